"""Judged files are read line by line, and a bad line is named."""

import os
import re
from pathlib import Path

import pytest
from PIL import Image
from tests.parity.evaluate.conftest import judged, row

from m0kit.errors import InputError
from m0kit_parity.evaluate.judged import Query, read_judged


def test_a_judged_file_is_read_with_paths_relative_to_it(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "p.png")
    documents = ["text", {"text": "more"}, {"image": "p.png"}]
    path = judged(tmp_path, row({"image": "p.png"}, documents, relevance=[0, 2, 1]), "", row(relevance=[1, 0, 0]))
    queries, errors = read_judged(path)
    assert errors == {}
    assert queries[0] == Query(
        f"{path}: line 1",
        {"image": tmp_path / "p.png"},
        ("text", {"text": "more"}, {"image": tmp_path / "p.png"}),
        (0, 2, 1),
    )
    assert queries[1].where == f"{path}: line 3", "empty lines count"


BAD = {
    "the line is not JSON": '{"query": ',
    'expected "query" with "document" or "documents"': {"query": "q"},
    "expected .* got list": "[1, 2]",
    "the key 'query' twice": '{"query": "a", "query": "b", "documents": ["a", "b"]}',
    "unknown key 'score'": row(score=1),
    "list of two or more": row(documents=["only one"]),
    "must be a list": row(documents="a text"),
    "query: is empty": row(query="", relevance=[1, 0, 0]),
    "document 2: expected text": row(documents=["a", 7], relevance=[1, 0]),
    "document 1: .*gone.png: No such file": row(documents=[{"image": "gone.png"}, "b"], relevance=[1, 0]),
    "one number for each of 3 documents, not 2": row(relevance=[1, 0]),
    "one number for each of 3 documents, not str": row(relevance="yes"),
    "whole numbers from 0 to 30, got -1": row(relevance=[1, -1, 0]),
    "whole numbers from 0 to 30, got True": row(relevance=[1, True, 0]),
    "whole numbers from 0 to 30, got 0.5": row(relevance=[1, 0.5, 0]),
    "whole numbers from 0 to 30, got 31": row(relevance=[1, 31, 0]),
    "no document is relevant": row(relevance=[0, 0, 0]),
    'no "relevance", which other lines': row(),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_line_is_named_and_costs_the_others_nothing(message: str, tmp_path: Path) -> None:
    good = row(relevance=[1, 0, 0])
    path = judged(tmp_path, good, BAD[message], good)
    queries, errors = read_judged(path)
    assert [query.where for query in queries] == [f"{path}: line 1", f"{path}: line 3"]
    assert list(errors) == [f"{path}: line 2"]
    assert errors[f"{path}: line 2"].startswith(f"{path}: line 2: ")
    assert re.search(message, errors[f"{path}: line 2"])


def test_a_file_without_any_usable_line_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl: No such file"):
        read_judged(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"no query that can be used: .*judged\.jsonl is empty"):
        read_judged(judged(tmp_path, ""))
    with pytest.raises(InputError, match=r"no query that can be used: .*judged\.jsonl: line 1: the line is not JSON"):
        read_judged(judged(tmp_path, "{", "["))
    (tmp_path / "judged.jsonl").write_text('{"query": "q"}', "utf-16")
    with pytest.raises(InputError, match="is UTF-16"):
        read_judged(tmp_path / "judged.jsonl")


def test_a_judged_file_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "judged.jsonl")
    for path in (tmp_path / "judged.jsonl", Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{path}: is a device, a pipe or a socket"):
            read_judged(path)
