"""Workloads are exactly as large as they say."""

from pathlib import Path

import pytest

from m0kit import Reranker
from m0kit.scoring.prompt import PromptBuilder
from m0kit_parity.bench.workloads import QUERY, page_of, text_of, workloads


@pytest.mark.parametrize("num_tokens", [64, 65, 67, 128, 256, 601, 1024, 4096])
def test_a_text_makes_a_prompt_of_exactly_the_length_asked_for(num_tokens: int, prompts: PromptBuilder) -> None:
    for seed in range(3):
        text = text_of(prompts, num_tokens, seed)
        assert len(prompts.build(QUERY, text).token_ids) == num_tokens
    assert text_of(prompts, num_tokens, 0) != text


def test_a_prompt_too_short_for_its_headers_is_refused(prompts: PromptBuilder) -> None:
    with pytest.raises(ValueError, match="at least, not 5"):
        text_of(prompts, 5)


@pytest.mark.parametrize("visual_tokens", [4, 48, 96, 192, 384, 767, 768])
def test_a_page_makes_exactly_the_visual_tokens_asked_for(visual_tokens: int, tiny_artifact: Path) -> None:
    reranker = Reranker.load(tiny_artifact, threads=1)
    trace_grid = reranker.trace((QUERY, page_of(visual_tokens))).grid_thw
    assert trace_grid.prod() == 4 * visual_tokens
    assert page_of(visual_tokens, 1) != page_of(visual_tokens)


@pytest.mark.parametrize("prompts", ["real"], indirect=True)  # the headers alone fill 24 tokens of the small one
def test_workloads_are_those_that_are_promised(prompts: PromptBuilder) -> None:
    loads = workloads(prompts)
    assert {name: len(load) for name, load in loads.items()} == {
        "text, 64 tokens": 1,
        "text, 256 tokens": 1,
        "text, 1024 tokens": 1,
        "page, 768 visual tokens": 1,
        "8 texts, 24–600 tokens": 8,
        "32 texts, 24–600 tokens": 32,
    }
    for load in list(loads.values())[4:]:
        lengths = [len(prompts.build(*pair).token_ids) for pair in load]
        assert len(set(lengths)) > len(lengths) // 2
        assert 24 <= min(lengths) <= max(lengths) <= 600


def test_only_the_workloads_asked_for_are_made(prompts: PromptBuilder) -> None:
    """Of which others may not fit: headers alone can fill more than the 24 tokens of the mixed ones."""
    assert list(workloads(prompts, ("64 ", "page"))) == ["text, 64 tokens", "page, 768 visual tokens"]
    assert workloads(prompts, ("nothing",)) == {}
