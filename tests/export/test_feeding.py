"""Feedback on made-up prompts: which matrices get it, what their products meet, and that scores come nearer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from m0kit_export import feeding
from m0kit_export.answers import open_tokenizer
from m0kit_export.builder import Weight
from m0kit_export.feeding import feed_back
from m0kit_export.graphs import build_graphs
from m0kit_export.sources import CheckpointSource
from m0kit_parity.reference import Reference
from m0kit_quant.feedback import Plane
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import Parts

Float64 = NDArray[np.float64]
INT4 = Recipe.default("int4")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "ROWS_PER_INPUT", 0.5)


@pytest.fixture(scope="module")
def source(tiny: Path) -> CheckpointSource:
    return CheckpointSource.open(tiny)


def fed(source: CheckpointSource, recipe: Recipe = INT4) -> list[tuple[Weight, Parts]]:
    written: list[tuple[Weight, Parts]] = []
    graphs = build_graphs(source.config, recipe)
    feed_back(source.config, open_tokenizer(source.tokenizer), source, graphs, lambda *each: written.append(each))
    return written


def test_each_matrix_with_few_bits_is_written_once(source: CheckpointSource) -> None:
    weights = [w for graph in build_graphs(source.config, INT4).values() for w in graph.weights]
    names = [weight.name for weight, _ in fed(source)]
    assert sorted(names) == sorted(w.name for w in weights if not w.scheme.is_float)


def test_products_meet_what_they_meet_in_pytorch(
    tiny: Path, source: CheckpointSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of the last product of either half, prompt by prompt by transformers' own modules and positions."""
    moments: list[Any] = []
    make = Plane.of
    monkeypatch.setattr(feeding.Plane, "of", lambda moment: moments.append(moment) or make(moment))
    fed(source)
    prompts = feeding._Prompts(source.config, open_tokenizer(source.tokenizer))  # noqa: SLF001
    flat, places = prompts.patches()
    token_ids, _, visual, groups = prompts.tokens()
    reference = Reference.load(tiny)
    core = reference.core
    seen: list[torch.Tensor] = []
    watched = [core.language_model.layers[-1].mlp.down_proj, core.visual.merger.mlp[2]]
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in watched]
    grid = torch.tensor([[1, *(places.max(axis=0) + 1).tolist()]])
    with torch.inference_mode():
        images = iter(torch.from_numpy(flat).split(len(places)))
        last, merged = [[], []], []
        for kind, (first, count, length) in enumerate(groups):
            for i in range(count):
                ids = torch.from_numpy(token_ids[first + i * length : first + (i + 1) * length])[None]
                pads = ids == source.config.prompt.image_pad_id
                pictured: dict[str, Any] = {"pixel_values": next(images), "image_grid_thw": grid} if pads.any() else {}
                seen.clear()
                core(input_ids=ids, mm_token_type_ids=pads.int(), use_cache=False, **pictured)
                last[kind].append(seen[-1][0].double())
                merged += [x.double() for x in seen[:-1]]
    for hook in hooks:
        hook.remove()
    text, page = (torch.cat(rows).numpy() for rows in last)
    wanted = (text.T @ text / len(text) + page.T @ page / len(page)) / 2  # alike, whatever their number
    assert np.abs(moments[-1] - wanted).max() < 1e-4 * np.abs(wanted).max()
    rows = torch.cat(merged).numpy()
    wanted = rows.T @ rows / len(rows)
    met = moments[1 + 4 * source.config.vision.depth + 1]  # after the table's and the blocks'
    assert np.abs(met - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert len(visual) == len(rows)
