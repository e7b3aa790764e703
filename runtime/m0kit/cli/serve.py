"""`m0kit serve`: what a server is told by flags, the environment and a file of TOML. Running it is `m0kit.server`'s.

Owns how settings are written, which of two wins, and printing them. An option is a field of the dataclasses of
`m0kit.server.settings`, whose default is its default: a flag, M0KIT_SERVE_FLAG, and a key of the file, in this order.
"""

import difflib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import read_manifest
from m0kit.cli.options import SIZE, require_pixels
from m0kit.errors import DependencyError, DeviceError, M0kitError
from m0kit.files import read_regular
from m0kit.schema import parse_toml
from m0kit.scoring import gpus
from m0kit.server.settings import ModelSettings, Settings
from m0kit.terminal import show

_HELP: Final = {
    # Of artifacts
    "names": "What requests call the first artifact; again for aliases. The folder's name by default.",
    "index": "An index that documents are known from by id, and added to: of the first artifact, or of that NAME.",
    "revision": "Branch, tag or commit, when the one ARTIFACT is a hub id.",
    "device": "cpu, cuda, cuda:1, several GPUs as cuda:0,cuda:1, or the name of an execution provider.",
    "threads": "CPU threads of a worker; all cores, shared by the workers, by default.",
    "memory": "low: vision encoder and decoder never in memory together, int8 weights left in their files.",
    "max_pixels": "Shrink images above this size; the checkpoint's own limit by default.",
    "cache_bytes": "Memory of a worker to keep documents in that come again.",
    "kv": "How states are kept: 56, 28 or 14 KiB a token of the published model. The index's way, else fp16.",
    "gpu_bytes": "The most to take of each GPU's memory; by default M0KIT_GPU_BYTES, else all that is free.",
    "pool_bytes": "Of it for keys and values; by default M0KIT_GPU_POOL_BYTES, else all that is left.",
    # Of the address
    "host": "Address to listen at. Any but this machine's own needs --api-key-file, or --without-keys.",
    "port": "0: one that is free.",
    "uds": "A Unix socket to listen at, in place of host and port.",
    "api_key_file": "Keys of those who may ask, one a line. SIGHUP reads it again.",
    "without_keys": "Let anyone ask who reaches an address that is not this machine's own.",
    "allowed_hosts": "A name that clients may call this server by; again for more.",
    "image_hosts": "A host that images may be fetched from by URL: NAME, NAME:PORT, or NAME=10.1.2.0/24 where it is "
    "in a network of your own; again for more. None by default.",
    "root_path": "Path under which a proxy serves this, which it takes off what it passes on.",
    "tls_cert": "Certificate chain, PEM.",
    "tls_key": "Its private key, PEM.",
    # Of one request
    "max_body_bytes": "Of a request's body.",
    "max_documents": "Of a request.",
    "max_images": "Of a request.",
    "max_image_bytes": "Of one image's file.",
    "max_image_pixels": "Of one image.",
    "max_request_pixels": "Of all images of a request.",
    "max_request_tokens": "Of a request, as estimated: those of the decoder, and three for each of an image.",
    "request_timeout_s": "Seconds for a request's work.",
    "read_timeout_s": "Seconds without a byte of a request that is being sent.",
    "keep_alive_s": "Seconds that a connection may stay open between two requests.",
    # Of all
    "max_connections": "At a time, of a worker.",
    "max_held_bytes": "Of bodies that a worker reads or works on at a time.",
    "queue_s": "Work that may wait, by measured throughput; more is told to come again.",
    "shutdown_timeout_s": "Seconds that accepted requests are given to finish when the server is stopped.",
    "workers": "Processes, which share the weights' pages and one index.",
    "warm": "Run an image and a text before the server says that it is ready.",
    "page": "A page to try it, at /.",
    "log_format": "Of the log on stderr.",
    "log_level": "Least that is logged.",
}
# Flags that are not called as the field is.
_FLAGS: Final = {
    "names": "served-model-name",
    "allowed_hosts": "allowed-host",
    "image_hosts": "image-host",
    "max_body_bytes": "max-body",
    "max_held_bytes": "max-held",
    "request_timeout_s": "request-timeout",
    "read_timeout_s": "read-timeout",
    "keep_alive_s": "keep-alive",
    "queue_s": "queue-seconds",
    "shutdown_timeout_s": "shutdown-timeout",
}
# What takes back a flag that the environment or a file gives.
_OPPOSITES: Final = {"without_keys": "with-keys", "warm": "no-warm", "page": "no-page"}
_OF_ONE: Final = ("artifact", "names", "index")  # of artifacts: what is not said of all at once
_COMMON: Final = tuple(field.name for field in fields(ModelSettings) if field.name not in _OF_ONE)
_OF_SERVER: Final = tuple(field.name for field in fields(Settings) if field.name != "models")
_TYPES: Final = get_type_hints(ModelSettings) | get_type_hints(Settings)
_DEFAULTS: Final[dict[str, Any]] = {
    field.name: field.default for kind in (ModelSettings, Settings) for field in fields(kind)
}
_SAID: Final = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
_LEAST: Final = {"port": 0, "cache_bytes": 0, "max_images": 0}  # of the others 1, or a thousandth of a second
_MOST: Final = {"port": 65535, "threads": 1024, "workers": 1024}  # more than the largest machines have cores
_LONGEST_S: Final = 1_000_000  # eleven days: systems do not wait for any number of seconds
_LARGEST: Final = 2**63 - 1  # that a file of TOML can hold
_MAX_FILE_BYTES: Final = 1 << 20
# Of the extra `serve`. They are looked for here, since a worker would only find out after its start.
_PACKAGES: Final = ("uvicorn", "h11", "starlette", "prometheus_client")
_TABLES: Final = "m0kit.models"  # those of the file, in what click keeps of a call
_WORDS: Final = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    SIZE: 'bytes as a whole number, or a text like "500M"',
    str: "a text",
}


def _flag(name: str) -> str:
    """What a field is called as an option, without the hyphens before it, and in the file."""
    return _FLAGS.get(name, name.replace("_", "-"))


def _parameter(name: str) -> str:
    """What click calls it; also the end of its variable."""
    return _flag(name).replace("-", "_")


def _type(name: str) -> Any:
    """Of one value of a field: bool, int, float, SIZE, Path, str or a Literal."""
    kind = _TYPES[name]
    if get_origin(kind) in (types.UnionType, Union):
        (kind,) = (one for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is tuple:
        return get_args(kind)[0]
    return SIZE if kind is int and name.endswith("_bytes") else kind


def _is_many(name: str) -> bool:
    return get_origin(_TYPES[name]) is tuple or name == "index"


def _option(name: str) -> click.Option:
    """The option of a field: type and default are the field's."""
    kind, default = _type(name), _DEFAULTS[name]
    declared = [f"--{_flag(name)}", _parameter(name)]
    made: dict[str, Any] = {"help": _HELP[name], "default": default, "show_default": default not in (None, "")}
    if _is_many(name):
        made |= {"multiple": True, "default": (), "show_default": False}
        made |= {"metavar": "[NAME=]FOLDER"} if name == "index" else {}
    elif get_origin(kind) is Literal:
        made["type"] = click.Choice(get_args(kind))
    elif kind is bool:
        made |= {"is_flag": True, "show_default": False}
        declared[0] += f"/--{_OPPOSITES[name]}"
    elif kind in (int, float, SIZE):
        made |= {"type": kind, "callback": _check_number}
        if kind is SIZE and default is not None:
            made["default"] = str(_size(default))
    elif kind is Path:
        made["type"] = click.Path(path_type=Path)
    return click.Option(declared, **made)


def _check_number(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Raises click.BadParameter."""
    if value is None:
        return None
    field = next(name for name in _HELP if _parameter(name) == param.name)
    is_time = _type(field) is float
    least = _LEAST.get(field, 0.001 if is_time else 1)
    most = _LONGEST_S if is_time else _MOST.get(field, _LARGEST)
    if not least <= value <= most:
        wanted = f"{least} or more" if most == _LARGEST and value < least else f"{least} to {most}"
        raise click.BadParameter(f"{value}: expected {wanted}.", ctx, param)
    return value


def _size(num_bytes: int) -> int | str:
    """As people write it, where that is the same."""
    for power, letter in ((3, "G"), (2, "M"), (1, "K")):
        if num_bytes and num_bytes % 1024**power == 0:
            return f"{num_bytes // 1024**power}{letter}"
    return num_bytes


# --- the file ----------------------------------------------------------------------------------------------


def _read_file(ctx: click.Context, _: click.Parameter, file: Path | None) -> Path | None:
    """What a file says stands for the options' defaults. Raises click.UsageError naming the key."""
    if file is None:
        return None
    where = f"--config: {click.format_filename(file)}"
    try:
        table = parse_toml(read_regular(file, _MAX_FILE_BYTES))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{where}: {getattr(error, 'strerror', None) or error}.") from None
    models = table.pop("models", [])
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise click.UsageError(f"{where}: models: expected tables, each below a line [[models]].")
    ctx.meta[_TABLES] = [_model_of(ctx, model, f"{where}: models[{number}]") for number, model in enumerate(models)]
    names = [name for name in _HELP if name not in _OF_ONE]
    found = _checked(ctx, table, names, ("models",), where)
    ctx.default_map = {_parameter(name): value for name, value in found.items()}
    return file


def _model_of(ctx: click.Context, table: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields of ModelSettings from a table. Raises click.UsageError."""
    own = {name: table.pop(name) for name in _OF_ONE if name in table}
    found = _checked(ctx, table, _COMMON, _OF_ONE, where)
    for name in own:
        wanted = "a list of texts" if name == "names" else "a text"
        values = own[name] if name == "names" and isinstance(own[name], list) else [own[name]]
        if isinstance(own[name], list) != (name == "names") or not all(isinstance(one, str) and one for one in values):
            raise click.UsageError(f"{where}.{name}: expected {wanted}, got {own[name]!r:.60}.")
    if "artifact" not in own:
        raise click.UsageError(f"{where}: has no artifact, a folder or a hub id.")
    own |= {"names": tuple(own.get("names", ())), "index": Path(own["index"]) if "index" in own else None}
    return found | own


def _checked(
    ctx: click.Context, table: Mapping[str, Any], names: Iterable[str], others: Iterable[str], where: str
) -> dict[str, Any]:
    """Values of a table's keys, by the fields that they are of. Raises click.UsageError, also for other keys."""
    params = {param.name: param for param in ctx.command.params}
    fields = {_flag(name): name for name in names}
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key[:60].replace("_", "-"), [*fields, *others], n=1, cutoff=0.5)
            raise click.UsageError(
                f"{where}: {key!r:.60} is not known{f' (did you mean {near[0]}?)' if near else ''}. Keys are called as "
                "the options of `m0kit serve` are, without the two hyphens."
            )
        name = fields[key]
        kind, many, param = _type(name), _is_many(name), params[_parameter(name)]
        wanted = next((word for one, word in _WORDS.items() if kind is one), _WORDS[str])
        values = value if many and isinstance(value, list) else [value]
        if many != isinstance(value, list) or not all(_fits(one, kind) for one in values):
            raise click.UsageError(
                f"{where}: {key}: expected {'a list of texts' if many else wanted}, got {value!r:.60}."
            )
        try:
            one = param.type_cast_value(ctx, value)
            found[name] = param.callback(ctx, param, one) if param.callback else one
        except click.BadParameter as error:
            raise click.UsageError(f"{where}: {key}: {error.message}") from None
    return found


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is SIZE:
        return isinstance(value, int | str)
    return isinstance(value, int | float if kind is float else int if kind is int else str)


def to_toml(settings: Settings) -> list[str]:
    """Lines of a file that gives these settings again; what is not set is left out. Raises M0kitError."""
    lines = list(_lines(settings, _OF_SERVER))
    for model in settings.models:
        lines += ["", "[[models]]", *_lines(model, (*_OF_ONE, *_COMMON))]
    return lines


def _lines(settings: Settings | ModelSettings, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        value = getattr(settings, name)
        key = name if name in _OF_ONE else _flag(name)
        if isinstance(value, tuple) and value:  # one a line: a line that is shown has a longest length
            yield from (f"{key} = [", *(f"  {_toml(one)}," for one in value), "]")
        elif value is not None and value != ():
            yield f"{key} = {_toml(_size(value) if _type(name) is SIZE else value)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    try:
        str(value).encode()
    except UnicodeEncodeError:  # a name of a file that is none
        raise M0kitError(f"{value}: is not Unicode, so no file of TOML can name it. Rename it.") from None
    return '"' + "".join(map(_letter, str(value))) + '"'


def _letter(char: str) -> str:
    if char.isprintable() and char not in '"\\':
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


# --- what was given ----------------------------------------------------------------------------------------


def settings_of(ctx: click.Context) -> Settings:
    """What a call of the command says, with the environment and a file. Raises click.UsageError."""
    artifacts: tuple[str, ...] = ctx.params["artifacts"]
    given = {name: ctx.params[_parameter(name)] for name in _HELP}
    sources = {name: ctx.get_parameter_source(_parameter(name)) for name in _HELP}
    said = {name for name, source in sources.items() if source in _SAID}
    if "uds" in said and said & {"host", "port"}:
        raise click.UsageError("--uds takes the place of --host and --port: give one or the other.")
    try:
        models = _models(ctx, artifacts, given, said)
        return Settings(tuple(models), **{name: given[name] for name in _OF_SERVER})
    except (ValueError, DeviceError) as error:
        raise click.UsageError(str(error)) from None


def _models(
    ctx: click.Context, artifacts: Sequence[str], given: Mapping[str, Any], said: set[str]
) -> list[ModelSettings]:
    """A flag or variable is of all artifacts, and wins over a table of the file. Raises click.UsageError."""
    tables = [_table_of(artifact) for artifact in artifacts] or ctx.meta.get(_TABLES, [])
    if not tables:
        raise click.UsageError("Give an ARTIFACT, or a --config with [[models]].")
    if given["revision"] is not None and len(tables) > 1:
        raise click.UsageError("--revision is of one ARTIFACT. Of several it stands behind each: organisation/name@v2.")
    common = {name: given[name] for name in _COMMON}
    models = [
        ModelSettings(**common | {name: value for name, value in table.items() if name in _OF_ONE or name not in said})
        for table in tables
    ]
    if given["names"]:
        if artifacts and models[0].names:
            raise click.UsageError("The first ARTIFACT has a NAME= already: leave --served-model-name out.")
        models[0] = replace(models[0], names=given["names"])
    for which, folder in _indexes(models, given["index"]).items():
        models[which] = replace(models[which], index=folder)
    for model in models:
        has_limit = model.gpu_bytes is not None or model.pool_bytes is not None
        if has_limit and not gpus.named(model.device):
            raise click.UsageError("--gpu-bytes and --pool-bytes are limits of a GPU's memory: say --device cuda too.")
    return models


def _table_of(artifact: str) -> dict[str, Any]:
    """Of an ARTIFACT on the command line: NAME,ALIAS=ARTIFACT, or a folder or hub id alone."""
    names, place = ("", artifact) if Path(artifact).exists() else _split(artifact)
    if not place or (names and not all(names.split(","))):
        raise click.UsageError(f"{artifact!r}: expected ARTIFACT, NAME=ARTIFACT or NAME,ALIAS=ARTIFACT.")
    return {"artifact": place, "names": tuple(names.split(",")) if names else ()}


def _indexes(models: Sequence[ModelSettings], given: Iterable[str]) -> dict[int, Path]:
    """The folders by the positions of their artifacts. Raises click.UsageError."""
    found: dict[int, Path] = {}
    for text in given:
        name, folder = ("", text) if Path(text).exists() else _split(text)
        which = next((i for i, model in enumerate(models) if not name or name in model.called), None)
        if which is None:
            known = ", ".join(name for model in models for name in model.called)
            raise click.UsageError(f"--index {text}: no artifact is called {name!r}. There are: {known}.")
        if not folder or which in found:
            raise click.UsageError(f"--index {text}: expected one folder for {models[which].called[0]}.")
        found[which] = Path(folder)
    return found


def _split(text: str) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    return (name, rest) if equals else ("", text)


def _found(model: ModelSettings) -> tuple[ModelSettings, str]:
    """The artifact as a folder that is here, once for all workers, and what to say of it.

    Raises ArtifactError, click.UsageError.
    """
    folder = resolve(model.artifact, model.revision, what="artifact")
    manifest = read_manifest(folder)
    require_pixels(folder, model.max_pixels)
    told = f"{', '.join(model.called)}: {manifest.scheme} on {model.device}"
    told += f", index {click.format_filename(model.index)}" if model.index else ""
    return replace(model, artifact=str(folder.absolute()), names=model.called, revision=None), told


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    params: list[click.Parameter] = [_option(name) for name in reversed(_HELP)]  # as decorators leave them
    command.__click_params__ = params  # type: ignore[attr-defined]
    return command


@click.command()
@click.argument("artifacts", metavar="ARTIFACT…", nargs=-1, envvar="M0KIT_SERVE_ARTIFACTS")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_file,
    help="A file of TOML with these options; what is given here, or in the environment, wins.",
)
@click.option("--print-config", is_flag=True, help="Print the settings as such a file, and end.")
@_options
@click.pass_context
def serve(ctx: click.Context, /, print_config: bool, **_: Any) -> None:
    """Score over HTTP with each ARTIFACT, in the forms that clients of other rerankers speak.

    ARTIFACT is a folder or a hub id, with names before it where requests are to call it otherwise than the folder:
    NAME=ARTIFACT, or NAME,ALIAS=ARTIFACT. Requests that name none get the first.

    Every option is also M0KIT_SERVE_… in the environment (several values with blanks between them), and a key of a
    --config file. SIGTERM finishes what was accepted and ends with 0, SIGHUP reads the keys again.
    """
    settings = settings_of(ctx)
    if print_config:
        show(*to_toml(settings))
        return
    if (missing := next((name for name in _PACKAGES if find_spec(name) is None), None)) is not None:
        raise DependencyError(f"m0kit serve needs {missing}. pip install 'm0kit[serve]'.")
    from m0kit.server.workers import run

    models, told = zip(*map(_found, settings.models), strict=True)
    ctx.exit(run(replace(settings, models=models), told))
