"""`make gpu` as a program: a part that fails costs the others nothing, and what was found is written after each."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from m0kit.errors import M0kitError
from m0kit_parity.gpu import check
from m0kit_parity.gpu.found import Found
from m0kit_parity.gpu.place import Place

TABLE = [["what", "s"], ["a page", "0.5"]]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, parts: dict[str, Any], *arguments: str) -> tuple[int, str, Any]:
    monkeypatch.setattr(check, "PARTS", parts)
    monkeypatch.setattr(check, "card", lambda: "a card")
    monkeypatch.setenv("M0KIT_DEBUG", "0")  # which the command sets for its processes
    file = folder / "gpu.json"
    places = ["--device", "cpu", "--work", str(folder / "work"), "--json", str(file)]
    done = CliRunner().invoke(check.check, [*places, *arguments])
    return done.exit_code, done.output, json.loads(file.read_text("utf-8"))


def good(place: Place) -> Found:
    return Found([TABLE], {"page_s": 0.5}, notes=["on a quiet machine"])


def wrong(place: Place) -> Found:
    return Found([TABLE], {}, ["a page took too long"])


def broken(place: Place) -> Found:
    raise M0kitError("the GPU is gone")


def test_all_parts_run_and_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output, written = run(monkeypatch, tmp_path, {"first": good, "second": good})
    assert code == 0
    assert "== second: passed" in output
    assert "a page  0.5" in output
    assert "on a quiet machine" in output
    assert written["about"]["card"] == "a card"
    assert {name: part["outcome"] for name, part in written["parts"].items()} == {"first": "passed", "second": "passed"}
    assert written["parts"]["first"]["facts"] == {"page_s": 0.5}


def test_a_part_that_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output, written = run(monkeypatch, tmp_path, {"first": broken, "second": good})
    assert code == 1
    assert "FAILED: the GPU is gone" in output
    assert written["parts"]["second"]["outcome"] == "passed"
    assert "broken" in written["parts"]["first"]["error"]  # where it failed


def test_what_does_not_hold_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output, written = run(monkeypatch, tmp_path, {"only": wrong})
    assert code == 1
    assert "WRONG: a page took too long" in output
    assert written["parts"]["only"]["outcome"] == "wrong"


def test_no_part_begins_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Place, "elapsed", property(lambda _: 100.0))
    code, output, written = run(monkeypatch, tmp_path, {"late": good}, "--budget", "99")
    assert code == 1
    assert "the time (99 s) was over" in output
    assert written["parts"]["late"]["outcome"] == "not run"


def test_the_command_knows_all_parts_that_were_asked_for() -> None:
    assert set(check.PARTS) == {"speed", "resident", "exactness", "profile", "four", "memory", "parity"}
