"""What figures are measured on: checkpoints and artifacts, made when one is first asked for, and how much is measured.

Workshop(Path("work"), QUICK, threads=2).artifact("big", "int8")
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from m0kit_parity.bench.measure import Ran, run_m0kit
from m0kit_parity.evaluate.drawn import drawn_sets
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.samples.checkpoints import write_checkpoint
from m0kit_parity.small.files import SMALL

Model = Literal["small", "massive", "big"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: everything that was published, or a little of each."""

    big: Literal["full", "wide"]  # the shape of what is called big
    layers: int  # of the full-width layers whose whole pairs are compared
    repeats: int
    loads: tuple[str, ...]  # parts of the names of the workloads of whole pairs
    queries: int | None  # of each embedded evaluation set; None: all
    drawn: int  # queries, of all sets together
    calibration: int  # pairs of each kind
    cases: tuple[str, ...]  # of parity; (): all
    memory: tuple[int, int]  # tokens, visual tokens up to which memory is measured
    seconds: tuple[int, int]  # likewise
    documents: int  # kept
    pages: int  # of an index
    tokens: int  # of a document that is kept, at most
    asked: int  # queries of very many pairs


WHOLE: Final = Sizes(
    "full", 4, 3, ("text,", "page", "8 texts"), None, 1700, 24, (), (10_240, 3072), (2048, 768), 16, 100, 2048, 1000
)
QUICK: Final = Sizes(
    "wide", 2, 1, ("64 ", "256 ", "page"), 5, 34, 2, ("text_text", "image_text"), (512, 384), (256, 96), 4, 8, 256, 100
)


@dataclass(frozen=True, slots=True)
class Workshop:
    """A folder with what was made; it is made in a folder aside, so what is there is whole."""

    folder: Path
    sizes: Sizes
    threads: int

    @property
    def scratch(self) -> Path:
        """A folder for what one figure needs alone: empty when it begins, gone when it is measured."""
        return self.folder / "scratch"

    def checkpoint(self, model: Model) -> Path:
        """`big` is random, of full width; `massive` is the small one with activations such as real models have."""
        folder = self.folder / model
        if model == "small":
            return SMALL / "base"
        if not folder.is_dir():
            if model == "big":
                write_checkpoint(folder, self.sizes.big, progress=True)
            else:
                run_m0kit("checkpoint", "small-massive", folder)
        return folder

    def artifact(self, model: Model, precision: str, *, adapter: str = "", calibration: Path | None = None) -> Path:
        """The artifact of a checkpoint, with one of the embedded adapters, or calibrated on a file of pairs."""
        folder = self.place(model, precision, adapter or ("calibrated" if calibration else ""))
        if folder.is_dir():
            return folder
        if model == "big":
            self.export(model, precision)  # a process of its own gives its memory back
            return folder
        from m0kit_export.adapter import AdapterSpec
        from m0kit_export.export import export_artifact
        from m0kit_quant.recipe import Recipe

        adapters = [AdapterSpec(SMALL / "adapters" / adapter)] if adapter else []
        recipe = Recipe.default(precision)
        export_artifact(
            self.checkpoint(model), folder, adapters=adapters, recipe=recipe, calibration=calibration, progress=False
        )
        return folder

    def export(self, model: Model, precision: str, *options: object, name: str = "") -> Ran:
        """Make it anew by `m0kit export` with options, and say what that cost; `name` tells it apart."""
        words = (self.checkpoint(model), "-o", self.place(model, precision, name), "--precision", precision)
        return run_m0kit("export", *words, "--overwrite", *options)

    def place(self, model: Model, precision: str, name: str = "") -> Path:
        """Where an artifact is, or would be."""
        return self.folder / "-".join(filter(None, (model, name, precision)))

    def forget(self, *folders: Path) -> None:
        """Give their room back."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def sets(self) -> dict[str, list[Query]]:
        """Held-out queries, drawn."""
        return drawn_sets(self.sizes.drawn)
