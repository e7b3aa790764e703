"""`m0kit export`: the exporter's one command. Owns option names and what is printed, nothing else."""

import json
from pathlib import Path
from typing import Literal

import click

from m0kit.artifact import Manifest


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="PATH[:WEIGHT]",
    help="LoRA adapter to merge; several are merged in the order given.",
)
@click.option(
    "--precision",
    "scheme",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="How weights are stored.",
)
@click.option("--revision", help="Branch, tag or commit, when CHECKPOINT is a hub id.")
@click.option("--overwrite", is_flag=True, help="Replace the artifact that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(
    checkpoint: str,
    output: Path,
    adapters: tuple[str, ...],
    scheme: Literal["fp32", "fp16"],
    revision: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the ONNX artifact of CHECKPOINT, a folder or a hub id.

    Every weight is read back and compared; OUTPUT appears only when it is whole.
    """
    from m0kit_export.export import export_artifact  # torch and transformers: not for `m0kit --help`
    from m0kit_export.merge import AdapterSpec

    manifest = export_artifact(
        checkpoint,
        output,
        adapters=[AdapterSpec.parse(a) for a in adapters],
        scheme=scheme,
        revision=revision,
        overwrite=overwrite,
    )
    if as_json:
        summary = {
            "artifact": str(output),
            "bytes": manifest.num_bytes,
            "scheme": manifest.scheme,
            "fingerprint": manifest.fingerprint,
            "provenance": dict(manifest.provenance),
        }
        click.echo(json.dumps(summary, ensure_ascii=False))
        return
    describe(output, manifest)


def describe(output: Path, manifest: Manifest) -> None:
    """Say what was written, and under which licence its weights stand."""
    click.echo(f"{output}: {manifest.num_bytes / 2**20:.1f} MiB, {manifest.scheme}")
    click.echo(f"licence of the weights: {manifest.licence}", err=True)
    if dropped := manifest.provenance["dropped_tensors"]:
        click.echo(f"left out, scoring does not use it: {', '.join(dropped)}", err=True)
