"""Artifacts opened on GPUs, for which the computer itself stands: what is asked first, what fits, what index serves."""

import math
import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m0kit import Reranker, opening
from m0kit.artifact.ports import PAGE_TOKENS
from m0kit.errors import DeviceError, M0kitError, StoreError, WrongAnswerError
from m0kit.index import add, open_index
from m0kit.opening import GPU_VARIABLE
from m0kit.scoring import sessions
from m0kit.scoring.cuda_engine import POOL_VARIABLE, CudaEngine, number_of_bytes
from m0kit.scoring.gpus import Gpu
from m0kit_parity.cuda.host import HostDevice, HostGraph
from m0kit_parity.proof.tolerances import tolerances

POOL_BYTES = 16 << 20
# What 16 bits may cost a logit altogether. 2e-3 were seen.
HALF = tolerances("fp16")["logit"].limit


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


DOCUMENTS: list[tuple[str, Any, str]] = [
    ("short", "a text", ""),
    ("long", "a text of many words that is longer than a page of the pool " * 4, ""),
    ("image", image(84, 112), ""),
]
PAIRS: list[Any] = [(query, document) for query in ("q", "another query") for _, document, _ in DOCUMENTS]


@dataclass
class Gpus:
    """What stands for them: each one that was opened, with the memory that it may take."""

    gpu: Gpu = field(default_factory=lambda: Gpu("the computer itself", 1 << 40))
    num_bytes: int = 1 << 28
    opened: list[tuple[int, int | None]] = field(default_factory=list)
    devices: list[HostDevice] = field(default_factory=list)

    def open(self, index: int, memory_limit: int | None = None) -> Any:
        device: Any = HostDevice(self.num_bytes)
        device.gpu = self.gpu
        self.opened.append((index, memory_limit))
        self.devices.append(device)
        return device

    @property
    def runs(self) -> Mapping[str, int]:
        """Of the graphs, on the device that was opened last."""
        return {name: count for name, count in self.devices[-1].counts.items() if name.startswith("run")}


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpus:
    found = Gpus()
    monkeypatch.setattr(opening, "CudaDevice", found.open)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # what is known to be right is asked for again
    return found


@pytest.fixture(scope="session")
def fp16(in_precision: Callable[[str], Path]) -> Path:
    return in_precision("fp16")


def on_gpu(artifact: Path, **options: Any) -> Reranker:
    return Reranker.load(artifact, **{"device": "cuda", "pool_bytes": POOL_BYTES, **options})


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4", "nf4"])
def test_scores_are_those_of_the_cpu(precision: str, in_precision: Callable[[str], Path]) -> None:
    artifact = in_precision(precision)
    found = on_gpu(artifact).score(PAIRS, raw=True)
    expected = Reranker.load(artifact, threads=1, kv="fp16").score(PAIRS, raw=True)
    # bfloat16 has 3 bits less than float16; where the CPU rounds activations, the tables of parity say what that costs.
    limit = {"bf16": 8 * HALF, "int8": tolerances("int8")["logit"].limit, "int4": tolerances("int4")["logit"].limit}
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit.get(precision, HALF))
    assert np.ptp(expected) > 0.5


# --- known answers ---------------------------------------------------------------------------------------


def test_known_answers_come_first_and_those_with_an_image_before_the_first_image(fp16: Path, gpus: Gpus) -> None:
    reranker = on_gpu(fp16)
    asked = dict(gpus.runs)
    assert asked["run decoder.cuda"] > 0
    assert "run vision.cuda" not in asked
    reranker.score(PAIRS[:2])
    assert "run vision.cuda" not in gpus.runs
    reranker.score([PAIRS[2]])
    assert gpus.runs["run vision.cuda"] > 1  # the known answers', and the user's
    before = gpus.runs["run vision.cuda"]
    reranker.score([("q", image(56, 56, 5))])
    assert gpus.runs["run vision.cuda"] == before + 1


def test_what_was_right_before_is_not_asked_again_on_that_device(fp16: Path, gpus: Gpus) -> None:
    on_gpu(fp16).close()
    assert gpus.runs
    on_gpu(fp16).close()
    assert not gpus.runs
    on_gpu(fp16, device="cuda:1").close()
    assert gpus.runs


def test_a_gpu_that_computes_wrongly_scores_nothing(fp16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = HostGraph.run
    monkeypatch.setattr(HostGraph, "run", lambda *args: wrong(run, "head.cuda", *args))
    with pytest.raises(WrongAnswerError, match=r"on the GPU cuda:0 .*Nothing was scored"):
        on_gpu(fp16)


def test_one_that_encodes_images_wrongly_scores_texts_alone(fp16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = HostGraph.run
    monkeypatch.setattr(HostGraph, "run", lambda *args: wrong(run, "vision.cuda", *args))
    reranker = on_gpu(fp16)
    assert np.isfinite(reranker.score(PAIRS[:2])).all()
    for _ in range(2):  # it is not tried once and then trusted
        with pytest.raises(WrongAnswerError):
            reranker.score([PAIRS[2]])


def wrong(run: Any, name: str, graph: Any, inputs: Any, outputs: Any) -> None:
    """A run that turns what the graph of that name gives around."""
    run(graph, inputs, outputs)
    for value in outputs.values():
        if name == "head.cuda" and not hasattr(value, "address") and value.dtype == np.float32:
            value[...] = -value
    if name == "vision.cuda" and "pixels" in inputs:
        flipped = {**inputs, "positions": inputs["positions"][:, ::-1].copy()}
        run(graph, flipped, outputs)


# --- what runs there -------------------------------------------------------------------------------------


def test_an_artifact_in_fp32_runs_its_portable_graphs(
    unasked: Path, monkeypatch: pytest.MonkeyPatch, gpus: Gpus
) -> None:
    opened = {}

    def noting(folder: Path, name: str, *, device: str, runs: Mapping[str, str], **_: Any) -> sessions.Graph:
        opened[name] = device, runs.get(name, name)
        return portable(folder, name)

    portable = partial(sessions.open_graph, threads=1)
    monkeypatch.setattr(sessions, "open_graph", noting)
    Reranker.load(unasked, device="cuda").score(PAIRS[:3])
    assert opened == {name: ("cuda", name) for name in ("vision", "decoder", "head")}
    assert not gpus.opened


def test_an_engine_of_ones_own_is_asked_for_the_portable_graphs(fp16: Path, gpus: Gpus) -> None:
    Reranker.load(fp16, device="cuda", open_graph=partial(sessions.open_graph, threads=1)).score(PAIRS[:1])
    assert not gpus.opened


@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_documents_are_kept_in_16_bits_there_and_in_nothing_else(fp16: Path, kv: Any, gpus: Gpus) -> None:
    with pytest.raises(ValueError, match=rf"kv says to keep keys and values in {kv}, .*kept in 16 bits\. Say kv fp16"):
        on_gpu(fp16, kv=kv)
    assert not gpus.opened
    assert on_gpu(fp16).kv == "fp16"


@pytest.mark.parametrize(
    ("gpu", "precision", "said"),
    [
        (Gpu("Old", 1 << 40, capability=(7, 0)), "fp16", r"Old is too old \(compute capability 7\.0"),
        (Gpu("T4", 1 << 40, capability=(7, 5)), "bf16", r"T4 has no bf16 .*Export it in fp16"),
        (Gpu("Small", 1 << 30), "fp16", r"it takes .* GB on Small, of which 1\.1 GB is free"),
    ],
)
def test_a_gpu_that_cannot_compute_it_is_refused_by_name(
    gpu: Gpu, precision: str, said: str, gpus: Gpus, in_precision: Callable[[str], Path]
) -> None:
    gpus.gpu = gpu
    with pytest.raises(DeviceError, match=said):
        on_gpu(in_precision(precision))


# --- memory ----------------------------------------------------------------------------------------------


def test_the_memory_of_a_gpu_may_be_limited(fp16: Path, monkeypatch: pytest.MonkeyPatch, gpus: Gpus) -> None:
    on_gpu(fp16).close()
    on_gpu(fp16, gpu_bytes=5_000_000_000).close()
    monkeypatch.setenv(GPU_VARIABLE, "4000000000")
    on_gpu(fp16).close()
    on_gpu(fp16, gpu_bytes=5_000_000_000).close()
    assert gpus.opened == [(0, None), (0, 5_000_000_000), (0, 4_000_000_000), (0, 5_000_000_000)]
    with pytest.raises(DeviceError, match=r"of which 1\.0 GB is allowed"):
        on_gpu(fp16, gpu_bytes=1_000_000_000)


def test_the_pool_has_the_bytes_that_are_said(fp16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine_of(on_gpu(fp16))
    decoder = first.config.decoder
    page = 2 * decoder.num_layers * PAGE_TOKENS * decoder.kv_size * 2
    assert first.pool.num_pages == POOL_BYTES // page
    monkeypatch.setenv(POOL_VARIABLE, str(100 * page + 7))
    assert engine_of(on_gpu(fp16, pool_bytes=None)).pool.num_pages == 100
    assert engine_of(on_gpu(fp16)).pool.num_pages == POOL_BYTES // page


def test_cache_bytes_limit_what_is_kept_of_the_pool(fp16: Path) -> None:
    reranker = on_gpu(fp16, cache_bytes=200_000)
    reranker.score([("q", f"document {i}") for i in range(20)])
    cache = engine_of(reranker).cache
    assert cache.max_bytes == 200_000
    assert 0 < cache.num_bytes <= 200_000
    assert engine_of(on_gpu(fp16, cache_bytes=1 << 40)).cache.max_bytes <= POOL_BYTES


@pytest.mark.parametrize(("told", "number"), [("8000000000", 8_000_000_000), ("0", 0), ("", None), (None, None)])
def test_a_number_of_bytes_is_read(told: str | None, number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(POOL_VARIABLE, raising=False)
    if told is not None:
        monkeypatch.setenv(POOL_VARIABLE, told)
    assert number_of_bytes(POOL_VARIABLE) == number


@pytest.mark.parametrize("told", ["8GB", "-1", "1e9", " 1", "٣", "²", "1_000", "x" * 500])
@pytest.mark.parametrize("variable", [POOL_VARIABLE, GPU_VARIABLE])
def test_what_is_no_number_of_bytes_is_told(
    fp16: Path, monkeypatch: pytest.MonkeyPatch, variable: str, told: str
) -> None:
    monkeypatch.setenv(variable, told)
    with pytest.raises(ValueError, match=rf"^{variable}: .* is no number of bytes\. Say 8000000000 for 8 GB") as caught:
        on_gpu(fp16, pool_bytes=None)
    assert len(str(caught.value)) < 150


# --- an open one -----------------------------------------------------------------------------------------


def test_other_limits_are_those_of_the_cpu_on_the_same_engine(fp16: Path, gpus: Gpus) -> None:
    on_cpu = Reranker.load(fp16, threads=1, kv="fp16")
    reranker = on_gpu(fp16)
    with pytest.warns(UserWarning, match="was too long and was cut"):
        found, expected = (
            each.with_limits(max_length=100, max_query_length=20).score(PAIRS[:5], raw=True)
            for each in (reranker, on_cpu)
        )
    np.testing.assert_allclose(found, expected, rtol=0, atol=HALF)
    assert abs(expected[1] - on_cpu.score(PAIRS[1:2], raw=True)[0]) > 2 * HALF  # it was cut
    assert len(gpus.opened) == 1


def test_a_document_beyond_the_pool_is_told_and_costs_itself_alone(fp16: Path) -> None:
    page = 2 * 3 * PAGE_TOKENS * 32 * 2
    reranker = on_gpu(fp16, max_length=1024, pool_bytes=10 * page)
    wide = reranker.with_limits(max_length=8000)
    pairs: list[Any] = [PAIRS[0], ("q", DOCUMENTS[1][1] * 9), PAIRS[3]]
    found = wide.evaluate(pairs)
    assert [result.error is None for result in found] == [True, False, True]
    assert f"{POOL_VARIABLE}, or lower max_length" in str(found[1].error)
    assert np.isfinite([found[0].score, found[2].score]).all()
    assert math.isnan(found[1].score)


def test_a_pickled_one_is_opened_again_with_the_same_memory(fp16: Path, gpus: Gpus) -> None:
    reranker = on_gpu(fp16, device="cuda:1", gpu_bytes=6_000_000_000)
    with pickle.loads(pickle.dumps(reranker)) as other:
        assert gpus.opened == [(1, 6_000_000_000)] * 2
        assert engine_of(other).pool.num_pages == engine_of(reranker).pool.num_pages
        np.testing.assert_array_equal(other.score(PAIRS, raw=True), reranker.score(PAIRS, raw=True))


def test_closing_ends_its_threads_and_refuses_what_comes_later(fp16: Path) -> None:
    before = set(threading.enumerate())
    reranker = on_gpu(fp16)
    (own,) = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("m0kit-gpu")]
    reranker.close()
    assert not own.is_alive()
    with pytest.raises(M0kitError, match="was closed"):
        reranker.score(PAIRS[:1])


def test_the_stages_of_a_pair_are_not_to_be_had_there(fp16: Path) -> None:
    with pytest.raises(DeviceError, match="Load the artifact on device 'cpu'"):
        on_gpu(fp16).trace(PAIRS[0])


def engine_of(reranker: Reranker) -> CudaEngine:
    assert isinstance(reranker.engine, CudaEngine)
    return reranker.engine


# --- indexes ---------------------------------------------------------------------------------------------


def index_of(maker: Reranker, folder: Path) -> Path:
    with open_index(folder, maker) as store:
        add(maker, store, DOCUMENTS)
        assert len(store) == len(DOCUMENTS)
    return folder


def by_id() -> list[Any]:
    return [(query, {"id": name}) for query in ("q", "another query") for name, _, _ in DOCUMENTS]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("made_on", ["cpu", "cuda"])
def test_an_index_serves_the_other_kind_of_device(
    precision: str, made_on: str, in_precision: Callable[[str], Path], tmp_path: Path, gpus: Gpus
) -> None:
    """Where neither rounds activations: its documents are read, not computed again, and score as the maker has it."""
    artifact = in_precision(precision)
    maker = on_gpu(artifact) if made_on == "cuda" else Reranker.load(artifact, threads=1, kv="fp16")
    folder = index_of(maker, tmp_path / "library")
    expected = maker.score(PAIRS, raw=True)
    serving = Reranker.load(artifact, threads=1, index=folder) if made_on == "cuda" else on_gpu(artifact, index=folder)
    if made_on == "cpu":
        before = gpus.devices[-1].counts.copy()
    found = serving.score(by_id(), raw=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * HALF if precision == "bf16" else HALF)
    if made_on == "cpu":
        took = gpus.devices[-1].counts - before
        assert "run vision.cuda" not in took
        assert took["copies"] >= 4  # pages of three documents


def test_on_one_kind_of_device_an_index_changes_nothing(fp16: Path, tmp_path: Path) -> None:
    maker = on_gpu(fp16)
    folder = index_of(maker, tmp_path / "library")
    kept = maker.score(PAIRS, raw=True)
    np.testing.assert_allclose(on_gpu(fp16, index=folder).score(by_id(), raw=True), kept, rtol=0, atol=HALF / 4)


@pytest.mark.parametrize("precision", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("made_on", ["cpu", "cuda"])
def test_where_one_of_them_rounds_the_index_of_the_other_is_refused_by_name(
    precision: str, made_on: str, in_precision: Callable[[str], Path], tmp_path: Path
) -> None:
    """A CPU rounds what goes into products with int8: of nf4 those of the first layer, with 16 bits."""
    artifact = in_precision(precision)
    there, here = (made_on, "cpu" if made_on == "cuda" else "cuda")
    maker = on_gpu(artifact) if made_on == "cuda" else Reranker.load(artifact, threads=1, kv="fp16")
    assert maker.identity.get("device", "cpu") == made_on
    folder = index_of(maker, tmp_path / "library")
    with pytest.raises(StoreError, match=rf"what differs: device \({there} there, {here} here\)"):
        on_gpu(artifact, index=folder) if here == "cuda" else Reranker.load(artifact, index=folder, threads=1)
    again = on_gpu(artifact, index=folder) if made_on == "cuda" else Reranker.load(artifact, index=folder, threads=1)
    assert np.isfinite(again.score(by_id())).all()


def test_an_index_kept_otherwise_is_refused_by_name(fp16: Path, tmp_path: Path) -> None:
    folder = index_of(Reranker.load(fp16, threads=1, kv="int8"), tmp_path / "library")
    with pytest.raises(ValueError, match="keeps keys and values in int8, and on a GPU they are kept in 16 bits"):
        on_gpu(fp16, index=folder)
