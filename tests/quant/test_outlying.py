"""Columns that stand far out: found in any basis, stored wider, named; usual matrices stay as they were."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.quant.weights import Tensors, rewritten
from torch import Tensor

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_parity.small.files import MASSIVE, SMALL
from m0kit_quant.floats import Fp32Scheme
from m0kit_quant.int8 import Int8Scheme
from m0kit_quant.outlying import FAR, WIDER, outlying
from m0kit_quant.recipe import Recipe

WRITERS = {"visual.blocks.0.mlp.fc2.weight", "model.layers.0.mlp.down_proj.weight"}


@given(st.integers(0, 63), st.floats(0.1, 100), st.floats(1e-6, 1e6), st.booleans())
def test_a_column_is_found_by_its_size_beside_the_others_alone(
    column: int, times: float, unit: float, floats: bool
) -> None:
    matrix = np.full((8, 64), unit, np.float32)
    matrix[3, column] *= np.float32(times)
    scheme = Fp32Scheme() if floats else Int8Scheme()
    seen: list[str] = []
    found = outlying(Tensors({"a": matrix}), {"a": scheme}, seen.append)
    far = bool(np.abs(matrix).max() > FAR * np.float32(unit)) and not floats
    assert seen == ([] if floats else ["a"])
    assert found == ({"a": pytest.approx(times, rel=1e-5)} if far else {})


def test_a_matrix_of_zeros_has_none() -> None:
    matrix = np.zeros((4, 8), np.float32)
    matrix[0, 0] = 1
    assert not outlying(Tensors({"a": matrix}), {"a": Int8Scheme()})


@pytest.mark.parametrize("precision", ["int8", "int4", "nf4"])
def test_of_small_massive_what_writes_massive_activations_is_stored_wider(precision: str, tmp_path: Path) -> None:
    recipe = replace(Recipe.default(precision), feedback=False)
    manifest = export_artifact(MASSIVE / "base", tmp_path / "m", recipe=recipe, progress=False)
    wider = manifest.provenance["stored_wider"]
    assert wider.keys() == WRITERS
    assert all(each["scheme"] == WIDER and each["times"] > FAR for each in wider.values())
    assert {rule["match"] for rule in manifest.recipe["weights"]} >= WRITERS
    assert WIDER in read_manifest(tmp_path / "m").schemes
    plain = replace(recipe, widen=False)
    assert not export_artifact(MASSIVE / "base", tmp_path / "p", recipe=plain, progress=False).provenance[
        "stored_wider"
    ]


def test_what_is_usual_stays_as_it_is_and_costs_nothing(tmp_path: Path) -> None:
    recipe = Recipe.default("int8")
    kept = export_artifact(SMALL / "base", tmp_path / "a", recipe=replace(recipe, feedback=False), progress=False)
    bare = replace(recipe, feedback=False, widen=False)
    plain = export_artifact(SMALL / "base", tmp_path / "b", recipe=bare, progress=False)
    assert not kept.provenance["stored_wider"]
    assert kept.files == plain.files


def test_one_column_would_cost_the_others_and_does_not(tmp_path: Path) -> None:
    """Of one neuron: what all others write is lost beside it without `widen`."""
    name = "visual.blocks.1.mlp.fc"

    def change(tensors: dict[str, Tensor]) -> None:
        # GELU of next to nothing is half of it: such a neuron adds little still, and no range is shared through it.
        for part in ("weight", "bias"):
            tensors[f"{name}1.{part}"][0] *= 1e-4
        tensors[f"{name}2.weight"][:, 0] = tensors[f"{name}2.weight"].abs().max() * 1000

    folder = rewritten(SMALL / "base", tmp_path / "odd", change)
    export_artifact(folder, tmp_path / "fp32", progress=False)
    recipe = replace(Recipe.default("int8"), feedback=False)
    off = []
    for widen in (True, False):
        out = tmp_path / str(widen)
        manifest = quantize_artifact(tmp_path / "fp32", out, recipe=replace(recipe, widen=widen), progress=False)
        assert (f"{name}2.weight" in manifest.provenance["stored_wider"]) == widen
        page = SMALL / "eval" / "pages" / "01-0.png"
        scores = [
            Reranker.load(each, threads=1).score([("red cup", page)], raw=True) for each in (tmp_path / "fp32", out)
        ]
        off.append(float(np.abs(scores[0] - scores[1]).max()))
    assert off[0] < off[1] / 4
