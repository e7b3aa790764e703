"""`--adapter PATH[:WEIGHT]`: what exists decides, hub ids are fetched, and what cannot be read is said."""

import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from tests.export import tiny_model
from tests.export.test_merge import FORMS, save_adapter
from tests.hub import cached

from m0kit.errors import AdapterError
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import Checkpoint
from m0kit_export.merge import AdapterStack


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes folders of these names, and works where they are."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> None:
        for name in names:
            (tmp_path / name).mkdir(parents=True)

    return make


@pytest.mark.parametrize(
    ("folder", "text", "path", "weight"),
    [
        ("tuned", "tuned", "tuned", 1.0),
        ("tuned", "tuned:0.5", "tuned", 0.5),
        ("tuned", "tuned:-1", "tuned", -1.0),
        ("tuned", "tuned:.25", "tuned", 0.25),
        ("tuned", "tuned/:2", "tuned", 2.0),
        ("tuned", "./tuned:2", "tuned", 2.0),
        ("runs/2026-11-25T10:45", "runs/2026-11-25T10:45", "runs/2026-11-25T10:45", 1.0),
        ("runs/2026-11-25T10:45", "runs/2026-11-25T10:45:0.5", "runs/2026-11-25T10:45", 0.5),
        ("run:3", "run:3", "run:3", 1.0),
        ("a:b/c", "a:b/c", "a:b/c", 1.0),
        ("C:\\tuned", "C:\\tuned", "C:\\tuned", 1.0),
        ("C:\\tuned", "C:\\tuned:2e-1", "C:\\tuned", 0.2),
        ("tuned:", "tuned:", "tuned:", 1.0),
        ("tuned:nan", "tuned:nan", "tuned:nan", 1.0),
        ("0.5", "0.5", "0.5", 1.0),
        ("org/name", "org/name:0.5", "org/name", 0.5),
    ],
)
def test_what_exists_is_the_folder_and_a_number_behind_it_the_weight(
    here: Callable[..., None], folder: str, text: str, path: str, weight: float
) -> None:
    here(folder)
    assert AdapterSpec.parse(text) == AdapterSpec(Path(path), weight)


def test_a_text_that_can_be_read_in_two_ways_is_refused_with_both_spellings(here: Callable[..., None]) -> None:
    here("run:45", "run")
    with pytest.raises(AdapterError, match=r"'run:45' and 'run' are both here.* 'run:45:1' .* 'run/:45'"):
        AdapterSpec.parse("run:45")
    assert AdapterSpec.parse("run:45:1") == AdapterSpec(Path("run:45"), 1.0)
    assert AdapterSpec.parse("run/:45") == AdapterSpec(Path("run"), 45.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gone", "there is no adapter folder 'gone'"),
        ("gone:45", "there is no adapter folder 'gone:45', nor 'gone' to take with the weight 45"),
        ("here:nan", "'here' is here, but 'nan' is no weight"),
        ("here:inf", "'here' is here, but 'inf' is no weight"),
        ("here:1e999", "'here' is here, but '1e999' is no weight"),
        ("here:0,5", "'here' is here, but '0,5' is no weight"),
        ("here:", "'here' is here, but '' is no weight"),
        ("D:\\gone", "there is no adapter folder 'D:"),
        ("a/b/c", "there is no adapter folder 'a/b/c'"),
        ("/org/name:x", "there is no adapter folder '/org/name:x'"),
        ("x" * 5000 + ":1", "there is no adapter folder 'x"),
        ("a\0b:1", "there is no adapter folder"),
    ],
)
def test_what_is_no_adapter_is_named(here: Callable[..., None], text: str, said: str) -> None:
    here("here")
    with pytest.raises(AdapterError, match=re.escape(said)):
        AdapterSpec.parse(text)


def test_a_file_is_no_adapter_folder(here: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"'adapter\.safetensors' is a file\. Give the folder that holds it"):
        AdapterSpec.parse("adapter.safetensors")


@pytest.mark.parametrize(("text", "weight"), [("org/name", 1.0), ("org/name:0.5", 0.5)])
def test_an_adapter_may_be_on_the_hub(
    checkpoint: Checkpoint,
    model: tiny_model.Reranker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    weight: float,
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    snapshot = cached(adapter, tmp_path / "home")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.chdir(tmp_path)
    spec = AdapterSpec.parse(text)
    assert (spec.path, spec.weight) == (snapshot, weight)
    (told,) = AdapterStack.open([spec], checkpoint).provenance()
    assert (told["name"], told["weight"]) == ("org/name", weight)


def test_an_adapter_that_is_not_on_the_hub_is_named(here: Callable[..., None]) -> None:
    here()
    with pytest.raises(AdapterError, match=r"adapter 'org/name'.*HF_HUB_OFFLINE"):
        AdapterSpec.parse("org/name:0.5")


def test_impossible_specs_are_refused() -> None:
    with pytest.raises(AdapterError, match="empty"):
        AdapterSpec.parse("")
    with pytest.raises(AdapterError, match="weight of adapter tuned is inf"):
        AdapterSpec(Path("tuned"), float("inf"))
