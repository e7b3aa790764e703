"""From pairs to scores: prepare, plan, encode images, decode, score. The one public class of the runtime.

    reranker = Reranker.load("m0-fp32")
    reranker.score([("slm markdown", Path("page.png"))])          # → array([0.49], dtype=float32)

`evaluate` does the work; `score`, `predict`, `rank`, `rerank` and `compute_score` are its thin faces under
the names that users of other rerankers know. A score never depends on what else is in the call.
"""

import copy
import math
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m0kit import sessions
from m0kit.artifact import GRAPHS, TOKENIZER, Manifest, read_manifest, verify_files
from m0kit.config import ModelConfig
from m0kit.errors import InputError
from m0kit.image import Pixels, patchify, resize
from m0kit.inputs import Content, Picture, parse_pair
from m0kit.planner import Item, image_rows, layout_groups, pack_images, plan_runs
from m0kit.positions import mrope_positions, vision_positions
from m0kit.precision import check_device
from m0kit.prompt import ImageTokens, Prompt, PromptBuilder
from m0kit.trace import Trace

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one pair. With an `error` score and logit are NaN."""

    score: float  # sigmoid(logit − bias), 0 to 1
    logit: float
    error: InputError | None = None
    truncated: tuple[str, ...] = ()  # "document", "query": what lost its end, as the published procedure cuts


@dataclass(frozen=True, slots=True)
class _Ready:
    """A pair that can be run."""

    position: int  # in the call
    prompt: Prompt
    prefix_images: tuple[str, ...]  # keys, in prompt order
    suffix_images: tuple[str, ...]

    @property
    def images(self) -> tuple[str, ...]:
        return self.prefix_images + self.suffix_images

    @property
    def item(self) -> Item:
        prefix = self.prompt.token_ids[: self.prompt.prefix_length]
        return Item((prefix.tobytes(), self.prefix_images), len(prefix), len(self.prompt.token_ids))


class Reranker:
    """An opened artifact. Thread-safe: every call keeps its state to itself."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        config: ModelConfig,
        opener: sessions.GraphOpener,
        low_memory: bool = False,
    ):
        self.manifest = manifest
        self.config = config
        self._folder = folder
        self._open = opener
        self._prompts = PromptBuilder(folder / TOKENIZER, config.prompt)
        self._low_memory = low_memory
        self._vision, self._decoder, self._head = (_Opened(partial(opener, folder, name)) for name in GRAPHS)
        self._head.open()  # tells at once whether the device is there
        if low_memory:
            self._vision.rival, self._decoder.rival = self._decoder, self._vision
        else:
            self._decoder.open()
        decoder = config.decoder
        nothing = np.zeros((0, decoder.kv_size), np.float32)
        self._no_past = {
            f"past_key_values.{layer}.{kv}": nothing for layer in range(decoder.num_layers) for kv in ("key", "value")
        }

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
        open_graph: sessions.GraphOpener | None = None,
    ) -> "Reranker":
        """Open an artifact on a device ("cpu", "cuda", "cuda:1", or an execution provider's name).

        `memory`: "fast" keeps quantised weights packed for this CPU in memory; "low" leaves int8 weights mapped
        from the artifact's files, and never holds the vision encoder and the decoder at once: a call encodes all its
        images first, and each opens anew for it. Float weights are mapped either way, and the vision encoder is opened
        when the first image comes. Scores are the same to rounding.
        `max_pixels` and `max_length` (tokens of a prompt) replace the checkpoint's own limits. `open_graph`
        runs the graphs in another engine than ONNX Runtime.
        Raises ArtifactError, DeviceError, DependencyError, ValueError for limits the model cannot have.
        """
        if memory not in ("fast", "low"):
            raise ValueError(f'memory must be "fast" or "low", got {memory!r}')
        folder = Path(path)
        manifest = read_manifest(folder)
        config = manifest.model
        if max_pixels is not None:
            config = replace(config, image=replace(config.image, max_pixels=max_pixels))
        if max_length is not None:
            config = replace(config, prompt=replace(config.prompt, max_length=max_length))
        if open_graph is None:
            check_device(device, manifest.schemes, str(folder))
            # 4-bit products are three times slower unpacked, int8 a little; packed floats gain nothing worth 9 GB.
            prepack = "int4" in manifest.schemes or ("int8" in manifest.schemes and memory == "fast")
            open_graph = partial(sessions.open_graph, device=device, threads=threads, prepack=prepack)
        verify_files(folder, manifest)
        return cls(folder, manifest, config, open_graph, memory == "low")

    # --- the one method ----------------------------------------------------------------------------

    def evaluate(
        self, pairs: Iterable[Any], *, on_error: Literal["raise", "mark"] = "mark", progress: bool = False
    ) -> list[Result]:
        """Score (query, document) pairs; one Result each, in input order.

        Query and document are text (str), an image (PIL image, path, bytes), or {"text": …} / {"image": …}.
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
        images = _Images(self.config, self._vision)
        ready: list[_Ready] = []
        with tqdm(total=len(pairs), unit="pair", disable=not progress) as bar:
            for position, pair in enumerate(pairs):
                try:
                    ready.append(self._prepare(position, pair, images))
                except InputError as error:
                    if on_error == "raise":
                        raise
                    bar.update()
                    yield position, Result(math.nan, math.nan, error)
            if self._low_memory:
                images.embeds([key for pair in ready for key in pair.images])
            for run in plan_runs([pair.item for pair in ready]):
                groups = [[ready[index] for index in group] for group in run]
                logits = self._logits(self._decode(groups, images, ["hidden"])["hidden"])
                for pair, logit in zip((p for group in groups for p in group), logits, strict=True):
                    images.release(pair.images)
                    bar.update()
                    yield pair.position, self._result(pair.prompt, float(logit))

    def trace(self, pair: Any, layers: bool = False) -> Trace:
        """Everything one pair produces on its way to the score, for comparison with the reference.

        With `layers` also the last token after each decoder layer, which opens the decoder a second time.
        """
        images = _Images(self.config, self._vision)
        ready = self._prepare(0, pair, images)
        patches = [patchify(images.pixels(key), self.config.image) for key in ready.images]
        embeds = [images.embeds([key])[0] for key in ready.images]
        names = [f"layers.{i}" for i in range(self.config.decoder.num_layers)] if layers else []
        decoder = self._open(self._folder, "decoder", also=names) if layers else None
        out = self._decode([[ready]], images, ["hidden", *names], decoder)
        logit = float(self._logits(out["hidden"])[0])
        return Trace(
            token_ids=ready.prompt.token_ids,
            positions=self._positions(ready, images),
            grid_thw=np.asarray([p.grid_thw for p in patches], np.int64).reshape(-1, 3),
            patches=tuple(p.values for p in patches),
            image_embeds=tuple(embeds),
            hidden=out["hidden"][0],
            logit=logit,
            score=self._result(ready.prompt, logit).score,
            layers=np.stack([out[name][-1] for name in names]) if layers else None,
        )

    # --- its steps ---------------------------------------------------------------------------------

    def _prepare(self, position: int, pair: Any, images: "_Images") -> _Ready:
        """Parse a pair, look at its images, build its prompt. Raises InputError naming the pair."""
        where = f"pair {position}"
        parsed = parse_pair(pair, where)
        keys: dict[str, str] = {}

        def part(name: str, content: Content) -> str | ImageTokens:
            if not isinstance(content, Picture):
                return content.text
            keys[name] = content.key
            return ImageTokens(images.see(content, f"{where}: {name}"))

        document, query = part("document", parsed.document), part("query", parsed.query)
        try:
            prompt = self._prompts.build(query, document)
        except InputError as error:
            raise type(error)(f"{where}: {error}") from None
        ready = _Ready(
            position,
            prompt,
            *((keys[name],) if name in keys else () for name in ("document", "query")),
        )
        images.claim(ready.images)
        return ready

    def _positions(self, pair: _Ready, images: "_Images") -> Int64:
        grids = np.asarray([images.pixels(key).grid_thw for key in pair.images], np.int64).reshape(-1, 3)
        prompt, merge = self.config.prompt, self.config.image.merge_size
        return mrope_positions(pair.prompt.token_ids, grids, prompt.image_pad_id, merge)

    def _decode(
        self,
        groups: Sequence[Sequence[_Ready]],
        images: "_Images",
        outputs: Sequence[str],
        decoder: sessions.Graph | None = None,
    ) -> dict[str, Float32]:
        """One run: each group's prefix once, then the suffixes of its pairs → hidden (B, D) and the like."""
        layout = layout_groups(
            [
                (
                    group[0].prompt.prefix_length,
                    [len(p.prompt.token_ids) - p.prompt.prefix_length for p in group],
                )
                for group in groups
            ]
        )
        token_ids: list[Int64] = []
        positions: list[Int64] = []
        image_index: list[Int64] = []
        keys: list[str] = []
        row = 0
        for group in groups:
            cut = group[0].prompt.prefix_length
            for first, pair in enumerate(group):
                placed = self._positions(pair, images)
                index = pair.prompt.image_token_index
                if first == 0:
                    token_ids.append(pair.prompt.token_ids[:cut])
                    positions.append(placed[:, :cut])
                    image_index.append(index[index < cut] + row)
                    keys += pair.prefix_images
                    row += cut
                token_ids.append(pair.prompt.token_ids[cut:])
                positions.append(placed[:, cut:])
                image_index.append(index[index >= cut] - cut + row)
                keys += pair.suffix_images
                row += len(pair.prompt.token_ids) - cut
        width = self.config.decoder.hidden_size
        feeds = {
            "token_ids": np.concatenate(token_ids),
            "positions": np.ascontiguousarray(np.concatenate(positions, axis=1)),
            "image_embeds": np.concatenate([np.zeros((0, width), np.float32), *images.embeds(keys)]),
            "image_token_index": np.concatenate(image_index),
            "pieces": layout.pieces,
            "last_index": layout.last_index,
            "last_pieces": layout.last_pieces,
            **self._no_past,
        }
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


class _Images:
    """The images of one call: resized once, encoded once, forgotten after the last pair that needs them."""

    def __init__(self, config: ModelConfig, vision: sessions.Graph) -> None:
        self._config = config
        self._vision = vision
        self._pixels: dict[str, Pixels] = {}
        self._sources: list[Any] = []  # PIL images are known by identity, so none may go before the call ends
        self._embeds: dict[str, Float32] = {}
        self._uses: Counter[str] = Counter()

    def see(self, picture: Picture, where: str) -> int:
        """Decode and resize a picture, if it is new; returns its number of visual tokens."""
        if picture.key not in self._pixels:
            self._pixels[picture.key] = resize(picture, self._config.image, where)
            if not isinstance(picture.source, bytes):
                self._sources.append(picture.source)
        return self._pixels[picture.key].num_tokens

    def pixels(self, key: str) -> Pixels:
        return self._pixels[key]

    def claim(self, keys: Sequence[str]) -> None:
        """Note that one more pair needs these."""
        self._uses.update(keys)

    def release(self, keys: Sequence[str]) -> None:
        """Note that one pair less does."""
        self._uses.subtract(keys)
        for key in keys:
            if self._uses[key] <= 0:
                self._embeds.pop(key, None)
                self._pixels.pop(key, None)

    def embeds(self, keys: Sequence[str]) -> list[Float32]:
        """Image embeddings (V, D) for each key, in order; those not there yet are encoded, packed."""
        new = [key for key in dict.fromkeys(keys) if key not in self._embeds]
        for pack in pack_images([self._pixels[key].num_patches for key in new]):
            self._encode([new[index] for index in pack])
        return [self._embeds[key] for key in keys]

    def _encode(self, keys: Sequence[str]) -> None:
        image = self._config.image
        patches = [patchify(self._pixels[key], image) for key in keys]
        feeds = {
            "patches": np.concatenate([p.values for p in patches]),
            "positions": np.concatenate([vision_positions(p.grid_thw, image.merge_size) for p in patches]),
            "images": image_rows([len(p.values) for p in patches]),
        }
        out = self._vision.run(feeds, ["image_embeds"])["image_embeds"]
        ends = np.cumsum([self._pixels[key].num_tokens for key in keys])
        for key, rows in zip(keys, np.split(out, ends[:-1]), strict=True):
            self._embeds[key] = rows.copy() if len(keys) > 1 else rows


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
