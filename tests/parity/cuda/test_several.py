"""Two GPUs score as one does, each is asked the known answers itself, and neither waits for the other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.export.artifacts import artifacts_of

from m0kit import Reranker, opening
from m0kit.errors import DeviceError
from m0kit.scoring.gpus import Gpu
from m0kit_parity.cuda.host import HostDevice


@pytest.fixture(scope="module")
def artifact(tiny: Path) -> Path:
    return artifacts_of(tiny, "several")("fp16")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The numbers of the GPUs that were opened; what they are asked is remembered nowhere else."""
    numbers: list[int] = []

    def device(index: int, _: int | None) -> Any:
        numbers.append(index)
        host: Any = HostDevice(1 << 30)
        host.gpu = Gpu("the computer itself", 1 << 40)
        return host

    monkeypatch.setattr(opening, "CudaDevice", device)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return numbers


def pairs() -> list[tuple[str, Any]]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)) for _ in range(6)]
    return [("a query", f"document {i}") for i in range(8)] + [("a query", image) for image in images]


def test_two_gpus_score_as_one(artifact: Path, opened: list[int]) -> None:
    with Reranker.load(artifact, device="cuda", pool_bytes=1 << 26) as one:
        known = one.manifest.known_answers
        wanted = [result.logit for result in one.results(pairs())]
        asked = len(one.try_answers(again=True))
    with Reranker.load(artifact, device="cuda:2,cuda:0", pool_bytes=1 << 26) as both:
        found = [result.logit for result in both.results(pairs())]
        assert len(both.try_answers(again=True)) == 2 * asked > 0
    assert opened == [0, 2, 0]
    # Runs hold other documents, and numpy rounds products of other shapes otherwise: what an engine may be off by.
    assert known is not None
    np.testing.assert_allclose(found, wanted, rtol=0, atol=known.tolerance["fp16"])


def test_the_known_answers_may_come_before_any_image_of_a_user(artifact: Path, opened: list[int]) -> None:
    """They have one themselves, before which they would be asked."""
    with Reranker.load(artifact, device="cuda:0,cuda:1", pool_bytes=1 << 26) as both:
        assert len(both.try_answers("image", again=True)) > 0


@pytest.mark.parametrize(
    ("device", "said"), [("cuda:0,cpu", "'cpu' cannot stand beside GPUs"), ("cuda:1,cuda:1", "names a GPU twice")]
)
def test_what_cannot_be_one_is_refused(artifact: Path, opened: list[int], device: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        Reranker.load(artifact, device=device)
    assert opened == []
