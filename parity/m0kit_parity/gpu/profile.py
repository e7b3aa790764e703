"""Where the time of a run goes, and what computes on the host: ONNX Runtime's profile, and a trace of the GPU.

Owns both readings. ONNX Runtime notes when it has launched a node, not when the GPU is done with it; so its process
runs with CUDA_LAUNCH_BLOCKING=1, in which a launch returns when its kernel has run. The trace of kernels is PyTorch's
profiler, which sees all of its process, and tells how much of the time the GPU was idle.
"""

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from m0kit.errors import M0kitError
from m0kit_parity.bench.workloads import Pair
from m0kit_parity.gpu.found import Found
from m0kit_parity.gpu.place import Place
from m0kit_parity.gpu.sides import let_go, logits_of

_TOP: Final = 12
# Arithmetic on a few integers, which ONNX Runtime itself puts on the host where that spares a copy.
SHAPES: Final = frozenset(
    ("Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Gather", "Mul", "Range", "ReduceProd",
     "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze")
)  # fmt: skip


def profile(place: Place) -> Found:
    """Microseconds by kind of node for a batch of pages and one of texts, nodes on the host, and idle time."""
    from m0kit_parity.gpu.speed import workloads

    artifact = place.artifact(place.size, "fp16")
    loads = workloads(artifact, place.on_gpu)
    pages, texts = (loads[name][: 16 if "page" in name else 64] for name in list(loads)[:2])
    batches = {"pages": pages, "texts": texts}
    with place.process("m0kit, profiled", partial(open_profiled, artifact, place.device, place.options)) as ask:
        nodes = ask(batches)
    tables: list[list[list[str]]] = []
    for batch, graphs in nodes["time"].items():
        for graph, kinds in graphs.items():
            whole = sum(kinds.values()) or 1
            rows = [[f"{graph}, {len(batches[batch])} {batch}", "ms", "share"]]
            top = sorted(kinds.items(), key=lambda item: -item[1])[:_TOP]
            rows += [[kind, f"{us / 1e3:.2f}", f"{us / whole:.1%}"] for kind, us in top]
            tables.append([*rows, ["all", f"{whole / 1e3:.2f}", ""]])
    host = [["nodes on the host", "kind", "name"], *([g, kind, name] for g, kind, name in nodes["host"][: 2 * _TOP])]
    facts: dict[str, Any] = {"nodes": nodes}
    wrong: list[str] = []
    notes: list[str] = []
    if place.on_gpu:
        tables.append(host)
        off = [node for node in nodes["host"] if node[1] not in SHAPES]
        wrong += [f"{graph}: {name} ({kind}) ran on the host" for graph, kind, name in off[:_TOP]]
        notes.append(f"{len(nodes['host'])} nodes ran on the host, {len(off)} of them more than shape arithmetic")
        traces = facts["kernels"] = {}
        try:
            with place.process("m0kit, traced", partial(open_traced, artifact, place.device, place.options)) as ask:
                traces |= {batch: ask(pairs) for batch, pairs in batches.items()}
        except M0kitError as error:  # what ONNX Runtime told is told all the same
            wrong.append(f"no trace of the GPU: {error}")
        for batch, trace in traces.items():
            rows = [[f"kernels, {len(batches[batch])} {batch}", "ms", "times"]]
            rows += [[name, f"{us / 1e3:.2f}", str(count)] for name, us, count in trace["top"]]
            tables.append(rows)
            notes.append(
                f"{batch}: {trace['wall_us'] / 1e3:.1f} ms, of which the GPU worked {trace['busy_us'] / 1e3:.1f}: "
                f"{trace['launches']} kernels, {trace['copies']} copies"
            )
    return Found(tables, facts, wrong, notes)


# --- ONNX Runtime's own ----------------------------------------------------------------------------------


def open_profiled(artifact: Path, device: str, options: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Runs in its process: opens the artifact with every session profiled."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    from m0kit.reranker import Reranker
    from m0kit.scoring.sessions import onnxruntime

    ort = onnxruntime()
    folder = tempfile.mkdtemp(prefix="m0kit-profile-")
    made: list[Any] = []
    options_type, session_type = ort.SessionOptions, ort.InferenceSession

    def profiled() -> Any:
        new = options_type()
        new.enable_profiling = True
        new.profile_file_prefix = f"{folder}/session"
        return new

    def opened(*arguments: Any, **named: Any) -> Any:
        made.append(session_type(*arguments, **named))
        return made[-1]

    ort.SessionOptions, ort.InferenceSession = profiled, opened
    return partial(_profiled, Reranker.load(artifact, device=device, **options), made)


def _profiled(reranker: Any, sessions: list[Any], batches: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    for pairs in batches.values():
        logits_of(reranker, pairs)  # what is done once
    spans = {}
    for batch, pairs in batches.items():
        let_go(reranker)
        start = time.time_ns()
        logits_of(reranker, pairs)
        spans[batch] = start, time.time_ns()
    times: dict[str, dict[str, dict[str, float]]] = {batch: {} for batch in spans}
    host: dict[tuple[str, str, str], None] = {}
    for session in sessions:
        graph = graph_of([port.name for port in session.get_outputs()])
        began = session.get_profiling_start_time_ns()
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
        for event in kernels(events):
            kind, provider = event["args"].get("op_name", "?"), event["args"].get("provider", "")
            if provider == "CPUExecutionProvider" or kind.startswith("Memcpy"):
                host[graph, kind, event["name"].removesuffix("_kernel_time")] = None
            for batch, (first, last) in spans.items():
                if first <= began + 1000 * event["ts"] <= last:
                    of = times[batch].setdefault(graph, {})
                    of[kind] = of.get(kind, 0.0) + event["dur"]
    return {"time": times, "host": list(host)}


def graph_of(outputs: Iterable[str]) -> str:
    """Which graph of an artifact has these outputs."""
    names = set(outputs)
    found = {"image_embeds": "vision", "hidden": "decoder", "logit": "head"}
    return next((graph for output, graph in found.items() if output in names), "another")


def kernels(events: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Of a profile's events those of one node each; a Loop's holds its body's, which count by themselves."""
    for event in events:
        of_node = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if of_node and event["args"].get("op_name") not in ("Loop", "If", "Scan"):
            yield event


# --- the GPU's -------------------------------------------------------------------------------------------


def open_traced(artifact: Path, device: str, options: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Runs in its process: PyTorch comes first, and its profiler sees what ONNX Runtime launches."""
    import torch

    torch.zeros(1, device=device)
    from m0kit.reranker import Reranker

    return partial(_traced, Reranker.load(artifact, device=device, **options))


def _traced(reranker: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    import torch

    for _ in range(2):
        let_go(reranker)
        logits_of(reranker, pairs)
    let_go(reranker)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        start = time.perf_counter()
        logits_of(reranker, pairs)
        wall = time.perf_counter() - start
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    return summed([e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]) | {
        "wall_us": 1e6 * wall
    }


def summed(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The kernels that took longest, and how long any was at work."""
    took: Counter[str] = Counter()
    count: Counter[str] = Counter()
    busy, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        name = event["name"].removeprefix("void ")[:60]
        took[name] += event["dur"]
        count[name] += 1
        last = event["ts"] + event["dur"]
        busy += max(0.0, last - max(event["ts"], end))
        end = max(end, last)
    return {
        "top": [(name, us, count[name]) for name, us in took.most_common(_TOP)],
        "busy_us": busy,
        "launches": sum(e["cat"] == "kernel" for e in events),
        "copies": sum(e["cat"] == "gpu_memcpy" for e in events),
    }
