"""What the runtime's tests share: one tiny random checkpoint, its artifact, and both sides opened."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from tests.alone import ALONE

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest, write_manifest
from m0kit.config import ModelConfig

if TYPE_CHECKING:
    from m0kit_parity.reference import Reference


@pytest.fixture(scope="session")
def artifact(tiny_artifact: Path) -> Path:
    return tiny_artifact


@pytest.fixture(scope="session")
def in_precision(request: pytest.FixtureRequest, tiny_artifact: Path) -> Callable[[str], Path]:
    """precision → the artifact of the tiny model in it, by its default recipe; not to be written to."""
    if ALONE:
        committed: Path = request.getfixturevalue("committed")
        return lambda precision: committed / precision
    from tests.export.artifacts import artifacts_of

    return artifacts_of(request.getfixturevalue("tiny"), "artifact", {"fp32": tiny_artifact})


@pytest.fixture(scope="session")
def reranker(artifact: Path) -> Reranker:
    return Reranker.load(artifact, threads=1)


@pytest.fixture(scope="session")
def reference(tiny: Path) -> "Reference":
    from m0kit_parity.reference import Reference

    return Reference.load(tiny)


@pytest.fixture(scope="session")
def config(reranker: Reranker) -> ModelConfig:
    return reranker.config


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """(height, width, seed) → an RGB image without any symmetry: coarse noise under fine noise."""

    def make(height: int, width: int, seed: int = 0) -> Image.Image:
        rng = np.random.default_rng([seed, height, width])
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height))
        fine = rng.integers(0, 64, (height, width, 3), np.uint8)
        return Image.fromarray((np.asarray(coarse) // 2 + fine).astype(np.uint8))

    return make


@pytest.fixture(scope="session")
def unasked(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifact without known answers, for tests that count what is run."""
    folder = tmp_path_factory.mktemp("unasked") / "artifact"
    shutil.copytree(artifact, folder)
    write_manifest(folder, replace(read_manifest(folder), known_answers=None))
    return folder
