"""Bad lines are left out for all, and figures land where they belong.

What the figures of time and memory are is nobody's business here: machines differ.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest
from m0kit.errors import ArtifactError, InputError, ScoreError
from m0kit.scoring.schedule import Result
from m0kit_parity.evaluate.compare import check_same_model, compare, judged_workloads, labels_of
from m0kit_parity.evaluate.intervals import interval, resampled
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.small.evaluate import ndcg_at_k


def test_artifacts_of_two_models_are_refused_with_both_names(base: Path, tiny_artifact: Path) -> None:
    paths = [base, base, tiny_artifact]
    with pytest.raises(ArtifactError, match=rf"{re.escape(str(base))} and {re.escape(str(tiny_artifact))}.*decoders"):
        check_same_model(paths, [read_manifest(path) for path in paths])


def test_what_differs_is_said(base: Path) -> None:
    first = read_manifest(base)
    vision = replace(first.model, vision=replace(first.model.vision, rope_theta=1.0))
    tokenizer = {**first.files, "tokenizer.json": replace(first.files["tokenizer.json"], sha256="0")}
    for what, other in (
        ("vision encoder", replace(first, model=vision)),
        ("tokenizer", replace(first, files=tokenizer)),
    ):
        with pytest.raises(ArtifactError, match=f"their {what}s differ"):
            check_same_model([base, base], [first, other])
    check_same_model([base, base], [first, replace(first, scheme="int4")])


def test_labels_are_short_and_never_the_same() -> None:
    paths = [Path("a/m0"), Path("b/m0"), Path("int8"), Path("a/m0")]
    assert labels_of(paths) == ["a/m0", "b/m0", "int8", "a/m0 (2)"]
    assert labels_of([Path()]) == [Path.cwd().name]


def test_artifacts_take_turns_one_measurement_at_a_time(base: Path, tuned: Path, fast: list[Any]) -> None:
    sets = {"set": [Query("line 1", "a bicycle", ("a red car", "two cats"), (1, 0))]}
    loads = {"a": [("q", "d")], "b": [("q", "d")] * 2}
    evaluation, _ = compare([base, tuned], sets, loads, threads=1, repeats=2)
    assert fast == [
        *[("memory", name, n) for n in (1, 2) for name in ("base", "tuned")],
        *[("seconds", name, n) for n in (1, 2) for _ in range(2) for name in ("base", "tuned")],
    ]
    ratio = evaluation.artifacts[1].seconds["a"]  # measured fifth to eighth: 2·5 and 0.5·6, then 2·7 and 0.5·8
    assert (ratio.low, ratio.high) == (pytest.approx(10 / 3), pytest.approx(14 / 4))
    assert evaluation.artifacts[0].seconds["a"].ratio == 1
    assert evaluation.artifacts[1].memory["b"].private == 20
    before = len(fast)
    evaluation, _ = compare([base], sets, loads, threads=1, speed=False)
    assert {what for what, *_ in fast[before:]} == {"memory"}
    assert evaluation.artifacts[0].seconds == {}


def test_scores_that_are_not_finite_are_not_ranked(
    base: Path, fast: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(self: Reranker, pairs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        pairs = list(pairs)
        for position, result in real(self, pairs):
            error = ScoreError("no finite number") if "cats" in pairs[position][1] else None
            yield position, replace(result, score=math.nan, logit=math.nan, error=error) if error else result

    real: Callable[..., Iterator[tuple[int, Any]]] = Reranker.stream
    monkeypatch.setattr(Reranker, "stream", overflowing)
    good, bad = Query("line 1", "q", ("a", "b"), None), Query("line 2", "q", ("a", "cats"), None)
    evaluation, _ = compare([base], {"set": [good, bad]}, threads=1, speed=False)
    assert evaluation.sets == {"set": 1}
    assert re.fullmatch(r"line 2, document 2: .*base: no finite number", evaluation.errors[0])
    with pytest.raises(InputError, match=r"no query could be scored.*line 2"):
        compare([base], {"set": [bad]}, threads=1, speed=False)


def test_each_loss_has_the_interval_of_its_own_queries(
    base: Path, tuned: Path, fast: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are random here: what matters is which of them an interval is made of."""
    sizes = {"alone": 30, "together": 40, "few": 19}
    sets = {
        name: [Query(f"{name} {i}", "q", tuple("abc"), (2, 1, 0), f"{i // 2}" * (name == "together")) for i in range(n)]
        for name, n in sizes.items()
    }
    drawn = [np.random.default_rng(side).normal(size=(sum(sizes.values()), 3)) for side in range(4)]
    sides = iter(drawn)

    def stream(_: Reranker, pairs: Iterable[Any]) -> Iterator[tuple[int, Result]]:
        logits = next(sides).ravel()
        for position, _pair in enumerate(list(pairs)):
            yield position, Result(0.5, float(logits[position]))

    monkeypatch.setattr(Reranker, "stream", stream)
    evaluation, _ = compare([base, tuned], sets, {}, threads=1, speed=False, kvs=("int8",))
    assert evaluation.artifacts[0].quality["alone"].interval is None
    ndcg = np.asarray([[ndcg_at_k(list(row), (2, 1, 0)) for row in side] for side in drawn])
    losses = 100 * (ndcg[0] - ndcg[1:])
    places = iter(np.split(losses, np.cumsum(list(sizes.values()))[:-1], axis=1))
    parts = [
        resampled(next(places).T, [query.group for query in queries], seed)
        for seed, queries in enumerate(sets.values())
    ]
    for side, artifact in enumerate(evaluation.artifacts[1:]):  # with documents as computed, and kept in int8
        for (name, quality), part in zip(artifact.quality.items(), [*parts, None], strict=True):
            assert quality.interval == interval(parts if part is None else [part], side), name
        assert artifact.quality["few"].interval is None
        assert artifact.quality["together"].interval is not None, "twenty groups"
        assert artifact.quality["alone"].changed == np.count_nonzero(losses[side, :30])


def test_the_files_own_pairs_are_timed_a_few_of_each_kind(tmp_path: Path) -> None:
    page = {"image": tmp_path / "p.png"}
    queries = [Query(f"line {i}", f"q{i}", (f"d{i}", {"text": f"e{i}"}, page), None) for i in range(7)]
    loads = judged_workloads(queries)
    assert {name: len(load) for name, load in loads.items()} == {
        "4 of the file's text pairs": 4,
        "4 of the file's image pairs": 4,
    }
    texts = loads["4 of the file's text pairs"]
    assert texts[0] == ("q0", "d0")
    assert texts[-1] == ("q6", {"text": "e6"}), "spread from the first to the last"
    assert list(judged_workloads([Query("line 1", page, ("a", "b"), None)])) == ["2 of the file's image pairs"]
