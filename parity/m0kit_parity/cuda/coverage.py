"""Whether a graph for CUDA runs on the device from its first node to its last, read off the table of kernels.

Owns the rules, which are ONNX Runtime's own (how it finds a kernel for a node, which nodes its CUDA provider leaves to
the CPU, what its kernels read in CPU memory) and three of m0kit's: no Loop, no operator that waits, no double.
Types are told from operator to operator, as the table's signatures have it; shapes are not looked at.

What may be on the host is shape arithmetic alone: integers that come from Shape and become shapes, some nanoseconds
each, which a device would only be asked for and waited for. `on_host` names it. A session that is opened with
session.disable_cpu_ep_fallback takes none of it: there `on_host` has to be empty.

    assert not uncovered(onnx.load("decoder.cuda.onnx", load_external_data=False))
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx
from onnx import TensorProto, helper

from m0kit_parity.cuda.kernels import Entry, Kernel, Kernels, Signature, read_kernels

# Each of them makes the host wait for the device, though it has a CUDA kernel.
WAITING: Final[Mapping[str, str]] = {
    "Loop": "the host waits for the device in every turn of it",
    "If": "the host waits for what it is to decide by",
    "Scan": "the host starts every turn of it",
    "NonZero": "the host waits for how much it gives out",
    "Compress": "the host waits for how much it gives out",
    "Unique": "the host waits for how much it gives out",
    "NonMaxSuppression": "the host waits for how much it gives out",
    "com.microsoft.RemovePadding": "the host waits for how much it gives out",
}
# Inputs that may be left out, and without which the kernel asks the device for them and waits.
ASKED: Final[Mapping[str, str]] = {"com.microsoft.PagedAttention": "attention_metadata"}

_TYPES: Final[Mapping[int, str]] = {number: name.lower() for name, number in TensorProto.DataType.items()}
_COUNTS: Final = frozenset({"bool", "int32", "int64", "uint8", "uint32", "uint64"})  # what shape arithmetic has
# Mean and inverse deviation of the normalisations, which are kept in float.
_FURTHER: Final[Mapping[str, str]] = {"U": "float"}
# Which keep a node on the device whatever it reads, and how many values a constant may have that does not:
# GetCpuPreferredNodes and IsSmallInitializer of ONNX Runtime's fallback_cpu_capability.cc.
_HALVES: Final = frozenset({"float16", "bfloat16", "float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"})
_SMALL: Final = 100


def uncovered(model: onnx.ModelProto) -> list[str]:
    """A sentence for each thing that keeps the graph from running on a CUDA device without the host; values unread."""
    return _look(model).complaints


def on_host(model: onnx.ModelProto) -> list[str]:
    """The nodes that ONNX Runtime leaves to the CPU though they have CUDA kernels, "name (operator)"."""
    return _look(model).hosted


def _look(model: onnx.ModelProto) -> "_Walk":
    walk = _Walk({_domain(each.domain): each.version for each in model.opset_import}, read_kernels())
    walk.graph(model.graph, {})
    return walk


@dataclass(frozen=True, slots=True)
class _Value:
    """What is known of a value: type (None: not known, and said so), where it lies, who makes it, its size."""

    type: str | None
    place: str  # "constant", "fed" from outside, "device" or "host" memory
    maker: str = ""
    size: float = math.inf

    @property
    def small(self) -> bool:
        return self.place == "fed" or (self.place == "constant" and self.size <= _SMALL)


@dataclass(slots=True)
class _Walk:
    """One pass over a model's nodes in their order, those of inner graphs behind their node."""

    opsets: Mapping[str, int]
    table: Kernels
    complaints: list[str] = field(default_factory=list)
    hosted: list[str] = field(default_factory=list)

    def graph(self, graph: onnx.GraphProto, outside: Mapping[str, _Value]) -> dict[str, _Value]:
        """Look at each node; `outside`: values of the graph around it."""
        values = dict(outside)
        for tensor in graph.initializer:
            values[tensor.name] = _Value(_TYPES[tensor.data_type], "constant", size=math.prod(tensor.dims))
        constants = {tensor.name for tensor in graph.initializer}
        for port in graph.input:
            number = port.type.tensor_type.elem_type
            if port.name not in constants:
                values[port.name] = _Value(_TYPES[number] if number else None, "fed")
            if not number:
                self.complaints.append(f"{port.name}: this input of the graph {graph.name} has no type")
        for node in graph.node:
            self._node(node, values)
        return values

    def _node(self, node: onnx.NodeProto, values: dict[str, _Value]) -> None:
        where = f"{node.name or node.output[0]} ({node.op_type})"
        inner = [self.graph(a.g, values) for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        if node.op_type == "Constant" and not node.domain:
            values[node.output[0]] = _constant(node)
            return
        name = f"{node.domain}.{node.op_type}" if _domain(node.domain) else node.op_type
        entry = self.table.operators.get(name)
        signature = entry.signature(self.opsets.get(_domain(node.domain), 0)) if entry else None
        inputs = [values.get(each) if each else None for each in node.input]
        complaints: list[str] = []
        outputs: list[str | None] = [None] * len(node.output)
        kernel = None
        if entry is None or signature is None:
            complaints.append(f"{self.table.release} has no such operator at the opsets {_told(self.opsets)}")
        elif lost := [each for each, value in zip(node.input, inputs, strict=True) if each and value is None]:
            complaints.append(f"nothing before it makes its input {lost[0]}")
        else:
            outputs, kernel = self._fit(node, entry, signature, inputs, inner, complaints)
        if name in WAITING:
            complaints.append(WAITING[name])
        placed = ["device"] * len(node.output)
        if signature is not None and kernel is not None:
            placed = self._place(node, where, signature, kernel, inputs, outputs, complaints)
            if name in ASKED and not _given(node, signature, ASKED[name]):
                complaints.append(f"without {ASKED[name]} it asks the device for them, and the host waits")
        self.complaints += [f"{where}: {complaint}" for complaint in complaints]
        for each, kind, place in zip(node.output, outputs, placed, strict=True):
            values[each] = _Value(kind, place, where)

    def _fit(
        self,
        node: onnx.NodeProto,
        entry: Entry,
        signature: Signature,
        inputs: Sequence[_Value | None],
        inner: Sequence[Mapping[str, _Value]],
        complaints: list[str],
    ) -> tuple[list[str | None], Kernel | None]:
        """The types of what the node makes, and its kernel; what is amiss is added to the complaints."""
        unknown = [None] * len(node.output)
        if any(value is not None and value.type is None for value in inputs):
            return list(unknown), None  # what makes that input was complained about
        kinds = [value.type if value else None for value in inputs]
        bound: dict[str, str] = dict(signature.only)
        repeated = {side[-1].type for side in (signature.inputs, signature.outputs) if side and side[-1].repeats}
        free = repeated if inner else set()  # what a Loop carries may differ from turn to turn
        for formal, kind in zip(signature.formals(signature.inputs, len(kinds)), kinds, strict=False):
            if kind is None or formal.type in free:
                continue
            wanted = bound.setdefault(formal.type, formal.type if formal.type in _TYPES.values() else kind)
            if kind != wanted:
                complaints.append(f"its input {formal.name} is {kind}, and {formal.type} is {wanted} here")
                return list(unknown), None
        outputs = _outputs(node, signature, bound, kinds, inner)
        if untold := [name for name, kind in zip(node.output, outputs, strict=True) if name and kind is None]:
            complaints.append(f"the type of its output {untold[0]} is not known to this check")
            return outputs, None
        used = [kind if name else None for name, kind in zip(node.output, outputs, strict=True)]
        if "double" in (*kinds, *used):
            complaints.append("it computes in double, for which most GPUs have next to no units")
        kernel = entry.kernel(signature, kinds, used)
        if kernel is None:
            complaints.append(_missing(self.table, entry, signature, kinds, used))
        return outputs, kernel

    def _place(
        self,
        node: onnx.NodeProto,
        where: str,
        signature: Signature,
        kernel: Kernel,
        inputs: Sequence[_Value | None],
        outputs: Sequence[str | None],
        complaints: list[str],
    ) -> list[str]:
        """Where what the node makes lies: on the device, unless its kernel or ONNX Runtime has it otherwise."""
        given = [(place, value) for place, value in enumerate(inputs) if value is not None]
        if _left_to_host(given, kernel):
            self.hosted.append(where)
            kinds = {*(value.type for _, value in given), *outputs} - {None}
            if not kinds <= _COUNTS:
                complaints.append(
                    f"it is left to the host, where all that it reads lies, and no shape arithmetic: {_listed(kinds)}"
                )
            return ["host"] * len(node.output)
        formals = list(signature.formals(signature.inputs, len(inputs)))
        complaints += [
            f"it reads its input {formals[place].name} in CPU memory, and {value.maker} makes it on the device, "
            "for which the host waits"
            for place, value in given
            if place in kernel.host_inputs and value.place == "device"
        ]
        return ["host" if place in kernel.host_outputs else "device" for place in range(len(node.output))]


def _left_to_host(given: Iterable[tuple[int, _Value]], kernel: Kernel) -> bool:
    """ONNX Runtime's rule: it reads something that lies on the host, and nothing that does not."""
    given = list(given)
    return any(value.place == "host" for _, value in given) and not any(
        value.type in _HALVES or (not value.small and (value.place != "host" or place in kernel.host_inputs))
        for place, value in given
    )


def _outputs(
    node: onnx.NodeProto,
    signature: Signature,
    bound: Mapping[str, str],
    kinds: Sequence[str | None],
    inner: Sequence[Mapping[str, _Value]],
) -> list[str | None]:
    """The types of what a node makes; None where this is not known."""
    if inner:
        body = next(a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
        made = [inner[0][each.name].type if each.name in inner[0] else None for each in body.output]
        return made[len(made) - len(node.output) :]  # a Loop's first is whether it goes on
    chosen = _chosen(node, kinds)
    formals = list(signature.formals(signature.outputs, len(node.output)))
    kinds_out: list[str | None] = []
    for formal in formals:
        own = formal.type if formal.type in _TYPES.values() else None
        kinds_out.append(own or bound.get(formal.type) or chosen or _FURTHER.get(formal.type))
    return kinds_out + [None] * (len(node.output) - len(formals))


def _chosen(node: onnx.NodeProto, kinds: Sequence[str | None]) -> str | None:
    """The type that an attribute, or its default, gives what a node makes."""
    attributes = {a.name: a for a in node.attribute}
    for name in ("to", "dtype", "output_dtype"):
        if name in attributes and attributes[name].i:
            return _TYPES[attributes[name].i]
    if node.op_type == "ConstantOfShape":
        return _TYPES[attributes["value"].t.data_type] if "value" in attributes else "float"
    if node.op_type == "QuantizeLinear":
        return (kinds[2] if len(kinds) > 2 else None) or "uint8"
    if node.op_type == "DequantizeLinear":
        return kinds[1]
    return None


def _constant(node: onnx.NodeProto) -> _Value:
    value = helper.get_node_attr_value(node, node.attribute[0].name)
    if isinstance(value, TensorProto):
        return _Value(_TYPES[value.data_type], "constant", size=math.prod(value.dims))
    kind = {"value_float": "float", "value_floats": "float", "value_int": "int64", "value_ints": "int64"}
    size = len(value) if isinstance(value, Sequence) else 1
    return _Value(kind.get(node.attribute[0].name, "string"), "constant", size=size)


def _given(node: onnx.NodeProto, signature: Signature, name: str) -> bool:
    place = next(place for place, formal in enumerate(signature.inputs) if formal.name == name)
    return place < len(node.input) and bool(node.input[place])


def _missing(
    table: Kernels,
    entry: Entry,
    signature: Signature,
    inputs: Sequence[str | None],
    outputs: Sequence[str | None],
) -> str:
    """What the node would need, and what there is."""
    serving = [kernel for kernel in entry.kernels if kernel.serves(signature.since)]
    if not serving:
        had = ", ".join(sorted({f"{k.first} to {k.last}" if k.last else f"{k.first}" for k in entry.kernels}))
        return (
            f"{table.release} has no CUDA kernel of it"
            + (f" in version {signature.since}, only in {had}" if had else "")
        )  # fmt: skip
    sides = ((signature.inputs, inputs), (signature.outputs, outputs))
    needed = ", ".join(
        f"{formal.name} {kind}"
        for side, kinds in sides
        for formal, kind in zip(signature.formals(side, len(kinds)), kinds, strict=False)
        if kind is not None
    )
    there = "; ".join(", ".join(f"{key} {_listed(kinds)}" for key, kinds in k.types.items()) for k in serving)
    return f"{table.release} has no CUDA kernel of it for {needed}; it has: {there}"


def _listed(kinds: Iterable[str | None]) -> str:
    return "/".join(sorted(str(kind) for kind in kinds))


def _told(opsets: Mapping[str, int]) -> str:
    return ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in opsets.items())


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
