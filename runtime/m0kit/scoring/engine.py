"""What computes: documents' states, images' embeddings, and the logits of a run, with the artifact's graphs.

Owns the feeds of the graphs, and what a state is: here arrays in the computer's memory. Which pairs go into a run is
the schedule's, which knows a state only as what the engine gave for it.

    engine = GraphEngine(config, graphs, kv="fp32", salt=salt)
    (state,) = engine.states([prepared.document])
    engine.begin([Part(prepared.document, [prepared], state)])()  # → [logit]
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from m0kit.artifact import ports
from m0kit.artifact.ports import present_names
from m0kit.config import DecoderConfig, ModelConfig
from m0kit.errors import ArtifactDamagedError, RecordDamagedError, ScoreError
from m0kit.keeping.cache import Cache, Once
from m0kit.keeping.states import Pasts, State
from m0kit.keeping.store import Store
from m0kit.scoring.image import patchify
from m0kit.scoring.images import SeenImage
from m0kit.scoring.planner import PATCH_BUDGET, TILE, TOKEN_BUDGET, Group, image_rows, layout_groups, pack
from m0kit.scoring.positions import mrope_positions, position_after, vision_positions
from m0kit.scoring.prepare import ENCODING_COST, Document, Prepared
from m0kit.scoring.sessions import Graph
from m0kit.trace import Trace

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

# Bytes of pasts in one run: a query on 18 pages at a time in float16, enough rows for products at full speed.
PAST_BYTES: Final = 384 << 20
LOW_MEMORY_PAST_BYTES: Final = 96 << 20

_log: Final = logging.getLogger(__name__)


class Handle(Protocol):
    """A document's state, wherever it is."""

    @property
    def num_bytes(self) -> int:
        """What it takes of the memory that runs share."""

    @property
    def is_finite(self) -> bool:
        """Whether it can be used: no value overflowed."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some pairs of a document that go into one run, and its state where that was computed before."""

    document: Document
    pairs: Sequence[Prepared]
    state: Any = None  # a Handle of the engine that runs it


@dataclass(frozen=True, slots=True)
class RunStats:
    """What one run of the decoder was."""

    rows: int  # tokens that were computed, without what fills up
    pairs: int
    kept_rows: int  # tokens of states that were computed before
    past_bytes: int  # of these states
    seconds: float  # with encoding the images that it needed


class Engine(Protocol):
    """What a schedule needs of whatever computes."""

    config: ModelConfig
    low_memory: bool  # images are encoded for many documents before the decoder takes over

    @property
    def rows(self) -> int:
        """Tokens that a run takes; one pair alone may have more."""

    @property
    def past_bytes(self) -> int:
        """What the states of a run may take, in the bytes of their handles; one alone may take more."""

    @property
    def runs_ahead(self) -> int:
        """Runs that are begun before the logits of the first are waited for; 0 where `begin` itself computes."""

    @property
    def prepare_threads(self) -> int:
        """Threads that prepare pairs while it computes; 1 where nothing is won by preparing beside it."""

    @property
    def kept(self) -> str:
        """What it keeps of a document, in words."""

    @property
    def keeps(self) -> bool:
        """Whether documents are computed apart from their queries."""

    def find(self, document: Document) -> Handle | None:
        """Its state where it is kept. Raises InputError for a document that is too large for this engine."""

    def has(self, document: Document) -> bool:
        """Whether it is kept, without fetching it: one that turns out damaged, or goes, is computed then."""

    def prefetch(self, documents: Iterable[Document]) -> None:
        """These will be asked for soon."""

    def states(self, documents: Sequence[Document]) -> Sequence[Handle]:
        """States of documents that are not kept, in one run; those that are finite may be kept from then on."""

    def encode(self, images: Sequence[SeenImage]) -> None:
        """Have the embeddings of these ready."""

    def begin(self, parts: Sequence[Part]) -> Callable[[], list[float]]:
        """A run. Returns what waits for one logit of each pair, in order, which may be NaN or infinite.

        What is called raises what went wrong; it is called once, or not at all where nobody wants the run any more.
        Documents without a state are there for the next run, where they are kept.
        """

    def rest(self, used: Iterable[Document]) -> None:
        """Nothing waits for now; the states of these documents were used."""


class Graphs(NamedTuple):
    """The three graphs of an artifact."""

    vision: Graph
    decoder: Graph
    head: Graph


class GraphEngine:
    """Runs graphs on arrays. Thread-safe; several schedules may share one, and then compute nothing twice."""

    rows = TOKEN_BUDGET
    runs_ahead = 0
    prepare_threads = 1

    def __init__(
        self,
        config: ModelConfig,
        graphs: Graphs,
        *,
        kv: ports.Kept,
        salt: bytes,
        cache: Cache | None = None,
        store: Store | None = None,
        low_memory: bool = False,
    ) -> None:
        """`salt` tells what this artifact computes from what another does, in the cache."""
        self.config, self.graphs, self.kv, self.salt = config, graphs, kv, salt
        self.cache, self.store, self.low_memory = cache, store, low_memory
        self.past_bytes = LOW_MEMORY_PAST_BYTES if low_memory else PAST_BYTES
        self.tile = TILE  # to which runs are filled up; 1 for those who count what a run sees
        self.on_run: Callable[[RunStats], object] | None = None
        self._once = Once()
        self._spare: list[Pasts] = []  # memory for pasts that no run is using
        self._no_past = Pasts(config.decoder, kv).feeds([])

    # --- states --------------------------------------------------------------------------------------

    @property
    def kept(self) -> str:
        return f"what is kept of the document (keys and values in {self.kv})"

    @property
    def keeps(self) -> bool:  # to keep them, or to round them as if they were kept
        return self.cache is not None or self.store is not None or self.kv != "fp32"

    def find(self, document: Document) -> State | None:
        """A document's state where it was computed before: that of so many tokens."""
        state: State | None = self.cache.get(document.key) if self.cache is not None else None
        if state is not None or self.store is None:
            return state
        return read_state(self.store, document, self.config.decoder, self.kv)

    def has(self, document: Document) -> bool:
        key = document.key
        return (self.cache is not None and key in self.cache) or (
            self.store is not None and bool(self.store.has([key]))
        )

    def prefetch(self, documents: Iterable[Document]) -> None:
        if self.store is not None:
            self.store.prefetch(document.key for document in documents)

    def states(self, documents: Sequence[Document]) -> list[State]:
        """States of documents that were not there, computed here or by another thread that has them in hand."""
        by_key = {document.key: document for document in documents}
        known = self.cache.peek if self.cache is not None else lambda _: None
        return self._once.get(list(by_key), known, lambda keys: self.compute([by_key[key] for key in keys]))

    def compute(self, documents: Sequence[Document]) -> list[State]:
        """States of documents in one run, whatever is kept; those that are finite go into the cache."""
        if not documents:
            return []
        names = [name for layer in range(self.config.decoder.num_layers) for name in present_names(layer)]
        out = self._decode([Part(document, []) for document in documents], names)
        states, row = [], 0
        for document in documents:
            rows = slice(row, row + document.length)
            state = State.from_presents(out, rows, self.config.decoder, self.kv)
            row = rows.stop
            if self.cache is not None and state.is_finite:
                self.cache.put(document.key, state, num_bytes=state.num_bytes, cost=document.cost)
            states.append(state)
        return states

    def rest(self, used: Iterable[Document]) -> None:
        self._spare.clear()
        if self.store is not None and (keys := {document.key for document in used}):
            self.store.touch(keys)

    # --- images --------------------------------------------------------------------------------------

    def encode(self, images: Sequence[SeenImage]) -> None:
        """Embeddings of images that have none, packed."""
        new = []
        for image in dict.fromkeys(images):
            if image.embeds is None and self.cache is not None:
                image.embeds = self.cache.get(self.key(image))
            if image.embeds is None:
                new.append(image)
        sized = ((image, [int(image.grid_thw.prod())]) for image in new)
        for packed in pack(sized, [PATCH_BUDGET]):
            for image, embeds in zip(packed, self._encoded(packed), strict=True):
                image.embeds = embeds
                image.drop_pixels()

    def _encoded(self, images: Sequence[SeenImage]) -> list[Array]:
        """Embeddings by this thread, or by another that has the same pixels in hand."""
        cache = self.cache
        if cache is None:
            return self._encode(images)
        by_key = {self.key(image): image for image in images}

        def encode(keys: list[bytes]) -> list[Array]:
            embeds = self._encode([by_key[key] for key in keys])
            for key, own in zip(keys, embeds, strict=True):
                if np.isfinite(own).all():
                    cache.put(key, own, num_bytes=own.nbytes, cost=ENCODING_COST * len(own))
            return embeds

        return self._once.get([self.key(image) for image in images], cache.peek, encode)

    def _encode(self, images: Sequence[SeenImage]) -> list[Array]:
        patches = [patchify(image.pixels(), self.config.image) for image in images]
        merge = self.config.image.merge_size
        feeds = {
            "patches": np.concatenate([p.values for p in patches]),
            "positions": np.concatenate([vision_positions(p.grid_thw, merge) for p in patches]),
            "images": image_rows([len(p.values) for p in patches]),
        }
        out = self.graphs.vision.run(feeds, ["image_embeds"])["image_embeds"]
        if self.kv != "fp32":
            out = out.astype(np.float16)
        ends = np.cumsum([image.num_tokens for image in images])
        if len(out) != ends[-1]:
            raise ArtifactDamagedError(
                f"the vision graph gives {len(out)} rows for {ends[-1]} visual tokens. Export the artifact again."
            )
        return [rows.copy() if len(images) > 1 else rows for rows in np.split(out, ends[:-1])]

    def key(self, image: SeenImage) -> bytes:
        """By which its embeddings are kept."""
        return hashlib.sha256(b"image" + self.salt + image.digest()).digest()

    # --- runs ----------------------------------------------------------------------------------------

    def begin(self, parts: Sequence[Part]) -> Callable[[], list[float]]:
        """Computes at once."""
        hidden = self._decode(parts, ["hidden"])["hidden"]
        found: list[float] = self.logits(hidden)[: sum(len(part.pairs) for part in parts)].tolist()
        return lambda: found

    def logits(self, hidden: Float32) -> Float32:
        """hidden (B, D) → (B,)"""
        return self.graphs.head.run({"hidden": hidden}, ["logit"])["logit"]

    def positions(self, token_ids: Int64, images: Sequence[SeenImage], position: int = 0) -> Int64:
        """(3, T) of one prompt (T,) with these images in order, or of a part of one from `position` on."""
        grids = np.asarray([image.grid_thw for image in images], np.int64).reshape(-1, 3)
        merge = self.config.image.merge_size
        return mrope_positions(token_ids, grids, self.config.prompt.image_pad_id, merge, position)

    def trace(self, pair: Prepared, layers: Sequence[str] = (), decoder: Graph | None = None) -> Trace:
        """Every stage of a pair that is run alone, with `layers` that another `decoder` has as outputs."""
        images = pair.document.images + pair.images
        patches = [patchify(image.pixels(), self.config.image) for image in images]
        self.encode(images)
        out = self._decode([Part(pair.document, [pair])], ["hidden", *layers], decoder)
        logit = float(self.logits(out["hidden"])[0])
        is_finite = math.isfinite(logit)
        # The last layer has the wanted rows alone, the others have all of the run, which may be filled up.
        rows = [pair.document.length + pair.num_rows - 1] * (len(layers) - 1) + [0]
        return Trace(
            token_ids=pair.prompt.token_ids,
            positions=self.positions(pair.prompt.token_ids, images),
            grid_thw=np.asarray([p.grid_thw for p in patches], np.int64).reshape(-1, 3),
            patches=tuple(p.values for p in patches),
            image_embeds=tuple(np.asarray(image.embeds, np.float32) for image in images),
            hidden=out["hidden"][0],
            logit=logit,
            score=sigmoid(logit - self.config.prompt.logit_bias) if is_finite else math.nan,
            layers=np.stack([out[name][row] for name, row in zip(layers, rows, strict=True)]) if layers else None,
            error=None if is_finite else not_finite("the model's answer").of_pair(0),
        )

    def _decode(
        self, parts: Sequence[Part], outputs: Sequence[str], decoder: Graph | None = None
    ) -> dict[str, Float32]:
        """One run: prefixes that are not kept, and the suffixes behind each → hidden (B, D), filled up, and more."""
        start = time.perf_counter()
        layout = layout_groups([_group(part) for part in parts], self.tile)
        token_ids: list[Int64] = []
        positions: list[Int64] = []
        images: list[SeenImage] = []
        for ids, places, some in self._rows(parts):
            token_ids.append(ids)
            positions.append(places)
            images += some
        token_ids.append(token_ids[0][:1].repeat(layout.fill))
        positions.append(positions[0][:, :1].repeat(layout.fill, axis=1))
        ids = np.concatenate(token_ids)
        self.encode(images)
        embeds = [np.asarray(image.embeds, np.float32) for image in images]
        none = np.zeros((0, self.config.decoder.hidden_size), np.float32)
        states: list[State] = [part.state for part in parts if part.state is not None]
        feeds = {
            "token_ids": ids,
            "positions": np.ascontiguousarray(np.concatenate(positions, axis=1)),
            "image_embeds": np.concatenate([none, *embeds]),
            "image_token_index": np.nonzero(ids[: layout.num_tokens] == self.config.prompt.image_pad_id)[0],
            "pieces": layout.pieces,
            "last_index": layout.last_index,
            "last_pieces": layout.last_pieces,
        }
        out = self._with_pasts(feeds, states, outputs, decoder or self.graphs.decoder)
        if self.on_run is not None:
            kept = sum(state.length for state in states)
            past_bytes = sum(state.num_bytes for state in states)
            seconds = time.perf_counter() - start
            self.on_run(RunStats(layout.num_tokens, layout.num_pairs, kept, past_bytes, seconds))
        return out

    def _rows(self, parts: Sequence[Part]) -> Iterator[tuple[Int64, Int64, tuple[SeenImage, ...]]]:
        """Token ids, positions and images, in the order of the layout."""
        for part in parts:
            document = part.document
            if part.state is None:
                yield document.prefix, self.positions(document.prefix, document.images), document.images
            for pair in part.pairs:
                grids = (image.grid_thw for image in document.images)
                start = position_after(pair.prompt.prefix_length, grids, self.config.image.merge_size)
                yield pair.prompt.suffix, self.positions(pair.prompt.suffix, pair.images, start), pair.images

    def _with_pasts(
        self, feeds: Mapping[str, Array], states: Sequence[State], outputs: Sequence[str], decoder: Graph
    ) -> dict[str, Float32]:
        if not states:
            return decoder.run({**feeds, **self._no_past}, outputs)
        try:
            pasts = self._spare.pop()
        except IndexError:
            pasts = Pasts(self.config.decoder, self.kv)
        try:
            return decoder.run({**feeds, **pasts.feeds(states)}, outputs)
        finally:
            self._spare.append(pasts)


def read_state(store: Store, document: Document, config: DecoderConfig, kv: ports.Kept) -> State | None:
    """A document's state from an index; None where none is there, or none that can be its own, which is logged."""
    try:
        raw = store.get(document.key)
    except RecordDamagedError as error:
        _log.warning("%s It was computed anew for now.", error)
        return None
    if raw is None:
        return None
    try:
        state = State.from_bytes(raw, config, kv)
        wrong = "" if state.length == document.length else f"{state.length} tokens of {document.length}"
    except ValueError as error:
        wrong = str(error)
    if wrong:
        told = "%s: a document's state cannot be its own (%s). It was computed anew for now."
        _log.warning(told, store.path, wrong)
        return None
    return state


def _group(part: Part) -> Group:
    suffixes = [(pair.prompt.prefix_length, pair.num_rows) for pair in part.pairs]
    return Group(part.document.length, suffixes, kept=part.state is not None)


def sigmoid(value: float) -> float:
    """1 / (1 + exp(−value)) in two forms, so that neither overflows nor loses what is near 0."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    small = math.exp(value)
    return small / (1 + small)


def not_finite(what: str) -> ScoreError:
    """What is wrong where a number of the model's is none."""
    return ScoreError(
        f"{what} is not a finite number. The artifact's precision may be too narrow for this input: check it with "
        "`m0kit inspect --verify`, use one in fp32, or leave the input out."
    )
