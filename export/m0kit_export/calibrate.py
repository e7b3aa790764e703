"""Run an artifact on a calibration set and collect what its products see.

Owns the reading of the set and the collecting; what follows from the statistics is `m0kit_quant.calibration`. The one
module of the exporter that runs the model: it builds graphs that also give out statistics, over the data files of an
artifact whose weights are stored as floats.

A calibration file has a pair a line: {"query": …, "document": …}, or "documents" with a list, as `m0kit score` and
`m0kit evaluate` read them.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m0kit.artifact import read_manifest
from m0kit.errors import InputError, RecipeError
from m0kit.inputs import beside
from m0kit.reranker import Reranker
from m0kit.sessions import Graph, open_graph
from m0kit_export.graphs import build_graphs
from m0kit_quant.calibration import Calibration
from m0kit_quant.recipe import Recipe

Array = NDArray[Any]
_KINDS: Final = ("text", "image")


@dataclass
class _Sums:
    """Of one product, apart for pairs without and with an image, so that neither drowns the other."""

    peak: Array | float = 0.0
    energy: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, peak: Array, energy: Array, rows: int) -> None:
        self.peak = np.maximum(self.peak, peak)
        self.energy[kind] = self.energy.get(kind, 0) + energy.astype(np.float64)
        self.rows[kind] = self.rows.get(kind, 0) + rows

    def mean(self) -> Array:
        return np.asarray(np.mean([e / max(self.rows[k], 1) for k, e in self.energy.items()], axis=0), np.float32)


class _Observed:
    """A graph that notes the statistics of every run."""

    def __init__(self, graph: Graph, products: Sequence[str], sums: dict[str, _Sums], kind: Sequence[str]) -> None:
        self._graph, self._products, self._sums, self._kind = graph, products, sums, kind

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        watched = [f"{name}.{what}" for name in self._products for what in ("peak", "energy", "rows")]
        results = self._graph.run(feeds, [*outputs, *watched])
        for name in self._products:
            peak, energy, rows = (results[f"{name}.{what}"] for what in ("peak", "energy", "rows"))
            self._sums[name].add(self._kind[0], peak, energy, int(rows[0]))
        return {name: results[name] for name in outputs}


def calibrate(folder: Path, pairs: Path, *, threads: int | None = None, progress: bool = True) -> Calibration:
    """Score the pairs of a file, one by one, with the artifact in `folder` and return what its products saw.

    Text and images count alike, whatever their numbers. Raises RecipeError for a file without usable pairs or with a
    bad one (the line is named), ArtifactError.
    """
    found = read_pairs(pairs)
    manifest = read_manifest(folder)
    recipe = Recipe.from_dict(manifest.recipe, str(folder))
    graphs = build_graphs(manifest.model, recipe, observe=True)
    sums: dict[str, _Sums] = defaultdict(_Sums)
    kind = ["text"]

    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> Graph:
        del also
        products = [port.name.removesuffix(".peak") for port in graphs[name].outputs if port.name.endswith(".peak")]
        model = graphs[name].model.SerializeToString()
        return _Observed(open_graph(folder, name, threads=threads, model=model), products, sums, kind)

    reranker = Reranker.load(folder, open_graph=opener)
    reranker.try_answers()
    sums.clear()  # of the known answers, which are no pairs to calibrate on
    reranker.tile = 1  # rows that fill up a run would count like those of the pair
    counts = dict.fromkeys(_KINDS, 0)
    for line, pair in tqdm(found, unit="pair", desc="calibrating", disable=None if progress else True):
        kind[0] = "image" if any(isinstance(part, dict) and "image" in part for part in pair) else "text"
        try:
            reranker.score([pair])
        except InputError as error:
            said = str(error).removeprefix("pair 0: ")  # its place in a call of one
            raise RecipeError(f"{pairs}: line {line}: {said} Correct the line or take it out.") from error
        counts[kind[0]] += 1
    about = {"pairs": counts, "sha256": hashlib.sha256(pairs.read_bytes()).hexdigest()}
    return Calibration(
        {name: np.asarray(s.peak, np.float32) for name, s in sums.items()},
        {name: s.mean() for name, s in sums.items()},
        about,
    )


def read_pairs(path: Path) -> list[tuple[int, tuple[Any, Any]]]:
    """Number of the line and (query, document); images relative to the file. Raises RecipeError naming bad lines."""
    bad: list[str] = []
    pairs: list[tuple[int, tuple[Any, Any]]] = []
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({type(error).__name__}). Give JSON lines in UTF-8.") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            query = _content(row["query"], path.parent)
            pairs += [(number, (query, _content(document, path.parent))) for document in _documents(row)]
        except KeyError as error:
            bad.append(f"line {number}: has no {error}")
        except (TypeError, ValueError, RecursionError) as error:
            bad.append(f"line {number}: {'not JSON' if isinstance(error, json.JSONDecodeError) else error}")
    if bad or not pairs:
        shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise RecipeError(
            f"{path}: {shown or 'holds no pairs'}. "
            'A line is {"query": …, "document": …} or {"query": …, "documents": […]}.'
        )
    return pairs


def _documents(row: Any) -> list[Any]:
    documents = row["documents"] if "documents" in row else [row["document"]]
    if not isinstance(documents, list) or not documents:
        raise ValueError("documents is not a list with something in it")
    return documents


def _content(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and len(value) == 1 and isinstance(value.get("text"), str):
        return value["text"]
    if isinstance(value, dict) and len(value) == 1 and isinstance(value.get("image"), str):
        return beside(folder, value)
    raise ValueError(f'{str(value)[:40]!r} is neither a text nor {{"image": …}}')
