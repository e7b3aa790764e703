"""Locks agree with pyproject.toml, and lists of packages with the locks; `make locks` writes both."""

import json
import re
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from m0kit.bundle.wheels import Target, read_lock

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = {"cpu": ("cpu", "serve", "pdf"), "gpu": ("gpu", "serve", "pdf")}
PYTHONS = ("3.11", "3.12", "3.13")
TARGETS = {
    "cpu": [Target(python, f"linux-{machine}") for python in PYTHONS for machine in ("x86_64", "aarch64")],
    "gpu": [Target(python, "linux-x86_64") for python in PYTHONS],  # there are no wheels for others
    "build": [Target(PYTHONS[-1], "linux-x86_64")],
}
HEAVY = ("torch", "transformers", "onnx", "safetensors", "peft")


def pins(which: str, target: Target) -> dict[str, str]:
    """Versions by normalised name."""
    found: dict[str, str] = {}
    for line in read_lock(DEPLOY / f"requirements-{which}.txt", target):
        name, version = line.split(" ")[0].split("==")
        assert canonicalize_name(name) not in found, f"{name}: two versions for one machine"
        found[canonicalize_name(name)] = version
    return found


def wanted(which: str) -> list[Requirement]:
    if which == "build":
        return [Requirement(line) for line in PYPROJECT["build-system"]["requires"]]
    lines = [*PROJECT["dependencies"]]
    for extra in EXTRAS[which]:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("which", TARGETS)
def test_a_lock_has_what_pyproject_asks_for(which: str) -> None:
    for target in TARGETS[which]:
        found = pins(which, target)
        for requirement in wanted(which):
            assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), (
                f"{target}: {requirement}"
            )
        assert not [name for name in HEAVY if name in found]


def test_a_lock_has_nothing_that_nobody_asks_for() -> None:
    """By what the packages that are installed here ask for, perhaps in other versions."""
    target = Target(f"{sys.version_info.major}.{sys.version_info.minor}", "linux-x86_64")
    needed: set[str] = set()
    waiting = wanted("cpu")
    while waiting:
        requirement = waiting.pop()
        if (name := canonicalize_name(requirement.name)) not in needed:
            needed.add(name)
            lines = map(Requirement, distribution(name).requires or [])
            waiting += [line for line in lines if target.applies(line.marker)]
    assert pins("cpu", target).keys() == needed


@pytest.mark.parametrize("which", TARGETS)
def test_a_lock_names_no_place_to_take_packages_from(which: str) -> None:
    text = (DEPLOY / f"requirements-{which}.txt").read_text("utf-8")
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


def listed(which: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / f"m0kit-{which}.cdx.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize("which", EXTRAS)
def test_a_list_has_what_its_lock_installs_with_the_same_hashes(which: str) -> None:
    locked: dict[str, set[str]] = {}
    for python in PYTHONS:
        for line in read_lock(DEPLOY / f"requirements-{which}.txt", Target(python, "linux-x86_64")):
            locked[line.split(" ")[0]] = set(re.findall("sha256:([0-9a-f]{64})", line))
    found = {
        f"{part['name']}=={part['version']}": {each["content"] for each in part["hashes"]}
        for part in listed(which)["components"]
    }
    assert found == locked


@pytest.mark.parametrize("which", EXTRAS)
def test_a_list_is_of_this_version_and_has_a_licence_for_each(which: str) -> None:
    found = listed(which)
    assert found["metadata"]["component"]["version"] == PROJECT["version"]
    assert not [part["name"] for part in found["components"] if not part.get("licenses")]
    refs = [part["bom-ref"] for part in found["components"]]
    assert len(set(refs)) == len(refs)
    assert found["dependencies"] == [{"ref": found["metadata"]["component"]["bom-ref"], "dependsOn": refs}]
    assert "://" not in json.dumps(found)


@pytest.mark.parametrize("which", EXTRAS)
def test_a_list_fits_the_schema_of_cyclonedx(which: str) -> None:
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib[json-validation], from PyPI, is not installed")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (DEPLOY / f"m0kit-{which}.cdx.json").read_text("utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
