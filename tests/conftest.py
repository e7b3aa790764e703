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

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from m0kit_export.export import export_artifact
from m0kit_parity.checkpoints import write_checkpoint

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
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tiny: Path) -> Path:
    folder = tiny.with_name("artifact")
    export_artifact(tiny, folder, progress=False)
    return folder
