"""Two artifacts of one model, measuring replaced by figures, and judged files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from m0kit_export.adapter import AdapterSpec
from m0kit_export.export import export_artifact
from m0kit_parity.bench.measure import Memory
from m0kit_parity.evaluate import compare as comparing
from m0kit_parity.evaluate.command import evaluate
from m0kit_parity.small.files import SMALL


@pytest.fixture(scope="module")
def base(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "base"
    export_artifact(small, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, small: Path) -> Path:
    """The same model, other weights: it ranks code better and the rest a little worse."""
    folder = base.with_name("tuned")
    export_artifact(small, folder, adapters=[AdapterSpec(SMALL / "adapters" / "code", 1.0)], progress=False)
    return folder


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Measuring processes replaced by figures; returns the measurements asked for, in order."""
    asked: list[tuple[str, str, int]] = []

    def memory(artifact: Path, pairs: Sequence[Any], **_: Any) -> Memory:
        asked.append(("memory", artifact.name, len(pairs)))
        return Memory(opened=0.1, loaded=10.0, peak=30.0, private=20.0, seconds=1.0)

    def seconds(artifact: Path, pairs: Sequence[Any], **_: Any) -> float:
        asked.append(("seconds", artifact.name, len(pairs)))
        return {"base": 2.0, "tuned": 0.5}.get(artifact.name, 1.0) * len(asked)

    monkeypatch.setattr(comparing, "measure_memory", memory)
    monkeypatch.setattr(comparing, "measure_seconds", seconds)
    return asked


def judged(folder: Path, *rows: Any, name: str = "judged.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", "utf-8")
    return path


def row(query: Any = "a red bicycle", documents: Any = ("a bicycle", "two cats", "a red car"), **rest: Any) -> Any:
    return {"query": query, "documents": documents, **rest}


def invoke(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(evaluate, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done
