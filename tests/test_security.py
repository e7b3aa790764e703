"""SECURITY.md says what the code holds to."""

import re
from pathlib import Path

import pytest
from tests.fuzz.surfaces import SURFACES

from m0kit import plain
from m0kit.artifact import manifest as artifact
from m0kit.reading import decoding, formats
from m0kit_export import patterns

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text("utf-8")


@pytest.mark.parametrize(
    "told",
    [
        f"{decoding.MAX_DECODED_PIXELS:,} pixels",
        f"| image, file | {formats.MAX_IMAGE_BYTES >> 30} GiB |",
        f"| text file | {formats.MAX_TEXT_BYTES >> 20} MiB |",
        f"| message | {plain.MAX_SHOWN:,} characters",
        f"| manifest of an artifact | {artifact.MANIFEST_BYTES >> 20} MiB,",
        f"| tokenizer | {artifact.TOKENIZER_BYTES >> 20} MiB,",
        f"| graph | {artifact.GRAPH_BYTES >> 20} MiB,",
        f"{patterns.DEADLINE_S:g} seconds in a process of their own",
    ],
)
def test_a_limit_is_the_one_in_the_code(told: str) -> None:
    assert told in PAGE


def test_the_files_that_hold_the_limits_are_there() -> None:
    roots = [ROOT, *(ROOT / name for name in ("runtime", "export", "quant", "parity"))]
    named = re.findall(r"`([\w/]+\.py)`", PAGE)
    assert named
    assert not [name for name in named if not any((root / name).is_file() for root in roots)]


def test_it_counts_the_surfaces() -> None:
    numbers = {13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen"}
    assert f"each of {numbers[len(SURFACES)]} surfaces" in PAGE
