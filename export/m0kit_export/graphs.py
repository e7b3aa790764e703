"""The graphs of jina-reranker-m0 in standard ONNX operators (opset 23): vision, decoder, head; and the set for CPUs.

Written out module by module with the checkpoint's own tensor names, not traced. Owns what is computed;
how nodes and weights are put together is `m0kit_export.builder`.

Everything is *packed*: tokens of all pairs (and patches of all images) stand in one row-major table without
batch axis and without padding. Attention runs in a Loop over pieces of a few hundred query rows, so memory
grows with the length and not with its square. In the decoder a table of pieces says which rows ask and
which answer: one prefix can answer to any number of suffixes, whether it was computed in this run or comes
from a cache. In the vision encoder each image is cut into pieces by itself and sees nothing else.

    graph = decoder_graph(config.decoder, Recipe.default("fp32"))

Sources: Qwen2-VL (arXiv:2409.12191), transformers' `modeling_qwen2_vl`, the ONNX operators Attention,
RMSNormalization and RotaryEmbedding (opset 23), LayerNormalization (17), Gelu (20).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from onnx import TensorProto, helper

from m0kit.artifact.ports import (
    IMAGE_COLUMNS,
    KV,
    PIECE_COLUMNS,
    GraphSet,
    Kept,
    decoder_name,
    decoder_ports,
    head_ports,
    past_names,
    present_names,
    table_names,
    vision_ports,
)
from m0kit.config import DecoderConfig, ModelConfig
from m0kit_export.builder import Builder, Graph
from m0kit_export.cuda import cuda_graphs
from m0kit_export.frequencies import Frequencies, powers
from m0kit_export.names import expected_shapes
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import CONTRIB, Scheme
from m0kit_quant.weights import EMBEDDING, Float32

F32 = np.dtype(np.float32)

# Rows that go through an MLP at once: enough for full speed, few enough to need little memory.
CHUNK_ROWS = 1024
# The same for quantised products, four times as fast: there it pays that what lies between them stays in the cache.
QUANTIZED_CHUNK_ROWS = 512
# Patches of an image that ask at once. Half of it costs a tenth of the speed, twice of it only memory.
VISION_PIECE_ROWS = 256
# The same for MultiHeadAttention. Where it cannot tell the size of a cache it makes the whole table after all.
FLASH_PIECE_ROWS = 1024


def build_graphs(
    config: ModelConfig, recipe: Recipe, observe: bool = False, frequencies: Frequencies | None = None
) -> dict[str, Graph]:
    """All three by name, matrices stored as the recipe has it; `observe` as in `Builder`.

    Rotary frequencies are PyTorch's unless given. Raises RecipeError when the recipe does not fit the model.
    """
    frequencies = frequencies or Frequencies.of(config)
    graphs = {
        "vision": vision_graph(config, recipe, observe, frequency=frequencies.vision),
        "decoder": decoder_graph(config.decoder, recipe, observe, frequency=frequencies.decoder),
        "head": head_graph(config.decoder, recipe, observe),
    }
    recipe.check(w.name for graph in graphs.values() for w in graph.weights if len(w.shape) == 2)
    return graphs


def check_recipe(recipe: Recipe, config: ModelConfig) -> None:
    """Raises RecipeError when the recipe does not fit the model, as `build_graphs` does, but at once."""
    flat = {name: (shape[0], math.prod(shape[1:])) for name, shape in expected_shapes(config).items() if len(shape) > 1}
    for name, shape in flat.items():
        recipe.scheme(name, shape)
    recipe.check(flat)


def kept_decoders(config: DecoderConfig, recipe: Recipe, frequency: Float32 | None = None) -> dict[str, Graph]:
    """The decoder once more for pasts that are kept as float16 or int8, by the names of their files.

    They read the data file of "decoder".
    """
    others = [kv for kv in KV if kv != "fp32"]
    return {decoder_name(kv): decoder_graph(config, recipe, kv=kv, frequency=frequency) for kv in others}


def graph_sets(
    config: ModelConfig, recipe: Recipe, portable: Mapping[str, Graph], frequencies: Frequencies | None = None
) -> dict[GraphSet, dict[str, Graph]]:
    """What runs on one kind of device alone: by set and the portable graph in whose place it runs.

    They read the data files of the `portable` graphs. A set for the CPU is made where these hold standard operators
    alone; with quantised products they are ONNX Runtime's already. It has no decoder: attention is a twentieth of a
    decoder's time on a page, too little for another operator to gain much. A set for CUDA is made where matrices are
    not stored in float32.
    """
    frequencies = frequencies or Frequencies.of(config)
    sets: dict[GraphSet, dict[str, Graph]] = {}
    if not Builder("vision", recipe).contrib:
        sets["cpu"] = {"vision": vision_graph(config, recipe, frequency=frequencies.vision, contrib=True)}
    if cuda := cuda_graphs(config, recipe, portable, frequencies):
        sets["cuda"] = cuda
    return sets


def schemes_of(graphs: Mapping[str, Graph]) -> dict[str, Scheme]:
    """How each tensor is stored, by its name."""
    return {weight.name: weight.scheme for graph in graphs.values() for weight in graph.weights}


def vision_graph(
    config: ModelConfig,
    recipe: Recipe,
    observe: bool = False,
    frequency: Float32 | None = None,
    contrib: bool = False,
) -> Graph:
    """Patches of any number of images → one embedding per 2×2 patches.

    Its ports are `m0kit.artifact.ports.vision_ports`; patches come in merge order. `contrib` as in `Builder`.
    The convolution's kernel equals its stride, so it is a product with the flattened kernel.
    """
    vision, width = config.vision, config.vision.width
    b = Builder("vision", recipe, observe, contrib)
    x = b.linear("visual.patch_embed.proj", "patches", (width, vision.patch_values), bias=False)
    # Rotary frequencies: the first half of a head's pairs turns with the row, the second with the column.
    pairs = vision.head_dim // 2
    if frequency is None:
        frequency = powers(vision.rope_theta, pairs)
    axis = np.repeat([0, 1], pairs // 2)
    cos, sin = _cos_sin(b, "positions", axis, np.tile(frequency, 2), position_axis=1)
    for i in range(vision.depth):
        block = f"visual.blocks.{i}"
        h = _layer_norm(b, f"{block}.norm1", x, width, vision.layer_norm_eps)
        qkv = b.linear(f"{block}.attn.qkv", h, (3 * width, width), bias=True, half=True)
        q, k, v = b.split(qkv, [width] * 3)
        q = _rotary(b, q, cos, sin, vision.num_heads, width)
        k = _rotary(b, k, cos, sin, vision.num_heads, width)
        a = _vision_attention(b, q, k, v, vision.num_heads, width)
        x = b.op("Add", x, b.linear(f"{block}.attn.proj", a, (width, width), bias=True, half=True))
        h = _layer_norm(b, f"{block}.norm2", x, width, vision.layer_norm_eps)
        h = _by_rows(b, h, width, partial(_quick_mlp, b, f"{block}.mlp", width, vision.mlp_size))
        x = b.op("Add", x, h)
    merged = width * vision.merge_size**2
    h = _layer_norm(b, "visual.merger.ln_q", x, width, vision.layer_norm_eps)
    h = b.op("Reshape", h, b.const([-1, merged]))
    h = b.op("Gelu", b.linear("visual.merger.mlp.0", h, (merged, merged), bias=True))
    b.linear("visual.merger.mlp.2", h, (config.decoder.hidden_size, merged), bias=True, out="image_embeds")
    return b.finish(vision_ports(config))


def decoder_graph(
    config: DecoderConfig,
    recipe: Recipe,
    observe: bool = False,
    kv: Kept = "fp32",
    frequency: Float32 | None = None,
) -> Graph:
    """Tokens of any number of pairs → hidden state of the last token of each, after the final norm.

    Its ports are `m0kit.artifact.ports.decoder_ports`; keys are rotated before they come out. `layers.{i}` names the
    residual stream after layer i. `kv` is how pasts come: "fp32"; "fp16", and then presents come out so as well;
    "int8" with tables.
    In the last layer only the wanted rows ask and go through the MLP.
    """
    D, F = config.hidden_size, config.intermediate_size
    K, C, H = config.num_kv_heads, config.head_dim, config.num_heads
    b = Builder("decoder", recipe, observe)
    x = b.lookup(EMBEDDING, "token_ids", (config.vocab_size, D))
    x = b.op("ScatterND", x, b.op("Reshape", "image_token_index", b.const([-1, 1])), "image_embeds")
    if frequency is None:
        frequency = powers(config.rope_theta, C)
    axis = np.repeat([0, 1, 2], config.mrope_section)
    cos, sin = _cos_sin(b, "positions", axis, frequency, position_axis=0)
    last_cos, last_sin = (b.op("Gather", table, "last_index", axis=1) for table in (cos, sin))
    for i in range(config.num_layers):
        layer, last = f"model.layers.{i}", i == config.num_layers - 1
        h = _rms_norm(b, f"{layer}.input_layernorm", x, D, config.rms_norm_eps)
        k = b.linear(f"{layer}.self_attn.k_proj", h, (K * C, D), bias=True, half=True)
        k = _rotary(b, k, cos, sin, K, K * C)
        v = b.linear(f"{layer}.self_attn.v_proj", h, (K * C, D), bias=True, half=True)
        k, v = (
            _by_head(b, new, K, C, None if kv == "fp16" else name)
            for name, new in zip(present_names(i), (k, v), strict=True)
        )
        if kv == "fp16":
            for name, new in zip(present_names(i), (k, v), strict=True):
                b.cast(new, np.float16, name)
        if last:
            x, h = (b.op("Gather", rows, "last_index", axis=0) for rows in (x, h))
            cos, sin = last_cos, last_sin
        q = b.linear(f"{layer}.self_attn.q_proj", h, (H * C, D), bias=True, half=True)
        q = _rotary(b, q, cos, sin, H, H * C)
        a = _decoder_attention(b, q, k, v, _PASTS[kv](b, i, K), "last_pieces" if last else "pieces", config)
        o = b.linear(f"{layer}.self_attn.o_proj", a, (D, H * C), bias=False, half=True)
        x = b.op("Add", x, o)
        h = _rms_norm(b, f"{layer}.post_attention_layernorm", x, D, config.rms_norm_eps)
        h = _by_rows(b, h, D, partial(_gated_mlp, b, f"{layer}.mlp", D, F))
        x = b.op("Add", x, h, out=f"layers.{i}")
    _rms_norm(b, "model.norm", x, D, config.rms_norm_eps, out="hidden")
    return b.finish(decoder_ports(config, kv))


def head_graph(config: DecoderConfig, recipe: Recipe, observe: bool = False) -> Graph:
    """hidden (B, D) float32 → logit (B,) float32: Linear, ReLU, Linear to one value."""
    D = config.hidden_size
    b = Builder("head", recipe, observe)
    h = b.op("Relu", b.linear("score.0", "hidden", (D, D), bias=True))
    h = b.linear("score.2", h, (1, D), bias=True)
    b.op("Reshape", h, b.const([-1]), out="logit")
    return b.finish(head_ports(config))


def _gated_mlp(b: Builder, name: str, width: int, inner: int, x: str) -> str:
    """SiLU(gate) · up → down. The product of the two can pass float16, so down is not half."""
    gate = b.linear(f"{name}.gate_proj", x, (inner, width), bias=False, half=True)
    up = b.linear(f"{name}.up_proj", x, (inner, width), bias=False, half=True)
    h = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
    return b.linear(f"{name}.down_proj", h, (width, inner), bias=False)


def _quick_mlp(b: Builder, name: str, width: int, inner: int, x: str) -> str:
    """fc1 → QuickGELU → fc2. Both pass float16 on real images (reference.md), so neither is half."""
    h = b.linear(f"{name}.fc1", x, (inner, width), bias=True)
    gate = b.op("Sigmoid", b.op("Mul", h, b.const(1.702, F32)))
    return b.linear(f"{name}.fc2", b.op("Mul", h, gate), (width, inner), bias=True)


def _by_rows(b: Builder, x: str, width: int, mlp: Callable[[str], str]) -> str:
    """An MLP over a bounded number of rows at once; in one go when observed, as a loop gives nothing out."""
    rows = QUANTIZED_CHUNK_ROWS if b.quantized else CHUNK_ROWS
    return mlp(x) if b.observe else _in_chunks(b, x, width, rows, mlp)


def _in_chunks(b: Builder, x: str, width: int, num_rows: int, layer: Callable[[str], str]) -> str:
    """`layer`, which maps rows to rows, over `num_rows` rows of x (·, width) at a time.

    An MLP is six times as wide inside: on a 10,240-token prompt its inner values alone take 1.1 GB at once.
    """
    zero, step = b.const([0]), b.const(num_rows)
    total = b.op("Squeeze", b.op("Shape", x, end=1), zero)
    count = b.op("Div", b.op("Add", total, b.const(num_rows - 1)), step)

    def body(index: str) -> str:
        first = b.op("Mul", b.op("Reshape", index, b.const([1])), b.const([num_rows]))
        return layer(b.op("Slice", x, first, b.op("Add", first, b.const([num_rows])), zero))

    return _collect(b, count, x, width, body)


def _collect(b: Builder, count: str, like: str, width: int, body: Callable[[str], str]) -> str:
    """Run `body`, index → rows (·, width), `count` times and put the rows one below the other.

    Kept to what three engines take: the carried result starts as an empty slice of `like`, because
    OpenVINO reads an empty constant as a scalar.
    """
    zero = b.const([0])
    initial = b.op("Slice", like, zero, zero, zero)
    start = b.mark()
    index, carried, go = f"index_{initial}", f"carried_{initial}", f"go_{initial}"
    grown = b.op("Concat", carried, body(index), axis=0)
    goes_on = b.op("Identity", go)
    value = helper.make_tensor_value_info
    return b.loop(
        count,
        initial,
        b.subgraph(
            f"body_{initial}",
            [
                value(index, TensorProto.INT64, []),
                value(go, TensorProto.BOOL, []),
                value(carried, TensorProto.FLOAT, [None, width]),
            ],
            [value(goes_on, TensorProto.BOOL, []), value(grown, TensorProto.FLOAT, [None, width])],
            start,
        ),
    )


def _vision_attention(b: Builder, q: str, k: str, v: str, heads: int, width: int) -> str:
    """Attention of packed patches (P, width), image by image: each sees the whole of its own."""
    zero = b.const([0])
    count = b.op("Squeeze", b.op("Shape", "images", end=1), zero)

    def image(index: str) -> str:
        first, end = _table_row(b, "images", index, len(IMAGE_COLUMNS))
        asking, *answering = (b.op("Slice", x, first, end, zero) for x in (q, k, v))
        keys, values = (b.op("Reshape", x, b.const([1, -1, width])) for x in answering)
        if b.contrib:
            return _in_chunks(b, asking, width, FLASH_PIECE_ROWS, partial(_attend_flash, b, keys, values, heads, width))
        return _in_chunks(b, asking, width, VISION_PIECE_ROWS, partial(_attend, b, keys, values, heads, width))

    return _collect(b, count, q, width, image)


def _decoder_attention(b: Builder, q: str, k: str, v: str, past: "_Past", pieces: str, config: DecoderConfig) -> str:
    """Attention of packed tokens, piece by piece: q (·, H·C), k and v (K, T, C) → (·, H·C).

    A piece sees the causal part of its keys, counted from the end. The G = H/K query heads that share a key head
    stand below each other as rows of one product: a suffix of few tokens becomes enough rows for full speed (a third
    faster than the Attention operator on 24 tokens behind 768, as fast on 256 rows).
    """
    K, C = config.num_kv_heads, config.head_dim
    G, zero = config.num_heads // K, b.const([0])
    q = b.op("Mul", q, b.const(1 / np.sqrt(C), F32))
    count = b.op("Squeeze", b.op("Shape", pieces, end=1), zero)

    def piece(index: str) -> str:
        q0, q1, a0, a1, b0, b1, p0, p1, number = _table_row(b, pieces, index, len(PIECE_COLUMNS))
        rows = b.op("Slice", q, q0, q1, zero)
        one = b.const([1])
        keys, values = (
            b.op("Concat", old, b.op("Slice", new, a0, a1, one), b.op("Slice", new, b0, b1, one), axis=1)
            for old, new in zip(past(p0, p1, number), (k, v), strict=True)
        )
        hidden = _hidden_from(b, rows, keys)
        asking = b.op("Transpose", b.op("Reshape", rows, b.const([-1, K, G, C])), perm=[1, 2, 0, 3])
        asking = b.op("Reshape", asking, b.const([K, -1, C]))
        scores = b.op("MatMul", asking, b.op("Transpose", keys, perm=[0, 2, 1]))
        by_query = b.op("Reshape", scores, b.op("Concat", b.const([K, G]), b.op("Shape", hidden), axis=0))
        share = b.op("Softmax", b.op("Add", by_query, hidden), axis=-1)
        answers = b.op("MatMul", b.op("Reshape", share, b.op("Shape", scores)), values)
        answers = b.op("Transpose", b.op("Reshape", answers, b.const([K, G, -1, C])), perm=[2, 0, 1, 3])
        return b.op("Reshape", answers, b.const([-1, K * G * C]))

    return _collect(b, count, q, K * G * C, piece)


_Past = Callable[[str, str, str], tuple[str, str]]  # first and end row, number → keys and values (K, ·, C) float32


def _past_fp32(b: Builder, layer: int, _kv_heads: int) -> _Past:
    (key, value), one = past_names(layer), b.const([1])
    return lambda p0, p1, _number: (b.op("Slice", key, p0, p1, one), b.op("Slice", value, p0, p1, one))


def _past_fp16(b: Builder, layer: int, kv_heads: int) -> _Past:
    """Widened piece by piece, where it stays in the processor's cache: a fifth faster than a layer at once."""
    read = _past_fp32(b, layer, kv_heads)
    return lambda *place: tuple(b.cast(rows, F32) for rows in read(*place))


def _past_int8(b: Builder, layer: int, kv_heads: int) -> _Past:
    """Integers · scale + low, channel by channel; the first token of a past stands as it is in the table."""

    def widen(stored: str, table: str, p0: str, p1: str, number: str) -> str:
        one = b.const([1])
        rows = b.op("Gather", table, number, axis=0)
        scale, low, first = (b.op("Reshape", row, b.const([kv_heads, 1, -1])) for row in b.split(rows, [1] * 3, axis=1))
        there = b.op("Min", one, b.op("Sub", p1, p0))
        rest = b.cast(b.op("Slice", stored, b.op("Add", p0, there), p1, one), F32)
        rest = b.op("Add", b.op("Mul", rest, scale), low)
        return b.op("Concat", b.op("Slice", first, b.const([0]), there, one), rest, axis=1)

    (key, value), (key_table, value_table) = past_names(layer), table_names(layer)
    return lambda *place: (widen(key, key_table, *place), widen(value, value_table, *place))


_PASTS: dict[Kept, Callable[[Builder, int, int], _Past]] = {
    "fp32": _past_fp32,
    "fp16": _past_fp16,
    "int8": _past_int8,
}


def _table_row(b: Builder, table: str, index: str, columns: int) -> list[str]:
    """The entries of one row of a table, each (1,)."""
    row = b.op("Gather", table, b.op("Reshape", index, b.const([1])), axis=0)
    return b.split(b.op("Reshape", row, b.const([-1])), [1] * columns, axis=0)


def _attend(b: Builder, keys: str, values: str, heads: int, width: int, rows: str) -> str:
    """rows (·, width) that ask keys and values (1, ·, ·) → (·, width). Reshape states ranks that engines lose."""
    asking = b.op("Reshape", rows, b.const([1, -1, width]))
    answers = b.op("Attention", asking, keys, values, q_num_heads=heads, kv_num_heads=heads)
    return b.op("Reshape", answers, b.const([-1, width]))


def _attend_flash(b: Builder, keys: str, values: str, heads: int, width: int, rows: str) -> str:
    """The same by ONNX Runtime's own operator, which never has the table of scores in memory: a tenth faster."""
    asking = b.op("Reshape", rows, b.const([1, -1, width]))
    answers = b.op("MultiHeadAttention", asking, keys, values, num_heads=heads, domain=CONTRIB)
    return b.op("Reshape", answers, b.const([-1, width]))


def _hidden_from(b: Builder, rows: str, keys: str) -> str:
    """(rows, keys): 0 where a row may look, else so low that nothing is left of it after the softmax.

    The last row sees every key of (K, keys, C), each row before it one less.
    """
    zero, nought, one = b.const([0]), b.const(0), b.const(1)
    num_keys = b.op("Squeeze", b.op("Shape", keys, start=1, end=2), zero)
    num_rows = b.op("Squeeze", b.op("Shape", rows, end=1), zero)
    last_seen = b.op("Range", b.op("Sub", num_keys, num_rows), num_keys, one)
    seen = b.op("LessOrEqual", b.op("Range", nought, num_keys, one), b.op("Reshape", last_seen, b.const([-1, 1])))
    return b.op("Where", seen, b.const(0, F32), b.const(np.finfo(np.float32).min / 2, F32))


def _by_head(b: Builder, x: str, heads: int, head_dim: int, out: str | None) -> str:
    """(T, heads·C) → (heads, T, C)"""
    return b.op("Transpose", b.op("Reshape", x, b.const([-1, heads, head_dim])), perm=[1, 0, 2], out=out)


def _rotary(b: Builder, x: str, cos: str, sin: str, heads: int, width: int, out: str | None = None) -> str:
    """Rotate the two halves of each head of x (T, width) by tables (1, T, C/2)."""
    x3 = b.op("Reshape", x, b.const([1, -1, width]))
    turned = b.op("RotaryEmbedding", x3, cos, sin, num_heads=heads)
    return b.op("Reshape", turned, b.const([-1, width]), out=out)


def _cos_sin(
    b: Builder, positions: str, axis: np.ndarray, frequency: np.ndarray, position_axis: int
) -> tuple[str, str]:
    """Tables (1, T, C/2): pair j turns by the position on axis[j] times frequency[j], in float32."""
    chosen = b.op("Gather", positions, b.const(axis), axis=position_axis)
    if position_axis == 0:
        chosen = b.op("Transpose", chosen, perm=[1, 0])
    angle = b.op("Mul", b.cast(chosen, F32), b.const(frequency, F32))
    table: Callable[[str], str] = lambda f: b.op("Reshape", b.op(f, angle), b.const([1, -1, len(axis)]))  # noqa: E731
    return table("Cos"), table("Sin")


def _rms_norm(b: Builder, name: str, x: str, width: int, eps: float, out: str | None = None) -> str:
    weight = b.vector(f"{name}.weight", width)
    return b.op("RMSNormalization", x, weight, axis=-1, epsilon=eps, out=out)


def _layer_norm(b: Builder, name: str, x: str, width: int, eps: float) -> str:
    weight, bias = b.vector(f"{name}.weight", width), b.vector(f"{name}.bias", width)
    return b.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps)
