"""The graphs for GPUs against PyTorch, in numpy: in float32 first, where nothing is rounded, then in true 16 bits.

Differences of vectors are measured per row: the largest, relative to the root mean square of the row in PyTorch.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from m0kit.artifact.manifest import TOKENIZER, read_manifest
from m0kit.artifact.ports import GRAPHS, cuda_type, data_name, expected_ports, set_graphs
from m0kit.config import ModelConfig
from m0kit.precision import SCHEMES
from m0kit.scoring import cuda_engine
from m0kit.scoring.cuda_engine import CudaEngine
from m0kit.scoring.positions import vision_positions
from m0kit.scoring.prepare import Preparer
from m0kit.scoring.prompt import PromptBuilder
from m0kit.scoring.schedule import Result, Schedule
from m0kit_export import cuda
from m0kit_export.builder import Graph
from m0kit_export.cuda import SHIFT, cuda_graphs, in_pairs, shift_of
from m0kit_export.export import export_artifact
from m0kit_export.graphs import build_graphs
from m0kit_export.stored import StoredWeights
from m0kit_parity.cuda.host import HostDevice
from m0kit_parity.cuda.reference import CudaReference
from m0kit_parity.gpu.numbers import kernel_limit
from m0kit_parity.reference import PublishedNames, Reference
from m0kit_parity.samples.checkpoints import model_config
from m0kit_parity.small.files import SMALL
from m0kit_quant.recipe import Recipe

# Both sides compute in float32, in other orders: up to 8e-6 were measured. A wrong position, order of channels, mask,
# or epsilon is 1e-3 and more.
TOLERANCE = 3e-5
# Of a logit, where they lie some 0.5 apart: 1e-5 were measured.
LOGIT = 1e-4
ON_CUDA = [precision for precision in SCHEMES if precision != "fp32"]
Array = NDArray[Any]
Pair = tuple[Any, Any]


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), np.uint8))


PAIRS: list[Pair] = [
    ("q", "a document"),
    ("which one", "a text of many words, longer than a page of the pool " * 7),
    ("7", "x"),
    ("a query", image(84, 56)),
    ("a query", image(140, 196)),
    ("a query", image(28, 28)),
    (image(56, 112), "a document"),
    (image(56, 56), image(84, 112)),
    (image(84, 112), image(56, 56)),
]


def assert_close(seen: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    __tracebackhide__ = True
    assert seen.shape == expected.shape
    assert np.isfinite(seen).all()
    rows, wanted = (x.astype(np.float64) for x in (seen, expected))
    worst = float((np.abs(rows - wanted).max(1) / np.sqrt((wanted**2).mean(1))).max())
    assert worst <= tolerance, f"{worst:.1e} of a row's size, {worst / tolerance:.0%} of the tolerance"


def written_in_float32(artifact: Path) -> dict[str, Graph]:
    """The CUDA graphs of an artifact in fp32, which export writes none for; they stand beside its own afterwards."""
    config, recipe = read_manifest(artifact).model, Recipe.default("fp32")
    graphs = cuda_graphs(config, recipe, build_graphs(config, recipe), dtype="float32")
    for name, graph in graphs.items():
        (artifact / f"{name}.cuda.onnx").write_bytes(graph.model.SerializeToString())
    return graphs


@pytest.fixture(scope="module", params=["tiny", "broad"])
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exact(request: pytest.FixtureRequest, size: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / size
    export_artifact(request.getfixturevalue(size), folder, progress=False)
    written_in_float32(folder)
    return folder


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, size: str) -> Reference:
    torch.set_num_threads(1)
    return Reference.load(request.getfixturevalue(size))


def results(artifact: Path, pairs: Sequence[Pair], dtype: str | None = None) -> list[Result]:
    """Of an engine on the computer itself."""
    manifest = read_manifest(artifact)
    config = replace(manifest.model, prompt=replace(manifest.model.prompt, max_length=2048))
    device = HostDevice(1 << 30)
    dtype = dtype or cuda_type(manifest.schemes) or ""
    engine = CudaEngine(config, device, partial(device.open, artifact), dtype, salt=b"", pool_bytes=64 << 20)
    schedule = Schedule(engine)
    preparer = Preparer(config, PromptBuilder(artifact / TOKENIZER, config.prompt), b"")
    tickets = [schedule.add(preparer.prepare(pair)) for pair in pairs]
    found: dict[int, Result] = {}
    while len(schedule):
        found.update(schedule.step())
    engine.close()
    return [found[ticket] for ticket in tickets]


def logits(artifact: Path, pairs: Sequence[Pair], dtype: str | None = None) -> Array:
    return np.asarray([result.logit for result in results(artifact, pairs, dtype)])


# --- in float32 ----------------------------------------------------------------------------------------


def test_in_float32_logits_are_pytorchs(exact: Path, reference: Reference) -> None:
    expected = reference.score(PAIRS, raw=True)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits(exact, PAIRS, "float32"), expected, rtol=0, atol=LOGIT)


def test_what_is_divided_between_norms_changes_nothing(
    exact: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float16 needs it, where nothing is rounded: epsilons, biases and activations have their part in it."""
    shifted = tmp_path / "shifted"
    shutil.copytree(exact, shifted)
    monkeypatch.setattr(cuda, "shift_of", lambda _: SHIFT)
    written_in_float32(shifted)
    assert (shifted / "decoder.cuda.onnx").read_bytes() != (exact / "decoder.cuda.onnx").read_bytes()
    np.testing.assert_allclose(logits(shifted, PAIRS, "float32"), reference.score(PAIRS, raw=True), rtol=0, atol=LOGIT)


def test_an_image_is_encoded_as_by_pytorch_alone_and_beside_others(exact: Path, reference: Reference) -> None:
    """Filled up to the size of the largest, by anything."""
    config = read_manifest(exact).model
    vision = CudaReference(exact / "vision.cuda.onnx")
    inputs = [reference.inputs(("q", one)) for one in (image(84, 56), image(28, 28), image(140, 196))]
    grids = [one.grids[0].numpy() for one in inputs]
    with torch.inference_mode():
        expected = [
            reference.core.visual(one.patches[0], grid_thw=one.grids[0][None]).pooler_output.numpy() for one in inputs
        ]
    pixels = [pixels_of(one.patches[0].numpy(), config) for one in inputs]
    merged = config.image.merge_size**2
    size = max(map(len, pixels)) + 8
    found = vision.run(vision_feeds(config, pixels, grids, size), ["image_embeds"])["image_embeds"]
    by_image = found.reshape(len(pixels), size // merged, -1)
    for own, rows, wanted in zip(pixels, by_image, expected, strict=True):
        assert_close(rows[: len(own) // merged], wanted)
    for own, grid, wanted in zip(pixels, grids, expected, strict=True):
        alone = vision.run(vision_feeds(config, [own], [grid], len(own)), ["image_embeds"])["image_embeds"]
        assert_close(alone, wanted)


def pixels_of(patches: Array, config: ModelConfig) -> Array:
    """Patches as PyTorch gets them → bytes of one frame of each."""
    vision, mean, std = config.vision, np.asarray(config.image.mean), np.asarray(config.image.std)
    area = vision.patch_size**2
    frames = patches.reshape(len(patches), vision.in_channels, vision.temporal_patch_size, area)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    values = (frames[:, :, 0] * std[:, None] + mean[:, None]) / config.image.rescale
    return np.asarray(np.rint(values).reshape(len(patches), -1), np.uint8)


def vision_feeds(
    config: ModelConfig, pixels: Sequence[Array], grids: Sequence[Array], size: int, fill: int = 77
) -> dict[str, Array]:
    """Images that are filled up to `size` patches with that byte and that position."""
    whole = np.full((len(pixels), size, pixels[0].shape[1]), fill, np.uint8)
    positions = np.full((len(pixels), size, 2), fill, np.int64)
    for i, (own, grid) in enumerate(zip(pixels, grids, strict=True)):
        whole[i, : len(own)], positions[i, : len(own)] = own, vision_positions(grid, config.vision.merge_size)
    return {"pixels": whole, "positions": positions, "lengths": np.asarray([len(p) for p in pixels], np.int32)}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_fills_an_image_up_reaches_none_of_its_rows(
    exact: Path, size: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """To the bit, whatever it is and however much: attention gives no numbers there at all (`MultiHeadAttention`)."""
    config = read_manifest(exact).model
    artifact = exact
    if dtype == "float16":
        artifact = tmp_path / "fp16"
        export_artifact(request.getfixturevalue(size), artifact, recipe=Recipe.default("fp16"), progress=False)
    vision = CudaReference(artifact / "vision.cuda.onnx")
    grid = np.array([1, 6, 4])
    own = np.random.default_rng(0).integers(0, 256, (24, 588), np.uint8)
    seen = []
    for filled, fill in ((24, 0), (32, 0), (32, 255), (32, 9), (64, 9), (120, 9)):
        found = vision.run(vision_feeds(config, [own], [grid], filled, fill), ["image_embeds"])["image_embeds"]
        assert len(found) == filled // 4
        seen.append(found[:6])
        assert np.isfinite(found[:6].astype(np.float32)).all()
        assert not np.isfinite(found[6:].astype(np.float32)).any()  # so it could have shown
    for other in seen[2:4]:
        np.testing.assert_array_equal(other, seen[1])
    # Products of more rows may be summed in another order.
    for other in seen:
        assert_close(other, seen[0], TOLERANCE if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("extra", [4, 60])
def test_a_score_does_not_know_how_far_its_image_was_filled_up(
    exact: Path, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    before = logits(exact, PAIRS[3:6], "float32")
    monkeypatch.setattr(cuda_engine, "encoder_size", lambda num_patches: num_patches + extra)
    np.testing.assert_allclose(logits(exact, PAIRS[3:6], "float32"), before, rtol=0, atol=LOGIT)


# --- in 16 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ON_CUDA)
def test_in_16_bits_logits_are_pytorchs_with_the_weights_of_the_artifact(
    precision: str, tiny: Path, in_precision: Callable[[str], Path]
) -> None:
    """What is left is what 16 bits cost, for which `kernel_limit` gives the reasons."""
    artifact = in_precision(precision)
    expected = with_stored_weights(tiny, artifact).score(PAIRS, raw=True)
    np.testing.assert_allclose(logits(artifact, PAIRS), expected, rtol=0, atol=kernel_limit(precision, on_gpu=True))
    assert np.ptp(expected) > 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "fp16"
    export_artifact(SMALL / "base", folder, recipe=Recipe.default("fp16"), progress=False)
    return folder


def test_a_trained_model_scores_as_in_pytorch(small: Path) -> None:
    expected = with_stored_weights(SMALL / "base", small).score(PAIRS, raw=True)
    np.testing.assert_allclose(logits(small, PAIRS), expected, rtol=0, atol=kernel_limit("fp16", on_gpu=True))


def with_stored_weights(checkpoint: Path, artifact: Path) -> Reference:
    """PyTorch in float32 on what the artifact's files hold."""
    torch.set_num_threads(1)
    found = Reference.load(checkpoint)
    manifest = read_manifest(artifact)
    stored = StoredWeights(artifact, build_graphs(manifest.model, Recipe.from_dict(manifest.recipe, "manifest")))
    shell = PublishedNames(found.core, found.head)
    with torch.no_grad():
        for name in stored.weights:
            target = shell.get_parameter(name)
            target.copy_(torch.from_numpy(np.ascontiguousarray(stored.read(name))).reshape(target.shape))
    return found


# --- the same data -------------------------------------------------------------------------------------


def outside(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}


@pytest.mark.parametrize("shape", ["tiny", "wide", "full"])
@pytest.mark.parametrize("precision", ON_CUDA)
def test_weights_are_read_where_the_portable_graphs_have_them(precision: str, shape: Any) -> None:
    config, recipe = model_config(shape), Recipe.default(precision)
    portable = build_graphs(config, recipe)
    graphs = cuda_graphs(config, recipe, portable)
    assert list(graphs) == list(GRAPHS)
    for name, graph in graphs.items():
        own, theirs = outside(graph.model.graph), outside(portable[name].model.graph)
        assert own == theirs  # names, types, shapes, and the places: file, offset, length
        used = {i for node in graph.model.graph.node for i in node.input}
        assert own.keys() <= used
        assert {t.external_data[0].value for t in own.values()} == {data_name(name)}
        inside = [t for t in graph.model.graph.initializer if t.name not in own]
        assert sum(len(t.SerializeToString()) for t in inside) < 1 << 20


def test_an_artifact_in_float32_has_none() -> None:
    config, recipe = model_config("tiny"), Recipe.default("fp32")
    assert cuda_graphs(config, recipe, build_graphs(config, recipe)) == {}


@pytest.mark.parametrize("precision", ON_CUDA)
def test_a_written_artifacts_graphs_pass_the_checker(precision: str, in_precision: Callable[[str], Path]) -> None:
    artifact = in_precision(precision)
    for name in set_graphs("cuda").values():
        onnx.checker.check_model(str(artifact / f"{name}.onnx"))


# --- what they are made of -----------------------------------------------------------------------------


def nodes_of(config: ModelConfig, precision: str) -> dict[str, list[onnx.NodeProto]]:
    recipe = Recipe.default(precision)
    return {
        name: list(graph.model.graph.node)
        for name, graph in cuda_graphs(config, recipe, build_graphs(config, recipe)).items()
    }


@pytest.mark.parametrize("precision", ON_CUDA)
def test_there_are_no_loops_and_a_layer_is_a_few_nodes_of_ever_the_same_kind(precision: str) -> None:
    """So that nothing depends on how many rows or images there are: not which nodes run, nor where the host waits."""
    tiny = model_config("tiny")
    layers: list[Counter[str]] = []
    for more in (0, 1, 2):
        config = replace(
            tiny,
            decoder=replace(tiny.decoder, num_layers=tiny.decoder.num_layers + more),
            vision=replace(tiny.vision, depth=tiny.vision.depth + more),
        )
        nodes = nodes_of(config, precision)
        for own in nodes.values():
            assert not {node.op_type for node in own} & {"Loop", "If", "Scan", "NonZero", "Shape", "Range", "Where"}
            assert not any(attribute.HasField("g") for node in own for attribute in node.attribute)
        layers.append(Counter((name, node.op_type) for name, own in nodes.items() for node in own))  # type: ignore[misc]
    one, two = layers[1] - layers[0], layers[2] - layers[1]
    assert one == two
    assert one["vision", "MultiHeadAttention"] == one["decoder", "PagedAttention"] == 1  # type: ignore[index]
    assert sum(count for (name, _), count in one.items() if name == "head") == 0  # type: ignore[misc]


@pytest.mark.parametrize("precision", ON_CUDA)
def test_their_ports_are_those_that_engines_feed(precision: str) -> None:
    config, recipe = model_config("tiny"), Recipe.default(precision)
    for name, graph in cuda_graphs(config, recipe, build_graphs(config, recipe)).items():
        assert graph.ports == expected_ports(config, f"{name}.cuda", cuda_type(recipe.schemes))
        told = [(value.name, value.type.tensor_type.elem_type) for value in graph.model.graph.input]
        assert told == [
            (port.name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))) for port in graph.ports.inputs
        ]


def test_neighbours_are_turned_together() -> None:
    """Two heads of 8: value i of the model stands beside value i + 4."""
    assert in_pairs(2, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert sorted(in_pairs(5, 16)) == list(range(80))


# --- the range of float16 ------------------------------------------------------------------------------


TOKEN = 35  # "D" of "**Document**"
WHITE = image(84, 112)
WHITE.paste((255, 255, 255), (0, 0, 14, 14))


def plant_inner(tensors: dict[str, torch.Tensor]) -> None:
    """One channel of each MLP whose inner value passes 65504 and counts for little afterwards.

    Factors are powers of two, so that no weight is rounded differently.
    """
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor[5] *= 2**8
        if name.endswith("down_proj.weight"):
            tensor[:, 5] /= 2**8
        if name.endswith(("fc1.weight", "fc1.bias")):
            tensor[5] *= 2**15
        if name.endswith("fc2.weight"):
            tensor[:, 5] /= 2**9


def plant_sum(tensors: dict[str, torch.Tensor]) -> None:
    """A channel of what runs through the layers, at one token and one patch alone, as large models have them.

    The token is one of every document's header, which the first MLP knows by its embedding; the patch is white.
    """
    layer = "model.layers.0"
    tensors["model.embed_tokens.weight"][:, 7] = 0
    tensors["model.embed_tokens.weight"][TOKEN, 7] = 2**6
    tensors[f"{layer}.self_attn.o_proj.weight"][7] = 0
    tensors[f"{layer}.post_attention_layernorm.weight"][7] = 1
    for name in ("gate_proj", "up_proj"):
        tensors[f"{layer}.mlp.{name}.weight"][5] = 0
        tensors[f"{layer}.mlp.{name}.weight"][5, 7] = 4
    tensors[f"{layer}.mlp.down_proj.weight"][7, 5] = 2**9
    tensors["visual.merger.mlp.2.weight"][7] = 0
    tensors["visual.merger.mlp.2.bias"][7] = 0
    block = "visual.blocks.0"
    tensors["visual.patch_embed.proj.weight"][7] = 0.25
    tensors[f"{block}.norm2.weight"][7] = 1
    tensors[f"{block}.norm2.bias"][7] = 0
    tensors[f"{block}.mlp.fc1.weight"][5] = 0
    tensors[f"{block}.mlp.fc1.weight"][5, 7] = 256
    tensors[f"{block}.mlp.fc1.bias"][5] = -1300
    tensors[f"{block}.mlp.fc2.weight"][7, 5] = 2**12


def planted(source: Path, folder: Path, plant: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    plant(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@torch.inference_mode()
def peaks(reference: Reference, pairs: Sequence[Pair]) -> dict[str, float]:
    """The largest value inside MLPs, and of the sums that run through the layers, in decoder and image encoder."""
    found: Counter[str] = Counter()

    def note(name: str, values: torch.Tensor) -> None:
        found[name] = max(found[name], float(values.abs().max()))  # type: ignore[assignment]

    hooks = []
    for layer in reference.core.language_model.layers:
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: note("decoder inner", given[0])))
        hooks.append(layer.register_forward_hook(lambda *given: note("decoder sum", given[2])))
    for block in reference.core.visual.blocks:
        hooks.append(block.mlp.fc2.register_forward_pre_hook(lambda _, given: note("vision inner", given[0])))
        hooks.append(block.register_forward_hook(lambda *given: note("vision sum", given[2])))
    reference.score(pairs)
    for hook in hooks:
        hook.remove()
    return dict(found)


BEYOND = [pytest.param(plant_inner, "inner", id="inner"), pytest.param(plant_sum, "sum", id="sum")]
LARGEST_HALF = float(np.finfo(np.float16).max)
Plant = Callable[[dict[str, torch.Tensor]], None]


@pytest.mark.parametrize(("plant", "what"), BEYOND)
def test_what_leaves_the_range_of_float16_still_scores_right(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, what: str
) -> None:
    """And without the shift does not."""
    checkpoint, artifact = planted(tiny, tmp_path / "checkpoint", plant), tmp_path / "fp16"
    pairs = [*PAIRS, ("a query", WHITE), (WHITE, "x")]
    reference = Reference.load(checkpoint)
    seen = peaks(reference, pairs)
    for part in ("decoder", "vision"):
        assert LARGEST_HALF < seen[f"{part} {what}"] < SHIFT * LARGEST_HALF / 2
    expected = reference.score(pairs, raw=True)
    assert np.ptp(expected) > 1  # it leaves something to tell apart
    export_artifact(checkpoint, artifact, recipe=Recipe.default("fp16"), progress=False)
    limit = kernel_limit("fp16", on_gpu=True)  # weights are exact in float16
    np.testing.assert_allclose(logits(artifact, pairs), expected, rtol=0, atol=limit)

    monkeypatch.setattr(cuda, "SHIFT", 1.0)
    config, recipe = read_manifest(artifact).model, Recipe.from_dict(read_manifest(artifact).recipe, "manifest")
    for name, graph in cuda_graphs(config, recipe, build_graphs(config, recipe)).items():
        (artifact / f"{name}.cuda.onnx").write_bytes(graph.model.SerializeToString())
    assert not np.isfinite(logits(artifact, pairs[:1])).any()
    one = reference.inputs(("q", WHITE))
    pixels, grid = pixels_of(one.patches[0].numpy(), config), one.grids[0].numpy()
    feeds = vision_feeds(config, [pixels], [grid], len(pixels))
    embeds = CudaReference(artifact / "vision.cuda.onnx").run(feeds, ["image_embeds"])["image_embeds"]
    assert not np.isfinite(embeds).all()


@pytest.mark.parametrize(("plant", "what"), BEYOND)
def test_bfloat16_has_the_range(tiny: Path, tmp_path: Path, plant: Plant, what: str) -> None:
    checkpoint, artifact = planted(tiny, tmp_path / "checkpoint", plant), tmp_path / "bf16"
    pairs = [*PAIRS, ("a query", WHITE)]
    export_artifact(checkpoint, artifact, recipe=Recipe.default("bf16"), progress=False)
    expected = with_stored_weights(checkpoint, artifact).score(pairs, raw=True)
    np.testing.assert_allclose(logits(artifact, pairs), expected, rtol=0, atol=kernel_limit("bf16", on_gpu=True))


def test_float16_alone_is_shifted() -> None:
    assert [shift_of(dtype) for dtype in ("float16", "bfloat16", "float32")] == [SHIFT, 1.0, 1.0]
    assert np.log2(SHIFT) % 1 == 0  # so that it rounds nothing


def gated(dtype: str, gate: Array, up: Array) -> Array:
    """SiLU(gate) · up over the shift, as the graphs spell it."""
    config = model_config("tiny").decoder
    recipe = Recipe.default({"float16": "fp16", "bfloat16": "bf16"}[dtype])
    portable = build_graphs(model_config("tiny"), recipe)
    model = cuda_graphs(model_config("tiny"), recipe, portable)["decoder"].model
    (node, *_) = [node for node in model.graph.node if node.op_type == "GatedRMSNorm"]
    assert up.shape[1] == config.intermediate_size
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == node.input[1]}
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(gate.dtype))
    ports = [onnx.helper.make_tensor_value_info(name, kind, [None, None]) for name in (node.input[0], node.input[2])]
    out = onnx.helper.make_tensor_value_info(node.output[0], kind, None)
    scale = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = onnx.helper.make_graph([node], "gated", ports, [out], scale)
    feeds = {node.input[0]: up, node.input[2]: gate}
    whole = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    (found,) = CudaReference(whole).run(feeds, [node.output[0]]).values()
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rms", [1e-3, 1.0, 300.0, 45_000.0, 65_504.0])
def test_a_gated_product_is_off_by_less_than_its_last_bit(dtype: str, rms: float) -> None:
    """A norm computes it: what that norms is below the type's rounding up to 45,000, and 5e-4 at the end of float16."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (4, 96))
    up, gate = (signs * rms).astype(kind), rng.uniform(0.5, 4, (4, 96)).astype(kind)
    wide_gate, wide_up = gate.astype(np.float64), up.astype(np.float64)
    exact = wide_gate / (1 + np.exp(-wide_gate)) * wide_up / shift_of(dtype)
    off = np.abs(gated(dtype, gate, up).astype(np.float64) - exact) / np.abs(exact)
    last_bit = float(ml_dtypes.finfo(kind).eps) / 2  # of a sum that is rounded once
    normed = rms**2 / (2 * 2.0**42)
    if rms >= 1:  # below, results are not all normal numbers of float16
        assert off.max() <= last_bit + normed + 1e-6
    assert normed <= (2.5e-4 if rms <= 45_000 else 5e-4)
