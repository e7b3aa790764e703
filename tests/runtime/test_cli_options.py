"""What commands say of their inputs is said once."""

import pytest

from m0kit.cli_options import tell


def test_a_message_that_many_share_is_told_once_with_some_names(capsys: pytest.CaptureFixture[str]) -> None:
    tell("error", [("a", "is empty"), ("b", "is cut"), *((f"c{i}", "is empty") for i in range(5))])
    tell("note", [("", "of the whole")])
    tell("error", [])
    assert capsys.readouterr().err.splitlines() == [
        "error: a, c0, c1 and 3 more: is empty",
        "error: b: is cut",
        "note: of the whole",
    ]


def test_what_stdout_has_anyway_is_told_up_to_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    tell("error", [(str(i), f"message {i % 4}") for i in range(10)], most=3)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: 0, 4, 8: message 0",
        "error: 1, 5, 9: message 1",
        "error: 2, 6: message 2",
        "error: and 2 more",
    ]
