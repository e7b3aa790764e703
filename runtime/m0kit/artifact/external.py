"""What a graph's file says of tensors that lie outside it. Owns reading that much of ONNX, from the bytes alone.

    for tensor in external_tensors(path.read_bytes()): …     # tensor.location, tensor.offset, tensor.length

ONNX is a protobuf message; tensors stand as initializers, in attributes of nodes, and in subgraphs of these. Readers of
ONNX open the files that these name, some of them wherever they are; so it is read here first, with nothing taken on
trust: what is not plainly what an exporter writes is an error. So are functions: thirty, each of which calls the next
one twice, are a few kilobytes, and an engine that writes them out never ends.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# Message → number of a field → the message in it, as far as tensors can be found through them (onnx.proto).
_INNER: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
}
_NONE: Final = {"training", "function", "sparse tensor"}  # no graph of an artifact has them
# Of these there is one at most. Of two, readers of protobuf make one, which then says what neither does by itself.
_SINGLE: Final = {("model", 7), ("attribute", 5), ("attribute", 6)}
# Fields of a tensor.
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL, _LOCATION = 1, 2, 8, 13, 14
_DEPTH: Final = 100  # messages within messages that readers of protobuf take
_MOST_PARTS: Final = 100_000  # graphs, nodes, attributes, tensors; the full model's largest graph has 5,900
# Bytes of a value, by TensorProto.DataType.
_SIZES: Final = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_NUMBER: Final = re.compile(r"\d{1,18}", re.ASCII)
_PLACES: Final = {"location", "offset", "length"}

_Value = int | memoryview


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A tensor whose values are bytes offset … offset + length of a file."""

    name: str
    location: str
    offset: int
    length: int


def external_tensors(raw: bytes) -> list[ExternalTensor]:
    """All of a graph's file. Raises ValueError, a sentence part, for bytes that are no ONNX or say it in an odd way."""
    found: list[ExternalTensor] = []
    waiting: list[tuple[str, memoryview, int]] = [("model", memoryview(raw), 1)]
    has_graph, num_parts = False, 0
    while waiting:
        kind, message, depth = waiting.pop()
        if depth > _DEPTH:
            raise ValueError("it is nested too deeply")
        if kind == "tensor":
            if (tensor := _tensor(message)) is not None:
                found.append(tensor)
            continue
        inner, seen = _INNER[kind], set()
        for number, value in _fields(message):
            part = inner.get(number)
            if part is None:
                continue
            if part in _NONE:
                raise ValueError(f"it has a {part}, which no graph of an artifact has")
            if isinstance(value, int):
                raise ValueError(f"a {kind} in it has a number in place of a {part}")
            if number in seen and (kind, number) in _SINGLE:
                raise ValueError(f"a {kind} in it has two of what it has one of ({part})")
            seen.add(number)
            num_parts += 1
            if num_parts > _MOST_PARTS:
                raise ValueError(f"it has more than {_MOST_PARTS} nodes, attributes and tensors")
            has_graph = has_graph or kind == "model"
            waiting.append((part, value, depth + 1))
    if not has_graph:
        raise ValueError("it holds no graph")
    return found


def _tensor(message: memoryview) -> ExternalTensor | None:
    """The tensor, where its values are outside."""
    dims: list[int] = []
    places: dict[str, str] = {}
    name, data_type, is_external = "", 0, False
    for number, value in _fields(message):
        if number == _DIMS:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == _DATA_TYPE and isinstance(value, int):
            data_type = value
        elif number == _NAME and not isinstance(value, int):
            name = _text(value)
        elif number == _LOCATION:
            is_external = value == 1
        elif number == _EXTERNAL and not isinstance(value, int):
            entry = {part: _text(text) for part, text in _fields(value) if not isinstance(text, int)}
            key = entry.get(1, "")
            if key not in _PLACES or key in places:
                raise ValueError(f"the tensor {name or '?'!s:.100} has the place {key!r:.60}, or has it twice")
            places[key] = entry.get(2, "")
    if not is_external and not places:
        return None
    told = f"the tensor {name:.100}"
    if not is_external or set(places) != _PLACES:
        raise ValueError(f"{told} lies outside without a location, an offset and a length")
    if not all(_NUMBER.fullmatch(places[key]) for key in ("offset", "length")):
        raise ValueError(f"{told} has an offset or a length that is no whole number from 0")
    offset, length = int(places["offset"]), int(places["length"])
    size = _SIZES.get(data_type)
    if size is None or min(dims, default=1) < 0 or math.prod(dims) * size != length:
        raise ValueError(f"{told} of shape {dims[:8]} and type {data_type} cannot have {length} bytes")
    return ExternalTensor(name, places["location"], offset, length)


def _fields(message: memoryview) -> Iterator[tuple[int, _Value]]:
    """Number and value of each field of a protobuf message: a whole number, or bytes."""
    place, end = 0, len(message)
    while place < end:
        key = message[place]
        place += 1
        if key > 0x7F:
            key, place = _varint(message, place - 1)
        number, wire = key >> 3, key & 7
        if wire == 2:
            length = message[place] if place < end else 0
            place += 1
            if length > 0x7F:
                length, place = _varint(message, place - 1)
            start, place = place, place + length
            if place > end:
                raise ValueError("it ends in the middle of a field")
            yield number, message[start:place]
        elif wire == 0:
            value, place = _varint(message, place)
            yield number, value - (1 << 64) if value >= 1 << 63 else value
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
            if place > end:
                raise ValueError("it ends in the middle of a field")
        else:
            raise ValueError("it is no ONNX graph (its bytes are not those of protobuf)")
        if not 0 < number < 1 << 29:
            raise ValueError("it is no ONNX graph (its bytes are not those of protobuf)")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise ValueError("it ends in the middle of a field")
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, place
    raise ValueError("it is no ONNX graph (its bytes are not those of protobuf)")


def _packed(values: memoryview) -> list[int]:
    place, found = 0, []
    while place < len(values):
        value, place = _varint(values, place)
        found.append(value - (1 << 64) if value >= 1 << 63 else value)
    return found


def _text(value: memoryview) -> str:
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("a name in it is not text in UTF-8") from None
