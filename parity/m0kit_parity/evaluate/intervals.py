"""How sure a mean over queries is: the interval of a paired bootstrap.

Owns the resampling. Two artifacts rank the very same queries, so what is resampled are queries with their *differences*
(Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13; of systems compared on the same queries
Sakai 2006, SIGIR, and Smucker, Allan & Carterette 2007, CIKM). Sets are resampled each by itself: how many queries each
has is no chance. Queries that were drawn together, over the same pages, are drawn together again (a cluster bootstrap:
Field & Welsh 2007, JRSS B 69): were their losses alike, they would be said to tell more than they do. Of 150 such pairs
they were not (a correlation of -0.01 in int8, 0.00 in nf4), so that being careful costs nothing.

    parts = [resampled(losses, groups, seed) for seed, (losses, groups) in enumerate(sets)]
    interval(parts[:1], 0), interval(parts, 0)      # of the first set, and of all of them together

**Percentiles**, and not BCa: of differences as these are, most of them 0 and some of ten points, BCa's intervals held
the true mean less often: of 20 queries of which three in ten change 80 to 84 % of the time against 89, of 170 92 or 93
against 93 to 95. Either is too narrow where fewer than some ten queries change: what others may lose is not seen.

The same on every machine: raw integers of PCG64, which NumPy promises to keep, and sums that are exact in any order,
since differences are rounded to 2⁻²⁰ before.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 9_999  # percentiles are the 250th from either end, which chance moves by 1 % of the interval
LEVEL: Final = 0.95
# Groups; with fewer no interval is given, since most of what queries may lose is not among so few.
LEAST: Final = 20
_SEED: Final = 20_402
_EXACT: Final = 2.0**20  # steps of a difference in a unit
_AT_ONCE: Final = 1 << 20  # integers drawn, 8 MiB


class Resampled(NamedTuple):
    """A set, resampled: each time the sum of differences, (RESAMPLES, sides), and how many queries, (RESAMPLES,)."""

    sums: NDArray[np.float64]
    queries: NDArray[np.float64]
    groups: int  # that were drawn from


Interval = tuple[float, float]


def resampled(differences: NDArray[np.float64], groups: Sequence[str], seed: int) -> Resampled:
    """Resample one set. `differences`: (queries, sides); `groups`: of each query, "" for one that stands alone.

    `seed` tells the sets of one evaluation apart. All sides get the same resamples.
    """
    rows: dict[str | int, int] = {}
    row = np.asarray([rows.setdefault(group or i, len(rows)) for i, group in enumerate(groups)])
    num_groups = len(rows)
    table = np.zeros((num_groups, differences.shape[1] + 1))  # of each group the sums, and how many queries it has
    np.add.at(table[:, :-1], row, np.round(differences * _EXACT))
    np.add.at(table[:, -1], row, 1)
    bits = np.random.PCG64([_SEED, seed])
    drawn = np.empty((RESAMPLES, table.shape[1]))
    step = max(1, _AT_ONCE // num_groups)
    for start in range(0, RESAMPLES, step):
        times = min(step, RESAMPLES - start)
        raw = bits.random_raw(times * num_groups).reshape(times, num_groups)
        # The upper half as a fraction of the groups: one is likelier than another by 2⁻³² · groups at most.
        chosen = ((raw >> np.uint64(32)) * np.uint64(num_groups)) >> np.uint64(32)
        cells = chosen.astype(np.int64) + num_groups * np.arange(times)[:, None]
        counts = np.bincount(cells.ravel(), minlength=times * num_groups).reshape(times, num_groups)
        drawn[start : start + times] = counts.astype(np.float64) @ table
    return Resampled(drawn[:, :-1] / _EXACT, drawn[:, -1], num_groups)


def interval(parts: Sequence[Resampled], side: int) -> Interval | None:
    """The interval of a side's mean difference over the queries of all `parts`; None of fewer groups than `LEAST`."""
    if sum(part.groups for part in parts) < LEAST:
        return None
    sums = np.sum([part.sums[:, side] for part in parts], axis=0)
    means = np.sort(sums / np.sum([part.queries for part in parts], axis=0))
    tail = round((RESAMPLES + 1) * (1 - LEVEL) / 2)
    return float(means[tail - 1]), float(means[-tail])
