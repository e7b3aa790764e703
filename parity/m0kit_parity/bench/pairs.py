"""Whole pairs, m0kit beside transformers and other engines, each in a process of its own, taking turns.

Owns the sides and what becomes of one that fails; workloads and the clock are `workloads.py`'s and `timing.py`'s.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from m0kit.errors import M0kitError
from m0kit.terminal import bar
from m0kit_parity.bench.timing import Timing, compare, take_turns, timed
from m0kit_parity.bench.workloads import Pair
from m0kit_parity.child import Child, Maker
from m0kit_parity.drawing.table import Rows

Side = Callable[[list[Pair]], float]  # scores pairs, says its seconds

TORCH: Final = "transformers fp32"


@dataclass(frozen=True, slots=True)
class Missing:
    """A side of a workload without a ratio: it failed, or the side that it is compared with did."""

    workload: str
    side: str
    error: str
    seconds: float | None = None


def whole_pairs(
    checkpoint: Path, artifacts: Mapping[str, Path], loads: Mapping[str, list[Pair]], *, peers: Sequence[str],
    repeats: int, threads: int, scratch: Path,
) -> list[Timing | Missing]:  # fmt: skip
    """Artifacts by their names, transformers on the checkpoint they are of, and peers, which write to `scratch`."""
    makers: dict[str, Maker] = {name: partial(open_artifact, path, threads) for name, path in artifacts.items()}
    makers[TORCH] = partial(open_transformers, checkpoint, threads)
    makers |= {name: partial(open_peer, checkpoint, name, threads, scratch) for name in peers}
    return side_by_side(makers, loads, repeats)


def side_by_side(
    makers: Mapping[str, Maker], loads: Mapping[str, list[Pair]], repeats: int, rest: float = 0.3
) -> list[Timing | Missing]:
    """Every side on every workload, each in a process of its own, taking turns; compared with transformers.

    A side that cannot be opened is missing everywhere; one that crashes at a workload is opened anew for the next.
    A side that nothing more is asked of gives its memory back.
    """
    children: dict[str, Child] = {}
    broken: dict[str, str] = {}  # could not be opened
    results: list[Timing | Missing] = []
    with ExitStack() as stack:
        for place, (load, pairs) in enumerate(bar(loads.items(), unit="workload")):
            wanted = [side for side in makers if _takes(side, pairs)]
            for side in [side for side in wanted if side not in broken and side not in children]:
                try:
                    children[side] = stack.enter_context(Child(makers[side]))
                except M0kitError as error:
                    broken[side] = f"{side}: {error}"
            failed = {side: broken[side] for side in wanted if side in broken}
            asked = {side: partial(children[side], pairs) for side in wanted if side in children}
            times = take_turns(asked, repeats, rest, failed)
            for side in wanted:
                if side in failed:
                    results.append(Missing(load, side, failed[side]))
                elif TORCH not in times:
                    alone = f"{TORCH} failed, so there is nothing to compare with"
                    results.append(Missing(load, side, alone, statistics.median(times[side])))
                else:
                    results += compare(load, {side: times[side], TORCH: times[TORCH]}, TORCH)[:1]
            later = [pairs for _, pairs in list(loads.items())[place + 1 :]]
            for side in list(children):
                if not children[side].alive or not any(_takes(side, pairs) for pairs in later):
                    children.pop(side).close()
    return results


def _takes(side: str, pairs: Sequence[Pair]) -> bool:
    """llama.cpp is a peer for texts alone."""
    return not side.startswith("llama") or all(isinstance(part, str) for pair in pairs for part in pair)


# What runs in the process of a side: each returns what scores pairs there, and says its seconds.


def open_artifact(artifact: Path, threads: int) -> Side:
    """m0kit's own side."""
    from m0kit.reranker import Reranker

    return _side(Reranker.load(artifact, threads=threads).score)


def open_transformers(checkpoint: Path, threads: int) -> Side:
    """The published scoring call in PyTorch."""
    import torch

    from m0kit_parity.reference import Reference

    torch.set_num_threads(threads)
    return _side(Reference.load(checkpoint).compute_score)


def open_peer(checkpoint: Path, name: str, threads: int, scratch: Path) -> Side:
    """Another engine."""
    from m0kit_parity.bench.peers import peer

    return _side(peer(checkpoint, name, threads, scratch).score)


def _side(score: Callable[[list[Pair]], object]) -> Side:
    return lambda pairs: timed(partial(score, pairs))()


def pairs_table(results: Sequence[Timing | Missing]) -> Rows:
    """A row for each side, below one for its workload."""
    rows = [["whole pairs", "seconds", f"against {TORCH}", "range"]]
    for workload in dict.fromkeys(result.workload for result in results):
        rows += [[workload, "", "", ""], *(_row(r) for r in results if r.workload == workload)]
    return rows


def _row(result: Timing | Missing) -> list[str]:
    if isinstance(result, Missing):
        return [f"  {result.side}", "failed" if result.seconds is None else f"{result.seconds:.3f}", "–", "–"]
    cells = [f"{result.seconds:.3f}", f"{result.ratio:.2f}×", f"{result.low:.2f}–{result.high:.2f}"]
    return [f"  {result.side}", *cells]
