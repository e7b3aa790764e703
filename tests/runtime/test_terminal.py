"""How a command starts and ends: whatever its streams are and whatever is raised, one line and an exit code."""

import errno
import importlib
import io
import json
import logging
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from PIL import Image

from m0kit import terminal
from m0kit.errors import DeviceLostError, InputError, OutputError

M0KIT = f"{sys.executable} -m m0kit"
posix = pytest.mark.skipif(os.name != "posix", reason="redirections of a POSIX shell")


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M0KIT_DEBUG", raising=False)


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of shell, as a user types it; bytes, because what is printed may be in any encoding."""
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


def said(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line on stderr."""
    text = done.stderr.decode()
    assert "Traceback" not in text
    assert "Exception ignored" not in text
    assert text.count("\n") <= 1, text
    return text


@pytest.fixture(scope="module")
def texts(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents whose names few encodings can write."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("größe.txt", "漢字.txt", "😀.txt"):
        (folder / name).write_text("text", "utf-8")
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    return folder


# --- streams -----------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "shift_jis", "utf-8:surrogateescape"])
@pytest.mark.parametrize("form", ["", "--json"])
def test_a_character_that_stdout_cannot_write_is_escaped(encoding: str, form: str, artifact: Path, texts: Path) -> None:
    done = shell(f"{M0KIT} rerank {artifact} {form} --query größe {texts}/*.txt", PYTHONIOENCODING=encoding)
    assert (done.returncode, said(done)) == (0, "")
    written = "utf-8" if encoding == "ascii" else encoding.partition(":")[0]
    lines = done.stdout.decode(written).splitlines()
    assert len(lines) == 4
    if form:
        names = {json.loads(line)["document"] for line in lines}
        assert names == {os.fsdecode(path) for path in texts.iterdir()}


@posix
def test_json_with_characters_that_stdout_cannot_write_is_still_json(artifact: Path, tmp_path: Path) -> None:
    """Python's own escapes (\\xe9, \\U0001f600) are not those of JSON."""
    copy = tmp_path / "größe 😀"
    copy.symlink_to(artifact)
    done = shell(f"{M0KIT} inspect --json '{copy}'", PYTHONIOENCODING="cp1252")
    assert (done.returncode, said(done)) == (0, "")
    assert json.loads(done.stdout.decode("cp1252"))["artifact"] == str(copy)


@posix
@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_no_locale_is_needed(locale: str, artifact: Path, texts: Path) -> None:
    plain = {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = shell(f"{M0KIT} rerank {artifact} --query q {texts}/*.txt {texts}/fehlt-ß.txt", **plain)
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 5
    assert "No such file" in said(done)


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words", ["inspect {}", "inspect --json {}", "rerank {} --query q {texts}/größe.txt", "--help"]
)
def test_a_full_stdout_is_one_line_and_exit_code_1(words: str, unbuffered: str, artifact: Path, texts: Path) -> None:
    line = words.replace("{}", str(artifact)).replace("{texts}", str(texts))
    done = shell(f"{M0KIT} {line} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert said(done).startswith("error: ")
    assert "No space left on device" in said(done)
    if not unbuffered and "--json" not in words:  # what is longer than the stream's memory is lost at once
        assert said(done).startswith("error: stdout: ")


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", ">/dev/full 2>&1", ">&- 2>&-"])
def test_without_a_place_for_the_error_the_exit_code_is_left(where: str, tmp_path: Path) -> None:
    done = shell(f"{M0KIT} inspect {tmp_path}/nowhere {where}")
    assert (done.returncode, done.stdout, said(done)) == (1, b"", "")


@posix
@pytest.mark.parametrize("words", ["inspect {}", "rerank {} --query q {texts}/größe.txt", "--version"])
@pytest.mark.parametrize("where", [">&-", ">&- 2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_stdout_is_nobody_to_write_to(words: str, where: str, artifact: Path, texts: Path) -> None:
    line = words.replace("{}", str(artifact)).replace("{texts}", str(texts))
    done = shell(f"{M0KIT} {line} {where}")
    assert (done.returncode, done.stdout, said(done)) == (0, b"", "")


@posix
def test_files_are_not_opened_in_the_place_of_a_closed_stream(tmp_path: Path, artifact: Path) -> None:
    """The next file that is opened would become stdout, and what anything prints would be written into it."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "q", "document": "d"}\n')
    done = shell(f"{M0KIT} score {artifact} {pairs} -o {tmp_path}/scores.jsonl <&- >&- 2>&-")
    assert done.returncode == 0
    (row,) = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert 0 < json.loads(row)["score"] < 1


@posix
def test_a_closed_stdin_is_said_and_not_taken_for_an_empty_one(artifact: Path) -> None:
    done = shell(f"{M0KIT} score {artifact} <&-")
    assert (done.returncode, done.stdout) == (1, b"")
    assert said(done) == "error: stdin is closed, so nothing can be read from it. Name a file, or pipe something in.\n"


@posix
@pytest.mark.parametrize("words", ["--help", "inspect {}", "inspect --json {}", "score --help"])
def test_a_reader_that_goes_away_is_no_traceback(words: str, artifact: Path) -> None:
    """`true` reads nothing, so this is every moment at which a pipe can break, the flush at the end above all."""
    line = words.replace("{}", str(artifact))
    done = shell(f"set -o pipefail; {M0KIT} {line} | true")
    assert done.returncode in (0, 1)  # 0: all was in the pipe before it was closed
    assert said(done) == ""


# --- exceptions --------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], object]:
    def command() -> object:
        raise error

    return command


def denied() -> OSError:
    return PermissionError(errno.EACCES, "Permission denied", "/root/report.html")


def library(name: str | None, text: str) -> ImportError:
    return ModuleNotFoundError(text, name=name)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("line 3: not JSON."), 1, "error: line 3: not JSON."),
        (InputError("a name\nof two lines"), 1, r"error: a name\nof two lines"),
        (OutputError("out: exists."), 1, "error: out: exists."),
        (denied(), 1, "error: /root/report.html: Permission denied."),
        (NotADirectoryError(20, "Not a directory", "a/b"), 1, "error: a/b: Not a directory."),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device"),
        (OSError("something"), 1, "error: something"),
        (BrokenPipeError(), 1, ""),
        (MemoryError(), 1, "error: out of memory"),
        (MemoryError("Unable to allocate 5.00 GiB"), 1, "error: out of memory: Unable to allocate 5.00 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), 1, "error: unexpected RecursionError: maximum"),
        (KeyError("weights"), 1, "error: unexpected KeyError: 'weights'"),
        (ValueError("a\nb"), 1, "error: unexpected ValueError: a b."),
        (AssertionError(), 1, "error: unexpected AssertionError."),
        (ExceptionGroup("several", [KeyError("a")]), 1, "error: unexpected ExceptionGroup: several"),
        (library("m0kit_export", "No module"), 1, "this command needs m0kit_export, a part of m0kit itself"),
        (library("somebody", "No module"), 1, "this command needs somebody. pip install somebody"),
        (library("json.nothing", "No module named 'json.nothing'"), 1, "json is not in the version that m0kit needs"),
        (ImportError("cannot import name 'x' from 'json'", name="json"), 1, "json is not in the version"),
        (ImportError("libfoo.so.1: cannot open shared object file"), 1, "libfoo.so.1: cannot open"),
        (click.UsageError("Give documents."), 2, "Error: Give documents."),
        (click.BadParameter("no"), 2, "Error: Invalid value: no"),
        (click.Abort(), 130, "interrupted"),
        (DeviceLostError("the GPU was lost"), 75, "error: the GPU was lost"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("told by somebody"), 1, "told by somebody"),
        (GeneratorExit(), 1, "error: unexpected GeneratorExit"),
    ],
    ids=repr,
)
def test_whatever_is_raised_is_one_line_and_an_exit_code(
    error: BaseException, code: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert terminal.run(raising(error)) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert text in err
    assert err.count("\n") == bool(text)
    if "unexpected" in err:
        assert "M0KIT_DEBUG=1" in err


@pytest.mark.parametrize(
    ("package", "text"),
    [
        ("torch", "this command needs torch. pip install 'm0kit[export]'"),
        ("pyarrow.parquet", "this command needs pyarrow. pip install 'm0kit[parquet]'"),
        ("onnxruntime", "this command needs onnxruntime. pip install 'm0kit[cpu]'"),
    ],
)
def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    package: str, text: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setitem(sys.modules, package.partition(".")[0], None)
    assert terminal.run(lambda: importlib.import_module(package)) == 1
    assert capfd.readouterr().err == f"error: {text}\n"


def test_the_exit_code_of_a_command_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    assert [terminal.run(lambda code=code: code) for code in (0, 1, 3, None, "text")] == [0, 1, 3, 0, 0]
    assert capfd.readouterr() == ("", "")


@posix
@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_where_an_error_came_from(how: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("no JSON")
    flag, environment = ("--debug", {}) if how == "flag" else ("", {"M0KIT_DEBUG": "1"})
    done = shell(f"{M0KIT} {flag} inspect {tmp_path}", **environment)
    assert done.returncode == 1
    text = done.stderr.decode()
    assert "Traceback" in text
    assert "JSONDecodeError" in text
    assert text.splitlines()[-1].startswith(f"error: {tmp_path}")
    assert "Traceback" not in shell(f"{M0KIT} {flag} nonsense", **environment).stderr.decode()


# --- warnings and bars -------------------------------------------------------------------------------------


def test_a_warning_is_a_note_in_one_line_once(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        for _ in range(3):
            warnings.warn("Corrupt EXIF data.\nExpecting 12 bytes", UserWarning, stacklevel=1)
        warnings.warn("another", RuntimeWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        shown = warnings.showwarning
        assert terminal.run(command) == 0
        assert warnings.showwarning is shown, "what a program shows is its own business again"
    assert capfd.readouterr().err == "note: Corrupt EXIF data. Expecting 12 bytes\nnote: another\n"


@posix
def test_what_pillow_warns_of_is_an_error_of_ours_or_one_plain_line(artifact: Path, tmp_path: Path) -> None:
    colours = Image.effect_noise((60, 80), 90).convert("RGB")
    colours.quantize(16).save(tmp_path / "palette.png", transparency=bytes(range(0, 160, 10)))
    file = io.BytesIO()
    colours.save(file, "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + struct.pack("<HHII", 0x112, 3, 1, 1) + b"\x1a\x01"  # five tags, one there
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "exif.jpg").write_bytes(file.getvalue()[:2] + segment + file.getvalue()[2:])
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0)  # of an image over Pillow's limit for a warning
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    large = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + large)
    done = shell(f"cd {tmp_path}; {M0KIT} rerank {artifact} --query q palette.png exif.jpg exif.jpg large.png")
    assert (done.returncode, len(done.stdout.splitlines())) == (3, 4)
    note, error = done.stderr.decode().splitlines()
    assert note.startswith("note: Corrupt EXIF data")
    assert error.startswith("error: large.png: ")
    assert "12000×12000" in error


def test_what_m0kit_logs_is_a_note_once_whoever_else_listens(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("m0kit.jobs.job")

    def command() -> None:
        log.warning("%s: its rows\nare scored again", "a\x1b[2Jb")
        log.info("nobody asked")

    caplog.set_level(logging.INFO)
    before = logging.getLogger("m0kit").handlers, logging.getLogger("m0kit").propagate
    assert terminal.run(lambda: terminal.run(command)) == 0
    assert capfd.readouterr().err == "note: a\\x1b[2Jb: its rows are scored again\n"
    assert caplog.messages == []
    assert (logging.getLogger("m0kit").handlers, logging.getLogger("m0kit").propagate) == before
    command()
    assert capfd.readouterr().err == ""
    assert len(caplog.messages) == 2, "outside of a command it is for whom a program chose"


def test_a_bar_is_for_a_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> Iterator[int]:
        with terminal.bar(total=3, unit="pair") as bar:
            for i in range(3):
                bar.update()
                yield i
        yield from terminal.bar(range(3))

    assert list(work()) == [0, 1, 2, 0, 1, 2]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(work()) == [0, 1, 2, 0, 1, 2]
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err
    with terminal.bar(total=3, shown=False) as bar:
        bar.update()
    assert capfd.readouterr().err == ""


# --- text from elsewhere -----------------------------------------------------------------------------------

NASTY = "a\x1b[2J\x1b]8;;file:b\x07\r\x7f\x9b\u202e\u2028c"
PLAIN = r"a\x1b[2J\x1b]8;;file:b\x07\r\x7f\x9b\u202e\u2028c"


def test_a_line_is_one_line_whatever_stands_in_it(capfd: pytest.CaptureFixture[str]) -> None:
    terminal.show(f"name: {NASTY}\nfiles: all checked", "", "größe 漢字")
    terminal.say(f"note: {NASTY}\n")
    out, err = capfd.readouterr()
    assert out == f"name: {PLAIN}\\nfiles: all checked\n\ngröße 漢字\n"
    assert err == f"note: {PLAIN}\\n\n"


def test_a_text_is_shown_line_by_line(capfd: pytest.CaptureFixture[str]) -> None:
    terminal.show_text(f"name  score\n{NASTY}  1\n")
    assert capfd.readouterr().out == f"name  score\n{PLAIN}  1\n\n"


def test_json_is_the_same_value_in_harmless_characters(capfd: pytest.CaptureFixture[str]) -> None:
    terminal.show_json({NASTY: "ß"})
    out = capfd.readouterr().out
    assert json.loads(out) == {NASTY: "ß"}
    assert out.removesuffix("\n").isprintable()
    assert "ß" in out


@pytest.mark.parametrize(
    "error",
    [
        InputError(NASTY),
        OSError(2, "No such file", NASTY),
        ValueError(NASTY),
        ImportError(NASTY),
        MemoryError(NASTY),
        SystemExit(NASTY),
        click.UsageError(NASTY),
        click.BadParameter(NASTY, param_hint="PAIRS"),
        click.NoSuchOption(NASTY),
        click.MissingParameter(NASTY, param_hint=NASTY),
        click.FileError(NASTY, NASTY),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("debug", ["0", "1"])
def test_nothing_that_is_raised_acts_on_the_terminal(
    error: BaseException, debug: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M0KIT_DEBUG", debug)
    assert terminal.run(raising(error)) in (1, 2)
    text = capfd.readouterr().err
    assert r"a\x1b[2J" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_traceback_shows_what_an_exception_says_as_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M0KIT_DEBUG", "1")

    def command() -> None:
        try:
            {}[NASTY]
        except KeyError as cause:
            raise ValueError("a\nfiles: all checked") from cause

    assert terminal.run(command) == 1
    lines = capfd.readouterr().err.splitlines()
    assert "The above exception was the direct cause of the following exception:" in lines
    assert r"ValueError: a\nfiles: all checked" in lines
    assert all(line.isprintable() for line in lines)


@posix
@pytest.mark.parametrize(
    "words",
    ["$'a\\x1b[2Jb\\nc'", "inspect $'--a\\x1b[2Jb\\nc'", "score x --engine $'a\\x1b[2Jb\\nc'", "score a b c$'\\x9b'"],
)
def test_wrong_usage_is_told_in_clicks_lines_and_harmless(words: str) -> None:
    done = shell(f"{M0KIT} {words}")
    assert (done.returncode, done.stdout) == (2, b"")
    usage, hint, blank, error = done.stderr.decode("utf-8").removesuffix("\n").split("\n")
    assert usage.startswith("Usage: ")
    assert hint.startswith("Try '")
    assert blank == ""
    assert error.startswith("Error: ")
    assert error.isprintable()


@posix
def test_what_the_shell_completes_is_harmless() -> None:
    words = {"_M0KIT_COMPLETE": "bash_complete", "COMP_WORDS": "m0kit inspect a\x1b[2J", "COMP_CWORD": "2"}
    script = "import sys; sys.argv[0] = 'm0kit'; from m0kit.__main__ import main; main()"
    done = shell(f'{sys.executable} -c "{script}"', **words)
    assert b"\x1b" not in done.stdout + done.stderr


def test_what_libraries_print_warn_of_and_log_is_harmless(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's

    def command() -> None:
        print(NASTY)
        print(f"two\nlines\t{NASTY}\r\n", file=sys.stderr, end="")
        warnings.warn(f"corrupt {NASTY}\nagain", stacklevel=1)
        logging.getLogger("a library").warning("cannot read %s", f"{NASTY}\nagain")
        logging.getLogger("a library").info("nobody asked")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        streams = sys.stdout, sys.stderr, logging.lastResort
        assert terminal.run(command) == 0
    assert streams == (sys.stdout, sys.stderr, logging.lastResort), "what a program prints to is its own business again"
    print("a\x1bb")
    out, err = capfd.readouterr()
    assert out == f"{PLAIN}\na\x1bb\n"
    assert err == f"two\nlines\t{PLAIN}\nnote: corrupt {PLAIN} again\nnote: cannot read {PLAIN} again\n"


def on_terminal(command: Callable[[], object], columns: int) -> str:
    """What a command prints to a terminal of so many columns, on stderr and stdout."""
    fcntl, termios = importlib.import_module("fcntl"), importlib.import_module("termios")
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    streams = sys.stdout, sys.stderr
    with open(writer, "w", encoding="utf-8") as stream:
        sys.stdout = sys.stderr = stream
        try:
            terminal.run(command)
        finally:
            sys.stdout, sys.stderr = streams
        os.write(writer, b"\x04")
        found = b""
        while not found.endswith(b"\x04"):
            found += os.read(reader, 1 << 16)
    os.close(reader)
    return found[:-1].decode().replace("\r\n", "\n")


@posix
@pytest.mark.parametrize(
    "value", ["cc-by-4.0" + " " * 40, "." * 27, "漢" * 13 + " ", "e\u0301" * 27, "x" * 200], ids=ascii
)
@pytest.mark.parametrize("print_line", [terminal.show, terminal.say])
def test_a_value_never_begins_a_line_of_the_terminal(print_line: Callable[[str], None], value: str) -> None:
    """Where it is longer than a line the terminal goes on at the left edge, where another of our lines may begin."""
    lines = on_terminal(lambda: print_line(f"{'licence':12} {value}files        12 checked"), 40).split("\n")
    assert lines[0].startswith("licence      ")
    assert len(lines) > 2
    assert all(line.startswith(" " * 13) for line in lines[1:-1])
    assert "".join([lines[0], *(line[13:] for line in lines[1:])]) == f"licence      {value}files        12 checked"


@posix
def test_a_line_that_fits_and_json_are_left_as_they_are() -> None:
    value = {"licence": "x" * 100}
    assert on_terminal(lambda: terminal.show("x" * 40, "漢" * 20), 40) == f"{'x' * 40}\n{'漢' * 20}\n"
    assert on_terminal(lambda: terminal.show_json(value), 40) == f"{json.dumps(value)}\n"
    assert on_terminal(lambda: terminal.show("x" * 100), 0) == "x" * 100 + "\n", (
        "a terminal that does not say its width"
    )


@posix
def test_the_name_of_a_bar_is_harmless_and_the_bar_still_a_bar() -> None:
    def command() -> None:
        with terminal.bar(total=2, desc=f"{NASTY}\nFORGED") as outer, terminal.bar(total=2, desc="inner") as inner:
            outer.update()
            inner.update()

    text = on_terminal(command, 200)
    assert f"\r{PLAIN}\\nFORGED: " in text
    assert "\x1b[A" in text, "several bars go up and down"
    assert "\x1b[2J" not in text
