"""`m0kit parity`: arguments in, exit codes out.

Owns the command lines, the provenance of a recording and the order of the two halves. PyTorch is
imported only where a recording is made, and in a process of its own when a check follows, so that
reference and artifact are never in memory together.

    m0kit parity run CHECKPOINT ARTIFACT          both halves
    m0kit parity record CHECKPOINT -o golden      PyTorch once, everything kept
    m0kit parity check ARTIFACT golden            no PyTorch
    m0kit parity published ARTIFACT --inputs DIR  against the scores on the model card

Exit codes: 0 pass or near-tie, 1 a stage failed, 3 lines of --pairs were left out and all others passed; others as for
every m0kit command.
"""

import platform
import shlex
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import Manifest, read_manifest
from m0kit.cli.options import ARTIFACT, PARTLY, REVISION_HELP, require_place, tell
from m0kit.cli.page import Contents
from m0kit.cli.page import write as write_page
from m0kit.errors import CheckpointError, M0kitError
from m0kit.files import sha256_of
from m0kit.terminal import say, show, show_json, show_text
from m0kit_parity.child import Child
from m0kit_parity.proof.cases import Case, builtin_cases, pairs_file, published_groups
from m0kit_parity.proof.compare import Verdict
from m0kit_parity.proof.golden import Golden, record, require_free
from m0kit_parity.proof.origin import require_same_origin
from m0kit_parity.proof.portable import ENGINES, require_standard
from m0kit_parity.proof.render import to_html, to_json, to_text
from m0kit_parity.proof.report import Report, check, check_published
from m0kit_parity.proof.tolerances import tolerances

_F = TypeVar("_F", bound=Callable[..., Any])

# What can change a figure on either side.
_PACKAGES: Final = ("m0kit", "torch", "transformers", "peft", "tokenizers", "pillow", "numpy", "onnxruntime")

# Nothing in a forward pass draws random numbers; should a library fill a tensor that a checkpoint lacks,
# it fills it the same way every time.
_SEED: Final = 0


def _options(*decorators: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def apply(function: _F) -> _F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_record_options = _options(
    click.option("--revision", help=REVISION_HELP.format("CHECKPOINT")),
    click.option(
        "--adapter",
        multiple=True,
        metavar="PATH[:WEIGHT]",
        help="LoRA adapter to merge; repeatable.",
    ),
    click.option("--cases", multiple=True, metavar="NAME", help="Only this case; repeatable."),
    click.option("--heavy", is_flag=True, help="Also the cases that take minutes on the published model."),
    click.option(
        "--pairs",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help='Your own pairs, one {"query": …, "documents": […]} per line, in place of the built-in cases '
        "(with --cases, beside those).",
    ),
)
_layers_option = click.option("--layers", is_flag=True, help="Also the hidden state after each decoder layer.")
_check_options = _options(
    click.option("--device", default="cpu", show_default=True, help="Where the artifact runs."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads of the artifact's side."),
    click.option(
        "--engine",
        type=click.Choice(["onnxruntime", "openvino", "onnx"]),
        default="onnxruntime",
        show_default=True,
        help="What runs the graphs; onnx is the slow reference evaluator.",
    ),
    click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a report page."),
    click.option("--json", is_flag=True, help="Print JSON in place of the table."),
)
_folder = click.Path(path_type=Path)


class _Group(click.Group):
    """Says `run` where a checkpoint or an artifact stands in a command's place."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}. For both halves say `{ctx.command_path} run CHECKPOINT ARTIFACT`.")
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, no_args_is_help=True)
def parity() -> None:
    """Hold an artifact against PyTorch, stage by stage."""


@parity.command("run")
@click.argument("checkpoint")
@click.argument("artifact")
@_record_options
@_layers_option
@_check_options
@click.option("-o", "--output", type=_folder, help="Keep the golden folder here.")
def run_command(
    checkpoint: str,
    artifact: str,
    revision: str | None,
    adapter: tuple[str, ...],
    cases: tuple[str, ...],
    heavy: bool,
    pairs: Path | None,
    layers: bool,
    device: str,
    threads: int | None,
    engine: str,
    html: Path | None,
    json: bool,
    output: Path | None,
) -> None:
    """Hold an artifact against PyTorch, stage by stage: record, then check.

    The table shows how much of each tolerance was used. The two halves run one after the other, never
    both in memory; alone they are `record`, which needs PyTorch, and `check`, which does not.
    """
    artifact_folder = resolve(artifact, what="artifact")
    manifest = read_manifest(artifact_folder)
    _require(artifact_folder, manifest, engine, html)
    _look(checkpoint, adapter, revision)
    if output is not None:
        require_free(output)
    given = {"adapters": [{"path": path} for path in adapter]}
    require_same_origin(artifact_folder, manifest.provenance, given, "or give another artifact.")
    chosen, code = _cases(cases, heavy, pairs)
    arguments = [checkpoint, *_record_arguments(revision, adapter, cases, heavy, pairs, layers)]
    with tempfile.TemporaryDirectory(prefix="m0kit-parity-") as temporary:
        golden = output or Path(temporary) / "golden"
        command = shlex.join(["m0kit", "parity", "record", *arguments, "-o", str(output or "golden")])
        recorder = partial(
            _recorder, checkpoint, revision, golden, adapter, chosen, layers, command, threads, artifact_folder
        )
        with Child(recorder, patience_s=None) as record_there:
            try:
                record_there()
            except M0kitError as error:
                if record_there.alive:
                    raise
                raise CheckpointError(f"{checkpoint}: PyTorch's side: {error} Choose fewer --cases.") from error
        _check_here(artifact_folder, golden, (), layers, device, threads, engine, html, json)
    click.get_current_context().exit(code)


@parity.command("record")
@click.argument("checkpoint")
@_record_options
@_layers_option
@click.option("-o", "--output", type=_folder, required=True, help="The golden folder to write.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of PyTorch.")
def record_command(
    checkpoint: str,
    revision: str | None,
    adapter: tuple[str, ...],
    cases: tuple[str, ...],
    heavy: bool,
    pairs: Path | None,
    layers: bool,
    output: Path,
    threads: int | None,
) -> None:
    """Run PyTorch once and keep every stage, with its provenance."""
    _look(checkpoint, adapter, revision)
    require_free(output)
    arguments = [checkpoint, *_record_arguments(revision, adapter, cases, heavy, pairs, layers), "-o", str(output)]
    command = shlex.join(["m0kit", "parity", "record", *arguments])
    chosen, code = _cases(cases, heavy, pairs)
    _record_here(checkpoint, revision, output, adapter, chosen, layers, command, threads)
    show(str(output))
    click.get_current_context().exit(code)


@parity.command("check")
@ARTIFACT
@click.argument("golden", type=_folder)
@click.option("--cases", multiple=True, metavar="NAME", help="Only this case; repeatable.")
@_layers_option
@_check_options
def check_command(
    artifact: Path,
    golden: Path,
    cases: tuple[str, ...],
    layers: bool,
    device: str,
    threads: int | None,
    engine: str,
    html: Path | None,
    json: bool,
) -> None:
    """Hold an artifact against a golden folder. Needs no PyTorch."""
    _check_here(artifact, golden, cases, layers, device, threads, engine, html, json)


@parity.command("published")
@ARTIFACT
@click.option(
    "--inputs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder with the model card's example texts and images; an incomplete one is told what is missing.",
)
@_check_options
def published_command(
    artifact: Path,
    inputs: Path,
    device: str,
    threads: int | None,
    engine: str,
    html: Path | None,
    json: bool,
) -> None:
    """Hold an artifact of the published model against the scores on its model card."""
    from m0kit.reranker import Reranker

    groups = published_groups(inputs)
    require_place(html)
    require_standard(engine, artifact, read_manifest(artifact))
    reranker = Reranker.load(artifact, device=device, threads=threads, open_graph=ENGINES[engine])
    about = {"artifact": str(artifact), "device": device, "reference": "the model card of jina-reranker-m0"}
    report = check_published(groups, reranker, {**about, "versions": _versions()}, picture=_picture(html))
    _finish(report, html, json)


def _look(checkpoint: str, adapters: Sequence[str], revision: str | None) -> None:
    """Whether a checkpoint and adapters are there at all, before PyTorch is imported to read them."""
    from m0kit_export.adapter import AdapterSpec  # which the check of an artifact does without
    from m0kit_export.folder import find_folder

    find_folder(checkpoint, revision)
    for text in adapters:
        AdapterSpec.parse(text).check()


def _require(artifact: Path, manifest: Manifest, engine: str, html: Path | None) -> None:
    """What would end a check after minutes is looked at first."""
    require_place(html)
    require_standard(engine, artifact, manifest)
    tolerances(manifest.scheme)


def _cases(names: Sequence[str], heavy: bool, pairs: Path | None) -> tuple[tuple[Case, ...], int]:
    """The cases, and the exit code when all goes well: lines of `pairs` that cannot be used are told and left out."""
    if pairs is None:
        return builtin_cases(names, heavy), 0
    own, errors = pairs_file(pairs)
    tell("error", (("", error) for error in errors.values()))
    return (*(builtin_cases(names, heavy) if names else ()), own), PARTLY if errors else 0


def _record_arguments(
    revision: str | None, adapters: Sequence[str], names: Sequence[str], heavy: bool, pairs: Path | None, layers: bool
) -> list[str]:
    """The options of a recording as they would be typed."""
    arguments = [] if revision is None else ["--revision", revision]
    arguments += [part for adapter in adapters for part in ("--adapter", adapter)]
    arguments += [part for name in names for part in ("--cases", name)]
    arguments += ["--heavy"] * heavy
    arguments += ["--pairs", str(pairs)] if pairs else []
    return arguments + ["--layers"] * layers


def _recorder(*arguments: Any) -> Callable[[], None]:
    """What a process of its own is asked to do."""
    return partial(_record_here, *arguments)


def _record_here(
    source: str,
    revision: str | None,
    folder: Path,
    adapters: Sequence[str],
    cases: Sequence[Case],
    layers: bool,
    command: str,
    threads: int | None,
    artifact: Path | None = None,
) -> None:
    """Load the reference in this process and record; first see that `artifact` was made from the same weights."""
    import torch

    from m0kit_export.adapter import AdapterSpec
    from m0kit_export.checkpoint import open_checkpoint
    from m0kit_export.merge import AdapterStack
    from m0kit_parity.reference import Reference

    torch.manual_seed(_SEED)
    if threads is not None:
        torch.set_num_threads(threads)
    specs = [AdapterSpec.parse(adapter) for adapter in adapters]
    opened = open_checkpoint(source, revision)
    AdapterStack.open(specs, opened)  # what export would refuse is refused here, in the same words
    provenance = {
        "versions": _versions(),
        "checkpoint": {
            "source": str(opened.source),
            "licence": opened.licence,
            "fingerprint": opened.fingerprint(),
        },
        "adapters": [
            {"path": str(spec.path), "weight": spec.weight, "sha256": _hashes(Path(spec.path))} for spec in specs
        ],
        "seed": _SEED,
    }
    if artifact is not None:
        require_same_origin(artifact, read_manifest(artifact).provenance, provenance, "or give another artifact.")
    say(f"loading {source} in PyTorch")
    reference = Reference.load(opened.folder, adapters=[(spec.path, spec.weight) for spec in specs])
    record(
        folder,
        cases,
        reference,
        model=opened.config,
        command=command,
        provenance=provenance,
        layers=layers,
        progress=say,
    )


def _check_here(
    artifact: Path,
    folder: Path,
    names: Sequence[str],
    layers: bool,
    device: str,
    threads: int | None,
    engine: str,
    html: Path | None,
    as_json: bool,
) -> None:
    from m0kit.reranker import Reranker

    golden = Golden.open(folder)
    manifest = read_manifest(artifact)
    golden.require(manifest.model, layers)
    golden.require_cases(names)
    _require(artifact, manifest, engine, html)
    advice = f"{folder} was recorded by: {golden.command}"
    require_same_origin(artifact, manifest.provenance, golden.provenance, advice)
    say(f"opening {artifact} on {device}")
    reranker = Reranker.load(artifact, device=device, threads=threads, open_graph=ENGINES[engine])
    about = {
        "artifact": str(artifact),
        "scheme": manifest.scheme,
        "device": device,
        "engine": engine,
        "versions": _versions(),
        "artifact_provenance": manifest.provenance,
        "golden": {
            "command": golden.command,
            "created": golden.created,
            "provenance": golden.provenance,
        },
    }
    report = check(
        golden, reranker, manifest.scheme, about, names=names, layers=layers, picture=_picture(html), progress=say
    )
    _finish(report, html, as_json)


def _picture(html: Path | None) -> Callable[[Any], str]:
    """What a page shows of an image, where there is to be a page."""
    return Contents().shown if html is not None else lambda _: ""


def _finish(report: Report, html: Path | None, as_json: bool) -> None:
    """Print, write the page, and leave with the verdict's exit code."""
    if html is not None:
        write_page(html, to_html(report))
    if as_json:
        show_json(to_json(report), indent=1)
    else:
        show_text(to_text(report))
    if report.verdict is Verdict.FAIL:
        click.get_current_context().exit(1)


def _versions() -> dict[str, str]:
    """Python, the machine, and every installed package that can change a figure; nothing is imported."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of an adapter."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
