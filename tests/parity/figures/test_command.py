"""Each figure is measured once, in a process of its own, and kept at once; one that fails costs the others nothing."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from m0kit_parity.figures import command, published
from m0kit_parity.figures.command import figures

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# In a file of its own, which a fresh process can import.
FAKES = """
from m0kit.errors import M0kitError
from m0kit_parity.child import Child

def make_echo():
    return echo

def echo(text):
    return text

def measurer(name, shop, docs):
    def measure():
        with open(docs / "calls", "a") as file:
            file.write(f"{name} {shop.sizes.big}\\n")
        if name == "bad":
            raise M0kitError("no room.")
        with Child(make_echo) as ask:  # as the sides of whole pairs are
            return [[["x"], [ask(name)]]], []
    return measure
"""


@pytest.fixture(autouse=True)
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "m0kit_test_measurer.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    import m0kit_test_measurer  # type: ignore[import-not-found, unused-ignore]

    def figure(_shop: Any) -> Any:
        """A title

        And more.
        """

    monkeypatch.setattr(command, "measurer", m0kit_test_measurer.measurer)
    monkeypatch.setattr(published, "FIGURES", dict.fromkeys(("good", "bad", "last"), figure))
    (tmp_path / "docs").mkdir()
    yield
    del sys.modules["m0kit_test_measurer"]


def invoke(tmp_path: Path, *options: str, code: int = 0) -> Result:
    done = CliRunner().invoke(figures, ["--docs", str(tmp_path / "docs"), "--threads", "1", *options])
    assert done.exit_code == code, done.output
    return done


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "docs" / "calls").read_text().splitlines()


def test_what_was_measured_is_kept_and_the_rest_tried_again(tmp_path: Path) -> None:
    done = invoke(tmp_path, "--quick", code=3)
    assert "error: bad: no room." in done.stderr
    text = (tmp_path / "docs" / "figures.md").read_text()
    assert text.count("a quick run") == 2
    assert "## A title\n\nAnd more.\n\nNot measured yet." in text
    assert calls(tmp_path) == ["good wide", "bad wide", "last wide"]
    done = invoke(tmp_path, "--quick", code=3)
    assert "good: known for this version and machine" in done.stderr
    assert calls(tmp_path)[3:] == ["bad wide"]
    invoke(tmp_path, "--only", "last")
    assert calls(tmp_path)[4:] == ["last full"]
    invoke(tmp_path, "--quick", "--again", "--only", "good")
    assert calls(tmp_path)[5:] == ["good wide"]


def test_an_unknown_figure_is_told_which_there_are(tmp_path: Path) -> None:
    assert "there are good, bad, last." in invoke(tmp_path, "--only", "nope", code=2).stderr
