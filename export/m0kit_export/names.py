"""What the tensors of jina-reranker-m0 are called, then and now, and their shapes. Knows no files and needs nothing.

expected_shapes(config)["model.norm.weight"]           # (1536,) for the published model
canonical_name("model.language_model.norm.weight")     # "model.norm.weight"
spelled("model.norm.weight", nested=True)              # and back
"""

from collections.abc import Iterable

from m0kit.config import ModelConfig
from m0kit_quant.weights import EMBEDDING

# transformers 4.52 moved both towers under `model.`: (since, before).
_NESTED = (("model.language_model.", "model."), ("model.visual.", "visual."))
# One published source names the head's layers by role.
_ROLES = (("score.dense.", "score.0."), ("score.out_proj.", "score.2."))
# What torch.compile, FSDP and activation checkpointing put into names; none of it is a part of the model's own.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every tensor that scoring uses, in the order of the computation."""
    v, d = config.vision, config.decoder
    size, merged = d.hidden_size, v.width * v.merge_size**2
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (
            v.width,
            v.in_channels,
            v.temporal_patch_size,
            v.patch_size,
            v.patch_size,
        )
    }

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (v.width,)

    for i in range(v.depth):
        block = f"visual.blocks.{i}"
        layer_norm(f"{block}.norm1")
        layer_norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", 3 * v.width, v.width)
        linear(f"{block}.attn.proj", v.width, v.width)
        linear(f"{block}.mlp.fc1", v.mlp_size, v.width)
        linear(f"{block}.mlp.fc2", v.width, v.mlp_size)
    layer_norm("visual.merger.ln_q")
    linear("visual.merger.mlp.0", merged, merged)
    linear("visual.merger.mlp.2", size, merged)

    shapes[EMBEDDING] = (d.vocab_size, size)
    for i in range(d.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (size,)
        linear(f"{layer}.self_attn.q_proj", d.num_heads * d.head_dim, size)
        linear(f"{layer}.self_attn.k_proj", d.kv_size, size)
        linear(f"{layer}.self_attn.v_proj", d.kv_size, size)
        linear(f"{layer}.self_attn.o_proj", size, d.num_heads * d.head_dim, bias=False)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (size,)
        linear(f"{layer}.mlp.gate_proj", d.intermediate_size, size, bias=False)
        linear(f"{layer}.mlp.up_proj", d.intermediate_size, size, bias=False)
        linear(f"{layer}.mlp.down_proj", size, d.intermediate_size, bias=False)
    shapes["model.norm.weight"] = (size,)
    linear("score.0", size, size)
    linear("score.2", 1, size)
    return shapes


def canonical_name(name: str) -> str:
    """The published name of a tensor or module stored under either naming scheme, or inside a training wrapper."""
    name = unwrapped(name)
    return _renamed(name, (*_NESTED, *_ROLES))


def spelled(name: str, *, nested: bool) -> str:
    """A canonical name as transformers spells it: `nested` since 4.52, and as it is before."""
    return _renamed(name, [(before, since) for since, before in _NESTED]) if nested else name


def is_nested(names: Iterable[str]) -> bool:
    """Whether tensors or modules are named as since transformers 4.52; by majority, where somebody renamed a part."""
    votes = 0
    for name in names:
        if name.startswith(tuple(since for since, _ in _NESTED)):
            votes += 1
        elif name.startswith(("model.layers.", EMBEDDING.removesuffix("weight"), "visual.")):
            votes -= 1
    return votes >= 0


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def unwrapped(name: str) -> str:
    """The name without what training wrappers put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":  # DistributedDataParallel, DeepSpeed
        del parts[0]
    return ".".join(parts)
