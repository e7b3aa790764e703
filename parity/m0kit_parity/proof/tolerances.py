"""How far an artifact may be from PyTorch, stage by stage, and why. The only place where a limit is written.

Owns numbers and reasons; `compare.py` does the measuring. A recipe with a new precision adds a table here.

    >>> tolerances("fp32")["score"].limit
    0.0001

The measures, so that a figure means the same everywhere (a: artifact, r: reference):

- exact: the number of values in which a and r differ; the limit is 0.
- relative: max|a − r| of a row divided by the root mean square of that row of r, worst row of the tensor.
  A row is one token's vector, so that a wrong token is not hidden behind good ones, and the largest
  difference (rather than the mean) so that a wrong value is not hidden within its row. The divisor is
  the row's size rather than its largest value because this family of models has a few dimensions a
  hundred times larger than the others.
- absolute: |a − r|.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from m0kit.errors import ArtifactError

Measure = Literal["exact", "relative", "absolute"]

# The order in which a pair goes through them; ranking compares the documents of one query.
STAGES: Final = (
    "token_ids",
    "positions",
    "grid_thw",
    "patches",
    "image_embeds",
    "portable_embeds",
    "layers",
    "hidden",
    "logit",
    "score",
    "ranking",
)

# A row of zeros has no size to be relative to; below this the relative measure is an absolute one.
# Values of either model are around 1 (embeddings, normed states), so this is far under any limit.
RELATIVE_FLOOR: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The limit of one stage. `why` is the reason for the limit, printed in the report."""

    measure: Measure
    limit: float
    why: str

    def __post_init__(self) -> None:
        if self.limit < 0 or (self.measure == "exact") != (self.limit == 0):
            raise ValueError(f"limit {self.limit} does not fit the measure {self.measure!r}")
        if not self.why:
            raise ValueError("a tolerance needs its reason")


Table = Mapping[str, Tolerance]


def _ranking(score: Tolerance) -> Tolerance:
    return Tolerance(
        "absolute",
        2 * score.limit,
        "two scores may each be off by the score tolerance, so only documents whose reference scores lie "
        "closer than twice that may change places, and then it is called a near-tie",
    )


_INTEGERS = Tolerance("exact", 0, "whole numbers from the same rules: a difference is a different prompt")
_PATCHES = Tolerance(
    "exact", 0, "the same pixels through the same fp32 formula in the same order, before any model weight"
)

_SCORE_FP32 = Tolerance(
    "absolute", 1e-4, "the published scores are quoted with four digits; fp32 must keep all of them"
)
_SCORE_FP16 = Tolerance("absolute", 1e-2, "the noise between two published runs of the model in its own 16-bit format")
_SCORE_PUBLISHED = Tolerance(
    "absolute", 1e-2, "the published scores were computed in bf16, and two published runs differ by this"
)


def _table(image_embeds: Tolerance, hidden: Tolerance, logit: Tolerance, score: Tolerance) -> Table:
    """The stages of a precision: those before any weight are exact in all of them."""
    return {
        "token_ids": _INTEGERS,
        "positions": _INTEGERS,
        "grid_thw": _INTEGERS,
        "patches": _PATCHES,
        "image_embeds": image_embeds,
        "portable_embeds": Tolerance(
            image_embeds.measure,
            image_embeds.limit,
            "as for image embeddings, by the portable graph, where that of the device's set gave those",
        ),
        "layers": Tolerance(hidden.measure, hidden.limit, "as for the final hidden state, at each decoder layer"),
        "hidden": hidden,
        "logit": logit,
        "score": score,
        "ranking": _ranking(score),
    }


def _before_sigmoid(score: Tolerance) -> Tolerance:
    why = f"the sigmoid is nowhere steeper than 1/4, so this is the score's {score.limit:g} before it"
    return Tolerance("absolute", 4 * score.limit, why)


def _few_bits(embeds: float, hidden: float, logit: float, product: str) -> Table:
    """A precision that rounds the products: the graphs must compute it, how it ranks is `m0kit evaluate`'s business."""
    return _table(
        Tolerance(
            "relative",
            embeds,
            f"{product}; some four of them in a row make a branch (twice that), the largest of 1,536 values is four "
            "times the typical one; a part read wrongly (order of nibbles, zero point, scale) gives 4 and more",
        ),
        Tolerance(
            "relative", hidden, "as for image embeddings; the stream averages over its layers' independent errors"
        ),
        Tolerance(
            "absolute",
            logit,
            "logits spread over some 10; this is what the trained checkpoint was seen to move at most, times 1.5 to 2",
        ),
        Tolerance("absolute", logit / 4, "the sigmoid is nowhere steeper than 1/4, so this is the logit's before it"),
    )


_TABLES: Final[Mapping[str, Table]] = {
    "fp32": _table(
        Tolerance(
            "relative",
            1e-4,
            "about 1,700 fp32 roundings (6e-8): 32 layers of some ten operations whose sums are taken in "
            "another order; a wrong constant or epsilon shows at 1e-3 and above",
        ),
        Tolerance(
            "relative",
            1e-4,
            "fp32 sums in another order through 28 layers; a wrong rotary angle, mask or epsilon shows "
            "at 1e-3 and above",
        ),
        _before_sigmoid(_SCORE_FP32),
        _SCORE_FP32,
    ),
    "fp16": _table(
        Tolerance(
            "relative",
            3e-2,
            "rounding to 11 bits (4.9e-4) in 32 layers of about 8 rounded operations adds up like a random "
            "walk, √256 · 4.9e-4 = 8e-3 rms; the largest of 1,536 values is some 4 times that",
        ),
        Tolerance(
            "relative",
            5e-2,
            "as for image embeddings through 28 layers (√224 · 4.9e-4 · 4 = 3e-2), added to theirs",
        ),
        _before_sigmoid(_SCORE_FP16),
        _SCORE_FP16,
    ),
    "bf16": _table(
        Tolerance(
            "relative",
            5e-2,
            "weights alone are rounded, to 8 bits (2e-3 rms): √128 products of it in a row are 2e-2, the largest of "
            "1,536 values some 4 times that, less the half that is common; nothing where the checkpoint is bf16 itself",
        ),
        Tolerance("relative", 5e-2, "as for image embeddings"),
        _before_sigmoid(_SCORE_FP16),
        _SCORE_FP16,
    ),
    "int8": _few_bits(
        *(0.4, 0.2, 0.6), "weights of 7 bits are off by 1.6 %, activations of 8 by about 1.5 %: 2.2 % of a product"
    ),
    "int4": _few_bits(*(1.2, 0.4, 1.2), "weights of 4 bits are off by 8 to 13 %, activations of 8 by 1 %"),
    "nf4": _few_bits(*(1.2, 0.4, 1.2), "weights of 4 bits are off by 9 %, activations not at all"),
}

# Against published figures only scores exist, and the reference itself is the noisy side.
PUBLISHED: Final[Table] = {"score": _SCORE_PUBLISHED, "ranking": _ranking(_SCORE_PUBLISHED)}


def tolerances(precision: str) -> Table:
    """The table for an artifact's precision. Raises ArtifactError for one that has no table."""
    if precision not in _TABLES:
        raise ArtifactError(
            f"this artifact's precision is {precision!r}, and parity has tolerances for {', '.join(_TABLES)} "
            "only: choose one of those recipes, or add a table with its reasons to tolerances.py"
        )
    return _TABLES[precision]
