"""What is asked of a server under load: bodies of requests by kind, the same for the same seed.

Owns the kinds and their sizes. Cold: no document comes twice, so each is read. Warm: documents are drawn from a few
that were sent before, and queries are new.

    source = Source("mixed", Sizes(), seed=0)
    source.cold()      # the body of one request
"""

import base64
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from PIL import Image

from m0kit.reading.decoding import open_image
from m0kit_parity.bench.workloads import WORDS, page_of

Kind = Literal["tiny", "texts", "pages", "mixed", "ids"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of requests: how many of each, words of a text, visual tokens of a page."""

    texts: int = 10
    pages: int = 2
    ids: int = 20
    words: tuple[int, int] = (20, 150)  # least and most
    visual_tokens: int = 64
    kept: int = 64  # documents that warm requests draw from, of each form


class Source:
    """An endless supply of one kind."""

    def __init__(self, kind: Kind, sizes: Sizes, seed: int = 0) -> None:
        self.kind, self.sizes = kind, sizes
        self._random = random.Random(f"{kind} {seed}")
        self._serial = 0
        self._blank = None if kind in ("tiny", "texts") else _pixels(page_of(sizes.visual_tokens, seed))
        self.kept: dict[str, dict[str, str]] = {}  # by id
        if kind != "tiny":
            for number in range(sizes.kept):
                self.kept[f"text-{number}"] = {"text": self._text()}
                if self._blank is not None:
                    self.kept[f"page-{number}"] = {"image": self._page()}

    def cold(self) -> bytes:
        """A request on documents that never came before."""
        if self.kind == "ids":
            raise ValueError("ids are of documents that are kept")
        texts, pages = self._counts()
        documents = [{"text": self._text()} for _ in range(texts)] + [{"image": self._page()} for _ in range(pages)]
        return self._body(documents)

    def warm(self) -> bytes:
        """A request on documents of `kept`, by their ids where the kind is that."""
        if self.kind == "tiny":
            return self.cold()
        if self.kind == "ids":
            return self._body([{"id": name} for name in self._drawn(list(self.kept), self.sizes.ids)])
        texts, pages = self._counts()
        chosen = self._drawn([name for name in self.kept if name.startswith("text")], texts)
        chosen += self._drawn([name for name in self.kept if name.startswith("page")], pages)
        return self._body([self.kept[name] for name in chosen])

    def warming(self) -> Iterator[bytes]:
        """Requests that name each of `kept` once, or none for ids, which are added to the index instead."""
        if self.kind != "ids":
            for document in self.kept.values():
                yield self._body([document])

    def additions(self) -> Iterator[tuple[str, bytes]]:
        """Each of `kept` as the body of a PUT, with its id."""
        for name, document in self.kept.items():
            yield name, json.dumps(document).encode()

    def _counts(self) -> tuple[int, int]:
        sizes = self.sizes
        counts = {"tiny": (1, 0), "texts": (sizes.texts, 0), "pages": (0, sizes.pages)}
        return counts.get(self.kind, (sizes.texts, sizes.pages))

    def _drawn(self, names: Sequence[str], count: int) -> list[str]:
        return self._random.sample(names, min(count, len(names)))

    def _body(self, documents: Sequence[dict[str, str]]) -> bytes:
        body: dict[str, Any] = {"query": self._words(3), "documents": documents, "return_documents": False}
        return json.dumps(body).encode()

    def _words(self, count: int) -> str:
        self._serial += 1
        return " ".join([*self._random.choices(WORDS, k=count), str(self._serial)])

    def _text(self) -> str:
        return self._words(3 if self.kind == "tiny" else self._random.randint(*self.sizes.words))

    def _page(self) -> str:
        """A page that differs from all others in one row of pixels: to draw each would take longer than to read it."""
        assert self._blank is not None
        pixels = self._blank.copy()
        pixels[-1] = np.frombuffer(self._random.randbytes(pixels[-1].size), np.uint8).reshape(pixels[-1].shape)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _pixels(page: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(open_image(page, "the page").convert("RGB"))
