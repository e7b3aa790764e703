"""An artifact is read as it was written, and each kind of damage is named with its path."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.hub import cached
from tests.protobuf import external, graph_of
from tests.sealed import edit_manifest, put_file

from m0kit.artifact import manifest as module
from m0kit.artifact.manifest import (
    MANIFEST_BYTES,
    FileEntry,
    KnownAnswer,
    KnownAnswers,
    Manifest,
    read_manifest,
    verify_files,
    write_manifest,
)
from m0kit.artifact.ports import GRAPHS, KV, expected_ports
from m0kit.errors import (
    ArtifactDamagedError,
    ArtifactError,
    ArtifactNotFoundError,
    ArtifactVersionError,
    M0kitError,
)
from m0kit.files import read_regular, sha256_of
from m0kit_parity.samples.checkpoints import model_config

EMPTY = b"\x3a\x00"  # a graph of nothing
FILES = {
    "tokenizer.json": b"{}",
    "vision.onnx": EMPTY,
    "decoder.onnx": EMPTY + b"\x08\x0a",
    "decoder.kv-fp16.onnx": EMPTY + b"\x08\x0b",
    "decoder.kv-int8.onnx": EMPTY + b"\x08\x0c",
    "head.onnx": EMPTY + b"\x08\x0d",
    "vision.cpu.onnx": EMPTY + b"\x08\x0e",
    "head.onnx.data": b"",
}
RUNS = {"cpu": {"vision": "vision.cpu"}}
NAMES = (*GRAPHS, "decoder.kv-fp16", "decoder.kv-int8", "vision.cpu")
PORTS = {name: expected_ports(model_config("tiny"), name) for name in NAMES}

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
    manifest = Manifest(model_config("tiny"), "int4", PORTS, RUNS, files, provenance, RECIPE)
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

    def reading(path: Path, max_bytes: int) -> bytes:
        if path.suffix == ".onnx":  # hashed as it is read
            names.append(path.name)
        return read_regular(path, max_bytes)

    monkeypatch.setattr(module, "sha256_of", counting)
    monkeypatch.setattr(module, "read_regular", reading)
    return names


def test_what_was_written_is_read(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.model == model_config("tiny")
    assert manifest.scheme == "int4"
    assert manifest.schemes == ("fp32", "int4")
    assert manifest.recipe == RECIPE
    assert manifest.graphs == PORTS
    assert manifest.runs == RUNS
    assert manifest.files["decoder.onnx"].size == 4
    assert manifest.provenance["base"] == "jinaai/jina-reranker-m0 é"
    assert manifest.licence == "cc-by-nc-4.0"
    assert manifest.num_bytes == 24
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    verify_files(folder, manifest)


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
        replace(manifest, model=replace(model, prompt=replace(model.prompt, max_length=9000))),
        replace(manifest, model=replace(model, image=replace(model.image, max_pixels=400_000))),
        replace(manifest, model=replace(model, image=replace(model.image, mean=(0.5, 0.5, 0.5)))),
        replace(manifest, model=replace(model, decoder=replace(model.decoder, rope_theta=1e4))),
        replace(manifest, graphs={**PORTS, "vision": PORTS["head"]}),
        replace(manifest, recipe={**RECIPE, "equalize": False}),
        replace(manifest, scheme="int8"),
    ]
    seen = {manifest.fingerprint, *(one.fingerprint for one in changed)}
    assert len(seen) == len(changed) + 1
    write_manifest(folder, manifest)
    assert read_manifest(folder).fingerprint == manifest.fingerprint


def test_the_fingerprint_is_that_of_every_export_of_the_same_weights(folder: Path) -> None:
    """By whatever tools, from wherever, and with known answers that another CPU rounded otherwise."""
    manifest = read_manifest(folder)
    known = KnownAnswers((KnownAnswer("q", "d", 1.0),), dict.fromkeys(KV, 0.1), "")
    for other in (replace(manifest, provenance={"tools": {"m0kit": "9"}}), replace(manifest, known_answers=known)):
        assert other != manifest
        assert other.fingerprint == manifest.fingerprint


def test_the_fingerprint_depends_on_what_the_fields_mean(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(folder)
    before = manifest.fingerprint
    monkeypatch.setattr(module, "FORMAT_VERSION", 4)
    assert manifest.fingerprint != before


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


def test_a_manifest_without_its_hash_is_refused_with_known_answers_or_without(folder: Path) -> None:
    known = KnownAnswers((KnownAnswer("q", "d", 1.5),), dict.fromkeys(KV, 0.1), "why")
    for manifest in (read_manifest(folder), replace(read_manifest(folder), known_answers=known)):
        write_manifest(folder, manifest)
        assert read_manifest(folder).known_answers == manifest.known_answers
        raw = json.loads((folder / "manifest.json").read_text("utf-8"))
        del raw["sha256"]
        (folder / "manifest.json").write_text(json.dumps(raw), "utf-8")
        with pytest.raises(ArtifactDamagedError, match=r"has no sha256 of its own, so it was changed\. Copy"):
            read_manifest(folder)


def test_the_fingerprint_depends_on_every_file(folder: Path) -> None:
    manifest = read_manifest(folder)
    seen = {manifest.fingerprint}
    for name in FILES:
        seen.add(replace(manifest, files={**manifest.files, name: FileEntry(1, "0" * 64)}).fingerprint)
    assert len(seen) == len(FILES) + 1
    assert replace(manifest, provenance={}).licence == "not stated by the checkpoint"


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


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a":1,"a":2}', b"NaN", b'{"a":Infinity}', b"9" * 400, b"1e999"],
)
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
    edit_manifest(folder, lambda raw: raw.update(format_version=4, files=None, model="unknown"))
    with pytest.raises(
        ArtifactVersionError, match=rf"^{folder / 'manifest.json'}: format version 4; this m0kit reads 3\. Update m0kit"
    ):
        read_manifest(folder)


def test_an_older_version_asks_for_another_export(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": "m0kit-artifact", "format_version": 2}')  # it had no hash
    with pytest.raises(
        ArtifactVersionError, match=rf"^{folder / 'manifest.json'}: format version 2; this m0kit reads 3\. Export the"
    ):
        read_manifest(folder)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version 0": (lambda raw: raw.update(format_version=0), "format_version is 0, expected a whole number from 1"),
    "version text": (lambda raw: raw.update(format_version="1"), "format_version is '1'"),
    "version true": (lambda raw: raw.update(format_version=True), "format_version is True"),
    "no version": (lambda raw: raw.pop("format_version"), "format_version is None"),
    "odd part": (lambda raw: raw.update(licence="mine"), "the unknown field `licence`"),
    "no known answers": (lambda raw: raw.pop("known_answers"), "missing required field `known_answers`"),
    "no recipe": (lambda raw: raw.pop("recipe"), "missing required field `recipe`"),
    "no model": (lambda raw: raw.pop("model"), "missing required field `model`"),
    "model text": (lambda raw: raw.update(model="m0"), "got `str` - at `$.model`"),
    "no decoder": (lambda raw: raw["model"].pop("decoder"), "missing required field `decoder` - at `$.model`"),
    "no field": (lambda raw: raw["model"]["decoder"].pop("num_heads"), "field `num_heads` - at `$.model.decoder`"),
    "no field with a default": (lambda raw: raw["model"]["prompt"].pop("logit_bias"), "required field `logit_bias`"),
    "odd field": (lambda raw: raw["model"]["image"].update(x=1), "the unknown field `x` - at `$.model.image`"),
    "half layer": (lambda raw: raw["model"]["decoder"].update(num_layers=2.5), "got `float` - at `$.model.decoder"),
    "a layer's truth": (lambda raw: raw["model"]["decoder"].update(num_layers=True), "got `bool`"),
    "bad mean": (lambda raw: raw["model"]["image"].update(mean=[1, 2]), "at `$.model.image.mean`"),
    "no spread": (lambda raw: raw["model"]["image"].update(std=[1, 0, 1]), "std must be positive"),
    "bad heads": (lambda raw: raw["model"]["decoder"].update(num_kv_heads=3), "must be a multiple of num_kv_heads"),
    "no such token": (lambda raw: raw["model"]["prompt"].update(score_token_id=384), "the vocabulary ends at 383"),
    "a token before all": (lambda raw: raw["model"]["prompt"].update(image_pad_id=-1), "image_pad_id is -1"),
    "no scheme": (lambda raw: raw.pop("scheme"), "missing required field `scheme`"),
    "no graphs": (lambda raw: raw.pop("graphs"), "missing required field `graphs`"),
    "graphs list": (lambda raw: raw.update(graphs=[]), "at `$.graphs`"),
    "a graph missing": (lambda raw: raw["graphs"].pop("decoder.kv-int8"), "graphs: decoder.kv-int8 is missing"),
    "a graph too many": (lambda raw: raw["graphs"].update(x=raw["graphs"]["head"]), "graphs: 'x' is not known"),
    "no runs": (lambda raw: raw.pop("runs"), "missing required field `runs`"),
    "runs list": (lambda raw: raw.update(runs=["cpu"]), "at `$.runs`"),
    "a set list": (lambda raw: raw["runs"].update(cpu=["vision.cpu"]), "at `$.runs[...]`"),
    "a set that is not known": (lambda raw: raw["runs"].update(npu={}), "runs: 'npu' is not known; known are cpu"),
    "a set without its graph": (lambda raw: raw["runs"].update(cpu={}), "runs: cpu is {}, and it can only be {'vi"),
    "a set of another graph": (lambda raw: raw["runs"]["cpu"].update(vision="head"), "runs: cpu is {'vision': 'head'}"),
    "a graph of no set": (lambda raw: raw.update(runs={}), "graphs: 'vision.cpu' is not known"),
    "a port text": (lambda raw: raw["graphs"]["head"]["inputs"].append("hidden"), "at `$.graphs[...].inputs[1]`"),
    "a port's letter": (
        lambda raw: raw["graphs"]["head"]["inputs"][0].update(shape=["B", "D"]),
        "head has other inputs than this model: hidden float32 [B, D] in place of hidden float32 [B, 64]",
    ),
    "a port's kind": (lambda raw: raw["graphs"]["decoder"]["inputs"][0].update(dtype="int32"), "in place of token_ids"),
    "a port missing": (lambda raw: raw["graphs"]["vision"]["outputs"].clear(), "image_embeds float32 [V, 64] is miss"),
    "a port too many": (lambda raw: raw["graphs"]["head"]["outputs"].extend([{"name": "x", "dtype": "y", "shape": []}]),
                        "x y [] is one too many"),
    "ports of others": (lambda raw: raw["graphs"].update(head=raw["graphs"]["vision"]), "head has other inputs"),
    "no provenance": (lambda raw: raw.pop("provenance"), "missing required field `provenance`"),
    "provenance list": (lambda raw: raw.update(provenance=[]), "at `$.provenance`"),
    "adapters text": (lambda raw: raw["provenance"].update(adapters="mine"), "provenance: Expected `array`"),
    "an adapter's name": (lambda raw: raw["provenance"].update(adapters=[{"name": 3}]), "`$.adapters[0].name`"),
    "a hash of an adapter": (lambda raw: raw["provenance"].update(adapters=[{"sha256": ["a"]}]), "`$.adapters[0].sha"),
    "hashes of the base": (lambda raw: raw["provenance"].update(base_files={"a": 1}), "`$.base_files[...]`"),
    "depth": (lambda raw: raw["provenance"].update(x=json.loads("[" * 120 + "]" * 120)), "it is nested too deeply"),
    "licence number": (lambda raw: raw["provenance"].update(licence=3), "provenance: Expected `str | null`"),
    "recipe list": (lambda raw: raw.update(recipe=[]), "at `$.recipe`"),
    "recipe null": (lambda raw: raw.update(recipe=None), "at `$.recipe`"),
    "no rules": (lambda raw: raw["recipe"].pop("weights"), "`weights`"),
    "rules empty": (lambda raw: raw["recipe"].update(weights=[]), "at `$.weights`"),
    "rules text": (lambda raw: raw["recipe"].update(weights="int4"), "at `$.weights`"),
    "rule text": (lambda raw: raw["recipe"].update(weights=["int4"]), "at `$.weights[0]`"),
    "rule without scheme": (lambda raw: raw["recipe"]["weights"][1].pop("scheme"), "`scheme`"),
    "odd rule": (lambda raw: raw["recipe"]["weights"][1].update(bits=3), "unknown field `bits` - at `$.weights[1]`"),
    "odd scheme": (
        lambda raw: raw["recipe"]["weights"][1].update(scheme="int3"),
        "recipe: scheme 'int3' is not known; known are fp32, fp16, bf16, int8, int4, nf4",
    ),
    "scheme list": (lambda raw: raw["recipe"]["weights"][1].update(scheme=["int4"]), "`$.weights[1].scheme`"),
    "no files": (lambda raw: raw.pop("files"), "missing required field `files`"),
    "files list": (lambda raw: raw.update(files=["vision.onnx"]), "at `$.files`"),
    "no size": (lambda raw: raw["files"]["head.onnx"].pop("size"), "`size` - at `$.files[...]`"),
    "size text": (lambda raw: raw["files"]["head.onnx"].update(size="big"), "at `$.files[...].size`"),
    "size below 0": (lambda raw: raw["files"]["head.onnx"].update(size=-1), "at `$.files[...].size`"),
    "half a hash": (lambda raw: raw["files"]["head.onnx"].update(sha256="ab"), "at `$.files[...].sha256`"),
    "no graph": (lambda raw: raw["files"].pop("head.onnx"), "does not list head.onnx"),
    "no tokenizer": (lambda raw: raw["files"].pop("tokenizer.json"), "does not list tokenizer.json"),
    "large graph": (lambda raw: raw["files"]["vision.onnx"].update(size=1 << 40), "vision.onnx has 1099511627776"),
    "large tokenizer": (lambda raw: raw["files"]["tokenizer.json"].update(size=1 << 30), "tokenizer.json has 10737418"),
    "many files": (
        lambda raw: raw["files"].update({f"f{i}": raw["files"]["head.onnx"] for i in range(1000)}),
        "files: lists 1008",
    ),
    "two spellings": (lambda raw: raw["files"].update({"HEAD.onnx": raw["files"]["head.onnx"]}), "in two spellings"),
    **{
        f"{section}.{name}": (
            lambda raw, section=section, name=name, value=value: raw["model"][section].update({name: value}),
            said,
        )
        for section, name, value, said in [
            ("decoder", "num_layers", 10**9, "num_layers must be at most 1024"),
            ("decoder", "num_layers", 1000, "num_layers is 1000, and the graph decoder has the inputs of 3 layers"),
            ("decoder", "hidden_size", 10**9, "hidden_size must be at most"),
            ("decoder", "hidden_size", 65, "vision has other outputs than this model"),
            ("decoder", "head_dim", 0, "head_dim must be positive"),
            ("decoder", "vocab_size", 10**12, "vocab_size must be at most"),
            ("decoder", "max_positions", 10**15, "max_positions must be at most"),
            ("vision", "depth", 10**9, "depth must be at most 1024"),
            ("vision", "patch_size", 10**6, "patch_size"),
            ("image", "max_pixels", 10**15, "max_pixels must be at most"),
            ("image", "min_pixels", 10**8, "min_pixels must be at most"),
            ("prompt", "max_length", 10**12, "max_length must be at most"),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_field_missing_or_wrong_is_damaged(folder: Path, damage: str) -> None:
    change, said = DAMAGES[damage]
    edit_manifest(folder, change)
    with pytest.raises(ArtifactDamagedError) as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(f"{folder / 'manifest.json'}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../secret", "..", ".", "", "sub/file", "a\\b", "C:file", "manifest.json", "/", "a\0", "a\n"),
        *(
            "con",
            "NUL.txt",
            "com1.data",
            ".hidden",
            "a..b",
            "a.",
            "a ",
            "ä",
            "*",
            "-rf",
            "file:stream",
            "\x1b[2J",
        ),
    ],
)
def test_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    edit_manifest(folder, lambda raw: raw["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(ArtifactDamagedError) as caught:
        read_manifest(folder)
    assert str(caught.value) == (
        f"{folder / 'manifest.json'}: files: {name!r} is not a plain file name inside the artifact. Export again."
    )


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
    (folder / "aside").write_bytes(b"xx")
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
    with pytest.raises(ArtifactDamagedError, match=f"^{folder / 'head.onnx'}: 2 bytes, the manifest says 4"):
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
    changed = replace(manifest, files={**manifest.files, "head.onnx": FileEntry(4, "0" * 64)})
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
        raise PermissionError(13, "Permission denied", name)

    if name == "manifest.json":
        monkeypatch.setattr(module, "read_regular", denied)
    else:
        monkeypatch.setattr(module, "sha256_of", denied)
    with pytest.raises(M0kitError, match=rf"^{folder}/.*: cannot be read: Permission denied") as caught:
        verify_files(folder, read_manifest(folder))
    assert isinstance(caught.value, ArtifactError)


# --- what is no file, has no end, or is known to nobody ----------------------------------------------


def test_a_manifest_of_gigabytes_is_not_read(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 15 << 30)  # it takes no room on the disk
    said = rf"manifest\.json: cannot be read: has more than the {MANIFEST_BYTES} bytes"
    with pytest.raises(ArtifactError, match=said):
        read_manifest(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no fifos in folders")
@pytest.mark.parametrize("name", ["manifest.json", "vision.onnx", "tokenizer.json", "head.onnx.data"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_file_is_never_opened(folder: Path, name: str, kind: str) -> None:
    manifest = read_manifest(folder)
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "fifo":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match=rf"^{folder / name}: "):
        verify_files(folder, manifest if name != "manifest.json" else read_manifest(folder))


def test_a_file_that_is_not_listed_is_not_looked_at(folder: Path) -> None:
    (folder / "large").symlink_to("/dev/zero")
    (folder / "vision.onnx.data").write_bytes(b"x")
    verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize(
    ("location", "said"),
    [
        *(
            (name, "reads the file")
            for name in ("../secret", "/etc/passwd", "vision.onnx.data", "./head.onnx.data", "")
        ),
        ("*/_ORT_MEM_ADDR_/*", "reads the file"),  # which is an address in memory
        ("head.onnx.data", "ends at byte 16 of head.onnx.data, which has 0"),
    ],
)
def test_a_graph_may_read_its_own_data_file_alone_and_not_beyond(folder: Path, location: str, said: str) -> None:
    put_file(folder, "head.onnx", graph_of(external("w", location)))
    with pytest.raises(ArtifactDamagedError, match=rf"^{folder / 'head.onnx'}: ") as caught:
        verify_files(folder, read_manifest(folder))
    assert said in str(caught.value)


def test_a_graph_whose_data_file_is_not_listed_is_refused(folder: Path) -> None:
    (folder / "vision.onnx.data").write_bytes(bytes(16))
    put_file(folder, "vision.onnx", graph_of(external("w", "vision.onnx.data")))
    with pytest.raises(ArtifactDamagedError, match=r"vision\.onnx\.data, which the manifest does not list"):
        verify_files(folder, read_manifest(folder))
    put_file(folder, "vision.onnx.data", bytes(16))
    verify_files(folder, read_manifest(folder))


def test_a_graph_is_looked_at_again_where_its_data_is_listed_shorter(folder: Path) -> None:
    put_file(folder, "head.onnx.data", bytes(16))
    put_file(folder, "head.onnx", graph_of(external("w", "head.onnx.data")))
    verify_files(folder, read_manifest(folder))
    put_file(folder, "head.onnx.data", bytes(15))
    with pytest.raises(ArtifactDamagedError, match=r"head\.onnx: the tensor 'w' ends at byte 16"):
        verify_files(folder, read_manifest(folder))


# --- known answers -----------------------------------------------------------------------------------

KNOWN: dict[str, Any] = {
    "pairs": [{"query": "q", "document": "d", "logit": 1.5}],
    "tolerance": {"fp32": 0.1, "fp16": 0.2, "int8": 0.3},
    "why": "because",
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pairs": []}, "known_answers"),
        ({"pairs": KNOWN["pairs"] * 101}, "known_answers"),
        ({"pairs": [{"query": "q", "document": {"image": "/etc/passwd"}, "logit": 1.5}]}, "a data URI"),
        ({"pairs": [{"query": "q", "document": {"id": "x"}, "logit": 1.5}]}, "a data URI"),
        ({"pairs": [{"query": "q", "document": {}, "logit": 1.5}]}, "a data URI"),
        ({"pairs": [{"query": "q" * 100_001, "document": "d", "logit": 1.5}]}, "more than 100000 characters"),
        ({"pairs": [{"query": "q", "document": None, "logit": 1.5}]}, "known_answers.pairs[0].document"),
        ({"pairs": [{"query": "q", "document": "d", "logit": "1"}]}, "known_answers.pairs[0].logit"),
        ({"pairs": [{"query": "q", "document": "d", "logit": 1, "x": 1}]}, "unknown field `x`"),
        ({"tolerance": {"fp32": 0.1, "fp16": 0.2}}, "tolerance must have fp32, fp16, int8"),
        ({"tolerance": {**KNOWN["tolerance"], "fp64": 1.0}}, "tolerance must have fp32, fp16, int8"),
        ({"tolerance": {**KNOWN["tolerance"], "int8": 0}}, "a number above 0 and at most 150"),
        ({"tolerance": {**KNOWN["tolerance"], "int8": -1.0}}, "a number above 0 and at most 150"),
        ({"tolerance": {**KNOWN["tolerance"], "int8": 1e300}}, "a number above 0 and at most 150"),
        ({"why": None}, "known_answers.why"),
    ],
)
def test_known_answers_that_could_not_be_asked_are_refused(folder: Path, changed: dict[str, Any], said: str) -> None:
    edit_manifest(folder, lambda raw: raw.update(known_answers=KNOWN))
    read_manifest(folder)
    edit_manifest(folder, lambda raw: raw.update(known_answers={**KNOWN, **changed}))
    with pytest.raises(ArtifactDamagedError) as caught:
        read_manifest(folder)
    assert said in str(caught.value)
