"""A checkpoint's folder is found, here or on the hub, or it is said why not; so is its licence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from tests.export.tiny_model import edit_json, linked

from m0kit.errors import CheckpointError
from m0kit_export.checkpoint import open_checkpoint

# --- where from ------------------------------------------------------------------------------------------


def test_places_that_are_no_checkpoint_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder 'nowhere'"):
        open_checkpoint("nowhere")
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_checkpoint(folder / "a" / "b")  # a Path is never a hub id
    with pytest.raises(CheckpointError, match=r"config\.json is a file"):
        open_checkpoint(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"revision 'main' was given with '.*base', which is no hub id"):
        open_checkpoint(folder, revision="main")
    for odd in ("../a", "a/b/c", "https://x.y/z", "a\nb/c", "", "x" * 5000, "a/\0"):
        with pytest.raises(CheckpointError):
            open_checkpoint(odd)


def hub_error(kind: type[Exception]) -> Exception:
    import httpx2 as httpx

    if issubclass(kind, hub_errors.HfHubHTTPError):
        return kind("long text", response=httpx.Response(404, request=httpx.Request("GET", "https://hub/a/b")))
    return kind("long text")


class TransportError(Exception):
    """As the HTTP client's own errors: no OSError, no base class shared with anything."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "checkpoint 'a/b' at revision 'v1' is gated: accept its terms"),
        (hub_errors.RevisionNotFoundError, "checkpoint 'a/b' has no revision 'v1'"),
        (
            hub_errors.RepositoryNotFoundError,
            "'a/b' at revision 'v1': there is no such folder here, and no such repository on the hub",
        ),
        (
            hub_errors.HFValidationError,
            "'a/b' at revision 'v1': there is no such folder here, and no such repository on the hub",
        ),
        (hub_errors.LocalEntryNotFoundError, "checkpoint 'a/b' at revision 'v1': .* holds no complete copy"),
        (hub_errors.HfHubHTTPError, "checkpoint 'a/b' at revision 'v1': .* holds no complete copy"),
        (ConnectionError, "checkpoint 'a/b' at revision 'v1': .* holds no complete copy"),
        (TimeoutError, "checkpoint 'a/b' at revision 'v1': .* holds no complete copy"),
        (json.JSONDecodeError, "checkpoint 'a/b' at revision 'v1': .* holds no complete copy"),
        (TransportError, "checkpoint 'a/b' at revision 'v1': .* holds no complete copy"),
    ],
)
def test_what_goes_wrong_on_the_hub_becomes_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise json.JSONDecodeError("long text", "<html>", 0) if error is json.JSONDecodeError else hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as refused:
        open_checkpoint("a/b", revision="v1")
    assert "long text" not in str(refused.value)


def test_a_hub_id_without_network_and_cache_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint 'jinaai/jina-reranker-m0': HF_HUB_OFFLINE is set"):
        open_checkpoint("jinaai/jina-reranker-m0", cache_dir=tmp_path)


def test_only_safe_files_of_the_top_folder_are_downloaded(monkeypatch: pytest.MonkeyPatch, original: Path) -> None:
    asked: dict[str, Any] = {}

    def download(source: str, **options: Any) -> str:
        asked.update(options, source=source)
        return str(original)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("a/b", "v1", Path("cache")).source == "a/b"
    assert (asked["source"], asked["revision"], asked["cache_dir"]) == ("a/b", "v1", Path("cache"))
    from huggingface_hub.utils import filter_repo_objects

    files = ["model.safetensors", "config.json", "merges.txt", "LICENSE", "README.md", "m.py", "m.bin", "onnx/a.json"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:5]


# --- licence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: cc-by-nc-4.0\n---\n# m0"}, "cc-by-nc-4.0"),
        ({"README.md": "---\ntags: [x]\nlicense: 'mit'\nlanguage: en\n---"}, "mit"),
        ({"README.md": "---\nlicense: other\nlicense_name: acme-1.0\n---"}, "acme-1.0"),
        ({"README.md": "license: mit, in the text only"}, None),
        ({"README.md": "---\r\nlicense: mit\r\n---\r\n"}, "mit"),
        ({"LICENSE": "  Attribution-NonCommercial 4.0\n International"}, "cc-by-nc-4.0"),
        ({"LICENSE.txt": "Apache License\n   Version 2.0, January 2004"}, "apache-2.0"),
        ({"LICENSE": "All rights reserved."}, None),
        ({"README.md": "---\nlicense: mit\n---", "LICENSE": "Attribution-NonCommercial 4.0"}, "mit"),
        ({"README.md": "\xff\xfe not UTF-8"}, None),
    ],
)
def test_licence_comes_from_front_matter_or_licence_file(
    folder: Path, files: dict[str, str], licence: str | None
) -> None:
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    assert open_checkpoint(folder).licence == licence


def test_licence_in_the_config_is_the_last_resort(folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(license="cc-by-nc-4.0"))
    assert open_checkpoint(folder).licence == "cc-by-nc-4.0"
    (folder / "README.md").write_text("---\nlicense: mit\n---")
    assert open_checkpoint(folder).licence == "mit"


@pytest.mark.parametrize(
    "worst",
    [
        "---" + "\n" * 999_000,
        "---\n" + "license:\n" * 111_000,
        "---\nlicense:" + " " * 999_000,
        "\n" + "mit " * 250_000,
    ],
    ids=["line ends", "empty fields", "blanks", "titles"],
)
def test_the_longest_model_card_takes_no_time_to_speak_of(folder: Path, worst: str) -> None:
    """In a process of its own: a pattern that looks everywhere from everywhere would take hours, and the kill comes."""
    for name in ("README.md", "LICENSE"):
        (folder / name).write_text(worst)
    code = "import sys; from pathlib import Path; from m0kit_export.folder import find_licence as f; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(f(Path(sys.argv[1]), {}))", str(folder)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "None"


def test_a_model_card_without_end_is_read_to_a_limit(folder: Path) -> None:
    front = "---\nlicense: mit\n"
    (folder / "README.md").write_text(front + "a" * (1 << 20) + "\n---\n")  # as the results of many benchmarks
    assert open_checkpoint(folder).licence == "mit"
    (folder / "README.md").write_text(front + "a" * (5 << 20) + "\n---\n")
    assert open_checkpoint(folder).licence is None
    linked(folder, "README.md", "/dev/zero")
    assert open_checkpoint(folder).licence is None


def test_a_licence_longer_than_any_is_none(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: " + "a" * 65 + "\n---\n")
    assert open_checkpoint(folder).licence is None
