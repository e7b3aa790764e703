"""What float16 loses: measured, avoided by scaling or by wider storage, and said; usual weights stay as they were."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.quant.weights import Tensors, random_weights, rewritten

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest
from m0kit_export.calibrate import calibrate
from m0kit_export.cli import export
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_export.graphs import build_graphs, schemes_of
from m0kit_parity.samples.checkpoints import model_config
from m0kit_parity.samples.outliers import write_injected
from m0kit_quant.equalize import Rescaled, channel_groups
from m0kit_quant.floats import Bf16Scheme, Fp16Scheme
from m0kit_quant.halves import MAX_LOSS, fit_halves, loss_of, losses
from m0kit_quant.int8 import Int8Scheme
from m0kit_quant.recipe import Recipe

Float32 = NDArray[np.float32]
FP16 = Recipe.default("fp16")
CONFIG = model_config("tiny")
GRAPHS = build_graphs(CONFIG, FP16)
SCHEMES = schemes_of(GRAPHS)
HALF = {weight.name for graph in GRAPHS.values() for weight in graph.weights if weight.half}
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def random(*shape: int, seed: int = 0, scale: float = 0.1) -> Float32:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def scaled(source: Path, folder: Path, factors: dict[str, float]) -> Path:
    """A copy of the checkpoint in fp32 with some tensors times a number."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, factor in factors.items():
            tensors[name] = tensors[name] * factor

    return rewritten(source, folder, change)


# --- the measure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-2, -6, -10])
def test_a_usual_matrix_loses_next_to_nothing(exponent: int) -> None:
    assert loss_of(random(64, 96, scale=2.0**exponent)) < 1e-6 * 2 ** (-exponent)


@pytest.mark.parametrize("exponent", [-15, -18, -24, -30, -60])
@pytest.mark.parametrize("part", ["row", "column", "matrix"])
def test_a_row_a_column_or_a_matrix_below_the_range_is_found(part: str, exponent: int) -> None:
    weight = random(64, 96)
    place = {"row": np.s_[3], "column": np.s_[:, 5], "matrix": np.s_[:]}[part]
    weight[place] *= np.float32(2.0**exponent)
    stored = weight[place].astype(np.float16).astype(np.float32)
    true = float(np.linalg.norm(stored - weight[place]) / np.linalg.norm(weight[place]))
    found = loss_of(weight)
    assert found > MAX_LOSS or true < 2 * MAX_LOSS
    assert found >= true - 2.0**-11  # what the normal range rounds is not counted


def test_a_column_without_input_is_no_loss_and_one_with_a_large_input_is() -> None:
    weight, inputs = random(64, 96), np.ones(96)
    weight[:, 5] *= np.float32(2.0**-20)
    assert loss_of(weight, inputs) < 1e-6
    inputs[5] = 2.0**15
    assert loss_of(weight, inputs) > MAX_LOSS


def test_an_input_below_the_range_is_a_loss_where_its_weights_make_up_for_it() -> None:
    weight, inputs = random(64, 96, scale=0.01), np.ones(96)
    inputs[5] = 2.0**-22
    assert loss_of(weight, inputs, multiplied=True) < MAX_LOSS
    weight[:, 5] *= 2**20
    assert loss_of(weight, inputs, multiplied=True) > MAX_LOSS
    assert loss_of(weight, inputs) < MAX_LOSS


@pytest.mark.parametrize("what", ["weight", "input", "output", "bias"])
def test_what_leaves_the_range_above_is_an_infinite_loss(what: str) -> None:
    weight, inputs, bias = random(8, 16), np.ones(16), np.zeros(8, np.float32)
    if what == "weight":
        weight[2, 3] = -65520
        inputs[3] = 0  # though nothing ever meets it: the file cannot hold it
    elif what == "bias":
        bias[4] = 7e4
    else:
        inputs[5] = 7e4 if what == "input" else 6e4
        weight[2, 5] = 0 if what == "input" else 2
    assert loss_of(weight, inputs, bias, multiplied=True) == math.inf
    assert (loss_of(weight, inputs, bias) == math.inf) == (what in ("weight", "bias"))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 2.0**-14, 2.0**-24, 65504.0])
def test_what_float16_holds_exactly_is_no_loss(value: float) -> None:
    assert loss_of(np.full((3, 40), value, np.float32)) == 0


@given(st.integers(0, 2**32 - 1), st.integers(-40, 12), st.integers(1, 60), st.integers(1, 60))
def test_what_is_kept_in_float16_is_near_in_every_row_and_column(seed: int, top: int, rows: int, columns: int) -> None:
    """Each row and column of its own size: where the measure is content, float16 is as near as usual."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** (top + rng.integers(-20, 1, rows)[:, None] + rng.integers(-6, 1, columns)[None])
    weight = (rng.standard_normal((rows, columns)) * sizes).astype(np.float32)
    if loss_of(weight) > MAX_LOSS:
        return
    error = np.square(Fp16Scheme().decode(Fp16Scheme().encode(weight), weight.shape).astype(np.float64) - weight)
    for axis in (0, 1):
        whole = np.square(weight, dtype=np.float64).sum(axis)
        # 2^-11 at most of each value in the normal range, and MAX_LOSS of the sum outside it
        assert (error.sum(axis) <= (2.0**-22 + MAX_LOSS**2) * whole).all()


# --- what is done about it -------------------------------------------------------------------------


def test_usual_weights_are_left_alone() -> None:
    fit = fit_halves(random_weights(CONFIG), CONFIG, SCHEMES, HALF, equalize=True)
    assert (fit.scales, fit.wider) == ({}, {})


def test_outliers_between_layers_are_shared_out_by_powers_of_two_and_nothing_is_stored_wider() -> None:
    weights = random_weights(CONFIG)
    group = next(g for g in channel_groups(CONFIG) if UP.removesuffix(".weight") == g.name)
    factors = np.ones(group.num_channels, np.float32)
    factors[[2, 9]] = 2.0**-16
    spiky = Rescaled(weights, [group], {group.name: factors})
    assert DOWN in losses(spiky, CONFIG, SCHEMES, HALF)
    fit = fit_halves(spiky, CONFIG, SCHEMES, HALF, equalize=True)
    assert not fit.wider
    assert group.name in fit.scales
    for scale in fit.scales.values():
        assert np.array_equal(np.exp2(np.rint(np.log2(scale))), scale)


def test_without_equalising_the_same_is_stored_wider() -> None:
    weights = random_weights(CONFIG)
    weights.tensors[DOWN][:, 3] *= np.float32(2.0**-16)
    weights.tensors[UP][3] *= np.float32(2.0**16)
    fit = fit_halves(weights, CONFIG, SCHEMES, HALF, equalize=False)
    assert fit.wider.keys() == {DOWN, UP}  # the products of up would leave the range
    assert not fit.scales


@pytest.mark.parametrize(("dtype", "scheme"), [("bfloat16", "bf16"), ("float32", "fp32")])
def test_bf16_is_taken_where_it_holds_every_value(dtype: str, scheme: str) -> None:
    weights = random_weights(CONFIG)
    tiny = torch.from_numpy(weights.tensors[UP] * np.float32(2.0**-24)).to(getattr(torch, dtype)).float().numpy()
    fit = fit_halves(Tensors({**weights.tensors, UP: tiny}), CONFIG, SCHEMES, HALF, equalize=True)
    assert {name: each.scheme for name, each in fit.wider.items()} == {UP: scheme}
    assert fit.wider[UP].lost == pytest.approx(1, rel=0.5)


def test_only_matrices_stored_in_float16_are_looked_at() -> None:
    weights = random_weights(CONFIG)
    weights.tensors[UP] *= np.float32(2.0**-24)
    schemes = {**SCHEMES, UP: Int8Scheme(), DOWN: Bf16Scheme()}
    seen: list[str] = []
    fit = fit_halves(weights, CONFIG, schemes, HALF, equalize=True, done=seen.append)
    assert (fit.scales, fit.wider) == ({}, {})
    assert "model.embed_tokens.weight" in seen
    assert not {UP, DOWN} & set(seen)


# --- whole artifacts -------------------------------------------------------------------------------


def scores(artifact: Path) -> NDArray[np.float32]:
    pairs = [(query, document) for query in ("red fox", "def sort") for document in ("a red fox", "sort a list", "x")]
    return Reranker.load(artifact).score(pairs)


# A power of two into one matrix and out of the next: the function is the same to the bit in floating point.
WHOLE = {
    "model.layers.0.self_attn.q_proj.weight": 2.0**-15,
    "model.layers.0.self_attn.q_proj.bias": 2.0**-15,
    "model.layers.0.self_attn.k_proj.weight": 2.0**15,
    "model.layers.0.self_attn.k_proj.bias": 2.0**15,
    "model.layers.1.mlp.up_proj.weight": 2.0**-18,
    "model.layers.1.mlp.down_proj.weight": 2.0**18,
    "model.layers.2.self_attn.v_proj.weight": 2.0**16,
    "model.layers.2.self_attn.v_proj.bias": 2.0**16,
    "model.layers.2.self_attn.o_proj.weight": 2.0**-16,
    "score.0.weight": 2.0**-20,
    "score.0.bias": 2.0**-20,
    "score.2.weight": 2.0**20,
}


def test_matrices_outside_the_range_change_no_score(small: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    odd = scaled(small, tmp_path / "odd", WHOLE)
    manifest = export_artifact(odd, tmp_path / "fp16", recipe=FP16, progress=False)
    # Equal but for the order of fp32 sums: the small checkpoint is stored in fp16, which loses nothing of it.
    np.testing.assert_allclose(scores(tmp_path / "fp16"), scores(made("fp32")), atol=1e-6, rtol=0)
    wider = manifest.provenance["stored_wider"]
    assert {"model.layers.1.mlp.up_proj.weight", "score.0.weight"} <= wider.keys() <= WHOLE.keys()
    assert {each["scheme"] for each in wider.values()} == {"fp32"}
    assert [rule["match"] for rule in manifest.recipe["weights"]] == [*wider, "*"]
    assert set(read_manifest(tmp_path / "fp16").schemes) == {"fp16", "fp32"}


@pytest.mark.parametrize(("strength", "fraction"), [(4096, 0.01), (4096, 0.3), (65536, 0.05)])
def test_channels_outside_the_range_change_no_score(
    small: Path, made: Callable[..., Path], tmp_path: Path, strength: int, fraction: float
) -> None:
    write_injected(small, tmp_path / "spiky", strength, fraction=fraction)
    manifest = export_artifact(tmp_path / "spiky", tmp_path / "fp16", recipe=FP16, progress=False)
    np.testing.assert_allclose(scores(tmp_path / "fp16"), scores(made("fp32")), atol=1e-6, rtol=0)
    if fraction < 0.1:
        assert not manifest.provenance["stored_wider"]


def test_usual_checkpoints_give_the_same_bytes_as_plain_rounding(
    small: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = export_artifact(small, tmp_path / "plain", recipe=replace(FP16, equalize=False), progress=False)
    assert read_manifest(made("fp16")).files == manifest.files
    assert manifest.provenance["stored_wider"] == {}


def test_an_artifact_with_wider_matrices_calibrates_and_is_quantised_as_the_checkpoint(
    small: Path, tmp_path: Path
) -> None:
    odd = scaled(small, tmp_path / "odd", WHOLE)
    export_artifact(odd, tmp_path / "fp16", recipe=FP16, progress=False)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "red fox", "document": "a red fox"}))
    assert "score.0" in calibrate(tmp_path / "fp16", tmp_path / "pairs.jsonl", progress=False).energy
    manifest = quantize_artifact(tmp_path / "fp16", tmp_path / "int8", recipe=Recipe.default("int8"), progress=False)
    assert manifest.provenance["stored_wider"] == {}  # of this artifact, not of the one it was made from
    again = quantize_artifact(tmp_path / "fp16", tmp_path / "again", recipe=FP16, progress=False)
    assert again.files == read_manifest(tmp_path / "fp16").files


def test_the_command_names_what_is_stored_wider(small: Path, tmp_path: Path) -> None:
    odd = scaled(small, tmp_path / "odd", {"score.2.weight": 2.0**-18, "score.2.bias": 1e9})
    result = CliRunner().invoke(export, [str(odd), "-o", str(tmp_path / "out"), "--precision", "fp16"])
    assert result.exit_code == 0, result.output
    assert "float16 would lose of a row or column: score.2.weight (fp32, values beyond its range)\n" in result.stderr
