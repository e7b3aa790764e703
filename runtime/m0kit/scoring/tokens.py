"""From text to token ids, and to the first so many of them in bounded time. Owns the tokenizer's rules.

    tokenizer = open_tokenizer(raw)           # Qwen2's rules, whatever the vocabulary; others are refused
    Encoder(tokenizer).start(text, 9729)      # ids of all of a short text, the first 9,729 at least of one of 20 MB

A tokenizer takes seconds and hundreds of megabytes for each megabyte of text, of which a prompt keeps some tens of
kilobytes. `start` tokenises no more than it must, and gives exactly the ids of the whole. It rests on three facts:

- NFC changes nothing across a place where a character follows that neither reorders nor composes with what is before.
- Qwen2's pattern is matched from left to right without looking back, and each of its alternatives but those for blanks
  looks one character beyond its end at most, those for blanks not beyond the blanks. So in a text that is cut, all
  pieces are those of the whole but the last, or the blanks at the end.
- Byte pair encoding always joins the pair of lowest rank, the leftmost of equals. So tokens side by side are the
  encoding of their text if, and only if, each two neighbours are that of theirs: the first join across a boundary in
  the whole would be made in the text of those two alone as well. A boundary in a piece whose end is not in sight is
  certain if the token before it goes with whatever token can follow; to know these, a little more of the piece is
  encoded up to each place where a token may end.

For another tokenizer than Qwen2's, and where all this finds nothing, the whole text is tokenised, or refused if large.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Final, Literal

import msgspec
from tokenizers import Tokenizer, models, normalizers

from m0kit.errors import InputError, is_panic

# Qwen2's pattern (transformers, models/qwen2/tokenization_qwen2.py): contractions, letters with one leading character,
# single digits, punctuation, line breaks, blanks.
PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PIECES: Final = [
    {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]
_PLAIN: Final = (  # settings of a model that Qwen2's does not make use of
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)
# Letters of a token, which are bytes: Qwen2's longest has 128. Work for a boundary grows with the square.
MAX_TOKEN_LETTERS: Final = 512
# Bytes of a text that is tokenised whole: some 2 s and 400 MB a megabyte. Written text is cut long before.
MAX_WHOLE_BYTES: Final = 4 << 20
_UNTAKEN: Final = "the tokenizer cannot take the text. Leave the pair out, and check the artifact's tokenizer."
# Characters per token of a first try: most texts have fewer.
_WIDTH: Final = 6
_LOOK_BACK: Final = 8  # lengths of the longest token, for a boundary that is certain
_SEARCH: Final = 256  # characters from the end of a part, among which a place for NFC is looked for
# The pattern's \s.
BLANKS: Final = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# Characters that NFC neither reorders nor composes with what is before them; not all, but some of each large script.
STARTER: Final = re.compile(
    "[\\0-\u02ff\u0370-\u0482\u048a-\u0590\u05d0-\u05ea\u0621-\u063a\u0904-\u0939\u0e01-\u0e30\u2000-\u205e\u2190-\u2bff"
    "\u3000-\u3029\u3041-\u3096\u30a1-\u30fa\u3105-\u312d\u3400-\u9fff\uac00-\ud7a3\U0001f000-\U0001faff]"
)


def open_tokenizer(raw: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json, to which all that is given it is text. Nothing of it grows with its settings.

    Raises ValueError, with the rest of a sentence, for what is none or has other rules than Qwen2's: a normaliser may
    make a gigabyte of a letter, and a pattern never end.
    """
    try:
        file = msgspec.json.decode(raw, type=_File)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(f"cannot be read as a tokenizer ({error})") from None
    model = file.model
    own = [token for token in file.added_tokens if not token.special]
    if (
        file.normalizer != {"type": "NFC"}
        or not _splits_alike(file.pre_tokenizer.pretokenizers)
        or file.decoder.get("type") != "ByteLevel"
        or model.type != "BPE"
        or not _is_plain(model)
        or any(token.lstrip or token.rstrip or token.single_word for token in own)
    ):
        raise ValueError("has other rules than Qwen2's tokenizer (NFC, its pattern, byte-level BPE)")
    if len(set(model.vocab.values())) != len(model.vocab):
        raise ValueError("gives one id to two tokens")
    if any(len(token) > MAX_TOKEN_LETTERS for token in model.vocab):
        raise ValueError(f"has a token of more than {MAX_TOKEN_LETTERS} letters")
    kept = {  # the library is shown nothing else: some settings end the process
        "version": "1.0",
        "added_tokens": file.added_tokens,
        "normalizer": file.normalizer,
        "pre_tokenizer": file.pre_tokenizer,
        "post_processor": None,  # what it would add is never asked for, but it might repeat what is there
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": model.vocab, "merges": model.merges},
    }
    try:
        with _caught():
            tokenizer = Tokenizer.from_buffer(msgspec.json.encode(kept))
    except _LibraryError:
        raise ValueError("cannot be read as a tokenizer") from None
    tokenizer.encode_special_tokens = True  # as text
    return tokenizer


@dataclass(frozen=True, slots=True)
class _Added:
    """A token that stands for itself."""

    id: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
    content: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TOKEN_LETTERS)]
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


@dataclass(frozen=True, slots=True)
class _Pieces:
    type: Literal["Sequence"]
    pretokenizers: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Model:
    type: str
    vocab: dict[str, Annotated[int, msgspec.Meta(ge=0, lt=2**32)]]
    merges: msgspec.Raw  # handed on as they are: the library says what is wrong with them
    dropout: Any = None
    unk_token: Any = None
    continuing_subword_prefix: Any = None
    end_of_word_suffix: Any = None
    byte_fallback: Any = None
    ignore_merges: Any = None


@dataclass(frozen=True, slots=True)
class _File:
    """What is read of a tokenizer.json."""

    model: _Model
    normalizer: dict[str, Any]
    pre_tokenizer: _Pieces
    decoder: dict[str, Any]
    added_tokens: list[_Added] = field(default_factory=list)


class Encoder:
    """A tokenizer's ids of texts. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, width: int = _WIDTH, *, in_threads: bool = False) -> None:
        """`width`: characters per token of a first try in `start`.

        `in_threads`: several threads tokenise at a time. The library holds Python's lock while it encodes a text, but
        not for a list of texts; then, however, it warns at the next fork, so a list of one is for those who ask.
        """
        self.tokenizer, self._in_threads = tokenizer, in_threads
        self._width = width
        self._model: Any = tokenizer.model
        self._vocabulary: tuple[dict[str, int], int] | None = None
        added = tokenizer.get_added_tokens_decoder().values()  # special ones are not looked for: texts are data
        self._is_known = (
            _has_qwen2_rules(tokenizer) and tokenizer.encode_special_tokens and all(token.special for token in added)
        )

    def all(self, text: str) -> list[int]:
        """The ids of a text. Raises InputError for one that the tokenizer cannot take."""
        try:
            with _caught():
                ids: list[int] = self._encoding(text).ids
        except _LibraryError:
            raise InputError(_UNTAKEN) from None
        return ids

    def before(self, text: str) -> tuple[list[int], int, int]:
        """The ids of a text that others will continue: ids, how many of them stand whatever follows, and the place in
        the text that they reach to. The rest, continued, is tokenised as it would be in the whole.

        Raises InputError as `all` does. None stand where that is not known.
        """
        try:
            with _caught():
                encoding = self._encoding(text)
        except _LibraryError:
            raise InputError(_UNTAKEN) from None
        ids: list[int] = encoding.ids
        last = encoding.token_to_word(len(ids) - 1) if ids and self._is_known else None
        if last is None:
            return ids, 0, 0
        piece = last
        while piece and BLANKS.issuperset(text[slice(*_span(encoding.word_to_chars(piece)))]):
            piece -= 1
        piece = min(piece + 1, last)  # all but the blanks at the end, or but the last
        certain, place = _span(encoding.word_to_tokens(piece))[0], _span(encoding.word_to_chars(piece))[0]
        # Before a letter of ASCII the text may be cut for NFC, too.
        if not text[place:].isascii() or self.all(text[place:]) != ids[certain:]:
            return ids, 0, 0
        return ids, certain, place

    def start(self, text: str, count: int) -> list[int]:
        """The first ids of a text, exactly: `count` or more, or all that there are.

        Raises InputError as `all` does, and for a large text that has no place where it may be cut.
        """
        size = max(count, 1) * self._width
        try:
            with _caught():
                while self._is_known and 2 * size < min(len(text), 2 * MAX_WHOLE_BYTES):
                    ids = self._certain(text, size, count)
                    if len(ids) >= count:
                        return ids
                    size *= 2
        except _LibraryError:
            raise InputError(_UNTAKEN) from None
        if len(text) > MAX_WHOLE_BYTES or len(text.encode()) > MAX_WHOLE_BYTES:
            raise InputError(
                f"the text of {len(text)} characters has no place where it may be cut before it is tokenised (it holds "
                "thousands of combining marks or blanks in a row, or the tokenizer has tokens of its own), and is "
                f"larger than the {MAX_WHOLE_BYTES >> 20} MiB that are tokenised whole. Give its beginning alone."
            )
        return self.all(text)

    def _encoding(self, text: str) -> Any:
        if self._in_threads:
            return self.tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids. Raises InputError as `all` does."""
        try:
            with _caught():
                text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        except _LibraryError:
            raise InputError(_UNTAKEN) from None
        return text

    def _certain(self, text: str, size: int, count: int) -> list[int]:
        """Ids that the text begins with, whatever follows its first `size` characters; no more than needed."""
        places = range(size, max(size - _SEARCH, 0), -1)
        end = next((end for end in places if STARTER.match(text[end])), None)
        if end is None:
            end = next((end for end in places if is_starter(text[end])), None)
        if end is None:
            return []
        part = self.tokenizer.normalizer.normalize_str(text[:end])
        pieces = self.tokenizer.pre_tokenizer.pre_tokenize_str(part)
        last = len(pieces)
        while last and BLANKS.issuperset(part[slice(*pieces[last - 1][1])]):
            last -= 1
        open_blanks = last < len(pieces)
        last = last if open_blanks else last - 1
        ids: list[int] = []
        for letters, _ in pieces[:last]:
            ids += self._piece(letters)
            if len(ids) >= count:
                return ids
        if not open_blanks:
            return ids + self._certain_of_piece(pieces[last][0], count - len(ids))
        blanks = part[pieces[last][1][0] :]
        line_end = max(blanks.rfind("\r"), blanks.rfind("\n"))
        # The piece reaches to the last line end among the blanks, wherever that is; without one, the last blank may
        # belong to what follows.
        blanks = blanks[: line_end + 1] if line_end >= 0 else blanks[:-1]
        letters = "".join(letters for letters, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(blanks))
        return ids + self._certain_of_piece(letters, count - len(ids))

    def _certain_of_piece(self, letters: str, count: int) -> list[int]:
        """The first `count` ids of a piece that begins with these letters, or none where that is not certain."""
        vocabulary, longest = self._tokens()
        place = len(letters) - longest
        found: list[Any] = self._model.tokenize(letters[:place]) if place > 0 else []
        if len(found) < count:
            return []
        # Where the token ends, whatever the letters that follow, that reaches across the place or ends there.
        ends = [place]
        for end in range(place + 1, len(letters) + 1):
            if any(letters[start:end] in vocabulary for start in range(max(end - longest, 0), place)):
                ends.append(end)
        boundaries = list(itertools.accumulate(len(token.value) for token in found))  # its offsets count bytes
        for last in range(len(found) - 1, count - 2, -1):
            token, boundary = found[last], boundaries[last]
            if place - boundary > _LOOK_BACK * longest:
                return []
            nexts = {self._model.tokenize(letters[boundary:end])[0].value for end in ends if end > boundary}
            if boundary < place and all(self._go_together(token.value, next_one) for next_one in nexts):
                return [token.id for token in found[: last + 1]]
        return []

    def _go_together(self, one: str, other: str) -> bool:
        return [token.value for token in self._model.tokenize(one + other)] == [one, other]

    def _piece(self, letters: str) -> list[int]:
        return [token.id for token in self._model.tokenize(letters)]

    def _tokens(self) -> tuple[dict[str, int], int]:
        """The vocabulary, and how many letters, which are bytes, the longest token has."""
        if self._vocabulary is None:  # rarely needed; a second thread would only make the same
            found = self.tokenizer.get_vocab(with_added_tokens=False)
            self._vocabulary = found, max(map(len, found))
        return self._vocabulary


def _span(found: tuple[int, int] | None) -> tuple[int, int]:
    """Of a piece that is there."""
    assert found is not None
    return found


class _LibraryError(Exception):
    """The tokenizers library gave up."""


@contextmanager
def _caught() -> Iterator[None]:
    """Makes one of what the library raises: plain Exception, and where it panics what `except Exception` passes by."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise _LibraryError from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise _LibraryError from error


def _has_qwen2_rules(tokenizer: Tokenizer) -> bool:
    """Of everything but its vocabulary, its merges and added tokens."""
    model: Any = tokenizer.model
    if not isinstance(tokenizer.normalizer, normalizers.NFC) or not isinstance(model, models.BPE):
        return False
    if not _is_plain(model) or tokenizer.pre_tokenizer is None:
        return False
    return _splits_alike(json.loads(tokenizer.pre_tokenizer.__getstate__()).get("pretokenizers", []))


def _is_plain(model: Any) -> bool:
    """Whether a model, the library's or one of a file, makes no use of such settings."""
    return not any(getattr(model, name) for name in _PLAIN)


def _splits_alike(pieces: list[dict[str, Any]]) -> bool:
    """Whether a text is split into pieces by Qwen2's pattern; offsets are not asked for."""
    return [{k: v for k, v in piece.items() if k != "trim_offsets"} for piece in pieces] == _PIECES


def is_starter(one: str) -> bool:
    """Whether NFC neither reorders a character nor composes it with what is before; False where that is not known."""
    first = unicodedata.normalize("NFD", one)[0]
    followers = _followers()
    return (
        unicodedata.category(one) != "Cn"  # another version of Unicode may know it
        and unicodedata.combining(first) == 0
        and one not in followers
        and first not in followers
    )


@cache
def _followers() -> frozenset[str]:
    """Characters that compose with one before them. Takes 0.1 s, and is rarely asked for."""
    parts = (unicodedata.decomposition(chr(code)).split() for code in range(0x110000))
    pairs = {chr(int(part[1], 16)) for part in parts if len(part) == 2 and not part[0].startswith("<")}
    return frozenset(pairs | {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))})  # Hangul's parts
