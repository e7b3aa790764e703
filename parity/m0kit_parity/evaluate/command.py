"""`m0kit evaluate`: artifacts of one model side by side, how well each ranks and what it costs. Owns the command line.

    m0kit evaluate m0-fp32 m0-int8 m0-int4 --pairs judged.jsonl --html report.html
    m0kit evaluate jinaai/jina-reranker-m0 --precision int8 --precision int4 --pairs judged.jsonl

Exit codes: 0 all well, 3 some lines or measurements failed and the others are reported; others as for every command.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import MANIFEST, read_manifest
from m0kit.artifact.ports import Kept
from m0kit.cli.options import JSON, PARTLY, require_place, tell
from m0kit.cli.page import text
from m0kit.cli.page import write as write_page
from m0kit.errors import InputError
from m0kit.machine.detect import describe
from m0kit.plain import plain
from m0kit.precision import SCHEMES
from m0kit.terminal import say, show_json, show_text
from m0kit_export.adapter import AdapterSpec
from m0kit_export.folder import find_folder
from m0kit_parity.bench.options import PACKAGES, THREADS
from m0kit_parity.evaluate.compare import VISUAL_TOKENS, builtin_workloads, check_same_model, compare
from m0kit_parity.evaluate.drawn import LEAST, drawn_sets
from m0kit_parity.evaluate.judged import Query, builtin_sets, read_judged
from m0kit_parity.evaluate.quality import Evaluation
from m0kit_parity.evaluate.render import to_html, to_json, to_text

if TYPE_CHECKING:  # with the exporter's packages
    from m0kit_parity.evaluate.activations import Activations
    from m0kit_parity.evaluate.blame import Blamed


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...|CHECKPOINT")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(SCHEMES),
    help="Repeatable: export CHECKPOINT so, score it, and remove it again.",
)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="PATH[:WEIGHT]", help="With --precision, as of `m0kit export`."
)
@click.option("--revision", help="With --precision: branch, tag or commit, when CHECKPOINT is a hub id.")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --precision: folder for two artifacts meanwhile; NAME.evaluation here by default. It goes at the end.",
)
@click.option(
    "--pairs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Your own queries and documents, JSON lines, judged or not; the small checkpoint's sets by default.",
)
@click.option(
    "--draw", type=click.IntRange(LEAST), metavar="N",
    help="So many queries drawn for the small checkpoint, in place of its 170; always the same.",
)  # fmt: skip
@click.option(
    "--kv",
    "kvs",
    multiple=True,
    type=click.Choice(["fp16", "int8"]),
    help="Repeatable: also what keeping the documents' keys and values so does to the ranking.",
)
@JSON
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write one self-contained page.")
@THREADS
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Turns of each artifact.")
@click.option(
    "--blame", "with_blame", is_flag=True, help="Also which layers, matrices and tokens the errors come from."
)
@click.option("--no-speed", is_flag=True, help="Do not measure seconds.")
@click.option("--strict", is_flag=True, help="Stop at the first line or measurement that fails.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    artifacts: tuple[str, ...],
    precisions: tuple[str, ...],
    adapters: tuple[str, ...],
    revision: str | None,
    work: Path | None,
    pairs: Path | None,
    draw: int | None,
    kvs: tuple[Kept, ...],
    as_json: bool,
    html: Path | None,
    threads: int,
    repeats: int,
    with_blame: bool,
    no_speed: bool,
    strict: bool,
) -> None:
    """Compare artifacts of one model: ranking quality, bytes, memory, seconds. The first one is the baseline.

    ARTIFACTs are folders or hub ids, org/name or org/name@revision.

    With --precision a CHECKPOINT takes their place, a folder or a hub id: it is exported as a baseline with its own
    values and in each precision, scored and removed, two artifacts on the disk at a time. The same command goes on
    where one was stopped. What the checkpoint's activations are like is told too.

    A line of PAIRS is {"query": …, "documents": […], "relevance": […]}, query and documents each a string (text),
    {"text": …} or {"image": …} with a path relative to the file. Without "relevance", quality is agreement with
    the baseline.

    Each loss stands with its 95 % interval: what it may be on other queries like these (a paired bootstrap).

    --blame computes a few of the pairs once for each part of the model, that part as in the artifact and the others as
    in the baseline: a minute for the small checkpoint, an estimated three hours for the published one on two cores.
    """
    if pairs and draw:
        raise click.UsageError("--pairs and --draw are two sets of queries: give one of them.")
    require_place(html)
    about = {**describe(*PACKAGES), "threads": threads, "repeats": repeats}
    about["pairs"] = str(pairs or (f"{draw} drawn" if draw else "built-in sets"))
    options: dict[str, Any] = {
        "threads": threads,
        "repeats": repeats,
        "speed": not no_speed,
        "strict": strict,
        "about": about,
    }
    report = partial(_report, html=html, as_json=as_json)
    if precisions:
        name = _checkpoint(artifacts, kvs)
        errors = _evaluate_checkpoint(
            name, precisions, adapters, revision, work or Path(f"{_last(name)}.evaluation"), (pairs, draw, strict),
            options, with_blame, report,
        )  # fmt: skip
        ctx.exit(PARTLY if errors else 0)
    for option, value in (("--adapter", adapters), ("--revision", revision), ("--work", work)):
        if value:
            raise click.UsageError(f"{option} goes with a CHECKPOINT and --precision; artifacts are given as they are.")
    folders = [resolve(artifact, what="artifact") for artifact in artifacts]
    for folder in folders:
        if (folder / "config.json").is_file() and not (folder / MANIFEST).is_file():
            raise click.UsageError(
                f"{plain(folder)} is a checkpoint and no artifact. Say --precision for each form to compare it in."
            )
    manifests = [read_manifest(folder) for folder in folders]
    check_same_model(folders, manifests)
    if with_blame:
        from m0kit_parity.evaluate.blame import sides_of  # with the exporter's packages

        for folder in folders[1:]:
            sides_of(folders[0], folder)  # before minutes of work
    sets, bad = _queries(pairs, draw, strict)
    loads, max_pixels = None, None  # the file's own pairs
    if pairs is None:
        image = manifests[0].model.image
        loads, max_pixels = builtin_workloads(folders[0]), max(image.max_pixels, VISUAL_TOKENS * image.factor**2)
    evaluation, notes = compare(folders, sets, loads, max_pixels=max_pixels, bad=bad, kvs=kvs, **options)
    found: list[Blamed] | None = None
    if with_blame:
        from m0kit_parity.evaluate.blame import blame

        others = zip(folders[1:], evaluation.artifacts[1:], strict=False)  # behind them are other forms of documents
        found = [blame(folders[0], folder, sets, label=a.label, threads=threads) for folder, a in others]
    report(evaluation, notes, found)
    ctx.exit(PARTLY if evaluation.errors else 0)


def _queries(pairs: Path | None, draw: int | None, strict: bool) -> tuple[dict[str, list[Query]], list[str]]:
    """The sets that are asked for, and what is wrong with other lines; InputError, with `strict` at the first."""
    if pairs is None:
        return drawn_sets(draw) if draw else builtin_sets(), []
    queries, bad = read_judged(pairs)
    if bad and strict:
        raise InputError(next(iter(bad.values())))
    return {pairs.name: queries}, list(bad.values())


def _report(
    evaluation: Evaluation,
    notes: Sequence[str],
    found: "Sequence[Blamed] | None" = None,
    activations: "Activations | None" = None,
    *,
    html: Path | None,
    as_json: bool,
) -> None:
    """Tell it all: notes and errors to the side, the result as text or JSON, and the page."""
    texts, facts, sections = [to_text(evaluation)], to_json(evaluation), list[str]()
    if found is not None:
        from m0kit_parity.evaluate import blamed

        texts += map(blamed.to_text, found)
        facts["blame"] = list(map(blamed.to_json, found))
        sections += map(blamed.to_html, found)
    if activations is not None:
        from m0kit_parity.evaluate import activations as stated
        from m0kit_parity.evaluate import beside

        summary, tables = stated.summary(activations), stated.to_text(activations)
        compared = beside.to_text(activations)
        texts.append(f"{summary}\n\n{compared}\n\n{tables}")
        facts["activations"] = asdict(activations)
        sections.append(
            f'<h2>Activations</h2><p>{text(summary)}</p><div class="wide"><pre>{escape(compared)}</pre></div>'
            f'<details><summary>All figures</summary><div class="wide"><pre>{escape(tables)}</pre></div></details>'
        )
    say(*(f"note: {note}" for note in notes))
    tell("error", map(_place_and_reason, evaluation.errors))
    if html:
        write_page(html, to_html(evaluation, sections))
    if as_json:
        show_json(facts)
    else:
        show_text("\n\n".join(texts))


def _checkpoint(names: Sequence[str], kvs: Sequence[Kept]) -> str:
    """The one checkpoint that --precision goes with. Raises UsageError."""
    if len(names) > 1:
        raise click.UsageError(
            f"--precision goes with one CHECKPOINT, and {len(names)} were given. Artifacts are compared without it."
        )
    if (Path(names[0]) / MANIFEST).is_file():
        raise click.UsageError(
            f"{plain(names[0])} is an artifact, and --precision goes with a checkpoint. `m0kit quantize` writes it in "
            "fewer bits; compare the two without --precision."
        )
    if kvs:
        raise click.UsageError("--kv goes with artifacts; export the CHECKPOINT first, or leave it out.")
    return names[0]


def _last(name: str) -> str:
    """What a checkpoint is called, in front of its place or organisation, and behind it its revision."""
    return Path(name.partition("@")[0]).absolute().name


def _evaluate_checkpoint(
    name: str,
    precisions: Sequence[str],
    adapters: Sequence[str],
    revision: str | None,
    folder: Path,
    asked: tuple[Path | None, int | None, bool],
    options: dict[str, Any],
    with_blame: bool,
    report: Callable[..., None],
) -> bool:
    """Report on a checkpoint; whether some lines or measurements failed."""
    find_folder(name, revision)  # before PyTorch comes
    specs = tuple(AdapterSpec.parse(adapter) for adapter in adapters)
    for spec in specs:
        spec.check()
    pairs, _, _ = asked
    sets, bad = _queries(*asked)
    from m0kit_parity.evaluate.checkpoint import Checkpoint, Work, evaluate_checkpoint, sets_key_of

    if pairs is None:
        say("note: the built-in queries are those that the small checkpoint was made for; --pairs takes your own")
        key = f"{options['about']['pairs']} of m0kit {version('m0kit')}"
    else:
        key = sets_key_of(pairs, sets[pairs.name])
    with Work.open(folder) as work:
        told = evaluate_checkpoint(
            work, Checkpoint(name, specs, revision), precisions, sets, key,
            loads=builtin_workloads if pairs is None else None, bad=bad, with_blame=with_blame, **options,
        )  # fmt: skip
        report(told.evaluation, told.notes, told.blamed if with_blame else None, told.activations)
        work.finish()
    return bool(told.evaluation.errors)


def _place_and_reason(error: str) -> tuple[str, str]:
    """The two parts of a message, so that one that many lines have is told once."""
    parts = re.fullmatch(r"(.*?line \d+(?:, document \d+)?): (.*)", error, re.DOTALL)
    return (parts[1], parts[2]) if parts else ("", error)
