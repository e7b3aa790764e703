"""The demo's commands are real ones that do what the demo says, in its order."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from m0kit.cli.commands import cli
from m0kit_parity import demo


def test_every_step_works_but_for_those_that_have_tests_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    outputs: list[str] = []

    def run(*arguments: object) -> None:
        words = [str(argument) for argument in arguments]
        ran.append(words)
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None
        if words[0] in ("parity", "evaluate"):  # an argument it does not know would exit with 2; help ends it early
            assert CliRunner().invoke(command, [*words[1:], "--help"]).exit_code == 0
            return
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, done.output
        outputs.append(done.stdout)

    monkeypatch.setattr(demo, "m0kit", run)
    demo.main()
    verbs = [words[0] for words in ran]
    assert verbs == [
        "export",
        "export",
        "inspect",
        "rerank",
        "rerank",
        "rerank",
        "rerank",
        "index",
        "index",
        "rerank",
        "parity",
        "quantize",
        "quantize",
        "evaluate",
    ]
    texts, code_without, code_with, pages = outputs[3:7]
    assert "relevant" in texts.splitlines()[0], "the trained checkpoint puts the right text first"
    assert code_without != code_with, "the adapter must change the ranking"
    assert "relevant" in code_with.splitlines()[0]
    asked_again = outputs[9]
    assert [line.split()[-1] for line in asked_again.splitlines()] == [
        line.split()[-1] for line in pages.splitlines()[:3]
    ], "kept pages rank as the pages themselves"
    said = capsys.readouterr().out
    assert Path(pages.splitlines()[0].split()[-1]).name in said.split("(the right answer is ")[1].split(")")[0]


def test_a_step_that_fails_ends_the_demo_with_its_exit_code() -> None:
    with pytest.raises(SystemExit) as ended:
        demo.m0kit("no-such-command")
    assert ended.value.code == 2


def test_what_it_shows_can_be_typed(capfd: pytest.CaptureFixture[str]) -> None:
    demo.m0kit("--version")
    assert capfd.readouterr().out.splitlines()[0] == "$ m0kit --version"
