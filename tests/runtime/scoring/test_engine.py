"""What the engine feeds is what the graphs' ports are, and what it tells of its runs is what it ran."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m0kit import Reranker
from m0kit.artifact.ports import KV, decoder_name, expected_ports
from m0kit.scoring import sessions
from m0kit.scoring.engine import GraphEngine, RunStats

PAIRS: list[Any] = [
    ("query", "a text " * 30),
    ("other", "a text " * 30),
    ("query", Image.effect_noise((84, 112), 90).convert("RGB")),
    (Image.effect_noise((56, 56), 90).convert("RGB"), "short"),
]


@pytest.mark.parametrize("kv", KV)
def test_what_is_fed_and_asked_for_are_the_ports(artifact: Path, kv: Any) -> None:
    seen: set[tuple[str, bool]] = set()

    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        inner = sessions.open_graph(folder, name, threads=1, also=also)

        class Graph:
            def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
                ports = expected_ports(config, name)
                assert set(feeds) == {port.name for port in ports.inputs}
                assert set(outputs) <= {port.name for port in ports.outputs}
                sizes: dict[Any, int] = {}
                for port in ports.inputs:
                    fed = feeds[port.name]
                    assert fed.dtype.name == port.dtype, port
                    assert fed.ndim == len(port.shape), port
                    for size, told in zip(fed.shape, port.shape, strict=True):
                        assert size == (told if isinstance(told, int) else sizes.setdefault(told, size)), port
                seen.add((name, any(port.startswith("present.") for port in outputs)))
                return inner.run(feeds, outputs)

        return Graph()

    config = Reranker.load(artifact, threads=1).config
    assert np.isfinite(Reranker.load(artifact, open_graph=opener, kv=kv, cache_bytes=1 << 24).score(PAIRS)).all()
    assert seen == {("vision", False), ("head", False), (decoder_name(kv), True), (decoder_name(kv), False)}


@pytest.mark.parametrize("options", [{}, {"kv": "int8"}])
def test_a_run_is_told_as_it_was(artifact: Path, options: dict[str, Any]) -> None:
    reranker = Reranker.load(artifact, threads=1, **options)
    told: list[RunStats] = []
    reranker.engine.on_run = told.append
    preparer, _ = reranker.begin()
    prepared = [preparer.prepare(pair) for pair in PAIRS]
    reranker.score(PAIRS)
    documents = sum({one.document.key: one.document.length for one in prepared}.values())
    suffixes = sum(one.num_rows for one in prepared)
    assert sum(stats.rows for stats in told) == documents + suffixes
    assert sum(stats.pairs for stats in told) == len(PAIRS)
    assert sum(stats.kept_rows for stats in told) == (documents if options else 0)
    assert all((stats.past_bytes > 0) == (stats.kept_rows > 0) for stats in told)
    assert all(stats.seconds > 0 for stats in told)


def test_a_copy_is_told_of_too_and_keeps_its_own(artifact: Path) -> None:
    reranker = Reranker.load(artifact, threads=1)
    told: list[RunStats] = []
    reranker.engine.on_run = told.append
    limited = reranker.with_limits(max_query_length=100)
    limited.score([("query", "a text")])
    assert len(told) == 1
    limited.engine.on_run = None
    reranker.score([("query", "a text")])
    limited.score([("query", "a text")])
    assert len(told) == 2


def test_what_is_kept_in_one_form_is_not_found_in_another(artifact: Path) -> None:
    image = Image.new("RGB", (56, 56))
    plain, half = Reranker.load(artifact, threads=1), Reranker.load(artifact, threads=1, kv="fp16")
    one, other = (each.begin()[0].prepare(("q", image)).document for each in (plain, half))
    assert one.key != other.key
    assert isinstance(plain.engine, GraphEngine)
    assert isinstance(half.engine, GraphEngine)
    assert plain.engine.key(one.images[0]) != half.engine.key(one.images[0])
