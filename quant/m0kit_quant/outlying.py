"""Columns of a matrix that stand far out: found, so that the matrix can be stored wider. Owns when they do.

    found = outlying(weights, schemes)              # {"visual.blocks.0.mlp.fc2.weight": 588.0}
    recipe = recipe.storing(dict.fromkeys(found, WIDER))

What writes massive activations into the residual stream are a few columns of one matrix ("super weights",
arXiv:2411.07191). A scale serves a row or a block of it, so next to a column a hundred times as large the others are
rounded to almost nothing, and where the stream is put into another basis (`rotate`), in every row.
"""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from m0kit_quant.scheme import Scheme
from m0kit_quant.weights import Weights

# Times the median column: of the 127 steps of 8 bits eight are left for it then. Matrices of the trained small
# checkpoint reach 3.7 in the default recipes' basis, random ones of full width 1.7; of small-massive the two that write
# massive activations have 588 and 32, all others 9.0 and less.
FAR: Final = 16.0
WIDER: Final = "bf16"  # has float32's range on every device


def outlying(
    weights: Weights, schemes: Mapping[str, Scheme], done: Callable[[str], object] = lambda _: None
) -> dict[str, float]:
    """Matrices in fewer bits that have a column FAR out → its largest |w| over the median column's.

    `schemes` says how each tensor is stored; `done` hears each matrix once it was looked at.
    """
    found = {}
    for name in losing(schemes):
        matrix = weights.read(name)
        columns = np.abs(matrix.reshape(len(matrix), -1)).max(axis=0)
        median = float(np.median(columns))
        if median and columns.max() > FAR * median:
            found[name] = float(columns.max()) / median
        done(name)
    return found


def losing(schemes: Mapping[str, Scheme]) -> list[str]:
    """Those of the matrices that are multiplied and rounded to fewer bits."""
    return [name for name, scheme in schemes.items() if not (scheme.is_float or scheme.table)]
