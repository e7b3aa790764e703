"""Prompts are those of the published procedure, token by token, at every edge of truncation."""

import gc
import tracemalloc
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m0kit.config import PromptConfig
from m0kit.errors import ArtifactDamagedError, InputError
from m0kit.keeping.cache import Cache
from m0kit.scoring.prompt import ImageTokens, PromptBuilder
from m0kit_parity.samples.checkpoints import model_config
from m0kit_parity.samples.vocabulary import write_qwen2_tokenizer
from m0kit_parity.small.tokenizer import SPECIAL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LIMITS = [(10240, 512), (60, 20), (41, 20), (40, 20), (64, 1), (30, 5)]  # max_length, max_query_length
Part = str | ImageTokens
Builders = dict[tuple[int, int], PromptBuilder]


def prompt_config(max_length: int = 10240, max_query_length: int = 512, shape: str = "tiny") -> PromptConfig:
    ids = model_config(shape).prompt  # type: ignore[arg-type]
    return PromptConfig(
        ids.vision_start_id,
        ids.vision_end_id,
        ids.image_pad_id,
        max_length=max_length,
        max_query_length=max_query_length,
    )


@pytest.fixture(scope="session")
def tokenizer_file(tiny_artifact: Path) -> Path:
    return tiny_artifact / "tokenizer.json"


@pytest.fixture(scope="session")
def builders(tokenizer_file: Path) -> Builders:
    return {limits: PromptBuilder(tokenizer_file, prompt_config(*limits)) for limits in LIMITS}


@pytest.fixture(scope="session")
def theirs(tokenizer_file: Path) -> "PreTrainedTokenizerFast":
    return pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))


def published(
    tokenizer: "PreTrainedTokenizerFast", config: PromptConfig, query: Part, document: Part
) -> tuple[list[int], bool]:
    """The published procedure written down once more, with transformers' tokenizer: ids, image tokens lost?"""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    limit = max(config.max_length - config.max_query_length, config.max_query_length)
    if isinstance(document, str):
        ids = tokenizer(
            document, add_special_tokens=False, split_special_tokens=True, truncation=True, max_length=limit
        )["input_ids"]
        if len(ids) >= limit:
            document = tokenizer.decode(ids, skip_special_tokens=False)
    text = "**Document**:\n"
    token_ids: list[int] = []
    images = 0
    for part, after in ((document, "\n**Query**:\n"), (query, "")):
        if isinstance(part, ImageTokens):
            images += part.num_tokens
            token_ids += encode(text)
            token_ids += [config.vision_start_id, *[config.image_pad_id] * part.num_tokens, config.vision_end_id]
            text = after
        else:
            text += part + after
    token_ids += encode(text)
    kept = token_ids[: config.max_length - 1]
    return [*kept, 100], kept.count(config.image_pad_id) != images


def shared_length(one: list[int], other: list[int]) -> int:
    """How many leading tokens two prompts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


fragments = st.sampled_from(
    ["\n", "\n\n", "\r\n", " ", "  ", "\t", "e\u0301", "\u0301", "\u200d", "\ufeff", "漢字", "தமிழ்", "עברית", "हिन्दी",
     "\U0001f469\u200d\U0001f467", "\U0001f1e9", "\U000130a7", "**Query**:\n", "**Document**:", "a", "the", "12345",
     "'s", "(x)", "\0", "\u2028", *SPECIAL_TOKENS, "<|image_pad|", "|>"]
)  # fmt: skip
texts = st.lists(st.one_of(fragments, st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=12).map(
    "".join
)
parts = st.one_of(texts, texts, st.integers(1, 30).map(ImageTokens))


@settings(max_examples=600)
@given(parts, parts, st.sampled_from(LIMITS))
@example("<|image_pad|>", ImageTokens(4), LIMITS[0])
@example("\nq", "d\n", LIMITS[0])
@example("\u0301q", "d", LIMITS[0])
def test_prompts_are_the_published_ones(
    builders: Builders, theirs: "PreTrainedTokenizerFast", query: Part, document: Part, limits: tuple[int, int]
) -> None:
    config = prompt_config(*limits)
    expected, image_is_cut = published(theirs, config, query, document)
    if image_is_cut:
        with pytest.raises(InputError, match=rf"^its images take \d+ visual tokens, .* {limits[0]} tokens"):
            builders[limits].build(query, document)
        return
    prompt = builders[limits].build(query, document)
    assert prompt.token_ids.tolist() == expected
    assert len(expected) <= limits[0]
    assert prompt.token_ids.dtype == "int64"
    whole, _ = published(theirs, prompt_config(10240), query, document)
    if whole == expected:
        assert not prompt.query_truncated
    if not prompt.query_truncated and not prompt.document.truncated:
        assert len(whole) <= limits[0]
    # As much of the document's prefix as the prompt has, and one token at least behind it.
    assert prompt.prefix_length == shared_length(expected[:-1], prompt.document.prefix.tolist())
    assert prompt.suffix.tolist() == expected[prompt.prefix_length :]
    assert prompt.document.prefix.dtype == prompt.suffix.dtype == "int64"


@settings(max_examples=300)
@given(texts, texts)
def test_text_never_becomes_a_special_token(builders: Builders, query: str, document: str) -> None:
    first_special = model_config("tiny").decoder.vocab_size - len(SPECIAL_TOKENS)
    assert (builders[LIMITS[0]].build(query, document).token_ids < first_special).all()
    prompt = builders[LIMITS[0]].build(query, ImageTokens(3))
    special = prompt.token_ids[prompt.token_ids >= first_special]
    ids = model_config("tiny").prompt
    assert special.tolist() == [ids.vision_start_id, *[ids.image_pad_id] * 3, ids.vision_end_id]


@settings(max_examples=300)
@given(parts, parts, st.sampled_from(LIMITS[:2]))
def test_the_prefix_belongs_to_the_document(
    builders: Builders, query: Part, document: Part, limits: tuple[int, int]
) -> None:
    """All prompts of a document hold one array. Queries that begin with an ordinary letter use all of it."""
    builder = builders[limits]
    fixed = builder.document(document)
    before = fixed.prefix.tolist()
    try:
        prompts = [builder.build(part, fixed) for part in (query, "what", "Zebra 5", "x", ImageTokens(1))]
    except InputError:
        return  # an image too large
    for prompt in prompts:
        assert prompt.document.prefix is fixed.prefix
        assert prompt.token_ids[: prompt.prefix_length].tolist() == before[: prompt.prefix_length]
        assert prompt.document.truncated == fixed.truncated
    whole = min(len(before), limits[0] - 1)
    assert [prompt.prefix_length for prompt in prompts[1:]] == [whole] * 4
    assert prompts[0].prefix_length <= whole
    assert fixed.prefix.tolist() == before
    assert builder.document(document).prefix.tolist() == before


@settings(max_examples=100)
@given(parts)
def test_the_prefix_is_the_prompt_of_the_document_alone(
    builders: Builders, theirs: "PreTrainedTokenizerFast", document: Part
) -> None:
    alone, _ = published(theirs, prompt_config(*LIMITS[0]), "", document)
    assert builders[LIMITS[0]].document(document).prefix.tolist() == alone[:-1]


@pytest.mark.parametrize("document", ["d", "d\n", "", "d<|image_pad|>", "x" * 25, ImageTokens(4)])
def test_a_document_prepared_once_gives_the_prompts_of_the_document(builders: Builders, document: Part) -> None:
    builder = builders[(60, 20)]
    fixed = builder.document(document)
    for query in ("what", "\n\nwhat", "\u0301", "q" * 80, ImageTokens(2)):
        assert repr(builder.build(query, fixed)) == repr(builder.build(query, document))


def test_the_prefix_is_all_but_the_query(builders: Builders, theirs: "PreTrainedTokenizerFast") -> None:
    """That it is long matters: it is what queries share."""
    builder = builders[LIMITS[0]]
    header = len(theirs("**Document**:\nsome text\n**Query**:\n")["input_ids"])
    assert builder.build("what", "some text").prefix_length == header
    assert builder.build(ImageTokens(4), "some text").prefix_length == header
    pieces = len(theirs("**Document**:\n")["input_ids"]) + 7 + 2 + len(theirs("\n**Query**:\n")["input_ids"])
    assert builder.build("what", ImageTokens(7)).prefix_length == pieces
    assert builder.build(ImageTokens(4), ImageTokens(7)).prefix_length == pieces


def of_tokens(tokenizer: "PreTrainedTokenizerFast", count: int, letters: str = "zqxjkv") -> str:
    """A text of exactly so many tokens, one per letter, no two neighbours alike."""
    text = "".join(letters[(i * i + i // 5) % len(letters)] for i in range(count))
    assert len(tokenizer(text)["input_ids"]) == count
    return text


@pytest.mark.parametrize("over", [-1, 0, 1, 2, 30])
def test_a_document_at_its_limit_is_kept_and_one_over_is_cut(
    builders: Builders, theirs: "PreTrainedTokenizerFast", over: int
) -> None:
    limits = (60, 20)
    document = of_tokens(theirs, 40 + over)
    prompt = builders[limits].build("w", document)
    assert prompt.token_ids.tolist() == published(theirs, prompt_config(*limits), "w", document)[0]
    assert prompt.document.truncated is (over > 0)
    header = len(theirs("**Document**:\n")["input_ids"])
    kept = theirs(document)["input_ids"][: 40 + min(over, 0)]
    assert prompt.token_ids[header : header + len(kept)].tolist() == kept
    assert prompt.token_ids[header + len(kept)] != theirs(document + "zz")["input_ids"][40]


@pytest.mark.parametrize("over", [-2, -1, 0, 1, 2, 50])
def test_a_prompt_at_its_limit_is_whole_and_one_over_loses_the_end_of_the_query(
    builders: Builders, theirs: "PreTrainedTokenizerFast", over: int
) -> None:
    fixed = len(theirs("**Document**:\nd\n**Query**:\n")["input_ids"])
    query = of_tokens(theirs, 60 - 1 - fixed + over)  # one place for the score token
    prompt = builders[(60, 20)].build(query, "d")
    assert len(prompt.token_ids) == 60 + min(over, 0)
    assert prompt.token_ids[-1] == 100
    assert prompt.query_truncated is (over > 0)
    assert prompt.document.truncated is False
    assert prompt.token_ids[fixed:-1].tolist() == theirs(query)["input_ids"][: 59 - fixed]


def test_behind_a_full_document_only_part_of_the_query_limit_is_left(
    tokenizer_file: Path, theirs: "PreTrainedTokenizerFast"
) -> None:
    config = prompt_config()
    document, query = of_tokens(theirs, 9728), of_tokens(theirs, 512)
    prompt = PromptBuilder(tokenizer_file, config).build(query, document)
    assert prompt.token_ids.tolist() == published(theirs, config, query, document)[0]
    assert len(prompt.token_ids) == 10240
    assert (prompt.document.truncated, prompt.query_truncated) == (False, True)


def test_a_cut_inside_a_letter_is_the_published_cut(builders: Builders, theirs: "PreTrainedTokenizerFast") -> None:
    """The document is decoded back to text, where half a letter becomes U+FFFD."""
    document = "x" * 39 + "漢字漢字"
    prompt = builders[(60, 20)].build("q", document)
    assert prompt.token_ids.tolist() == published(theirs, prompt_config(60, 20), "q", document)[0]
    assert prompt.document.truncated
    assert "\ufffd" in theirs.decode(prompt.token_ids)


def test_an_image_that_does_not_fit_is_refused_and_a_lost_vision_end_is_not(
    builders: Builders, theirs: "PreTrainedTokenizerFast"
) -> None:
    builder, config = builders[(60, 20)], prompt_config(60, 20)
    before = len(theirs("**Document**:\n")["input_ids"]) + 1
    for pads, lost in ((59 - before - 1, 0), (59 - before, 1)):
        prompt = builder.build("query", ImageTokens(pads))
        assert len(prompt.token_ids) == 60
        assert (prompt.token_ids == config.image_pad_id).sum() == pads
        assert (config.vision_end_id in prompt.token_ids) is not lost
        assert prompt.query_truncated
    said = rf"^its images take {60 - before} visual tokens, .* the limit of 60 tokens\. Lower max_pixels"
    with pytest.raises(InputError, match=said):
        builder.build("query", ImageTokens(60 - before))
    with pytest.raises(InputError, match="its images take 50 visual tokens"):
        builder.build(ImageTokens(25), ImageTokens(25))
    with pytest.raises(InputError, match="its images take 25 visual tokens"):
        builder.build(ImageTokens(25), of_tokens(theirs, 40))


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": 3}', "\ud83d".encode("utf-8", "surrogatepass")])
def test_a_file_that_is_no_tokenizer_is_named(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactDamagedError, match=rf"^{path}: cannot be read as a tokenizer \(.+\)\. Export again\.$"):
        PromptBuilder(path, prompt_config())


def test_with_the_real_vocabulary_prompts_are_the_published_ones(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_qwen2_tokenizer(tmp_path)
    config = prompt_config(shape="wide")
    assert (config.vision_start_id, config.vision_end_id, config.image_pad_id) == (151652, 151653, 151655)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    builder = PromptBuilder(tmp_path / "tokenizer.json", config)
    contents: list[Part] = [
        "slm markdown",
        "We present ReaderLM-v2, a compact 1.5B model.\n\nIt reads HTML — up to 512K tokens.",
        "def f(x):\n\treturn x ** 2  # 平方\n",
        "Größe, Straße, naïve cafe\u0301; 你好，世界; здравствуй; مرحبا; नमस्ते",
        "<|im_start|>system\n<|vision_start|><|image_pad|><|vision_end|><|endoftext|>",
        "\n leading and trailing \n",
        "the quick brown fox " * 2500,
        ImageTokens(768),
    ]
    for query in contents:
        for document in contents:
            expected, image_is_cut = published(theirs, config, query, document)
            if image_is_cut:  # an image behind a document of full length
                assert document == contents[-2]
                assert query == contents[-1]
                continue
            prompt = builder.build(query, document)
            assert prompt.token_ids.tolist() == expected
            images = [part for part in (query, document) if isinstance(part, ImageTokens)]
            assert (prompt.token_ids >= 151643).sum() == sum(image.num_tokens + 2 for image in images)
    whole = builder.build("what", "text").token_ids.tolist()
    assert theirs.decode(whole[:-1]) == "**Document**:\ntext\n**Query**:\nwhat"
    assert len(theirs("**Document**:\n\n**Query**:\n")["input_ids"]) < len(whole) < 14
    # A newline joins the one before it, so less of the prefix is used.
    assert (
        builder.build("\n\nwhat", "text").prefix_length < builder.build("what", "text").prefix_length == len(whole) - 2
    )
    # A text may itself end in the score token; another is appended all the same.
    assert builder.build("\U000130a7", "d").token_ids[-2:].tolist() == [100, 100]


@settings(max_examples=200)
@given(parts, parts, st.sampled_from(LIMITS[1:]), st.integers(20, 60))
def test_of_large_parts_the_prompt_is_the_published_one(
    builders: Builders,
    theirs: "PreTrainedTokenizerFast",
    query: Part,
    document: Part,
    limits: tuple[int, int],
    times: int,
) -> None:
    """Of which no more is tokenised than is kept."""
    query, document = (part * times if isinstance(part, str) else part for part in (query, document))
    expected, image_is_cut = published(theirs, prompt_config(*limits), query, document)
    if not image_is_cut:
        prompt = builders[limits].build(query, document)
        assert prompt.token_ids.tolist() == expected
        whole, _ = published(theirs, prompt_config(1 << 20, limits[1]), query, document)
        if not prompt.document.truncated:
            assert prompt.query_truncated == (len(whole) > limits[0])


def test_a_query_of_megabytes_is_cut_like_any_other(builders: Builders, theirs: "PreTrainedTokenizerFast") -> None:
    config = prompt_config()
    long, longer = ("what is it " * n for n in (20_000, 2_000_000))
    for query, document in ((longer, "d"), ("q", longer), (longer, longer)):
        prompt = builders[10240, 512].build(query, document)
        shorter = [long if part is longer else part for part in (query, document)]
        expected, _ = published(theirs, config, *shorter)
        assert prompt.token_ids.tolist() == expected
        assert (prompt.query_truncated, prompt.document.truncated) == (query is longer, document is longer)


def test_what_is_remembered_of_short_documents_takes_no_more_than_is_counted(tokenizer_file: Path) -> None:
    builder = PromptBuilder(tokenizer_file, prompt_config())
    builder.document("the first one makes what all share")
    tracemalloc.start()
    try:
        for number in range(2000):
            builder.document(f"document {number}")
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(builder.remembered) == 2001
    assert taken < builder.remembered.num_bytes < 2 * taken


def test_what_is_remembered_of_documents_is_bounded(tokenizer_file: Path) -> None:
    builder = PromptBuilder(tokenizer_file, prompt_config())
    for i in range(30):
        builder.document(f"{i} " + "the tide " * 300_000)
    assert len(builder.remembered) == 30  # what was cut is not kept
    assert builder.remembered.num_bytes < 30 * 200_000
    first = builder.document("a document")
    assert builder.document("a document") is first
    assert builder.document(ImageTokens(4)) is builder.document(ImageTokens(4))
    assert builder.remembered.max_bytes == 32 << 20


def test_a_document_is_known_as_long_as_a_prompt_has_it(tokenizer_file: Path) -> None:
    """However many there are: each pair of a long list on many documents would tokenise its own again."""
    builder = PromptBuilder(tokenizer_file, prompt_config())
    builder.remembered = Cache(0)
    prompt = builder.build("query", "a document")
    assert builder.build("another", "a document").document is prompt.document
    known = weakref.ref(prompt.document)
    del prompt
    gc.collect()
    assert known() is None
    limited = builder.with_limits(prompt_config(max_length=60, max_query_length=20))
    kept = builder.build("query", "a document")
    assert limited.build("query", "a document").document is not kept.document
