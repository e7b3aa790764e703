"""From a pair as it was given to one that can be run: parsed, its images looked at, its prompt built.

Owns what a document is known by, and what work will cost. Nothing here runs a graph, and threads of a pool may prepare.

    preparer = Preparer(config, prompts, salt)
    prepared = preparer.prepare(("slm markdown", Path("page.png")))
    prepared.document.key, prepared.prompt.suffix, prepared.cost
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from m0kit.config import ModelConfig
from m0kit.errors import InputError, RecordDamagedError
from m0kit.keeping.store import Store, StoredDocument
from m0kit.reading.inputs import Content, Known, Picture, Text, parse_pair
from m0kit.scoring.image import estimated_tokens
from m0kit.scoring.images import Images, SeenImage
from m0kit.scoring.prompt import ImageTokens, Prompt, PromptBuilder, PromptDocument

# What the image encoder spends on a visual token, in units of what the decoder spends on a token.
ENCODING_COST: Final = 3
# Bytes of text for a token, few rather than many: texts of 29 languages and code have 2.5 to 5.
_BYTES_PER_TOKEN: Final = 2.5
# Bytes of a prepared pair besides its tokens: objects, and a place in the schedule.
_OVERHEAD: Final = 1000


@dataclass(frozen=True, slots=True)
class Document:
    """What pairs on the same document share: equal where tokens, pixels, model and form of what is kept are."""

    key: bytes
    prefix: NDArray[np.int64] = field(compare=False)  # (T,)
    images: tuple[SeenImage, ...] = field(compare=False)

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


class Preparer:
    """Prepares pairs for one schedule, or documents for an index. Thread-safe.

    A PIL image is known by its identity while a pair that has it waits, and must not be drawn on meanwhile.
    """

    def __init__(self, config: ModelConfig, prompts: PromptBuilder, salt: bytes, store: Store | None = None) -> None:
        """`salt`: what a document's state depends on besides tokens and pixels. `store`: what {"id": …} names."""
        self._config, self._prompts, self._salt, self._store = config, prompts, salt, store
        self._images = Images(config.image)

    def prepare(self, pair: Any) -> Prepared:
        """Raises InputError, without a position."""
        parsed = parse_pair(pair)
        document, begun = self.document(parsed.document, "document")
        query, images = self._part(parsed.query, "query")
        return Prepared(document, self._prompts.build(query, begun), images)

    def document(self, content: Content, where: str) -> tuple[Document, PromptDocument]:
        """A document, and how prompts with it begin: a whole one may have the tokens of one that was cut.

        Raises InputError naming `where`.
        """
        kept = self._stored(content.id, where) if isinstance(content, Known) else None
        part, images = self._part(content if kept is None else content_of(kept), where)
        begun = self._prompts.document(part)
        if kept is not None and kept.kind == "image":
            key = kept.key  # made from the same pixels and tokens, which need not be decoded for it again
        else:
            payload = [begun.prefix.tobytes(), *(image.digest() for image in images)]
            key = hashlib.sha256(b"document" + self._salt + b"".join(payload)).digest()
        return Document(key, begun.prefix, images), begun

    def estimate(self, content: Content) -> int:
        """What a query or document will cost, about, in tokens of the decoder: from its length or its header alone.

        Raises InputError for an image whose header cannot be read, or a document that the index does not have.
        """
        if isinstance(content, Known):
            content = content_of(self._stored(content.id, "document"))
        if isinstance(content, Text):
            return min(int(len(content.text.encode()) / _BYTES_PER_TOKEN) + 1, self._config.prompt.max_length)
        return (1 + ENCODING_COST) * estimated_tokens(content, self._config.image)

    def _part(self, content: Content, where: str) -> tuple[str | ImageTokens, tuple[SeenImage, ...]]:
        if isinstance(content, Known):
            content = content_of(self._stored(content.id, where))
        if isinstance(content, Picture):
            image = self._images.see(content, where)
            return ImageTokens(image.num_tokens), (image,)
        return content.text, ()

    def _stored(self, name: str, where: str) -> StoredDocument:
        """A document of the index. Raises InputError."""
        if self._store is None:
            raise InputError(f'{{"id": {name!r}}} names a document of an index, and none is open.', where=where)
        try:
            document = self._store.document(name)
        except RecordDamagedError as error:
            raise InputError(error, where=where) from None
        if document is None:
            told = f"{self._store.path} has no document {name!r}. Add it with `m0kit index add`."
            raise InputError(told, where=where)
        return document


def content_of(document: StoredDocument) -> Text | Picture:
    """A document of an index as it was given, or as the pixels that the model sees."""
    if document.kind == "text":
        return Text(document.data.decode())
    return Picture(document.data, f"kept {hashlib.sha256(document.data).hexdigest()}", ready=True)
