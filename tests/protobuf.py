"""ONNX messages from their bytes up, also such as no exporter writes. Not a test file.

Fields are those of onnx.proto; what is not given is not there.
"""


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, *parts: bytes | str) -> bytes:
    content = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    return varint(field << 3 | 2) + varint(len(content)) + content


def external(
    name: str,
    location: str,
    offset: str | int = 0,
    length: str | int = 16,
    *,
    shape: tuple[int, ...] = (4,),
    kind: int = 1,
) -> bytes:
    """The content of a TensorProto whose values lie outside."""
    places = {"location": location, "offset": str(offset), "length": str(length)}
    return b"".join(
        [
            *(number(1, size) for size in shape),
            number(2, kind),
            message(8, name),
            *(message(13, message(1, key), message(2, value)) for key, value in places.items()),
            number(14, 1),
        ]
    )


def graph_of(*initializers: bytes) -> bytes:
    """A ModelProto whose graph has these tensors and nothing else."""
    return message(7, *(message(5, tensor) for tensor in initializers))
