"""Known answers: what a few tiny pairs score, computed in numpy from what an artifact's files hold.

Owns the pairs, the forward pass and the tolerances; nothing of an engine. The runtime scores the pairs with the
engine it runs on (`m0kit.artifact.answers`) before it scores anything else, so that a kernel that is wrong is found.
Weights are read back from the finished data files and decoded, so their packing is checked as well.

    answers = known_answers(folder, config, graphs)                    # for the manifest

Every weight is read once for all pairs: their tokens stand in one table, equal beginnings once, and a mask says who
sees whom. In memory is one matrix at a time. Where products round activations (int8, int4), everything is computed two
ways side by side, W = 2: with activations rounded as the products do it, which gives the answers, and without. How far
the two are apart says how far any two right ways of computing may be: a last bit that falls otherwise early on grows
to about as much through the layers. Elsewhere W = 1.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from m0kit.artifact.manifest import TOKENIZER, KnownAnswer, KnownAnswers
from m0kit.artifact.ports import Kept
from m0kit.config import ModelConfig
from m0kit.errors import CheckpointError
from m0kit.scoring import tokens
from m0kit_export import forward
from m0kit_export.builder import Graph
from m0kit_export.forward import attention, rms_norm
from m0kit_export.stored import StoredWeights
from m0kit_quant.weights import EMBEDDING, Float32

Int64 = NDArray[np.int64]

# Short, because the first start on a machine pays for them: a prefix of some 20 rows in one run, suffixes of a few rows
# behind it in the next; with a picture all in one run. Several queries, because a wrong logit may be near the right one
# by chance.
DOCUMENT: Final = "def area(w, h):\n    return w * h"
QUERIES: Final = ("area", "lights", "港")
IMAGE_QUERIES: Final = ("stone", "area")
# Rows and columns of visual tokens of the picture, where the limits of pixels leave room: 24 patches.
GRID: Final = (2, 3)


# The tolerance of a logit is NOISE times how far the two ways of computing are apart, and a share of what a logit moves
# by when hidden states are others altogether (`_head`), by the form in which documents are kept. Measured on small
# (trained), tiny and full (random), ONNX Runtime 1.27 to 1.32 on one CPU: right kernels use 0.4 of it at most, fp32
# products a hundredth, sums in float16 (1.29) 0.74; a kernel that loses the zero points of 4-bit weights (up to 1.28)
# is beyond it 2.5 (tiny) and 14 times (small). Two right ways of computing
# differ by three times the noise now and then.
NOISE: Final = 5.0
SHARES: Final[Mapping[Kept, float]] = {"fp32": 0.02, "fp16": 0.05, "int8": 0.08}
WHY: Final = (
    "five times what rounding activations moves these logits by, and 2, 5 or 8 percent (documents kept as fp32, fp16, "
    "int8) of what they move by when hidden states are others altogether"
)


@dataclass(frozen=True, slots=True)
class PairTokens:
    """One pair as the decoder sees it."""

    token_ids: Int64  # (T,)
    positions: Int64  # (3, T)
    images: Int64  # (V,) its rows that are visual tokens


def known_answers(
    folder: Path, config: ModelConfig, graphs: Mapping[str, Graph], progress: Callable[[int], object] = lambda _: None
) -> KnownAnswers:
    """The answers of the graphs whose data files lie in `folder` with the tokenizer; `progress` is told bytes read.

    Raises CheckpointError when a logit is not finite, or the tokenizer cannot be read.
    """
    tokenizer = open_tokenizer((folder / TOKENIZER).read_bytes())
    stored = Products(folder, graphs, progress)
    pixels = picture(config)
    grid = (pixels.shape[0] // config.image.factor, pixels.shape[1] // config.image.factor)
    texts = [(query, DOCUMENT) for query in QUERIES]
    sequences = [_text_sequence(tokenizer, config, query, document) for query, document in texts]
    sequences += [_image_sequence(tokenizer, config, query, grid) for query in IMAGE_QUERIES]
    with np.errstate(all="ignore"):
        embeds = encode(stored, config, *forward.patches(pixels, config))
        hidden = decode(stored, config, sequences, embeds)
        logits, unit = _head(stored, hidden)
    if not np.isfinite([*logits[0], unit]).all():
        raise CheckpointError(
            "the checkpoint scores a plain pair as NaN or infinity. Look for the reason in its weights or adapters."
        )
    if not np.isfinite([*logits[-1], *hidden[-1].reshape(-1)]).all():
        # Float16 overflows somewhere. What computes in it has nothing to be allowed for: it is wrong.
        logits, hidden = logits[:1], hidden[:1]
    # Few logits may be close to each other by chance, hidden states are not; but a trained head looks where it counts.
    apart = np.linalg.norm(hidden[0] - hidden[-1], axis=1) / np.linalg.norm(hidden[0], axis=1)
    noise = max(math.sqrt(np.mean((logits[0] - logits[-1]) ** 2)), float(apart.mean()) * unit)
    tolerance: dict[str, float] = {kv: float(f"{NOISE * noise + share * unit:.3g}") for kv, share in SHARES.items()}
    shown = {"image": _data_uri(pixels)}
    asked: list[tuple[str, str | dict[str, str]]] = [*texts, *((query, shown) for query in IMAGE_QUERIES)]
    pairs = [KnownAnswer(*pair, round(float(logit), 6)) for pair, logit in zip(asked, logits[0], strict=True)]
    return KnownAnswers(tuple(pairs), tolerance, WHY)


def open_tokenizer(raw: bytes) -> Tokenizer:
    """The checkpoint's tokenizer, to which all is text. Raises CheckpointError."""
    try:
        return tokens.open_tokenizer(raw)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's {TOKENIZER} {error}. Fetch it again.") from None


class Products(StoredWeights):
    """Products with what is stored, in W ways. What `decode` and `encode` ask for is what another class may give."""

    def __init__(self, folder: Path, graphs: Mapping[str, Graph], progress: Callable[[int], object]) -> None:
        super().__init__(folder, graphs, progress)
        products = [w for w in self.weights.values() if len(w.shape) == 2 and not w.scheme.table]
        self.ways = 2 if any(w.half or w.scheme.shared_scale(w.shape[1]) for w in products) else 1  # W

    def linear(self, name: str, x: Float32, *, bias: bool) -> Float32:
        """x (W, T, in) → (W, T, out)"""
        weight = self.weights[f"{name}.weight"]
        if weight.half:
            x = np.stack([x[0], _half(x[1])])
        elif self.ways == 2:
            x = np.stack([weight.scheme.rounded(x[0]), x[1]])
        y = x @ self.read(f"{name}.weight").T
        y = np.asarray(y + self.read(f"{name}.bias") if bias else y, np.float32)
        return np.stack([y[0], _half(y[1])]) if weight.half else y

    def embedded(self, token_ids: Int64) -> Float32:
        """Rows of the embedding (W, T, D)."""
        return np.repeat(self.rows(EMBEDDING, token_ids)[None], self.ways, axis=0)

    def after(self, layer: str, x: Float32) -> None:
        """Is shown the residual stream (W, T, D) or (W, P, E) behind each layer."""


def _half(x: Float32) -> Float32:
    """What is left of float32 in float16."""
    return x.astype(np.float16).astype(np.float32)


# --- the model -------------------------------------------------------------------------------------


def decode(stored: Products, config: ModelConfig, sequences: Sequence[PairTokens], embeds: Float32) -> Float32:
    """Hidden states (W, B, D) of the sequences' last tokens; embeds (W, V, D) of the picture in those that have it."""
    decoder = config.decoder
    paths, seen = _paths(sequences)
    num_rows = len(seen)
    token_ids, positions = np.empty(num_rows, np.int64), np.empty((3, num_rows), np.int64)
    for path, sequence in zip(paths, sequences, strict=True):
        token_ids[path], positions[:, path] = sequence.token_ids, sequence.positions
    x = stored.embedded(token_ids)
    visual = [path[s.images] for path, s in zip(paths, sequences, strict=True) if len(s.images)]
    for rows in visual:
        x[:, rows] = embeds
    x = forward.decode(stored, decoder, x, positions, lambda q, k, v: attention(q, k, v, seen))
    return rms_norm(x[:, [path[-1] for path in paths]], stored.read("model.norm.weight"), decoder.rms_norm_eps)


def _paths(sequences: Sequence[PairTokens]) -> tuple[list[Int64], NDArray[np.bool_]]:
    """Where the tokens of each sequence stand in one table of T rows, and what each row sees (T, T).

    Beginnings that are equal stand there once.
    """
    known: dict[bytes, int] = {}  # a beginning → the row of its last token
    paths = []
    for sequence in sequences:
        starts = (sequence.token_ids[: end + 1].tobytes() for end in range(len(sequence.token_ids)))
        paths.append(np.asarray([known.setdefault(start, len(known)) for start in starts], np.int64))
    seen = np.zeros((len(known), len(known)), bool)
    for path in paths:
        seen[np.ix_(path, path)] |= np.tri(len(path), dtype=bool)
    return paths, seen


def _head(stored: Products, hidden: Float32) -> tuple[Float32, float]:
    """hidden (W, B, D) → logits (W, B), and what a logit moves by when the hidden state is another altogether.

    That is the head's slope times the length of the hidden state, spread over all directions: a change as large as the
    hidden state, which has nothing to do with the model, moves the logit by about so much, whatever the weights' scale.
    """
    inner = stored.linear("score.0", hidden, bias=True)
    logits = stored.linear("score.2", np.maximum(inner, 0), bias=True)[:, :, 0]
    slopes = np.where(inner[0] > 0, stored.read("score.2.weight"), 0) @ stored.read("score.0.weight")  # (B, D)
    lengths = np.linalg.norm(slopes, axis=1) * np.linalg.norm(hidden[0], axis=1)
    return logits, float(lengths.mean()) / math.sqrt(hidden.shape[2])


def encode(stored: Products, config: ModelConfig, patches: Float32, places: Int64) -> Float32:
    """patches (P, 1176) of one image in merge order and their rows and columns (P, 2) → embeddings (W, V, D)."""
    seen = np.ones((len(patches), len(patches)), bool)
    repeated = np.repeat(patches[None], stored.ways, axis=0)
    return forward.encode(stored, config.vision, repeated, places, lambda q, k, v: attention(q, k, v, seen))


# --- the pairs -------------------------------------------------------------------------------------


def _text_sequence(tokenizer: Tokenizer, config: ModelConfig, query: str, document: str) -> PairTokens:
    prompt = config.prompt
    text = prompt.document_header + document + prompt.query_header + query
    token_ids = np.asarray([*_encode(tokenizer, text), prompt.score_token_id], np.int64)
    return PairTokens(token_ids, np.tile(np.arange(len(token_ids)), (3, 1)), np.zeros(0, np.int64))


def _image_sequence(tokenizer: Tokenizer, config: ModelConfig, query: str, grid: tuple[int, int]) -> PairTokens:
    """`grid`: rows and columns of visual tokens."""
    prompt = config.prompt
    before = [*_encode(tokenizer, prompt.document_header), prompt.vision_start_id]
    after = [prompt.vision_end_id, *_encode(tokenizer, prompt.query_header + query), prompt.score_token_id]
    first, count = len(before), grid[0] * grid[1]
    token_ids = np.asarray([*before, *[prompt.image_pad_id] * count, *after], np.int64)
    return PairTokens(token_ids, forward.prompt_positions(first, grid, len(after)), first + np.arange(count))


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def picture(config: ModelConfig) -> NDArray[np.uint8]:
    """(H, W, 3): lines of dark bars on paper, in a size that the model takes as it is."""
    factor, image = config.image.factor, config.image
    rows, columns = GRID
    while rows * columns * factor**2 < image.min_pixels:
        rows, columns = rows + 1, columns + 1
    while rows * columns * factor**2 > image.max_pixels and columns > 1:
        rows, columns = max(rows - 1, 1), columns - 1
    y, x = np.mgrid[: rows * factor, : columns * factor]
    ink = (y // 7 % 2 == 1) & ((x * 5 + y // 14 * 11) // 16 % 4 != 0)
    return np.where(ink[..., None], [60, 60, 80], [250, 250, 245]).astype(np.uint8)


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
