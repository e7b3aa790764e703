"""Writing weights whose errors are fed back, by what each product meets on prompts that the exporter makes up itself.

Owns the prompts and the one trip through the model; how errors are fed back is `m0kit_quant.feedback`. Nothing of a
user is needed: tokens are drawn from the vocabulary at random, images are noise, waves and bars like type. Each product
of the fp32 weights that are going to be stored gets its inputs, is encoded, and gone. In memory are one layer's
activations, one matrix, and one second moment with its factor.

    with DataFiles(folder, graphs, bar) as files:
        feed_back(config, tokenizer, weights, graphs, files.write)
        files.write_rest(weights, importance)
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from m0kit.config import ModelConfig
from m0kit.errors import CheckpointError
from m0kit_export.builder import Graph, Weight
from m0kit_export.forward import Int64, attention, decode, encode, patches, prompt_positions
from m0kit_quant.feedback import Plane
from m0kit_quant.scheme import Parts
from m0kit_quant.weights import EMBEDDING, Float32, Weights

# Rows of text, and of images, for each input of the widest product: fewer than one would leave directions unseen. On
# the small checkpoint 2, 8 and 30 move int4 scores by the same 0.0073 to 0.0076 (0.0163 without feedback).
ROWS_PER_INPUT: Final = 2.0
_TOKENS: Final = 64  # of a prompt of text
_GRID: Final = (4, 8)  # rows and columns of visual tokens of an image
_QUERY: Final = 8  # tokens
_ROWS_AT_ONCE: Final = 4096
_CELLS: Final = (1, 2, 4, 7, 14, 28)  # pixels a side of what noise is made of


def feed_back(
    config: ModelConfig,
    tokenizer: Tokenizer,
    weights: Weights,
    graphs: Mapping[str, Graph],
    write: Callable[[Weight, Parts], object],
) -> None:
    """Hand `write` what is stored of every matrix in `graphs` that takes feedback, but the head's.

    Raises CheckpointError where a product's inputs are not finite.
    """
    prompts = _Prompts(config, tokenizer)
    declared = {weight.name: weight for graph in graphs.values() for weight in graph.weights}
    if (table := declared[EMBEDDING]).scheme.takes_feedback:
        rows = weights.read(EMBEDDING)
        write(table, table.scheme.encode(rows, Plane.of(_noticed(weights, rows.shape[1]))))
        del rows
    fed = _Fed(weights, declared, write)
    with np.errstate(all="ignore"):
        flat, places = prompts.patches()
        images = [(0, prompts.images, len(places))]
        embeds = encode(
            fed, config.vision, flat[None], np.tile(places, (prompts.images, 1)), _packed(images, causal=False)
        )
        token_ids, positions, visual, groups = prompts.tokens()
        x = weights.read(EMBEDDING)[token_ids][None]
        x[0, visual] = embeds[0]
        fed.kinds = [slice(first, first + count * length) for first, count, length in groups]
        decode(fed, config.decoder, x, positions, _packed(groups, causal=True))


def _noticed(weights: Weights, width: int) -> NDArray[np.float64]:
    """What an error of the looked-up rows does (D, D): to the stream itself, to attention and to the first MLP alike.

    An error e is x·e in a product by W behind a norm of gain g, up to a factor: e·diag(g)·WᵀW·diag(g)·eᵀ counts.
    """
    noticed = np.eye(width)
    layer = "model.layers.0"
    for norm, modules in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        gain = weights.read(f"{layer}.{norm}.weight")
        matrices = (weights.read(f"{layer}.{module}.weight") * gain for module in modules)
        seen = np.sum([matrix.T @ matrix for matrix in matrices], axis=0, dtype=np.float64)
        size = float(np.trace(seen))
        noticed += seen * (width / size) if size > 0 else 0
    return noticed


class _Fed:
    """Products in fp32 that are encoded when they are asked for."""

    def __init__(
        self, weights: Weights, declared: Mapping[str, Weight], write: Callable[[Weight, Parts], object]
    ) -> None:
        self._weights, self._declared, self._write = weights, declared, write
        self.kinds: Sequence[slice] = ()  # rows that count alike, whatever their number; none: all of one kind
        self._met: tuple[Float32, Plane] | None = None  # the last inputs: several products take the same

    def read(self, name: str) -> Float32:
        return self._weights.read(name)

    def linear(self, name: str, x: Float32, *, bias: bool) -> Float32:
        """x (1, T, in) → (1, T, out)"""
        weight = self._declared[f"{name}.weight"]
        values = self._weights.read(weight.name).reshape(weight.shape)
        if weight.scheme.takes_feedback:
            self._write(weight, weight.scheme.encode(values, self._plane(name, x)))
        y = x @ values.T
        return y + self._weights.read(f"{name}.bias") if bias else y

    def after(self, layer: str, x: Float32) -> None:
        """Nothing is looked at between layers."""

    def _plane(self, name: str, x: Float32) -> Plane:
        if self._met is None or self._met[0] is not x:
            self._met = None  # before the next one is made
            moment = np.zeros((x.shape[2], x.shape[2]), np.float32)
            kinds = self.kinds or [slice(0, x.shape[1])]
            for rows in kinds:
                share = math.sqrt(len(kinds) * (rows.stop - rows.start))
                for first in range(rows.start, rows.stop, _ROWS_AT_ONCE):
                    part = x[0, first : min(first + _ROWS_AT_ONCE, rows.stop)] / np.float32(share)
                    moment += part.T @ part
            try:
                self._met = x, Plane.of(moment)
            except ValueError as error:
                raise CheckpointError(
                    f"{name} {error} on a plain prompt. Look for the reason in the checkpoint's weights or adapters."
                ) from None
        return self._met[1]


def _packed(groups: Sequence[tuple[int, int, int]], *, causal: bool) -> Callable[[Float32, Float32, Float32], Float32]:
    """Attention of sequences that stand one below the other: first row, number of sequences, rows of each."""

    def attend(q: Float32, k: Float32, v: Float32) -> Float32:
        heads, width = q.shape[1], q.shape[3]
        out = np.empty((1, q.shape[2], heads * width), np.float32)
        for first, count, length in groups:
            seen = np.tri(length, dtype=bool) if causal else np.ones((length, length), bool)
            for i in range(count):  # a table of scores each
                own = slice(first + i * length, first + (i + 1) * length)
                out[0, own] = attention(q[:, :, own], k[:, :, own], v[:, :, own], seen)[0]
        return out

    return attend


class _Prompts:
    """What the model is shown. The same for every model of the same shape and vocabulary, on every machine."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        special = tokenizer.get_added_tokens_decoder()
        known = min(config.decoder.vocab_size, tokenizer.get_vocab_size())
        self._plain = np.asarray([i for i in range(known) if i not in special] or range(known), np.int64)
        vision, decoder = config.vision, config.decoder
        text = ROWS_PER_INPUT * max(decoder.hidden_size, decoder.intermediate_size)
        pixels = ROWS_PER_INPUT * max(vision.width, vision.mlp_size)
        self._texts = math.ceil(text / _TOKENS)
        self.images = math.ceil(pixels / (_GRID[0] * _GRID[1] * vision.merge_size**2))

    def patches(self) -> tuple[Float32, Int64]:
        """Patches (I·P, 1176) of all images, and the places (P, 2) of those of one."""
        made = [patches(drawn, self._config) for drawn in self._drawn()]
        return np.concatenate([flat for flat, _ in made]), made[0][1]

    def tokens(self) -> tuple[Int64, Int64, Int64, list[tuple[int, int, int]]]:
        """Ids (T,), positions (3, T), rows that are visual tokens (I·V,), and the sequences as `_packed` takes them."""
        prompt = self._config.prompt
        ahead, between = (
            self._tokenizer.encode(h, add_special_tokens=False).ids
            for h in (prompt.document_header, prompt.query_header)
        )
        size = max(_TOKENS - len(ahead) - len(between) - _QUERY - 1, 1)  # headers are some ten tokens
        drawn = self._plain[_numbers("tokens", self._texts * _TOKENS) % len(self._plain)].reshape(self._texts, -1)
        texts = [[*ahead, *row[:size], *between, *row[size : size + _QUERY], prompt.score_token_id] for row in drawn]
        drawn = self._plain[_numbers("queries", self.images * _QUERY) % len(self._plain)].reshape(self.images, -1)
        first = len(ahead) + 1
        pads = [prompt.image_pad_id] * (_GRID[0] * _GRID[1])
        head, tail = [*ahead, prompt.vision_start_id, *pads, prompt.vision_end_id, *between], [prompt.score_token_id]
        pages = [[*head, *row, *tail] for row in drawn]
        length = len(pages[0])
        page = prompt_positions(first, _GRID, length - first - len(pads))
        span = len(texts[0])
        text_rows = len(texts) * span
        token_ids = np.concatenate([np.asarray(texts, np.int64).reshape(-1), np.asarray(pages, np.int64).reshape(-1)])
        positions = np.concatenate(
            [np.tile(np.tile(np.arange(span), (3, 1)), len(texts)), np.tile(page, len(pages))], axis=1
        )
        visual = (text_rows + np.arange(len(pages))[:, None] * length + first + np.arange(len(pads))).reshape(-1)
        return token_ids, positions, visual, [(0, len(texts), span), (text_rows, len(pages), length)]

    def _drawn(self) -> list[NDArray[np.uint8]]:
        """Images (H, W, 3) of _GRID visual tokens."""
        height, width = (side * self._config.image.factor for side in _GRID)
        y, x = np.mgrid[:height, :width].astype(np.float64)
        drawn = []
        for i in range(self.images):
            numbers = iter(_numbers(f"image {i}", height * width * 3 + 64).tolist())
            if i % 4 == 0:  # noise
                cell = _CELLS[next(numbers) % len(_CELLS)]
                shape = -(-height // cell), -(-width // cell), 3
                values = np.asarray([next(numbers) % 256 for _ in range(math.prod(shape))], np.uint8).reshape(shape)
                made = values.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
            elif i % 4 == 1:  # waves
                a, b, c = (next(numbers) % 1000 / 1000 for _ in range(3))
                wave = np.cos(6 * a + (b - 0.5) * x / 4 + (c - 0.5) * y / 4)
                made = np.repeat(np.rint(127.5 + 127.5 * wave).astype(np.uint8)[..., None], 3, axis=2)
            else:  # bars on paper, in lines
                made = np.full((height, width, 3), 255, np.uint8)
                line = next(numbers) % 8
                while line < height - 8:
                    tall, at = 8 + next(numbers) % 12, next(numbers) % 40
                    while at < width:
                        high = next(numbers) % 3 * tall // 3
                        thick = 1 + next(numbers) % 3
                        if next(numbers) % 3:
                            made[line + high : line + tall, at : at + thick] = 0
                        else:
                            made[line + high : line + high + 2, at : at + 3 * thick] = 0
                        at += 3 + next(numbers) % 6 + (16 if next(numbers) % 6 == 0 else 0)
                    line += tall + 4 + next(numbers) % 30
            drawn.append(made)
        return drawn


def _numbers(name: str, count: int) -> Int64:
    """(count,) of 32 bits, the same everywhere and always."""
    raw = hashlib.shake_256(f"m0kit {name}".encode()).digest(4 * count)
    return np.frombuffer(raw, "<u4").astype(np.int64)
