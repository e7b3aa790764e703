"""The benchmark of a store measures stores that are as full as it says."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from m0kit.keeping.store import Store
from m0kit_parity.bench.adding import measure
from m0kit_parity.bench.commands import bench


@pytest.mark.parametrize("limited", [False, True])
def test_a_store_is_filled_and_every_add_is_timed(tmp_path: Path, limited: bool) -> None:
    found = measure(tmp_path / "store", 1000, limited, 120)
    assert (found.records, found.limited) == (1000, limited)
    assert (found.dropped > 0) == limited
    assert found.longest_s > 0
    assert found.per_second > 0
    with Store.open(tmp_path / "store") as store:
        assert store.stats().records + found.dropped >= 1000
        assert (store.max_bytes is not None) == limited


def test_the_command_goes_up_by_tens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = CliRunner().invoke(bench, ["store", "--max-records", "1000", "--adds", "20", "--json"])
    assert [(row["records"], row["limited"]) for row in json.loads(done.output)] == [(1000, False), (1000, True)]
    done = CliRunner().invoke(bench, ["store", "--max-records", "1000", "--adds", "20"])
    assert [line.split()[:2] for line in done.output.splitlines()[-2:]] == [["1,000", "none"], ["1,000", "hit"]]
