"""Other engines on the same pairs: OpenVINO in int8, llama.cpp in its own weight types. For speed, not for use.

A peer is m0kit's own `Reranker` with another engine below it, so that images, tokens and plan are the same on
both sides and a difference is the engine's. Whatever a peer cannot do with a graph of m0kit (Loops above all),
it gets in the form that suits it best. Owns those forms; what is timed is `pairs.py`'s.

    peer(Path("wide"), "openvino-int8", threads=2, scratch=Path("scratch")).score([("slm markdown", Path("page.png"))])
"""

import contextlib
import ctypes
import io
import logging
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from m0kit.artifact.manifest import Manifest
from m0kit.config import DecoderConfig, VisionConfig
from m0kit.errors import CheckpointError, DependencyError, InputError, M0kitError
from m0kit.quiet import silence_openvino
from m0kit.reranker import Reranker
from m0kit.scoring.sessions import Graph
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_parity.bench.options import require_packages
from m0kit_parity.reference import Reference

Array = NDArray[Any]
Float32 = NDArray[np.float32]
GgufType = Literal["f32", "f16", "q8_0", "q4_0", "q4_k"]

OPENVINO: Final = "openvino-int8"
# f32 is for proving that llama.cpp computes the same; nobody runs it.
LLAMA: Final[Mapping[str, GgufType]] = {f"llama-{t}": t for t in ("f16", "q8_0", "q4_0", "q4_k")}

# Columns that share one scale when OpenVINO quantises activations. Its default is 32; on full widths 256 takes a
# fifth off that, and more is no faster. A group wider than a product's input would switch that product's off.
_MAX_GROUP: Final = 256
# Tokens llama.cpp computes at once: its default. Twice of it is as fast and only needs more memory.
_LLAMA_ROWS: Final = 512


def peer(checkpoint: Path, name: str, threads: int, scratch: Path) -> Reranker:
    """The peer of that name, ready to run on a checkpoint folder; `scratch` takes the files that it needs.

    Raises CheckpointError, DependencyError with what to install.
    """
    require_packages([name])
    opened = open_checkpoint(checkpoint)
    return openvino(opened, threads) if name == OPENVINO else llama(opened, LLAMA[name], threads, scratch)


def _package(package: str, install: str, needed_by: str) -> Any:
    silence_openvino()
    try:
        return import_module(package)
    except ImportError:
        raise DependencyError(f"the peer {needed_by} needs {install}. pip install {install}") from None


# --- what the peers share ------------------------------------------------------------------------------


def _reranker(checkpoint: Checkpoint, vision: Graph, decoder: Graph) -> Reranker:
    """m0kit's scoring over two graphs of another engine; the head, two small products, is NumPy's."""
    graphs = {"vision": vision, "decoder": decoder, "head": _Head(checkpoint)}

    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> Graph:
        del folder
        assert not also, "peers have no inner results"
        return graphs[name]

    manifest = Manifest(checkpoint.config, "peer", graphs={}, runs={}, files={}, provenance={}, recipe={"weights": []})
    return Reranker(checkpoint.folder, manifest, checkpoint.config, opener)


class _Head:
    """hidden (B, D) → logit (B,)"""

    def __init__(self, checkpoint: Checkpoint) -> None:
        names = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")
        self._weights = [float32_of(checkpoint, name) for name in names]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        del outputs
        w0, b0, w2, b2 = self._weights
        return {"logit": (np.maximum(feeds["hidden"] @ w0.T + b0, 0) @ w2.T + b2)[:, 0]}


class _Embedding:
    """Rows of the embedding, and image embeddings in their places; the table stays mapped from its file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._table = checkpoint.read("model.embed_tokens.weight")  # (vocabulary, D)

    def rows(self, feeds: Mapping[str, Array]) -> Float32:
        """Feeds of m0kit's decoder → (T, D)."""
        rows: Float32 = self._table[torch.from_numpy(feeds["token_ids"])].float().numpy()
        rows[feeds["image_token_index"]] = feeds["image_embeds"]
        return rows


def float32_of(checkpoint: Checkpoint, name: str) -> Float32:
    """A tensor of the checkpoint in float32."""
    values: Float32 = checkpoint.read(name).float().numpy()
    return values


# --- OpenVINO ------------------------------------------------------------------------------------------


def openvino(checkpoint: Checkpoint, threads: int, *, int8: bool = True) -> Reranker:
    """transformers' modules through OpenVINO's converter, weights through nncf, activations in int8 as they come.

    With `int8` False the same graphs in float32: the proof that they are the model. Raises DependencyError.
    """
    ov = _package("openvino", "openvino", OPENVINO)
    reference, config = Reference.load(checkpoint.folder), checkpoint.config
    core, decoder, vision = reference.core, config.decoder, config.vision
    T, P = 6, 2 * config.image.merge_size**2  # of the example that is traced; the shapes below are what is taken
    modules: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], list[list[int]]]] = {
        "vision": (
            _Vision(core.visual, vision),
            (torch.zeros(P, vision.patch_values), torch.zeros(P, 2, dtype=torch.int64)),
            [[-1, vision.patch_values], [-1, 2]],
        ),
        "decoder": (
            _Decoder(core.language_model, decoder),
            (torch.zeros(T, decoder.hidden_size), torch.zeros(3, T, dtype=torch.int64), torch.zeros(T, T),
             torch.tensor([1, T - 1])),
            [[-1, decoder.hidden_size], [3, -1], [-1, -1], [-1]],
        ),
    }  # fmt: skip
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # what is not int8; the default may be bfloat16
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": quantisation_group(decoder, vision) if int8 else 0,
    }
    engine, compiled = ov.Core(), {}
    for name, (module, example, shapes) in modules.items():
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the converter still uses in torch and transformers
            model = ov.convert_model(module.eval(), example_input=example, input=[ov.PartialShape(s) for s in shapes])
        if int8:
            model = compress(model)
        compiled[name] = engine.compile_model(model, "CPU", settings)
    return _reranker(
        checkpoint, _OpenVinoVision(compiled["vision"]), _OpenVinoDecoder(compiled["decoder"], _Embedding(checkpoint))
    )


def compress(model: Any) -> Any:
    """Every matrix as int8 with a scale per row, by OpenVINO's own tool."""
    nncf = _package("nncf", "nncf", OPENVINO)
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its bar moves the cursor, and stdout is for results
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    finally:
        logger.setLevel(level)


def quantisation_group(decoder: DecoderConfig, vision: VisionConfig) -> int:
    """The largest power of two up to 256 that divides the input width of every product inside the layers."""
    widths = (decoder.hidden_size, decoder.intermediate_size, vision.width, vision.mlp_size, _MAX_GROUP)
    return math.gcd(*widths)


class _Decoder(nn.Module):
    """m0kit's decoder on transformers' modules, without Loops: one mask for all pieces of a run."""

    def __init__(self, model: Any, config: DecoderConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(
        self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor:
        """embeds (T, D), positions (3, T), mask (T, T) to add, last (B,) → hidden (B, D).

        As in m0kit only the wanted rows ask and go through the MLP in the last layer.
        """
        heads, kv_heads, dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        cos, sin = (table[0][:, None] for table in self.model.rotary_emb(embeds, positions[:, None]))  # (T, 1, C)
        x = embeds
        for i, layer in enumerate(self.model.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            k = _rotate(attention.k_proj(h).view(-1, kv_heads, dim), cos, sin)
            v = attention.v_proj(h).view(-1, kv_heads, dim)
            if i == self.config.num_layers - 1:
                x, h, cos, sin, mask = (rows.index_select(0, last) for rows in (x, h, cos, sin, mask))
            q = _rotate(attention.q_proj(h).view(-1, heads, dim), cos, sin)
            k, v = (rows.repeat_interleave(heads // kv_heads, 1) for rows in (k, v))
            x = x + attention.o_proj(_attend(q, k, v, mask))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden: torch.Tensor = self.model.norm(x)
        return hidden


class _Vision(nn.Module):
    """m0kit's vision graph on transformers' modules, for one image."""

    def __init__(self, model: Any, config: VisionConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """patches (P, 1176), positions (P, 2) → image_embeds (V, D)."""
        heads, dim = self.config.num_heads, self.config.head_dim
        cos, sin = (table[:, None] for table in self.model.rotary_pos_emb(patches, positions))  # (P, 1, C)
        x = F.linear(patches, self.model.patch_embed.proj.weight.flatten(1))
        for block in self.model.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).view(-1, 3, heads, dim).unbind(1)
            x = x + block.attn.proj(_attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v))
            x = x + block.mlp(block.norm2(x))
        merged: torch.Tensor = self.model.merger(x)
        return merged


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head of x (T, H, C) by tables (T, 1, C)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """q (N, H, C), k and v (T, H, C), mask (N, T) → (N, H·C)"""
    q, k, v = (rows.transpose(0, 1)[None] for rows in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[None, None])
    return out[0].transpose(0, 1).flatten(1)


class _OpenVinoVision:
    """Feeds of m0kit's vision graph, image by image."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        del outputs
        patches, positions = feeds["patches"], feeds["positions"]
        embeds = [np.array(self._compiled([patches[a:b], positions[a:b]])[0]) for a, b in feeds["images"]]
        return {"image_embeds": np.concatenate(embeds)}


class _OpenVinoDecoder:
    """Feeds of m0kit's decoder, one run at a time."""

    def __init__(self, compiled: Any, embedding: _Embedding) -> None:
        self._compiled, self._embedding = compiled, embedding

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        del outputs
        embeds = self._embedding.rows(feeds)
        mask = additive_mask(feeds["pieces"], len(embeds))
        return {"hidden": np.array(self._compiled([embeds, feeds["positions"], mask, feeds["last_index"]])[0])}


def additive_mask(pieces: NDArray[np.int64], num_tokens: int) -> Float32:
    """(T, T): 0 where a row may look and −inf elsewhere, from the planner's table (N, 9) of a run without past."""
    mask = np.full((num_tokens, num_tokens), -np.inf, np.float32)
    for q0, q1, a0, a1, b0, b1, *_ in pieces.tolist():
        mask[q0:q1, a0:a1] = 0
        rows, columns = q1 - q0, b1 - b0
        mask[q0:q1, b0:b1][np.tri(rows, columns, columns - rows, dtype=np.bool_)] = 0
    return mask


# --- llama.cpp -----------------------------------------------------------------------------------------


def llama(checkpoint: Checkpoint, kind: GgufType, threads: int, scratch: Path) -> Reranker:
    """The decoder in llama.cpp with weights of one type, text only. Raises DependencyError, M0kitError.

    Text alone turns all three axes of M-RoPE alike, which is the plain rotation of the architecture qwen2.
    """
    lib = _package("llama_cpp", "llama-cpp-python", f"llama-{kind}")
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it prints every tensor it loads
    scratch.mkdir(parents=True, exist_ok=True)
    plain: Literal["f32", "f16"] = "f32" if kind == "f32" else "f16"
    path = scratch / f"decoder-{plain}.gguf"
    if not path.exists():
        write_gguf(checkpoint, path, plain)
    if kind != plain:
        source, path = path, scratch / f"decoder-{kind}.gguf"
        _quantise(lib, source, path, kind, threads)
    rows = checkpoint.config.prompt.max_length
    decoder = LlamaDecoder(lib, path, rows, threads, _Embedding(checkpoint), exact=kind == "f32")
    return _reranker(checkpoint, _NoVision(), decoder)


def write_gguf(checkpoint: Checkpoint, path: Path, kind: Literal["f32", "f16"]) -> None:
    """The decoder as a GGUF file of architecture qwen2 that takes embeddings and gives the last hidden state.

    It has no vocabulary: rows of the embedding come from outside, as they do for images in every engine, and
    the output matrix is the identity, so that what llama.cpp calls logits is the state that m0's head takes.
    Raises DependencyError, and CheckpointError for a weight too large for float16.
    """
    gguf = _package("gguf", "gguf", f"llama-{kind}")
    config = checkpoint.config.decoder
    width = config.hidden_size
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(width)
    stored = np.float32 if kind == "f32" else np.float16
    writer.add_tensor("token_embd.weight", np.zeros((width, width), stored))  # must be there; never looked at
    writer.add_tensor("output.weight", np.eye(width, dtype=np.float32))
    writer.add_tensor("output_norm.weight", float32_of(checkpoint, "model.norm.weight"))
    known = set(checkpoint.names)
    for i in range(config.num_layers):
        for ours, theirs in _GGUF_NAMES.items():
            for part in ("weight", "bias"):
                name = f"model.layers.{i}.{ours}.{part}"
                if name not in known:
                    continue
                values = float32_of(checkpoint, name)
                if values.ndim > 1:  # llama.cpp takes norms and biases in float32 alone
                    with np.errstate(over="ignore"):
                        values = values.astype(stored)
                    if not np.isfinite(values).all():
                        raise CheckpointError(f"{name} holds values that float16 cannot, so llama.cpp is no peer here.")
                writer.add_tensor(f"blk.{i}.{theirs}.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# llama.cpp's names of a layer's parts (docs of the GGUF format, "Standardized tensor names").
_GGUF_NAMES: Final[Mapping[str, str]] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _quantise(lib: Any, source: Path, target: Path, kind: GgufType, threads: int) -> None:
    """llama.cpp's own quantisation of a float16 file; Q4_K is the published mixture Q4_K_M."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = {
        "q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0,
        "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0,
        "q4_k": lib.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    }[kind]
    params.nthread = threads
    params.quantize_output_tensor = False  # the identity
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise M0kitError(f"{source}: llama.cpp could not write it as {kind}. See that {target.parent} has room.")


class _NoVision:
    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        del feeds, outputs
        raise InputError("llama.cpp is a peer for text alone, and a pair has an image. Leave such pairs out.")


class LlamaDecoder:
    """Feeds of m0kit's decoder, pair by pair, each from an empty cache."""

    def __init__(self, lib: Any, path: Path, max_tokens: int, threads: int, embedding: _Embedding, exact: bool) -> None:
        self._lib, self._embedding = lib, embedding
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not model:
            raise M0kitError(f"{path}: llama.cpp cannot load it. Remove it, and see that memory and disk have room.")
        weakref.finalize(self, lib.llama_model_free, model)
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = max_tokens
        params.n_ubatch = _LLAMA_ROWS
        params.n_threads = params.n_threads_batch = threads
        # Flash attention, which is faster, works in float16 even where the cache is float32.
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = lib.GGML_TYPE_F32 if exact else lib.GGML_TYPE_F16
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise M0kitError(f"{path}: llama.cpp has no memory for prompts of {max_tokens} tokens.")
        weakref.finalize(self, lib.llama_free, self._context)  # run before the model's: last made, first run

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        del outputs
        rows = self._embedding.rows(feeds)
        hidden = np.zeros((len(feeds["last_pieces"]), rows.shape[1]), np.float32)
        for i, (_, _, a0, a1, b0, b1, *_) in enumerate(feeds["last_pieces"].tolist()):
            if a1 - a0 + b1 - b0 > 1:  # a single token is no prompt: it fills up the run, and nobody looks at it
                hidden[i] = self._last_hidden(np.concatenate([rows[a0:a1], rows[b0:b1]]))
        return {"hidden": hidden}

    def _last_hidden(self, embeds: Float32) -> Float32:
        """embeds (T, D) of one prompt → (D,)"""
        lib, (num_tokens, width) = self._lib, embeds.shape
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        batch = lib.llama_batch_init(num_tokens, width, 1)
        try:
            batch.n_tokens = num_tokens
            rows = np.arange(num_tokens)
            for field, values in (
                (batch.embd, embeds.reshape(-1)),
                (batch.pos, rows),
                (batch.n_seq_id, np.ones_like(rows)),
                (batch.logits, rows == num_tokens - 1),
            ):
                np.ctypeslib.as_array(field, values.shape)[:] = values
            for token in range(num_tokens):
                batch.seq_id[token][0] = 0
            if code := lib.llama_decode(self._context, batch):
                raise M0kitError(f"llama.cpp failed on a prompt of {num_tokens} tokens (llama_decode gave {code}).")
            return np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, -1), (width,)).copy()
        finally:
            lib.llama_batch_free(batch)
