"""Scaling channels between two layers without changing the function: which channels there are, and by how much.

Eight bits for the inputs of a product are lost on one channel a thousand times larger than the others. But
a channel that one tensor makes and others take, with nothing nonlinear between, may be made s times smaller
by the first and s times larger by the others: the products are the same. Owns the list of such channels of
jina-reranker-m0 (`channel_groups`), their rescaling (`Rescaled`) and the choice of s (`equalizing_scale`).

    groups = channel_groups(config)
    scales = {group.name: equalizing_scale(weights, group) for group in groups}
    equalized = Rescaled(weights, groups, scales)       # a Weights like the one given

Every s that `equalizing_scale` chooses is a power of two, so that scaling rounds nothing and the function in floating
point stays the same to the bit, unless a value leaves the format's range.

Sources: SmoothQuant (arXiv:2211.10438) with activations from calibration; without them cross-layer
equalisation (arXiv:1906.04721).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from m0kit.config import ModelConfig
from m0kit_quant.weights import Float32, Weights

# Beyond this a weight or its channel is damaged or dead, and fp16 islands would leave their range.
MAX_BITS: Final = 20

# The largest of some ten thousand values of a normalised channel lies about four deviations out.
_LARGEST_DEVIATION = 4.0
# How much coarser weights are than inputs: 63 steps of 7 bits (products of 8 would saturate on older CPUs), 127 of 8.
_COARSER_WEIGHTS = 2.0
_ROWS_AT_ONCE = 512  # a copy of that many rows is in memory while a matrix is measured


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels between tensors that make them and matrices that take them, free to be scaled one by one."""

    name: str  # of the module that makes them: "model.layers.0.input_layernorm"
    producers: tuple[tuple[str, int], ...]  # (tensor, row of its first channel): vectors, matrices by rows
    consumers: tuple[str, ...]  # matrices (out, in), all with the same `columns`
    num_channels: int
    columns: NDArray[np.int64]  # (in,) the channel that each column takes


def channel_groups(config: ModelConfig) -> tuple[ChannelGroup, ...]:
    """All of the model, in the order of the computation. Tensors carry their canonical names.

    Not among them: what passes GELU, QuickGELU or ReLU, which do not commute with a scale or whose scale
    buys nothing, and the final norm, whose output is the hidden state that parity compares.
    """
    v, d = config.vision, config.decoder
    groups: list[ChannelGroup] = []

    def add(name: str, made_by: Iterable[tuple[str, int]], taken_by: Iterable[str], size: int, columns: object) -> None:
        table = np.array(columns, np.int64)
        table.setflags(write=False)
        groups.append(ChannelGroup(name, tuple(made_by), tuple(f"{m}.weight" for m in taken_by), size, table))

    def norm(name: str, bias: bool, taken_by: Iterable[str], size: int, tiles: int = 1) -> None:
        vectors = ("weight", "bias") if bias else ("weight",)
        add(name, ((f"{name}.{vector}", 0) for vector in vectors), taken_by, size, np.tile(np.arange(size), tiles))

    for i in range(v.depth):
        block = f"visual.blocks.{i}"
        qkv, value_rows = f"{block}.attn.qkv", 2 * v.width
        norm(f"{block}.norm1", True, [qkv], v.width)
        values = ((f"{qkv}.weight", value_rows), (f"{qkv}.bias", value_rows))
        add(f"{block}.attn.v", values, [f"{block}.attn.proj"], v.width, np.arange(v.width))
        norm(f"{block}.norm2", True, [f"{block}.mlp.fc1"], v.width)
    # The merger lays the patches of a token side by side: each channel is there once per patch.
    norm("visual.merger.ln_q", True, ["visual.merger.mlp.0"], v.width, tiles=v.merge_size**2)

    # Several query heads read one value head: a channel of it reaches as many columns of o_proj.
    heads = np.arange(d.num_kv_heads).repeat(d.num_heads // d.num_kv_heads)  # (H,)
    read = (heads[:, None] * d.head_dim + np.arange(d.head_dim)).reshape(-1)  # (H·C,)
    for i in range(d.num_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        v_proj, up = f"{attention}.v_proj", f"{mlp}.up_proj"
        projections = (f"{attention}.q_proj", f"{attention}.k_proj", v_proj)
        norm(f"model.layers.{i}.input_layernorm", False, projections, d.hidden_size)
        values = ((f"{v_proj}.weight", 0), (f"{v_proj}.bias", 0))
        add(v_proj, values, [f"{attention}.o_proj"], d.kv_size, read)
        norm(f"model.layers.{i}.post_attention_layernorm", False, (f"{mlp}.gate_proj", up), d.hidden_size)
        inner = d.intermediate_size
        add(up, [(f"{up}.weight", 0)], [f"{mlp}.down_proj"], inner, np.arange(inner))
    return tuple(groups)


class Rescaled:
    """Weights with channels scaled: what makes them divided by s, what takes them multiplied by s.

    `scales` gives s (num_channels,) float32 by the group's name; a group without one is left alone. A tensor
    that no scale touches comes back as it is, not as a copy. Raises ValueError for an unknown group, a wrong
    shape, or an s that is not a positive finite number.
    """

    def __init__(self, weights: Weights, groups: Iterable[ChannelGroup], scales: Mapping[str, Float32]) -> None:
        known = {group.name: group for group in groups}
        self._weights = weights
        self._rows: dict[str, list[tuple[int, Float32]]] = {}  # tensor → (first row, divisors)
        self._columns: dict[str, list[Float32]] = {}  # tensor → factors (in,)
        for name, given in scales.items():
            if name not in known:
                raise ValueError(f"scale for {name!r}: the model has no such group of channels; see channel_groups")
            group = known[name]
            scale = _checked(group, given)
            if np.all(scale == 1):
                continue
            for tensor, first_row in group.producers:
                self._rows.setdefault(tensor, []).append((first_row, scale))
            for tensor in group.consumers:
                self._columns.setdefault(tensor, []).append(scale[group.columns])

    def read(self, name: str) -> Float32:
        """The tensor, float32, scaled. What the source raises passes through."""
        tensor = self._weights.read(name)
        rows, columns = self._rows.get(name, []), self._columns.get(name, [])
        if not rows and not columns:
            return tensor
        scaled = tensor.copy()
        for factors in columns:
            scaled *= factors
        for first, divisors in rows:
            part = scaled[first : first + len(divisors)]
            part /= divisors if scaled.ndim == 1 else divisors[:, None]
        return scaled


def equalizing_scale(
    weights: Weights, group: ChannelGroup, activation: NDArray[np.floating] | None = None, strength: float = 0.5
) -> Float32:
    """s (num_channels,) float32, powers of two, that shares a channel's range between inputs and weights.

    activation: max|x| per channel of what the consumers take, from calibration. Then s = a^strength /
    w^(1 − strength) in units of its median, so that an even group stays as it is: strength 1 moves all of
    the range into the weights, 0 all of it into the inputs.
    Without activation the producer's weights stand for a, and a channel moves only as far as both sides ask.

    Stays 1: a channel that is dead or not finite on either side; a whole group whose ranges promise no gain.
    Reads one tensor at a time. Raises ValueError for an activation of the wrong shape or below 0, or a
    strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength!r}: the share of the range moved into the weights is from 0 to 1")
    inputs = produced(weights, group) if activation is None else np.asarray(activation, np.float64)
    if inputs.shape != (group.num_channels,):
        raise ValueError(
            f"{group.name}: the activation has shape {list(inputs.shape)}, expected max|x| of each of its "
            f"{group.num_channels} channels"
        )
    if bool((inputs < 0).any()):
        raise ValueError(f"{group.name}: the activation holds negative values, expected max|x| of each channel")
    if activation is None and np.ptp(inputs) == 0:  # as behind a norm of a rotated stream: nothing to share
        return np.ones(group.num_channels, np.float32)
    columns = _consumed(weights, group)
    alive = np.isfinite(inputs) & np.isfinite(columns) & (inputs > 0) & (columns > 0)
    scale = np.ones(group.num_channels, np.float32)
    if not alive.any():
        return scale
    a, w = (np.log2(side[alive]) - np.median(np.log2(side[alive])) for side in (inputs, columns))
    if activation is None:
        # A gain is small where training met a channel that is large by itself, and its columns are then as
        # usual. The geometric mean would make such inputs larger still: in a trained model with gains of 1/30
        # on one channel in 50, int8 products came out 1.7 times worse than without, those of this rule as before.
        bits = np.where(a * w < 0, np.sign(a) * np.minimum(np.abs(a), np.abs(w)), 0.0)
    else:
        bits = strength * a - (1 - strength) * w
        bits -= np.median(bits)  # so that rounding leaves as many channels as it can alone
    bits = np.clip(np.rint(bits), -MAX_BITS, MAX_BITS)
    # Whole bits are up to √2 from the best scale, which costs a fairly even group more than it gains. With
    # this choice int8 inputs and 7-bit weights of the small trained model err 0.87 (norms), 1.03 (values) and
    # 0.72 (MLPs) times as much as unscaled; without it 0.84, 1.14 and 0.72, and up to 1.6 in single groups.
    if _predicted_error(a - bits, w + bits) < _predicted_error(a, w):
        scale[alive] = np.exp2(bits)
    return scale


def produced(weights: Weights, group: ChannelGroup) -> NDArray[np.float64]:
    """About max|x| of each channel, up to a common factor: what normalised inputs make of the producers."""
    size = np.zeros(group.num_channels)
    for name, first in group.producers:
        size += _row_sizes(weights.read(name), first, group.num_channels) * (
            1.0 if name.endswith(".bias") else _LARGEST_DEVIATION
        )
    return size


def _predicted_error(a: NDArray[np.float64], w: NDArray[np.float64]) -> float:
    """Error of a product, up to a factor, when each side rounds to steps of its largest channel; a, w: log2 ranges."""
    inputs, columns = np.exp2(a), np.exp2(w)
    of_inputs = inputs.max() * np.linalg.norm(columns)
    of_columns = _COARSER_WEIGHTS * columns.max() * np.linalg.norm(inputs)
    return float(np.hypot(of_inputs, of_columns))


def _row_sizes(tensor: Float32, first: int, count: int) -> NDArray[np.float64]:
    rows = tensor[first : first + count]
    sizes = np.abs(rows) if rows.ndim == 1 else np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return sizes.astype(np.float64)


def _consumed(weights: Weights, group: ChannelGroup) -> NDArray[np.float64]:
    """Largest weight of each channel, in units of the mean |weight| of its row.

    In units of its row, because weights are quantised by rows: how large a row is does not matter to them, and
    without it one large row, which another group may well have made, would speak for the whole column.
    """
    largest = np.zeros(group.num_channels)
    for name in group.consumers:
        np.maximum.at(largest, group.columns, _column_sizes(weights.read(name)))
    return largest


def _column_sizes(matrix: Float32) -> Float32:
    sizes = np.zeros(matrix.shape[1], np.float32)
    for first in range(0, len(matrix), _ROWS_AT_ONCE):
        part = np.abs(matrix[first : first + _ROWS_AT_ONCE])
        with np.errstate(over="ignore"):  # a mean of infinity leaves the channel alone, as what is not finite
            mean = part.mean(axis=1, keepdims=True)
        np.divide(part, mean, out=part, where=mean > 0)
        np.maximum(sizes, part.max(axis=0), out=sizes)
    return sizes


def _checked(group: ChannelGroup, scale: Float32) -> Float32:
    values = np.asarray(scale, np.float32)
    if values.shape != (group.num_channels,):
        raise ValueError(f"scale for {group.name}: has shape {list(values.shape)}, not [{group.num_channels}]")
    if not bool((np.isfinite(values) & (values > 0)).all()):
        raise ValueError(f"scale for {group.name}: holds a value that is not a positive finite number")
    return values
