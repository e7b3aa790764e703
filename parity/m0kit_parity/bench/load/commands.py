"""`m0kit bench serve`, `overhead`, `soak` and `kill`: a server under load. Owns the command lines.

TARGET is the URL of a server that runs, or an artifact, which is then served on loopback while it is measured.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from m0kit.cli.options import ARTIFACT, JSON
from m0kit.machine.detect import describe
from m0kit_parity.bench.load.bodies import KINDS, Kind, Sizes, Source
from m0kit_parity.bench.load.curve import LOADS, curve_table, measure
from m0kit_parity.bench.load.killing import kill_under_load, killed_table
from m0kit_parity.bench.load.overhead import overhead_table, overheads
from m0kit_parity.bench.load.server import Point, require_psutil, serving, watched
from m0kit_parity.bench.load.soak import soak as soak_all
from m0kit_parity.bench.load.soak import soak_table
from m0kit_parity.bench.options import THREADS
from m0kit_parity.bench.telling import tell
from m0kit_parity.drawing.table import Rows

_PACKAGES: Final = ("uvicorn", "starlette", "h11")
_MOST_POINTS: Final = 200  # of memory, in JSON


def _sizes(command: Any) -> Any:
    """Options of how large requests are."""
    for option in reversed(
        (
            click.option("--texts", type=click.IntRange(1), default=10, show_default=True, help="Of a request."),
            click.option("--pages", type=click.IntRange(1), default=2, show_default=True, help="Of a request."),
            click.option("--words", type=click.IntRange(1), nargs=2, default=(20, 150), show_default=True),
            click.option("--visual-tokens", type=click.IntRange(4), default=64, show_default=True, help="Of a page."),
        )
    ):
        command = option(command)
    return command


SEED = click.option("--seed", type=int, default=0, show_default=True, help="Of arrivals and texts.")
OPTION = click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="Of m0kit serve, as queue-seconds=5; repeatable."
)


@click.command("serve")
@click.argument("target", metavar="URL|ARTIFACT")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=("mixed",), show_default=True)
@click.option("--cold/--warm", "is_cold", default=None, help="Documents new, or read before; both by default.")
@click.option("--load", "loads", multiple=True, type=click.FloatRange(0.01), default=LOADS, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.5), default=15, show_default=True, help="Of arrivals, for each load."
)
@click.option("--clients", type=click.IntRange(1), default=16, show_default=True, help="That measure the capacity.")
@click.option("--retry-within", type=click.FloatRange(0), help="Obey Retry-After while a request is so young; seconds.")
@click.option("--path", default="/v1/rerank", show_default=True)
@click.option("--api-key", help="That the server wants.")
@_sizes
@SEED
@THREADS
@OPTION
@JSON
def serve(
    target: str, kinds: tuple[Kind, ...], is_cold: bool | None, loads: tuple[float, ...], seconds: float, clients: int,
    retry_within: float | None, path: str, api_key: str | None, texts: int, pages: int, words: tuple[int, int],
    visual_tokens: int, seed: int, threads: int, options: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Latency and answers against offered load, as multiples of the capacity, which is measured first.

    Requests come at random moments (Poisson) whether or not others were answered; latency counts from the moment at
    which one was meant to come. `tiny` is a text of some words, `texts` and `pages` are several of these, `mixed` is
    both, `ids` names documents of the index. Memory is that of the server's processes, where it is started here.
    """
    found: dict[str, Any] = {}
    made: list[Rows | str] = []
    with _target(target, "ids" in kinds, threads, options) as (url, points):
        for kind in kinds:
            source = Source(kind, Sizes(texts, pages, 20, words, visual_tokens), seed)
            for cold in (True, False) if is_cold is None else (is_cold,):
                if cold and kind == "ids":
                    continue
                curve = measure(
                    url, source, is_cold=cold, loads=loads, seconds=seconds, clients=clients, seed=seed, path=path,
                    key=api_key, retry_within_s=retry_within, points=points,
                )  # fmt: skip
                found[f"{kind} {curve.temper}"] = asdict(curve)
                made += [f"{kind}, {curve.temper}: {curve.capacity:.1f} requests a second", curve_table(curve)]
        facts = {"curves": found, "memory": [asdict(point) for point in points[:: len(points) // _MOST_POINTS + 1]]}
    about = {**describe(*_PACKAGES), "threads": threads, "target": target, "seconds": seconds, "options": list(options)}
    tell(about, facts, made, as_json)


@contextmanager
def _target(target: str, wants_index: bool, threads: int, options: Sequence[str]) -> Iterator[tuple[str, list[Point]]]:
    """A server's URL, and points of its memory as they come."""
    with ExitStack() as stack:
        if "://" in target:
            if options:
                raise click.UsageError("--option is for a server that is started here. Give an ARTIFACT.")
            yield target, []
            return
        require_psutil()
        if wants_index:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="m0kit-load-"))
            options = [*options, f"index={Path(folder) / 'index'}"]
        server = stack.enter_context(serving(_artifact(target), "--threads", threads, *_flags(options)))
        yield server.url, stack.enter_context(watched(server.pid))


def _flags(options: Sequence[str]) -> list[str]:
    return [f"--{option}" for option in options]


def _artifact(target: str) -> Path:
    path = Path(target)
    if not path.is_dir():
        raise click.UsageError(f"{target!r:.100} is no folder of an artifact, and no URL.")
    return path


@click.command()
@ARTIFACT
@click.option("--turns", type=click.IntRange(1), default=9, show_default=True, help="Of tiny requests 50 times that.")
@click.option("--only", multiple=True, type=click.Choice(KINDS[:4]), help="Repeatable; all by default.")
@click.option("--cold", "cold_only", is_flag=True, help="No documents that were read before.")
@_sizes
@SEED
@THREADS
@JSON
def overhead(
    artifact: Path, turns: int, only: tuple[Kind, ...], cold_only: bool, texts: int, pages: int, words: tuple[int, int],
    visual_tokens: int, seed: int, threads: int, as_json: bool,
) -> None:  # fmt: skip
    """What a request costs beside `Reranker.score` of the same pairs, both taking turns on the same artifact."""
    require_psutil()
    sizes = Sizes(texts, pages, 20, words, visual_tokens, kept=max(texts, pages))
    kinds = only or KINDS[:4]
    many = [("tiny", Source("tiny", sizes, seed), True)] if "tiny" in kinds else []
    works = [(f"{kind}, cold", Source(kind, sizes, seed), True) for kind in kinds if kind != "tiny"]
    if not cold_only:
        works += [(f"{kind}, warm", Source(kind, sizes, seed + 1), False) for kind in kinds if kind != "tiny"]
    found = overheads(artifact, works, turns=turns, threads=threads) if works else []
    found += overheads(artifact, many, turns=50 * turns, threads=threads, rest=0.0) if many else []
    about = {**describe(*_PACKAGES), "threads": threads, "artifact": str(artifact), "sizes": asdict(sizes)}
    tell(about, {"overheads": [asdict(one) for one in found]}, [overhead_table(found)], as_json)


@click.command()
@ARTIFACT
@click.option("--requests", type=click.IntRange(100), default=100_000, show_default=True)
@click.option("--clients", type=click.IntRange(1), default=4, show_default=True, help="That ask one after another.")
@SEED
@THREADS
@OPTION
@JSON
def soak(
    artifact: Path, requests: int, clients: int, seed: int, threads: int, options: tuple[str, ...], as_json: bool
) -> None:
    """A day of requests of all kinds as fast as they are answered, and what the server holds meanwhile."""
    require_psutil()
    with (
        tempfile.TemporaryDirectory(prefix="m0kit-load-") as folder,
        serving(artifact, "--threads", threads, "--index", Path(folder) / "index", *_flags(options)) as server,
        watched(server.pid) as points,
    ):
        found = soak_all(server.url, points, requests=requests, clients=clients, seed=seed)
    lines: list[Rows | str] = [soak_table(found), ""]
    lines.append(f"{found.requests:,} requests in {found.seconds:.0f} s: {_counts(found.statuses)}")
    lines.append(f"grown after the warm-up: {found.grown:+.1f} MiB")
    notes = [f"answers that should not be: {_counts(found.unexpected)}"] if found.unexpected else []
    about = {**describe(*_PACKAGES), "threads": threads, "artifact": str(artifact), "options": list(options)}
    tell(about, {"soak": asdict(found)}, lines, as_json, notes)


@click.command("kill")
@ARTIFACT
@click.option("--workers", type=click.IntRange(2), default=2, show_default=True)
@click.option("--kills", type=click.IntRange(1), default=4, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=40, show_default=True)
@click.option("--rate", type=click.FloatRange(0.1), default=10, show_default=True, help="Of rankings, a second.")
@_sizes
@SEED
@THREADS
@JSON
def kill_command(
    artifact: Path, workers: int, kills: int, seconds: float, rate: float, texts: int, pages: int,
    words: tuple[int, int], visual_tokens: int, seed: int, threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Kill workers under load (kill -9): what becomes of requests, and whether acknowledged documents are there."""
    require_psutil()
    source = Source("mixed", Sizes(texts, pages, 20, words, visual_tokens), seed)
    with tempfile.TemporaryDirectory(prefix="m0kit-load-") as folder:
        words_ = ["--workers", workers, "--threads", max(1, threads // workers), "--index", Path(folder) / "index"]
        with serving(artifact, *words_) as server:
            found = kill_under_load(server.url, server.pid, source, rate=rate, seconds=seconds, kills=kills, seed=seed)
    times = ", ".join(f"{one:.2f}" for one in found.replaced_s)
    about = {**describe(*_PACKAGES), "threads": threads, "artifact": str(artifact), "workers": workers}
    tell(about, {"killed": asdict(found)}, [killed_table(found), f"replaced after {times} s"], as_json)


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count:,} × {name}" for name, count in found.items())


COMMANDS: Final = (serve, overhead, soak, kill_command)
