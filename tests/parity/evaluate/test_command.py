"""Metrics are what their definitions say, bad lines are named and left out for all, and figures land where they belong.

What the figures of time and memory are is nobody's business here: machines differ.
"""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m0kit import Reranker
from m0kit.artifact.manifest import MANIFEST, read_manifest
from m0kit.errors import ArtifactError, InputError, M0kitError, OutputError, ScoreError
from m0kit_export.adapter import AdapterSpec
from m0kit_export.export import export_artifact
from m0kit_parity.bench import commands as bench
from m0kit_parity.bench import measure as measure_module
from m0kit_parity.evaluate import command as evaluate
from m0kit_parity.evaluate.command import Query, quality_of, spearman
from m0kit_parity.small import evaluate as ranking
from m0kit_parity.small.files import SMALL

SVG = "{http://www.w3.org/2000/svg}"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def base(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "base"
    export_artifact(small, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, small: Path) -> Path:
    """The same model, other weights: it ranks code better and the rest a little worse."""
    folder = base.with_name("tuned")
    export_artifact(small, folder, adapters=[AdapterSpec(SMALL / "adapters" / "code", 1.0)], progress=False)
    return folder


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Measuring processes replaced by figures; returns the measurements asked for, in order."""
    asked: list[tuple[str, str, int]] = []

    def measure(what: str, artifact: Path, pairs: Sequence[Any], *_: Any) -> Any:
        asked.append((what, artifact.name, len(pairs)))
        if what == "seconds":
            return {"base": 2.0, "tuned": 0.5}.get(artifact.name, 1.0) * len(asked)
        return {"loaded": 10.0, "peak": 30.0, "private": 20.0, "seconds": 1.0}

    monkeypatch.setattr(measure_module, "_measure", measure)
    return asked


def judged(folder: Path, *rows: Any, name: str = "judged.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", "utf-8")
    return path


def row(query: Any = "a red bicycle", documents: Any = ("a bicycle", "two cats", "a red car"), **rest: Any) -> Any:
    return {"query": query, "documents": documents, **rest}


def invoke(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(evaluate.evaluate, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


# --- metrics -------------------------------------------------------------------------------------------

few_values = st.lists(st.tuples(*[st.integers(-3, 3).map(float)] * 2), min_size=2, max_size=8)


@given(few_values)
def test_spearman_is_pearson_of_ranks_shared_by_equal_values(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(side) for side in zip(*pairs, strict=True))

    def ranks(values: list[float]) -> list[float]:
        """By counting: those below, and the middle of those that are equal."""
        return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]

    if len(set(a)) > 1 and len(set(b)) > 1:
        expected = np.corrcoef(ranks(a), ranks(b))[0, 1]
        assert spearman(a, b) == pytest.approx(expected, abs=1e-12)  # rounding of sums of eight small numbers
    else:
        assert spearman(a, b) == (len(set(a)) == len(set(b)) == 1)


@given(st.permutations(range(6)))
def test_spearman_without_ties_is_the_formula_of_squared_differences(order: list[int]) -> None:
    squared = sum((i - o) ** 2 for i, o in enumerate(order))
    assert spearman(range(6), order) == pytest.approx(1 - 6 * squared / (6 * 35), abs=1e-12)


def test_spearman_sees_only_the_order() -> None:
    values = [0.1, 0.9, 0.5, 0.4]
    assert spearman(values, [v**3 for v in values]) == pytest.approx(1)
    assert spearman(values, [-v for v in values]) == pytest.approx(-1)


def test_quality_is_measured_against_the_baseline() -> None:
    queries = [Query("line 1", "q", ("a", "b", "c"), (1, 0, 0)), Query("line 2", "q", ("a", "b"), (1, 0))]
    before, after = [[0.9, 0.5, 0.1], [0.6, 0.4]], [[0.5, 0.6, 0.1], [0.6, 0.3]]
    quality = quality_of(queries, after, before)
    second = 1 / math.log2(3)  # the only relevant document at rank 2
    assert quality.ndcg == pytest.approx((second + 1) / 2)
    assert quality.loss == pytest.approx(100 * (1 - (second + 1) / 2))
    assert quality.max_delta == pytest.approx(0.4)
    assert quality.mean_delta == pytest.approx((0.4 + 0.1 + 0 + 0 + 0.1) / 5)
    assert quality.spearman == pytest.approx((0.5 + 1) / 2)
    assert quality.same_first == 0.5
    alone = quality_of(queries, before, None)
    assert (alone.ndcg, alone.loss, alone.max_delta, alone.spearman) == (1.0, None, None, None)


def test_a_better_artifact_loses_less_than_nothing() -> None:
    queries = [Query("line 1", "q", ("a", "b"), (0, 1))]
    loss = quality_of(queries, [[0.1, 0.9]], [[0.9, 0.1]]).loss
    assert loss is not None
    assert loss < 0


def test_without_judgements_there_is_agreement_only() -> None:
    quality = quality_of([Query("line 1", "q", ("a", "b"), None)], [[0.1, 0.9]], [[0.9, 0.1]])
    assert (quality.ndcg, quality.loss, quality.same_first) == (None, None, 0.0)
    assert quality.spearman == pytest.approx(-1)


# --- judged files --------------------------------------------------------------------------------------


def test_a_judged_file_is_read_with_paths_relative_to_it(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "p.png")
    documents = ["text", {"text": "more"}, {"image": "p.png"}]
    path = judged(tmp_path, row({"image": "p.png"}, documents, relevance=[0, 2, 1]), "", row(relevance=[1, 0, 0]))
    queries, errors = evaluate.read_judged(path)
    assert errors == {}
    assert queries[0] == Query(
        f"{path}: line 1",
        {"image": tmp_path / "p.png"},
        ("text", {"text": "more"}, {"image": tmp_path / "p.png"}),
        (0, 2, 1),
    )
    assert queries[1].where == f"{path}: line 3", "empty lines count"


BAD = {
    "the line is not JSON": '{"query": ',
    'expected "query" with "document" or "documents"': {"query": "q"},
    "expected .* got list": "[1, 2]",
    "the key 'query' twice": '{"query": "a", "query": "b", "documents": ["a", "b"]}',
    "unknown key 'score'": row(score=1),
    "list of two or more": row(documents=["only one"]),
    "must be a list": row(documents="a text"),
    "query: is empty": row(query="", relevance=[1, 0, 0]),
    "document 2: expected text": row(documents=["a", 7], relevance=[1, 0]),
    "document 1: .*gone.png: No such file": row(documents=[{"image": "gone.png"}, "b"], relevance=[1, 0]),
    "one number for each of 3 documents, not 2": row(relevance=[1, 0]),
    "one number for each of 3 documents, not str": row(relevance="yes"),
    "whole numbers from 0 to 30, got -1": row(relevance=[1, -1, 0]),
    "whole numbers from 0 to 30, got True": row(relevance=[1, True, 0]),
    "whole numbers from 0 to 30, got 0.5": row(relevance=[1, 0.5, 0]),
    "whole numbers from 0 to 30, got 31": row(relevance=[1, 31, 0]),
    "no document is relevant": row(relevance=[0, 0, 0]),
    'no "relevance", which other lines': row(),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_line_is_named_and_costs_the_others_nothing(message: str, tmp_path: Path) -> None:
    good = row(relevance=[1, 0, 0])
    path = judged(tmp_path, good, BAD[message], good)
    queries, errors = evaluate.read_judged(path)
    assert [query.where for query in queries] == [f"{path}: line 1", f"{path}: line 3"]
    assert list(errors) == [f"{path}: line 2"]
    assert errors[f"{path}: line 2"].startswith(f"{path}: line 2: ")
    assert re.search(message, errors[f"{path}: line 2"])


def test_a_file_without_any_usable_line_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl: No such file"):
        evaluate.read_judged(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"no query that can be used: .*judged\.jsonl is empty"):
        evaluate.read_judged(judged(tmp_path, ""))
    with pytest.raises(InputError, match=r"no query that can be used: .*judged\.jsonl: line 1: the line is not JSON"):
        evaluate.read_judged(judged(tmp_path, "{", "["))
    (tmp_path / "judged.jsonl").write_text('{"query": "q"}', "utf-16")
    with pytest.raises(InputError, match="is UTF-16"):
        evaluate.read_judged(tmp_path / "judged.jsonl")


# --- artifacts -----------------------------------------------------------------------------------------


def test_artifacts_of_two_models_are_refused_with_both_names(base: Path, tiny_artifact: Path) -> None:
    paths = [base, base, tiny_artifact]
    with pytest.raises(ArtifactError, match=rf"{re.escape(str(base))} and {re.escape(str(tiny_artifact))}.*decoders"):
        evaluate.check_same_model(paths, [read_manifest(path) for path in paths])


def test_what_differs_is_said(base: Path) -> None:
    first = read_manifest(base)
    vision = replace(first.model, vision=replace(first.model.vision, rope_theta=1.0))
    tokenizer = {**first.files, "tokenizer.json": replace(first.files["tokenizer.json"], sha256="0")}
    for what, other in (
        ("vision encoder", replace(first, model=vision)),
        ("tokenizer", replace(first, files=tokenizer)),
    ):
        with pytest.raises(ArtifactError, match=f"their {what}s differ"):
            evaluate.check_same_model([base, base], [first, other])
    evaluate.check_same_model([base, base], [first, replace(first, scheme="int4")])


def test_labels_are_short_and_never_the_same() -> None:
    paths = [Path("a/m0"), Path("b/m0"), Path("int8"), Path("a/m0")]
    assert evaluate.labels_of(paths) == ["a/m0", "b/m0", "int8", "a/m0 (2)"]
    assert evaluate.labels_of([Path()]) == [Path.cwd().name]


# --- the comparison ------------------------------------------------------------------------------------


def test_scores_and_figures_are_each_artifacts_own(
    base: Path, tuned: Path, fast: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ranking.read_set
    monkeypatch.setattr(ranking, "read_set", lambda folder, kind: read(folder, kind)[:3])
    done = json.loads(invoke(base, tuned, "--json", "--repeats", 2, "--threads", 1).stdout)
    assert done["sets"] == {**dict.fromkeys(ranking.KINDS, 3), "all sets": 12}
    first, second = done["artifacts"]
    assert (first["label"], second["label"]) == ("base", "tuned")
    assert second["num_bytes"] == read_manifest(tuned).num_bytes
    for kind in ranking.KINDS:
        items = read(SMALL / "eval", kind)[:3]
        mine, theirs = (
            [
                [r.score for r in Reranker.load(a, threads=1).evaluate([(i.query, d) for d in i.documents])]
                for i in items
            ]
            for a in (tuned, base)
        )
        ndcg = [
            np.mean([ranking.ndcg_at_k(s, i.relevance) for s, i in zip(x, items, strict=True)]) for x in (mine, theirs)
        ]
        assert second["quality"][kind]["ndcg"] == pytest.approx(ndcg[0], abs=1e-9)  # the same sums
        assert first["quality"][kind]["ndcg"] == pytest.approx(ndcg[1], abs=1e-9)
        delta = np.abs(np.subtract(mine, theirs))
        # scores repeat to 1e-5, whatever they were computed beside
        assert second["quality"][kind]["max_delta"] == pytest.approx(delta.max(), abs=2e-5)
        assert second["quality"][kind]["max_delta"] > 0.01, "or these artifacts cannot be told apart"
        assert done["chance"][kind] == pytest.approx(np.mean([ranking.chance_ndcg(i.relevance) for i in items]))
    each = [second["quality"][kind]["ndcg"] for kind in ranking.KINDS]
    assert second["quality"]["all sets"]["ndcg"] == pytest.approx(np.mean(each))  # equal sizes here


def test_artifacts_take_turns_one_measurement_at_a_time(base: Path, tuned: Path, fast: list[Any]) -> None:
    sets = {"set": [Query("line 1", "a bicycle", ("a red car", "two cats"), (1, 0))]}
    loads = {"a": [("q", "d")], "b": [("q", "d")] * 2}
    evaluation, _ = evaluate.compare([base, tuned], sets, loads, threads=1, repeats=2)
    assert fast == [
        *[("memory", name, n) for n in (1, 2) for name in ("base", "tuned")],
        *[("seconds", name, n) for n in (1, 2) for _ in range(2) for name in ("base", "tuned")],
    ]
    ratio = evaluation.artifacts[1].seconds["a"]  # measured fifth to eighth: 2·5 and 0.5·6, then 2·7 and 0.5·8
    assert (ratio.low, ratio.high) == (pytest.approx(10 / 3), pytest.approx(14 / 4))
    assert evaluation.artifacts[0].seconds["a"].ratio == 1
    assert evaluation.artifacts[1].memory["b"].private == 20
    before = len(fast)
    evaluation, _ = evaluate.compare([base], sets, loads, threads=1, speed=False)
    assert {what for what, *_ in fast[before:]} == {"memory"}
    assert evaluation.artifacts[0].seconds == {}


def test_a_line_that_cannot_be_scored_is_left_out_for_all(
    base: Path, tuned: Path, fast: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    pairs = judged(
        tmp_path,
        row(relevance=[1, 0, 0]),
        row(documents=["a", {"image": "broken.png"}], relevance=[1, 0]),
        row(relevance=[0, 0, 0]),
        row(query="two cats", relevance=[0, 1, 0]),
    )
    done = invoke(base, tuned, "--pairs", pairs, "--json", "--threads", 1, code=3)
    report = json.loads(done.stdout)
    assert report["sets"] == {"judged.jsonl": 2}
    assert len(report["errors"]) == 2
    assert report["errors"][0].startswith(f"{pairs}: line 3: no document is relevant")
    assert report["errors"][1].startswith(f"{pairs}: line 2, document 2: document: ")
    for error in report["errors"]:
        assert f"error: {error}" in done.stderr
    for pairs_file, message in (
        (pairs, "line 3"),
        (judged(tmp_path, *pairs.read_text().splitlines()[:2], name="two.jsonl"), "line 2"),
    ):
        with pytest.raises(InputError, match=message):
            invoke(base, tuned, "--pairs", pairs_file, "--strict", "--threads", 1)


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
    evaluation, _ = evaluate.compare([base], {"set": [good, bad]}, threads=1, speed=False)
    assert evaluation.sets == {"set": 1}
    assert re.fullmatch(r"line 2, document 2: .*base: no finite number", evaluation.errors[0])
    with pytest.raises(InputError, match=r"no query could be scored.*line 2"):
        evaluate.compare([base], {"set": [bad]}, threads=1, speed=False)


def test_what_was_cut_is_said_once(tiny_artifact: Path, fast: list[Any], tmp_path: Path) -> None:
    pairs = judged(tmp_path, row(documents=["cat " * 20_000, "a"]))
    done = invoke(tiny_artifact, tiny_artifact, "--pairs", pairs, "--no-speed", "--threads", 1)
    assert done.stderr.count(f"note: {pairs}: line 1, document 1: the document was too long and was cut") == 1


def test_a_measurement_that_fails_costs_the_others_nothing(
    base: Path, tuned: Path, fast: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    works = measure_module._measure

    def fails(what: str, artifact: Path, *rest: Any) -> Any:
        if artifact == tuned:
            raise M0kitError(f"{what} of tuned failed")
        return works(what, artifact, *rest)

    monkeypatch.setattr(measure_module, "_measure", fails)
    pairs = judged(tmp_path, row(relevance=[1, 0, 0]))
    done = invoke(base, tuned, "--pairs", pairs, "--threads", 1, "--html", tmp_path / "r.html", code=3)
    assert re.search(r"tuned +fp32 +– +– +–\n", done.stdout)
    assert "seconds of tuned failed" in done.stderr
    assert done.stderr.count("seconds of tuned failed") == 1, "no further turns"
    assert re.search(r"base +fp32 +10 +30 +20", done.stdout)
    with pytest.raises(M0kitError, match="memory of tuned failed"):
        invoke(base, tuned, "--pairs", pairs, "--threads", 1, "--strict")


# --- processes that measure ----------------------------------------------------------------------------


def test_the_files_own_pairs_are_timed_a_few_of_each_kind(tmp_path: Path) -> None:
    page = {"image": tmp_path / "p.png"}
    queries = [Query(f"line {i}", f"q{i}", (f"d{i}", {"text": f"e{i}"}, page), None) for i in range(7)]
    loads = evaluate.judged_workloads(queries)
    assert {name: len(load) for name, load in loads.items()} == {
        "4 of the file's text pairs": 4,
        "4 of the file's image pairs": 4,
    }
    texts = loads["4 of the file's text pairs"]
    assert texts[0] == ("q0", "d0")
    assert texts[-1] == ("q6", {"text": "e6"}), "spread from the first to the last"
    assert list(evaluate.judged_workloads([Query("line 1", page, ("a", "b"), None)])) == ["2 of the file's image pairs"]


# --- forms ---------------------------------------------------------------------------------------------


def result_of(names: Sequence[str], judged: bool = True, speed: bool = True) -> evaluate.Evaluation:
    artifacts = []
    for i, name in enumerate(names):
        other = (None,) * 5 if i == 0 else (0.1 * i, 0.01, 0.001, 0.99, 0.975)
        quality = evaluate.Quality(0.9 - i / 1000 if judged else None, *other)
        memory = {"load": evaluate.Memory(1, 3, 2, 0.1)}
        seconds = {"load": bench.Timing("load", name, 1.0, 1.0 + i, 1.0, 2.0 + i)} if speed else {}
        artifacts.append(
            evaluate.Measured(name, f"/{name}", "int8", 10**9 // (i + 1), "f", {"set": quality}, memory, seconds)
        )
    return evaluate.Evaluation({"cpu": "<b>"}, {"set": 2}, {"set": 0.5} if judged else {}, tuple(artifacts), ())


def test_tables_are_complete_and_aligned() -> None:
    text = evaluate.to_text(result_of(["a", "bb"]))
    assert re.search(r"^set, 2 queries +scheme +nDCG@10 +loss, points", text)
    assert re.search(r"bb +int8 +0\.8990 +0\.10 +0\.01 +0\.001 +0\.9900 +97\.5%", text)
    assert re.search(r"bb +int8 +500\.0 +50\.0%", text)
    assert re.search(r"bb +int8 +1\.000 +2\.00× +1\.00–3\.00", text)
    assert "\n(chance) " in text
    for block in text.split("\n\n")[:-1]:
        assert len({len(line) for line in block.splitlines()}) == 1


def test_a_file_without_judgements_is_called_agreement_only() -> None:
    text = evaluate.to_text(result_of(["a", "b"], judged=False))
    assert "agreement with the baseline (a) only" in text
    assert "nDCG" not in text
    assert "chance" not in text
    assert "agreement" not in evaluate.to_text(result_of(["a", "b"]))


NASTY = "<img src=x onerror='y'>&\""


@pytest.mark.parametrize("judged", [True, False])
def test_the_page_is_self_contained_and_escapes_what_it_shows(judged: bool) -> None:
    evaluation = replace(result_of([NASTY, "b"], judged), errors=(NASTY,))
    page = evaluate.to_html(evaluation)
    assert "<img" not in page
    assert not re.search(r"<script|<link|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 2
    root = ET.fromstring(page.removeprefix("<!doctype html>\n").replace('<meta charset="utf-8">', "").replace(
        '<meta name="viewport" content="width=device-width, initial-scale=1">', ""))  # fmt: skip
    assert [e.text for e in root.iter("h2")][:2] == ["Quality against size", "Quality against speed"]
    assert not [e for e in root.iter() if {"src", "href"} & set(e.attrib)]
    assert NASTY in [e.text for e in root.iter("li")]
    one = evaluate.to_html(result_of(["a", "b"], speed=False))
    assert one.count("<svg") == 1
    assert "Speed was not measured." in one


def test_dots_stand_where_their_figures_say_and_names_do_not_cover_each_other() -> None:
    names = ["m0-fp32", "m0-fp16", "m0-int8", "m0-int4", "m0-nf4"]
    crowded = dict.fromkeys(names, 1.0) | {"m0-fp32": 4.0, "m0-fp16": 2.0}
    quality: dict[str, float | None] = dict.fromkeys(names, 0.80) | {"m0-fp32": 0.84, "m0-fp16": 0.82}
    root = ET.fromstring(evaluate._scatter(crowded, quality, "GB", "nDCG"))
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]
    assert dots[0][0] > dots[1][0] > dots[2][0], "larger stands further right"
    assert dots[0][1] < dots[1][1] < dots[2][1], "better stands higher"
    assert dots[0][0] - dots[1][0] == pytest.approx(2 * (dots[1][0] - dots[2][0]), abs=0.3)  # pixels are rounded to 0.1
    boxes = []
    for text in root.iter(f"{SVG}text"):
        if text.text in names:
            x, y, width = float(text.attrib["x"]), float(text.attrib["y"]), 7 * len(text.text or "")
            left = x - width if text.attrib.get("text-anchor") == "end" else x
            boxes.append((left, left + width, y))
            assert left > 0
            assert left + width <= 760
            assert 0 < y < 320
    assert len(boxes) == len(names)
    for a, b in combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or abs(a[2] - b[2]) >= 13
    one = ET.fromstring(evaluate._scatter({"a": 1.0, "b": 2.0}, {"a": 0.5, "b": None}, "x", "y"))
    assert len(list(one.iter(f"{SVG}circle"))) == 1


# --- the command ---------------------------------------------------------------------------------------


@linux
def test_the_command_runs_for_real(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    pairs = judged(tmp_path, row(relevance=[2, 0, 1]))
    page = tmp_path / "r.html"
    done = invoke(base, copy, "--pairs", pairs, "--repeats", 1, "--threads", 1, "--html", page)
    assert re.search(r"copy +fp32 +\d\.\d{4} +0\.00 +0 +0 +1\.0000 +100\.0%", done.stdout), "the same files"
    assert "speed: 3 of the file's text pairs" in done.stdout
    assert "memory: 3 of the file's text pairs" in done.stdout
    text = page.read_text("utf-8")
    assert text.count("<svg") == 2
    assert text.index("<h2>Figures") < text.index("<details><summary>Versions"), "what it was made with is folded"


def test_what_cannot_work_is_said_before_anything_slow(base: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    pairs = judged(tmp_path, row())
    with pytest.raises(OutputError, match="there is no folder"):
        invoke(base, "--html", tmp_path / "gone" / "r.html")
    with pytest.raises(ArtifactError, match="not of one model"):
        invoke(base, tiny_artifact, "--pairs", pairs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=MANIFEST):
        invoke(base, tmp_path / "empty", "--pairs", pairs)
    assert "Missing argument" in invoke(code=2).output


def test_a_judged_file_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "judged.jsonl")
    for path in (tmp_path / "judged.jsonl", Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{path}: is a device, a pipe or a socket"):
            evaluate.read_judged(path)
