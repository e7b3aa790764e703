"""What workers share is measured: weights in float are pages of files, which further workers do not take again."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")

from m0kit_parity.bench.workers import main, measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_second_worker_adds_what_is_its_own(tiny_artifact: Path) -> None:
    found = measure(tiny_artifact, 2)
    # Two workers and their parent. Were nothing shared, each would count all of its pages.
    assert 2 * found.own < found.total < 2 * (found.own + found.shared) + found.own
    assert found.shared > 10  # the program itself


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the server did not start:\nerror: "):
        main(str(tmp_path / "nothing"))
