"""Bad lines are left out for all, and figures land where they belong.

What the figures of time and memory are is nobody's business here: machines differ.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest
from m0kit.errors import ArtifactError, InputError, ScoreError
from m0kit_parity.evaluate.compare import check_same_model, compare, judged_workloads, labels_of
from m0kit_parity.evaluate.judged import Query


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
    def overflowing(self: Reranker, pairs: Sequence[Any]) -> list[Any]:
        return [
            replace(r, score=math.nan, logit=math.nan, error=ScoreError("no finite number")) if "cats" in pair[1] else r
            for pair, r in zip(pairs, real(self, pairs), strict=True)
        ]

    real: Callable[..., list[Any]] = Reranker.evaluate
    monkeypatch.setattr(Reranker, "evaluate", overflowing)
    good, bad = Query("line 1", "q", ("a", "b"), None), Query("line 2", "q", ("a", "cats"), None)
    evaluation, _ = compare([base], {"set": [good, bad]}, threads=1, speed=False)
    assert evaluation.sets == {"set": 1}
    assert re.fullmatch(r"line 2, document 2: .*base: no finite number", evaluation.errors[0])
    with pytest.raises(InputError, match=r"no query could be scored.*line 2"):
        compare([base], {"set": [bad]}, threads=1, speed=False)


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
