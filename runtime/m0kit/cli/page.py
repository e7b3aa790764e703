"""A page for eyes: one file of HTML that needs no other. Owns its frame, style, escaping and thumbnails, no content.

    write(Path("report.html"), page("Ranking", ["<h1>Ranking</h1>", Contents().shown(query), about({"threads": 4})]))

Nothing in a page runs or is fetched, and its policy tells the browser so: styles are those of one hash, images are
data. Whatever comes from outside passes `text`. A page follows light and dark, is read on a phone, and prints.
"""

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image

from m0kit.config import ImageConfig
from m0kit.errors import InputError
from m0kit.files import writing
from m0kit.plain import MAX_SHOWN, plain, to_json
from m0kit.reading.inputs import Known, Picture, Text, parse_content
from m0kit.scoring.image import resize

Grade = Literal["pass", "near", "fail", "none"]

THUMBNAIL_SIDE: Final = 200  # pixels of the longer side at most
THUMBNAIL_BYTES: Final = 10_000
MAX_THUMBNAILS: Final = 60  # of a page: 0.8 MB in base64
_QUALITIES: Final = (85, 70, 50, 30)  # of JPEG, until a thumbnail is small enough
_EXCERPT: Final = 280  # characters of a text
_EXCERPT_LINES: Final = 4
_MARKS: Final = {"pass": "✓", "near": "≈", "fail": "✗", "none": "–"}  # so that a verdict does not rest on its colour
# The model's own rules for turning, transparency and limits, in steps of one pixel in place of 28.
_SMALL: Final = ImageConfig(1, (2 * THUMBNAIL_SIDE) ** 2, (0.5,) * 3, (0.5,) * 3, 1 / 255, 1, 1, 1)


def page(title: str, sections: Iterable[str]) -> str:
    """A whole document of sections of HTML; `title` is text."""
    style = base64.b64encode(hashlib.sha256(_CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{text(title)}</title><style>{_CSS}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def write(path: Path, document: str) -> None:
    """Put a page in its place, whole or not at all. Raises OutputError."""
    with writing(path) as file:
        file.write(document.encode())


def text(value: object, most: int | None = MAX_SHOWN) -> str:
    """What stands for a text from anywhere, in an element or an attribute; control characters as `plain` shows them."""
    return escape(plain(value, most))


def verdict(grade: Grade, word: str, sentence: str) -> str:
    """The first thing to read: a word, a mark and a sentence."""
    return f'<p class="verdict {grade}"><b>{_MARKS[grade]} {text(word)}</b> {text(sentence)}</p>'


def mark(grade: Grade, word: str) -> str:
    """A verdict within a table or a line."""
    return f'<span class="{grade}">{_MARKS[grade]} {text(word)}</span>'


def table(heading: Iterable[str], rows: Iterable[Iterable[str]], name: str = "") -> str:
    """Cells are HTML; the first of each row is its heading, and a table that is too wide scrolls by itself."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heading)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide"><table class="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def about(facts: Mapping[str, Any]) -> str:
    """Versions, hashes and commands, folded: whoever needs them opens it."""
    rows = [(text(name), f"<code>{text(value)}</code>") for name, value in _flat(facts)]
    title = "Versions, hashes and how this was made"
    return f'<details class="about"><summary>{title}</summary>{table(("what", "value"), rows)}</details>'


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} · ")
        elif value not in (None, "", [], ()):
            yield f"{prefix}{name}", value if isinstance(value, str) else to_json(value)


class Contents:
    """What stands for queries and documents on one page: excerpts of texts, and so many thumbnails at most."""

    def __init__(self, max_thumbnails: int = MAX_THUMBNAILS) -> None:
        self._left = max_thumbnails

    def shown(self, content: Any) -> str:
        """HTML for a query or document in any form that `Reranker` takes; an image that cannot be read is said so."""
        try:
            parsed = parse_content(content, "")
            if isinstance(parsed, Text):
                return excerpt(parsed.text)
            if isinstance(parsed, Known):
                return '<span class="quiet">in the index</span>'
            if self._left <= 0:
                return '<span class="quiet">image</span>'
            self._left -= 1
            return f'<img class="thumbnail" alt="" src="{thumbnail(parsed)}"/>'
        except (InputError, MemoryError):
            return '<span class="quiet">cannot be shown</span>'


def excerpt(whole: str) -> str:
    """The beginning of a text, its lines kept, in the direction of its script."""
    lines = whole[: _EXCERPT + 1].strip().splitlines()
    shown = "\n".join(text(line.expandtabs(4)) for line in lines[:_EXCERPT_LINES])
    more = "…" if len(whole) > _EXCERPT or len(lines) > _EXCERPT_LINES else ""
    return f'<span class="excerpt" dir="auto">{shown}{more}</span>'


def small(image: Any) -> Any:
    """What `Contents` shows of an image, in a few kilobytes; None where it cannot be shown."""
    try:
        parsed = parse_content(image, "")
        return {"image": thumbnail(parsed)} if isinstance(parsed, Picture) else image
    except (InputError, MemoryError):
        return None


def thumbnail(picture: Picture) -> str:
    """A small JPEG of a picture as a data URI, as the model would see it. Raises ImageError, MemoryError."""
    image = Image.fromarray(resize(picture, _SMALL, "image").values)
    side = THUMBNAIL_SIDE
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            image.save(file := io.BytesIO(), "JPEG", quality=quality, optimize=True)
            if file.tell() <= THUMBNAIL_BYTES:
                return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        side //= 2


_COLOURS: Final = {  # in light and dark; text has a contrast of 4.5 to the paper at least
    "paper": ("#ffffff", "#14171b"),
    "wash": ("#f4f5f7", "#1e2228"),
    "ink": ("#1b1f24", "#e4e7eb"),
    "faint": ("#5a636e", "#9aa4b0"),
    "grid": ("#d8dce2", "#363c45"),
    "pass": ("#1a6e3a", "#5fca85"),
    "near": ("#8a5200", "#e8b04b"),
    "fail": ("#b3261e", "#ff8a80"),
    "none": ("#5a636e", "#9aa4b0"),
    "series-0": ("#2563c9", "#7fb0f7"),
    "series-1": ("#a34a0c", "#f0a468"),
    "series-2": ("#23784a", "#6fd09a"),
    "series-3": ("#8a3fa0", "#d09be2"),
    "series-4": ("#a8324f", "#f08fa9"),
    "series-5": ("#4d6472", "#a6bccb"),
}
LIGHT: Final = {name: light for name, (light, _) in _COLOURS.items()}
_RULES: Final = """
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
 max-width: 75rem; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; } small, .quiet { color: var(--faint); }
ul { padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
.verdict { background: var(--wash); border-left: 5px solid currentColor; padding: .7rem 1rem; max-width: none; }
.verdict b { font-size: 1.1rem; margin-right: .4rem; } .pass, .pass b { color: var(--pass); }
.near, .near b { color: var(--near); } .fail, .fail b { color: var(--fail); } .none, .none b { color: var(--none); }
.verdict { border-color: var(--none); color: var(--ink); } .verdict.pass { border-color: var(--pass); }
.verdict.near { border-color: var(--near); } .verdict.fail { border-color: var(--fail); }
span.pass, span.near, span.fail, span.none { white-space: nowrap; } span.fail { font-weight: bold; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--grid); padding: .3rem .55rem; text-align: left; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; } thead th { white-space: nowrap; vertical-align: bottom; }
thead small { display: block; font-weight: normal; } tbody th { font-weight: 600; }
.figures td, .figures thead th + th { text-align: right; white-space: nowrap; }
.about th, .about td { font-size: .85rem; } .about tbody th { font-weight: normal; white-space: nowrap; }
code { font: .85em/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; max-width: 36rem; } figure h3 { margin-bottom: 0; }
figcaption { color: var(--faint); font-size: .85rem; }
svg.plot { display: block; height: auto; width: 100%; } svg.plot text { fill: var(--ink);
 font-size: 13px; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
details { border-top: 1px solid var(--grid); padding: .5rem 0; } summary { cursor: pointer; }
details.about { margin-top: 3rem; }
.excerpt { display: block; max-width: 46rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.thumbnail { background: #fff; border: 1px solid var(--grid); display: block; height: auto; margin: .25rem 0;
 max-width: 100%; }
.query { background: var(--wash); border-radius: 4px; padding: .7rem 1rem; }
.ranking { list-style: none; margin: 0; padding: 0; }
.ranking li { border-top: 1px solid var(--grid); display: grid; gap: 0 1rem; padding: .7rem 0;
 grid-template-columns: 2.5rem 8.5rem minmax(0, 1fr); }
.rank { color: var(--faint); text-align: right; } .rank, .score { font-variant-numeric: tabular-nums; }
.score { white-space: nowrap; } .score b { font-size: 1.05rem; }
.bar { display: block; height: 8px; margin-top: .2rem; width: 100%; }
.name { font-weight: 600; overflow-wrap: anywhere; }
td .excerpt { min-width: 15rem; }
@media (max-width: 34rem) { svg.plot text { font-size: 15px; }
 .ranking li { grid-template-columns: 2rem minmax(0, 1fr); }
 .ranking .what { grid-column: 2; } }
@media print { body { font-size: 11pt; max-width: none; padding: 0; } h2, h3, summary { break-after: avoid; }
 tr, figure, .ranking li, .verdict { break-inside: avoid; } .wide { overflow: visible; }
 * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
_LIGHT, _DARK = (" ".join(f"--{name}: {pair[dark]};" for name, pair in _COLOURS.items()) for dark in (0, 1))
_CSS: Final = (
    f":root {{ color-scheme: light; {_LIGHT} }} "
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {_DARK} }} }}{_RULES}"
)
