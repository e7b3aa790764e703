"""SECURITY.md says what the code holds to."""

import re
from pathlib import Path

import pytest
from tests.fuzz.surfaces import SURFACES

from m0kit import plain
from m0kit.artifact import manifest as artifact
from m0kit.reading import decoding, formats
from m0kit_export import patterns

pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")

from m0kit.server import bodies, connections, fetching, guard, pages, service
from m0kit.server.settings import ModelSettings, Settings
from m0kit.server.wire import body

SERVER = Settings((ModelSettings("any"),))
assert SERVER.max_request_pixels == 10**9
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
        f"| head of a request | {guard.MAX_HEAD_BYTES >> 10} KiB, {guard.MAX_HEADERS} headers, "
        f"{SERVER.read_timeout_s:g} seconds |",
        f"| body | {SERVER.max_body_bytes >> 20} MiB, {SERVER.read_timeout_s:g} seconds without a byte, "
        f"{bodies.MIN_BYTES_PER_S >> 10} KiB a second |",
        f"| bodies of all requests | {SERVER.max_held_bytes >> 20} MiB |",
        f"| JSON | {body.MAX_SIGNS:,} values",
        f"| {SERVER.max_documents:,} documents, {SERVER.max_images} images of {SERVER.max_image_bytes >> 20} MiB and "
        f"{SERVER.max_image_pixels // 10**6} million pixels, 10⁹ pixels, {SERVER.max_request_tokens // 10**6} million",
        f"| image by URL | {fetching.TIMEOUT_S:g} seconds, {fetching.MAX_REDIRECTS} redirects, "
        f"{fetching.MAX_HEAD_BYTES >> 10} KiB of head; as many bytes of all as a body; "
        f"{fetching.MAX_FETCHES} at a time, {service.MAX_FETCHES} of a request |",
        f"{pages.MAX_PDFS} at a time | 429",
        f"| connections | {SERVER.max_connections:,}; {connections.MIN_TAKEN_PER_S >> 10} KiB a second of an answer",
        f"| work that waits | {SERVER.queue_s:g} seconds",
        f"| a request's time | {SERVER.request_timeout_s:g} seconds",
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
    numbers = {18: "eighteen", 19: "nineteen", 20: "twenty"}
    assert f"each of {numbers[len(SURFACES)]} surfaces" in PAGE
