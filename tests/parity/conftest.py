"""What parity's tests share: the tiny random checkpoint and the small trained one, each on both sides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from m0kit import Reranker
from m0kit_export.export import Scheme, export_artifact
from m0kit_export.merge import AdapterSpec
from m0kit_parity.cases import Case
from m0kit_parity.checkpoints import write_checkpoint
from m0kit_parity.cli import SMALL
from m0kit_parity.golden import Golden, record
from m0kit_parity.reference import Reference
from m0kit_parity.report import Report, check

Hold = Callable[..., Report]


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The fixtures below open artifacts before a test's own cache folder is set."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def small() -> Path:
    return SMALL / "base"


@pytest.fixture(scope="session")
def tiny_artifact(tiny: Path) -> Path:
    folder = tiny.with_name("tiny-artifact")
    export_artifact(tiny, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_reference(tiny: Path) -> Reference:
    return Reference.load(tiny)


@pytest.fixture(scope="session")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Hold:
    """Export, record, check: the whole way of a checkpoint with its adapters through both sides."""

    def run(
        source: Path, cases: Sequence[Case], adapters: Mapping[Path, float] | None = None, scheme: Scheme = "fp32"
    ) -> Report:
        folder = tmp_path_factory.mktemp("hold")
        specs = [AdapterSpec(path, weight) for path, weight in (adapters or {}).items()]
        export_artifact(source, folder / "artifact", adapters=specs, scheme=scheme, progress=False)
        reference = Reference.load(source, adapters=[(spec.path, spec.weight) for spec in specs])
        record(folder / "golden", cases, reference, model=reference.config, command="record", provenance={})
        reranker = Reranker.load(folder / "artifact", threads=1)
        return check(Golden.open(folder / "golden"), reranker, scheme, {})

    return run
