"""Graphs of one node, in numpy as on a GPU and in ONNX Runtime on the CPU. Not a test file."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper

from m0kit_parity.cuda.reference import CudaReference
from m0kit_quant.scheme import CONTRIB

Array = NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float32), np.dtype(np.float16), BF16]
HALVES = FLOATS[1:]


def model(
    op_type: str, inputs: Sequence[Array | None], *, domain: str = CONTRIB, outputs: Sequence[str] = ("y0",),
    types: Sequence[Any] | None = None, **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    """Inputs are "x0", "x1", …, and None is left out; outputs have the type of the first input unless told."""
    element = helper.np_dtype_to_tensor_dtype
    given = {f"x{i}": array for i, array in enumerate(inputs) if array is not None}
    names = [f"x{i}" if array is not None else "" for i, array in enumerate(inputs)]
    node = helper.make_node(op_type, names, list(outputs), name=op_type, domain=domain, **attributes)
    dtypes = types or [next(iter(given.values())).dtype] * len(outputs)
    graph = helper.make_graph(
        [node], op_type,
        [helper.make_tensor_value_info(name, element(x.dtype), x.shape) for name, x in given.items()],
        [helper.make_tensor_value_info(name, element(np.dtype(t)), None)
         for name, t in zip(outputs, dtypes, strict=True) if name],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def computed(op_type: str, *inputs: Array | None, outputs: Sequence[str] = ("y0",), **more: Any) -> Any:
    """What the operator in numpy gives: an array, or a list of them for several `outputs`."""
    feeds = {f"x{i}": array for i, array in enumerate(inputs) if array is not None}
    graph = CudaReference(model(op_type, inputs, outputs=outputs, **more))
    results = [*graph.run(feeds, [name for name in outputs if name]).values()]
    return results if len(results) > 1 else results[0]


def on_cpu(op_type: str, *inputs: Array | None, outputs: Sequence[str] = ("y0",), **more: Any) -> Any:
    """The same by ONNX Runtime's kernel for CPUs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = model(op_type, inputs, outputs=outputs, **more).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    results = session.run(None, {f"x{i}": array for i, array in enumerate(inputs) if array is not None})
    return results if len(results) > 1 else results[0]


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Seeded noise."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def wide(x: Array) -> Array:
    return x.astype(np.float64)


def tensor(x: Array) -> torch.Tensor:
    """The same values for PyTorch, in float64."""
    return torch.from_numpy(wide(x))


def unit(dtype: np.dtype[Any]) -> float:
    """Half the distance from 1 to the next number: what one rounding may change, in parts."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def assert_near(actual: Array, exact: Array | torch.Tensor, roundings: float, *, atol_part: float = 1.0) -> None:
    """Within `roundings` roundings of the type of `actual`, relative to the value or to `atol_part` of the largest."""
    exact = np.asarray(exact, np.float64)
    size = np.maximum(np.abs(exact), atol_part * np.abs(exact).max(initial=0))
    assert_within(actual, exact, roundings * unit(actual.dtype) * size)


def assert_within(actual: Array, exact: Array | torch.Tensor, allowed: Array) -> None:
    """No value off by more than `allowed` for it."""
    exact = np.asarray(exact, np.float64)
    assert actual.shape == exact.shape
    assert np.isfinite(wide(actual)).all()
    off = np.abs(wide(actual) - exact)
    worst = np.argmax(off - allowed) if off.size else 0
    told = [f"{x.flat[worst]:g}" if x.size else "" for x in (off, exact, allowed)]
    assert (off <= allowed).all(), f"{told[0]} off from {told[1]}, allowed are {told[2]}"
