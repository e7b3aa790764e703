"""How many pixels an AVIF file has its decoder make, told from its boxes. Owns the structure, and decodes nothing.

    coded_pixels(raw)   # of all frames of its images, hidden ones too

A header may claim few pixels and its frames have many, and before a frame that is shown any number of others may
stand. An image is an item of the file (`iloc`), one of its cells or its alpha channel another; of an animation the
first sample of each track counts. The data of each are AV1's units: a sequence header with the size, and frames.
"""

import struct
from collections.abc import Iterator
from typing import Final

_CONTAINERS: Final = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_MAX_DEPTH: Final = 8
_MAX_OVERLAP: Final = 4  # of the file: the first image of an animation is an item too
_SEQUENCE, _FRAME_HEADER, _FRAME = 1, 3, 6  # kinds of AV1's units


def coded_pixels(raw: bytes) -> int:
    """Frames times their size, over all images and the first sample of each track. Raises ValueError if damaged."""
    try:
        images = list(_images(raw, 0, len(raw), 0))
        if sum(end - start for parts in images for start, end in parts) > _MAX_OVERLAP * len(raw):
            raise ValueError("its images stand over each other")
        return sum(_of_units(b"".join(raw[start:end] for start, end in parts)) for parts in images)
    except (struct.error, IndexError):
        raise ValueError("its boxes end before their contents") from None


def _boxes(raw: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, and where the contents begin and end."""
    while start + 8 <= end:
        size, name = struct.unpack_from(">I4s", raw, start)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", raw, start + 8)
            head = 16
        stop = min(start + size, end) if size else end
        if stop < start + head:
            raise ValueError("a box is smaller than its own head")
        yield name, start + head, stop
        start = stop


def _images(raw: bytes, start: int, end: int, depth: int) -> Iterator[list[tuple[int, int]]]:
    """Where the data of each image stand, in parts."""
    found = {}
    for name, first, stop in _boxes(raw, start, end):
        found[name] = first, stop
        if name in _CONTAINERS and depth < _MAX_DEPTH:
            yield from _images(raw, first, stop, depth + 1)
        if name == b"meta":
            boxes = {inner: place for inner, *place in _boxes(raw, first + 4, stop)}
            if b"iloc" in boxes:
                yield from _items(raw, boxes[b"iloc"][0], boxes.get(b"idat", [0])[0])
    sizes, chunks = found.get(b"stsz"), found.get(b"stco") or found.get(b"co64")
    if sizes and chunks:
        same, number = struct.unpack_from(">II", raw, sizes[0] + 4)
        size = same or (struct.unpack_from(">I", raw, sizes[0] + 12)[0] if number else 0)
        (place,) = struct.unpack_from(">I" if b"stco" in found else ">Q", raw, chunks[0] + 8)
        yield [(min(place, len(raw)), min(place + size, len(raw)))]


def _items(raw: bytes, start: int, inside: int) -> Iterator[list[tuple[int, int]]]:
    """The extents of the items in a box `iloc`; `inside` is where data begin that stand in the same box as it does."""
    version = raw[start]
    widths = raw[start + 4], raw[start + 5]
    offset, length, base, index = widths[0] >> 4, widths[0] & 15, widths[1] >> 4, widths[1] & 15
    index = index if version else 0
    place = start + 6

    def number(width: int) -> int:
        nonlocal place
        if place + width > len(raw):
            raise IndexError
        place += width
        return int.from_bytes(raw[place - width : place], "big")

    for _ in range(number(4 if version == 2 else 2)):
        number(4 if version == 2 else 2)  # its id
        method = number(2) & 15 if version else 0
        number(2)
        begin = number(base) + (inside if method == 1 else 0)
        parts = []
        for _ in range(number(2)):
            number(index)
            first = min(begin + number(offset), len(raw))
            size = number(length)
            parts.append((first, min(first + size, len(raw)) if size else len(raw)))
        yield parts


def _of_units(data: bytes) -> int:
    """Frames times their size. Nothing for what is no AV1: metadata, and grids, which name their cells."""
    frames = size = place = 0
    while place < len(data):
        kind, has_extension, has_size = data[place] >> 3, data[place] >> 2 & 1, data[place] >> 1 & 1
        place += 1 + has_extension
        length = len(data) - place
        if has_size:
            length = 0
            for shift in range(0, 56, 7):
                if place >= len(data):
                    return frames * size
                place += 1
                length |= (data[place - 1] & 127) << shift
                if data[place - 1] < 128:
                    break
        if kind == _SEQUENCE:
            size = max(size, _frame_size(data[place : place + length]))
        frames += kind in (_FRAME_HEADER, _FRAME)
        place += length
    return frames * size


def _frame_size(header: bytes) -> int:
    """Pixels of the largest frame of an AV1 sequence (its specification, 5.5.1)."""
    bits = int.from_bytes(header, "big")
    left = 8 * len(header)

    def take(count: int) -> int:
        nonlocal left
        left -= count
        return bits >> left & ((1 << count) - 1) if left >= 0 else 0

    take(4)  # profile, still picture
    if take(1):  # reduced
        take(5)
    else:
        delays = 0
        if take(1):  # timing
            take(64)
            if take(1):
                zeros = 0
                while left > 0 and not take(1):
                    zeros += 1
                take(zeros)
            if take(1):  # the decoder's model
                delays = take(5) + 1
                take(42)
        has_delay = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if delays and take(1):
                take(2 * delays + 1)
            if has_delay and take(1):
                take(4)
    widths = take(4) + 1, take(4) + 1
    return (take(widths[0]) + 1) * (take(widths[1]) + 1)
