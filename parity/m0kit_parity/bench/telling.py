"""How a benchmark tells what it found: tables with what they depend on below, or JSON."""

from collections.abc import Iterable, Mapping
from typing import Any

from m0kit.terminal import say, show, show_json
from m0kit_parity.bench.timing import told
from m0kit_parity.drawing.table import Rows, table


def tell(
    about: Mapping[str, Any], facts: Mapping[str, Any], made: Iterable[Rows | str], as_json: bool,
    notes: Iterable[str] = (),
) -> None:  # fmt: skip
    """What was measured as JSON, or as tables with sentences between and below them."""
    if as_json:
        show_json({"about": about, **facts})
        return
    lines: list[str] = []
    for part in made:
        lines += [part] if isinstance(part, str) else [*([""] if lines else []), *table(part).split("\n")]
    show(*lines, *notes)
    say(told(about))
