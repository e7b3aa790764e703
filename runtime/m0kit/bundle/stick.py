"""One folder with all that a machine without a network needs. Owns what lies in it and that it is whole.

bundle(Path("m0-int8"), Path("stick"), plan)

stick/install.sh  requirements.txt  wheels/  models/m0-int8/  m0kit.cdx.json  SHA256SUMS
"""

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from m0kit.artifact.manifest import MANIFEST, Manifest, read_manifest, verify_files
from m0kit.artifact.signature import SIGNATURE
from m0kit.bundle.cyclonedx import Component, document, licence_of
from m0kit.bundle.wheels import Download, Target, Wheel, gather, own_wheel, pip_download
from m0kit.errors import ArtifactDamagedError
from m0kit.files import destination, replacing, require_unoccupied, sha256_of

SUMS: Final = "SHA256SUMS"
_INSTALL: Final = """\
#!/bin/sh
# Installs m0kit from this folder alone:  sh install.sh [FOLDER]     with another Python: PYTHON=/opt/python/bin/python3
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${{1:-m0kit-venv}}
cd "$here"
if command -v sha256sum > /dev/null; then sha256sum --check --quiet SHA256SUMS; else shasum -a 256 -c SHA256SUMS; fi
cd "$OLDPWD"
"${{PYTHON:-python{python}}}" -m venv "$venv"
"$venv/bin/python" -m pip --isolated --disable-pip-version-check install --quiet --no-index \\
  --find-links "$here/wheels" --only-binary :all: --require-hashes --requirement "$here/requirements.txt"
name={name}
echo "$venv/bin/m0kit serve '$here/models/$name'"
"""
_FOR_WINDOWS: Final = """\
rem Installs m0kit from this folder alone:  install.cmd [FOLDER]
set venv=%~1
if "%venv%"=="" set venv=m0kit-venv
py -{python} -m venv "%venv%" || exit /b 1
"%venv%\\Scripts\\python" -m pip --isolated --disable-pip-version-check install --quiet --no-index ^
  --find-links "%~dp0wheels" --only-binary :all: --require-hashes --requirement "%~dp0requirements.txt"
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted of a bundle."""

    target: Target
    extras: tuple[str, ...] = ("cpu", "serve", "pdf")
    wheel: Path | None = None  # m0kit's own; by default it is built or fetched
    lock: Path | None = None  # versions that are taken, as pip's constraints


@dataclass(frozen=True, slots=True)
class Bundled:
    """What was written."""

    wheels: int
    num_bytes: int


def bundle(
    artifact: Path, output: Path, plan: Plan, *, name: str | None = None, download: Download = pip_download
) -> Bundled:
    """Gather wheels and the artifact, verified, into `output`, which appears when it is whole.

    `name`: what the artifact's folder is called there. Files are hard links where the disk is the same. Raises
    ArtifactError, OutputError, M0kitError for wheels that cannot be had.
    """
    require_unoccupied(output)
    manifest = read_manifest(artifact)
    verify_files(artifact, manifest)
    name = name or destination(artifact).name
    with replacing(output) as new:
        folder, scratch = new / "wheels", new.with_name("scratch")
        folder.mkdir()
        scratch.mkdir()
        wheels = gather(own_wheel(scratch, plan.wheel), plan.extras, plan.target, folder, download, plan.lock)
        _carry(artifact, manifest, new / "models" / name)
        (new / "requirements.txt").write_text(_requirements(wheels, plan.extras), "utf-8", newline="\n")
        listed = json.dumps(_list(wheels, name, manifest), indent=1, ensure_ascii=False)
        (new / "m0kit.cdx.json").write_text(f"{listed}\n", "utf-8", newline="\n")
        is_windows = plan.target.platform.startswith("windows")
        script = new / ("install.cmd" if is_windows else "install.sh")
        text = _FOR_WINDOWS if is_windows else _INSTALL
        script.write_text(
            text.format(python=plan.target.python, name=shlex.quote(name)), "utf-8",
            newline="\r\n" if is_windows else "\n",
        )  # fmt: skip
        return _seal(new, manifest, f"models/{name}", len(wheels))


def _carry(artifact: Path, manifest: Manifest, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (MANIFEST, SIGNATURE, *manifest.files):
        source = Path(os.path.realpath(artifact / name))  # in a hub's cache it is a link
        if name == SIGNATURE and not source.is_file():
            continue
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(source, folder / name)
            continue
        shutil.copyfile(source, folder / name)


def _requirements(wheels: Sequence[Wheel], extras: Sequence[str]) -> str:
    lines = []
    for wheel in wheels:
        brackets = f"[{','.join(extras)}]" if wheel.name == "m0kit" and extras else ""
        lines.append(f"{wheel.name}{brackets}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    return "".join(lines)


def _list(wheels: Sequence[Wheel], name: str, manifest: Manifest) -> dict[str, object]:
    parts = [
        Component(
            wheel.name, wheel.version, licence_of(wheel.metadata), (wheel.sha256,), file=f"wheels/{wheel.path.name}",
            kind="application" if wheel.name == "m0kit" else "library",
        )
        for wheel in wheels
    ]  # fmt: skip
    (ours,) = (part for part in parts if part.kind == "application")
    model = Component(name, manifest.fingerprint, manifest.licence, kind="machine-learning-model")
    return document(ours, [model, *(part for part in parts if part is not ours)])


def _seal(folder: Path, manifest: Manifest, place: str, num_wheels: int) -> Bundled:
    """Write the sums of all files as they are there. Raises ArtifactDamagedError where a copy is another file."""
    sums, num_bytes = [], 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, digest = path.relative_to(folder).as_posix(), sha256_of(path)
        entry = manifest.files.get(path.name) if name == f"{place}/{path.name}" else None
        if entry is not None and entry.sha256 != digest:
            raise ArtifactDamagedError(f"{name}: was copied wrongly. Check the disk, and bundle again.")
        sums.append(f"{digest}  {name}\n")
        num_bytes += path.stat().st_size
    (folder / SUMS).write_text("".join(sums), "utf-8", newline="\n")
    return Bundled(num_wheels, num_bytes)
