"""An artifact that is open: its graphs, tokenizer, limits, and what is kept of documents.

Owns opening and closing, processes that are forked or take a pickle, and that known answers come first. How pairs
become scores is `m0kit.scoring`; `begin` gives a call what it goes through.
"""

import copy
import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Self

from m0kit.artifact.answers import KINDS, Answer, Kind, Setting, Trial
from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import TOKENIZER, Manifest, read_manifest, verify_files
from m0kit.artifact.ports import KV, Kept, decoder_name
from m0kit.config import ModelConfig
from m0kit.errors import InputError, M0kitError, StoreError
from m0kit.keeping.cache import Cache
from m0kit.keeping.store import Store
from m0kit.precision import check_device
from m0kit.scoring import sessions
from m0kit.scoring.engine import GraphEngine, Graphs
from m0kit.scoring.prepare import Preparer
from m0kit.scoring.prompt import PromptBuilder
from m0kit.scoring.schedule import Result, Schedule
from m0kit.trace import Trace

# For what the known answers' documents keep.
_ANSWERS_BYTES: Final = 64 << 20


class OpenArtifact:
    """What `Reranker` is besides scoring. Thread-safe: every call keeps its state to itself. A context manager.

    A forked child opens the graphs again on first use; a pickled one is loaded again from the same places. A copy
    shares the graphs.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        config: ModelConfig,
        opener: sessions.GraphOpener,
        low_memory: bool = False,
        *,
        cache_bytes: int = 0,
        kv: Kept = "fp32",
        store: Store | None = None,
        device: str = "cpu",
        setting: Setting | None = None,
    ):
        """`setting`: what the graphs run in; without it known answers are not asked for."""
        self.manifest, self.config = manifest, config
        self.low_memory, self.kv, self.store, self.device = low_memory, kv, store, device
        self.prompts = PromptBuilder(folder / TOKENIZER, config.prompt)
        self._folder, self._open = folder, opener
        vision, decoder, head = (
            sessions.Opened(partial(opener, folder, name)) for name in ("vision", decoder_name(kv), "head")
        )
        self._opened = vision, decoder, head
        head.open()  # tells at once whether the device is there
        if low_memory:
            vision.rival, decoder.rival = decoder, vision
        else:
            decoder.open()
        self._trial = Trial(folder, manifest, setting, kv) if setting else None
        self.engine = GraphEngine(
            config,
            Graphs(_Tried(vision, self) if setting else vision, decoder, head),
            kv=kv,
            salt=_salt(manifest, config, kv),
            cache=Cache(cache_bytes) if cache_bytes else None,
            store=store,
        )
        self._loaded: dict[str, Any] | None = None  # arguments of `load`

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
        DependencyError, StoreError, ValueError for limits the model cannot have.
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
        setting = Setting(None, device, memory)
        if open_graph is None:
            setting = replace(setting, version=sessions.engine_version())
            check_device(device, manifest.schemes, str(folder))
            # 4-bit products are three times slower unpacked, int8 a little; packed floats gain nothing worth 9 GB.
            prepack = "int4" in manifest.schemes or ("int8" in manifest.schemes and memory == "fast")
            ports = manifest.graphs
            open_graph = partial(sessions.open_graph, device=device, threads=threads, prepack=prepack, ports=ports)
        verify_files(folder, manifest)
        reranker = cls(
            folder,
            manifest,
            config,
            open_graph,
            memory == "low",
            cache_bytes=cache_bytes,
            kv=kv,
            store=store,
            device=device,
            setting=setting,
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
        for graph in self._opened:
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
        other.__dict__.update(self.__dict__, engine=copy.copy(self.engine))
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
    def cache(self) -> Cache | None:
        """What is kept in memory."""
        return self.engine.cache

    @cache.setter
    def cache(self, cache: Cache | None) -> None:
        self.engine.cache = cache

    @property
    def identity(self) -> dict[str, Any]:
        """What the states of documents depend on, besides the documents: an index belongs to one of these."""
        return {
            "artifact": self.manifest.fingerprint,
            "precision": self.manifest.scheme,
            "kv": self.kv,
            "model": json.loads(json.dumps(self.config.to_dict())),  # as it comes back from a file
        }

    def with_limits(self, *, max_length: int | None = None, max_query_length: int | None = None) -> Self:
        """The same under other limits of a prompt, in tokens; a document keeps what the query leaves.

        Raises ValueError for limits that do not fit together.
        """
        own, other = self.config.prompt, copy.copy(self)
        prompt = replace(
            own,
            max_length=own.max_length if max_length is None else max_length,
            max_query_length=own.max_query_length if max_query_length is None else max_query_length,
        )
        other.config, other.prompts = replace(self.config, prompt=prompt), self.prompts.with_limits(prompt)
        return other

    def try_answers(self, *kinds: Kind, again: bool = False) -> list[Answer]:
        """Score the artifact's known answers of these kinds, all by default, unless they were right before.

        With `again` they are scored in any case. Limits and caches of this reranker play no part. Returns those that
        were scored. Raises WrongAnswerError.
        """
        if self._trial is None:
            return []
        config, salt = self.manifest.model, self.engine.salt
        prompts = self.prompts.with_limits(config.prompt)
        found: list[Answer] = []
        for kind in kinds or KINDS:
            # Texts are computed as documents that are kept, many rows, and queries behind them, a few rows; images
            # without, so that both ways through the decoder are taken. Nothing is shared with a user's own call,
            # which may be waiting for the very same image.
            cache = Cache(_ANSWERS_BYTES) if kind == "text" else None
            engine = GraphEngine(config, Graphs(*self._opened), kv=self.kv, salt=salt, cache=cache)
            schedule = Schedule(engine, low_memory=self.low_memory)
            found += self._trial.check(kind, partial(_logits, Preparer(config, prompts, salt), schedule), again=again)
        return found

    def begin(self) -> tuple[Preparer, Schedule]:
        """What one call goes through, or many whose pairs are to share their work. Raises M0kitError after `close`."""
        if self._opened[-1].is_closed:
            raise M0kitError(f"{self._folder}: this reranker was closed. Load the artifact again.")
        preparer = Preparer(self.config, self.prompts, self.engine.salt, self.store)
        return preparer, Schedule(self.engine, low_memory=self.low_memory)

    def trace(self, pair: Any, layers: bool = False) -> Trace:
        """Everything one pair produces on its way to the score, for comparison with the reference.

        With `layers` also the last token after each decoder layer, which opens the decoder a second time. A logit that
        is not finite is the trace's `error`; its stages tell where that began.
        """
        preparer, _ = self.begin()
        try:
            ready = preparer.prepare(pair)
        except InputError as error:
            raise error.of_pair(0) from error
        names = [f"layers.{i}" for i in range(self.config.decoder.num_layers)] if layers else []
        decoder = self._open(self._folder, "decoder", also=names) if layers else None
        return self.engine.trace(ready, names, decoder)


def _logits(preparer: Preparer, schedule: Schedule, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
    tickets = [schedule.add(preparer.prepare(pair)) for pair in pairs]
    found: dict[int, Result] = {}
    while len(schedule):
        found.update(schedule.step())
    return [found[ticket].logit for ticket in tickets]


class _Tried:
    """The image encoder, which is not run for anything before the known answers that have an image are right."""

    def __init__(self, encoder: sessions.Graph, artifact: OpenArtifact) -> None:
        self._encoder, self._artifact = encoder, artifact
        self._right = False

    def run(self, feeds: Mapping[str, sessions.Array], outputs: Sequence[str]) -> dict[str, sessions.Array]:
        if not self._right:
            self._artifact.try_answers("image")
            self._right = True
        return self._encoder.run(feeds, outputs)


def check_identity(store: Store, artifact: OpenArtifact) -> None:
    """Raises StoreError when an index was made by another artifact, or with other settings."""
    here = artifact.identity
    if differing := [name for name in here if store.identity.get(name) != here[name]]:
        told = {"artifact": "the files of the artifact", "model": "limits of pixels or tokens"}
        facts = ", ".join(
            told.get(name) or f"{name} ({store.identity.get(name)} there, {here[name]} here)" for name in differing
        )
        raise StoreError(
            f"{store.path}: this index was made with another artifact or other settings; what differs: {facts}. "
            "Use what it was made with, or make a new index."
        )


def _salt(manifest: Manifest, config: ModelConfig, kv: str) -> bytes:
    """What every kept value depends on, besides tokens and pixels."""
    facts = {"artifact": manifest.fingerprint, "kv": kv, "model": config.to_dict() | {"prompt": None}, "format": 1}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _loaded_again(kind: type[OpenArtifact], arguments: Mapping[str, Any]) -> OpenArtifact:
    """A pickled one."""
    return kind.load(**arguments)
