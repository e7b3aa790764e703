"""The user's key is made once, is for nobody else, and is the same for all who make it at once."""

import os
import secrets
import stat
import threading
from pathlib import Path

import pytest

from m0kit.jobs.keys import key_file, own_key


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = key_file()
    assert place == tmp_path / "m0kit" / "journal.key"
    return place


def test_a_key_is_made_once_and_for_this_user_alone(place: Path) -> None:
    key = own_key()
    assert key is not None
    assert len(key) == 32
    assert own_key() == key == place.read_bytes()
    assert os.name != "posix" or stat.S_IMODE(place.stat().st_mode) == 0o600
    assert [path.name for path in place.parent.iterdir()] == [place.name]


@pytest.mark.skipif(os.name != "posix", reason="needs modes and links")
@pytest.mark.parametrize("kind", ["readable", "short", "link"])
def test_what_is_no_secret_is_replaced(place: Path, tmp_path: Path, kind: str) -> None:
    place.parent.mkdir()
    known = b"k" * (31 if kind == "short" else 32)
    kept = tmp_path / "elsewhere" if kind == "link" else place
    kept.write_bytes(known)
    kept.chmod(0o644 if kind == "readable" else 0o600)
    if kind == "link":
        place.symlink_to(kept)
    key = own_key()
    assert key not in (None, known)
    assert own_key() == key
    assert not place.is_symlink()


def test_who_makes_it_at_the_same_time_gets_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[bytes | None] = []
    other = threading.Thread(target=lambda: others.append(own_key()))
    drawn = iter((b"a" * 32, b"b" * 32))

    def slowly(_: int) -> bytes:
        if not other.ident:
            other.start()
        return next(drawn)

    monkeypatch.setattr(secrets, "token_bytes", slowly)
    key = own_key()
    other.join()
    assert others == [key]
    assert key in (b"a" * 32, b"b" * 32)


def test_where_nothing_may_be_written_there_is_none(place: Path) -> None:
    place.parent.write_text("a file")
    assert own_key() is None
