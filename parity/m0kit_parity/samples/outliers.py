"""Checkpoints whose activations have outliers, and which compute the same: what equalisation is proved on.

In a few channels of every group (`m0kit_quant.equalize.channel_groups`) what makes the channel is scaled up
by a power of two, and what takes it down by the same. In floating point nothing else changes; a scheme that
rounds inputs or weights to few bits meets channels up to a thousand times larger than their neighbours, as
large language models have them. Adapters of the original do not fit the copy: they were trained on its inputs.

    write_injected("small/base", Path("spiky"), strength=1000)
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from m0kit.config import ModelConfig
from m0kit.files import named_errors, replacing, require_unoccupied
from m0kit.terminal import bar
from m0kit_export.checkpoint import INDEX, WEIGHTS, Checkpoint, open_checkpoint
from m0kit_export.folder import read_json_object
from m0kit_export.names import canonical_name
from m0kit_export.tensors import read_header, read_tensor
from m0kit_parity.samples.safetensors import write
from m0kit_quant.equalize import Rescaled, channel_groups
from m0kit_quant.weights import Float32, Weights

MAX_STRENGTH: Final = 1 << 16  # float16 cannot tell a usual weight divided by more than that from zero
FRACTION: Final = 0.01  # of a group's channels, at least one; trained models have fewer

_COPIED: Final = ("*.json", "*.txt", "LICENSE*")


def outlier_scales(
    config: ModelConfig, strength: float, seed: int = 0, fraction: float = FRACTION
) -> dict[str, Float32]:
    """Scales for `Rescaled` by group: 1/S on the chosen channels, 1 on the others, (num_channels,) float32.

    S is the power of two nearest to `strength`, as 1024 to 1000: others would change the function. The choice depends
    on the seed and the group's name alone.
    Raises ValueError for a strength outside 2 to 65536 or a fraction outside 0 to 1/2.
    """
    if not 2 <= strength <= MAX_STRENGTH:
        raise ValueError(f"strength is {strength!r}: outliers are from 2 to {MAX_STRENGTH} times as large as before")
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"fraction is {fraction!r}: outliers are from 0 to 1/2 of the channels")
    factor = np.float32(2.0 ** -round(math.log2(strength)))
    scales = {}
    for group in channel_groups(config):
        rng = np.random.Generator(np.random.SFC64([seed, *group.name.encode()]))
        count = max(1, round(fraction * group.num_channels))
        scale = np.ones(group.num_channels, np.float32)
        scale[rng.choice(group.num_channels, count, replace=False)] = factor
        scales[group.name] = scale
    return scales


def inject(
    weights: Weights, config: ModelConfig, strength: float, seed: int = 0, fraction: float = FRACTION
) -> Rescaled:
    """The weights with outliers; arguments and errors as of `outlier_scales`."""
    return Rescaled(weights, channel_groups(config), outlier_scales(config, strength, seed, fraction))


def write_injected(
    source: str | Path,
    folder: Path,
    strength: float,
    *,
    seed: int = 0,
    fraction: float = FRACTION,
    progress: bool = False,
) -> None:
    """Copy a checkpoint with outliers: same files, names of tensors and shards; aside first, renamed when complete.

    A tensor keeps its format where that holds the scaled values exactly, and is float32 where it does not: the
    copy then computes what the original computes, and not what rounding made of it. One tensor is in memory
    at a time. Raises CheckpointError, OutputError when the folder is not empty, and ValueError as `outlier_scales`.
    """
    require_unoccupied(folder)
    checkpoint = open_checkpoint(source)
    tensors = _Injected(checkpoint, inject(_AsFloat32(checkpoint), checkpoint.config, strength, seed, fraction))
    with replacing(folder) as aside, named_errors(folder):
        for path in sorted({path for pattern in _COPIED for path in checkpoint.folder.glob(pattern)}):
            if path.is_file():
                shutil.copyfile(path, aside / path.name)
        _write_weights(checkpoint.folder, aside, tensors, progress)
        readme = checkpoint.folder / "README.md"
        said = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        (aside / "README.md").write_text(said + _note(strength, seed, fraction), encoding="utf-8")


class _AsFloat32:
    """A checkpoint's tensors as `Weights`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def read(self, name: str) -> Float32:
        values: Float32 = self._checkpoint.read(name).float().numpy()
        return values


class _Injected:
    """What is written: tensors of the copy by the names in the file, in the format that holds them."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights) -> None:
        groups = channel_groups(checkpoint.config)
        self._weights = weights
        self._touched = {name for group in groups for name in (*(p for p, _ in group.producers), *group.consumers)}

    def read(self, file: Path, name: str) -> torch.Tensor:
        stored = read_tensor(file, name)
        if canonical_name(name) not in self._touched:
            return stored
        scaled = torch.from_numpy(self._weights.read(canonical_name(name)))
        fitting = scaled.to(stored.dtype)
        return fitting if torch.equal(fitting.float(), scaled) else scaled


def _write_weights(source: Path, folder: Path, tensors: _Injected, progress: bool) -> None:
    sharded = (source / INDEX).exists()
    index = read_json_object(source / INDEX) if sharded else {}
    files = sorted(set(index["weight_map"].values())) if sharded else [WEIGHTS]
    total = 0
    for file in files:
        names = list(read_header(source / file))
        # The header comes first and says each tensor's format, which only its values can tell: read twice.
        with bar(total=2 * len(names), unit="tensor", desc=file, shown=progress) as shown:
            each = _each(source / file, names, tensors, shown)
            header = {name: (tensor.dtype, tensor.shape) for name, tensor in each}
            again = _each(source / file, names, tensors, shown)
            total += write(folder / file, header, (tensor for _, tensor in again))
    if sharded:
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")


def _each(file: Path, names: list[str], tensors: _Injected, shown: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        yield name, tensors.read(file, name)
        shown.update()


def _note(strength: float, seed: int, fraction: float) -> str:
    return (
        f"\nChanged by m0kit: {fraction:.2%} of the channels between layers, chosen by seed {seed}, are larger by "
        f"the power of two nearest to {strength:g}, and what takes them is smaller by the same. The scores are "
        "unchanged; adapters trained on the original do not fit.\n"
    )
