"""From a query and a document to token ids, by the published scoring procedure. Owns tokenising and truncation.

The document comes first. Text of a user is data: it is encoded so that it can spell any special token and
never become one (the published tokenizer would take `<|image_pad|>` in a text for an image).

    prompt = PromptBuilder(Path("m0-fp32/tokenizer.json"), config.prompt).build("slm", "some text")
"""

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from m0kit.config import PromptConfig
from m0kit.errors import ArtifactDamagedError, InputError


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """An image's place in a prompt: that many visual tokens between vision start and vision end."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one pair, the score token last."""

    token_ids: NDArray[np.int64]  # (T,)
    prefix_length: int  # leading tokens that come from the document and the query header alone
    image_token_index: NDArray[np.int64]  # (V,) where image pads stand
    document_truncated: bool
    query_truncated: bool


@dataclass(frozen=True, slots=True)
class _Document:
    """The part of a prompt that a document fixes: token ids, then text that the query's text continues."""

    token_ids: tuple[int, ...]  # before `text`
    text: str
    text_ids: tuple[int, ...]  # of `text` alone
    truncated: bool


class PromptBuilder:
    """Builds prompts with an artifact's tokenizer. Thread-safe."""

    def __init__(self, tokenizer_file: Path, config: PromptConfig) -> None:
        """Raises ArtifactDamagedError when the file is not a tokenizer."""
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # the library raises plain Exception
            raise ArtifactDamagedError(f"{tokenizer_file}: cannot be read as a tokenizer. Export again.") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # as text
        self._tokenizer = tokenizer
        self._config = config
        self._document = lru_cache(maxsize=16)(self._build_document)  # one document, many queries

    def with_limits(self, config: PromptConfig) -> "PromptBuilder":
        """The same tokenizer under another configuration."""
        other = copy.copy(self)
        other._config = config
        other._document = lru_cache(maxsize=16)(other._build_document)
        return other

    def build(self, query: str | ImageTokens, document: str | ImageTokens) -> Prompt:
        """The prompt of one pair. Raises InputError when an image does not fit.

        A text document is cut to `max_document_length` tokens, the whole prompt to `max_length` with the
        score token, which costs the query its end. Text next to text is tokenised as one string, so tokens
        may span the seam; `prefix_length` then ends before the seam.
        """
        config = self._config
        prefix = self._document(document)
        fixed = [*prefix.token_ids, *prefix.text_ids]
        if isinstance(query, ImageTokens):
            token_ids = fixed + self._image(query)
            prefix_length = len(fixed)
        else:
            token_ids = [*prefix.token_ids, *self._encode(prefix.text + query)]
            prefix_length = _common_length(token_ids, fixed)
        kept = token_ids[: config.max_length - 1]
        is_pad = np.asarray(kept, np.int64) == config.image_pad_id
        expected = sum(part.num_tokens for part in (document, query) if isinstance(part, ImageTokens))
        if int(is_pad.sum()) != expected:
            raise InputError(
                f"its images take {expected} visual tokens, and with the rest of the prompt that is over the limit "
                f"of {config.max_length} tokens. Lower max_pixels, shrink the image, or shorten the document."
            )
        return Prompt(
            token_ids=np.asarray([*kept, config.score_token_id], np.int64),
            prefix_length=min(prefix_length, len(kept)),
            image_token_index=np.nonzero(is_pad)[0].astype(np.int64),
            document_truncated=prefix.truncated,
            query_truncated=len(kept) < len(token_ids),
        )

    def _build_document(self, document: str | ImageTokens) -> _Document:
        config = self._config
        if isinstance(document, ImageTokens):
            token_ids = self._encode(config.document_header) + self._image(document)
            text, truncated = config.query_header, False
        else:
            limit = config.max_document_length
            own = self._encode(document)
            if len(own) >= limit:  # decoded back even when nothing is lost, as published
                document = self._tokenizer.decode(own[:limit], skip_special_tokens=False)
            token_ids, truncated = [], len(own) > limit
            text = config.document_header + document + config.query_header
        return _Document(tuple(token_ids), text, tuple(self._encode(text)), truncated)

    def _image(self, image: ImageTokens) -> list[int]:
        config = self._config
        return [config.vision_start_id, *[config.image_pad_id] * image.num_tokens, config.vision_end_id]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _common_length(a: list[int], b: list[int]) -> int:
    """How many leading items are equal."""
    if a[: len(b)] == b:
        return len(b)
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))
