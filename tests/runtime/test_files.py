"""A folder appears whole or not at all, a dead process's leftovers go, a living one's stay, on every system."""

import contextlib
import errno
import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m0kit import files
from m0kit.errors import OutputError
from m0kit.files import destination, exchange, flush, lock_file, occupied, read_regular, replacing, sha256_of, writing


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(params=["swap", "two renames"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(files, "exchange", lambda *_: False)


def write(out: Path, text: str, overwrite: bool = False) -> None:
    with replacing(out, overwrite=overwrite) as new:
        (new / "file").write_text(text)
        scratch = new.with_name("scratch")
        scratch.mkdir()
        (scratch / "large").touch()


@pytest.mark.usefixtures("_way")
def test_a_folder_appears_whole_and_alone(out: Path) -> None:
    write(out, "1")
    assert (out / "file").read_text() == "1"
    write(out, "2", overwrite=True)
    assert (out / "file").read_text() == "2"
    with pytest.raises(OutputError, match="exists and is not empty"):
        write(out, "3")
    assert (out / "file").read_text() == "2"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("_way")
def test_what_fails_leaves_the_old_one(out: Path) -> None:
    write(out, "1")
    with pytest.raises(KeyboardInterrupt), replacing(out, overwrite=True):
        raise KeyboardInterrupt
    assert (out / "file").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failed_second_renaming_brings_the_old_one_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, "1")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "")
        return rename(self, target)

    monkeypatch.setattr(files, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot be written"):
        write(out, "2", overwrite=True)
    assert (out / "file").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_old_one_that_cannot_come_back_now_comes_back_next_time(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, "1")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == out:
            raise OSError(errno.EIO, "")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange", lambda *_: False)
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OutputError, match="cannot be written"):
            write(out, "2", overwrite=True)
    assert not out.exists()
    with pytest.raises(OutputError, match="not empty"):
        write(out, "3")
    assert (out / "file").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_link_means_the_place_it_leads_to(tmp_path: Path) -> None:
    place, link, empty = tmp_path / "disk" / "place", tmp_path / "link", tmp_path / "empty"
    link.symlink_to(Path("disk") / "place")
    write(link, "1")  # to nothing yet
    assert link.is_symlink()
    assert (place / "file").read_text() == "1"
    write(link, "2", overwrite=True)
    assert link.is_symlink()
    assert (place / "file").read_text() == "2"
    empty.mkdir()
    (tmp_path / "second").symlink_to(empty)
    write(tmp_path / "second", "3")
    assert (tmp_path / "second").is_symlink()
    assert (empty / "file").read_text() == "3"
    assert destination(link) == place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "empty", "link", "second"]
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_the_folder_one_is_in_is_not_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (Path(), Path(".."), tmp_path / "here"):
        with pytest.raises(OutputError, match="holds the folder you are in"):
            write(place, "1", overwrite=True)
    write(Path("inside"), "1")
    assert [path.name for path in Path().iterdir()] == ["inside"]


def test_occupied_is_what_is_no_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "to-file").symlink_to("file")
    assert {name: occupied(tmp_path / name) for name in ("file", "empty", "dangling", "to-file", ".")} == {
        "file": True, "empty": False, "dangling": False, "to-file": True, ".": True,
    }  # fmt: skip


# --- one file ----------------------------------------------------------------------------------------------


def put(path: Path, data: bytes = b"new", **options: Any) -> None:
    with writing(path, **options) as file:
        file.write(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_alone(out: Path) -> None:
    with writing(out) as file:
        file.write(b"1")
        assert names(out.parent) == [".out.unfinished"]
    assert out.read_bytes() == b"1"
    with writing(out) as file:
        file.write(b"2")
        assert out.read_bytes() == b"1"
    assert out.read_bytes() == b"2"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OutputError])
def test_a_file_whose_writing_fails_leaves_the_old_one(out: Path, error: type[BaseException]) -> None:
    for before in (None, b"old"):
        if before:
            out.write_bytes(before)
        with pytest.raises(error), writing(out):
            raise error
        assert names(out.parent) == (["out"] if before else [])
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize("failing", ["open", "fsync", "replace", "ready", "write"])
def test_what_the_system_refuses_is_said_and_leaves_the_old_one(
    out: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        if failing in ("open", "fsync", "replace"):
            patch.setattr(os, failing, full)
        options = {"ready": full} if failing == "ready" else {}
        with pytest.raises(OutputError, match=r"out: cannot be written \(No space"), writing(out, **options):
            full() if failing == "write" else None
    assert out.read_bytes() == b"old"
    assert names(out.parent) == ["out"]


def test_a_file_is_durable_before_it_is_ready_and_ready_before_it_has_its_name(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("flush"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names))[1])
    put(out, ready=lambda: done.append("ready"))
    assert done == ["flush", "ready", "rename", "flush"]  # its bytes, and at last its name


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
@pytest.mark.parametrize(("private", "mode"), [(False, 0o640), (True, 0o600)])
def test_a_private_file_is_for_its_user_alone(out: Path, private: bool, mode: int) -> None:
    before = os.umask(0o027)
    try:
        put(out, private=private)
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == mode


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.parametrize("planted", ["out", ".out.unfinished", ".out.unfinished/new", ".out.unfinished/other"])
@pytest.mark.parametrize("kind", ["link", "link to a folder", "circle", "hard link", "pipe", "file"])
def test_nothing_is_written_through_what_lies_in_the_way(tmp_path: Path, planted: str, kind: str) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "victims").mkdir()
    (tmp_path / "victims" / "victim").write_text("precious")
    place = tmp_path / planted
    place.parent.mkdir(exist_ok=True)
    {
        "link": lambda: place.symlink_to(tmp_path / "victim"),
        "link to a folder": lambda: place.symlink_to(tmp_path / "victims"),
        "circle": lambda: place.symlink_to(place),
        "hard link": lambda: place.hardlink_to(tmp_path / "victim"),
        "pipe": lambda: os.mkfifo(place),
        "file": place.touch,
    }[kind]()
    put(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert not (tmp_path / "out").is_symlink()
    assert names(tmp_path) == ["out", "victim", "victims"]
    assert (tmp_path / "victim").read_text() == (tmp_path / "victims" / "victim").read_text() == "precious"


@pytest.mark.skipif(os.name != "posix", reason="needs links, pipes and devices")
def test_what_the_system_gives_a_name_to_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, target in {"null": "/dev/null", "stdout": tmp_path / "pipe"}.items():  # links, so that none is lost
        (tmp_path / name).symlink_to(target)
        with pytest.raises(OutputError, match=f"{name}: is a device, whose place no file can take. Name a file."):
            put(tmp_path / name)
    assert names(tmp_path) == ["null", "pipe", "stdout"]


def test_a_folder_is_not_replaced_by_a_file(out: Path) -> None:
    (out / "inner").mkdir(parents=True)
    with pytest.raises(OutputError, match="out: cannot be written"):
        put(out)
    assert names(out.parent) == ["out"]
    assert names(out) == ["inner"]


def test_a_file_without_a_folder_is_said(out: Path) -> None:
    with pytest.raises(OutputError, match=r"file: cannot be written \(No such file"):
        put(out / "file")


@pytest.mark.usefixtures("_unhurried")
def test_who_writes_the_same_file_waits_and_sees_what_was_written(out: Path) -> None:
    def other() -> None:
        with writing(out) as file:
            file.write(out.read_bytes() + b" second")

    second = threading.Thread(target=other)
    with writing(out) as file:
        second.start()
        file.write(b"first")
    second.join()
    assert out.read_bytes() == b"first second"
    assert names(out.parent) == ["out"]


@pytest.fixture
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, whoever waits goes on waiting."""
    monkeypatch.setattr(files.time, "monotonic", lambda: 0.0)


def test_a_file_that_another_process_goes_on_writing_is_said(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(files.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    with writing(out) as file:
        with pytest.raises(OutputError, match=r"out: another process is writing it, in .*\.out\.unfinished"):
            put(out, b"second")
        file.write(b"first")
    assert 5 < next(clock) < 20
    assert out.read_bytes() == b"first"


_KILLED = """
import os, signal, sys
from pathlib import Path
from m0kit.files import writing

count, limit = 0, int(sys.argv[2])

def watch(event, _):
    global count
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
with writing(Path(sys.argv[1])) as file:
    file.write(b"new")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_kill_before_any_operation_leaves_the_old_file_or_the_new_one(out: Path) -> None:
    """A later writer finds no more than a free work place, and clears it away."""
    found = []
    for limit in range(1, 100):
        out.write_bytes(b"old")
        done = subprocess.run([sys.executable, "-c", _KILLED, str(out), str(limit)], check=False)
        found.append(out.read_bytes())
        put(out)
        assert names(out.parent) == ["out"]
        if done.returncode == 0:
            break
    assert found == sorted(found, reverse=True)
    assert {b"old", b"new"} == set(found)
    assert len(found) > 7


# --- processes ---------------------------------------------------------------------------------------------

_HOLDER = """
import sys
from pathlib import Path
from m0kit.files import replacing
with replacing(Path(sys.argv[1]), overwrite=True) as new:
    (new / "file").write_text("of another process")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(out: Path) -> Iterator[Callable[[], Any]]:
    """Start a process that is writing `out` until it is killed or its stdin is closed."""
    started: list[Any] = []

    def start() -> Any:
        command = [sys.executable, "-c", _HOLDER, str(out)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_a_living_process_writes_is_left_alone(out: Path, holder: Callable[[], Any]) -> None:
    process = holder()
    with pytest.raises(OutputError, match=r"out: another process is writing it, in .*\.out\.unfinished"):
        write(out, "mine")
    process.communicate("")
    assert process.returncode == 0
    assert (out / "file").read_text() == "of another process"


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_what_a_killed_process_left_is_cleared_away(out: Path, holder: Callable[[], Any]) -> None:
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in out.parent.iterdir()] == [".out.unfinished"]
    write(out, "mine")
    assert (out / "file").read_text() == "mine"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_old_one_moved_by_a_killed_process_comes_back_first(out: Path) -> None:
    write(out, "1")
    space = out.with_name(".out.unfinished")
    (space / "new").mkdir(parents=True)
    (space / "lock").touch()
    out.rename(space / "old")
    with replacing(out, overwrite=True) as new:
        assert (out / "file").read_text() == "1"
        (new / "file").write_text("2")
    assert (out / "file").read_text() == "2"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_place_is_written_once_at_a_time_in_one_process_too(out: Path) -> None:
    with replacing(out), pytest.raises(OutputError, match="another process is writing it"):
        write(out, "2")


# --- systems -----------------------------------------------------------------------------------------------


def test_swapping_leaves_both_names(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "file").touch()
    if exchange(one, other):
        assert (other / "file").exists()
        assert not (one / "file").exists()
    assert not exchange(one, tmp_path / "missing")


@pytest.mark.parametrize(("platform", "name"), [("darwin", "renamex_np"), ("linux", "renameat2")])
def test_swapping_asks_the_system_by_its_own_name(monkeypatch: pytest.MonkeyPatch, platform: str, name: str) -> None:
    asked: list[Any] = []
    library = SimpleNamespace(**{name: lambda *args: asked.append(args) or 0})
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: library)
    assert exchange(Path("/a"), Path("/b"))
    wanted = {"darwin": (b"/a", b"/b", 2), "linux": (-100, b"/a", -100, b"/b", 2)}
    assert asked == [wanted[platform]]


def test_without_such_a_function_there_is_no_swapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not exchange(Path("a"), Path("b"))


def _no_locks(descriptor: int) -> bool:
    raise OSError(errno.ENOLCK, "")


def test_without_locks_a_place_is_written_but_a_work_place_that_is_there_is_not_touched(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "lock_file", _no_locks)
    write(out, "1")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (out.with_name(".out.unfinished") / "new").mkdir(parents=True)
    with pytest.raises(OutputError, match="if there is none, remove that folder"):
        write(out, "2", overwrite=True)
    assert out.with_name(".out.unfinished").joinpath("new").is_dir()


def test_windows_locks_a_byte_and_removes_the_lock_once_it_is_closed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[Any] = []
    fake = SimpleNamespace(LK_NBLCK=2, locking=lambda *args: locked.append(args[1:]))
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    unlink, close, order = os.unlink, os.close, []
    monkeypatch.setattr(os, "close", lambda fd: (order.append("close"), close(fd))[1])
    monkeypatch.setattr(os, "unlink", lambda path, **to: (order.append("unlink"), unlink(path, **to))[1])
    monkeypatch.setattr(files, "exchange", lambda *_: False)
    monkeypatch.setattr(sys, "platform", "win32")
    write(out, "1")
    monkeypatch.setattr(sys, "platform", "linux")
    assert locked == [(2, 1)]
    assert order[-2:] == ["close", "unlink"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_windows_says_busy_with_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise PermissionError(errno.EACCES, "")

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=busy))
    monkeypatch.setattr(sys, "platform", "win32")
    assert not lock_file(3)


def test_windows_closes_a_file_before_it_renames_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    replace = os.replace

    def replacing_closed(*names: Path) -> None:
        if not opened[0].closed:
            raise PermissionError(errno.EACCES, "is used by another process")
        replace(*names)

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None))
    monkeypatch.setattr(os, "replace", replacing_closed)
    monkeypatch.setattr(sys, "platform", "win32")
    with writing(out) as file:
        opened.append(file)
    monkeypatch.setattr(sys, "platform", "linux")
    assert names(out.parent) == ["out"]


def test_a_file_that_is_read_on_windows_is_left_as_it_is(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "is used by another process")

    out.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OutputError, match="out: no permission to write there"):
        put(out)
    assert out.read_bytes() == b"old"
    assert names(out.parent) == ["out"]


def test_without_locks_a_file_is_written_but_not_where_another_may_be_writing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(files.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    monkeypatch.setattr(files, "lock_file", _no_locks)
    put(out)
    assert names(out.parent) == ["out"]
    out.with_name(".out.unfinished").mkdir()
    with pytest.raises(OutputError, match="if there is none, remove that folder"):
        put(out)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_flushed_is_no_error_but_a_broken_disk_is(
    out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OutputError) if number == errno.EIO else contextlib.nullcontext():
        put(out)
    assert out.read_bytes() == b"new"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EIO])
def test_a_drive_of_a_mac_that_cannot_empty_its_cache_is_flushed_as_far_as_it_goes(
    out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refused(*_: object) -> None:
        raise OSError(number, "")

    done: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refused)
    monkeypatch.setattr(os, "fsync", done.append)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OutputError) if number == errno.EIO else contextlib.nullcontext():
        put(out)
    assert len(done) == (0 if number == errno.EIO else 2)


_WITHOUT_FLAGS = """
import os, sys
from pathlib import Path
for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):
    if hasattr(os, name):
        delattr(os, name)
from m0kit import files
assert files.OWN == 0
with files.writing(Path(sys.argv[1])) as file:
    file.write(b"new")
assert files.read_regular(sys.argv[1], 3) == b"new"
"""


def test_files_are_written_where_the_system_has_no_flags_for_links_and_waiting(out: Path) -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_FLAGS, str(out)], check=True)
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_files_and_folders_are_flushed_as_the_system_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").touch()
    done: list[tuple[str, Any]] = []
    modes: list[int] = []
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, mode: (modes.append(mode), opened(path, mode))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, what: done.append((what, os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(sys, "platform", platform)
    flush(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    names = [str(tmp_path / "inner" / "file"), str(tmp_path / "inner"), str(tmp_path)]
    if platform == "win32":  # folders cannot be opened, and only what is open for writing is flushed
        assert (done, modes) == ([("fsync", names[0])], [os.O_RDWR])
    else:
        assert done == [("fsync" if platform == "linux" else 51, name) for name in names]


def test_what_is_read_takes_no_more_memory_than_there_is_of_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * 3_000_000)
    tracemalloc.start()
    try:
        assert len(read_regular(tmp_path / "file", 1 << 62)) == 3_000_000
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert read_regular(tmp_path / "file", 3_000_000) == b"a" * 3_000_000
    with pytest.raises(OSError, match="has more than the 2999999 bytes"):
        read_regular(tmp_path / "file", 2_999_999)


def test_a_hash_is_that_of_the_whole_file_and_progress_is_told(tmp_path: Path) -> None:
    raw = bytes(range(250)) * 10_000
    (tmp_path / "file").write_bytes(raw)
    told: list[int] = []
    assert sha256_of(tmp_path / "file", told.append) == hashlib.sha256(raw).hexdigest()
    assert told == [1 << 20, 1 << 20, len(raw) - (2 << 20)]


def test_no_path_is_followed_by_what_breaks_off_in_a_circle_of_links(tmp_path: Path) -> None:
    """`Path.resolve` raises RuntimeError there up to Python 3.12; `destination` says where it leads, if anywhere."""
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    assert destination(circle) == circle
    root = Path(__file__).parents[2]
    for package in ("runtime", "export", "quant", "parity"):
        for file in (root / package).rglob("*.py"):
            assert not re.search(r"\.resolve\(\)", file.read_text("utf-8")), file
