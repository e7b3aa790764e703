"""`m0kit figures`: measure what is published, and write the page. Owns the command line and the order of things.

    m0kit figures --quick

Each figure is measured in a process of its own, which gives its memory back, and is kept at once: a run that was ended
goes on where it stopped. Exit codes: 0 all well, 3 some figures could not be measured; others as for every command.
"""

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m0kit.cli.options import PARTLY
from m0kit.errors import InputError, M0kitError
from m0kit.machine.detect import describe
from m0kit.terminal import say
from m0kit_parity.bench.options import PACKAGES, THREADS
from m0kit_parity.child import Child
from m0kit_parity.figures.page import MARKDOWN, Measured, Page

if TYPE_CHECKING:
    from m0kit_parity.figures.workshop import Workshop


@click.command()
@click.option("--quick", is_flag=True, help="A little of each, in minutes: fewer layers, sizes and repetitions.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this figure; repeatable.")
@click.option("--again", is_flag=True, help="Measure also what was measured for this version on this machine.")
@click.option(
    "--docs", type=click.Path(path_type=Path, exists=True, file_okay=False), default="docs", show_default=True,
    help="Where the page and its plots are.",
)  # fmt: skip
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False),
    help="Where checkpoints and artifacts are made, 25 GB; kept there. A temporary folder by default.",
)  # fmt: skip
@THREADS
@click.pass_context
def figures(
    ctx: click.Context, quick: bool, only: tuple[str, ...], again: bool, docs: Path, work: Path | None, threads: int
) -> None:
    """Measure every published figure on this machine, and write docs/figures.md with its plots.

    An hour and more with the full dimensions; minutes with --quick. Linux only: it reads /proc.
    """
    if not Path("/proc/self/status").is_file():
        raise InputError("m0kit figures reads /proc, which this system does not have. Run it on Linux.")
    from m0kit_parity.figures.published import FIGURES, text_of  # what measures imports what exports
    from m0kit_parity.figures.workshop import QUICK, WHOLE, Workshop

    if unknown := [name for name in only if name not in FIGURES]:
        raise click.UsageError(f"no figure is called {unknown[0]!r}; there are {', '.join(FIGURES)}.")
    texts = {name: text_of(name) for name in FIGURES}
    about = {**describe(*PACKAGES), "threads": threads, "quick": quick}
    failed = []
    with tempfile.TemporaryDirectory(prefix="m0kit-figures-") as temporary:
        # Apart: what is called the same there is of other sizes.
        folder = (work or Path(temporary)) / f"{'quick' if quick else 'whole'}-{about['m0kit']}"
        shop = Workshop(folder, QUICK if quick else WHOLE, threads)
        shop.folder.mkdir(parents=True, exist_ok=True)
        page = Page.read(docs)
        for name in only or FIGURES:
            if not again and page.has(name, about):
                say(f"{name}: known for this version and machine")
                continue
            say(f"{name}: measuring")
            try:
                with Child(partial(measurer, name, shop, docs), nested=True) as ask:
                    parts, plots = ask()
            except M0kitError as error:
                say(f"error: {name}: {error}")
                failed.append(name)
                continue
            page.figures[name] = Measured(about, f"{datetime.now(UTC):%Y-%m-%d}", parts, plots)
            page.write(texts)
        page.write(texts)  # which may have changed where no figure has
    say(f"{docs / MARKDOWN}: written")
    ctx.exit(PARTLY if failed else 0)


def measurer(name: str, shop: "Workshop", docs: Path) -> Callable[[], Any]:
    """What runs in a figure's process."""
    from m0kit_parity.figures.published import measure

    return partial(measure, name, shop, docs)
