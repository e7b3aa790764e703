"""A peer computes the model: in float32 as PyTorch does, in fewer bits as near as those bits allow.

What needs packages beyond those for development (nncf, llama-cpp-python, gguf) is skipped without them:

    pip install nncf llama-cpp-python gguf
"""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from m0kit import Reranker
from m0kit.errors import CheckpointError, DependencyError, InputError
from m0kit.scoring.planner import PIECE_ROWS, Group, layout_groups
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_parity.bench import peers
from m0kit_parity.bench.options import PEERS
from m0kit_parity.bench.workloads import page_of
from m0kit_parity.reference import Reference
from m0kit_parity.samples.checkpoints import model_config

SENTENCE = "some document of words "
# One document with two queries is one prefix with two suffixes; 60 sentences are several pieces of attention.
TEXTS = [
    ("a query", SENTENCE),
    ("a query", SENTENCE * 5),
    ("another", SENTENCE),
    ("a query", SENTENCE * 60),
    ("ein Wort", "näher: 那 7"),
]
IMAGES = [
    ("a query", page_of(48)),
    ("another", page_of(48)),
    (page_of(20), SENTENCE),
    (page_of(6), page_of(20, 1)),
]

# Scores. Float32 sums in another order: 1e-6 is seen; a wrong angle, mask or layer gives 1e-2 and more.
FLOAT32 = 1e-5
# float16 products and softmax in llama.cpp: 1e-3 is seen, three layers of 2⁻¹¹ under a steep head.
FLOAT16 = 3e-3
# 8 bits of weights (and of activations) in a network of 64 columns: 1e-2 is seen. Scores of TEXTS lie 0.5 apart.
EIGHT_BITS = 3e-2


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture(scope="module")
def expected(tiny_reference: Reference) -> np.ndarray:
    scores = tiny_reference.score([*TEXTS, *IMAGES])
    assert np.ptp(scores[: len(TEXTS)]) > 0.3, "scores that lie together would pass with a wrong model"
    return scores


@pytest.fixture
def llama_cpp() -> Any:
    pytest.importorskip("gguf")
    return pytest.importorskip("llama_cpp")


def test_the_mask_shows_each_row_its_prefix_and_its_own_rows_up_to_itself() -> None:
    prefix = PIECE_ROWS + 5
    groups = [Group(prefix, [(prefix, 3), (prefix - 2, PIECE_ROWS + 2)]), Group(0, [(0, 4)]), Group(7, [(7, 1)])]
    layout = layout_groups(groups)
    num_rows = layout.num_tokens + layout.fill
    assert layout.fill
    sees = np.zeros((num_rows, num_rows), bool)
    row = 0
    for group in groups:
        first, row = row, row + group.length
        for i in range(first, row):
            sees[i, first : i + 1] = True
        for used, length in group.suffixes:
            for i in range(row, row + length):
                sees[i, first : first + used] = sees[i, row : i + 1] = True
            row += length
    for i in range(row, num_rows):  # what fills up the run sees itself: a row that sees nothing gives NaN
        sees[i, i] = True
    mask = peers.additive_mask(layout.pieces, num_rows)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, np.where(sees, np.float32(0), -np.inf))


@pytest.mark.parametrize(("shape", "group"), [("wide", 256), ("tiny", 32)])
def test_a_quantisation_group_divides_every_width(shape: Any, group: int) -> None:
    config = model_config(shape)
    assert peers.quantisation_group(config.decoder, config.vision) == group


def test_openvino_graphs_are_the_model(checkpoint: Checkpoint, expected: np.ndarray) -> None:
    scores = peers.openvino(checkpoint, 1, int8=False).score([*TEXTS, *IMAGES])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=FLOAT32)


def test_openvino_int8_is_near_and_quantises_weights_and_activations(
    checkpoint: Checkpoint, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    scores = peers.openvino(checkpoint, 1).score([*TEXTS, *IMAGES])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=EIGHT_BITS)
    monkeypatch.setattr(peers, "quantisation_group", lambda _decoder, _vision: 0)
    weights_only = peers.openvino(checkpoint, 1).score([*TEXTS, *IMAGES])
    np.testing.assert_allclose(weights_only, expected, rtol=0, atol=EIGHT_BITS)
    for one, other in ((scores, expected), (weights_only, expected), (scores, weights_only)):
        assert (np.abs(one - other) > 10 * FLOAT32).sum() > len(expected) / 2, "these two are the same computation"


def test_openvinocompresses_every_matrix(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nncf")
    compress, models = peers.compress, []

    def keep(model: Any) -> Any:
        models.append(compress(model))
        return models[-1]

    monkeypatch.setattr(peers, "compress", keep)
    peers.openvino(checkpoint, 1)
    config = checkpoint.config
    for model, count in zip(models, (1 + 4 * config.vision.depth + 2, 7 * config.decoder.num_layers), strict=True):
        constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
        matrices = [op for op in constants if sum(size > 1 for size in op.get_output_shape(0)) > 1]
        stored = [op.get_element_type().get_type_name() for op in matrices]
        assert stored == ["i8"] * count


def test_progress_of_thecompression_stays_off_stdout(checkpoint: Checkpoint, capsys: Any) -> None:
    """`m0kit bench --json` is read by programs."""
    pytest.importorskip("nncf")
    peers.openvino(checkpoint, 1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", FLOAT32), ("f16", FLOAT16), ("q8_0", EIGHT_BITS)])
def test_llama_cpp_computes_the_model(
    kind: Any, tolerance: float, checkpoint: Checkpoint, expected: np.ndarray, tmp_path: Path, llama_cpp: Any
) -> None:
    scores = peers.llama(checkpoint, kind, 1, tmp_path).score(TEXTS)
    np.testing.assert_allclose(scores, expected[: len(TEXTS)], rtol=0, atol=tolerance)


class Summing(peers.LlamaDecoder):
    """llama.cpp's place is taken by a sum; notes the prompts."""

    def __init__(self) -> None:
        self.prompts: list[list[float]] = []
        self._embedding: Any = self

    def rows(self, feeds: dict[str, Any]) -> np.ndarray:
        return np.stack([feeds["token_ids"], np.ones_like(feeds["token_ids"])], axis=1).astype(np.float32)

    def _last_hidden(self, embeds: np.ndarray) -> np.ndarray:
        self.prompts.append(embeds[:, 0].tolist())
        return np.asarray(embeds.sum(0))


def test_llama_cpp_gets_whole_prompts_and_none_of_what_fills_up_a_run() -> None:
    layout = layout_groups([Group(3, [(3, 2), (2, 2)]), Group(0, [(0, 4)])])
    ids = np.arange(layout.num_tokens + layout.fill)
    decoder = Summing()
    feeds = {"token_ids": ids, "last_pieces": layout.last_pieces, "last_index": layout.last_index}
    hidden = decoder.run(feeds, ["hidden"])["hidden"]
    assert decoder.prompts == [[0, 1, 2, 3, 4], [0, 1, 5, 6], [7, 8, 9, 10]]
    assert (hidden.dtype, hidden.shape) == (np.float32, (4, 2))
    assert hidden[:3].tolist() == [[10, 5], [12, 4], [34, 4]]
    assert np.isfinite(hidden).all()  # a head may be run on all of it


def test_every_call_of_llama_cpp_starts_from_an_empty_cache(
    checkpoint: Checkpoint, tmp_path: Path, llama_cpp: Any
) -> None:
    reranker = peers.llama(checkpoint, "f16", 1, tmp_path)
    first = reranker.score(TEXTS)
    np.testing.assert_array_equal(reranker.score(TEXTS), first)
    np.testing.assert_array_equal(reranker.score(TEXTS[::-1]), first[::-1])


# 64 columns are no multiple of the 256 of Q4_K, so llama.cpp falls back here to the nearest type; full widths are.
@pytest.mark.parametrize(
    ("kind", "file_type", "stored"), [("q8_0", 7, "Q8_0"), ("q4_0", 2, "Q4_0"), ("q4_k", 15, "Q5_0")]
)
def test_llama_cpp_stores_the_type_asked_for(
    kind: Any, file_type: int, stored: str, checkpoint: Checkpoint, tmp_path: Path, llama_cpp: Any
) -> None:
    import gguf  # type: ignore[import-not-found, unused-ignore]

    scores = peers.llama(checkpoint, kind, 1, tmp_path).score(TEXTS[:1])
    reader = gguf.GGUFReader(tmp_path / f"decoder-{kind}.gguf")
    assert reader.fields["general.file_type"].contents() == file_type
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_gate.weight"] == types["blk.1.attn_q.weight"] == stored
    assert types["output.weight"] == types["blk.0.attn_norm.weight"] == types["blk.0.attn_q.bias"] == "F32"
    assert 0 < scores[0] < 1


def test_an_image_is_no_business_of_llama_cpp(checkpoint: Checkpoint, tmp_path: Path, llama_cpp: Any) -> None:
    with pytest.raises(InputError, match="text alone"):
        peers.llama(checkpoint, "f16", 1, tmp_path).score(IMAGES[:1])


def test_a_weight_beyond_float16_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_cpp: Any
) -> None:
    read = peers.float32_of
    monkeypatch.setattr(peers, "float32_of", lambda c, name: read(c, name) * (1e7 if "up_proj" in name else 1))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds values that float16"):
        peers.write_gguf(checkpoint, tmp_path / "a.gguf", "f16")
    peers.write_gguf(checkpoint, tmp_path / "b.gguf", "f32")


def test_the_peers_are_those_there_are() -> None:
    assert tuple(PEERS) == (peers.OPENVINO, *peers.LLAMA)


def test_each_peer_is_another_engine_and_scores(tiny: Path, expected: np.ndarray, tmp_path: Path) -> None:
    for package in ("nncf", "llama_cpp", "gguf"):
        pytest.importorskip(package)
    names = ["llama-q8_0", "openvino-int8", "llama-f16"]
    scores = [peers.peer(tiny, name, 1, tmp_path / "new" / "scratch").score(TEXTS) for name in names]
    for values in scores:
        np.testing.assert_allclose(values, expected[: len(TEXTS)], rtol=0, atol=EIGHT_BITS)
    assert len({tuple(values) for values in scores}) == len(names), "one engine was run under two names"


def test_peers_need_no_artifact_and_no_onnx_runtime(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed under a peer's name is that peer."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    reranker = peers.openvino(checkpoint, 1, int8=False)
    assert isinstance(reranker, Reranker)
    assert reranker.score(TEXTS[:1]).shape == (1,)


def test_an_unknown_peer_is_refused_with_the_names_there_are(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"peer 'ggml' is not known\. Say openvino-int8, llama-f16, llama-q8_0"):
        peers.peer(tiny, "ggml", 1, tmp_path)


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("openvino-int8", "openvino", "openvino"),
        ("openvino-int8", "nncf", "nncf"),
        ("llama-q4_0", "llama_cpp", "llama-cpp-python"),
        ("llama-f16", "gguf", "gguf"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_made(
    name: str, package: str, install: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("openvino", "nncf", "llama_cpp", "gguf"):
        there = ModuleType(other)
        there.__spec__ = ModuleSpec(other, None)
        monkeypatch.setitem(sys.modules, other, there)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=f"the peer {name} needs {install}. pip install {install}$"):
        peers.peer(tmp_path / "no checkpoint", name, 1, tmp_path / "scratch")
    assert list(tmp_path.iterdir()) == []
