"""Known answers are what the model computes, whatever the precision; the numpy they come from is held to PyTorch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.quant import products

from m0kit import Reranker
from m0kit.artifact.manifest import KnownAnswer, read_manifest
from m0kit.artifact.ports import KV
from m0kit.config import ModelConfig
from m0kit.errors import CheckpointError
from m0kit.precision import SCHEMES
from m0kit.reading.inputs import parse_content
from m0kit_export.answers import IMAGE_QUERIES, QUERIES, known_answers, picture
from m0kit_export.export import export_artifact
from m0kit_export.graphs import build_graphs
from m0kit_export.stored import StoredWeights
from m0kit_parity.reference import Reference
from m0kit_parity.samples.checkpoints import model_config
from m0kit_quant import int4
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import Parts

# Of logits around 2, by two ways through float32 with different orders of sums.
FLOATS = 2e-5


def pairs_of(folder: Path) -> list[KnownAnswer]:
    known = read_manifest(folder).known_answers
    assert known is not None
    return list(known.pairs)


def test_they_are_the_logits_of_pytorch(tiny: Path, tiny_artifact: Path) -> None:
    reference = Reference.load(tiny)
    pairs = pairs_of(tiny_artifact)
    assert len(pairs) == len(QUERIES) + len(IMAGE_QUERIES)
    for pair in pairs:
        document: Any = pair.document
        if pair.is_image:
            document = parse_content(pair.document, "document").source  # type: ignore[union-attr]
        assert abs(reference.trace((pair.query, document)).logit - pair.logit) < FLOATS


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("precision", SCHEMES)
def test_every_precision_comes_out_right(
    in_precision: Callable[[str], Path], precision: str, memory: Any, kv: Any
) -> None:
    reranker = Reranker.load(in_precision(precision), threads=1, memory=memory, kv=kv)
    answers = reranker.try_answers(again=True)
    assert len(answers) == len(pairs_of(in_precision(precision)))
    # A machine whose kernels round otherwise may take other shares; more than the whole would have raised.
    assert max(answer.used for answer in answers) < 0.75
    if precision not in ("int8", "int4") and kv == "fp32":
        # nf4 rounds inputs to 16 bits in its first layer and block: 2e-5 of the largest of a row, ten times over.
        assert max(answer.off for answer in answers) < (1e-3 if precision == "nf4" else FLOATS)


def test_they_tell_pairs_apart(tiny_artifact: Path) -> None:
    """Or an engine that gives every pair the same logit might be right."""
    known = read_manifest(tiny_artifact).known_answers
    assert known is not None
    logits = [pair.logit for pair in known.pairs]
    assert np.std(logits) > 10 * known.tolerance["fp32"]


real = StoredWeights.parts


def without_zero_points(self: StoredWeights, name: str) -> Parts:
    """What the file holds, read as ONNX Runtime up to 1.28 computed it: every zero point is 8."""
    parts = real(self, name)
    if "zero_point" in parts and not self.weights[name].scheme.table:
        parts["zero_point"] = np.full_like(parts["zero_point"], 0x88)
    return parts


def test_a_kernel_that_loses_zero_points_is_beyond_the_tolerance(
    in_precision: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_precision("int4")
    manifest = read_manifest(folder)
    graphs = build_graphs(manifest.model, Recipe.from_dict(manifest.recipe, "test"))
    right = known_answers(folder, manifest.model, graphs)
    assert right == manifest.known_answers
    monkeypatch.setattr(StoredWeights, "parts", without_zero_points)
    wrong = known_answers(folder, manifest.model, graphs)
    off = [abs(a.logit - b.logit) for a, b in zip(right.pairs, wrong.pairs, strict=True)]
    assert max(off) > 2 * right.tolerance["fp32"]


@pytest.mark.parametrize("block", int4.BLOCKS)
@pytest.mark.parametrize("rows", [4, 64])
def test_zero_points_outside_the_loop_of_a_product_count(block: int, rows: int) -> None:
    """The MLPs stand in loops and their weights outside. ONNX Runtime 1.24 to 1.28 packed them without zero points."""
    rng = np.random.default_rng(block + rows)
    stored = int4.quantize(rng.normal(0.02, 0.05, (96, 256)).astype(np.float32), block)
    x = rng.normal(size=(rows, 256)).astype(np.float32)
    value = helper.make_tensor_value_info
    product = helper.make_node(
        "MatMulNBits", ["x", "w", "s", "z"], ["y"], domain="com.microsoft",
        K=256, N=96, bits=4, block_size=block, accuracy_level=4,
    )  # fmt: skip
    body = helper.make_graph(
        [product, helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["sum", "y"], ["grown"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("sum", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("grown", TensorProto.FLOAT, None)],
    )
    arrays = {"w": stored.packed, "s": stored.scale, "z": stored.zero_point, "yes": np.array(True), "n": np.array(1)}
    arrays["start"] = np.zeros((rows, 96), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "yes", "start"], ["out"], body=body)],
        "one",
        [value("x", TensorProto.FLOAT, [rows, 256])],
        [value("out", TensorProto.FLOAT, [rows, 96])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    meant = products.int4(x, stored)
    assert np.abs(found - meant).max() < 2e-3 * np.abs(meant).max()


@pytest.mark.parametrize(("low", "high"), [(3136, 602112), (200_000, 602112), (784, 1000), (784, 8000)])
def test_the_picture_needs_no_resizing(low: int, high: int) -> None:
    config = model_config("tiny")
    config = replace(config, image=replace(config.image, min_pixels=low, max_pixels=high))
    assert isinstance(config, ModelConfig)
    height, width, channels = picture(config).shape
    assert (height % 28, width % 28, channels) == (0, 0, 3)
    assert low <= height * width <= high


def test_a_model_that_computes_nothing_finite_is_refused(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(tiny_artifact)
    graphs = build_graphs(manifest.model, Recipe.from_dict(manifest.recipe, "test"))
    real = StoredWeights.read

    def huge(self: Any, name: str) -> Any:
        values = real(self, name)
        return values * np.float32(3e38) if name == "model.norm.weight" else values

    monkeypatch.setattr(StoredWeights, "read", huge)
    with pytest.raises(CheckpointError, match="scores a plain pair as NaN or infinity"):
        known_answers(tiny_artifact, manifest.model, graphs)


def test_a_broken_tokenizer_is_named(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        export_artifact(tmp_path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
