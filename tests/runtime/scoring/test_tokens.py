"""The start of a text's ids is that of the whole text's, wherever it is cut, and takes no more work than it must."""

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.runtime.scoring.test_prompt import fragments
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from m0kit.errors import DependencyError, InputError
from m0kit.scoring.tokens import BLANKS, MAX_WHOLE_BYTES, PATTERN, STARTER, Encoder, is_starter, open_tokenizer
from m0kit_parity.samples.vocabulary import write_qwen2_tokenizer


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


@pytest.mark.parametrize("name", ["small", "real", "tricky"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, st.sampled_from(["\n**Query**:\n", "=-=", "Query: ", "\n", " \n \t", "word", ""]), texts)
@example("d", "\n**Query**:\n", "\n\nq")
@example("d", "Query: ", " q")
@example("d", "Query: ", "\u0301q")
@example("abcdefg", "", "h")
def test_what_stands_before_a_continuation_stands_in_the_whole(
    name: str, request: pytest.FixtureRequest, document: str, header: str, query: str
) -> None:
    encoder = Encoder(request.getfixturevalue(name))
    text = document + header
    ids, certain, place = encoder.before(text)
    assert ids == encoder.all(text)
    threaded = Encoder(encoder.tokenizer, in_threads=True)
    assert (threaded.before(text), threaded.all(query)) == ((ids, certain, place), encoder.all(query))
    assert ids[:certain] + encoder.all(text[place:] + query) == encoder.all(text + query)
    if header.endswith("**:\n"):
        assert text[place:] == "**:\n"


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
        " \n",
        "é",
        "\u1780\u17b6",
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
    first = {one: unicodedata.normalize("NFD", one)[0] for one in characters()}
    for name, rule in (("STARTER", STARTER.match), ("is_starter", is_starter)):
        chosen = [one for one in characters() if rule(one)]
        assert len(chosen) > {"STARTER": 40_000, "is_starter": 200_000}[name]
        for one in chosen:
            assert unicodedata.combining(first[one]) == 0
            assert not {one, first[one]} & followers
            assert unicodedata.normalize("NFC", "a" + one) == "a" + unicodedata.normalize("NFC", one)
    assert re.fullmatch(STARTER, "a")


@pytest.mark.parametrize("unit", ["\u0301", "\u0301\u0327", "\u1161"])
def test_a_large_text_that_cannot_be_cut_is_refused_by_name(
    small: Tokenizer, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(small)
    monkeypatch.setattr(encoder, "all", lambda text: pytest.fail(f"{len(text)} characters"))
    with pytest.raises(InputError, match=r"^the text of \d+ characters has no place where it may be cut.*4 MiB"):
        encoder.start(unit * (MAX_WHOLE_BYTES // len(unit.encode()) + 1), 9_729)


# --- a tokenizer of somebody else --------------------------------------------------------------------


def change(raw: dict[str, Any], case: str) -> None:
    model, added = raw["model"], raw["added_tokens"]
    if case == "a normaliser that makes much of little":
        raw["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 9999}
    elif case == "no normaliser":
        raw["normalizer"] = None
    elif case == "a sequence of normalisers":
        raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "x"}]}
    elif case == "a pattern that never ends":
        raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a|a)*(a|a)*(a|a)*b"
    elif case == "one more piece":
        raw["pre_tokenizer"]["pretokenizers"].append(
            {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}
        )
    elif case == "a decoder that makes much of little":
        raw["decoder"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 9999}
    elif case == "another model":
        raw["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a", "merges": []}
    elif case in ("dropout", "unk_token"):
        model[case] = {"dropout": 0.5, "unk_token": next(iter(model["vocab"]))}[case]
    elif case == "a long token":
        model["vocab"]["a" * 600] = 9_999
    elif case == "a long added token":
        added[0]["content"] = "a" * 600
    elif case == "an id twice":
        model["vocab"]["qqqqq"] = 5
    else:
        raise AssertionError(case)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("a normaliser that makes much of little", "other rules than Qwen2's"),
        ("no normaliser", r"cannot be read as a tokenizer \(.*normalizer"),
        ("a sequence of normalisers", "other rules than Qwen2's"),
        ("a pattern that never ends", "other rules than Qwen2's"),
        ("one more piece", "other rules than Qwen2's"),
        ("a decoder that makes much of little", "other rules than Qwen2's"),
        ("another model", "other rules than Qwen2's"),
        ("dropout", "other rules than Qwen2's"),
        ("unk_token", "other rules than Qwen2's"),
        ("a long token", "a token of more than 512 letters"),
        ("a long added token", r"length <= 512 - at `\$\.added_tokens\[0\]\.content`"),
        ("an id twice", "one id to two tokens"),
    ],
)
def test_a_tokenizer_of_other_rules_is_refused(tiny: Path, case: str, said: str) -> None:
    raw = json.loads((tiny / "tokenizer.json").read_bytes())
    open_tokenizer(json.dumps(raw).encode())
    change(raw, case)
    Tokenizer.from_str(json.dumps(raw))  # which the library takes
    with pytest.raises(ValueError, match=said):
        open_tokenizer(json.dumps(raw).encode())


def test_what_would_end_the_process_is_not_shown_to_the_library(tiny: Path) -> None:
    """A prefix is cut off within a letter, and what comes of that is no text: the library aborts, in either place."""
    good = (tiny / "tokenizer.json").read_text("utf-8")
    raw = json.loads(good)
    raw["model"]["continuing_subword_prefix"] = "a"
    with pytest.raises(ValueError, match="other rules than Qwen2's"):
        open_tokenizer(json.dumps(raw).encode())
    twice = f'{{"model": {json.dumps(raw["model"])}, {good.lstrip()[1:]}'
    open_tokenizer(twice.encode())  # the last one counts
    for damaged in (
        good.encode()[:-9],
        b"[" * 100_000,
        b'{"model": "\xff"}',
        good.replace('"vocab":{', '"vocab":{"\\ud83d":9,').encode(),
    ):
        with pytest.raises(ValueError, match=r"^cannot be read as a tokenizer"):
            open_tokenizer(damaged)


def test_what_is_written_around_the_tokens_repeats_nothing(tiny: Path) -> None:
    raw = json.loads((tiny / "tokenizer.json").read_bytes())
    many = [{"Sequence": {"id": "A", "type_id": 0}}] * 50
    raw["post_processor"] = {"type": "TemplateProcessing", "single": many, "pair": many, "special_tokens": {}}
    raw["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 9000}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "a",
    }  # fmt: skip
    plain = opened(tiny / "tokenizer.json")
    assert Encoder(open_tokenizer(json.dumps(raw).encode())).all("the tide") == Encoder(plain).all("the tide")


class PanicException(BaseException):
    """Named as what the library raises where it panics, which is no Exception."""


@pytest.mark.parametrize("kind", [PanicException, Exception])
def test_where_the_library_gives_up_the_text_is_named(small: Tokenizer, kind: type[BaseException]) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(small, name)

        def encode(self, *_: object, **__: object) -> None:
            raise kind("byte index 1 is not a char boundary")

        decode = encode

    encoder = Encoder(small)
    encoder.tokenizer = Broken()  # type: ignore[assignment]
    for ask in (lambda: encoder.all("a"), lambda: encoder.start("a", 3), lambda: encoder.decode([1])):
        with pytest.raises(InputError, match=r"^the tokenizer cannot take the text"):
            ask()


def test_an_interrupt_stays_one(small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    encoder = Encoder(small)
    monkeypatch.setattr(encoder, "_certain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder.start("a " * 9999, 3)


def test_a_panic_at_opening_is_no_tokenizer(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panicking:
        @staticmethod
        def from_buffer(raw: bytes) -> None:
            raise PanicException(raw)

    monkeypatch.setattr("m0kit.scoring.tokens.Tokenizer", Panicking)
    with pytest.raises(ValueError, match=r"cannot be read as a tokenizer$"):
        open_tokenizer((tiny / "tokenizer.json").read_bytes())
