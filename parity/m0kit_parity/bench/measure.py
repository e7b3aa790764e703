"""What scoring costs an artifact, in a process of its own: a peak never falls again, and caches stay apart.

Owns the child process and what it reports; which pairs are scored is the caller's business.

    measure_memory(Path("m0-int4"), [("slm markdown", Path("page.png"))], threads=2).peak
"""

import base64
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from m0kit.errors import M0kitError
from m0kit.terminal import ended
from m0kit_parity.bench.workloads import Pair
from m0kit_parity.child import PATIENCE_S


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process that scores one workload, in MiB. A peak counts mapped weights, `private` does not."""

    opened: float  # seconds until the artifact was open
    loaded: float
    peak: float
    private: float
    seconds: float  # of that one run, cold and watched: for orientation only


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ran to its end."""

    seconds: float
    peak: float  # MiB resident, mapped files among it
    output: str


# Between this process and the command: a process has at least the peak of the one that started it.
_STARTER: Final = """
import json, resource, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a child of ours ignores, and would hand down
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([done.returncode, seconds, peak, done.stdout, done.stderr]))
"""

# Only the runtime: no PyTorch, nothing of the process that measures. Pairs come on stdin as JSON.
CHILD: Final = """
import json, os, statistics, sys, threading, time
from pathlib import Path
result = os.dup(1)
os.dup2(2, 1)  # what a library prints is not the result
from m0kit.reranker import Reranker

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def content(value):
    image = value.get("image")
    return value if image is None or image.startswith("data:") else {"image": Path(image)}

job = json.load(sys.stdin)
pairs = [tuple(map(content, pair)) for pair in job["pairs"]]
start = time.perf_counter()
reranker = Reranker.load(job["artifact"], threads=job["threads"], max_pixels=job["max_pixels"], memory=job["mode"])
opened = time.perf_counter() - start

def run():
    start = time.perf_counter()
    reranker.score(pairs)
    return time.perf_counter() - start

def memory():
    loaded, anonymous, done = status("VmRSS"), [status("RssAnon")], False

    def watch():
        while not done:
            anonymous.append(status("RssAnon"))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        seconds = run()
    finally:
        done = True
        watcher.join()
    return {"opened": opened, "loaded": loaded, "peak": status("VmHWM"), "private": max(anonymous), "seconds": seconds}

def seconds():
    run()
    counted = [run()]
    while sum(counted) < 0.5:  # one run of a small model is a few clock ticks
        counted.append(run())
    return statistics.median(counted)

os.write(result, json.dumps({"memory": memory, "seconds": seconds}[job["measure"]](), allow_nan=False).encode())
"""


def run_m0kit(*words: object) -> Ran:
    """`m0kit …` in a process of its own, and what it took. Linux only. Raises M0kitError for a command that fails."""
    command = [sys.executable, "-m", "m0kit", *map(str, words)]
    done = subprocess.run([sys.executable, "-c", _STARTER, *command], stdout=subprocess.PIPE, text=True, check=True)
    code, seconds, peak, output, errors = json.loads(done.stdout)
    if code:
        reason = (errors.strip().splitlines() or ["it said nothing"])[-1]
        raise M0kitError(f"m0kit {words[0]}: {ended(code) if code < 0 else f'exit code {code}'}: {reason}")
    return Ran(seconds, peak, output)


def measure_memory(
    artifact: Path, pairs: Sequence[Pair], threads: int, max_pixels: int | None = None, mode: str = "fast"
) -> Memory:
    """Memory of a fresh process that scores `pairs` once. Linux only: it reads /proc. Raises M0kitError.

    `mode` is the `memory` of `Reranker.load`.
    """
    return Memory(**_measure("memory", artifact, pairs, threads, max_pixels, mode))


def measure_seconds(artifact: Path, pairs: Sequence[Pair], threads: int, max_pixels: int | None = None) -> float:
    """Seconds to score `pairs` in a fresh process, after one run that does not count. Raises M0kitError."""
    return float(_measure("seconds", artifact, pairs, threads, max_pixels, "fast"))


def _measure(what: str, artifact: Path, pairs: Sequence[Pair], threads: int, max_pixels: int | None, mode: str) -> Any:
    job: dict[str, Any] = {"measure": what, "artifact": str(artifact), "threads": threads, "max_pixels": max_pixels}
    job["mode"] = mode
    job["pairs"] = [[for_child(side) for side in pair] for pair in pairs]
    child = [sys.executable, "-c", CHILD]
    try:
        done = subprocess.run(
            child, input=json.dumps(job), capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise M0kitError(
            f"{artifact}: the process measuring {what} said nothing for {PATIENCE_S:g} seconds, so it was stopped."
        ) from None
    if done.returncode < 0:
        raise M0kitError(
            f"{artifact}: the process measuring {what} {ended(done.returncode)}. "
            "If memory ran out, free some or leave this artifact out."
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise M0kitError(f"{artifact}: the process measuring {what} failed: {reason}")
    return json.loads(done.stdout)


def for_child(value: Any) -> dict[str, str]:
    """One side of a pair as it travels in JSON."""
    if isinstance(value, str):
        return {"text": value}
    image = value["image"] if isinstance(value, Mapping) and "image" in value else value
    if isinstance(image, bytes):
        return {"image": f"data:image/png;base64,{base64.b64encode(image).decode()}"}
    if isinstance(image, Path):
        return {"image": str(image)}
    return dict(value)  # text said explicitly, or a data URI
