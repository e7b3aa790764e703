"""The tokenizer.json of a checkpoint: its own, or made by transformers from vocab.json and merges.txt.

Owns which files that takes; what the special ids must be is `checkpoint`'s.

    files, text = read_tokenizer(folder)
"""

import contextlib
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any, Final, TypedDict

from msgspec import Meta

from m0kit.errors import CheckpointError
from m0kit.files import read_regular
from m0kit.schema import fitting, parse

TOKENIZER = "tokenizer.json"
_PARTS = ("vocab.json", "merges.txt")
_SETTINGS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")  # which may be missing
_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")
_MAX_BYTES: Final = 64 << 20  # of any of these; the published tokenizer.json has 7 MB, and none of its kind 30


# More than any vocabulary has, 150,000 here. tokenizers walks through all ids up to the highest when it writes them,
# and ends the process where it has no memory for that.
_Ids = dict[str, Annotated[int, Meta(ge=0, lt=1 << 20)]]


class _Settings(TypedDict, total=False):
    """What is looked at of tokenizer_config.json."""

    tokenizer_class: str | None
    added_tokens_decoder: dict[str, Any]  # by their ids


def read_tokenizer(folder: Path) -> tuple[tuple[str, ...], str]:
    """(names of the files it comes from, JSON of the tokenizer). Raises CheckpointError."""
    if (folder / TOKENIZER).exists():
        try:
            return (TOKENIZER,), _read(folder, TOKENIZER).decode()  # to the byte, line ends too
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{TOKENIZER} in {folder.name} is not readable JSON: it is not text in UTF-8. Fetch it again"
            ) from None
    there = [name for name in _PARTS if (folder / name).exists()]
    if len(there) < len(_PARTS):
        found = f"; of {' and '.join(_PARTS)}, which would do, it has {there[0]} alone" if there else ""
        raise CheckpointError(f"{folder.name} has no {TOKENIZER}{found}. Copy it from the published model")
    files = (*_PARTS, *(name for name in _SETTINGS if (folder / name).exists()))
    return files, _made(folder, {name: _read(folder, name) for name in files})


def _read(folder: Path, name: str) -> bytes:
    try:
        return read_regular(folder / name, _MAX_BYTES)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{name} in {folder.name}: {reason}. Fetch it again") from None


def _made(folder: Path, files: dict[str, bytes]) -> str:
    """By transformers, in a folder where nothing but these files is."""
    for name, data in files.items():
        if name.endswith(".json"):
            _check_settings(folder, name, data)
    from transformers import Qwen2Tokenizer  # seconds, which a tokenizer.json saves

    with tempfile.TemporaryDirectory(prefix="m0kit-tokenizer-") as alone, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in files.items():
            (Path(alone) / name).write_bytes(data)
        with contextlib.suppress(Exception):  # whatever transformers and tokenizers make of damaged files
            tokenizer = Qwen2Tokenizer.from_pretrained(alone, local_files_only=True)
            return str(tokenizer.backend_tokenizer.to_str())
    raise CheckpointError(
        f"{folder.name} has no {TOKENIZER}, and transformers cannot make one from {' and '.join(_PARTS)} there. "
        "Copy it from the published model"
    )


def _check_settings(folder: Path, name: str, data: bytes) -> None:
    """Raises CheckpointError for a file that is not of its form, or names another class than Qwen2's."""
    try:
        settings = parse(data, wide=True)
    except ValueError as error:
        raise CheckpointError(f"{name} in {folder.name} is not readable JSON: {error}. Fetch it again") from None
    kind = None
    try:
        if name == "tokenizer_config.json":
            found = fitting(settings, _Settings)
            kind = found.get("tokenizer_class")
            fitting({id_: int(id_) for id_ in found.get("added_tokens_decoder", {})}, _Ids)
        elif name != "special_tokens_map.json":
            fitting(settings, _Ids)
    except ValueError as error:
        raise CheckpointError(f"{name} in {folder.name}: {error}. Fetch it again") from None
    if kind not in _CLASSES:
        raise CheckpointError(
            f"tokenizer_config.json: tokenizer_class is {kind!r:.40}, of which m0kit makes no {TOKENIZER}. "
            "Save the tokenizer with transformers, which writes one"
        )
