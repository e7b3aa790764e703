"""An artifact is read as it was written, and each kind of damage is named with its path."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests._hub import cached

from m0kit import artifact as module
from m0kit.artifact import (
    KV,
    FileEntry,
    KnownAnswer,
    KnownAnswers,
    Manifest,
    read_manifest,
    sha256_of,
    verify_files,
    write_manifest,
)
from m0kit.errors import (
    ArtifactDamagedError,
    ArtifactError,
    ArtifactNotFoundError,
    ArtifactVersionError,
    M0kitError,
)
from m0kit_parity.checkpoints import model_config

FILES = {"tokenizer.json": b"{}", "vision.onnx": b"v", "decoder.onnx": b"dd", "head.onnx": b"h", "head.onnx.data": b""}

RECIPE = {
    "precision": "int4",
    "device": "cpu",
    "equalize": True,
    "weights": [{"match": "score.*", "scheme": "fp32"}, {"match": "*", "scheme": "int4", "block": [128, 64]}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in the artifact's form; what the files hold doesn't matter here."""
    folder = tmp_path / "m0-int4"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    files = {name: FileEntry(len(content), sha256_of(folder / name)) for name, content in FILES.items()}
    provenance = {"base": "jinaai/jina-reranker-m0 é", "licence": "cc-by-nc-4.0", "adapters": []}
    manifest = Manifest(model_config("tiny"), "int4", {"vision": {"inputs": []}}, files, provenance, RECIPE)
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of files in the order in which they are hashed; nothing is remembered before the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    names: list[str] = []

    def counting(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(module, "sha256_of", counting)
    return names


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As one who does not write a manifest's own hash, or knew nothing of it."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text("utf-8"))
    raw.pop("sha256", None)
    change(raw)
    path.write_text(json.dumps(raw), "utf-8")


def test_what_was_written_is_read(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.model == model_config("tiny")
    assert manifest.scheme == "int4"
    assert manifest.schemes == ("fp32", "int4")
    assert manifest.recipe == RECIPE
    assert manifest.graphs == {"vision": {"inputs": []}}
    assert manifest.files["decoder.onnx"].size == 2
    assert manifest.provenance["base"] == "jinaai/jina-reranker-m0 é"
    assert manifest.licence == "cc-by-nc-4.0"
    assert manifest.num_bytes == 6
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    verify_files(folder, manifest)


@pytest.mark.parametrize("scheme", ["fp32", "fp16"])
def test_a_manifest_from_before_recipes_is_read_as_one_scheme_for_all(folder: Path, scheme: str) -> None:
    edit(folder, lambda raw: (raw.pop("recipe"), raw.update(scheme=scheme)))
    manifest = read_manifest(folder)
    assert manifest.schemes == (scheme,)
    assert manifest.recipe == {"precision": scheme, "weights": [{"match": "*", "scheme": scheme}]}
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def test_a_scheme_is_listed_once_however_many_rules_use_it(folder: Path) -> None:
    manifest = read_manifest(folder)
    rules = [
        {"match": name, "scheme": scheme} for name, scheme in zip("abcd", ("nf4", "int8", "nf4", "fp32"), strict=True)
    ]
    assert replace(manifest, recipe={"weights": rules}).schemes == ("fp32", "int8", "nf4")


def test_a_real_artifact_is_whole(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    verify_files(artifact, manifest)
    assert {p.name for p in artifact.iterdir()} == {*manifest.files, "manifest.json"}


def test_the_fingerprint_depends_on_every_setting_that_changes_a_score(folder: Path) -> None:
    manifest = read_manifest(folder)
    model = manifest.model
    changed = [
        replace(manifest, model=replace(model, prompt=replace(model.prompt, logit_bias=0.5))),
        replace(manifest, model=replace(model, image=replace(model.image, mean=(0.5, 0.5, 0.5)))),
        replace(manifest, model=replace(model, decoder=replace(model.decoder, rope_theta=1e4))),
        replace(manifest, graphs={"vision": {"inputs": [{"name": "patches"}]}}),
        replace(manifest, recipe={**RECIPE, "equalize": False}),
        replace(manifest, scheme="int8"),
        replace(manifest, known_answers=KnownAnswers((), dict.fromkeys(KV, 0.1), "")),
    ]
    seen = {manifest.fingerprint, *(one.fingerprint for one in changed)}
    assert len(seen) == len(changed) + 1
    write_manifest(folder, manifest)
    assert read_manifest(folder).fingerprint == manifest.fingerprint


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("prompt", "logit_bias", 0.5), ("image", "mean", [0.5, 0.5, 0.5]), ("prompt", "score_token_id", 101)],
)
def test_a_manifest_that_was_edited_is_refused_by_name(folder: Path, section: str, name: str, value: Any) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text("utf-8"))
    raw["model"][section][name] = value
    path.write_text(json.dumps(raw), "utf-8")
    with pytest.raises(ArtifactDamagedError, match=r"manifest\.json: has changed since the export"):
        read_manifest(folder)


def test_a_manifest_may_be_laid_out_anew(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = read_manifest(folder)
    raw = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(dict(reversed(raw.items()))), "utf-8")
    assert read_manifest(folder) == manifest


def test_only_a_manifest_of_the_first_form_may_lack_its_hash(folder: Path) -> None:
    edit(folder, lambda _: None)
    assert read_manifest(folder).known_answers is None
    known = KnownAnswers((KnownAnswer("q", "d", 1.5),), dict.fromkeys(KV, 0.1), "why")
    write_manifest(folder, replace(read_manifest(folder), known_answers=known))
    assert read_manifest(folder).known_answers == known
    edit(folder, lambda _: None)
    with pytest.raises(ArtifactDamagedError, match="has changed since the export"):
        read_manifest(folder)


def test_the_first_manifests_are_read(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "first_format" / "manifest.json", tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.known_answers is None
    assert len(manifest.fingerprint) == 64


def test_the_fingerprint_depends_on_every_file(folder: Path) -> None:
    manifest = read_manifest(folder)
    seen = {manifest.fingerprint}
    for name in FILES:
        seen.add(replace(manifest, files={**manifest.files, name: FileEntry(1, "0" * 64)}).fingerprint)
    assert len(seen) == len(FILES) + 1
    assert replace(manifest, provenance={}).fingerprint == manifest.fingerprint
    assert replace(manifest, provenance={}).licence == "not stated by the checkpoint"


def test_a_hash_is_that_of_the_whole_file_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setattr(module, "_CHUNK", 7)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(20)))
    told: list[int] = []
    assert sha256_of(path, told.append) == hashlib.sha256(bytes(range(20))).hexdigest()
    assert told == [7, 7, 6]


# --- what is no artifact -----------------------------------------------------------------------------


def test_a_missing_folder_or_manifest_is_not_found(folder: Path) -> None:
    nowhere = folder / "nowhere"
    with pytest.raises(ArtifactNotFoundError, match=f"^{nowhere}: no such folder.*m0kit export"):
        read_manifest(nowhere)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_manifest(folder / "vision.onnx")
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactNotFoundError, match=rf"^{folder}: there is no manifest\.json.*export again"):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_manifest_that_is_not_json_is_damaged(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactDamagedError, match=rf"^{folder / 'manifest.json'}: cannot be read as JSON"):
        read_manifest(folder)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"format": "gguf"}'])
def test_json_of_another_kind_is_not_a_manifest(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=rf'^{folder / "manifest.json"}: not an m0kit manifest \(expected "format"'):
        read_manifest(folder)


def test_a_newer_version_asks_for_a_newer_m0kit_before_anything_else_is_read(folder: Path) -> None:
    edit(folder, lambda raw: raw.update(format_version=2, files=None, model="unknown"))
    with pytest.raises(
        ArtifactVersionError, match=rf"^{folder / 'manifest.json'}: format version 2; .* up to 1\. Update"
    ):
        read_manifest(folder)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version 0": (lambda raw: raw.update(format_version=0), "format_version is 0, expected a whole number from 1"),
    "version text": (lambda raw: raw.update(format_version="1"), "format_version is '1'"),
    "no version": (lambda raw: raw.pop("format_version"), "format_version is None"),
    "no model": (lambda raw: raw.pop("model"), "'model'"),
    "model text": (lambda raw: raw.update(model="m0"), ""),
    "no decoder": (lambda raw: raw["model"].pop("decoder"), "decoder: expected an object"),
    "no field": (lambda raw: raw["model"]["decoder"].pop("num_heads"), "missing fields ['num_heads']"),
    "odd field": (lambda raw: raw["model"]["image"].update(x=1), "image: missing fields [], unknown fields ['x']"),
    "half layer": (lambda raw: raw["model"]["decoder"].update(num_layers=2.5), "decoder.num_layers: expected a whole"),
    "bad mean": (lambda raw: raw["model"]["image"].update(mean=[1, 2]), "image.mean: expected three numbers"),
    "bad heads": (lambda raw: raw["model"]["decoder"].update(num_kv_heads=3), "must be a multiple of num_kv_heads"),
    "no scheme": (lambda raw: raw.pop("scheme"), "'scheme'"),
    "no graphs": (lambda raw: raw.pop("graphs"), "'graphs'"),
    "graphs list": (lambda raw: raw.update(graphs=[]), "graphs"),
    "no provenance": (lambda raw: raw.pop("provenance"), "'provenance'"),
    "provenance list": (lambda raw: raw.update(provenance=[]), "provenance"),
    "recipe list": (lambda raw: raw.update(recipe=[]), "recipe: expected an object, got list"),
    "recipe null": (lambda raw: raw.update(recipe=None), "recipe: expected an object"),
    "no rules": (lambda raw: raw["recipe"].pop("weights"), "'weights'"),
    "rules empty": (lambda raw: raw["recipe"].update(weights=[]), "recipe: has no weights"),
    "rules text": (lambda raw: raw["recipe"].update(weights="int4"), "recipe: has no weights"),
    "rule text": (lambda raw: raw["recipe"].update(weights=["int4"]), ""),
    "rule without scheme": (lambda raw: raw["recipe"]["weights"][1].pop("scheme"), "'scheme'"),
    "odd scheme": (
        lambda raw: raw["recipe"]["weights"][1].update(scheme="int3"),
        "recipe: scheme 'int3' is not known; known are fp32, fp16, bf16, int8, int4, nf4",
    ),
    "scheme list": (lambda raw: raw["recipe"]["weights"][1].update(scheme=["int4"]), "is not known"),
    "no files": (lambda raw: raw.pop("files"), "'files'"),
    "files list": (lambda raw: raw.update(files=["vision.onnx"]), ""),
    "no size": (lambda raw: raw["files"]["head.onnx"].pop("size"), "'size'"),
    "size text": (lambda raw: raw["files"]["head.onnx"].update(size="big"), ""),
    "no graph": (lambda raw: raw["files"].pop("head.onnx"), "does not list head.onnx"),
    "no tokenizer": (lambda raw: raw["files"].pop("tokenizer.json"), "does not list tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_field_missing_or_wrong_is_damaged(folder: Path, damage: str) -> None:
    change, said = DAMAGES[damage]
    edit(folder, change)
    with pytest.raises(ArtifactDamagedError) as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(f"{folder / 'manifest.json'}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "..", ".", "", "sub/file", "a\\b", "C:file", "manifest.json", "/"]
)
def test_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    edit(folder, lambda raw: raw["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(ArtifactDamagedError) as caught:
        read_manifest(folder)
    assert str(caught.value) == (f"{folder / 'manifest.json'}: {name!r} is not a plain file name inside the artifact.")


# --- files that changed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactDamagedError, match=f"^{folder / name}: is missing.*Copy.*or export again"):
        verify_files(folder, read_manifest(folder))


def test_a_folder_in_place_of_a_file_is_missing(folder: Path) -> None:
    (folder / "vision.onnx").unlink()
    (folder / "vision.onnx").mkdir()
    with pytest.raises(ArtifactDamagedError, match=r"vision\.onnx: is missing"):
        verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("target", ["the same content", "nowhere"])
def test_a_link_out_of_the_artifact_is_refused(folder: Path, tmp_path: Path, target: str) -> None:
    aside = tmp_path / target
    if target != "nowhere":
        shutil.copyfile(folder / "vision.onnx", aside)
    (folder / "vision.onnx").unlink()
    (folder / "vision.onnx").symlink_to(aside)
    with pytest.raises(ArtifactDamagedError, match=f"^{folder / 'vision.onnx'}: is a link to {aside}, outside of the"):
        verify_files(folder, read_manifest(folder))


def test_a_link_within_the_artifact_counts_as_what_it_leads_to(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "vision.onnx").rename(folder / "aside")
    (folder / "vision.onnx").symlink_to("aside")
    verify_files(folder, manifest)
    (folder / "aside").write_bytes(b"x")
    with pytest.raises(ArtifactDamagedError, match=r"vision\.onnx: its content has changed"):
        verify_files(folder, manifest)
    (folder / "aside").unlink()
    with pytest.raises(ArtifactDamagedError, match=r"vision\.onnx: is missing"):
        verify_files(folder, manifest)


def test_the_links_of_a_hub_cache_lead_to_its_own_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot, other = cached(folder, tmp_path / "home"), cached(folder, tmp_path / "home", "org/other")
    manifest = read_manifest(snapshot)
    verify_files(snapshot, manifest)
    (tmp_path / "here").symlink_to(snapshot)
    verify_files(tmp_path / "here", manifest)
    shutil.copytree(snapshot.parent.parent, tmp_path / "moved", symlinks=True)  # no cache any more, by its name
    for target in (other / "vision.onnx", snapshot.parent.parent / "refs" / "main", Path("/etc/hostname")):
        (snapshot / "vision.onnx").unlink()
        (snapshot / "vision.onnx").symlink_to(target)
        with pytest.raises(ArtifactDamagedError, match=r"vision\.onnx: is a link to .*, outside of the artifact"):
            verify_files(snapshot, manifest)
    with pytest.raises(ArtifactDamagedError, match="outside of the artifact"):
        verify_files(tmp_path / "moved" / "snapshots" / snapshot.name, manifest)


def test_another_size_is_named_with_both(folder: Path) -> None:
    (folder / "head.onnx").write_bytes(b"hh")
    with pytest.raises(ArtifactDamagedError, match=f"^{folder / 'head.onnx'}: 2 bytes, the manifest says 1"):
        verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_a_changed_byte_is_seen_even_with_size_and_time_restored(folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    before = (folder / name).stat()
    with open(folder / name, "r+b") as file:
        file.write(b"X")
    os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / name).stat().st_mtime_ns == before.st_mtime_ns
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(ArtifactDamagedError, match=rf"^{folder / name}: its content has changed .*sha256"):
            verify_files(folder, manifest)


def test_another_file_of_the_same_content_in_its_place_is_hashed(folder: Path, hashed: list[str]) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    shutil.copy2(folder / "head.onnx", folder / "copy")
    os.replace(folder / "copy", folder / "head.onnx")
    hashed.clear()
    verify_files(folder, manifest)
    assert hashed == ["head.onnx"]


def test_files_are_hashed_once_per_change(folder: Path, hashed: list[str]) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert sorted(hashed) == sorted(FILES)
    hashed.clear()
    verify_files(folder, manifest)
    assert hashed == []
    os.utime(folder / "decoder.onnx")
    verify_files(folder, manifest)
    assert hashed == ["decoder.onnx"]
    hashed.clear()
    verify_files(folder, manifest)
    assert hashed == []


def test_a_manifest_with_another_hash_is_not_served_from_memory(folder: Path, hashed: list[str]) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    changed = replace(manifest, files={**manifest.files, "head.onnx": FileEntry(1, "0" * 64)})
    with pytest.raises(ArtifactDamagedError, match=r"head\.onnx: its content has changed"):
        verify_files(folder, changed)


def test_what_is_remembered_of_one_artifact_survives_another(folder: Path, hashed: list[str]) -> None:
    second = folder.with_name("second")
    shutil.copytree(folder, second)
    for place in (folder, second):
        verify_files(place, read_manifest(place))
    hashed.clear()
    for place in (folder, second):
        verify_files(place, read_manifest(place))
    assert hashed == []
    memory = Path(os.environ["XDG_CACHE_HOME"]) / "m0kit" / "verified.json"
    shutil.rmtree(folder)
    (second / "head.onnx").touch()
    verify_files(second, read_manifest(second))
    assert {Path(path).parent for path in json.loads(memory.read_text())["files"]} == {second.resolve()}
    assert [p.name for p in memory.parent.iterdir()] == ["verified.json"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a": 3}'])
def test_a_spoiled_memory_is_no_error(folder: Path, hashed: list[str], content: bytes) -> None:
    memory = Path(os.environ["XDG_CACHE_HOME"]) / "m0kit" / "verified.json"
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    verify_files(folder, read_manifest(folder))
    assert len(hashed) == len(FILES)


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "head.onnx"))  # a file: nothing can be made in it
    for _ in range(2):
        verify_files(folder, read_manifest(folder))
    assert len(hashed) == 2 * len(FILES)


def test_without_the_variable_the_memory_is_in_the_home_folder(
    folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    verify_files(folder, read_manifest(folder))
    assert (tmp_path / "home" / ".cache" / "m0kit" / "verified.json").is_file()


@pytest.mark.parametrize("name", ["manifest.json", "vision.onnx"])
def test_no_permission_is_said(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who may read everything; so the refusal is played."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "secret words", name)

    if name == "manifest.json":
        monkeypatch.setattr(Path, "read_text", denied)
    else:
        monkeypatch.setattr(module, "sha256_of", denied)
    with pytest.raises(M0kitError, match=rf"^{folder}/.*: cannot be read: Permission denied") as caught:
        verify_files(folder, read_manifest(folder))
    assert isinstance(caught.value, ArtifactError)
