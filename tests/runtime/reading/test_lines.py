"""Lines are what a person counts, and one that cannot be read is an error of that line alone."""

import io
import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit.errors import InputError
from m0kit.reading import lines as module
from m0kit.reading.lines import is_json_lines, json_object, lines, records, strings

WANTED = '{"query": …}'


def of(raw: bytes) -> list[tuple[int, Any]]:
    return list(records(io.BytesIO(raw), WANTED, "here"))


def test_a_line_ends_with_a_line_feed_and_nothing_else() -> None:
    odd = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    raw = json.dumps({"query": odd}, ensure_ascii=False).encode()
    assert of(raw + b"\r\n\n \n" + raw) == [(1, {"query": odd}), (4, {"query": odd})]


def test_a_byte_order_mark_is_none_at_the_start_of_any_line() -> None:
    """Files that begin with one are also put one after the other."""
    line = b'\xef\xbb\xbf{"query": "q"}\n'
    assert of(line * 2) == [(1, {"query": "q"}), (2, {"query": "q"})]
    assert [text for _, text in strings(io.BytesIO(b"\xef\xbb\xbfone\r\n\xef\xbb\xbftwo "))] == ["one", "two "]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{not", 'the line is not JSON (character 2). Write {"query": …} on one line.'),
        (b'{"a": 1} {"a": 2}', "not JSON (character 10)"),
        (b'"caf\xe9"', "the line is not UTF-8 text (byte 5 is 0xE9). Save it as UTF-8."),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", 'expected {"query": …}, got list.'),
        (b"null", "got NoneType."),
        (b'{"a": NaN}', "the line is not JSON: it holds NaN. Write null."),
        (b'{"a": [-Infinity]}', "it holds -Infinity"),
        (b'{"a": 1, "b": 2, "a": 3}', "the line has the key 'a' twice."),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of thousands of digits. Write it as a string."),
        (b'{"a": "b\0"}', "not JSON"),
        (b'{"' + b"k" * 10_000 + b'": 1, "' + b"k" * 10_000 + b'": 1}', "twice"),
    ],
)
def test_a_bad_line_costs_one_line_and_has_its_number(line: bytes, said: str) -> None:
    good = b'{"query": "q"}\n'
    (first, bad, last) = of(good + b"\n" + line + b"\n" + good)
    assert (first, last) == ((1, {"query": "q"}), (4, {"query": "q"}))
    number, error = bad
    assert (number, type(error)) == (3, InputError)
    assert said in str(error)
    assert len(str(error)) < 300


def test_half_of_a_surrogate_pair_is_kept_for_who_reads_the_text() -> None:
    assert of(rb'{"a": "\ud800"}') == [(1, {"a": "\ud800"})]


def test_a_line_too_long_for_memory_is_a_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 40)
    found = of(b'{"query": "q"}\n{"query": "' + b"q" * 1000 + b'"}\n{"query": "r"}')
    assert [number for number, _ in found] == [1, 2, 3]
    assert "longer than" in str(found[1][1])
    assert found[2][1] == {"query": "r"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_another_encoding_is_named_with_the_file(encoding: str) -> None:
    with pytest.raises(InputError, match=rf"^here: is {encoding[:6].upper()}\. Save it as UTF-8\.$"):
        of('{"query": "größe"}\n'.encode(encoding) * 3)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"\x1f\x8b\x08\x00abc", r"compressed \(gzip\)"),
        (b"PAR1\x15\x04\x00\xff", "Parquet"),
        (b"PK\x03\x04\x00", "a ZIP archive"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"\x89PNG\r\n\x1a\n\x00", r"an image \(PNG\)"),
    ],
)
def test_a_file_that_is_no_text_is_named_once(raw: bytes, what: str) -> None:
    with pytest.raises(InputError, match=rf"^here: is {what}"):
        of(raw + b"\nmore\nand more\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "no", "no: No such file"),
        (tmp_path, "is a folder, and no file"),
        (Path("a\0"), "name of a"),
    ):
        with pytest.raises(InputError, match=words):
            list(lines(path))

    class Broken(io.BytesIO):
        def readline(self, *_: Any) -> bytes:
            raise OSError(5, "secret words")

    with pytest.raises(InputError, match=r"^there: Input/output error\.$"):
        list(lines(Broken(), "there"))


def test_lines_may_be_left_out_without_a_look() -> None:
    stream: BinaryIO = io.BytesIO(b'no json\n\n{"a": 1}\nno json\n')
    assert [number for number, _ in records(stream, WANTED, "here", first=1)] == [3, 4]


def test_names_of_json_lines_are_known_in_any_case() -> None:
    assert all(is_json_lines(Path(f"a{name}")) for name in (".jsonl", ".ndjson", ".JSONL", ".NdJson"))
    assert not any(is_json_lines(Path(name)) for name in ("a.json", "jsonl", ".jsonl", "a.jsonl.gz"))


@given(st.lists(st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(), st.none()), max_size=3)))
def test_what_was_written_is_read(values: list[dict[str, Any]]) -> None:
    for ascii_only in (True, False):
        raw = "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
        raw = raw.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        if not ascii_only and "\ufffd" in raw:
            continue
        assert [record for _, record in of(raw.encode())] == values


@given(st.binary())
def test_whatever_the_bytes_are_only_input_errors_come_out(raw: bytes) -> None:
    try:
        found = of(raw)
    except InputError as error:
        if not str(error).startswith("here: "):
            raise AssertionError(str(error)) from error
        return
    numbers = [number for number, _ in found]
    assert numbers == sorted(set(numbers))
    assert numbers == [n for n, line in enumerate(raw.split(b"\n"), 1) if line.removeprefix(b"\xef\xbb\xbf").strip()]
    assert all(isinstance(value, dict | InputError) for _, value in found)


def test_a_json_object_is_read_alone() -> None:
    assert json_object(b'{"a": [1, 2.5, true, null]}', WANTED) == {"a": [1, 2.5, True, None]}


def test_what_a_line_may_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of two letters takes a hundred bytes; looking for a key that comes twice takes one look at each."""
    monkeypatch.setattr(module, "MAX_VALUES", 1000)
    (_, error), (_, good) = of(b'{"query": [' + b"0," * 1000 + b'0]}\n{"query": "' + b"," * 900 + b'"}\n')
    assert "the line holds more than 1000 values" in str(error)
    assert good == {"query": "," * 900}
    monkeypatch.undo()
    keys = ",".join(f'"k{i}":0' for i in range(200_000))
    ((_, error),) = of(f'{{{keys},"k199999":1}}'.encode())
    assert "the key 'k199999' twice" in str(error)


def test_what_never_ends_is_looked_at_before_it_is_read_on(tmp_path: Path) -> None:
    class Zeros(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            buffer[:] = bytes(len(buffer))
            return len(buffer)

    with pytest.raises(InputError, match="here: "):
        next(lines(io.BufferedReader(Zeros()), "here"))
    with pytest.raises(InputError, match="is a device, a pipe or a socket, and no file"):
        next(lines(Path("/dev/zero")))


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b" \n", b"\n\n \n"])
def test_blank_lines_count_however_many_there_are(tmp_path: Path, blank: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(blank * 30_000 + b"{}\n" + blank * 3 + b"{}\n" + blank)
    each = blank.count(b"\n")
    assert [number for number, _ in lines(path)] == [30_000 * each + 1, 30_003 * each + 2]
    assert list(lines(path)) == list(lines(io.BytesIO(path.read_bytes())))
