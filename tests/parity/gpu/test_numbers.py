"""Numbers of a device against PyTorch: what is compared, and that a wrong kernel shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m0kit_export.export import export_artifact
from m0kit_parity.gpu import numbers
from m0kit_parity.gpu.numbers import judged, kernel_limit, open_golden, open_ways, pairs_of, spearman
from m0kit_parity.gpu.place import Place
from m0kit_parity.reference import Reference
from m0kit_quant.recipe import Recipe


@pytest.fixture(scope="module")
def nf4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "artifact"
    export_artifact(tiny, folder, recipe=Recipe.default("nf4"), progress=False)
    return folder


def test_a_golden_takes_the_weights_of_an_artifact(tiny: Path, nf4: Path) -> None:
    from m0kit.reranker import Reranker

    pairs, ask = [("which?", "a text"), ("which?", "another text of language models")], open_golden()
    plain = Reference.load(tiny).score(pairs, raw=True)
    assert ask(tiny, pairs, "cpu") == pytest.approx(plain.tolist(), abs=1e-6)
    own = ask(tiny, pairs, "cpu", nf4)
    # Sums of floats, and inputs that the first layer and block round to 16 bits.
    assert own == pytest.approx(Reranker.load(nf4).score(pairs, raw=True).tolist(), abs=1e-3)
    assert np.abs(np.subtract(own, plain)).max() > 0.01
    assert ask(tiny, pairs, "cpu") == pytest.approx(plain.tolist(), abs=1e-6)  # of the checkpoint again


def test_pairs_have_texts_and_images_on_both_sides(tiny_artifact: Path) -> None:
    kinds = {tuple(isinstance(side, str) for side in pair) for pair in pairs_of(tiny_artifact, "tiny", 300)}
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


def test_ways_of_computing_a_pair_agree(tiny_artifact: Path) -> None:
    ways = open_ways(tiny_artifact, "cpu", {})(False)
    assert len(ways) == 8
    for way, logits in ways.items():
        assert logits == pytest.approx(ways["alone"], abs=1e-5), way  # sums of floats by several threads


def test_a_kernel_that_is_wrong_shows_and_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "PRECISIONS", ("fp16", "int8", "nf4"))
    golden, place = np.array([1.0, 2.0, 4.0]), Place(Path("nowhere"), "cpu", "tiny", 1e9)
    goldens: dict[Any, Any] = {("tiny", precision): golden for precision in ("", "fp16", "int8", "nf4")}
    found: dict[Any, Any] = {
        ("tiny", "fp16", "cpu"): golden + 0.001,
        ("tiny", "int8", "cpu"): "its process was ended by SIGSEGV.",
        ("tiny", "nf4", "cpu"): np.array([1.0, 2.5, 4.0]),
    }
    told = judged(place, ["tiny"], {"tiny": 3}, goldens, found)
    assert list(told.wrong) == [
        "tiny int8: its process was ended by SIGSEGV.",
        "tiny nf4: 0.500 off what its own weights give; 0.04 is allowed",
    ]
    assert [row[:4] for row in told.tables[0]][2] == ["tiny", "int8", "3", "failed"]
    assert told.facts["tiny nf4"]["max"] == pytest.approx(0.5)


def test_a_logit_that_is_not_finite_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "PRECISIONS", ("fp16",))
    golden, place = np.array([1.0, 2.0]), Place(Path("nowhere"), "cpu", "tiny", 1e9)
    found: dict[Any, Any] = {("tiny", "fp16", "cpu"): np.array([1.0, np.nan])}
    told = judged(place, ["tiny"], {"tiny": 2}, {("tiny", ""): golden, ("tiny", "fp16"): golden}, found)
    assert len(told.wrong) == 1


def test_limits_of_a_gpu_are_those_of_its_products() -> None:
    assert kernel_limit("fp16", on_gpu=True) == kernel_limit("int4", on_gpu=True) < kernel_limit("bf16", on_gpu=True)
    assert kernel_limit("nf4", on_gpu=False) < kernel_limit("int4", on_gpu=False)


def test_ranks_that_agree_correlate() -> None:
    assert spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2.0, 9.0]), np.array([0.3, 0.2, 0.1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([5.0, 5.0, 6.0])) == pytest.approx(1)
