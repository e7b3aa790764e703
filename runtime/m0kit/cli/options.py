"""What commands share: options, opening the artifact they name, telling what was wrong with their inputs."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import read_manifest
from m0kit.errors import OutputError
from m0kit.reranker import Reranker
from m0kit.scoring import gpus
from m0kit.terminal import say

_NAMES = 3  # of inputs that are named beside a message they share
PARTLY = 3  # exit code: some inputs could not be used, the others were


def exit_code(num_failed: int, num_given: int, done: str = "scored") -> int:
    """0, or PARTLY, or 1 where nothing at all could be `done`, which is said.

    Nothing given is no failure, since a part of a divided input may well be empty; it is said all the same.
    """
    if num_given == 0:
        say(f"note: nothing was given to be {done}")
    elif num_failed == num_given:
        say(f"error: nothing could be {done}")
        return 1
    return PARTLY if num_failed else 0


REVISION_HELP = "Branch, tag or commit, when {} is a hub id."


def artifact_argument(required: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """ARTIFACT, a folder or a hub id, with --revision; the command gets the folder as `artifact`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(*args: Any, artifact: str | None, revision: str | None, **options: Any) -> Any:
            folder = resolve(artifact, revision, what="artifact") if artifact is not None else None
            return function(*args, artifact=folder, **options)

        option = click.option("--revision", help=REVISION_HELP.format("ARTIFACT"))
        return click.argument("artifact", required=required)(option(command))

    return decorate


ARTIFACT = artifact_argument()
DOCUMENTS = click.argument("documents", nargs=-1, type=click.Path())  # for `m0kit.cli.documents`
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


if TYPE_CHECKING:
    _IntType = click.ParamType[int]
else:
    _IntType = click.ParamType  # up to click 8.3 it says nothing of what comes out


_SIZE_DIGITS = 20  # of more bytes than there are


class _Size(_IntType):
    """Bytes, with K, M, G or T for powers of 1024."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        if match is None or len(match[1]) > _SIZE_DIGITS:
            self.fail(f"{value!r} is not a size; write bytes, or 500M, 20G.", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


SIZE = _Size()


_LOADING = (
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        help="cpu, cuda, cuda:1, several GPUs as cuda:0,cuda:1, or the name of an execution provider.",
    ),
    click.option(
        "--gpu-bytes",
        type=SIZE,
        help="The most to take of each GPU's memory: 8G; by default M0KIT_GPU_BYTES, else all that is free.",
    ),
    click.option(
        "--pool-bytes",
        type=SIZE,
        help="Of it for keys and values: 4G; by default M0KIT_GPU_POOL_BYTES, else all that is left.",
    ),
    # More than the largest machines have cores; an engine would be busy with its threads alone.
    click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; all cores by default."),
    click.option(
        "--memory",
        type=click.Choice(["fast", "low"]),
        default="fast",
        show_default=True,
        help="low: vision encoder and decoder never in memory together, int8 weights left in their files.",
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(1),
        help="Shrink images above this size; the checkpoint's own limit by default.",
    ),
)


def loading(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options above, which a command gets as `load`, those of `Reranker.load`.

    Raises click.UsageError for limits of a GPU's memory on another device.
    """

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> Any:
        names = ("device", "gpu_bytes", "pool_bytes", "threads", "memory", "max_pixels")
        load = {name: options.pop(name) for name in names}
        has_limit = load["gpu_bytes"] is not None or load["pool_bytes"] is not None
        if has_limit and not gpus.named(load["device"]):
            raise click.UsageError("--gpu-bytes and --pool-bytes are limits of a GPU's memory: say --device cuda too.")
        return function(*args, load=load, **options)

    for option in reversed(_LOADING):
        command = option(command)
    return command


def open_reranker(artifact: Path, load: Mapping[str, Any], **options: Any) -> Reranker:
    """`Reranker.load` with the options of a command. Raises click.UsageError for limits the model cannot have."""
    require_pixels(artifact, load.get("max_pixels"))
    return Reranker.load(artifact, **load, **options)


def require_pixels(artifact: Path, max_pixels: int | None) -> None:
    """Raises click.UsageError for a limit that the model cannot have."""
    if max_pixels is None:
        return
    image = read_manifest(artifact).model.image
    try:
        replace(image, max_pixels=max_pixels)
    except ValueError as error:
        raise click.UsageError(f"--max-pixels: {error}.") from None


def tell(kind: Literal["note", "error"], said: Iterable[tuple[str, str]], most: int | None = None) -> None:
    """Print what there is to say of inputs, (name, message), to stderr; a message that many share once.

    Of the messages `most` are printed, where stdout has each of them anyway.
    """
    named: dict[str, list[str]] = {}
    for name, message in said:
        named.setdefault(message, []).append(name)
    for message, names in list(named.items())[:most]:
        some = ", ".join(name for name in names[:_NAMES] if name)
        more = f" and {len(names) - _NAMES} more" if some and len(names) > _NAMES else ""
        say(f"{kind}: {some}{more}{': ' if some else ''}{message}")
    if most is not None and len(named) > most:
        say(f"{kind}: and {sum(map(len, list(named.values())[most:]))} more")


def require_place(file: Path | None) -> None:
    """Before anything slow: raises OutputError where a file that is asked for cannot be written."""
    if file is None:
        return
    folder = file.absolute().parent
    if file.is_dir():
        why = "is a folder"
    elif file.exists() and not file.is_file():  # a file would take its place
        why = "is a device, a pipe or a socket"
    elif not folder.is_dir():
        why = f"there is no folder {click.format_filename(folder)}"
    elif not os.access(folder, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        why = "may not be written"
    else:
        return
    raise OutputError(f"{click.format_filename(file)}: {why}. Choose another file.")
