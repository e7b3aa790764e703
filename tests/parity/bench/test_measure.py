"""What scoring costs is measured in a process of its own, which says why when it fails."""

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m0kit.errors import M0kitError
from m0kit_parity.bench import measure
from m0kit_parity.bench.workloads import page_of

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_processes_measure_every_form_of_content(tiny_artifact: Path, tmp_path: Path, monkeypatch: Any) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "p.png")
    png = (tmp_path / "p.png").read_bytes()
    uri = measure.for_child(png)
    monkeypatch.chdir(tmp_path)
    contents = ["text", {"text": "more"}, Path("p.png"), {"image": Path("p.png")}, png, uri]
    pairs = [(query, document) for query, document in combinations(contents, 2)]
    memory = measure.measure_memory(tiny_artifact, pairs, 1)
    assert 0 < memory.loaded <= memory.peak
    assert 0 < memory.private <= memory.peak
    assert measure.measure_seconds(tiny_artifact, pairs, 1) > 0


@linux
def test_private_memory_grows_with_the_work(tiny_artifact: Path) -> None:
    few, many = (measure.measure_memory(tiny_artifact, [("q", page_of(n))], 1).private for n in (48, 768))
    # 3,072 patches of 1,176 float32 values alone are 13.8 MiB
    assert many > few + 13


def test_a_process_that_fails_says_why(tiny_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(M0kitError, match=r"measuring seconds failed: .*there is no manifest"):
        measure.measure_seconds(tmp_path, [("q", "d")], 1)
    with pytest.raises(M0kitError, match=r"measuring memory failed: .*No such file"):
        measure.measure_memory(tiny_artifact, [("q", tmp_path / "gone.png")], 1)


def test_a_process_that_is_killed_is_told_from_one_that_fails(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(M0kitError, match=r"measuring seconds was ended by SIGKILL\. If memory ran out"):
        measure.measure_seconds(tiny_artifact, [("q", "d")], 1)


def test_what_a_library_prints_there_is_not_taken_for_the_result(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = "import atexit, os; print('garbage', flush=True); atexit.register(os.write, 1, b'more garbage\\n')\n"
    monkeypatch.setattr(measure, "CHILD", measure.CHILD.replace("from m0kit", noise + "from m0kit", 1))
    assert measure.measure_seconds(tiny_artifact, [("q", "d")], 1) > 0


def test_a_process_that_says_nothing_is_stopped(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CHILD", "import time\nwhile True: time.sleep(60)")
    monkeypatch.setattr(measure, "PATIENCE_S", 0.5)
    with pytest.raises(M0kitError, match=r"measuring seconds said nothing for 0\.5 seconds, so it was stopped\."):
        measure.measure_seconds(tiny_artifact, [("q", "d")], 1)
