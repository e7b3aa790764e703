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

import functools
import platform
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import Manifest, read_manifest
from m0kit.cli.options import ARTIFACT, PARTLY, REVISION_HELP, require_place, tell
from m0kit.cli.page import Contents
from m0kit.cli.page import write as write_page
from m0kit.errors import CheckpointError, M0kitError
from m0kit.files import sha256_of
from m0kit.machine.detect import versions
from m0kit.reranker import Reranker
from m0kit.terminal import say, show, show_json, show_text
from m0kit_parity.child import Child
from m0kit_parity.proof.cases import Case, builtin_cases, pairs_file, published_groups
from m0kit_parity.proof.compare import Verdict
from m0kit_parity.proof.golden import Golden, record, require_free
from m0kit_parity.proof.origin import require_same_origin
from m0kit_parity.proof.portable import ENGINES, portable_encoder, require_standard
from m0kit_parity.proof.render import to_html, to_json, to_text
from m0kit_parity.proof.report import Report, check, check_published
from m0kit_parity.proof.tolerances import tolerances

# What can change a figure on either side.
_PACKAGES: Final = ("m0kit", "torch", "transformers", "peft", "tokenizers", "pillow", "numpy", "onnxruntime")

# Nothing in a forward pass draws random numbers; should a library fill a tensor that a checkpoint lacks,
# it fills it the same way every time.
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class _Recording:
    """What PyTorch's side is of: CHECKPOINT and the options of `record`, as they were given."""

    checkpoint: str
    revision: str | None
    adapter: tuple[str, ...]
    cases: tuple[str, ...]
    heavy: bool
    pairs: Path | None
    layers: bool

    def look(self) -> None:
        """Whether checkpoint and adapters are there at all, before PyTorch is imported to read them."""
        from m0kit_export.adapter import AdapterSpec  # which the check of an artifact does without
        from m0kit_export.folder import find_folder

        find_folder(self.checkpoint, self.revision)
        for text in self.adapter:
            AdapterSpec.parse(text).check()

    def chosen(self) -> tuple[tuple[Case, ...], int]:
        """The cases, and the exit code when all goes well: lines that cannot be used are told and left out."""
        if self.pairs is None:
            return builtin_cases(self.cases, self.heavy), 0
        own, errors = pairs_file(self.pairs)
        tell("error", (("", error) for error in errors.values()))
        chosen = (*(builtin_cases(self.cases, self.heavy) if self.cases else ()), own)
        return chosen, PARTLY if errors else 0

    def command(self, output: Path) -> str:
        """As it would be typed."""
        words = ["m0kit", "parity", "record", self.checkpoint]
        words += [] if self.revision is None else ["--revision", self.revision]
        words += [part for adapter in self.adapter for part in ("--adapter", adapter)]
        words += [part for name in self.cases for part in ("--cases", name)]
        words += ["--heavy"] * self.heavy
        words += ["--pairs", str(self.pairs)] if self.pairs else []
        return shlex.join([*words, *["--layers"] * self.layers, "-o", str(output)])

    def record(
        self, folder: Path, cases: Sequence[Case], command: str, threads: int | None, artifact: Path | None = None
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
        specs = [AdapterSpec.parse(adapter) for adapter in self.adapter]
        opened = open_checkpoint(self.checkpoint, self.revision)
        AdapterStack.open(specs, opened)  # what export would refuse is refused here, in the same words
        provenance = {
            "versions": _versions(),
            "checkpoint": {
                "source": str(opened.source), "licence": opened.licence, "fingerprint": opened.fingerprint()
            },
            "adapters": [
                {"path": str(spec.path), "weight": spec.weight, "sha256": _hashes(Path(spec.path))} for spec in specs
            ],
            "seed": _SEED,
        }  # fmt: skip
        if artifact is not None:
            require_same_origin(artifact, read_manifest(artifact).provenance, provenance, "or give another artifact.")
        say(f"loading {self.checkpoint} in PyTorch")
        reference = Reference.load(opened.folder, adapters=[(spec.path, spec.weight) for spec in specs])
        record(
            folder, cases, reference, model=opened.config, command=command, provenance=provenance,
            norm=reference.norm, layers=self.layers, progress=say,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Checking:
    """How the artifact's side runs and what is made of it: the options that all checks have."""

    device: str
    threads: int | None
    engine: str
    html: Path | None
    json: bool

    def require(self, artifact: Path, manifest: Manifest) -> None:
        """What would end a check after minutes is looked at first."""
        require_place(self.html)
        require_standard(self.engine, artifact, manifest)

    def open(self, artifact: Path) -> Reranker:
        """The artifact, to be run."""
        return Reranker.load(artifact, device=self.device, threads=self.threads, open_graph=ENGINES[self.engine])

    def check(self, artifact: Path, folder: Path, names: Sequence[str], layers: bool) -> None:
        """Hold an artifact against a golden folder, and finish."""
        golden = Golden.open(folder)
        manifest = read_manifest(artifact)
        golden.require(manifest.model, layers)
        golden.require_cases(names)
        self.require(artifact, manifest)
        tolerances(manifest.scheme)
        advice = f"{folder} was recorded by: {golden.command}"
        require_same_origin(artifact, manifest.provenance, golden.provenance, advice)
        say(f"opening {artifact} on {self.device}")
        reranker = self.open(artifact)
        about = {
            "artifact": str(artifact),
            "scheme": manifest.scheme,
            "device": self.device,
            "engine": self.engine,
            "versions": _versions(),
            "artifact_provenance": manifest.provenance,
            "golden": {"command": golden.command, "created": golden.created, "provenance": golden.provenance},
        }
        own_engine = ENGINES[self.engine] is not None
        portable = None if own_engine else portable_encoder(self.device, artifact, manifest, self.threads)
        report = check(
            golden, reranker, manifest.scheme, about, names=names, layers=layers,
            rotated=bool(manifest.recipe.get("rotate")), portable=portable, picture=self.picture(), progress=say,
        )  # fmt: skip
        self.finish(report)

    def picture(self) -> Callable[[Any], str]:
        """What a page shows of an image, where there is to be a page."""
        return Contents().shown if self.html is not None else lambda _: ""

    def finish(self, report: Report) -> None:
        """Print, write the page, and leave with the verdict's exit code."""
        if self.html is not None:
            write_page(self.html, to_html(report))
        if self.json:
            show_json(to_json(report), indent=1)
        else:
            show_text(to_text(report))
        if report.verdict is Verdict.FAIL:
            click.get_current_context().exit(1)


def _together(kind: type[Any], name: str, *parameters: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Parameters that a command gets as one `kind`, by `name`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**given: Any) -> Any:
            own = {field.name: given.pop(field.name) for field in fields(kind)}
            return function(**given, **{name: kind(**own)})

        decorated: Callable[..., Any] = command
        for parameter in reversed(parameters):
            decorated = parameter(decorated)
        return decorated

    return decorate


_LAYERS = click.option("--layers", is_flag=True, help="Also the hidden state after each decoder layer.")
_RECORDING = _together(
    _Recording,
    "recording",
    click.argument("checkpoint"),
    click.option("--revision", help=REVISION_HELP.format("CHECKPOINT")),
    click.option("--adapter", multiple=True, metavar="PATH[:WEIGHT]", help="LoRA adapter to merge; repeatable."),
    click.option("--cases", multiple=True, metavar="NAME", help="Only this case; repeatable."),
    click.option("--heavy", is_flag=True, help="Also the cases that take minutes on the published model."),
    click.option(
        "--pairs",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help='Your own pairs, one {"query": …, "documents": […]} per line, in place of the built-in cases '
        "(with --cases, beside those).",
    ),
    _LAYERS,
)
_CHECKING = _together(
    _Checking,
    "checking",
    click.option("--device", default="cpu", show_default=True, help="Where the artifact runs."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads of the artifact's side."),
    click.option(
        "--engine",
        type=click.Choice(list(ENGINES)),
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
@_RECORDING
@click.argument("artifact")
@_CHECKING
@click.option("-o", "--output", type=_folder, help="Keep the golden folder here.")
def run_command(artifact: str, output: Path | None, recording: _Recording, checking: _Checking) -> None:
    """Hold an artifact against PyTorch, stage by stage: record, then check.

    The table shows how much of each tolerance was used. The two halves run one after the other, never
    both in memory; alone they are `record`, which needs PyTorch, and `check`, which does not.
    """
    folder = resolve(artifact, what="artifact")
    manifest = read_manifest(folder)
    checking.require(folder, manifest)
    tolerances(manifest.scheme)
    recording.look()
    if output is not None:
        require_free(output)
    given = {"adapters": [{"path": path} for path in recording.adapter]}
    require_same_origin(folder, manifest.provenance, given, "or give another artifact.")
    chosen, code = recording.chosen()
    command = recording.command(output or Path("golden"))
    with tempfile.TemporaryDirectory(prefix="m0kit-parity-") as temporary:
        golden = output or Path(temporary) / "golden"
        recorder = partial(_recorder, recording, golden, chosen, command, checking.threads, folder)
        with Child(recorder, patience_s=None) as record_there:
            try:
                record_there()
            except M0kitError as error:
                if record_there.alive:
                    raise
                told = f"{recording.checkpoint}: PyTorch's side: {error} Choose fewer --cases."
                raise CheckpointError(told) from error
        checking.check(folder, golden, (), recording.layers)
    click.get_current_context().exit(code)


def _recorder(recording: _Recording, *arguments: Any) -> Callable[[], None]:
    """What a process of its own is asked to do."""
    return partial(recording.record, *arguments)


@parity.command("record")
@_RECORDING
@click.option("-o", "--output", type=_folder, required=True, help="The golden folder to write.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of PyTorch.")
def record_command(output: Path, threads: int | None, recording: _Recording) -> None:
    """Run PyTorch once and keep every stage, with its provenance."""
    recording.look()
    require_free(output)
    chosen, code = recording.chosen()
    recording.record(output, chosen, recording.command(output), threads)
    show(str(output))
    click.get_current_context().exit(code)


@parity.command("check")
@ARTIFACT
@click.argument("golden", type=_folder)
@click.option("--cases", multiple=True, metavar="NAME", help="Only this case; repeatable.")
@_LAYERS
@_CHECKING
def check_command(artifact: Path, golden: Path, cases: tuple[str, ...], layers: bool, checking: _Checking) -> None:
    """Hold an artifact against a golden folder. Needs no PyTorch."""
    checking.check(artifact, golden, cases, layers)


@parity.command("published")
@ARTIFACT
@click.option(
    "--inputs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder with the model card's example texts and images; an incomplete one is told what is missing.",
)
@_CHECKING
def published_command(artifact: Path, inputs: Path, checking: _Checking) -> None:
    """Hold an artifact of the published model against the scores on its model card."""
    groups = published_groups(inputs)
    checking.require(artifact, read_manifest(artifact))
    about = {"artifact": str(artifact), "device": checking.device, "versions": _versions()}
    about |= {"reference": "the model card of jina-reranker-m0"}
    checking.finish(check_published(groups, checking.open(artifact), about, picture=checking.picture()))


def _versions() -> dict[str, str]:
    """Python, the machine, and every installed package that can change a figure; nothing is imported."""
    return {"python": platform.python_version(), "machine": platform.machine(), **versions(*_PACKAGES)}


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of an adapter."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
