"""Whether the device computes the right numbers: every precision against PyTorch, and documents that are kept.

Owns the pairs, and what is compared with what. A golden is the reference in float32 (on the device without TF32). An
artifact is held against two: the checkpoint, which shows what the precision costs, and its own weights as they are
decoded again, which shows what the kernels cost.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from m0kit.artifact.manifest import read_manifest
from m0kit.errors import M0kitError
from m0kit.scoring.prompt import PromptBuilder
from m0kit_parity.bench.workloads import QUERY, Pair, prompts_of, text_of
from m0kit_parity.drawing.table import shown
from m0kit_parity.gpu.found import Found
from m0kit_parity.gpu.place import Place, Size
from m0kit_parity.gpu.sides import exact, let_go, logits_of
from m0kit_parity.proof.cases import draw_page
from m0kit_parity.proof.tolerances import tolerances
from m0kit_parity.small.evaluate import read_set
from m0kit_parity.small.files import SMALL

PRECISIONS: Final = ("fp16", "bf16", "int8", "int4", "nf4")
_LENGTHS: Final = (64, 257, 777, 1024, 3000)  # tokens of a prompt; and as short as one can be
_QUERIES: Final = ("slm markdown", "which page shows the report of small language models?")
Float64 = NDArray[np.float64]
# Several artifacts are opened one after the other in a process: each would take all of the GPU's memory.
_SMALL_POOL: Final = {"pool_bytes": 1 << 30}


def pairs_of(artifact: Path, size: Size, longest: int) -> list[Pair]:
    """Texts and images on both sides, from as few tokens as a prompt has to `longest`."""
    if size == "small":  # what it was trained on, which spreads its logits
        items = [item for kind in ("text", "code", "pages", "across") for item in read_set(SMALL / "eval", kind)[:3]]
        trained: list[Pair] = [(item.query, document) for item in items for document in item.documents[:4]]
    else:
        trained = []
    prompts = prompts_of(artifact)
    pages = [_page(seed, tokens) for seed, tokens in enumerate((16, 96, 300, 768)) if tokens <= longest]
    pairs: list[Pair] = [("7", "a")]
    for query in _QUERIES:
        pairs += [(query, text(prompts, n, n, query)) for n in _LENGTHS if n <= longest]
        pairs += [(query, page) for page in pages]
    pairs += [(page, words) for page in pages[:2] for words in ("a text about language models", "another text " * 90)]
    pairs += [(pages[0], page) for page in pages[1:]]
    return trained + pairs


def text(prompts: PromptBuilder, tokens: int, seed: int, query: str = QUERY) -> str:
    """A document that makes a prompt of so many tokens with the query, or of as few as there can be."""
    shortest = len(prompts.build(query, "7").token_ids)
    return text_of(prompts, max(tokens, shortest), seed, query)


def _page(seed: int, visual_tokens: int) -> Any:
    rows = max(r for r in range(1, visual_tokens + 1) if visual_tokens % r == 0 and r * r <= 2 * visual_tokens)
    return draw_page([f"page {seed}", "of a report"], (28 * visual_tokens // rows, 28 * rows), seed)


# --- goldens -------------------------------------------------------------------------------------------


def open_golden() -> Callable[..., list[float]]:
    """Runs in its process: the reference, one checkpoint after the other."""
    import torch

    exact(torch)
    loaded: dict[Path, Any] = {}
    return partial(_golden, loaded)


def _golden(
    loaded: dict[Path, Any], checkpoint: Path, pairs: Sequence[Pair], device: str, artifact: Path | None = None,
    dtype: str = "float32",
) -> list[float]:  # fmt: skip
    """Raw logits of a checkpoint; `artifact`: with the weights of that."""
    import torch

    from m0kit_parity.gpu.sides import change
    from m0kit_parity.reference import Reference

    if checkpoint not in loaded:
        loaded.clear()
        loaded[checkpoint] = Reference.load(checkpoint)
    reference = loaded[checkpoint]
    reference.core.to(device)
    reference.head.to(device)
    if artifact is not None:
        _take_weights(reference, artifact)
    change(reference, dtype)
    found: list[float] = reference.score(pairs, raw=True).tolist()
    if artifact is not None or dtype != "float32":
        loaded.clear()  # its weights are others now
    if device != "cpu":
        torch.cuda.empty_cache()
    return found


def _take_weights(reference: Any, artifact: Path) -> None:
    """Every weight as the artifact's files hold it."""
    import torch

    from m0kit_export.graphs import build_graphs
    from m0kit_export.stored import StoredWeights
    from m0kit_parity.reference import PublishedNames
    from m0kit_quant.recipe import Recipe

    manifest = read_manifest(artifact)
    stored = StoredWeights(artifact, build_graphs(manifest.model, Recipe.from_dict(manifest.recipe, str(artifact))))
    shell = PublishedNames(reference.core, reference.head)
    with torch.no_grad():
        for name in stored.weights:
            target = shell.get_parameter(name)
            target.copy_(torch.from_numpy(np.ascontiguousarray(stored.read(name))).reshape(target.shape))


# --- parity --------------------------------------------------------------------------------------------


def open_scoring() -> Callable[..., list[float]]:
    """Runs in its process: m0kit, one artifact after the other."""
    return _logits


def _logits(artifact: Path, device: str, options: Mapping[str, Any], pairs: Sequence[Pair]) -> list[float]:
    from m0kit.reranker import Reranker

    with Reranker.load(artifact, device=device, **options) as reranker:
        return logits_of(reranker, pairs)


def parity(place: Place, sizes: Sequence[Size]) -> Found:
    """Logits of every precision on checkpoints of these sizes against PyTorch."""
    artifacts = place.artifacts(sizes, PRECISIONS)
    pairs = {size: pairs_of(artifacts[size, PRECISIONS[0]], size, 3000 if place.on_gpu else 300) for size in sizes}
    goldens: dict[tuple[Size, str], Float64] = {}
    with place.process("PyTorch", open_golden) as ask:
        for size in sizes:
            checkpoint = place.checkpoint(size)
            # The CPU where that takes seconds; the wide one would take it a minute.
            goldens[size, ""] = np.asarray(ask(checkpoint, pairs[size], place.device if size == "wide" else "cpu"))
            if place.on_gpu:  # what transformers itself makes of 16 bits, to judge the figures by
                for dtype in ("float16", "bfloat16"):
                    goldens[size, dtype] = np.asarray(ask(checkpoint, pairs[size], place.device, None, dtype))
            for precision in PRECISIONS:
                artifact = artifacts[size, precision]
                goldens[size, precision] = np.asarray(ask(checkpoint, pairs[size], place.device, artifact))
            place.tell(f"goldens of {size} are there")
    found: dict[tuple[Size, str, str], Float64 | str] = {}
    wanted = [(size, p, place.device) for p in PRECISIONS for size in sizes]
    if place.on_gpu:
        few = [precision for precision in PRECISIONS if precision not in ("fp16", "bf16")]
        wanted += [(size, p, "cpu") for p in few for size in sizes if size != "wide"]
    while wanted:
        with place.process("m0kit", open_scoring) as ask:
            while wanted and ask.alive:
                size, precision, device = key = wanted.pop(0)
                try:
                    options = _SMALL_POOL if device != "cpu" else {}
                    logits = ask(artifacts[size, precision], device, {**place.options, **options}, pairs[size])
                    found[key] = np.asarray(logits)
                except M0kitError as error:  # a process that is over is started again for the next
                    found[key] = str(error)
                    place.tell(f"{size} {precision} on {device}: {error}")
    return judged(place, sizes, {size: len(pairs[size]) for size in sizes}, goldens, found)


def judged(
    place: Place, sizes: Sequence[Size], counts: Mapping[Size, int],
    goldens: Mapping[tuple[Size, str], Float64], found: Mapping[tuple[Size, str, str], Float64 | str],
) -> Found:  # fmt: skip
    """Logits by size, precision and device, or why there are none, held against the goldens of the checkpoints ("" in
    place of a precision), of their own weights, and of transformers in 16 bits where those are there."""
    heading = ["logits", "precision", "pairs", "max Δ", "rms Δ", "Spearman", "own weights", "CPU", "limit"]
    rows: list[list[str]] = [heading]
    facts: dict[str, Any] = {}
    wrong: list[str] = []
    for size in sizes:
        golden, count = goldens[size, ""], counts[size]
        for precision in PRECISIONS:
            logits, name = found[size, precision, place.device], f"{size} {precision}"
            if isinstance(logits, str):
                wrong.append(f"{name}: {logits}")
                rows.append([size, precision, str(count), "failed", *[""] * 5])
                continue
            own, cpu = goldens[size, precision], found.get((size, precision, "cpu"))
            limit = kernel_limit(precision, place.on_gpu)
            about = _compared(logits, golden, own, cpu if place.on_gpu and not isinstance(cpu, str) else None)
            rows.append(_row(size, precision, count, about, limit))
            facts[name] = {**about, "limit": limit, "logits": logits.tolist(), "golden": golden.tolist(),
                           "own weights": own.tolist()}  # fmt: skip
            if not _off(logits, own) <= limit:
                wrong.append(f"{name}: {_off(logits, own):.3f} off what its own weights give; {limit:g} is allowed")
            trained = max(tolerances(precision)["logit"].limit, limit)  # made for weights that mean something
            if size == "small" and not _off(logits, golden) <= trained:
                wrong.append(f"{name}: {_off(logits, golden):.3f} off the checkpoint; {trained:g} is allowed")
        for dtype in ("float16", "bfloat16"):
            if (size, dtype) in goldens:
                about = facts[f"{size} transformers {dtype}"] = _compared(goldens[size, dtype], golden, None, None)
                rows.append(_row(size, f"transformers {dtype}", count, about, None))
    return Found([rows], facts, wrong)


def kernel_limit(precision: str, on_gpu: bool) -> float:
    """How far a logit may be off what PyTorch in float32 makes of the very same weights.

    On a GPU products are of 16 bits whatever the weights are, so the limit is that of fp16, the noise between two runs
    of the published model; bf16 has 3 bits less, so eight times that. On a CPU int8 and int4 round activations, which
    the tables of parity allow for, and the others do not round them more than fp16 does.
    """
    half = tolerances("fp16")["logit"].limit
    if on_gpu:
        return 8 * half if precision == "bf16" else half
    return tolerances(precision)["logit"].limit if precision in ("int8", "int4") else half


def _compared(found: Float64, golden: Float64, own: Float64 | None, cpu: Float64 | None) -> dict[str, float | None]:
    return {
        "max": _off(found, golden),
        "rms": float(np.sqrt(np.mean((found - golden) ** 2))),
        "spearman": spearman(found, golden),
        "own": None if own is None else _off(found, own),
        "cpu": None if cpu is None else _off(found, cpu),
    }


def _off(a: Float64, b: Float64) -> float:
    return float(np.abs(a - b).max())


def _row(size: str, precision: str, count: int, about: Mapping[str, float | None], limit: float | None) -> list[str]:
    cells = [shown(about[name], ".5f") for name in ("max", "rms", "spearman", "own", "cpu")]
    return [size, precision, str(count), *cells, shown(limit, "g")]


def spearman(a: Float64, b: Float64) -> float:
    """Correlation of ranks; equal values share the middle of theirs."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Float64) -> Float64:
    order = np.sort(values)
    return np.asarray((np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right")) / 2)


# --- documents that are kept ---------------------------------------------------------------------------


def exactness(place: Place) -> Found:
    """A pair's logit by every way on which it may be computed, against the pair alone and nothing kept."""
    rows: list[list[str]] = [["kept documents", "way", "logits", "equal to the bit", "max Δ"]]
    facts: dict[str, Any] = {}
    wrong: list[str] = []
    limit = tolerances("fp16")["logit"].limit  # of what 16 bits may cost altogether
    for precision in ("fp16", "int4"):
        artifact = place.artifact(place.size, precision)
        make = partial(open_ways, artifact, place.device, place.options)
        with place.process(f"{artifact.name}, every way", make) as ask:
            ways = {way: np.asarray(found) for way, found in ask(place.on_gpu).items()}
        base = ways.pop("alone")
        for way, found in ways.items():
            off, equal = _off(found, base), int(np.sum(found == base))
            facts[f"{precision}, {way}"] = {"logits": len(base), "equal": equal, "max": off}
            rows.append([precision, way, str(len(base)), str(equal), f"{off:.3g}"])
            if not off <= limit:
                wrong.append(f"{precision}, {way}: a logit is off by {off:.3g}; {limit:g} is allowed")
    return Found([rows], facts, wrong)


def open_ways(artifact: Path, device: str, options: Mapping[str, Any]) -> Callable[[bool], dict[str, list[float]]]:
    """Runs in its process."""
    from m0kit.reranker import Reranker

    return partial(_ways, Reranker.load(artifact, device=device, cache_bytes=8 << 30, **options), artifact)


def _ways(reranker: Any, artifact: Path, on_gpu: bool) -> dict[str, list[float]]:
    prompts = prompts_of(artifact)
    lengths, visual = ((40, 130, 777, 1500), (96, 768)) if on_gpu else ((40, 130), (12,))
    documents = [text(prompts, n, n) for n in lengths] + [_page(50 + n, n) for n in visual]
    pairs = [(query, document) for document in documents for query in (QUERY, "what does page 7 say of the report?")]
    rng = random.Random(1)
    longest = 400 if on_gpu else 60
    company = [("another query", text(prompts, rng.randint(40, longest), 90 + i)) for i in range(50)]

    def alone(pair: Pair, kept: bool) -> float:
        if not kept:
            let_go(reranker)
        return logits_of(reranker, [pair])[0]

    def together() -> list[float]:
        half = len(company) // 2
        scores = logits_of(reranker, [*company[:half], *pairs, *company[half:]])
        return list(scores[half : half + len(pairs)])

    found = {"alone": [alone(pair, kept=False) for pair in pairs]}
    found["alone once more"] = [alone(pair, kept=False) for pair in pairs]
    let_go(reranker)
    found["in company of 50"] = together()
    let_go(reranker)
    found["two queries on each document"] = logits_of(reranker, pairs)
    let_go(reranker)
    logits_of(reranker, [("yet another query", document) for document in documents])
    found["on kept documents"] = [alone(pair, kept=True) for pair in pairs]
    found["on kept documents, in company"] = together()
    found["two queries on each kept document"] = logits_of(reranker, pairs)
    # Room for one or two of them: each comes back after it had to go.
    state_bytes = 2 * 2 * 2 * reranker.config.decoder.num_layers * reranker.config.decoder.kv_size * max(lengths)
    let_go(reranker)
    reranker.cache.max_bytes = int(1.5 * state_bytes)
    for _ in range(2):
        found["after they had to go"] = [alone(pair, kept=True) for pair in pairs]
    return found
