"""Artifacts of a checkpoint in every precision, each made when it is first asked for. Not a test file."""

from collections.abc import Callable
from pathlib import Path

from m0kit_export.export import export_artifact
from m0kit_quant.recipe import Recipe


def artifacts_of(checkpoint: Path, name: str, made: dict[str, Path] | None = None) -> Callable[[str], Path]:
    """precision → the artifact of `checkpoint` by its default recipe, at `name`-precision beside it.

    Those in `made` are there already.
    """
    found = dict(made or {})

    def artifact(precision: str) -> Path:
        if precision not in found:
            found[precision] = checkpoint.with_name(f"{name}-{precision}")
            export_artifact(checkpoint, found[precision], recipe=Recipe.default(precision), progress=False)
        return found[precision]

    return artifact
