"""Runs inputs of a surface in forked children under limits, and tells what came of them. Owns limits and canaries.

    result = run("image", seed=0, numbers=range(2000))

Input number i of a surface is a function of (surface, seed, i) alone: the surface's seeds come first, as they are, then
seeds that were mutated. A child takes many inputs and notes each in a file before it goes on; so when one dies, that
tells of which. It is run again alone, and the rest goes on in another child.

An input fails where anything but an M0kitError comes out, where the process dies, hangs or takes too much memory,
where a file outside of the input's folder is read out, written, or gone, and where the target says `Wrong`.
"""

import atexit
import faulthandler
import json
import os
import resource
import shutil
import signal
import stat
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, Final

SEEDS: Final = Path(__file__).parent / "seeds"
SECRET: Final = "the-words-that-nobody-may-say"
# Milliseconds are usual; so much is never a busy machine.
_CPU_S: Final = 20
_WAIT_S: Final = 30  # for a process that does nothing, as at a pipe that nobody writes to
# Above what the process had before: an image at the limit of pixels takes a third of it.
_RESIDENT_BYTES: Final = 3 << 29
_ADDRESS_BYTES: Final = 3 << 30  # thread stacks and arenas are address space, too
_FILE_BYTES: Final = 256 << 20
_CHUNK: Final = 250  # inputs of a child: a fork of a process with PyTorch in it takes 10 ms
_MOST_DEATHS: Final = 8  # then a surface is given up: each may have cost a minute
MTIME_NS: Final = 10**18  # of all files that are laid: a job knows its input by it


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link; "@" in its target stands for the folder that the input's folder and the canaries are in."""

    target: str


@dataclass(frozen=True, slots=True)
class Pipe:
    """A pipe that nobody writes to."""


Files = Mapping[str, "bytes | Link | Pipe"]  # an input: what lies in its folder, by relative name


class Wrong(Exception):  # noqa: N818
    """What a target raises where something came out that should not have."""


@dataclass(frozen=True)
class Surface:
    """Something that reads what others wrote."""

    seeds: Mapping[str, Files]  # named "whole…" where it must be taken without an error, "once…" where it takes seconds
    mutate: Callable[[Random, Files], Files]
    target: Callable[[Path], object]  # given the folder: what a user would call; returns what was said, as text or not
    base: Files = field(default_factory=dict)  # what lies there beside or below what an input says
    file: str = "input"  # the name of a seed's file that is committed without a folder
    native_may_die: bool = False  # where an engine runs what it was given with a hash that fits

    def input(self, name: str, seed: int, number: int) -> tuple[str, Files]:
        """Input `number`, and where it comes from."""
        names = sorted(self.seeds)
        if number < len(names):
            return f"seed {names[number]}", self.seeds[names[number]]
        random = Random(f"{name}/{seed}/{number}")
        whole = [name for name in names if name.startswith("whole")]
        rest = [name for name in names if not name.startswith("once")]
        chosen = random.choice(whole if whole and random.random() < 0.6 else rest)
        files = self.seeds[chosen]
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            with suppress(Exception):  # what one change left, the next may not be able to take for what it was
                files = self.mutate(random, files)
        return f"seed {chosen}, mutated", files


@dataclass
class Result:
    """What came of the inputs of one surface."""

    surface: str
    seed: int
    inputs: int = 0
    whole: int = 0  # no error
    errors: Counter[str] = field(default_factory=Counter)  # by class
    died: Counter[str] = field(default_factory=Counter)  # where an engine may
    slowest: tuple[float, int] = (0.0, -1)  # seconds of CPU, number
    seconds: float = 0.0  # of CPU
    failures: dict[str, list[int]] = field(default_factory=dict)  # what → numbers of inputs

    def add(self, other: "Result") -> None:
        self.inputs += other.inputs
        self.whole += other.whole
        self.errors += other.errors
        self.died += other.died
        self.slowest = max(self.slowest, other.slowest)
        self.seconds += other.seconds
        for what, numbers in other.failures.items():
            self.failures.setdefault(what, []).extend(numbers)

    def told(self) -> str:
        """The failures, each with the command that shows it."""
        lines = []
        for what, numbers in sorted(self.failures.items(), key=lambda item: -len(item[1])):
            lines.append(f"{self.surface} {self.seed} {min(numbers)}: {what} ({len(numbers)} inputs)")
            lines.append(f"    python -m tests.fuzz {self.surface} --seed {self.seed} --replay {min(numbers)}")
        return "\n".join(lines)


def at_home() -> None:
    """Give this process and its children a user's folders of their own, which go when it ends."""
    home = tempfile.mkdtemp(prefix="m0kit-fuzz-home-")
    remove_at_end(home)
    key = Path(home, "m0kit", "journal.key")  # by which a job knows its own rows; made here, inputs are the same always
    key.parent.mkdir()
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    os.environ |= dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME"), home)


def remove_at_end(folder: str) -> None:
    """Of this process, not of its children."""
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)


def run(name: str, surface: Surface, seed: int, numbers: Sequence[int], seconds: float = float("inf")) -> Result:
    """Run inputs by number, as many as fit into `seconds`."""
    result = Result(name, seed)
    started = time.monotonic()
    with _Place() as place:
        at = deaths = 0
        while at < len(numbers) and time.monotonic() - started < seconds and deaths < _MOST_DEATHS:
            chunk = numbers[at : at + _CHUNK]
            notes, death = _in_child(place, ((n, surface.input(name, seed, n)[1]) for n in chunk), surface)
            for number, note in notes:
                must = (
                    surface.input(name, seed, number)[0].startswith("seed whole")
                    if number < len(surface.seeds)
                    else False
                )
                if must and "error" in note and "failure" not in note:
                    note["failure"] = f"an input that is whole is refused: {note['said']}"
                _count(result, number, note)
            at += len(notes)
            if death is not None:
                deaths += 1
                number = numbers[at]
                again, confirmed = _in_child(place, [(number, surface.input(name, seed, number)[1])], surface)
                if again and not confirmed:
                    _count(result, number, again[0][1])
                    _fail(result, number, f"{death}, but only after the inputs before it")
                elif surface.native_may_die and death.startswith("SIG"):
                    result.inputs += 1
                    result.died[death] += 1
                    deaths -= 1
                else:
                    result.inputs += 1
                    _fail(result, number, death)
                at += 1
        if deaths >= _MOST_DEATHS:
            _fail(result, numbers[min(at, len(numbers) - 1)], f"given up after {deaths} deaths")
    result.seconds = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    return result


def alone(files: Files, surface: Surface, quiet: bool = True) -> dict[str, Any]:
    """What comes of one input: {"error": class} or {"failure": what}, with the traceback in "trace"."""
    with _Place() as place:
        notes, death = _in_child(place, [(0, files)], surface, quiet)
    return notes[0][1] if notes else {"failure": death, "trace": ""}


def save(files: Files, path: Path) -> None:
    """As a tar file, which has links and pipes; it can be committed as a seed."""
    with tarfile.open(path, "w:xz", preset=9) as target:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            if isinstance(content, Link):
                entry.type, entry.linkname = tarfile.SYMTYPE, content.target
            elif isinstance(content, Pipe):
                entry.type = tarfile.FIFOTYPE
            else:
                entry.size = len(content)
            target.addfile(entry, BytesIO(content) if isinstance(content, bytes) else None)


def load(path: Path, file: str = "input") -> Files:
    """What `save` wrote; any other file is the content of the one file that an input has."""
    if not path.name.endswith(".tar.xz"):
        return {file: path.read_bytes()}
    files: dict[str, bytes | Link | Pipe] = {}
    with tarfile.open(path) as source:
        for entry in source:
            content = source.extractfile(entry) if entry.isreg() else None
            files[entry.name] = Link(entry.linkname) if entry.issym() else content.read() if content else Pipe()
    return files


def committed(name: str, file: str = "input") -> dict[str, Files]:
    """The seeds of a surface that are files."""
    folder = SEEDS / name
    return {path.name: load(path, file) for path in sorted(folder.iterdir())} if folder.is_dir() else {}


# --- the place ---------------------------------------------------------------------------------------


class _Place:
    """A folder with the input's, one for temporary files, and canaries."""

    def __enter__(self) -> "_Place":
        memory = "/dev/shm"  # where flushing costs nothing; a container may have little of it
        roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * _FILE_BYTES
        where = memory if roomy else None
        self.path = Path(tempfile.mkdtemp(prefix="m0kit-fuzz-", dir=where))
        self.renew()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def renew(self) -> None:
        """Fresh canaries."""
        for name in ("canary", "input", "temporary"):
            shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / name).mkdir()
        for name in ("secret.txt", "victim", "000001.kv", "weights.data"):
            (self.path / "canary" / name).write_text(f"{SECRET}\n" * 200, "utf-8")
        self.before = self.outside()
        self.laid: dict[str, tuple[object, object]] = {}  # name → content, and what the file was then

    def outside(self) -> dict[str, Any]:
        """All that must stay as it is."""
        found: dict[str, Any] = {"": sorted(os.listdir(self.path))}
        for entry in os.scandir(self.path / "canary"):
            status = entry.stat(follow_symlinks=False)
            content = Path(entry.path).read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found[entry.name] = (status.st_ino, status.st_mode, status.st_mtime_ns, content)
        return found

    def lay(self, files: Files) -> Path:
        """Put an input into its folder. A file that lies there already as it should stays, for what is known of it."""
        folder = self.path / "input"
        kept = {
            name: stamp
            for name, stamp in self.laid.items()
            if files.get(name) is stamp[0] and _stamp(folder / name) == stamp[1]
        }
        for path in sorted(folder.rglob("*"), reverse=True):
            if str(path.relative_to(folder)) not in kept:
                with suppress(OSError):  # a folder that holds what is kept
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in files.keys() - kept.keys():
            path, content = folder / name, files[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Link):
                path.symlink_to(content.target.replace("@", str(self.path)))
            elif isinstance(content, Pipe):
                os.mkfifo(path)
            else:
                path.write_bytes(content)
                os.utime(path, ns=(MTIME_NS, MTIME_NS))
                kept[name] = content, _stamp(path)
        self.laid = kept
        return folder

    def told_secret(self) -> str | None:
        """The name of a file in the input's folder that was not there, or not so, and says what a canary holds."""
        for folder, _, names in os.walk(self.path / "input"):
            for name in names:
                path = Path(folder, name)
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_mtime_ns != MTIME_NS:
                    with path.open("rb") as file:
                        if SECRET.encode() in file.read(1 << 24):
                            return str(path.relative_to(self.path / "input"))
        return None


def _stamp(path: Path) -> object:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# --- children ----------------------------------------------------------------------------------------


def _in_child(
    place: _Place, inputs: Iterable[tuple[int, Files]], surface: Surface, quiet: bool = True
) -> tuple[list[tuple[int, dict[str, Any]]], str | None]:
    """The notes on inputs, by number, and how the child died, if it did: of the input that has no note."""
    handle, notes = tempfile.mkstemp(prefix="m0kit-fuzz-notes-")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _limit(place, quiet)
            if quiet:  # pytest's writes past what is swallowed
                faulthandler.disable()
            else:
                faulthandler.dump_traceback_later(10)  # where it hangs
            for number, files in inputs:
                note = _tried(place, files, surface)
                os.write(handle, json.dumps([number, note]).encode() + b"\n")
                if "failure" in note:  # it may have left anything behind
                    break
            code = 0
        except BaseException:
            if not quiet:
                traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    os.close(handle)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it started itself and left
    found = [json.loads(line) for line in Path(notes).read_bytes().splitlines()]
    os.unlink(notes)
    death = _death(status)
    if (now := place.outside()) != place.before:
        if death is not None:
            death = _changed(place.before, now)
        place.renew()
    elif death is not None or (found and "failure" in found[-1][1]):
        place.renew()
    return [(number, note) for number, note in found], death


def _limit(place: _Place, quiet: bool) -> None:
    """For this process, for good."""
    os.setpgid(0, 0)
    os.chdir(place.path)
    os.environ["TMPDIR"] = tempfile.tempdir = str(place.path / "temporary")
    limits = [(resource.RLIMIT_FSIZE, _FILE_BYTES), (resource.RLIMIT_CORE, 0)]
    with suppress(FileNotFoundError):  # elsewhere than on Linux nothing tells what there is already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits.append((resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + _ADDRESS_BYTES))
    for what, most in limits:
        resource.setrlimit(what, (most, most))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2) if quiet else (0,):
        os.dup2(null, descriptor)
    warnings.simplefilter("ignore")


def _tried(place: _Place, files: Files, surface: Surface) -> dict[str, Any]:
    from m0kit.errors import M0kitError

    folder = place.lay({**surface.base, **files})
    used, resident = time.process_time(), _resident()
    signal.setitimer(signal.ITIMER_PROF, _CPU_S)
    signal.setitimer(signal.ITIMER_REAL, _WAIT_S)
    note: dict[str, Any] = {}
    said: object = None
    try:
        said = surface.target(folder)
    except Wrong as error:
        note = {"failure": f"wrong: {error}", "trace": traceback.format_exc()}
    except M0kitError as error:
        said = str(error)
        note = {"error": type(error).__name__, "said": said, "trace": traceback.format_exc()}
        if said and (what := controls(said.replace("\n", ""))):
            note["failure"] = f"{type(error).__name__} holds {what}{_at(error)}"
    except BaseException as error:  # a panic of Rust's is no Exception
        note = {"failure": f"{type(error).__name__}{_at(error)}", "trace": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    note["cpu"] = time.process_time() - used
    if (now := place.outside()) != place.before:
        note["failure"] = _changed(place.before, now)
    elif SECRET in str(said):
        note["failure"] = "says what is in a file outside"
    elif name := place.told_secret():
        note["failure"] = f"wrote what is in a file outside into {name}"
    elif (grown := _resident() - resident) > _RESIDENT_BYTES:
        note["failure"] = f"takes more than {_RESIDENT_BYTES >> 20} MiB"
        note["said"] = f"{grown >> 20} MiB"
    if "failure" not in note:
        note.pop("trace", None)
    return note


def controls(said: str) -> str | None:
    """What in a text would steer a terminal; None where nothing would."""
    for letter in said:
        code = ord(letter)
        if (
            code < 32
            or 0x7F <= code < 0xA0
            or letter in "\u061c\u200e\u200f\u2028\u2029"
            or (0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069)
        ):
            return "a control character"
    return None


def _resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _at(error: BaseException) -> str:
    """Where in m0kit's code."""
    own = [
        f for f in traceback.extract_tb(error.__traceback__) if "/m0kit" in f.filename and "/tests/" not in f.filename
    ]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name or "its own list" for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return f"changed or removed outside of the folder: {', '.join(names)}"


def _death(status: int) -> str | None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGPROF:
            return f"takes more than {_CPU_S} s of CPU"
        if number == signal.SIGALRM:
            return f"waits for more than {_WAIT_S} s"
        return signal.Signals(number).name
    return f"exit code {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else None


def _count(result: Result, number: int, note: Mapping[str, Any]) -> None:
    result.inputs += 1
    result.slowest = max(result.slowest, (note.get("cpu", 0.0), number))
    if "failure" in note:
        _fail(result, number, note["failure"])
    elif "error" in note:
        result.errors[note["error"]] += 1
    else:
        result.whole += 1


def _fail(result: Result, number: int, what: str) -> None:
    result.failures.setdefault(what, []).append(number)
