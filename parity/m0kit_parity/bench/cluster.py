"""Several servers behind one nginx on this machine: how often a document is found read, and what that is worth.

Owns the workload, starting and ending the servers and nginx, and counting. Each server has one thread and a cache of
its own; a client names the set of documents that it asks about in X-Document-Key.

    for passed in cluster(Path("m0-int8"), Plan()): …
"""

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from m0kit.errors import M0kitError
from m0kit_parity.bench.workloads import prompts_of, text_of
from m0kit_parity.drawing.table import Rows

HEADER: Final = "X-Document-Key"
_START_S: Final = 120.0  # far more than a small artifact takes
_WAYS: Final = {"by document": f"hash $http_{HEADER.lower().replace('-', '_')} consistent;", "in turn": ""}


@dataclass(frozen=True)
class Plan:
    """The work: each pass asks once for every set, in another order, with another query."""

    servers: int = 3
    sets: int = 36
    documents: int = 8  # of a set
    tokens: int = 200  # of a document
    passes: int = 4
    clients: int = 6  # that ask at a time
    room: float = 0.5  # of a server's cache: how much of all that is kept of all documents


@dataclass(frozen=True, slots=True)
class Pass:
    """Once through all sets."""

    way: str
    servers: int
    number: int
    documents: int
    cached: int
    failed: int  # requests without a whole answer
    seconds: float

    @property
    def hits(self) -> float:
        """Of documents that were answered for."""
        return self.cached / max(1, self.documents)


def cluster(artifact: Path, plan: Plan) -> Iterator[Pass]:
    """Passes with one server that has room for all, then with several by document and in turn, then with one fewer.

    Raises M0kitError where nginx or the server's packages are not here, or a server does not start.
    """
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if nginx is None:
        raise M0kitError("nginx is not installed, which stands before the servers. Install it as the system does.")
    prompts = prompts_of(artifact)
    sets = [
        [text_of(prompts, plan.tokens, seed=1 + which * plan.documents + i) for i in range(plan.documents)]
        for which in range(plan.sets)
    ]
    with tempfile.TemporaryDirectory(prefix="m0kit-cluster-") as scratch:
        with _Server(artifact, "8G") as one:
            alone = replace(plan, servers=1)
            yield from (_ask(one.port, sets, alone, "one server", number) for number in range(plan.passes))
            room = int(one.cache_bytes() * plan.room)
        for way, line in _WAYS.items():
            with contextlib.ExitStack() as stack:
                servers = [stack.enter_context(_Server(artifact, str(room))) for _ in range(plan.servers)]
                port = stack.enter_context(_proxy(nginx, Path(scratch), line, [server.port for server in servers]))
                yield from (_ask(port, sets, plan, way, number) for number in range(plan.passes))
                servers[0].stop()
                fewer = replace(plan, servers=plan.servers - 1)
                for number in range(plan.passes, plan.passes + 2):
                    yield _ask(port, sets, fewer, way, number)


def cluster_table(passes: Sequence[Pass]) -> Rows:
    """One row a pass; speeds against those of one server with all in its cache."""
    base = [each for each in passes if each.way == "one server"][-1]
    rows = [("requests", "servers", "pass", "found read", "requests failed", "speed")]
    for each in passes:
        speed = (each.documents / each.seconds) / (base.documents / base.seconds)
        rows.append((
            each.way, str(each.servers), str(each.number + 1), f"{each.hits:.0%}", str(each.failed), f"{speed:.2f}",
        ))  # fmt: skip
    return rows


class _Server:
    """`m0kit serve` on one thread, in a process of its own, until the block ends."""

    def __init__(self, artifact: Path, cache_bytes: str) -> None:
        words = ["serve", str(artifact), "--port", "0", "--threads", "1", "--cache-bytes", cache_bytes]
        words += ["--log-format", "json", "--log-level", "info", "--no-page", "--allowed-host", "m0kit"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("M0KIT_SERVE")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "m0kit", *words], stderr=subprocess.PIPE, env=environment, text=True
        )
        self._reader: threading.Thread | None = None
        self.port = 0

    def __enter__(self) -> "_Server":
        killer = threading.Timer(_START_S, self._process.kill)
        killer.start()
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.startswith("{") and (told := json.loads(line)).get("event") == "ready":
                self.port = int(told["address"].rpartition(":")[2])
                break
        killer.cancel()
        if not self.port:
            self.stop()
            raise M0kitError("a server did not start. Try `m0kit serve` with the artifact, which says why.")
        self._reader = threading.Thread(target=self._process.stderr.read, daemon=True)  # so that the pipe never fills
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As an operator does."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        if self._reader is not None:
            self._reader.join()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def cache_bytes(self) -> float:
        """What its cache holds of documents."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return float(next(line for line in lines if line.startswith('m0kit_cache_bytes{cache="prefix"}')).split()[-1])


@contextlib.contextmanager
def _proxy(nginx: str, folder: Path, way: str, ports: Sequence[int]) -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    servers = " ".join(f"server 127.0.0.1:{each} max_fails=1 fail_timeout=60s;" for each in ports)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.getuid() == 0 else ""
    conf = folder / "nginx.conf"
    conf.write_text(
        f"worker_processes 1; pid {folder}/pid; {user} events {{ worker_connections 256; }} "
        f"http {{ {temporary} access_log off; upstream m0kit {{ {way} {servers} keepalive 16; }} "
        f"server {{ listen 127.0.0.1:{port}; client_max_body_size 64m; location / {{ proxy_pass http://m0kit; "
        'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; '
        "proxy_next_upstream error http_503 non_idempotent; } } }\n"
    )
    command = [nginx, "-p", str(folder), "-e", str(folder / "errors"), "-c", str(conf), "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise M0kitError("nginx did not start.")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


def _ask(port: int, sets: Sequence[Sequence[str]], plan: Plan, way: str, number: int) -> Pass:
    """Every set once."""
    order = list(range(len(sets)))
    random.Random(number).shuffle(order)
    begun = time.perf_counter()
    with ThreadPoolExecutor(plan.clients) as pool:
        found = list(pool.map(lambda which: _request(port, which, sets[which], number), order))
    seconds = time.perf_counter() - begun
    answered = [cached for each in found if each is not None for cached in each]
    return Pass(way, plan.servers, number, len(answered), sum(answered), found.count(None), seconds)


def _request(port: int, which: int, documents: Sequence[str], number: int) -> list[bool] | None:
    """For each document whether it had been read; None without a whole answer."""
    body = json.dumps({"query": f"query {number} on set {which}", "documents": documents})
    headers = {"Content-Type": "application/json", "Accept": "application/x-ndjson", HEADER: f"set-{which}"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_START_S)) as connection:
        try:
            connection.request("POST", "/v1/rerank", body, headers)
            answer = connection.getresponse()
            lines: list[dict[str, Any]] = [json.loads(line) for line in answer.read().splitlines()]
        except (OSError, ValueError, http.client.HTTPException):
            return None
    found = [bool(line["cached"]) for line in lines if "cached" in line]
    return found if answer.status == 200 and len(found) == len(documents) else None
