"""Tables line up in a terminal, and are tables in Markdown."""

from m0kit_parity.drawing.table import markdown, table


def test_columns_line_up() -> None:
    assert table([["name", "s"], ["a", "12.5"]]) == "name     s\na     12.5"


def test_a_row_with_empty_ends_has_no_blanks_behind_it() -> None:
    assert table([["name", "s"], ["group", ""]]) == "name   s\ngroup"


def test_markdown_keeps_every_cell_in_its_own() -> None:
    assert markdown([["a|b", "s"], ["c\nd", "1"]]) == "| a\\|b | s |\n| --- | --- |\n| c\\nd | 1 |"
