"""Several servers behind nginx: what is counted, on a few documents."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from m0kit.errors import M0kitError
from m0kit_parity.bench import cluster as measured
from m0kit_parity.bench.cluster import Pass, Plan, cluster, cluster_table

PLAN = Plan(servers=2, sets=6, documents=2, tokens=128, passes=2, clients=2, room=2.0)
HAS_NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def test_a_row_is_a_pass_against_one_server_that_has_all() -> None:
    one = Pass("one server", 1, 1, documents=10, cached=10, failed=0, seconds=2.0)
    rows = cluster_table([replace(one, number=0, cached=0, seconds=8.0), one, Pass("in turn", 3, 0, 10, 4, 1, 1.0)])
    assert rows[1:] == [
        ("one server", "1", "1", "0%", "0", "0.25"),
        ("one server", "1", "2", "100%", "0", "1.00"),
        ("in turn", "3", "1", "40%", "1", "2.00"),
    ]


def test_without_nginx_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured.shutil, "which", lambda *_, **__: None)
    with pytest.raises(M0kitError, match="nginx is not installed"):
        next(cluster(Path("nowhere"), PLAN))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NGINX, reason="nginx is not installed")
def test_by_document_every_set_is_read_once_and_a_server_that_goes_takes_its_own_alone(committed: Path) -> None:
    passes = {(each.way, each.number): each for each in cluster(committed / "int8", PLAN)}
    assert not [each for each in passes.values() if each.failed or each.documents != PLAN.sets * PLAN.documents]
    assert [passes[("one server", number)].hits for number in (0, 1)] == [0, 1]
    assert [passes[("by document", number)].hits for number in (0, 1)] == [0, 1]
    assert 0 < passes[("by document", 2)].hits < 1 or passes[("by document", 2)].cached in (0, PLAN.sets * 2)
    assert passes[("by document", 3)].hits == 1
    assert passes[("in turn", 0)].hits == 0
