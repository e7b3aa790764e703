"""A thin ONNX graph builder: nodes, constants, and weights that live in an external data file.

Owns how a graph is put together; not what the model computes (`m0kit_export.graphs` does), nor how a product with
stored weights is spelled (the weights' scheme in `m0kit_quant` does).
Tensors are declared by name and shape and get their place in the data file at once; their values are written
later, one tensor at a time, by whoever streams the checkpoint.

    builder = Builder("head", Recipe.default("fp32"))
    y = builder.linear("score.0", "hidden", (64, 64), bias=True)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from m0kit import precision
from m0kit.artifact.ports import GraphPorts, Port, data_name
from m0kit_quant.floats import FLOATS
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import CONTRIB, Scheme
from m0kit_quant.schemes import SCHEMES

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11  # the IR that came with opset 23
ALIGNMENT = 4096  # a memory page: mapped weights never share a page, and any vector load is aligned

TYPES: dict[Any, int] = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    FLOATS["bf16"]: TensorProto.BFLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
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
    half: bool  # its product is in float16

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
    With `contrib` the graph is for ONNX Runtime alone, and may use its own operators; with quantised products it is so.
    """

    def __init__(
        self, name: str, recipe: Recipe, observe: bool = False, contrib: bool = False, like: Graph | None = None
    ) -> None:
        """`like`: a graph of the same model, whose data file this one reads."""
        self.name = name
        self._places = None if like is None else {weight.name: weight for weight in like.weights}
        self.observe = observe
        self._recipe = recipe
        self.quantized = any(precision.SCHEMES[scheme].operator for scheme in recipe.schemes)
        self.contrib = contrib or self.quantized
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._weights: dict[str, Weight] = {}
        self._observed: list[Port] = []
        self._shared: dict[str, tuple[str, str]] = {}  # of `once`
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

    def cast(self, x: str, dtype: DTypeLike, out: str | None = None) -> str:
        return self.op("Cast", x, to=TYPES[np.dtype(dtype)], out=out)

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

    def skip_norm(self, op_type: str, *inputs: str, epsilon: float) -> tuple[str, str]:
        """A node of com.microsoft that adds and normalises: what it gives, and the sum before it."""
        out, total = self._fresh(op_type), self._fresh("Sum")
        self._uses_contrib = True
        outs = [out, "", "", total]
        self._nodes.append(helper.make_node(op_type, inputs, outs, name=out, domain=CONTRIB, epsilon=epsilon))
        return out, total

    def paged_attention(self, inputs: Sequence[str], metadata: str, *, outs: Sequence[str], **heads: int) -> str:
        """com.microsoft.PagedAttention: its first eight inputs and the last; `outs` name the updated pool."""
        out = self._fresh("PagedAttention")
        self._uses_contrib = True
        ins = [*inputs, *[""] * 8, metadata]
        self._nodes.append(helper.make_node("PagedAttention", ins, [out, *outs], name=out, domain=CONTRIB, **heads))
        return out

    # --- weights -----------------------------------------------------------------------------------

    def vector(self, name: str, size: int, scheme: str = "fp32") -> str:
        """Declare a vector of the checkpoint, stored as floats."""
        return self._declare(name, (size,), SCHEMES[scheme]())[""]

    def lookup(self, name: str, ids: str, shape: tuple[int, int]) -> str:
        """Rows `ids` (T,) of the table `name` (V, D) as float32 (T, D); only these rows are ever read."""
        scheme = self._recipe.scheme(name, shape)
        return scheme.lookup(self, ids, self._declare(name, shape, scheme), shape)

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

        `half`: the values of the product stay in the range of float16, so that it may be computed in it.
        """
        if self.observe:
            self._watch(name, x, shape[1])
        scheme = self._recipe.scheme(f"{name}.weight", shape)
        part = self._declare(f"{name}.weight", shape, scheme, half and scheme.is_half)
        added = self.vector(f"{name}.bias", shape[0], scheme.bias) if bias else None
        return scheme.linear(self, x, part, shape, bias=added, half=half, out=out)

    def cuda_linear(
        self, name: str, x: str, shape: tuple[int, int], *, dtype: np.dtype[Any], scale: float = 1.0,
        bias: bool = False, rows: NDArray[np.int64] | None = None,
    ) -> str:  # fmt: skip
        """`scale` times what `linear` gives, with x and the result in `dtype`; every kernel is CUDA's.

        `rows`: the columns of the result that are wanted, in that order.
        """
        scheme = self._recipe.scheme(f"{name}.weight", shape)
        part = self._declare(f"{name}.weight", shape, scheme)
        added = self.cuda_vector(f"{name}.bias", shape[0], dtype) if bias else None
        if rows is not None:
            try:
                part = scheme.cuda_rows(self, part, shape, rows)
            except NotImplementedError:
                y = scheme.cuda_linear(self, x, part, shape, dtype=dtype, scale=scale, bias=added)
                return self.op("Gather", y, self.const(rows), axis=-1)
            shape = len(rows), shape[1]
            added = added and self.op("Gather", added, self.const(rows), axis=0)
        return scheme.cuda_linear(self, x, part, shape, dtype=dtype, scale=scale, bias=added)

    def cuda_vector(self, name: str, size: int, dtype: np.dtype[Any]) -> str:
        """A stored vector in `dtype`: narrowed once, when the graph is opened, like all that needs no input."""
        assert self._places is not None
        scheme = self._places[name].scheme
        stored = self._declare(name, (size,), scheme)[""]
        return stored if FLOATS[scheme.name] == dtype else self.cast(stored, dtype)

    def cuda_lookup(self, name: str, ids: str, shape: tuple[int, int], *, dtype: np.dtype[Any]) -> str:
        """`lookup` in `dtype`, by CUDA's kernels."""
        scheme = self._recipe.scheme(name, shape)
        return scheme.cuda_lookup(self, ids, self._declare(name, shape, scheme), shape, dtype)

    def once(self, x: str, make: Callable[[str], tuple[str, str]]) -> tuple[str, str]:
        """What `make` makes of x, for all products that take it; a loop's inside is not seen outside."""
        if x not in self._shared:
            self._shared[x] = make(x)
        return self._shared[x]

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
            if self._places is None:
                raise AssertionError(f"weight {name} is declared twice")
            return {part.key: part.name for part in self._weights[name].parts}
        parts = []
        for key, (part_shape, dtype) in scheme.layout(shape).items():
            part = Part(f"{name}.{key}" if key else name, key, part_shape, dtype, self._place(name, key))
            self._end = -(-(part.offset + part.num_bytes) // ALIGNMENT) * ALIGNMENT
            tensor = TensorProto(name=part.name, data_type=TYPES[dtype], dims=part_shape)
            tensor.data_location = TensorProto.EXTERNAL
            places = {"location": data_name(self.name), "offset": part.offset, "length": part.num_bytes}
            for place, value in places.items():
                tensor.external_data.add(key=place, value=str(value))
            self._initializers.append(tensor)
            parts.append(part)
        self._weights[name] = Weight(name, tuple(shape), scheme, tuple(parts), half)
        return {part.key: part.name for part in parts}

    def _place(self, name: str, key: str) -> int:
        """Where a part begins."""
        if self._places is None:
            return self._end
        return next(part.offset for part in self._places[name].parts if part.key == key)

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
        self._shared = {x: found for x, found in self._shared.items() if found[0] not in inside}
        return helper.make_graph(nodes, name, list(inputs), list(outputs))

    def mark(self) -> int:
        return len(self._nodes)

    def finish(self, ports: GraphPorts) -> Graph:
        ports = GraphPorts(ports.inputs, (*ports.outputs, *self._observed))
        inputs, outputs = (
            [helper.make_tensor_value_info(p.name, TYPES[np.dtype(p.dtype)], list(p.shape)) for p in side]
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
