"""`m0kit export` and `m0kit quantize`. Owns option names and what is printed, nothing else."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import Manifest
from m0kit.precision import SCHEMES
from m0kit.terminal import say, show, show_json

if TYPE_CHECKING:
    from m0kit_quant.recipe import Recipe

_PARTLY = 3  # exit code of every m0kit command: some inputs could not be used, the others were
_path = click.Path(path_type=Path)
_OPTIONS = (
    click.option("-o", "--output", type=_path, required=True, help="Folder to write."),
    click.option("--recipe", "recipe_file", type=_path, help="A TOML file that says how each matrix is stored."),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        show_default="cpu",
        help="Where it runs most: the default recipes of int4 and nf4 differ. It runs on both, fp32 slowly on cuda.",
    ),
    click.option(
        "--calibrate", "calibration", type=_path, help="JSON lines of query and document(s) to choose scales on."
    ),
    click.option("--overwrite", is_flag=True, help="Replace the artifact that is there."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)


def _shared(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command()
@click.argument("checkpoint")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="PATH[:WEIGHT]",
    help="LoRA adapter to merge; several are merged in the order given.",
)
@click.option(
    "--precision",
    type=click.Choice(SCHEMES),
    help="How weights are stored; fp32 unless a recipe says otherwise.",
)
@click.option(
    "--qlora",
    type=click.Choice(["single", "double"]),
    help="The adapters were trained on the base in NF4, its scales quantised once or twice: merge them on that.",
)
@click.option(
    "--qlora-keep",
    multiple=True,
    metavar="MODULE",
    help="With --qlora, a module that the training did not quantise, repeatable; score.2 by default.",
)
@click.option("--revision", help="Branch, tag or commit, when CHECKPOINT is a hub id.")
@_shared
def export(
    checkpoint: str,
    adapters: tuple[str, ...],
    qlora: str | None,
    qlora_keep: tuple[str, ...],
    revision: str | None,
    output: Path,
    **options: Any,
) -> None:
    """Write the ONNX artifact of CHECKPOINT, a folder or a hub id.

    Everything written is read back and compared; OUTPUT appears only when it is whole.
    """
    from m0kit_export.adapter import AdapterSpec, QLora
    from m0kit_export.export import export_artifact  # torch and transformers: not for `m0kit --help`

    if qlora_keep and not qlora:
        raise click.UsageError("--qlora-keep goes with --qlora.")
    trained = QLora(qlora == "double", qlora_keep or QLora.keep) if qlora else None
    manifest = export_artifact(
        checkpoint,
        output,
        adapters=[AdapterSpec.parse(a) for a in adapters],
        recipe=_recipe(options.pop("precision") or None, options, "fp32"),
        calibration=options["calibration"],
        qlora=trained,
        revision=revision,
        overwrite=options["overwrite"],
    )
    describe(output, manifest, options["as_json"])
    _tell(manifest)
    _leave(manifest)


@click.command()
@click.argument("artifact")
@click.option("--precision", type=click.Choice(SCHEMES), help="How weights are stored.")
@click.option("--revision", help="Branch, tag or commit, when ARTIFACT is a hub id.")
@_shared
def quantize(artifact: str, revision: str | None, output: Path, **options: Any) -> None:
    """Write ARTIFACT, an fp32 one above all, in fewer bits: the same bytes as exporting the checkpoint that way."""
    from m0kit_export.export import quantize_artifact

    manifest = quantize_artifact(
        resolve(artifact, revision, what="artifact"),
        output,
        recipe=_recipe(options.pop("precision"), options, None),
        calibration=options["calibration"],
        overwrite=options["overwrite"],
    )
    describe(output, manifest, options["as_json"])
    _tell(manifest)
    _leave(manifest)


def _recipe(precision: str | None, options: dict[str, Any], default: str | None) -> "Recipe":
    from m0kit_quant.recipe import Recipe

    if options["recipe_file"] is not None:
        recipe = Recipe.read(options["recipe_file"])
        if precision not in (None, recipe.precision):
            raise click.UsageError(
                f"--precision {precision}, but the recipe is of {recipe.precision}. Leave one of the two out."
            )
        if options["device"] not in (None, recipe.device):
            raise click.UsageError(
                f"--device {options['device']}, but the recipe is for {recipe.device}. Leave one of the two out."
            )
        return recipe
    if precision is None and default is None:
        raise click.UsageError("Give --precision or --recipe.")
    return Recipe.default(precision or str(default), options["device"] or "cpu")


def describe(output: Path, manifest: Manifest, as_json: bool) -> None:
    """Say what was written, and under which licence its weights stand."""
    if as_json:
        summary = {
            "artifact": str(output),
            "bytes": manifest.num_bytes,
            "scheme": manifest.scheme,
            "fingerprint": manifest.fingerprint,
            "provenance": dict(manifest.provenance),
        }
        show_json(summary)
        return
    show(f"{output}: {manifest.num_bytes / 2**20:.1f} MiB, {manifest.scheme}")
    say(f"licence of the weights: {manifest.licence}")
    if dropped := manifest.provenance.get("dropped_tensors"):
        say(f"left out, scoring does not use it: {', '.join(dropped)}")
    for adapter in manifest.provenance.get("adapters", []):
        if left_out := adapter.get("left_out"):  # not in artifacts of earlier versions
            say(f"left out of adapter {adapter.get('name')}: {', '.join(left_out)}")
    wider = manifest.provenance["stored_wider"]
    lost = [f"{name} ({each['scheme']}, {_loss(each['lost'])})" for name, each in wider.items() if "lost" in each]
    far = [f"{name} ({each['scheme']}, {each['times']:g} times)" for name, each in wider.items() if "times" in each]
    _tell_wider("what float16 would lose of a row or column", lost)
    _tell_wider("a column far larger than the others", far)


def _tell_wider(why: str, matrices: Sequence[str]) -> None:
    more = f", and {len(matrices) - 5} more, which the manifest names" if len(matrices) > 5 else ""
    if matrices:
        say(f"stored wider, for {why}: {', '.join(matrices[:5])}{more}")


def _loss(lost: float | None) -> str:
    return "values beyond its range" if lost is None else f"{lost:.2%}"


def _tell(manifest: Manifest) -> None:
    """What an artifact that is meant for a GPU does not do there."""
    if manifest.recipe["device"] == "cuda" and "cuda" not in manifest.runs:
        say(
            "note: fp32 has no graphs for CUDA: it runs there by the portable ones, slowly. Take fp16 to be fast there."
        )


def _leave(manifest: Manifest) -> None:
    """Exit code 3 when lines of the calibration set could not be used; they were told while it ran."""
    if (manifest.provenance.get("calibration") or {}).get("left_out_lines"):
        click.get_current_context().exit(_PARTLY)
