"""Case files: the set covers what it should, contents are made alike every time, errors name the field."""

import io
import os
import re
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m0kit.errors import InputError
from m0kit_parity.proof.cases import (
    CASES,
    KINDS,
    Case,
    Content,
    builtin_cases,
    draw_page,
    encode,
    image_content,
    pairs_file,
    published_groups,
    read_case,
    text_content,
)

ALL = builtin_cases(heavy=True)


def contents(case: Case) -> list[Content]:
    return [content for group in case.groups for content in (group.query, *group.documents)]


def pixels(content: Content) -> int:
    """Pixels that the model sees: at least 3,136, at most 602,112."""
    if content.form == "text":
        return 0
    with Image.open(io.BytesIO(content.data)) as image:
        return min(max(image.width * image.height, 3136), 602_112)


def test_the_built_in_set_covers_every_kind_of_pair() -> None:
    assert {case.kind for case in ALL} == set(KINDS)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_a_case_is_of_the_kind_it_says(case: Case) -> None:
    assert len(case.why) > 40
    if case.kind == "mixed":
        return
    query, document = case.kind.split("-")
    for group in case.groups:
        assert ("text" if group.query.form == "text" else "image") == query
        assert {"text" if d.form == "text" else "image" for d in group.documents} == {document}


def test_the_default_set_is_affordable_on_the_published_model() -> None:
    """Ten minutes at the 60 GFLOP/s of two slow cores are 36 TFLOP.

    A visual token (784 pixels) costs about 8 GFLOP through vision and decoder, a text token 2.6.
    """
    cost = 0.0
    for case in builtin_cases():
        for group in case.groups:
            for document in group.documents:
                cost += 8e9 * (pixels(group.query) + pixels(document)) / 784
                cost += 2.6e9 * (10 + sum(len(c.data) / 2 for c in (group.query, document) if c.form == "text"))
    assert cost < 36e12


def test_heavy_cases_are_left_out_unless_asked_for_or_named() -> None:
    heavy = {case.name for case in ALL if case.heavy}
    assert {"image_4k", "long_2k", "long_truncated"} <= heavy
    assert not heavy & {case.name for case in builtin_cases()}
    assert [case.name for case in builtin_cases(["image_4k"])] == ["image_4k"]


def test_multilingual_has_at_least_six_scripts() -> None:
    (case,) = builtin_cases(["multilingual"])
    letters = "".join(c.data.decode() for c in contents(case))
    scripts = {unicodedata.name(c).split()[0] for c in letters if c.isalpha()}
    assert {
        "LATIN",
        "CYRILLIC",
        "ARABIC",
        "HEBREW",
        "DEVANAGARI",
        "HANGUL",
        "GREEK",
        "THAI",
        "HIRAGANA",
    } <= scripts


def test_image_kinds_and_sizes_hold_what_their_reason_claims() -> None:
    seen = set()
    for content in (c for case in builtin_cases(["image_kinds", "image_sizes"]) for c in contents(case)):
        if content.form != "text":
            with Image.open(io.BytesIO(content.data)) as image:
                rotated = image.getexif().get(0x0112)
                seen |= {image.mode, image.format, image.size, (content.form, rotated)}
                if image.mode == "P" and image.format == "PNG":
                    assert "transparency" in image.info
    assert {"RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "PNG", "JPEG", "WEBP", "GIF"} <= seen
    assert {(56, 56), (1, 1), (2600, 13), ("file", 6), ("pillow", 6)} <= seen


def test_the_truncated_case_is_far_over_the_document_limit() -> None:
    (case,) = builtin_cases(["long_truncated"])
    words = case.groups[0].documents[0].data.decode().split()
    assert len(words) > 9728  # every word is at least one token
    assert "Entry 700 " in case.groups[0].documents[0].data.decode()


def test_drawn_contents_are_the_same_bytes_in_another_process() -> None:
    script = (
        "from m0kit_parity.proof.cases import builtin_cases;"
        "print([d.sha256 for c in builtin_cases() for g in c.groups for d in (g.query, *g.documents)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == str([c.sha256 for case in builtin_cases() for c in contents(case)])


def test_every_patch_of_a_page_differs_so_that_a_swap_shows() -> None:
    page = np.asarray(draw_page(["title", "line"], (280, 196), seed=3))
    patches = {page[y : y + 14, x : x + 14].tobytes() for y in range(0, 196, 14) for x in range(0, 280, 14)}
    assert len(patches) == 14 * 20


def test_another_seed_draws_another_page() -> None:
    assert draw_page(["a"], (56, 56), seed=1).tobytes() != draw_page(["a"], (56, 56), seed=2).tobytes()


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"]))
def test_a_page_has_the_size_and_mode_asked_for(width: int, height: int, mode: str) -> None:
    page = draw_page(["one", "two"], (width, height), mode=mode)
    assert (page.size, page.mode) == ((width, height), mode)


def test_a_content_is_handed_over_in_its_form() -> None:
    data = encode(draw_page([], (30, 20)))
    assert text_content("é\n").value() == "é\n"
    assert Content("file", data).value() == data
    opened = Content("pillow", data).value()
    assert isinstance(opened, Image.Image)
    assert opened.size == (30, 20)


def test_the_pixel_hash_sees_pixels_and_palette_but_not_compression() -> None:
    page = draw_page(["x"], (20, 20), mode="P")
    stored, packed = io.BytesIO(), io.BytesIO()
    page.save(stored, "PNG", compress_level=0)
    page.save(packed, "PNG", compress_level=9)
    first = Content("file", stored.getvalue()).pixels_sha256()
    assert first == Content("file", packed.getvalue()).pixels_sha256()
    page.putpalette(bytes(reversed(page.getpalette() or [])))
    assert first != Content("file", encode(page)).pixels_sha256()
    assert text_content("x").pixels_sha256() is None


def test_repeated_text_counts() -> None:
    (case,) = builtin_cases(["long_2k"])
    text = case.groups[0].documents[0].data.decode()
    assert text.startswith("Item 1: ")
    assert "Item 90: " in text


def test_a_dropped_file_is_a_new_case(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'why = "mine"\nkind = "text-text"\n[[groups]]\nquery = "q"\ndocuments = ["d"]\n'
    )
    (case,) = builtin_cases(folder=tmp_path)
    assert (case.name, case.groups[0].query.value()) == ("mine", "q")


GROUP = '[[groups]]\nquery = "q"\ndocuments = ["d"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("why = ", "not a readable TOML"),
        (f'kind = "text-text"\n{GROUP}', "why must be str"),
        (f'why = "x"\nkind = "text-video"\n{GROUP}', "kind is 'text-video'"),
        ('why = "x"\nkind = "mixed"', r"\[\[groups\]\]"),
        ('why = "x"\nkind = "mixed"\ngroups = []', "at least one group"),
        (f'why = "x"\nkind = "mixed"\nweight = 1\n{GROUP}', "unknown field weight"),
        (f'why = "x"\nkind = "mixed"\nheavy = 1\n{GROUP}', "heavy must be bool"),
        ('why = "x"\nkind = "mixed"\n[[groups]]\nquery = "q"\ndocuments = []', "at least one document"),
        ('why = "x"\nkind = "mixed"\n[[groups]]\nquery = 3\ndocuments = ["d"]', "a string or a table, got 3"),
        ('why = "x"\nkind = "mixed"\n[[groups]]\nquery = {page = ["a"]}\ndocuments = ["d"]', "size is"),
        (
            'why="x"\nkind="mixed"\n[[groups]]\nquery={page=["a"], size=[9,9], mode="HSV"}\ndocuments=["d"]',
            "mode is one of",
        ),
        (
            'why="x"\nkind="mixed"\n[[groups]]\nquery={page=["a"], size=[9,9], mode="RGBA", format="JPEG"}\n'
            'documents=["d"]',
            "JPEG cannot hold an image of mode RGBA",
        ),
        (f'why = "x"\nkind = "mixed"\nheavy = {"9" * 5000}\n{GROUP}', "a number of thousands of digits"),
        (f'why = "x"\nkind = {"[" * 50_000}', "nested too deeply"),
        (".".join("a" * 100_000) + " = 1", "more than 100 dots"),
        ("#" * ((1 << 20) + 1), "has more than the 1048576 bytes"),
        (
            'why="x"\nkind="mixed"\n[[groups]]\nquery={text="a", times=1000000000000}\ndocuments=["d"]',
            "more than 4194304 l",
        ),
        (
            'why="x"\nkind="mixed"\n[[groups]]\nquery={text="a", times=-1}\ndocuments=["d"]',
            "times is -1, which makes le",
        ),
        (
            'why="x"\nkind="mixed"\n[[groups]]\nquery={page=["a"], size=[99999, 99999]}\ndocuments=["d"]',
            "16000000 are dra",
        ),
        (
            'why="x"\nkind="mixed"\n[[groups]]\nquery={page=["a"], size=[9, 9], seed=-1}\ndocuments=["d"]',
            "seed is a whole",
        ),
    ],
)
def test_a_wrong_case_file_is_named_with_its_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_case(path)
    assert str(path) in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="no case is called nope; there are code, "):
        builtin_cases(["tiny", "nope"])


def test_own_pairs_are_read_with_images_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    data = encode(draw_page(["p"], (40, 30)))
    (tmp_path / "scans" / "a.png").write_bytes(data)
    path = tmp_path / "my pairs.jsonl"
    path.write_text(
        '{"query": "q\u2028x", "documents": ["one", {"text": "two"}]}\n\n'
        '{"query": {"image": "scans/a.png"}, "documents": [{"image": "scans/a.png"}]}\n',
        encoding="utf-8",
    )
    case, errors = pairs_file(path)
    assert errors == {}
    assert (case.name, case.kind, len(case.groups)) == ("my-pairs", "mixed", 2)
    assert case.groups[0].query.value() == "q\u2028x"  # a line separator inside a string is no line end
    assert [d.value() for d in case.groups[0].documents] == ["one", "two"]
    assert case.groups[1].query.value() == data


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: the line is not JSON"),
        ("[]", "line 1: expected"),
        ('{"query": "q"}', "line 1: expected"),
        ('{"query": "q", "documents": [{"image": "none.png"}]}', r"line 1: .*none\.png: No such file"),
        ('{"query": "q", "documents": ["d", {"image": "torn.png"}]}', r"line 1: document: .*torn\.png: not an image"),
        ('{"query": "q", "documents": [{"video": "x"}]}', "line 1: document 1: unknown key 'video'"),
        ("", "no pairs"),
    ],
)
def test_a_wrong_line_of_pairs_is_named_and_costs_itself(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "torn.png").write_bytes(b"torn")
    path = tmp_path / "pairs.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=message):
        pairs_file(path)
    if line:
        good = '{"query": "q", "document": "d", "id": 1, "relevance": [1]}'
        path.write_text(f"{line}\n{good}\n\ufeff{good}", "utf-8")
        case, errors = pairs_file(path)
        assert [[d.value() for d in group.documents] for group in case.groups] == [["d"], ["d"]]
        assert list(errors) == [1]
        assert re.search(message, errors[1])


def test_a_file_that_is_no_image_is_refused_without_the_library_s_words(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("not an image")
    with pytest.raises(InputError, match="Accepted: PNG, JPEG") as caught:
        image_content(path)
    assert "cannot identify" not in str(caught.value)


@pytest.mark.parametrize("form", ["file", "pillow"])
def test_a_format_that_runs_a_program_is_refused_without_one(
    tmp_path: Path, form: Literal["file", "pillow"], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(os, "posix_spawn", start)
    out = io.BytesIO()
    Image.new("RGB", (30, 30)).save(out, "EPS")
    content = Content(form, out.getvalue())
    (tmp_path / "page.png").write_bytes(content.data)
    attempts = [content.label, content.pixels_sha256, lambda: image_content(tmp_path / "page.png")]
    if form == "pillow":
        attempts.append(content.value)
    for attempt in attempts:
        with pytest.raises(InputError, match="They are PostScript"):
            attempt()


def fill_published(folder: Path) -> None:
    for n in range(1, 5):
        (folder / f"text-{n}.txt").write_text(f"text {n}")
        (folder / f"page-{n}.png").write_bytes(encode(draw_page([f"page {n}"], (56, 56), seed=n)))
    (folder / "query.jpg").write_bytes(encode(draw_page(["query"], (56, 56)), "JPEG"))


def test_the_published_examples_take_their_inputs_from_a_folder(tmp_path: Path) -> None:
    fill_published(tmp_path)
    groups = published_groups(tmp_path)
    assert [len(g.scores) for g in groups] == [4, 4, 4, 4]
    assert groups[0].scores == (0.6839, 0.4432, 0.5904, 0.4548)
    assert groups[3].scores == (0.6276, 0.9922, 0.8091, 0.7941)
    assert groups[0].group.query.value() == "slm markdown"
    (tmp_path / "text-1.txt").write_bytes(b"\xef\xbb\xbftext 1\r\n")  # as an editor may have saved it
    assert published_groups(tmp_path)[2].group.documents[0].value() == "text 1"
    assert groups[2].group.query.form == "file"
    assert [d.value() for d in groups[2].group.documents] == ["text 1", "text 2", "text 3", "text 4"]


def test_missing_published_inputs_are_listed_with_where_to_get_them(tmp_path: Path) -> None:
    fill_published(tmp_path)
    (tmp_path / "page-3.png").unlink()
    (tmp_path / "query.png").write_bytes(b"two of a kind")
    with pytest.raises(InputError, match=r"query\{.png.*page-3|page-3.*query\{.png") as caught:
        published_groups(tmp_path)
    assert "model card" in str(caught.value)
    assert "page-2" not in str(caught.value).split("\n")[0]


def test_case_files_hold_no_binaries() -> None:
    for path in CASES.rglob("*"):
        if path.is_file():
            assert path.suffix == ".toml"
            tomllib.loads(path.read_text(encoding="utf-8"))


def test_a_file_of_pairs_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pairs.jsonl")
    for path in (tmp_path / "pairs.jsonl", Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{path}: is a device, a pipe or a socket"):
            pairs_file(path)
    with pytest.raises(InputError, match="No such file"):
        pairs_file(tmp_path / "none.jsonl")
