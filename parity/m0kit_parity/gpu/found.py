"""What a part of the check found: tables for people, facts for machines, and what of it is wrong.

Found([[["pairs", "s"], ["a page", "0.02"]]], {"page_s": 0.02}, wrong=[])
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from m0kit_parity.drawing.table import Rows


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a part that ran to its end."""

    tables: Sequence[Rows]
    facts: dict[str, Any]
    wrong: Sequence[str] = field(default_factory=tuple)  # a sentence for each check that does not hold
    notes: Sequence[str] = field(default_factory=tuple)
