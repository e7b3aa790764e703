"""What the exporter's tests share: random checkpoints and their artifacts, once per process."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.export import tiny_model
from tests.export.artifacts import artifacts_of

from m0kit.config import DecoderConfig, ModelConfig, VisionConfig
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_export.export import export_artifact
from m0kit_parity.samples import checkpoints
from m0kit_parity.samples.checkpoints import write_checkpoint


def broad_config() -> ModelConfig:
    """The published widths of heads (128 and 80), the published ratios, few channels."""
    small = checkpoints.model_config("tiny")
    decoder = DecoderConfig(512, 2, 4, 2, 128, 1536, 1e-6, 1e6, (16, 24, 24), small.decoder.vocab_size, 32768)
    vision = VisionConfig(2, 160, 2, 640, 3, 14, 2, 2, 1e-6, 1e4)
    return ModelConfig(decoder, vision, small.image, small.prompt)


@pytest.fixture(scope="module")
def model() -> tiny_model.Reranker:
    return tiny_model.make_model()


@pytest.fixture(scope="module")
def checkpoint(model: tiny_model.Reranker, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    return open_checkpoint(tiny_model.write_checkpoint(folder, tiny_model.published_tensors(model)))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_checkpoint(tmp_path_factory.mktemp("original") / "base")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "base"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose values float16 holds exactly, so that fp16 storage alone changes nothing."""
    folder = tmp_path_factory.mktemp("tiny-exact") / "checkpoint"
    write_checkpoint(folder, "tiny", dtype="float16")
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tiny: Path) -> Path:  # of its own: the fixture shared by all tests is made once, of the other tiny
    folder = tiny.with_name("artifact")
    export_artifact(tiny, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def in_precision(tiny: Path, tiny_artifact: Path) -> Callable[[str], Path]:
    """precision → the artifact of `tiny` in it, by its default recipe; not to be written to."""
    return artifacts_of(tiny, "artifact", {"fp32": tiny_artifact})


@pytest.fixture(scope="session")
def broad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("broad") / "checkpoint", broad_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "model_config", lambda *_: config)
        write_checkpoint(folder, "tiny", dtype="float16")
    return folder


@pytest.fixture(scope="session")
def broad_artifact(broad: Path) -> Path:
    folder = broad.with_name("artifact")
    export_artifact(broad, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MiB of weights, of which no tensor has more than 2."""
    folder, config = tmp_path_factory.mktemp("heavy") / "checkpoint", broad_config()
    config = replace(config, decoder=replace(config.decoder, num_layers=30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "model_config", lambda *_: config)
        patch.setattr(checkpoints, "draw", lambda *args: iter([np.full(math.prod(args[1]), 0.5, np.float32)]))
        write_checkpoint(folder, "tiny", dtype="bfloat16")
    return folder
