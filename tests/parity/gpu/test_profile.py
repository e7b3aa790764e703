"""What is read off ONNX Runtime's profile and off a trace of the GPU."""

from pathlib import Path

from m0kit_parity.bench.workloads import Pair
from m0kit_parity.gpu.profile import graph_of, kernels, open_profiled, summed


def test_a_profile_tells_the_time_of_each_kind_of_node_by_batch(tiny_artifact: Path) -> None:
    batches: dict[str, list[Pair]] = {"short": [("a", "b")], "long": [("a", "a text " * 40)]}
    found = open_profiled(tiny_artifact, "cpu", {})(batches)
    assert set(found["time"]) == {"short", "long"}
    for graphs in found["time"].values():
        assert {"decoder", "head"} <= set(graphs)
        assert graphs["decoder"]["Gemm"] > 0
    assert ("decoder", "Gemm") in {(graph, kind) for graph, kind, _ in found["host"]}  # all of them, here


def test_a_loop_is_not_counted_beside_its_body() -> None:
    def event(kind: str, name: str = "x_kernel_time", cat: str = "Node") -> dict[str, object]:
        return {"cat": cat, "name": name, "args": {"op_name": kind}, "dur": 1}

    events = [event("Loop"), event("MatMul"), event("MatMul", "x_fence_before"), event("", "model_run", "Session")]
    assert list(kernels(events)) == [events[1]]


def test_graphs_are_known_by_their_outputs() -> None:
    names = {"vision": ["image_embeds"], "decoder": ["present.0.key", "hidden"], "head": ["logit"], "another": ["y"]}
    for graph, outputs in names.items():
        assert graph_of(outputs) == graph


def test_time_that_kernels_share_counts_once() -> None:
    events = [
        {"cat": "kernel", "name": "void gemm", "ts": 0.0, "dur": 10.0},
        {"cat": "kernel", "name": "void gemm", "ts": 20.0, "dur": 10.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 25.0, "dur": 10.0},
    ]
    assert summed(events) == {
        "top": [("gemm", 20.0, 2), ("Memcpy HtoD", 10.0, 1)],
        "busy_us": 25.0,
        "launches": 2,
        "copies": 1,
    }
    assert summed([])["busy_us"] == 0
