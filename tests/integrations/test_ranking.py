"""What the integrations share, which needs none of their packages."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from m0kit import Reranker
from m0kit.errors import DependencyError, ImageError, InputError
from m0kit.integrations.ranking import arank, check_top, missing, opened, rank

PLACES = ["documents[0]", "documents[1] (id 7)"]


def test_it_ranks_as_the_reranker_does_and_says_every_score(reranker: Reranker) -> None:
    documents = ["a b", "tide", "tide", "a small model"]
    ranking = rank(reranker, "slm markdown", documents, ["", "", "", ""])
    assert [index for index, _ in ranking] == [one["index"] for one in reranker.rerank("slm markdown", documents)]
    assert [result.score for _, result in ranking] == sorted((result.score for _, result in ranking), reverse=True)
    assert asyncio.run(arank(reranker, "slm markdown", documents, ["", "", "", ""])) == ranking


@pytest.mark.parametrize(
    ("query", "documents", "kind", "said"),
    [
        ("q", ["a", ""], InputError, "documents[1] (id 7): is empty. Give some text, or leave the pair out."),
        ("q", ["a", Path("no.png")], ImageError, "documents[1] (id 7): no.png: No such file or directory."),
        ("q", ["a", {"image": "no.png"}], ImageError, 'documents[1] (id 7): a string under "image" must be'),
        ("q", ["a", 7], InputError, "documents[1] (id 7): expected text (str), an image"),
        ("", ["a", "b"], InputError, "query: is empty. Give some text, or leave the pair out."),
    ],
)
def test_an_error_names_the_document(
    reranker: Reranker, query: Any, documents: list[Any], kind: type[InputError], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        rank(reranker, query, documents, PLACES)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(said)


def test_what_was_cut_is_logged_once_for_the_query_and_by_name(
    artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = Reranker.load(artifact, threads=1).with_limits(max_length=64, max_query_length=16)
    rank(short, "word " * 100, ["a " * 200, "b"], PLACES)
    assert [record.getMessage() for record in caplog.records] == [
        "the query was too long and was cut",
        "documents[0] was too long and was cut",
    ]


def test_a_task_that_is_cancelled_ends_the_work(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go, ended = threading.Event(), threading.Event(), threading.Event()
    stream, seen = Reranker.stream, list[int]()

    def slow(self: Reranker, pairs: Any, **options: Any) -> Any:
        try:
            for position, result in stream(self, pairs, **options):
                seen.append(position)
                started.set()
                assert go.wait(60)
                yield position, result
        finally:
            ended.set()

    monkeypatch.setattr(Reranker, "stream", slow)

    async def cancelled() -> None:
        task = asyncio.create_task(arank(reranker, "q", ["a", "b", "c", "d"], ["", "", "", ""]))
        assert await asyncio.to_thread(started.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    asyncio.run(cancelled())
    assert ended.wait(60)
    assert len(seen) == 1


def test_a_model_is_a_reranker_or_a_path(reranker: Reranker, artifact: Path) -> None:
    assert opened(reranker, "cpu", None) is reranker
    for path in (artifact, str(artifact)):
        made = opened(path, "cpu", {"threads": 1, "cache_bytes": 1 << 20})
        assert made.cache is not None
    with pytest.raises(TypeError, match="expected a Reranker or the path of an artifact, got int"):
        opened(7, "cpu", None)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3"])
def test_how_many_is_a_number_of_one_or_more(value: Any) -> None:
    with pytest.raises(ValueError, match=r"top_n: got .*, expected 1 or more, or None for all\."):
        check_top(value, "top_n")
    check_top(None, "top_n")
    with pytest.raises(ValueError, match=r"expected 1 or more\."):
        check_top(None, "top_n", or_all=False)


def test_the_folder_imports_no_framework() -> None:
    frameworks = ["langchain_core", "llama_index", "haystack", "pydantic"]
    script = f"import sys, m0kit.integrations; assert not [n for n in {frameworks} if n in sys.modules]"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("langchain", "langchain_core", "langchain"),
        ("llama_index", "llama_index", "llama-index"),
        ("haystack", "haystack", "haystack"),
    ],
)
def test_a_framework_that_is_not_there_is_one_sentence_that_names_the_extra(
    module: str, package: str, extra: str
) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from m0kit.errors import DependencyError\n"
        f"try:\n    import m0kit.integrations.{module}\n"
        "except DependencyError as error:\n    print(error, error.__cause__, error.__suppress_context__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    said = f"this integration needs {package}. pip install 'm0kit[{extra}]'"
    assert (done.stdout, done.stderr) == (f"{said} None True\n", "")


def test_a_framework_that_is_broken_speaks_for_itself() -> None:
    inner = ModuleNotFoundError("No module named 'yaml'", name="yaml")
    assert missing(inner, "langchain_core", "langchain") is inner
    older = ImportError("cannot import name", name="langchain_core.documents")
    assert isinstance(missing(older, "langchain_core", "langchain"), DependencyError)
