"""The residual stream in another basis, without changing the function: what one channel held, all of them share.

What runs through the layers of a trained model has a few channels a thousand times larger than the others (Massive
Activations, arXiv:2402.17762), and eight bits with one scale a row are spent on those alone. In a basis in which every
channel holds a share of all the old ones there are none. Norms commute with the change of basis once their gains and
offsets are in the matrices behind them, so it is folded into the weights: graphs and runtime stay as they are. Owns the
change of basis (`spread`) and the weights in it (`Rotated`).

    rotated = Rotated(weights, config)          # a Weights like the one given
    spread(hidden.T, 1536).T                    # what leaves its graphs, in the model's own basis

The basis is a product of small reflections, 1 − (2/p)·ones, for every factor 4 of the width and then its odd primes;
for powers of 4 that is a Hadamard matrix. It is its own inverse. A factor 2 that is left over has Sylvester's matrix.
But LayerNorm takes the mean off, which reflections leave where it is and Sylvester's matrix does not: in the image
encoder the two halves stay apart. Additions one by one in float64, rounded to float32 once at the end, are the same
bytes on every machine.

Sources: QuaRot (arXiv:2404.00456); the folding of norms is SliceGPT's (arXiv:2401.15024).
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from m0kit.config import ModelConfig
from m0kit_quant.int8 import by_rows
from m0kit_quant.weights import EMBEDDING, Float32, Weights

Float64 = NDArray[np.float64]
Turn = Callable[[Float64], Float64]

_ROOT_HALF: Final = 0.5**0.5


def spread(x: NDArray[np.floating], width: int, *, keeps_ones: bool = False) -> Float64:
    """Q·x for columns x (n · width, T) of n vectors one below the other; Q (width, width) = Qᵀ = Q⁻¹.

    `keeps_ones`: Q·1 = ±1, so that Q·x has no mean where x has none.
    """
    y = np.array(x, np.float64, order="C")
    stride = y.shape[1]
    for factor in _factors(width):
        parts = y.reshape(-1, factor, stride)
        if factor == 2 and not keeps_ones:
            first = parts[:, 0] * _ROOT_HALF
            second = parts[:, 1] * _ROOT_HALF
            parts[:, 0], parts[:, 1] = first + second, first - second
        elif factor > 2:
            total = parts[:, 0] + parts[:, 1]
            for i in range(2, factor):
                total += parts[:, i]
            total *= 2 / factor
            parts -= total[:, None]
        stride *= factor
    return y


def _factors(width: int) -> list[int]:
    """As many 4 as there are in it, then its primes; their product is the width."""
    found, factor = [], 4
    while width > 1:
        while width % factor == 0:
            found.append(factor)
            width //= factor
        factor = {4: 2, 2: 3}.get(factor, factor + 2)
    return found


class Rotated:
    """The weights of the same function on a stream in the other basis. Norms have gains of one and no offsets.

    A matrix W that makes the stream becomes Q·W. One that takes it behind a norm of gain g and offset b becomes
    W·diag(g)·Q, and W·b goes into its bias. Any other tensor comes back as it is, not as a copy. Image encoder and
    decoder have a stream each; image embeddings enter the decoder's.
    """

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self._weights = weights
        self._makes: dict[str, Turn] = {}  # tensors whose rows are channels of the stream
        self._takes: dict[str, tuple[str, Turn]] = {}  # matrices whose columns are, and the norm before them
        self._adds: dict[str, str] = {}  # biases behind a norm with an offset → the norm
        self._norms: set[str] = set()
        v, d = config.vision, config.decoder

        def norm(name: str, taken_by: list[str], turn: Turn, *, offset: bool = False) -> None:
            self._norms |= {f"{name}.weight", f"{name}.bias"}
            self._takes |= {f"{matrix}.weight": (name, turn) for matrix in taken_by}
            if offset:
                self._adds |= {f"{matrix}.bias": name for matrix in taken_by}

        def makes(names: list[str], turn: Turn) -> None:
            self._makes |= dict.fromkeys(names, turn)

        patches, stream = partial(spread, width=v.width, keeps_ones=True), partial(spread, width=d.hidden_size)
        makes(["visual.patch_embed.proj.weight"], patches)
        for i in range(v.depth):
            block = f"visual.blocks.{i}"
            norm(f"{block}.norm1", [f"{block}.attn.qkv"], patches, offset=True)
            norm(f"{block}.norm2", [f"{block}.mlp.fc1"], patches, offset=True)
            makes(
                [f"{block}.{module}.{of}" for module in ("attn.proj", "mlp.fc2") for of in ("weight", "bias")], patches
            )
        norm("visual.merger.ln_q", ["visual.merger.mlp.0"], patches, offset=True)
        makes(["visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias"], stream)
        for i in range(d.num_layers):
            layer = f"model.layers.{i}"
            norm(f"{layer}.input_layernorm", [f"{layer}.self_attn.{each}_proj" for each in "qkv"], stream)
            norm(f"{layer}.post_attention_layernorm", [f"{layer}.mlp.{each}_proj" for each in ("gate", "up")], stream)
            makes([f"{layer}.self_attn.o_proj.weight", f"{layer}.mlp.down_proj.weight"], stream)
        norm("model.norm", ["score.0"], stream)
        self._takes[EMBEDDING] = "", stream  # its rows are the stream

    def read(self, name: str) -> Float32:
        """The tensor, float32. What the source raises passes through."""
        tensor = self._weights.read(name)
        if name in self._norms:
            return np.full(tensor.shape, 1 if name.endswith(".weight") else 0, np.float32)
        if turn := self._makes.get(name):
            return _by_columns(tensor.reshape(len(tensor), -1), turn).reshape(tensor.shape)
        if name in self._takes:
            norm, turn = self._takes[name]
            gain = self._vector(f"{norm}.weight", tensor.shape[1]) if norm else np.ones(tensor.shape[1])
            return _by_rows(tensor, lambda x: turn(x * gain[:, None]))
        if norm := self._adds.get(name, ""):
            matrix = self._weights.read(f"{name.removesuffix('bias')}weight")
            return _added(tensor, matrix, self._vector(f"{norm}.bias", matrix.shape[1]))
        return tensor

    def _vector(self, name: str, size: int) -> Float64:
        """A norm's, as often as patches that it has normed stand side by side in `size` columns."""
        vector = self._weights.read(name).astype(np.float64)
        return np.tile(vector, size // len(vector))


def _by_columns(matrix: Float32, turn: Turn) -> Float32:
    """`turn` of a matrix (N, K), a stretch of columns at a time."""
    out = np.empty(matrix.shape, np.float32)

    def fill(first: int, end: int) -> None:
        out[:, first:end] = turn(matrix[:, first:end].astype(np.float64, order="C"))

    by_rows(fill, matrix.shape[1], matrix.shape[0])
    return out


def _by_rows(matrix: Float32, turn: Turn) -> Float32:
    """`turn` of a matrix's transpose, a stretch of rows at a time, and transposed again."""
    out = np.empty(matrix.shape, np.float32)

    def fill(first: int, end: int) -> None:
        out[first:end] = turn(matrix[first:end].T.astype(np.float64, order="C")).T

    by_rows(fill, *matrix.shape)
    return out


def _added(bias: Float32, matrix: Float32, offset: Float64) -> Float32:
    """bias (N,) + matrix (N, K) · offset (K,), added up half on half, so that no library decides the order."""
    out = np.empty(bias.shape, np.float32)

    def fill(first: int, end: int) -> None:
        terms = matrix[first:end].T * offset[:, None]
        while len(terms) > 1:
            half = len(terms) // 2
            rest = terms[2 * half :]
            terms = terms[:half] + terms[half : 2 * half]
            terms = np.concatenate([terms, rest]) if len(rest) else terms
        out[first:end] = bias[first:end] + terms[0]

    by_rows(fill, *matrix.shape)
    return out
