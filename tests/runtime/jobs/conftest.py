"""An input of a job, and images beside it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tests.runtime.jobs.pretending import png, texts, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", texts(50))


@pytest.fixture
def pages(tmp_path: Path, picture: Callable[..., Image.Image]) -> dict[str, bytes]:
    """Two images beside the input, by name."""
    found = {"page.png": png(picture(90, 60, 1)), "scan.png": png(picture(60, 90, 2))}
    for name, raw in found.items():
        (tmp_path / name).write_bytes(raw)
    return found
