"""From an image to patches, bit for bit what transformers' Pillow processor for Qwen2-VL makes of it.

Owns orientation, alpha, resizing, normalisation and the order of patches. One rule per form:

* a file (path, bytes, data URI): first frame, turned as its EXIF orientation says, converted to RGB; an alpha
  channel is dropped with the conversion, a single transparent colour (tRNS, GIF) becomes white;
* a PIL image: taken as it is, no EXIF turn; alpha and transparent colours are put on white.

These are the rules of `load_image` followed by `Qwen2VLImageProcessorPil` (transformers 5.23).

    pixels = resize(Picture(b"…", "key"), config, "pair 0: document")
    patches = patchify(pixels, config)
    values, grid_thw = patches_uint8(pixels, config)     # for an encoder that normalises
"""

import hashlib
import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from m0kit.config import ImageConfig
from m0kit.errors import ImageError
from m0kit.files import read_regular
from m0kit.reading.decoding import load, open_image, require_room
from m0kit.reading.formats import MAX_IMAGE_BYTES
from m0kit.reading.inputs import Picture, at

MAX_ASPECT_RATIO = 200  # Qwen2-VL's smart_resize


@dataclass(frozen=True, slots=True)
class Pixels:
    """An image as the model will see it, before normalisation."""

    values: NDArray[np.uint8]  # (height, width, 3), sides multiples of 28
    grid_thw: NDArray[np.int64]  # (3,) 1, rows and columns of patches
    num_tokens: int  # V, visual tokens: 2×2 patches each


@dataclass(frozen=True, slots=True)
class Patches:
    """An image as the vision encoder takes it."""

    values: NDArray[np.float32]  # (P, 1176): channel, frame, row, column of a 14×14 patch
    grid_thw: NDArray[np.int64]  # (3,)


def smart_resize(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """The size to which an image is resized: (height, width) in multiples of 28 within the pixel limits.

    Mirrors transformers' `smart_resize` for Qwen2-VL, with Python's rounding half to even.
    Raises ValueError when one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"aspect ratio {max(height, width) / min(height, width):.1f}")
    factor = config.factor
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > config.max_pixels:
        shrink = math.sqrt((height * width) / config.max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def resize(picture: Picture, config: ImageConfig, where: str) -> Pixels:
    """Decode a picture and bring it to the model's size. Raises ImageError naming `where`."""
    where = at(where, picture.path)
    own = isinstance(picture.source, Image.Image)
    image = picture.source if isinstance(picture.source, Image.Image) else open_image(_bytes(picture, where), where)
    # Before anything is decoded.
    if picture.ready:
        _check_ready(*image.size, config, where)
    else:
        _check_sides(*image.size, where)
    if not own:
        image = _upright(image, where)
    width, height = image.size
    if picture.ready:
        return _pixels(np.asarray(image), config)
    rows, columns = smart_resize(height, width, config)
    said = f"the image (mode {image.mode}, {width}×{height}) cannot be decoded or converted to RGB."
    try:
        resized = _on_white(image).resize((columns, rows), Image.Resampling.BICUBIC)
    except MemoryError:
        require_room(image.size)
        raise ImageError(said, where=where) from None
    except Exception as error:  # a lazily opened PIL image decodes here; Pillow raises what it likes
        raise ImageError(said, where=where) from error
    return _pixels(np.asarray(resized), config)


def to_png(pixels: Pixels) -> bytes:
    """A file that is read back with `ready`."""
    file = io.BytesIO()
    Image.fromarray(pixels.values).save(file, "PNG", compress_level=1)
    return file.getvalue()


def ready_grid(picture: Picture, config: ImageConfig, where: str) -> NDArray[np.int64]:
    """grid_thw (3,) of a `ready` picture, from its header alone. Raises ImageError naming `where`."""
    assert isinstance(picture.source, bytes)
    width, height = open_image(picture.source, where).size
    _check_ready(width, height, config, where)
    return np.array([1, height // config.patch_size, width // config.patch_size], np.int64)


def estimated_tokens(picture: Picture, config: ImageConfig) -> int:
    """Visual tokens that a picture will have, from its header; before a turn by EXIF. Raises ImageError."""
    where = str(picture.path or "")
    source = picture.source
    width, height = (source if isinstance(source, Image.Image) else open_image(_bytes(picture, where), where)).size
    _check_sides(width, height, where)
    rows, columns = (height, width) if picture.ready else smart_resize(height, width, config)
    return rows * columns // config.factor**2


def _check_ready(width: int, height: int, config: ImageConfig, where: str) -> None:
    if height % config.factor or width % config.factor or width * height > config.max_pixels:
        raise ImageError(
            f"kept pixels of {width}×{height}; sides must be multiples of {config.factor}, and at most "
            f"{config.max_pixels} pixels. Add the document again.",
            where=where,
        )


def _pixels(values: NDArray[np.uint8], config: ImageConfig) -> Pixels:
    rows, columns, _ = values.shape
    grid = np.array([1, rows // config.patch_size, columns // config.patch_size], np.int64)
    return Pixels(values, grid, int(grid.prod()) // config.merge_size**2)


def _bytes(picture: Picture, where: str) -> bytes:
    """Of the file, as it was when its key was made. Raises ImageError."""
    if isinstance(picture.source, bytes):
        return picture.source
    if callable(picture.source):
        return picture.source(where)
    assert isinstance(picture.source, Path)
    try:
        raw = read_regular(picture.source, MAX_IMAGE_BYTES)
    except OSError as error:
        raise ImageError(f"{error.strerror}.", where=where) from None
    if hashlib.sha256(raw).hexdigest() != picture.key:
        raise ImageError("was changed while it was being scored. Score it again.", where=where)
    return raw


def patches_uint8(pixels: Pixels, config: ImageConfig) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Values (P, 588) in the order of `patchify` (channel, row, column of a 14×14 patch), and grid_thw (3,).

    Neither normalised nor repeated for the second frame.
    """
    split = _in_groups(pixels, config)
    values = np.empty((*split.shape[:4], 3, *split.shape[4:6]), np.uint8)
    # A channel at a time: NumPy then copies along rows of patches, not three bytes at a time.
    for channel in range(3):
        values[:, :, :, :, channel] = split[..., channel]
    return values.reshape(int(pixels.grid_thw.prod()), -1), pixels.grid_thw


def patchify(pixels: Pixels, config: ImageConfig) -> Patches:
    """Normalise and cut into patches, those of one 2×2 group next to each other.

    The single frame stands for all of a temporal patch. A byte has 256 values, so rescaling (in float64)
    and normalising (in float32) are one table per channel: the processor's arithmetic, done once.
    """
    table = _normalised(config)
    split = _in_groups(pixels, config)
    frames, patch = config.temporal_patch_size, config.patch_size
    values = np.empty((*split.shape[:4], 3, frames, patch, patch), np.float32)
    for channel in range(3):
        values[:, :, :, :, channel] = table[channel][split[..., channel]][:, :, :, :, None]
    return Patches(values.reshape(int(pixels.grid_thw.prod()), -1), pixels.grid_thw)


def _in_groups(pixels: Pixels, config: ImageConfig) -> NDArray[np.uint8]:
    """A view: group row, group column, row and column of a patch in it, y, x, channel."""
    _, rows, columns = pixels.grid_thw.tolist()
    merge, patch = config.merge_size, config.patch_size
    split = pixels.values.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    return split.transpose(0, 3, 1, 4, 2, 5, 6)


@lru_cache(maxsize=4)
def _normalised(config: ImageConfig) -> NDArray[np.float32]:
    """(3, 256): what each byte becomes in each channel."""
    rescaled = (np.arange(256, dtype=np.float64) * config.rescale).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None] for v in (config.mean, config.std))
    table: NDArray[np.float32] = (rescaled[None] - mean) / std
    return table


def _check_sides(width: int, height: int, where: str) -> None:
    """Raises ImageError for sides that the model does not take."""
    if not width or not height:
        raise ImageError(f"the image has no pixels ({width}×{height}).", where=where)
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"an image of {width}×{height} pixels is too narrow; one side may be at most "
            f"{MAX_ASPECT_RATIO} times the other. Cut it into parts.",
            where=where,
        )


def _upright(image: Image.Image, where: str) -> Image.Image:
    """The first frame of a file that was opened, turned, in RGB. Raises ImageError."""
    load(image, where)
    width, height = image.size
    said = f"the {image.format} file ({width}×{height}) is damaged or cut off. Save it again."
    try:
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)
    except MemoryError:
        require_room(image.size)
        raise ImageError(said, where=where) from None
    except Exception as error:  # of damaged metadata
        raise ImageError(said, where=where) from error


def _rgb(image: Image.Image) -> Image.Image:
    """As it is or converted; Pillow would copy one that is in RGB already."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, transparency on white. A colour that was transparent in a file is still noted in `info`."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return _rgb(image)
    opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
