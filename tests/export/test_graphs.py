"""The graphs against PyTorch, and what they promise: standard operators, packing, pasts in three forms, bounded memory.

Differences are measured per row: the largest, relative to the root mean square of the row in PyTorch.
"""

import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
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
from m0kit.artifact.manifest import read_manifest
from m0kit.artifact.ports import GRAPHS, KV, data_name, decoder_name, set_graphs
from m0kit.config import ModelConfig
from m0kit.errors import ScoreError, WrongAnswerError
from m0kit.keeping.states import Pasts, State
from m0kit.precision import SCHEMES
from m0kit.scoring.planner import Group, Layout, image_rows, layout_groups
from m0kit.scoring.positions import vision_positions
from m0kit.scoring.sessions import OnnxRuntimeGraph, open_graph
from m0kit_export.builder import CONTRIB, OPSET, Builder
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.export import export_artifact
from m0kit_export.graphs import (
    CHUNK_ROWS,
    FLASH_PIECE_ROWS,
    VISION_PIECE_ROWS,
    build_graphs,
    kept_decoders,
)
from m0kit_parity.proof.portable import ENGINES
from m0kit_parity.reference import Reference
from m0kit_quant.halves import Fit
from m0kit_quant.recipe import Recipe

# Both sides compute in float32, in different orders: up to 5e-6 were measured. A wrong position, mask,
# frequency or epsilon is 1e-3 and more.
TOLERANCE = 1e-5
# The same sums in the same engine, but in other blocks of its matrix products: up to 2e-6 were measured.
PACKING = 3e-6
FLOATS = ("fp32", "fp16", "bf16")
FILES = (*GRAPHS, *(decoder_name(kv) for kv in KV if kv != "fp32"))  # the decoder once for every form of its pasts
VISIONS = ("vision", set_graphs("cpu")["vision"])
ON_CUDA = tuple(set_graphs("cuda").values())  # what these are made of, and compute, test_cuda tells
Array = NDArray[Any]


@dataclass
class Sides:
    """The same model twice."""

    config: ModelConfig
    torch: Reference
    visions: dict[str, OnnxRuntimeGraph]  # the portable one and that of the set for CPUs, by name
    decoder: OnnxRuntimeGraph
    head: OnnxRuntimeGraph
    kept: dict[str, OnnxRuntimeGraph]  # decoders by the form of their pasts


@dataclass
class Tables:
    """Tables written by hand, where the planner's are not meant."""

    pieces: Array
    last_index: Array
    last_pieces: Array


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
    visions = {name: open_graph(artifact, name, threads=1) for name in VISIONS}
    decoder, head = (open_graph(artifact, name, threads=1) for name in ("decoder", "head"))
    kept = {kv: open_graph(artifact, decoder_name(kv), threads=1) for kv in KV}
    torch.set_num_threads(1)
    return Sides(read_manifest(artifact).model, Reference.load(checkpoint), visions, decoder, head, kept)


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


def run_vision(sides: Sides, name: str, sizes: Sequence[tuple[int, int]], patches: Sequence[Array]) -> Array:
    grids = [np.array([1, h, w]) for h, w in sizes]
    feeds = {
        "patches": np.concatenate(patches),
        "positions": np.concatenate([vision_positions(grid, sides.config.vision.merge_size) for grid in grids]),
        "images": image_rows([len(p) for p in patches]),
    }
    return sides.visions[name].run(feeds, ["image_embeds"])["image_embeds"]


@torch.inference_mode()
def torch_vision(sides: Sides, sizes: Sequence[tuple[int, int]], patches: Sequence[Array]) -> Array:
    grids = torch.tensor([[1, h, w] for h, w in sizes])
    out = sides.torch.core.visual(torch.from_numpy(np.concatenate(patches)), grid_thw=grids)
    return np.asarray(out.pooler_output.numpy())


@pytest.mark.parametrize("name", VISIONS)
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
def test_vision_agrees_with_pytorch(sides: Sides, name: str, sizes: list[tuple[int, int]]) -> None:
    patches = random_patches(sides.config, sizes)
    assert_close(run_vision(sides, name, sizes, patches), torch_vision(sides, sizes, patches))


def test_the_large_image_really_is_cut() -> None:
    assert CHUNK_ROWS < 34 * 32
    assert VISION_PIECE_ROWS < FLASH_PIECE_ROWS < 34 * 32


@pytest.mark.parametrize("name", VISIONS)
def test_images_do_not_see_each_other(sides: Sides, name: str) -> None:
    sizes = [(4, 4), (6, 2), (24, 24)]
    patches = random_patches(sides.config, sizes)
    alone = [run_vision(sides, name, [size], [own]) for size, own in zip(sizes, patches, strict=True)]
    together = run_vision(sides, name, sizes, patches)
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
    tables: Layout | Tables,
    pasts: dict[str, Array] | None = None,
    outputs: Sequence[str] = ("hidden",),
    kv: str = "fp32",
) -> dict[str, Array]:
    """One run on the rows of all prompts and those that fill it up; presents without the latter."""
    starts = np.cumsum([0, *(len(p.ids) for p in prompts)])
    num_rows, fill = int(starts[-1]), int(tables.pieces[:, 1].max() - starts[-1])
    feeds = {
        "token_ids": np.concatenate([*(p.ids for p in prompts), np.full(fill, 7)]),
        "positions": np.concatenate([*(p.positions for p in prompts), np.full((3, fill), 3)], axis=1),
        "image_embeds": np.concatenate([p.embeds for p in prompts]),
        "image_token_index": np.concatenate([p.index + s for p, s in zip(prompts, starts, strict=False)]),
        "pieces": tables.pieces,
        "last_index": tables.last_index,
        "last_pieces": tables.last_pieces,
        **Pasts(sides.config.decoder, kv).feeds([]),
    }
    for name, values in (pasts or {}).items():
        assert name in feeds
        feeds[name] = values
    out = sides.kept[kv].run(feeds, outputs)
    return {name: rows[:, :num_rows] if name.startswith("present") else rows for name, rows in out.items()}


def decode(sides: Sides, prompts: Sequence[Prompt], cuts: Sequence[int] | None = None) -> Array:
    """Each prompt's last hidden state, all in one run, cut into a prefix of so many tokens and a suffix."""
    cuts = cuts or [0] * len(prompts)
    layout = layout_groups([Group(cut, [(cut, len(p.ids) - cut)]) for p, cut in zip(prompts, cuts, strict=True)])
    return run_decoder(sides, prompts, layout)["hidden"][: len(prompts)]


def compute(sides: Sides, documents: Sequence[Prompt], kv: str = "fp32") -> dict[str, Array]:
    """The presents (K, T, C) of documents packed in one run."""
    layout = layout_groups([Group(len(document.ids), []) for document in documents])
    return run_decoder(sides, documents, layout, outputs=presents(sides), kv=kv)


def as_pasts(out: dict[str, Array]) -> dict[str, Array]:
    """Presents under the names by which they are fed again."""
    return {name.replace("present", "past_key_values"): values for name, values in out.items()}


def presents(sides: Sides) -> list[str]:
    return [f"present.{i}.{kv}" for i in range(sides.config.decoder.num_layers) for kv in ("key", "value")]


@torch.inference_mode()
def torch_decode(sides: Sides, prompts: Sequence[Prompt]) -> Array:
    rows = []
    for prompt in prompts:
        embeds = sides.torch.core.language_model.embed_tokens(torch.from_numpy(prompt.ids))
        embeds[torch.from_numpy(prompt.index)] = torch.from_numpy(prompt.embeds)
        out = sides.torch.core.language_model(
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
    layout = layout_groups([Group(300, [(300, len(part.ids)) for part in packed[1:]])])
    hidden = run_decoder(sides, packed, layout)["hidden"]
    assert_close(hidden[:3], torch_decode(sides, wholes))


def test_other_pairs_in_the_run_change_nothing(sides: Sides) -> None:
    prompts = [random_prompt(sides.config, n, num_images=min(n, 8)) for n in (5, 300, 1, 48, 700)]
    alone = np.concatenate([decode(sides, [prompt]) for prompt in prompts])
    assert_close(decode(sides, prompts), alone, PACKING)
    assert_close(decode(sides, prompts[::-1])[::-1], alone, PACKING)


def test_a_suffix_may_follow_a_part_of_the_prefix(sides: Sides) -> None:
    """As where a query's text merges into the last tokens of the document's."""
    whole = random_prompt(sides.config, 60)
    document, lengths = whole.cut(0, 40), (40, 37, 1)
    suffixes = [whole.cut(used, 60) for used in lengths]
    layout = layout_groups([Group(40, [(used, 60 - used) for used in lengths])])
    hidden = run_decoder(sides, [document, *suffixes], layout)["hidden"][:3]
    assert_close(hidden, np.repeat(torch_decode(sides, [whole]), 3, axis=0))


def test_only_the_wanted_rows_come_out_in_the_order_asked(sides: Sides) -> None:
    prompt = random_prompt(sides.config, 50)
    layout = layout_groups([Group(0, [(0, 50)])])
    wanted = np.array([49, 7, 20])
    last_pieces = np.array([(q, q + 1, 0, 0, 0, row + 1, 0, 0, 0) for q, row in enumerate(wanted)])
    hidden = run_decoder(sides, [prompt], Tables(layout.pieces, wanted, last_pieces))["hidden"]
    assert_close(hidden, torch_decode(sides, [prompt.cut(0, row + 1) for row in wanted]))


@pytest.mark.parametrize(("length", "cut"), [(2, 1), (40, 33), (600, 100), (600, 599), (900, 300)])
def test_presents_fed_as_past_give_what_one_run_gives(sides: Sides, length: int, cut: int) -> None:
    prompt = random_prompt(sides.config, length, num_images=1)
    past = compute(sides, [prompt.cut(0, cut)])
    behind = layout_groups([Group(cut, [(cut, length - cut)], kept=True)])
    out = run_decoder(sides, [prompt.cut(cut, length)], behind, as_pasts(past), ["hidden", *presents(sides)])
    assert_close(out["hidden"][:1], torch_decode(sides, [prompt]))
    expected = compute(sides, [prompt])
    for name in presents(sides):  # the new rows alone, rotated
        decoder = sides.config.decoder
        assert expected[name].shape == (decoder.num_kv_heads, length, decoder.head_dim)
        assert_close(np.concatenate([past[name], out[name]], axis=1), expected[name])


def test_ragged_pasts_of_several_documents_answer_in_one_run(sides: Sides) -> None:
    """Three documents of different lengths in one past table, a stray one between them, and one pair without."""
    lengths, cuts = (60, 500, 9, 30), (40, 300, 8, 0)
    prompts = [random_prompt(sides.config, n, num_images=3) for n in lengths]
    stray = random_prompt(sides.config, 70)
    pasts = compute(sides, [prompts[0].cut(0, 40), stray, prompts[1].cut(0, 300), prompts[2].cut(0, 8)])
    places = [(0, 40, 0), (110, 410, 2), (410, 418, 3), (0, 0, 0)]
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
    tables = Tables(np.array(pieces), ends, np.array(last_pieces))
    hidden = run_decoder(sides, suffixes, tables, as_pasts(pasts))["hidden"]
    assert_close(hidden, torch_decode(sides, prompts))


def test_pasts_and_prefixes_of_the_run_stand_side_by_side(sides: Sides) -> None:
    """The planner's own tables: kept documents, one of them used in part, between documents that are not."""
    prompts = [random_prompt(sides.config, n, num_images=2) for n in (50, 90, 33, 300, 21)]
    cuts, kept = (20, 80, 30, 290, 9), (False, True, False, True, False)
    documents = [prompt.cut(0, cut) for prompt, cut in zip(prompts, cuts, strict=True)]
    pasts = compute(sides, [document for document, is_kept in zip(documents, kept, strict=True) if is_kept])
    groups, rows = [], []
    for prompt, document, cut, is_kept in zip(prompts, documents, cuts, kept, strict=True):
        groups.append(Group(cut, [(used, len(prompt.ids) - used) for used in (cut, cut - 3)], is_kept))
        rows += [*([] if is_kept else [document]), *(prompt.cut(used, len(prompt.ids)) for used in (cut, cut - 3))]
    hidden = run_decoder(sides, rows, layout_groups(groups), as_pasts(pasts))["hidden"][:10]
    assert_close(hidden, np.repeat(torch_decode(sides, prompts), 2, axis=0))


def test_past_prefix_and_suffix_stand_in_that_order(sides: Sides) -> None:
    """All three spans of a piece at once: a past, a prefix of this run after it, and the suffix itself."""
    prompt = random_prompt(sides.config, 90)
    past = compute(sides, [prompt.cut(0, 30)])
    pieces = np.array([(0, 40, 0, 0, 0, 40, 0, 30, 0), (40, 60, 0, 40, 40, 60, 0, 30, 0)])
    last_pieces = np.array([(0, 1, 0, 40, 40, 60, 0, 30, 0)])
    hidden = run_decoder(sides, [prompt.cut(30, 90)], Tables(pieces, np.array([59]), last_pieces), as_pasts(past))
    assert_close(hidden["hidden"], torch_decode(sides, [prompt]))


# --- decoders whose pasts are kept in fewer bits ---------------------------------------------------------


def two_documents(sides: Sides) -> tuple[list[Prompt], Layout]:
    """Prompts of which the first 40 and 130 tokens are kept, and the run of what is left of them."""
    prompts = [random_prompt(sides.config, n, num_images=4) for n in (61, 150)]
    layout = layout_groups([Group(40, [(40, 21)], kept=True), Group(130, [(130, 20), (100, 50)], kept=True)])
    return [*prompts, prompts[1]], layout


def ask(sides: Sides, pasts: dict[str, Array], kv: str, layout: Layout | None = None) -> Array:
    """What the pairs of `two_documents` get from pasts, however made."""
    prompts, own = two_documents(sides)
    suffixes = [prompt.cut(used, len(prompt.ids)) for prompt, used in zip(prompts, (40, 130, 100), strict=True)]
    return run_decoder(sides, suffixes, layout or own, pasts, kv=kv)["hidden"][:3]


def documents_of(sides: Sides) -> list[Prompt]:
    prompts, _ = two_documents(sides)
    return [prompts[0].cut(0, 40), prompts[1].cut(0, 130)]


def apart(one: Array, other: Array) -> float:
    """The largest difference in sizes of a row."""
    return float((np.abs(one - other).max(1) / np.sqrt((other**2).mean(1))).max())


def test_the_decoder_for_float16_pasts_is_the_decoder_on_rounded_values(sides: Sides) -> None:
    exact, halves = compute(sides, documents_of(sides)), compute(sides, documents_of(sides), kv="fp16")
    for name in presents(sides):
        assert halves[name].dtype == np.float16
        np.testing.assert_array_equal(halves[name], exact[name].astype(np.float16))
    seen = ask(sides, as_pasts(halves), "fp16")
    widened = {name: values.astype(np.float32) for name, values in halves.items()}
    # The same kernels on the same values: not a bit may differ.
    np.testing.assert_array_equal(seen, ask(sides, as_pasts(widened), "fp32"))
    # And the rounding is there, and small: 2⁻¹¹ of a value, under a few layers of attention with contrast.
    assert 1e-6 < apart(seen, ask(sides, as_pasts(exact), "fp32")) < 1e-2


def test_the_decoder_for_int8_pasts_is_the_decoder_on_rounded_values(sides: Sides) -> None:
    """Of two documents whose scales differ, one of them used in part."""
    config = sides.config.decoder
    exact, out = compute(sides, documents_of(sides)), compute(sides, documents_of(sides), kv="int8")
    for name in presents(sides):  # come out as computed: who keeps them knows the document's end
        assert out[name].dtype == np.float32
        np.testing.assert_array_equal(out[name], exact[name])
    states = [State.from_presents(out, rows, config, "int8") for rows in (slice(0, 40), slice(40, 170))]
    feeds = Pasts(config, "int8").feeds(states)
    widened = {}
    for i, (which, name) in product(range(config.num_layers), enumerate(("key", "value"))):
        parts = []
        for state in states:
            scale, low, first = (rows[:, None] for rows in state.table[i, which])  # (K, 1, C)
            parts += [first, state.kv[i, which, :, 1:].astype(np.float32) * scale + low]
        widened[f"past_key_values.{i}.{name}"] = np.concatenate(parts, axis=1)
    seen = ask(sides, feeds, "int8")
    np.testing.assert_array_equal(seen, ask(sides, widened, "fp32"))
    rounding = apart(seen, ask(sides, as_pasts(exact), "fp32"))
    assert 1e-4 < rounding < 0.3  # 1/510 of what a channel spans, under a few layers of attention with contrast
    # Mixed-up tables would show: those of the other document, and another first token.
    _, layout = two_documents(sides)
    swapped = layout.pieces.copy(), layout.last_pieces.copy()
    for table in swapped:
        table[:3, 8] = 1 - table[:3, 8]
    mixed = ask(sides, feeds, "int8", replace(layout, pieces=swapped[0], last_pieces=swapped[1]))
    assert (np.abs(mixed - seen).max(1) > 1e-3).all()
    for name in [name for name in feeds if name.endswith("table")]:
        feeds[name][:, 2] = feeds[name][::-1, 2]
    assert (np.abs(ask(sides, feeds, "int8") - seen).max(1) > 1e-3).any()


@pytest.mark.parametrize("used", [0, 1, 2])
def test_of_an_int8_past_no_more_is_seen_than_is_used(sides: Sides, used: int) -> None:
    """Its first token, which is kept apart, is no exception."""
    config = sides.config.decoder
    whole = random_prompt(sides.config, 30)
    states = [State.from_presents(compute(sides, [whole.cut(0, 12)]), slice(0, 12), config, "int8")]
    layout = layout_groups([Group(12, [(used, 30 - used)], kept=True)])
    seen = run_decoder(sides, [whole.cut(used, 30)], layout, Pasts(config, "int8").feeds(states), kv="int8")["hidden"]
    expected = torch_decode(sides, [whole])
    # One token is as computed, the second is the lowest or the highest or one of 255 steps between.
    assert_close(seen[:1], expected, TOLERANCE if used < 2 else 0.1)


@pytest.mark.parametrize("kv", KV)
def test_without_pasts_every_decoder_is_the_decoder(sides: Sides, kv: str) -> None:
    prompts = [random_prompt(sides.config, n, num_images=2) for n in (37, 300)]
    layout = layout_groups([Group(20, [(20, 17)]), Group(290, [(290, 10)])])
    expected = run_decoder(sides, prompts, layout)["hidden"]
    np.testing.assert_array_equal(run_decoder(sides, prompts, layout, kv=kv)["hidden"], expected)


# --- head --------------------------------------------------------------------------------------------


def test_head_agrees_with_pytorch(sides: Sides) -> None:
    hidden = np.random.default_rng(0).standard_normal((17, sides.config.decoder.hidden_size), np.float32)
    expected = sides.torch.head(torch.from_numpy(hidden)).detach()[:, 0].numpy()
    assert_close(sides.head.run({"hidden": hidden}, ["logit"])["logit"], expected)


# --- what the graphs are made of -----------------------------------------------------------------------


def nodes_of(graph: onnx.GraphProto, depth: int = 0) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Every node with the number of loops around it."""
    for node in graph.node:
        yield depth, node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g, depth + 1)


def load_graphs(artifact: Path, names: Sequence[str] | None = None) -> dict[str, onnx.ModelProto]:
    """All that the manifest tells of, or those named."""
    names = names or tuple(read_manifest(artifact).graphs)
    return {name: onnx.load(artifact / f"{name}.onnx", load_external_data=False) for name in names}


def on_cpus(artifact: Path) -> dict[str, onnx.ModelProto]:
    """All but the set for GPUs."""
    return load_graphs(artifact, [name for name in read_manifest(artifact).graphs if name not in ON_CUDA])


@pytest.fixture(scope="module", params=SCHEMES)
def written(request: pytest.FixtureRequest, in_precision: Callable[[str], Path]) -> Path:
    return in_precision(request.param)


def test_graphs_pass_the_checker_with_data_and_inferred_shapes(written: Path) -> None:
    for name in read_manifest(written).graphs:
        onnx.checker.check_model(str(written / f"{name}.onnx"), full_check=True)


@pytest.mark.parametrize("precision", SCHEMES)
def test_artifacts_have_the_sets_that_their_weights_allow(precision: str, in_precision: Callable[[str], Path]) -> None:
    """For CPUs those with float weights, for GPUs those in 16 bits or fewer."""
    manifest = read_manifest(in_precision(precision))
    runs = {"cpu": {"vision": "vision.cpu"}} if precision in FLOATS else {}
    if precision != "fp32":
        runs["cuda"] = {"vision": "vision.cuda", "decoder": "decoder.cuda", "head": "head.cuda"}
    assert manifest.runs == runs
    assert sorted(manifest.graphs) == sorted((*FILES, *(name for own in runs.values() for name in own.values())))


# Which of ONNX Runtime's own operators a portable graph may hold, by precision; fp32, fp16 and bf16 need none.
OWN = {
    "int8": {"vision": {"MatMulIntegerToFloat", "MultiHeadAttention"}, "decoder": {"MatMulIntegerToFloat"}},
    "int4": {
        "vision": {"MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention"},
        "decoder": {"MatMulIntegerToFloat", "MatMulNBits"},
    },
    "nf4": {
        "vision": {"MatMulIntegerToFloat", "MatMulBnb4", "MultiHeadAttention"},
        "decoder": {"MatMulIntegerToFloat", "MatMulBnb4"},
    },
}


def test_graphs_hold_standard_operators_of_one_opset_and_else_what_their_precision_needs(written: Path) -> None:
    precision = read_manifest(written).scheme
    for name, model in on_cpus(written).items():
        own = {node.op_type for _, node in nodes_of(model.graph) if node.domain == CONTRIB}
        needed = OWN.get(precision, {}).get(name.partition(".")[0], set())
        assert own == ({"MultiHeadAttention"} if name == "vision.cpu" else needed)
        domains = [("", OPSET), (CONTRIB, 1)] if own else [("", OPSET)]
        assert [(o.domain, o.version) for o in model.opset_import] == domains
        assert {node.domain for _, node in nodes_of(model.graph)} == {domain for domain, _ in domains}
        assert not model.functions


def test_every_tensor_of_the_checkpoint_is_used_once_or_for_inputs_of_16_bits_twice(written: Path, tiny: Path) -> None:
    stored: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for model in load_graphs(written, GRAPHS).values():
        external = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        stored.update(external)
        used.update(i for _, node in nodes_of(model.graph) for i in node.input if i in external)
    recipe = Recipe.from_dict(read_manifest(written).recipe, "manifest")
    weights = [w for graph in build_graphs(open_checkpoint(tiny).config, recipe).values() for w in graph.weights]
    assert sorted(weight.name for weight in weights) == sorted(open_checkpoint(tiny).names)
    once = {part.name: 1 for weight in weights for part in weight.parts}
    assert len(once) >= len(weights)
    assert stored == once
    assert used == {part.name: 2 if weight.scheme.inputs == 16 else 1 for weight in weights for part in weight.parts}


def test_a_graph_beside_a_portable_one_reads_the_same_data_from_the_same_places(written: Path) -> None:
    """Decoders for pasts in other forms, and those of the sets."""
    held = {
        name: {t.name: t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        for name, model in load_graphs(written).items()
    }
    for name in held:
        portable = name.partition(".")[0]
        assert held[name] == held[portable]  # names, kinds, shapes, offsets and lengths
        assert {t.external_data[0].value for t in held[name].values()} == {data_name(portable)}
    assert len(held["decoder"]) > 20
    assert sorted(path.name for path in written.glob("*.data")) == sorted(map(data_name, GRAPHS))


def test_kept_decoders_have_the_files_names_and_the_form_of_their_pasts(tiny: Path) -> None:
    config = open_checkpoint(tiny).config.decoder
    graphs = kept_decoders(config, Recipe.default("fp32"))
    assert list(graphs) == ["decoder.kv-fp16", "decoder.kv-int8"] == [decoder_name(kv) for kv in KV[1:]]
    for kv in KV[1:]:
        inputs = {port.name: port for port in graphs[decoder_name(kv)].ports.inputs}
        for name, feed in Pasts(config, kv).feeds([]).items():
            assert inputs.pop(name).dtype == feed.dtype
        assert not [name for name in inputs if name.startswith("past")]


def test_declared_ports_are_those_of_the_manifest(written: Path) -> None:
    for name, described in read_manifest(written).graphs.items():
        graph = load_graphs(written)[name].graph
        for told, ports in ((described.inputs, graph.input), (described.outputs, graph.output)):
            assert [p.name for p in told] == [p.name for p in ports]
            for seen, port in zip(told, ports, strict=True):
                kept = port.type.tensor_type
                assert seen.dtype == onnx.helper.tensor_dtype_to_np_dtype(kept.elem_type).name
                assert list(seen.shape) == [d.dim_param or d.dim_value for d in kept.shape.dim]


# --- bounded memory ------------------------------------------------------------------------------------


ATTENTION = ("Attention", "MultiHeadAttention")


def test_what_grows_with_rows_times_columns_stands_inside_loops(written: Path) -> None:
    """Attention and its mask see one piece, the inside of an MLP one chunk."""
    for name, model in on_cpus(written).items():
        for depth, node in nodes_of(model.graph):
            if node.op_type in (*ATTENTION, "LessOrEqual", "Softmax") or ".mlp." in "".join(node.input):
                expected = 2 if name in VISIONS and node.op_type in ATTENTION else 1  # images, then pieces
                assert depth == expected or "merger" in "".join(node.input), f"{name}: {node.name}"


PEAK = textwrap.dedent("""
    import sys
    from pathlib import Path
    import numpy as np
    from m0kit.scoring import planner
    from m0kit.artifact.manifest import read_manifest
    from m0kit.scoring.sessions import open_graph
    from m0kit.keeping.states import Pasts

    folder, T, rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    planner.PIECE_ROWS, planner.PIECE_SCORES = rows, 10**9  # so that the rows alone count
    config = read_manifest(folder).model
    layout = planner.layout_groups([planner.Group(0, [(0, T)])])
    assert not layout.fill
    decoder = open_graph(folder, "decoder", threads=1)
    visions = [open_graph(folder, name, threads=1) for name in ("vision.cpu", "vision")]
    feeds = {
        "token_ids": np.zeros(T, np.int64),
        "positions": np.tile(np.arange(T), (3, 1)),
        "image_embeds": np.zeros((0, config.decoder.hidden_size), np.float32),
        "image_token_index": np.zeros(0, np.int64),
        "pieces": layout.pieces, "last_index": layout.last_index, "last_pieces": layout.last_pieces,
        **Pasts(config.decoder, "fp32").feeds([]),
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
    for vision in visions:
        vision.run(patches, ["image_embeds"])
    print(after - before, peak() - after)
""")


def peak_growth(artifact: Path, num_rows: int, piece_rows: int) -> list[int]:
    """MiB that one run of (decoder, both visions) adds to the peak of a fresh process."""
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
    # Nor does it store wider what can be seen to overflow.
    monkeypatch.setattr("m0kit_export.export.fit_halves", lambda *_, **__: Fit({}, {}))
    export_artifact(checkpoint, tmp_path / "naive", recipe=Recipe.default("fp16"), progress=False)

    expected = score(tmp_path / "fp32", where, "onnxruntime")
    assert np.isfinite(expected).all()
    assert np.ptp(expected) > 0.1  # the outliers leave something to tell apart
    with pytest.raises((WrongAnswerError, ScoreError), match=r"artifact wrongly|not a finite number"):
        score(tmp_path / "naive", where, "onnx")
    # Weights are exact in float16; a product rounds to 2⁻¹¹, and the layers add that up: measured 0.004.
    for engine in ("onnx", "onnxruntime"):
        assert np.abs(score(tmp_path / "fp16", where, engine) - expected).max() < 0.02, engine
