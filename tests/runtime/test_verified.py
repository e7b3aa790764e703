"""What was found right is remembered in the user's cache folder, by platformdirs' rules, or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m0kit import verified
from m0kit.verified import Memory, cache_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("system", "place"),
    [("linux", ".cache/m0kit"), ("darwin", "Library/Caches/m0kit"), ("win32", "AppData/Local/m0kit/Cache")],
)
def test_each_system_has_its_place(home: Path, monkeypatch: pytest.MonkeyPatch, system: str, place: str) -> None:
    monkeypatch.setattr(verified.sys, "platform", system)
    assert cache_folder() == home / place


def test_the_variables_of_the_systems_count(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verified.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "m0kit" / "Cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "m0kit"


def test_a_relative_cache_folder_is_ignored(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG rules have it: it would be another one in each working folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_folder() == home / ".cache" / "m0kit"


@pytest.mark.parametrize("named", ["", "relative", "~"])
def test_a_home_that_is_none_is_no_place(home: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("HOME", named)
    assert cache_folder() is None


def test_an_unknown_user_without_a_home_leaves_nothing_behind(tmp_path: Path) -> None:
    """The user of a container that has no entry in its list of users."""
    code = (
        "import os; os.setuid(54321)\n"
        "from m0kit.verified import Memory, cache_folder\n"
        "assert cache_folder() is None, cache_folder()\n"
        "memory = Memory.load(); memory.remember_answers('key'); memory.save()\n"
        "assert os.listdir('.') == [], os.listdir('.')\n"
    )
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    tmp_path.chmod(0o777)
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    loaded = "import sys, json, hashlib, tempfile, dataclasses, pathlib, m0kit.verified\n"
    done = subprocess.run([sys.executable, "-c", loaded + code], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_two_processes_keep_what_the_other_remembers() -> None:
    first, second = Memory.load(), Memory.load()
    first.remember_answers("one")
    second.remember_answers("two")
    second.remember_file(__file__, ["sha", 1])
    first.save()
    second.save()
    memory = Memory.load()
    assert memory.knows_answers("one")
    assert memory.knows_answers("two")
    assert memory.knows_file(__file__, ["sha", 1])
    assert not memory.knows_file(__file__, ["sha", 2])


def test_the_oldest_verdicts_are_forgotten() -> None:
    memory = Memory.load()
    for number in range(1100):
        memory.remember_answers(f"{number}")
    memory.save()
    memory = Memory.load()
    assert len(memory.answers) == 1000
    assert memory.knows_answers("1099")
    assert not memory.knows_answers("0")


@pytest.mark.parametrize("content", ["[]", "{", '{"files": [], "answers": {}}', '{"a": ["old", 1]}', "[" * 100000])
def test_another_content_is_nothing_remembered(content: str) -> None:
    folder = cache_folder()
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verified.json").write_text(content)
    memory = Memory.load()
    assert (memory.files, memory.answers) == ({}, [])
    memory.remember_answers("key")
    memory.save()
    assert Memory.load().knows_answers("key")
    assert set(json.loads((folder / "verified.json").read_text())) == {"files", "answers"}


def test_nothing_is_left_where_the_memory_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "m0kit" / "verified.json" / "in the way").mkdir(parents=True)
    memory = Memory.load()
    memory.remember_answers("key")
    memory.save()
    assert [path.name for path in (tmp_path / "m0kit").iterdir()] == ["verified.json"]
