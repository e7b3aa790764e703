"""What the quantisation's tests share: the small trained checkpoint, without and with outliers, in every precision."""

from collections.abc import Callable
from pathlib import Path

import pytest

from m0kit_export.export import export_artifact
from m0kit_parity.samples.outliers import write_injected
from m0kit_parity.small.files import SMALL
from m0kit_quant.recipe import Recipe

Made = Callable[..., Path]


@pytest.fixture(scope="session")
def small() -> Path:
    return SMALL / "base"


@pytest.fixture(scope="session")
def spiky(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint with channels 1024 times larger than their neighbours; it computes the same."""
    folder = tmp_path_factory.mktemp("spiky") / "checkpoint"
    write_injected(small, folder, 1024)
    return folder


@pytest.fixture(scope="session")
def made(small: Path, spiky: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(precision, outliers) → the artifact by the default recipe, written once per process."""
    folder = tmp_path_factory.mktemp("made")

    def get(precision: str, outliers: bool = False) -> Path:
        output = folder / f"{precision}{'-spiky' if outliers else ''}"
        if not output.exists():
            export_artifact(spiky if outliers else small, output, recipe=Recipe.default(precision), progress=False)
        return output

    return get
