"""How large a checkpoint's activations are, layer by layer: what a scheme of few bits meets. Owns the statistics.

    found = activation_statistics("small/base", [("find lost key", "The key is lost."), ("red cup", Path("page.png"))])
    show_text(to_text(found))

Two figures that papers report, each by its definition:

residual  After each layer, the largest |x| over the median |x| of a pair's hidden state. 1,000 and more is what
          "Massive Activations in Large Language Models" (arXiv:2402.17762, section 2) calls massive. Medians are of one
          pair, as there, and a checkpoint's figure is the largest of its pairs.
normed    What a norm hands to the matrices behind it: max|x| of each channel over all tokens of all pairs, the largest
          over the median channel, as SmoothQuant (arXiv:2211.10438) tells an outlier channel. `row` is what a scale per
          row meets at most tokens: max|x| over the median |x| of one token, the median of a pair's tokens, the mean
          over pairs.

The reference runs one pair at a time, and of a pair's activations only these figures are kept, so that memory goes with
the checkpoint and the longest pair and not with the number of pairs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from m0kit.errors import InputError
from m0kit.terminal import bar
from m0kit_parity.drawing.table import table
from m0kit_parity.reference import Reference

MASSIVE: Final = 1000.0  # times the median |x| of the hidden state (arXiv:2402.17762)
OUTLIER: Final = 20.0  # times the median channel; LLM.int8() (arXiv:2208.07339) meets channels "up to 20x"
_SHOWN: Final = 4  # channels, and tokens of one, that a line names
_FLAT: Final = 1e-4  # of normalised pixels: a patch of one colour, whatever its rounding

_FIRST, _IMAGE, _PAPER, _INK = "first token", "image", "flat patch", "other patch"


@dataclass(frozen=True, slots=True)
class MassiveChannel:
    """A channel of the residual stream that is massive at some token."""

    channel: int
    ratio: float  # its largest |x| over the median of that pair's hidden state
    tokens: tuple[tuple[str, int], ...]  # where, and how many such tokens there were: most first


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual stream at one place; figures are of the pair where the ratio is largest."""

    place: str  # the module whose output it is, by its canonical name: "model.layers.3"
    largest: float  # |x|
    median: float  # |x|
    massive: tuple[MassiveChannel, ...]  # largest first
    massive_tokens: float  # share of all tokens

    @property
    def ratio(self) -> float:
        return self.largest / self.median if self.median else float("inf")


@dataclass(frozen=True, slots=True)
class Normed:
    """What one norm hands on."""

    place: str  # "model.layers.3.input_layernorm"
    channels: tuple[tuple[int, float], ...]  # the largest channels: (channel, times the median channel)
    outliers: int  # channels of OUTLIER times the median and more
    row: float  # largest over median |x| of a token: of a pair's tokens the median, of pairs the mean

    @property
    def ratio(self) -> float:
        return self.channels[0][1]


@dataclass(frozen=True, slots=True)
class Activations:
    """Of one checkpoint, in the order of the computation: image encoder, then decoder."""

    pairs: int
    residual: tuple[Residual, ...]
    normed: tuple[Normed, ...]


@dataclass(slots=True)
class SeenResidual:
    """What is kept of a place while pairs go by."""

    largest: float = 0.0
    median: float = 1.0
    count: int = 0
    massive: int = 0
    ratios: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, Counter[str]] = field(default_factory=dict)

    def add(self, values: Tensor, labels: Sequence[str]) -> None:
        size = values.abs()
        median, largest = float(size.median()), float(size.max())
        if largest * self.median > self.largest * median:
            self.largest, self.median = largest, median
        massive = size >= MASSIVE * median if median else torch.zeros_like(size, dtype=torch.bool)
        self.count += len(size)
        self.massive += int(massive.any(1).sum())
        for token, channel in massive.nonzero().tolist():
            self.tokens.setdefault(channel, Counter())[labels[token]] += 1
            self.ratios[channel] = max(self.ratios.get(channel, 0.0), float(size[token, channel]) / median)

    def done(self, place: str) -> Residual:
        channels = sorted(self.ratios, key=lambda channel: -self.ratios[channel])
        massive = tuple(MassiveChannel(c, self.ratios[c], tuple(self.tokens[c].most_common(_SHOWN))) for c in channels)
        return Residual(place, self.largest, self.median, massive, self.massive / max(self.count, 1))


@dataclass(slots=True)
class SeenNormed:
    """The same of what a norm hands on."""

    largest: Tensor | None = None  # (D,)
    rows: float = 0.0
    count: int = 0

    def add(self, values: Tensor) -> None:
        size = values.abs()
        largest = size.amax(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.rows += float((size.amax(1) / size.median(1).values.clamp_min(torch.finfo(size.dtype).tiny)).median())
        self.count += 1

    def done(self, place: str) -> Normed:
        assert self.largest is not None
        ratios = self.largest / self.largest.median().clamp_min(torch.finfo(self.largest.dtype).tiny)
        most = ratios.topk(min(_SHOWN, len(ratios)))
        channels = tuple(zip(most.indices.tolist(), most.values.tolist(), strict=True))
        return Normed(place, channels, int((ratios >= OUTLIER).sum()), self.rows / self.count)


class _Watch:
    """Hooks on the reference's modules, and what they have seen."""

    def __init__(self, reference: Reference) -> None:
        self.residual: dict[str, SeenResidual] = {}
        self.normed: dict[str, SeenNormed] = {}
        self.labels: dict[bool, list[str]] = {}  # of the pair's patches (True) and tokens
        self._reference = reference

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooked for as long as the block lasts."""
        visual, decoder = self._reference.core.visual, self._reference.core.language_model
        hooks = []
        for module, place, norm in _places(visual, decoder):
            see = partial(self._normed, place) if norm else partial(self._residual, place)
            hooks.append(module.register_forward_hook(see))
        # The decoder is given embeddings, an image's among them, that no module makes.
        hooks.append(decoder.layers[0].register_forward_pre_hook(self._embedded, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _residual(self, place: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        values = _rows(output)
        self.residual.setdefault(place, SeenResidual()).add(values, self.labels[place.startswith("visual.")])

    def _normed(self, place: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        self.normed.setdefault(place, SeenNormed()).add(_rows(output))

    def _embedded(self, _module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = inputs[0] if inputs else keywords["hidden_states"]
        self.residual.setdefault("model.embed_tokens", SeenResidual()).add(_rows(given), self.labels[False])


def activation_statistics(
    checkpoint: str | Path | Reference,
    pairs: Iterable[Any],
    *,
    max_pixels: int | None = None,
    progress: bool = False,
) -> Activations:
    """Statistics of a checkpoint (folder or hub id, or a loaded reference) over (query, document) pairs, in fp32.

    A pair is what `Reference.score` takes. Places without tokens are left out: the image encoder when no pair has an
    image. `max_pixels` reads the images of a folder's reference smaller. Raises CheckpointError; InputError when there
    is no pair.
    """
    if isinstance(checkpoint, Reference):
        reference = checkpoint
    else:
        reference = Reference.load(checkpoint, max_pixels=max_pixels, progress=progress)
    watch, count = _Watch(reference), 0
    with watch.watching():
        for pair in bar(pairs, unit="pair", desc="activations", shown=progress):
            inputs = reference.inputs(pair)
            pad, decode = reference.config.prompt.image_pad_id, reference.tokenizer.decode
            watch.labels = {True: patch_labels(inputs.patches), False: token_labels(inputs.token_ids, pad, decode)}
            reference.hidden(reference.feeds([inputs]))
            count += 1
    if not count:
        raise InputError("statistics of activations need at least one pair of a query and a document; got none.")
    return gathered(count, watch.residual, watch.normed)


def gathered(num_pairs: int, residual: Mapping[str, SeenResidual], normed: Mapping[str, SeenNormed]) -> Activations:
    """What was seen at each place, in the order of the computation."""
    return Activations(
        num_pairs,
        tuple(seen.done(place) for place, seen in sorted(residual.items(), key=_order)),
        tuple(seen.done(place) for place, seen in sorted(normed.items(), key=_order)),
    )


def _order(item: tuple[str, object]) -> tuple[bool, int]:
    """Image encoder before decoder, by layers; what is of no layer comes first or last, as its name says."""
    parts = item[0].split(".")
    layer = int(parts[2]) if parts[1] in ("blocks", "layers") else {"patch_embed": -1, "embed_tokens": -1}.get(parts[1])
    return parts[0] == "model", 1 << 30 if layer is None else layer


def _places(visual: Any, decoder: Any) -> Iterator[tuple[nn.Module, str, bool]]:
    """Module, canonical name, and whether it is a norm; the others' outputs are the residual stream."""
    yield visual.patch_embed, "visual.patch_embed", False
    for i, block in enumerate(visual.blocks):
        yield block.norm1, f"visual.blocks.{i}.norm1", True
        yield block.norm2, f"visual.blocks.{i}.norm2", True
        yield block, f"visual.blocks.{i}", False
    yield visual.merger.ln_q, "visual.merger.ln_q", True
    for i, layer in enumerate(decoder.layers):
        yield layer.input_layernorm, f"model.layers.{i}.input_layernorm", True
        yield layer.post_attention_layernorm, f"model.layers.{i}.post_attention_layernorm", True
        yield layer, f"model.layers.{i}", False
    yield decoder.norm, "model.norm", True


def _rows(output: Any) -> Tensor:
    """(tokens, channels) of a module's output."""
    values: Tensor = output[0] if isinstance(output, tuple) else output
    return values.reshape(-1, values.shape[-1]).float()


def token_labels(token_ids: Iterable[int], image_pad_id: int, decode: Callable[[list[int]], str]) -> list[str]:
    """What each token of the prompt is: its text, as Python writes it."""
    labels = [_IMAGE if token == image_pad_id else repr(decode([token])) for token in token_ids]
    return [_FIRST, *labels[1:]]


def patch_labels(images: Iterable[Tensor]) -> list[str]:
    """What each patch of some images, each (P, 1176), is: of one colour, or with something on it."""
    labels = []
    for patches in images:
        # (P, channels × frames × 14 × 14): each channel of each frame is normalised by itself
        planes = patches.float().reshape(len(patches), -1, 14 * 14)
        flat = (planes.amax(2) - planes.amin(2)).amax(1) < _FLAT
        labels += [_PAPER if one else _INK for one in flat.tolist()]
    return labels


def summary(found: Activations) -> str:
    """What decides whether few bits are tried on such activations, in a sentence."""
    massive = [one for one in found.residual if one.massive]
    most = max(found.residual, key=lambda one: one.ratio)
    outlying = [one for one in found.normed if one.outliers]
    channels = sorted({each.channel for one in massive for each in one.massive})
    told = f"{len(channels)} channels of the residual stream are massive (≥ {MASSIVE:.0f} × its median)"
    if not massive:
        told = f"no channel of the residual stream is massive (≥ {MASSIVE:.0f} × its median)"
    return (
        f"On {found.pairs} pairs {told}; the largest value is {most.ratio:,.0f} × the median, behind {most.place}. "
        f"Channels of {OUTLIER:.0f} × the median channel are in {len(outlying)} of {len(found.normed)} normed inputs."
    )


def to_text(found: Activations) -> str:
    """Two tables."""
    residual = [["residual stream after", "largest", "median", "ratio", "tokens ≥ 1000×", "channels", "at"]]
    for one in found.residual:
        channels = " ".join(str(m.channel) for m in one.massive[:_SHOWN]) or "–"
        at = ", ".join(f"{label} ({count})" for label, count in one.massive[0].tokens) if one.massive else "–"
        share = f"{100 * one.massive_tokens:.1f} %"
        figures = [f"{one.largest:.4g}", f"{one.median:.3g}", f"{one.ratio:,.0f}", share, channels, at]
        residual.append([one.place, *figures])
    normed = [["normed input", "ratio", f"channels ≥ {OUTLIER:.0f}×", "row", "channels"]]
    for norm in found.normed:
        most = ", ".join(f"{channel} ({ratio:.1f})" for channel, ratio in norm.channels)
        normed.append([norm.place, f"{norm.ratio:.1f}", str(norm.outliers), f"{norm.row:.1f}", most])
    return f"{table(residual)}\n\n{table(normed)}"
