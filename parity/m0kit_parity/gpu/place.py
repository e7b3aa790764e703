"""Where a check runs: the device, the sizes, a folder for checkpoints and artifacts, and the time that is left.

Owns what parts share. Checkpoints and artifacts are made when a part first asks for them, and found again in the
folder by the next command.

    place = Place(Path("/dev/shm/m0kit-gpu"), "cuda", "full", budget_s=300)
    place.artifact("full", "fp16")
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from m0kit.terminal import say
from m0kit_parity.child import Child, Maker
from m0kit_parity.small.files import SMALL

Size = Literal["tiny", "small", "wide", "full"]

_LEAST_S = 20.0  # what a process gets that is started when the time is nearly over


@dataclass(frozen=True)
class Place:
    """A device, the size that speed is measured at, and a clock that started with the command."""

    root: Path
    device: str  # "cpu", "cuda"
    size: Size
    budget_s: float
    options: dict[str, Any] = field(default_factory=dict)  # of `Reranker.load`, besides the device
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.budget_s - self.elapsed

    def tell(self, text: str) -> None:
        """A line of progress."""
        say(f"[{self.elapsed:6.1f} s] {text}")

    @contextmanager
    def process(self, what: str, make: Maker) -> Iterator[Child]:
        """Another process, which is ended when the time is over."""
        self.tell(f"starting {what}")
        with Child(make, max(_LEAST_S, self.left), nested=True) as child:
            self.tell(f"{what} is there")
            yield child

    def checkpoint(self, size: Size) -> Path:
        """The folder of a checkpoint: the trained small one, or random weights."""
        if size == "small":
            return SMALL / "base"
        folder = self.root / size
        if not folder.exists():
            from m0kit_parity.samples.checkpoints import write_checkpoint

            self.tell(f"writing the checkpoint {size}")
            write_checkpoint(folder, size, lm_head=False, device=self.device)
        return folder

    def artifact(self, size: Size, precision: str) -> Path:
        """The folder of an artifact: written in haste for the full size, else exported."""
        return self.artifacts([size], [precision])[size, precision]

    def artifacts(self, sizes: Sequence[Size], precisions: Sequence[str]) -> dict[tuple[Size, str], Path]:
        """Several of them, those that are exported side by side."""
        folders = {(size, p): self.root / f"{size}-{p}" for size in sizes for p in precisions}
        missing = [key for key, folder in folders.items() if not folder.exists()]
        checkpoints = {size: self.checkpoint(size) for size, _ in missing}
        if missing:
            self.tell(f"writing the artifacts {', '.join(folders[key].name for key in missing)}")
        large = [(size, p) for size, p in missing if size in ("wide", "full")]
        hasty = [(checkpoints[size], folders[size, p], p, self.device) for size, p in large]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda arguments: _write(*arguments), hasty))
        exported = [(checkpoints[size], folders[size, p], p) for size, p in missing if (size, p) not in large]
        if len(exported) == 1:
            _export(*exported[0])
        elif exported:
            with ProcessPoolExecutor(min(len(exported), os.cpu_count() or 1), get_context("spawn")) as processes:
                for one in [processes.submit(_export, *arguments) for arguments in exported]:
                    one.result()
        if missing:
            self.tell("they are there")
        if missing and self.on_gpu:
            import torch

            torch.cuda.empty_cache()  # nothing but CUDA itself stays on the GPU with this process
        return folders


def _write(checkpoint: Path, folder: Path, precision: str, device: str) -> None:
    from m0kit_export.checkpoint import open_checkpoint
    from m0kit_parity.gpu.weights import write_artifact

    write_artifact(open_checkpoint(checkpoint), folder, precision, device)


def _export(checkpoint: Path, folder: Path, precision: str) -> None:
    from m0kit_export.export import export_artifact
    from m0kit_quant.recipe import Recipe

    export_artifact(checkpoint, folder, recipe=Recipe.default(precision), progress=False)
