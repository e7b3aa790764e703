"""The three graphs against PyTorch, and what they promise: standard operators, packing, pasts, bounded memory.

Differences are measured per row: the largest, relative to the root mean square of the row in PyTorch.
"""

import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from m0kit import Reranker
from m0kit.artifact import GRAPHS, read_manifest
from m0kit.config import ModelConfig
from m0kit.planner import image_rows, layout_groups
from m0kit.positions import vision_positions
from m0kit.precision import SCHEMES
from m0kit.sessions import OnnxRuntimeGraph, open_graph
from m0kit_export.builder import CONTRIB, OPSET, Builder
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.export import export_artifact
from m0kit_export.graphs import CHUNK_ROWS, VISION_PIECE_ROWS, build_graphs
from m0kit_parity.portable import ENGINES
from m0kit_parity.reference import Reference
from m0kit_quant.recipe import Recipe

# Both sides compute in float32, in different orders: up to 5e-6 were measured. A wrong position, mask,
# frequency or epsilon is 1e-3 and more.
TOLERANCE = 1e-5
# The same sums in the same engine, but in other blocks of its matrix products: up to 2e-6 were measured.
PACKING = 3e-6
Array = NDArray[Any]


@dataclass
class Sides:
    """The same model twice."""

    config: ModelConfig
    torch: Reference
    vision: OnnxRuntimeGraph
    decoder: OnnxRuntimeGraph
    head: OnnxRuntimeGraph


@dataclass
class Prompt:
    """Token ids (T,), positions (3, T), image embeddings (V, D) in the place of rows index (V,)."""

    ids: Array
    positions: Array
    index: Array
    embeds: Array

    def cut(self, start: int, end: int) -> "Prompt":
        held = (self.index >= start) & (self.index < end)
        ids, positions = self.ids[start:end], self.positions[:, start:end]
        return Prompt(ids, positions, self.index[held] - start, self.embeds[held])


@pytest.fixture(scope="module", params=["tiny", "broad"])
def sides(request: pytest.FixtureRequest) -> Sides:
    checkpoint: Path = request.getfixturevalue(request.param)
    artifact: Path = request.getfixturevalue(f"{request.param}_artifact")
    graphs = [open_graph(artifact, name, threads=1) for name in GRAPHS]
    torch.set_num_threads(1)
    return Sides(read_manifest(artifact).model, Reference.load(checkpoint), *graphs)


def assert_close(seen: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    __tracebackhide__ = True
    assert seen.dtype == np.float32
    assert seen.shape == expected.shape
    assert np.isfinite(seen).all()
    rows, wanted = (np.atleast_2d(x).reshape(-1, x.shape[-1]).astype(np.float64) for x in (seen, expected))
    worst = float((np.abs(rows - wanted).max(1) / np.sqrt((wanted**2).mean(1))).max())
    assert worst <= tolerance, f"{worst:.1e} of a row's size, {worst / tolerance:.0%} of the tolerance"


# --- vision ------------------------------------------------------------------------------------------


def random_patches(config: ModelConfig, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((h * w, config.vision.patch_values), np.float32) for h, w in sizes]


def run_vision(sides: Sides, sizes: Sequence[tuple[int, int]], patches: Sequence[Array]) -> Array:
    grids = [np.array([1, h, w]) for h, w in sizes]
    feeds = {
        "patches": np.concatenate(patches),
        "positions": np.concatenate([vision_positions(grid, sides.config.vision.merge_size) for grid in grids]),
        "images": image_rows([len(p) for p in patches]),
    }
    return sides.vision.run(feeds, ["image_embeds"])["image_embeds"]


@torch.inference_mode()
def torch_vision(sides: Sides, sizes: Sequence[tuple[int, int]], patches: Sequence[Array]) -> Array:
    grids = torch.tensor([[1, h, w] for h, w in sizes])
    out = sides.torch._core.visual(torch.from_numpy(np.concatenate(patches)), grid_thw=grids)
    return np.asarray(out.pooler_output.numpy())


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([(2, 2)], id="one visual token"),
        pytest.param([(4, 6)], id="small"),
        pytest.param([(2, 58)], id="a line"),
        pytest.param([(34, 32)], id="more rows than a chunk and a piece"),
        pytest.param([(4, 4), (2, 8), (26, 22)], id="several, one of them in two pieces"),
    ],
)
def test_vision_agrees_with_pytorch(sides: Sides, sizes: list[tuple[int, int]]) -> None:
    patches = random_patches(sides.config, sizes)
    assert_close(run_vision(sides, sizes, patches), torch_vision(sides, sizes, patches))


def test_the_large_image_really_is_cut() -> None:
    assert CHUNK_ROWS < 34 * 32
    assert VISION_PIECE_ROWS < 34 * 32


def test_images_do_not_see_each_other(sides: Sides) -> None:
    sizes = [(4, 4), (6, 2), (24, 24)]
    patches = random_patches(sides.config, sizes)
    alone = [run_vision(sides, [size], [own]) for size, own in zip(sizes, patches, strict=True)]
    together = run_vision(sides, sizes, patches)
    assert_close(together, np.concatenate(alone), PACKING)


# --- decoder -----------------------------------------------------------------------------------------


def random_prompt(config: ModelConfig, length: int, seed: int = 0, num_images: int = 0) -> Prompt:
    """Positions as no prompt has them: the three axes drift apart, so that a mixed-up axis shows."""
    rng = np.random.default_rng([seed, length])
    index = np.sort(rng.permutation(length)[:num_images])
    return Prompt(
        rng.integers(0, config.decoder.vocab_size, length),
        np.cumsum(rng.integers(0, 3, (3, length)), axis=1),
        index,
        rng.standard_normal((len(index), config.decoder.hidden_size), np.float32),
    )


def run_decoder(
    sides: Sides,
    prompts: Sequence[Prompt],
    pieces: Array,
    last_index: Array,
    last_pieces: Array,
    pasts: dict[str, Array] | None = None,
    outputs: Sequence[str] = ("hidden",),
) -> dict[str, Array]:
    decoder = sides.config.decoder
    none = np.zeros((0, decoder.kv_size), np.float32)
    names = [f"{i}.{kv}" for i in range(decoder.num_layers) for kv in ("key", "value")]
    starts = np.cumsum([0, *(len(p.ids) for p in prompts)])
    feeds = {
        "token_ids": np.concatenate([p.ids for p in prompts]),
        "positions": np.concatenate([p.positions for p in prompts], axis=1),
        "image_embeds": np.concatenate([p.embeds for p in prompts]),
        "image_token_index": np.concatenate([p.index + s for p, s in zip(prompts, starts, strict=False)]),
        "pieces": pieces,
        "last_index": last_index,
        "last_pieces": last_pieces,
        **{f"past_key_values.{name}": (pasts or {}).get(f"present.{name}", none) for name in names},
    }
    return sides.decoder.run(feeds, outputs)


def decode(sides: Sides, prompts: Sequence[Prompt], cuts: Sequence[int] | None = None) -> Array:
    """Each prompt's last hidden state, all in one run, cut into a prefix of so many tokens and a suffix."""
    cuts = cuts or [0] * len(prompts)
    layout = layout_groups([(cut, [len(p.ids) - cut]) for p, cut in zip(prompts, cuts, strict=True)])
    return run_decoder(sides, prompts, layout.pieces, layout.last_index, layout.last_pieces)["hidden"]


def presents(sides: Sides) -> list[str]:
    return [f"present.{i}.{kv}" for i in range(sides.config.decoder.num_layers) for kv in ("key", "value")]


@torch.inference_mode()
def torch_decode(sides: Sides, prompts: Sequence[Prompt]) -> Array:
    rows = []
    for prompt in prompts:
        embeds = sides.torch._core.language_model.embed_tokens(torch.from_numpy(prompt.ids))
        embeds[torch.from_numpy(prompt.index)] = torch.from_numpy(prompt.embeds)
        out = sides.torch._core.language_model(
            inputs_embeds=embeds[None],
            position_ids=torch.from_numpy(prompt.positions)[:, None],
            use_cache=False,
        )
        rows.append(out.last_hidden_state[0, -1].numpy())
    return np.stack(rows)


@pytest.mark.parametrize(
    ("length", "num_images"),
    [(1, 0), (1, 1), (2, 0), (37, 9), (256, 0), (257, 256), (CHUNK_ROWS + 77, 40)],
)
def test_decoder_agrees_with_pytorch(sides: Sides, length: int, num_images: int) -> None:
    prompts = [random_prompt(sides.config, length, num_images=num_images)]
    assert_close(decode(sides, prompts), torch_decode(sides, prompts))


@pytest.mark.parametrize(("length", "cut"), [(2, 1), (40, 33), (300, 298), (700, 20), (900, 450)])
def test_a_prefix_of_the_run_answers_as_if_in_one_row(sides: Sides, length: int, cut: int) -> None:
    prompts = [random_prompt(sides.config, length, num_images=5 if length > 5 else 0)]
    assert_close(decode(sides, prompts, [cut]), torch_decode(sides, prompts))


def test_one_prefix_answers_many_suffixes(sides: Sides) -> None:
    wholes = [random_prompt(sides.config, 320, num_images=30)]
    for seed in (1, 2):  # other queries behind the same document
        other = random_prompt(sides.config, 20 * seed, seed)
        document = wholes[0].cut(0, 300)
        positions = np.concatenate([document.positions, other.positions + document.positions[:, -1:] + 1], axis=1)
        wholes.append(Prompt(np.concatenate([document.ids, other.ids]), positions, document.index, document.embeds))
    packed = [wholes[0].cut(0, 300), *(whole.cut(300, len(whole.ids)) for whole in wholes)]
    layout = layout_groups([(300, [len(part.ids) for part in packed[1:]])])
    hidden = run_decoder(sides, packed, layout.pieces, layout.last_index, layout.last_pieces)["hidden"]
    assert_close(hidden, torch_decode(sides, wholes))


def test_other_pairs_in_the_run_change_nothing(sides: Sides) -> None:
    prompts = [random_prompt(sides.config, n, num_images=min(n, 8)) for n in (5, 300, 1, 48, 700)]
    alone = np.concatenate([decode(sides, [prompt]) for prompt in prompts])
    assert_close(decode(sides, prompts), alone, PACKING)
    assert_close(decode(sides, prompts[::-1])[::-1], alone, PACKING)


def test_only_the_wanted_rows_come_out_in_the_order_asked(sides: Sides) -> None:
    prompt = random_prompt(sides.config, 50)
    layout = layout_groups([(0, [50])])
    wanted = np.array([49, 7, 20])
    last_pieces = np.array([(q, q + 1, 0, 0, 0, row + 1, 0, 0) for q, row in enumerate(wanted)])
    hidden = run_decoder(sides, [prompt], layout.pieces, wanted, last_pieces)["hidden"]
    assert_close(hidden, torch_decode(sides, [prompt.cut(0, row + 1) for row in wanted]))


@pytest.mark.parametrize(("length", "cut"), [(2, 1), (40, 33), (600, 100), (600, 599), (900, 300)])
def test_presents_fed_as_past_give_what_one_run_gives(sides: Sides, length: int, cut: int) -> None:
    prompt = random_prompt(sides.config, length, num_images=1)
    first = layout_groups([(0, [cut])])
    past = run_decoder(
        sides, [prompt.cut(0, cut)], first.pieces, first.last_index, first.last_pieces, outputs=presents(sides)
    )
    second = layout_groups([(0, [length - cut])])
    pieces, last_pieces = second.pieces.copy(), second.last_pieces.copy()
    for table in (pieces, last_pieces):
        table[:, 6:] = 0, cut
    hidden = run_decoder(
        sides, [prompt.cut(cut, length)], pieces, second.last_index, last_pieces, past, ["hidden", *presents(sides)]
    )
    assert_close(hidden["hidden"], torch_decode(sides, [prompt]))
    whole = layout_groups([(0, [length])])
    expected = run_decoder(sides, [prompt], whole.pieces, whole.last_index, whole.last_pieces, outputs=presents(sides))
    for name in presents(sides):  # the new rows alone, rotated
        assert_close(np.concatenate([past[name], hidden[name]]), expected[name])


def test_ragged_pasts_of_several_documents_answer_in_one_run(sides: Sides) -> None:
    """Three documents of different lengths in one past table, a stray one between them, and one pair without."""
    lengths, cuts = (60, 500, 9, 30), (40, 300, 8, 0)
    prompts = [random_prompt(sides.config, n, num_images=3) for n in lengths]
    stray = random_prompt(sides.config, 70)
    documents = [prompts[0].cut(0, 40), stray, prompts[1].cut(0, 300), prompts[2].cut(0, 8)]
    first = layout_groups([(0, [len(d.ids)]) for d in documents])
    pasts = run_decoder(sides, documents, first.pieces, first.last_index, first.last_pieces, outputs=presents(sides))
    places = [(0, 40), (110, 410), (410, 418), (0, 0)]
    pieces: list[tuple[int, ...]] = []
    last_pieces: list[tuple[int, ...]] = []
    row = 0
    for length, cut, place in zip(lengths, cuts, places, strict=True):
        end = row + length - cut
        for start in range(row, end, 13):  # other cuts than the planner's give the same
            stop = min(start + 13, end)
            pieces.append((start, stop, 0, 0, row, stop, *place))
        last_pieces.append((len(last_pieces), len(last_pieces) + 1, 0, 0, row, end, *place))
        row = end
    ends = np.cumsum([n - c for n, c in zip(lengths, cuts, strict=True)]) - 1
    suffixes = [p.cut(c, len(p.ids)) for p, c in zip(prompts, cuts, strict=True)]
    hidden = run_decoder(sides, suffixes, np.array(pieces), ends, np.array(last_pieces), pasts)["hidden"]
    assert_close(hidden, torch_decode(sides, prompts))


def test_past_prefix_and_suffix_stand_in_that_order(sides: Sides) -> None:
    """All three spans of a piece at once: a past, a prefix of this run after it, and the suffix itself."""
    prompt = random_prompt(sides.config, 90)
    first = layout_groups([(0, [30])])
    past = run_decoder(
        sides, [prompt.cut(0, 30)], first.pieces, first.last_index, first.last_pieces, outputs=presents(sides)
    )
    pieces = np.array([(0, 40, 0, 0, 0, 40, 0, 30), (40, 60, 0, 40, 40, 60, 0, 30)])
    last_pieces = np.array([(0, 1, 0, 40, 40, 60, 0, 30)])
    hidden = run_decoder(sides, [prompt.cut(30, 90)], pieces, np.array([59]), last_pieces, past)["hidden"]
    assert_close(hidden, torch_decode(sides, [prompt]))


# --- head --------------------------------------------------------------------------------------------


def test_head_agrees_with_pytorch(sides: Sides) -> None:
    hidden = np.random.default_rng(0).standard_normal((17, sides.config.decoder.hidden_size), np.float32)
    expected = sides.torch._logit(torch.from_numpy(hidden)).numpy()
    assert_close(sides.head.run({"hidden": hidden}, ["logit"])["logit"], expected)


# --- what the graphs are made of -----------------------------------------------------------------------


def nodes_of(graph: onnx.GraphProto, depth: int = 0) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Every node with the number of loops around it."""
    for node in graph.node:
        yield depth, node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g, depth + 1)


def load_graphs(artifact: Path) -> dict[str, onnx.ModelProto]:
    return {name: onnx.load(artifact / f"{name}.onnx", load_external_data=False) for name in GRAPHS}


@pytest.fixture(scope="module", params=SCHEMES)
def written(request: pytest.FixtureRequest, in_precision: Callable[[str], Path]) -> Path:
    return in_precision(request.param)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_pass_the_checker_with_data_and_inferred_shapes(written: Path, name: str) -> None:
    onnx.checker.check_model(str(written / f"{name}.onnx"), full_check=True)


# Which of ONNX Runtime's own operators a graph may hold, by precision; fp32, fp16 and bf16 need none.
OWN = {
    "int8": {"vision": {"MatMulIntegerToFloat", "MultiHeadAttention"}, "decoder": {"MatMulIntegerToFloat"}},
    "int4": {
        "vision": {"MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention"},
        "decoder": {"MatMulIntegerToFloat", "MatMulNBits"},
    },
    "nf4": {"vision": {"MatMulBnb4", "MultiHeadAttention"}, "decoder": {"MatMulBnb4"}},
}


def test_graphs_hold_standard_operators_of_one_opset_and_else_what_their_precision_needs(written: Path) -> None:
    precision = read_manifest(written).scheme
    for name, model in load_graphs(written).items():
        own = {node.op_type for _, node in nodes_of(model.graph) if node.domain == CONTRIB}
        assert own == OWN.get(precision, {}).get(name, set())
        domains = [("", OPSET), (CONTRIB, 1)] if own else [("", OPSET)]
        assert [(o.domain, o.version) for o in model.opset_import] == domains
        assert {node.domain for _, node in nodes_of(model.graph)} == {domain for domain, _ in domains}
        assert not model.functions


def test_every_tensor_of_the_checkpoint_is_used_exactly_once(written: Path, tiny: Path) -> None:
    stored: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for model in load_graphs(written).values():
        external = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        stored.update(external)
        used.update(i for _, node in nodes_of(model.graph) for i in node.input if i in external)
    recipe = Recipe.from_dict(read_manifest(written).recipe, "manifest")
    weights = [w for graph in build_graphs(open_checkpoint(tiny).config, recipe).values() for w in graph.weights]
    assert sorted(weight.name for weight in weights) == sorted(open_checkpoint(tiny).names)
    once = {part.name: 1 for weight in weights for part in weight.parts}
    assert len(once) >= len(weights)
    assert stored == once
    assert used == once


def test_declared_ports_are_those_of_the_manifest(written: Path) -> None:
    for name, described in read_manifest(written).graphs.items():
        graph = load_graphs(written)[name].graph
        for kind, ports in (("inputs", graph.input), ("outputs", graph.output)):
            assert [p["name"] for p in described[kind]] == [p.name for p in ports]
            for seen, port in zip(described[kind], ports, strict=True):
                kept = port.type.tensor_type
                assert seen["dtype"] == onnx.helper.tensor_dtype_to_np_dtype(kept.elem_type).name
                assert seen["shape"] == [d.dim_param or d.dim_value for d in kept.shape.dim]


# --- bounded memory ------------------------------------------------------------------------------------


def test_what_grows_with_rows_times_columns_stands_inside_loops(written: Path) -> None:
    """Attention and its mask see one piece, the inside of an MLP one chunk."""
    for name, model in load_graphs(written).items():
        for depth, node in nodes_of(model.graph):
            if node.op_type in ("Attention", "LessOrEqual", "Softmax") or ".mlp." in "".join(node.input):
                expected = 2 if name == "vision" and node.op_type == "Attention" else 1  # images, then pieces
                assert depth == expected or "merger" in "".join(node.input), f"{name}: {node.name}"


PEAK = textwrap.dedent("""
    import sys
    from pathlib import Path
    import numpy as np
    from m0kit import planner
    from m0kit.artifact import read_manifest
    from m0kit.sessions import open_graph

    folder, T, rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    planner.PIECE_ROWS = rows
    config = read_manifest(folder).model
    layout = planner.layout_groups([(0, [T])])
    none = np.zeros((0, config.decoder.kv_size), np.float32)
    decoder = open_graph(folder, "decoder", threads=1)
    vision = open_graph(folder, "vision", threads=1)
    feeds = {
        "token_ids": np.zeros(T, np.int64),
        "positions": np.tile(np.arange(T), (3, 1)),
        "image_embeds": np.zeros((0, config.decoder.hidden_size), np.float32),
        "image_token_index": np.zeros(0, np.int64),
        "pieces": layout.pieces, "last_index": layout.last_index, "last_pieces": layout.last_pieces,
        **{f"past_key_values.{i}.{kv}": none for i in range(config.decoder.num_layers) for kv in ("key", "value")},
    }
    patches = {
        "patches": np.zeros((T, config.vision.patch_values), np.float32),
        "positions": np.zeros((T, 2), np.int64),
        "images": planner.image_rows([T]),
    }

    def peak():
        return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) >> 10

    before = peak()
    decoder.run(feeds, ["hidden"])
    after = peak()
    vision.run(patches, ["image_embeds"])
    print(after - before, peak() - after)
""")


def peak_growth(artifact: Path, num_rows: int, piece_rows: int) -> list[int]:
    """MiB that one run of (decoder, vision) adds to the peak of a fresh process."""
    command = [sys.executable, "-c", PEAK, str(artifact), str(num_rows), str(piece_rows)]
    return [int(n) for n in subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_square_of_the_length(tiny_artifact: Path) -> None:
    """5,000 rows squared, in 4 heads of float32, are 381 MiB; in pieces of 256 rows they are 20."""
    decoder, vision = peak_growth(tiny_artifact, 5000, 256)
    assert decoder < 120
    assert vision < 120
    assert peak_growth(tiny_artifact, 5000, 5000)[0] > 381  # one piece: so the measure can see it


# --- float16 -------------------------------------------------------------------------------------------


def plant_outliers(source: Path, folder: Path, where: str) -> Path:
    """One channel of each MLP whose inner value passes 65504 (but not 1e7) and counts for little afterwards.

    Factors are powers of two, so that no weight is rounded differently.
    """
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if where == "decoder" and name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor[5] *= 2**10  # gate and up stay under 65504, their product does not
        if where == "decoder" and name.endswith("down_proj.weight"):
            tensor[:, 5] /= 2**10
        if where == "vision" and name.endswith(("fc1.weight", "fc1.bias")):
            tensor[5] *= 2**15
        if where == "vision" and name.endswith("fc2.weight"):
            tensor[:, 5] /= 2**9
    assert all(torch.isfinite(t).all() for t in tensors.values())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def naive_linear(self: Builder, name: str, x: str, shape: tuple[int, int], **options: Any) -> str:
    return _linear(self, name, x, shape, **{**options, "half": True})


_linear = Builder.linear


def score(artifact: Path, where: str, engine: str) -> Array:
    pairs: list[Any] = [("a query", "small"), ("a query", "document"), ("which", "0123456789")]
    if where == "vision":
        noise = np.random.default_rng(0).integers(0, 256, (3, 56, 84, 3), np.uint8)
        pairs = [("q", Image.fromarray(picture)) for picture in noise]
    return Reranker.load(artifact, threads=1, open_graph=ENGINES[engine]).score(pairs, raw=True)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("where", ["decoder", "vision"])
@pytest.mark.parametrize("size", ["tiny", "broad"])
def test_fp16_survives_what_overflows_a_naive_fp16_graph(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: str, where: str
) -> None:
    """In ONNX's evaluator, which computes in float16 what is float16; ONNX Runtime's CPU kernels widen it."""
    checkpoint = plant_outliers(request.getfixturevalue(size), tmp_path / "checkpoint", where)
    export_artifact(checkpoint, tmp_path / "fp32", progress=False)
    export_artifact(checkpoint, tmp_path / "fp16", recipe=Recipe.default("fp16"), progress=False)
    monkeypatch.setattr(Builder, "linear", naive_linear)
    export_artifact(checkpoint, tmp_path / "naive", recipe=Recipe.default("fp16"), progress=False)

    expected = score(tmp_path / "fp32", where, "onnxruntime")
    assert np.isfinite(expected).all()
    assert np.ptp(expected) > 0.1  # the outliers leave something to tell apart
    assert not np.isfinite(score(tmp_path / "naive", where, "onnx")).any()
    # Weights are exact in float16; a product rounds to 2⁻¹¹, and the layers add that up: measured 0.004.
    for engine in ("onnx", "onnxruntime"):
        assert np.abs(score(tmp_path / "fp16", where, engine) - expected).max() < 0.02, engine
