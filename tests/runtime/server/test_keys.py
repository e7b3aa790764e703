"""The key file: what is a key, what never leaves it, and what a bad new file changes."""

import hashlib
import logging
from pathlib import Path

import pytest

from m0kit.errors import M0kitError
from m0kit.server.keys import MAX_FILE_BYTES, MAX_KEYS, Keys

ONE, TWO, THREE = b"a" * 16, b"Bq9-_./+=" * 3, b"the:third:key:of:four"


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return path


def test_each_form_of_a_line_lets_its_key_in(tmp_path: Path) -> None:
    hashed = hashlib.sha256(b"the fourth").hexdigest()
    text = f"\ufeff# clés\r\n\r\n{ONE.decode()}\r\nsearch: {TWO.decode()}\n  {THREE.decode()}  \n"
    text += f"ops:\tsha256:{hashed.upper()}\n"
    keys = Keys.read(write(tmp_path / "keys", text + f"sha256:{hashlib.sha256(b'fifth').hexdigest()}"))
    given = (ONE, TWO, THREE, b"the fourth", b"fifth", b"", ONE[:-1], hashed.encode(), b"search: " + TWO)
    found = [keys.name_of(key) for key in given]
    assert found == ["line-3", "search", "line-5", "ops", "line-7", None, None, None, None]


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("good: " + "k" * 16 + "\nSECRET-short\n", 2, "of 12 characters is guessed too easily"),
        ("\n\nSECRET-with-ü-and-more", 3, "letters, digits and signs of ASCII"),
        ("SECRET with blanks in it", 1, "without blanks"),
        ("SECRET-name with blank: kkkkkkkkkkkkkkkk", 1, "without blanks"),
        ("sha256:SECRET", 1, "64 hex digits"),
        ("SECRET-\x07-control-characters", 1, "without blanks"),
        (b"SECRET\xff\xfe" + b"k" * 16, 1, "ASCII"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_never_shown(
    tmp_path: Path, text: str | bytes, line: int, why: str
) -> None:
    with pytest.raises(M0kitError) as caught:
        Keys.read(write(tmp_path / "keys", text))
    assert f"keys, line {line}: " in str(caught.value)
    assert why in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no key"),
        ("# none\n\n", "holds no key"),
        ("\n".join(["k" * 16] * (MAX_KEYS + 1)), "1001 keys"),
        ("#" * (MAX_FILE_BYTES + 1), "bytes that are read"),
    ],
)
def test_a_file_without_keys_or_with_too_many_is_none(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(M0kitError, match=why):
        Keys.read(write(tmp_path / "keys", text))


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(M0kitError, match=r"Name a file with one key a line\."):
            Keys.read(path)


def test_a_file_that_others_may_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "keys", ONE)
    Keys.read(path)
    assert not caplog.messages
    path.chmod(0o640)
    Keys.read(path)
    assert ["chmod 600" in message for message in caplog.messages] == [True]
    path.write_bytes(b"sha256:" + hashlib.sha256(ONE).hexdigest().encode())  # no secret, but nobody else's to write
    Keys.read(path)
    assert len(caplog.messages) == 1
    path.chmod(0o660)
    Keys.read(path)
    assert len(caplog.messages) == 2


def test_keys_are_read_again_and_a_bad_file_keeps_the_old_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "keys", b"old: " + ONE)
    keys = Keys.read(path)
    write(path, b"new: " + TWO)
    assert keys.reread()
    assert (keys.name_of(ONE), keys.name_of(TWO)) == (None, "new")
    for bad in (b"", b"short", TWO + b" and more"):
        write(path, bad)
        assert not keys.reread()
        assert keys.name_of(TWO) == "new"
    path.unlink()
    assert not keys.reread()
    assert keys.name_of(TWO) == "new"
    assert len([message for message in caplog.messages if "stay as they were" in message]) == 4
    assert TWO.decode() not in caplog.text


def test_every_hash_is_compared_wherever_the_key_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys.read(write(tmp_path / "keys", b"\n".join([ONE, TWO, THREE])))
    compared: list[bytes] = []

    def count(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("m0kit.server.keys.hmac.compare_digest", count)
    for key in (ONE, THREE, b"none"):
        compared.clear()
        keys.name_of(key)
        assert compared == [hashlib.sha256(each).digest() for each in (ONE, TWO, THREE)]
