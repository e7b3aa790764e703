"""What computes on a GPU: documents' keys and values in pages of its memory, and runs that follow each other closely.

Owns the feeds of the CUDA graphs, and when what is where. Which pages are whose is `m0kit.keeping.pages`', which token
is in which page `m0kit.scoring.paging`'s, the GPU itself `m0kit.scoring.device`'s.

A run is laid out by its caller's thread while the GPU is at the run before; the engine's own thread then copies,
encodes, decodes and reads the logits. A document has its pages from the moment its run is laid out: what comes later
runs later.

    engine = CudaEngine(config, device, partial(device.open, folder), "float16", salt=salt)
    engine.begin([Part(prepared.document, [prepared])])()      # → [logit]
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m0kit import forks
from m0kit.artifact.ports import PAGE_TOKENS, past_names, present_names, set_name
from m0kit.config import ModelConfig
from m0kit.errors import DeviceError, M0kitError, PoolFullError
from m0kit.keeping.cache import Cache
from m0kit.keeping.pages import PageState, Pool, claim, too_large
from m0kit.keeping.states import State
from m0kit.keeping.store import Store
from m0kit.scoring.device import Device, DeviceGraph, Placed, item_size
from m0kit.scoring.engine import Part, RunStats, read_state
from m0kit.scoring.image import patches_uint8
from m0kit.scoring.images import SeenImage
from m0kit.scoring.paging import PagedLayout, PagedPart, layout_pages, split_part
from m0kit.scoring.positions import mrope_positions, position_after, vision_positions
from m0kit.scoring.prepare import Document

Array = NDArray[Any]
Int64 = NDArray[np.int64]


POOL_VARIABLE: Final = "M0KIT_GPU_POOL_BYTES"
# What a GPU of that much free memory is given at once: rows of a run, patches of images encoded together. Products of
# fewer rows leave part of a large GPU idle; a small one has no memory for more.
_LARGE: Final = 8 << 30
_ROWS: Final = (16384, 2048)
_PATCHES: Final = (4 * 3072, 3072)
# Beside activations: CUDA's libraries and their work space, kernels, and what memory loses in its arena.
_SPARE_BYTES: Final = 768 << 20
# Of the rest: arenas never shrink, and each new longest run adds to them (8,192 rows grew beyond 2 GB on an H100).
_POOL_SHARE: Final = 0.75


class _Seen(NamedTuple):
    """Tokens of an image in a run."""

    image: SeenImage
    rows: Int64  # of the run
    tokens: Int64  # of the image


class _Encoding(NamedTuple):
    """One run of the image encoder on I images that are filled up to S patches."""

    images: Sequence[SeenImage]
    feeds: dict[str, Array]
    pixels: NDArray[np.uint8]  # (I, S, ·)
    block: NDArray[np.uint8]  # of pinned memory, in which they are

    @property
    def num_patches(self) -> int:
        return int(self.pixels.shape[0] * self.pixels.shape[1])


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of the decoder, laid out. To be held until it is done: with it go pages."""

    layout: PagedLayout
    feeds: dict[str, Array]
    encode: Sequence[_Encoding]  # whose rows come first in the embeddings
    own: Mapping[SeenImage, int]  # images encoded here whose embeddings are to be read back, and where they begin
    embeds: Sequence[Array]  # after them those that are in the computer's memory: bytes (tokens, D times the type's)
    places: Sequence[int]  # of each pair among those of the call
    pasts: Sequence[PageState]
    kept_rows: int


class CudaEngine:
    """Runs CUDA graphs. Thread-safe; several schedules may share one, whose runs then take turns."""

    low_memory = False
    keeps = False  # a document's pages are written in the run of its first pair
    runs_ahead = 1

    def __init__(
        self,
        config: ModelConfig,
        device: Device,
        opener: Callable[[str], DeviceGraph],
        dtype: str,
        *,
        salt: bytes,
        cache_bytes: int = 0,
        pool_bytes: int | None = None,
        encoder_bytes: int = 0,
        store: Store | None = None,
    ) -> None:
        """`opener` opens a graph by its name; `dtype` is what they compute in.

        `pool_bytes`: memory for keys and values, by default what M0KIT_GPU_POOL_BYTES says or all that is free but for
        what runs need and the image encoder (`encoder_bytes`), which is opened when the first image comes.
        `cache_bytes`: how much of it may hold documents that nothing waits for; 0: all.
        Raises DeviceError where too little memory is left for one document.
        """
        self.config, self.salt, self.store, self.dtype = config, salt, store, dtype
        self.on_run: Callable[[RunStats], object] | None = None
        self._first_image: Callable[[], object] | None = None
        self._asking = threading.local()  # is_on: this thread is at what comes before the first image
        self._device, self._open = device, opener
        self._decoder, self._head = opener(set_name("decoder", "cuda")), opener(set_name("head", "cuda"))
        self._vision: DeviceGraph | None = None
        self._lock = threading.Lock()
        self._is_forked = self._is_closed = False
        forks.watch(self)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="m0kit-gpu")
        self._scratch: dict[str, tuple[int, int]] = {}  # address and bytes
        self._pinned: list[NDArray[np.uint8]] = []  # that no run is using

        decoder = config.decoder
        free = device.free_bytes() - encoder_bytes
        small = int(free < _LARGE)
        self.rows, self._patches = _ROWS[small], _PATCHES[small]
        self.prepare_threads = min(8, os.cpu_count() or 1)
        self._page_row = PAGE_TOKENS * decoder.kv_size * item_size(dtype)  # bytes of a page in a layer's keys or values
        self._page_bytes = 2 * decoder.num_layers * self._page_row
        wanted = number_of_bytes(POOL_VARIABLE) if pool_bytes is None else pool_bytes
        if wanted is None:
            wanted = int(max(free - self._work_bytes() - _SPARE_BYTES, 0) * _POOL_SHARE)
        self.pool = Pool(wanted // self._page_bytes)
        self._check_pool(wanted, free)
        # A document has two pages of a run at least, for itself and its query; two runs are there at a time.
        self.rows = min(self.rows, max(4 * self.pool.num_pages, 1024))
        pool_bytes = self.pool.num_pages * self._page_bytes
        self.past_bytes = pool_bytes // 4
        self.cache = Cache(min(cache_bytes or pool_bytes, pool_bytes))
        self._pages = device.allocate(pool_bytes)
        layer = self.pool.num_pages * self._page_row
        shape = (self.pool.num_pages, PAGE_TOKENS, decoder.num_kv_heads, decoder.head_dim)
        bound = {}
        for i in range(decoder.num_layers):
            for j, (past, present) in enumerate(zip(past_names(i), present_names(i), strict=True)):
                bound[past] = bound[present] = Placed(self._pages + (2 * i + j) * layer, shape, dtype)
        self._decoder.bind(bound)

    def _work_bytes(self) -> int:
        """Inner values of the largest run, three times, as each graph has its arena, and those have gaps (measured)."""
        decoder, vision = self.config.decoder, self.config.vision
        item = item_size(self.dtype)
        row = item * (6 * decoder.hidden_size + 4 * decoder.intermediate_size)
        patch = item * (10 * vision.width + 2 * vision.mlp_size) + 20 * vision.patch_values
        largest = encoder_size(self.config.image.max_pixels // vision.patch_size**2)  # which may be more, alone
        return 3 * max(self.rows * row, max(self._patches, largest) * patch)

    def _check_pool(self, wanted: int, free: int) -> None:
        needed = self.pool.pages_for(self.config.prompt.max_length) + 2
        if self.pool.num_pages < needed:
            least = needed * self._page_bytes
            raise DeviceError(
                f"the pool of pages has {wanted / 1e6:,.0f} MB ({free / 1e6:,.0f} MB of the GPU are free), and one "
                f"document of {self.config.prompt.max_length:,} tokens takes {least / 1e6:,.0f} MB. Give it more "
                f"(--pool-bytes, --gpu-bytes, {POOL_VARIABLE}), end what else uses the GPU, lower max_length, or take "
                "an artifact in int4."
            )

    def before_images(self, call: Callable[[], object]) -> None:
        """`call` something before the first image is encoded. What it raises, a run that has an image raises."""
        self._first_image = call

    def after_fork(self) -> None:
        """A child has no GPU: CUDA does not come along, nor do the threads of sessions, whose ends these wait for."""
        self._is_forked = True
        if not self._is_closed:
            forks.abandon((self._decoder, self._head, self._vision))
        self._lock = threading.Lock()

    # --- states --------------------------------------------------------------------------------------

    @property
    def kept(self) -> str:
        return f"what is kept of the document (keys and values in {self.dtype})"

    def find(self, document: Document) -> PageState | None:
        """Its pages, read from the store where they are there. Raises InputError where the pool is too small for it."""
        self._check_room(document)
        state: PageState | None = self.cache.get(document.key)
        if state is not None or self.store is None:
            return state
        kept = read_state(self.store, document, self.config.decoder, "fp16")
        if kept is None:
            return None
        with self._lock:
            if self._is_closed or self._is_forked:  # as `begin` will say
                return None
            try:
                state = self._claim(document)
            except PoolFullError:  # for now: those that run hold it
                return None
            values = _paged(kept.kv, self.pool.pages_for(kept.length))
            values = _as_bfloat16(values) if self.dtype == "bfloat16" else values
            self._keep(document, state)
            self._worker.submit(self._write, document.key, state, values)
        return state

    def has(self, document: Document) -> bool:
        return document.key in self.cache

    def prefetch(self, documents: Iterable[Document]) -> None:
        if self.store is not None:
            self.store.prefetch(document.key for document in documents)

    def states(self, documents: Sequence[Document]) -> list[PageState]:
        """Written in a run of their own."""
        waiter = self.begin([Part(document, []) for document in documents])
        waiter()
        return [state for document in documents if (state := self.cache.peek(document.key)) is not None]

    def compute(self, documents: Sequence[Document]) -> list[State]:
        """States of documents in the computer's memory, in float16, whatever is kept: for an index."""
        return [self._computed(document) for document in documents]  # each in pages that are free again after it

    def _computed(self, document: Document) -> State:
        with self._lock:
            state = self._claim(document)
        self.begin([Part(document, [], state)], fresh=frozenset([document.key]))()
        return self._worker.submit(self._read, state).result()

    def rest(self, used: Iterable[Document]) -> None:
        if self.store is not None and (keys := {document.key for document in used}):
            self.store.touch(keys)

    def encode(self, images: Sequence[SeenImage]) -> None:
        """Nothing ahead: images are encoded in the run that needs them."""

    def close(self) -> None:
        """End after what is running, and give its memory back."""
        with self._lock:
            if self._is_closed or self._is_forked:
                return
            self._is_closed = True
        self._worker.shutdown()
        del self._decoder, self._head
        self._vision = None
        self.cache = Cache(0)
        self._pinned.clear()
        with suppress(M0kitError):  # a GPU that was lost has nothing to give back
            for address in (self._pages, *(address for address, _ in self._scratch.values())):
                self._device.free(address)
        self._scratch.clear()

    def _claim(self, document: Document) -> PageState:
        """Pages for it. Raises PoolFullError, and InputError where the pool is too small for it."""
        self._check_room(document)
        pages = claim(self.pool, self.cache, self.pool.pages_for(document.length))
        return PageState(pages, document.length, self._page_bytes)

    def _check_room(self, document: Document) -> None:
        """A reranker's limits can be raised after its pool was made."""
        num_pages = self.pool.pages_for(document.length)
        if num_pages + 2 > self.pool.num_pages:
            raise too_large(
                self.pool, document.length, num_pages, f"raise --pool-bytes or {POOL_VARIABLE}, or lower max_length"
            )

    def _keep(self, document: Document, state: PageState) -> None:
        self.cache.put(document.key, state, num_bytes=state.num_bytes, cost=document.cost)

    def _lose(self, written: Mapping[bytes, PageState]) -> None:
        """Nobody may use these: what was to write them failed, and what is in their pages is another document's."""
        for key, state in written.items():
            state.pages.is_lost = True
            if self.cache.peek(key) is state:
                self.cache.forget(key)

    def _write(self, key: bytes, state: PageState, values: Array) -> None:
        """values (2L, pages, …) into its pages."""
        layer = self.pool.num_pages * self._page_row
        source_pitch = values.strides[0]
        try:
            for i, page in enumerate(state.pages.numbers):
                source = values.ctypes.data + i * self._page_row
                target = self._pages + page * self._page_row
                self._device.copy(target, source, self._page_row, len(values), layer, source_pitch)
        except BaseException:  # those that wait for it are told by their own run
            self._lose({key: state})
            raise

    def _read(self, state: PageState) -> State:
        decoder, numbers = self.config.decoder, state.pages.numbers
        shape = (2 * decoder.num_layers, len(numbers), PAGE_TOKENS, decoder.num_kv_heads, decoder.head_dim)
        values = np.empty(shape, np.uint16)
        layer = self.pool.num_pages * self._page_row
        for i, page in enumerate(numbers):
            target, source = values.ctypes.data + i * self._page_row, self._pages + page * self._page_row
            self._device.copy(target, source, self._page_row, len(values), values.strides[0], layer)
        halves = _from_bfloat16(values) if self.dtype == "bfloat16" else values.view(np.float16)
        return State(_unpaged(halves, state.length), np.empty((0, 2, 3, 0, 0), np.float32))

    # --- runs ----------------------------------------------------------------------------------------

    def begin(self, parts: Sequence[Part], fresh: frozenset[bytes] = frozenset()) -> Callable[[], list[float]]:
        """Lay out a run, or the few that it takes, and queue them. `fresh`: documents whose pages are to be written."""
        if self._is_forked:
            raise DeviceError("the GPU was opened before this process was forked. Load the artifact in each process.")
        if (
            (first := self._first_image) is not None
            and not getattr(self._asking, "is_on", False)
            and any(map(_has_images, parts))
        ):
            self._asking.is_on = True
            try:
                first()  # who comes meanwhile calls it too, and so waits for it
                self._first_image = None
            finally:
                self._asking.is_on = False
        with self._lock:
            queued = self._queued(parts, fresh)
            if isinstance(queued, PoolFullError):  # those that run hold pages, which are free when they are done
                self._worker.submit(int).result()
                queued = self._queued(parts, fresh)
        if not isinstance(queued, PoolFullError):
            return queued.result
        halves = _halves(parts)
        if halves is None:
            raise queued
        # Queries on one document have pages of their own, of which a small pool has too few for all at once.
        found = [logit for half in halves for logit in self.begin(half, fresh)()]
        return lambda: found

    def _queued(self, parts: Sequence[Part], fresh: frozenset[bytes]) -> "Future[list[float]] | PoolFullError":
        """Under the lock."""
        if self._is_closed:
            raise M0kitError("this reranker was closed meanwhile. Load the artifact again.")
        try:
            runs, written = self._laid_out(parts, fresh)
        except PoolFullError as error:
            return error.with_traceback(None)  # whose frames hold what was claimed
        total = sum(len(part.pairs) for part in parts)
        return self._worker.submit(self._execute, runs, total, written)

    def _laid_out(self, parts: Sequence[Part], fresh: frozenset[bytes]) -> tuple[list[_Run], dict[bytes, PageState]]:
        """The runs, and the documents that they write."""
        written: dict[bytes, PageState] = {}
        steps: list[list[tuple[Part, PagedPart, list[int]]]] = []
        place = 0
        try:
            for part in parts:
                document = part.document
                state: PageState | None = part.state
                if state is None or state.pages.is_lost:  # others may have begun to write it meanwhile
                    state = self.cache.peek(document.key)
                if state is None:
                    state = written[document.key] = self._claim(document)
                    self._keep(document, state)
                done = 0 if document.key in written or document.key in fresh else document.length
                suffixes = [(pair.prompt.prefix_length, pair.num_rows) for pair in part.pairs]
                whole = PagedPart(document.length, suffixes, state.pages.numbers, done)
                for i, step in enumerate(split_part(whole, max(self.rows, 1))):
                    if i == len(steps):
                        steps.append([])
                    chosen = Part(document, [part.pairs[j] for j in step.indexes], state)
                    steps[i].append((chosen, step.part, [place + j for j in step.indexes]))
                place += len(part.pairs)
            return [self._run(some) for some in steps], written
        except BaseException:
            self._lose(written)
            raise

    def _run(self, steps: Sequence[tuple[Part, PagedPart, list[int]]]) -> _Run:
        layout = layout_pages([step for _, step, _ in steps], lambda n: claim(self.pool, self.cache, n))
        ids: list[Int64] = []
        positions: list[Int64] = []
        seen: list[_Seen] = []
        row = 0
        for part, step, _ in steps:
            document = part.document
            chunk = slice(step.written, step.length)
            if chunk.start < chunk.stop:
                ids.append(document.prefix[chunk])
                positions.append(self._positions(document.prefix, document.images)[:, chunk])
                seen += self._seen(document.prefix, document.images, chunk, row)
                row += chunk.stop - chunk.start
            grids = [image.grid_thw for image in document.images]
            for pair in part.pairs:
                prompt = pair.prompt
                ids.append(prompt.suffix)
                after = position_after(prompt.prefix_length, grids, self.config.image.merge_size)
                positions.append(self._positions(prompt.suffix, pair.images, after))
                seen += self._seen(prompt.suffix, pair.images, slice(0, pair.num_rows), row)
                row += pair.num_rows
        images = dict.fromkeys(each.image for each in seen)
        seen_as = {image: image.embeds for image in images}  # once: the run before may be setting them
        own = [image for image, values in seen_as.items() if values is None]
        there = {image: values for image, values in seen_as.items() if values is not None}
        encode = self._encodings(own)
        merged = self.config.image.merge_size**2
        first: dict[SeenImage, int] = {}
        embeds = 0
        for each in encode:
            for i, image in enumerate(each.images):
                first[image] = embeds + i * each.pixels.shape[1] // merged
            embeds += each.num_patches // merged
        for image in there:
            first[image] = embeds
            embeds += image.num_tokens
        none = np.zeros(0, np.int64)
        feeds: dict[str, Array] = {
            "token_ids": np.concatenate(ids),
            "positions": np.ascontiguousarray(np.concatenate(positions, axis=1)),
            "cumulative": layout.cumulative,
            "past": layout.past,
            "block_table": layout.block_table,
            "metadata": layout.metadata,
            "last_index": layout.last_index if len(layout.last_index) else np.zeros(1, np.int64),
            "image_token_index": np.concatenate([none, *(each.rows for each in seen)]),
            "image_rows": np.concatenate([none, *(first[each.image] + each.tokens for each in seen)]),
        }
        of_queries = {image for part, _, _ in steps for pair in part.pairs for image in pair.images}
        return _Run(
            layout,
            feeds,
            encode=encode,
            # A query's image may be needed by later runs; a document's is in its pages from now on.
            own={image: first[image] for image in own if image in of_queries},
            embeds=list(there.values()),
            places=[place for _, _, places in steps for place in places],
            pasts=[part.state for part, _, _ in steps],
            kept_rows=sum(step.written for _, step, _ in steps),
        )

    def _positions(self, token_ids: Int64, images: Sequence[SeenImage], position: int = 0) -> Int64:
        """(3, T) of one prompt (T,) with these images in order, or of a part of one from `position` on."""
        grids = np.asarray([image.grid_thw for image in images], np.int64).reshape(-1, 3)
        merge = self.config.image.merge_size
        return mrope_positions(token_ids, grids, self.config.prompt.image_pad_id, merge, position)

    def _seen(self, token_ids: Int64, images: Sequence[SeenImage], chunk: slice, row: int) -> Iterator[_Seen]:
        """Which tokens of which images are in a chunk of a prompt that begins at a row of the run."""
        if not images:
            return
        pads = np.nonzero(token_ids == self.config.prompt.image_pad_id)[0]
        for image, start in zip(images, _starts([image.num_tokens for image in images]), strict=True):
            places = pads[start : start + image.num_tokens]
            inside = np.nonzero((places >= chunk.start) & (places < chunk.stop))[0]
            if len(inside):
                yield _Seen(image, places[inside] - chunk.start + row, inside)

    def _encodings(self, images: Sequence[SeenImage]) -> list[_Encoding]:
        """What the image encoder has to do, run by run: images of about one size together, filled up to that."""
        by_size: dict[int, list[SeenImage]] = {}
        for image in images:
            by_size.setdefault(encoder_size(int(image.grid_thw.prod())), []).append(image)
        found: list[_Encoding] = []
        for size, some in by_size.items():
            while some:
                count = 1 << min(len(some), max(self._patches // size, 1)).bit_length() - 1
                found.append(self._encoding(some[:count], size))
                some = some[count:]
        return found

    def _encoding(self, images: Sequence[SeenImage], size: int) -> _Encoding:
        merge = self.config.image.merge_size
        area = self.config.vision.in_channels * self.config.image.patch_size**2
        block = self._host(len(images) * size * area)
        pixels = block[: len(images) * size * area].reshape(len(images), size, area)
        positions = np.zeros((len(images), size, 2), np.int64)
        lengths = np.empty(len(images), np.int32)
        for i, image in enumerate(images):
            values, grid_thw = patches_uint8(image.pixels(), self.config.image)
            lengths[i] = length = len(values)
            pixels[i, :length], pixels[i, length:] = values, 0
            positions[i, :length] = vision_positions(grid_thw, merge)
            image.drop_pixels()
        return _Encoding(images, {"positions": positions, "lengths": lengths}, pixels, block)

    # --- on the engine's own thread ------------------------------------------------------------------

    def _execute(self, runs: Sequence[_Run], total: int, written: Mapping[bytes, PageState]) -> list[float]:
        logits = np.full(total, np.nan, np.float32)
        try:
            for run in runs:
                start = time.perf_counter()
                found = self._compute(run)
                logits[run.places] = found[: len(run.places)]
                if self.on_run is not None:
                    rows = len(run.feeds["token_ids"])
                    past = sum(state.num_bytes for state in run.pasts) if run.kept_rows else 0
                    stats = RunStats(rows, len(run.places), run.kept_rows, past, time.perf_counter() - start)
                    self.on_run(stats)
        except BaseException:
            self._lose(written)
            raise
        finally:
            self._pinned += [each.block for run in runs for each in run.encode]
        return list(map(float, logits))

    def _compute(self, run: _Run) -> Array:
        """The logits of a run (B,)."""
        if any(state.pages.is_lost for state in run.pasts):
            raise DeviceError("the run failed that was to compute a document of this one. Score its pairs again.")
        layer = self.pool.num_pages * self._page_row
        for source, target in run.layout.copies:
            rows = 2 * self.config.decoder.num_layers
            places = self._pages + target * self._page_row, self._pages + source * self._page_row
            self._device.copy(*places, self._page_row, rows, layer, layer)
        embeds = self._embeds(run)
        pairs = len(run.feeds["last_index"])
        hidden = self._placed("hidden", (pairs, self.config.decoder.hidden_size), "float32")
        self._decoder.run({**run.feeds, "image_embeds": embeds}, {"hidden": hidden})
        logits = np.empty(pairs, np.float32)
        self._head.run({"hidden": hidden}, {"logit": logits})
        return logits

    def _embeds(self, run: _Run) -> Placed:
        """The run's images as the decoder takes them, one behind the other on the device."""
        D, item = self.config.decoder.hidden_size, item_size(self.dtype)
        merged = self.config.image.merge_size**2
        total = sum(each.num_patches // merged for each in run.encode) + sum(map(len, run.embeds))
        whole = self._placed("embeds", (max(total, 1), D), self.dtype)
        row = 0
        for each in run.encode:
            if self._vision is None:
                self._vision = self._open(set_name("vision", "cuda"))
            pixels = self._placed("pixels", each.pixels.shape, "uint8")
            self._device.copy(pixels.address, each.pixels.ctypes.data, each.pixels.nbytes)
            out = Placed(whole.address + row * D * item, (each.num_patches // merged, D), self.dtype)
            self._vision.run({**each.feeds, "pixels": pixels}, {"image_embeds": out})
            row += each.num_patches // merged
        for image, start in run.own.items():
            values = np.empty((image.num_tokens, D * item), np.uint8)
            self._device.copy(values.ctypes.data, whole.address + start * D * item, values.nbytes)
            image.embeds = values
        for values in run.embeds:
            self._device.copy(whole.address + row * D * item, values.ctypes.data, values.nbytes)
            row += len(values)
        return whole

    def _placed(self, name: str, shape: tuple[int, ...], dtype: str) -> Placed:
        """Memory for something that a run needs, which grows with the largest."""
        num_bytes = int(np.prod(shape)) * item_size(dtype)
        if num_bytes > self._scratch.get(name, (0, 0))[1]:
            if name in self._scratch:  # popped first, as there may be no more memory, and then it is nobody's
                self._device.free(self._scratch.pop(name)[0])
            self._scratch[name] = self._device.allocate(num_bytes), num_bytes
        return Placed(self._scratch[name][0], shape, dtype)

    def _host(self, num_bytes: int) -> NDArray[np.uint8]:
        """Memory of the computer that is copied from at full speed; it comes back when its run is done."""
        for i, block in enumerate(self._pinned):
            if len(block) >= num_bytes:
                return self._pinned.pop(i)
        return self._device.pinned(max(num_bytes, self._patches * 600))


def _halves(parts: Sequence[Part]) -> tuple[list[Part], list[Part]] | None:
    """The pairs before and after the middle of them, in order; None where there is one part of one pair at most."""
    if len(parts) > 1:
        return list(parts[: len(parts) // 2]), list(parts[len(parts) // 2 :])
    part, middle = parts[0], len(parts[0].pairs) // 2
    if middle == 0:
        return None
    return [replace(part, pairs=part.pairs[:middle])], [replace(part, pairs=part.pairs[middle:])]


def _has_images(part: Part) -> bool:
    """Whether there are any that may have to be encoded."""
    return bool(part.document.images and part.state is None) or any(pair.images for pair in part.pairs)


def _starts(counts: Sequence[int]) -> Int64:
    """Where each begins that is so long."""
    return np.cumsum([0, *counts[:-1]]) if len(counts) else np.zeros(0, np.int64)


def encoder_size(num_patches: int) -> int:
    """To how many patches an image is filled up: few sizes, as attention is made ready for each of them (60 ms)."""
    if num_patches <= 512:
        return max(1 << (num_patches - 1).bit_length(), 64)
    step = 512 if num_patches <= 4096 else 2048
    return -(-num_patches // step) * step


def _paged(kv: Array, num_pages: int) -> Array:
    """(L, 2, K, T, C) of a state → (2L, pages, P, K, C), the last page filled up."""
    layers, _, heads, length, width = kv.shape
    paged = np.zeros((2 * layers, num_pages * PAGE_TOKENS, heads, width), kv.dtype)
    paged[:, :length] = kv.reshape(2 * layers, heads, length, width).transpose(0, 2, 1, 3)
    return paged.reshape(2 * layers, num_pages, PAGE_TOKENS, heads, width)


def _unpaged(paged: Array, length: int) -> Array:
    """The same the other way round."""
    _, _, _, heads, width = paged.shape
    tokens = paged.reshape(len(paged) // 2, 2, -1, heads, width)[:, :, :length]
    return np.ascontiguousarray(tokens.transpose(0, 1, 3, 2, 4))


def _as_bfloat16(values: NDArray[np.float16]) -> NDArray[np.uint16]:
    """The nearest, half to even, as bits: numpy has no such type."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # the state tells that it is not finite
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float16)


def number_of_bytes(variable: str) -> int | None:
    """What an environment variable says; None where it is not set. Raises ValueError."""
    told = os.environ.get(variable)
    if not told:
        return None
    if not (told.isascii() and told.isdigit()):
        raise ValueError(f"{variable}: {told!r:.40} is no number of bytes. Say 8000000000 for 8 GB.")
    return int(told)
