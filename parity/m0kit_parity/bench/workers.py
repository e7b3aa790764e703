"""What several workers of `m0kit serve` take of memory together. Linux alone: it reads /proc.

    python -m m0kit_parity.bench.workers ARTIFACT [--memory low]      # one, two and three workers

PSS counts a page that several processes map in parts, so the sum over processes is what they take of the machine. Each
worker scores a text and an image first: the others are halted meanwhile.
"""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from m0kit.terminal import show

_SIDE: Final = 448  # pixels: 256 tokens
_OPTIONS: Final = ("--port", "0", "--threads", "1", "--cache-bytes", "64M", "--no-page")
_PATIENCE_S: Final = 600.0
_LOOK_S: Final = 0.01


@dataclass(frozen=True)
class Memory:
    """MiB of a server: of all its processes, and of its first worker what is its own and what others may share."""

    total: float
    own: float
    shared: float
    ready_s: float


def measure(artifact: Path, workers: int, *options: str) -> Memory:
    """Start a server, have each worker score, and look. Raises RuntimeError where it does not start or answer."""
    command = [sys.executable, "-m", "m0kit", "serve", str(artifact), "--workers", str(workers), *_OPTIONS, *options]
    begun = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            pids, port = _started(server)
            ready_s = time.monotonic() - begun
            for pid in pids:
                with _halted([other for other in pids if other != pid]):
                    _score(port)
            found = [_rollup(pid) for pid in {server.pid, *pids}]
            first = _rollup(pids[0])
            shared = first["Shared_Clean"] + first["Private_Clean"]  # the second where there is no other
            return Memory(sum(each["Pss"] for each in found), first["Private_Dirty"], shared, ready_s)
        finally:
            server.terminate()


def _started(server: "subprocess.Popen[str]") -> tuple[list[int], int]:
    """Workers and the port, once all are ready."""
    pids: list[int] = []
    said = ""
    assert server.stderr is not None
    for line in server.stderr:
        said += line
        if found := re.search(r"worker started worker=\d+ pid=(\d+)", line):
            pids.append(int(found[1]))
        if found := re.search(r"serving at http://127\.0\.0\.1:(\d+)", line):
            return pids or [server.pid], int(found[1])
    raise RuntimeError(f"the server did not start:\n{said}")


def _score(port: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), "PNG")
    image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    body = json.dumps({"query": "markdown", "documents": ["some text " * 50, {"image": image}]})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)) as connection:
        connection.request("POST", "/v1/rerank", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {response.read()!r:.500}")
        response.read()


@contextlib.contextmanager
def _halted(pids: Sequence[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        while any(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T" for pid in pids):
            time.sleep(_LOOK_S)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _rollup(pid: int) -> dict[str, float]:
    """MiB by the kernel's names."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(kib) / 1024 for name, kib, *_ in map(str.split, lines)}


def main(artifact: str, *options: str) -> None:
    """Print a line for each number of workers."""
    for workers in (1, 2, 3):
        found = measure(Path(artifact), workers, *options)
        show(
            f"{workers} workers: {found.total:.0f} MiB; of a worker {found.own:.0f} its own, {found.shared:.0f} pages "
            f"of files; ready in {found.ready_s:.1f} s"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
