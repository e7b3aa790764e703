"""Weights for tests: random ones in a dictionary, for what reads one at a time, and those of a checkpoint changed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from m0kit.config import ModelConfig
from m0kit_export.names import expected_shapes
from m0kit_quant.weights import Float32


class Tensors:
    """Weights in a dictionary."""

    def __init__(self, tensors: dict[str, Float32]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Float32:
        return self.tensors[name]


def random_weights(config: ModelConfig, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        spread = 1 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.3
        centre = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")) else 0.0
        tensors[name] = (centre + spread * rng.standard_normal(shape)).astype(np.float32)
    return Tensors(tensors)


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the checkpoint in fp32 whose tensors were changed."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder
