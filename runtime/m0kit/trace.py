"""Everything one pair produces on its way to a score, stage by stage. The common noun of runtime and parity.

`Reranker.trace(pair)` fills it from an artifact, the PyTorch reference fills it from a checkpoint, and
parity compares the two field by field.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m0kit.errors import ScoreError


@dataclass(frozen=True, slots=True)
class Trace:
    """The stages of one pair. Shape letters are those of `m0kit.config`."""

    token_ids: NDArray[np.int64]  # (T,) the whole prompt with the score token
    positions: NDArray[np.int64]  # (3, T) t, row, column
    grid_thw: NDArray[np.int64]  # (I, 3) frames, rows and columns of patches, in prompt order
    patches: tuple[NDArray[np.float32], ...]  # I × (P, 1176), in prompt order
    image_embeds: tuple[NDArray[np.float32], ...]  # I × (V, D)
    hidden: NDArray[np.float32]  # (D,) last token, after the final norm
    logit: float
    score: float  # sigmoid(logit − bias); NaN where the logit is not finite
    layers: NDArray[np.float32] | None = None  # (num_layers, D) last token after each decoder layer, on request
    error: ScoreError | None = None  # of a logit that is not finite
