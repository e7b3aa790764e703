"""nginx.conf, run: who is asked, what is handed on, and what is said where nobody answers."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from m0kit.server.settings import MEBI, ModelSettings, Settings

CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
PATIENCE_S = 20.0  # far more than anything here takes
KEYS = [f"document-{i}" for i in range(40)]


class Upstream(ThreadingHTTPServer):
    """Stands for a server: says who it is, or what it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], int]] = []  # path, headers, bytes of the body
        self.status = 200
        self.go_on = threading.Event()
        self.was_told = True  # to go on, by a client that had the first line
        self.connections: list[socket.socket] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def stop(self) -> None:
        """As if it were killed: with the connections that nginx keeps."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        upstream = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        upstream.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, len(body)))
        self.send_response(upstream.status)
        if upstream.status in (429, 503):
            self.send_header("Retry-After", "7")
        if self.path == "/lines":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"9\r\nthe first\r\n")
            upstream.was_told = upstream.go_on.wait(PATIENCE_S)
            self.wfile.write(b"8\r\nthe last\r\n0\r\n\r\n")
            return
        said = json.dumps({"port": upstream.port}).encode()
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_PUT(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Proxy:
    """nginx with three servers behind it."""

    port: int
    plain_port: int
    upstreams: list[Upstream] = field(default_factory=list)

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=PATIENCE_S, context=context)

    def ask(
        self, path: str = "/v1/rerank", method: str = "POST", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        with contextlib.closing(self.connect()) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, b"{}", {"Host": "rerank.example", **named})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def asked(self, **headers: str) -> int:
        """The port of who answers."""
        status, _, body = self.ask(**headers)
        assert status == 200
        return int(json.loads(body)["port"])

    def num_seen(self) -> int:
        return sum(len(upstream.seen) for upstream in self.upstreams)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def adapted(folder: Path, ports: list[int], upstreams: list[Upstream]) -> Path:
    """The file with places and ports of this test, and nothing else changed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("this machine has no openssl to make a certificate")
    certificate = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=rerank.example",
    ]
    command = [openssl, *certificate, "-keyout", str(folder / "key"), "-out", str(folder / "crt")]
    subprocess.run(command, check=True, capture_output=True)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    changes = {
        "pid /run/nginx.pid;": f"pid {folder}/nginx.pid;" + (" user root;" if os.getuid() == 0 else ""),
        "worker_processes auto;": "worker_processes 1;",
        "worker_connections 4096;": "worker_connections 256;",
        "http {": f"http {{\n{temporary}",
        "listen 80;": f"listen 127.0.0.1:{ports[0]};",
        "listen 443 ssl": f"listen 127.0.0.1:{ports[1]} ssl",
        "/etc/nginx/tls/rerank.crt": f"{folder}/crt",
        "/etc/nginx/tls/rerank.key": f"{folder}/key",
        "access_log /dev/stdout": f"access_log {folder}/log",
    }
    changes |= {f"127.0.0.1:{8081 + i}": f"127.0.0.1:{each.port}" for i, each in enumerate(upstreams)}
    text = CONF.read_text("utf-8")
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text, "utf-8")
    return folder / "nginx.conf"


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    if NGINX is None:
        pytest.skip("nginx is not installed")
    upstreams = [Upstream() for _ in range(3)]
    ports = free_ports(2)
    conf = adapted(tmp_path, ports, upstreams)
    try:
        with running(tmp_path, conf, ports[1]):
            yield Proxy(ports[1], ports[0], upstreams)
    finally:
        for upstream in upstreams:
            with contextlib.suppress(OSError):
                upstream.stop()


@contextlib.contextmanager
def running(folder: Path, conf: Path, port: int) -> Iterator[None]:
    assert NGINX is not None
    words = [NGINX, "-p", str(folder), "-e", str(folder / "errors"), "-c", str(conf)]
    checked = subprocess.run([*words, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen([*words, "-g", "daemon off;"])
    try:
        end = time.monotonic() + PATIENCE_S
        while True:
            assert process.poll() is None, (folder / "errors").read_text()
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < end
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_a_documents_key_leads_to_one_server_and_keys_to_all_of_them(proxy: Proxy) -> None:
    first = {key: proxy.asked(X_Document_Key=key) for key in KEYS}
    assert {key: proxy.asked(X_Document_Key=key) for key in reversed(KEYS)} == first
    assert set(first.values()) == {upstream.port for upstream in proxy.upstreams}
    assert {proxy.asked(X_Document_Key=KEYS[0], Authorization=f"Bearer {key}") for key in KEYS[:8]} == {first[KEYS[0]]}


def test_without_one_the_tenant_counts_then_the_key_then_the_address(proxy: Proxy) -> None:
    assert len({proxy.asked(X_Tenant=key) for key in KEYS}) == 3
    assert len({proxy.asked(X_Tenant="one", Authorization=key) for key in KEYS}) == 1
    assert len({proxy.asked(Authorization=f"Bearer {key}") for key in KEYS}) == 3
    assert len({proxy.asked() for _ in range(10)}) == 1


def test_of_a_server_that_is_away_the_share_alone_moves(proxy: Proxy) -> None:
    before = {key: proxy.asked(X_Document_Key=key) for key in KEYS}
    gone = proxy.upstreams[0]
    gone.stop()
    after = {key: proxy.asked(X_Document_Key=key) for key in KEYS}
    assert gone.port in before.values()
    assert gone.port not in after.values()
    assert all(after[key] == port for key, port in before.items() if port != gone.port)


def test_a_server_that_is_added_takes_keys_and_moves_none_between_the_others(proxy: Proxy, tmp_path: Path) -> None:
    with_all = {key: proxy.asked(X_Document_Key=key) for key in KEYS}
    new = proxy.upstreams[0].port
    before = tmp_path / "before"
    before.mkdir()
    (port,) = free_ports(1)
    text = (tmp_path / "nginx.conf").read_text("utf-8").replace(f"127.0.0.1:{proxy.port} ssl", f"127.0.0.1:{port} ssl")
    text = text.replace(f"127.0.0.1:{proxy.plain_port};", f"127.0.0.1:{free_ports(1)[0]};")
    text = re.sub(rf"server 127.0.0.1:{new} .*", "", text).replace(f"{tmp_path}/nginx.pid", f"{before}/nginx.pid")
    (before / "nginx.conf").write_text(text, "utf-8")
    with running(before, before / "nginx.conf", port):
        two = Proxy(port, 0, proxy.upstreams)
        with_two = {key: two.asked(X_Document_Key=key) for key in KEYS}
    assert new in with_all.values()
    assert new not in with_two.values()
    assert all(with_two[key] == port for key, port in with_all.items() if port != new)


def test_a_line_is_there_before_the_next_one_is_made(proxy: Proxy) -> None:
    with contextlib.closing(proxy.connect()) as connection:
        connection.request("POST", "/lines", b"{}", {"Host": "rerank.example"})
        answer = connection.getresponse()
        assert answer.read1() == b"the first"
        for upstream in proxy.upstreams:
            upstream.go_on.set()
        assert answer.read() == b"the last"
    assert all(upstream.was_told for upstream in proxy.upstreams)


def test_a_server_that_is_busy_says_when_to_come_again_and_no_other_is_asked(proxy: Proxy) -> None:
    for upstream in proxy.upstreams:
        upstream.status = 429
    status, headers, body = proxy.ask(X_Document_Key="a")
    assert (status, headers["Retry-After"], b"port" in body, proxy.num_seen()) == (429, "7", True, 1)


def test_a_server_that_is_not_ready_is_stood_in_for(proxy: Proxy) -> None:
    for upstream in proxy.upstreams[:2]:
        upstream.status = 503
    proxy.upstreams[2].status = 200
    answers = [proxy.ask(X_Document_Key=key)[0] for key in KEYS]
    assert answers.count(200) >= len(KEYS) - 4  # two tries at each of the two, until they are left out


def test_what_is_written_is_never_sent_to_a_second_server(proxy: Proxy) -> None:
    for upstream in proxy.upstreams:
        upstream.status = 503
    status, headers, _ = proxy.ask("/v1/documents/a", "PUT", X_Document_Key="a")
    assert (status, headers["Retry-After"], proxy.num_seen()) == (503, "7", 1)


def test_where_nobody_answers_a_client_gets_a_sentence_and_a_time(proxy: Proxy) -> None:
    for upstream in proxy.upstreams:
        upstream.stop()
    status, headers, body = proxy.ask()
    said = json.loads(body)
    assert (status, headers["Retry-After"], said["code"]) == (503, "2", "NOT_READY")
    assert said["detail"] == said["message"] == said["error"]["message"]


def test_a_body_over_the_limit_is_refused_by_its_length(proxy: Proxy) -> None:
    length = Settings((ModelSettings("m"),)).max_body_bytes + 1
    with contextlib.closing(proxy.connect()) as connection:
        connection.putrequest("POST", "/v1/rerank", skip_host=True)
        for name, value in (("Host", "rerank.example"), ("Content-Length", str(length))):
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["code"], proxy.num_seen()) == (413, "BODY_TOO_LARGE", 0)


def test_the_name_and_the_key_are_handed_on_and_tales_of_other_proxies_are_not(proxy: Proxy) -> None:
    proxy.ask(X_Forwarded_For="10.0.0.1", Authorization="Bearer k", X_Request_Id="mine")
    ((_, headers, _),) = [each for upstream in proxy.upstreams for each in upstream.seen]
    assert (headers["host"], headers["authorization"], headers["x-request-id"]) == (
        "rerank.example",
        "Bearer k",
        "mine",
    )
    assert "x-forwarded-for" not in headers


def test_numbers_are_not_for_clients_and_plain_http_leads_to_tls(proxy: Proxy) -> None:
    assert proxy.ask("/metrics", "GET")[0] == 404
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.plain_port, timeout=PATIENCE_S)) as plain:
        plain.request("POST", "/v1/rerank?a=b", b"{}", {"Host": "rerank.example"})
        answer = plain.getresponse()
        assert (answer.status, answer.headers["Location"]) == (308, "https://rerank.example/v1/rerank?a=b")
    assert proxy.num_seen() == 0


def test_the_log_has_no_key_and_no_path(proxy: Proxy, tmp_path: Path) -> None:
    proxy.ask("/v1/documents/secret-id", "PUT", Authorization="Bearer secret-key", X_Document_Key="secret-document")
    proxy.ask("/metrics", "GET")  # so that the line before is there
    (line, *_) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["status"] == 200
    assert "secret" not in line


def value(name: str) -> str:
    return re.findall(rf"^\s*{name} ([^;]+);", CONF.read_text("utf-8"), re.MULTILINE)[-1]


def test_limits_are_those_of_the_server() -> None:
    server = Settings((ModelSettings("m"),))
    assert value("client_max_body_size") == f"{server.max_body_bytes // MEBI}m"
    assert f"{server.max_body_bytes // MEBI} MiB" in CONF.read_text("utf-8")
    assert int(value("proxy_read_timeout").rstrip("s")) > server.request_timeout_s
    assert int(value("keepalive_timeout").rstrip("s")) < server.keep_alive_s
