"""The rotary frequencies of a model, θ^(−2j/dim): computed once by PyTorch, then kept by every artifact.

One last bit of a frequency is 1e-3 radians at position 10,000, and no other library rounds powers as PyTorch does; so
they are taken from PyTorch, and from an artifact where there is one, which needs no PyTorch.

    Frequencies.of(config).decoder                          # (head_dim / 2,) float32
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from m0kit.config import ModelConfig
from m0kit.errors import ArtifactDamagedError
from m0kit_quant.weights import Float32


@dataclass(frozen=True, slots=True, eq=False)
class Frequencies:
    """Radians a position."""

    vision: Float32  # (head_dim / 4,): of the row, and the same of the column
    decoder: Float32  # (head_dim / 2,)

    @classmethod
    def of(cls, config: ModelConfig) -> "Frequencies":
        """By PyTorch."""
        return cls(
            powers(config.vision.rope_theta, config.vision.head_dim // 2),
            powers(config.decoder.rope_theta, config.decoder.head_dim),
        )

    @classmethod
    def stored(cls, graphs: Mapping[str, onnx.ModelProto], config: ModelConfig) -> "Frequencies":
        """Those of an artifact's graphs "vision" and "decoder". Raises ArtifactDamagedError when they are not there."""
        vision, decoder = (_read(graphs[name].graph) for name in ("vision", "decoder"))
        wanted = ((config.vision.head_dim // 2,), (config.decoder.head_dim // 2,))
        if (vision.shape, decoder.shape) != wanted or not np.isfinite([*vision, *decoder]).all():
            raise ArtifactDamagedError("the graphs hold no rotary frequencies of this model. Export again.")
        return cls(vision[: len(vision) // 2], decoder)


def powers(theta: float, dim: int) -> Float32:
    """θ^(−2j/dim), (dim/2,) float32, by PyTorch."""
    import torch  # three seconds, which an artifact saves

    exponent = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    return np.asarray((1.0 / (theta**exponent)).numpy(), np.float32)


def _read(graph: onnx.GraphProto) -> Float32:
    """What positions are multiplied with before the first cosine; empty where there is none."""
    made = {output: node for node in graph.node for output in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        angle = made.get(node.input[0]) if node.op_type == "Cos" and node.input else None
        if angle is not None and angle.op_type == "Mul" and angle.input[1:] and angle.input[1] in values:
            tensor = values[angle.input[1]]
            if tensor.data_type != onnx.TensorProto.FLOAT or tensor.data_location == onnx.TensorProto.EXTERNAL:
                break
            try:
                return np.asarray(numpy_helper.to_array(tensor), np.float32)
            except ValueError:  # a shape that its bytes do not fill
                break
    return np.zeros(0, np.float32)
