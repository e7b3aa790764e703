"""Random weights of a model in a dictionary, for tests of what reads weights one tensor at a time."""

import numpy as np

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
