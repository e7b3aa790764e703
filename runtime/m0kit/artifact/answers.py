"""Known answers: a few tiny pairs whose logits the exporter computed, scored here before anything else is.

Owns when they are scored and what a wrong one means. A kernel that is wrong on one kind of CPU in one range of
versions gives scores like any other; this is where it is found. What came out right is remembered for the artifact,
ONNX Runtime's version, CPU, device and form of the weights, so that it costs once (`m0kit.verified`).

    Trial(folder, manifest, Setting("1.32.0", "cpu", "fast"), "fp32").check("text", evaluate)
"""

import contextlib
import hashlib
import json
import math
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from m0kit import forks
from m0kit.artifact.manifest import KnownAnswer, Manifest
from m0kit.artifact.ports import cuda_type
from m0kit.errors import WrongAnswerError
from m0kit.verified import Memory

Kind = Literal["text", "image"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

# On a GPU graphs of a bf16 artifact round every value to 8 bits, where the CPU's compute in float32: right kernels took
# 0.8 of the tolerance on small. What is wrong altogether is off by twenty times as much.
_BF16: Final = 4

# What tells one kind of processor from another in /proc/cpuinfo, on x86 and on ARM.
_CPU_FIELDS: Final = (
    *("model name", "vendor_id", "cpu family", "model", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What computes, and where. `version` is None for an engine that is not ours, whose verdicts are not remembered."""

    version: str | None  # of ONNX Runtime
    device: str
    memory: str
    gpu: str = ""  # its name, where the device is one


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one known answer."""

    known: KnownAnswer
    logit: float
    tolerance: float

    @property
    def off(self) -> float:
        return abs(self.logit - self.known.logit)

    @property
    def used(self) -> float:
        """The share of the tolerance; infinite for NaN."""
        return math.inf if math.isnan(self.logit) else self.off / self.tolerance


def summary(answers: Sequence[Answer]) -> str:
    """One line on answers that were right: how many, and how much of the tolerance the worst one took."""
    if not answers:
        return "none in this artifact, so what an engine computes cannot be checked; export it again to have them"
    worst = max(answers, key=lambda answer: answer.used)
    return f"{len(answers)} right; a logit is off by {worst.off:.2g} of {worst.tolerance:.2g} that are allowed"


class Trial:
    """The known answers of an opened artifact. Thread-safe; each kind is tried once."""

    def __init__(self, folder: Path, manifest: Manifest, setting: Setting, kv: str) -> None:
        self._folder, self._manifest, self._setting, self._kv = folder, manifest, setting, kv
        self._lock = threading.RLock()  # an engine may ask them before its first image, of which they are the first
        self._passed: set[Kind] = set()
        forks.watch(self)

    def after_fork(self) -> None:
        """A thread that asked them is not there; whether they came out right was not known."""
        self._lock = threading.RLock()

    def check(
        self, kind: Kind, logits: Callable[[Sequence[tuple[Any, Any]]], Sequence[float]], *, again: bool = False
    ) -> list[Answer]:
        """Score the known pairs of one kind by `logits` unless they were right before, or with `again` in any case.

        Returns what was scored now; nothing for an artifact that has no known answers. Raises WrongAnswerError.
        """
        known = self._manifest.known_answers
        pairs = [pair for pair in known.pairs if pair.is_image == (kind == "image")] if known else []
        with self._lock:
            if not known or not pairs or (kind in self._passed and not again):
                return []
            key, memory = self._key(kind), Memory.load()
            if key is not None and memory.knows_answers(key) and not again:
                self._passed.add(kind)
                return []
            found = logits([(pair.query, pair.document) for pair in pairs])
            tolerance = known.tolerance[self._kv] * (_BF16 if self._is_bf16_on_gpu else 1)
            answers = [Answer(pair, logit, tolerance) for pair, logit in zip(pairs, found, strict=True)]
            if wrong := [answer for answer in answers if answer.used > 1]:
                raise WrongAnswerError(self._told(max(wrong, key=lambda answer: answer.used), len(wrong), len(answers)))
            self._passed.add(kind)
            if key is not None and not memory.knows_answers(key):
                memory.remember_answers(key)
                memory.save()
            return answers

    @property
    def _is_bf16_on_gpu(self) -> bool:
        return self._setting.device.startswith("cuda") and cuda_type(self._manifest.schemes) == "bfloat16"

    def _key(self, kind: Kind) -> str | None:
        """What a verdict holds for."""
        setting = self._setting
        if setting.version is None:
            return None
        known = self._manifest.known_answers
        facts: list[Any] = [kind, self._manifest.fingerprint, asdict(known) if known else None]
        facts += [setting.version, setting.device, setting.memory, self._kv]
        facts += [_processor()[1], "" if setting.device == "cpu" else setting.gpu + _gpus()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _told(self, worst: Answer, wrong: int, total: int) -> str:
        known, setting = worst.known, self._setting
        document = "an image" if known.is_image else repr(known.document)
        what = f"ONNX Runtime {setting.version}" if setting.version else "this engine"
        if setting.version:
            if setting.device.startswith("cuda"):
                package, where = "onnxruntime-gpu", f"the GPU {setting.device} ({setting.gpu or 'name unknown'})"
            else:
                package, where = "onnxruntime", f"this CPU ({_processor()[0]}), device {setting.device}"
            what += f" on {where}, memory {setting.memory}, kv {self._kv},"
            todo = f"Install another version (pip install -U {package}), or export in another precision"
        else:
            todo = "Use ONNX Runtime, or an artifact in a precision that the engine has kernels for"
        return (
            f"{self._folder}: {what} computes this {self._manifest.scheme} artifact wrongly: {wrong} of {total} known "
            f"answers differ. The query {known.query!r} on {document} must have the logit {known.logit:.4f} "
            f"± {worst.tolerance:.2g} and got {worst.logit:.4f}. Nothing was scored. {todo}; "
            "`m0kit doctor ARTIFACT` asks again."
        )


def _processor() -> tuple[str, str]:
    """Name of the CPU and a hash of it with its instructions."""
    lines: dict[str, str] = {}
    if sys.platform == "linux":
        try:
            text = Path("/proc/cpuinfo").read_text("utf-8", "replace").partition("\n\n")[0]
        except OSError:
            text = ""
        fields = (line.partition(":") for line in text.splitlines())
        lines = {name.strip(): value.strip() for name, _, value in fields if name.strip() in _CPU_FIELDS}
    elif sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            lines["model name"] = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    else:
        lines["model name"] = platform.processor()
    name = lines.get("model name") or platform.machine()
    return name, hashlib.sha256(f"{platform.machine()}\n{sorted(lines.items())}".encode()).hexdigest()


def _gpus() -> str:
    """What the NVIDIA driver says of its GPUs and of itself, where it says so in files."""
    told = []
    for path in [*sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")), Path("/proc/driver/nvidia/version")]:
        try:
            told.append(path.read_text("utf-8", "replace"))
        except OSError:
            continue
    return "\n".join(told)
