"""An index is made on one kind of device and read on the other, where both compute the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.export.artifacts import artifacts_of

from m0kit import Reranker, opening
from m0kit.errors import StoreError
from m0kit.index import add, open_index
from m0kit.scoring.gpus import Gpu
from m0kit_parity.cuda.host import HostDevice

DOCUMENTS = [("a", "a small language model writes markdown", ""), ("b", "the tide comes in twice a day", "")]
ON: dict[str, dict[str, Any]] = {"cpu": {"device": "cpu"}, "cuda": {"device": "cuda", "pool_bytes": 1 << 26}}
# Values are rounded to 11 bits in and between layers, in bf16 to 8. 7e-3 and 3e-2 were seen; the logits of the two
# documents lie 0.6 apart.
NEAR = 0.01


@pytest.fixture(scope="module")
def artifact(tiny: Path) -> Callable[[str], Path]:
    return artifacts_of(tiny, "kept")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def device(*_: object) -> Any:
        made: Any = HostDevice(1 << 30)
        made.gpu = Gpu("the computer itself", 1 << 40)
        return made

    monkeypatch.setattr(opening, "CudaDevice", device)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(artifact: Path, folder: Path, device: str) -> None:
    with Reranker.load(artifact, kv="fp16", **ON[device]) as reranker, open_index(folder, reranker) as store:
        add(reranker, store, DOCUMENTS)


def read(artifact: Path, folder: Path, device: str) -> tuple[list[float], int]:
    """Logits of a query on what the index holds, and how many states were read from it."""
    with Reranker.load(artifact, index=folder, **ON[device]) as reranker:
        assert reranker.store is not None
        logits = reranker.score([("markdown", {"id": name}) for name, _, _ in DOCUMENTS], raw=True)
        return logits.tolist(), reranker.store.record_reads.hits


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_index_serves_both(artifact: Callable[[str], Path], tmp_path: Path, host: None, precision: str) -> None:
    folder = artifact(precision)
    found = {}
    for maker in ON:
        made(folder, tmp_path / maker, maker)
        for reader in ON:
            found[maker, reader], reads = read(folder, tmp_path / maker, reader)
            assert reads == len(DOCUMENTS)
    near = NEAR * (8 if precision == "bf16" else 1)
    for logits in found.values():
        assert logits == pytest.approx(found["cpu", "cpu"], abs=near)


@pytest.mark.parametrize("precision", ["int8", "int4", "nf4"])  # nf4 in its first layer and block
def test_where_a_cpu_rounds_activations_it_is_refused_by_the_device(
    artifact: Callable[[str], Path], tmp_path: Path, host: None, precision: str
) -> None:
    folder = artifact(precision)
    for maker, reader in (("cpu", "cuda"), ("cuda", "cpu")):
        made(folder, tmp_path / maker, maker)
        read(folder, tmp_path / maker, maker)
        with pytest.raises(StoreError, match=rf"what differs: device \({maker} there, {reader} here\)"):
            read(folder, tmp_path / maker, reader)


def test_on_a_gpu_it_must_be_in_16_bits(artifact: Callable[[str], Path], tmp_path: Path, host: None) -> None:
    folder = artifact("fp16")
    with Reranker.load(folder, kv="int8") as reranker, open_index(tmp_path / "index", reranker) as store:
        add(reranker, store, DOCUMENTS)
    with pytest.raises(ValueError, match="keeps keys and values in int8, and on a GPU they are kept in 16 bits"):
        read(folder, tmp_path / "index", "cuda")
