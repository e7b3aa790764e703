"""Run an artifact on a calibration set and collect what its products see.

Owns the reading of the set and the collecting; what follows from the statistics is `m0kit_quant.calibration`. The one
module of the exporter that runs the model: it builds graphs that also give out statistics, over the data files of an
artifact whose weights are stored as floats.

A calibration file has a pair a line: {"query": …, "document": …}, or "documents" with a list, as `m0kit score` and
`m0kit evaluate` read them; other keys are ignored. A line that cannot be used is left out, and said.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m0kit.artifact.manifest import read_manifest
from m0kit.errors import InputError, RecipeError
from m0kit.files import sha256_of
from m0kit.reading.inputs import group_from_file
from m0kit.reading.lines import records
from m0kit_export.graphs import build_graphs
from m0kit_export.sources import stored_frequencies
from m0kit_quant.calibration import Calibration
from m0kit_quant.recipe import Recipe

if TYPE_CHECKING:
    from m0kit.scoring.sessions import Graph

Array = NDArray[Any]
_KINDS: Final = ("text", "image")
_WANTED: Final = '{"query": …, "document": …} or {"query": …, "documents": […]}'


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

    def __init__(self, graph: "Graph", products: Sequence[str], sums: dict[str, _Sums], kind: Sequence[str]) -> None:
        self._graph, self._products, self._sums, self._kind = graph, products, sums, kind

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        watched = [f"{name}.{what}" for name in self._products for what in ("peak", "energy", "rows")]
        results = self._graph.run(feeds, [*outputs, *watched])
        for name in self._products:
            peak, energy, rows = (results[f"{name}.{what}"] for what in ("peak", "energy", "rows"))
            self._sums[name].add(self._kind[0], peak, energy, int(rows[0]))
        return {name: results[name] for name in outputs}


def calibrate(
    folder: Path,
    pairs: Path,
    *,
    threads: int | None = None,
    progress: bool = True,
    require_signature: Literal[False] | None = None,
) -> Calibration:
    """Score the pairs of a file, one by one, with the artifact in `folder` and return what its products saw.

    Text and images count alike, whatever their numbers. Warns of lines that cannot be used, and notes their numbers.
    `require_signature`: False for an artifact that this process wrote itself.
    Raises RecipeError for a file without usable pairs, ArtifactError.
    """
    from m0kit.reranker import Reranker  # ONNX Runtime, which nothing else here needs
    from m0kit.scoring.engine import GraphEngine
    from m0kit.scoring.sessions import open_graph

    found, errors = read_pairs(pairs)
    manifest = read_manifest(folder, require_signature=require_signature)
    recipe = Recipe.from_dict(manifest.recipe, str(folder))
    frequencies = stored_frequencies(folder, manifest.model)
    graphs = build_graphs(manifest.model, recipe, observe=True, frequencies=frequencies)
    sums: dict[str, _Sums] = defaultdict(_Sums)
    kind = ["text"]

    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> "Graph":
        del also
        products = [
            port.name.removesuffix(".peak") for port in graphs[name].ports.outputs if port.name.endswith(".peak")
        ]
        model = graphs[name].model.SerializeToString()
        return _Observed(open_graph(folder, name, threads=threads, model=model), products, sums, kind)

    reranker = Reranker.load(folder, open_graph=opener, require_signature=require_signature)
    reranker.try_answers()
    sums.clear()  # of the known answers, which are no pairs to calibrate on
    assert isinstance(reranker.engine, GraphEngine)  # as graphs of our own were opened
    reranker.engine.tile = 1  # rows that fill up a run would count like those of the pair
    counts = dict.fromkeys(_KINDS, 0)
    for line, pair in tqdm(found, unit="pair", desc="calibrating", disable=None if progress else True):
        kind[0] = "image" if any(isinstance(part, dict) and "image" in part for part in pair) else "text"
        try:
            reranker.score([pair])
        except InputError as error:
            errors[line] = f"line {line}: {error.said}"
        else:
            counts[kind[0]] += 1
    if not any(counts.values()):
        raise _nothing(pairs, errors)
    for said in errors.values():
        warnings.warn(f"{pairs}: {said} It is left out.", stacklevel=2)
    about: dict[str, Any] = {"pairs": counts, "sha256": sha256_of(pairs)}
    if errors:
        about["left_out_lines"] = sorted(errors)
    return Calibration(
        {name: np.asarray(s.peak, np.float32) for name, s in sums.items()},
        {name: s.mean() for name, s in sums.items()},
        about,
    )


def read_pairs(path: Path) -> tuple[list[tuple[int, tuple[Any, Any]]], dict[int, str]]:
    """Number of the line and (query, document), images relative to the file; and what is wrong with the other lines.

    Raises RecipeError for a file without usable pairs.
    """
    errors: dict[int, str] = {}
    pairs: list[tuple[int, tuple[Any, Any]]] = []
    try:
        for number, record in records(path, _WANTED):
            try:
                if isinstance(record, InputError):
                    raise record
                query, documents = group_from_file(record, path.parent)
            except InputError as error:
                errors[number] = f"line {number}: {error}"
            else:
                pairs += [(number, (query, document)) for document in documents]
    except InputError as error:  # of the file as a whole
        raise RecipeError(str(error)) from None
    if not pairs:
        raise _nothing(path, errors)
    return pairs, errors


def _nothing(path: Path, errors: Mapping[int, str]) -> RecipeError:
    some = list(errors.values())
    shown = " ".join(some[:5]) + (f" And {len(some) - 5} more." if len(some) > 5 else "")
    return RecipeError(f"{path}: {shown or 'holds no pairs.'} A line is {_WANTED}.")
