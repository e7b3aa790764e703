"""Shared by all tests: one hypothesis profile, few threads, a cache folder of our own, the tiny random model."""

import os
import signal

# Two test processes on two cores: more threads than that only fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from tests.alone import ALONE, DEVELOPMENT
from tests.artifacts.make import unpack

from m0kit.errors import DependencyError

# Machines differ and are noisy: how long an example takes says nothing about correctness.
settings.register_profile("m0kit", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("m0kit")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What m0kit remembers of verified files must not leak between runs of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that live longer than a test open artifacts before its own cache folder is set."""
    if not ALONE:
        import torch

        torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A module of tests that imports what an installed runtime does not bring is skipped there, with the reason."""
    report = yield
    if ALONE and isinstance(collector, pytest.Module) and report.call.excinfo is not None:
        cause = report.call.excinfo.value.__cause__
        if isinstance(cause, ModuleNotFoundError) and str(cause.name).partition(".")[0] in DEVELOPMENT:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: needs {cause.name}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """There a test that meets an extra which is not installed is skipped with the sentence that names it."""
    try:
        yield
    except DependencyError as error:
        if not ALONE:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed artifacts of the tiny model, one folder per precision; not to be written to."""
    folder = tmp_path_factory.mktemp("committed")
    unpack(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="an installed runtime has no checkpoints")
    from m0kit_parity.samples.checkpoints import write_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(request: pytest.FixtureRequest) -> Path:
    if ALONE:
        committed: Path = request.getfixturevalue("committed")
        return committed / "fp32"
    from m0kit_export.export import export_artifact

    tiny: Path = request.getfixturevalue("tiny")
    folder = tiny.with_name("artifact")
    export_artifact(tiny, folder, progress=False)
    return folder
