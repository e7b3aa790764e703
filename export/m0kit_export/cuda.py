"""The graphs once more for NVIDIA GPUs: vision, decoder and head, in 16 bits almost throughout.

Same modules, same data files, other nodes: no Loop, no table that the host would have to read midway, few large
products and ONNX Runtime's fused small ones. Attention of the image encoder is one node a block for any number of
images; the decoder's reads and writes a pool of pages, which its run updates in place.

    graphs = cuda_graphs(config, recipe, build_graphs(config, recipe))      # reads the data files of these

Everything that lies between two norms is divided by `SHIFT` where the type is float16: the sum that runs through the
layers, and what an MLP has inside. A norm does not see it, a power of two rounds nothing, and what reached 65504 times
64 would not fit. bfloat16 has the range of float32, and is left alone.

Sources: the operators' schemas in ONNX Runtime (PagedAttention, MultiHeadAttention, FusedMatMul, QuickGelu,
SkipLayerNormalization, SkipSimplifiedLayerNormalization), and those of `m0kit_export.graphs`.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from m0kit.artifact.ports import (
    cuda_decoder_ports,
    cuda_type,
    cuda_vision_ports,
    head_ports,
    past_names,
    present_names,
)
from m0kit.config import DecoderConfig, ModelConfig
from m0kit_export.builder import TYPES, Builder, Graph
from m0kit_export.frequencies import Frequencies, powers
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import CONTRIB
from m0kit_quant.weights import EMBEDDING, Float32

F32: Final = np.dtype(np.float32)
# Real images and texts reach some 10⁵ between norms (reference models overflow float16 there); this leaves 4·10⁶, and
# what is below 4·10⁻³ of a sum of usual size loses bits of its own, not of the sum.
SHIFT: Final = 64.0


def cuda_graphs(
    config: ModelConfig,
    recipe: Recipe,
    portable: Mapping[str, Graph],
    frequencies: Frequencies | None = None,
    dtype: str | None = None,
) -> dict[str, Graph]:
    """By the portable graphs in whose place they run, and whose data files they read.

    `recipe` is the one that those were built by. Rotary frequencies are PyTorch's unless given. `dtype`: what they
    compute in, by default what an artifact's do, which has none where matrices are float32; in "float32" they run in
    no GPU, and can be held against the reference without rounding.
    """
    dtype = dtype or cuda_type(recipe.schemes)
    if dtype is None:
        return {}
    frequencies = frequencies or Frequencies.of(config)
    shift = shift_of(dtype)
    like = {name: Builder(name, recipe, like=graph) for name, graph in portable.items()}
    return {
        "vision": vision_graph(_Half(like["vision"], dtype, shift), config, frequencies.vision),
        "decoder": decoder_graph(_Half(like["decoder"], dtype, shift), config.decoder, frequencies.decoder),
        "head": head_graph(_Half(like["head"], "float32", 1.0), config.decoder),
    }


def shift_of(dtype: str) -> float:
    """What the sums of a graph in this type are divided by."""
    return SHIFT if dtype == "float16" else 1.0


class _Half:
    """Nodes in one float type. `b` makes them; sums are kept divided by `shift`."""

    def __init__(self, b: Builder, dtype: str, shift: float) -> None:
        self.b, self.shift = b, shift
        self.dtype = next(known for known in TYPES if known.name == dtype)

    def cast(self, x: str, out: str | None = None) -> str:
        return self.b.cast(x, self.dtype, out)

    def const(self, value: float) -> str:
        return self.b.const(value, self.dtype)

    def vector(self, name: str, size: int) -> str:
        """Of the checkpoint. Narrowed once, when the graph is opened, like all that needs no input."""
        return self.b.cuda_vector(name, size, self.dtype)

    def linear(
        self, name: str, x: str, shape: tuple[int, int], *, bias: bool = False, shifted: bool = False,
        rows: NDArray[np.int64] | None = None,
    ) -> str:  # fmt: skip
        """x (T, in) → (T, out), with `shifted` divided by the shift; of `rows` of the matrix, where these are given."""
        scale = 1 / self.shift if shifted else 1.0
        return self.b.cuda_linear(name, x, shape, dtype=self.dtype, scale=scale, bias=bias, rows=rows)

    def contrib(self, op_type: str, *inputs: str, **attributes: float | str) -> str:
        return self.b.op(op_type, *inputs, out=None, domain=CONTRIB, **attributes)

    def rotary(self, x: str, cos: str, sin: str, heads: int, **attributes: int) -> str:
        """Turn pairs of values in each head of x (·, T, width), by tables that are as wide as half a head."""
        return self.b.op("RotaryEmbedding", x, cos, sin, out=None, num_heads=heads, **attributes)

    def tables(
        self, positions: str, axis: NDArray[np.int64], frequency: Float32, shape: list[int], position_axis: int
    ) -> tuple[str, str]:
        """Cosines and sines in `shape`, in float32 first: an angle of 10,240 has no digits behind the point in 16 bits.

        Pair j turns by the position on axis[j], of those along `position_axis`, times frequency[j].
        """
        chosen = self.b.op("Gather", positions, self.b.const(axis), axis=position_axis)
        if position_axis == 0:
            chosen = self.b.op("Transpose", chosen, perm=[1, 0])
        angle = self.b.op("Mul", self.b.cast(chosen, F32), self.b.const(frequency, F32))
        angle = self.b.op("Reshape", angle, self.b.const(shape))
        return self.cast(self.b.op("Cos", angle)), self.cast(self.b.op("Sin", angle))


def in_pairs(heads: int, head_dim: int) -> NDArray[np.int64]:
    """Rows of a matrix of queries or keys, so that the two values which are turned together are neighbours.

    The model turns value i of a head with value i + C/2. Where queries and keys have the same other order, their
    products are the same; and where neighbours are turned, heads next to each other can be taken for one.
    """
    half = head_dim // 2
    order = np.stack([np.arange(half), np.arange(half) + half], axis=1).reshape(-1)
    return np.asarray((np.arange(heads)[:, None] * head_dim + order).reshape(-1), np.int64)


def vision_graph(h: _Half, config: ModelConfig, frequency: Float32 | None = None) -> Graph:
    """Pixels of images of about one size, patch by patch in merge order → one embedding per 2×2 patches.

    Its ports are `m0kit.artifact.ports.cuda_vision_ports`. What fills an image up to the size of the others is seen by
    no patch of it, and comes out as rows that nobody needs. Embeddings are divided by the shift, as the decoder takes
    them.
    """
    b, vision, width = h.b, config.vision, config.vision.width
    heads, C = vision.num_heads, vision.head_dim
    x = h.linear("visual.patch_embed.proj", _normalised(h, config), (width, vision.patch_values), shifted=True)
    frequency = powers(vision.rope_theta, C // 2) if frequency is None else frequency
    # Two heads are turned as one: the kernel starts a block for each, and that is most of its time (0.12 → 0.07 ms for
    # four pages on an H100; more heads are no faster).
    together = 2 if heads % 2 == 0 else 1
    axis, frequency = np.tile(np.repeat([0, 1], C // 4), together), np.tile(frequency, 2 * together)
    cos, sin = h.tables("positions", axis, frequency, [0, 0, together * C // 2], position_axis=2)
    of_queries = in_pairs(heads, C)
    parts = [of_queries, of_queries + width, np.arange(2 * width, 3 * width)]
    eps = vision.layer_norm_eps / h.shift**2
    added: tuple[str, str] | None = None  # what a block's last step adds to x: a product and its bias
    for i in range(vision.depth):
        block = f"visual.blocks.{i}"
        normed, x = _layer_norm(h, f"{block}.norm1", x, added, width, eps)
        qkv = f"{block}.attn.qkv"
        q, k, v = (h.linear(qkv, normed, (3 * width, width), bias=True, rows=rows) for rows in parts)
        q, k = (h.rotary(part, cos, sin, heads // together, interleaved=1) for part in (q, k))
        a = h.contrib("MultiHeadAttention", q, k, v, "", "lengths", num_heads=heads)
        o = h.linear(f"{block}.attn.proj", a, (width, width), shifted=True)
        normed, x = _layer_norm(h, f"{block}.norm2", x, (o, f"{block}.attn.proj.bias"), width, eps)
        inner = h.linear(f"{block}.mlp.fc1", normed, (vision.mlp_size, width), bias=True, shifted=True)
        inner = h.contrib("QuickGelu", inner, alpha=1.702 * h.shift)
        o = h.linear(f"{block}.mlp.fc2", inner, (width, vision.mlp_size))
        added = o, f"{block}.mlp.fc2.bias"
    merged = width * vision.merge_size**2
    normed, _ = _layer_norm(h, "visual.merger.ln_q", x, added, width, eps)
    inner = b.op("Reshape", normed, b.const([-1, merged]))
    # Gelu bends where its input does, so it needs that undivided: in float32, on a quarter of the rows.
    inner = h.linear("visual.merger.mlp.0", inner, (merged, merged), bias=True, shifted=True)
    inner = b.op("Gelu", b.op("Mul", b.cast(inner, F32), b.const(h.shift, F32)))
    inner = h.cast(b.op("Mul", inner, b.const(1 / h.shift, F32)))
    D = config.decoder.hidden_size
    embeds = h.linear("visual.merger.mlp.2", inner, (D, merged))
    bias = b.op("Mul", h.vector("visual.merger.mlp.2.bias", D), h.const(1 / h.shift))
    b.op("Add", embeds, bias, out="image_embeds")
    return b.finish(cuda_vision_ports(config, h.dtype.name))


def decoder_graph(h: _Half, config: DecoderConfig, frequency: Float32 | None = None) -> Graph:
    """Tokens of any number of sequences behind pages of earlier ones → hidden states of the rows that are wanted.

    Its ports are `m0kit.artifact.ports.cuda_decoder_ports`. All keys and values of a layer are written to their pages
    before any is read, so one sequence may see what another of the same run has written.
    """
    D, F = config.hidden_size, config.intermediate_size
    K, C, H = config.num_kv_heads, config.head_dim, config.num_heads
    b = h.b
    x = b.cuda_lookup(EMBEDDING, "token_ids", (config.vocab_size, D), dtype=h.dtype)
    if h.shift != 1:
        x = b.op("Mul", x, h.const(1 / h.shift))
    visual = b.op("Gather", "image_embeds", "image_rows", axis=0)
    x = b.op("ScatterND", x, b.op("Reshape", "image_token_index", b.const([-1, 1])), visual)
    frequency = powers(config.rope_theta, C) if frequency is None else frequency
    axis = np.repeat([0, 1, 2], config.mrope_section)
    cos, sin = h.tables("positions", axis, frequency, [1, -1, C // 2], position_axis=0)
    eps = config.rms_norm_eps / h.shift**2
    added: str | None = None
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        normed, x = _rms_norm(h, f"{layer}.input_layernorm", x, added, D, eps)
        q = h.linear(f"{layer}.self_attn.q_proj", normed, (H * C, D), bias=True)
        k = h.linear(f"{layer}.self_attn.k_proj", normed, (K * C, D), bias=True)
        v = h.linear(f"{layer}.self_attn.v_proj", normed, (K * C, D), bias=True)
        q, k = (
            b.op("Reshape", h.rotary(b.op("Reshape", part, b.const([1, -1, n * C])), cos, sin, n), b.const([-1, n * C]))
            for part, n in ((q, H), (k, K))
        )
        a = b.paged_attention(
            (q, k, v, *past_names(i), "cumulative", "past", "block_table"), "metadata",
            outs=present_names(i), num_heads=H, kv_num_heads=K,
        )  # fmt: skip
        if i == config.num_layers - 1:  # from here on the wanted rows are enough
            a, x = (b.op("Gather", rows, "last_index", axis=0) for rows in (a, x))
        o = h.linear(f"{layer}.self_attn.o_proj", a, (D, H * C), shifted=True)
        normed, x = _rms_norm(h, f"{layer}.post_attention_layernorm", x, o, D, eps)
        gate = h.linear(f"{layer}.mlp.gate_proj", normed, (F, D))
        up = h.linear(f"{layer}.mlp.up_proj", normed, (F, D))
        inner = _gated(h, gate, up, F)
        added = h.linear(f"{layer}.mlp.down_proj", inner, (D, F))
    normed, _ = _rms_norm(h, "model.norm", x, added, D, eps)
    b.cast(normed, F32, "hidden")
    return b.finish(cuda_decoder_ports(config, h.dtype.name))


def head_graph(h: _Half, config: DecoderConfig) -> Graph:
    """hidden (B, D) → logit (B,), all in float32: next to nothing is computed here, and it is the last step."""
    b, D = h.b, config.hidden_size
    x = b.op("Relu", h.linear("score.0", "hidden", (D, D), bias=True))
    b.op("Reshape", h.linear("score.2", x, (1, D), bias=True), b.const([-1]), out="logit")
    return b.finish(head_ports(config))


def _normalised(h: _Half, config: ModelConfig) -> str:
    """Pixels (I, S, 3·patch²) → what `m0kit.scoring.image.patchify` makes of them (I, S, 3·frames·patch²)."""
    b, image, vision = h.b, config.image, config.vision
    area = vision.patch_size**2
    scaled = b.op("Mul", b.cast("pixels", F32), b.const(image.rescale, F32))
    mean, std = (np.repeat(np.asarray(v, np.float32), area) for v in (image.mean, image.std))
    normal = h.cast(b.op("Div", b.op("Sub", scaled, b.const(mean, F32)), b.const(std, F32)))
    frame = b.op("Reshape", normal, b.const([0, 0, vision.in_channels, area]))
    both = b.op("Concat", *[frame] * vision.temporal_patch_size, axis=3)
    return b.op("Reshape", both, b.const([0, 0, vision.patch_values]))


def _gated(h: _Half, gate: str, up: str, width: int) -> str:
    """SiLU(gate) · up / shift in one node: ONNX Runtime has none, but a norm that multiplies what it normed by SiLU.

    Its epsilon is so large that nothing is normed: up / √(mean(up²) + ε) is up / √ε but for mean(up²) / 2ε of it, which
    is less than the last bit of float16 where √(mean(up²)) is below 45,000, and 5e-4 where a row is all at the end of
    the type. Computed in float32 inside; half the time of an activation and a product.
    """
    weight = 2.0 ** (15 if h.dtype == np.float16 else 21)  # float16 has no more; with its shift ε is 2⁴² in every type
    epsilon = (weight * h.shift) ** 2
    scale = h.b.const(np.full(width, weight), h.dtype)
    return h.contrib("GatedRMSNorm", up, scale, gate, epsilon=epsilon, activation="silu")


def _layer_norm(h: _Half, name: str, x: str, added: tuple[str, str] | None, width: int, eps: float) -> tuple[str, str]:
    """The norm of x plus what is `added`, and that sum itself."""
    weight, bias = h.vector(f"{name}.weight", width), h.vector(f"{name}.bias", width)
    if added is None:
        return h.b.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps), x
    product, offset = added
    shifted = h.vector(offset, width)
    if h.shift != 1:
        shifted = h.b.op("Mul", shifted, h.const(1 / h.shift))
    return h.b.skip_norm("SkipLayerNormalization", product, x, weight, bias, shifted, epsilon=eps)


def _rms_norm(h: _Half, name: str, x: str, added: str | None, width: int, eps: float) -> tuple[str, str]:
    """The norm of x plus what is `added`, and that sum itself."""
    weight = h.vector(f"{name}.weight", width)
    if added is None:
        return h.b.op("RMSNormalization", x, weight, axis=-1, epsilon=eps), x
    return h.b.skip_norm("SkipSimplifiedLayerNormalization", added, x, weight, epsilon=eps)
