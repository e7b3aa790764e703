"""The tiny model in widths that suit bitsandbytes, and loaded by transformers in 4 bits. Not a test file."""

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from tests.export import tiny_model
from torch import nn
from transformers import BitsAndBytesConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration


class Published(Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """The published class, but for its tied lm_head: since transformers 5 an Identity cannot be tied."""

    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012  (transformers' own form)

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.lm_head = nn.Identity()
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.post_init()


def raw_config() -> dict[str, Any]:
    """The tiny one in multiples of the block: other rows, bitsandbytes 0.50 dequantises wrongly (on AVX-512)."""
    raw = tiny_model.published_config()
    raw["hidden_size"], raw["intermediate_size"] = 64, 128
    raw["rope_scaling"] = {"mrope_section": [2, 3, 3], "type": "mrope"}
    raw["vision_config"] |= {"embed_dim": 64, "hidden_size": 64}
    return raw


def make_model() -> Published:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return Published(Qwen2VLConfig(**raw_config())).float().eval()


def write_checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """Random weights of realistic size, under the names that transformers 5 looks for."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in make_model().named_parameters()}
    tensors = {name: (torch.randn(shape, generator=generator) * 0.2).to(dtype) for name, shape in shapes.items()}
    return tiny_model.write_checkpoint(folder, tensors, raw_config())


def load_in_4bit(folder: Path, dtype: torch.dtype, **options: Any) -> Published:
    """By transformers; computes in `dtype`."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Published
        model, report = Published.from_pretrained(
            folder, dtype=dtype, quantization_config=config, output_loading_info=True
        )
    assert not any(report.values()), report
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # or it would multiply in bf16 whatever was asked for
    return model.eval()


def quantised_names(model: nn.Module) -> set[str]:
    """Published names of the weights in 4 bits."""
    modules = model.named_modules()
    return {tiny_model.old_name(f"{path}.weight") for path, module in modules if isinstance(module, bnb.nn.Linear4bit)}
