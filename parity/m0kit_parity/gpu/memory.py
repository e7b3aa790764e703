"""Memory of the device as pairs grow, and of a process that may have 4 GB of it.

Owns the meter: what is in use on the whole card, asked of the driver every few milliseconds, less what was in use
before the process began. So nothing else may use the card meanwhile. Without a GPU it is the process's own memory.
"""

import ctypes
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from m0kit.errors import M0kitError
from m0kit_parity.bench.workloads import QUERY, Pair, prompts_of, text_of
from m0kit_parity.gpu.found import Found
from m0kit_parity.gpu.place import Place
from m0kit_parity.gpu.sides import Asked, open_m0kit
from m0kit_parity.gpu.speed import page
from m0kit_parity.proof.cases import draw_page

_LENGTHS: Final = (256, 1024, 4096, 10_240)
_4K: Final = (3840, 2160)
# Visual tokens of that page: all of a prompt's 10,240 tokens but those around it. Undiminished it has 10,579.
_4K_TOKENS: Final = 9900
_POOL: Final = 2 << 30
LIMIT: Final = 4 << 30
_MIB: Final = 1 << 20


class Meter:
    """The most that was in use since it was last asked, in bytes."""

    def __init__(self, used: Callable[[], int]) -> None:
        self._used, self._before = used, used()
        self._most, self._over = self._before, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over:
            self._most = max(self._most, self._used())
            time.sleep(0.004)

    def now(self) -> int:
        return self._used() - self._before

    def most(self) -> int:
        """Since the last call."""
        most = max(self._most, self._used()) - self._before
        self._most = self._used()
        return most

    def stop(self) -> None:
        self._over = True
        self._thread.join()


def used_bytes(device: str) -> Callable[[], int]:
    """What asks the driver how much of a card is in use. Raises M0kitError where it does not tell."""

    class Info(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    index = int(device.partition(":")[2] or 0)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise M0kitError("the driver's libnvidia-ml.so.1 is not there, so memory cannot be measured") from None
    handle, info = ctypes.c_void_p(), Info()

    def call(name: str, *arguments: Any) -> None:
        if code := getattr(nvml, name)(*arguments):
            raise M0kitError(f"{name} of the driver fails with code {code}, so memory cannot be measured")

    call("nvmlInit_v2")
    call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))

    def used() -> int:
        call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(info))
        return int(info.used)

    used()
    return used


@contextmanager
def metered(device: str) -> Iterator[Meter | None]:
    """A meter of a GPU; none without one."""
    if device == "cpu":
        yield None
        return
    meter = Meter(used_bytes(device))
    try:
        yield meter
    finally:
        meter.stop()


def open_measured(artifact: Path, device: str, options: dict[str, Any]) -> Asked:
    """Runs in its process: as `open_m0kit`, and "peak" tells the process's own most memory, in bytes."""
    ask = open_m0kit(artifact, device, options)

    def answer(what: str, *arguments: Any) -> dict[str, Any]:
        if what == "peak":
            return {"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        return ask(what, *arguments)

    return answer


def memory(place: Place) -> Found:
    """The most memory in use while pairs of growing length, and a 4K page, are scored one after the other."""
    artifact = place.artifact(place.size, "fp16")
    prompts = prompts_of(artifact)
    loads: dict[str, list[Pair]] = {}
    for n in _LENGTHS if place.on_gpu else (256, 512):
        # A query always has room for its 512 tokens: a full prompt needs a long one. Digits are a token each.
        query = "7" * 508 if n > _LENGTHS[-2] else QUERY
        loads[f"{n} tokens"] = [(query, text_of(prompts, n, query=query))]
    if place.on_gpu:
        loads["a page of 768 visual tokens"] = [(QUERY, page(1))]
        loads[f"a 4K page, {_4K_TOKENS} visual tokens"] = [(QUERY, draw_page(["a page"], _4K))]
    options = {**place.options, "max_pixels": _4K_TOKENS * 784, **({"pool_bytes": _POOL} if place.on_gpu else {})}
    rows = [["memory, one pair at a time", "MiB", "seconds"]]
    facts: dict[str, Any] = {"pool_bytes": _POOL, "peaks": {}}
    with (
        metered(place.device) as meter,
        place.process("m0kit fp16", partial(open_measured, artifact, place.device, options)) as ask,
    ):

        def told(what: str, seconds: float) -> None:
            most = meter.most() if meter else ask("peak")["peak"]
            facts["peaks"][what] = {"bytes": most, "seconds": seconds}
            rows.append([what, f"{most / _MIB:.0f}", f"{seconds:.3f}"])
            place.tell(f"{what}: {most / _MIB:.0f} MiB")

        told("opened", ask("opened")["seconds"])
        for name, pairs in loads.items():
            found = ask("score", pairs, 0)
            told(name, found["seconds"][0])
    return Found([rows], facts, notes=[f"of it {_POOL / _MIB:.0f} MiB pool"] if place.on_gpu else [])


def four(place: Place) -> Found:
    """Pages scored in 4 bits by a process that may have 4 GB of the card."""
    artifact = place.artifact(place.size, "int4")
    limited = {"gpu_bytes": LIMIT} if place.on_gpu else {}
    pairs = [(QUERY, page(seed, 768 if place.on_gpu else 12)) for seed in range(8)]
    with (
        metered(place.device) as meter,
        place.process(
            "m0kit int4 in 4 GB", partial(open_measured, artifact, place.device, {**place.options, **limited})
        ) as ask,
    ):
        found = ask("score", pairs, 1)
        most = meter.most() if meter else ask("peak")["peak"]
    rate = len(pairs) / found["seconds"][0]
    facts = {"limit": LIMIT, "peak": most, "pairs_per_s": rate, "logits": found["logits"]}
    rows = [["int4 in 4 GB", "MiB", "pairs/s"], [f"{len(pairs)} pages", f"{most / _MIB:.0f}", f"{rate:.1f}"]]
    wrong = [f"{most / _MIB:.0f} MiB were in use, {LIMIT / _MIB:.0f} are allowed"] if most > LIMIT else []
    return Found([rows], facts, wrong)
