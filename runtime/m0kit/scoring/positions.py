"""Where tokens and patches stand: M-RoPE positions of a prompt, row and column of patches. Pure numpy.

positions = mrope_positions(token_ids, grid_thw, image_pad_id=151655, merge_size=2)
position = position_after(770, [grid_thw], merge_size=2)     # of the first token of a suffix behind 770 tokens
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def mrope_positions(token_ids: Int64, grid_thw: Int64, image_pad_id: int, merge_size: int, position: int = 0) -> Int64:
    """Positions (3, T): frame, row and column of each token of one prompt, or of a part of one from `position` on.

    token_ids (T,); grid_thw (I, 3) of its images in order, in patches. Text advances all three axes
    together; an image's tokens count frames, rows and columns from where it starts; the text after it goes
    on from the highest position + 1. Mirrors Qwen2-VL's `get_rope_index` (arXiv:2409.12191, 2.1).
    Raises ValueError when the pads do not match the grids.
    """
    pads = np.nonzero(token_ids == image_pad_id)[0]
    if not len(pads) and not len(grid_thw):
        return _text(position, len(token_ids))
    sizes = grid_thw.reshape(-1, 3) // np.array([1, merge_size, merge_size])
    if sizes.prod(axis=1).sum() != len(pads):
        raise ValueError(f"{len(pads)} image pads for images of {sizes.prod(axis=1).tolist()} visual tokens")
    parts: list[Int64] = []
    start = used = 0
    for size in sizes:
        count = int(size.prod())
        first = int(pads[used])
        if int(pads[used + count - 1]) != first + count - 1:
            raise ValueError(f"the pads of an image of {count} visual tokens are not in one row")
        parts.append(_text(position, first - start))
        position += first - start
        parts.append(np.indices(size).reshape(3, -1) + position)
        position += int(size.max())
        start, used = first + count, used + count
    parts.append(_text(position, len(token_ids) - start))
    return np.concatenate(parts, axis=1).astype(np.int64)


def position_after(length: int, grids: Iterable[Int64], merge_size: int) -> int:
    """The position of text behind `length` tokens of a prompt with all of these images in it; grids (3,) in patches."""
    for grid_thw in grids:
        frames, rows, columns = grid_thw.tolist()
        size = frames, rows // merge_size, columns // merge_size
        length += max(size) - size[0] * size[1] * size[2]
    return length


def vision_positions(grid_thw: Int64, merge_size: int) -> Int64:
    """Row and column (P, 2) of each patch of one image, in the order in which 2×2 groups are merged."""
    frames, rows, columns = grid_thw.tolist()
    grid = np.indices((rows, columns)).reshape(2, rows // merge_size, merge_size, columns // merge_size, merge_size)
    return np.tile(grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2), (frames, 1)).astype(np.int64)


def _text(start: int, length: int) -> Int64:
    return np.tile(np.arange(start, start + length, dtype=np.int64), (3, 1))
