"""Ratios are what a clock says, turn by turn."""

from functools import partial

from m0kit_parity.bench import timing


def test_sides_take_turns_and_the_first_turn_does_not_count() -> None:
    calls: list[str] = []

    def clock() -> float:
        """On which our n-th call takes n seconds, theirs 10·n, and nothing else takes time."""
        return float(sum((i // 2 + 1) * (10 if call == "theirs" else 1) for i, call in enumerate(calls)))

    sides = {name: partial(calls.append, name) for name in ("ours", "theirs")}
    timed = {name: timing.timed(run, clock) for name, run in sides.items()}
    times = timing.take_turns(timed, 3, rest=0)
    assert calls == ["ours", "theirs"] * 4
    assert times == {"ours": [2, 3, 4], "theirs": [20, 30, 40]}


def test_a_ratio_is_the_median_over_turns() -> None:
    ours, theirs = timing.compare("x", {"ours": [1.0, 2.0, 1.0], "theirs": [2.0, 2.0, 3.0]}, "theirs")
    assert (ours.seconds, ours.ratio, ours.low, ours.high) == (1.0, 2.0, 1.0, 3.0)
    assert (theirs.seconds, theirs.ratio, theirs.low, theirs.high) == (2.0, 1.0, 1.0, 1.0)


def test_the_range_of_sizes_doubles_and_ends_where_it_should() -> None:
    assert timing.doubling(64, 300) == [64, 128, 256, 300]
    assert timing.doubling(64, 64) == [64]
