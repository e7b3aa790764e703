"""What the runtime's tests share: one tiny random checkpoint, its artifact, and both sides opened."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m0kit import Reranker
from m0kit.config import ModelConfig
from m0kit_export.export import export_artifact
from m0kit_parity.checkpoints import write_checkpoint
from m0kit_parity.reference import Reference


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The fixtures below open artifacts before a test's own cache folder is set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "checkpoint"
    write_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def artifact(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("artifact")
    export_artifact(checkpoint, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def reranker(artifact: Path) -> Reranker:
    return Reranker.load(artifact, threads=1)


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference.load(checkpoint)


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
