"""`m0kit evaluate`: artifacts of one model side by side, how well each ranks and what it costs. Owns the command line.

    m0kit evaluate m0-fp32 m0-int8 m0-int4 --pairs judged.jsonl --html report.html

Exit codes: 0 all well, 3 some lines or measurements failed and the others are reported; others as for every command.
"""

import re
from pathlib import Path

import click

from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import read_manifest
from m0kit.artifact.ports import Kept
from m0kit.cli.options import JSON, PARTLY, require_place, tell
from m0kit.cli.page import write as write_page
from m0kit.errors import InputError
from m0kit.machine.detect import describe
from m0kit.terminal import say, show_json, show_text
from m0kit_parity.bench.options import PACKAGES, THREADS
from m0kit_parity.evaluate.compare import VISUAL_TOKENS, builtin_workloads, check_same_model, compare
from m0kit_parity.evaluate.judged import Query, builtin_sets, read_judged
from m0kit_parity.evaluate.render import to_html, to_json, to_text


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Your own queries and documents, JSON lines, judged or not; the small checkpoint's sets by default.",
)
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
@click.option("--no-speed", is_flag=True, help="Do not measure seconds.")
@click.option("--strict", is_flag=True, help="Stop at the first line or measurement that fails.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    artifacts: tuple[str, ...],
    pairs: Path | None,
    kvs: tuple[Kept, ...],
    as_json: bool,
    html: Path | None,
    threads: int,
    repeats: int,
    no_speed: bool,
    strict: bool,
) -> None:
    """Compare artifacts of one model: ranking quality, bytes, memory, seconds. The first one is the baseline.

    ARTIFACTs are folders or hub ids, org/name or org/name@revision.

    A line of PAIRS is {"query": …, "documents": […], "relevance": […]}, query and documents each a string (text),
    {"text": …} or {"image": …} with a path relative to the file. Without "relevance", quality is agreement with
    the baseline.
    """
    require_place(html)
    folders = [resolve(artifact, what="artifact") for artifact in artifacts]
    manifests = [read_manifest(folder) for folder in folders]
    check_same_model(folders, manifests)
    sets: dict[str, list[Query]]
    bad: dict[str, str] = {}
    loads, max_pixels = None, None  # the file's own pairs
    if pairs is None:
        image = manifests[0].model.image
        sets, loads = builtin_sets(), builtin_workloads(folders[0])
        max_pixels = max(image.max_pixels, VISUAL_TOKENS * image.factor**2)
    else:
        queries, bad = read_judged(pairs)
        if bad and strict:
            raise InputError(next(iter(bad.values())))
        sets = {pairs.name: queries}
    about = {**describe(*PACKAGES), "threads": threads, "repeats": repeats, "pairs": str(pairs or "built-in sets")}
    evaluation, notes = compare(
        folders, sets, loads, threads=threads, repeats=repeats, speed=not no_speed, max_pixels=max_pixels,
        strict=strict, about=about, bad=list(bad.values()), kvs=kvs,
    )  # fmt: skip
    say(*(f"note: {note}" for note in notes))
    tell("error", map(_place_and_reason, evaluation.errors))
    if html:
        write_page(html, to_html(evaluation))
    if as_json:
        show_json(to_json(evaluation))
    else:
        show_text(to_text(evaluation))
    ctx.exit(PARTLY if evaluation.errors else 0)


def _place_and_reason(error: str) -> tuple[str, str]:
    """The two parts of a message, so that one that many lines have is told once."""
    parts = re.fullmatch(r"(.*?line \d+(?:, document \d+)?): (.*)", error, re.DOTALL)
    return (parts[1], parts[2]) if parts else ("", error)
