"""Environments that hold what m0kit with some of its extras brings, and the tools of its tests. Not a test file.

Owns finding Pythons, the pins of the lowest versions, and pip. What is tried in one stands in test_installed.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TOOLS = ("pytest", "hypothesis", "httpx2")
# What pip says when it is the network that fails, not the request.
_UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|Temporary failure in name resolution"
    r"|Connection (refused|reset|broken|aborted)|Max retries exceeded|ProxyError|Network is unreachable"
)


def find_python(version: str) -> str | None:
    """A python of this version ("3.12") that works. One that pyenv only pretends to have does not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    probe = f"import ensurepip, sqlite3, ssl, lzma, sys; assert '%d.%d' % sys.version_info[:2] == {version!r}"
    for python in found:
        if python and subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0:
            return python
    return None


def requirements(extra: str | None = None) -> list[Requirement]:
    """Of the project alone, or of one of its extras."""
    named = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in named]


def lowest(wanted: Iterable[Requirement]) -> list[str]:
    """The pins "name==version" of the lowest versions that the requirements name."""
    pins = []
    for requirement in wanted:
        bounds = [spec.version for spec in requirement.specifier if spec.operator in (">=", "~=", "==")]
        assert len(bounds) == 1, f"pyproject.toml: {requirement} does not say from which version on it works"
        pins.append(f"{requirement.name}=={bounds[0]}")
    return pins


def clean_environment() -> dict[str, str]:
    """Without what would lead to another copy of m0kit, or give it options."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith(("M0KIT_", "PYTEST_", "COV_"))}


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the built wheel and some of its extras."""

    folder: Path
    pins: tuple[str, ...]  # what was asked for beside the wheel

    def run(self, *words: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """A command of the environment's bin folder."""
        command = [str(self.folder / "bin" / str(words[0])), *map(str, words[1:])]
        return subprocess.run(
            command, cwd=cwd or self.folder, env=clean_environment(), capture_output=True, text=True, check=False
        )

    def versions(self) -> dict[str, str]:
        """What is installed, by its normalised name."""
        done = self.run("python", "-m", "pip", "list", "--format", "freeze")
        assert done.returncode == 0, done.stderr
        pairs = (line.split("==") for line in done.stdout.splitlines() if "==" in line)
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def build_wheel(folder: Path) -> Path:
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("m0kit-*.whl")
    return wheel


def make_environment(folder: Path, python: str, wheel: Path, extras: Iterable[str], pins: Iterable[str]) -> Environment:
    subprocess.run([python, "-m", "venv", str(folder)], env=clean_environment(), capture_output=True, check=True)
    tools = [str(r) for r in requirements("dev") if r.name in TOOLS]
    pip(str(folder / "bin" / "python"), "install", f"{wheel}[{','.join(extras)}]", *pins, *tools)
    return Environment(folder, tuple(pins))


def pip(python: str, *words: str) -> None:
    """Patient, and once again. Where no registry can be reached the test is skipped; in CI that is a failure."""
    command = [python, "-m", "pip", *words, "--quiet", "--disable-pip-version-check", "--timeout", "180"]
    for _ in range(2):
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    said = f"pip {' '.join(words)}:\n{done.stdout}{done.stderr}"
    if _UNREACHABLE.search(said) and not os.environ.get("CI"):
        pytest.skip(f"no package registry can be reached from here: {said.splitlines()[-1]}")
    pytest.fail(said, pytrace=False)
