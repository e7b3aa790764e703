"""The real vocabulary is Qwen2's, token for token; the small one follows the same rules."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from m0kit.errors import DependencyError
from m0kit_parity.samples import vocabulary
from m0kit_parity.samples.vocabulary import QWEN2_VOCAB_SIZE, write_qwen2_tokenizer, write_small_tokenizer

# As the published model numbers them.
SPECIAL = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|box_start|>": 151648,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|quad_end|>": 151651,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
}

TEXTS = [
    "How do small language models turn a web page into markdown?",
    "Wo liegt die Hauptstadt? Où est la capitale ? ¿Dónde?",
    "首都は東京です。人口は約千四百万人。北京今天晴,最高气温二十六度。",
    "Москва — столица. القاهرة هي عاصمة البلاد. ירושלים היא עיר עתיקה.",
    "नई दिल्ली देश की राजधानी है। 서울은 수도이다. กรุงเทพฯ Ελλάδα",
    "def f(x):\n\treturn {'a': x ** 2,  \"b\": [1234567, 0xFF]}\r\n\r\n   # done\n",
    "I'll we've DON'T it's 12,345.67 €   three   spaces\n\n\nlines \u00a0nbsp\u3000wide",
    "👩‍🚀 👍🏽 🇯🇵 \U000130a7 ﬁ ½ ²",
]


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("qwen2")
    write_qwen2_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def merge_by_rank(token: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte pair encoding from its definition: always the pair of the lowest rank, the leftmost of equals."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_special_tokens_have_the_published_ids(qwen2: Tokenizer) -> None:
    assert {token: qwen2.token_to_id(token) for token in SPECIAL} == SPECIAL
    assert all(qwen2.encode(token, add_special_tokens=False).ids == [i] for token, i in SPECIAL.items())
    assert qwen2.get_vocab_size(with_added_tokens=False) == QWEN2_VOCAB_SIZE == 151_643


def test_the_score_token_is_what_the_published_one_is(qwen2: Tokenizer) -> None:
    """Id 100 is a lone byte, 0xA7: what is left of U+130A7, an Egyptian hieroglyph, behind a longer token."""
    assert vocabulary.qwen2_ranks()[b"\xa7"] == 100
    assert qwen2.encode("\U000130a7", add_special_tokens=False).ids[-1] == 100


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_tiktokens_own_encoding_with_the_published_ranks(text: str, qwen2: Tokenizer) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding(
        "qwen2", pat_str=vocabulary.PATTERN, mergeable_ranks=vocabulary.qwen2_ranks(), special_tokens={}
    )
    assert qwen2.encode(text, add_special_tokens=False).ids == encoding.encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_byte_pair_encoding_by_its_definition(text: str, qwen2: Tokenizer) -> None:
    ranks = vocabulary.qwen2_ranks()
    letters = {letter: byte for byte, letter in vocabulary.byte_letters().items()}
    pieces = qwen2.pre_tokenizer.pre_tokenize_str(qwen2.normalizer.normalize_str(text))
    expected = [i for piece, _ in pieces for i in merge_by_rank(bytes(letters[c] for c in piece), ranks)]
    assert qwen2.encode(text, add_special_tokens=False).ids == expected


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back_normalised(qwen2: Tokenizer, text: str) -> None:
    ids = qwen2.encode(text, add_special_tokens=False).ids
    assert qwen2.decode(ids, skip_special_tokens=False) == qwen2.normalizer.normalize_str(text)


def test_tokenizer_config_is_the_published_kind(tmp_path: Path) -> None:
    write_small_tokenizer(tmp_path, 384)
    settings_ = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings_["padding_side"], settings_["tokenizer_class"]) == ("left", "Qwen2Tokenizer")


def test_the_small_vocabulary_ends_in_the_special_tokens_in_the_published_order(tmp_path: Path) -> None:
    tokenizer = write_small_tokenizer(tmp_path, 384)
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    assert ids == list(range(ids[0], ids[0] + len(SPECIAL)))
    assert tokenizer.get_vocab_size() == 384
    assert tokenizer.encode("the").ids != [tokenizer.encode(letter).ids[0] for letter in "the"]  # letters merge


@pytest.mark.parametrize("text", TEXTS)
def test_the_small_vocabulary_can_write_every_script(text: str, tmp_path: Path) -> None:
    tokenizer = write_small_tokenizer(tmp_path, 384)
    assert tokenizer.decode(tokenizer.encode(text).ids) == tokenizer.normalizer.normalize_str(text)


def test_a_vocabulary_too_small_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 270"):
        write_small_tokenizer(tmp_path, 200)


def test_without_dashscope_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DependencyError, match=r"pip install 'm0kit\[dev\]'"):
        write_qwen2_tokenizer(tmp_path)
