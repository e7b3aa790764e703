"""What fewer bits cost in ranking: nDCG@10 of the small trained model, as it is and with outliers put into it.

Losses are against the same model in fp32, over every second query of the held-out sets together: texts, texts across
languages, code and pages.
"""

from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.quant.conftest import Made

from m0kit import Reranker
from m0kit_export.export import export_artifact
from m0kit_parity.small.evaluate import KINDS, Item, ndcg_at_k, read_set
from m0kit_parity.small.files import SMALL
from m0kit_quant.recipe import Recipe

# Points of nDCG@10 that a precision may cost: the project's goals.
GOALS = {"fp16": 0.0, "int8": 0.2, "int4": 1.0, "nf4": 1.0}
# Root of the mean squared change of a score (0 to 1), a third above what was seen, with outliers (fp16, int8) or
# without (int4, nf4): it sees what a ranking of ten happens to forgive.
CHANGES = {"fp16": 1e-4, "int8": 0.015, "int4": 0.036, "nf4": 0.028}


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [item for kind in KINDS for item in read_set(SMALL / "eval", kind)[::2]]


@pytest.fixture(scope="module")
def exact(made: Made, items: list[Item]) -> list[NDArray[np.float32]]:
    return scores_of(made("fp32"), items)


def scores_of(folder: Path, items: list[Item]) -> list[NDArray[np.float32]]:
    """Scores of each query's documents."""
    pairs = [(item.query, {"image": d} if isinstance(d, Path) else d) for item in items for d in item.documents]
    scores = Reranker.load(folder, threads=1).score(pairs)
    return np.split(scores, np.cumsum([len(item.documents) for item in items])[:-1])


def loss(scores: list[NDArray[np.float32]], exact: list[NDArray[np.float32]], items: list[Item]) -> float:
    """Points of nDCG@10."""
    quality = [
        fmean(ndcg_at_k(s.tolist(), item.relevance) for s, item in zip(found, items, strict=True))
        for found in (exact, scores)
    ]
    return 100 * (quality[0] - quality[1])


def change(scores: list[NDArray[np.float32]], exact: list[NDArray[np.float32]]) -> float:
    return float(np.sqrt(np.mean(np.square(np.concatenate(scores) - np.concatenate(exact)))))


@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
@pytest.mark.parametrize("precision", GOALS)
def test_a_precision_costs_no_more_than_its_goal(
    made: Made, items: list[Item], exact: list[NDArray[np.float32]], precision: str, outliers: bool
) -> None:
    """With outliers, too, against the model without: it computes the same."""
    scores = scores_of(made(precision, outliers), items)
    assert loss(scores, exact, items) <= GOALS[precision] + 1e-9
    assert change(scores, exact) <= CHANGES[precision]


def test_the_measure_sees_what_outliers_do_without_equalisation(
    spiky: Path, tmp_path: Path, items: list[Item], exact: list[NDArray[np.float32]]
) -> None:
    """The goal is met for the reason we think: the same weights in the same eight bits, ranges as they came."""
    raw = {**Recipe.default("int8").to_dict(), "equalize": False}
    export_artifact(spiky, tmp_path / "unequal", recipe=Recipe.from_dict(raw, "test"), progress=False)
    scores = scores_of(tmp_path / "unequal", items)
    assert loss(scores, exact, items) > 10 * GOALS["int8"]
    assert change(scores, exact) > 5 * CHANGES["int8"]
