"""`m0kit checkpoint` and `m0kit adapter`: files to try m0kit on. Owns the command lines.

m0kit checkpoint tiny OUT               random weights in the published layout
m0kit adapter CHECKPOINT dora OUT       an adapter for any checkpoint
"""

import shutil
from pathlib import Path
from typing import Final, Literal, get_args

import click

from m0kit.cli.options import REVISION_HELP
from m0kit.files import named_errors, replacing, require_unoccupied
from m0kit.terminal import show
from m0kit_export.folder import find_folder
from m0kit_parity.small.files import SMALL, copy_massive

_Shape = Literal["small", "small-massive", "tiny", "wide", "full"]

# The keys of adapters.FORMS, which cannot be read without importing PEFT.
FORM_NAMES: Final = (
    *("plain", "rslora", "dora", "patterns", "bias-all", "bias-lora-only", "lora-bias"),
    *("score", "embedding", "tokens", "decoder", "vision-decoder"),
)


@click.command()
@click.argument("shape", type=click.Choice(get_args(_Shape)))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@click.option(
    "--outliers",
    type=click.FloatRange(2, 1 << 16),
    metavar="STRENGTH",
    help="Make some channels so many times larger than they were, without changing what the model computes.",
)
def checkpoint(shape: _Shape, output: Path, seed: int, outliers: float | None) -> None:
    """Write a checkpoint in the published model's format to try things on.

    small is the trained one that m0kit carries, small-massive the same with activations as large as those of large
    models, from the repository. The others have random weights: tiny takes a moment, wide has the published widths and
    few layers, full every dimension of the published model.
    """
    require_unoccupied(output)
    with replacing(output) as new, named_errors(output):
        if outliers is None:
            _write_shape(shape, new, seed)
        else:
            from m0kit_parity.samples.outliers import write_injected

            plain = new.with_name("plain")
            plain.mkdir()
            _write_shape(shape, plain, seed)
            write_injected(plain, new, outliers, seed=seed, progress=True)
    show(str(output))


def _write_shape(shape: _Shape, output: Path, seed: int) -> None:
    if shape == "small":
        shutil.copytree(SMALL / "base", output, dirs_exist_ok=True)
    elif shape == "small-massive":
        copy_massive(output)
    else:
        from m0kit_parity.samples.checkpoints import write_checkpoint

        write_checkpoint(output, shape, seed=seed, progress=True)


@click.command()
@click.argument("checkpoint")
@click.argument("form", type=click.Choice(FORM_NAMES))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random values.")
@click.option("--old-names", is_flag=True, help="Name modules as transformers did before 4.52.")
@click.option("--revision", help=REVISION_HELP.format("CHECKPOINT"))
def adapter(checkpoint: str, form: str, output: Path, seed: int, old_names: bool, revision: str | None) -> None:
    """Write a LoRA adapter for CHECKPOINT to try things on, made by PEFT with random trained values."""
    folder = find_folder(checkpoint, revision)  # before PyTorch is imported
    require_unoccupied(output)
    from m0kit_parity.samples.adapters import write_adapter

    write_adapter(output, folder, form, seed=seed, naming="published" if old_names else "new")
    show(str(output))
