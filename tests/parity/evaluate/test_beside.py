"""A checkpoint's activations beside small-massive's and published ones: what is kept, and what is said of others."""

from dataclasses import replace

import pytest

from m0kit_parity.evaluate import beside
from m0kit_parity.evaluate.activations import Activations, activation_statistics
from m0kit_parity.small import evaluate
from m0kit_parity.small.files import MASSIVE, SMALL


@pytest.fixture(scope="module")
def found():
    """Of small and of small-massive, on the embedded queries with the first document each."""
    items = [item for kind in evaluate.KINDS for item in evaluate.read_set(SMALL / "eval", kind)]
    pairs = [(item.query, item.documents[0]) for item in items]
    return {folder.name: activation_statistics(folder / "base", pairs) for folder in (SMALL, MASSIVE)}


def test_what_is_kept_of_small_massive_is_what_it_has(found):
    kept = beside.measured()["small-massive"]
    for tower, sizes in beside.sizes_of(found[MASSIVE.name]).items():
        for name, value in kept[tower].items():
            # Kept are four digits; threads and kinds of CPU sum in other orders, which moves the fifth.
            assert getattr(sizes, name) == pytest.approx(value, rel=1e-3), (tower, name)


def test_what_is_no_larger_lives_where_the_figures_hold(found):
    for one in found.values():
        assert "its figures hold here" in beside.to_text(one)


def test_what_is_larger_is_named_with_both_figures(found):
    massive = found[MASSIVE.name]
    rows = beside.sizes_of(massive)["decoder"].row
    norms = tuple(
        replace(one, row=2 * rows) if one.place == "model.layers.3.input_layernorm" else one for one in massive.normed
    )
    told = beside.to_text(Activations(massive.pairs, massive.residual, norms)).rpartition("\n")[2]
    assert f"decoder, rows: largest over median of a token, at most ({2 * rows:.0f}, small-massive {rows:.0f})" in told
    assert "image encoder" not in told
    assert "channels" not in told


def test_without_an_image_nothing_is_said_of_its_encoder(found):
    one = found[MASSIVE.name]
    text_only = Activations(
        one.pairs,
        tuple(each for each in one.residual if each.place.startswith("model.")),
        tuple(each for each in one.normed if each.place.startswith("model.")),
    )
    told = beside.to_text(text_only)
    assert told.startswith("decoder")
    assert "image encoder" not in told
    assert "17,190×" in told.splitlines()[1]  # Qwen2.5-1.5B's, as published
