"""Every surface takes 500 inputs, the same ones in each run; and the runner tells what it is there to tell.

python -m pytest tests/fuzz
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from tests.fuzz import runner
from tests.fuzz.__main__ import ROOT, fuzz
from tests.fuzz.runner import Files, Link, Pipe, Result, Surface, Wrong, load, run, save
from tests.fuzz.surfaces import SURFACES

from m0kit.errors import InputError

INPUTS = 500
FEWER = {"request": 250, "http": 250, "pdf": 200}  # each of these does much, and takes five milliseconds
SEED = 0


@pytest.mark.parametrize("name", SURFACES)
def test_what_others_wrote_gives_a_result_or_one_of_our_errors(name: str) -> None:
    inputs = FEWER.get(name, INPUTS)
    result = fuzz(name, inputs, SEED)
    assert not result.failures, result.told()
    assert result.inputs == inputs


@pytest.mark.parametrize("name", ["journal", "index", "golden", "adapter"])  # what is written anew for each run
def test_an_input_is_the_same_in_every_process(name: str) -> None:
    script = (
        "import hashlib; from tests.fuzz.runner import at_home; from tests.fuzz.surfaces import SURFACES; at_home(); "
        f"s = SURFACES[{name!r}](); inputs = [sorted(map(repr, {{**s.base, **s.input('x', 1, i)[1]}}.items())) "
        "for i in range(60)]; print(hashlib.sha256(repr(inputs).encode()).hexdigest())"
    )
    told = {
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(told) == 1


def _told(target: object) -> Result:
    def called(folder: Path) -> object:
        return target(folder)  # type: ignore[operator]

    def mutated(random: Random, files: Files) -> Files:
        return files

    seeds = {"whole": {"input": b"whole"}, "x": {"input": b"x"}}
    return run("toy", Surface(seeds, mutated, called), 0, range(4))


def test_results_and_our_own_errors_are_counted() -> None:
    def target(folder: Path) -> None:
        if (folder / "input").read_bytes() == b"x":
            raise InputError("not so")

    result = _told(target)
    assert (result.inputs, result.whole + result.errors["InputError"]) == (4, 4)
    assert result.errors["InputError"] >= 1
    assert not result.failures


def _raises(_: Path) -> None:
    raise KeyError("x")


def _is_wrong(_: Path) -> None:
    raise Wrong("it is not what was written")


def _is_refused(_: Path) -> None:
    raise InputError("not even what is whole")


def _steers_a_terminal(_: Path) -> None:
    error = InputError("x")
    error.args = ("red \x1b[31m",)
    raise error


def _dies(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _loops(_: Path) -> None:
    while True:
        pass


def _waits(_: Path) -> None:
    signal.pause()


def _takes_memory(_: Path) -> int:
    return len(bytearray(b"\1") * (256 << 20))  # written to, so that it is resident


def _writes_outside(folder: Path) -> None:
    (folder.parent / "canary" / "victim").write_text("mine")


def _deletes_outside(folder: Path) -> None:
    (folder.parent / "canary" / "victim").unlink()


def _adds_outside(folder: Path) -> None:
    (folder.parent / "more").touch()


def _says_a_secret(folder: Path) -> str:
    return (folder.parent / "canary" / "secret.txt").read_text()


def _copies_a_secret(folder: Path) -> None:
    (folder / "copy").write_bytes((folder.parent / "canary" / "secret.txt").read_bytes())


@pytest.mark.parametrize(
    ("target", "what"),
    [
        (_raises, "KeyError"),
        (_is_wrong, "wrong: it is not what was written"),
        (_is_refused, "an input that is whole is refused"),
        (_steers_a_terminal, "holds a control character"),
        (_dies, "SIGSEGV"),
        (_loops, "s of CPU"),
        (_waits, "waits for more than"),
        (_takes_memory, "takes more than"),
        (_writes_outside, "changed or removed outside"),
        (_deletes_outside, "changed or removed outside"),
        (_adds_outside, "changed or removed outside"),
        (_says_a_secret, "says what is in a file outside"),
        (_copies_a_secret, "wrote what is in a file outside"),
    ],
)
def test_the_runner_tells_each_kind_of_failure(target: object, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_CPU_S", 0.5)
    monkeypatch.setattr(runner, "_WAIT_S", 30 if target is _loops else 1)
    monkeypatch.setattr(runner, "_RESIDENT_BYTES", 64 << 20)
    result = _told(target)
    assert result.failures
    assert all(what in told for told in result.failures), result.failures
    assert "--replay 0" in result.told()


def test_what_an_engine_dies_of_is_told_and_is_no_failure() -> None:
    surface = Surface({"x": {"input": b"x"}}, lambda _, files: files, _dies, native_may_die=True)
    result = run("toy", surface, 0, range(3))
    assert (result.died["SIGSEGV"], result.inputs, result.failures) == (3, 3, {})


def test_an_input_is_read_as_it_was_saved(tmp_path: Path) -> None:
    files: Files = {"a": b"\0\1", "b/c": Link("../canary"), "d": Pipe()}
    save(files, tmp_path / "x.tar.xz")
    assert load(tmp_path / "x.tar.xz") == files
    (tmp_path / "raw").write_bytes(b"raw")
    assert load(tmp_path / "raw", "name") == {"name": b"raw"}
