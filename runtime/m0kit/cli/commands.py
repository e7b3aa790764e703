"""The `m0kit` command: rerank, score, inspect, and whatever the other folders add through entry points.

Results go to stdout, everything else to stderr. Exit codes: 0 all well · 1 an error, a check that failed, or no input
at all could be scored · 2 wrong usage · 3 some inputs could not be scored, the others were · 130 interrupted ·
143 terminated. An input that holds nothing is well, and said.
Every option is also read from the environment: `m0kit rerank --device` from M0KIT_RERANK_DEVICE.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import click

from m0kit.artifact.answers import summary
from m0kit.artifact.manifest import read_manifest, read_signed, verify_files
from m0kit.artifact.ports import GRAPHS
from m0kit.artifact.signature import REQUIRE, SIGNATURE
from m0kit.artifact.signature import sign as sign_manifest
from m0kit.cli.bundle import bundle_command
from m0kit.cli.doctor import answers_here, doctor
from m0kit.cli.documents import STDIN, Pages, find, survey
from m0kit.cli.index import index, read_ids
from m0kit.cli.options import (
    ARTIFACT,
    DOCUMENTS,
    JSON,
    SIZE,
    exit_code,
    loading,
    open_reranker,
    require_pixels,
    require_place,
    tell,
)
from m0kit.cli.page import small
from m0kit.cli.page import write as write_page
from m0kit.cli.ranking import made_by, ranking_page
from m0kit.cli.serve import serve
from m0kit.errors import DeviceLostError, InputError
from m0kit.jobs.parquet import is_parquet
from m0kit.jobs.rows import read_lines
from m0kit.plain import plain
from m0kit.reading.formats import read as read_file
from m0kit.reading.inputs import parse_content
from m0kit.reading.pdf import PdfPage
from m0kit.reranker import Reranker, best_first
from m0kit.scoring.schedule import Result
from m0kit.terminal import DEBUG, run, say, show, show_json


class _Commands(click.Group):
    """Our own commands and those of the entry-point group; theirs import what is heavy when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._found()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self._found().get(cmd_name)
        if found is None:
            return super().get_command(ctx, cmd_name)
        command: click.Command = found.load()
        return command

    @staticmethod
    def _found() -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group="m0kit.commands")}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="m0kit")
@click.option("--debug", is_flag=True, help="Show where in the code an error came from.")
@click.option(
    "--require-signature",
    type=click.Path(),
    metavar="SIGNERS",
    help="Open no artifact but those signed by one of the file SIGNERS (ssh-keygen(1), ALLOWED SIGNERS).",
)
def cli(debug: bool, require_signature: str | None) -> None:
    """Export jina-reranker-m0 to ONNX, score with it without PyTorch, prove it equal."""
    if debug:
        os.environ[DEBUG] = "1"  # for processes that this one starts as well
    if require_signature:
        os.environ[REQUIRE] = os.path.abspath(require_signature)  # likewise


def main() -> None:
    """Entry point of the console script: errors become one line and an exit code."""
    sys.exit(run(lambda: cli.main(standalone_mode=False, auto_envvar_prefix="M0KIT")))


_INDEX = click.option(
    "--index",
    "index_folder",
    type=click.Path(path_type=Path),
    help="What this index holds is not read again.",
)
_MOST_ERRORS = 20  # different ones on stderr; stdout has each
_RAW = click.option("--raw", is_flag=True, help="Print logits instead of scores between 0 and 1.")
_STRICT = click.option("--strict", is_flag=True, help="Stop at the first input that cannot be scored.")


@cli.command()
@ARTIFACT
@DOCUMENTS
@click.option("--query", help="The query as text.")
@click.option("--query-image", type=click.Path(path_type=Path), help="The query as an image file.")
@click.option("--top-n", type=click.IntRange(1), help="Print the best N only.")
@_INDEX
@click.option("--candidates", type=click.File("rb"), help="Ids of documents of the index, one per line.")
@_RAW
@_STRICT
@JSON
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write the ranking as one page.")
@loading
@click.pass_context
def rerank(
    ctx: click.Context,
    artifact: Path,
    documents: tuple[str, ...],
    query: str | None,
    query_image: Path | None,
    top_n: int | None,
    index_folder: Path | None,
    candidates: Any,
    raw: bool,
    strict: bool,
    as_json: bool,
    html: Path | None,
    load: dict[str, Any],
) -> None:
    """Order DOCUMENTS by their relevance to a query, best first.

    A document is a text file (UTF-8), an image or a page of a PDF; a folder or a pattern in quotes stands for those in
    it, `-` for one from stdin. A file of JSON lines (.jsonl, .ndjson) holds one a line, {"id": …, "text": …} or {"id":
    …, "image": …}; page 3 of a PDF is called paper.pdf#page=3. With --index documents that were read before cost their
    queries only: the CANDIDATES, or all of the index where neither those nor DOCUMENTS are given.
    """
    if (query is None) == (query_image is None):
        raise click.UsageError("Give either --query or --query-image.")
    if candidates is not None and index_folder is None:
        raise click.UsageError("--candidates are ids of an index: give --index too.")
    if candidates is not None and candidates.name == "<stdin>" and STDIN in documents:
        raise click.UsageError("Stdin can be a document, or --candidates, not both.")
    if not documents and index_folder is None:
        raise click.UsageError("Give documents, or --index.")
    require_place(html)
    asked = query if query_image is None else read_file(query_image)
    if query_image is not None and isinstance(asked, str):
        raise InputError(f"--query-image: {query_image}: holds text. Give that with --query.")
    parse_content(asked, "--query")
    passed: list[tuple[str, str]] = []
    found = list(survey(find(documents), passed))
    tell("note", passed)
    if candidates is not None:
        found += [(name, error or {"id": name}, name) for name, error in read_ids(candidates)]
    elif documents and not found:
        raise InputError("none of the documents is text or an image.")
    reranker = open_reranker(artifact, load, index=index_folder)
    if reranker.store is not None and candidates is None and not documents:
        found = [(name, {"id": name}, name) for name in reranker.store.ids()]
    given: list[tuple[str, Any]] = []  # with what a page of the ranking shows of it
    places: list[str] = []

    def pairs() -> Iterator[Any]:
        for one in found:
            for name, content, source in one[1].documents() if isinstance(one[1], Pages) else [one]:
                shown = content if not isinstance(content, PdfPage) else None if html is None else small(content)
                given.append((name, shown))
                place = name if source in ("", name) else f"{source}: {name}"
                places.append(plain(click.format_filename(place)))
                yield content if isinstance(content, InputError) else (asked, content)

    has_pages = any(isinstance(content, Pages) for _, content, _ in found)
    results = _evaluate(reranker, pairs() if has_pages else list(pairs()), places, strict)
    names = [plain(click.format_filename(name)) for name, _ in given]
    values = [result.logit if raw else result.score for result in results]
    order = best_first([result.logit for result in results])[:top_n]
    for rank, i in enumerate(order):
        error = results[i].error
        if as_json:  # escaped, because names of files may hold what UTF-8 cannot write
            line: dict[str, Any] = {"rank": rank + 1, "index": i, "document": given[i][0]}
            line |= {"error": str(error)} if error else {"score": values[i]}
            show_json(line)
        else:
            show(f"{'  error' if error else f'{values[i]:7.4f}'}  {names[i]}")
    if html is not None:
        settings = {**load, "index": str(index_folder) if index_folder else None}
        contents = [(name, content) for name, (_, content) in zip(names, given, strict=True)]
        write_page(html, ranking_page(asked, contents, results, order, made_by(artifact, reranker.manifest, settings)))
    ctx.exit(exit_code(sum(result.error is not None for result in results), len(results)))


@cli.command()
@ARTIFACT
@click.argument("pairs", type=click.Path(exists=True, dir_okay=False, allow_dash=True), default=STDIN)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the scores to a file: .jsonl or .parquet.")
@click.option("--overwrite", is_flag=True, help="With -o: replace the file, and what another job left half done.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="With -o: score in this process, or on the cluster at RAY_ADDRESS, or one started here.",
)
@click.option(
    "--workers", type=click.IntRange(1, 10_000), help="Actors of --engine ray; by default one for each GPU, or 1."
)
@_INDEX
@click.option(
    "--cache",
    "cache_bytes",
    type=SIZE,
    default=0,
    help="Memory to keep documents in that come again: 2G. Of a GPU's pool all by default.",
)
@_RAW
@_STRICT
@loading
@click.pass_context
def score(
    ctx: click.Context,
    artifact: Path,
    pairs: str,
    output: Path | None,
    overwrite: bool,
    engine: Literal["local", "ray"],
    workers: int | None,
    index_folder: Path | None,
    cache_bytes: int,
    raw: bool,
    strict: bool,
    load: dict[str, Any],
) -> None:
    """Score PAIRS, JSON lines from a file or stdin; prints one JSON line for each.

    A line is {"query": …, "document": …}, each a string (text), {"text": …} or {"image": …}, where an
    image is a data URI, the path of a file, relative to the file of PAIRS, or base64. An "id" is carried through,
    null is absent, other keys are ignored. What is printed for a line is {"score": …} or {"error": …}.

    With -o PAIRS may be of any size, and Parquet (.parquet) with such columns. The file
    has a row for each: row, id, score, logit, truncated, error. Bad rows are also listed in OUTPUT.errors.jsonl.
    Stopped by whatever, even a kill, the same command goes on where it was.
    """
    if output is not None:
        if raw:
            raise click.UsageError("--raw is for output on the terminal; a file of scores has the logits too.")
        if workers is not None and engine != "ray":
            raise click.UsageError("--workers is an option of --engine ray.")
        load |= {"index": str(index_folder) if index_folder else None, "cache_bytes": cache_bytes}
        ctx.exit(_score_file(artifact, pairs, output, load, engine, workers, overwrite=overwrite, strict=strict))
    if overwrite or engine != "local" or workers is not None:
        raise click.UsageError("--overwrite, --engine and --workers need -o.")
    is_file = pairs != STDIN
    if is_file and is_parquet(Path(pairs)):
        raise click.UsageError("Parquet needs -o.")
    folder, place = (Path(pairs).parent, f"{pairs}: ") if is_file else (Path(), "")
    with click.open_file(pairs, "rb") as file:  # which may be a pipe
        rows = list(read_lines(cast(BinaryIO, file), folder, pairs if is_file else "<stdin>"))
    values = [InputError(f"{place}{row.error}") if row.error else row.pair for row in rows]
    reranker = open_reranker(artifact, load, index=index_folder, cache_bytes=cache_bytes)
    results = _evaluate(reranker, values, [plain(f"{place}{row.place}") for row in rows], strict)
    for row, result in zip(rows, results, strict=True):
        line = {} if row.id is None else {"id": json.loads(row.id)}
        line |= {"error": str(result.error)} if result.error else {"score": result.logit if raw else result.score}
        show_json(line)
    ctx.exit(exit_code(sum(result.error is not None for result in results), len(results)))


def _score_file(
    artifact: Path, pairs: str, output: Path, load: dict[str, Any], engine: str, workers: int | None, **options: bool
) -> int:
    """The exit code of `score -o`, with so many actors of Ray, or in this process."""
    from m0kit.jobs.engine import local_engine
    from m0kit.jobs.job import score_file
    from m0kit.jobs.ray_engine import ray_engine

    if pairs == STDIN:
        raise click.UsageError("-o needs a file of PAIRS: stdin could not be read again after an interruption.")
    require_pixels(artifact, load["max_pixels"])

    def stop(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)  # so that what is done is committed
    try:
        scored = ray_engine(workers) if engine == "ray" else local_engine
        done = score_file(artifact, pairs, output, load=load, engine=scored, progress=True, **options)
    except (KeyboardInterrupt, SystemExit, DeviceLostError):
        say(f"{output}: not finished; the same command goes on with it")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    told = f"{output}: {done.rows} rows" + (f", {done.resumed} of them from before" if done.resumed else "")
    told += f", {done.truncated} cut to the model's length" if done.truncated else ""
    told += f", {done.errors} could not be scored: see {done.error_file}" if done.errors else ""
    say(told)
    return exit_code(done.errors, done.rows)


cli.add_command(bundle_command)
cli.add_command(doctor)
cli.add_command(index)
cli.add_command(serve)


@cli.command()
@ARTIFACT
@click.option("--verify", is_flag=True, help="Also check every file against its hash, and score the known answers.")
@JSON
def inspect(artifact: Path, verify: bool, as_json: bool) -> None:
    """Show what an artifact is, what it was made from, and under which licence its weights stand."""
    manifest, signed_by = read_signed(artifact)
    if verify:
        verify_files(artifact, manifest)
        answers = answers_here(artifact, manifest)
    if as_json:
        facts = {
            "artifact": str(artifact),
            "scheme": manifest.scheme,
            "recipe": dict(manifest.recipe),
            "bytes": manifest.num_bytes,
            "fingerprint": manifest.fingerprint,
            "licence": manifest.licence,
            "model": manifest.model.to_dict(),
            "provenance": dict(manifest.provenance),
            "graphs": {name: asdict(ports) for name, ports in manifest.graphs.items()},
            "runs": {which: dict(graphs) for which, graphs in manifest.runs.items()},
        }
        if verify:
            facts["answers"] = [asdict(answer) for answer in answers]
        show_json(facts)
        return
    decoder, vision, image = manifest.model.decoder, manifest.model.vision, manifest.model.image
    sets = [f"on {which} {', '.join(own.values())}" for which, own in manifest.runs.items()]
    adapters = ", ".join(_adapter(a) for a in manifest.provenance.get("adapters", [])) or "none"
    rows = [
        ("artifact", f"{artifact}: {manifest.num_bytes / 2**20:.1f} MiB, {manifest.scheme}"),
        ("weights", ", ".join(f"{rule['match']} {rule['scheme']}" for rule in manifest.recipe["weights"])),
        ("base", manifest.provenance.get("base")),
        ("adapters", adapters),
        ("licence", manifest.licence),
        ("decoder", f"{decoder.num_layers} layers of width {decoder.hidden_size}, {decoder.vocab_size} tokens"),
        ("vision", f"{vision.depth} blocks of width {vision.width}"),
        ("images", f"{image.min_pixels}–{image.max_pixels} pixels"),
        ("prompt", f"up to {manifest.model.prompt.max_length} tokens"),
        ("graphs", "; ".join([", ".join(GRAPHS), *sets])),
        ("fingerprint", manifest.fingerprint),
    ]
    if signed_by is not None:
        rows.append(("signed by", signed_by))
    if verify:
        rows.append(("files", f"{len(manifest.files)} checked, all as exported"))
        rows.append(("answers", summary(answers)))
    for name, value in rows:
        show(f"{name:12} {value}")


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path),
    help="A private key of OpenSSH, or a public one whose private key the agent or a token holds.",
)
def sign(artifact: Path, key: Path) -> None:
    """Sign ARTIFACT, a folder, with a key of OpenSSH, once all its files are as exported.

    The signature is manifest.json.sig, over the manifest, which holds the hash of every file. --require-signature
    before any command, or M0KIT_REQUIRE_SIGNATURE, opens artifacts with a trusted one alone.
    """
    verify_files(artifact, read_manifest(artifact, require_signature=False))
    sign_manifest(artifact, key, say)
    say(f"{artifact / SIGNATURE}: written. Whoever trusts the key opens it with --require-signature.")


def _adapter(entry: dict[str, Any]) -> str:
    """Name and weight as they were merged, and the adapter's own licence where it states one."""
    weight = "" if entry.get("weight") == 1 else f" × {entry.get('weight')}"
    return f"{entry.get('name')}{weight}" + (f" ({entry['licence']})" if entry.get("licence") else "")


def _evaluate(
    reranker: Reranker, pairs: list[Any] | Iterator[Any], places: Sequence[str], strict: bool
) -> list[Result]:
    """The results of pairs; one that could not be read is the error in its place. Messages begin with the places.

    Those are plain, as messages are. Pairs of an iterator are read as they are run, and each has its place by then.
    """
    results: list[Result] = []
    readable: list[int] = []

    def read() -> Iterator[Any]:
        for i, pair in enumerate(pairs):
            is_bad = isinstance(pair, InputError)
            if is_bad and strict:
                raise pair
            results.append(Result(math.nan, math.nan, pair if is_bad else None))
            if not is_bad:
                readable.append(i)
                yield pair

    try:
        these = list(read()) if isinstance(pairs, list) else read()
        on_error: Literal["raise", "mark"] = "raise" if strict else "mark"
        for position, result in reranker.stream(these, on_error=on_error, progress=sys.stderr.isatty()):
            i = readable[position]
            results[i] = replace(result, error=_placed(places[i], result.error)) if result.error else result
    except InputError as error:
        raise error if error.pair is None else _placed(places[readable[error.pair]], error) from None
    told = list(zip(places, results, strict=True))
    errors = [(place, str(result.error).removeprefix(f"{place}: ")) for place, result in told if result.error]
    tell("error", errors, most=_MOST_ERRORS)
    tell("note", ((p, f"the {what} was too long and was cut") for p, result in told for what in result.truncated))
    return results


def _placed(place: str, error: InputError) -> InputError:
    """The error with a place that the user knows, once, for a position in a call."""
    own = error.said.removeprefix("document: ")
    return type(error)(own if own.startswith(f"{place}: ") else f"{place}: {error.said}")
