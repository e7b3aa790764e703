"""A model that is an artifact in one part and its baseline in the others: many such mixtures side by side.

Owns the weights of both sides and their mixing, product by product; which parts are worth mixing is `blame`'s. The
forward pass is that of the known answers (`m0kit_export.answers`), in numpy: no graph is written, and in memory is one
matrix of each side at a time. Products are those of a CPU, where 16 bits are widened and nothing is rounded to them.

    mixed = Mixed(Side.open(Path("m0-fp32")), Side.open(Path("m0-int8")))
    mixed.begin([BASELINE, Part(("model.layers.*.mlp.down_proj.weight",))], roles, num_visual)
    logits = mixed.logits(tokens, images)                     # (W,), one of each part

An artifact's matrices cannot just be put among its baseline's: before they lost bits, the residual stream was put into
another basis (`m0kit_quant.rotate`) and channels were scaled between them (`m0kit_quant.equalize`). So the same is done
to the baseline's weights, which leaves its function as it is, and each matrix of one side fits among the other's.
"""

import fnmatch
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo

from m0kit.artifact.manifest import Manifest, read_manifest
from m0kit.config import ModelConfig
from m0kit.errors import ArtifactError
from m0kit_export.answers import PairTokens, Products, decode, encode
from m0kit_export.builder import Graph
from m0kit_export.graphs import build_graphs
from m0kit_export.sources import load_graph, stored_frequencies
from m0kit_export.stored import StoredWeights
from m0kit_quant.equalize import ChannelGroup, Rescaled, channel_groups
from m0kit_quant.floats import FLOATS
from m0kit_quant.recipe import Recipe
from m0kit_quant.rotate import Rotated, spread
from m0kit_quant.weights import EMBEDDING, Float32, Weights

Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

IMAGE: Final = "image"  # the role of visual tokens, and of all that the image encoder computes
SCORE: Final = "score token"  # the role of the token that the head reads
_KEPT_BYTES: Final = 256 << 20  # of decoded matrices, where a whole model has no more; else none is kept


@dataclass(frozen=True, slots=True)
class Part:
    """What is as in the artifact: matrices by their names (globs), what of their products, and at which tokens."""

    match: tuple[str, ...] = ()
    weights: bool = True  # as they are stored
    inputs: bool = True  # rounded as the products round them
    role: str | None = None  # None: at all tokens

    def has(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.match)


BASELINE: Final = Part()
WHOLE: Final = Part(("*",))


@dataclass(frozen=True)
class Side:
    """An artifact whose weights can be read."""

    folder: Path
    manifest: Manifest
    graphs: Mapping[str, Graph]

    @classmethod
    def open(cls, folder: Path) -> "Side":
        """That its files have their hashes is for whoever scores with it. Raises ArtifactError, RecipeError."""
        manifest = read_manifest(folder)
        recipe = Recipe.from_dict(manifest.recipe, str(folder))
        graphs = build_graphs(manifest.model, recipe, frequencies=stored_frequencies(folder, manifest.model))
        for name, graph in graphs.items():
            if _places(graph.model) != _places(load_graph(folder, name)):
                raise ArtifactError(
                    f"{folder}: {name} lays its weights out otherwise than this version of m0kit does, so they cannot "
                    "be told apart. Export it again."
                )
        return cls(folder, manifest, graphs)

    @property
    def rotated(self) -> bool:
        return bool(self.manifest.recipe.get("rotate"))

    @property
    def is_float(self) -> bool:
        return all(scheme in FLOATS for scheme in self.manifest.schemes)


def _places(model: ModelProto) -> dict[str, tuple[str, int, int]]:
    """Where each weight lies, by its initializer's name."""
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            place = ExternalDataInfo(tensor)
            found[tensor.name] = (str(place.location), int(place.offset or 0), int(place.length or 0))
    return found


class Mixed(Products):
    """Products in W ways, one for each part, between a baseline's weights and an artifact's."""

    def __init__(self, baseline: Side, artifact: Side) -> None:
        """Of the same weights, the baseline's stored as floats."""
        super().__init__(artifact.folder, artifact.graphs, lambda _: None)
        self.config = artifact.manifest.model
        self._plain = StoredWeights(baseline.folder, baseline.graphs)
        self._rotated = artifact.rotated and not baseline.rotated
        basis = Rotated(self._plain, self.config) if self._rotated else self._plain
        calibrated = bool(artifact.manifest.provenance.get("calibration"))
        self._reference = scaled_alike(basis, super().read, self.config, powers_of_two=not calibrated)
        self._parts: Sequence[Part] = ()
        self._roles: Mapping[str, Bools] = {}
        self._moved = np.zeros(0, bool)
        self.watch = _unwatched
        num_bytes = sum(2 * 4 * int(np.prod(weight.shape)) for weight in self.weights.values())
        self._kept: dict[str, tuple[Float32, Float32]] | None = {} if num_bytes <= _KEPT_BYTES else None
        self._scratch = _Scratch(self._reference) if self._rotated and self._kept is None else None

    @property
    def lossy(self) -> list[str]:
        """The matrices that are not stored in float32, in the order of the computation."""
        return [w.name for w in self.weights.values() if len(w.shape) == 2 and w.scheme.name != "fp32"]

    def distance(self, name: str) -> float:
        """How far a matrix is from the baseline's, as part of it (Frobenius norms)."""
        if name == EMBEDDING:  # the largest tensor by far; some of its rows tell
            rows = np.linspace(0, self.weights[name].shape[0] - 1, 256).astype(np.int64)
            reference, own = self._looked_up(rows), self.rows(name, rows)
        else:
            reference, own = self._matrices(name)
        norm = float(np.linalg.norm(reference))
        return float(np.linalg.norm(own - reference)) / norm if norm else 0.0

    def begin(self, parts: Sequence[Part], roles: Sequence[str]) -> None:
        """Take a pair on: `roles` of its tokens (T,). The first part must be BASELINE, which others are until they
        differ. `watch` is shown the residual stream (W, T, D), or (W, P, E) of an image, behind each layer."""
        assert parts[0] == BASELINE
        self._parts, self.ways, self.watch = parts, len(parts), _unwatched
        self._roles = {role: np.asarray([r == role for r in roles], bool) for role in set(roles)}
        self._moved = np.zeros(len(parts), bool)

    def logits(self, tokens: PairTokens, images: Sequence[tuple[Float32, Int64]]) -> NDArray[np.float64]:
        """(W,) of a pair: its tokens, and the patches (P, 1176) and their places (P, 2) of its images in order."""
        none = np.zeros((self.ways, 0, self.config.decoder.hidden_size), np.float32)
        with np.errstate(all="ignore"):  # a mixture may overflow, which its logit shows
            embeds = np.concatenate([none, *(encode(self, self.config, *image) for image in images)], axis=1)
            hidden = decode(self, self.config, [tokens], embeds)
            inner = np.maximum(self.linear("score.0", hidden, bias=True), 0)
            return self.linear("score.2", inner, bias=True)[:, 0, 0].astype(np.float64)

    # --- what the forward pass asks for ------------------------------------------------------------

    def read(self, name: str) -> Float32:
        """A vector of a norm, for all ways or (W, 1, D)."""
        reference, own = self._reference.read(name), super().read(name)
        if np.array_equal(reference, own):
            return reference
        found = np.repeat(reference[None, None], self.ways, axis=0)
        for way, part in enumerate(self._parts):
            if part.weights and part.role is None and part.has(name):
                found[way] = own
                self._moved[way] = True
        return found

    def embedded(self, token_ids: Int64) -> Float32:
        reference = self._looked_up(token_ids)
        found = np.repeat(reference[None], self.ways, axis=0)
        own = None
        for way, part in enumerate(self._parts):
            rows = self._rows(part, EMBEDDING, len(token_ids))
            if rows is None or not part.weights:
                continue
            own = self.rows(EMBEDDING, token_ids) if own is None else own
            found[way, rows] = own[rows]
            self._moved[way] = True
        return found

    def linear(self, name: str, x: Float32, *, bias: bool) -> Float32:
        """x (W, T, in) → (W, T, out). A way that has not left the baseline's yet is the baseline's."""
        matrix = f"{name}.weight"
        weight = self.weights[matrix]
        reference, own = self._matrices(matrix)
        vectors = (self._reference.read(f"{name}.bias"), super().read(f"{name}.bias")) if bias else (None, None)
        y = np.empty((*x.shape[:2], weight.shape[0]), np.float32)
        for way, part in enumerate(self._parts):
            rows = self._rows(part, matrix, x.shape[1])
            if rows is None and way and not self._moved[way]:
                y[way] = y[0]
                continue
            if rows is None or not rows.all():
                y[way] = _product(x[way], reference, vectors[0])
            if rows is None:
                continue
            self._moved[way] = True
            some = weight.scheme.rounded(x[way][rows]) if part.inputs else x[way][rows]
            side = int(part.weights)
            y[way, rows] = _product(some, own if side else reference, vectors[side])
        return y

    def after(self, layer: str, x: Float32) -> None:
        self.watch(layer, x)

    def _rows(self, part: Part, name: str, count: int) -> Bools | None:
        """Which rows of a product are as in the artifact; None for none of them."""
        if not part.has(name):
            return None
        if part.role is None:
            return np.ones(count, bool)
        if name.startswith(("visual.", "score.")):  # patches, and the one row that the head reads
            return np.ones(count, bool) if part.role == (IMAGE if name.startswith("visual.") else SCORE) else None
        return self._roles.get(part.role)

    def _looked_up(self, token_ids: Int64) -> Float32:
        """Rows of the baseline's embedding (T, D) in the artifact's basis."""
        rows = self._plain.rows(EMBEDDING, token_ids)
        return np.asarray(spread(rows.T, rows.shape[1]).T, np.float32) if self._rotated else rows

    def _matrices(self, name: str) -> tuple[Float32, Float32]:
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        reference = self._scratch.read(name) if self._scratch else self._reference.read(name)
        both = reference, super().read(name)
        if self._kept is not None:
            self._kept[name] = both
        return both


class _Scratch:
    """Matrices that take long to make, in a file without a name from the first time on: fp32's size, and mapped."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 — closed with this
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}

    def read(self, name: str) -> Float32:
        if name not in self._places:
            made = np.ascontiguousarray(self._weights.read(name), np.float32)
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(made.data)
            self._file.flush()
            self._places[name] = place, made.shape
        place, shape = self._places[name]
        return np.memmap(self._file, np.float32, "r", place, shape)


def _unwatched(layer: str, x: Float32) -> None:
    pass


def _product(x: Float32, matrix: Float32, bias: Float32 | None) -> Float32:
    y = x @ matrix.T
    return np.asarray(y if bias is None else y + bias, np.float32)


# --- the baseline's weights, scaled as the artifact's were ------------------------------------------


def scaled_alike(
    weights: Weights, stored: Callable[[str], Float32], config: ModelConfig, *, powers_of_two: bool
) -> Weights:
    """`weights` with their channels scaled as in what is `stored`, found by comparing the two.

    Of a norm's channels the scale is what its gain, which loses no bits, was divided by. Others are told by the matrix
    that fits best, so that a damaged one does not mislead. `powers_of_two`: all that an export without calibration
    chooses. Whatever is found, the function stays the same.
    """
    groups = channel_groups(config)
    scales: dict[str, Float32] = {}

    def found(group: ChannelGroup, scale: NDArray[np.float64]) -> None:
        scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
        if powers_of_two:
            scale = np.exp2(np.rint(np.log2(scale)))
        scales[group.name] = np.asarray(scale, np.float32)

    with np.errstate(all="ignore"):
        norms = [group for group in groups if weights.read(group.producers[0][0]).ndim == 1]
        for group in norms:
            gain = group.producers[0][0]
            found(group, weights.read(gain).astype(np.float64) / stored(gain))
        normed = Rescaled(weights, groups, scales)
        for group in groups:
            if group not in norms:
                found(group, _fitted(normed, stored, group))
    return Rescaled(weights, groups, scales)


def _fitted(weights: Weights, stored: Callable[[str], Float32], group: ChannelGroup) -> NDArray[np.float64]:
    """s (num_channels,) that brings weights nearest to what is stored, by the matrix where it brings them nearest."""
    best, least = np.ones(group.num_channels), np.inf
    for name, first in group.producers:
        ours, theirs = (read(name)[first : first + group.num_channels] for read in (weights.read, stored))
        if ours.ndim == 2:
            scale, rest = _ratio(ours, theirs, np.arange(group.num_channels), group.num_channels)
            best, least = (1 / scale, rest) if rest < least else (best, least)
    for name in group.consumers:
        scale, rest = _ratio(weights.read(name).T, stored(name).T, group.columns, group.num_channels)
        best, least = (scale, rest) if rest < least else (best, least)
    return best


def _ratio(a: Float32, b: Float32, channels: Int64, count: int) -> tuple[NDArray[np.float64], float]:
    """(count,) what rows of a must be multiplied by to come nearest to those of b, and how much of b is left over."""
    both, own = np.zeros(count), np.zeros(count)
    np.add.at(both, channels, np.einsum("ij,ij->i", a, b, dtype=np.float64))
    np.add.at(own, channels, np.einsum("ij,ij->i", a, a, dtype=np.float64))
    scale = both / own
    whole = float(np.square(b, dtype=np.float64).sum())
    told = float(np.nansum(both * scale))
    return scale, 1 - told / whole if whole else np.inf
