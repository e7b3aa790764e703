"""From a pair as it was given to one that can be run: parsed, its images looked at, its prompt built.

Owns what a document is known by, and what work will cost. Nothing here runs a graph, and threads of a pool may prepare.

    preparer = Preparer(config, prompts, salt)
    prepared = preparer.prepare(("slm markdown", Path("page.png")))
    prepared.document.key, prepared.prompt.suffix, prepared.cost
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m0kit.config import ModelConfig
from m0kit.errors import ImageError, InputError, RecordDamagedError
from m0kit.keeping.cache import Cache
from m0kit.keeping.catalogue import Described
from m0kit.keeping.store import Store, StoredDocument
from m0kit.reading.inputs import Content, Known, Pair, Picture, Text, parse_pair
from m0kit.scoring.image import estimated_tokens, ready_grid
from m0kit.scoring.images import Images, SeenImage
from m0kit.scoring.prompt import ImageTokens, Prompt, PromptBuilder, PromptDocument

# What the image encoder spends on a visual token, in units of what the decoder spends on a token.
ENCODING_COST: Final = 3
# Bytes of text for a token, few rather than many: texts of 29 languages and code have 2.5 to 5.
_BYTES_PER_TOKEN: Final = 2.5
# Bytes of a prepared pair besides its tokens: objects, and a place in the schedule.
_OVERHEAD: Final = 1000
# Characters of a text that is tokenised within 0.2 ms.
_QUICK: Final = 500
# Bytes of texts and sizes of pages that are remembered, by what an index's database says of them or by their files'
# hashes: 8,000 texts of 700 tokens, or 32,000 pages.
KNOWN_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """What pairs on the same document share: equal where tokens, pixels, model and form of what is kept are."""

    key: bytes
    prefix: NDArray[np.int64] = field(compare=False)  # (T,)
    images: tuple[SeenImage, ...] = field(compare=False)

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def length(self) -> int:
        return len(self.prefix)

    @property
    def cost(self) -> int:
        """Of computing it, in tokens of the decoder."""
        return self.length + ENCODING_COST * sum(image.num_tokens for image in self.images)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A pair that can be run."""

    document: Document
    prompt: Prompt
    images: tuple[SeenImage, ...]  # of the query

    @property
    def cost(self) -> int:
        """Of scoring it alone, in tokens of the decoder."""
        return self.document.cost + self.num_rows + ENCODING_COST * sum(image.num_tokens for image in self.images)

    @property
    def num_rows(self) -> int:
        """Rows of a run that it needs besides its document's."""
        return len(self.prompt.suffix)

    @property
    def num_bytes(self) -> int:
        """What it holds of memory while it waits, besides its document."""
        return _OVERHEAD + self.prompt.suffix.nbytes


class _FromIndex(NamedTuple):
    """A document of an index that was read."""

    content: Text | Picture
    grid_thw: NDArray[np.int64] | None  # (3,) of a picture
    key: bytes


class Preparer:
    """Prepares pairs for one schedule, or documents for an index. Thread-safe.

    A PIL image is known by its identity while a pair that has it waits, and must not be drawn on meanwhile.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompts: PromptBuilder,
        salt: bytes,
        store: Store | None = None,
        known: Cache | None = None,
    ) -> None:
        """`salt`: what a document's state depends on besides tokens and pixels. `store`: what {"id": …} names.

        `known`: what is remembered of the store's documents and of files, whatever the limits of tokens.
        """
        self._config, self._prompts, self._salt, self._store = config, prompts, salt, store
        self._known = Cache(KNOWN_BYTES) if known is None else known
        self._images = Images(config.image, self._known)

    def prepare(self, pair: Any) -> Prepared:
        """A pair as a caller gives it, or a parsed one. Raises InputError, without a position."""
        parsed = pair if isinstance(pair, Pair) else parse_pair(pair)
        document, begun = self.document(parsed.document, "document")
        query, images = self._part(parsed.query, "query")
        return Prepared(document, self._prompts.build(query, begun), images)

    def is_quick(self, pair: Any) -> bool:
        """Whether preparing a pair takes little more than telling another thread of it: texts that are short or
        remembered, documents of the index."""
        if isinstance(pair, Pair):
            pair = (pair.query, pair.document)
        if isinstance(pair, Mapping):
            pair = tuple(pair.values())
        return isinstance(pair, list | tuple) and all(map(self._is_quick, pair))

    def _is_quick(self, side: Any) -> bool:
        if isinstance(side, Known):
            return True
        if isinstance(side, Text):
            side = side.text
        if isinstance(side, Mapping):
            side = "" if "id" in side else side.get("text")
        return isinstance(side, str) and (len(side) <= _QUICK or self._prompts.remembers(side))

    def document(self, content: Content, where: str) -> tuple[Document, PromptDocument]:
        """A document, and how prompts with it begin: a whole one may have the tokens of one that was cut.

        Raises InputError naming `where`.
        """
        known = self._read(content.id, where) if isinstance(content, Known) else None
        part, images = self._part(content, where, known)
        begun = self._prompts.document(part)
        if known is not None and images:
            key = known.key  # made from the same pixels and tokens, which need not be decoded for it again
        else:
            payload = [begun.prefix.tobytes(), *(image.digest() for image in images)]
            key = hashlib.sha256(b"document" + self._salt + b"".join(payload)).digest()
        return Document(key, begun.prefix, images), begun

    def remembered(self, content: Content, where: str) -> Document | None:
        """The document where it can be told without decoding or tokenising much: what was seen lately, or is in the
        index. Raises InputError naming `where`, for one that the index does not have too."""
        if isinstance(content, Text):
            is_known = self._prompts.remembers(content.text) or len(content.text) <= _QUICK
        elif isinstance(content, Picture):
            is_known = self._images.remembers(content)
        else:
            is_known = True
        return self.document(content, where)[0] if is_known else None

    def estimate(self, content: Content) -> int:
        """What a query or document will cost, about, in tokens of the decoder: from its length or its header alone.

        Raises InputError for an image whose header cannot be read, or a document that the index does not have.
        """
        if isinstance(content, Known):
            content = content_of(self._stored(content.id, "document"))
        if isinstance(content, Text):
            return min(int(len(content.text.encode()) / _BYTES_PER_TOKEN) + 1, self._config.prompt.max_length)
        return (1 + ENCODING_COST) * estimated_tokens(content, self._config.image)

    def _part(
        self, content: Content, where: str, known: _FromIndex | None = None
    ) -> tuple[str | ImageTokens, tuple[SeenImage, ...]]:
        """What stands in a prompt, and its image. `known`: one of the index that was read."""
        if isinstance(content, Known):
            known = known or self._read(content.id, where)
            content = known.content
        if isinstance(content, Picture):
            image = self._images.see(content, where, None if known is None else known.grid_thw)
            return ImageTokens(image.num_tokens), (image,)
        return content.text, ()

    def _read(self, name: str, where: str) -> _FromIndex:
        """A document of the index, which is not read again for as long as it is the same. Raises InputError."""
        store = self._store
        row = None if store is None else store.described(name)
        known: _FromIndex | None = None if row is None else self._known.get(row)
        if known is not None:
            return known
        stored = self._stored(name, where)
        content = content_of(stored)
        grid = ready_grid(content, self._config.image, where) if isinstance(content, Picture) else None
        known = _FromIndex(content, grid, stored.key)
        if store is not None and row is not None and _is_of(stored, row):
            kept, num_bytes = known, _OVERHEAD + len(stored.data)
            if isinstance(content, Picture):  # its bytes need not stay in memory
                kept = known._replace(content=replace(content, source=partial(_read_again, store, row)))
                num_bytes = _OVERHEAD
            self._known.put(row, kept, num_bytes=num_bytes, cost=1)
        return known

    def _stored(self, name: str, where: str) -> StoredDocument:
        if self._store is None:
            raise InputError(f'{{"id": {name!r}}} names a document of an index, and none is open.', where=where)
        return _stored(self._store, name, where)


def _stored(store: Store, name: str, where: str) -> StoredDocument:
    """A document of the index. Raises InputError."""
    try:
        document = store.document(name)
    except RecordDamagedError as error:
        raise InputError(error, where=where) from None
    if document is None:
        raise InputError(f"{store.path} has no document {name!r}. Add it with `m0kit index add`.", where=where)
    return document


def _read_again(store: Store, row: Described, where: str) -> bytes:
    """The bytes of a page that was read before. Raises InputError."""
    stored = _stored(store, row.id, where)
    if not _is_of(stored, row):
        raise ImageError("was changed while it was being scored. Score it again.", where=where)
    return stored.data


def _is_of(document: StoredDocument, row: Described) -> bool:
    """Whether this is the document that a row tells of."""
    told = row.id, row.kind, row.key, row.content
    return (document.id, document.kind, document.key, hashlib.sha256(document.data).digest()) == told


def content_of(document: StoredDocument) -> Text | Picture:
    """A document of an index as it was given, or as the pixels that the model sees."""
    if document.kind == "text":
        return Text(document.data.decode())
    return Picture(document.data, f"kept {hashlib.sha256(document.data).hexdigest()}", ready=True)
