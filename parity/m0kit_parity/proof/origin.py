"""Whether an artifact and a recording were made from the same weights: base files, adapters, quantised base.

Owns that question and what is said; both answers stand in the provenance of either side.

    require_same_origin(Path("m0-fp32"), manifest.provenance, golden.provenance, "record again")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from m0kit.errors import InputError
from m0kit.schema import fitting

_WEIGHTS = ".safetensors"
_T = TypeVar("_T")


class _Adapter(TypedDict, total=False):
    name: str
    path: str
    weight: float
    sha256: dict[str, str] | None


class _Checkpoint(TypedDict):
    source: str
    fingerprint: dict[str, str]


class _Made(TypedDict, total=False):
    """What is compared of an artifact's provenance."""

    base: str
    base_files: dict[str, str] | None
    adapters: list[_Adapter] | None
    qlora: dict[str, Any] | None


class _Recorded(TypedDict, total=False):
    """What is compared of a recording's."""

    checkpoint: _Checkpoint | None
    adapters: list[_Adapter] | None


def require_same_origin(artifact: Path, made: Mapping[str, Any], recorded: Mapping[str, Any], advice: str) -> None:
    """Compare an artifact's provenance with a recording's; what either side does not state is not compared.

    Otherwise the figures would be of two models, and say nothing of the export. Raises InputError with `advice`.
    """
    artifacts = _formed(made, _Made, f"{artifact}: its provenance")
    references = _formed(recorded, _Recorded, "the provenance of PyTorch's side")
    ours, theirs = artifacts.get("adapters"), references.get("adapters")
    if ours is not None and theirs is not None and not _same_adapters(ours, theirs):
        raise InputError(
            f"{artifact} holds {_named(ours, theirs)}, and PyTorch's side has {_named(theirs, ours)}. "
            f"Give --adapter for each that was merged, in the same order and with the same weight; {advice}"
        )
    base, checkpoint = artifacts.get("base_files"), references.get("checkpoint")
    if base and checkpoint and _weights(base) != _weights(checkpoint["fingerprint"]):
        raise InputError(
            f"{artifact} was exported from other weights ({artifacts.get('base')}) than those of PyTorch's side "
            f"({checkpoint['source']}): their files differ. Export that checkpoint, or give the one of the artifact; "
            f"{advice}"
        )
    if checkpoint and artifacts.get("qlora"):
        raise InputError(
            f"{artifact}: its adapters were merged on a base in 4 bits (--qlora), which PyTorch's side does not make. "
            "Hold an export without --qlora against PyTorch, or use a checkpoint that is itself stored in 4 bits."
        )


def _formed(value: Mapping[str, Any], form: type[_T], where: str) -> _T:
    try:
        return fitting(dict(value), form)
    except ValueError as error:
        raise InputError(f"{where} is not what m0kit writes: {error}. Make it again") from None


def _weights(hashes: Mapping[str, str]) -> list[str]:
    """Hashes alone: a file may be called otherwise."""
    return sorted(value for name, value in hashes.items() if name.endswith(_WEIGHTS))


def _same_adapters(ours: Sequence[_Adapter], theirs: Sequence[_Adapter]) -> bool:
    return len(ours) == len(theirs) and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))


def _same(a: _Adapter, b: _Adapter) -> bool:
    """Weights, and the files that both name, as far as both say so."""
    if {"weight"} <= {*a} & {*b} and a["weight"] != b["weight"]:
        return False
    mine, others = a.get("sha256") or {}, b.get("sha256") or {}
    return all(mine[name] == others[name] for name in mine.keys() & others.keys())


def _named(adapters: Sequence[_Adapter], others: Sequence[_Adapter]) -> str:
    """ "the adapters code and legal × 0.5"; part of a hash where the other side's are called the same."""
    if not adapters:
        return "no adapter"
    called, other = ([str(a.get("name") or Path(str(a.get("path"))).name) for a in side] for side in (adapters, others))
    told = []
    for name, adapter in zip(called, adapters, strict=True):
        weight = f" × {adapter['weight']:g}" if adapter.get("weight", 1) != 1 else ""
        hashes = adapter.get("sha256") or {}
        sha256 = next((value for file, value in hashes.items() if file.endswith(_WEIGHTS)), "")
        told.append(name + weight + (f" (sha256 {sha256[:8]}…)" if sha256 and called == other else ""))
    return f"the adapter{'s' if len(told) > 1 else ''} {' and '.join(told)}"
