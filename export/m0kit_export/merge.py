"""PEFT adapters merged into a checkpoint's tensors, by PEFT's own code, one module at a time.

Owns reading and checking adapters, and the guarantee that a merged tensor is what
`PeftModel.from_pretrained(base, adapter).merge_and_unload()` makes of it in fp32, applied adapter after
adapter. Does not own what a merge computes: that is PEFT's, run on a skeleton in which only one module
exists, so that memory is bounded by the largest module and not by the model.

    >>> stack = AdapterStack.open([AdapterSpec.parse("tuned:0.5")], checkpoint)    # doctest: +SKIP
    >>> stack.merged("model.layers.0.self_attn.q_proj.weight").dtype               # doctest: +SKIP
    torch.float32

How it stays exact. PEFT decides by module names (lists, regular expressions, patterns) what an adapter
touches, and which tensors it saves. So PEFT is run once per adapter on the whole model without weights
(device "meta"); the tensors it would save there are those the adapter's file must hold, no more, no
less. Names are tried as transformers 4.52 and later know them and as before, that of the file first.

Weights. A weight w multiplies the low-rank update (PEFT's `set_scale`). It has no meaning for what
replaces instead of adding: DoRA's magnitudes, `modules_to_save`, trained biases, trainable tokens,
resized embeddings, and PiSSA or OLoRA, whose base is changed as well. There only w = 1 is accepted.
"""

import copy
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, TypedDict

import peft
import torch
from msgspec import Meta
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from m0kit.errors import AdapterError, CheckpointError
from m0kit.schema import fitting
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import (
    Checkpoint,
    check_tensors,
    file_sha256,
    find_licence,
    read_header,
    read_json_object,
    read_tensor,
)
from m0kit_export.names import canonical_name, expected_shapes, unwrapped
from m0kit_export.patterns import try_patterns

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."  # PeftModel.base_model (LoraModel) .model (ours)
_ADAPTER = "default"  # PEFT's name for an adapter that was not given one
_EMBEDDING = "model.embed_tokens"
_RANK_AXES = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
_MERGED_ROWS = 1 << 14  # tokens of an embedding merged at once
_FLOATS = ("F32", "F16", "BF16")

# Options of LoraConfig that say what a trained adapter is and that the tests hold against PEFT. Any other
# one that differs from its default (replicated layers, routed experts, quantised kernels, methods to come)
# is refused rather than guessed.
_UNDERSTOOD = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "init_lora_weights"),
}
# Entries of one list, each of which PEFT compares with each module; a name for every matrix of the published model are
# 324. Patterns it compiles again each time where they are many.
_MAX_NAMES: Final = 2000
_MAX_PATTERNS: Final = 1000
_Names = Annotated[list[str], Meta(max_length=_MAX_NAMES)]
_Patterns = Annotated[list[str], Meta(max_length=_MAX_PATTERNS // 2)]
_Whole = Annotated[int, Meta(ge=0)]
_Number = int | float


class Config(TypedDict, total=False):
    """What is used of adapter_config.json, of PEFT 0.5 to 0.21 and of ms-swift; other fields are `_check_options`'."""

    peft_type: str | None
    swift_type: str | None
    task_type: str | None
    base_model_name_or_path: str | None
    r: Annotated[int, Meta(ge=1, lt=1 << 31)]
    lora_alpha: _Number
    use_rslora: bool | None
    use_dora: bool | None
    rank_pattern: Annotated[dict[str, Annotated[int, Meta(ge=1, lt=1 << 31)]], Meta(max_length=_MAX_PATTERNS)] | None
    alpha_pattern: Annotated[dict[str, _Number], Meta(max_length=_MAX_PATTERNS)] | None
    target_modules: str | _Names | None
    exclude_modules: str | _Names | None
    layers_to_transform: _Whole | Annotated[list[_Whole], Meta(max_length=_MAX_NAMES)] | None
    layers_pattern: str | _Patterns | None
    fan_in_fan_out: bool | None
    bias: str
    lora_bias: bool | None
    modules_to_save: _Patterns | None
    trainable_token_indices: list[_Whole] | Annotated[dict[str, list[_Whole]], Meta(max_length=_MAX_NAMES)] | None
    init_lora_weights: bool | str | None
    ensure_weight_tying: bool | None


# How training started or runs; without effect on a trained adapter.
_WITHOUT_EFFECT = {
    *("lora_dropout", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"),
    *("peft_type", "peft_version", "runtime_config", "loftq_config", "eva_config", "megatron_core"),
    "ensure_weight_tying",  # of the embedding and the LM head, which m0kit leaves out; see `_fit`
    # ms-swift's own: the dtype while training and two learning rates of LoRA+
    *("swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
}
# Initialisations whose start the stored A and B replace altogether, and two that also change the base
# weight, in a way PEFT repeats exactly when it loads the adapter.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
_BASE_CHANGING_INITS = ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class _Unit:
    """What one adapter does to the tensors of one module: `stored` go to PEFT, `copied` replace."""

    path: str  # of the module, as the adapter's training knew it
    stored: Mapping[str, str]  # PEFT's name of an adapter tensor → its name in the file
    copied: Mapping[str, str]  # leaf of the module ("weight", "bias") → name in the file


@dataclass(frozen=True, slots=True)
class _Adapter:
    spec: AdapterSpec
    raw: Mapping[str, Any]  # adapter_config.json
    units: Mapping[str, _Unit]  # canonical module name → what happens to it
    hashes: Mapping[str, str]
    licence: str | None
    left_out: tuple[str, ...]  # tensors of the file that scoring has no use for

    @property
    def file(self) -> Path:
        return self.spec.path / WEIGHTS


class AdapterStack:
    """Adapters over one checkpoint, merged in order: each into the result of those before it.

    A later adapter's `modules_to_save`, biases and saved embeddings replace what earlier ones left there,
    as when PEFT merges them one after another.
    """

    def __init__(self, adapters: Sequence[_Adapter], checkpoint: Checkpoint) -> None:
        self._adapters = tuple(adapters)
        self._checkpoint = checkpoint

    @classmethod
    def open(cls, specs: Sequence[AdapterSpec], checkpoint: Checkpoint) -> "AdapterStack":
        """Read every adapter's config and tensors and check them against the checkpoint and each other.

        Raises AdapterError: not a LoRA, an option that cannot be merged, a tensor without a place, a
        missing, mis-shaped, non-float or non-finite one, a weight where it has no meaning.
        """
        return cls([_open_adapter(spec, checkpoint) for spec in specs], checkpoint)

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


def _open_adapter(spec: AdapterSpec, checkpoint: Checkpoint) -> _Adapter:
    name = spec.name
    if not os.path.isdir(spec.path):  # unlike Path.is_dir it also takes a name too long for the file system
        raise AdapterError(f"there is no adapter folder {name!r}. Download the adapter and give its folder")
    raw = read_config(spec.path, name)
    _check_tokens(name, raw, checkpoint)
    if not (spec.path / WEIGHTS).exists():
        if (spec.path / "adapter_model.bin").exists():
            raise AdapterError(
                f"adapter {name} is a pickle (adapter_model.bin), which can run code when it is opened. "
                "Load and save it with PEFT, which writes safetensors"
            )
        raise AdapterError(f"adapter {name} has no {WEIGHTS}")
    try:
        header = read_header(spec.path / WEIGHTS)
        check_tensors(spec.path / WEIGHTS, [tensor for tensor, (_, dtype) in header.items() if dtype in _FLOATS])
        hashes = {file: file_sha256(spec.path / file) for file in (CONFIG, WEIGHTS)}
    except CheckpointError as error:  # our own sentence, which names the file
        raise AdapterError(f"adapter {name}: {error}") from None
    for tensor, (_, dtype) in header.items():
        if dtype not in _FLOATS:
            raise AdapterError(f"{tensor} of adapter {name} is {dtype}, expected {', '.join(_FLOATS)}")
    try_patterns(raw, _module_names(checkpoint), f"{CONFIG} of adapter {name}")
    fit = _find_fit(name, raw, {key: shape for key, (shape, _) in header.items()}, checkpoint)
    adapter = _Adapter(spec, raw, fit.units, hashes, find_licence(spec.path, {}), fit.left_out)
    _check_weight(adapter, checkpoint)
    return adapter


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """adapter_config.json of a folder, its form and options checked. Raises AdapterError that names the adapter."""
    raw = read_json_object(folder / CONFIG, AdapterError)
    try:
        fitting(raw, Config)
    except ValueError as error:
        raise AdapterError(f"{CONFIG} of adapter {name}: {error}. Correct it, or save the adapter again") from None
    _check_options(name, raw)
    return raw


def _module_names(checkpoint: Checkpoint) -> list[str]:
    """What PEFT compares patterns with: all modules, and what they lie in, under either naming."""
    modules = dict.fromkeys(tensor.rpartition(".")[0] for tensor in checkpoint.names)
    names = {"": None}
    for nested in (True, False):
        for module in modules:
            parts = _spell(module, nested).split(".")
            names |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return list(names)


def _check_tokens(name: str, raw: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Trained tokens are in the vocabulary, each once."""
    tokens = raw.get("trainable_token_indices") or []
    size = checkpoint.config.decoder.vocab_size
    for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if indices and (max(indices) >= size or len(set(indices)) < len(indices)):
            raise AdapterError(
                f"{CONFIG} of adapter {name}: trainable_token_indices names a token twice, or one beyond the "
                f"vocabulary, which ends at {size - 1}. Correct it"
            )


def _check_options(name: str, raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type") or raw.get("swift_type")
    if kind != "LORA":
        raise AdapterError(f"adapter {name} is of PEFT type {kind!r:.40}; m0kit merges LORA (with rsLoRA, DoRA)")
    defaults = {f.name: getattr(peft.LoraConfig(), f.name) for f in fields(peft.LoraConfig)}
    for option, value in raw.items():
        if option in _UNDERSTOOD | _WITHOUT_EFFECT or value == defaults.get(option) or not value:
            continue
        raise AdapterError(
            f"adapter {name} uses {option}={value!r:.60}, which m0kit does not merge. Merge it with PEFT "
            "(merge_and_unload) and export the result"
        )
    init = raw.get("init_lora_weights", True)
    if init not in (*_PLAIN_INITS, *_BASE_CHANGING_INITS):
        raise AdapterError(
            f"adapter {name} was initialised with {init!r:.40}, which changes the base weights in a way its "
            "files do not hold. Save it with PEFT's path_initial_model_for_weight_conversion"
        )


def _check_weight(adapter: _Adapter, checkpoint: Checkpoint) -> None:
    """Refuse a weight other than 1 for whatever replaces instead of adding."""
    weight, raw, name = adapter.spec.weight, adapter.raw, adapter.spec.name
    if weight == 1.0:
        return
    for option, meaning in (
        ("use_dora", "DoRA rescales the whole weight, so part of it is not part of the way"),
        ("trainable_token_indices", "trained tokens replace the base's"),
    ):
        if raw.get(option):
            raise AdapterError(f"adapter {name} cannot have weight {weight}: {meaning}. Use weight 1")
    if raw.get("init_lora_weights", True) in _BASE_CHANGING_INITS:
        raise AdapterError(
            f"adapter {name} cannot have weight {weight}: {raw['init_lora_weights']} changes the base "
            "as well. Use weight 1, or convert it to plain LoRA when saving"
        )
    for module, unit in adapter.units.items():
        replacing = dict(unit.copied)
        replacing.update(
            (key.rpartition(".")[2], stored) for key, stored in unit.stored.items() if ".base_layer." in key
        )
        for leaf, stored in replacing.items():
            # PEFT also saves what it did not train: an embedding under LoRA is there in full
            if not torch.equal(read_tensor(adapter.file, stored).float(), checkpoint.read(f"{module}.{leaf}").float()):
                raise AdapterError(
                    f"adapter {name} cannot have weight {weight}: {stored} replaces the base's tensor. "
                    "Use weight 1, or leave out modules_to_save and trained biases"
                )


@dataclass(frozen=True, slots=True)
class _Fit:
    """How the tensors of a file fit the model under one naming."""

    num_ignored: int  # rank and alpha patterns that PEFT ignores
    units: Mapping[str, _Unit]
    left_out: tuple[str, ...]


def _find_fit(name: str, raw: Mapping[str, Any], header: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> _Fit:
    """Give every tensor of the file its place, under the naming that the adapter was trained with."""
    bare = [_bare(key) for key in header]
    new = sum(key.startswith(("model.language_model.", "model.visual.")) for key in bare)
    old = sum(key.startswith(("model.layers.", f"{_EMBEDDING}.", "visual.")) for key in bare)
    nested = new >= old
    try:
        fit = _fit(name, raw, header, checkpoint, nested)
    except AdapterError as error:
        # Keys renamed by a tool, under a config that nobody renamed: all names and shapes must fit still.
        with suppress(AdapterError):
            return _fit(name, raw, header, checkpoint, not nested)
        raise error from None
    # An alpha leaves no trace in the shapes: if patterns were meant for the other naming, nobody can tell
    # which alpha was trained.
    fewer = fit.num_ignored
    if fewer:
        with suppress(AdapterError):
            fewer = _fit(name, raw, header, checkpoint, not nested).num_ignored
    if fewer < fit.num_ignored:
        raise AdapterError(
            f"adapter {name}: rank_pattern or alpha_pattern names modules as transformers "
            f"{'before' if nested else 'since'} 4.52 does, its tensors the other way. Correct {CONFIG}"
        )
    return fit


def _fit(
    name: str,
    raw: Mapping[str, Any],
    header: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    nested: bool,
) -> _Fit:
    """The fit under one naming. Raises AdapterError if the file does not fit."""
    shapes = expected_shapes(checkpoint.config)
    skeleton = nn.Module()
    for module in dict.fromkeys(tensor.rpartition(".")[0] for tensor in shapes):
        own = {leaf: shapes[f"{module}.{leaf}"] for leaf in _leaves(checkpoint, module)}
        _place(skeleton, _spell(module, nested), _make_module(module, own))
    with peft_at_work(name, raw):
        # How the base weights are initialised changes neither names nor shapes, and needs weights.
        config = _lora_config(raw, init_lora_weights=True)
        model = peft.get_peft_model(skeleton, config, low_cpu_mem_usage=True)
        saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    layers, copies = _classify(name, model)
    if raw.get("lora_bias"):
        bare = [path for path in layers if getattr(model.get_submodule(path), "bias", None) is None]
        if bare:
            raise AdapterError(
                f"adapter {name} has lora_bias, but {bare[0].removeprefix(_PREFIX)} has no bias to take it: "
                "PEFT cannot merge it. Train it without lora_bias, or on modules with a bias"
            )

    places: dict[str, tuple[int, ...]] = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    wanted = [key for key in places if not _is_spare(key, copies)]
    embedding = f"{_PREFIX}{_spell(_EMBEDDING, nested)}"
    own_key = f"{embedding}.base_layer.weight" if embedding in layers else f"{embedding}.weight"
    places.setdefault(own_key, shapes[f"{_EMBEDDING}.weight"])  # save_embedding_layers adds it

    found: dict[str, str] = {}
    left_out: list[str] = []
    for key, shape in header.items():
        place = _place_of(key, nested, places)
        if _is_lm_head(key):
            left_out.append(key)  # scoring has no use for it, and an embedding tied to it is in the file by itself
            continue
        if 0 in shape:
            if place in wanted:
                raise AdapterError(
                    f"{key} of adapter {name} is empty (shape {list(shape)}): it was saved under DeepSpeed ZeRO-3 "
                    "without gathering the parts, and its values are lost. Save it again from the trainer's own "
                    "checkpoint (zero_to_fp32.py)"
                )
            left_out.append(key)  # a piece of the base, which the adapter did not train
            continue
        if place is None:
            raise AdapterError(
                f"{key} of adapter {name} has no place in the model that its config describes "
                f"(base_model_name_or_path: {raw.get('base_model_name_or_path')!r:.80}). Is it an adapter of "
                "jina-reranker-m0, and is adapter_config.json its own?"
            )
        if shape != places[place]:
            raise AdapterError(_misfit(name, raw, key, shape, places[place]))
        if place in found:
            raise AdapterError(f"{found[place]} and {key} of adapter {name} are one tensor twice. Remove one")
        found[place] = key
    heads = [key for key in left_out if _is_lm_head(key) and 0 not in header[key]]
    if raw.get("ensure_weight_tying") and heads and not any(key.startswith(embedding) for key in found):
        raise AdapterError(
            f"adapter {name} was trained with ensure_weight_tying, and holds {heads[0]} but nothing of the embedding "
            "tied to it, so that its change to the embedding is lost. Merge it with PEFT (merge_and_unload) and "
            "export the result"
        )
    missing = [key for key in wanted if key not in found]
    if missing:
        raise AdapterError(
            f"adapter {name} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which its config promises: the file is incomplete, or adapter_config.json is not its own"
        )
    targeted = [path.removeprefix(_PREFIX) for path in layers]
    return _Fit(_unmatched_patterns(raw, targeted), _group(found, layers, copies), tuple(left_out))


def _misfit(name: str, raw: Mapping[str, Any], key: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Why a tensor's shape is wrong: another rank than the config says, or another base."""
    part = next((part for part in _RANK_AXES if f".{part}." in f"{key}."), None)
    if part is not None and len(shape) == len(wanted):
        axis = _RANK_AXES[part]
        rest, wanted_rest = (s[:axis] + s[axis + 1 :] for s in (shape, wanted))
        if rest == wanted_rest:
            pattern = " or rank_pattern" if raw.get("rank_pattern") else ""
            return (
                f"{key} of adapter {name} has rank {shape[axis]}, {CONFIG} says {wanted[axis]} (r = "
                f"{raw.get('r', 8)!r:.20}{', and a rank_pattern' if pattern else ''}). Correct r{pattern} there: the "
                "scale of the update depends on it"
            )
    return (
        f"{key} of adapter {name} has shape {list(shape)}, this base asks for {list(wanted)}: it was trained on "
        f"another one (base_model_name_or_path: {raw.get('base_model_name_or_path')!r:.80})"
    )


def _classify(name: str, model: nn.Module) -> tuple[list[str], list[str]]:
    """Full paths of (modules that PEFT merges into, modules of which it keeps a full copy)."""
    layers: list[str] = []
    copies: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            inner = [m for m in module.modules() if m is not module]
            if any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in inner):
                raise AdapterError(
                    f"adapter {name}: modules_to_save also covers a module that carries LoRA or another "
                    f"copy, {path.removeprefix(_PREFIX)}. Name modules_to_save in full"
                )
            copies.append(path)
        elif isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
            layers.append(path)
    outer = [path for path in layers if not any(path.startswith(f"{other}.") for other in layers)]
    return outer, copies


def _group(found: Mapping[str, str], layers: Sequence[str], copies: Sequence[str]) -> dict[str, _Unit]:
    """Tensors by the module they change."""
    stored: dict[str, dict[str, str]] = {}
    copied: dict[str, dict[str, str]] = {}
    for key, in_file in found.items():
        layer = next((path for path in layers if key.startswith(f"{path}.")), None)
        if layer is not None:
            stored.setdefault(layer, {})[key] = in_file
        elif not _is_spare(key, copies):
            module, _, leaf = key.rpartition(".")
            copied.setdefault(module, {})[leaf] = in_file
    return {
        canonical_name(path.removeprefix(_PREFIX)): _Unit(
            path.removeprefix(_PREFIX), stored.get(path, {}), copied.get(path, {})
        )
        for path in {**stored, **copied}
    }


def _is_spare(key: str, copies: Sequence[str]) -> bool:
    """With bias="all" PEFT saves the biases of a copied module three times; only its own name counts."""
    return any(key.startswith((f"{path}.original_module.", f"{path}.modules_to_save.")) for path in copies)


def _apply(adapter: _Adapter, unit: _Unit, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One adapter merged into one module's own fp32 tensors, by leaf name."""
    merged = dict(tensors)
    if unit.stored:
        state = {key: read_tensor(adapter.file, stored) for key, stored in unit.stored.items()}
        if canonical_name(unit.path) == _EMBEDDING and _is_row_by_row(adapter, state):
            merged = _merge_rows(adapter, unit, tensors, state)
        elif _are_tokens(state):
            merged = _merge_tokens(adapter, unit, tensors, state)
        else:
            merged = _merge_by_peft(adapter, unit, tensors, state)
    for leaf, stored in unit.copied.items():
        merged[leaf] = read_tensor(adapter.file, stored).to(torch.float32, copy=True)
    return merged


def _is_row_by_row(adapter: _Adapter, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether an embedding's update is of each token by itself: plain LoRA is, DoRA's norms are not."""
    return not adapter.raw.get("use_dora") and any(".lora_embedding_A" in key for key in state)


def _merge_rows(
    adapter: _Adapter, unit: _Unit, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """An embedding through PEFT some tokens at a time: whole, its update alone would take another 2 GB."""
    merged = tensors["weight"]  # the caller's own, changed in place
    for start in range(0, len(merged), _MERGED_ROWS):
        rows = slice(start, start + _MERGED_ROWS)
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
    adapter: _Adapter, unit: _Unit, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Trained tokens through PEFT in an embedding of these tokens alone: it copies the whole several times."""
    merged = tensors["weight"]  # the caller's own, changed in place
    indices = list(_token_indices(adapter.raw, unit.path))
    alone = replace(adapter, raw={**adapter.raw, "trainable_token_indices": list(range(len(indices)))})
    merged[indices] = _merge_by_peft(alone, unit, {"weight": merged[indices]}, state)["weight"]
    return {"weight": merged}


def _merge_by_peft(
    adapter: _Adapter, unit: _Unit, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The unit's module through PEFT: attach, load, scale, merge, read back. By leaf name, fp32."""
    name, raw = adapter.spec.name, adapter.raw
    module = _make_module(canonical_name(unit.path), {leaf: t.shape for leaf, t in tensors.items()})
    for leaf, tensor in tensors.items():
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    skeleton = nn.Module()
    _place(skeleton, unit.path, module)

    init = raw.get("init_lora_weights", True)
    is_tokens = _are_tokens(state)
    overrides: dict[str, Any] = {
        # The module is known by now; patterns of ranks and alphas still go by its name.
        "target_modules": DUMMY_TARGET_MODULES if is_tokens else [unit.path],
        "trainable_token_indices": {unit.path: _token_indices(raw, unit.path)} if is_tokens else None,
        "init_lora_weights": init if init in _BASE_CHANGING_INITS else True,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")),
        "task_type": None,
    }
    with torch.no_grad(), torch.random.fork_rng(devices=[]), peft_at_work(name, raw):
        model = peft.get_peft_model(skeleton, _lora_config(raw, **overrides))
        result = peft.set_peft_model_state_dict(model, state)
        if adapter.spec.weight != 1.0:
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    layer.set_scale(_ADAPTER, adapter.spec.weight)
        bare = model.merge_and_unload().get_submodule(unit.path)
    lost = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{_ADAPTER}" in key)]
    if lost:
        raise AdapterError(f"PEFT did not load {lost[0]} of adapter {name} into {unit.path}")
    merged = {leaf: parameter.detach() for leaf, parameter in bare.named_parameters()}
    for leaf, tensor in merged.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"adapter {name} makes {unit.path}.{leaf} overflow. Its weights are broken")
    return merged


def _lora_config(raw: Mapping[str, Any], **overrides: Any) -> peft.LoraConfig:
    options = {option: raw[option] for option in _UNDERSTOOD if option in raw}
    # Two tasks make PEFT keep a full copy of the head; the others only choose a forward.
    options["task_type"] = raw.get("task_type") if raw.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else None
    return peft.LoraConfig(**copy.deepcopy({**options, **overrides}))  # PEFT writes into its lists


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
        f"option of {CONFIG} is wrong (base_model_name_or_path: {raw.get('base_model_name_or_path')!r:.80})"
    )


def _token_indices(raw: Mapping[str, Any], path: str) -> Any:
    tokens = raw["trainable_token_indices"]
    if isinstance(tokens, dict):
        return next(indices for module, indices in tokens.items() if path.endswith(module))
    return tokens


def _place_of(key: str, nested: bool, places: Mapping[str, Any]) -> str | None:
    """The name under which PEFT stores this tensor, or None. The file may use either naming, or spell out
    the adapter's name (as whole state dicts do)."""
    spelled = _PREFIX + _spell(canonical_name(_bare(key)), nested)
    plain = spelled.replace(f".modules_to_save.{_ADAPTER}.", ".")
    plain = re.sub(rf"\.{_ADAPTER}(\.weight|\.bias)?$", r"\1", plain)
    for candidate in (spelled, plain, plain.removesuffix(".weight")):
        if candidate in places:
            return candidate
    return None


def peft_name(key: str, shape: Sequence[int]) -> str | None:
    """What PEFT would have called a tensor of an adapter's file; None for one that is left out."""
    return None if _is_lm_head(key) or 0 in shape else _PREFIX + _bare(key)


def _is_lm_head(key: str) -> bool:
    return _bare(key).startswith("lm_head.")


def _bare(key: str) -> str:
    """The name inside the model. Tools save PEFT's prefix never, once or twice, and training wrappers around it."""
    before = ""
    while key != before:
        before, key = key, unwrapped(key).removeprefix(_PREFIX)
    return key


def _unmatched_patterns(raw: Mapping[str, Any], targeted: Sequence[str]) -> int:
    """How many keys of rank_pattern and alpha_pattern PEFT would ignore (its get_pattern_key)."""
    patterns = [*(raw.get("rank_pattern") or {}), *(raw.get("alpha_pattern") or {})]
    return sum(not any(re.match(rf"(.*\.)?({pattern})$", path) for path in targeted) for pattern in patterns)


def _spell(name: str, nested: bool) -> str:
    """A canonical name as the adapter's training saw it: `nested` from transformers 4.52 on."""
    if nested and name.startswith("visual."):
        return f"model.{name}"
    if nested and name.startswith("model."):
        return f"model.language_{name}"
    return name


def _make_module(name: str, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """The module that owns these parameters, without weights: of the class that PEFT goes by."""
    weight, bias = shapes["weight"], "bias" in shapes
    if name == _EMBEDDING:
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


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module under a dotted path, with empty modules on the way."""
    *parents, leaf = path.split(".")
    for parent in parents:
        if parent not in dict(root.named_children()):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(leaf, module)


def _leaves(checkpoint: Checkpoint, module: str) -> tuple[str, ...]:
    return tuple(leaf for leaf in ("weight", "bias") if f"{module}.{leaf}" in checkpoint.names)
