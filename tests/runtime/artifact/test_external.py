"""Whatever a graph reads of other files is found wherever it stands, and what is odd is refused."""

from pathlib import Path

import pytest
from tests.protobuf import external, graph_of, message, number, varint

from m0kit.artifact.external import ExternalTensor, external_tensors

TENSOR = external("w", "a.data", 64, 16)
FOUND = ExternalTensor("w", "a.data", 64, 16)


def in_attribute(*content: bytes) -> bytes:
    return message(7, message(1, message(5, *content)))  # model.graph.node.attribute


SUBGRAPH = message(5, TENSOR)  # graph.initializer
PLACES = {
    "initializer": graph_of(TENSOR),
    "attribute": in_attribute(message(5, TENSOR)),
    "list of tensors": in_attribute(message(10, TENSOR)),
    "subgraph": in_attribute(message(6, SUBGRAPH)),
    "list of subgraphs": in_attribute(message(11, SUBGRAPH)),
    "subgraph of a subgraph": in_attribute(message(6, message(1, message(5, message(6, SUBGRAPH))))),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_outside_is_found_wherever_it_stands(place: str) -> None:
    assert external_tensors(PLACES[place]) == [FOUND]


def test_all_that_an_exporter_writes_is_found(artifact: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="an installed runtime has no onnx to compare with")
    from onnx.external_data_helper import ExternalDataInfo

    for path in artifact.glob("*.onnx"):
        expected = {}
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = ExternalDataInfo(tensor)
                expected[tensor.name] = ExternalTensor(tensor.name, place.location, place.offset, place.length)
        found = external_tensors(path.read_bytes())
        assert len(found) == len(expected) > 0
        assert {tensor.name: tensor for tensor in found} == expected


def test_a_tensor_inside_is_none_and_packed_dimensions_count() -> None:
    inside = number(1, 4) + number(2, 1) + message(8, "w") + message(9, bytes(16))
    assert external_tensors(graph_of(inside)) == []
    packed = TENSOR.replace(number(1, 4), message(1, varint(2) + varint(2)))
    assert external_tensors(graph_of(packed)) == [FOUND]


ODD = {
    "a sparse initializer": (message(7, message(15, message(1, TENSOR))), "it has a sparse tensor"),
    "a sparse attribute": (in_attribute(message(22, message(1, TENSOR))), "it has a sparse tensor"),
    "a list of sparse ones": (in_attribute(message(23, message(2, TENSOR))), "it has a sparse tensor"),
    "a function": (graph_of() + message(25, message(7, message(5, message(5, TENSOR)))), "it has a function"),
    "training": (graph_of() + message(20, message(1, SUBGRAPH)), "it has a training"),
    "nothing": (b"", "holds no graph"),
    "text": (b"spoiled", "no ONNX graph"),
    "a cut field": (graph_of(TENSOR)[:-3], "ends in the middle"),
    "a cut number": (b"\x08\xff", "ends in the middle"),
    "a number without an end": (b"\x08" + b"\xff" * 11, "no ONNX graph"),
    "a group": (b"\x0b\x0c" + graph_of(), "no ONNX graph"),
    "a field 0": (b"\x02\x00" + graph_of(), "no ONNX graph"),
    "a graph that is a number": (number(7, 3), "a number in place of a graph"),
    "two graphs": (graph_of() + graph_of(TENSOR), "two of what it has one"),
    "two tensors of an attribute": (in_attribute(message(5, TENSOR), message(5, TENSOR)), "two of what it has one"),
    "no location": (graph_of(number(14, 1) + message(8, "w")), "without a location"),
    "a location of a tensor inside": (graph_of(TENSOR.removesuffix(number(14, 1))), "lies outside without"),
    "two locations": (graph_of(TENSOR + message(13, message(1, "location"), message(2, "b"))), "or has it twice"),
    "an odd place": (graph_of(TENSOR + message(13, message(1, "basepath"), message(2, "/"))), "the place 'basepath'"),
    "no length": (graph_of(TENSOR.replace(message(13, message(1, "length"), message(2, "16")), b"")), "without a loc"),
    "an offset below 0": (graph_of(external("w", "a", "-4")), "no whole number"),
    "an offset in hex": (graph_of(external("w", "a", "0x10")), "no whole number"),
    "an offset with blanks": (graph_of(external("w", "a", " 4")), "no whole number"),
    "another script's digits": (graph_of(external("w", "a", "٤")), "no whole number"),
    "an offset of 400 digits": (graph_of(external("w", "a", "9" * 400)), "no whole number"),
    "too few bytes": (graph_of(external("w", "a", 0, 15)), r"shape \[4\] and type 1 cannot have 15 bytes"),
    "a size below 0": (graph_of(external("w", "a", shape=(-2, -2))), "cannot have 16 bytes"),
    "a size past 64 bits": (graph_of(external("w", "a", shape=(1 << 62, 4, 4))), "cannot have 16 bytes"),
    "a million nodes": (message(7, message(1) * 1_000_000), "more than 100000 nodes, attributes and tensors"),
    "texts": (graph_of(external("w", "a", kind=8)), "type 8 cannot have"),
    "a name in Latin-1": (graph_of(TENSOR + message(8, b"\xe9")), "not text in UTF-8"),
    "a thousand subgraphs deep": (None, "nested too deeply"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_no_exporter_writes_is_refused(case: str) -> None:
    raw, said = ODD[case]
    if raw is None:
        raw = SUBGRAPH
        for _ in range(1000):
            raw = message(1, message(5, message(6, raw)))
        raw = message(7, raw)
    with pytest.raises(ValueError, match=said):
        external_tensors(raw)


def test_no_bytes_end_otherwise_than_with_a_value_error(artifact: Path) -> None:
    """Each byte of a small graph set to each of a few values, and cut there."""
    raw = (artifact / "head.onnx").read_bytes()
    for place in range(len(raw)):
        changed = [
            raw[:place],
            *(raw[:place] + bytes([value]) + raw[place + 1 :] for value in (0, 1, 0x0A, 0x7F, 0xFF)),
        ]
        for mutant in changed:
            try:
                found = external_tensors(mutant)
            except ValueError:
                continue
            assert all(tensor.offset >= 0 and tensor.length >= 0 for tensor in found)
