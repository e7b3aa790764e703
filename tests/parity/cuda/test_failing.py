"""What becomes of runs, documents and memory where a run fails or a pool is small."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.artifacts import artifacts_of

from m0kit import Reranker, opening
from m0kit.errors import M0kitError
from m0kit.keeping.pages import PAGE_TOKENS
from m0kit.scoring.cuda_engine import CudaEngine
from m0kit.scoring.engine import Part
from m0kit.scoring.gpus import Gpu
from m0kit_parity.cuda.host import HostDevice, HostGraph


@pytest.fixture(scope="module")
def artifact(tiny: Path) -> Path:
    return artifacts_of(tiny, "failing")("fp16")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    device: Any = HostDevice(1 << 30)
    device.gpu = Gpu("the computer itself", 1 << 40)
    monkeypatch.setattr(opening, "CudaDevice", lambda *_: device)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return device


def opened(artifact: Path, pages: int, **options: Any) -> Reranker:
    with Reranker.load(artifact, device="cuda", pool_bytes=1 << 26) as one:
        config = one.config.decoder
    page = 2 * config.num_layers * PAGE_TOKENS * config.kv_size * 2
    return Reranker.load(artifact, device="cuda", pool_bytes=pages * page, **options)


def failing_once(monkeypatch: pytest.MonkeyPatch, before: Callable[[], object]) -> None:
    run, left = HostGraph.run, [1]

    def failing(self: HostGraph, *values: Any) -> None:
        if left:
            left.pop()
            before()
            raise M0kitError("out of memory")
        run(self, *values)

    monkeypatch.setattr(HostGraph, "run", failing)


def test_no_run_reads_a_document_whose_own_run_failed(
    artifact: Path, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reranker.load(artifact, device="cuda", pool_bytes=1 << 26) as reranker:
        engine = reranker.engine
        assert isinstance(engine, CudaEngine)
        preparer, _ = reranker.begin()
        first, second = (preparer.prepare((query, "a document")) for query in ("one", "two"))
        is_queued = threading.Event()
        with monkeypatch.context() as patch:
            failing_once(patch, is_queued.wait)
            waits = [engine.begin([Part(first.document, [first])])]
            state = engine.find(first.document)
            waits.append(engine.begin([Part(first.document, [second], state)]))
            is_queued.set()
            for wait in waits:
                with pytest.raises(M0kitError):
                    wait()
        (again,) = engine.begin([Part(first.document, [second], state)])()  # whoever still holds it
        (wanted,) = reranker.score([("two", "a document")], raw=True)
    assert again == wanted


def test_a_small_pool_takes_many_queries_on_a_long_document(artifact: Path, host: Any) -> None:
    # Cut to one length, as all queries have one.
    text = " ".join(f"word {i}" for i in range(1500))
    pairs = [(f"query {i}", text) for i in range(10, 22)]
    options = {"max_length": 12 * PAGE_TOKENS}
    with opened(artifact, 100, **options) as large, opened(artifact, 14, **options) as small:
        wanted, found = ([result.logit for result in one.evaluate(pairs)] for one in (large, small))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-2)


def test_documents_as_long_as_a_pool_are_computed_for_an_index(artifact: Path, host: Any) -> None:
    texts = [" ".join(f"{kind} {i}" for i in range(1500)) for kind in ("word", "thing")]
    with opened(artifact, 18, max_length=16 * PAGE_TOKENS) as reranker:
        preparer, _ = reranker.begin()
        documents = [preparer.prepare(("q", text)).document for text in texts]
        assert all(document.length > 9 * PAGE_TOKENS for document in documents)
        assert all(state.is_finite for state in reranker.engine.compute(documents))


def test_what_is_closed_gives_its_memory_back(artifact: Path, host: Any) -> None:
    before = host.free_bytes()
    reranker = Reranker.load(artifact, device="cuda", pool_bytes=1 << 26)
    reranker.score([("a query", "a document")])
    reranker.close()
    reranker.close()
    assert host.free_bytes() == before
    with pytest.raises(M0kitError, match="closed"):
        reranker.score([("a query", "a document")])


def test_memory_that_could_not_grow_is_not_used_again(
    artifact: Path, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reranker.load(artifact, device="cuda", pool_bytes=1 << 26) as reranker:
        pair = [("a query", "a document")]
        (wanted,) = reranker.score(pair, raw=True)
        used = host.free_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(host, "allocate", lambda _: (_ for _ in ()).throw(M0kitError("out of memory")))
            with pytest.raises(M0kitError):
                reranker.score([(f"query {i}", f"document {i}") for i in range(50)])
        assert host.free_bytes() > used  # what was too small is gone
        (found,) = reranker.score(pair, raw=True)
    assert found == wanted
