"""Arguments name files, in their order; what they name nothing by is said in its place."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from tests.pdfs import locked, pdf, text

from m0kit.cli import documents as documents_module
from m0kit.cli.documents import Pages, count, find, read, survey
from m0kit.errors import InputError
from m0kit.reading.pdf import PdfPage, pdf_pages


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two texts, a file of lines and an Office document, at two depths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b/deep").mkdir(parents=True)
    Path("a.txt").write_text("text a\n")
    Path("b/b.txt").write_text("text b\n")
    Path("b/deep/c.JSONL").write_text('{"text": "c1"}\n\nno json\n{"id": 3, "text": "c3"}\n')
    Path("b/paper.docx").write_bytes(b"PK\x03\x04\xff")
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
    assert [name for name, _ in passed] == ["b/paper.docx"]
    assert passed[0][1].startswith("is a ZIP archive, as Office documents are.")
    assert passed[0][1].endswith("It was passed over.")
    assert count(find(["b", "a.txt"])) == 6  # the Office document and the bad line among them


def test_a_file_named_as_itself_is_an_error_where_a_folders_is_passed_over(folder: Path) -> None:
    found, passed = documents("b/*", "b/paper.docx")
    assert passed == []
    assert [(name, content[:28]) for name, content in found if "docx" in name] == [
        ("b/paper.docx", "b/paper.docx: is a ZIP archi")
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


class TestPdfs:
    """A page is a document; `survey` leaves a PDF as it is until its pages are asked for."""

    @pytest.fixture(autouse=True)
    def _pdfs(self, folder: Path) -> None:  # noqa: ARG002
        pytest.importorskip("pypdfium2", reason="needs m0kit[pdf]")
        Path("b/paper.pdf").write_bytes(pdf([text("one"), text("two"), text("three")]))
        Path("locked.pdf").write_bytes(locked([text("a")]))

    def test_a_page_is_named_by_its_file_and_number(self) -> None:
        found, _ = documents("a.txt", "b/paper.pdf", "locked.pdf", "b")
        names = [f"b/paper.pdf#page={number}" for number in (1, 2, 3)]
        assert [name for name, _ in found] == [
            "a.txt", *names, "locked.pdf", "b/b.txt", "b/deep/c.JSONL:1", "b/deep/c.JSONL:3", "3", *names,
        ]  # fmt: skip
        assert [content.number for _, content in found if isinstance(content, PdfPage)] == [1, 2, 3, 1, 2, 3]
        assert found[4][1] == "locked.pdf: needs a password. Save it without one."
        assert count(find(["a.txt", "b/paper.pdf"])) == 0

    @pytest.mark.parametrize(
        ("pages", "numbers"), [("2", [2]), ("2-3", [2, 3]), ("2-", [2, 3]), ("3-99", [3]), ("1-1", [1])]
    )
    def test_an_argument_may_name_pages(self, pages: str, numbers: list[int]) -> None:
        found, _ = documents(f"b/paper.pdf#page={pages}")
        assert [name for name, _ in found] == [f"b/paper.pdf#page={number}" for number in numbers]
        assert [content.number for _, content in found] == numbers

    @pytest.mark.parametrize(
        ("argument", "name", "said"),
        [
            ("b/paper.pdf#page=4", "b/paper.pdf", "b/paper.pdf: has 3 pages, and no page 4."),
            ("b/paper.pdf#page=0", "b/paper.pdf#page=0", "b/paper.pdf#page=0: pages count from 1"),
            ("b/paper.pdf#page=3-2", "b/paper.pdf#page=3-2", "b/paper.pdf#page=3-2: pages count from 1"),
            ("b/paper.pdf#page=x", "b/paper.pdf#page=x", "b/paper.pdf#page=x: No such file or directory."),
            ("gone.pdf#page=1", "gone.pdf", "gone.pdf: No such file or directory."),
            ("a.txt#page=1", "a.txt#page=1", "a.txt#page=1: names pages, and the file is no PDF."),
        ],
    )
    def test_pages_that_there_are_not_are_said(self, argument: str, name: str, said: str) -> None:
        ((found, content),), _ = documents(argument)
        assert found == name
        assert content.startswith(said)

    def test_a_file_whose_name_looks_like_pages_is_that_file(self) -> None:
        Path("a.txt#page=1").write_text("text")
        assert documents("a.txt#page=1")[0] == [("a.txt#page=1", "text")]

    def test_a_pdf_by_another_name_is_one_unless_the_name_denies_it(self) -> None:
        raw = Path("b/paper.pdf").read_bytes()
        for name in ("noname", "page.png", "a.docx"):
            Path(name).write_bytes(raw)
        assert [name for name, _ in documents("noname")[0]] == [f"noname#page={number}" for number in (1, 2, 3)]
        for name in ("page.png", "a.docx"):
            suffix = Path(name).suffix
            assert documents(name)[0] == [
                (name, f"{name}: its name ends with {suffix}, but it holds a PDF. Rename it.")
            ]

    def test_what_was_surveyed_holds_no_page(self) -> None:
        (found,) = survey(find(["b/paper.pdf"]), [])
        Path("b/paper.pdf").unlink()
        assert isinstance(found[1], Pages)
        assert [(name, str(content)) for name, content, _ in found[1].documents()] == [
            ("b/paper.pdf", "b/paper.pdf: No such file or directory.")
        ]

    def test_one_page_at_a_time_is_held(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[int] = []

        def counted(*args: Any, **options: Any) -> Any:
            for page in pdf_pages(*args, **options):
                drawn.append(page.number)
                yield page

        monkeypatch.setattr(documents_module, "pdf_pages", counted)
        these = read(find(["b/paper.pdf"]), [])
        for number in (1, 2, 3):
            next(these)
            assert drawn[-1] == number

    def test_without_the_extra_a_folders_are_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        found, passed = documents("b")
        assert "pdf" not in str(found)
        said = "reading PDFs needs pypdfium2. pip install 'm0kit[pdf]', or give pages as PNG. It was passed over."
        assert ("b/paper.pdf", said) in passed
        assert documents("b/paper.pdf")[0][0][1].startswith("b/paper.pdf: reading PDFs needs pypdfium2.")
