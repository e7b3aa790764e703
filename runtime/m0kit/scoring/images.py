"""Images that pairs are waiting for: looked at once, resized once, forgotten with the last pair that needs them.

Owns what is in memory of their pixels. Resized pixels are kept while there is room, and made again from their source
where not. What an engine makes of an image hangs on it, and goes with it.

    image = Images(config.image).see(picture, "document")     # decoded; the same object for the same pixels
    image.num_tokens, image.pixels()
"""

import hashlib
import threading
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m0kit.config import ImageConfig
from m0kit.keeping.cache import Cache, Once
from m0kit.reading.inputs import Picture
from m0kit.scoring.image import Pixels, ready_grid, resize

# Bytes of resized pixels that wait for their turn: 140 pages of the published size.
PIXEL_BYTES = 256 << 20
# Of what is remembered of a file: bytes, about, and what it saves, where that is 1 of a text of an index.
_FACTS_BYTES = 1000
_FACTS_COST = 100


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
        pixels = self._pixels  # which another thread may drop
        if pixels is None:
            pixels = self._pixels = resize(self.picture, self._config, self.where)
            self._room.take(pixels.values.nbytes, forced=True)
        return pixels

    @property
    def is_drawn(self) -> bool:
        """Whether `require` would do nothing."""
        return self.embeds is not None or self._pixels is not None

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
        pixels, self._pixels = self._pixels, None
        if pixels is not None:
            self._room.take(-pixels.values.nbytes)

    def __del__(self) -> None:
        self.drop_pixels()


class _Facts(NamedTuple):
    """What is remembered of a file, by the hash of its bytes: enough to know it again without decoding it."""

    grid_thw: NDArray[np.int64]  # (3,)
    num_tokens: int
    digest: bytes


class Images:
    """The images in use. Thread-safe."""

    def __init__(self, config: ImageConfig, remembered: Cache | None = None) -> None:
        """`remembered`: what is known of files, under one `config`; other keys there are left alone."""
        self._config = config
        self._remembered = Cache(0) if remembered is None else remembered
        self._room = _Room(PIXEL_BYTES)
        self._lock = threading.Lock()
        self._once = Once()
        self._by_source: WeakValueDictionary[str, SeenImage] = WeakValueDictionary()
        self._by_pixels: WeakValueDictionary[bytes, SeenImage] = WeakValueDictionary()

    def see(self, picture: Picture, where: str, grid_thw: NDArray[np.int64] | None = None) -> SeenImage:
        """Decode and resize a picture, unless it is in use. Raises ImageError naming `where`.

        `grid_thw` (3,): of a `ready` one, where it is known. Of threads with the same picture one does it.
        """
        known = self._known(picture.key)
        if known is None and picture.ready:
            known = self._look(picture, where, grid_thw)
        if known is None:
            (known,) = self._once.get([picture.key], self._known, lambda _: [self._look(picture, where, grid_thw)])
        return known

    def remembers(self, picture: Picture) -> bool:
        """Whether it is in use, or its size and pixels' digest are remembered: it need not be decoded to be known."""
        return self._known(picture.key) is not None or (_Facts, picture.key) in self._remembered

    def _known(self, key: str) -> SeenImage | None:
        with self._lock:
            return self._by_source.get(key)

    def _look(self, picture: Picture, where: str, grid_thw: NDArray[np.int64] | None) -> SeenImage:
        if picture.ready:  # the pixels of a document that is kept are rarely needed
            grid = ready_grid(picture, self._config, where) if grid_thw is None else grid_thw
            num_tokens = int(grid.prod()) // self._config.merge_size**2
            image = SeenImage(picture, where, grid, num_tokens, self._config, self._room)
            with self._lock:
                return self._by_source.setdefault(picture.key, image)
        own = isinstance(picture.source, Image.Image)  # which may be drawn on later
        facts: _Facts | None = None if own else self._remembered.get((_Facts, picture.key))
        pixels = None
        if facts is None:
            pixels = resize(picture, self._config, where)
            facts = _Facts(pixels.grid_thw, pixels.num_tokens, _digest(pixels))
            if not own:
                key = _Facts, picture.key
                self._remembered.put(key, facts, num_bytes=_FACTS_BYTES, cost=_FACTS_COST)
        again = replace(picture, source=picture.path or picture.source)  # a file's bytes need not stay in memory
        grid, num_tokens, digest = facts
        new = SeenImage(again, where, grid, num_tokens, self._config, self._room, _digest=digest)
        with self._lock:
            image = self._by_pixels.setdefault(digest, new)
            if image is new and pixels is not None:
                image.hold(pixels)
            elif own:
                image.others.append(picture)
            self._by_source[picture.key] = image
        return image


def _digest(pixels: Pixels) -> bytes:
    values = pixels.values
    return hashlib.sha256(str(values.shape).encode() + np.ascontiguousarray(values).data).digest()
