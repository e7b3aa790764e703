"""What `blame` found, as a text, as JSON and as a section of the page. Owns the three forms, no figure.

show_text(to_text(blamed))
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Final

from m0kit.cli.page import table as html_table
from m0kit.cli.page import text
from m0kit.plain import plain
from m0kit_parity.drawing import plot
from m0kit_parity.drawing.table import shown, table
from m0kit_parity.evaluate.blame import ROLES, Blamed

_AXES: Final[Mapping[str, str]] = {
    "kinds": "kind of matrix",
    "layers": "layer",
    "tokens": "token where inputs are rounded",
    "matrices": "single matrix",
}
_ROWS: Final = 10  # of each axis; JSON has all
_NAMED: Final = 3  # in a sentence
_LEAST: Final = 0.01  # of a share that is named


def to_text(blamed: Blamed) -> str:
    """Sentences first, then aligned tables, largest first."""
    said, notes = ("\n".join(plain(line, None) for line in lines(blamed)) for lines in (sentences, notes_of))
    parts = [said, *map(table, tables(blamed)), notes]  # labels are names of folders
    return "\n\n".join(parts)


def to_json(blamed: Blamed) -> dict[str, Any]:
    """All figures as plain values."""
    return asdict(blamed)


def to_html(blamed: Blamed) -> str:
    """A section; names are escaped."""
    figures = []
    for axis, title in _AXES.items():
        shares = blamed.axes[axis][:_ROWS]
        if axis != "matrices" and shares:
            bars = [plot.Bar(s.name, 100 * s.share, f"{s.share:.1%}") for s in shares]
            drawn = plot.bars(bars, "% of the squared error", least=100)
            figures.append(f"<figure><h3>By {text(title)}</h3>{drawn}</figure>")
    rows = (
        html_table(map(text, head), [list(map(text, row)) for row in rest], "figures") for head, *rest in tables(blamed)
    )
    return "".join(
        [
            f"<h2>Where the errors of {text(blamed.label)} come from</h2>",
            f"<p>{text(' '.join(sentences(blamed)))}</p>",
            f'<div class="plots">{"".join(figures)}</div>',
            "<details><summary>All figures</summary>",
            *rows,
            "</details>",
            f"<p>{text(' '.join(notes_of(blamed)))}</p>",
        ]
    )


def sentences(blamed: Blamed) -> Iterator[str]:
    """What a reader should know first."""
    pairs = " and ".join(f"{count} {kind} pairs" for kind, count in blamed.pairs.items() if count)
    whole = blamed.whole
    yield (
        f"{blamed.label} against {blamed.baseline}, on {pairs}: scores move by {whole.mean_delta:.4f} on average, "
        f"logits by {whole.logit:.4f} (root mean square)."
    )
    if not whole.logit:
        yield "Nothing differs, so there is nothing to blame."
        return
    yield (
        f"With stored weights alone logits move by {blamed.weights.logit:.4f}, with rounded inputs of products alone "
        f"by {blamed.inputs.logit:.4f}."
    )
    for axis, title in _AXES.items():
        if named := [f"{s.name} ({s.share:.0%})" for s in blamed.axes[axis][:_NAMED] if s.share >= _LEAST]:
            yield f"By {title}: {', '.join(named)}."


def tables(blamed: Blamed) -> list[list[list[str]]]:
    """Each axis, largest first, and the growth through the layers; first row the heading, strings all."""
    found = []
    for axis, title in _AXES.items():
        if not blamed.axes[axis]:
            continue
        share = "of the whole" if axis == "matrices" else "share"
        rows = [[title, share, "mean |Δ score|", "Δ logit", "left without"]]
        for s in blamed.axes[axis][:_ROWS]:
            rows.append([s.name, f"{s.share:.1%}", f"{s.mean_delta:.5f}", f"{s.logit:.4f}", f"{s.left:.4f}"])
        if rest := blamed.axes[axis][_ROWS:]:
            rows.append([f"({len(rest)} more)", f"{sum(s.share for s in rest):.1%}", "", "", ""])
        found.append(rows)
    roles = [role for role in ROLES if any(role in growth.error for growth in blamed.growth)]
    rows = [["residual stream is off by, behind", *roles]]
    rows += [[g.layer, *(shown(g.error.get(role), ".2%") for role in roles)] for g in blamed.growth]
    return [*found, rows]


def notes_of(blamed: Blamed) -> Iterator[str]:
    """What a reader of the tables must know, a sentence each."""
    sums = ", ".join(f"{_AXES[axis]} {total:.0%}" for axis, total in blamed.explained.items())
    yield (
        "Share: the squared change of the logit when this alone is as in the artifact and all else as in the baseline, "
        "among those of its table (single matrices: of the whole's)."
    )
    yield f"Left without: what logits would still move by (of {blamed.whole.logit:.4f}), were it as in the baseline."
    if sums:
        yield (
            "Squares add up to 100 % of the whole's where errors are independent, to less or more where they reinforce "
            f"or cancel each other. Here: {sums}. Pairs are few, so shares are rough."
        )
    here, there = blamed.engine
    yield (
        "Computed in numpy, images and prompts cut short; logits of the engine differ from these by "
        f"{here:.1g} ({blamed.baseline}) and {there:.1g} ({blamed.label})."
    )
