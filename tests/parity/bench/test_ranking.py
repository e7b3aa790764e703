"""An artifact's ranking stands beside what sees words alone, and beside chance."""

import json
from pathlib import Path

import pytest
from tests.parity.bench.running import invoke

from m0kit_export.export import export_artifact


def test_ranking_is_measured_beside_bm25_and_chance(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m0kit_parity.small import evaluate

    read = evaluate.read_set
    monkeypatch.setattr(evaluate, "read_set", lambda folder, kind: read(folder, kind)[:3])
    export_artifact(small, tmp_path / "a", progress=False)
    done = json.loads(invoke("ranking", tmp_path / "a", "--threads", 1, "--json").stdout)
    assert set(done) == set(evaluate.KINDS)
    assert done["text"]["m0kit"] > done["text"]["chance"]
    assert invoke("ranking", tmp_path / "a", "--threads", 1).stdout.startswith("nDCG@10")
