"""A jina-reranker-m0 of a few thousand parameters, written to disk in every form that exists.

Not a test file. The widths are pairwise different, so that a transposed or exchanged tensor cannot fit.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from m0kit.scoring.tokens import PATTERN

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 160, 48, 2, 4, 2, 56
DEPTH, WIDTH, VISION_HEADS = 2, 32, 2
MROPE = [2, 2, 2]
START, END, PAD = 150, 151, 152


def published_config() -> dict[str, Any]:
    """config.json as published: flat, and silent about what equals the defaults of the vision class."""
    return {
        "architectures": ["JinaVLForRanking"],
        "auto_map": {"AutoModel": "modeling.JinaVLForRanking"},
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_token_id": PAD,
        "intermediate_size": MLP,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2_vl",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": MROPE, "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "video_token_id": 153,
        "vision_config": {
            "depth": DEPTH,
            "embed_dim": WIDTH,
            "hidden_size": HIDDEN,
            "in_chans": 3,
            "model_type": "qwen2_vl",
            "num_heads": VISION_HEADS,
            "spatial_patch_size": 14,
        },
        "vision_end_token_id": END,
        "vision_start_token_id": START,
        "vision_token_id": 154,
        "vocab_size": VOCAB,
    }


def preprocessor_config() -> dict[str, Any]:
    return {
        "min_pixels": 3136,
        "max_pixels": 602112,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


def tokenizer() -> dict[str, Any]:
    """A character is a token."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": content, "special": True, **flags}
            for number, content in ((START, "<|vision_start|>"), (END, "<|vision_end|>"), (PAD, "<|image_pad|>"))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": {chr(33 + number): number for number in range(START)}, "merges": []},
    }


class Reranker(nn.Module):
    """The attribute names of the published class on today's transformers: model.language_model, model.visual."""

    def __init__(self) -> None:
        super().__init__()
        raw = published_config()
        self.model = Qwen2VLModel(Qwen2VLConfig(**raw))
        self.score = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def make_model(seed: int = 0) -> Reranker:
    """Random weights of realistic size, biases and norms included (transformers starts those at 0 and 1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = Reranker().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def old_name(name: str) -> str:
    """From the module names of transformers 4.52 and later to the published ones."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def published_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors under their published names. Buffers are not stored."""
    return {old_name(name): p.detach().clone().contiguous() for name, p in model.named_parameters()}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_checkpoint(
    folder: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """A folder in the published form."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", published_config() if config is None else config)
    write_json(folder / "preprocessor_config.json", preprocessor_config())
    write_json(folder / "tokenizer.json", tokenizer())
    save_file(
        published_tensors(make_model()) if tensors is None else tensors,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    edit(raw)
    write_json(path, raw)


def linked(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)
