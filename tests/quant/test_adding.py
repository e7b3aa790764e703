"""To add a scheme takes one class, one line in the registry and one in the runtime's table: shown with a toy."""
# ruff: noqa: ARG002 a scheme is given what any scheme may need

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from m0kit import Reranker, precision
from m0kit.artifact.manifest import read_manifest
from m0kit.precision import Products
from m0kit_export.export import export_artifact
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import Layout, Nodes, Parts, Scheme
from m0kit_quant.schemes import SCHEMES
from m0kit_quant.weights import Float32


class Steps(Scheme):
    """8 bits and a scale for each output, widened as they are used: of standard operators alone."""

    name = "steps"

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {"values": (shape, np.dtype(np.int8)), "step": ((shape[0], 1), np.dtype(np.float32))}

    def encode(self, weight: Float32, importance: Float32 | None = None) -> Parts:
        step = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
        return {"values": np.rint(weight / np.where(step > 0, step, 1)).astype(np.int8), "step": step}

    def decode(self, parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Float32:
        return parts["values"].astype(np.float32) * parts["step"]

    def product(self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], out: str | None) -> str:
        weight = b.op("Mul", b.cast(part["values"], np.float32), part["step"])
        return b.op("Gemm", x, weight, transB=1, out=out)

    def lookup(self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int]) -> str:
        rows, step = (b.op("Gather", part[key], ids, axis=0) for key in ("values", "step"))
        return b.op("Mul", b.cast(rows, np.float32), step)

    def cuda_product(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        weight = b.op("Mul", b.cast(part["values"], dtype), b.cast(part["step"], dtype))
        return b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]))

    def cuda_lookup(
        self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        return b.cast(self.lookup(b, ids, part, shape), dtype)


def test_a_scheme_is_exported_checked_and_scored_once_it_is_listed(
    tiny: Path, tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEMES, Steps.name, Steps)
    monkeypatch.setitem(precision.SCHEMES, Steps.name, Products())
    rule = {"match": "*", "scheme": Steps.name}
    recipe = Recipe.from_dict({"precision": "toy", "equalize": True, "weights": [rule]}, "test")
    export_artifact(tiny, tmp_path / "toy", recipe=recipe, progress=False)
    assert read_manifest(tmp_path / "toy").schemes == ("steps",)
    pairs = [("slm markdown", "HTML becomes Markdown."), ("x", "y"), ("数据库", "B-tree keeps rows in order.")]
    reranker = Reranker.load(tmp_path / "toy", threads=1)
    logits = reranker.score(pairs, raw=True)
    assert max(answer.used for answer in reranker.try_answers(again=True)) < 1  # what numpy makes of the stored parts
    exact = Reranker.load(tiny_artifact, threads=1).score(pairs, raw=True)
    assert 0 < np.abs(logits - exact).max() < 0.5  # 8 bits are near, and are not the float32 that they were made from
