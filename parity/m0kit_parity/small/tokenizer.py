"""The small checkpoint's tokenizer: byte-level BPE with Qwen2's normaliser, pre-tokeniser and special tokens.

Owns training it on the generated corpus and writing tokenizer.json and tokenizer_config.json.

    write_tokenizer(folder, size=3072)

Ids 0–255 are the bytes in GPT-2's order, as in Qwen2, so that id 100, the score token, is the same byte
(0xA7) in both. The special tokens stand at the top, in Qwen2's order.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from m0kit.scoring.tokens import PATTERN
from m0kit_parity.small import corpus

SPECIAL_TOKENS: Final = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
SEED: Final = 20


def _texts() -> Iterator[str]:
    rng = random.Random(SEED)
    for language in corpus.LANGUAGES:  # every word, as it stands inside a text
        for noun in range(len(corpus.NOUNS)):
            for adjective in range(len(corpus.ADJECTIVES)):
                yield f": {corpus.word(0, adjective, language, noun)} , {corpus.word(1, noun, language)}"
        for place in range(len(corpus.PLACES)):
            yield from [f": {corpus.word(2, place, language)}"] * 20
    for level in (1, 2, 4):
        for _ in range(3000):
            yield from _prompts(corpus.text_group(rng, level, 2))
    for _ in range(400):
        yield from _prompts(corpus.code_group(rng, 3))


def _prompts(group: corpus.Group) -> Iterator[str]:
    for document in group.documents:
        yield f"**Document**:\n{document}\n**Query**:\n{group.query}"


def train_tokenizer(size: int) -> Tokenizer:
    """A tokenizer of at most size ids, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path, size: int) -> Tokenizer:
    """Train and write tokenizer.json and tokenizer_config.json; returns the tokenizer."""
    tokenizer = train_tokenizer(size)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }  # fmt: skip
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer
