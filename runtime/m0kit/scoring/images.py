"""Images that pairs are waiting for: looked at once, resized once, forgotten with the last pair that needs them.

Owns what is in memory of their pixels. Resized pixels are kept while there is room, and made again from their source
where not. What an engine makes of an image hangs on it, and goes with it.

    image = Images(config.image).see(picture, "document")     # decoded; the same object for the same pixels
    image.num_tokens, image.pixels()
"""

import hashlib
import threading
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m0kit.config import ImageConfig
from m0kit.reading.inputs import Picture
from m0kit.scoring.image import Pixels, ready_grid, resize

# Bytes of resized pixels that wait for their turn: 140 pages of the published size.
PIXEL_BYTES = 256 << 20


class _Room:
    """Bytes of pixels that may be kept. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.left = max_bytes
        self._lock = threading.Lock()

    def take(self, num_bytes: int, *, forced: bool = False) -> bool:
        with self._lock:
            fits = forced or num_bytes <= self.left
            self.left -= num_bytes if fits else 0
            return fits


@dataclass(slots=True, eq=False, weakref_slot=True)
class SeenImage:
    """An image whose size is known. Equal pixels are one object, unless one of them comes from an index."""

    picture: Picture  # keeps a PIL image alive, which is known by its identity
    where: str
    grid_thw: NDArray[np.int64]  # (3,)
    num_tokens: int  # visual tokens
    _config: ImageConfig
    _room: _Room
    embeds: Any = None  # what an engine made of it
    others: list[Picture] = field(
        default_factory=list
    )  # PIL images of the same pixels: alive, they keep their identity
    _pixels: Pixels | None = None
    _digest: bytes = b""

    def pixels(self) -> Pixels:
        """Raises ImageError for a file that has changed or gone since it was looked at."""
        if self._pixels is None:
            self._pixels = resize(self.picture, self._config, self.where)
            self._room.take(self._pixels.values.nbytes, forced=True)
        return self._pixels

    def hold(self, pixels: Pixels) -> None:
        """Keep its pixels, if there is room."""
        if self._room.take(pixels.values.nbytes):
            self._pixels = pixels

    def require(self) -> None:
        """Make sure that it can be encoded, where it was not. Raises ImageError as `pixels` does."""
        if self.embeds is None:
            self.pixels()

    def digest(self) -> bytes:
        """sha256 of the pixels as the model sees them, size included."""
        if not self._digest:
            self._digest = _digest(self.pixels())
        return self._digest

    def drop_pixels(self) -> None:
        """They are made again where they are asked for again."""
        if self._pixels is not None:
            self._room.take(-self._pixels.values.nbytes)
            self._pixels = None

    def __del__(self) -> None:
        self.drop_pixels()


class Images:
    """The images in use. Thread-safe."""

    def __init__(self, config: ImageConfig) -> None:
        self._config = config
        self._room = _Room(PIXEL_BYTES)
        self._lock = threading.Lock()
        self._by_source: WeakValueDictionary[str, SeenImage] = WeakValueDictionary()
        self._by_pixels: WeakValueDictionary[bytes, SeenImage] = WeakValueDictionary()

    def see(self, picture: Picture, where: str) -> SeenImage:
        """Decode and resize a picture, unless it is in use. Raises ImageError naming `where`."""
        with self._lock:
            known = self._by_source.get(picture.key)
        if known is not None:
            return known
        if picture.ready:  # the pixels of a document that is kept are rarely needed
            grid = ready_grid(picture, self._config, where)
            num_tokens = int(grid.prod()) // self._config.merge_size**2
            image = SeenImage(picture, where, grid, num_tokens, self._config, self._room)
            with self._lock:
                return self._by_source.setdefault(picture.key, image)
        pixels = resize(picture, self._config, where)
        digest = _digest(pixels)
        again = replace(picture, source=picture.path or picture.source)  # a file's bytes need not stay in memory
        new = SeenImage(again, where, pixels.grid_thw, pixels.num_tokens, self._config, self._room, _digest=digest)
        with self._lock:
            image = self._by_pixels.setdefault(digest, new)
            if image is new:
                image.hold(pixels)
            elif isinstance(picture.source, Image.Image):
                image.others.append(picture)
            self._by_source[picture.key] = image
        return image


def _digest(pixels: Pixels) -> bytes:
    values = pixels.values
    return hashlib.sha256(str(values.shape).encode() + np.ascontiguousarray(values).data).digest()
