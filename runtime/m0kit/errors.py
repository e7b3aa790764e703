"""Every error m0kit raises on purpose. Owns the names, and that a message is one line, harmless and not long.

    M0kitError
    ├── InputError (ValueError)            a query, document or pair that cannot be scored
    │   ├── ImageError                     … because of its image
    │   ├── FormatError                    … because its file is neither text nor an image
    │   └── ScoreError                     … because the model's answer to it is not a finite number
    ├── ArtifactError (ValueError)         a folder that is not a usable artifact
    │   ├── ArtifactNotFoundError (FileNotFoundError)
    │   ├── ArtifactDamagedError           a file changed, missing or not as the manifest says
    │   ├── ArtifactVersionError           written by a newer m0kit
    │   ├── SignatureError                 not signed by one of those who are trusted, where that is required
    │   └── WrongAnswerError               the engine does not come out at the artifact's known answers
    ├── CheckpointError (ValueError)       a checkpoint that cannot be read as jina-reranker-m0
    │   └── AdapterError                   … or an adapter that does not fit it
    ├── RecipeError (ValueError)           a quantisation recipe or calibration set that cannot be used
    ├── StoreError (ValueError)            an index that cannot be used: of another artifact or version, or no index
    │   ├── StoreBusyError                 … because another process is writing to it
    │   └── RecordDamagedError             … or one of its records is not what was written
    ├── OutputError (OSError)              the result cannot be written: exists, no space, no permission
    ├── DeviceError (RuntimeError)         a device or execution provider that is not there
    │   └── DeviceLostError                … or no longer: nothing computes on it before the process is started again
    ├── PoolFullError (RuntimeError)       the pages on a device that are free are too few, while others are in use
    └── DependencyError (ImportError)      an optional package is missing; the message names the extra

Each class is also a builtin, so callers may catch ours or Python's. A message says what we got, what
we accept and what to do. Messages never carry a raw exception text of an image or inference library, nor a long
value (an image in base64): a run of letters without a blank is shortened. What they quote may hold anything, so
control characters, line ends among them, are escaped: see `m0kit.plain`.

    >>> issubclass(ImageError, ValueError)
    True
"""

import re
from typing import Any, Final, Literal, Self, get_args

from m0kit.plain import plain

Side = Literal["query", "document"]
SIDES: Final[tuple[Side, ...]] = get_args(Side)
_LONG: Final = re.compile(r"\S{400,}")  # longer than any path that people write


def _shortened(match: re.Match[str]) -> str:
    found = match[0]
    return f"{found[:60]}… ({len(found)} characters) …{found[-20:]}"


def _told(text: object) -> str:
    short = plain(_LONG.sub(_shortened, str(text)))
    return _LONG.sub(_shortened, short)  # again: escapes are longer than what they stand for


class M0kitError(Exception):
    """Root of the tree: `except M0kitError` catches everything m0kit raises on purpose."""

    def __init__(self, message: object = "", *lines: str) -> None:
        """`lines` stand below the message, each harmless as it is: what is to be copied into a file."""
        super().__init__("\n".join(map(_told, (message, *lines))))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(str(self).split("\n")), self.__dict__  # line ends are those of `lines`


class InputError(M0kitError, ValueError):
    """A query, document or pair that cannot be scored.

    Its text is composed: "pair 3: document: page.png: " and the reason, as far as the place is known.
    """

    def __init__(self, reason: object = "", *lines: str, where: str = "", pair: int | None = None) -> None:
        """`where`: "query", "document", with a file behind it, or another place; `pair`: the position in a call."""
        self.where, self.pair = _told(where), pair
        super().__init__(reason, *lines)
        self.reason = str(self)
        self.args = (": ".join(part for part in (self._pair, self.where, self.reason) if part),)

    @property
    def _pair(self) -> str:
        return "" if self.pair is None else f"pair {self.pair}"

    @property
    def side(self) -> Side | None:
        """Which part of the pair it is."""
        return next((side for side in SIDES if self.where.partition(": ")[0] == side), None)

    @property
    def said(self) -> str:
        """The text without the position, which means nothing outside of the call."""
        return f"{self.where}: {self.reason}" if self.where else self.reason

    def of_pair(self, pair: int) -> Self:
        """The same of the pair at that position."""
        other = type(self)(*self.reason.split("\n"), where=self.where, pair=pair)
        other.__cause__ = self.__cause__
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.reason, self.where, self.pair)


class ImageError(InputError):
    """An image that cannot be decoded, or whose size the model cannot take."""


class FormatError(InputError):
    """A file that is neither text nor an image."""


class ScoreError(InputError):
    """A pair to which the model gives no finite number, or a document whose state would hold such a one."""


class ArtifactError(M0kitError, ValueError):
    """A folder that is not a usable artifact."""


class ArtifactNotFoundError(ArtifactError, FileNotFoundError):
    """There is no artifact at that path."""


class ArtifactDamagedError(ArtifactError):
    """A file of the artifact is missing, changed, or not what the manifest says."""


class ArtifactVersionError(ArtifactError):
    """The artifact was written in a newer format than this m0kit reads."""


class SignatureError(ArtifactError):
    """The artifact is not signed by one of those who are trusted, or could not be signed."""


class WrongAnswerError(ArtifactError):
    """The engine computes the artifact wrongly: a known answer came out as another. Nothing was scored."""


class CheckpointError(M0kitError, ValueError):
    """A checkpoint that cannot be read as jina-reranker-m0 or a fine-tune of it."""


class AdapterError(CheckpointError):
    """An adapter that PEFT cannot read, or that was trained on another model."""


class RecipeError(M0kitError, ValueError):
    """A quantisation recipe, or a calibration set, that cannot be used on this model."""


class StoreError(M0kitError, ValueError):
    """An index that cannot be used: made by another artifact or version, or not an index at all."""


class StoreBusyError(StoreError):
    """Another process is writing to the index."""


class RecordDamagedError(StoreError):
    """A record of an index is not what was written."""


class OutputError(M0kitError, OSError):
    """The result cannot be written: the place exists, is full, or may not be written."""


class DeviceError(M0kitError, RuntimeError):
    """A device or execution provider that this installation does not have."""


class PoolFullError(M0kitError, RuntimeError):
    """Too few pages on a device are free now, since runs and schedules hold the others."""


class DeviceLostError(DeviceError):
    """A GPU that failed in the middle. This process cannot use it again; one that is started anew may."""


class DependencyError(M0kitError, ImportError):
    """A package is missing; the message names the extra that brings it."""


def _again(kind: type[InputError], reason: str, where: str, pair: int | None) -> InputError:
    """A pickled one."""
    return kind(*reason.split("\n"), where=where, pair=pair)


def is_panic(error: BaseException) -> bool:
    """Whether it comes of a library written in Rust that gave up: no Exception, and of a class nobody can import."""
    return type(error).__name__ == "PanicException"
