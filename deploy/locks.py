"""Writes what stands here of packages: locks with hashes, and CycloneDX lists of what they install on Linux.

    python deploy/locks.py UV      # the uv that resolves; `make locks` gets one

What is allowed is pyproject.toml's. A lock is for every Python and system at once, by conditions; a list has all that
any of the Pythons here installs. Licences are what packages declare, as pip reports it.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from m0kit.bundle.cyclonedx import Component, declared, document
from m0kit.bundle.wheels import Target, read_lock

HERE = Path(__file__).parent
ROOT = HERE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = {"cpu": ("cpu", "serve", "pdf"), "gpu": ("gpu", "serve", "pdf")}
PYTHONS = ("3.11", "3.12", "3.13")
HEADER = "# {what}, by `make locks`. pip install --require-hashes --only-binary :all: --no-deps -r {file}\n"
QUIET = ("--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links")


def main(uv: str) -> None:
    """Write them all."""
    for which, extras in EXTRAS.items():
        options = [word for extra in extras for word in ("--extra", extra)]
        file = lock(uv, which, [*options, "pyproject.toml"], f"m0kit[{','.join(extras)}] without m0kit")
        listed = json.dumps(cyclonedx(file), indent=1, ensure_ascii=False)
        (HERE / f"m0kit-{which}.cdx.json").write_text(f"{listed}\n", "utf-8")
    build = "\n".join(PROJECT["build-system"]["requires"])
    lock(uv, "build", ["-"], "What builds m0kit's wheel", build)


def lock(uv: str, which: str, words: list[str], what: str, given: str | None = None) -> Path:
    """Resolve anew for the oldest Python and all newer ones."""
    command = [uv, "pip", "compile", *QUIET, "--universal", "--generate-hashes", "--no-build", "--upgrade"]
    done = subprocess.run(
        [*command, "--python-version", PYTHONS[0], *words], cwd=ROOT, input=given, text=True, check=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    file = HERE / f"requirements-{which}.txt"
    file.write_text(HEADER.format(what=what, file=file.name) + done.stdout, "utf-8")
    return file


def cyclonedx(file: Path) -> dict[str, object]:
    """What a lock installs on Linux on x86-64."""
    found: dict[str, Component] = {}
    for python in PYTHONS:
        target = Target(python, "linux-x86_64")
        lines = read_lock(file, target)
        hashes = {line.split(" ")[0]: re.findall("sha256:([0-9a-f]{64})", line) for line in lines}
        for item in report(list(hashes), target):
            pin = f"{item['name']}=={item['version']}".lower().replace("_", "-")
            licence = declared(item.get("license_expression"), item.get("license"), item.get("classifier", []))
            name, _, version = pin.partition("==")
            found[pin] = Component(name, version, licence, tuple(hashes[pin]))
    project = PROJECT["project"]
    return document(Component("m0kit", project["version"], project["license"], kind="application"), found.values())


def report(pins: list[str], target: Target) -> list[dict[str, object]]:
    """Metadata of packages, as pip has them in its report."""
    tags = [word for tag in target.tags for word in ("--platform", tag)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"),
                *("--only-binary", ":all:", "--implementation", "cp", "--python-version", target.python, *tags),
                *("--target", folder, "--report", "-", *pins),
            ],
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    return [each["metadata"] for each in json.loads(done.stdout)["install"]]


if __name__ == "__main__":
    main(*sys.argv[1:])
