"""The model in numpy, layer by layer, with weights and products that the caller has.

Owns the forward pass alone: known answers (`answers`) compute with what is stored, feedback (`feeding`) looks at what
each product is given. A product is asked for once, with all rows, so that a caller needs one matrix at a time.

    x = decode(products, config.decoder, x, positions, lambda q, k, v: attention(q, k, v, seen))

W: ways of computing side by side, 1 for most.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from m0kit.config import DecoderConfig, ModelConfig, VisionConfig
from m0kit_quant.weights import Float32

Int64 = NDArray[np.int64]
# q, k, v (W, H, T, C) → (W, T, H·C)
Attend = Callable[[Float32, Float32, Float32], Float32]

_ROWS_AT_ONCE = 1024  # of what lies inside an MLP, six times as wide as outside


class Products(Protocol):
    """Weights, as the forward pass asks for them."""

    def read(self, name: str) -> Float32:
        """A norm's vector."""
        ...

    def linear(self, name: str, x: Float32, *, bias: bool) -> Float32:
        """x (W, T, in) by the matrix `name`.weight → (W, T, out)"""
        ...

    def after(self, layer: str, x: Float32) -> None:
        """Is shown the residual stream (W, T, D) or (W, P, E) behind each layer."""
        ...


def decode(products: Products, config: DecoderConfig, x: Float32, positions: Int64, attend: Attend) -> Float32:
    """The residual stream x (W, T, D) at positions (3, T) → the same after the last layer, before the final norm."""
    C, G, eps = config.head_dim, config.num_heads // config.num_kv_heads, config.rms_norm_eps
    axes = np.repeat([0, 1, 2], config.mrope_section)  # the position that each pair of a head turns with
    angle = positions[axes].T * _frequencies(config.rope_theta, C)  # (T, C/2)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        h = rms_norm(x, products.read(f"{layer}.input_layernorm.weight"), eps)
        q, k, v = (_heads(products.linear(f"{layer}.self_attn.{name}_proj", h, bias=True), C) for name in "qkv")
        q, k = _rotate(q, angle), _rotate(k, angle)
        a = attend(q, np.repeat(k, G, axis=1), np.repeat(v, G, axis=1))
        x = x + products.linear(f"{layer}.self_attn.o_proj", a, bias=False)
        h = rms_norm(x, products.read(f"{layer}.post_attention_layernorm.weight"), eps)
        gate, up = (products.linear(f"{layer}.mlp.{name}_proj", h, bias=False) for name in ("gate", "up"))
        for rows in _stretches(gate):
            gate[rows] = gate[rows] * _sigmoid(gate[rows]) * up[rows]
        del up
        x = x + products.linear(f"{layer}.mlp.down_proj", gate, bias=False)
        products.after(layer, x)
    return x


def encode(products: Products, config: VisionConfig, patches: Float32, places: Int64, attend: Attend) -> Float32:
    """patches (W, P, 1176) at rows and columns (P, 2) → embeddings (W, P/4, D of the decoder)"""
    eps = config.layer_norm_eps
    x = products.linear("visual.patch_embed.proj", patches, bias=False)
    # The first half of a head's pairs turns with the row, the second with the column.
    frequencies = _frequencies(config.rope_theta, config.head_dim // 2)
    angle = np.concatenate([places[:, :1] * frequencies, places[:, 1:] * frequencies], axis=1)
    for i in range(config.depth):
        block = f"visual.blocks.{i}"
        qkv = products.linear(f"{block}.attn.qkv", _layer_norm(products, f"{block}.norm1", x, eps), bias=True)
        q, k, v = (_heads(part, config.head_dim) for part in np.split(qkv, 3, axis=2))
        x = x + products.linear(f"{block}.attn.proj", attend(_rotate(q, angle), _rotate(k, angle), v), bias=True)
        h = products.linear(f"{block}.mlp.fc1", _layer_norm(products, f"{block}.norm2", x, eps), bias=True)
        for rows in _stretches(h):
            h[rows] = h[rows] * _sigmoid(np.float32(1.702) * h[rows])
        x = x + products.linear(f"{block}.mlp.fc2", h, bias=True)
        products.after(block, x)
    h = _layer_norm(products, "visual.merger.ln_q", x, eps)
    h = products.linear("visual.merger.mlp.0", h.reshape(len(h), -1, config.width * config.merge_size**2), bias=True)
    for rows in _stretches(h):
        h[rows] = _gelu(h[rows])
    return products.linear("visual.merger.mlp.2", h, bias=True)


def attention(q: Float32, k: Float32, v: Float32, seen: NDArray[np.bool_]) -> Float32:
    """q, k, v (W, H, T, C) → (W, T, H·C); row i looks at the columns of seen[i]."""
    scores = np.where(seen, q @ k.swapaxes(2, 3) / np.float32(math.sqrt(q.shape[3])), np.float32(-np.inf))
    share = np.exp(scores - scores.max(axis=3, keepdims=True))
    answers = share / share.sum(axis=3, keepdims=True) @ v
    return np.asarray(answers.swapaxes(1, 2).reshape(len(q), q.shape[2], -1), np.float32)


def _stretches(x: Float32) -> list[tuple[int, slice]]:
    """Indices of a few rows each of x (W, T, ·)."""
    return [(w, slice(t, t + _ROWS_AT_ONCE)) for w in range(len(x)) for t in range(0, x.shape[1], _ROWS_AT_ONCE)]


def _heads(x: Float32, width: int) -> Float32:
    """(W, T, H·C) → (W, H, T, C)"""
    return x.reshape(*x.shape[:2], -1, width).swapaxes(1, 2)


def _rotate(x: Float32, angle: NDArray[np.float64]) -> Float32:
    """Turn the two halves of each head of x (W, H, T, C) by angle (T, C/2)."""
    a, b = np.split(x, 2, axis=3)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=3)


def _frequencies(theta: float, width: int) -> NDArray[np.float64]:
    return np.asarray(theta ** (-np.arange(0, width, 2) / width), np.float64)


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """x (W, T, D) → the same shape"""
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=2, keepdims=True) + np.float32(eps)) * weight, np.float32)


def _layer_norm(products: Products, name: str, x: Float32, eps: float) -> Float32:
    x = x - x.mean(axis=2, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, axis=2, keepdims=True) + np.float32(eps))
    return np.asarray(x * products.read(f"{name}.weight") + products.read(f"{name}.bias"), np.float32)


def _sigmoid(x: Float32) -> Float32:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)), np.float32)


def _gelu(x: Float32) -> Float32:
    erf = np.asarray([math.erf(value) for value in (x / math.sqrt(2)).reshape(-1)], np.float32)
    return np.asarray(0.5 * x * (1 + erf.reshape(x.shape)), np.float32)


def prompt_positions(before: int, grid: tuple[int, int], behind: int) -> Int64:
    """(3, T) of a prompt with one image: `before` tokens, rows and columns of visual tokens, `behind` tokens.

    Those of an image count from where it starts, and text goes on behind the greatest of them (M-RoPE).
    """
    inside = np.stack([np.zeros(grid[0] * grid[1], np.int64), *np.indices(grid).reshape(2, -1)]) + before
    after = np.arange(behind) + before + max(grid)
    return np.concatenate([np.tile(np.arange(before), (3, 1)), inside, np.tile(after, (3, 1))], axis=1)


def patches(pixels: NDArray[np.uint8], config: ModelConfig) -> tuple[Float32, Int64]:
    """pixels (H, W, 3) → patches (P, 1176), the four of a visual token one after the other, and their places (P, 2)."""
    image, side, merge = config.image, config.image.patch_size, config.image.merge_size
    mean, std = np.asarray(image.mean, np.float32), np.asarray(image.std, np.float32)
    values = (pixels * np.float32(image.rescale) - mean) / std
    rows, columns = (size // side // merge for size in pixels.shape[:2])
    split = values.reshape(rows, merge, side, columns, merge, side, -1)
    split = split.transpose(0, 3, 1, 4, 6, 2, 5)  # row, column, row and column within, channel, y, x
    still = np.repeat(split[:, :, :, :, :, None], image.temporal_patch_size, axis=5)
    row, inner_row, column, inner_column = np.indices((rows, merge, columns, merge))
    places = np.stack([row * merge + inner_row, column * merge + inner_column], axis=-1)
    flat = still.reshape(rows * columns * merge**2, -1)
    return flat.astype(np.float32), places.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
