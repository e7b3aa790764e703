"""A ranking as a page: `m0kit rerank --html`. Owns what it shows of each document; the frame is `page`'s.

write(Path("ranking.html"), ranking_page("slm markdown", given, results, order, {"artifact": "m0-int8"}))
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from m0kit.artifact.manifest import Manifest
from m0kit.cli.page import Contents, about, page, text, verdict
from m0kit.machine.detect import describe
from m0kit.scoring.schedule import Result

MAX_ROWS: Final = 200  # documents in the list, and in that of those without a score


def ranking_page(
    query: Any,
    given: Sequence[tuple[str, Any]],
    results: Sequence[Result],
    order: Sequence[int],
    facts: Mapping[str, Any],
) -> str:
    """The page of `order`, indices of `given` (name, content) and `results`, MAX_ROWS of them are shown."""
    contents = Contents()
    asked = contents.shown(query)
    ranked = [i for i in order if results[i].error is None]
    failed = [i for i, result in enumerate(results) if result.error is not None]
    rows = "".join(_row(rank, *given[i], results[i], contents) for rank, i in enumerate(ranked[:MAX_ROWS], 1))
    sections = ["<h1>Ranking</h1>", _summary(len(results), len(failed), min(len(ranked), MAX_ROWS))]
    sections.append(f'<h2>Query</h2><div class="query">{asked}</div>')
    if rows:
        sections.append(f'<h2>Documents, best first</h2><ol class="ranking">{rows}</ol>')
    if failed:
        told = "".join(f"<li>{text(results[i].error)}</li>" for i in failed[:MAX_ROWS])
        more = f"<p>And {len(failed) - MAX_ROWS:,} more.</p>" if len(failed) > MAX_ROWS else ""
        sections.append(f"<h2>Could not be scored</h2><ul>{told}</ul>{more}")
    return page("Ranking", [*sections, about(facts)])


def made_by(artifact: Path, manifest: Manifest, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a ranking depends on, for the end of its page."""
    return {
        "artifact": str(artifact),
        "scheme": manifest.scheme,
        "fingerprint": manifest.fingerprint,
        "licence": manifest.licence,
        "base": manifest.provenance.get("base"),
        "adapters": [adapter.get("name") for adapter in manifest.provenance.get("adapters", [])],
        "settings": settings,
        **describe(),
        "written": datetime.now(UTC).isoformat(" ", "seconds"),
    }


def _summary(num_given: int, num_failed: int, num_shown: int) -> str:
    """How many there are, and how many of them can be seen here."""
    what = f"{num_given:,} document{'s' if num_given != 1 else ''}"
    scored = num_given - num_failed
    if not scored:
        return verdict("fail", "Nothing scored", f"of {what}.")
    part = "" if num_shown == scored else f" The best {num_shown:,} are shown."
    if num_failed:
        return verdict("near", f"{scored:,} scored", f"of {what}; {num_failed:,} could not be, see below.{part}")
    return verdict("pass", f"{scored:,} scored", f"of {what}.{part}")


def _row(rank: int, name: str, content: Any, result: Result, contents: Contents) -> str:
    cut = "".join(f'<div class="near">The {what} was too long and was cut.</div>' for what in result.truncated)
    return (
        f'<li><span class="rank">{rank}</span><div class="score"><b>{result.score:.4f}</b> '
        f"<small>logit {result.logit:.2f}</small>"
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="100" height="8" fill="var(--grid)"/>'
        f'<rect width="{100 * result.score:.2f}" height="8" fill="var(--series-0)"/></svg></div>'
        f'<div class="what"><div class="name">{text(name)}</div>{contents.shown(content)}{cut}</div></li>'
    )
