"""Wheels that hold nothing but what they say of themselves, and one who fetches them. Not a test file."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from m0kit.bundle.wheels import Target


def make_wheel(folder: Path, name: str, version: str = "1.0", *lines: str) -> Path:
    """`lines`: of its metadata, "Requires-Dist: numpy>=2"."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    head = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", "License-Expression: MIT", *lines]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{stem}.dist-info/METADATA", "\n".join(head) + "\n\nSaid of it.\n")
        file.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{stem}.dist-info/RECORD", "")
    return path


class Index:
    """A registry: what is asked for by name, and with it what `brings` says, as pip on one machine resolved it."""

    def __init__(self, brings: dict[str, Sequence[tuple[str, str, Sequence[str]]]]) -> None:
        self._brings = brings
        self.asked: list[list[str]] = []
        self.pins: list[list[str]] = []

    def __call__(self, wanted: Sequence[str], target: Target, folder: Path, lock: Sequence[str]) -> None:
        assert target.tags
        self.asked.append(list(wanted))
        self.pins.append(list(lock))
        for line in wanted:
            for name, version, lines in self._brings.get(Requirement(line.split(" --hash")[0]).name, ()):
                make_wheel(folder, name, version, *lines)
