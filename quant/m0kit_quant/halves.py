"""What float16 loses of a model's matrices, and what holds those of which it loses too much.

float16 keeps 11 bits of a value from 2^-14 to 65504; below, steps of 2^-24 are all there is, and above there is
nothing. A checkpoint can have most of a channel there and mean it: what makes the channel is larger by as much. Owns
measuring that and choosing the format; sharing the ranges out so that less is lost is `equalize`.

    fit = fit_halves(weights, config, schemes, multiplied, equalize=True)
    weights = Rescaled(weights, channel_groups(config), fit.scales)
    recipe = recipe.storing({name: each.scheme for name, each in fit.wider.items()})
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from m0kit.config import ModelConfig
from m0kit_quant.equalize import ChannelGroup, Rescaled, channel_groups, equalizing_scale, produced
from m0kit_quant.floats import FLOATS
from m0kit_quant.int8 import by_rows
from m0kit_quant.scheme import Scheme
from m0kit_quant.weights import Float32, Weights

# What a row or a column may lose outside the normal range: root of the sum of squares of what changes, as part of that
# of the values. It is what rounding to 11 bits costs everywhere (2^-11/√3 of a value between 1 and 2), so that the two
# together are never much more than that; a usual row of weights loses 1e-7.
MAX_LOSS: Final = 2.0**-12

_SMALLEST: Final = float(np.finfo(np.float16).smallest_normal)
_LARGEST: Final = float(np.finfo(np.float16).max)
# An input below the normal range is off by up to half a step of 2^-24; the mean square of that error is step²/12.
_INPUT_ERROR: Final = 2.0**-24 / sqrt(12)


@dataclass(frozen=True, slots=True)
class Wider:
    """A matrix that is not stored in float16 after all."""

    scheme: str  # "bf16" or "fp32"
    lost: float  # what float16 would lose of a row or a column; infinite where a value leaves its range


@dataclass(frozen=True, slots=True)
class Fit:
    """What keeps float16 from losing more than MAX_LOSS: channels to scale, and matrices to store wider."""

    scales: Mapping[str, Float32]  # by the name of the group, as `Rescaled` takes them
    wider: Mapping[str, Wider]  # by the name of the matrix


def fit_halves(
    weights: Weights,
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    multiplied: Collection[str],
    *,
    equalize: bool,
    done: Callable[[str], object] = lambda _: None,
) -> Fit:
    """Where the matrices stored in float16 lose too much: share out the ranges if `equalize`, then store wider.

    Nothing changes, to the byte, where nothing is lost. `schemes` says how each tensor is stored, `multiplied` names
    the matrices whose products are computed in float16; `done` hears each matrix once it was measured.
    """
    losing = losses(weights, config, schemes, multiplied, done=done)
    scales: dict[str, Float32] = {}
    if losing and equalize:
        groups = channel_groups(config)
        # Consumers that lose bits had their ranges shared out before.
        free = [group for group in groups if all(schemes[name].is_float for name in group.consumers)]
        scales = {group.name: equalizing_scale(weights, group) for group in free if _members(group) & losing.keys()}
        touched = {name for group in groups if group.name in scales for name in _members(group)}
        weights = Rescaled(weights, groups, scales)
        losing = losses(weights, config, schemes, multiplied, touched | losing.keys())
    wider = {name: Wider(_wider_scheme(weights.read(name)), lost) for name, lost in losing.items()}
    return Fit(scales, wider)


def losses(
    weights: Weights,
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    multiplied: Collection[str],
    names: Collection[str] | None = None,
    done: Callable[[str], object] = lambda _: None,
) -> dict[str, float]:
    """Matrices stored in float16 of which a row or a column loses more than MAX_LOSS → the largest such part.

    `names` limits the search; the rest as of `fit_halves`. A row counts with its inputs, as far as the weights tell
    how large they are, and with its bias: a column of next to nothing that meets inputs of usual size is no loss.
    """
    wanted = [name for name, scheme in schemes.items() if scheme.name == "fp16" and name.endswith(".weight")]
    groups = {consumer: group for group in channel_groups(config) for consumer in group.consumers}
    known: dict[str, NDArray[np.float64]] = {}
    found = {}
    for name in wanted if names is None else [name for name in wanted if name in names]:
        inputs = None
        if group := groups.get(name):
            if group.name not in known:
                known = {group.name: produced(weights, group)}  # consumers of a group come right after one another
            inputs = known[group.name][group.columns]
        bias = name.removesuffix("weight") + "bias"
        matrix = weights.read(name)
        offsets = weights.read(bias) if bias in schemes else None
        loss = loss_of(matrix.reshape(len(matrix), -1), inputs, offsets, multiplied=name in multiplied)
        if loss > MAX_LOSS:
            found[name] = loss
        done(name)
    return found


def loss_of(
    matrix: Float32,
    inputs: NDArray[np.float64] | None = None,
    bias: Float32 | None = None,
    *,
    multiplied: bool = False,
) -> float:
    """The largest part that a row of (N, K) loses outside float16's normal range; infinite where a value is above it.

    `inputs` is max|x| of each input (K,). Without it columns count by themselves, as rows do. `multiplied`: the product
    is in float16, so that inputs and outputs, too, lose what lies outside.
    """
    num_rows, width = matrix.shape
    sizes = np.ones(width) if inputs is None else inputs
    offsets = np.zeros(num_rows, np.float32) if bias is None else bias
    largest, input_error = (_LARGEST, _INPUT_ERROR) if multiplied and inputs is not None else (np.inf, 0.0)
    scale = float(sizes.max()) or 1.0
    if scale > largest or not np.isfinite(scale):
        return np.inf
    sizes = sizes / scale  # of any unit; so that squares stay within float32
    rows = np.empty(num_rows)
    of_columns: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def measure(first: int, end: int) -> None:
        values = matrix[first:end]
        usual, row, column, small, lost = _parted(values)
        met = usual * sizes.astype(np.float32)
        size = np.einsum("ij,ij->i", met, met).astype(np.float64) + _sums(
            row, (small * sizes[column]) ** 2, len(values)
        )
        error = _sums(row, (lost * sizes[column]) ** 2, len(values))
        if input_error:
            squares = np.einsum("ij,ij->i", usual, usual).astype(np.float64)
            error += (squares + _sums(row, small**2, len(values))) * (input_error / scale) ** 2
        offset, offset_lost = offsets[first:end].astype(np.float64), _lost(offsets[first:end]).astype(np.float64)
        size += (offset / scale) ** 2
        error += (offset_lost / scale) ** 2
        beyond = np.isinf(_lost(np.abs(values).max(axis=1))) | (size > (largest / scale) ** 2)
        rows[first:end] = np.where(beyond, np.inf, _part(error, size))
        if inputs is None:
            whole = np.einsum("ij,ij->j", usual, usual).astype(np.float64) + _sums(column, small**2, width)
            of_columns[first] = _sums(column, lost**2, width), whole

    by_rows(measure, num_rows, width)
    if inputs is not None:
        return float(rows.max())
    lost, whole = (sum(of_columns[first][i] for first in sorted(of_columns)) for i in (0, 1))
    return float(max(rows.max(), _part(np.asarray(lost), np.asarray(whole)).max()))


def _parted(
    values: Float32,
) -> tuple[Float32, NDArray[np.intp], NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Values in float16's range with zeros for the others, and of those below it: row, column, value and what is lost.

    The second are few, and may be too small for squares in float32. Values above the range are left to the caller.
    """
    size = np.abs(values)
    row, column = np.nonzero((size < _SMALLEST) & (size > 0))
    small = values[row, column]
    usual = np.where((size < _SMALLEST) | (size > _LARGEST), np.float32(0), values)
    return usual, row, column, small.astype(np.float64), _lost(small).astype(np.float64)


def _lost(values: Float32) -> Float32:
    """What float16 changes in the values outside its normal range; infinite where it has no such value."""
    with np.errstate(over="ignore"):
        changed = values.astype(np.float16).astype(np.float32) - values
    return np.where((np.abs(values) < _SMALLEST) | ~np.isfinite(changed), changed, np.float32(0))


def _sums(place: NDArray[np.intp], values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    return np.bincount(place, values, count).astype(np.float64)


def _part(error: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root of error/size; infinite where the error is not finite, nothing of nothing is nothing."""
    part = np.sqrt(np.divide(error, size, out=np.zeros_like(size), where=size > 0))
    return np.where(np.isfinite(error), part, np.inf)


def _members(group: ChannelGroup) -> set[str]:
    """The tensors on both sides of a group."""
    return {*group.consumers, *(name for name, _ in group.producers)}


def _wider_scheme(matrix: Float32) -> str:
    """ "bf16" where that holds every value exactly, in as many bytes; else "fp32"."""
    with np.errstate(over="ignore"):
        held = np.array_equal(matrix.astype(FLOATS["bf16"]).astype(np.float32), matrix)
    return "bf16" if held else "fp32"
