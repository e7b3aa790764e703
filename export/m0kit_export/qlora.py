"""The base that a QLoRA adapter was trained on: linear layers rounded to NF4 and back, the rest as stored.

An adapter trained on a base in 4 bits has learnt to make up for its rounding, and belongs on that base, not
on the one it was rounded from. Owns which layers were rounded, and the second rounding of their scales; the
first one is `m0kit_quant.nf4`'s, merging is `merge`'s, to which this is a checkpoint like any other.

    >>> base = QuantizedBase.of(checkpoint, double_quant=True)                         # doctest: +SKIP
    >>> stack = AdapterStack.open([AdapterSpec.parse("my-qlora")], base)               # doctest: +SKIP

What transformers' bitsandbytes integration rounds is every nn.Linear but those it keeps: layers of both
towers and of the head, neither the embedding nor the patches' convolution. Of the head, transformers 4 (here
4.51, on the published class) keeps score.2, the module of the last parameter; transformers 5 means to do so
too, but compares its name with that of a bias and rounds it. Who trained with llm_int8_skip_modules kept what
it names, and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from m0kit.errors import CheckpointError
from m0kit_export.adapter import KEPT
from m0kit_export.checkpoint import Checkpoint
from m0kit_export.names import spelled
from m0kit_quant.nf4 import BLOCK_SIZE, NF4, bitsandbytes_functional, dequantize, quantize
from m0kit_quant.weights import EMBEDDING, Float32


@dataclass(frozen=True)
class QuantizedBase(Checkpoint):
    """A checkpoint whose linear layers are read as NF4 holds them. Made by `of`."""

    double_quant: bool = field(kw_only=True)
    kept: tuple[str, ...] = field(kw_only=True)  # modules left as they are, under either naming
    rounded: tuple[str, ...] = field(kw_only=True)  # names of the weights that are not

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, double_quant: bool, keep: Sequence[str] = KEPT) -> "QuantizedBase":
        """The checkpoint as BitsAndBytesConfig(load_in_4bit, "nf4") loads it.

        double_quant: bnb_4bit_use_double_quant of the training. keep: modules that it did not quantise, as
        "score" or "model.visual"; a name stands for all below it. Raises CheckpointError when a name fits no
        linear layer or the checkpoint is in 4 bits already, DependencyError without bitsandbytes.
        """
        bitsandbytes_functional()
        if checkpoint.packed:
            raise CheckpointError(
                f"{checkpoint.source} is stored in 4 bits already: adapters are merged on it as it is. "
                "Leave out the option for QLoRA, or give the checkpoint it was quantised from"
            )
        linear = _linear_weights(checkpoint)
        for module in keep:
            if not any(_is_in(name, module) for name in linear):
                raise CheckpointError(
                    f"no linear layer of jina-reranker-m0 is called {module!r:.80} or lies below it. Name modules "
                    "that the training did not quantise, such as 'score' or 'visual'"
                )
        rounded = tuple(name for name in linear if not any(_is_in(name, module) for module in keep))
        own = {each.name: getattr(checkpoint, each.name) for each in fields(Checkpoint)}
        return cls(**own, double_quant=double_quant, kept=tuple(keep), rounded=rounded)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as `Checkpoint.read` gives it, in its dtype; a linear layer's with NF4's rounding in it.

        As `bitsandbytes.functional.dequantize_4bit` gives it: level times absmax in fp32, rounded to the dtype
        of the base, which is what training multiplied with when it computed in that dtype. Raises CheckpointError.
        """
        tensor = super().read(name)
        if name not in self.rounded:
            return tensor
        rounded = quantize(tensor.to(torch.float32).numpy())
        if self.double_quant:
            rounded = NF4(rounded.shape, rounded.packed, _round_scales(rounded.absmax))
        return torch.from_numpy(dequantize(rounded)).to(tensor.dtype)

    def provenance(self) -> dict[str, Any]:
        """What the manifest says about the rounding: a JSON object."""
        return {
            "scheme": "nf4",
            "block_size": BLOCK_SIZE,
            "double_quant": self.double_quant,
            "num_rounded": len(self.rounded),
            "kept": list(self.kept),
            "bitsandbytes": version("bitsandbytes"),
        }


def _linear_weights(checkpoint: Checkpoint) -> list[str]:
    """Weights of every nn.Linear: the matrices, but for the embedding."""
    names = [name for name in checkpoint.names if name.endswith(".weight") and len(checkpoint.shape(name)) == 2]
    return [name for name in names if name != EMBEDDING]


def _is_in(name: str, module: str) -> bool:
    """Whether a tensor belongs to a module, named in full or by its last parts, under either naming."""
    return bool(module) and any(f".{module}." in f".{spelled(name, nested=nested)}" for nested in (False, True))


def _round_scales(absmax: Float32) -> Float32:
    """Scales as double quantisation keeps them: about their mean, in 8 bits, by bitsandbytes. (blocks,)"""
    functional = bitsandbytes_functional()
    scales = torch.from_numpy(absmax)
    mean = scales.mean()
    codes, state = functional.quantize_blockwise(scales - mean, blocksize=256)
    read: Float32 = (functional.dequantize_blockwise(codes, state) + mean).numpy().astype(np.float32, copy=False)
    return read
