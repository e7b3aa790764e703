"""Traces of an artifact whose residual stream is in another basis, as if it were in the model's own.

Owns the way back for what a trace holds of the stream; the basis is `m0kit_quant.rotate`'s. A hidden state has been
through the final norm, whose gain the artifact has in its head: the reference lends its own.

    tracer, portable = turned_back(reranker, None, golden.norm())
    tracer.trace(pair).hidden                               # what PyTorch gives
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m0kit.trace import Trace
from m0kit_parity.proof.golden import Tracer
from m0kit_parity.proof.portable import Encoder
from m0kit_quant.rotate import spread

Float32 = NDArray[np.float32]


def turned_back(tracer: Tracer, portable: Encoder | None, norm: Float32) -> tuple[Tracer, Encoder | None]:
    """Both in the model's own basis; `norm` (D,) is the gain of its final norm."""

    def encode(trace: Trace) -> list[Float32]:
        assert portable is not None
        return [_back(embeds) for embeds in portable(trace)]

    return _TurnedBack(tracer, norm), portable and encode


class _TurnedBack:
    """A tracer of what another one traces."""

    def __init__(self, tracer: Tracer, norm: Float32) -> None:
        self._tracer, self._norm = tracer, norm

    def trace(self, pair: tuple[Any, Any], layers: bool = False) -> Trace:
        """Every stage of one pair."""
        trace = self._tracer.trace(pair, layers)
        return replace(
            trace,
            image_embeds=tuple(map(_back, trace.image_embeds)),
            hidden=_back(trace.hidden[None])[0] * self._norm,
            layers=None if trace.layers is None else _back(trace.layers),
        )


def _back(rows: Float32) -> Float32:
    """Of vectors (T, D)."""
    return spread(rows.T, rows.shape[1]).T.astype(rows.dtype)
