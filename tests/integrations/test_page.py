"""The examples of docs/integrations.md run, each where its framework is there."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from tests.installed.environment import ROOT, requirements
from tests.integrations.conftest import NOT_HERE, Page

TEXT = (ROOT / "docs" / "integrations.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"^## (\w+)\n+```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
PACKAGES = {"LangChain": "langchain_core", "LlamaIndex": "llama_index", "Haystack": "haystack"}


def test_each_framework_has_an_example() -> None:
    assert set(EXAMPLES) == set(PACKAGES)
    assert TEXT.count("```python") == len(PACKAGES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(
    name: str,
    artifact: Path,
    page: Page,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{name} {NOT_HERE}")
    (tmp_path / "m0-int8").symlink_to(artifact)
    shutil.copy(page.path, tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(EXAMPLES[name], "docs/integrations.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 1
    found = names["found"]
    assert isinstance(found, list)
    assert len(found) == 2


def test_the_versions_that_the_page_names_are_the_lowest_and_within_the_range() -> None:
    for extra in ("langchain", "llama-index", "haystack"):
        (requirement,) = requirements(extra)
        named = re.search(rf"\| {requirement.name} ([\d.]+), ([\d.]+) \|", TEXT)
        assert named is not None, requirement.name
        (lowest,) = (spec.version for spec in requirement.specifier if spec.operator == ">=")
        assert named[1].split(".")[: len(lowest.split("."))] == lowest.split(".")
        assert all(requirement.specifier.contains(version) for version in named.groups())
