"""PEFT adapters merged into a checkpoint's tensors, by PEFT's own code, one module at a time.

Owns the guarantee that a merged tensor is what `PeftModel.from_pretrained(base, adapter).merge_and_unload()` makes of
it in fp32, applied adapter after adapter. Does not own what a merge computes: that is PEFT's, run on a skeleton in
which only one module exists, so that memory is bounded by the largest module and not by the model.

    >>> stack = AdapterStack.open([AdapterSpec.parse("tuned:0.5")], checkpoint)    # doctest: +SKIP
    >>> stack.merged("model.layers.0.self_attn.q_proj.weight").dtype               # doctest: +SKIP
    torch.float32
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from m0kit.errors import AdapterError
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import Checkpoint
from m0kit_export.lora import ADAPTER, BASE_CHANGING_INITS, Adapter, Unit, lora_config, open_adapter
from m0kit_export.names import canonical_name
from m0kit_export.skeleton import peft_at_work, skeleton
from m0kit_export.tensors import read_tensor
from m0kit_quant.weights import EMBEDDING

MERGED_ROWS = 1 << 14  # tokens of an embedding merged at once


class AdapterStack:
    """Adapters over one checkpoint, merged in order: each into the result of those before it.

    A later adapter's `modules_to_save`, biases and saved embeddings replace what earlier ones left there,
    as when PEFT merges them one after another.
    """

    def __init__(self, adapters: Sequence[Adapter], checkpoint: Checkpoint) -> None:
        self._adapters = tuple(adapters)
        self._checkpoint = checkpoint

    @classmethod
    def open(cls, specs: Sequence[AdapterSpec], checkpoint: Checkpoint) -> "AdapterStack":
        """Read every adapter's config and tensors and check them against the checkpoint and each other.

        Raises AdapterError: not a LoRA, an option that cannot be merged, a tensor without a place, a
        missing, mis-shaped, non-float or non-finite one, a weight where it has no meaning.
        """
        return cls([open_adapter(spec, checkpoint) for spec in specs], checkpoint)

    def merged(self, name: str) -> torch.Tensor:
        """Checkpoint tensor `name` with all adapters merged: fp32, CPU, contiguous, the caller's own.

        Raises CheckpointError for an unknown or damaged tensor, AdapterError when PEFT cannot merge.
        """
        module, _, leaf = name.rpartition(".")
        touching = [adapter for adapter in self._adapters if module in adapter.units]
        # A whole module is read only if something is merged into it.
        leaves = _leaves(self._checkpoint, module) if touching else (leaf,)
        tensors = {each: self._checkpoint.read(f"{module}.{each}").to(torch.float32, copy=True) for each in leaves}
        for adapter in touching:
            tensors = _apply(adapter, adapter.units[module], tensors)
        return tensors[leaf].contiguous()

    def provenance(self) -> list[dict[str, Any]]:
        """One JSON object per adapter, in order: name, weight, sha256 of both files, kind, rank, licence, left_out."""
        return [
            {
                "name": adapter.spec.name,
                "weight": adapter.spec.weight,
                "sha256": dict(adapter.hashes),
                "peft_type": "LORA",
                "rank": adapter.raw.get("r", 8),
                "licence": adapter.licence,
                "left_out": list(adapter.left_out),
            }
            for adapter in self._adapters
        ]


def _apply(adapter: Adapter, unit: Unit, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One adapter merged into one module's own fp32 tensors, by leaf name."""
    merged = dict(tensors)
    if unit.stored:
        state = {key: read_tensor(adapter.file, stored) for key, stored in unit.stored.items()}
        if canonical_name(f"{unit.path}.weight") == EMBEDDING and _is_row_by_row(adapter, state):
            merged = _merge_rows(adapter, unit, tensors, state)
        elif _are_tokens(state):
            merged = _merge_tokens(adapter, unit, tensors, state)
        else:
            merged = _merge_by_peft(adapter, unit, tensors, state)
    for leaf, stored in unit.copied.items():
        merged[leaf] = read_tensor(adapter.file, stored).to(torch.float32, copy=True)
    return merged


def _is_row_by_row(adapter: Adapter, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether an embedding's update is of each token by itself: plain LoRA is, DoRA's norms are not."""
    return not adapter.raw.get("use_dora") and any(".lora_embedding_A" in key for key in state)


def _merge_rows(
    adapter: Adapter, unit: Unit, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """An embedding through PEFT some tokens at a time: whole, its update alone would take another 2 GB."""
    merged = tensors["weight"]  # the caller's own, changed in place
    for start in range(0, len(merged), MERGED_ROWS):
        rows = slice(start, start + MERGED_ROWS)
        part = {
            key: value[:, rows] if ".lora_embedding_A" in key else value[rows] if ".base_layer." in key else value
            for key, value in state.items()
        }
        merged[rows] = _merge_by_peft(adapter, unit, {"weight": merged[rows].clone()}, part)["weight"]
    return {"weight": merged}


def _are_tokens(state: Mapping[str, torch.Tensor]) -> bool:
    """Trained tokens are all there is of an adapter in their module: then there is no LoRA."""
    return any(key.endswith(".trainable_tokens_delta") for key in state)


def _merge_tokens(
    adapter: Adapter, unit: Unit, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Trained tokens through PEFT in an embedding of these tokens alone: it copies the whole several times."""
    merged = tensors["weight"]  # the caller's own, changed in place
    indices = list(_token_indices(adapter.raw, unit.path))
    alone = replace(adapter, raw={**adapter.raw, "trainable_token_indices": list(range(len(indices)))})
    merged[indices] = _merge_by_peft(alone, unit, {"weight": merged[indices]}, state)["weight"]
    return {"weight": merged}


def _merge_by_peft(
    adapter: Adapter, unit: Unit, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The unit's module through PEFT: attach, load, scale, merge, read back. By leaf name, fp32."""
    name, raw = adapter.spec.name, adapter.raw
    alone = skeleton({unit.path: {leaf: tensor.shape for leaf, tensor in tensors.items()}})
    for leaf, tensor in tensors.items():
        setattr(alone.get_submodule(unit.path), leaf, nn.Parameter(tensor, requires_grad=False))
    init = raw.get("init_lora_weights", True)
    is_tokens = _are_tokens(state)
    overrides: dict[str, Any] = {
        # The module is known by now; patterns of ranks and alphas still go by its name.
        "target_modules": DUMMY_TARGET_MODULES if is_tokens else [unit.path],
        "trainable_token_indices": {unit.path: _token_indices(raw, unit.path)} if is_tokens else None,
        "init_lora_weights": init if init in BASE_CHANGING_INITS else True,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")),
        "task_type": None,
    }
    with torch.no_grad(), torch.random.fork_rng(devices=[]), peft_at_work(name, raw):
        model = peft.get_peft_model(alone, lora_config(raw, **overrides))
        result = peft.set_peft_model_state_dict(model, state)
        if adapter.spec.weight != 1.0:
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    layer.set_scale(ADAPTER, adapter.spec.weight)
        bare = model.merge_and_unload().get_submodule(unit.path)
    lost = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{ADAPTER}" in key)]
    if lost:
        raise AdapterError(f"PEFT did not load {lost[0]} of adapter {name} into {unit.path}")
    merged = {leaf: parameter.detach() for leaf, parameter in bare.named_parameters()}
    for leaf, tensor in merged.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"adapter {name} makes {unit.path}.{leaf} overflow. Its weights are broken")
    return merged


def _token_indices(raw: Mapping[str, Any], path: str) -> Any:
    tokens = raw["trainable_token_indices"]
    if isinstance(tokens, dict):
        return next(indices for module, indices in tokens.items() if path.endswith(module))
    return tokens


def _leaves(checkpoint: Checkpoint, module: str) -> tuple[str, ...]:
    return tuple(leaf for leaf in ("weight", "bias") if f"{module}.{leaf}" in checkpoint.names)
