"""Something for PEFT to work on: modules without weights.

Owns the skeleton, a model in which no module but those asked for exists, each of the class that PEFT goes by, and what
becomes of PEFT's warnings and exceptions. Knows no files.

    with peft_at_work("tuned", raw):
        model = peft.get_peft_model(skeleton({"score.0": {"weight": (64, 64)}}), peft.LoraConfig(r=8))
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from m0kit.errors import AdapterError
from m0kit_export.names import canonical_name
from m0kit_quant.weights import EMBEDDING


@contextmanager
def peft_at_work(name: str, raw: Mapping[str, Any]) -> Iterator[None]:
    """PEFT's warnings kept quiet (what they warn of is an error here), its exceptions made ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError) as error:
            reason = type(error).__name__
        except (NotImplementedError, RuntimeError, TypeError, ValueError, re.error) as error:
            reason = type(error).__name__
        else:
            return
    raise AdapterError(
        f"PEFT cannot put adapter {name} on this model ({reason}): target_modules "
        f"{raw.get('target_modules')!r:.120} match nothing here or something that takes no LoRA, or another "
        f"option of adapter_config.json is wrong (base_model_name_or_path: {raw.get('base_model_name_or_path')!r:.80})"
    )


def skeleton(modules: Mapping[str, Mapping[str, Sequence[int]]]) -> nn.Module:
    """Modules by their dotted paths, with empty ones on the way; of each the shapes of its parameters."""
    whole = nn.Module()
    for path, shapes in modules.items():
        *parents, leaf = path.split(".")
        root = whole
        for parent in parents:
            if parent not in dict(root.named_children()):
                root.add_module(parent, nn.Module())
            root = root.get_submodule(parent)
        root.add_module(leaf, _module(canonical_name(path), shapes))
    return whole


def _module(name: str, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """One module without weights, of the class that PEFT goes by."""
    weight, bias = shapes["weight"], "bias" in shapes
    if f"{name}.weight" == EMBEDDING:
        return nn.Embedding(weight[0], weight[1], device="meta")
    if len(weight) == 5:
        kernel = (weight[2], weight[3], weight[4])
        return nn.Conv3d(weight[1], weight[0], kernel, stride=kernel, bias=bias, device="meta")
    if len(weight) == 2:
        return nn.Linear(weight[1], weight[0], bias=bias, device="meta")
    norm = nn.Module()  # RMSNorm and LayerNorm: PEFT copies them whole and never looks inside
    for leaf, shape in shapes.items():
        norm.register_parameter(leaf, nn.Parameter(torch.empty(*shape, device="meta"), requires_grad=False))
    return norm
