"""Pairs in, scores out, under every name that users of rerankers know.

    reranker = Reranker.load("m0-fp32")
    reranker.score([("slm markdown", Path("page.png"))])          # → array([0.49], dtype=float32)

`evaluate` and `stream` are the one way of a call: prepare, schedule, run, result (`m0kit.scoring`); the others are thin
faces of it. A score never depends on what else is in the call.
"""

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m0kit.errors import DependencyError, InputError
from m0kit.opening import OpenArtifact
from m0kit.reading.inputs import as_list, check_many, is_many
from m0kit.scoring.ahead import prepared_ahead
from m0kit.scoring.schedule import OnError, Result

Float32 = NDArray[np.float32]

# Bytes of prepared pairs that wait, besides their pixels: some 50,000 short queries on a few thousand pages. Pairs on
# one document share its work where they wait together.
WAITING_BYTES: Final = 64 << 20
_EXPECTED: Final = "a list of pairs (query, document)"


class Reranker(OpenArtifact):
    """An opened artifact that scores. See `OpenArtifact`."""

    def evaluate(self, pairs: Iterable[Any], *, on_error: OnError = "mark", progress: bool = False) -> list[Result]:
        """Score (query, document) pairs; one Result each, in input order.

        Query and document are text (str), an image (PIL image, path, bytes), or {"text": …} / {"image": …};
        {"id": …} is a document of the index.
        A pair that cannot be scored is marked with its error and costs the others nothing, or, with
        on_error="raise", raises, before anything is run where that can be known. Raises InputError for `pairs` that
        are no list.
        """
        pairs = as_list(pairs, "pairs", _EXPECTED)
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
        """As `evaluate`, but gives (position in `pairs`, Result) as soon as it is done, in the order of the work.

        `pairs` are prepared as far as WAITING_BYTES of them may wait. Those that come one by one, of a generator, are
        run as they come: as many wait as were run. Where the engine computes beside its caller, others are prepared
        meanwhile, and run as soon as they fill a run. A PIL image must stay as it is until its pairs are done.
        """
        check_many(pairs, "pairs", _EXPECTED)
        preparer, schedule = self.begin()
        total = len(pairs) if isinstance(pairs, Sized) else None
        positions: dict[int, int] = {}  # by ticket
        run = 0  # rows
        # tqdm takes a lock of all processes even where it shows nothing; one that is held at a fork stays so.
        with (
            closing(schedule),
            closing(prepared_ahead(pairs, preparer, self.engine)) as ready,
            tqdm(total=total, unit="pair") if progress else nullcontext() as bar,
        ):

            def least() -> float:
                """Rows that wait at least while others are prepared."""
                if self.engine.runs_ahead:  # a run, beside those that are computed meanwhile
                    return self.engine.rows
                return math.inf if total is not None else run + self.engine.rows

            def placed(position: int, result: Result) -> tuple[int, Result]:
                if bar is not None:
                    bar.update()
                if result.error is None:
                    return position, result
                error = result.error.of_pair(position)
                if on_error == "raise":
                    raise error
                return position, replace(result, error=error)

            for position, prepared in enumerate(ready):
                if isinstance(prepared, InputError):
                    yield placed(position, Result.failed(prepared))
                else:
                    positions[schedule.add(prepared)] = position
                while schedule.num_bytes > WAITING_BYTES or schedule.num_rows > least():
                    before = schedule.num_rows
                    yield from (placed(positions.pop(ticket), result) for ticket, result in schedule.step())
                    run += before - schedule.num_rows
            while len(schedule):
                yield from (placed(positions.pop(ticket), result) for ticket, result in schedule.step())

    def score(
        self, pairs: Iterable[Any], *, raw: bool = False, on_error: OnError = "raise", progress: bool = False
    ) -> Float32:
        """Scores between 0 and 1 (with `raw` logits) in input order, float32; NaN for a marked pair.

        A float32 is 1 from a logit of some 20 on, and 0 below −101: the logits still tell such pairs apart, and all
        rankings here go by them. Warns of pairs that were cut to the model's length, and of marked ones.
        """
        results = self.results(pairs, on_error=on_error, progress=progress)
        return np.asarray([r.logit if raw else r.score for r in results], np.float32)

    def results(self, pairs: Iterable[Any], *, on_error: OnError = "raise", progress: bool = False) -> list[Result]:
        """The results of `evaluate`, for the faces that have nowhere to say what was cut or left out: they warn."""
        results = self.evaluate(pairs, on_error=on_error, progress=progress)
        for position, result in enumerate(results):
            if result.error:
                warnings.warn(f"not scored: {result.error}", stacklevel=3)
            for what in result.truncated:
                warnings.warn(f"pair {position}: the {what} was too long and was cut", stacklevel=3)
        return results

    def predict(
        self, inputs: Any = None, prompt_name: str | None = None, prompt: str | None = None, batch_size: int = 32,
        show_progress_bar: bool | None = None, activation_fn: Callable[[Any], Any] | None = None,
        apply_softmax: bool | None = False, convert_to_numpy: bool = True, convert_to_tensor: bool = False,
        device: Any = None, pool: Any = None, chunk_size: int | None = None, **older: Any,
    ) -> Any:  # fmt: skip
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
        results = self.results(pairs, progress=bool(show_progress_bar))
        scores = _activated(results, activation_fn)
        if torch is None:
            return np.float32(scores[0]) if single else scores
        tensor = torch.from_numpy(scores)
        if single:
            return tensor[0]
        return tensor if convert_to_tensor else list(tensor)

    def rank(
        self, query: Any, documents: Iterable[Any], top_k: int | None = None, return_documents: bool = False,
        prompt_name: str | None = None, prompt: str | None = None, batch_size: int = 32,
        show_progress_bar: bool | None = None, activation_fn: Callable[[Any], Any] | None = None, device: Any = None,
        pool: Any = None, chunk_size: int | None = None, **older: Any,
    ) -> list[dict[str, Any]]:  # fmt: skip
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
        results = self.results([(query, document) for document in documents], progress=bool(show_progress_bar))
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
        results = self.results([(query, document) for document in documents])
        order = best_first([result.logit for result in results])[:top_n]
        found = [{"index": i, "relevance_score": results[i].score} for i in order]
        return (
            [{**one, "document": documents[i]} for one, i in zip(found, order, strict=True)]
            if return_documents
            else found
        )

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
        limited = self.with_limits(max_length=max_length, max_query_length=max_query_length)
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

        results = limited.results([typed(pair) for pair in listed], progress=show_progress)
        scores = [float(np.float32(result.score)) for result in results]
        return scores[0] if single else scores


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
