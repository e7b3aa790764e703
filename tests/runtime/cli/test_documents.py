"""Arguments name files, in their order; what they name nothing by is said in its place."""

import os
from pathlib import Path
from typing import Any

import pytest

from m0kit.cli.documents import count, find, read
from m0kit.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two texts, a file of lines and a PDF, at two depths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b/deep").mkdir(parents=True)
    Path("a.txt").write_text("text a\n")
    Path("b/b.txt").write_text("text b\n")
    Path("b/deep/c.JSONL").write_text('{"text": "c1"}\n\nno json\n{"id": 3, "text": "c3"}\n')
    Path("b/paper.pdf").write_bytes(b"%PDF-1.7 \xff")
    Path("b/.hidden").write_text("hidden")
    return tmp_path


def documents(*arguments: str) -> tuple[list[tuple[str, Any]], list[tuple[str, str]]]:
    """Names with contents (for errors their words), and what was passed over."""
    passed: list[tuple[str, str]] = []
    found = list(read(find(arguments), passed))
    return [(name, str(c) if isinstance(c, InputError) else c) for name, c, _ in found], passed


def test_files_come_in_the_order_of_the_arguments_and_a_folders_by_path(folder: Path) -> None:
    found, passed = documents("b", "a.txt", "./a.txt")
    assert [name for name, _ in found] == [
        "b/b.txt", "b/deep/c.JSONL:1", "b/deep/c.JSONL:3", "3", "a.txt", "a.txt",
    ]  # fmt: skip
    assert found[0][1] == "text b"
    assert found[1][1] == {"text": "c1"}
    assert found[2][1].startswith("b/deep/c.JSONL:3: the line is not JSON")
    assert [name for name, _ in passed] == ["b/paper.pdf"]
    assert passed[0][1].startswith("is a PDF.")
    assert passed[0][1].endswith("It was passed over.")
    assert count(find(["b", "a.txt"])) == 6  # the PDF and the bad line among them


def test_a_file_named_as_itself_is_an_error_where_a_folders_is_passed_over(folder: Path) -> None:
    found, passed = documents("b/*", "b/paper.pdf")
    assert passed == []
    assert [(name, content[:22]) for name, content in found if "pdf" in name] == [
        ("b/paper.pdf", "b/paper.pdf: is a PDF.")
    ] * 2


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("gone.txt", "gone.txt: No such file or directory."),
        ("*.tiff", "*.tiff: no file matches."),
        ("", ": an empty name. Is a variable of the shell not set?"),
        ("https://example.org/a.png", "https://example.org/a.png: 'https://example.org/a.png' is a URL, and m0kit"),
        ("empty", "empty: the folder holds no file."),
    ],
)
def test_what_names_nothing_is_said_in_its_place(folder: Path, argument: str, said: str) -> None:
    (folder / "empty").mkdir()
    found, _ = documents("a.txt", argument, "a.txt")
    assert [name for name, _ in found] == ["a.txt", argument, "a.txt"]
    assert found[1][1].startswith(said)


def test_a_file_called_like_stdin_is_a_file(folder: Path) -> None:
    Path("-").write_text("no stdin")
    assert documents("./-")[0] == [("-", "no stdin")]
    assert ("-", "no stdin") in documents("*")[0]


def test_a_link_that_leads_nowhere_is_said_and_one_that_leads_back_ends(folder: Path) -> None:
    Path("b/nowhere.txt").symlink_to("gone.txt")
    Path("b/deep/back").symlink_to(folder / "b")
    Path("b/aside").symlink_to(folder / "aside")
    (folder / "aside").mkdir()
    Path("aside/d.txt").write_text("text d")
    found, _ = documents("b")
    assert [name for name, _ in found if name.endswith(".txt")] == ["b/aside/d.txt", "b/b.txt", "b/nowhere.txt"]
    assert dict(found)["b/nowhere.txt"] == "b/nowhere.txt: No such file or directory."


def test_a_folder_that_may_not_be_listed_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "secret words", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    found, _ = documents("b")
    assert ("b/deep", "b/deep: Permission denied.") in found


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_what_a_folder_or_a_pattern_holds_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe waits for its writer, and a device has no end."""
    monkeypatch.chdir(tmp_path)
    Path("pages").mkdir()
    os.mkfifo("pages/b.txt")
    os.mkfifo("pages/c.jsonl")
    Path("pages/d.txt").symlink_to("b.txt")
    Path("pages/e.jsonl").symlink_to("/dev/zero")
    Path("pages/a.txt").write_text("words")
    found = find(["pages", "pages/*"])
    assert count(found) == len(found) == 8
    given = [(name, str(content)) for name, content, _ in read(found, [])]
    why = "is a device, a pipe or a socket, and no file."
    linked = [(f"pages/{name}", f"pages/{name}: {why}") for name in ("d.txt", "e.jsonl")]
    everything = [(f"pages/{name}", f"pages/{name}: {why}") for name in ("b.txt", "c.jsonl", "d.txt", "e.jsonl")]
    assert given == [("pages/a.txt", "words"), *linked, ("pages/a.txt", "words"), *everything]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_a_file_that_is_named_may_be_a_pipe() -> None:
    out, into = os.pipe()
    os.write(into, b"from a substitution\n")
    os.close(into)
    (given,) = read(find([f"/dev/fd/{out}"]), [])
    os.close(out)
    assert given[1] == "from a substitution"
