"""The start of a text's ids is that of the whole text's, wherever it is cut, and takes no more work than it must."""

import itertools
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.runtime.test_prompt import fragments
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from m0kit.errors import DependencyError
from m0kit.tokens import BLANKS, PATTERN, STARTER, Encoder
from m0kit_parity.vocabulary import write_qwen2_tokenizer


def opened(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def small(tiny: Path) -> Tokenizer:
    return opened(tiny / "tokenizer.json")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("qwen2")
    try:
        write_qwen2_tokenizer(folder)
    except DependencyError:
        pytest.skip("dashscope is not installed")
    return opened(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def tricky() -> Tokenizer:
    """Merges that reach far: what a letter becomes depends on many that follow."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    # Each pair of a chain is merged before the one to its left: a…h read from the right end.
    for left, right in reversed(list(itertools.pairwise("abcdefgh"))):
        merges.append((left, right))
    merges += [("Ġ", "Ġ"), ("ĠĠ", "Ġ"), ("Ċ", "Ċ"), ("=", "="), ("==", "="), ("ab", "cd"), ("h", "a"), ("gh", "ab")]
    for pair in merges:
        letters.setdefault("".join(pair), len(letters))
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_as_letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    return tokenizer


def check(tokenizer: Tokenizer, text: str, count: int, width: int = 1) -> None:
    __tracebackhide__ = True
    encoder = Encoder(tokenizer, width)
    whole = encoder.all(text)
    ids = encoder.start(text, count)
    assert ids[:count] == whole[:count]
    assert len(ids) >= min(count, len(whole))
    assert len(ids) <= len(whole)


# Runs of one kind, which are one piece however long, and what may stand at their edges.
runs = st.tuples(
    st.sampled_from(["a", "abcdefgh", "ha", "gh", " ", "\n", " \n", "\t ", "=", "-=", "é", "e\u0301", "\u0301", "漢",
                     "한", "\u1112\u1161", "ภา", "\U0001f469", "\U0001f469\u200d", "5", "\u00a0", "\r\n", "\x1c",
                     "\u180e", "'l", "'s", "\u3000"]),
    st.integers(1, 60),
).map(lambda run: run[0] * run[1])  # fmt: skip
texts = st.lists(
    st.one_of(runs, fragments, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), min_size=1, max_size=10
).map("".join)


@pytest.mark.parametrize("name", ["small", "real", "tricky"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, st.integers(1, 40), st.integers(1, 3))
@example("word  \n" + " " * 90 + "\nx", 8, 1)
@example("word  \n" + " " * 90 + "x", 8, 1)
@example("abcdefgh" * 60, 20, 1)
@example("abc" + "\n" * 200 + " " * 100 + "!", 4, 1)
@example("!" + "\n" * 200, 4, 1)
@example("\u1112" * 50 + "\u1161\u11ab", 3, 1)
@example("a" + "\u0327\u0301" * 100, 3, 1)
def test_the_start_is_that_of_the_whole(
    name: str, request: pytest.FixtureRequest, text: str, count: int, width: int
) -> None:
    check(request.getfixturevalue(name), text, count, width)


@pytest.mark.parametrize("name", ["small", "real"])
@pytest.mark.parametrize(
    "unit",
    [
        "the tide comes in, ",
        "漢字文、",
        "ACGTTGCA",
        "a",
        "ภาษาไทย",
        "=",
        "\n",
        "\U0001f469",
        "e\u0301",
        "5",
        "x\n\n",
        "é",
    ],
)
def test_of_a_large_text_little_is_tokenised(
    name: str, unit: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, count = request.getfixturevalue(name), 600
    text = unit * (400_000 // len(unit))
    encoder = Encoder(tokenizer)
    expected = encoder.all(text[: 200 * count])[:count]  # a token has 128 letters at most
    monkeypatch.setattr(encoder, "all", lambda text: pytest.fail(f"{len(text)} characters"))
    assert encoder.start(text, count)[:count] == expected
    headed = f"a head\n{text}"  # of which the first tokens are certain, and the many that follow not so soon
    assert encoder.start(headed, count)[:count] == Encoder(tokenizer).all(headed[: 200 * count])[:count]


def test_texts_that_are_short_or_of_another_tokenizer_are_tokenised_whole(small: Tokenizer) -> None:
    ids = Encoder(small).all("the tide " * 200)
    assert Encoder(small).start("the tide " * 200, 10_000) == ids
    for change in ("normalizer", "pre_tokenizer", "added"):
        other = Tokenizer.from_str(small.to_str())
        other.encode_special_tokens = True
        if change == "normalizer":
            other.normalizer = normalizers.NFKC()
        elif change == "pre_tokenizer":
            other.pre_tokenizer = pre_tokenizers.ByteLevel()
        else:
            other.add_tokens([AddedToken("tide the")])
        check(other, "the tide " * 200, 10)
        assert len(Encoder(other).start("the tide " * 200, 10)) == len(Encoder(other).all("the tide " * 200))


def characters() -> Iterator[str]:
    return (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)


def test_blanks_are_the_patterns() -> None:
    split = pre_tokenizers.Split(Regex(r"\s"), behavior="removed")
    assert {one for one in characters() if not split.pre_tokenize_str(one)} == BLANKS


def test_what_nfc_is_cut_before_neither_reorders_nor_composes() -> None:
    followers = set()
    for one in characters():
        parts = unicodedata.decomposition(one).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            followers.add(chr(int(parts[1], 16)))
    followers |= {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # Hangul's parts
    chosen = [one for one in characters() if STARTER.match(one)]
    assert len(chosen) > 40_000
    for one in chosen:
        assert unicodedata.combining(one) == 0
        assert one not in followers
    assert re.fullmatch(STARTER, "a")
