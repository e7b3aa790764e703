"""What commands share: options, opening the artifact they name, reading a document's file."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from m0kit.errors import M0kitError
from m0kit.reranker import Reranker

PARTLY = 3  # exit code: some inputs could not be used, the others were

ARTIFACT = click.argument("artifact", type=click.Path(path_type=Path))
DEVICE = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="cpu, cuda, cuda:1, or the name of an execution provider.",
)
THREADS = click.option("--threads", type=click.IntRange(1), help="CPU threads; all cores by default.")
MEMORY = click.option(
    "--memory",
    type=click.Choice(["fast", "low"]),
    default="fast",
    show_default=True,
    help="low: vision encoder and decoder never in memory together, int8 weights left in their files.",
)
PIXELS = click.option(
    "--max-pixels",
    type=click.IntRange(1),
    help="Shrink images above this size; the checkpoint's own limit by default.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


if TYPE_CHECKING:
    _IntType = click.ParamType[int]
else:
    _IntType = click.ParamType  # up to click 8.3 it says nothing of what comes out


class _Size(_IntType):
    """Bytes, with K, M, G or T for powers of 1024."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size; write bytes, or 500M, 20G.", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


SIZE = _Size()


def load(
    artifact: Path,
    device: str,
    threads: int | None,
    memory: Literal["fast", "low"],
    max_pixels: int | None,
    **options: Any,
) -> Reranker:
    """`Reranker.load` with the options of a command. Raises click.UsageError for limits the model cannot have."""
    try:
        return Reranker.load(artifact, device=device, threads=threads, memory=memory, max_pixels=max_pixels, **options)
    except M0kitError:
        raise
    except ValueError as error:
        raise click.UsageError(f"--max-pixels: {error}.") from None


def text_or_path(path: Path) -> str | Path:
    """Text of a UTF-8 file; the path itself for anything else."""
    try:
        raw = path.read_bytes()
    except OSError:
        return path  # reported by the reranker, like any image that cannot be read
    try:
        return raw.decode("utf-8") if b"\0" not in raw else path
    except UnicodeDecodeError:
        return path
