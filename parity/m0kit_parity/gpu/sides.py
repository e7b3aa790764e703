"""The two sides that are compared, each in a process of its own: an artifact in m0kit, a checkpoint in transformers.

Owns what is asked of them there, and their clocks. Both score the same pairs; transformers' side is the published
call, batches of 8 padded on the left, sdpa attention, with positions made on the CPU.

    with place.process("m0kit", partial(open_m0kit, artifact, "cuda", {})) as ask:
        ask("score", pairs, 3)                      # {"seconds": [...], "logits": [...]}
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from m0kit_parity.bench.workloads import Pair

if TYPE_CHECKING:
    import torch

    from m0kit.reranker import Reranker
    from m0kit.scoring.schedule import Result
    from m0kit_parity.reference import Reference

Asked = Callable[..., dict[str, Any]]

BATCH: Final = 8  # of transformers
_SQUARE: Final = 8192  # of the product by which a card's rate is measured: 137 GFLOP in fp16 pass in 0.17 ms


def median(seconds: Sequence[float]) -> float:
    """Of the turns that count."""
    return statistics.median(seconds)


# --- m0kit ---------------------------------------------------------------------------------------------


def open_m0kit(artifact: Path, device: str, options: dict[str, Any]) -> Asked:
    """Runs in its process: opens the artifact, and answers by the name of what is asked."""
    from m0kit.reranker import Reranker

    start = time.perf_counter()
    reranker = Reranker.load(artifact, device=device, **options)
    opened = time.perf_counter() - start
    known: dict[str, Asked] = {
        "score": partial(_score, reranker),
        "prepared": partial(_prepared, reranker),
        "resident": partial(_resident, reranker),
        "held": partial(_held, reranker),
        "index": partial(_index, reranker),
        "opened": lambda: {"seconds": opened},
    }
    return partial(_ask, known)


def _ask(known: dict[str, Asked], what: str, *arguments: Any) -> dict[str, Any]:
    return known[what](*arguments)


def _score(reranker: "Reranker", pairs: Sequence[Pair], repeats: int) -> dict[str, Any]:
    """Logits, and seconds of each turn after one that does not count: from strings and images to logits."""
    seconds: list[float] = []
    logits: list[float] = []
    for turn in range(repeats + 1):
        let_go(reranker)
        new = [_another(pair, turn) for pair in pairs]
        start = time.perf_counter()
        found = logits_of(reranker, new)
        seconds.append(time.perf_counter() - start)
        logits = logits or found
    return {"seconds": seconds[1:] or seconds, "logits": logits}


def _another(pair: Pair, turn: int) -> Pair:
    """A pair as long on another text, of whose tokens nothing is remembered; the pair itself at turn 0."""
    query, document = pair
    return (query, f"{document[:-1]}{turn}") if turn and isinstance(document, str) else pair


def logits_of(reranker: "Reranker", pairs: Sequence[Pair]) -> list[float]:
    """NaN for a pair whose answer is not finite, so that it costs the others nothing."""
    found: list[float] = reranker.score(pairs, raw=True, on_error="mark").tolist()
    return found


def let_go(reranker: "Reranker") -> None:
    """Keep nothing of the documents that were read, so that they are read again."""
    while reranker.cache is not None and reranker.cache.drop_least():
        pass


def _prepared(reranker: "Reranker", pairs: Sequence[Pair], repeats: int) -> dict[str, Any]:
    """Seconds from prompts and decoded, resized images to logits, and the operations that the pairs take."""
    from m0kit_parity.gpu.work import prepared_flops

    seconds, flops = [], 0.0
    for _ in range(repeats + 1):
        let_go(reranker)
        preparer, schedule = reranker.begin()
        ready = [preparer.prepare(pair) for pair in pairs]
        flops = sum(prepared_flops(reranker.config, one) for one in ready)
        for one in ready:
            for image in (*one.document.images, *one.images):
                image.pixels()
        start = time.perf_counter()
        for one in ready:
            schedule.add(one)
        while len(schedule):
            schedule.step()
        seconds.append(time.perf_counter() - start)
        schedule.close()
    return {"seconds": seconds[1:] or seconds, "flops": flops}


def _resident(reranker: "Reranker", contents: Sequence[Any], queries: Sequence[str]) -> dict[str, Any]:
    """Seconds and logits of each query on all documents, given to `score` anew; the first one reads them."""
    seconds, logits = [], []
    for query in queries:
        start = time.perf_counter()
        logits.append(logits_of(reranker, [(query, content) for content in contents]))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "logits": logits, "counters": counters(reranker.engine)}


def _held(reranker: "Reranker", contents: Sequence[Any], queries: Sequence[str]) -> dict[str, Any]:
    """The same by a caller that goes on with one preparer, and holds pairs on the documents, as a service would."""
    preparer, schedule = reranker.begin()
    held: list[Any] = []  # what is held is not looked at again
    seconds, logits = [], []
    for query in queries:
        start = time.perf_counter()
        ready = [preparer.prepare((query, content)) for content in contents]
        tickets = [schedule.add(one) for one in ready]
        found: dict[int, Result] = {}
        while len(schedule):
            found.update(schedule.step())
        seconds.append(time.perf_counter() - start)
        logits.append([found[ticket].logit for ticket in tickets])
        held = ready
    schedule.close()
    return {"seconds": seconds, "logits": logits, "documents": len(held)}


def _index(reranker: "Reranker", folder: Path, contents: Sequence[Any]) -> dict[str, Any]:
    """Write an index of the documents, named by their numbers."""
    from m0kit.index import add, open_index

    start = time.perf_counter()
    with open_index(folder, reranker) as store:
        done = add(reranker, store, [(str(i), content, "") for i, content in enumerate(contents)])
    return {"seconds": time.perf_counter() - start, "read": done.read, "failed": done.failed}


def counters(engine: Any) -> dict[str, float]:
    """Numbers that an engine counts, whatever it counts."""
    found = {}
    for name in dir(engine):
        value = None if name.startswith("_") else getattr(engine, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


# --- transformers --------------------------------------------------------------------------------------


def open_transformers(checkpoint: Path, device: str, dtype: str) -> Asked:
    """Runs in its process: opens the checkpoint in PyTorch's type of that name."""
    import torch

    from m0kit_parity.reference import Reference

    exact(torch)
    reference = Reference.load(checkpoint, dtype=getattr(torch, dtype), device=device)
    known: dict[str, Asked] = {
        "score": partial(_torch_score, reference),
        "model": partial(_torch_model, reference),
        "rate": partial(_rate, reference),
        "change": partial(change, reference),
    }
    return partial(_ask, known)


def exact(torch: Any) -> None:
    """Products in float32 are that: no TF32, in the convolution of patches neither."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def change(reference: "Reference", dtype: str) -> dict[str, Any]:
    """Every weight in PyTorch's type of that name; rotary frequencies stay float32."""
    import torch

    for parameter in (*reference.core.parameters(), *reference.head.parameters()):  # not the rotary frequencies
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return {}


def _torch_score(reference: "Reference", pairs: Sequence[Pair], repeats: int, batch: int = BATCH) -> dict[str, Any]:
    """Logits and seconds of each turn after one that does not count; with no turns that one, of the pairs alone."""
    seconds: list[float] = []
    logits: list[float] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        logits = []
        for first in range(0, len(pairs), batch):
            feeds = reference.feeds([reference.inputs(pair) for pair in pairs[first : first + batch]])
            logits += reference.logits(reference.hidden(feeds)).tolist()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:] or seconds, "logits": logits}


def _torch_model(reference: "Reference", pairs: Sequence[Pair], repeats: int) -> dict[str, Any]:
    """Seconds of the model alone, from token ids and pixel values that are on the device already to logits."""
    chunks = [pairs[first : first + BATCH] for first in range(0, len(pairs), BATCH)]
    ready = [reference.feeds([reference.inputs(pair) for pair in chunk]) for chunk in chunks]
    seconds: list[float] = []
    logits: list[float] = []
    for _ in range(repeats + 1):
        _wait(reference.device)
        start = time.perf_counter()
        queued = [reference.logits(reference.hidden(feeds)) for feeds in ready]
        logits = [logit for one in queued for logit in one.tolist()]
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:] or seconds, "logits": logits}


def _wait(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(reference: "Reference", dtype: str, square: int | None = None) -> dict[str, Any]:
    """The device's rate on a large product, operations a second: the best of five rounds of ten."""
    import torch

    n = square or (_SQUARE if reference.device.type == "cuda" else 512)
    a, b = (torch.randn(n, n, device=reference.device, dtype=getattr(torch, dtype)) for _ in range(2))
    out, best = torch.empty_like(a), 0.0
    for _ in range(6):
        _wait(reference.device)
        start = time.perf_counter()
        for _ in range(10):
            torch.matmul(a, b, out=out)
        _wait(reference.device)
        best = max(best, 10 * 2 * n**3 / (time.perf_counter() - start))
    return {"rate": best}
