"""What is scored in a benchmark: texts of an exact number of tokens, pages of an exact number of visual tokens.

text_of(prompts_of(Path("m0-int8")), 256)
"""

import bisect
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from m0kit.artifact.manifest import TOKENIZER, read_manifest, verify_files
from m0kit.scoring.prompt import PromptBuilder
from m0kit_parity.proof.cases import draw_page, encode

Pair = tuple[Any, Any]  # query, document, in the forms that `Reranker` takes

# Words that stand for one token each in Qwen2's vocabulary behind a blank, and for a few in a small one.
WORDS: Final = ("the", "model", "page", "text", "small", "language", "score", "image", "data", "report", "line")
_ONE_TOKEN: Final = "7"  # wherever it stands: the pre-tokeniser splits off every digit
QUERY: Final = "small language model"


def prompts_of(artifact: Path) -> PromptBuilder:
    """What builds an artifact's prompts, once its files are as exported. Raises ArtifactError."""

    manifest = read_manifest(artifact)
    verify_files(artifact, manifest)
    return PromptBuilder(artifact / TOKENIZER, manifest.model.prompt)


def text_of(prompts: PromptBuilder, num_tokens: int, seed: int = 0, query: str = QUERY) -> str:
    """A document that makes a prompt of exactly `num_tokens` tokens with `query`.

    Raises ValueError when that is too few for the query and the headers.
    """

    def length(text: str) -> int:
        return len(prompts.build(query, text).token_ids)

    shortest = length(_ONE_TOKEN)
    if num_tokens < shortest:
        raise ValueError(f"a prompt with this query takes {shortest} tokens at least, not {num_tokens}")
    words = random.Random(seed).choices(WORDS, k=num_tokens - shortest + 1)
    fitting = bisect.bisect_right(range(1, len(words)), num_tokens, key=lambda n: length(" ".join(words[:n])))
    text = " ".join(words[:fitting]) or _ONE_TOKEN
    return text + _ONE_TOKEN * (num_tokens - length(text))


def page_of(visual_tokens: int, seed: int = 0) -> bytes:
    """A PNG that makes exactly `visual_tokens` visual tokens, as close to a page's shape as that allows."""

    rows = max(r for r in range(1, visual_tokens + 1) if visual_tokens % r == 0 and r * r <= 2 * visual_tokens)
    lines = [f"{WORDS[(i + seed) % len(WORDS)]} {i}" for i in range(12)]
    return encode(draw_page(lines, (28 * visual_tokens // rows, 28 * rows), seed))


def workloads(prompts: PromptBuilder, only: Sequence[str] = ()) -> dict[str, list[Pair]]:
    """The pairs of `m0kit bench pairs`: all workloads, or those whose name holds one of the texts."""
    loads: dict[str, list[Pair]] = {}

    def wanted(name: str) -> bool:
        return not only or any(text in name for text in only)

    for n in (64, 256, 1024):
        if wanted(name := f"text, {n} tokens"):
            loads[name] = [(QUERY, text_of(prompts, n))]
    if wanted(name := "page, 768 visual tokens"):
        loads[name] = [(QUERY, page_of(768))]
    for count in (8, 32):
        if wanted(name := f"{count} texts, 24–600 tokens"):
            rng = random.Random(count)
            lengths = [rng.randint(24, 600) for _ in range(count)]
            loads[name] = [(QUERY, text_of(prompts, n, seed)) for seed, n in enumerate(lengths)]
    return loads
