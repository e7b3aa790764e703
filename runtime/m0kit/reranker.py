"""From pairs to scores: prepare, plan, encode images, decode, score. The one public class of the runtime.

    reranker = Reranker.load("m0-fp32")
    reranker.score([("slm markdown", Path("page.png"))])          # → array([0.49], dtype=float32)

`evaluate` does the work; `score`, `predict`, `rank`, `rerank` and `compute_score` are its thin faces under
the names that users of other rerankers know. A score never depends on what else is in the call.
"""

import copy
import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m0kit import sessions
from m0kit.answers import KINDS, Answer, Engine, Kind, Trial
from m0kit.artifact import KV, TOKENIZER, Kept, Manifest, decoder_name, read_manifest, verify_files
from m0kit.cache import Cache
from m0kit.config import ModelConfig
from m0kit.errors import ArtifactError, InputError, RecordDamagedError, StoreError
from m0kit.image import patchify
from m0kit.images import ENCODING_COST, Images
from m0kit.inputs import Content, Known, Picture, Text, parse_pair
from m0kit.planner import TILE, TOKEN_BUDGET, Group, layout_groups, pack
from m0kit.positions import mrope_positions
from m0kit.precision import check_device
from m0kit.prompt import ImageTokens, Prompt, PromptBuilder, PromptDocument
from m0kit.states import Pasts, State
from m0kit.store import Document as StoredDocument
from m0kit.store import Store
from m0kit.trace import Trace

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

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
    """A document of the call and the pairs that ask about it."""

    prompt: PromptDocument
    images: tuple[str, ...]  # keys
    key: bytes  # of its state
    pairs: list[_Pair] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt.prefix)


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
    """An opened artifact. Thread-safe: every call keeps its state to itself."""

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
        self.store = store
        self._salt = _salt(manifest, config, kv)
        decoder = config.decoder
        # Artifacts from before documents could be kept: pasts (T_past, K·C), pieces without the number of their past.
        ports = manifest.graphs.get("decoder", {}).get("inputs", [])
        self._first_format = any(port["name"] == "pieces" and port["shape"][1] == 8 for port in ports)
        self._no_past = Pasts(decoder, kv).feeds([])
        if self._first_format:
            self._no_past = {name: np.zeros((0, decoder.kv_size), np.float32) for name in self._no_past}

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
    ) -> "Reranker":
        """Open an artifact on a device ("cpu", "cuda", "cuda:1", or an execution provider's name).

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
        An artifact's known answers are scored first, where they were not right before; those with an image when the
        first image comes.
        Raises ArtifactError (WrongAnswerError where the engine computes wrongly), DeviceError, DependencyError,
        StoreError, ValueError for limits the model cannot have.
        """
        if memory not in ("fast", "low"):
            raise ValueError(f'memory must be "fast" or "low", got {memory!r}')
        store = Store.open(Path(index)) if index is not None else None
        kv = kv or (store.identity.get("kv") if store else "fp32")
        if kv not in KV:
            raise ValueError(f"kv must be one of {', '.join(KV)}, got {kv!r}")
        folder = Path(path)
        manifest = read_manifest(folder)
        if (cache_bytes or store or kv != "fp32") and decoder_name("int8") not in manifest.graphs:
            raise ArtifactError(f"{folder}: was exported before documents could be kept. Export it again.")
        config = manifest.model
        if max_pixels is not None:
            config = replace(config, image=replace(config.image, max_pixels=max_pixels))
        if max_length is not None:
            config = replace(config, prompt=replace(config.prompt, max_length=max_length))
        engine = Engine(None, device, memory)
        if open_graph is None:
            engine = replace(engine, version=sessions.version())
            check_device(device, manifest.schemes, str(folder))
            # 4-bit products are three times slower unpacked, int8 a little; packed floats gain nothing worth 9 GB.
            prepack = "int4" in manifest.schemes or ("int8" in manifest.schemes and memory == "fast")
            open_graph = partial(sessions.open_graph, device=device, threads=threads, prepack=prepack)
        verify_files(folder, manifest)
        low = memory == "low"
        reranker = cls(
            folder, manifest, config, open_graph, low, cache_bytes=cache_bytes, kv=kv, store=store, engine=engine
        )
        if store:
            check_identity(store, reranker)
        reranker.try_answers("text")
        return reranker

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

    def evaluate(
        self, pairs: Iterable[Any], *, on_error: Literal["raise", "mark"] = "mark", progress: bool = False
    ) -> list[Result]:
        """Score (query, document) pairs; one Result each, in input order.

        Query and document are text (str), an image (PIL image, path, bytes), or {"text": …} / {"image": …};
        {"id": …} is a document of the index.
        A pair that cannot be scored is marked with its error and costs the others nothing, or, with
        on_error="raise", raises before anything is run.
        """
        pairs = list(pairs)
        results: list[Result | None] = [None] * len(pairs)
        for position, result in self.stream(pairs, on_error=on_error, progress=progress):
            results[position] = result
        return [result for result in results if result is not None]

    def stream(
        self, pairs: Iterable[Any], *, on_error: Literal["raise", "mark"] = "mark", progress: bool = False
    ) -> Iterator[tuple[int, Result]]:
        """As `evaluate`, but gives (position in `pairs`, Result) as soon as it is done, in the order of the work."""
        pairs = list(pairs)
        images = self.open_images()
        with tqdm(total=len(pairs), unit="pair", disable=not progress) as bar:
            documents: dict[Any, Document] = {}
            for position, pair in enumerate(pairs):
                try:
                    self._prepare(position, pair, documents, images)
                except InputError as error:
                    if on_error == "raise":
                        raise
                    bar.update()
                    yield position, Result(math.nan, math.nan, error)
            for done, logits in self._work([d for d in dict.fromkeys(documents.values()) if d.pairs], images):
                for pair, logit in zip(done, logits, strict=True):
                    bar.update()
                    if isinstance(logit, InputError):
                        if on_error == "raise":
                            raise logit
                        yield pair.position, Result(math.nan, math.nan, logit)
                    else:
                        yield pair.position, self._result(pair.prompt, float(logit))

    def trace(self, pair: Any, layers: bool = False) -> Trace:
        """Everything one pair produces on its way to the score, for comparison with the reference.

        With `layers` also the last token after each decoder layer, which opens the decoder a second time.
        """
        images = self.open_images()
        documents: dict[Any, Document] = {}
        self._prepare(0, pair, documents, images)
        document = next(iter(documents.values()))
        (ready,) = document.pairs
        keys = document.images + ready.images
        patches = [patchify(images.pixels(key), self.config.image) for key in keys]
        embeds = [images.embeds([key])[0] for key in keys]
        names = [f"layers.{i}" for i in range(self.config.decoder.num_layers)] if layers else []
        decoder = self._open(self._folder, "decoder", also=names) if layers else None
        part = _Part(document, [ready])
        out = self._decode([part], images, ["hidden", *names], decoder=decoder)
        logit = float(self._logits(out["hidden"])[0])
        # The last layer has the wanted rows alone, the others have all of the run, which may be filled up.
        last = len(document.prompt.prefix) + len(ready.prompt.suffix) - 1
        rows = [last] * (len(names) - 1) + [0]
        return Trace(
            token_ids=ready.prompt.token_ids,
            positions=self._positions(ready.prompt.token_ids, keys, images),
            grid_thw=np.asarray([p.grid_thw for p in patches], np.int64).reshape(-1, 3),
            patches=tuple(p.values for p in patches),
            image_embeds=tuple(embeds),
            hidden=out["hidden"][0],
            logit=logit,
            score=self._result(ready.prompt, logit).score,
            layers=np.stack([out[name][row] for name, row in zip(names, rows, strict=True)]) if layers else None,
        )

    # --- its steps ---------------------------------------------------------------------------------

    def open_images(self) -> Images:
        """For the images of one call."""
        return Images(self.config.image, self._encoder, self.cache, self._salt, half=self.kv != "fp32")

    def _prepare(self, position: int, pair: Any, documents: dict[Any, Document], images: Images) -> None:
        """Parse a pair, look at its images, build its prompt, add it to its document. Raises InputError."""
        where = f"pair {position}"
        parsed = parse_pair(pair, where)
        document = self.document(parsed.document, f"{where}: document", documents, images)
        query, keys = self._part(parsed.query, f"{where}: query", images)
        try:
            prompt = self._prompts.build(query, document.prompt)
        except InputError as error:
            raise type(error)(f"{where}: {error}") from None
        images.claim(document.images + keys)
        document.pairs.append(_Pair(position, prompt, keys))

    def document(
        self, content: Content, where: str, documents: dict[Any, Document], images: Images, *, keyed: bool = False
    ) -> Document:
        """The entry of a document in `documents`, made when it is new, with a key where asked or where states are kept.

        Raises InputError.
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
            fresh = Document(prompt, images_of_it, key)
            documents[name] = documents.setdefault(key, fresh) if key else fresh
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
            images.embeds([key for document in some for key in wanted[document]])
            yield from self._runs(some, images)

    def _wanted(self, document: Document) -> list[str]:
        """The images that must be encoded for a document's pairs."""
        own = () if self.state(document.key) else document.images
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
            yield pairs, logits[: len(pairs)].tolist()
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

        new: list[Document] = []
        for document in self._ahead(documents):
            document.pairs = [pair for pair in document.pairs if fetched(pair.images, [pair])]
            state = self.state(document.key) if document.pairs else None
            if not document.pairs or (state is None and not fetched(document.images, document.pairs)):
                continue
            if state is not None or not self.keeps:
                yield from _split(document, state)
                continue
            if new and sum(d.length for d in new) + document.length > TOKEN_BUDGET:
                for known, computed in zip(new, self.compute(new, images), strict=True):
                    yield from _split(known, computed)
                new = []
            new.append(document)
        for known, computed in zip(new, self.compute(new, images), strict=True):
            yield from _split(known, computed)

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

    def state(self, key: bytes) -> State | None:
        """A document's state where it was computed before."""
        state: State | None = self.cache.get(key) if self.cache is not None else None
        if state is None and self.store is not None:
            try:
                raw = self.store.get(key)
            except RecordDamagedError as error:
                warnings.warn(f"{error} It was computed anew for now.", stacklevel=2)
            else:
                state = None if raw is None else State.from_bytes(raw, self.config.decoder, self.kv)
        return state

    def compute(self, documents: Sequence[Document], images: Images) -> list[State]:
        """States of new documents, in one run; they go into the cache."""
        if not documents:
            return []
        names = [f"present.{i}.{name}" for i in range(self.config.decoder.num_layers) for name in ("key", "value")]
        out = self._decode([_Part(document, []) for document in documents], images, names)
        states, row = [], 0
        for document in documents:
            rows = slice(row, row + document.length)
            state = State.from_presents(out, rows, self.config.decoder, self.kv)
            row = rows.stop
            if self.cache is not None:
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
                token_ids.append(document.prompt.prefix)
                positions.append(self._positions(document.prompt.prefix, document.images, images))
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
        if self._first_format:
            feeds |= {name: feeds[name][:, :8] for name in ("pieces", "last_pieces")}
        return (decoder or self._decoder).run(feeds, outputs)

    def _logits(self, hidden: Float32) -> Float32:
        """hidden (B, D) → (B,)"""
        return self._head.run({"hidden": hidden}, ["logit"])["logit"]

    def _result(self, prompt: Prompt, logit: float) -> Result:
        shifted = logit - self.config.prompt.logit_bias
        # Two forms of the sigmoid, so that neither overflows.
        score = 1 / (1 + math.exp(-shifted)) if shifted >= 0 else 1 - 1 / (1 + math.exp(shifted))
        cut = (("document", prompt.document_truncated), ("query", prompt.query_truncated))
        return Result(score, logit, None, tuple(name for name, is_cut in cut if is_cut))

    # --- its faces ---------------------------------------------------------------------------------

    def score(
        self, pairs: Iterable[Any], *, raw: bool = False, on_error: Literal["raise", "mark"] = "raise",
        progress: bool = False,
    ) -> Float32:  # fmt: skip
        """Scores between 0 and 1 (with `raw` logits) in input order, float32; NaN for a marked pair.

        Warns of pairs that were cut to the model's length, and of marked ones.
        """
        results = self.evaluate(pairs, on_error=on_error, progress=progress)
        for position, result in enumerate(results):
            if result.error:
                warnings.warn(f"not scored: {result.error}", stacklevel=2)
            for what in result.truncated:
                warnings.warn(f"pair {position}: the {what} was too long and was cut", stacklevel=2)
        return np.asarray([r.logit if raw else r.score for r in results], np.float32)

    def predict(
        self, sentences: Sequence[Any], batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> Float32 | np.float32:
        """CrossEncoder's name for `score`: an array for a list of pairs, one number for a single pair.

        `batch_size` is accepted and has no effect: runs are filled by a token budget.
        """
        del batch_size
        pairs, single = _listed(sentences)
        scores = self.score(pairs, progress=bool(show_progress_bar))
        return np.float32(scores[0]) if single else scores

    def rank(
        self, query: Any, documents: Sequence[Any], top_k: int | None = None, return_documents: bool = False,
        batch_size: int = 32, show_progress_bar: bool | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """CrossEncoder's ranking: [{"corpus_id", "score", "text"?}], best first."""
        pairs = [(query, document) for document in documents]
        scores: Any = self.predict(pairs, batch_size, show_progress_bar) if pairs else []
        return [
            {"corpus_id": i, "score": scores[i], **({"text": documents[i]} if return_documents else {})}
            for i in _best_first(scores)[:top_k]
        ]

    def rerank(
        self, query: Any, documents: Sequence[Any], top_n: int | None = None, return_documents: bool = True
    ) -> list[dict[str, Any]]:
        """Jina's and Cohere's ranking: [{"index", "relevance_score", "document"?}], best first."""
        scores = self.score([(query, document) for document in documents])
        return [
            {
                "index": i,
                "relevance_score": float(scores[i]),
                **({"document": documents[i]} if return_documents else {}),
            }
            for i in _best_first(scores)[:top_n]
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

        scores = [float(score) for score in limited.score(map(typed, listed), progress=show_progress)]
        return scores[0] if single else scores


class _Opened:
    """A graph that is opened when it is needed, and takes the place of its rival where it has one.

    Who scores texts alone never pays for the vision encoder. A rival that another thread is running lives until
    that run ends.
    """

    def __init__(self, opener: Callable[[], sessions.Graph]) -> None:
        self.rival: _Opened | None = None
        self._opener = opener
        self._lock = threading.Lock()
        self._graph: sessions.Graph | None = None

    def open(self) -> sessions.Graph:
        with self._lock:
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


def _listed(argument: Any) -> tuple[Any, bool]:
    """A list of pairs from one pair or a list of pairs, and which of the two it was."""
    if isinstance(argument, Mapping):
        return [argument], True
    first = argument[0] if len(argument) else ()
    is_list = isinstance(first, list | tuple) or (isinstance(first, Mapping) and "document" in first)
    return (argument, False) if is_list else ([argument], True)


def _best_first(scores: Any) -> list[int]:
    """Indices by falling score; equal scores keep their order, NaN comes last."""
    return [int(i) for i in np.argsort(-np.asarray(scores, np.float64), kind="stable")]
