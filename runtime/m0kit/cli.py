"""The `m0kit` command: rerank, score, inspect, and whatever the other folders add through entry points.

Results go to stdout, everything else to stderr. Exit codes: 0 all well · 1 an error, or a check that
failed · 2 wrong usage · 3 some inputs could not be scored, the others were · 130 interrupted · 143 terminated.
Every option is also read from the environment: `m0kit rerank --device` from M0KIT_RERANK_DEVICE.
"""

import json
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

import click

from m0kit.answers import summary
from m0kit.artifact import read_manifest, verify_files
from m0kit.cli_options import ARTIFACT, DEVICE, JSON, MEMORY, PARTLY, PIXELS, SIZE, THREADS, text_or_path
from m0kit.cli_options import load as load_reranker
from m0kit.doctor import answers_here, doctor
from m0kit.errors import InputError, M0kitError
from m0kit.index import index, read_ids
from m0kit.inputs import beside
from m0kit.reranker import Reranker, Result


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
def cli() -> None:
    """Export jina-reranker-m0 to ONNX, score with it without PyTorch, prove it equal."""


def main() -> None:
    """Entry point of the console script: errors become one line and an exit code."""
    try:
        code = cli.main(standalone_mode=False, auto_envvar_prefix="M0KIT")
    except M0kitError as error:
        click.echo(f"error: {error}", err=True)
        code = 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("m0kit"):
            raise
        click.echo(f"error: this command needs {error.name}. pip install 'm0kit[export]'", err=True)
        code = 1
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; Python would complain about it at exit
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


_INDEX = click.option(
    "--index",
    "index_folder",
    type=click.Path(path_type=Path),
    help="What this index holds is not read again.",
)
_RAW = click.option("--raw", is_flag=True, help="Print logits instead of scores between 0 and 1.")
_STRICT = click.option("--strict", is_flag=True, help="Stop at the first input that cannot be scored.")


@cli.command()
@ARTIFACT
@click.argument("documents", nargs=-1, type=click.Path(path_type=Path))
@click.option("--query", help="The query as text.")
@click.option("--query-image", type=click.Path(path_type=Path), help="The query as an image file.")
@click.option("--top-n", "--top", type=click.IntRange(1), help="Print the best N only.")
@_INDEX
@click.option("--candidates", type=click.File(encoding="utf-8"), help="Ids of documents of the index, one per line.")
@_RAW
@_STRICT
@JSON
@DEVICE
@THREADS
@MEMORY
@PIXELS
@click.pass_context
def rerank(
    ctx: click.Context,
    artifact: Path,
    documents: tuple[Path, ...],
    query: str | None,
    query_image: Path | None,
    top_n: int | None,
    index_folder: Path | None,
    candidates: Any,
    raw: bool,
    strict: bool,
    as_json: bool,
    device: str,
    threads: int | None,
    memory: Literal["fast", "low"],
    max_pixels: int | None,
) -> None:
    """Order DOCUMENTS, files, by their relevance to a query, best first.

    A file that is valid UTF-8 is a text document, any other is opened as an image. With --index documents that were
    read before cost their queries only: the CANDIDATES, or all of the index where neither those nor files are given.
    """
    if (query is None) == (query_image is None):
        raise click.UsageError("Give either --query or --query-image.")
    if candidates is not None and index_folder is None:
        raise click.UsageError("--candidates are ids of an index: give --index too.")
    if not documents and index_folder is None:
        raise click.UsageError("Give documents, or --index.")
    ids = read_ids(candidates) if candidates is not None else []
    reranker = load_reranker(artifact, device, threads, memory, max_pixels, index=index_folder)
    if reranker.store is not None and candidates is None and not documents:
        ids = reranker.store.ids()
    names = [*(click.format_filename(path) for path in documents), *ids]
    plain = [*map(str, documents), *ids]
    asked = query_image if query is None else query
    contents = [*(text_or_path(path) for path in documents), *({"id": name} for name in ids)]
    results = _evaluate(reranker, [(asked, content) for content in contents], names, strict)
    values = [result.logit if raw else result.score for result in results]
    order = sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i], i))
    for rank, i in enumerate(order[:top_n]):
        error = results[i].error
        if as_json:  # escaped, because names of files may hold what UTF-8 cannot write
            line: dict[str, Any] = {"rank": rank + 1, "index": i, "document": plain[i]}
            line |= {"error": str(error)} if error else {"score": values[i]}
            click.echo(json.dumps(line))
        else:
            click.echo(f"{'  error' if error else f'{values[i]:7.4f}'}  {names[i]}")
    ctx.exit(PARTLY if any(result.error for result in results) else 0)


@cli.command()
@ARTIFACT
@click.argument("pairs", type=click.File(encoding="utf-8"), default="-")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the scores to a file: .jsonl or .parquet.")
@click.option("--overwrite", is_flag=True, help="With -o: replace the file, and what another job left half done.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="With -o: score in this process, or on the cluster at RAY_ADDRESS, or one started here.",
)
@click.option("--workers", type=click.IntRange(1), help="Actors of --engine ray; 1 by default.")
@_INDEX
@click.option("--cache", "cache_bytes", type=SIZE, default=0, help="Memory to keep documents in that come again: 2G.")
@_RAW
@_STRICT
@DEVICE
@THREADS
@MEMORY
@PIXELS
@click.pass_context
def score(
    ctx: click.Context,
    artifact: Path,
    pairs: Any,
    output: Path | None,
    overwrite: bool,
    engine: Literal["local", "ray"],
    workers: int | None,
    index_folder: Path | None,
    cache_bytes: int,
    raw: bool,
    strict: bool,
    device: str,
    threads: int | None,
    memory: Literal["fast", "low"],
    max_pixels: int | None,
) -> None:
    """Score PAIRS, JSON lines from a file or stdin; prints one JSON line for each.

    A line is {"query": …, "document": …}, each a string (text), {"text": …} or {"image": …}, where an
    image is a data URI or the path of a file, relative to the file of PAIRS.

    With -o PAIRS may be of any size, and Parquet (.parquet) with such columns; an id is carried through. The file
    has a row for each: row, id, score, logit, truncated, error. Bad rows are also listed in OUTPUT.errors.jsonl.
    Stopped by whatever, even a kill, the same command goes on where it was.
    """
    if output is not None:
        if raw:
            raise click.UsageError("--raw is for output on the terminal; a file of scores has the logits too.")
        if workers is not None and engine != "ray":
            raise click.UsageError("--workers is an option of --engine ray.")
        load = {"device": device, "threads": threads, "memory": memory, "max_pixels": max_pixels}
        load |= {"index": str(index_folder) if index_folder else None, "cache_bytes": cache_bytes}
        ctx.exit(_score_file(artifact, pairs, output, load, engine, workers or 1, overwrite, strict))
    if overwrite or engine != "local" or workers is not None:
        raise click.UsageError("--overwrite, --engine and --workers need -o.")
    folder = Path(pairs.name).parent if pairs.name not in ("-", "<stdin>") else Path()
    values = dict(_read_pairs(pairs, folder))
    reranker = load_reranker(artifact, device, threads, memory, max_pixels, index=index_folder, cache_bytes=cache_bytes)
    results = _evaluate(reranker, list(values.values()), [f"line {number}" for number in values], strict)
    for result in results:
        value = result.logit if raw else result.score
        click.echo(json.dumps({"error": str(result.error)} if result.error else {"score": value}))
    ctx.exit(PARTLY if any(result.error for result in results) else 0)


def _score_file(
    artifact: Path,
    pairs: Any,
    output: Path,
    load: dict[str, Any],
    engine: Literal["local", "ray"],
    workers: int,
    overwrite: bool,
    strict: bool,
) -> int:
    """The exit code of `score -o`."""
    from m0kit.jobs import local_engine, score_file
    from m0kit.ray_engine import ray_engine

    if pairs.name in ("-", "<stdin>"):
        raise click.UsageError("-o needs a file of PAIRS: stdin could not be read again after an interruption.")

    def stop(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)  # so that what is done is committed
    try:
        chosen = ray_engine(workers) if engine == "ray" else local_engine
        done = score_file(
            artifact, pairs.name, output, load=load, engine=chosen, overwrite=overwrite, strict=strict, progress=True
        )
    except M0kitError:
        raise
    except ValueError as error:  # a limit that this model cannot have
        raise click.UsageError(f"--max-pixels: {error}.") from None
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"{output}: not finished; the same command goes on with it", err=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    told = f"{output}: {done.rows} rows" + (f", {done.resumed} of them from before" if done.resumed else "")
    told += f", {done.truncated} cut to the model's length" if done.truncated else ""
    told += f", {done.errors} could not be scored: see {done.error_file}" if done.errors else ""
    click.echo(told, err=True)
    return PARTLY if done.errors else 0


cli.add_command(doctor)
cli.add_command(index)


@cli.command()
@ARTIFACT
@click.option("--verify", is_flag=True, help="Also check every file against its hash, and score the known answers.")
@JSON
def inspect(artifact: Path, verify: bool, as_json: bool) -> None:
    """Show what an artifact is, what it was made from, and under which licence its weights stand."""
    manifest = read_manifest(artifact)
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
            "graphs": dict(manifest.graphs),
        }
        if verify:
            facts["answers"] = [asdict(answer) for answer in answers]
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    decoder, vision, image = manifest.model.decoder, manifest.model.vision, manifest.model.image
    adapters = ", ".join(_adapter(a) for a in manifest.provenance.get("adapters", [])) or "none"
    rows = [
        ("artifact", f"{artifact}: {manifest.num_bytes / 2**20:.1f} MiB, {manifest.scheme}"),
        ("weights", ", ".join(f"{rule['match']} {rule['scheme']}" for rule in manifest.recipe["weights"])),
        ("base", manifest.provenance.get("base")),
        ("adapters", adapters),
        ("licence", manifest.licence),
        (
            "decoder",
            f"{decoder.num_layers} layers of width {decoder.hidden_size}, {decoder.vocab_size} tokens",
        ),
        ("vision", f"{vision.depth} blocks of width {vision.width}"),
        ("images", f"{image.min_pixels}–{image.max_pixels} pixels"),
        ("prompt", f"up to {manifest.model.prompt.max_length} tokens"),
        ("fingerprint", manifest.fingerprint),
    ]
    if verify:
        rows.append(("files", f"{len(manifest.files)} checked, all as exported"))
        rows.append(("answers", summary(answers)))
    for name, value in rows:
        click.echo(f"{name:12} {value}")


def _adapter(entry: dict[str, Any]) -> str:
    """Name and weight as they were merged, and the adapter's own licence where it states one."""
    weight = "" if entry.get("weight") == 1 else f" × {entry.get('weight')}"
    return f"{entry.get('name')}{weight}" + (f" ({entry['licence']})" if entry.get("licence") else "")


def _evaluate(reranker: Reranker, pairs: list[Any], names: list[str], strict: bool) -> list[Result]:
    results = reranker.evaluate(pairs, on_error="raise" if strict else "mark", progress=sys.stderr.isatty())
    for name, result in zip(names, results, strict=True):
        if result.error:
            click.echo(f"error: {name}: {result.error}", err=True)
        for what in result.truncated:
            click.echo(f"note: {name}: the {what} was too long and was cut", err=True)
    return results


def _read_pairs(lines: Any, folder: Path) -> Iterator[tuple[int, Any]]:
    """Number of the line and its pair. Raises InputError."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            pair = json.loads(line)
            if isinstance(pair, dict):
                pair = {key: beside(folder, value) for key, value in pair.items()}
            yield number, pair
    except UnicodeDecodeError:
        raise InputError(f"{lines.name}: not UTF-8 text. Write one pair per line as JSON, in UTF-8.") from None
    except (ValueError, RecursionError):
        raise InputError(f"line {number}: not JSON. Write one pair per line.") from None
