"""Positions are transformers' positions: M-RoPE of a prompt, row and column of patches."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m0kit.scoring.positions import mrope_positions, position_after, vision_positions

if TYPE_CHECKING:
    from m0kit_parity.reference import Reference

PAD = 7
grids = st.tuples(st.just(1), st.integers(1, 9).map(lambda n: 2 * n), st.integers(1, 9).map(lambda n: 2 * n))
# Texts around and between images: at least one token between two images (vision end and start in a prompt).
mixes = st.tuples(st.integers(0, 20), st.lists(st.tuples(grids, st.integers(1, 20)), max_size=4))
Mix = tuple[int, list[tuple[tuple[int, int, int], int]]]


def tokens(mix: Mix) -> tuple[np.ndarray, np.ndarray]:
    before, images = mix
    token_ids = [1] * before
    for (frames, rows, columns), after in images:
        token_ids += [PAD] * (frames * rows * columns // 4) + [1] * after
    return np.asarray(token_ids, np.int64), np.asarray([grid for grid, _ in images], np.int64).reshape(-1, 3)


@settings(max_examples=300)
@given(mixes.filter(lambda mix: mix[0] or mix[1]))
def test_prompt_positions_are_transformers_positions(reference: "Reference", mix: Mix) -> None:
    token_ids, grid_thw = tokens(mix)
    torch = pytest.importorskip("torch")
    ids = torch.from_numpy(token_ids)[None]
    expected, _ = reference.core.get_rope_index(
        ids,
        mm_token_type_ids=(ids == PAD).int(),
        image_grid_thw=torch.from_numpy(grid_thw) if len(grid_thw) else None,
        attention_mask=torch.ones_like(ids),
    )
    mine = mrope_positions(token_ids, grid_thw, PAD, merge_size=2)
    assert mine.dtype == np.int64
    assert mine.tolist() == expected[:, 0].tolist()


def test_text_after_an_image_goes_on_from_the_highest_position() -> None:
    token_ids = np.array([1, 1, *[PAD] * 6, 1, 1])
    got = mrope_positions(token_ids, np.array([[1, 4, 6]]), PAD, 2)
    assert got.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


@settings(max_examples=300)
@given(mixes, st.integers(0, 20), mixes)
def test_a_suffix_stands_where_it_does_in_the_whole(prefix: Mix, lost: int, suffix: Mix) -> None:
    """Behind all of the images of a prefix, and any of the text after them; with images of its own."""
    before, grids = tokens(prefix)
    after, own = tokens(suffix)
    text = next((len(before) - 1 - i for i in np.flatnonzero(before == PAD)[::-1]), len(before))
    used = before[: len(before) - min(lost, text)]
    whole = mrope_positions(np.concatenate([used, after]), np.concatenate([grids, own]), PAD, 2)
    start = position_after(len(used), grids, 2)
    np.testing.assert_array_equal(mrope_positions(after, own, PAD, 2, start), whole[:, len(used) :], strict=True)


@settings(max_examples=200)
@given(grids)
def test_patch_positions_are_transformers_positions(grid: tuple[int, int, int]) -> None:
    torch = pytest.importorskip("torch")
    vision_utils = pytest.importorskip("transformers.vision_utils")
    expected = vision_utils.get_vision_position_ids(torch.tensor([grid]), 2)
    mine = vision_positions(np.array(grid), merge_size=2)
    assert mine.dtype == np.int64
    assert mine.tolist() == expected.tolist()


def test_patches_of_one_group_stand_together() -> None:
    assert vision_positions(np.array([1, 2, 4]), 2).tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1],
        [0, 2], [0, 3], [1, 2], [1, 3],
    ]  # fmt: skip
    assert vision_positions(np.array([2, 2, 2]), 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] * 2


@pytest.mark.parametrize(
    ("token_ids", "grids", "message"),
    [
        ([1, PAD, PAD], [[1, 2, 2]], "2 image pads for images of \\[1\\] visual tokens"),
        ([1, 1], [[1, 2, 2]], "0 image pads"),
        ([PAD, 1], [], "1 image pads for images of \\[\\]"),
        ([PAD, 1, PAD], [[1, 2, 4]], "not in one row"),
        ([PAD, 1, PAD, PAD], [[1, 2, 4], [1, 2, 2]], "not in one row"),
    ],
)
def test_pads_that_do_not_match_the_images_are_refused(
    token_ids: list[int], grids: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(np.array(token_ids), np.array(grids, np.int64).reshape(-1, 3), PAD, 2)
