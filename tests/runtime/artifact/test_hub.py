"""A name is a folder here or a repository on the hub; a path never reaches the hub; each failure is one sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tests.hub import COMMIT, Hub, cached, served
from tests.sealed import edit_manifest

from m0kit import Reranker
from m0kit.artifact.hub import is_id, resolve
from m0kit.artifact.manifest import read_manifest
from m0kit.cli.commands import cli
from m0kit.errors import AdapterError, ArtifactNotFoundError, CheckpointError

Asking = Callable[..., dict[str, Any]]

# huggingface_hub reads its environment when it is imported, so each question gets a process of its own.
_ASK = """
import json, sys
from m0kit.errors import M0kitError
from m0kit.artifact.hub import resolve
name, revision, what = json.loads(sys.argv[1])
try:
    print(json.dumps({"folder": str(resolve(name, revision, what=what))}))
except M0kitError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def ask(tmp_path: Path, home: Path) -> Asking:
    def ask(name: str, revision: str | None = None, what: str = "artifact", **environment: str) -> dict[str, Any]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        (tmp_path / "here").mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", _ASK, json.dumps([name, revision, what])],
            env={**kept, "HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", **environment},
            cwd=tmp_path / "here", capture_output=True, text=True, check=True,
        )  # fmt: skip
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return ask


@pytest.fixture
def hub(artifact: Path) -> Iterator[Hub]:
    files = {file.name: file.read_bytes() for file in artifact.iterdir()}
    with served(files | {"other.bin": b"not of the artifact"}) as hub:
        yield hub


def test_only_a_string_of_two_plain_parts_that_is_not_here_is_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "folder").mkdir(parents=True)
    assert is_id("org/name")
    assert is_id("org-1/name_2.x")
    assert is_id("org/name@refs/pr/1")
    here = ["there/folder", "name", "./org/name", "../org/name", "~/name", "/org/name", "a/b/c", "org/", "org\\name"]
    assert not any(is_id(name) for name in [*here, ".hidden/name", "", "org/näme", "C:/name", Path("org/name")])


def test_what_is_no_hub_id_comes_back_as_it_is(ask: Asking) -> None:
    assert ask("./org/name", HF_ENDPOINT="http://127.0.0.1:9") == {"folder": "org/name"}
    assert resolve("a/b/c", what="artifact") == Path("a/b/c")
    assert resolve(Path("org/name"), what="artifact") == Path("org/name")


@pytest.mark.parametrize(
    ("what", "error"),
    [("artifact", ArtifactNotFoundError), ("adapter", AdapterError), ("checkpoint", CheckpointError)],
)
def test_a_revision_of_a_folder_is_refused(tmp_path: Path, what: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"revision 'v2' was given with .* is no hub id"):
        resolve(str(tmp_path), "v2", what=what)


def test_an_artifact_is_fetched_file_by_file_of_its_manifest_and_then_kept(
    ask: Asking, hub: Hub, home: Path, artifact: Path
) -> None:
    folder = Path(ask("org/name", HF_ENDPOINT=hub.url)["folder"])
    assert folder == home / "hub" / "models--org--name" / "snapshots" / COMMIT
    manifest = read_manifest(artifact)
    assert sorted(hub.fetched) == sorted(["manifest.json", *manifest.files])
    assert read_manifest(folder) == manifest
    assert hub.tokens == {None}
    hub.asked.clear()
    assert ask("org/name", HF_ENDPOINT=hub.url)["folder"] == str(folder)
    assert hub.fetched == []
    hub.asked.clear()
    assert ask("org/name", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")["folder"] == str(folder)
    assert hub.asked == []


def test_the_token_of_the_environment_is_sent(ask: Asking, hub: Hub) -> None:
    hub.token = "hf_of_this_test"
    answer = ask("org/name", HF_ENDPOINT=hub.url)
    assert answer["error"] == "ArtifactNotFoundError"
    assert (
        "'org/name': there is no such folder here, and no such repository on the hub that may be read"
        in (answer["text"])
    )
    assert "folder" in ask("org/name", HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
    assert hub.tokens == {None, "Bearer hf_of_this_test"}


def test_a_revision_is_asked_for_by_name(ask: Asking, hub: Hub) -> None:
    assert ask("org/name", "v2", HF_ENDPOINT=hub.url)["folder"].endswith(COMMIT)
    assert ("HEAD", "/org/name/resolve/v2/manifest.json") in hub.asked
    hub.asked.clear()
    assert ask("org/name@v2", HF_ENDPOINT=hub.url)["folder"].endswith(COMMIT)
    assert ("HEAD", "/org/name/resolve/v2/manifest.json") in hub.asked
    assert "names a revision, and 'v3' is given too" in ask("org/name@v2", "v3")["text"]
    answer = ask("org/name", "v3", HF_ENDPOINT=hub.url)
    assert answer["text"].startswith("artifact 'org/name' has no revision 'v3' on the hub.")


@pytest.mark.parametrize(
    ("what", "files"),
    [
        ("adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w", "README.md": b"-"}),
        ("checkpoint", {"config.json": b"{}", "model.safetensors": b"w", "README.md": b"-"}),
    ],
)
def test_adapters_and_checkpoints_come_without_what_nobody_reads(
    ask: Asking, hub: Hub, what: str, files: dict[str, bytes]
) -> None:
    hub.files = files | {"optimizer.pt": b"x", "onnx/model.onnx": b"x", "pytorch_model.bin": b"x"}
    folder = Path(ask("org/name", what=what, HF_ENDPOINT=hub.url)["folder"])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files


def test_a_repository_without_an_artifact_is_named(ask: Asking, hub: Hub) -> None:
    hub.files = {"config.json": b"{}"}
    answer = ask("org/name", HF_ENDPOINT=hub.url)
    assert "artifact 'org/name': the repository on the hub holds no manifest.json" in answer["text"]


def test_a_manifest_from_the_hub_names_no_file_outside_its_folder(ask: Asking, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(hub.files["manifest.json"])
    edit_manifest(tmp_path, lambda raw: raw["files"].update({"../../evil": {"size": 1, "sha256": "0" * 64}}))
    hub.files["manifest.json"] = (tmp_path / "manifest.json").read_bytes()
    answer = ask("org/name", HF_ENDPOINT=hub.url)
    assert answer["error"] == "ArtifactDamagedError"
    assert "'../../evil' is not a plain file name" in answer["text"]
    assert hub.fetched == ["manifest.json"]


def test_a_signature_comes_along_where_there_is_one(ask: Asking, hub: Hub) -> None:
    hub.files["manifest.json.sig"] = b"signed"
    folder = Path(ask("org/name", HF_ENDPOINT=hub.url)["folder"])
    assert (folder / "manifest.json.sig").read_bytes() == b"signed"


@pytest.mark.parametrize(
    ("what", "error"),
    [("artifact", "ArtifactNotFoundError"), ("adapter", "AdapterError"), ("checkpoint", "CheckpointError")],
)
def test_what_is_offline_and_not_cached_says_so_by_its_name(ask: Asking, home: Path, what: str, error: str) -> None:
    answer = ask("org/name", what=what, HF_HUB_OFFLINE="1")
    assert answer["error"] == error
    assert answer["text"].startswith(f"{what} 'org/name': HF_HUB_OFFLINE is set, there is no such folder here, and ")
    assert str(home) in answer["text"]


def test_a_hub_that_does_not_answer_is_one_sentence(ask: Asking) -> None:
    assert "'org/name': there is no such folder here, the hub does not answer" in ask("org/name")["text"]


def test_a_cache_made_elsewhere_is_used_offline(ask: Asking, home: Path, artifact: Path) -> None:
    snapshot = cached(artifact, home)
    assert ask("org/name", HF_HUB_OFFLINE="1") == {"folder": str(snapshot)}
    assert ask("org/name", COMMIT, HF_HUB_OFFLINE="1") == {"folder": str(snapshot)}
    (snapshot / "head.onnx").unlink()
    assert "holds no complete copy" in ask("org/name", HF_HUB_OFFLINE="1")["text"]


# --- artifacts whose files are links -------------------------------------------------------------------------------


@pytest.fixture
def cached_artifact(artifact: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As it lies in the cache; in this process huggingface_hub is offline since it was imported."""
    from huggingface_hub import constants

    snapshot = cached(artifact, home)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    return snapshot


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_scores_from_a_cache_are_those_of_the_folder(
    cached_artifact: Path, artifact: Path, picture: Callable[..., Image.Image], memory: Any
) -> None:
    pairs = [("q", "text"), ("q", picture(56, 84))]
    for opened in (
        Reranker.load("org/name", threads=1, memory=memory),
        Reranker.load("org/name", threads=1, memory=memory, revision=COMMIT),
        Reranker.load(cached_artifact, threads=1, memory=memory, kv="int8"),
    ):
        wanted = Reranker.load(artifact, threads=1, kv=opened.kv)
        assert opened.score(pairs, raw=True).tolist() == wanted.score(pairs, raw=True).tolist()


def test_inner_results_from_a_cache_are_those_of_the_folder(cached_artifact: Path, reranker: Reranker) -> None:
    """Graphs changed on the way are opened from memory, where ONNX Runtime does not follow links to weights."""
    pair = ("q", "text")
    wanted = reranker.trace(pair, layers=True)
    found = Reranker.load("org/name", threads=1).trace(pair, layers=True)
    assert found.layers is not None
    assert wanted.layers is not None
    assert np.array_equal(found.layers, wanted.layers)


def test_weights_that_are_links_stay_mapped(cached_artifact: Path) -> None:
    reranker = Reranker.load(cached_artifact, threads=1)
    reranker.score([("q", "text")])
    if Path("/proc/self/maps").is_file():
        blob = os.path.realpath(cached_artifact / "decoder.onnx.data")
        assert blob in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "words",
    [
        "inspect org/name --verify",
        f"inspect org/name --revision {COMMIT}",
        "inspect org/name@main",
        "doctor org/name",
        "score org/name pairs.jsonl",
        "score org/name pairs.jsonl -o out.jsonl",
        "rerank org/name --query q text.txt",
        "index add org/name library text.txt",
    ],
)
def test_every_command_takes_a_hub_id(
    words: str, cached_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"query": "q", "document": "text"}\n')
    Path("text.txt").write_text("text")
    done = CliRunner().invoke(cli, words.split())
    assert done.exit_code == 0, (done.output, done.exception)


def test_a_command_says_what_is_not_in_the_cache(cached_artifact: Path) -> None:
    done = CliRunner().invoke(cli, ["inspect", "org/name", "--revision", "v9"])
    assert isinstance(done.exception, ArtifactNotFoundError)
    assert "'org/name' at revision 'v9': HF_HUB_OFFLINE is set" in str(done.exception)


def test_a_folder_here_wins(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/name").symlink_to(artifact)
    assert CliRunner().invoke(cli, ["inspect", "org/name"]).exit_code == 0
