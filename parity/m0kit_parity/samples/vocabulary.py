"""Tokenizers for random checkpoints: Qwen2's real vocabulary, and a small one with the same rules.

Neither is in the repository: the real ranks come from the PyPI package `dashscope`, the small one is just
the bytes and a few merges.

    write_qwen2_tokenizer(Path("checkpoint"))
"""

import base64
import importlib.util
import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import Regex as TokenizerRegex

from m0kit.errors import DependencyError
from m0kit.scoring.tokens import PATTERN
from m0kit_parity.small.tokenizer import SPECIAL_TOKENS

QWEN2_VOCAB_SIZE = 151_643  # ordinary tokens; the special tokens follow


def write_qwen2_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json and tokenizer_config.json with Qwen2's 151,643 tokens and the published special tokens.

    Raises DependencyError when dashscope is not installed.
    """
    ranks = qwen2_ranks()
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in ranks:  # in order of rank, which is the order of merging
        if len(token) > 1:
            left, right = _last_merge(token, ranks)
            merges.append((names[left], names[right]))
    return _write(folder, {names[token]: rank for token, rank in ranks.items()}, merges)


def write_small_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The same rules over the 256 bytes and as many two-letter merges as fit below `vocab_size` ids.

    Every script can be written (byte by byte), and neighbouring letters do merge, so that tokens depend on
    what stands next to what, across the seams of a prompt too.
    """
    letters = byte_letters()
    vocabulary = {letter: rank for rank, letter in enumerate(letters[byte] for byte in _byte_order())}
    room = vocab_size - len(vocabulary) - len(SPECIAL_TOKENS)
    if room < 0:
        raise ValueError(f"vocab_size must be at least {len(vocabulary) + len(SPECIAL_TOKENS)}, got {vocab_size}")
    common = [*b"etaoinshrdlcum", *b" \n:*", *"еаоинτα的".encode()]
    merges: list[tuple[str, str]] = []
    for left in common:
        for right in common:
            name = letters[left] + letters[right]
            if len(merges) < room and name not in vocabulary:
                merges.append((letters[left], letters[right]))
                vocabulary[name] = len(vocabulary)
    return _write(folder, vocabulary, merges)


def _write(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(TokenizerRegex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return tokenizer


def qwen2_ranks() -> dict[bytes, int]:
    """Each ordinary token and its rank. Raises DependencyError when dashscope is not installed."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        raise DependencyError("Qwen2's vocabulary comes with dashscope. pip install 'm0kit[dev]'")
    lines = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes().split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    if sorted(ranks.values()) != list(range(QWEN2_VOCAB_SIZE)):
        raise DependencyError(f"dashscope's qwen.tiktoken holds {len(ranks)} ranks, expected {QWEN2_VOCAB_SIZE}")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte pair encoding joins last to make `token`: merge lower ranks until two remain."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, QWEN2_VOCAB_SIZE) for a, b in itertools.pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _byte_order() -> list[int]:
    """Bytes in GPT-2's order: those that print as themselves first. It is the order of ids 0–255 in Qwen2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return printable + [byte for byte in range(256) if byte not in printable]


def byte_letters() -> dict[int, str]:
    """The letter by which byte-level BPE writes each byte: itself if it prints, else one from U+0100 on."""
    order = _byte_order()
    printable = 188
    return {byte: chr(byte) if i < printable else chr(256 + i - printable) for i, byte in enumerate(order)}
