"""What memory holds of a job's input at a time is bounded, by rows and by bytes."""

from pathlib import Path

import pytest
from tests.runtime.jobs.pretending import write

from m0kit.jobs import windows as windows_file
from m0kit.jobs.windows import Work


def test_windows_are_bounded_by_rows_and_stand_by_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_file, "WINDOW_ROWS", 4)
    rows = [{"query": f"q{i}", "document": "ab"[i % 2]} for i in range(10)]
    windows = list(Work(write(tmp_path / "in.jsonl", rows), [(0, 1), (3, 5)]))
    assert [[row.number for row in window] for window in windows] == [[1, 5, 2, 6], [7, 9, 8]]


def test_windows_are_bounded_by_bytes_and_keep_equal_contents_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_file, "WINDOW_BYTES", 2 * windows_file.IMAGE_BYTES + 1000)
    rows = [{"query": "q", "document": {"image": bytes([i // 3]) * 100}} for i in range(12)]
    windows = list(Work(write(tmp_path / "in.parquet", rows), []))
    assert [len(window) for window in windows] == [6, 6]
    first = [row.pair["document"]["image"] for row in windows[0]]
    assert len({id(image) for image in first}) == 2
    monkeypatch.setattr(windows_file, "WINDOW_BYTES", 1)  # a row that is larger than that comes alone
    assert [len(window) for window in Work(tmp_path / "in.parquet", [])] == [1] * 12
