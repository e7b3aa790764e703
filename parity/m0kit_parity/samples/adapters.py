"""Adapters for any checkpoint in the published layout, made by PEFT itself, in every form a user could have.

What PEFT starts at zero or as a copy of the base gets random *trained* values: an update of every adapted
tensor as large as `UPDATE` of the tensor itself, so that a lost, transposed or wrongly scaled one shows in
the scores. PEFT works on the model without weights: only the adapter's own tensors are ever in memory, and
of the base one at a time.

    write_adapter(Path("full-dora"), "full", "dora")
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from m0kit.errors import AdapterError
from m0kit.files import named_errors, replacing, require_unoccupied
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_export.names import canonical_name
from m0kit_parity.reference import NewNames, PublishedNames, empty_model
from m0kit_parity.samples.checkpoints import Naming

UPDATE: Final = 0.2  # root mean square of an update relative to that of what it changes
RANK: Final = 8
ALPHA: Final = 16

# Options of peft.LoraConfig, in words that fit both namings of modules.
FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "v_proj", "down_proj", "qkv"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "gate_proj": 4},
        "alpha_pattern": {"v_proj": 5, r"layers\.1\.mlp\.gate_proj": 12},
    },
    "bias-all": {"target_modules": ["q_proj", "fc1"], "bias": "all"},
    "bias-lora-only": {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["q_proj", "v_proj", "fc1"], "lora_bias": True},
    "score": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [99, 100, 101]},  # 100 is in every prompt
    "decoder": {"target_modules": "all-linear", "exclude_modules": r".*(visual|score).*"},
    "vision-decoder": {"target_modules": "all-linear"},
}

_ADAPTER = "default"  # PEFT's name for an adapter that was not given one
_SLICE = 1 << 20  # values in fp32 at once


def write_adapter(folder: Path, source: str | Path, form: str, *, seed: int = 0, naming: Naming = "new") -> None:
    """Write an adapter of one of FORMS for a checkpoint, a folder or hub id.

    Values depend on `seed` and the tensor's published name alone, not on `naming`. The folder appears when
    it is complete. Raises AdapterError for an unknown form, OutputError when the folder is not empty, CheckpointError.
    """
    if form not in FORMS:
        raise AdapterError(f"no form of adapter is called {form!r}; there are {', '.join(FORMS)}")
    require_unoccupied(folder)
    checkpoint = open_checkpoint(source)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **copy.deepcopy(dict(FORMS[form])))
    with replacing(folder) as aside, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT remarks that it saves an adapted embedding whole
        shell = (NewNames if naming == "new" else PublishedNames)(*empty_model(checkpoint))
        model = peft.get_peft_model(shell, config, low_cpu_mem_usage=True)
        _train(model, checkpoint, seed)
        with named_errors(folder):
            model.save_pretrained(aside)


def _train(model: nn.Module, checkpoint: Checkpoint, seed: int) -> None:
    """Give values to whatever PEFT is going to save.

    All are drawn before the base is read, and scaled where they are: what is kept, allocated between the
    reads, would hold on to the memory of every read.
    """
    drawn: dict[str, torch.Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            rng = np.random.Generator(np.random.SFC64([seed, *b"adapter ", *_published(name).encode()]))
            drawn[name] = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))
            _set(model, name, drawn[name], trained=True)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for path, layer in layers.items():
        _scale_low_rank(path, layer, drawn, checkpoint)
        if path.endswith(".embed_tokens"):  # PEFT saves it as it is beside the update
            whole = checkpoint.read(f"{_published(path)}.weight")
            _set(model, f"{path}.base_layer.weight", whole, trained=False)
    for name, values in drawn.items():
        if ".lora_" not in name:
            base = _replaced(name, model, checkpoint)
            values.mul_(UPDATE * _size(base)).add_(base)


def _set(model: nn.Module, name: str, values: torch.Tensor, trained: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = nn.Parameter(values, requires_grad=trained)
    if isinstance(module, nn.ParameterDict):
        module[leaf] = parameter
    else:
        setattr(module, leaf, parameter)


def _scale_low_rank(path: str, layer: LoraLayer, drawn: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """A, B, B's bias and DoRA's magnitude of one module, from deviation 1 to the size that training gives."""
    weight = checkpoint.read(f"{_published(path)}.weight")
    rank: int = layer.r[_ADAPTER]
    scaling: float = layer.scaling[_ADAPTER]
    # An element of B·A is a sum of `rank` products.
    down = 1 / math.sqrt(layer.in_features)
    up = UPDATE * _size(weight) / (down * scaling * math.sqrt(rank))
    for leaf, _ in layer.named_parameters():
        values = drawn.get(f"{path}.{leaf}")
        if values is None:
            continue
        if leaf.startswith("lora_magnitude"):  # starts as the norms of the rows
            norms = [torch.linalg.vector_norm(part, dim=1) for part in _slices(weight.flatten(1))]
            values.mul_(UPDATE).add_(1).mul_(torch.cat(norms).reshape(values.shape))
        elif leaf.startswith("lora_B") and leaf.endswith("bias"):
            values.mul_(UPDATE * _size(checkpoint.read(f"{_published(path)}.bias")) / scaling)
        elif leaf.startswith("lora_"):
            values.mul_(down if leaf.startswith(("lora_A", "lora_embedding_A")) else up)


def _replaced(name: str, model: nn.Module, checkpoint: Checkpoint) -> torch.Tensor:
    """What a bias, a whole module's tensor or single tokens are trained in place of."""
    path, _, tokens = name.partition(".token_adapter.")
    if tokens:
        layer: Any = model.get_submodule(f"{path}.token_adapter")
        return checkpoint.read(f"{_published(path)}.weight")[layer.token_indices[_ADAPTER]]
    return checkpoint.read(_published(name))


def _size(tensor: torch.Tensor) -> float:
    """Root mean square."""
    return math.sqrt(sum(part.square().sum().item() for part in _slices(tensor)) / tensor.numel())


def _slices(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows at a time in fp32, so that nothing large is ever copied whole."""
    rows = max(1, _SLICE * len(tensor) // tensor.numel())
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows].float()


def _published(name: str) -> str:
    """The published name of a tensor or module of the model that PEFT wrapped."""
    bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return canonical_name(bare.replace(f".modules_to_save.{_ADAPTER}", ""))
