"""`m0kit bench reuse`: what it is worth to read a document once, in memory and on disk, and what it costs.

Owns the workloads of documents that come again. Both sides of a ratio take turns in one run where
that is affordable. What a kept document costs depends on sizes alone, so where many documents are wanted one state is
computed, and the others get copies of it, each in memory or on disk of its own: 100 pages would take half an hour to
read, and their scores are nobody's business here. Nothing passes or fails.

    m0kit bench reuse m0-int8                                  # all parts but `many`
    m0kit bench reuse m0-int8 --only cached --checkpoint m0    # also against transformers fp32
    m0kit bench reuse small-fp32 --only many
"""

import gc
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from m0kit.artifact.manifest import read_manifest
from m0kit.artifact.ports import Kept
from m0kit.config import DecoderConfig, ModelConfig
from m0kit.errors import InputError, OutputError
from m0kit.index import add, open_index, stored_form
from m0kit.keeping.cache import Cache
from m0kit.keeping.states import Pasts, State
from m0kit.keeping.store import Store
from m0kit.reading.inputs import Content, Picture, parse_content
from m0kit.reranker import Reranker
from m0kit.scoring.engine import PAST_BYTES
from m0kit.scoring.planner import pack
from m0kit.scoring.prepare import Document
from m0kit.scoring.prompt import ImageTokens, PromptBuilder
from m0kit.terminal import bar
from m0kit_parity.bench.reuse_results import Asking, Cached, CacheSize, Disk, Growth, Indexing, Many, Point, Reading
from m0kit_parity.bench.timing import compare, doubling, take_turns, timed
from m0kit_parity.bench.workloads import page_of, prompts_of, text_of

DOCUMENT_TOKENS: Final = 768  # visual tokens of a published page, and a text as long
SUFFIXES: Final = (4, 12, 24)  # tokens of a query with the score token: a word or two, a question, a long one
QUESTION: Final = 12
SHORT_TOKENS: Final = 128  # documents where many are wanted
UNCACHED_TOKENS: Final = 1024  # what `growth` computes anew at most: ten seconds or so at full size, and it is linear
CACHE_SIZES: Final = (0, 25, 50, 75, 100, 125)  # percent of the working set
REQUESTS: Final = 4  # for each document of the stream
QUERIES, DOCUMENTS = 1000, 100  # of `many`
EVERYTHING: Final = 1 << 40  # bytes of a cache that lets nothing go
PARTS: Final = ("cached", "disk", "indexing", "growth", "many")


# --- workloads -----------------------------------------------------------------------------------------


def query_of(suffix: int, rng: random.Random) -> str:
    """A query that adds exactly `suffix` tokens to any document, the score token among them: digits are one each."""
    return "".join(rng.choices("0123456789", k=suffix - 1))


def text_document(prompts: PromptBuilder, tokens: int, seed: int = 0) -> str:
    """A text whose prefix, headers included, is exactly `tokens` long. Raises ValueError when that is too few."""
    return text_of(prompts, tokens + 2, seed, query="7")  # and the score token


def fitting(config: ModelConfig, prompts: PromptBuilder, wanted: int) -> tuple[int, int]:
    """Tokens of a text's prefix and visual tokens of a page: as wanted, or as many as the limits allow."""
    limit = config.prompt.max_length - max(SUFFIXES)
    around = len(prompts.document(ImageTokens(0)).prefix)
    visual = min(wanted, limit - around, config.image.max_pixels // config.image.factor**2)
    return min(wanted, limit, config.prompt.max_document_length), visual - visual % 16  # a page's shape needs divisors


def stretched(state: State, length: int) -> State:
    """A state of `length` tokens, in memory of its own: those of `state`, again and again."""
    rows = np.arange(length) % state.length
    return State(state.kv[:, :, :, rows], state.table.copy())


def _entry(reranker: Reranker, value: Any) -> tuple[Content, Document]:
    content, (preparer, _) = parse_content(value, "document"), reranker.begin()
    return content, preparer.document(content, "document")[0]


def read_one(reranker: Reranker, content: Any) -> State:
    """The state of a document, really computed; it goes into the cache."""
    _, document = _entry(reranker, content)
    return reranker.engine.compute([document])[0]


def keep(reranker: Reranker, contents: Sequence[Any], state: State) -> None:
    """Put copies of a state into the cache, stretched, as those of documents that are not there yet."""
    assert reranker.cache is not None
    for content in contents:
        _, entry = _entry(reranker, content)
        copied = stretched(state, entry.length)
        reranker.cache.put(entry.key, copied, num_bytes=copied.num_bytes, cost=entry.length)


# --- parts ---------------------------------------------------------------------------------------------


def cached(
    artifact: Path, kv: Kept, *, documents: int, tokens: int, repeats: int, page_repeats: int, threads: int,
    checkpoint: Path | None = None,
) -> list[Cached]:  # fmt: skip
    """A new query on each of `documents` kept documents, per document, against one pair without a cache.

    One document is really computed, the others get copies of its state. Pages take `page_repeats` turns of both
    sides, because computing one anew is slow, and then the kept ones alone up to `repeats`.
    """
    prompts = prompts_of(artifact)
    plain = Reranker.load(artifact, threads=threads)
    warm = Reranker.load(artifact, threads=threads, cache_bytes=EVERYTHING, kv=kv)
    text_tokens, visual = fitting(plain.config, prompts, tokens)
    kinds: dict[str, list[Any]] = {
        "text": [text_document(prompts, text_tokens, seed) for seed in range(documents)],
        "page": [page_of(visual, seed) for seed in range(documents)],
    }
    results = []
    for kind, contents in kinds.items():
        results += _cached(kind, contents, plain, warm, repeats if kind == "text" else page_repeats, repeats)
        warm.cache = Cache(EVERYTHING)  # the next kind needs the memory
    if checkpoint is None:
        return results
    del plain, warm  # the checkpoint in float32 needs the memory, too
    theirs = _transformers(checkpoint, {kind: contents[0] for kind, contents in kinds.items()}, threads)
    return [
        replace(r, transformers=theirs[r.kind], faster_than_transformers=theirs[r.kind] / r.cached) for r in results
    ]


def _cached(kind: str, contents: Sequence[Any], plain: Reranker, warm: Reranker, both: int, more: int) -> list[Cached]:
    """`both` turns of both sides, and `more` of the kept one where that is more."""
    rng = random.Random(0)
    state = read_one(warm, contents[0])
    keep(warm, contents[1:], state)
    asked: dict[int, tuple[str, float]] = {}  # what the uncached side said last

    def anew(suffix: int) -> None:
        query = query_of(suffix, rng)
        asked[suffix] = query, float(plain.score([(query, contents[0])])[0])

    def kept(suffix: int) -> None:
        query = query_of(suffix, rng)
        warm.score([(query, content) for content in contents])

    fast = {f"cached {n}": timed(partial(kept, n)) for n in SUFFIXES}
    slow = {f"uncached {n}": timed(partial(anew, n)) for n in SUFFIXES}
    times = take_turns(fast | slow, both)
    if more > both:
        for name, seconds in take_turns(fast, more - both).items():
            times[name] += seconds
    results = []
    for n in SUFFIXES:
        uncached = statistics.median(times[f"uncached {n}"])
        per_document = statistics.median(times[f"cached {n}"]) / len(contents)
        query, score = asked[n]
        difference = abs(float(warm.score([(query, contents[0])])[0]) - score)
        results.append(Cached(kind, state.length, n, uncached, per_document, uncached / per_document, difference))
    return results


def _transformers(checkpoint: Path, contents: Mapping[str, Any], threads: int) -> dict[str, float]:
    """Seconds of one pair each."""
    import torch

    from m0kit_parity.reference import Reference

    torch.set_num_threads(threads)
    reference = Reference.load(checkpoint)
    reference.compute_score([("7", "7")])  # what PyTorch does once
    query = query_of(QUESTION, random.Random(0))
    return {kind: timed(partial(reference.compute_score, [(query, c)]))() for kind, c in contents.items()}


def disk(artifact: Path, kv: Kept, folder: Path, *, pages: int, tokens: int, repeats: int, threads: int) -> Disk:
    """An index of `pages` pages in `folder` (made here): opening and loading it, and one query on all of them.

    One page is really computed, the others have their own picture, id and key, and a copy of its state on disk.
    Raises OutputError when there is too little space.
    """
    visual = fitting(read_manifest(artifact).model, prompts_of(artifact), tokens)[1]
    names = [f"page {seed}" for seed in range(pages)]
    config, keys, length = _build(artifact, kv, folder, {n: page_of(visual, i) for i, n in enumerate(names)}, threads)
    query = random.Random(0)
    reading, asking = [], []
    for temperature in ("cold", "warm"):
        loads, first, second = [], [], []
        for _ in range(repeats):
            if temperature == "cold" and not _let_go(folder):
                break
            loads.append(_read(folder, keys, config, kv))
            if temperature == "cold":
                _let_go(folder)
            reranker = Reranker.load(artifact, threads=threads, index=folder)
            first.append(_ask(reranker, names, query_of(QUESTION, query)))
            if temperature == "warm":
                second.append(_ask(reranker, names, query_of(QUESTION, query)))
            assert reranker.store is not None
            reranker.store.close()
            del reranker
            gc.collect()  # a page in a map that still lives would not be let go
        if loads:
            num_bytes = loads[0][2]
            open_s, load_s = (statistics.median(load[i] for load in loads) for i in (0, 1))
            reading.append(Reading(temperature, open_s, load_s, num_bytes / load_s))
        for name, runs in ((temperature, first), ("next", second)):
            if runs:
                columns = [statistics.median(column) for column in zip(*runs, strict=True)]
                asking.append(Asking(name, *columns))
    index_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Disk(pages, length, index_bytes, reading, asking)


def _build(
    artifact: Path, kv: Kept, folder: Path, pages: Mapping[str, bytes], threads: int
) -> tuple[DecoderConfig, list[bytes], int]:
    """Make the index → the decoder's dimensions, its keys, tokens of a page."""
    reader = Reranker.load(artifact, threads=threads, kv=kv)
    state: State | None = None
    keys = []
    with open_index(folder, reader) as store:
        for name, raw in bar(pages.items(), unit="page", desc="index"):
            picture, entry = _entry(reader, raw)
            assert isinstance(picture, Picture)
            page = stored_form(name, picture, entry)
            if state is None:
                state = reader.engine.compute([entry])[0]
                _check_space(folder, len(pages) * (state.num_bytes + len(page.data)))
            store.add([page], {entry.key: state.buffers})
            keys.append(entry.key)
    assert state is not None
    return reader.config.decoder, keys, state.length


def _check_space(folder: Path, num_bytes: int) -> None:
    need, free = num_bytes * 21 // 20, shutil.disk_usage(folder).free  # the database, and what is rounded up
    if need > free:
        raise OutputError(
            f"{folder}: {free / 2**30:.1f} GiB free, and an index of these pages takes {need / 2**30:.1f}. "
            "Name a folder on another disk with --tmp, or give fewer --pages."
        )


def _let_go(folder: Path) -> bool:
    """Ask the system to drop its copy of an index's files from memory; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _read(folder: Path, keys: Sequence[bytes], config: DecoderConfig, kv: Kept) -> tuple[float, float, int]:
    """Seconds to open an index and to load its records, and their bytes."""
    start = time.perf_counter()
    with Store.open(folder) as store:
        opened = time.perf_counter()
        pasts, num_bytes = Pasts(config, kv), 0

        def states() -> Iterator[tuple[State, list[int]]]:
            for key in keys:
                raw = store.get(key)
                assert raw is not None
                state = State.from_bytes(raw, config, kv)
                yield state, [state.num_bytes]

        for run in pack(states(), [PAST_BYTES]):
            pasts.feeds(run)
            num_bytes += sum(state.num_bytes for state in run)
        return opened - start, time.perf_counter() - opened, num_bytes


def _ask(reranker: Reranker, names: Sequence[str], query: str) -> tuple[float, float, float, float]:
    """One query on all pages → seconds, of these reading states, its share, of these looking pages up."""
    assert reranker.store is not None
    records, documents = reranker.store.record_reads, reranker.store.document_reads
    before = records.seconds, documents.seconds
    seconds = timed(lambda: reranker.score([(query, {"id": name}) for name in names]))()
    loading = records.seconds - before[0]
    return seconds, loading, loading / seconds, documents.seconds - before[1]


def indexing(
    artifact: Path, kv: Kept, folder: Path, *, documents: int, repeats: int, threads: int, tokens: int = 256
) -> Indexing:
    """Texts that nobody has seen: reading `documents` of them into an index in `folder`, and scoring as many."""
    prompts, seeds = prompts_of(artifact), itertools.count()
    reader = Reranker.load(artifact, threads=threads, kv=kv)
    plain = Reranker.load(artifact, threads=threads)
    texts = [[text_document(prompts, tokens, next(seeds)) for _ in range(documents)] for _ in range(2 * repeats + 2)]
    fresh = iter(texts)
    query = query_of(min(SUFFIXES), random.Random(0))
    with open_index(folder, reader) as store:

        def index() -> None:
            done = add(reader, store, ((f"text {next(seeds)}", text, "") for text in next(fresh)))
            if done.read != documents:
                raise InputError(f"{artifact}: {documents} texts made {done.read} states. Give fewer --documents.")

        def score() -> None:
            plain.score([(query, text) for text in next(fresh)])

        times = take_turns({"index": timed(index), "score": timed(score)}, repeats)
    indexed, scored = compare("", times, "score")
    return Indexing(
        documents, tokens, documents / indexed.seconds, documents / scored.seconds,
        indexed.ratio, indexed.low, indexed.high,
    )  # fmt: skip


def growth(
    artifact: Path, kv: Kept, *, documents: int, max_tokens: int, repeats: int, threads: int, most: int = 64
) -> Growth:
    """Seconds of a call as its documents, its queries and its document's tokens grow, kept and computed anew.

    All queries are new. What is computed anew ends at 1024 tokens of documents and queries together. Every kept
    document has a copy of one computed state, cut or repeated to its length.
    """
    rng, prompts = random.Random(0), prompts_of(artifact)
    plain = Reranker.load(artifact, threads=threads)
    warm = Reranker.load(artifact, threads=threads, cache_bytes=EVERYTHING, kv=kv)
    one, _ = fitting(plain.config, prompts, min(DOCUMENT_TOKENS, max_tokens))
    longest, _ = fitting(plain.config, prompts, max_tokens)
    short = [text_document(prompts, SHORT_TOKENS, seed) for seed in range(max(most, documents))]
    long = {n: text_document(prompts, n, 1) for n in doubling(64, longest)}
    whole = text_document(prompts, one, 2)
    state = read_one(warm, short[0])
    keep(warm, [*short[1:], *long.values(), whole], state)
    steps = doubling(1, most)
    # What grows: its steps, the documents of a step, how many queries each gets, tokens to compute anew.
    loads: dict[str, dict[int, tuple[list[str], int, int]]] = {
        f"documents of {SHORT_TOKENS} tokens, one query": {
            n: (short[:n], 1, n * (SHORT_TOKENS + QUESTION)) for n in steps
        },
        f"queries on one document of {one} tokens": {n: ([whole], n, one + n * QUESTION) for n in steps},
        "tokens of a document, one query": {n: ([text], 1, n + QUESTION) for n, text in long.items()},
    }
    measured: dict[str, dict[int, Point]] = {}
    with bar(total=sum(map(len, loads.values())), unit="point", desc="growth") as shown:
        for what, points in loads.items():
            measured[what] = {}
            for amount, (contents, queries, anew) in points.items():

                def run(reranker: Reranker, contents: Sequence[str], queries: int) -> None:
                    asked = [query_of(QUESTION, rng) for _ in range(queries)]
                    reranker.score([(query, content) for query in asked for content in contents])

                sides = {"cached": timed(partial(run, warm, contents, queries))}
                if anew <= UNCACHED_TOKENS:
                    sides["uncached"] = timed(partial(run, plain, contents, queries))
                times = take_turns(sides, repeats)
                measured[what][amount] = {
                    side: statistics.median(times[side]) if side in times else None for side in ("cached", "uncached")
                }
                shown.update()
    requests = REQUESTS * documents
    stream = (
        f"{requests} requests, each a new query on one of {documents} documents of {SHORT_TOKENS} tokens, drawn by "
        f"Zipf's law (the k-th is wanted 1/k as often as the first); the cache was full before the first"
    )
    return Growth(measured, _cache_sizes(warm, short[:documents], state, requests), stream)


def _cache_sizes(reranker: Reranker, contents: Sequence[str], state: State, requests: int) -> list[CacheSize]:
    """The same stream through caches of different sizes, once each; the rarest documents were put in first."""
    rng = random.Random(1)
    stream = rng.choices(contents, [1 / rank for rank in range(1, len(contents) + 1)], k=requests)
    results = []
    for percent in bar(CACHE_SIZES, unit="size", desc="cache"):
        reranker.cache = Cache(len(contents) * state.num_bytes * percent // 100) if percent else None
        if reranker.cache is not None:
            keep(reranker, contents[::-1], state)
        reranker.score([(query_of(QUESTION, rng), "7")])  # a first run that does not count
        before = (reranker.cache.hits, reranker.cache.misses) if reranker.cache is not None else (0, 0)

        def play() -> None:
            for content in stream:
                reranker.score([(query_of(QUESTION, rng), content)])

        seconds = timed(play)()
        hits = reranker.cache.hits - before[0] if reranker.cache is not None else 0
        results.append(CacheSize(percent, hits / requests, seconds / requests))
    return results


def many(artifact: Path, *, queries: int, documents: int, threads: int, tokens: int = 64) -> Many:
    """All queries on all documents, short texts, in one call of `Reranker.stream` without a cache; Linux only."""
    if not Path("/proc/self/status").is_file():
        raise InputError("the part many reads /proc, which this system does not have. Run it on Linux.")
    rng, prompts = random.Random(0), prompts_of(artifact)
    reranker = Reranker.load(artifact, threads=threads)
    texts = [text_document(prompts, tokens, seed) for seed in range(documents)]
    asked = [query_of(QUESTION, rng) for _ in range(queries)]
    pairs = [(query, text) for query in asked for text in texts]
    reranker.score(pairs[:documents])
    marks = {max(len(pairs) * percent // 100, 1): f"{percent} %" for percent in (10, 50, 100)}
    resident = {"before": _resident()}
    start, planning = time.perf_counter(), 0.0
    stream = reranker.stream(pairs, on_error="raise")
    for done, _ in enumerate(bar(stream, total=len(pairs), unit="pair", desc="many"), 1):
        if done == 1:
            planning, resident["planned"] = time.perf_counter() - start, _resident()
        if done in marks:
            resident[marks[done]] = _resident()
    seconds = time.perf_counter() - start
    return Many(len(pairs), documents, planning, len(pairs) / seconds, resident)


def _resident() -> float:
    """MiB of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def reuse_parts(
    artifact: Path, parts: Sequence[str], *, checkpoint: Path | None = None, kv: Kept, documents: int, pages: int,
    max_tokens: int, repeats: int, page_repeats: int, tmp: Path | None = None, threads: int,
) -> dict[str, Any]:  # fmt: skip
    """Some of PARTS, each with its result; `tmp` is where indexes are made."""
    tokens = min(DOCUMENT_TOKENS, max_tokens)
    shared: dict[str, Any] = {"threads": threads, "repeats": repeats}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="m0kit-bench-", dir=tmp) as temporary:
        root = Path(temporary)
        runs: dict[str, Callable[[], Any]] = {
            "cached": lambda: cached(
                artifact, kv, documents=documents, tokens=tokens, page_repeats=page_repeats, checkpoint=checkpoint,
                **shared,
            ),
            "disk": lambda: disk(artifact, kv, root / "pages", pages=pages, tokens=tokens, **shared),
            "indexing": lambda: indexing(artifact, kv, root / "texts", documents=documents, **shared),
            "growth": lambda: growth(artifact, kv, documents=documents, max_tokens=max_tokens, **shared),
            "many": lambda: many(artifact, queries=QUERIES, documents=DOCUMENTS, threads=threads),
        }  # fmt: skip
        for part in parts:
            results[part] = runs[part]()
            gc.collect()  # one part's models must not slow the next one by their memory
            shutil.rmtree(root / "pages", ignore_errors=True)
    return results
