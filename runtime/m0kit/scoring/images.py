"""The images of one call: resized once, encoded once, forgotten after the last pair that needs them.

Owns what is in memory of them. Resized pixels are kept while there is room and made again from their source where
not; embeddings go through the cache, when there is one.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m0kit.config import ImageConfig
from m0kit.errors import ArtifactDamagedError, ImageError
from m0kit.keeping.cache import Cache, Once
from m0kit.reading.inputs import Picture
from m0kit.scoring import sessions
from m0kit.scoring.image import Pixels, patchify, ready_grid, resize
from m0kit.scoring.planner import PATCH_BUDGET, image_rows, pack
from m0kit.scoring.positions import vision_positions

Float32 = NDArray[np.float32]
Array = NDArray[Any]

# Bytes of resized pixels that wait for their turn: 140 pages of the published size.
PIXEL_BYTES = 256 << 20
# What the image encoder spends on a visual token, in units of what the decoder spends on a token.
ENCODING_COST = 3


@dataclass(slots=True)
class _Seen:
    """What is known of a picture once it was looked at."""

    picture: Picture  # keeps a PIL image alive, which is known by its identity
    where: str
    grid_thw: NDArray[np.int64]
    num_tokens: int
    pixels: Pixels | None
    digest: bytes = b""


class Images:
    """Pictures by their keys (`Picture.key`). For one call, and one thread."""

    def __init__(
        self, config: ImageConfig, vision: sessions.Graph, cache: Cache | None, once: Once, salt: bytes, half: bool
    ):
        """With a cache an image that other calls encode too is encoded `once`.

        `salt` tells the embeddings of one artifact from another's in the cache; with `half` they are float16.
        """
        self._config, self._vision, self._cache, self._salt, self._half = config, vision, cache, salt, half
        self._once = once
        self._seen: dict[str, _Seen] = {}
        self._embeds: dict[str, Array] = {}
        self._uses: Counter[str] = Counter()
        self._pixel_bytes = 0

    def see(self, picture: Picture, where: str) -> int:
        """Decode and resize a picture, if it is new; returns its number of visual tokens. Raises ImageError."""
        if picture.key not in self._seen and picture.ready:
            grid = ready_grid(picture, self._config, where)  # the pixels of a document that is kept are rarely needed
            self._seen[picture.key] = _Seen(picture, where, grid, int(grid.prod()) // self._config.merge_size**2, None)
        elif picture.key not in self._seen:
            pixels = resize(picture, self._config, where)
            again = replace(picture, source=picture.path or picture.source)  # a file's bytes need not stay in memory
            seen = _Seen(again, where, pixels.grid_thw, pixels.num_tokens, None)
            self._seen[picture.key] = seen
            if self._pixel_bytes + pixels.values.nbytes <= PIXEL_BYTES:
                seen.pixels = pixels
                self._pixel_bytes += pixels.values.nbytes
        return self._seen[picture.key].num_tokens

    def grid(self, key: str) -> NDArray[np.int64]:
        """grid_thw (3,)"""
        return self._seen[key].grid_thw

    def num_tokens(self, key: str) -> int:
        return self._seen[key].num_tokens

    def digest(self, key: str) -> bytes:
        """sha256 of the pixels as the model sees them, size included."""
        seen = self._seen[key]
        if not seen.digest:
            values = self.pixels(key).values
            seen.digest = hashlib.sha256(str(values.shape).encode() + np.ascontiguousarray(values).data).digest()
        return seen.digest

    def pixels(self, key: str) -> Pixels:
        """Raises ImageError for a file that has changed or gone since it was looked at."""
        seen = self._seen[key]
        if seen.pixels is None:
            seen.pixels = resize(seen.picture, self._config, seen.where)
            self._pixel_bytes += seen.pixels.values.nbytes
        return seen.pixels

    def fetch(self, keys: Sequence[str]) -> None:
        """Make sure that these can be encoded. Raises ImageError as `pixels` does."""
        for key in keys:
            if key not in self._embeds:
                self.pixels(key)

    def there(self, keys: Sequence[str]) -> list[str]:
        """Those that can be encoded; why others cannot, `fetch` says."""
        found = []
        for key in keys:
            with suppress(ImageError):
                self.fetch([key])
                found.append(key)
        return found

    def claim(self, keys: Sequence[str]) -> None:
        """Note that one more pair needs these."""
        self._uses.update(keys)

    def release(self, keys: Sequence[str]) -> None:
        """Note that one pair less does."""
        self._uses.subtract(keys)
        for key in keys:
            if self._uses[key] <= 0:
                self._embeds.pop(key, None)
                self._drop_pixels(key)

    def embeds(self, keys: Sequence[str]) -> list[Float32]:
        """Image embeddings (V, D) for each key, in order; those not there yet are encoded, packed."""
        new = []
        for key in dict.fromkeys(keys):
            if key not in self._embeds:
                known = self._cache.get(self._cache_key(key)) if self._cache is not None else None
                if known is None:
                    new.append(key)
                else:
                    self._embeds[key] = known
        sized = ((key, [int(self.grid(key).prod())]) for key in new)
        for packed in pack(sized, [PATCH_BUDGET]):
            self._embeds |= zip(packed, self._encoded(packed), strict=True)
            for key in packed:
                self._drop_pixels(key)
        return [np.asarray(self._embeds[key], np.float32) for key in keys]

    def _encoded(self, keys: Sequence[str]) -> list[Array]:
        """Embeddings by this thread, or by another that has the same pixels in hand."""
        cache = self._cache
        if cache is None:
            return self._encode(keys)
        shared = [self._cache_key(key) for key in keys]
        by_pixels = dict(zip(shared, keys, strict=True))

        def encode(some: list[bytes]) -> list[Array]:
            embeds = self._encode([by_pixels[key] for key in some])
            for key, own in zip(some, embeds, strict=True):
                if np.isfinite(own).all():
                    cache.put(key, own, num_bytes=own.nbytes, cost=ENCODING_COST * len(own))
            return embeds

        return self._once.get(shared, cache.peek, encode)

    def _encode(self, keys: Sequence[str]) -> list[Array]:
        patches = [patchify(self.pixels(key), self._config) for key in keys]
        feeds = {
            "patches": np.concatenate([p.values for p in patches]),
            "positions": np.concatenate([vision_positions(p.grid_thw, self._config.merge_size) for p in patches]),
            "images": image_rows([len(p.values) for p in patches]),
        }
        out = self._vision.run(feeds, ["image_embeds"])["image_embeds"]
        if self._half:
            out = out.astype(np.float16)
        ends = np.cumsum([self._seen[key].num_tokens for key in keys])
        if len(out) != ends[-1]:
            raise ArtifactDamagedError(
                f"the vision graph gives {len(out)} rows for {ends[-1]} visual tokens. Export the artifact again."
            )
        return [rows.copy() if len(keys) > 1 else rows for rows in np.split(out, ends[:-1])]

    def _cache_key(self, key: str) -> bytes:
        return hashlib.sha256(b"image" + self._salt + self.digest(key)).digest()

    def _drop_pixels(self, key: str) -> None:
        seen = self._seen[key]
        if seen.pixels is not None:
            self._pixel_bytes -= seen.pixels.values.nbytes
            seen.pixels = None
