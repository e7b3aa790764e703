"""A file is what its content is, and one rule says what text a text file holds."""

import codecs
import io
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m0kit.errors import FormatError, ImageError, InputError
from m0kit.reading.formats import FORMATS, MAX_TEXT_BYTES, image_format, parse, read, read_text, text_of

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
PAGE = "<!DOCTYPE html><html><body>404 not found</body></html>"


def image(kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(out, kind)
    return out.getvalue()


PNG = image()


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"a text", "a text"),
        (b"\xef\xbb\xbfa text", "a text"),
        (b"a text\n", "a text"),
        (b"a text\r\n", "a text"),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo"),
        (b"one\rtwo\r", "one\ntwo"),
        (b"a text\n\n", "a text\n"),
        (b" a text ", " a text "),
        (b"\xef\xbb\xbf\xef\xbb\xbfa", "\ufeffa"),
        ("größe\u2028漢字\x85".encode(), "größe\u2028漢字\x85"),
        (b"\n", ""),
        (b"", ""),
    ],
)
def test_text_is_the_same_whatever_an_editor_makes_of_its_file(raw: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    assert read(path) == read_text(path) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")))
def test_a_text_comes_back_from_any_editor(text: str) -> None:
    marked = text.removeprefix("\ufeff")
    for written in (marked + "\n", "\ufeff" + marked + "\n", (marked + "\n").replace("\n", "\r\n")):
        assert text_of(written.encode()) == marked


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["page.png", "page.JPG", "page", "page.dat"])
def test_an_image_is_one_under_any_name_that_does_not_deny_it(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(image(kind))
    assert image_format(image(kind)) == kind
    assert read(path) == path


@pytest.mark.parametrize(
    ("name", "raw", "kind", "words"),
    [
        ("a.png", POINTER.encode(), ImageError, ["a Git LFS pointer", "git lfs pull"]),
        ("a.txt", POINTER.encode(), InputError, ["a Git LFS pointer", "git lfs pull"]),
        ("a", POINTER.encode(), InputError, ["a Git LFS pointer"]),
        ("a.pdf", POINTER.encode(), InputError, ["a Git LFS pointer"]),
        ("a.JPG", PAGE.encode(), ImageError, ["its name ends with .jpg", "a web page", "download it again"]),
        ("a.pdf", b"\xef\xbb\xbf\n " + PAGE.encode(), InputError, ["its name ends with .pdf", "a web page"]),
        ("a.webp", b"just a text", ImageError, ["its name ends with .webp, but it holds text"]),
        ("a.docx", b"just a text", InputError, ["its name ends with .docx, but it holds text"]),
        ("a.png", b"", ImageError, ["its name ends with .png, but it is empty"]),
        ("a.svg", b'<?xml version="1.0"?><svg></svg>', FormatError, ["an SVG drawing", "render"]),
        ("a.pdf", b"%PDF-1.7\n\x00\xff", FormatError, ["is a PDF. One text or image is read here: give a page"]),
        ("a.txt", b"%PDF-1.7\nall in letters", FormatError, ["is a PDF"]),
        ("a.png", b"%PDF-1.7\n\x00\xff", FormatError, ["is a PDF"]),
        ("a.docx", b"PK\x03\x04\x00\x00", FormatError, ["is a ZIP archive, as Office documents are"]),
        ("a.txt.gz", b"\x1f\x8b\x08\x00", FormatError, ["is compressed (gzip)"]),
        ("a.parquet", b"PAR1\x15\x04\x00\xff", FormatError, ["is Parquet"]),
        ("a.heic", b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", FormatError, ["is HEIC"]),
        ("a.mp4", b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2", FormatError, ["a film or sound"]),
        ("a.zip", b"\x00nonsense", FormatError, ["a file of the kind .zip"]),
        ("a.rtf", b"{\\rtf1 text}", FormatError, ["is RTF"]),
        ("a.txt", PNG, InputError, ["its name ends with .txt, but it holds an image (PNG)", "Rename it"]),
        ("a.pdf", PNG, InputError, ["its name ends with .pdf, but it holds an image (PNG)"]),
        ("a.txt", "größe".encode("utf-16"), InputError, ["is UTF-16. Save it as UTF-8"]),
        ("a.txt", "größe".encode("utf-16-be"), InputError, ["is UTF-16. Save it as UTF-8"]),
        ("a.txt", "plain".encode("utf-16-le"), InputError, ["is UTF-16. Save it as UTF-8"]),
        ("a", codecs.BOM_UTF32_LE + "größe".encode("utf-32-le"), InputError, ["is UTF-32. Save it as UTF-8"]),
        ("a", "plain".encode("utf-32-be"), InputError, ["is UTF-32"]),
        ("a.txt", "größe".encode("latin-1"), InputError, ["is not UTF-8 text (byte 2 is 0xF6)", "Latin-1"]),
        ("a", b"BMW f\xe4hrt weit genug", InputError, ["is not UTF-8 text", "Latin-1"]),
        ("a.bin", b"\x01\x00\x02\xff", FormatError, ["is neither text nor an image. Accepted", "PNG, JPEG"]),
        ("a.txt", b"null \x00 byte", FormatError, ["is neither text nor an image"]),
    ],
)  # fmt: skip
def test_what_is_no_text_and_no_image_is_named(
    name: str, raw: bytes, kind: type[InputError], words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read(path)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{path}: ")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["BMW is a car", "P1 2 things first", "GIF89a is a format", "RIFF WEBP", "II*"])
def test_text_that_begins_as_an_image_does_is_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert read(path) == text


def test_an_image_written_in_letters_is_one_under_its_own_name(tmp_path: Path) -> None:
    for name in ("a.ppm", "a.pgm"):
        (tmp_path / name).write_text("P3 2 2 255\n" + "0 " * 12)
        assert read(tmp_path / name) == tmp_path / name


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "no.png", "no.png: No such file or directory."),
        (tmp_path, "is a folder, and no file."),
        (Path("a\0b"), "cannot be the name of a file."),
    ):
        with pytest.raises(InputError, match=words):
            read(path)
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(InputError, match="is an image"):
        read_text(tmp_path / "a.png")


def test_what_is_no_text_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 36)  # sparse; more than memory
    with pytest.raises(FormatError):
        read(tmp_path / "huge")
    (tmp_path / "latin.txt").write_bytes(b"x" * 5000 + b"\xe9")
    with pytest.raises(InputError, match="byte 5000 is 0xE9"):
        read(tmp_path / "latin.txt")


def test_a_character_at_the_edge_of_the_first_look_is_whole(tmp_path: Path) -> None:
    for shift in range(4):
        text = "x" * (4093 + shift) + "漢字" * 100
        (tmp_path / "a.txt").write_text(text, "utf-8")
        assert read(tmp_path / "a.txt") == text


def test_an_image_from_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(PNG,))
    writer.start()
    assert read(pipe, named=True) == PNG
    writer.join()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_what_nobody_named_is_a_file_or_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")  # opening it would wait for a writer
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        for name in ("fifo.txt", "zero.txt", "s"):
            with pytest.raises(InputError, match=f"{name}: is a device, a pipe or a socket, and no file"):
                read(tmp_path / name)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_of_a_named_device_no_more_is_read_than_may_be_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormatError):
        read(Path("/dev/zero"), named=True)
    monkeypatch.setattr("m0kit.reading.formats.MAX_TEXT_BYTES", 10 << 20)
    with pytest.raises(InputError, match=r"/dev/fd/[0-9]+: has more than the 10 MiB that are read of it"):
        endless(lambda path: read(path, named=True))


def endless(use: Callable[[Path], object]) -> None:
    """A pipe in which text never ends."""
    out, into = os.pipe()

    def write() -> None:
        with suppress(BrokenPipeError):
            while True:
                os.write(into, b"y\n" * 9999)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        use(Path(f"/dev/fd/{out}"))
    finally:
        os.close(out)
        writer.join()
        os.close(into)


def test_a_text_of_more_than_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"words " * 2000)
    with path.open("r+b") as file:
        file.truncate(MAX_TEXT_BYTES + 1)  # sparse
    with pytest.raises(InputError, match="has more than the 256 MiB that are read of it"):
        read(path)


@given(st.binary(), st.sampled_from(["", ".txt", ".png", ".pdf", ".ppm", ".svg"]))
def test_whatever_the_bytes_are_only_input_errors_come_out(raw: bytes, suffix: str) -> None:
    try:
        found = parse(raw, "there", suffix)
    except InputError as error:
        found = str(error).removeprefix("there: ")
        if found == str(error):
            raise AssertionError(found) from error
    else:
        assert found == raw or isinstance(found, str)
