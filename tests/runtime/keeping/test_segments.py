"""Segments are files of one folder: no name leads out of it, and none of them gets shorter."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from m0kit.errors import StoreError
from m0kit.keeping import segments as module
from m0kit.keeping.segments import New, Segments


@pytest.fixture(params=[True, False], ids=["in folder", "by path"])
def segments(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Segments:
    """Both ways: the second is that of Windows, which cannot look a name up in an open folder."""
    if not request.param:
        monkeypatch.setattr(module, "IN_FOLDER", False)
        monkeypatch.setattr(module, "OWN", module.OWN & ~getattr(os, "O_NOFOLLOW", 0))
    (tmp_path / "segments").mkdir()
    return Segments(tmp_path)


def write(segments: Segments, number: int, data: bytes, *, new: bool) -> None:
    with segments.appending(number, new=new) as file:
        file.seek(0, os.SEEK_END)
        file.write(data)


def test_what_is_appended_is_mapped(segments: Segments) -> None:
    assert segments.numbers() == []
    write(segments, 1, b"abc", new=True)
    write(segments, 1, b"def", new=False)
    write(segments, 1_234_567, b"", new=True)
    assert segments.path(1).name == "000001.kv"
    assert segments.path(1).read_bytes() == b"abcdef"
    assert segments.numbers() == [1, 1_234_567]
    assert (segments.size(1), segments.size(2), segments.size(1_234_567)) == (6, -1, 0)
    mapped = segments.map(1, 6)
    assert mapped is not None
    assert bytes(mapped) == b"abcdef"
    assert segments.map(1, 7) is None
    assert segments.map(2, 0) is None
    assert segments.map(1_234_567, 0) is None
    segments.unlink(1)
    assert bytes(mapped) == b"abcdef", "whoever has it mapped keeps its bytes"
    assert segments.numbers() == [1_234_567]


def new(name: str, size: int, crc: int | None = None) -> New:
    return New(False, name.encode(), [memoryview(name.encode() * size)], 1.5, 1, crc)


def test_pieces_lie_behind_each_other_and_are_known_again(segments: Segments) -> None:
    unused = iter(range(1, 10)).__next__
    pieces, ends = segments.append([new("a", 5000), new("b", 1), new("c", 9000), new("d", 0)], None, 16384, unused)
    assert [(piece.segment, piece.start, piece.size) for piece in pieces] == [
        (1, 0, 5000), (1, 8192, 1), (2, 0, 9000), (2, 12288, 0),
    ]  # fmt: skip
    assert ends == {1: 12288, 2: 12288} == {number: segments.size(number) for number in (1, 2)}
    views = [segments.view(piece) for piece in pieces]
    assert [view is not None and view.tobytes() for view in views] == [b"a" * 5000, b"b", b"c" * 9000, b""]
    assert all(piece.fits(view) for piece, view in zip(pieces, views, strict=True))
    assert not pieces[0].fits(views[1])
    assert not pieces[0]._replace(key=b"b").fits(views[0]), "the key is part of the sum"
    assert not pieces[0]._replace(content=True).fits(views[0])
    assert not pieces[0].fits(None)


def test_pieces_go_behind_the_known_end_unless_a_segment_is_not_as_long_as_it_should_be(segments: Segments) -> None:
    unused = iter(range(1, 10)).__next__
    segments.append([new("a", 1)], None, 16384, unused)
    ((second,), ends) = segments.append([new("b", 1, crc=7)], (1, 4096), 16384, unused)
    assert (second.segment, second.start, second.crc, ends) == (1, 4096, 7, {1: 8192})
    ((third,), ends) = segments.append([new("c", 1)], (1, 4096), 16384, unused)
    assert (third.segment, third.start, ends) == (2, 0, {2: 4096})
    assert segments.append([], (2, 4096), 16384, unused) == ([], {})


def test_a_segment_that_was_too_short_is_mapped_anew(segments: Segments) -> None:
    ((piece,), _) = segments.append([new("a", 1)], None, 16384, lambda: 1)
    view = segments.view(piece)
    longer = piece._replace(start=4096)
    assert segments.view(longer) is None
    write(segments, 1, b"b", new=False)
    found = segments.view(longer)
    assert found is not None
    assert found.tobytes() == b"b"
    segments.forget()
    segments.unlink(1)
    assert segments.view(piece) is None
    assert view is not None
    assert view.tobytes() == b"a"


def test_a_new_one_never_takes_the_place_of_another(segments: Segments) -> None:
    write(segments, 1, b"abc", new=True)
    with pytest.raises(FileExistsError):
        write(segments, 1, b"def", new=True)
    with pytest.raises(FileNotFoundError):
        write(segments, 2, b"def", new=False)
    assert segments.path(1).read_bytes() == b"abc"


def test_names_that_were_not_given_here_are_left_alone(segments: Segments) -> None:
    for name in ("1.kv", "0000001.kv", "000001.kv.bak", "1234567890123456.kv", "notes.txt", "٠٠٠٠٠١.kv"):
        (segments.folder / name).write_bytes(b"")
    assert segments.numbers() == []


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo", "linked folder"])
def test_only_regular_files_are_opened(segments: Segments, tmp_path: Path, kind: str) -> None:
    place, victim = segments.path(1), tmp_path / "victim"
    victim.write_bytes(b"dear to somebody")
    make: dict[str, Callable[[], object]] = {
        "link": lambda: place.symlink_to(victim),
        "dangling link": lambda: place.symlink_to(tmp_path / "nowhere"),
        "folder": place.mkdir,
        "fifo": lambda: os.mkfifo(place),
        "linked folder": lambda: (segments.folder.rmdir(), segments.folder.symlink_to(tmp_path)),
    }
    make[kind]()
    actions: list[Callable[[], object]] = [
        segments.numbers, lambda: segments.size(1), lambda: segments.map(1, 1), lambda: segments.unlink(1),
        lambda: write(segments, 1, b"x", new=False),
    ]  # fmt: skip
    for action in actions:
        with pytest.raises(StoreError, match="an index has only files of its own"):
            action()
    with pytest.raises((StoreError, FileExistsError)):
        write(segments, 1, b"x", new=True)
    assert victim.read_bytes() == b"dear to somebody"
    assert os.path.lexists(place) or kind == "linked folder"
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_has_another_name_is_read_and_not_written(segments: Segments, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"dear to somebody")
    os.link(tmp_path / "victim", segments.path(1))
    assert segments.map(1, 4) is not None
    with pytest.raises(StoreError, match=r"cp -rL"):
        write(segments, 1, b"x", new=False)
    assert (tmp_path / "victim").read_bytes() == b"dear to somebody"


def test_a_file_longer_than_memory_can_hold_is_no_disaster(segments: Segments) -> None:
    write(segments, 1, b"abc", new=True)
    os.truncate(segments.path(1), 1 << 43)
    assert segments.size(1) == 1 << 43
    try:
        assert segments.map(1, 1 << 62) is None
    finally:
        os.truncate(segments.path(1), 0)


def test_a_file_and_then_its_folder_are_durable_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "segments").mkdir()
    segments = Segments(tmp_path)
    done: list[object] = []
    monkeypatch.setattr(module, "sync", lambda file: done.append(os.fstat(file).st_size))
    monkeypatch.setattr(module, "sync_path", done.append)
    new = [New(False, name, [memoryview(name * size)], 1.5, 1, None) for name, size in ((b"a", 1), (b"b", 9000))]
    segments.append(new, None, 8192, iter((1, 2)).__next__)
    assert done == [4096, 12288, segments.folder]
