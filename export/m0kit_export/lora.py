"""A LoRA adapter as PEFT saves it: its config and tensors, each with its place in the model.

Owns reading and checking adapters. Merging is `merge`, PEFT itself at work `skeleton`.

    adapter = open_adapter(AdapterSpec.parse("tuned:0.5"), checkpoint)             # doctest: +SKIP
    adapter.units["model.layers.0.self_attn.q_proj"].stored                        # doctest: +SKIP

PEFT decides by module names (lists, regular expressions, patterns) what an adapter touches, and which tensors it
saves. So PEFT is run once per adapter on the whole model without weights (device "meta"); the tensors it would save
there are those the adapter's file must hold, no more, no less. Names are tried as transformers 4.52 and later know
them and as before, that of the file first.

Weights. A weight w multiplies the low-rank update (PEFT's `set_scale`). It has no meaning for what
replaces instead of adding: DoRA's magnitudes, `modules_to_save`, trained biases, trainable tokens,
resized embeddings, and PiSSA or OLoRA, whose base is changed as well. There only w = 1 is accepted.
"""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, TypedDict

import peft
import torch
from msgspec import Meta
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from m0kit.errors import AdapterError, CheckpointError
from m0kit.schema import fitting
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import Checkpoint
from m0kit_export.folder import file_sha256, find_licence, read_json_object
from m0kit_export.names import canonical_name, expected_shapes, is_nested, spelled, unwrapped
from m0kit_export.patterns import try_patterns
from m0kit_export.skeleton import peft_at_work, skeleton
from m0kit_export.tensors import FLOATS, check_tensors, read_header, read_tensor
from m0kit_quant.weights import EMBEDDING

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER = "default"  # PEFT's name for an adapter that was not given one

_PREFIX = "base_model.model."  # PeftModel.base_model (LoraModel) .model (ours)
_EMBEDDING = EMBEDDING.removesuffix(".weight")
_RANK_AXES = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}

# Entries of one list, each of which PEFT compares with each module; a name for every matrix of the published model are
# 324. Patterns it compiles again each time where they are many.
_MAX_NAMES: Final = 2000
_MAX_PATTERNS: Final = 1000
_Names = Annotated[list[str], Meta(max_length=_MAX_NAMES)]
_Patterns = Annotated[list[str], Meta(max_length=_MAX_PATTERNS // 2)]
_Whole = Annotated[int, Meta(ge=0)]
_Number = int | float


class _Options(TypedDict, total=False):
    """Those of LoraConfig that say what a trained adapter is and that the tests hold against PEFT.

    Any other one that differs from its default (replicated layers, routed experts, quantised kernels, methods to come)
    is refused rather than guessed.
    """

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


class _Config(_Options, total=False):
    """What is used of adapter_config.json, of PEFT 0.5 to 0.21 and of ms-swift; other fields are `_check_options`'."""

    peft_type: str | None
    swift_type: str | None
    task_type: str | None
    base_model_name_or_path: str | None
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
BASE_CHANGING_INITS = ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class Unit:
    """What one adapter does to the tensors of one module: `stored` go to PEFT, `copied` replace."""

    path: str  # of the module, as the adapter's training knew it
    stored: Mapping[str, str]  # PEFT's name of an adapter tensor → its name in the file
    copied: Mapping[str, str]  # leaf of the module ("weight", "bias") → name in the file


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checked adapter."""

    spec: AdapterSpec
    raw: Mapping[str, Any]  # adapter_config.json
    units: Mapping[str, Unit]  # canonical module name → what happens to it
    hashes: Mapping[str, str]
    licence: str | None
    left_out: tuple[str, ...]  # tensors of the file that scoring has no use for

    @property
    def file(self) -> Path:
        return self.spec.path / WEIGHTS


def open_adapter(spec: AdapterSpec, checkpoint: Checkpoint) -> Adapter:
    """Read and check the adapter's config and tensors against the checkpoint. Raises AdapterError."""
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
        check_tensors(spec.path / WEIGHTS, [tensor for tensor, (_, dtype) in header.items() if dtype in FLOATS])
        hashes = {file: file_sha256(spec.path / file) for file in (CONFIG, WEIGHTS)}
    except CheckpointError as error:  # our own sentence, which names the file
        raise AdapterError(f"adapter {name}: {error}") from None
    for tensor, (_, dtype) in header.items():
        if dtype not in FLOATS:
            raise AdapterError(f"{tensor} of adapter {name} is {dtype}, expected {', '.join(FLOATS)}")
    try_patterns(raw, _module_names(checkpoint), f"{CONFIG} of adapter {name}")
    fit = _find_fit(name, raw, {key: shape for key, (shape, _) in header.items()}, checkpoint)
    adapter = Adapter(spec, raw, fit.units, hashes, find_licence(spec.path, {}), fit.left_out)
    _check_weight(adapter, checkpoint)
    return adapter


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """adapter_config.json of a folder, its form and options checked. Raises AdapterError that names the adapter."""
    raw = read_json_object(folder / CONFIG, AdapterError)
    try:
        fitting(raw, _Config)
    except ValueError as error:
        raise AdapterError(f"{CONFIG} of adapter {name}: {error}. Correct it, or save the adapter again") from None
    _check_options(name, raw)
    return raw


def lora_config(raw: Mapping[str, Any], **overrides: Any) -> peft.LoraConfig:
    """A config's options for PEFT, some of them replaced."""
    options = {option: raw[option] for option in _Options.__annotations__ if option in raw}
    # Two tasks make PEFT keep a full copy of the head; the others only choose a forward.
    options["task_type"] = raw.get("task_type") if raw.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else None
    return peft.LoraConfig(**copy.deepcopy({**options, **overrides}))  # PEFT writes into its lists


def peft_name(key: str, shape: Sequence[int]) -> str | None:
    """What PEFT would have called a tensor of an adapter's file; None for one that is left out."""
    return None if _is_lm_head(key) or 0 in shape else _PREFIX + _bare(key)


def _module_names(checkpoint: Checkpoint) -> list[str]:
    """What PEFT compares patterns with: all modules, and what they lie in, under either naming."""
    modules = dict.fromkeys(tensor.rpartition(".")[0] for tensor in checkpoint.names)
    names = {"": None}
    for nested in (True, False):
        for module in modules:
            parts = spelled(module, nested=nested).split(".")
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
        if option in {*_Options.__annotations__, *_WITHOUT_EFFECT} or value == defaults.get(option) or not value:
            continue
        raise AdapterError(
            f"adapter {name} uses {option}={value!r:.60}, which m0kit does not merge. Merge it with PEFT "
            "(merge_and_unload) and export the result"
        )
    init = raw.get("init_lora_weights", True)
    if init not in (*_PLAIN_INITS, *BASE_CHANGING_INITS):
        raise AdapterError(
            f"adapter {name} was initialised with {init!r:.40}, which changes the base weights in a way its "
            "files do not hold. Save it with PEFT's path_initial_model_for_weight_conversion"
        )


def _check_weight(adapter: Adapter, checkpoint: Checkpoint) -> None:
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
    if raw.get("init_lora_weights", True) in BASE_CHANGING_INITS:
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
    units: Mapping[str, Unit]
    left_out: tuple[str, ...]


def _find_fit(name: str, raw: Mapping[str, Any], header: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> _Fit:
    """Give every tensor of the file its place, under the naming that the adapter was trained with."""
    nested = is_nested(_bare(key) for key in header)
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
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, its in shapes.items():
        module, _, leaf = tensor.rpartition(".")
        modules.setdefault(spelled(module, nested=nested), {})[leaf] = its
    with peft_at_work(name, raw):
        # How the base weights are initialised changes neither names nor shapes, and needs weights.
        config = lora_config(raw, init_lora_weights=True)
        model = peft.get_peft_model(skeleton(modules), config, low_cpu_mem_usage=True)
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
    embedding = f"{_PREFIX}{spelled(_EMBEDDING, nested=nested)}"
    own_key = f"{embedding}.base_layer.weight" if embedding in layers else f"{embedding}.weight"
    places.setdefault(own_key, shapes[EMBEDDING])  # save_embedding_layers adds it

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


def _group(found: Mapping[str, str], layers: Sequence[str], copies: Sequence[str]) -> dict[str, Unit]:
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
        canonical_name(path.removeprefix(_PREFIX)): Unit(
            path.removeprefix(_PREFIX), stored.get(path, {}), copied.get(path, {})
        )
        for path in {**stored, **copied}
    }


def _is_spare(key: str, copies: Sequence[str]) -> bool:
    """With bias="all" PEFT saves the biases of a copied module three times; only its own name counts."""
    return any(key.startswith((f"{path}.original_module.", f"{path}.modules_to_save.")) for path in copies)


def _place_of(key: str, nested: bool, places: Mapping[str, Any]) -> str | None:
    """The name under which PEFT stores this tensor, or None. The file may use either naming, or spell out
    the adapter's name (as whole state dicts do)."""
    whole = _PREFIX + spelled(canonical_name(_bare(key)), nested=nested)
    plain = whole.replace(f".modules_to_save.{ADAPTER}.", ".")
    plain = re.sub(rf"\.{ADAPTER}(\.weight|\.bias)?$", r"\1", plain)
    for candidate in (whole, plain, plain.removesuffix(".weight")):
        if candidate in places:
            return candidate
    return None


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
