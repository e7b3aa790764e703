"""What a process of its own does, returns, or how it ends, is one sentence in the process that asked."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from m0kit.errors import CheckpointError, InputError, M0kitError
from m0kit_parity.child import Child

# In a file of its own, which a fresh process can import.
SIDES = '''
import ctypes, os, signal, sys, time
from m0kit.errors import CheckpointError, InputError

def echo():
    return lambda *arguments: (os.getpid(), arguments)

def after(how, times=1):
    """Answers so many times, and then …"""
    left = [times]
    def run(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            return arguments
        return WAYS[how]()
    return run

def at_once(how):
    return WAYS[how]()

def forever():
    while True:
        time.sleep(60)

def noting(path):
    import atexit
    atexit.register(path.write_text, "left")
    return lambda: None

def refuse():
    raise InputError("line 3: no.")

def missing():
    raise CheckpointError("no checkpoint.")

def locked():
    import multiprocessing
    global lock
    lock = multiprocessing.RLock()  # a semaphore with a name, such as tqdm has
    return forever()

def shout():
    print("garbage", flush=True)
    os.write(1, b"more garbage\\n")
    return "said"

def huge():
    raise MemoryError

def fall():
    raise KeyError("weights")

WAYS = {
    "abort": os.abort, "null": lambda: ctypes.string_at(0), "exit": lambda: sys.exit(3), "_exit": lambda: os._exit(4),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "hang": forever, "refuse": refuse,
    "missing": missing, "locked": locked, "shout": shout, "memory": huge, "raise": fall,
    "end": lambda: exec("raise EOFError"),
}
'''


@pytest.fixture
def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "m0kit_test_sides.py").write_text(SIDES)
    monkeypatch.syspath_prepend(tmp_path)
    import m0kit_test_sides  # type: ignore[import-not-found, unused-ignore]

    yield m0kit_test_sides
    del sys.modules["m0kit_test_sides"]


def test_calls_are_answered_in_one_other_process(sides: Any) -> None:
    with Child(sides.echo) as child:
        answers = [child(1, b"two", Path("three")) for _ in range(3)]
        assert child.alive
    assert not child.alive
    pids = {pid for pid, _ in answers}
    assert len(pids) == 1
    assert os.getpid() not in pids
    assert [arguments for _, arguments in answers] == [(1, b"two", Path("three"))] * 3


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("abort", "its process was ended by SIGABRT"),
        ("null", "its process was ended by SIGSEGV"),
        ("kill", "its process was ended by SIGKILL. That is how Linux answers when memory runs out."),
        ("exit", "its process ended with exit code 3"),
        ("_exit", "its process ended with exit code 4"),
    ],
)
@pytest.mark.parametrize("when", ["opening", "running"])
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_crash_is_a_sentence(how: str, said: str, when: str, sides: Any) -> None:
    with pytest.raises(M0kitError, match=f"^{said}"):  # noqa: PT012 — either may raise
        child = Child(partial(sides.at_once if when == "opening" else sides.after, how))
        assert child("once") == ("once",)
        child("twice")
    if when == "running":
        assert not child.alive
        with pytest.raises(M0kitError, match="its process"):
            child("again")
        child.close()


@pytest.mark.parametrize("when", ["opening", "running"])
def test_one_that_says_nothing_is_stopped(when: str, sides: Any) -> None:
    if when == "opening":
        with pytest.raises(M0kitError, match=r"^it said nothing for 2 seconds, so it was stopped\.$"):
            Child(partial(sides.at_once, "hang"), patience_s=2)
        return
    child = Child(partial(sides.after, "hang"))
    assert child("once") == ("once",)
    child.patience_s = 0.1
    with pytest.raises(M0kitError, match=r"^it said nothing for 0\.1 seconds"):
        child("twice")
    assert not child.alive


def test_errors_come_back_as_they_are_and_a_side_goes_on_after_them(sides: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^no checkpoint\.$"):
        Child(partial(sides.at_once, "missing"))
    with Child(partial(sides.after, "refuse", 0)) as child:
        for _ in range(2):
            with pytest.raises(InputError, match=r"^line 3: no\.$"):
                child()
    for how, said in (("raise", "^KeyError: 'weights'$"), ("memory", "^out of memory"), ("end", "^EOFError$")):
        with Child(partial(sides.after, how, 0)) as child, pytest.raises(M0kitError, match=said):
            child()


def test_one_with_nothing_to_do_leaves_by_itself(sides: Any, tmp_path: Path) -> None:
    """So what it opened is closed, and files that it keeps are whole."""
    with Child(partial(sides.noting, tmp_path / "left")) as child:
        child()
    assert (tmp_path / "left").read_text() == "left"


def test_what_is_printed_there_is_no_result_here(sides: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with Child(partial(sides.after, "shout", 0)) as child:
        assert child() == "said"
    out, err = capfd.readouterr()
    assert out == ""
    assert "garbage" in err


def test_a_file_as_stdout_holds_only_what_is_printed_here(sides: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\nfrom m0kit_parity.child import Child\n"
        "import m0kit_test_sides as sides\n\nif __name__ == '__main__':\n"
        "    with Child(partial(sides.after, 'shout', 0)) as child:\n        print(child())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, str(script)], stdout=out, check=True, env=environment)
    assert (tmp_path / "out").read_text() == "said\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_both_without_a_traceback(sides: Any, tmp_path: Path) -> None:
    """The whole group gets it, as from a terminal, while the child is in the middle of something."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom functools import partial\nfrom m0kit.terminal import run\n"
        "from m0kit_parity.child import Child\nimport m0kit_test_sides as sides\n\ndef work():\n"
        "    with Child(partial(sides.after, 'locked')) as child:\n"
        "        child('once')\n        print('ready', child._process.pid, flush=True)\n        child('twice')\n\n"
        "if __name__ == '__main__':\n    sys.exit(run(work))\n"
    )
    done = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout is not None
    word, pid = done.stdout.readline().split()
    assert word == "ready"
    os.killpg(done.pid, signal.SIGINT)
    _, err = done.communicate()
    assert (done.returncode, err) == (130, "interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
