"""What a server writes down. Owns the form of a line, as text or JSON, and what never stands in one.

    set_up("json", "info")
    log("info", "request", route="/v1/rerank", status=200, ms=12.5)

A line is an event and fields: ids of requests, routes as they are declared, status, times, sizes, counts, names of
keys. Never texts, images, ids of documents or keys. So of an exception the frames and classes are written, not what
it says, which may quote a request; within a line, those of our own errors that never do stand as they are. Of
libraries' lines the first is written. Control characters are escaped.
"""

import datetime as dt
import logging
import sys
import traceback
from pathlib import Path
from typing import Final, Literal, TextIO

from m0kit.errors import InputError, M0kitError, RecordDamagedError
from m0kit.plain import plain, to_json

Level = Literal["debug", "info", "warning", "error"]
Field = str | int | float | bool | None
LOGGER: Final = logging.getLogger("m0kit.server")
# Libraries whose lines below these would quote requests, or say again what ours say.
_OTHERS: Final = {"uvicorn": logging.WARNING, "asyncio": logging.WARNING}


def log(level: Level, event: str, *, error: BaseException | None = None, **fields: Field) -> None:
    """Write one line. Fields that are None are left out; of `error` its classes and frames are written."""
    number = logging.getLevelNamesMapping()[level.upper()]
    if LOGGER.isEnabledFor(number):
        shown = {name: value for name, value in fields.items() if value is not None}
        LOGGER.log(number, "%s", event, exc_info=error, extra={"fields": shown})


def set_up(form: Literal["text", "json"], level: Level, stream: TextIO | None = None) -> None:
    """All lines of this process go to `stream` (standard error), ours from `level` on; again replaces what was."""
    handler = _Handler(sys.stderr if stream is None else stream)
    handler.setFormatter(Json() if form == "json" else Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name, lowest in _OTHERS.items():
        logging.getLogger(name).setLevel(lowest)
    LOGGER.setLevel(level.upper())


class _Handler(logging.StreamHandler[TextIO]):
    """A line that cannot be written is lost: Python would print what it was made of."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 — as logging calls it
        del record


class Text(logging.Formatter):
    """`2026-11-27T03:32:31.412Z info request route=/v1/rerank status=200 ms=12.5`, blanks in values quoted."""

    def format(self, record: logging.LogRecord) -> str:
        told = [_time(record), record.levelname.lower(), _event(record)]
        told += [f"{name}={_value(value)}" for name, value in _fields(record).items()]
        return " ".join(told)


class Json(logging.Formatter):
    """One object a line: time, level, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": _time(record), "level": record.levelname.lower(), "event": _event(record)}
        return to_json(told | {name: _plain(value) for name, value in _fields(record).items()})


def _time(record: logging.LogRecord) -> str:
    moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _event(record: logging.LogRecord) -> str:
    text = str(record.msg)
    if isinstance(record.args, tuple):
        text = text % tuple(map(_unquoted, record.args)) if record.args else text
    else:
        text = record.getMessage()
    return plain(text if record.name == LOGGER.name else text.partition("\n")[0])  # asyncio's go on with the exception


def _unquoted(value: object) -> object:
    """The same, but for an error whose text is of a request, or of the index: that is its class alone."""
    quotes = isinstance(value, BaseException) and (
        not isinstance(value, M0kitError) or isinstance(value, InputError | RecordDamagedError)
    )
    return f"{type(value).__name__}, whose text may quote documents." if quotes else value


def _fields(record: logging.LogRecord) -> dict[str, Field]:
    fields: dict[str, Field] = dict(getattr(record, "fields", {}))
    if record.name != LOGGER.name:
        fields["logger"] = record.name
    if record.exc_info and record.exc_info[1] is not None:
        fields["error"] = _told(record.exc_info[1])
    return fields


def _plain(value: Field) -> Field:
    if isinstance(value, float):
        return round(value, 3) if value == value and abs(value) != float("inf") else str(value)
    return plain(value, None) if isinstance(value, str) else value


def _value(value: Field) -> str:
    text = str(_plain(value))
    return text if text and not any(char in text for char in ' "=') else to_json(text)


def _told(error: BaseException) -> str:
    """Classes and frames, the first cause first: "KeyError: app.py:12 main, wire.py:40 parse; then ValueError: …"."""
    told: list[str] = []
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen and len(told) < 10:
        seen.add(id(link))
        frames = traceback.extract_tb(link.__traceback__)[-30:]
        places = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}" for frame in frames]
        told.append(f"{type(link).__name__}: {', '.join(places)}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "; then ".join(reversed(told))
