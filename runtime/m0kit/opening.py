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
from m0kit.artifact.ports import GRAPHS, KV, Kept, cuda_type, data_name, decoder_name
from m0kit.config import ModelConfig
from m0kit.errors import DeviceError, InputError, M0kitError, StoreError
from m0kit.keeping.cache import Cache
from m0kit.keeping.store import Store
from m0kit.precision import SCHEMES, check_device, provider_of
from m0kit.scoring import gpus, sessions
from m0kit.scoring.cuda_device import CudaDevice
from m0kit.scoring.cuda_engine import CudaEngine, number_of_bytes
from m0kit.scoring.engine import GraphEngine, Graphs
from m0kit.scoring.prepare import KNOWN_BYTES, Preparer
from m0kit.scoring.prompt import PromptBuilder
from m0kit.scoring.routed import RoutedEngine
from m0kit.scoring.schedule import Result, Schedule
from m0kit.trace import Trace

# For what the known answers' documents keep.
_ANSWERS_BYTES: Final = 64 << 20
_EMBEDDING: Final = "model.embed_tokens.weight"
GPU_VARIABLE: Final = "M0KIT_GPU_BYTES"  # the most that a process may take of a GPU's memory


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
        on_gpus: CudaEngine | RoutedEngine[CudaEngine] | None = None,
    ):
        """`setting`: what the graphs run in; without it known answers are not asked for.

        `on_gpus`: what computes instead of the graphs that `opener` opens.
        """
        self.manifest, self.config = manifest, config
        self.low_memory, self.kv, self.store, self.device = low_memory, kv, store, device
        self.prompts = PromptBuilder(folder / TOKENIZER, config.prompt, in_threads=on_gpus is not None)
        self._folder, self._open = folder, opener
        self._known = Cache(KNOWN_BYTES)  # documents of the index, and files
        self._trials: list[tuple[Trial, CudaEngine | None]] = []  # of each GPU its own
        self._graphs: Graphs | None = None
        self._opened: tuple[sessions.Opened, ...] = ()
        self._is_closed = False
        self._loaded: dict[str, Any] | None = None  # arguments of `load`
        self.engine: GraphEngine | CudaEngine | RoutedEngine[CudaEngine]
        if on_gpus is not None:
            self.engine = on_gpus
            engines = on_gpus.engines if isinstance(on_gpus, RoutedEngine) else (on_gpus,)
            for index, engine in zip(gpus.named(device), engines, strict=True):
                if setting:
                    one = f"cuda:{index}"
                    trial = Trial(folder, manifest, replace(setting, device=one, gpu=_gpu_name(one)), kv)
                    self._trials.append((trial, engine))
                    engine.before_images(partial(self._try, trial, engine, "image"))
            return
        if setting:
            self._trials.append((Trial(folder, manifest, setting, kv), None))
        vision, decoder, head = (
            sessions.Opened(partial(opener, folder, name)) for name in ("vision", decoder_name(kv), "head")
        )
        self._graphs, self._opened = Graphs(vision, decoder, head), (vision, decoder, head)
        head.open()  # tells at once whether the device is there
        if low_memory:
            vision.rival, decoder.rival = decoder, vision
        else:
            decoder.open()
        self.engine = GraphEngine(
            config,
            Graphs(_Tried(vision, self) if setting else vision, decoder, head),
            kv=kv,
            salt=_salt(manifest, config, kv),
            cache=Cache(cache_bytes) if cache_bytes else None,
            store=store,
            low_memory=low_memory,
        )

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
        gpu_bytes: int | None = None,
        pool_bytes: int | None = None,
    ) -> Self:
        """Open an artifact on a device ("cpu", "cuda", "cuda:1", "cuda:0,cuda:1", or an execution provider's name).

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
        On GPUs keys and values are kept in their memory, in 16 bits, with no `cache_bytes` as many as fit: `gpu_bytes`
        is the most that this process may take of each GPU's memory, `pool_bytes` what of it is for keys and values
        (by default M0KIT_GPU_BYTES and M0KIT_GPU_POOL_BYTES, else all that is free). Several GPUs share the documents.
        An artifact in fp32 runs its portable graphs there, slowly.
        `open_graph` runs the graphs in another engine than ONNX Runtime; it is asked for the portable ones alone, never
        for those of a device's set.
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
        folder = resolve(path, revision, what="artifact")
        manifest = read_manifest(folder, require_signature=require_signature)
        ids = gpus.named(device) if open_graph is None and "cuda" in manifest.runs else ()
        kv = kv or (store.identity.get("kv") if store is not None else "fp16" if ids else "fp32")
        if kv not in KV:
            raise ValueError(f"kv must be one of {', '.join(KV)}, got {kv!r}")
        if ids and kv != "fp16":
            where = f"{store.path} keeps" if store is not None else "kv says to keep"
            raise ValueError(
                f"{where} keys and values in {kv}, and on a GPU they are kept in 16 bits. Say kv fp16, where an index "
                "is made too."
            )
        config = manifest.model
        if max_pixels is not None:
            config = replace(config, image=replace(config.image, max_pixels=max_pixels))
        if max_length is not None:
            config = replace(config, prompt=replace(config.prompt, max_length=max_length))
        opener = open_graph
        setting = Setting(None, device, memory)
        if open_graph is None:
            setting = replace(setting, version=sessions.engine_version(), gpu=_gpu_name(device))
            check_device(device, manifest.schemes, str(folder))
            # 4-bit products are three times slower unpacked, int8 a little; packed floats gain nothing worth 9 GB.
            prepack = "int4" in manifest.schemes or ("int8" in manifest.schemes and memory == "fast")
            ports, runs = manifest.graphs, manifest.runs.get(provider_of(device), {})
            open_graph = partial(
                sessions.open_graph, device=device, threads=threads, prepack=prepack, ports=ports, runs=runs
            )
        verify_files(folder, manifest)
        on_gpus = None
        if ids:
            engines = [
                _cuda_engine(folder, manifest, config, one, store, cache_bytes, gpu_bytes, pool_bytes) for one in ids
            ]
            on_gpus = engines[0] if len(engines) == 1 else RoutedEngine(engines)
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
            on_gpus=on_gpus,
        )
        if store is not None:
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
            "gpu_bytes": gpu_bytes,
            "pool_bytes": pool_bytes,
        }
        return reranker

    def close(self) -> None:
        """Let the graphs, what is kept in memory and the index go. A run in another thread ends first."""
        self._is_closed = True
        for graph in self._opened:
            graph.close()
        if not isinstance(self.engine, GraphEngine):
            self.engine.close()
        self.cache, self._known = None, Cache(0)
        if self.store is not None:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        own = self.engine
        other.__dict__.update(self.__dict__, engine=copy.copy(own) if isinstance(own, GraphEngine) else own)
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
        """What is kept in memory; of several GPUs each has its own."""
        return None if isinstance(self.engine, RoutedEngine) else self.engine.cache

    @cache.setter
    def cache(self, cache: Cache | None) -> None:
        if isinstance(self.engine, GraphEngine):
            self.engine.cache = cache

    @property
    def identity(self) -> dict[str, Any]:
        """What the states of documents depend on, besides the documents: an index belongs to one of these."""
        return {
            "artifact": self.manifest.fingerprint,
            "precision": self.manifest.scheme,
            "kv": self.kv,
            "model": json.loads(json.dumps(self.config.to_dict())),  # as it comes back from a file
            # Where the CPU rounds what goes into products, its states are not those of a GPU.
            **({"device": "cuda"} if self._graphs is None and _rounds(self.manifest) else {}),
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
        return [
            answer
            for kind in kinds or KINDS
            for trial, engine in self._trials
            for answer in self._try(trial, engine, kind, again=again)
        ]

    def _try(self, trial: Trial, on_gpu: CudaEngine | None, kind: Kind, *, again: bool = False) -> list[Answer]:
        config, salt = self.manifest.model, self.engine.salt
        prompts = self.prompts.with_limits(config.prompt)
        engine: GraphEngine | CudaEngine
        if on_gpu is not None:
            engine = on_gpu
        else:
            # Texts are computed as documents that are kept, many rows, and queries behind them, a few rows; images
            # without, so that both ways through the decoder are taken. Nothing is shared with a user's own call,
            # which may be waiting for the very same image.
            cache = Cache(_ANSWERS_BYTES) if kind == "text" else None
            assert self._graphs is not None
            engine = GraphEngine(config, self._graphs, kv=self.kv, salt=salt, cache=cache, low_memory=self.low_memory)
        return trial.check(kind, partial(_logits, Preparer(config, prompts, salt), Schedule(engine)), again=again)

    def begin(self) -> tuple[Preparer, Schedule]:
        """What one call goes through, or many whose pairs are to share their work. Raises M0kitError after `close`."""
        if self._is_closed:
            raise M0kitError(f"{self._folder}: this reranker was closed. Load the artifact again.")
        preparer = Preparer(self.config, self.prompts, self.engine.salt, self.store, self._known)
        return preparer, Schedule(self.engine)

    def trace(self, pair: Any, layers: bool = False) -> Trace:
        """Everything one pair produces on its way to the score, for comparison with the reference.

        With `layers` also the last token after each decoder layer, which opens the decoder a second time. A logit that
        is not finite is the trace's `error`; its stages tell where that began. Raises DeviceError on a GPU.
        """
        if not isinstance(self.engine, GraphEngine):
            raise DeviceError(
                "the stages of a pair are those of the portable graphs. Load the artifact on device 'cpu'."
            )
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
    here = {"device": "cpu", **artifact.identity}
    there = {"device": "cpu", **store.identity}
    if differing := [name for name in here if there.get(name) != here[name]]:
        told = {"artifact": "the files of the artifact", "model": "limits of pixels or tokens"}
        facts = ", ".join(
            told.get(name) or f"{name} ({there.get(name)} there, {here[name]} here)" for name in differing
        )
        raise StoreError(
            f"{store.path}: this index was made with another artifact or other settings; what differs: {facts}. "
            "Use what it was made with, or make a new index."
        )


def _cuda_engine(
    folder: Path,
    manifest: Manifest,
    config: ModelConfig,
    index: int,
    store: Store | None,
    cache_bytes: int,
    gpu_bytes: int | None,
    pool_bytes: int | None,
) -> CudaEngine:
    """The artifact on one GPU. Raises DeviceError where that cannot compute it."""
    gpu_bytes = gpu_bytes if gpu_bytes is not None else number_of_bytes(GPU_VARIABLE)
    device = CudaDevice(index, gpu_bytes)
    weights = {name: manifest.files[data_name(name)].size for name in GRAPHS}
    if why := gpus.problem(device.gpu, (manifest.scheme, *manifest.schemes), sum(weights.values()), gpu_bytes):
        raise DeviceError(f"{folder}: {why}.")
    return CudaEngine(
        config,
        device,
        partial(device.open, folder),
        cuda_type(manifest.schemes) or "float16",
        salt=_salt(manifest, config, "fp16", on_gpu=True),
        cache_bytes=cache_bytes,
        pool_bytes=pool_bytes,
        encoder_bytes=weights["vision"],
        store=store,
    )


def _gpu_name(device: str) -> str:
    """As the driver calls the device's GPU, the first of several; "" where it is none, or the driver does not tell."""
    ids = gpus.named(device)
    there = gpus.devices().gpus if ids else ()
    return there[ids[0]].name if ids and ids[0] < len(there) else ""


def _rounds(manifest: Manifest) -> bool:
    """Whether products on the CPU round activations. Rows of the embedding are looked up, in any scheme as they are."""
    rules = manifest.recipe["weights"]
    return any(SCHEMES[str(rule["scheme"])].rounds for rule in rules if rule["match"] != _EMBEDDING)


def _salt(manifest: Manifest, config: ModelConfig, kv: str, *, on_gpu: bool = False) -> bytes:
    """What every kept value depends on, besides tokens and pixels."""
    facts = {"artifact": manifest.fingerprint, "kv": kv, "model": config.to_dict() | {"prompt": None}, "format": 1}
    if on_gpu and _rounds(manifest):
        facts["device"] = "cuda"
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _loaded_again(kind: type[OpenArtifact], arguments: Mapping[str, Any]) -> OpenArtifact:
    """A pickled one."""
    return kind.load(**arguments)
