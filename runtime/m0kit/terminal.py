"""The terminal's side of a command: its streams, lines, bars and notes, and any exception as one line and an exit code.

Owns how the process of a command starts and ends, and every line that it prints. Nothing here is for the library: a
program that imports m0kit keeps its streams, its warnings and its exceptions. A stream that the shell closed is nobody
to write to, as for Python.

    sys.exit(run(lambda: cli.main(standalone_mode=False)))

Whatever is printed may quote a file of somebody else. So a line is the unit: `show` and `say` take lines, and escape in
each what is no harmless character (`m0kit.plain`), line ends too; where a line ends, only the caller says. What other
libraries print themselves, and Python's tracebacks, pass a stream that does the same for all but their line ends.
"""

import codecs
import contextlib
import importlib.util
import io
import logging
import os
import re
import signal
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TextIO

import click
from tqdm import tqdm

from m0kit.errors import DeviceLostError, M0kitError
from m0kit.plain import plain, to_json

LOST: Final = 75  # exit code where a GPU was lost: "try again" (EX_TEMPFAIL of sysexits.h), in a new process
DEBUG: Final = "M0KIT_DEBUG"  # set: show where in the code an error came from
# What brings a package; those that are not listed are asked for by their own names.
_EXTRAS: Final = {
    **dict.fromkeys(("torch", "transformers", "peft", "safetensors", "onnx", "ml_dtypes", "accelerate"), "export"),
    "onnxruntime": "cpu",
    "bitsandbytes": "nf4",
    "pyarrow": "parquet",
    "ray": "ray",
    "optimum": "optimum",
}
# Pillow's: such an image is an error of ours, by its name; such transparency is dropped, as the rule for files says.
_SAID_ELSEWHERE: Final = ("Image size .* could be decompression bomb", "Palette images with Transparency expressed in")
_LONGEST: Final = 400  # characters of somebody else's message that are shown
_INDENT: Final = 13  # columns before what is left of a line that does not fit; nothing of ours begins there
_UP: Final = re.compile(r"\n*(?:\x1b\[A)*")  # how tqdm moves between several bars, and all that it writes then


def run(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; what it raises is told on stderr in one line.

    Its result is the exit code where it is a whole number. Warnings, what m0kit logs, and what others log for want of
    anybody who would take it, are shown as notes without source lines. Results that cannot be written are an error,
    also where that shows only when all is done.
    """
    _open_streams()
    ours, notes = logging.getLogger("m0kit"), _Notes(logging.WARNING)
    before = sys.stdout, sys.stderr, logging.lastResort, ours.handlers, ours.propagate
    sys.stdout, sys.stderr, logging.lastResort = _screen(sys.stdout), _screen(sys.stderr), notes
    ours.handlers, ours.propagate = [notes], False  # others' handlers would say it again, and not as a note
    try:
        return _run(command)
    finally:
        sys.stdout, sys.stderr, logging.lastResort, ours.handlers, ours.propagate = before


def _run(command: Callable[[], object]) -> int:
    # They remark on settings that m0kit checks itself, and on speed that it has no use for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = _note  # type: ignore[assignment]
        for message in _SAID_ELSEWHERE:
            warnings.filterwarnings("ignore", message)
        try:
            result = command()
            code = result if isinstance(result, int) else 0
        except BaseException as error:
            code, text = _told(error)
            if debugging() and text and text[0].startswith("error"):
                say(*_trace(error))
            say(*text)
    return _close_streams(code)


def show(*lines: str) -> None:
    """Print lines of the result to stdout, each as one line whatever stands in it. Raises OSError, ValueError."""
    _write(sys.stdout, lines)


def show_text(text: str) -> None:
    """Print a text of several lines to stdout, such as a table; in none of its lines is anything but plain text."""
    show(*text.split("\n"))


def show_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON to stdout. Raises OSError, ValueError."""
    if sys.stdout is not None:
        sys.stdout.write(f"{to_json(value, indent)}\n")
        sys.stdout.flush()


def say(*lines: str) -> None:
    """Print lines to stderr, if somebody is there to read them; each is one line whatever stands in it."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr, lines)


def bar(items: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> "tqdm[Any]":
    """A progress bar of tqdm on stderr, for a terminal only: in a file or a pipe it would be noise."""
    if "desc" in options:
        options["desc"] = plain(options["desc"])
    return tqdm(items, disable=not (shown and sys.stderr is not None and sys.stderr.isatty()), **options)


def debugging() -> bool:
    """Whether errors are to show where in the code they came from."""
    return os.environ.get(DEBUG, "0").lower() not in ("", "0", "false", "no", "off")


def ended(code: int) -> str:
    """How a process ended, of the exit code that Python gives: "was ended by SIGSEGV", "ended with exit code 3"."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


# --- streams -----------------------------------------------------------------------------------------------


def _escape(error: UnicodeError) -> tuple[str, int]:
    r"""What an encoding cannot write as \uXXXX, which is JSON's form: Python's own escapes would break JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)), error.end


codecs.register_error("m0kit.escape", _escape)


def _open_streams() -> None:
    """Streams that write any text; those that the shell closed are kept from becoming the next file opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY)  # also for stdin: an empty one would be taken for input
        if getattr(sys, name) is None and name == "stdin":
            sys.stdin = io.TextIOWrapper(_ClosedInput())
        elif getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            ascii_only = codecs.lookup(stream.encoding).name == "ascii"  # no locale is set; click would do the same
            errors = "m0kit.escape" if stream.errors in ("strict", "surrogateescape") else stream.errors
            with contextlib.suppress(OSError):  # a file that cannot tell its place
                stream.reconfigure(encoding="utf-8" if ascii_only else stream.encoding, errors=errors)


class _Screen(io.TextIOWrapper):
    """A stream that shows whatever Python writes to it: of control characters only line ends and tabs are left.

    tqdm's own are left too: it begins a bar with a return, and goes up in writes of their own. The buffer is another
    stream's, and not closed with this one.
    """

    def write(self, text: str) -> int:
        if not _UP.fullmatch(text):
            back = "\r" if text.startswith("\r") else ""
            lines = text.removeprefix(back).replace("\r\n", "\n").split("\n")
            super().write(back + "\n".join("\t".join(plain(t, None) for t in line.split("\t")) for line in lines))
        else:
            super().write(text)
        return len(text)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.flush()


def _screen(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, _Screen):
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    return _Screen(
        stream.buffer,
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Notes(logging.Handler):
    """What is logged where nobody takes it."""

    def emit(self, record: logging.LogRecord) -> None:
        _note(record.getMessage())


class _ClosedInput(io.BufferedIOBase):
    """stdin of a process that has none."""

    name = "<stdin>"

    def readable(self) -> bool:
        return True

    def read(self, *_: Any) -> bytes:
        raise M0kitError("stdin is closed, so nothing can be read from it. Name a file, or pipe something in.")

    read1 = read


def _close_streams(code: int) -> int:
    """Write what is still held back, so that Python has nothing left to fail on; returns the exit code."""
    for name in ("stdout", "stderr"):
        stream: TextIO = getattr(sys, name)
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            if name == "stdout" and code != 1:
                code = 1
                say(*_told(error)[1])
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _note(message: Warning | str, *_: Any) -> None:
    say(f"note: {_one_line(message)}")


def _one_line(text: object) -> str:
    """A text of a library, whose own line ends need not be seen."""
    return " ".join(filter(None, (line.strip(" \t\r") for line in str(text).split("\n"))))


# --- lines -------------------------------------------------------------------------------------------------


def _write(stream: TextIO | None, lines: Iterable[str]) -> None:
    """Each as one line; on a terminal what does not fit goes on below, indented.

    The terminal itself would begin it at the left edge, where the end of a long value could look like our next line.
    """
    if stream is None:
        return
    columns = _columns(stream)
    for line in map(plain, lines):
        pieces = _cut(line, columns) if columns > 2 * _INDENT and 2 * len(line) > columns else [line]
        stream.write("".join(f"{piece}\n" for piece in pieces))
    stream.flush()


def _columns(stream: TextIO) -> int:
    """Of the terminal behind a stream; 0 where there is none, or it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        return 0


def _cut(line: str, columns: int) -> list[str]:
    """A line in pieces that fit. Characters that are wide, or ambiguous, count for two columns."""
    pieces, taken = [""], 0
    for char in line:
        wide = 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WFA" else 1
        if taken + wide > columns:
            pieces.append(" " * _INDENT)
            taken = _INDENT
        pieces[-1] += char
        taken += wide
    return pieces


# --- exceptions --------------------------------------------------------------------------------------------


def _told(error: BaseException) -> tuple[int, list[str]]:
    """Exit code and the lines to say: none, or one, unless it is about usage."""
    if isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError):
        error = error.__cause__  # click takes the end of anything for Ctrl-D
    match error:
        case SystemExit():
            return (error.code or 0, []) if isinstance(error.code, int | None) else (1, [_one_line(error.code)])
        case KeyboardInterrupt() | click.Abort():
            return 130, ["interrupted"]
        case click.ClickException():
            return error.exit_code, _usage(error)
        case DeviceLostError():
            return LOST, [f"error: {_one_line(error)}"]
        case M0kitError():
            return 1, [f"error: {_one_line(error)}"]
        case BrokenPipeError():
            return 1, []  # the reader went away, and knows it
        case ImportError():
            return 1, [f"error: {_import_failed(error)}"]
        case OSError():
            where = error.filename if error.filename is not None else "stdout" if _stuck(sys.stdout) else None
            what = error.strerror or _one_line(error) or type(error).__name__
            return 1, [f"error: {f'{_one_line(os.fsdecode(where))}: ' if where else ''}{what}."]
    text = _one_line(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:  # the second is PyTorch's
        return 1, [f"error: out of memory{f': {_short(text)}' if text else ''}. Close other programs, or ask for less."]
    what = type(error).__name__ + (f": {_short(text)}" if text else "")
    return 1, [f"error: unexpected {what.rstrip('.')}. Run it again with {DEBUG}=1 and report what it says."]


def _usage(error: click.ClickException) -> list[str]:
    """What click would print, in lines."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error.format_message().splitlines()  # the help
    text = error.format_message()
    if isinstance(error, click.MissingParameter):  # the one with lines of its own: what there is to choose from
        text = _one_line(text)
    message = f"Error: {text}"
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return [message]
    ctx = error.ctx
    hint = f"Try '{ctx.command_path} {ctx.help_option_names[0]}' for help."
    return [*ctx.get_usage().splitlines(), hint, "", message]


def _trace(error: BaseException) -> Iterator[str]:
    """Python's traceback in lines. What an exception says is one, so that it cannot go on as if Python did."""
    for part in traceback.TracebackException.from_exception(error).format():
        text = part.removesuffix("\n")
        yield from text.split("\n") if text.startswith((" ", "\n")) else [text]


def _stuck(stream: TextIO) -> bool:
    """Whether a stream still holds what it could not write."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return True
    return False


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _import_failed(error: ImportError) -> str:
    """A package that is missing, too old or broken, and how to get it."""
    if error.name is None:
        return f"a package cannot be loaded: {_short(_one_line(error)).rstrip('.')}. Install it again."
    package = error.name.partition(".")[0]
    if package.startswith("m0kit"):
        return f"this command needs {package}, a part of m0kit itself. Install m0kit again."
    wanted = f"'m0kit[{_EXTRAS[package]}]'" if package in _EXTRAS else package
    try:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == package
        there = not is_missing and importlib.util.find_spec(package) is not None
    except ValueError:  # imported by hand, without a specification
        there = True
    if not there:
        return f"this command needs {package}. pip install {wanted}"
    try:
        found = f"{package} {version(package)}"
    except PackageNotFoundError:
        found = package
    text = _short(_one_line(error)).rstrip(".")
    return f"{found} is not in the version that m0kit needs: {text}. pip install --upgrade {wanted}"
