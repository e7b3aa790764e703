"""What the decoder keeps of a document: keys and values of its prefix in every layer. Owns their forms.

A state is computed once and read by any number of suffixes. Its form (`kv`) is "fp32", as computed; "fp16"; or
"int8": a byte for each, between the lowest and the highest value of its channel in the document. A scale for each
token, which KIVI (arXiv:2402.02750) takes for values, was measured: nearly twice the error in scores. The first token
stays as computed: attention rests on it, and its values are unlike all others (KVQuant, arXiv:2401.18079).
L layers, K heads, T tokens, C head width.

    state = State.from_presents(out, slice(0, 770), config.decoder, "fp16")
    feeds = Pasts(config.decoder, "fp16").feeds([state])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from m0kit.artifact.ports import STORED, past_names, present_names, table_names
from m0kit.config import DecoderConfig

Array = NDArray[Any]

DTYPES: Final[dict[str, np.dtype[Any]]] = {kv: np.dtype(name) for kv, name in STORED.items()}
_LEVELS: Final = 255


@dataclass(frozen=True, slots=True)
class State:
    """Keys and values of T tokens; the table has no layers where nothing was quantised."""

    kv: Array  # (L, 2, K, T, C): keys, values
    table: NDArray[np.float32]  # (L, 2, 3, K, C): scale and lowest value of each channel, the first token

    @property
    def length(self) -> int:
        return int(self.kv.shape[3])

    @property
    def buffers(self) -> tuple[Array, ...]:
        """What is written, one after the other."""
        return self.kv, self.table

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.buffers)

    @property
    def is_finite(self) -> bool:
        """Whether every value is a number: not where a graph overflowed, nor where a value was too large for fp16."""
        return all(part.dtype == np.uint8 or bool(np.isfinite(part).all()) for part in self.buffers)

    @classmethod
    def from_presents(cls, out: Mapping[str, Array], rows: slice, config: DecoderConfig, kv: str) -> "State":
        """Rows of a run's outputs `present_names` (K, T, C), copied."""
        layers, heads, width = config.num_layers, config.num_kv_heads, config.head_dim
        kept = np.empty((layers, 2, heads, rows.stop - rows.start, width), DTYPES[kv])
        table = np.empty((layers if kv == "int8" else 0, 2, 3, heads, width), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # `is_finite` tells
            for layer in range(layers):
                for i, name in enumerate(present_names(layer)):
                    values = out[name][:, rows]
                    if kv == "int8":
                        kept[layer, i], table[layer, i] = _rounded(values)
                    else:
                        kept[layer, i] = values
        return cls(kept, table)

    @classmethod
    def from_bytes(cls, raw: NDArray[np.uint8], config: DecoderConfig, kv: str) -> "State":
        """The state whose `buffers` were written, as views. Raises ValueError when the size cannot be one."""
        layers, heads, width = config.num_layers, config.num_kv_heads, config.head_dim
        scaled = layers if kv == "int8" else 0
        fixed, per_token = 4 * 6 * scaled * heads * width, 2 * layers * heads * width * DTYPES[kv].itemsize
        length, rest = divmod(raw.size - fixed, per_token)
        if rest or length < 0:
            raise ValueError(f"{raw.size} bytes are not keys and values of a whole number of tokens")
        end = length * per_token
        return cls(
            raw[:end].view(DTYPES[kv]).reshape(layers, 2, heads, length, width),
            raw[end:].view(np.float32).reshape(scaled, 2, 3, heads, width),
        )


def _rounded(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(K, T, C) → bytes of that shape and (3, K, C): scale, lowest value, first token."""
    first, rest = values[:, 0], values[:, 1:]
    low, high = (rest.min(1), rest.max(1)) if rest.shape[1] else (np.zeros_like(first), np.zeros_like(first))
    scale = np.maximum(high - low, np.finfo(np.float32).tiny * _LEVELS) / np.float32(_LEVELS)
    kept = np.zeros(values.shape, np.uint8)  # the first token's are never read
    kept[:, 1:] = np.clip(np.rint((rest - low[:, None]) / scale[:, None]), 0, _LEVELS)
    return kept, np.stack([scale, low, first])


class Pasts:
    """Feeds past_key_values.* for the states of a run. Keeps its memory from run to run; for one thread."""

    def __init__(self, config: DecoderConfig, kv: str) -> None:
        self._config, self._kv = config, kv
        self._memory: Array = np.empty(0, DTYPES[kv])

    def feeds(self, states: Sequence[State]) -> dict[str, Array]:
        """One after the other along the tokens; a single state is fed where it lies."""
        config = self._config
        layers, heads, width = config.num_layers, config.num_kv_heads, config.head_dim
        if len(states) == 1:
            kv = states[0].kv
        else:
            total = sum(state.length for state in states)
            size = 2 * layers * heads * total * width
            if self._memory.size < size:
                self._memory = np.empty(size, DTYPES[self._kv])  # fresh memory costs more than the copy
            kv = self._memory[:size].reshape(layers, 2, heads, total, width)
            start = 0
            for state in states:
                kv[:, :, :, start : start + state.length] = state.kv
                start += state.length
        feeds = {name: kv[layer, i] for layer in range(layers) for i, name in enumerate(past_names(layer))}
        if self._kv == "int8":
            # Without a past an empty table for the pieces that name past 0 all the same.
            tables = [s.table for s in states] or [np.zeros((layers, 2, 3, heads, width), np.float32)]
            for layer in range(layers):
                for i, name in enumerate(table_names(layer)):
                    feeds[name] = np.stack([table[layer, i] for table in tables])
        return feeds
