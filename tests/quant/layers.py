"""Layers of small models in numpy and float64, which are computed twice."""

import numpy as np


class Layers:
    """Of the weights of a model: products and norms by name, rows in, rows out."""

    def __init__(self, weights):
        self._weights = weights

    def read(self, name):
        return self._weights.read(name).astype(np.float64)

    def linear(self, name, x, bias=True):
        return x @ self.read(f"{name}.weight").T + (self.read(f"{name}.bias") if bias else 0)

    def layer_norm(self, name, x):
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
        return x * self.read(f"{name}.weight") + self.read(f"{name}.bias")


def attention(q, k, v, width):
    """(T, H·C), (T, K·C) → (T, H·C) of heads that are `width` wide, each query head by itself."""
    repeats, out = q.shape[1] // k.shape[1], []
    for head in range(q.shape[1] // width):
        mine, theirs = slice(head * width, (head + 1) * width), head // repeats
        read = slice(theirs * width, (theirs + 1) * width)
        out.append(_softmax(q[:, mine] @ k[:, read].T / np.sqrt(width)) @ v[:, read])
    return np.concatenate(out, axis=1)


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
