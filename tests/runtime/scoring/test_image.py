"""Images become, bit for bit, what transformers' Pillow processor makes of them; bad ones become ImageError."""

import base64
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tests.alone import optional

from m0kit.config import ImageConfig
from m0kit.errors import ImageError
from m0kit.reading.decoding import MAX_DECODED_PIXELS
from m0kit.reading.inputs import Picture, parse_content
from m0kit.scoring.image import patches_uint8, patchify, ready_grid, resize, smart_resize
from m0kit_parity.samples.checkpoints import model_config

theirs = optional("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
image_utils = optional("transformers.image_utils")

PUBLISHED = model_config("tiny").image
SMALL = replace(PUBLISHED, max_pixels=16 * 784)  # at most 16 visual tokens: quick
WHERE = "pair 3: document"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F")
TRANSPARENT = ("L one", "P one", "P many", "RGB one")  # a colour noted as transparent beside the pixels


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """No two places alike, some of the values at both ends."""
    values = np.random.default_rng([seed, height, width]).integers(-40, 296, (height, width, channels))
    return np.clip(values, 0, 255).astype(np.uint8)


def in_mode(mode: str, height: int = 45, width: int = 70) -> Image.Image:
    values = noise(height, width, 4)
    base, _, transparent = mode.partition(" ")
    if base in ("I;16", "I", "F"):
        wide = values[:, :, 0].astype(np.float64) * 257 + values[:, :, 1] / 256 - 300 * (base != "I;16")
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[base]
        return Image.fromarray((wide if base == "I;16" else wide / 150).astype(kind))
    rgba = Image.fromarray(values, "RGBA")
    if base == "P":
        image = rgba.convert("RGB").quantize(11)
        if transparent:
            image.info["transparency"] = 3 if transparent == "one" else bytes([255, 0, 128, 40, 250])
        return image
    if base in ("1", "LAB"):
        image = rgba.convert("RGB").convert(base) if base == "1" else Image.fromarray(values[:, :, :3], "LAB")
    elif base == "PA":
        image = rgba.convert("RGB").quantize(11).convert("PA")
        image.putalpha(Image.fromarray(values[:, :, 3]))
    elif base in ("LA", "RGBA"):
        image = rgba.convert(base)
    else:
        image = rgba.convert("RGB").convert(base)
    if transparent:
        image.info["transparency"] = 0 if base == "L" else tuple(int(v) for v in values[7, 9, :3])
    return image


def ours(source: bytes | Image.Image, config: ImageConfig) -> tuple[NDArray[np.float32], list[int]]:
    picture = parse_content(source, WHERE)
    assert isinstance(picture, Picture)
    pixels = resize(picture, config, WHERE)
    patches = patchify(pixels, config)
    assert int(pixels.grid_thw.prod()) == len(patches.values) == 4 * pixels.num_tokens
    return patches.values, patches.grid_thw.tolist()


@lru_cache
def processor(config: ImageConfig) -> Any:
    return theirs.Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        image_mean=list(config.mean),
        image_std=list(config.std),
        rescale_factor=config.rescale,
    )


def published(source: bytes | Image.Image, config: ImageConfig) -> tuple[NDArray[np.float32], list[int]]:
    """transformers: a file goes through load_image, a PIL image is passed as it is."""
    if isinstance(source, bytes):
        source = image_utils.load_image("data:image/x;base64," + base64.b64encode(source).decode())
    done = processor(config)(images=[source], return_tensors="np")
    return done["pixel_values"], done["image_grid_thw"][0].tolist()


def assert_same(source: bytes | Image.Image, config: ImageConfig = SMALL) -> NDArray[np.float32]:
    (mine, grid), (expected, expected_grid) = ours(source, config), published(source, config)
    assert grid == expected_grid
    assert (mine.dtype, mine.shape) == (np.float32, expected.shape)
    assert mine.tobytes() == expected.astype(np.float32, casting="no").tobytes()
    return mine


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


# --- the same as transformers ------------------------------------------------------------------------


@settings(max_examples=1500)
@given(
    st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([PUBLISHED, SMALL, replace(SMALL, min_pixels=9000)])
)
def test_the_size_is_transformers_size(height: int, width: int, config: ImageConfig) -> None:
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, config)
        return
    expected = theirs.smart_resize(height, width, 28, config.min_pixels, config.max_pixels)
    assert smart_resize(height, width, config) == expected


@settings(max_examples=1500)
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_size_of_small_images_is_transformers_size(height: int, width: int) -> None:
    """Small sides are where rounding half to even and growing to the least size decide."""
    if max(height, width) <= 200 * min(height, width):
        expected = theirs.smart_resize(height, width, 28, SMALL.min_pixels, SMALL.max_pixels)
        assert smart_resize(height, width, SMALL) == expected


@settings(max_examples=250)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(["RGB", "L", "RGBA"]), st.booleans())
def test_any_size_gives_transformers_patches(height: int, width: int, mode: str, as_file: bool) -> None:
    if max(height, width) > 200 * min(height, width):
        height = width
    image = Image.fromarray(noise(height, width, 4), "RGBA").convert(mode)
    assert_same(file_of(image, "PNG", compress_level=0) if as_file else image)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (13, 2600), (14, 14), (28, 28), (56, 56), (3, 5), (4, 1)])
def test_odd_sizes_give_transformers_patches(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    assert_same(image, PUBLISHED)
    assert_same(file_of(image, "PNG"), PUBLISHED)


@pytest.mark.parametrize(
    ("height", "width", "tokens"), [(776, 776, 768), (1123, 794, 768), (600, 1000, 0), (2160, 3840, 12_288)]
)
def test_pages_and_4k_give_transformers_patches(height: int, width: int, tokens: int) -> None:
    config = replace(PUBLISHED, max_pixels=tokens * 784) if tokens else PUBLISHED
    values = assert_same(Image.fromarray(noise(height, width)), config)
    if tokens == 12_288:
        assert len(values) > 4 * 10_000  # not shrunk: the raised limit counts


@pytest.mark.parametrize("mode", MODES + TRANSPARENT)
def test_every_mode_of_a_pil_image_gives_transformers_patches(mode: str) -> None:
    image = in_mode(mode)
    assert image.mode == mode.partition(" ")[0]
    assert_same(image)


FILES = [
    *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", *TRANSPARENT)),
    *((mode, "JPEG") for mode in ("L", "RGB", "CMYK", "YCbCr")),
    *((mode, "WEBP") for mode in ("RGB", "RGBA", "L")),
    *((mode, "GIF") for mode in ("1", "L", "P", "P one", "RGBA", "RGB one")),
    *((mode, "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")),
    *((mode, "TIFF") for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F")),
    *((mode, "PPM") for mode in ("1", "L", "RGB", "I")),
    ("RGB", "AVIF"),
]


@pytest.mark.parametrize(("mode", "kind"), FILES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.filterwarnings("ignore:Couldn't allocate palette entry")  # while this test writes its GIF
def test_every_mode_of_a_file_gives_transformers_patches(mode: str, kind: str) -> None:
    raw = file_of(in_mode(mode), kind)
    assert_same(raw)
    assert_same(Image.open(io.BytesIO(raw)))  # opened by the caller: the rules of a PIL image


def test_alpha_is_dropped_from_a_file_and_white_behind_a_pil_image() -> None:
    values = noise(56, 56, 4)
    values[:, :, 3] = 0
    image = Image.fromarray(values, "RGBA")
    plain, _ = ours(Image.fromarray(values[:, :, :3]), SMALL)
    white, _ = ours(Image.new("RGB", (56, 56), "white"), SMALL)
    assert np.array_equal(ours(file_of(image, "PNG"), SMALL)[0], plain)
    assert np.array_equal(ours(image, SMALL)[0], white)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_one_transparent_colour_becomes_white_in_both_forms(kind: str) -> None:
    image = Image.new("P", (56, 56), 1)
    image.putpalette([200, 10, 10, 10, 10, 200])
    raw = file_of(image, kind, transparency=1)
    white, _ = ours(Image.new("RGB", (56, 56), "white"), SMALL)
    assert np.array_equal(assert_same(raw), white)
    assert np.array_equal(assert_same(Image.open(io.BytesIO(raw))), white)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_file_and_not_a_pil_image(kind: str, orientation: int) -> None:
    image = Image.fromarray(noise(56, 112))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = file_of(image, kind, exif=exif, **options)
    assert_same(raw)
    assert_same(Image.open(io.BytesIO(raw)))
    grid = ours(raw, SMALL)[1]
    assert grid == ([1, 4, 8] if orientation < 5 else [1, 8, 4])
    if kind == "PNG" and orientation > 1:
        assert not np.array_equal(ours(raw, SMALL)[0].ravel(), ours(image, SMALL)[0].ravel())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.fromarray(noise(60, 60, seed=i)).quantize(200).convert("RGB") for i in range(3)]
    raw = file_of(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert getattr(Image.open(io.BytesIO(raw)), "n_frames", 1) == 3
    first = assert_same(raw)
    assert np.array_equal(first, ours(file_of(frames[0], kind if kind == "GIF" else "PNG"), SMALL)[0])
    assert not np.array_equal(first, ours(frames[1], SMALL)[0])


def test_a_patch_holds_channel_frame_row_column_and_groups_of_four_stand_together() -> None:
    values = noise(56, 84)
    patches, grid = ours(Image.fromarray(values), SMALL)
    assert grid == [1, 4, 6]
    normal = (values / 255 - SMALL.mean) / SMALL.std
    rows = patches.reshape(-1, 3, 2, 14, 14)
    order = [(r + y, c + x) for r in (0, 2) for c in (0, 2, 4) for y in (0, 1) for x in (0, 1)]
    for patch, (row, column) in zip(rows, order, strict=True):
        expected = normal[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14].transpose(2, 0, 1)
        for frame in (0, 1):
            np.testing.assert_allclose(patch[:, frame], expected, atol=1e-6)  # float32 of values up to 2.7


@pytest.mark.parametrize("size", [(28, 28), (56, 84), (448, 392)])
def test_bytes_of_patches_are_patches_before_they_are_normalised(size: tuple[int, int]) -> None:
    """Rescaled in float64, normalised in float32 and repeated for the second frame: the same to the bit."""
    pixels = resize(Picture(Image.fromarray(noise(*size)), "image"), SMALL, "image")
    values, grid_thw = patches_uint8(pixels, SMALL)
    patches = patchify(pixels, SMALL)
    assert (values.dtype, values.shape) == (np.uint8, (len(patches.values), 3 * 14 * 14))
    assert grid_thw.tolist() == patches.grid_thw.tolist()
    rescaled = (values.astype(np.float64) * SMALL.rescale).astype(np.float32).reshape(-1, 3, 1, 14, 14)
    mean, std = (np.asarray(v, np.float32).reshape(3, 1, 1, 1) for v in (SMALL.mean, SMALL.std))
    both = np.repeat((rescaled - mean) / std, 2, axis=2).reshape(len(values), -1)
    np.testing.assert_array_equal(both, patches.values, strict=True)


def test_a_pil_image_is_left_as_it_was() -> None:
    image = in_mode("P one")
    before, info = image.tobytes(), dict(image.info)
    ours(image, SMALL)
    assert (image.mode, image.tobytes(), image.info) == ("P", before, info)


# --- what cannot be an image -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "object"])
def test_a_ratio_of_200_passes_and_201_is_refused(form: str) -> None:
    def source(height: int, width: int) -> bytes | Image.Image:
        image = Image.fromarray(noise(height, width))
        return image if form == "object" else file_of(image, "PNG")

    for size in ((200, 1), (1, 200), (400, 2)):
        assert_same(source(*size))
    for height, width in ((201, 1), (1, 201), (402, 2)):
        with pytest.raises(ImageError, match=f"^{WHERE}: an image of {width}×{height} pixels is too narrow.*200.*Cut"):
            ours(source(height, width), SMALL)


REFUSALS = (
    r"not an image that can be read \(\d+ bytes\)\.( They are [^.]+\.)? "
    r"Accepted: PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM, AVIF\.",
    r"the (PNG|JPEG|MPO|WEBP|GIF|BMP|TIFF|PPM|AVIF) file \(\d+×\d+\) is damaged or cut off\. Save it again\.",
    rf"the image has more than the limit of {MAX_DECODED_PIXELS} pixels\. Shrink it\.",
    rf"an image of \d+×\d+ pixels is over the limit of {MAX_DECODED_PIXELS}\. Shrink it\.",
    r"an image of \d+×\d+ pixels is too narrow; one side may be at most 200 times the other\. Cut it into parts\.",
    r"the (image of \d+ bytes|[A-Z]+ file \(\d+×\d+\)) (has|is in|is compressed) [^.]+\. Save it again, as PNG for "
    r"one\.",
)


def refused(source: bytes) -> str:
    """The message if it is refused (in words of ours alone), else nothing."""
    try:
        ours(source, SMALL)
    except ImageError as error:
        message = str(error)
        assert any(re.fullmatch(f"{WHERE}: {pattern}", message) for pattern in REFUSALS), message
        return message
    return ""


@pytest.mark.parametrize("raw", [b"", b"\x00", b"hello", b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_other_files_are_refused(raw: bytes) -> None:
    assert f"not an image that can be read ({len(raw)} bytes)" in refused(raw)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "PDF"])
def test_formats_outside_the_list_are_refused(kind: str) -> None:
    assert "not an image" in refused(file_of(Image.fromarray(noise(32, 32)), kind))


HEADS = (
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"\xff\xd8\xff",
    b"II*\0",
    b"MM\0*",
    b"BM",
    b"P6 ",
    b"RIFF\x40\0\0\0WEBPVP8 ",
)


@settings(max_examples=300)
@given(st.binary(max_size=400), st.sampled_from(HEADS))
@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd metadata
def test_random_bytes_are_refused_in_our_own_words(raw: bytes, head: bytes) -> None:
    refused(head + raw)


SEEDS = {
    "PNG": file_of(in_mode("P one", 20, 30), "PNG"),
    "PNG alpha": file_of(in_mode("RGBA", 20, 30), "PNG"),
    "JPEG": file_of(
        in_mode("RGB", 20, 30), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
    "GIF": file_of(in_mode("P one", 20, 30), "GIF"),
    "WEBP": file_of(in_mode("RGBA", 20, 30), "WEBP"),
    "TIFF": file_of(in_mode("RGB", 20, 30), "TIFF"),
    "TIFF lzw": file_of(in_mode("L", 20, 30), "TIFF", compression="tiff_lzw"),
    "BMP": file_of(in_mode("P", 20, 30), "BMP"),
    "PPM": file_of(in_mode("RGB", 20, 30), "PPM"),
}


@settings(max_examples=500)
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd metadata
def test_changed_and_cut_files_give_an_image_or_our_own_error(
    name: str, changes: list[tuple[float, int]], cut: float, at_the_start: bool
) -> None:
    raw = bytearray(SEEDS[name])
    for place, value in changes:
        raw[int(place * (min(len(raw), 100) if at_the_start else len(raw)))] = value
    refused(bytes(raw[: int(len(raw) * cut)] if cut < 0.9 else raw))


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_a_file_cut_in_the_middle_is_refused(name: str) -> None:
    assert refused(SEEDS[name]) == ""
    said = "not an image" if name in ("TIFF lzw", "WEBP") else "damaged or cut off"  # those two notice while opening
    assert said in refused(SEEDS[name][: len(SEEDS[name]) * 2 // 3])


def bomb(width: int, height: int) -> bytes:
    """A valid PNG header and hardly any data: a few bytes that claim so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height", "said"),
    [(60_000, 60_000, "more than the limit"), (12_000, 12_000, "an image of 12000×12000"), (9460, 9459, "9460×9459")],
)
def test_a_bomb_is_refused_from_its_header(width: int, height: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", decode)
    message = refused(bomb(width, height))
    assert said in message
    assert str(MAX_DECODED_PIXELS) in message


def test_a_bomb_is_a_bomb_where_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Shrink it" in refused(bomb(12_000, 12_000))


def test_the_limit_itself_is_not_refused_as_a_bomb() -> None:
    assert 9459 * 9459 < MAX_DECODED_PIXELS < 9460 * 9459
    assert "damaged" in refused(bomb(9459, 9459))


@pytest.fixture(autouse=True)
def _pillow_is_left_alone() -> Iterator[None]:
    """Nothing here may change what Pillow keeps for the whole process."""
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    yield
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_a_pil_image_without_pixels_or_closed_is_refused() -> None:
    with pytest.raises(ImageError, match=rf"^{WHERE}: the image has no pixels \(0×5\)"):
        ours(Image.new("RGB", (0, 5)), SMALL)
    closed = Image.new("RGB", (30, 31))
    closed.close()
    with pytest.raises(ImageError, match=rf"^{WHERE}: the image \(mode RGB, 30×31\) cannot be decoded"):
        ours(closed, SMALL)
    lazy = Image.open(io.BytesIO(SEEDS["JPEG"][:-200]))
    with pytest.raises(ImageError, match=rf"^{WHERE}: the image \(mode RGB, 30×20\) cannot be decoded"):
        ours(lazy, SMALL)


def test_running_out_of_memory_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        ours(SEEDS["PNG"], SMALL)


@pytest.mark.parametrize("size", [(30, 30), (28, 29), (28 * 40, 28 * 40)])
def test_kept_pixels_of_another_size_than_the_model_sees_are_refused_undecoded(size: tuple[int, int]) -> None:
    """An index from elsewhere may hold them; the grid of such a picture is asked before its pixels."""
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    picture = Picture(file.getvalue()[:60], "a", ready=True)  # cut off: a header is all that is looked at
    for look in (ready_grid, resize):
        with pytest.raises(ImageError, match=rf"^here: kept pixels of {size[0]}×{size[1]}; sides must be multiples of"):
            look(picture, PUBLISHED, "here")
