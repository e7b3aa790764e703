"""The tokenizer.json of a checkpoint: its own, or made by transformers from vocab.json and merges.txt.

Owns which files that takes; what the special ids must be is `checkpoint`'s.

    files, text = read_tokenizer(folder)
"""

import json
import warnings
from pathlib import Path
from typing import Any

from m0kit.errors import CheckpointError

TOKENIZER = "tokenizer.json"
_PARTS = ("vocab.json", "merges.txt")
_SETTINGS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")  # which may be missing
_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")


def read_tokenizer(folder: Path) -> tuple[tuple[str, ...], str]:
    """(names of the files it comes from, JSON of the tokenizer). Raises CheckpointError."""
    if (folder / TOKENIZER).exists():
        try:
            return (TOKENIZER,), (folder / TOKENIZER).read_bytes().decode()  # to the byte, line ends too
        except (OSError, ValueError):
            raise CheckpointError(f"{TOKENIZER} in {folder.name} is not readable JSON. Fetch it again") from None
    there = [name for name in _PARTS if (folder / name).exists()]
    if len(there) < len(_PARTS):
        found = f"; of {' and '.join(_PARTS)}, which would do, it has {there[0]} alone" if there else ""
        raise CheckpointError(f"{folder.name} has no {TOKENIZER}{found}. Copy it from the published model")
    settings = tuple(name for name in _SETTINGS if (folder / name).exists())
    return (*_PARTS, *settings), _made(folder)


def _made(folder: Path) -> str:
    from transformers import Qwen2Tokenizer  # seconds, which a tokenizer.json saves

    kind = _class(folder)
    if kind not in _CLASSES:
        raise CheckpointError(
            f"tokenizer_config.json: tokenizer_class is {kind!r:.40}, of which m0kit makes no {TOKENIZER}. "
            "Save the tokenizer with transformers, which writes one"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
        return str(tokenizer.backend_tokenizer.to_str())
    except Exception:  # whatever transformers and tokenizers make of damaged files
        raise CheckpointError(
            f"{folder.name} has no {TOKENIZER}, and transformers cannot make one from {' and '.join(_PARTS)} there. "
            "Copy it from the published model"
        ) from None


def _class(folder: Path) -> Any:
    """The class that tokenizer_config.json names; None when it names none, or is not there."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"tokenizer_config.json in {folder.name} is not readable JSON. Fetch it again") from None
    return settings.get("tokenizer_class") if isinstance(settings, dict) else None
