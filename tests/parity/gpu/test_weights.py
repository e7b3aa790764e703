"""Artifacts written in haste: the same bytes as exported ones where no search is left out, and near them elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch

from m0kit.artifact.manifest import read_manifest
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.export import export_artifact
from m0kit_export.graphs import build_graphs
from m0kit_export.stored import StoredWeights
from m0kit_parity.gpu.weights import write_artifact
from m0kit_parity.samples.checkpoints import write_checkpoint
from m0kit_quant.recipe import Recipe


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_files_are_those_of_an_export(tiny: Path, tmp_path: Path, precision: str) -> None:
    exported, hasty = tmp_path / "exported", tmp_path / "hasty"
    export_artifact(tiny, exported, recipe=Recipe.default(precision), progress=False)
    write_artifact(open_checkpoint(tiny), hasty, precision, "cpu")
    assert read_manifest(hasty).fingerprint == read_manifest(exported).fingerprint
    assert read_manifest(hasty).known_answers is None


def test_four_bits_are_the_nearest_of_each_block(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    write_artifact(checkpoint, tmp_path / "hasty", "int4", "cpu")
    stored = StoredWeights(tmp_path / "hasty", build_graphs(checkpoint.config, Recipe.default("int4")))
    few = [weight for weight in stored.weights.values() if weight.scheme.name == "int4"]
    assert few
    for weight in few:
        wanted = checkpoint.read(weight.name).float().numpy().reshape(weight.shape)
        block = weight.shape[1] // stored.parts(weight.name)["scale"].shape[1]
        blocks = wanted.reshape(weight.shape[0], -1, block)
        step = (np.maximum(blocks.max(2), 0) - np.minimum(blocks.min(2), 0)) / 15
        off = np.abs(stored.read(weight.name) - wanted).reshape(blocks.shape).max(2)
        assert (off <= step * 1.001).all()  # half a step of rounding, and half of the zero point's


def test_values_that_pytorch_draws_are_of_the_same_kind(tiny: Path, tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path / "drawn", "tiny", device="cpu")
    again = write_checkpoint(tmp_path / "again", "tiny", device="cpu")
    assert config == again
    first, second = open_checkpoint(tmp_path / "drawn"), open_checkpoint(tmp_path / "again")
    numpy_drawn = open_checkpoint(tiny)
    for name in first.names:
        values = first.read(name)
        assert torch.equal(values, second.read(name)), name
        if values.numel() > 2000:
            assert values.float().std() == pytest.approx(float(numpy_drawn.read(name).float().std()), rel=0.1), name
