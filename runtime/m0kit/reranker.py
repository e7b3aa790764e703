"""From pairs to scores: prepare, plan, encode images, decode, score. The one public class of the runtime.

    reranker = Reranker.load("m0-fp32")
    reranker.score([("slm markdown", Path("page.png"))])          # → array([0.49], dtype=float32)

`evaluate` does the work; `score`, `predict`, `rank`, `rerank` and `compute_score` are its thin faces under
the names that users of other rerankers know. A score never depends on what else is in the call.
"""

import copy
import hashlib
import importlib
import json
import math
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m0kit import forks
from m0kit.artifact.answers import KINDS, Answer, Engine, Kind, Trial
from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import TOKENIZER, Manifest, read_manifest, verify_files
from m0kit.artifact.ports import KV, Kept, decoder_name
from m0kit.config import ModelConfig
from m0kit.errors import (
    DependencyError,
    InputError,
    M0kitError,
    RecordDamagedError,
    ScoreError,
    StoreError,
)
from m0kit.keeping.cache import Cache, Once
from m0kit.keeping.states import Pasts, State
from m0kit.keeping.store import Document as StoredDocument
from m0kit.keeping.store import Store
from m0kit.precision import check_device
from m0kit.reading.inputs import Content, Known, Picture, Text, as_list, is_many, parse_pair
from m0kit.scoring import sessions
from m0kit.scoring.image import patchify
from m0kit.scoring.images import ENCODING_COST, Images
from m0kit.scoring.planner import TILE, TOKEN_BUDGET, Group, layout_groups, pack
from m0kit.scoring.positions import mrope_positions
from m0kit.scoring.prompt import ImageTokens, Prompt, PromptBuilder, PromptDocument
from m0kit.trace import Trace

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
OnError = Literal["raise", "mark"]

# Bytes of pasts in one run: a query on 18 pages at a time in float16, enough rows for products at full speed.
PAST_BYTES: Final = 384 << 20
LOW_MEMORY_PAST_BYTES: Final = 96 << 20
# For what the known answers' documents keep.
_ANSWERS_BYTES: Final = 64 << 20
# Documents whose states are read from disk ahead of the run that needs them.
READ_AHEAD: Final = 8
# Visual tokens whose embeddings wait for the decoder where it cannot be in memory beside the image encoder: 96 MiB.
LOW_MEMORY_VISUAL_TOKENS: Final = 16_384


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one pair. With an `error` score and logit are NaN."""

    score: float  # sigmoid(logit − bias), 0 to 1
    logit: float
    error: InputError | None = None
    truncated: tuple[str, ...] = ()  # "document", "query": what lost its end, as the published procedure cuts


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pair that can be run."""

    position: int  # in the call
    prompt: Prompt
    images: tuple[str, ...]  # keys of the query's images


@dataclass(slots=True, eq=False)
class Document:
    """What documents of equal tokens and pixels share in a call: one state, and the pairs that ask about it.

    Each keeps its own `PromptDocument`: a whole document may begin as one that was cut.
    """

    prefix: Int64
    images: tuple[str, ...]  # keys
    key: bytes  # of its state
    pairs: list[_Pair] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prefix)


# A call's documents by what they were given as, and by key: what those of one key share, and each one's own prompt.
Documents = dict[Any, tuple[Document, PromptDocument]]


@dataclass(frozen=True, slots=True)
class _Part:
    """Some pairs of a document that go into one run, and its state where it was computed before."""

    document: Document
    pairs: Sequence[_Pair]
    state: State | None = None

    @property
    def group(self) -> Group:
        suffixes = [(pair.prompt.prefix_length, len(pair.prompt.suffix)) for pair in self.pairs]
        return Group(self.document.length, suffixes, kept=self.state is not None)

    @property
    def costs(self) -> tuple[int, int]:
        """Rows of the run, bytes of pasts."""
        rows = sum(len(pair.prompt.suffix) for pair in self.pairs)
        return (rows + self.document.length, 0) if self.state is None else (rows, self.state.num_bytes)


class Reranker:
    """An opened artifact. Thread-safe: every call keeps its state to itself. A context manager.

    A forked child opens the graphs again on first use; a pickled one is loaded again from the same places. A copy
    shares the graphs.
    """

    tile = TILE  # to which runs are filled up; 1 for those who count what a run sees

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        config: ModelConfig,
        opener: sessions.GraphOpener,
        low_memory: bool = False,
        *,
        cache_bytes: int = 0,
        kv: str = "fp32",
        store: Store | None = None,
        device: str = "cpu",
        engine: Engine | None = None,
    ):
        """`engine`: what the graphs run in; without it known answers are not asked for."""
        self.manifest = manifest
        self.config = config
        self._folder = folder
        self._open = opener
        self._prompts = PromptBuilder(folder / TOKENIZER, config.prompt)
        self.low_memory = low_memory
        self.kv = kv
        self.device = device
        self._vision, self._decoder, self._head = (
            _Opened(partial(opener, folder, name)) for name in ("vision", decoder_name(kv), "head")
        )
        self._head.open()  # tells at once whether the device is there
        if low_memory:
            self._vision.rival, self._decoder.rival = self._decoder, self._vision
        else:
            self._decoder.open()
        self._trial = Trial(folder, manifest, engine, kv) if engine else None
        self._encoder: sessions.Graph = _Tried(self._vision, self) if engine else self._vision
        self.cache = Cache(cache_bytes) if cache_bytes else None
        self._once = Once()
        self.store = store
        self._loaded: dict[str, Any] | None = None  # arguments of `load`
        self._salt = _salt(manifest, config, kv)
        self._no_past = Pasts(config.decoder, kv).feeds([])

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str = "cpu",
        threads: int | None = None,
        *,
        memory: Literal["fast", "low"] = "fast",
        max_pixels: int | None = None,
        max_length: int | None = None,
        cache_bytes: int = 0,
        kv: Kept | None = None,
        index: str | os.PathLike[str] | None = None,
        open_graph: sessions.GraphOpener | None = None,
        revision: str | None = None,
        require_signature: str | os.PathLike[str] | Literal[False] | None = None,
    ) -> Self:
        """Open an artifact on a device ("cpu", "cuda", "cuda:1", or an execution provider's name).

        `path` is its folder, or as a string also a hub id, "organisation/name", with the `revision` (branch, tag,
        commit) if you like. A folder that is here wins; a `Path` is never looked for on the hub.
        `memory`: "fast" keeps quantised weights packed for this CPU in memory; "low" leaves int8 weights mapped
        from the artifact's files, and never holds the vision encoder and the decoder at once: a call encodes all its
        images first, and each opens anew for it. Float weights are mapped either way, and the vision encoder is opened
        when the first image comes. Scores are the same to rounding.
        `max_pixels` and `max_length` (tokens of a prompt) replace the checkpoint's own limits.
        `cache_bytes`: with more than 0, what was computed for documents and images is kept in memory up to so many
        bytes, and a document that comes again costs its new queries only. `index`: a folder that `m0kit index` made;
        its documents are known by {"id": …}, and what it holds of any document is not computed again. `kv`: how a
        document's keys and values are kept, "fp32" as computed (56 KiB a token; the default without an index),
        "fp16" (28) or "int8" (14). A score depends on `kv`, never on what happens to be kept.
        `open_graph` runs the graphs in another engine than ONNX Runtime.
        `require_signature`: a file of trusted signers (ssh-keygen(1), ALLOWED SIGNERS), one of whom must have signed
        the artifact (`m0kit sign`); by default the one that M0KIT_REQUIRE_SIGNATURE names. False: not even then.
        An artifact's known answers are scored first, where they were not right before; those with an image when the
        first image comes.
        Raises ArtifactError (WrongAnswerError where the engine computes wrongly, SignatureError), DeviceError,
        DependencyError,
        StoreError, ValueError for limits the model cannot have.
        """
        if memory not in ("fast", "low"):
            raise ValueError(f'memory must be "fast" or "low", got {memory!r}')
        store = Store.open(Path(index)) if index is not None else None
        kv = kv or (store.identity.get("kv") if store else "fp32")
        if kv not in KV:
            raise ValueError(f"kv must be one of {', '.join(KV)}, got {kv!r}")
        folder = resolve(path, revision, what="artifact")
        manifest = read_manifest(folder, require_signature=require_signature)
        config = manifest.model
        if max_pixels is not None:
            config = replace(config, image=replace(config.image, max_pixels=max_pixels))
        if max_length is not None:
            config = replace(config, prompt=replace(config.prompt, max_length=max_length))
        opener = open_graph
        engine = Engine(None, device, memory)
        if open_graph is None:
            engine = replace(engine, version=sessions.engine_version())
            check_device(device, manifest.schemes, str(folder))
            # 4-bit products are three times slower unpacked, int8 a little; packed floats gain nothing worth 9 GB.
            prepack = "int4" in manifest.schemes or ("int8" in manifest.schemes and memory == "fast")
            ports = manifest.graphs
            open_graph = partial(sessions.open_graph, device=device, threads=threads, prepack=prepack, ports=ports)
        verify_files(folder, manifest)
        low = memory == "low"
        reranker = cls(
            folder,
            manifest,
            config,
            open_graph,
            low,
            cache_bytes=cache_bytes,
            kv=kv,
            store=store,
            device=device,
            engine=engine,
        )
        if store:
            check_identity(store, reranker)
        reranker.try_answers("text")
        reranker._loaded = {
            "path": folder.absolute(),
            "device": device,
            "threads": threads,
            "memory": memory,
            "max_pixels": max_pixels,
            "max_length": max_length,
            "cache_bytes": cache_bytes,
            "kv": kv,
            "index": None if index is None else Path(index).absolute(),
            "open_graph": opener,
            "require_signature": os.path.abspath(require_signature) if require_signature else require_signature,
        }
        return reranker

    def close(self) -> None:
        """Let the graphs, what is kept in memory and the index go. A run in another thread ends first."""
        for graph in (self._vision, self._decoder, self._head):
            graph.close()
        self.cache = None
        if self.store is not None:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the arguments of `load`. Raises TypeError where these cannot be."""
        if self._loaded is None:
            raise TypeError("cannot pickle a Reranker that Reranker.load did not open. Load one in each process.")
        engine = self._loaded["open_graph"]
        try:
            pickle.dumps(engine)
        except Exception as error:  # whatever its parts raise
            raise TypeError(
                f"cannot pickle a Reranker with open_graph={engine!r:.80}, which cannot be pickled itself. "
                "Give a function of a module, or load one in each process."
            ) from error
        return _loaded_again, (type(self), self._loaded)

    @property
    def identity(self) -> dict[str, Any]:
        """What the states of documents depend on, besides the documents: an index belongs to one of these."""
        return {
            "artifact": self.manifest.fingerprint,
            "precision": self.manifest.scheme,
            "kv": self.kv,
            "model": json.loads(json.dumps(self.config.to_dict())),  # as it comes back from a file
        }

    def try_answers(self, *kinds: Kind, again: bool = False) -> list[Answer]:
        """Score the artifact's known answers of these kinds, all by default, unless they were right before.

        With `again` they are scored in any case. Limits and caches of this reranker play no part. Returns those that
        were scored. Raises WrongAnswerError.
        """
        if self._trial is None:
            return []
        plain = copy.copy(self)
        plain.config = self.manifest.model
        plain._prompts = self._prompts.with_limits(self.manifest.model.prompt)
        plain._encoder = self._vision
        plain.store = None
        plain._once = Once()  # a user's own call may be waiting for the very same image
        found: list[Answer] = []
        for kind in kinds or KINDS:
            # Texts are computed as documents that are kept, many rows, and queries behind them, a few rows; images
            # without, so that both ways through the decoder are taken.
            plain.cache = Cache(_ANSWERS_BYTES) if kind == "text" else None
            found += self._trial.check(kind, plain._known_logits, again=again)
        return found

    def _known_logits(self, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
        return [result.logit for result in self.evaluate(pairs)]

    # --- the one method ----------------------------------------------------------------------------

    def evaluate(self, pairs: Iterable[Any], *, on_error: OnError = "mark", progress: bool = False) -> list[Result]:
        """Score (query, document) pairs; one Result each, in input order.

        Query and document are text (str), an image (PIL image, path, bytes), or {"text": …} / {"image": …};
        {"id": …} is a document of the index.
        A pair that cannot be scored is marked with its error and costs the others nothing, or, with
        on_error="raise", raises, before anything is run where that can be known. Raises InputError for `pairs` that
        are no list.
        """
        pairs = as_list(pairs, "pairs", "a list of pairs (query, document)")
        results: list[Result | None] = [None] * len(pairs)
        for position, result in self.stream(pairs, on_error=on_error, progress=progress):
            assert results[position] is None
            results[position] = result
        done = [result for result in results if result is not None]
        assert len(done) == len(pairs)  # a missing one would shift all that follow
        return done

    def stream(
        self, pairs: Iterable[Any], *, on_error: OnError = "mark", progress: bool = False
    ) -> Iterator[tuple[int, Result]]:
        """As `evaluate`, but gives (position in `pairs`, Result) as soon as it is done, in the order of the work."""
        pairs = as_list(pairs, "pairs", "a list of pairs (query, document)")
        images = self.open_images()
        # tqdm takes a lock of all processes even where it shows nothing; one that is held at a fork stays so.
        with tqdm(total=len(pairs), unit="pair") if progress else nullcontext() as bar:
            documents: Documents = {}
            for position, pair in enumerate(pairs):
                try:
                    self._prepare(position, pair, documents, images)
                except InputError as error:
                    if on_error == "raise":
                        raise
                    if bar is not None:
                        bar.update()
                    yield position, Result(math.nan, math.nan, error)
            work = dict.fromkeys(document for document, _ in documents.values() if document.pairs)
            for done, logits in self._work(list(work), images):
                for pair, logit in zip(done, logits, strict=True):
                    if bar is not None:
                        bar.update()
                    if isinstance(logit, InputError):
                        if on_error == "raise":
                            raise logit
                        yield pair.position, Result(math.nan, math.nan, logit)
                    else:
                        yield pair.position, self._result(pair.prompt, logit)

    def trace(self, pair: Any, layers: bool = False) -> Trace:
        """Everything one pair produces on its way to the score, for comparison with the reference.

        With `layers` also the last token after each decoder layer, which opens the decoder a second time. A logit that
        is not finite is the trace's `error`; its stages tell where that began.
        """
        images = self.open_images()
        documents: Documents = {}
        self._prepare(0, pair, documents, images)
        document, _ = next(iter(documents.values()))
        (ready,) = document.pairs
        keys = document.images + ready.images
        patches = [patchify(images.pixels(key), self.config.image) for key in keys]
        embeds = [images.embeds([key])[0] for key in keys]
        names = [f"layers.{i}" for i in range(self.config.decoder.num_layers)] if layers else []
        decoder = self._open(self._folder, "decoder", also=names) if layers else None
        part = _Part(document, [ready])
        out = self._decode([part], images, ["hidden", *names], decoder=decoder)
        logit = float(self._logits(out["hidden"])[0])
        is_finite = math.isfinite(logit)
        # The last layer has the wanted rows alone, the others have all of the run, which may be filled up.
        last = document.length + len(ready.prompt.suffix) - 1
        rows = [last] * (len(names) - 1) + [0]
        return Trace(
            token_ids=ready.prompt.token_ids,
            positions=self._positions(ready.prompt.token_ids, keys, images),
            grid_thw=np.asarray([p.grid_thw for p in patches], np.int64).reshape(-1, 3),
            patches=tuple(p.values for p in patches),
            image_embeds=tuple(embeds),
            hidden=out["hidden"][0],
            logit=logit,
            score=self._result(ready.prompt, logit).score if is_finite else math.nan,
            layers=np.stack([out[name][row] for name, row in zip(names, rows, strict=True)]) if layers else None,
            error=None if is_finite else _not_finite("pair 0: the model's answer"),
        )

    # --- its steps ---------------------------------------------------------------------------------

    def open_images(self) -> Images:
        """For the images of one call. Raises M0kitError after `close`."""
        if self._head.is_closed:
            raise M0kitError(f"{self._folder}: this reranker was closed. Load the artifact again.")
        return Images(self.config.image, self._encoder, self.cache, self._once, self._salt, half=self.kv != "fp32")

    def _prepare(self, position: int, pair: Any, documents: Documents, images: Images) -> None:
        """Parse a pair, look at its images, build its prompt, add it to its document. Raises InputError."""
        where = f"pair {position}"
        parsed = parse_pair(pair, where)
        document, begun = self.document(parsed.document, f"{where}: document", documents, images)
        query, keys = self._part(parsed.query, f"{where}: query", images)
        try:
            prompt = self._prompts.build(query, begun)
        except InputError as error:
            raise type(error)(f"{where}: {error}") from None
        images.claim(document.images + keys)
        document.pairs.append(_Pair(position, prompt, keys))

    def document(
        self, content: Content, where: str, documents: Documents, images: Images, *, keyed: bool = False
    ) -> tuple[Document, PromptDocument]:
        """The entry of a document in `documents`, made when it is new, with a key where asked or where states are kept.

        Documents of one key share the first part of the entry. Raises InputError.
        """
        name = content.key if isinstance(content, Picture) else content
        if name not in documents:
            kept = self._stored(content.id, where) if isinstance(content, Known) else None
            part, images_of_it = self._part(content if kept is None else content_of(kept), where, images)
            prompt, key = self._prompts.document(part), b""
            if kept is not None and kept.kind == "image":
                key = kept.key  # made from the same pixels and tokens, which need not be decoded for it again
            elif keyed or self.keeps:
                payload = [prompt.prefix.tobytes(), *(images.digest(image) for image in images_of_it)]
                key = hashlib.sha256(b"document" + self._salt + b"".join(payload)).digest()
            entry = Document(prompt.prefix, images_of_it, key), prompt
            shared, _ = documents.setdefault(key, entry) if key else entry
            documents[name] = shared, prompt
        return documents[name]

    def _part(self, content: Content, where: str, images: Images) -> tuple[str | ImageTokens, tuple[str, ...]]:
        if isinstance(content, Known):
            content = content_of(self._stored(content.id, where))
        if isinstance(content, Picture):
            return ImageTokens(images.see(content, where)), (content.key,)
        return content.text, ()

    def _stored(self, name: str, where: str) -> StoredDocument:
        """A document of the index. Raises InputError."""
        if self.store is None:
            raise InputError(f'{where}: {{"id": {name!r}}} names a document of an index, and none is open.')
        try:
            document = self.store.document(name)
        except RecordDamagedError as error:
            raise InputError(f"{where}: {error}") from None
        if document is None:
            raise InputError(f"{where}: {self.store.path} has no document {name!r}. Add it with `m0kit index add`.")
        return document

    def _work(
        self, documents: Sequence[Document], images: Images
    ) -> Iterator[tuple[Sequence[_Pair], Sequence[float | InputError]]]:
        """Pairs and their logits, run by run; an error in place of a logit where an image has gone meanwhile."""
        if not self.low_memory:
            yield from self._runs(documents, images)
            return
        wanted = {document: self._wanted(document) for document in documents}
        sized = ((d, [sum(images.num_tokens(key) for key in wanted[d])]) for d in documents)
        for some in pack(sized, [LOW_MEMORY_VISUAL_TOKENS]):
            images.embeds(images.there([key for document in some for key in wanted[document]]))
            yield from self._runs(some, images)

    def _wanted(self, document: Document) -> list[str]:
        """The images that must be encoded for a document's pairs."""
        own = () if self._has(document.key) else document.images
        return [*own, *(key for pair in document.pairs for key in pair.images)]

    def _runs(
        self, documents: Sequence[Document], images: Images
    ) -> Iterator[tuple[Sequence[_Pair], Sequence[float | InputError]]]:
        pasts = Pasts(self.config.decoder, self.kv)
        failed: list[tuple[_Pair, InputError]] = []
        parts = ((part, part.costs) for part in self._parts(documents, images, failed))
        for run in pack(parts, (TOKEN_BUDGET, LOW_MEMORY_PAST_BYTES if self.low_memory else PAST_BYTES)):
            logits = self._logits(self._decode(run, images, ["hidden"], pasts)["hidden"])
            pairs = [pair for part in run for pair in part.pairs]
            for part in run:
                for pair in part.pairs:
                    images.release(part.document.images + pair.images)
            yield pairs, [self._answer(*answer) for answer in zip(pairs, logits[: len(pairs)].tolist(), strict=True)]
        if self.store is not None:
            self.store.touch({document.key for document in documents})
        if failed:
            yield [pair for pair, _ in failed], [error for _, error in failed]

    def _parts(
        self, documents: Sequence[Document], images: Images, failed: list[tuple[_Pair, InputError]]
    ) -> Iterator[_Part]:
        """The pairs of each document, cut where they are too many for one run.

        Where documents are kept, those without a state are computed first, several in a run.
        """

        def fetched(keys: Sequence[str], pairs: Sequence[_Pair]) -> bool:
            try:
                images.fetch(keys)
            except InputError as error:
                failed.extend((pair, error) for pair in pairs)
                return False
            return True

        def computed(some: Sequence[Document]) -> Iterator[_Part]:
            for document, state in zip(some, self._states(some, images), strict=True):
                if state.is_finite:
                    yield from _split(document, state)
                else:
                    failed.extend((pair, state_not_finite(f"pair {pair.position}", self.kv)) for pair in document.pairs)

        new: list[Document] = []
        for document in self._ahead(documents):
            document.pairs = [pair for pair in document.pairs if fetched(pair.images, [pair])]
            state = self.state(document.key, document.length) if document.pairs else None
            if not document.pairs or (state is None and not fetched(document.images, document.pairs)):
                continue
            if state is not None or not self.keeps:
                yield from _split(document, state)
                continue
            if new and sum(d.length for d in new) + document.length > TOKEN_BUDGET:
                yield from computed(new)
                new = []
            new.append(document)
        yield from computed(new)

    def _ahead(self, documents: Sequence[Document]) -> Iterator[Document]:
        """The documents, while the disk reads the states of those that follow."""
        if self.store is None:
            yield from documents
            return
        for some in range(0, len(documents), READ_AHEAD):
            start = some + READ_AHEAD if some else 0
            self.store.prefetch(d.key for d in documents[start : some + 2 * READ_AHEAD])
            yield from documents[some : some + READ_AHEAD]

    @property
    def keeps(self) -> bool:
        """Whether documents are computed apart from their queries: to be kept, or to round them as if they were."""
        return self.cache is not None or self.store is not None or self.kv != "fp32"

    def state(self, key: bytes, length: int) -> State | None:
        """A document's state where it was computed before: that of so many tokens."""
        state: State | None = self.cache.get(key) if self.cache is not None else None
        if state is not None or self.store is None:
            return state
        try:
            raw = self.store.get(key)
        except RecordDamagedError as error:
            warnings.warn(f"{error} It was computed anew for now.", stacklevel=2)
            return None
        if raw is None:
            return None
        try:
            state = State.from_bytes(raw, self.config.decoder, self.kv)
            what = "" if state.length == length else f"{state.length} tokens, where the document has {length}"
        except ValueError as error:
            what = str(error)
        if what:
            told = f"{self.store.path}: a document's state cannot be its own ({what}). It was computed anew for now."
            warnings.warn(told, stacklevel=2)
            return None
        return state

    def _has(self, key: bytes) -> bool:
        """Whether there is a state, without fetching it: one that turns out damaged, or goes, is computed then."""
        return (self.cache is not None and key in self.cache) or (
            self.store is not None and bool(self.store.has([key]))
        )

    def _states(self, documents: Sequence[Document], images: Images) -> list[State]:
        """States of documents that were not there, computed here or by another thread that has them in hand."""
        by_key = {document.key: document for document in documents}
        known = self.cache.peek if self.cache is not None else lambda _: None
        return self._once.get(list(by_key), known, lambda keys: self.compute([by_key[key] for key in keys], images))

    def compute(self, documents: Sequence[Document], images: Images) -> list[State]:
        """States of new documents, in one run; those that are finite go into the cache."""
        if not documents:
            return []
        names = [f"present.{i}.{name}" for i in range(self.config.decoder.num_layers) for name in ("key", "value")]
        out = self._decode([_Part(document, []) for document in documents], images, names)
        states, row = [], 0
        for document in documents:
            rows = slice(row, row + document.length)
            state = State.from_presents(out, rows, self.config.decoder, self.kv)
            row = rows.stop
            if self.cache is not None and state.is_finite:
                cost = document.length + ENCODING_COST * sum(images.num_tokens(key) for key in document.images)
                self.cache.put(document.key, state, num_bytes=state.num_bytes, cost=cost)
            states.append(state)
        return states

    def _positions(self, token_ids: Int64, keys: Sequence[str], images: Images) -> Int64:
        grids = np.asarray([images.grid(key) for key in keys], np.int64).reshape(-1, 3)
        prompt, merge = self.config.prompt, self.config.image.merge_size
        return mrope_positions(token_ids, grids, prompt.image_pad_id, merge)

    def _decode(
        self,
        parts: Sequence[_Part],
        images: Images,
        outputs: Sequence[str],
        pasts: Pasts | None = None,
        *,
        decoder: sessions.Graph | None = None,
    ) -> dict[str, Float32]:
        """One run: prefixes that are not kept, and the suffixes behind each → hidden (B, D), filled up, and more."""
        layout = layout_groups([part.group for part in parts], self.tile)
        token_ids: list[Int64] = []
        positions: list[Int64] = []
        keys: list[str] = []
        for part in parts:
            document = part.document
            if part.state is None:
                token_ids.append(document.prefix)
                positions.append(self._positions(document.prefix, document.images, images))
                keys += document.images
            for pair in part.pairs:
                whole = self._positions(pair.prompt.token_ids, document.images + pair.images, images)
                token_ids.append(pair.prompt.suffix)
                positions.append(whole[:, pair.prompt.prefix_length :])
                keys += pair.images
        token_ids.append(token_ids[0][:1].repeat(layout.fill))
        positions.append(positions[0][:, :1].repeat(layout.fill, axis=1))
        ids = np.concatenate(token_ids)
        states = [part.state for part in parts if part.state is not None]
        feeds = {
            "token_ids": ids,
            "positions": np.ascontiguousarray(np.concatenate(positions, axis=1)),
            "image_embeds": np.concatenate(
                [np.zeros((0, self.config.decoder.hidden_size), np.float32), *images.embeds(keys)]
            ),
            "image_token_index": np.nonzero(ids[: layout.num_tokens] == self.config.prompt.image_pad_id)[0],
            "pieces": layout.pieces,
            "last_index": layout.last_index,
            "last_pieces": layout.last_pieces,
            **(pasts.feeds(states) if pasts and states else self._no_past),
        }
        return (decoder or self._decoder).run(feeds, outputs)

    def _logits(self, hidden: Float32) -> Float32:
        """hidden (B, D) → (B,)"""
        return self._head.run({"hidden": hidden}, ["logit"])["logit"]

    @staticmethod
    def _answer(pair: _Pair, logit: float) -> float | InputError:
        """The logit, or why it is none."""
        return logit if math.isfinite(logit) else _not_finite(f"pair {pair.position}: the model's answer")

    def _result(self, prompt: Prompt, logit: float) -> Result:
        cut = (("document", prompt.document_truncated), ("query", prompt.query_truncated))
        score = sigmoid(logit - self.config.prompt.logit_bias)
        return Result(score, logit, None, tuple(name for name, is_cut in cut if is_cut))

    # --- its faces ---------------------------------------------------------------------------------

    def score(
        self, pairs: Iterable[Any], *, raw: bool = False, on_error: OnError = "raise",
        progress: bool = False,
    ) -> Float32:  # fmt: skip
        """Scores between 0 and 1 (with `raw` logits) in input order, float32; NaN for a marked pair.

        A float32 is 1 from a logit of some 20 on, and 0 below −101: the logits still tell such pairs apart, and all
        rankings here go by them. Warns of pairs that were cut to the model's length, and of marked ones.
        """
        results = self._scored(pairs, on_error=on_error, progress=progress)
        return np.asarray([r.logit if raw else r.score for r in results], np.float32)

    def _scored(self, pairs: Iterable[Any], *, on_error: OnError = "raise", progress: bool) -> list[Result]:
        """The results of `evaluate`, for the faces that have nowhere to say what was cut or left out: they warn."""
        results = self.evaluate(pairs, on_error=on_error, progress=progress)
        for position, result in enumerate(results):
            if result.error:
                warnings.warn(f"not scored: {result.error}", stacklevel=3)
            for what in result.truncated:
                warnings.warn(f"pair {position}: the {what} was too long and was cut", stacklevel=3)
        return results

    def predict(
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **older: Any,
    ) -> Any:
        """CrossEncoder's name for `score`: float32 (B,) for several pairs, one number for a single pair.

        `inputs` (once `sentences`): a list or another iterable of pairs, an array (B, 2), or one pair.
        `activation_fn` (once `activation_fct`) is applied to logits (B, 1) in place of sigmoid(logit − bias): to a
        torch tensor where PyTorch is imported, as CrossEncoder does, else to an array. `convert_to_tensor` gives a
        torch tensor, `convert_to_numpy=False` a list of them. `batch_size`, `chunk_size`, `num_workers` and
        `apply_softmax` are accepted and have no effect: runs are filled by a token budget, and there is one label.
        Raises InputError; ValueError for a prompt, a pool or another device than the one of `load`; TypeError for an
        unknown name; DependencyError where there is no PyTorch for a tensor.
        """
        del batch_size, apply_softmax, chunk_size
        inputs = older.pop("sentences", inputs)
        activation_fn = older.pop("activation_fct", activation_fn)
        self._check_options("predict", older, prompt_name=prompt_name, prompt=prompt, device=device, pool=pool)
        as_tensor = convert_to_tensor or not convert_to_numpy
        torch = _torch() if as_tensor else None  # before anything is run
        pairs, single = _listed(inputs)
        results = self._scored(pairs, progress=bool(show_progress_bar))
        scores = _activated(results, activation_fn)
        if torch is None:
            return np.float32(scores[0]) if single else scores
        tensor = torch.from_numpy(scores)
        if single:
            return tensor[0]
        return tensor if convert_to_tensor else list(tensor)

    def rank(
        self,
        query: Any,
        documents: Iterable[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **older: Any,
    ) -> list[dict[str, Any]]:
        """CrossEncoder's ranking: [{"corpus_id", "score", "text"?}], best first, scores as float.

        `top_k`: how many at most, all for None; ValueError where it is negative. The rest is as in `predict`. With an
        `activation_fn` the order is that of its values.
        """
        del batch_size, chunk_size
        for name in ("apply_softmax", "convert_to_numpy", "convert_to_tensor"):  # once taken, and without effect there
            older.pop(name, None)
        activation_fn = older.pop("activation_fct", activation_fn)
        self._check_options("rank", older, prompt_name=prompt_name, prompt=prompt, device=device, pool=pool)
        top_k = _top(top_k, "top_k")
        documents = as_list(documents, "documents", "a list of documents")
        results = self._scored([(query, document) for document in documents], progress=bool(show_progress_bar))
        scores = _activated(results, activation_fn).tolist()
        order = best_first([result.logit for result in results] if activation_fn is None else scores)
        return [
            {"corpus_id": i, "score": scores[i], **({"text": documents[i]} if return_documents else {})}
            for i in order[:top_k]
        ]

    def _check_options(self, method: str, unknown: dict[str, Any], *, device: Any, pool: Any, **prompts: Any) -> None:
        """Raises for what CrossEncoder takes and m0kit cannot honour; num_workers has no effect there either."""
        unknown.pop("num_workers", None)
        if unknown:
            raise TypeError(f"{method}() got an unexpected argument {next(iter(unknown))!r}")
        for name, value in prompts.items():
            if value is not None:
                raise ValueError(f"{name}: got {value!r:.40}; the prompt is the published one, part of the artifact.")
        if pool is not None:
            raise ValueError("pool: m0kit starts no processes of its own. Leave it out; load with more threads.")
        if device is not None and str(device).removesuffix(":0") != self.device.removesuffix(":0"):
            raise ValueError(f"device: got {device!r:.40}, but this one was loaded on {self.device!r}. Load it there.")

    def rerank(
        self, query: Any, documents: Iterable[Any], top_n: int | None = None, return_documents: bool = True
    ) -> list[dict[str, Any]]:
        """Jina's and Cohere's ranking: [{"index", "relevance_score", "document"?}], best first.

        Raises InputError for documents that are no list or cannot be scored, ValueError for a negative `top_n`.
        """
        top_n = _top(top_n, "top_n")
        documents = as_list(documents, "documents", "a list of documents")
        results = self._scored([(query, document) for document in documents], progress=False)
        return [
            {
                "index": i,
                "relevance_score": results[i].score,
                **({"document": documents[i]} if return_documents else {}),
            }
            for i in best_first([result.logit for result in results])[:top_n]
        ]

    def compute_score(
        self, pairs: Sequence[Any], batch_size: int = 8, max_length: int | None = None,
        max_query_length: int | None = None, *, query_type: Literal["text", "image"] = "text",
        doc_type: Literal["text", "image"] = "text", show_progress: bool = False,
    ) -> float | list[float]:  # fmt: skip
        """The model card's call: a float for one pair, a list for several.

        With query_type or doc_type "image" a string on that side is the path of an image (the only place
        where a string is not text: the caller has said so). `max_length` and `max_query_length` are limits in
        tokens for this call; a document keeps what the query leaves. `batch_size` is accepted and has no
        effect. Raises ValueError for limits that do not fit together.
        """
        del batch_size
        own = self.config.prompt
        prompt = replace(
            own,
            max_length=own.max_length if max_length is None else max_length,
            max_query_length=own.max_query_length if max_query_length is None else max_query_length,
        )
        limited = copy.copy(self)
        limited.config = replace(self.config, prompt=prompt)
        limited._prompts = self._prompts.with_limits(prompt)
        listed, single = _listed(pairs)
        kinds = {"query": query_type, "document": doc_type}

        def declared(value: Any, kind: str | None) -> Any:
            return Path(value) if kind == "image" and isinstance(value, str) else value

        def typed(pair: Any) -> Any:
            if isinstance(pair, Mapping):
                return {name: declared(value, kinds.get(name)) for name, value in pair.items()}
            if isinstance(pair, list | tuple) and len(pair) == 2:
                return declared(pair[0], query_type), declared(pair[1], doc_type)
            return pair  # of another shape: `score` says so

        results = limited._scored([typed(pair) for pair in listed], progress=show_progress)
        scores = [float(np.float32(result.score)) for result in results]
        return scores[0] if single else scores


class _Opened:
    """A graph that is opened when it is needed, and takes the place of its rival where it has one.

    Who scores texts alone never pays for the vision encoder. A rival that another thread is running lives until
    that run ends. A forked child opens it again: an engine's threads do not come along.
    """

    def __init__(self, opener: Callable[[], sessions.Graph]) -> None:
        self.rival: _Opened | None = None
        self._opener = opener
        self._lock = threading.Lock()
        self._graph: sessions.Graph | None = None
        self.is_closed = False
        forks.watch(self)

    def after_fork(self) -> None:
        forks.abandon(self._graph)
        self._graph = None
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
            self._graph = None

    def open(self) -> sessions.Graph:
        with self._lock:
            if self.is_closed:
                raise M0kitError("this reranker was closed meanwhile. Load the artifact again.")
            graph = self._graph
            if graph is None:
                if self.rival is not None:
                    self.rival._graph = None  # before, so that the two are never there together
                graph = self._graph = self._opener()
        return graph

    def run(self, feeds: Mapping[str, sessions.Array], outputs: Sequence[str]) -> dict[str, sessions.Array]:
        return self.open().run(feeds, outputs)


class _Tried:
    """The image encoder, which is not run for anything before the known answers that have an image are right."""

    def __init__(self, encoder: sessions.Graph, reranker: Reranker) -> None:
        self._encoder, self._reranker = encoder, reranker
        self._right = False

    def run(self, feeds: Mapping[str, sessions.Array], outputs: Sequence[str]) -> dict[str, sessions.Array]:
        if not self._right:
            self._reranker.try_answers("image")
            self._right = True
        return self._encoder.run(feeds, outputs)


def check_identity(store: Store, reranker: "Reranker") -> None:
    """Raises StoreError when an index was made by another artifact, or with other settings."""
    here = reranker.identity
    if differing := [name for name in here if store.identity.get(name) != here[name]]:
        told = {"artifact": "the files of the artifact", "model": "limits of pixels or tokens"}
        facts = ", ".join(
            told.get(name) or f"{name} ({store.identity.get(name)} there, {here[name]} here)" for name in differing
        )
        raise StoreError(
            f"{store.path}: this index was made with another artifact or other settings; what differs: {facts}. "
            "Use what it was made with, or make a new index."
        )


def content_of(document: StoredDocument) -> Text | Picture:
    """A document of an index as it was given, or as the pixels that the model sees."""
    if document.kind == "text":
        return Text(document.data.decode())
    return Picture(document.data, f"kept {hashlib.sha256(document.data).hexdigest()}", ready=True)


def _split(document: Document, state: State | None) -> Iterator[_Part]:
    """A document's pairs in parts of at most a run's tokens."""
    sized = ((pair, [len(pair.prompt.suffix)]) for pair in document.pairs)
    return (_Part(document, pairs, state) for pairs in pack(sized, [TOKEN_BUDGET]))


def _salt(manifest: Manifest, config: ModelConfig, kv: str) -> bytes:
    """What every kept value depends on, besides tokens and pixels."""
    facts = {"artifact": manifest.fingerprint, "kv": kv, "model": config.to_dict() | {"prompt": None}, "format": 1}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _loaded_again(kind: type[Reranker], arguments: Mapping[str, Any]) -> Reranker:
    """A pickled one."""
    return kind.load(**arguments)


def _listed(argument: Any) -> tuple[list[Any], bool]:
    """A list of pairs from one pair or any number of them, and whether it was one, told apart as CrossEncoder does."""
    if isinstance(argument, np.ndarray):
        argument = argument.tolist()
    if isinstance(argument, list | tuple):
        first = argument[0] if len(argument) else ()
        many = isinstance(first, list | tuple | np.ndarray) or (isinstance(first, Mapping) and "document" in first)
        return (list(argument), False) if many else ([argument], True)
    # What else can be gone through holds pairs; what is one thing is no pair, and `evaluate` says so.
    return (list(argument), False) if is_many(argument) else ([argument], True)


def _top(value: int | None, name: str) -> int | None:
    """How many of a ranking. Raises ValueError."""
    if value is not None and value < 0:
        raise ValueError(f"{name}: got {value}, expected None for all, or how many, 0 or more.")
    return value


def _activated(results: Sequence[Result], function: Callable[[Any], Any] | None) -> Float32:
    """(B,) scores, or what `function` makes of the logits (B, 1). Raises ValueError where that is of another shape."""
    if function is None or not results:
        return np.asarray([result.score for result in results], np.float32)
    logits = np.asarray([[result.logit] for result in results], np.float32)
    if torch := sys.modules.get("torch"):
        with torch.no_grad():
            values = np.asarray(function(torch.from_numpy(logits)), np.float32)
    else:
        values = np.asarray(function(logits), np.float32)
    if values.shape not in ((len(results), 1), (len(results),)):
        raise ValueError(f"activation_fn: made shape {values.shape} of logits {logits.shape}; expected the same shape.")
    return values.reshape(-1)


def _torch() -> Any:
    """PyTorch, which the runtime never needs and some callers want results in. Raises DependencyError."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise DependencyError(
            "convert_to_tensor=True and convert_to_numpy=False need PyTorch. pip install torch, or leave them out for "
            "NumPy arrays."
        ) from None


def best_first(logits: Sequence[float]) -> list[int]:
    """Indices by falling logit; equal ones keep their order, NaN comes last.

    A ranking goes by logits, not by scores: those of two very relevant documents are 1 and 1.
    """
    return [int(i) for i in np.argsort(-np.asarray(logits, np.float64), kind="stable")]


def sigmoid(value: float) -> float:
    """1 / (1 + exp(−value)) in two forms, so that neither overflows nor loses what is near 0."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    small = math.exp(value)
    return small / (1 + small)


def _not_finite(what: str) -> ScoreError:
    return ScoreError(
        f"{what} is not a finite number. The artifact's precision may be too narrow for this input: check it with "
        "`m0kit inspect --verify`, use one in fp32, or leave the input out."
    )


def state_not_finite(where: str, kv: str) -> ScoreError:
    """What is wrong with a document whose `State` is not finite."""
    return _not_finite(f"{where}: what is kept of the document (keys and values in {kv})")
