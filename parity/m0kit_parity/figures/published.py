"""Each published figure: what is measured, by which benchmark, and how it is told. Measures nothing by itself.

A figure is a function of the workshop; its docstring, title first, is what the page says of it.

    FIGURES["ranking"](Workshop(Path("work"), QUICK, threads=2)).parts
"""

import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement

from m0kit.artifact.manifest import read_manifest
from m0kit.precision import SCHEMES
from m0kit.reranker import Reranker
from m0kit_parity.bench import growth as growing
from m0kit_parity.bench.measure import Memory, Ran, measure_memory, run_m0kit
from m0kit_parity.bench.options import PEERS
from m0kit_parity.bench.pairs import TORCH, Missing, whole_pairs
from m0kit_parity.bench.ranking import ranking as rank
from m0kit_parity.bench.reuse import DOCUMENTS, many, reuse_parts, text_document
from m0kit_parity.bench.reuse_results import charts, tables
from m0kit_parity.bench.timing import Timing
from m0kit_parity.bench.workloads import Pair, prompts_of, workloads
from m0kit_parity.drawing.plot import write_plot
from m0kit_parity.drawing.table import Rows, shown
from m0kit_parity.evaluate.compare import ALL, builtin_workloads, compare
from m0kit_parity.evaluate.quality import Quality
from m0kit_parity.evaluate.render import span
from m0kit_parity.figures.workshop import Model, Workshop
from m0kit_parity.samples.checkpoints import model_config, write_checkpoint
from m0kit_parity.small import corpus, evaluate, pages
from m0kit_parity.small.files import SMALL

Parts = list[Rows | str]
DEEP: Final = ("256", "page")  # workloads at full depth
RANKED: Final[Mapping[Model, str]] = {"small": "small", "massive": "small-massive"}  # as they are called
_CHANGES: Final = "largest Δ / mean Δ / Spearman / same first"
_STAGES: Final = ("image_embeds", "hidden", "logit", "score")


@dataclass(frozen=True, slots=True)
class Found:
    """Tables, sentences below them, and charts for one SVG file."""

    parts: Parts
    charts: Sequence[str] = ()


def pairs(shop: Workshop) -> Found:
    """Whole pairs, every precision, and the peers

    Seconds, and how many times faster than transformers fp32 (sdpa, the published scoring call with batches of 8 padded
    on the left). A whole pair is everything between the call and the score. Layers of full width, random weights,
    medians; all sides take turns in one run, each in a process of its own (`m0kit bench pairs`). OpenVINO gets
    transformers' modules without loops, weights in 8 bits by nncf, activations quantised in groups of 256; llama.cpp
    scores texts only, with flash attention. Peers stand here where their packages are installed
    (`pip install 'm0kit[peers]'`). All but transformers save most of the last layer, which flatters them with few
    layers more than with 28.
    """
    wide, layers = shop.scratch / "layers", shop.sizes.layers
    write_checkpoint(wide, "wide", num_layers=layers, vision_depth=layers)
    artifacts = {}
    for precision in ("fp32", "int8", "int4", "nf4"):
        artifacts[precision] = shop.scratch / precision
        run_m0kit("export", wide, "-o", artifacts[precision], "--precision", precision)
    peers = [name for name in PEERS if _installed(PEERS[name])]
    parts = _side_by_side(shop, wide, artifacts, shop.sizes.loads, peers, shop.sizes.repeats)
    return Found([*parts, f"{layers} decoder layers and {layers} vision blocks; turns: {shop.sizes.repeats}."])


def depth(shop: Workshop) -> Found:
    """Whole pairs at full depth

    The same with the layers of the published model, in a quick run with as many as are named below
    (`m0kit bench pairs --layers 28` measures 28 + 28), one turn.
    """
    artifacts = {precision: shop.artifact("big", precision) for precision in ("int8", "int4")}
    parts = _side_by_side(shop, shop.checkpoint("big"), artifacts, DEEP, (), 1)
    return Found([*parts, _layers(shop)])


def precisions(shop: Workshop) -> Found:
    """What each precision takes

    Of random weights (`m0kit checkpoint full`, in a quick run fewer layers of it): seconds and
    peak memory of `m0kit export`, size on disk, seconds until
    the artifact is open, and peak resident memory of a pair of 256 tokens and of a page of 768 visual tokens, with both
    settings of `memory` (`m0kit bench memory`). Floats are mapped from the artifact's files in either: half of such a
    peak or more can be given back.
    """
    loads = ("text", "page")
    head = ["export s", "export MiB", "disk GB", "open s", *(f"{load}: resident MiB" for load in loads)]
    rows = [["precision", *head, *(f"low: {load}" for load in loads)]]
    for precision in SCHEMES:
        cost, artifact = shop.export("big", precision), shop.place("big", precision)
        pairs = builtin_workloads(artifact)
        found = {mode: _memory(shop, artifact, pairs, mode) for mode in ("fast", "low")}
        opened = statistics.median(memory.opened for memory in found["fast"])
        peaks = [f"{memory.peak:.0f}" for mode in found for memory in found[mode]]
        rows.append([precision, *_cost(cost), f"{_gigabytes(artifact):.2f}", f"{opened:.2f}", *peaks])
        if precision not in ("fp32", "int8", "int4"):  # which are measured further
            shop.forget(artifact)
    adapter = shop.scratch / "embedding"
    run_m0kit("adapter", shop.checkpoint("big"), "embedding", adapter)
    cost = shop.export("big", "fp32", "--adapter", adapter, name="adapted")
    size = _gigabytes(shop.place("big", "fp32", "adapted"))
    rows.append(["fp32, adapter on the embedding", *_cost(cost), f"{size:.2f}", *["–"] * 5])
    shop.forget(shop.place("big", "fp32", "adapted"))
    return Found([rows, _layers(shop)])


def quality(shop: Workshop) -> Found:
    """What each precision costs in ranking

    Points of nDCG@10 that are lost against fp32 on held-out queries (negative: gained), with the 95 % interval of a
    paired bootstrap, and how scores change. Of two checkpoints: `small`, the trained one that m0kit carries, and
    `small-massive`, the same with activations such as large models have (`m0kit checkpoint small-massive OUT`). Made by
    `m0kit evaluate fp32/ fp16/ bf16/ int8/ int4/ nf4/ --draw 1700 --no-speed`, which draws the same queries everywhere;
    `m0kit figures --only quality --only kept` makes this table and the next. The verdict is about the limit that
    `m0kit evaluate` holds a precision to: 0.1 points in 16 bits, 0.2 in int8, 1 in int4 and nf4. The rows with
    calibration are of artifacts that were exported with `--calibrate` on training pairs of texts, code and pages. The
    checkpoints are stored in 16 bits.
    """
    calibration = _calibration(shop)
    kinds = [(precision, "") for precision in SCHEMES]
    kinds += [(precision, "calibrated") for precision in ("int8", "int4", "nf4")]
    labels = [" ".join(filter(None, kind)) for kind in kinds]
    sets, parts = shop.sets(), []
    for model, called in RANKED.items():
        artifacts = [
            shop.artifact(model, precision, calibration=calibration if name else None) for precision, name in kinds
        ]
        found, _ = compare(artifacts, sets, {}, threads=shop.threads, speed=False)
        rows = [[called, "nDCG@10", "lost", "verdict", "largest Δ", "mean Δ", "Spearman", "same first"]]
        lost, changed = ([[f"{called}: {what}", *sets]] for what in ("lost", _CHANGES))
        for label, measured in zip(labels, found.artifacts, strict=True):
            q = measured.quality[ALL]
            cells = [shown(q.ndcg, ".4f"), _lost(q), found.verdict(measured) or "–"]
            rows.append([label, *cells, *_changes(q)])
            each = [measured.quality[name] for name in sets]
            lost.append([label, *map(_lost, each)])
            changed.append([label, *(" / ".join(_changes(q)) for q in each)])
        parts += [rows, lost, changed]
    counted = ", ".join(f"{len(queries)} {name}" for name, queries in sets.items())
    told = f"{found.sets[ALL]} queries of ten documents ({counted}); calibrated on {3 * shop.sizes.calibration} pairs."
    return Found([*parts, told])


def kept(shop: Workshop) -> Found:
    """What keeping documents costs in ranking

    Keys and values of documents kept in half precision or in bytes, against the same artifact with them as they are
    computed: points of nDCG@10 lost (negative: gained) with the 95 % interval, and mean change of a score
    (`m0kit evaluate ARTIFACT --kv fp16 --kv int8 --draw 1700 --no-speed`). The change in int8 and int4 artifacts is
    their own rounding amplifying a difference.
    """
    decoder = model_config("full").decoder
    values = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
    sizes = [(kv, f"{values * size // 1024} KiB") for kv, size in (("fp32", 4), ("fp16", 2), ("int8", 1))]
    sets, parts = shop.sets(), [[["kept in", "a token of the published model"], *map(list, sizes)]]
    for model, called in RANKED.items():
        rows = [[called, *(f"{kv}: {what}" for kv in ("fp16", "int8") for what in ("lost", "mean Δ"))]]
        for precision in SCHEMES:
            artifact = shop.artifact(model, precision)
            found, _ = compare([artifact], sets, {}, threads=shop.threads, speed=False, kvs=("fp16", "int8"))
            sides = [measured.quality[ALL] for measured in found.artifacts[1:]]
            rows.append([precision, *(cell for q in sides for cell in (_lost(q), shown(q.mean_delta, ".5f")))])
        parts.append(rows)
    return Found([*parts, f"{found.sets[ALL]} queries of ten documents."])


def answers(shop: Workshop) -> Found:
    """Known answers

    What it costs to score an artifact's known answers, which is done once for each combination of artifact, ONNX
    Runtime, CPU and settings, and how far their logits are off here of what is allowed (`m0kit doctor ARTIFACT`).
    """
    rows = [["artifact", "answers", "seconds", "a logit is off by", "allowed", "used"]]
    made: list[tuple[Model, str]] = [("small", precision) for precision in SCHEMES]
    made += [("big", precision) for precision in ("fp32", "int8", "int4")]
    for model, precision in made:
        with Reranker.load(shop.artifact(model, precision), threads=shop.threads) as reranker:
            start = time.perf_counter()
            found = reranker.try_answers(again=True)
            seconds = time.perf_counter() - start
        worst = max(found, key=lambda answer: answer.used)
        cells = [f"{seconds:.2f}", f"{worst.off:.2g}", f"{worst.tolerance:.2g}", f"{worst.used:.1%}"]
        rows.append([f"{_named(shop, model)}, {precision}", str(len(found)), *cells])
    return Found([rows])


def reuse(shop: Workshop) -> Found:
    """Documents that were read once

    Seconds per document of a new query on a document that is kept in fp16, against the same pair computed anew and
    against transformers fp32; the suffix is the query's own tokens and the score token. Then an index of pages on disk,
    and how fast texts are read into one (`m0kit bench reuse m0-int8/ --checkpoint full/`).
    """
    sizes = shop.sizes
    parts = ("cached", "disk", "indexing")
    results = reuse_parts(
        shop.artifact("big", "int8"), parts, checkpoint=shop.checkpoint("big"), kv="fp16", documents=sizes.documents,
        pages=sizes.pages, max_tokens=sizes.tokens, repeats=sizes.repeats, page_repeats=1, threads=shop.threads,
    )  # fmt: skip
    return Found([*tables(results), f"int8. {_layers(shop)}"])


def reuse_growth(shop: Workshop) -> Found:
    """How reading once grows

    The same artifact: more documents, more queries, longer documents, and a cache that holds a part of the documents
    (`m0kit bench reuse m0-int8/ --only growth --plot docs/reuse.svg`).
    """
    results = reuse_parts(
        shop.artifact("big", "int8"), ["growth"], kv="fp16", documents=shop.sizes.documents, pages=1,
        max_tokens=shop.sizes.tokens, repeats=1, page_repeats=1, threads=shop.threads,
    )  # fmt: skip
    return Found([*tables(results), f"int8, a suffix of 12 tokens. {_layers(shop)}"], charts(results))


def many_pairs(shop: Workshop) -> Found:
    """Very many pairs in one call

    Each query on each document of the small checkpoint in fp32, and the memory of the process meanwhile
    (`m0kit bench reuse small-fp32/ --only many`).
    """
    shop.export("small", "fp32")  # in another process: what PyTorch leaves in this one would be counted
    artifact = shop.place("small", "fp32")
    return Found(tables({"many": many(artifact, queries=shop.sizes.asked, documents=DOCUMENTS, threads=shop.threads)}))


def small_machine(shop: Workshop) -> Found:
    """On a small machine

    int8 weights with `--memory low` and states in int8: `m0kit index add` of texts of 700 tokens, then a whole
    `m0kit rerank --index` on all of them, starting included. Peaks count the mapped weights and the mapped index.
    """
    artifact, folder = shop.artifact("big", "int8"), shop.scratch / "texts"
    folder.mkdir()
    prompts, count = prompts_of(artifact), 24
    for i in range(count):
        (folder / f"{i}.txt").write_text(text_document(prompts, min(700, shop.sizes.tokens), i), "utf-8")
    index, low = shop.scratch / "library", ("--memory", "low", "--threads", shop.threads)
    rows = [["command", "seconds", "peak MiB"]]
    added = run_m0kit("index", "add", artifact, index, folder, "--kv", "int8", *low)
    asked = run_m0kit("rerank", artifact, "--index", index, "--query", "small language model", *low)
    rows += [[f"m0kit index add, {count} texts", *_cost(added)], ["m0kit rerank --index", *_cost(asked)]]
    return Found([rows, f"int8. {_layers(shop)}"])


def memory(shop: Workshop) -> Found:
    """Memory as the work grows

    One pair, a fresh process for each point, fp32. The peak counts pages of the mapped weights, which the system takes
    back when memory is short; *private* is what scoring needs of its own
    (`m0kit bench memory m0-fp32 --plot docs/memory.svg`).
    """
    (tokens, visual), artifact = shop.sizes.memory, shop.artifact("big", "fp32")
    measured, failed = growing.memory(
        artifact, max_tokens=tokens, max_visual_tokens=visual, mode="fast", threads=shop.threads
    )
    notes = [error for errors in failed.values() for error in errors.values()]
    return Found([*growing.memory_tables(measured, failed), *notes, _layers(shop)], growing.memory_charts(measured))


def seconds(shop: Workshop) -> Found:
    """Seconds as the work grows

    The same artifact (`m0kit bench growth m0-fp32 --repeats 1 --plot docs/growth.svg`).
    """
    (tokens, visual), artifact = shop.sizes.seconds, shop.artifact("big", "fp32")
    measured = growing.seconds(artifact, max_tokens=tokens, max_visual_tokens=visual, repeats=1, threads=shop.threads)
    return Found([*growing.seconds_tables(measured), _layers(shop)], growing.seconds_charts(measured))


def parity(shop: Workshop) -> Found:
    """Parity

    Largest share of each fp32 tolerance used over the built-in cases (`m0kit parity run CHECKPOINT ARTIFACT`). Token
    ids, positions and patches must be equal to the bit, and every ranking the reference's.
    """
    rows = [["", "pairs", *(stage.replace("_", " ") for stage in _STAGES), "verdict"]]
    models: tuple[tuple[str, Model, str], ...] = (
        (f"{_named(shop, 'big')}: random", "big", ""),
        ("small: trained, with its `code` adapter", "small", "code"),
    )
    options = [word for case in shop.sizes.cases for word in ("--cases", case)]
    for label, model, adapter in models:
        artifact = shop.artifact(model, "fp32", adapter=adapter)
        adapters = ["--adapter", SMALL / "adapters" / adapter] if adapter else []
        words = [shop.checkpoint(model), artifact, *adapters, *options, "--threads", shop.threads, "--json"]
        report = json.loads(run_m0kit("parity", "run", *words).output)
        found = [pair for case in report["cases"] for pair in case["pairs"]]
        stages = [stage for pair in found for stage in pair["stages"]]
        shares = [max(stage["share"] for stage in stages if stage["stage"] == name) for name in _STAGES]
        rows.append([label, str(len(found)), *(f"{share:.1%}" for share in shares), report["verdict"]])
    return Found([rows, f"Cases: {', '.join(shop.sizes.cases) or 'all'}."])


def ranking(shop: Workshop) -> Found:
    """Ranking

    nDCG@10 of the embedded trained checkpoint on held-out queries with ten candidates, without and with its adapters
    (`m0kit bench ranking ARTIFACT`). BM25 sees no pages. It was trained in an hour on two cores by
    `python -m m0kit_parity.small.train`; its log and scores are beside it.
    """
    found = {}
    for name in ("", "code", "score"):
        label = f"+ `{name}` adapter" if name else "base"
        found[label] = rank(shop.artifact("small", "fp32", adapter=name), shop.threads, shop.sizes.queries)
    base = found["base"]
    rows = [["", *base], ["queries", *(f"{base[kind]['queries']:.0f}" for kind in base)]]
    sides = [("chance", "chance", base), ("BM25", "bm25", base), *((label, "m0kit", found[label]) for label in found)]
    rows += [[label, *(f"{sets[kind][side]:.3f}" for kind in sets)] for label, side, sets in sides]
    return Found([rows])


def installed(_shop: Workshop) -> Found:
    """Installed size

    After `pip install 'm0kit[cpu]'`, with all that it brings; pip and setuptools are not counted, nor what Python
    compiles.
    """
    sizes = dict(sorted(_sizes("m0kit[cpu]").items(), key=lambda item: -item[1]))
    most = list(sizes)[:6]
    others = sum(size for name, size in sizes.items() if name not in most)
    told = [*((name, sizes[name]) for name in most), (f"{len(sizes) - len(most)} others", others)]
    told.append(("together", sum(sizes.values())))
    return Found([[["package", "MB"], *([name, f"{size / 1e6:.1f}"] for name, size in told)]])


FIGURES: Final[Mapping[str, Callable[[Workshop], Found]]] = {
    "pairs": pairs,
    "precisions": precisions,
    "depth": depth,
    "quality": quality,
    "kept": kept,
    "reuse": reuse,
    "reuse-growth": reuse_growth,
    "many": many_pairs,
    "small-machine": small_machine,
    "memory": memory,
    "growth": seconds,
    "parity": parity,
    "ranking": ranking,
    "answers": answers,
    "installed": installed,
}
PLOTS: Final = {"reuse-growth": "reuse.svg", "memory": "memory.svg", "growth": "growth.svg"}


def text_of(name: str) -> tuple[str, str]:
    """Title of a figure, and what the page says of it."""
    title, _, text = (FIGURES[name].__doc__ or "").partition("\n")
    return title, "\n".join(line.strip() for line in text.strip().split("\n"))


def measure(name: str, shop: Workshop, folder: Path) -> tuple[Parts, list[str]]:
    """The parts of a figure, and its plot, which goes into `folder`."""
    shop.forget(shop.scratch)  # of a run that was ended
    shop.scratch.mkdir()
    found = FIGURES[name](shop)
    shop.forget(shop.scratch)
    if not found.charts:
        return found.parts, []
    write_plot(folder / PLOTS[name], found.charts)
    return found.parts, [PLOTS[name]]


# --- what several of them need -------------------------------------------------------------------------


def _side_by_side(
    shop: Workshop, checkpoint: Path, artifacts: Mapping[str, Path], only: Sequence[str], peers: Sequence[str],
    repeats: int,
) -> Parts:  # fmt: skip
    """A row for each side, a column for each workload; below it what failed."""
    loads = workloads(prompts_of(next(iter(artifacts.values()))), only)
    results = whole_pairs(
        checkpoint, artifacts, loads, peers=peers, repeats=repeats, threads=shop.threads, scratch=shop.scratch / "peers"
    )
    cells: dict[tuple[str, str], str] = {}
    for r in results:
        cells[r.side, r.workload] = f"{r.seconds:.3f} s, {r.ratio:.2f}×" if isinstance(r, Timing) else "failed"
    labels = {name: name if name == TORCH or name in peers else f"m0kit {name}" for name, _ in cells}
    rows = [["", *loads]]
    rows += [[label, *(cells.get((side, load), "–") for load in loads)] for side, label in labels.items()]
    return [rows, *dict.fromkeys(r.error for r in results if isinstance(r, Missing))]


def _memory(shop: Workshop, artifact: Path, loads: Mapping[str, Sequence[Pair]], mode: str) -> list[Memory]:
    return [measure_memory(artifact, load, shop.threads, mode=mode) for load in loads.values()]


def _calibration(shop: Workshop) -> Path:
    """Training pairs of texts, code and pages, as many of each."""
    folder, rng = shop.folder / "calibration", random.Random(0)
    folder.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = []
    for i in range(shop.sizes.calibration):
        for group in (corpus.text_group(rng, corpus.MAX_LEVEL, 2), corpus.code_group(rng, 2)):
            lines.append({"query": group.query, "document": group.documents[0]})
        drawn = pages.page_group(rng, 2, hard=True)
        page = evaluate.draw_group(drawn, str(i), evaluate.EVALUATION_LOOK)[0]
        page.save(folder / f"{i}.png")
        lines.append({"query": drawn.queries[0], "document": {"image": f"{i}.png"}})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def _lost(quality: Quality) -> str:
    """Points, and their interval."""
    if quality.loss is None:
        return "–"
    return shown(quality.loss, ".2f") + (f" {span(quality.interval)}" if quality.interval else "")


def _changes(quality: Quality) -> list[str]:
    """In the order of `_CHANGES`."""
    q = quality
    deltas = [shown(q.max_delta, ".4f"), shown(q.mean_delta, ".4f")]
    return [*deltas, shown(q.spearman, ".3f"), shown(q.same_first, ".1%")]


def _installed(packages: Mapping[str, str]) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def _sizes(requirement: str) -> dict[str, int]:
    """Bytes of each installed package that a requirement brings, but for pip's and Python's own."""
    sizes: dict[str, int] = {}
    wanted = [(Requirement(requirement))]
    while wanted:
        this = wanted.pop()
        found = distribution(this.name)
        if found.name in sizes and not this.extras:
            continue
        sizes[found.name] = _bytes_of(found)
        for line in found.requires or ():
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in (this.extras or {""})):
                wanted.append(needed)
    return sizes


def _bytes_of(found: Distribution) -> int:
    """Of its files as installed; of m0kit, which may be installed from its source, those of its packages."""
    files = [Path(str(file.locate())) for file in found.files or ()]
    if found.name == "m0kit":
        import m0kit
        import m0kit_export
        import m0kit_parity
        import m0kit_quant

        folders = [Path(str(package.__file__)).parent for package in (m0kit, m0kit_export, m0kit_quant, m0kit_parity)]
        files = [path for folder in folders for path in folder.rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file() and path.suffix != ".pyc")


def _cost(ran: Ran) -> list[str]:
    return [f"{ran.seconds:.1f}", f"{ran.peak:.0f}"]


def _gigabytes(artifact: Path) -> float:
    return read_manifest(artifact).num_bytes / 1e9


def _layers(shop: Workshop) -> str:
    config = model_config(shop.sizes.big)
    return f"{config.decoder.num_layers} decoder layers and {config.vision.depth} vision blocks."


def _named(shop: Workshop, model: Model) -> str:
    return "small" if model == "small" else f"{shop.sizes.big}, {_layers(shop).rstrip('.')}"
