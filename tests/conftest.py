"""Shared by all tests: one hypothesis profile, few threads, and a cache folder of our own."""

import os

# Two test processes on two cores: more threads than that only fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

# Machines differ and are noisy: how long an example takes says nothing about correctness.
settings.register_profile("m0kit", deadline=None, print_blob=True)
settings.load_profile("m0kit")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What m0kit remembers of verified files must not leak between runs of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
