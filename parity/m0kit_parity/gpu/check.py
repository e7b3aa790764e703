"""`make gpu`: every check and every figure that takes a GPU, in minutes, without a network.

Owns the order of the parts, the time they get, and what becomes of one that fails: it is told, and the next one
begins. Results are written to a file after each part, so that a run that is broken off has told what it found.

    python -m m0kit_parity.gpu.check                               # all parts
    python -m m0kit_parity.gpu.check --only speed --budget 240
    python -m m0kit_parity.gpu.check --device cpu                  # the same on tiny checkpoints, to try the check
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from m0kit.errors import M0kitError
from m0kit.machine.detect import describe
from m0kit.terminal import DEBUG, run, show_text
from m0kit_parity.bench.options import PACKAGES
from m0kit_parity.drawing.table import table
from m0kit_parity.gpu.found import Found
from m0kit_parity.gpu.place import Place, Size


def _parity(place: Place) -> Found:
    from m0kit_parity.gpu.numbers import parity

    return parity(place, ("tiny", "small", "wide") if place.on_gpu else ("tiny", "small"))


def _exactness(place: Place) -> Found:
    from m0kit_parity.gpu.numbers import exactness

    return exactness(place)


def _speed(place: Place) -> Found:
    from m0kit_parity.gpu.speed import speed

    return speed(place)


def _resident(place: Place) -> Found:
    from m0kit_parity.gpu.speed import resident

    return resident(place)


def _profile(place: Place) -> Found:
    from m0kit_parity.gpu.profile import profile

    return profile(place)


def _memory(place: Place) -> Found:
    from m0kit_parity.gpu.memory import memory

    return memory(place)


def _four(place: Place) -> Found:
    from m0kit_parity.gpu.memory import four

    return four(place)


# In the order in which they run: what is wanted most comes first.
PARTS: Final[Mapping[str, Callable[[Place], Found]]] = {
    "speed": _speed,
    "resident": _resident,
    "exactness": _exactness,
    "profile": _profile,
    "four": _four,
    "memory": _memory,
    "parity": _parity,
}


@click.command()
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1; cpu tries the check itself.")
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="Repeatable; in the order given.")
@click.option(
    "--size", type=click.Choice(["tiny", "wide", "full"]), help="Of what speed is measured at: full, on cpu tiny."
)
@click.option(
    "--budget", type=click.FloatRange(1), default=330.0, show_default=True, help="Seconds; no part begins after."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where 20 GB of checkpoints and artifacts are made, and found again; by default in memory if it has room.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), default=Path("gpu.json"), show_default=True
)
def check(
    device: str, only: tuple[str, ...], size: Size | None, budget: float, work: Path | None, json_file: Path
) -> None:
    """Run every check and figure that takes a GPU; exit code 1 where something does not hold."""
    os.environ.setdefault(DEBUG, "1")  # what goes wrong in another process is told from where
    root = work or roomy() / "m0kit-gpu"
    root.mkdir(parents=True, exist_ok=True)
    place = Place(root, device, size or ("tiny" if device == "cpu" else "full"), budget)
    about = {
        **describe(*PACKAGES),
        "device": device,
        "size": place.size,
        "card": card(),
        "work": str(root),
    }
    place.tell("; ".join(f"{key} {value}" for key, value in about.items()))
    results: dict[str, Any] = {"about": about, "parts": {}}
    failed = False
    for name in only or tuple(PARTS):
        told, lines = _tried(place, name)
        results["parts"][name] = told
        failed |= told["outcome"] != "passed"
        json_file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
        show_text("\n".join(["", f"== {name}: {told['outcome']}, {told['seconds']:.0f} s", *lines]))
    show_text(
        "\n"
        + table(
            [["part", "outcome", "s"], *([n, p["outcome"], f"{p['seconds']:.0f}"] for n, p in results["parts"].items())]
        )
    )
    sys.exit(1 if failed else 0)


def _tried(place: Place, name: str) -> tuple[dict[str, Any], list[str]]:
    """What is written of a part, and shown."""
    if place.left <= 0:
        return {"outcome": "not run", "seconds": 0.0}, [f"the time ({place.budget_s:g} s) was over"]
    place.tell(f"part {name}")
    start = time.monotonic()
    try:
        found = PARTS[name](place)
    except Exception as error:  # told, and the next part begins
        text = traceback.format_exc()
        shown = [f"FAILED: {error}"] if isinstance(error, M0kitError) else [text]
        return {"outcome": "failed", "seconds": time.monotonic() - start, "error": text}, shown
    outcome = "wrong" if found.wrong else "passed"
    told = {"outcome": outcome, "seconds": time.monotonic() - start, "facts": found.facts, "wrong": list(found.wrong)}
    told["tables"] = [[list(row) for row in rows] for rows in found.tables]  # for docs/gpu.md
    lines = [line for rows in found.tables for line in ("", *table(rows).split("\n"))]
    return told, [*lines, *found.notes, *(f"WRONG: {sentence}" for sentence in found.wrong)]


def roomy() -> Path:
    """The folder of memory that Linux has, if 24 GB are free there, else that for temporary files."""
    memory = Path("/dev/shm")
    try:
        return memory if shutil.disk_usage(memory).free > 24 << 30 else Path(tempfile.gettempdir())
    except OSError:
        return Path(tempfile.gettempdir())


def card() -> str:
    """The GPU as its driver calls it, or none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or "none"
    except (OSError, subprocess.SubprocessError):
        return "none"


if __name__ == "__main__":
    sys.exit(run(partial(check.main, standalone_mode=False)))
