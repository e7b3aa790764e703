"""What commands say of their inputs is said once."""

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from m0kit import Reranker
from m0kit.cli.options import SIZE, loading, open_reranker, require_pixels, require_place, tell
from m0kit.errors import OutputError


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


def test_only_its_own_error_is_told_as_an_options(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(click.UsageError, match=r"^--max-pixels: min_pixels \(3136\) must not exceed"):
        require_pixels(artifact, 1)
    require_pixels(artifact, None)
    require_pixels(artifact, 10**9)

    def failing(*_: object, **options: object) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(Reranker, "load", failing)
    with pytest.raises(ValueError, match=r"^something else$"):
        open_reranker(artifact, {"max_pixels": 10**6})


def test_limits_of_a_gpu_reach_the_loading_and_go_with_a_gpu_alone() -> None:
    seen: list[dict[str, object]] = []

    @click.command()
    @loading
    def command(load: dict[str, object]) -> None:
        seen.append(load)

    limits = ["--gpu-bytes", "8G", "--pool-bytes", "500M"]
    assert CliRunner().invoke(command, ["--device", "cuda:0,cuda:1", *limits]).exit_code == 0
    assert (seen[0]["gpu_bytes"], seen[0]["pool_bytes"]) == (8 << 30, 500 << 20)
    for limit in (limits[:2], limits[2:], ["--gpu-bytes", "0"]):
        done = CliRunner().invoke(command, limit)
        assert done.exit_code == 2
        assert "say --device cuda too" in done.output
    assert CliRunner().invoke(command, []).exit_code == 0
    assert (seen[1]["gpu_bytes"], seen[1]["pool_bytes"]) == (None, None)


def test_a_page_takes_the_place_of_a_file_and_of_nothing_else(tmp_path: Path) -> None:
    require_place(None)
    require_place(tmp_path / "new.html")
    (tmp_path / "old.html").touch()
    require_place(tmp_path / "old.html")
    os.mkfifo(tmp_path / "pipe")
    for place, why in (("pipe", "is a device, a pipe"), ("", "is a folder"), ("gone/new.html", "there is no folder")):
        with pytest.raises(OutputError, match=why):
            require_place(tmp_path / place)


def test_a_page_needs_a_folder_that_may_be_written_even_where_its_file_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written aside, in the same folder."""
    (tmp_path / "old.html").touch()
    monkeypatch.setattr(os, "access", lambda place, _mode: place != tmp_path)
    with pytest.raises(OutputError, match="may not be written"):
        require_place(tmp_path / "old.html")


@pytest.mark.parametrize("text", ["9" * 400, "9" * 21 + "T", "1e9", "-1", "", "T", "1.5.5G"])
def test_what_is_no_size_is_wrong_usage(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        SIZE.convert(text, None, None)
