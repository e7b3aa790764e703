"""Which layers, matrices and tokens an artifact's errors come from. Owns the questions; `mixed` computes them.

    blamed = blame(Path("m0-fp32"), Path("m0-int8"), builtin_sets(), label="m0-int8")
    blamed.axes["kinds"][0]         # Share(name="model.layers.*.mlp.down_proj", share=0.41, …)

Each question is one way of computing a few pairs: everything as in the baseline, but for one part, which is as in the
artifact. What a logit moves by then is that part's own error, with all that the layers behind make of it. Where errors
of parts are independent, their squares add up: a part's share is its mean square among those of its axis, `explained`
is the sum of these as part of what they should come to. What would be left of the whole's error without one part's is
taken from the same passes: errors are small, so that they add up, if not their squares.

The axes: kinds of matrices; layers (some together where there are many); single matrices, those of which these two and
their distance from the baseline promise most; and tokens by their role, at which alone inputs of products are rounded.
Weights are not rounded at some tokens: their errors at all tokens are alike, and cancel where tokens are compared, so
that each alone tells nothing of the whole. How far tokens are off is told through the layers (`Growth`) in any case.

It costs W forward passes in float32 for each pair: W is some 50, and of those for single layers half the products are
the baseline's and computed once. Pairs are few, drawn by a fixed seed, and cut to _MAX_TOKENS and _MAX_VISUAL_TOKENS.
The published model takes some 1.3e15 operations: an estimated three hours on two cores.
"""

import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from m0kit.artifact.manifest import TOKENIZER
from m0kit.config import ModelConfig
from m0kit.errors import ArtifactError, InputError, ScoreError
from m0kit.reranker import Reranker
from m0kit.scoring.engine import sigmoid
from m0kit.scoring.positions import vision_positions
from m0kit.scoring.tokens import open_tokenizer
from m0kit.terminal import bar
from m0kit_export.answers import PairTokens
from m0kit_parity.evaluate.compare import is_image
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.evaluate.mixed import BASELINE, IMAGE, SCORE, WHOLE, Mixed, Part, Side
from m0kit_quant.weights import Float32

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

FIRST: Final = "first token"
DELIMITER: Final = "delimiters"
DOCUMENT: Final = "document"
QUERY: Final = "query"
ROLES: Final = (FIRST, DELIMITER, IMAGE, DOCUMENT, QUERY, SCORE)

# With half as many, kinds and layers of the small checkpoint's int8 changed places from seed to seed.
PAIRS: Final[Mapping[str, int]] = {"text": 24, "image": 12}
_SEED: Final = 0
_MAX_TOKENS: Final = 1024
_MAX_VISUAL_TOKENS: Final = 256
_GROUPS: Final = 8  # of layers, at most, of the image encoder and of the decoder
_SINGLE: Final = 8  # matrices that are looked at one by one
_WAYS_BYTES: Final = 1 << 30  # of what is between the matrices of all ways that are computed side by side


@dataclass(frozen=True, slots=True)
class Share:
    """What one part does by itself."""

    name: str
    share: float  # of the mean squares of its axis; of a single matrix, of the whole's
    mean_delta: float  # of the scores, |part − baseline|
    logit: float  # root mean square of what a logit moves by
    left: float  # the same of what would be left of the whole's without it


@dataclass(frozen=True, slots=True)
class Growth:
    """How far the residual stream is off behind one layer: ‖artifact − baseline‖ / ‖baseline‖ of a token, root mean
    square over tokens, by their role. Of the image encoder patches take the place of tokens."""

    layer: str
    error: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Blamed:
    """All that is found of one artifact."""

    label: str
    baseline: str
    pairs: Mapping[str, int]  # "text" and "image": how many
    whole: Share  # everything as in the artifact
    weights: Share  # weights alone, inputs of products unrounded
    inputs: Share  # inputs alone, weights as they were
    axes: Mapping[str, tuple[Share, ...]]  # "kinds", "layers", "tokens", "matrices": largest first
    explained: Mapping[str, float]  # axis → sum of its mean squares, as part of the whole's; of tokens, of the inputs'
    growth: tuple[Growth, ...]
    engine: tuple[float, float]  # root mean square of |logit here − the engine's|, of the baseline and the artifact


@dataclass(frozen=True, slots=True)
class PreparedPair:
    """A pair as both sides compute it."""

    tokens: PairTokens
    roles: tuple[str, ...]  # (T,)
    images: tuple[tuple[Float32, Int64], ...]
    logit: float  # the baseline's, by the engine
    own: float = math.nan  # the artifact's


def blame(
    baseline: Path,
    artifact: Path,
    sets: Mapping[str, Sequence[Query]],
    *,
    label: str = "",
    threads: int | None = None,
) -> Blamed:
    """What the `artifact` owes to which of its parts, on a few pairs of `sets`.

    Raises ArtifactError for artifacts of other weights, and a baseline that is not stored as floats; InputError when
    none of the pairs can be scored.
    """
    mixed = Mixed(*sides_of(baseline, artifact))
    pairs = prepared(baseline, artifact, sample(sets), threads)
    if not pairs:
        raise InputError("no pair can be scored, so there is nothing to blame an artifact for.")
    names = [name for name in mixed.lossy if _is_used(name, pairs)]
    axes = {"kinds": kinds_of(names), "layers": layers_of(names, mixed.config), "tokens": _roles(pairs)}
    first = [BASELINE, WHOLE, replace(WHOLE, inputs=False), replace(WHOLE, weights=False)]
    asked = [*first, *(part for parts in axes.values() for part in parts.values())]
    growth = _Growth()
    with bar(total=(len(asked) + _SINGLE) * len(pairs), unit="pass", desc=f"blaming {label}", leave=False) as told:
        found = _logits(mixed, pairs, asked, told, growth)
        rows = iter(found[len(first) :])
        by_axis = {axis: {name: next(rows) for name in parts} for axis, parts in axes.items()}
        single = _suspects(mixed, names, axes, {k: _squares(found[0], v) for k, v in by_axis.items() if k != "tokens"})
        alone = _logits(mixed, pairs, [BASELINE, *single.values()], told)
    bias = mixed.config.prompt.logit_bias

    def share(name: str, logits: Float64, squares: float) -> Share:
        moved = logits - found[0]
        square = float(np.mean(moved**2))
        scores = [abs(sigmoid(b - bias) - sigmoid(a - bias)) for a, b in zip(found[0], logits, strict=True)]
        part = square / squares if squares else 0.0
        return Share(name, part, float(np.mean(scores)), math.sqrt(square), _rms(found[1] - logits))

    whole, inputs = (float(np.mean((row - found[0]) ** 2)) for row in (found[1], found[3]))
    sums = {axis: sum(_squares(found[0], logits).values()) for axis, logits in by_axis.items()}
    wholes = {axis: inputs if axis == "tokens" else whole for axis in sums}
    shares = {
        axis: _sorted(share(name, row, sums[axis]) for name, row in logits.items()) for axis, logits in by_axis.items()
    }
    shares["matrices"] = _sorted(share(name, row, whole) for name, row in zip(single, alone[1:], strict=True))
    engine = np.asarray([[pair.logit, pair.own] for pair in pairs])
    return Blamed(
        label=label or artifact.absolute().name,
        baseline=baseline.absolute().name,
        pairs={"text": sum(not p.images for p in pairs), "image": sum(bool(p.images) for p in pairs)},
        whole=share("everything", found[1], whole),
        weights=share("weights", found[2], whole),
        inputs=share("inputs", found[3], whole),
        axes=shares,
        explained={axis: total / wholes[axis] for axis, total in sums.items() if wholes[axis]},
        growth=growth.done(),
        engine=(_rms(found[0] - engine[:, 0]), _rms(found[1] - engine[:, 1])),
    )


def sample(sets: Mapping[str, Sequence[Query]]) -> list[tuple[Any, Any]]:
    """A few (query, document) pairs without and with an image, drawn from all sets by a fixed seed."""
    every: dict[str, list[tuple[Any, Any]]] = {kind: [] for kind in PAIRS}
    for queries in sets.values():
        for query in queries:
            for document in query.documents:
                pair = (query.query, document)
                every["image" if any(map(is_image, pair)) else "text"].append(pair)
    rng = np.random.Generator(np.random.SFC64(_SEED))
    return [every[kind][i] for kind, count in PAIRS.items() for i in rng.permutation(len(every[kind]))[:count].tolist()]


def sides_of(baseline: Path, artifact: Path) -> tuple[Side, Side]:
    """The two, whose weights can be mixed. Raises ArtifactError as `blame` does."""
    one, other = Side.open(baseline), Side.open(artifact)
    if not one.is_float:
        raise ArtifactError(
            f"{baseline}: has lost bits itself, so nothing can be blamed on those of others. Put an fp32, bf16 or fp16 "
            "artifact first."
        )
    if one.rotated and not other.rotated:
        raise ArtifactError(
            f"{baseline} has its stream in another basis (rotate in its recipe), and {artifact} has not. Put one that "
            "is not rotated first."
        )
    for what in ("base_files", "adapters"):
        if without_places(one.manifest.provenance.get(what)) != without_places(other.manifest.provenance.get(what)):
            raise ArtifactError(
                f"{baseline} and {artifact} were made of other weights ({what} in their manifests), so it is not for "
                "fewer bits alone to answer for what differs. Blame exports of one checkpoint with the same adapters."
            )
    return one, other


def without_places(facts: Any) -> Any:
    """What the checkpoint, files and adapters of a provenance are, wherever they lay."""
    if isinstance(facts, Mapping):
        return {key: without_places(value) for key, value in facts.items() if key not in ("base", "name", "path")}
    return [without_places(one) for one in facts] if isinstance(facts, list | tuple) else facts


# --- the pairs -------------------------------------------------------------------------------------


def prepared(
    baseline: Path, artifact: Path, pairs: Sequence[tuple[Any, Any]], threads: int | None
) -> list[PreparedPair]:
    """Those that both artifacts can score."""
    own: dict[int, float] = {}
    found = prepared_by(baseline, pairs, threads)
    with _opened(artifact, threads) as reranker:
        for i in found:
            (result,) = reranker.evaluate([pairs[i]])
            if result.error is None:
                own[i] = result.logit
    return [replace(pair, own=own[i]) for i, pair in found.items() if i in own]


def prepared_by(folder: Path, pairs: Sequence[tuple[Any, Any]], threads: int | None) -> dict[int, PreparedPair]:
    """Those that an artifact can score, by their place."""
    found: dict[int, PreparedPair] = {}
    with _opened(folder, threads) as reranker:
        tokenizer = open_tokenizer((folder / TOKENIZER).read_bytes())
        preparer, _ = reranker.begin()
        for i, pair in enumerate(pairs):
            try:
                ready, trace = preparer.prepare(pair), reranker.trace(pair)
            except (InputError, ScoreError):
                continue
            if trace.error is None:
                ids, prompt = trace.token_ids, reranker.config.prompt
                roles = _roles_of(ids, ready.prompt.prefix_length, prompt.image_pad_id, tokenizer.decode)
                merge = reranker.config.image.merge_size
                grids = trace.grid_thw
                images = zip(trace.patches, (vision_positions(grid, merge) for grid in grids), strict=True)
                visual = np.nonzero(ids == prompt.image_pad_id)[0]
                tokens = PairTokens(ids, trace.positions, visual)
                found[i] = PreparedPair(tokens, roles, tuple(images), trace.logit)
    return found


def _opened(folder: Path, threads: int | None) -> Reranker:
    """With images and prompts no longer than are computed here."""
    config = Side.open(folder).manifest.model
    image = config.image
    pixels = min(image.max_pixels, max(image.min_pixels, _MAX_VISUAL_TOKENS * image.factor**2))
    length = min(config.prompt.max_length, max(_MAX_TOKENS, 2 * config.prompt.max_query_length))
    return Reranker.load(folder, threads=threads, max_pixels=pixels, max_length=length)


def _roles_of(
    token_ids: Int64, prefix_length: int, image_pad_id: int, decode: Callable[[list[int]], str]
) -> tuple[str, ...]:
    """What each token of a prompt is there for."""
    roles = []
    for row, token in enumerate(token_ids.tolist()):
        if row == len(token_ids) - 1:
            roles.append(SCORE)
        elif row == 0:
            roles.append(FIRST)
        elif token == image_pad_id:
            roles.append(IMAGE)
        elif not decode([token]).strip(
            string.punctuation + string.whitespace
        ):  # special tokens too, which decode to ""
            roles.append(DELIMITER)
        else:
            roles.append(DOCUMENT if row < prefix_length else QUERY)
    return tuple(roles)


# --- the parts -------------------------------------------------------------------------------------


def kinds_of(names: Sequence[str]) -> dict[str, Part]:
    """A part for each kind of matrix, whatever its layer; named as a recipe would match them."""
    globs = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) if _layer(name) else name for name in names)
    return {glob.removesuffix(".weight"): Part((glob,)) for glob in globs}


def layers_of(names: Sequence[str], config: ModelConfig) -> dict[str, Part]:
    """A part for each layer, or a few that follow each other, and for what stands before and behind them."""
    parts: dict[str, list[str]] = {}
    for name in names:
        layer = _layer(name)
        if layer is None:
            stem = re.sub(r"^(visual\.[a-z_]+|score)\..*", r"\1", name)
            parts.setdefault(stem.removesuffix(".weight"), []).append(name)
            continue
        stem, number = layer
        count = config.vision.depth if stem.startswith("visual") else config.decoder.num_layers
        size = -(-count // _GROUPS)
        first = number // size * size
        last = min(first + size, count) - 1
        parts.setdefault(f"{stem}.{first}" + (f"–{last}" if last > first else ""), []).append(name)
    return {name: Part(tuple(mine)) for name, mine in parts.items()}


def _layer(name: str) -> tuple[str, int] | None:
    """Of a matrix of a layer, where the layers are and its number."""
    match = re.match(r"(visual\.blocks|model\.layers)\.(\d+)\.", name)
    return (match[1], int(match[2])) if match else None


def _roles(pairs: Sequence[PreparedPair]) -> dict[str, Part]:
    there = {role for pair in pairs for role in pair.roles}
    return {role: replace(WHOLE, role=role, weights=False) for role in ROLES if role in there}


def _is_used(name: str, pairs: Sequence[PreparedPair]) -> bool:
    return not name.startswith("visual.") or any(pair.images for pair in pairs)


def _suspects(
    mixed: Mixed,
    names: Sequence[str],
    axes: Mapping[str, Mapping[str, Part]],
    squares: Mapping[str, Mapping[str, float]],
) -> dict[str, Part]:
    """Single matrices of which most is to be expected, by their kind, their layers and their own distance."""
    promise: dict[str, float] = {}
    for name in names:
        worth = 1.0
        for axis, of in squares.items():
            worth *= next((of[part] for part, what in axes[axis].items() if what.has(name)), 0.0)
        promise[name] = worth
    # Distances cost a reading of each matrix, so those which their kind and layers clear are spared it.
    likely = sorted(promise, key=promise.__getitem__, reverse=True)[: 4 * _SINGLE]
    likely.sort(key=lambda name: promise[name] * mixed.distance(name) ** 2, reverse=True)
    return {name.removesuffix(".weight"): Part((name,)) for name in likely[:_SINGLE]}


# --- the passes ------------------------------------------------------------------------------------


class _Growth:
    """Squares of relative errors behind each layer, of all tokens of a role."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, list[Float64]]] = {}
        self.roles: Sequence[str] = ()

    def see(self, layer: str, x: Float32) -> None:
        """x (W, T, D): the baseline's way first, the whole artifact's second."""
        moved = np.square(x[1] - x[0], dtype=np.float64).sum(axis=1)
        size = np.square(x[0], dtype=np.float64).sum(axis=1)
        squares = np.divide(moved, size, out=np.zeros_like(moved), where=size > 0)
        roles = [IMAGE] * len(squares) if layer.startswith("visual.") else self.roles
        for role in set(roles):
            rows = np.asarray([r == role for r in roles])
            self._seen.setdefault(layer, {}).setdefault(role, []).append(squares[rows])

    def done(self) -> tuple[Growth, ...]:
        return tuple(
            Growth(layer, {r: math.sqrt(np.concatenate(of[r]).mean()) for r in ROLES if r in of})
            for layer, of in sorted(self._seen.items(), key=lambda item: item[0].startswith("model."))
        )


def _logits(
    mixed: Mixed, pairs: Sequence[PreparedPair], parts: Sequence[Part], told: Any, growth: _Growth | None = None
) -> Float64:
    """(parts, pairs). The first part is BASELINE, which is computed beside the others of each batch."""
    found = np.zeros((len(parts), len(pairs)))
    for column, pair in enumerate(pairs):
        # Where there is no image, what the image encoder does wrong is nothing.
        idle = [not pair.images and all(glob.startswith("visual.") for glob in part.match) for part in parts]
        busy = [i for i in range(1, len(parts)) if not idle[i]]
        told.update(len(parts) - 1 - len(busy))
        for batch in _batches(busy, _way_bytes(mixed.config, pair)):
            rows = [0, *batch]
            mixed.begin([parts[i] for i in rows], pair.roles)
            if growth is not None and batch[0] == 1:
                growth.roles = pair.roles
                mixed.watch = growth.see
            found[rows, column] = mixed.logits(pair.tokens, pair.images)
            told.update(len(batch))
        found[idle, column] = found[0, column]
    return found


def _batches(parts: Sequence[int], way_bytes: int) -> Iterator[Sequence[int]]:
    """A few at a time; at least two, so that the baseline beside them costs no more than they do."""
    size = max(2, _WAYS_BYTES // way_bytes - 1)
    for first in range(0, len(parts), size):
        yield parts[first : first + size]


def _way_bytes(config: ModelConfig, pair: PreparedPair) -> int:
    """What one way of a pair takes at most, about: three copies of an MLP's inner values or of a table of attention."""
    decoder, vision = config.decoder, config.vision
    rows, patches = len(pair.tokens.token_ids), max((len(values) for values, _ in pair.images), default=0)
    most = max(
        rows * (decoder.intermediate_size + 2 * decoder.hidden_size),
        decoder.num_heads * rows**2,
        patches * (vision.mlp_size + 2 * vision.width),
        vision.num_heads * patches**2,
    )
    return 3 * 4 * most


def _squares(baseline: Float64, logits: Mapping[str, Float64]) -> dict[str, float]:
    return {name: float(np.mean((row - baseline) ** 2)) for name, row in logits.items()}


def _sorted(shares: Iterator[Share]) -> tuple[Share, ...]:
    return tuple(sorted(shares, key=lambda share: -share.share))


def _rms(values: Float64) -> float:
    return math.sqrt(float(np.mean(values**2)))
