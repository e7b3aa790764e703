"""`m0kit bench`: what scoring costs here, in time and memory, and what an artifact's ranking is worth.

Owns the workloads, the timing and the tables. Time is compared with transformers as a ratio, both sides taking
turns in one run, because machines are noisy and differ; nothing here passes or fails.

    m0kit bench pairs                   whole pairs against transformers fp32 on full-width layers, every precision
    m0kit bench growth m0-fp32          seconds as pairs, tokens and pixels grow
    m0kit bench memory m0-fp32          peak memory as tokens and pixels grow, a fresh process for each
    m0kit bench ranking m0-fp32         nDCG@10 on the evaluation set that m0kit carries
    m0kit bench reuse m0-int8           what keeping documents is worth (`m0kit_parity.bench.reuse`)
"""

import bisect
import importlib.util
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import click

from m0kit.cli.options import ARTIFACT, PARTLY, require_place
from m0kit.errors import DependencyError, InputError, M0kitError
from m0kit.plain import MAX_CELL, plain
from m0kit.precision import SCHEMES
from m0kit.scoring.prompt import PromptBuilder
from m0kit.terminal import bar, say, show, show_json
from m0kit_parity.bench.measure import Pair, measure_memory
from m0kit_parity.child import Child, Maker
from m0kit_parity.drawing import plot

Side = Callable[[list[Pair]], float]  # scores pairs, says its seconds

# Words that stand for one token each in Qwen2's vocabulary behind a blank, and for a few in a small one.
WORDS: Final = ("the", "model", "page", "text", "small", "language", "score", "image", "data", "report", "line")
_ONE_TOKEN: Final = "7"  # wherever it stands: the pre-tokeniser splits off every digit
# Each peer, and the packages that it needs with what installs them; read without importing PyTorch.
_LLAMA: Final = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
PEERS: Final[Mapping[str, Mapping[str, str]]] = {
    "openvino-int8": {"openvino": "openvino", "nncf": "nncf"},
    **dict.fromkeys(("llama-f16", "llama-q8_0", "llama-q4_0", "llama-q4_k"), _LLAMA),
}
_TORCH: Final = "transformers fp32"
QUERY: Final = "small language model"
_LIGHT: Final = {"ink": "#1d2430", "faint": "#5b6472", "grid": "#d9dee6", "series-0": "#2f6fd0", "series-1": "#c4641a",
                 "series-2": "#2b8a57"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timing:
    """One side of one workload; seconds are the median of its turns."""

    workload: str
    side: str
    seconds: float
    ratio: float  # median of the turns' ratios: how many times faster than the side compared with
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Missing:
    """A side of a workload without a ratio: it failed, or the side that it is compared with did."""

    workload: str
    side: str
    error: str
    seconds: float | None = None


def text_of(prompts: PromptBuilder, num_tokens: int, seed: int = 0, query: str = QUERY) -> str:
    """A document that makes a prompt of exactly `num_tokens` tokens with `query`.

    Raises ValueError when that is too few for the query and the headers.
    """

    def length(text: str) -> int:
        return len(prompts.build(query, text).token_ids)

    shortest = length(_ONE_TOKEN)
    if num_tokens < shortest:
        raise ValueError(f"a prompt with this query takes {shortest} tokens at least, not {num_tokens}")
    words = random.Random(seed).choices(WORDS, k=num_tokens - shortest + 1)
    fitting = bisect.bisect_right(range(1, len(words)), num_tokens, key=lambda n: length(" ".join(words[:n])))
    text = " ".join(words[:fitting]) or _ONE_TOKEN
    return text + _ONE_TOKEN * (num_tokens - length(text))


def require_packages(peers: Sequence[str]) -> None:
    """Raises DependencyError for a package that one of the peers needs; nothing is imported."""
    for name in peers:
        for package, install in PEERS[name].items():
            if importlib.util.find_spec(package) is None:
                raise DependencyError(f"the peer {name} needs {install}. pip install {install}")


def page_of(visual_tokens: int, seed: int = 0) -> bytes:
    """A PNG that makes exactly `visual_tokens` visual tokens, as close to a page's shape as that allows."""
    from m0kit_parity.proof.cases import draw_page, encode

    rows = max(r for r in range(1, visual_tokens + 1) if visual_tokens % r == 0 and r * r <= 2 * visual_tokens)
    lines = [f"{WORDS[(i + seed) % len(WORDS)]} {i}" for i in range(12)]
    return encode(draw_page(lines, (28 * visual_tokens // rows, 28 * rows), seed))


def workloads(prompts: PromptBuilder, mixed: Sequence[int] = (8, 32)) -> dict[str, list[Pair]]:
    """The pairs of `m0kit bench pairs`."""
    loads: dict[str, list[Pair]] = {f"text, {n} tokens": [(QUERY, text_of(prompts, n))] for n in (64, 256, 1024)}
    loads["page, 768 visual tokens"] = [(QUERY, page_of(768))]
    for count in mixed:
        rng = random.Random(count)
        lengths = [rng.randint(24, 600) for _ in range(count)]
        loads[f"{count} texts, 24–600 tokens"] = [(QUERY, text_of(prompts, n, seed)) for seed, n in enumerate(lengths)]
    return loads


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Something to run, as a side that takes turns: it returns its seconds."""

    def seconds() -> float:
        start = clock()
        run()
        return clock() - start

    return seconds


def take_turns(
    sides: Mapping[str, Callable[[], float]], repeats: int, rest: float = 0.3, failed: dict[str, str] | None = None
) -> dict[str, list[float]]:
    """Seconds that each side says it took, over `repeats` turns after one that does not count.

    A rest of so many seconds before each: threads of some engines spin on for a while and would slow the next one.
    With `failed` a side that raises an M0kitError takes no further turns; the error is noted there.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            if name not in times:
                continue
            time.sleep(rest)
            try:
                seconds = run()
            except M0kitError as error:
                if failed is None:
                    raise
                failed[name] = f"{name}: {error}"
                del times[name]
                continue
            if turn:
                times[name].append(seconds)
    return times


def compare(workload: str, times: Mapping[str, Sequence[float]], baseline: str) -> list[Timing]:
    """Medians of each side, and median and range of its ratios to the baseline turn by turn."""
    timings = []
    for side, seconds in times.items():
        ratios = [b / a for a, b in zip(seconds, times[baseline], strict=True)]
        middle = statistics.median(seconds)
        timings.append(Timing(workload, side, middle, statistics.median(ratios), min(ratios), max(ratios)))
    return timings


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    cpu = platform.processor() or platform.machine()
    flags: set[str] = set()
    if Path("/proc/cpuinfo").is_file():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
        cpu = f"{fields.get('model name', cpu)} family {fields.get('cpu family')} model {fields.get('model')}"
        flags = set(fields.get("flags", "").split())
    wide = [name for name in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if name in flags]
    packages = {}
    for package in ("m0kit", "onnxruntime", "torch", "transformers", "numpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"cpu": cpu, "features": wide, "cores": os.cpu_count(), **packages}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be; the first row is the heading, the first column is set left.

    No cell, whatever it holds, is more than a part of its line.
    """
    rows = [[plain(cell, MAX_CELL) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def write_plot(path: Path, charts: Iterable[str]) -> None:
    """Charts one below the other in one self-contained SVG file."""
    style = f"font:13px sans-serif;fill:{_LIGHT['ink']}"
    parts, top = [], 0
    for chart in charts:
        for name, colour in _LIGHT.items():  # written out: few viewers of SVG files know variables
            chart = chart.replace(f"var(--{name})", colour)
        head, _, rest = chart.partition(">")
        _, _, width, height = (int(float(v)) for v in head.split('viewBox="')[1].split('"')[0].split())
        parts.append(f'<svg y="{top}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">{rest}')
        top += height + 20
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {top}" style="{style}">'
        f'<rect width="760" height="{top}" fill="#fff"/>{"".join(parts)}</svg>\n',
        "utf-8",
    )


# --- commands ------------------------------------------------------------------------------------------

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_THREADS = click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default=True)
_PLOT = click.option("--plot", "plot_file", type=click.Path(path_type=Path, dir_okay=False), help="Write an SVG.")


@click.group()
def bench() -> None:
    """Measure scoring on this machine: time, memory, ranking."""


@bench.command()
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(SCHEMES),
    default=("fp32", "int8", "int4"),
    show_default=True,
    help="Repeatable.",
)
@click.option("--peer", "peer_names", multiple=True, type=click.Choice(list(PEERS)), help="Repeatable.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Decoder layers, vision blocks.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--only", multiple=True, metavar="TEXT", help="Only workloads whose name holds TEXT; repeatable.")
@_THREADS
@_JSON
@click.pass_context
def pairs(
    ctx: click.Context, precisions: tuple[str, ...], peer_names: tuple[str, ...], layers: int, repeats: int,
    only: tuple[str, ...], threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Whole pairs against transformers fp32 (sdpa, as many threads) on full-width layers with random weights.

    A whole pair is everything between the call and the score: decoding and preparing the image,
    tokenising, all graphs. transformers' side is the published scoring call, batches of 8 padded on the left.
    All sides take turns in one run, each in a process of its own, which takes the time itself. One that crashes costs
    the others nothing: the table says so, and the exit code is 3.
    """
    require_packages(peer_names)
    import torch

    from m0kit_export.export import export_artifact
    from m0kit_parity.samples.checkpoints import write_checkpoint
    from m0kit_quant.recipe import Recipe

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="m0kit-bench-") as temporary:
        root = Path(temporary)
        write_checkpoint(root / "wide", "wide", num_layers=layers, vision_depth=layers, progress=True)
        makers: dict[str, Maker] = {}
        for precision in precisions:
            export_artifact(root / "wide", root / precision, recipe=Recipe.default(precision))
            makers[precision] = partial(open_artifact, root / precision, threads)
        makers[_TORCH] = partial(open_transformers, root / "wide", threads)
        makers |= {name: partial(open_peer, root / "wide", name, threads, root / "peers") for name in peer_names}
        prompts = prompts_of(root / precisions[0])
        loads = {n: load for n, load in workloads(prompts).items() if not only or any(text in n for text in only)}
        results = side_by_side(makers, loads, repeats)
    about = {**machine(), "threads": threads, "layers": layers, "repeats": repeats}
    if as_json:
        show_json({"about": about, "results": [asdict(r) for r in results]})
    else:
        rows = [["whole pairs", "seconds", f"against {_TORCH}", "range"]]
        for name in loads:
            rows.append([name, "", "", ""])
            rows += [_row(r) for r in results if r.workload == name]
        show(*table(rows).split("\n"), *dict.fromkeys(r.error for r in results if isinstance(r, Missing)))
        say(_about(about))
    ctx.exit(PARTLY if any(isinstance(r, Missing) for r in results) else 0)


def _row(result: Timing | Missing) -> list[str]:
    if isinstance(result, Missing):
        return [f"  {result.side}", "failed" if result.seconds is None else f"{result.seconds:.3f}", "–", "–"]
    cells = [f"{result.seconds:.3f}", f"{result.ratio:.2f}×", f"{result.low:.2f}–{result.high:.2f}"]
    return [f"  {result.side}", *cells]


def side_by_side(
    makers: Mapping[str, Maker], loads: Mapping[str, list[Pair]], repeats: int, rest: float = 0.3
) -> list[Timing | Missing]:
    """Every side on every workload, each in a process of its own, taking turns; compared with transformers.

    A side that cannot be opened is missing everywhere; one that crashes at a workload is opened anew for the next.
    A side that nothing more is asked of gives its memory back.
    """
    children: dict[str, Child] = {}
    broken: dict[str, str] = {}  # could not be opened
    results: list[Timing | Missing] = []
    with ExitStack() as stack:
        for place, (load, pairs) in enumerate(bar(loads.items(), unit="workload")):
            wanted = [side for side in makers if _takes(side, pairs)]
            for side in [side for side in wanted if side not in broken and side not in children]:
                try:
                    children[side] = stack.enter_context(Child(makers[side]))
                except M0kitError as error:
                    broken[side] = f"{side}: {error}"
            failed = {side: broken[side] for side in wanted if side in broken}
            asked = {side: partial(children[side], pairs) for side in wanted if side in children}
            times = take_turns(asked, repeats, rest, failed)
            for side in wanted:
                if side in failed:
                    results.append(Missing(load, side, failed[side]))
                elif _TORCH not in times:
                    alone = f"{_TORCH} failed, so there is nothing to compare with"
                    results.append(Missing(load, side, alone, statistics.median(times[side])))
                else:
                    results += compare(load, {side: times[side], _TORCH: times[_TORCH]}, _TORCH)[:1]
            later = [pairs for _, pairs in list(loads.items())[place + 1 :]]
            for side in list(children):
                if not children[side].alive or not any(_takes(side, pairs) for pairs in later):
                    children.pop(side).close()
    return results


def _takes(side: str, pairs: Sequence[Pair]) -> bool:
    """llama.cpp is a peer for texts alone."""
    return not side.startswith("llama") or all(isinstance(part, str) for pair in pairs for part in pair)


# What runs in the process of a side: each returns what scores pairs there, and says its seconds.


def open_artifact(artifact: Path, threads: int) -> Side:
    """m0kit's own side."""
    from m0kit.reranker import Reranker

    return _side(Reranker.load(artifact, threads=threads).score)


def open_transformers(checkpoint: Path, threads: int) -> Side:
    """The published scoring call in PyTorch."""
    import torch

    from m0kit_parity.reference import Reference

    torch.set_num_threads(threads)
    return _side(Reference.load(checkpoint).compute_score)


def open_peer(checkpoint: Path, name: str, threads: int, scratch: Path) -> Side:
    """Another engine."""
    from m0kit_parity.bench.peers import peers

    return _side(peers(checkpoint, [name], threads, scratch)[0].run)


def _side(score: Callable[[list[Pair]], object]) -> Side:
    return lambda pairs: timed(partial(score, pairs))()


@bench.command()
@ARTIFACT
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--max-tokens", type=click.IntRange(64), default=4096, show_default=True)
@click.option("--max-visual-tokens", type=click.IntRange(64), default=768, show_default=True)
@_THREADS
@_PLOT
@_JSON
def growth(
    artifact: Path, repeats: int, max_tokens: int, max_visual_tokens: int, threads: int, plot_file: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Seconds as the work grows: pairs of one length, tokens of one pair, visual tokens of one page."""
    require_place(plot_file)
    from m0kit.reranker import Reranker

    prompts = prompts_of(artifact)
    reranker = Reranker.load(artifact, threads=threads, max_pixels=max(602_112, max_visual_tokens * 784))
    loads: dict[str, dict[int, list[Pair]]] = {
        "pairs of 128 tokens": {
            n: [(QUERY, text_of(prompts, 128, seed)) for seed in range(n)] for n in (1, 2, 4, 8, 16, 32)
        },
        "tokens of a text pair": {n: [(QUERY, text_of(prompts, n))] for n in _doubling(64, max_tokens)},
        "visual tokens of a page": {n: [(QUERY, page_of(n))] for n in _doubling(48, max_visual_tokens)},
    }
    measured: dict[str, dict[int, float]] = {}
    with bar(total=sum(map(len, loads.values())), unit="point") as shown:
        for kind, points in loads.items():
            measured[kind] = {}
            for amount, load in points.items():
                times = take_turns({"m0kit": timed(partial(reranker.score, load))}, repeats)
                measured[kind][amount] = statistics.median(times["m0kit"])
                shown.update()
    if plot_file:
        write_plot(plot_file, [plot.lines({kind: list(p.items())}, kind, "seconds") for kind, p in measured.items()])
    about = {**machine(), "threads": threads, "artifact": str(artifact), "repeats": repeats}
    if as_json:
        show_json({"about": about, "seconds": measured})
        return
    for kind, seconds in measured.items():
        rows = [[kind, "seconds", "per thousand"]]
        rows += [[str(n), f"{s:.3f}", f"{1000 * s / n:.2f}"] for n, s in seconds.items()]
        show(*table(rows).split("\n"), "")
    say(_about(about))


@bench.command()
@ARTIFACT
@click.option("--max-tokens", type=click.IntRange(64), default=10_240, show_default=True)
@click.option("--max-visual-tokens", type=click.IntRange(64), default=3072, show_default=True)
@click.option("--memory", "mode", type=click.Choice(["fast", "low"]), default="fast", show_default=True)
@_THREADS
@_PLOT
@_JSON
@click.pass_context
def memory(
    ctx: click.Context, artifact: Path, max_tokens: int, max_visual_tokens: int, mode: str, threads: int,
    plot_file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Peak memory of one pair as its tokens, or its page's pixels, grow.

    `private` is what scoring itself needs; the rest of the peak are weights mapped from the artifact,
    which the system takes back when memory is short. Linux only: it reads /proc.
    """
    if not Path("/proc/self/status").is_file():
        raise InputError("m0kit bench memory reads /proc, which this system does not have. Run it on Linux.")
    require_place(plot_file)
    prompts = prompts_of(artifact)
    pixels = max(602_112, max_visual_tokens * 784)
    measured: dict[str, dict[int, dict[str, float]]] = {"text": {}, "page": {}}
    points = [("text", n) for n in _doubling(256, max_tokens)] + [
        ("page", n) for n in _doubling(192, max_visual_tokens)
    ]
    failed: dict[str, dict[int, str]] = {"text": {}, "page": {}}
    for kind, amount in bar(points, unit="point"):
        document: Any = text_of(prompts, amount) if kind == "text" else page_of(amount)
        try:
            measured[kind][amount] = asdict(measure_memory(artifact, [(QUERY, document)], threads, pixels, mode))
        except M0kitError as error:
            failed[kind][amount] = str(error)
    if plot_file:
        charts = [
            plot.lines(
                {what: [(n, m[what]) for n, m in measured[kind].items()] for what in ("peak", "private")},
                label,
                "MiB",
            )
            for kind, label in (("text", "tokens of a text pair"), ("page", "visual tokens of a page"))
            if measured[kind]
        ]
        write_plot(plot_file, charts)
    about = {**machine(), "threads": threads, "memory": mode, "artifact": str(artifact)}
    if as_json:
        facts = {"about": about, "mebibytes": measured, "failed": failed}
        show_json(facts)
    else:
        for kind, label in (("text", "tokens of a text pair"), ("page", "visual tokens of a page")):
            rows = [[label, "after load MiB", "peak MiB", "private peak MiB", "seconds"]]
            for n in sorted({*measured[kind], *failed[kind]}):
                if n in failed[kind]:
                    rows.append([str(n), *["failed"] * 4])
                    continue
                m = measured[kind][n]
                rows.append([str(n), *(f"{m[k]:.0f}" for k in ("loaded", "peak", "private")), f"{m['seconds']:.1f}"])
            show(*table(rows).split("\n"), *dict.fromkeys(failed[kind].values()), "")
        say(_about(about))
    ctx.exit(PARTLY if any(failed.values()) else 0)


@bench.command()
@ARTIFACT
@_THREADS
@_JSON
def ranking(artifact: Path, threads: int, as_json: bool) -> None:
    """nDCG@10 on the evaluation set that m0kit carries, for artifacts of the small checkpoint."""
    from m0kit.reranker import Reranker
    from m0kit_parity.small import evaluate
    from m0kit_parity.small.files import SMALL

    reranker = Reranker.load(artifact, threads=threads)
    results: dict[str, dict[str, float]] = {}
    for kind in bar(evaluate.KINDS, unit="set"):
        items = evaluate.read_set(SMALL / "eval", kind)
        values: dict[str, list[float]] = {"m0kit": [], "bm25": [], "chance": []}
        for item in items:
            logits = reranker.score([(item.query, document) for document in item.documents], raw=True)
            values["m0kit"].append(evaluate.ndcg_at_k(logits.tolist(), item.relevance))
            values["bm25"].append(evaluate.ndcg_at_k(evaluate.bm25_text(item.query, item.documents), item.relevance))
            values["chance"].append(evaluate.chance_ndcg(item.relevance))
        results[kind] = {"queries": len(items), **{name: statistics.fmean(v) for name, v in values.items()}}
    if as_json:
        show_json(results)
        return
    rows = [["nDCG@10", "queries", "m0kit", "BM25", "chance"]]
    for kind, r in results.items():
        rows.append([kind, str(int(r["queries"])), *(f"{r[name]:.3f}" for name in ("m0kit", "bm25", "chance"))])
    show(*table(rows).split("\n"))


def prompts_of(artifact: Path) -> PromptBuilder:
    """What builds an artifact's prompts, once its files are as exported. Raises ArtifactError."""
    from m0kit.artifact.manifest import TOKENIZER, read_manifest, verify_files

    manifest = read_manifest(artifact)
    verify_files(artifact, manifest)
    return PromptBuilder(artifact / TOKENIZER, manifest.model.prompt)


def _doubling(first: int, last: int) -> list[int]:
    """first, twice that, … and last."""
    steps = []
    while first < last:
        steps.append(first)
        first *= 2
    return [*steps, last]


def _about(about: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {value}" for key, value in about.items())


import m0kit_parity.bench.adding  # noqa: E402
import m0kit_parity.bench.reuse  # noqa: E402, F401 — each adds its command; last, because they use what stands above
