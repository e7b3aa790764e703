"""What the command prints, its page, and its exit codes."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parity.evaluate.conftest import invoke, judged, row

from m0kit import Reranker
from m0kit.artifact.manifest import MANIFEST, read_manifest
from m0kit.errors import ArtifactError, InputError, M0kitError, OutputError
from m0kit_parity.evaluate import compare as comparing
from m0kit_parity.small import evaluate as ranking
from m0kit_parity.small.files import SMALL

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_scores_and_figures_are_each_artifacts_own(
    base: Path, tuned: Path, fast: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ranking.read_set
    monkeypatch.setattr("m0kit_parity.evaluate.judged.read_set", lambda folder, kind: read(folder, kind)[:3])
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


def test_as_many_queries_are_drawn_as_are_asked_for(base: Path, tuned: Path, fast: list[Any]) -> None:
    done = json.loads(invoke(base, tuned, "--draw", 22, "--threads", 1, "--no-speed", "--json").stdout)
    assert done["sets"] == {"text": 8, "across": 5, "code": 5, "pages": 4, "all sets": 22}
    assert done["about"]["pairs"] == "22 drawn"
    first, second = (artifact["quality"] for artifact in done["artifacts"])
    assert first["all sets"]["interval"] is None
    low, high = second["all sets"]["interval"]
    assert low < second["all sets"]["loss"] < high
    assert second["text"]["interval"] is None, "eight queries tell nothing"
    assert done["verdicts"] == {"base": None, "tuned": None}, "fp32 has no limit"


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


def test_what_was_cut_is_said_once(tiny_artifact: Path, fast: list[Any], tmp_path: Path) -> None:
    pairs = judged(tmp_path, row(documents=["cat " * 20_000, "a"]))
    done = invoke(tiny_artifact, tiny_artifact, "--pairs", pairs, "--no-speed", "--threads", 1)
    assert done.stderr.count(f"note: {pairs}: line 1, document 1: the document was too long and was cut") == 1


def test_a_measurement_that_fails_costs_the_others_nothing(
    base: Path, tuned: Path, fast: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    def failing(what: str, works: Callable[..., Any]) -> Callable[..., Any]:
        def measure(artifact: Path, *rest: Any, **options: Any) -> Any:
            if artifact == tuned:
                raise M0kitError(f"{what} of tuned failed")
            return works(artifact, *rest, **options)

        return measure

    for what in ("memory", "seconds"):
        works = getattr(comparing, f"measure_{what}")
        monkeypatch.setattr(comparing, f"measure_{what}", failing(what, works))
    pairs = judged(tmp_path, row(relevance=[1, 0, 0]))
    done = invoke(base, tuned, "--pairs", pairs, "--threads", 1, "--html", tmp_path / "r.html", code=3)
    assert re.search(r"tuned +fp32 +– +– +–\n", done.stdout)
    assert "seconds of tuned failed" in done.stderr
    assert done.stderr.count("seconds of tuned failed") == 1, "no further turns"
    assert re.search(r"base +fp32 +10 +30 +20", done.stdout)
    with pytest.raises(M0kitError, match="memory of tuned failed"):
        invoke(base, tuned, "--pairs", pairs, "--threads", 1, "--strict")


@linux
def test_the_command_runs_for_real(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    pairs = judged(tmp_path, row(relevance=[2, 0, 1]))
    page = tmp_path / "r.html"
    done = invoke(base, copy, "--pairs", pairs, "--repeats", 1, "--threads", 1, "--html", page)
    assert re.search(r"copy +fp32 +\d\.\d{4} +0\.00 +– +0 +0 +1\.0000 +100\.0%", done.stdout), "the same files"
    assert "speed: 3 of the file's text pairs" in done.stdout
    assert "memory: 3 of the file's text pairs" in done.stdout
    text = page.read_text("utf-8")
    assert text.count('<svg class="plot"') == 3
    assert text.index("<h2>Figures") < text.index("<summary>Versions, hashes"), "what it was made with is folded"
    assert "No documents changed places." in text, "the same files"


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
    assert "give one of them" in invoke(base, "--pairs", pairs, "--draw", 8, code=2).output
    assert "x>=4" in invoke(base, "--draw", 3, code=2).output
