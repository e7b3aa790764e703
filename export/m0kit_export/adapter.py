"""Which adapter is merged, how much of it, and on what base: `--adapter PATH[:WEIGHT]`, or a hub id as PATH.

Owns how that is said, before PyTorch comes; the adapter itself is read by `lora`, and merged by `merge`.

    AdapterSpec.parse("./tuned:0.5")
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from m0kit.artifact.hub import is_id, resolve
from m0kit.errors import AdapterError
from m0kit.files import destination

KEPT = ("score.2",)  # what 4-bit training by transformers 4 does not quantise (m0kit_export.qlora)


@dataclass(frozen=True)
class QLora:
    """How the base of a QLoRA training was quantised."""

    double_quant: bool
    keep: tuple[str, ...] = KEPT  # modules that were not


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Which adapter, and how much of it."""

    path: Path
    weight: float = 1.0
    hub_id: str | None = None  # where the folder was fetched from

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise AdapterError(f"the weight of adapter {self.name} is {self.weight}, expected a finite number")

    @property
    def name(self) -> str:
        """Of the adapter, for messages and the manifest."""
        return self.hub_id or destination(self.path).name

    def check(self) -> None:
        """Raises AdapterError when the folder does not look like an adapter at all."""
        if not os.path.exists(self.path / "adapter_config.json"):
            raise AdapterError(f"{self.name} has no adapter_config.json. Give the folder that holds it")

    @classmethod
    def parse(cls, text: str) -> "AdapterSpec":
        """From PATH, PATH:WEIGHT, or a hub id in the place of the path, which is fetched.

        What exists as a folder is a folder, whatever colons its name holds; else what stands before the last colon is,
        and a finite number must follow. Raises AdapterError when both readings exist, or none.
        """
        if not text:
            raise AdapterError("an adapter is given as PATH or PATH:WEIGHT, got an empty string")
        path, colon, number = text.rpartition(":")
        whole, part = os.path.lexists(text), bool(path) and os.path.lexists(path)
        weight = _weight(number)
        if whole and part and weight is not None:
            raise AdapterError(
                f"{text!r} and {path!r} are both here. Write {f'{text}:1'!r} for the one, {f'{path}/:{number}'!r} for "
                f"the other with the weight {number}"
            )
        if whole:
            return cls(_folder(text))
        if is_id(text):
            return cls(resolve(text, what="adapter"), 1.0, text)
        if colon and (part or is_id(path)):
            if weight is None:
                raise AdapterError(
                    f"adapter {text!r:.200}: {path!r:.100} is {'here' if part else 'a hub id'}, but {number!r:.40} "
                    "is no weight. Give a finite number, as in PATH:0.5"
                )
            return cls(_folder(path), weight) if part else cls(resolve(path, what="adapter"), weight, path)
        other = f", nor {path!r:.100} to take with the weight {number}" if path and weight is not None else ""
        raise AdapterError(f"there is no adapter folder {text!r:.200}{other}. Download the adapter and give its folder")


def _folder(path: str) -> Path:
    if not os.path.isdir(path):
        raise AdapterError(f"adapter {path!r:.200} is a file. Give the folder that holds it")
    return Path(path)


def _weight(text: str) -> float | None:
    """A finite number, as it is usually written, or None."""
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if math.isfinite(weight) and text == text.strip() and "_" not in text else None
