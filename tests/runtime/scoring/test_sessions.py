"""Graphs open on the device asked for, or say why not; failures come in our words."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from m0kit import Reranker
from m0kit.artifact.ports import GraphPorts, Port, expected_ports
from m0kit.config import ModelConfig
from m0kit.errors import ArtifactDamagedError, DependencyError, DeviceError, DeviceLostError, M0kitError
from m0kit.scoring import cuda
from m0kit.scoring.gpus import Devices, Gpu
from m0kit.scoring.sessions import OnnxRuntimeGraph, open_graph


def hidden(config: ModelConfig, rows: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((rows, config.decoder.hidden_size))
    return values.astype(np.float32)


@pytest.mark.parametrize("device", ["cpu", "CPUExecutionProvider"])
@pytest.mark.parametrize("threads", [None, 1])
def test_a_graph_runs_on_the_cpu(artifact: Path, config: ModelConfig, device: str, threads: int | None) -> None:
    graph = open_graph(artifact, "head", device=device, threads=threads)
    out = graph.run({"hidden": hidden(config)}, ["logit"])
    assert list(out) == ["logit"]
    assert out["logit"].shape == (3,)
    assert np.ptp(out["logit"]) > 0


def test_threads_are_given_to_the_engine(artifact: Path) -> None:
    graph = open_graph(artifact, "head", threads=1)
    assert graph.session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("device", ["", "tpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "gpu"])
def test_an_unknown_device_is_named_with_those_there_are(artifact: Path, device: str) -> None:
    with pytest.raises(DeviceError) as caught:
        open_graph(artifact, "head", device=device)
    available = ", ".join(onnxruntime.get_available_providers())
    assert str(caught.value) == f"device {device!r} is not known. Say cpu, cuda, cuda:1, or one of {available}."


@pytest.mark.parametrize(
    ("device", "provider", "hint"),
    [
        ("cuda", "CUDAExecutionProvider", True),
        ("cuda:1", "CUDAExecutionProvider", True),
        ("TensorrtExecutionProvider", "TensorrtExecutionProvider", False),
        ("NoSuchExecutionProvider", "NoSuchExecutionProvider", False),
    ],
)
def test_a_device_that_is_not_there_is_an_error_and_no_fallback(
    artifact: Path, device: str, provider: str, hint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError) as caught:
        Reranker.load(artifact, device=device)
    told = "cuda" if hint else repr(device)
    assert f"device {told}: this onnxruntime has CPUExecutionProvider, not {provider}." in str(caught.value)
    assert ("pip install 'm0kit[gpu]'" in str(caught.value)) is hint
    assert isinstance(caught.value, RuntimeError)


def test_a_device_that_does_not_start_is_an_error_and_no_fallback(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself only logs when CUDA's libraries are missing, and goes on with the CPU."""
    asked: list[Any] = []
    real = onnxruntime.InferenceSession

    def fall_back(model: Any, options: Any, providers: list[Any], **others: Any) -> Any:
        asked.extend(providers)
        return real(model, options, providers=["CPUExecutionProvider"], **others)

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    monkeypatch.setattr(cuda, "start", lambda _: Devices((Gpu("A", 10**10), Gpu("B", 10**10))))
    with pytest.raises(DeviceError, match=r"^device 'cuda:1': CUDAExecutionProvider .* did not start.*say device"):
        open_graph(artifact, "head", device="cuda:1")
    assert asked == [("CUDAExecutionProvider", cuda.provider_options(1)), "CPUExecutionProvider"]


def test_what_fails_on_a_gpu_is_told_for_what_it_is_and_nothing_goes_on_elsewhere(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fail(*_: Any, **options: Any) -> Any:
        asked.update(options)
        raise RuntimeError("CUDA failure 719: unspecified launch failure ; GPU=1")

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    monkeypatch.setattr(cuda, "start", lambda _: Devices((Gpu("A", 10**10), Gpu("B", 10**10))))
    with pytest.raises(DeviceLostError, match="cuda:1 was lost"):
        open_graph(artifact, "head", device="cuda:1")
    assert asked["enable_fallback"] is False, "ONNX Runtime would print, and take the CPU"
    with pytest.raises(DeviceError, match=r"'cuda:2' is not there; there are cuda:0 \(A\), cuda:1 \(B\)"):
        open_graph(artifact, "head", device="cuda:2")
    session: Any = type("Session", (), {"run": staticmethod(fail)})
    with pytest.raises(DeviceLostError, match="cuda:1 was lost"):
        OnnxRuntimeGraph(session, "head", None, gpu=1).run({"hidden": np.zeros((1, 2))}, ["logit"])


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:0,cuda:1", "a graph runs on one GPU"),
        ("cuda:0,cpu", "cannot stand"),
        ("cuda:0,cuda:0", "names a GPU twice"),
    ],
)
def test_a_graph_is_on_one_device(artifact: Path, device: str, said: str) -> None:
    with pytest.raises(DeviceError, match=f"^device '{device}'.*{said}"):
        open_graph(artifact, "head", device=device)


def test_without_onnxruntime_the_extras_are_named(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"onnxruntime is not installed.*m0kit\[cpu\].*m0kit\[gpu\]") as caught:
        Reranker.load(artifact)
    assert isinstance(caught.value, ImportError)


def test_inner_results_appear_as_outputs_and_change_nothing(reranker: Reranker, artifact: Path) -> None:
    """All layers of the decoder; the last one, normalised, is the graph's own output."""
    pair = ("query", "a document of some words")
    plain, layers = reranker.trace(pair), reranker.trace(pair, layers=True)
    assert plain.layers is None
    assert layers.layers is not None
    decoder = reranker.config.decoder
    assert layers.layers.shape == (decoder.num_layers, decoder.hidden_size)
    np.testing.assert_allclose(layers.hidden, plain.hidden, atol=1e-5)  # fp32, perhaps fused otherwise
    assert all(np.ptp(layer) > 0.1 for layer in layers.layers)
    assert np.abs(np.diff(layers.layers, axis=0)).max(axis=1).min() > 0.1
    session = open_graph(artifact, "decoder", also=["layers.0", "layers.1"]).session
    names = [port.name for port in session.get_outputs()]
    assert names[-2:] == ["layers.0", "layers.1"]
    assert names[:-2] == [port.name for port in open_graph(artifact, "decoder").session.get_outputs()]


@pytest.mark.parametrize("content", [b"", b"not protobuf at all", b"\x08\x0d"])
def test_a_file_that_is_no_graph_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "head.onnx").write_bytes(content)
    said = rf"^{tmp_path / 'head.onnx'}: ONNX Runtime {onnxruntime.__version__} cannot open it \(\w+\)\. It needs "
    with pytest.raises(ArtifactDamagedError, match=said):
        open_graph(tmp_path, "head")


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactDamagedError, match=rf"^{tmp_path / 'decoder.onnx'}: "):
        open_graph(tmp_path, "decoder")


def test_a_failure_of_the_engine_comes_in_our_words_with_the_shapes(artifact: Path, config: ModelConfig) -> None:
    graph = open_graph(artifact, "head")
    with pytest.raises(M0kitError, match=r"^the head graph failed in ONNX Runtime \(\w+\) on hidden \(2, 5\)\. If mem"):
        graph.run({"hidden": np.zeros((2, 5), np.float32)}, ["logit"])


def test_what_is_not_the_engines_failure_stays_what_it_is(artifact: Path, config: ModelConfig) -> None:
    class Broken:
        def run(self, *_: object) -> None:
            raise KeyboardInterrupt

    graph = open_graph(artifact, "head")
    graph.session = Broken()
    with pytest.raises(KeyboardInterrupt):
        graph.run({"hidden": hidden(config)}, ["logit"])


_RESTING = """
import sys
from m0kit import Reranker

def private(key="RssAnon"):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

reranker = Reranker.load(sys.argv[1], threads=1)
reranker.score([("a", "b")])
before = private()
reranker.score([("a", "word and word " * 2500)])
peak = private("VmHWM")
reranker.score([("a", "b")])  # a result in the middle of what was taken holds some of it until the next run
print(private() - before, peak - private("VmRSS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_long_prompt_took_is_given_back(artifact: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _RESTING, str(artifact)], capture_output=True, text=True, check=True)
    resting, given_back = map(float, done.stdout.split())
    assert given_back > 20  # MiB between the peak and now
    assert resting < 20  # the document kept for its next query, slack of allocators: 8 were seen, 110 if all is kept


def test_the_engine_prints_nothing_of_what_it_raises(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It would print the names of nodes, which are a file's, as they are."""
    graph = open_graph(artifact, "decoder")
    feed = {}
    for port in graph.session.get_inputs():
        shape = [size if isinstance(size, int) else 4 for size in port.shape]
        kind = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}[port.type]
        feed[port.name] = np.full(shape, 10**6, kind)
    with pytest.raises(M0kitError):
        graph.run(feed, ["hidden"])
    assert capfd.readouterr() == ("", "")


# --- graphs that are not as their manifest tells, though their hashes fit --------------------------------------------


def test_ports_are_those_that_the_manifest_tells(artifact: Path, config: ModelConfig) -> None:
    ports = {name: expected_ports(config, name) for name in ("vision", "decoder", "head", "decoder.kv-int8")}
    for name in ports:
        open_graph(artifact, name, threads=1, ports=ports)
    also = open_graph(artifact, "decoder", threads=1, ports=ports, also=["layers.0"])
    assert "layers.0" in {port.name for port in also.session.get_outputs()}
    told = {"head": ports["vision"]}
    said = r"head\.onnx: has other inputs than the manifest tells: hidden float32 \[B, 64\] in place of patches float32"
    with pytest.raises(ArtifactDamagedError, match=said):
        open_graph(artifact, "head", threads=1, ports=told)
    wrong = GraphPorts(ports["head"].inputs, (Port("logit", "float16", ("B",)),))
    with pytest.raises(
        ArtifactDamagedError, match=r"other outputs than the manifest tells: logit float32 \[B\] in place"
    ):
        open_graph(artifact, "head", threads=1, ports={"head": wrong})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.zeros((3, 1), np.float32), r"float32 \[3, 1\]"),
        (np.zeros(2, np.float32), r"float32 \[2\]"),
        (np.zeros((), np.float32), r"float32 \[\]"),
        (np.zeros(3, np.float64), r"float64 \[3\]"),
    ],
)
def test_what_comes_out_in_another_shape_is_an_error(config: ModelConfig, given: np.ndarray, told: str) -> None:
    class Session:
        def run(self, *_: Any) -> list[np.ndarray]:
            return [given]

    graph = OnnxRuntimeGraph(Session(), "head", None, expected_ports(config, "head"))
    with pytest.raises(ArtifactDamagedError, match=rf"^the head graph gives logit as {told}, and it should be float32"):
        graph.run({"hidden": hidden(config)}, ["logit"])


@pytest.mark.parametrize("error", [RuntimeError("basic_string"), IndexError(), MemoryError(), ValueError("x")])
def test_whatever_the_library_throws_is_told_in_our_words(
    artifact: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Session:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise error

        def run(self, *_: Any) -> Any:
            raise error

    with pytest.raises(M0kitError, match=r"^the head graph failed in ONNX Runtime \(\w+\) on hidden \(3, 64\)"):
        OnnxRuntimeGraph(object.__new__(Session), "head", None).run({"hidden": hidden(config)}, ["logit"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(
        ArtifactDamagedError, match=rf"head\.onnx: ONNX Runtime .* cannot open it \({type(error).__name__}"
    ):
        open_graph(artifact, "head")


def test_only_onnx_is_read_as_a_graph(tmp_path: Path) -> None:
    """ONNX Runtime's own format is told by four letters, which may stand in a field of ONNX as well."""
    (tmp_path / "head.onnx").write_bytes(b"\x0a\x06\0\0ORTM" + b"\x3a\0")
    with pytest.raises(ArtifactDamagedError) as caught:
        open_graph(tmp_path, "head", also=["x"])  # from its bytes
    assert "ORT model" not in str(caught.value.__cause__)
