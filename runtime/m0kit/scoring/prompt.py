"""From a query and a document to token ids, by the published scoring procedure. Owns tokenising and truncation.

The document comes first. Text of a user is data: it is encoded so that it can spell any special token and
never become one (the published tokenizer would take `<|image_pad|>` in a text for an image).

    prompt = PromptBuilder(Path("m0-fp32/tokenizer.json"), config.prompt).build("slm", "some text")
"""

import copy
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from m0kit.artifact.manifest import TOKENIZER_BYTES
from m0kit.config import PromptConfig
from m0kit.errors import ArtifactDamagedError, InputError
from m0kit.files import read_regular
from m0kit.keeping.cache import Cache
from m0kit.scoring.tokens import Encoder, open_tokenizer

# Bytes of documents that are remembered in tokens, for the next query: 3,000 of 768 tokens. Tokenising one takes longer
# than a hundredth of scoring a query on it.
_REMEMBERED: Final = 32 << 20
# Of each besides, in the cache and here: more than a short text's own.
_ENTRY_BYTES: Final = 700
# Characters of a text that is known by itself, not by its hash: fewer bytes, about, than its tokens have.
_SHORT: Final = 1 << 16
# Bytes and characters of queries that are remembered in tokens, for the next document.
_REMEMBERED_QUERIES: Final = 1 << 20
_SHORT_QUERY: Final = 1 << 12
# A token is a byte of the normalised text at least, and Unicode's NFC makes at most three bytes of one.
_MOST_TOKENS_PER_BYTE: Final = 3


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """An image's place in a prompt: that many visual tokens between vision start and vision end."""

    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PromptDocument:
    """The part of a prompt that a document fixes: token ids, and the text at their end that the query's continues."""

    prefix: NDArray[np.int64]  # its part of the prompt and the query header
    text: str  # no more of it than may be tokenised in another way before a query
    before_text: int  # tokens of the prefix before those of `text`
    num_pads: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one pair: the start of its document's prefix, then the suffix, the score token last."""

    document: PromptDocument
    prefix_length: int  # how much of its prefix stands in this prompt
    suffix: NDArray[np.int64]
    image_pad_id: int
    query_truncated: bool

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """(T,)"""
        return np.concatenate([self.document.prefix[: self.prefix_length], self.suffix])


class PromptBuilder:
    """Builds prompts with an artifact's tokenizer. Thread-safe."""

    def __init__(self, tokenizer_file: Path, config: PromptConfig, *, in_threads: bool = False) -> None:
        """`in_threads` as of `Encoder`. Raises ArtifactDamagedError when the file is not a tokenizer."""
        try:
            tokenizer = open_tokenizer(read_regular(tokenizer_file, TOKENIZER_BYTES))
        except OSError as error:
            raise ArtifactDamagedError(f"{tokenizer_file}: {error.strerror}. Export again.") from None
        except ValueError as error:
            raise ArtifactDamagedError(f"{tokenizer_file}: {error}. Export again.") from error
        self._encoder = Encoder(tokenizer, in_threads=in_threads)
        self.config = config
        self.remembered = Cache(_REMEMBERED)
        self._in_use: WeakValueDictionary[str | bytes | ImageTokens, PromptDocument] = WeakValueDictionary()
        self._queries = Cache(_REMEMBERED_QUERIES)

    def with_limits(self, config: PromptConfig) -> "PromptBuilder":
        """The same tokenizer under another configuration."""
        other = copy.copy(self)
        other.config, other.remembered = config, Cache(_REMEMBERED)
        other._in_use = WeakValueDictionary()  # noqa: SLF001 — of its own class
        return other

    def build(self, query: str | ImageTokens, document: "str | ImageTokens | PromptDocument") -> Prompt:
        """The prompt of one pair. Raises InputError when an image does not fit.

        A text document is cut to `max_document_length` tokens, the whole prompt to `max_length` with the
        score token, which costs the query its end. Text next to text is tokenised as one string, so tokens
        may span the seam; the part of the document's prefix that is used then ends before the seam.
        """
        config = self.config
        if not isinstance(document, PromptDocument):
            document = self.document(document)
        prefix, kept = document.prefix, config.max_length - 1
        if isinstance(query, ImageTokens):
            used, rest, expected = len(prefix), self._image(query), query.num_tokens
        else:
            start = document.before_text
            # One more than are kept tells that some are lost.
            whole = self._continued(document.text + query, kept - start + 1)
            common = _common_length(whole, prefix[start:].tolist())
            used, rest, expected = start + common, whole[common:], 0
        pad = config.image_pad_id
        truncated = used + len(rest) > kept
        used, own = min(used, kept), rest[: max(kept - used, 0)]
        expected += document.num_pads
        lost = int((prefix[used:] == pad).sum()) if used < len(prefix) else 0
        if document.num_pads - lost + own.count(pad) != expected:
            raise InputError(
                f"its images take {expected} visual tokens, and with the rest of the prompt that is over the limit "
                f"of {config.max_length} tokens. Lower max_pixels, shrink the image, or shorten the document."
            )
        return Prompt(
            document=document,
            prefix_length=used,
            suffix=np.asarray([*own, config.score_token_id], np.int64),
            image_pad_id=pad,
            query_truncated=truncated,
        )

    def remembers(self, document: str) -> bool:
        """Whether a short text need not be tokenised."""
        return document in self.remembered

    def cut(self, text: str, num_tokens: int) -> str:
        """The beginning of a text, of so many tokens at most where it stands alone."""
        own = self._encoder.start(text, num_tokens + 1)
        return text if len(own) <= num_tokens else self._encoder.decode(own[:num_tokens])

    def document(self, document: str | ImageTokens) -> PromptDocument:
        """What a document fixes, whatever the query will be; known as long as a prompt has it, and then remembered."""
        key: str | bytes | ImageTokens = document
        if isinstance(document, str) and len(document) > _SHORT:
            key = hashlib.sha256(document.encode()).digest()
        known: PromptDocument | None = self.remembered.get(key) or self._in_use.get(key)
        if known is None:
            known = self._build_document(document)
            num_bytes = known.prefix.nbytes + sys.getsizeof(known.text) + sys.getsizeof(key) + _ENTRY_BYTES
            self.remembered.put(key, known, num_bytes=num_bytes, cost=len(known.prefix))
            self._in_use[key] = known
        return known

    def _build_document(self, document: str | ImageTokens) -> PromptDocument:
        config = self.config
        if isinstance(document, ImageTokens):
            before = self._encoder.all(config.document_header) + self._image(document)
            text, truncated = config.query_header, False
        else:
            limit, before, truncated = config.max_document_length, [], False
            if _MOST_TOKENS_PER_BYTE * len(document.encode()) >= limit:
                own = self._encoder.start(document, limit + 1)
                truncated = len(own) > limit
                if len(own) >= limit:  # decoded back even when nothing is lost, as published
                    document = self._encoder.decode(own[:limit])
            text = config.document_header + document + config.query_header
        ids, certain, place = self._encoder.before(text)
        prefix = np.asarray([*before, *ids], np.int64)
        num_pads = int((prefix == config.image_pad_id).sum())
        return PromptDocument(prefix, text[place:], len(before) + certain, num_pads, truncated)

    def _continued(self, text: str, count: int) -> list[int]:
        """Ids of the end of a document with a query: `count` or more, or all."""
        if len(text) > _SHORT_QUERY:
            return self._encoder.start(text, count)
        ids: list[int] | None = self._queries.get(text)
        if ids is None:
            ids = self._encoder.all(text)
            self._queries.put(text, ids, num_bytes=sys.getsizeof(text) + 40 * len(ids), cost=len(ids))
        return ids

    def _image(self, image: ImageTokens) -> list[int]:
        config = self.config
        return [config.vision_start_id, *[config.image_pad_id] * image.num_tokens, config.vision_end_id]


def _common_length(a: list[int], b: list[int]) -> int:
    """How many leading items are equal."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
