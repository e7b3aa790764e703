"""What a model's products see on real inputs, and the channel scales that follow from it.

Owns the statistics and the choice; collecting them is `m0kit_export.calibrate`, applying the scales is `equalize`.

    scales = channel_scales(weights, config, schemes, calibration)
    Rescaled(weights, channel_groups(config), scales)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from m0kit.config import ModelConfig
from m0kit_quant.equalize import ChannelGroup, channel_groups, equalizing_scale
from m0kit_quant.int8 import LEVELS
from m0kit_quant.scheme import Scheme
from m0kit_quant.weights import Float32, Weights

# How much of a channel's range the weights take (SmoothQuant's α), and the powers of a channel's size of AWQ
# (arXiv:2306.00978): whichever predicts the smallest error.
_STRENGTHS: Final = (0.25, 0.5, 0.75)
_POWERS: Final = (0.25, 0.5, 0.75, 1.0)
_SAMPLED_ROWS: Final = 256  # of each matrix, evenly spread: enough to compare seven scales


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Statistics of the inputs x (·, K) of each product, by the name of its module."""

    peak: Mapping[str, Float32]  # (K,) max|x|
    energy: Mapping[str, Float32]  # (K,) mean of x², text and images counting alike
    about: Mapping[str, Any]  # numbers of pairs and the hash of their file, for the manifest

    def importance(self, config: ModelConfig, scales: Mapping[str, Float32]) -> dict[str, Float32]:
        """By matrix: how much the error of each input (K,) counts once the channels are scaled so."""
        energy = {f"{module}.weight": values for module, values in self.energy.items()}
        for group in channel_groups(config):
            if group.name in scales:
                columns = scales[group.name][group.columns]
                energy |= {name: energy[name] / columns**2 for name in group.consumers if name in energy}
        return {name: floored(values) for name, values in energy.items()}


def channel_scales(
    weights: Weights,
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    calibration: Calibration | None,
    done: Callable[[str], object] = lambda _: None,
) -> dict[str, Float32]:
    """The scale of every group of channels whose consumers lose bits; `done` hears each group's name.

    `schemes` says how each matrix is going to be stored.
    Without calibration the weights alone decide. With it, the scale with the smallest predicted error of the
    products among none at all, SmoothQuant's at three strengths and AWQ's at four.
    """
    scales = {}
    for group in channel_groups(config):
        if not all(schemes[name].is_float for name in group.consumers):
            if calibration is None:
                scales[group.name] = equalizing_scale(weights, group)
            else:
                scales[group.name] = _best_scale(weights, group, schemes, calibration)
        done(group.name)
    return scales


class _Held:
    """The few tensors of a group, read once for all that is tried on them."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._read: dict[str, Float32] = {}

    def read(self, name: str) -> Float32:
        if name not in self._read:
            self._read[name] = self._weights.read(name)
        return self._read[name]


def _best_scale(
    weights: Weights, group: ChannelGroup, schemes: Mapping[str, Scheme], calibration: Calibration
) -> Float32:
    # All consumers of a group take the same input, but of the last layer's some see the wanted rows alone.
    modules = [name.removesuffix(".weight") for name in group.consumers]
    peak, energy = (np.max([of[m] for m in modules], axis=0) for of in (calibration.peak, calibration.energy))
    weights = _Held(weights)
    samples = {name: _sample(weights.read(name)) for name in group.consumers}
    best, least = np.ones(group.num_channels, np.float32), np.inf
    for scale in _candidates(weights, group, peak, energy):
        columns = scale[group.columns]
        error = sum(
            predicted_error(sample * columns, schemes[name], peak / columns, energy / columns**2)
            for name, sample in samples.items()
        )
        if error < least:
            best, least = scale, error
    return best


def _candidates(weights: Weights, group: ChannelGroup, peak: Float32, energy: Float32) -> Iterator[Float32]:
    yield np.ones(group.num_channels, np.float32)
    largest = np.zeros(group.num_channels, np.float32)
    np.maximum.at(largest, group.columns, peak)
    for strength in _STRENGTHS:
        yield equalizing_scale(weights, group, largest, strength)
    size = np.zeros(group.num_channels)
    np.maximum.at(size, group.columns, np.sqrt(energy.astype(np.float64)))
    alive = size > 0
    if not alive.any():
        return
    size[~alive] = np.median(size[alive])
    for power in _POWERS:
        scale = (size / np.exp(np.log(size).mean())) ** power
        yield np.clip(scale, 2.0**-20, 2.0**20).astype(np.float32)


def predicted_error(weight: Float32, scheme: Scheme, peak: Float32, energy: Float32) -> float:
    """Expected square of a product's error relative to the square of the product, the mean over outputs (N, K)·x.

    Relative, because how large an output is says nothing about its worth: another group may have scaled it.
    Weights: their own error times the mean square of the input they meet. Inputs: rounded in steps of max|x| / 127 of
    the stretch that shares a scale (a row in int8, a block in int4), which is uniform noise of step²/12.
    """
    stored = scheme.decode(scheme.encode(weight, floored(energy)), weight.shape)
    energy = np.asarray(floored(energy), np.float64)
    errors = np.square(weight - stored, dtype=np.float64) @ energy
    if width := scheme.shared_scale(weight.shape[1]):
        steps = peak.astype(np.float64).reshape(-1, width).max(axis=1) / LEVELS
        squares = np.square(weight, dtype=np.float64).reshape(len(weight), -1, width).sum(axis=2)
        errors += squares @ (steps**2 / 12)
    signal = np.square(weight, dtype=np.float64) @ energy
    return float((errors[signal > 0] / signal[signal > 0]).mean()) if (signal > 0).any() else 0.0


def floored(energy: Float32) -> Float32:
    """Never zero: a calibration set is small, and what it has not seen may still come."""
    return np.asarray(energy + 1e-3 * max(float(energy.mean()), 1e-12), np.float32)


def _sample(matrix: Float32) -> NDArray[np.float32]:
    return np.ascontiguousarray(matrix[:: max(1, len(matrix) // _SAMPLED_ROWS)], np.float32)
