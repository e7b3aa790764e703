"""A table of strings, the first row its heading: as text, and as Markdown. Owns both forms, and no content.

show_text(table([["name", "s"], ["a", "12.5"]]))
"""

from collections.abc import Sequence

from m0kit.plain import MAX_CELL, plain

Rows = Sequence[Sequence[str]]


def table(rows: Rows) -> str:
    """Columns as wide as they need be, the first set left, the others right.

    No cell, whatever it holds, is more than a part of its line.
    """
    rows = [[plain(cell, MAX_CELL) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(rows: Rows) -> str:
    """As GitHub's Markdown has tables; a cell is one line, and `|` in it no border."""
    cells = [[plain(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:]))


def shown(value: float | None, form: str) -> str:
    """A figure in a cell; a dash where there is none."""
    return "–" if value is None else f"{value:{form}}"
