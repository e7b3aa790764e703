"""Bad input of every kind, through the door users come in by: the message names the input and says what to do,
carries nothing of a library's own words, and the rest of the batch is scored.

What a single file refuses in detail is tested beside that file; here each kind stands once, end to end.
"""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.sealed import edit_manifest

from m0kit import M0kitError, Reranker
from m0kit.artifact.manifest import MANIFEST, FileEntry, read_manifest, write_manifest
from m0kit.errors import (
    ArtifactDamagedError,
    ArtifactError,
    ArtifactNotFoundError,
    ArtifactVersionError,
    DeviceError,
    ImageError,
    InputError,
)
from m0kit.files import sha256_of
from m0kit.scoring import sessions

Make = Callable[..., Image.Image]
GOOD = ("a query", "a document")


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def whole_png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


# The pair, the class of its error, and what its message must say: which input, what it was, what to do.
PAIRS: dict[str, tuple[Any, type[InputError], list[str]]] = {
    "empty query": (("", "d"), InputError, ["query: is empty", "Give some text, or leave the pair out"]),
    "empty document": (("q", {"text": ""}), InputError, ["document: is empty", "Give some text"]),
    "half a character": (("q", "\udc80"), InputError, ["document", "surrogate", "Decode the text again"]),
    "not an image": (("q", b"hello"), ImageError, ["document", "5 bytes", "Accepted: PNG, JPEG"]),
    "empty file": (("q", b""), ImageError, ["document", "0 bytes", "Accepted"]),
    "truncated image": (("q", whole_png()[:4000]), ImageError, ["document", "PNG file (60×60)", "Save it again"]),
    "corrupt image": (
        (whole_png()[:3000] + bytes(100) + whole_png()[3100:], "d"), ImageError,
        ["query", "PNG file (60×60)", "Save it again"]),
    "decompression bomb": (("q", png(60_000, 60_000)), ImageError, ["document", "89478485 pixels", "Shrink it"]),
    "smaller bomb": (("q", png(10_000, 10_000)), ImageError, ["document", "89478485 pixels", "Shrink it"]),
    "absurd ratio": (("q", Image.new("RGB", (1000, 4))), ImageError, ["document", "1000×4", "200 times", "Cut it"]),
    "no such file": ((Path("nowhere.png"), "d"), ImageError, ["query", "nowhere.png", "No such file"]),
    "a folder": (("q", Path("/")), ImageError, ["document: /", "is a folder"]),
    "a path in a string": (("q", {"image": "a.png"}), ImageError, ["document", "data URI", "Pass a file as Path(…)"]),
    "spoiled base64": (("q", {"image": "data:image/png;base64,?"}), ImageError, ["document", "not valid base64"]),
    "unknown key": (("q", {"img": b""}), InputError, ["document", "unknown key 'img'", "Known are 'text', 'image'"]),
    "unknown key of a pair": (
        {"query": "q", "passage": "d"}, InputError, ["'passage'", "Known are 'query', 'document'"]),
    "text and image": (("q", {"text": "t", "image": b""}), InputError, ["document", '{"image": …} or {"id": …}']),
    "one item": (("q",), InputError, ["expected (query, document), got 1 items"]),
    "three items": (("q", "d", 1), InputError, ["expected (query, document), got 3 items"]),
    "a bare string": ("q", InputError, ["expected (query, document), got str", "pass a list that holds it"]),
    "a number": (("q", 5), InputError, ["document: expected text (str), an image", "got int"]),
    "nothing": (None, InputError, ["expected (query, document), got NoneType"]),
}  # fmt: skip
LIBRARIES = (
    "Pillow",
    "PIL.",
    "cannot identify",
    "truncated",
    "Errno",
    "Traceback",
    "onnxruntime",
    "<_io",
    "0x",
    "chunk",
)


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", PAIRS)
def test_a_bad_pair_is_named_and_the_others_are_scored(reranker: Reranker, case: str) -> None:
    pair, kind, words = PAIRS[case]
    (alone,) = reranker.score([GOOD])
    results = reranker.evaluate([GOOD, pair, GOOD])
    error = results[1].error
    assert type(error) is kind
    assert str(error).startswith("pair 1: ")
    for word in words:
        assert word in str(error)
    for word in LIBRARIES:
        assert word not in str(error)
    assert [result.error for result in results[::2]] == [None, None]
    assert [result.score for result in results[::2]] == pytest.approx([alone, alone], abs=1e-5)
    with pytest.raises(kind, match=r"^pair 1: "):
        reranker.evaluate([GOOD, pair], on_error="raise")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_all_bad_pairs_together_cost_a_good_one_nothing(reranker: Reranker) -> None:
    with pytest.warns(UserWarning, match=r"^not scored: ") as caught:
        scores = reranker.score([*(pair for pair, _, _ in PAIRS.values()), GOOD], on_error="mark")
    ours = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and w.filename == __file__]
    assert len(ours) == len(PAIRS)
    assert all(message.startswith(f"not scored: pair {i}: ") for i, message in enumerate(ours))
    assert np.isnan(scores[:-1]).all()
    assert scores[-1] == pytest.approx(reranker.score([GOOD])[0], abs=1e-5)


def test_a_call_of_bad_pairs_alone_runs_nothing(unasked: Path) -> None:
    class NeverRun:
        def run(self, *_: Any) -> Any:
            raise AssertionError("run")

    reranker = Reranker.load(unasked, open_graph=lambda *_: NeverRun())
    results = reranker.evaluate([pair for pair, _, _ in PAIRS.values()])
    assert all(result.error for result in results)


def test_a_document_over_the_limit_is_cut_as_the_reference_does_and_said(reranker: Reranker) -> None:
    with pytest.warns(UserWarning, match=r"^pair 1: the document was too long and was cut$"):
        scores = reranker.score([GOOD, ("q", "z" * 9800)])
    assert np.isfinite(scores).all()
    assert len(reranker.trace(("q", "z" * 9800)).token_ids) <= reranker.config.prompt.max_length


def test_text_that_spells_special_tokens_is_text(reranker: Reranker) -> None:
    """With the published tokenizer these are images without pixels, and a crash."""
    texts = ["<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|endoftext|>", "<|im_end|>" * 5]
    results = reranker.evaluate([(text, text) for text in texts])
    assert all(result.error is None and 0 < result.score < 1 for result in results)
    assert all(len(reranker.trace((text, text)).patches) == 0 for text in texts)


@pytest.mark.parametrize("kind", [InputError, ArtifactError, DeviceError, M0kitError])
def test_no_message_holds_a_long_value(kind: type[M0kitError]) -> None:
    error = kind(f"pages/1.png: {'A' * 700_000} is not known. Say cpu.")
    assert str(error) == f"pages/1.png: {'A' * 60}… (700000 characters) …{'A' * 20} is not known. Say cpu."
    path = "/very/long/" * 30
    assert str(kind(path)) == path


def test_a_single_pair_where_a_list_belongs_is_explained(reranker: Reranker) -> None:
    with pytest.raises(InputError, match=r"^pair 0: .*To score one pair, pass a list that holds it"):
        reranker.score(["q", "d"])


SINGLE = ["one string", b"bytes", bytearray(b"b"), {"text": "a"}, {"query": "q", "document": "d"}, Path("a.png"),
          Image.new("RGB", (60, 60)), 5, None]  # fmt: skip


@pytest.mark.parametrize("argument", SINGLE, ids=lambda value: type(value).__name__)
def test_one_thing_where_a_list_is_meant_is_never_taken_apart(reranker: Reranker, argument: Any) -> None:
    said = rf"expected a list of .*, got {type(argument).__name__}\. To pass one (pair|document), pass a list"
    for call in (reranker.score, reranker.evaluate, lambda pairs: list(reranker.stream(pairs))):
        with pytest.raises(InputError, match=f"^pairs: {said}"):
            call(argument)
    for rank in (reranker.rank, reranker.rerank):
        with pytest.raises(InputError, match=f"^documents: {said}"):
            rank("q", argument)
    if not isinstance(argument, Mapping) or "query" not in argument:  # one pair is one pair to these two
        for face in (reranker.predict, reranker.compute_score):
            with pytest.raises(InputError, match=r"^pair 0: "):
                face(argument)


# --- the artifact ------------------------------------------------------------------------------------


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "m0-fp32"
    shutil.copytree(artifact, folder)
    return folder


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    stat = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _edit(path: Path, **values: object) -> None:
    edit_manifest(path.parent, lambda raw: raw.update(values))


ARTIFACTS: dict[str, tuple[Callable[[Path], object], type[ArtifactError], list[str]]] = {
    "changed weights": (
        lambda a: _flip(a / "decoder.onnx.data"), ArtifactDamagedError, ["decoder.onnx.data: its content has changed"]),
    "changed graph": (
        lambda a: _flip(a / "vision.onnx"), ArtifactDamagedError, ["vision.onnx: its content has changed"]),
    "changed tokenizer": (
        lambda a: _flip(a / "tokenizer.json"), ArtifactDamagedError, ["tokenizer.json: its content has changed"]),
    "missing weights": (
        lambda a: (a / "head.onnx.data").unlink(), ArtifactDamagedError,
        ["head.onnx.data: is missing", "export again"]),
    "cut weights": (
        lambda a: os.truncate(a / "decoder.onnx.data", 100), ArtifactDamagedError,
        ["decoder.onnx.data: 100 bytes, the manifest says", "Copy or export again"]),
    "no manifest": (
        lambda a: (a / MANIFEST).unlink(), ArtifactNotFoundError, ["there is no manifest.json", "export again"]),
    "cut manifest": (
        lambda a: os.truncate(a / MANIFEST, 100), ArtifactDamagedError, ["manifest.json: cannot be read as JSON"]),
    "newer version": (
        lambda a: _edit(a / MANIFEST, format_version=99), ArtifactVersionError, ["format version 99", "Update m0kit"]),
    "a link": (
        lambda a: ((a / "head.onnx").rename(a.parent / "aside"), (a / "head.onnx").symlink_to("../aside")),
        ArtifactDamagedError, ["head.onnx: is a link to", "Copy the artifact with the files"]),
    "another JSON": (lambda a: (a / MANIFEST).write_text("{}"), ArtifactError, ["not an m0kit manifest"]),
    "no folder": (shutil.rmtree, ArtifactNotFoundError, ["no such folder", "m0kit export"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ARTIFACTS)
def test_a_damaged_artifact_is_refused_before_any_engine_opens_it(copy: Path, case: str) -> None:
    damage, kind, words = ARTIFACTS[case]
    Reranker.load(copy, threads=1)
    damage(copy)

    def opener(*_: Any) -> Any:
        raise AssertionError("opened")

    with pytest.raises(kind) as caught:
        Reranker.load(copy, open_graph=opener)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(str(copy))
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_was_always_wrong_is_named_by_path(copy: Path) -> None:
    """Hashes fit, the content doesn't: a tokenizer and a graph that no library reads."""
    for name in ("tokenizer.json", "head.onnx"):
        manifest = read_manifest(copy)
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(b"spoiled")
        files = {**manifest.files, name: FileEntry(7, sha256_of(copy / name))}
        write_manifest(copy, replace(manifest, files=files))
        with pytest.raises(ArtifactDamagedError, match=f"^{copy / name}: .*[Ee]xport .*again"):
            Reranker.load(copy)
        (copy / name).write_bytes(kept)
        write_manifest(copy, manifest)
    Reranker.load(copy)


@pytest.mark.parametrize("device", ["tpu", "cuda:99999x", "NoSuchExecutionProvider"])
def test_an_unknown_device_is_named(artifact: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=f"^device '{device}'.*CPUExecutionProvider"):
        Reranker.load(artifact, device=device)


def test_an_engine_that_runs_out_of_memory_says_what_to_lower(artifact: Path) -> None:
    Failure = type("Fail", (Exception,), {"__module__": "onnxruntime.capi"})

    class Full:
        def run(self, *_: Any) -> Any:
            raise Failure("bad_alloc at 0xdeadbeef")

    def opener(folder: Path, name: str) -> sessions.Graph:
        graph = sessions.open_graph(folder, name)
        if name == "decoder":
            graph.session = Full()
        return graph

    with pytest.raises(M0kitError, match=r"^the decoder graph failed.*lower max_pixels") as caught:
        Reranker.load(artifact, open_graph=opener).score([GOOD])
    assert "0xdeadbeef" not in str(caught.value)
