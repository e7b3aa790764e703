"""A thin ONNX graph builder: nodes, constants, and weights that live in an external data file.

Owns how a graph is put together and how a product with stored weights is spelled in ONNX, scheme by scheme; not
what the model computes (`m0kit_export.graphs` does), nor how weights become fewer bits (`m0kit_quant` does).
Tensors are declared by name and shape and get their place in the data file at once; their values are written
later, one tensor at a time, by whoever streams the checkpoint.

    builder = Builder("head", Recipe.default("fp32"))
    y = builder.linear("score.0", "hidden", (64, 64), bias=True)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike
from onnx import TensorProto, helper, numpy_helper

from m0kit.artifact.ports import GraphPorts, Port
from m0kit_quant import int8, nf4
from m0kit_quant.recipe import Recipe
from m0kit_quant.schemes import FLOATS, Scheme

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11  # the IR that came with opset 23
ALIGNMENT = 4096  # a memory page: mapped weights never share a page, and any vector load is aligned

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators, of which quantised products are made

_TYPES: dict[Any, int] = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    FLOATS["bf16"]: TensorProto.BFLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.bool_): TensorProto.BOOL,
}


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the data file: a tensor, or one of the arrays that a scheme makes of it."""

    name: str  # of the initializer
    key: str  # the scheme's name for it
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int  # bytes, a multiple of ALIGNMENT

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the checkpoint and what is stored for it. `shape` may flatten the checkpoint's."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme
    parts: tuple[Part, ...]
    half: bool  # its product may be in float16

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Graph:
    """A finished graph: the model without its values, and what must be written where."""

    model: onnx.ModelProto
    weights: tuple[Weight, ...]
    ports: GraphPorts  # what it observes, too

    @property
    def data_bytes(self) -> int:
        return max((p.offset + p.num_bytes for w in self.weights for p in w.parts), default=0)


class Builder:
    """Collects one graph. Every method that makes a node returns the name of its (first) result.

    `recipe` says how matrices are stored; vectors that belong to normalisations are always float32.
    With `observe` the graph also gives out, for the input x (T, K) of every product `name`, `{name}.peak` (K,), its
    max|x|, `{name}.energy` (K,), its sum of squares, and `{name}.rows` (1,), its T: for calibration.
    """

    def __init__(self, name: str, recipe: Recipe, observe: bool = False) -> None:
        self.name = name
        self.observe = observe
        self._recipe = recipe
        # With quantised products a graph is for ONNX Runtime alone, and may use its other operators too.
        self.contrib = any(scheme not in FLOATS for scheme in recipe.schemes)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._weights: dict[str, Weight] = {}
        self._observed: list[Port] = []
        self._quantized: dict[str, tuple[str, str]] = {}  # activation → its integers and the scales of its rows
        self._uses_contrib = False  # whether an operator is ONNX Runtime's own, inside a loop too
        self._end = 0
        self._serial = 0

    # --- nodes -------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """One node with one result."""
        out = out or self._fresh(op_type)
        self._uses_contrib |= attributes.get("domain") == CONTRIB
        self._nodes.append(helper.make_node(op_type, list(inputs), [out], name=out, **attributes))
        return out

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        """ONNX Split into parts of the given sizes."""
        outs = [self._fresh("Split") for _ in sizes]
        node = helper.make_node("Split", [x, self.const(list(sizes))], outs, name=outs[0], axis=axis)
        self._nodes.append(node)
        return outs

    def cast(self, x: str, dtype: DTypeLike) -> str:
        return self.op("Cast", x, to=_TYPES[np.dtype(dtype)])

    def const(self, value: Any, dtype: DTypeLike = np.int64) -> str:
        """A small constant, kept inside the graph; equal constants are shared."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"const_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def loop(self, count: str, initial: str, body: onnx.GraphProto, out: str | None = None) -> str:
        """Run `body` `count` (scalar) times over one carried tensor that starts as `initial`.

        The condition is spelled out as a constant: the ONNX reference evaluator takes a missing one
        for false.
        """
        out = out or self._fresh("Loop")
        always = self.const(True, np.bool_)
        self._nodes.append(helper.make_node("Loop", [count, always, initial], [out], name=out, body=body))
        return out

    # --- weights -----------------------------------------------------------------------------------

    def vector(self, name: str, size: int, scheme: str = "fp32") -> str:
        """Declare a vector of the checkpoint, stored as floats."""
        return self._declare(name, (size,), Scheme(scheme))[""]

    def lookup(self, name: str, ids: str, shape: tuple[int, int]) -> str:
        """Rows `ids` (T,) of the table `name` (V, D) as float32 (T, D); only these rows are ever read."""
        scheme = self._recipe.scheme(name, shape)
        part = self._declare(name, shape, scheme)
        if scheme.is_float:
            rows = self.op("Gather", part[""], ids, axis=0)
            return rows if scheme.name == "fp32" else self.cast(rows, np.float32)
        if scheme.name == "int8":
            rows = self.cast(self.op("Gather", part["int8"], ids, axis=0), np.float32)
            scale = self.op("Gather", part["scale"], ids, axis=0)
            return self.op("Mul", rows, self.op("Reshape", scale, self.const([-1, 1])))
        assert scheme.block is not None
        blocks = shape[1] // scheme.block
        rows = self._nibbles(self.op("Gather", part["int4"], ids, axis=0), [-1, blocks, scheme.block])
        zero = self._nibbles(self.op("Gather", part["zero_point"], ids, axis=0), [-1, blocks + blocks % 2, 1])
        if blocks % 2:
            zero = self.op("Slice", zero, self.const([0]), self.const([blocks]), self.const([1]))
        scale = self.op("Reshape", self.op("Gather", part["scale"], ids, axis=0), self.const([-1, blocks, 1]))
        values = self.op("Mul", self.op("Sub", rows, zero), scale)
        return self.op("Reshape", values, self.const([-1, shape[1]]))

    def linear(
        self,
        name: str,
        x: str,
        shape: tuple[int, int],
        *,
        bias: bool,
        half: bool = False,
        out: str | None = None,
    ) -> str:
        """x (T, in) → (T, out), float32 in and out, by the matrix `name`.weight (out, in) as the recipe stores it.

        fp16: the product itself runs in float16 only where `half` says that its values stay in range; elsewhere,
        and for bf16, the stored weight is widened as it is used.
        """
        if self.observe:
            self._watch(name, x, shape[1])
        scheme = self._recipe.scheme(f"{name}.weight", shape)
        part = self._declare(f"{name}.weight", shape, scheme, half)
        offset = [self.vector(f"{name}.bias", shape[0], "fp16" if scheme.name == "fp16" else "fp32")] if bias else []
        if scheme.name == "fp32":
            return self.op("Gemm", x, part[""], *offset, transB=1, out=out)
        if scheme.name == "fp16" and half:
            y = self.op("Gemm", self.cast(x, np.float16), part[""], *offset, transB=1)
            return self.op("Cast", y, to=TensorProto.FLOAT, out=out)
        if scheme.is_float:
            if scheme.name == "fp16":
                offset = [self.cast(vector, np.float32) for vector in offset]
            return self.op("Gemm", x, self.cast(part[""], np.float32), *offset, transB=1, out=out)
        last = None if offset else out
        if scheme.name == "int8":
            integers, row_scale = self._quantize_rows(x)
            y = self.op(
                *("MatMulIntegerToFloat", integers, part["int8"], self.const(1, np.float32), part["scale"]),
                self.const(int8.ZERO_POINT, np.uint8),
                domain=CONTRIB,
            )
            y = self.op("Mul", y, row_scale, out=last)
        elif scheme.name == "nf4":
            y = self.op(
                *("MatMulBnb4", x, part["nf4"], part["absmax"]), out=last, domain=CONTRIB,
                K=shape[1], N=shape[0], block_size=nf4.BLOCK_SIZE, quant_type=1,
            )  # fmt: skip
        else:
            y = self.op(
                *("MatMulNBits", x, part["int4"], part["scale"], part["zero_point"]), out=last, domain=CONTRIB,
                K=shape[1], N=shape[0], bits=4, block_size=scheme.block, accuracy_level=4,
            )  # fmt: skip
        return self.op("Add", y, offset[0], out=out) if offset else y

    def _quantize_rows(self, x: str) -> tuple[str, str]:
        """x (T, K) → uint8 (T, K) and the scale of each row (T, 1); once for all products that take x.

        `m0kit_quant.int8.quantize_activation` is the same in numpy.
        """
        if x not in self._quantized:
            peak = self.op("ReduceMax", self.op("Abs", x), self.const([1]), keepdims=1)
            peak = self.op("Max", peak, self.const(int8.SMALLEST, np.float32))
            scale = self.op("Mul", peak, self.const(1 / int8.LEVELS, np.float32))
            flat = self.op("Reshape", scale, self.const([-1]))
            zero = self.op("Expand", self.const(int8.ZERO_POINT, np.uint8), self.op("Shape", flat))
            self._quantized[x] = self.op("QuantizeLinear", x, flat, zero, axis=0), scale
        return self._quantized[x]

    def _nibbles(self, packed: str, shape: list[int]) -> str:
        """Bytes → float32 values of 0…15 in `shape`, the low half of a byte first."""
        low = self.op("BitwiseAnd", packed, self.const(15, np.uint8))
        high = self.op("BitShift", packed, self.const(4, np.uint8), direction="RIGHT")
        halves = [self.op("Unsqueeze", self.cast(half, np.float32), self.const([-1])) for half in (low, high)]
        return self.op("Reshape", self.op("Concat", *halves, axis=-1), self.const(shape))

    def _watch(self, name: str, x: str, size: int) -> None:
        zero = self.const([0])
        self.op("ReduceMax", self.op("Abs", x), zero, keepdims=0, out=f"{name}.peak")
        self.op("ReduceSumSquare", x, zero, keepdims=0, out=f"{name}.energy")
        self.op("Shape", x, end=1, out=f"{name}.rows")
        self._observed += [Port(f"{name}.{what}", "float32", (size,)) for what in ("peak", "energy")]
        self._observed.append(Port(f"{name}.rows", "int64", (1,)))

    def _declare(self, name: str, shape: tuple[int, ...], scheme: Scheme, half: bool = False) -> dict[str, str]:
        """Give the parts of a tensor their places; returns the initializer of each."""
        if name in self._weights:
            raise AssertionError(f"weight {name} is declared twice")
        parts = []
        for key, (part_shape, dtype) in scheme.layout(shape).items():
            part = Part(f"{name}.{key}" if key else name, key, part_shape, dtype, self._end)
            self._end = -(-(part.offset + part.num_bytes) // ALIGNMENT) * ALIGNMENT
            tensor = TensorProto(name=part.name, data_type=_TYPES[dtype], dims=part_shape)
            tensor.data_location = TensorProto.EXTERNAL
            places = {"location": f"{self.name}.onnx.data", "offset": part.offset, "length": part.num_bytes}
            for place, value in places.items():
                tensor.external_data.add(key=place, value=str(value))
            self._initializers.append(tensor)
            parts.append(part)
        self._weights[name] = Weight(name, tuple(shape), scheme, tuple(parts), half)
        return {part.key: part.name for part in parts}

    # --- the whole ---------------------------------------------------------------------------------

    def subgraph(
        self,
        name: str,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        start: int,
    ) -> onnx.GraphProto:
        """Take the nodes added since `start` (a value of `mark()`) out and make them a subgraph."""
        nodes, self._nodes = self._nodes[start:], self._nodes[:start]
        inside = {name for node in nodes for name in node.output}
        self._quantized = {x: found for x, found in self._quantized.items() if found[0] not in inside}
        return helper.make_graph(nodes, name, list(inputs), list(outputs))

    def mark(self) -> int:
        return len(self._nodes)

    def finish(self, ports: GraphPorts) -> Graph:
        ports = GraphPorts(ports.inputs, (*ports.outputs, *self._observed))
        inputs, outputs = (
            [helper.make_tensor_value_info(p.name, _TYPES[np.dtype(p.dtype)], list(p.shape)) for p in side]
            for side in (ports.inputs, ports.outputs)
        )
        graph = helper.make_graph(self._nodes, self.name, inputs, outputs, self._initializers)
        opsets = {"": OPSET, **({CONTRIB: 1} if self._uses_contrib else {})}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
            ir_version=IR_VERSION,
            producer_name="m0kit",
        )
        return Graph(model, tuple(self._weights.values()), ports)

    def _fresh(self, op_type: str) -> str:
        self._serial += 1
        return f"{op_type}_{self._serial}"
