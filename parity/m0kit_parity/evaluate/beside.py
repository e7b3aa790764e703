"""A checkpoint's activations beside those that our figures rest on, and beside published ones. Owns the comparison.

    show_text(to_text(found))          # found: Activations

What few bits cost is measured on small-massive (docs/activations.md). A checkpoint whose activations are no larger than
its are is where those figures hold; of one that goes beyond them this says in what.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

from m0kit_parity.drawing.table import table
from m0kit_parity.evaluate.activations import MASSIVE, OUTLIER, Activations

TOWERS: Final[Mapping[str, str]] = {"model.": "decoder", "visual.": "image encoder"}
SLACK: Final = 1.1  # times ours is ours still: other pairs move the figures of one checkpoint by as much
_FIGURES: Final[Mapping[str, tuple[str, str]]] = {
    "stream": (f"stream: largest over median, middle layer (massive: {MASSIVE:,.0f}×)", "{:,.0f}×"),
    "tokens": ("tokens that are massive, at most", "{:.1%}"),
    "row": ("rows: largest over median of a token, at most", "{:.0f}"),
    "channel": (f"channels: largest over median, at most (outlier: {OUTLIER:.0f}×)", "{:.0f}×"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the activations of one tower are."""

    stream: float  # largest |x| over the median, behind the middle layer
    tokens: float  # share of those that are massive, behind the layer where there are most
    row: float  # largest over median |x| of a token, of the normed input where that is largest
    channel: float  # the largest over the median channel, of the normed input where that is largest


def sizes_of(found: Activations) -> dict[str, Sizes]:
    """By tower; one that no pair has come to is left out."""
    sizes = {}
    for start, tower in TOWERS.items():
        stream = [one for one in found.residual if one.place.startswith(start)]
        layers = [one for one in stream if one.place.split(".")[1] in ("layers", "blocks")]
        norms = [one for one in found.normed if one.place.startswith(start)]
        if layers and norms:
            sizes[tower] = Sizes(
                layers[len(layers) // 2].ratio,
                max(one.massive_tokens for one in stream),
                max(one.row for one in norms),
                max(one.ratio for one in norms),
            )
    return sizes


def to_text(found: Activations) -> str:
    """A table for each tower, and what it says."""
    sizes = sizes_of(found)
    tables = [table(rows) for rows in _tables(sizes)]
    return "\n\n".join([*tables, _sentence(sizes)])


def _sentence(sizes: Mapping[str, Sizes]) -> str:
    """Whether our figures hold for such activations."""
    told = []
    for tower, mine in sizes.items():
        for name, (what, form) in _FIGURES.items():
            value, ours = getattr(mine, name), measured()["small-massive"][tower][name]
            if value > SLACK * ours:
                label = what.partition(" (")[0]
                told.append(f"{tower}, {label} ({form.format(value)}, small-massive {form.format(ours)})")
    if told:
        return (
            "Its activations go beyond those that m0kit's figures were measured with, so that these promise nothing "
            f"here and the losses above alone count: {'; '.join(told)}."
        )
    return (
        "Its activations are no larger than those of small-massive, on which docs/quantisation.md rests: as far as "
        "activations go, its figures hold here."
    )


def _tables(sizes: Mapping[str, Sizes]) -> list[list[list[str]]]:
    tables = []
    for tower, mine in sizes.items():
        ours, published = (measured()[whose][tower] for whose in ("small-massive", "published"))
        rows = [[tower, "this", "small-massive", *published]]
        for name, (what, form) in _FIGURES.items():
            both = [form.format(value) for value in (getattr(mine, name), ours[name])]
            rows.append([what, *both, *(each.get(name, "–") for each in published.values())])
        tables.append(rows)
    return tables


@cache
def measured() -> dict[str, Any]:
    """Of small-massive as measured on the embedded queries, of the others as docs/activations.md has them."""
    text = resources.files("m0kit_parity").joinpath("data", "activations.json").read_text("utf-8")
    kept: dict[str, Any] = json.loads(text)
    return kept
