"""The pixels that an AVIF has its decoder make are those of all its frames, whatever the header claims."""

import io
import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m0kit.reading.avif import coded_pixels


def avif(mode: str, width: int, height: int, frames: int = 1, **options: object) -> bytes:
    out = io.BytesIO()
    images = [Image.new(mode, (width, height), (i, 2, 3, 4)[: len(mode)]) for i in range(frames)]
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(out, "AVIF", speed=10, **more, **options)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4", "4:0:0"])
@pytest.mark.parametrize(
    ("mode", "size", "frames", "times"),
    [
        ("RGB", (300, 200), 1, 1),
        ("RGBA", (300, 200), 1, 2),  # alpha is an image of its own
        ("RGB", (641, 487), 3, 2),  # an item, and the first sample of the track
        ("RGBA", (64, 48), 3, 4),
        ("RGB", (1, 1), 1, 1),
        ("RGB", (2001, 37), 1, 1),
    ],
)
def test_each_frame_of_what_a_program_writes_is_counted(
    mode: str, size: tuple[int, int], frames: int, times: int, subsampling: str
) -> None:
    assert coded_pixels(avif(mode, *size, frames, subsampling=subsampling)) == times * size[0] * size[1]


def test_the_size_is_that_of_the_frame_and_not_what_the_header_claims() -> None:
    raw = avif("RGB", 300, 200)
    start = raw.index(b"ispe") + 8
    assert coded_pixels(raw[:start] + struct.pack(">II", 8, 8) + raw[start + 8 :]) == 300 * 200


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + name + body


def test_an_image_in_parts_is_one() -> None:
    """Else the size would stand in one part and the frames in another."""
    raw = avif("RGB", 300, 200)
    data = raw[raw.index(b"mdat") + 4 :]
    for version, method in ((0, 0), (1, 0), (1, 1), (2, 0)):
        wide = ">I" if version == 2 else ">H"

        def placed(start: int, version: int = version, method: int = method, wide: str = wide) -> bytes:
            items = bytes([version, 0, 0, 0, 0x44, 0x00]) + struct.pack(wide, 1) + struct.pack(wide, 1)
            items += struct.pack(">H", method) if version else b""
            items += struct.pack(">HH", 0, 2) + struct.pack(">IIII", start, 7, start + 7, len(data) - 7)
            inside = box(b"idat", data) if method else b""
            return box(b"meta", bytes(4) + box(b"iloc", items) + inside) + box(b"mdat", data)

        start = 0 if method else len(placed(0)) - len(data)
        assert coded_pixels(placed(start)) == 300 * 200


def test_images_that_stand_over_each_other_are_refused() -> None:
    items = bytes([0, 0, 0, 0, 0x44, 0x00]) + struct.pack(">HHHH", 1, 1, 0, 900) + struct.pack(">II", 8, 5000) * 900
    with pytest.raises(ValueError, match="over each other"):
        coded_pixels(box(b"meta", bytes(4) + box(b"iloc", items)) + box(b"mdat", bytes(5000)))


SEEDS = [avif("RGBA", 64, 48, 3), avif("RGB", 30, 20)]


@settings(max_examples=300)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_of_a_damaged_file_comes_a_number_or_a_value_error(
    seed: bytes, changes: list[tuple[float, int]], cut: float
) -> None:
    raw = bytearray(seed)
    for place, value in changes:
        raw[int(place * len(raw))] = value
    with suppress(ValueError):
        assert coded_pixels(bytes(raw[: int(len(raw) * cut)] if cut < 0.9 else raw)) >= 0
