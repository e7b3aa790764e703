"""Processes of a server, real ones: how they start, end, are replaced, and are one server to who asks."""

import contextlib
import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")

from tests.runtime.server.toy import Process, UnixConnection, halted, running, state, toys, until

from m0kit.scoring.engine import GraphEngine
from m0kit.server.service import Service
from m0kit.server.settings import ModelSettings, Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and halts processes")

BOTH = pytest.mark.parametrize("workers", [1, 2])
KEY, LATER = "first-key-of-the-tests", "second-key-of-the-tests"


@contextlib.contextmanager
def waiting(server: Process, folder: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection whose request is being worked on until there is a file `go`."""
    connection = server.connect()
    connection.request("GET", "/wait")
    until((folder / "waiting").exists)
    yield connection
    connection.close()


def _connects(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


# --- the end -------------------------------------------------------------------------------------------------


@BOTH
def test_sigterm_answers_what_was_accepted_refuses_what_comes_and_ends_with_0(workers: int, tmp_path: Path) -> None:
    """And systemd is told both when it is ready and when it stops, not when it has stopped."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(60)
        with toys(tmp_path, workers, {"NOTIFY_SOCKET": str(tmp_path / "notify")}) as server:
            assert told.recv(100) == b"READY=1"
            port = server.port
            with waiting(server, tmp_path) as connection:
                server.send(signal.SIGTERM)
                assert told.recv(100) == b"STOPPING=1"
                until(lambda: not _connects(port))
                assert server.process.poll() is None
                (tmp_path / "go").touch()
                response = connection.getresponse()
                assert (response.status, response.getheader("connection")) == (200, "close")
                response.read()
            assert server.end() == 0
        told.setblocking(False)
        with pytest.raises(BlockingIOError):  # nothing more, of any worker
            told.recv(100)


@BOTH
def test_what_is_not_done_in_time_is_told_so_and_the_exit_code_is_143(workers: int, tmp_path: Path) -> None:
    with toys(tmp_path, workers, shutdown_timeout_s=0.2) as server, waiting(server, tmp_path) as connection:
        server.send(signal.SIGTERM)
        response = connection.getresponse()
        assert response.status == 503
        assert b'"STOPPING"' in response.read()
        assert server.end() == 143
        server.find("requests are broken off")


@BOTH
def test_sigint_is_interrupted_and_a_second_one_waits_for_nobody(workers: int, tmp_path: Path) -> None:
    with toys(tmp_path, workers, shutdown_timeout_s=1000) as server, waiting(server, tmp_path) as connection:
        server.send(signal.SIGINT)
        if workers == 1:
            until(lambda: not _connects(server.port))
        else:
            server.find("stopping seconds=1000")
        assert server.process.poll() is None
        server.send(signal.SIGINT)
        assert server.end() == 130
        assert server.said[-1] == "interrupted"
        with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
            assert connection.getresponse().status == 503


def test_a_worker_that_does_not_end_in_time_is_killed(tmp_path: Path) -> None:
    with toys(tmp_path, 2, shutdown_timeout_s=0.1) as server:
        server.find("serving at")
        with halted([server.pid(1)]):
            server.send(signal.SIGTERM)
            server.find("worker did not finish in time and is killed worker=1")
            assert server.end() == 143


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    with toys(tmp_path, 2) as server:
        pids = [server.pid(0), server.pid(1)]
        assert server.ask("/who").json["pid"] in pids
        server.process.kill()
        until(lambda: all(state(pid) in ("", "Z") for pid in pids))


# --- the beginning -------------------------------------------------------------------------------------------


@BOTH
def test_what_will_not_start_is_said_once_and_not_tried_again(workers: int, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with toys(tmp_path, workers) as server:
        assert server.end() == 1
    assert [line for line in server.said if "Mend it" in line] == ["error: the toy is broken. Mend it."]
    assert sum("worker started" in line for line in server.said) == (0 if workers == 1 else workers)
    assert not any("serving at" in line for line in server.said)


def test_what_will_not_start_is_a_line_of_the_log_where_that_is_json(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with toys(tmp_path, 2, log_format="json") as server:
        assert server.end() == 1
    assert all(line.startswith('{"time": ') for line in server.said)
    assert sum('"event": "the toy is broken. Mend it."' in line for line in server.said) == 1


def test_a_worker_that_is_killed_at_each_start_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "crash").touch()
    with toys(tmp_path, 2) as server:
        assert server.end() == 1
    server.find("worker ended 3 times soon after its start; giving up")
    assert 3 <= sum("worker started" in line for line in server.said) <= 6


def test_a_socket_in_a_file_is_served_and_cleared_away(tmp_path: Path) -> None:
    place = tmp_path / "m0kit.sock"
    with toys(tmp_path, 2, uds=str(place)) as server:
        server.find(f"serving at unix:{place}")
        with contextlib.closing(UnixConnection(place)) as connection:
            assert server.ask("/who", on=connection).status == 200
        server.send(signal.SIGTERM)
        assert server.end() == 0
    assert not place.exists()


# --- workers -------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_while_the_other_answers_all_who_come(tmp_path: Path) -> None:
    with toys(tmp_path, 2) as server:
        first, other = server.pid(1), server.pid(0)
        assert server.ask("/who", worker=1).json == {"worker": 1, "pid": first}
        (tmp_path / "crash").touch()  # so that it stays away until the other was asked enough
        os.kill(first, signal.SIGKILL)
        server.find(r"worker was ended by SIGKILL worker=1")
        for _ in range(20):
            assert server.ask("/who").json == {"worker": 0, "pid": other}
        (tmp_path / "crash").unlink()
        server.find(r"worker ready worker=1", times=2)
        assert server.ask("/who", worker=1).json["worker"] == 1
        assert server.pid(1) != first
        assert server.pid(0) == other
        server.send(signal.SIGTERM)
        assert server.end() == 0


def test_a_lost_device_ends_its_process_for_another_to_begin(tmp_path: Path) -> None:
    with toys(tmp_path) as server:
        server.ask("/lose")
        assert server.end() == 75
    with toys(tmp_path, 2) as server:
        assert server.ask("/lose", worker=0).json["worker"] == 0
        server.find(r"worker ended with exit code 75 worker=0")
        server.find(r"worker ready worker=0", times=2)
        assert server.ask("/who", worker=0).json["worker"] == 0
        server.send(signal.SIGTERM)
        assert server.end() == 0


# --- the command, on an artifact -----------------------------------------------------------------------------


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "m0kit", "serve", *map(str, args), "--threads", "1"]


def certificate(folder: Path) -> tuple[Path, Path]:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("makes a certificate with the openssl program, which is not here")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    made = [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"tests: {KEY}\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes share what is theirs."""
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def server(committed: Path, keys: Path, private: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Two workers with all that there is: an index, keys, TLS, a path under which a proxy would serve it."""
    folder = tmp_path_factory.mktemp("server")
    cert, key = certificate(folder)
    options = ["--workers", 2, "--port", 0, "--api-key-file", keys, "--root-path", "/m0"]
    options += ["--tls-cert", cert, "--tls-key", key, "--index", folder / "library"]
    with running(command(f"m0,alias={committed / 'fp32'}", *options), TMPDIR=str(private)) as process:
        process.tls = ssl.create_default_context(cafile=cert)
        yield process
        process.send(signal.SIGTERM)
        assert process.end() == 0


@pytest.fixture
def ask(server: Process) -> Callable[..., Any]:
    def ask(path: str, method: str = "GET", body: Any = None, key: str = KEY, **options: Any) -> Any:
        return server.ask(path, method, body, authorization=f"Bearer {key}", **options)

    return ask


def test_it_says_where_it_is_what_it_serves_and_who_may_ask(server: Process, keys: Path) -> None:
    server.find(r"^serving at https://127\.0\.0\.1:\d+, 2 workers; Ctrl-C stops it$")
    server.find(r"^  model  m0, alias: fp32 on cpu, index .*library$")
    server.find(rf"^  keys   those of {keys}$")
    server.find(r"^  page   https://127\.0\.0\.1:\d+/$")


def test_documents_go_in_through_either_worker_and_both_know_them_at_once(ask: Callable[..., Any]) -> None:
    for worker in (0, 1):
        name = f"through-{worker}"
        put = ask(f"/v1/documents/{name}", "PUT", {"text": f"a document that came {name}"}, worker=worker)
        assert (put.status, put.json["status"]) == (200, "read"), put.body
        for other in (0, 1):
            assert ask(f"/v1/documents/{name}", worker=other).json["text"] == f"a document that came {name}"
            ranked = ask("/v1/rerank", "POST", {"query": "q", "documents": [{"id": name}]}, worker=other)
            assert ranked.status == 200, ranked.body
    added = ask("/v1/documents", "POST", {"documents": [{"id": "b-1", "text": "x"}, {"id": "b-2"}]}, worker=1)
    assert (added.json["read"], added.json["failed"]) == (1, 1)
    assert ask("/v1/documents/b-1", "DELETE", worker=1).json == {"id": "b-1", "deleted": True}
    gone = ask("/v1/documents/b-1", "DELETE", worker=1)
    assert (gone.status, gone.json["code"]) == (404, "DOCUMENT_NOT_FOUND")
    assert gone.json["request_id"] == gone.headers["x-request-id"]
    assert len(gone.headers.get_all("x-request-id")) == 1
    assert ask("/v1/documents/b-1", worker=0).status == 404


def test_each_worker_tells_what_all_have_counted(ask: Callable[..., Any]) -> None:
    def counted(worker: int) -> dict[str, float]:
        lines = ask("/metrics", worker=worker).body.decode().splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}

    before = counted(0)
    for worker, times in ((0, 2), (1, 3)):
        for _ in range(times):
            ask("/v1/rerank", "POST", {"query": "q", "documents": ["x", "y"]}, worker=worker)
    ask("/v1/documents/counted", "PUT", {"text": "once"}, worker=1)  # passed on, and one request all the same
    for worker in (0, 1):
        after = counted(worker)

        def more(name: str, now: dict[str, float] = after) -> float:
            return now[name] - before.get(name, 0)

        assert more('m0kit_requests_total{route="/v1/rerank",status="200"}') == 5
        assert more('m0kit_request_duration_seconds_count{route="/v1/rerank"}') == 5
        assert more('m0kit_documents_total{kind="text"}') == 11
        assert more('m0kit_requests_total{route="/v1/documents/{id:path}",status="200"}') == 1
        assert after["m0kit_queue_requests"] == 0
        models = [name for name in after if name.startswith("m0kit_model_info")]
        assert [after[name] for name in models] == [1]


def test_sighup_takes_new_keys_and_a_broken_file_leaves_the_old(
    server: Process, ask: Callable[..., Any], keys: Path
) -> None:
    told = "keys were read again"

    def both(key: str) -> list[int]:
        return [ask("/info", key=key, worker=worker).status for worker in (0, 1)]

    assert (both(KEY), both(LATER)) == ([200, 200], [401, 401])
    keys.write_text(f"tests: {KEY}\nlater: {LATER}\n")
    server.send(signal.SIGHUP)
    server.find(told, times=2)
    assert (both(KEY), both(LATER)) == ([200, 200], [200, 200])
    keys.write_text("short\n")
    server.send(signal.SIGHUP)
    assert "short" not in server.find("the keys stay as they were: .*", times=2)[0]
    assert both(LATER) == [200, 200]
    keys.write_text(f"tests: {KEY}\n")
    server.send(signal.SIGHUP)
    server.find(told, times=4)
    assert both(LATER) == [401, 401]


def test_a_writer_that_is_killed_loses_nothing_that_it_acknowledged(
    server: Process, ask: Callable[..., Any], private: Path
) -> None:
    """One addition is in its hands, others come before and after: each is there, or its client was told."""
    writer = server.pid(0)
    told: dict[str, int] = {}

    def put(name: str, on: http.client.HTTPConnection) -> None:
        told[name] = ask(f"/v1/documents/{name}", "PUT", {"text": f"text of {name}"}, on=on).status

    with contextlib.closing(server.connect(1)) as first, contextlib.closing(server.connect(1)) as second:
        for number in range(5):
            put(f"before-{number}", first)
        there = _num_at_writer(private)
        with halted([writer]):
            thread = threading.Thread(target=put, args=("during", first))
            thread.start()
            until(lambda: _num_at_writer(private) > there)
            os.kill(writer, signal.SIGKILL)
            thread.join()
        assert told["during"] == 503
        server.find(r"worker was ended by SIGKILL worker=0")
        failed = ask("/v1/documents/after", "PUT", {"text": "text of after"}, on=second)
        assert failed.status in (200, 503)
        if failed.status == 503:
            assert failed.json["code"] in ("NOT_READY", "INDEX_FAILED")
            assert int(failed.headers["retry-after"]) >= 1
        assert ask("/v1/documents/before-0", on=second).status == 200  # meanwhile it is read
        server.find(r"worker ready worker=0", times=2)
        put("again", second)
    assert told["again"] == 200
    for name, status in told.items():
        if status == 200:
            for worker in (0, 1):
                assert ask(f"/v1/documents/{name}", worker=worker).json["text"] == f"text of {name}"


def _num_at_writer(folder: Path) -> int:
    """Ends of connections to the writer's socket, accepted or not, and the socket itself."""
    paths = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    return sum(path.startswith(f"{folder}/") and path.endswith("/writer") for path in paths)


def test_an_artifact_that_is_broken_is_said_once(committed: Path, tmp_path: Path) -> None:
    shutil.copytree(committed / "fp32", tmp_path / "m0")
    data = tmp_path / "m0" / "decoder.onnx.data"
    os.truncate(data, data.stat().st_size // 2)
    with running(command(tmp_path / "m0", "--port", 0, "--workers", 2)) as process:
        assert process.end() == 1
    (error,) = [line for line in process.said if "decoder.onnx.data" in line]
    assert error.startswith(f"error: {data}: ")
    assert sum("worker started" in line for line in process.said) == 2


def test_warm_scores_the_known_answers_though_they_were_right_before(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0
    begin = GraphEngine.begin

    def counting(self: GraphEngine, *args: Any) -> Any:
        nonlocal runs
        runs += 1
        return begin(self, *args)

    monkeypatch.setattr(GraphEngine, "begin", counting)

    def runs_until_ready(warm: bool) -> int:
        nonlocal runs
        runs = 0
        service = Service(Settings((ModelSettings(str(committed / "fp32"), threads=1),), warm=warm), writes=True)
        service.start()
        until(lambda: service.problem is None)
        service.stop()
        service.desk.close()
        for lane in set(service.lanes.values()):
            lane.close()
        return runs

    first = runs_until_ready(False)
    assert runs_until_ready(False) == 0
    assert runs_until_ready(True) >= max(first, 2)  # a text, an image
