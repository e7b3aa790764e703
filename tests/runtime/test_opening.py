"""Which set of graphs runs where, and that it makes no difference which one did."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m0kit import Reranker
from m0kit.artifact.ports import KV, Kept
from m0kit.index import add, open_index
from m0kit.scoring import sessions

FLOATS = ("fp32", "fp16", "bf16")
# ONNX Runtime as an engine of one's own: it is asked for the portable graphs.
PORTABLE = partial(sessions.open_graph, threads=1)
# How far logits may be apart, by the form in which documents are kept. fp32: sums of float32 in another order, in each
# precision, since products of floats are computed so; 6e-6 were seen. The others: where that turns how a key or value
# is rounded, it is a rounding's size; this is a half and a tenth of what keeping in that form moves these logits by
# (2.2e-3, 5.5e-2), and 4e-4 and 6e-4 were seen. Logits of different pairs lie 0.5 apart.
ALIKE: Mapping[Kept, float] = {"fp32": 2e-5, "fp16": 1e-3, "int8": 5e-3}
Make = Callable[..., Image.Image]
Pairs = list[tuple[Any, Any]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs in the order in which ONNX Runtime runs them."""
    names: list[str] = []
    real = sessions.OnnxRuntimeGraph.run

    def noting(self: Any, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        names.append(self._name)
        return real(self, feeds, outputs)

    monkeypatch.setattr(sessions.OnnxRuntimeGraph, "run", noting)
    return names


@pytest.fixture
def pairs(picture: Make) -> Pairs:
    """The largest has more patches than attention takes at once, in either set."""
    images = [picture(*size) for size in ((60, 90), (28, 140), (700, 700), (84, 84))]
    return [("slm markdown", images[0]), ("q", "a text"), *(("a query", image) for image in images), (images[1], "x")]


@pytest.mark.parametrize("device", ["cpu", "CPUExecutionProvider"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_on_a_cpu_onnx_runtime_runs_the_set_for_it_where_there_is_one(
    precision: str, device: str, in_precision: Callable[[str], Path], runs: list[str], pairs: Pairs
) -> None:
    Reranker.load(in_precision(precision), device, 1).score(pairs[:1])
    assert set(runs) == {"vision.cpu" if precision in FLOATS else "vision", "decoder", "head"}


@pytest.mark.parametrize("precision", FLOATS)
def test_an_engine_of_ones_own_is_asked_for_the_portable_graphs(
    precision: str, in_precision: Callable[[str], Path], runs: list[str], pairs: Pairs
) -> None:
    Reranker.load(in_precision(precision), open_graph=PORTABLE).score(pairs[:1])
    assert set(runs) == {"vision", "decoder", "head"}


def test_another_provider_runs_the_portable_graphs(
    unasked: Path, monkeypatch: pytest.MonkeyPatch, pairs: Pairs
) -> None:
    opened = {}

    def noting(folder: Path, name: str, *, runs: Mapping[str, str], **_: Any) -> sessions.Graph:
        opened[name] = runs.get(name, name)
        return PORTABLE(folder, name)

    monkeypatch.setattr(sessions, "open_graph", noting)
    Reranker.load(unasked, "OtherExecutionProvider").score(pairs[:1])
    assert opened == {name: name for name in ("vision", "decoder", "head")}


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("precision", FLOATS)
def test_both_sets_score_alike(
    precision: str, kv: Kept, in_precision: Callable[[str], Path], runs: list[str], pairs: Pairs
) -> None:
    own, portable = (
        Reranker.load(in_precision(precision), threads=1, kv=kv, open_graph=engine).score(pairs, raw=True)
        for engine in (None, PORTABLE)
    )
    assert {"vision.cpu", "vision"} < set(runs)
    np.testing.assert_allclose(own, portable, rtol=0, atol=ALIKE[kv])


@pytest.mark.parametrize("engine", [None, PORTABLE])
@pytest.mark.parametrize("precision", FLOATS)
def test_in_either_set_a_score_is_the_same_alone_and_in_any_company(
    precision: str, engine: Any, in_precision: Callable[[str], Path], pairs: Pairs
) -> None:
    reranker = Reranker.load(in_precision(precision), threads=1, open_graph=engine)
    alone = np.concatenate([reranker.score([pair], raw=True) for pair in pairs])
    np.testing.assert_array_equal(reranker.score(pairs, raw=True), alone)
    np.testing.assert_array_equal(reranker.score(pairs[::-1], raw=True), alone[::-1])


@pytest.mark.parametrize("kv", KV)
def test_an_index_serves_whichever_set_runs(
    kv: Kept, artifact: Path, runs: list[str], pairs: Pairs, tmp_path: Path
) -> None:
    pairs = [pair for pair in pairs if isinstance(pair[0], str)]  # images of queries are kept by nobody
    documents = [(f"{number}", document, "") for number, (_, document) in enumerate(pairs)]
    maker = Reranker.load(artifact, threads=1, kv=kv, open_graph=PORTABLE)
    with open_index(tmp_path / "library", maker) as store:
        add(maker, store, documents)
    runs.clear()
    reader = Reranker.load(artifact, threads=1, index=tmp_path / "library")
    assert reader.engine.salt == maker.engine.salt
    found = reader.score(
        [(query, {"id": name}) for (query, _), (name, _, _) in zip(pairs, documents, strict=True)], raw=True
    )
    assert "vision" not in runs
    np.testing.assert_array_equal(found, maker.score(pairs, raw=True))
    own = Reranker.load(artifact, threads=1, kv=kv).score(pairs, raw=True)
    np.testing.assert_allclose(found, own, rtol=0, atol=ALIKE[kv])
