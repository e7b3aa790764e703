"""Shared by the tests of the integrations: the committed tiny artifact, open, and one page image in every form."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from tests.artifacts.make import picture

from m0kit import Reranker

NOT_HERE = "is not in this environment; `make integrations` makes one that has it"


@dataclass(frozen=True)
class Page:
    image: Image.Image
    png: bytes
    base64: str
    path: Path


@pytest.fixture(scope="session")
def artifact(committed: Path) -> Path:
    return committed / "fp32"


@pytest.fixture(scope="session")
def reranker(artifact: Path) -> Reranker:
    return Reranker.load(artifact, threads=1)


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    (image := picture(120, 200)).save(file := io.BytesIO(), "PNG")
    path = tmp_path_factory.mktemp("page") / "page.png"
    path.write_bytes(file.getvalue())
    return Page(image, file.getvalue(), base64.b64encode(file.getvalue()).decode(), path)
