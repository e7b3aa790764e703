"""`m0kit bench`: what scoring costs here, in time and memory, and what an artifact's ranking is worth.

Owns the command lines. Time is compared with transformers as a ratio, both sides taking turns in one run, because
machines are noisy and differ; nothing here passes or fails.

    m0kit bench pairs                   whole pairs against transformers fp32 on full-width layers, every precision
    m0kit bench growth m0-fp32          seconds as pairs, tokens and pixels grow
    m0kit bench memory m0-fp32          peak memory as tokens and pixels grow, a fresh process for each
    m0kit bench ranking m0-fp32         nDCG@10 on the evaluation set that m0kit carries
    m0kit bench reuse m0-int8           what keeping documents is worth
    m0kit bench store                   adds a second by the number of records an index holds
    m0kit bench serve m0-int8           latency against offered load, and more of a server: `load.commands`
    m0kit bench cluster m0-int8         several servers behind nginx, asked by document or in turn
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from m0kit.artifact.manifest import read_manifest
from m0kit.artifact.ports import KV, Kept
from m0kit.cli.options import ARTIFACT, JSON, PARTLY, require_place
from m0kit.machine.detect import describe
from m0kit.precision import SCHEMES
from m0kit.terminal import show_json, show_text
from m0kit_parity.bench import growth as growing
from m0kit_parity.bench import ranking as ranked
from m0kit_parity.bench.adding import adding, adding_table
from m0kit_parity.bench.cluster import Plan, cluster_table
from m0kit_parity.bench.cluster import cluster as measure_cluster
from m0kit_parity.bench.load.commands import COMMANDS
from m0kit_parity.bench.options import PACKAGES, PEERS, PLOT, THREADS, require_packages
from m0kit_parity.bench.pairs import Missing, pairs_table, whole_pairs
from m0kit_parity.bench.reuse import PARTS, reuse_parts
from m0kit_parity.bench.reuse_results import charts, tables
from m0kit_parity.bench.telling import tell
from m0kit_parity.bench.workloads import prompts_of, workloads
from m0kit_parity.drawing.plot import write_plot
from m0kit_parity.drawing.table import table


@click.group()
def bench() -> None:
    """Measure scoring on this machine: time, memory, ranking."""


@bench.command()
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(SCHEMES),
    default=("fp32", "int8", "int4"),
    show_default=True,
    help="Repeatable.",
)
@click.option("--peer", "peer_names", multiple=True, type=click.Choice(list(PEERS)), help="Repeatable.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Decoder layers, vision blocks.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--only", multiple=True, metavar="TEXT", help="Only workloads whose name holds TEXT; repeatable.")
@THREADS
@JSON
@click.pass_context
def pairs(
    ctx: click.Context, precisions: tuple[str, ...], peer_names: tuple[str, ...], layers: int, repeats: int,
    only: tuple[str, ...], threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Whole pairs against transformers fp32 (sdpa, as many threads) on full-width layers with random weights.

    A whole pair is everything between the call and the score: decoding and preparing the image,
    tokenising, all graphs. transformers' side is the published scoring call, batches of 8 padded on the left.
    All sides take turns in one run, each in a process of its own, which takes the time itself. One that crashes costs
    the others nothing: the table says so, and the exit code is 3.
    """
    require_packages(peer_names)
    import torch

    from m0kit_export.export import export_artifact
    from m0kit_parity.samples.checkpoints import write_checkpoint
    from m0kit_quant.recipe import Recipe

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="m0kit-bench-") as temporary:
        root = Path(temporary)
        write_checkpoint(root / "wide", "wide", num_layers=layers, vision_depth=layers, progress=True)
        artifacts = {precision: root / precision for precision in precisions}
        for precision, artifact in artifacts.items():
            export_artifact(root / "wide", artifact, recipe=Recipe.default(precision))
        loads = workloads(prompts_of(root / precisions[0]), only)
        results = whole_pairs(
            root / "wide", artifacts, loads, peers=peer_names, repeats=repeats, threads=threads, scratch=root / "peers"
        )
    about = {**describe(*PACKAGES), "threads": threads, "layers": layers, "repeats": repeats}
    notes = dict.fromkeys(r.error for r in results if isinstance(r, Missing))
    tell(about, {"results": [asdict(r) for r in results]}, [pairs_table(results)], as_json, notes)
    ctx.exit(PARTLY if notes else 0)


@bench.command()
@ARTIFACT
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--max-tokens", type=click.IntRange(64), default=4096, show_default=True)
@click.option("--max-visual-tokens", type=click.IntRange(64), default=768, show_default=True)
@THREADS
@PLOT
@JSON
def growth(
    artifact: Path, repeats: int, max_tokens: int, max_visual_tokens: int, threads: int, plot_file: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Seconds as the work grows: pairs of one length, tokens of one pair, visual tokens of one page."""
    require_place(plot_file)
    measured = growing.seconds(
        artifact, max_tokens=max_tokens, max_visual_tokens=max_visual_tokens, repeats=repeats, threads=threads
    )
    if plot_file:
        write_plot(plot_file, growing.seconds_charts(measured))
    about = {**describe(*PACKAGES), "threads": threads, "artifact": str(artifact), "repeats": repeats}
    tell(about, {"seconds": measured}, growing.seconds_tables(measured), as_json)


@bench.command()
@ARTIFACT
@click.option("--max-tokens", type=click.IntRange(64), default=10_240, show_default=True)
@click.option("--max-visual-tokens", type=click.IntRange(64), default=3072, show_default=True)
@click.option("--memory", "mode", type=click.Choice(["fast", "low"]), default="fast", show_default=True)
@THREADS
@PLOT
@JSON
@click.pass_context
def memory(
    ctx: click.Context, artifact: Path, max_tokens: int, max_visual_tokens: int, mode: str, threads: int,
    plot_file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Peak memory of one pair as its tokens, or its page's pixels, grow.

    `private` is what scoring itself needs; the rest of the peak are weights mapped from the artifact,
    which the system takes back when memory is short. Linux only: it reads /proc.
    """
    require_place(plot_file)
    measured, failed = growing.memory(
        artifact, max_tokens=max_tokens, max_visual_tokens=max_visual_tokens, mode=mode, threads=threads
    )
    if plot_file:
        write_plot(plot_file, growing.memory_charts(measured))
    about = {**describe(*PACKAGES), "threads": threads, "memory": mode, "artifact": str(artifact)}
    notes = dict.fromkeys(error for errors in failed.values() for error in errors.values())
    facts = {"mebibytes": measured, "failed": failed}
    tell(about, facts, growing.memory_tables(measured, failed), as_json, notes)
    ctx.exit(PARTLY if notes else 0)


@bench.command()
@ARTIFACT
@THREADS
@JSON
def ranking(artifact: Path, threads: int, as_json: bool) -> None:
    """nDCG@10 on the evaluation set that m0kit carries, for artifacts of the small checkpoint."""
    results = ranked.ranking(artifact, threads)
    if as_json:
        show_json(results)
    else:
        show_text(table(ranked.ranking_table(results)))


@bench.command()
@ARTIFACT
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Of the artifact: `cached` then also takes transformers fp32.",
)
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Repeatable; by default all parts but many.")
@click.option("--kv", type=click.Choice(KV), default="fp16", show_default=True)
@click.option("--documents", type=click.IntRange(1), default=16, show_default=True, help="Kept, indexed, in the cache.")
@click.option("--pages", type=click.IntRange(1), default=100, show_default=True, help="Of the index on disk.")
@click.option("--max-tokens", type=click.IntRange(64), default=4096, show_default=True, help="Of a document.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--page-repeats", type=click.IntRange(1), default=1, show_default=True, help="Of pages computed anew.")
@click.option("--tmp", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where indexes are made.")
@THREADS
@PLOT
@JSON
def reuse(
    artifact: Path, checkpoint: Path | None, only: tuple[str, ...], kv: Kept, documents: int, pages: int,
    max_tokens: int, repeats: int, page_repeats: int, tmp: Path | None, threads: int, plot_file: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """What it is worth to read a document once: cached, from disk, as things grow.

    Documents are texts and pages of 768 tokens, or of --max-tokens where that is less. Only one of each kind is
    computed; the others get copies of its state, because what they cost depends on sizes alone. `many` scores
    100,000 pairs and is meant for a small checkpoint.
    """
    chosen = [part for part in PARTS if (part in only if only else part != "many")]
    if plot_file and not set(chosen) & {"cached", "growth", "many"}:
        raise click.UsageError(f"--plot: {' and '.join(chosen)} have nothing to draw. Add cached, growth or many.")
    require_place(plot_file)
    results = reuse_parts(
        artifact, chosen, checkpoint=checkpoint, kv=kv, documents=documents, pages=pages, max_tokens=max_tokens,
        repeats=repeats, page_repeats=page_repeats, tmp=tmp, threads=threads,
    )  # fmt: skip
    if plot_file:
        write_plot(plot_file, charts(results))
    about = {**describe(*PACKAGES), "threads": threads, "artifact": str(artifact), "kv": kv, "repeats": repeats}
    facts = {part: [asdict(r) for r in found] if part == "cached" else asdict(found) for part, found in results.items()}
    tell(about, facts, tables(results), as_json)


@bench.command("store")
@click.option("--max-records", type=click.IntRange(1000), default=100_000, show_default=True)
@click.option(
    "--adds", type=click.IntRange(1), default=2000, show_default=True, help="Timed at each number of records."
)
@JSON
def store_command(max_records: int, adds: int, as_json: bool) -> None:
    """Adds a second by the number of records a store holds, without a limit and with one that is always hit.

    A million records take 5 GB in the folder for temporary files (TMPDIR).
    """
    found = adding(max_records, adds)
    if as_json:
        show_json([asdict(one) for one in found])
    else:
        show_text(table(adding_table(found)))


@bench.command("cluster")
@ARTIFACT
@click.option("--servers", type=click.IntRange(2), default=Plan.servers, show_default=True)
@click.option("--sets", type=click.IntRange(1), default=Plan.sets, show_default=True, help="Sets of documents.")
@click.option("--documents", type=click.IntRange(1), default=Plan.documents, show_default=True, help="Of a set.")
@click.option("--tokens", type=click.IntRange(32), default=Plan.tokens, show_default=True, help="Of a document.")
@click.option("--passes", type=click.IntRange(1), default=Plan.passes, show_default=True, help="Through all sets.")
@click.option("--clients", type=click.IntRange(1), default=Plan.clients, show_default=True, help="That ask at a time.")
@click.option(
    "--room", type=click.FloatRange(0, min_open=True), default=Plan.room, show_default=True,
    help="A server's cache, as a part of what all documents take.",
)  # fmt: skip
@JSON
def cluster_command(artifact: Path, as_json: bool, **plan: Any) -> None:
    """Servers of one thread behind nginx on this machine: how often a document is found read, and how fast that is.

    First one server with room for all, then several whose caches hold a part: with requests sent by document, and in
    turn. At last one of them is stopped. What is found read does not depend on the machine; the speed does.
    """
    read_manifest(artifact)  # what is wrong with it is said before that nginx is missing
    passes = list(measure_cluster(artifact, Plan(**plan)))
    about = {**describe(), "artifact": str(artifact), **plan}
    tell(about, {"passes": [asdict(each) for each in passes]}, [cluster_table(passes)], as_json)


for _command in COMMANDS:
    bench.add_command(_command)
