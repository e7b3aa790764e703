"""Judged queries: what to rank, and how relevant each document is. Owns the reading of them.

    queries, errors = read_judged(Path("judged.jsonl"))

A line of judged.jsonl is {"query": …, "documents": […], "relevance": [whole numbers]}; query and documents are
strings (text), {"text": …} or {"image": path or data URI}, paths relative to the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from m0kit.errors import InputError
from m0kit.reading.inputs import group_from_file, shown
from m0kit.reading.lines import records
from m0kit_parity.small.evaluate import KINDS, read_set
from m0kit_parity.small.files import SMALL

_MAX_GRADE: Final = 30  # gains are 2^grade − 1; judgements go up to 4 or 5, so more is a mistake in the file


@dataclass(frozen=True, slots=True)
class Query:
    """One query with its documents, in the forms that `Reranker` takes; `where` names its line."""

    where: str
    query: Any
    documents: tuple[Any, ...]
    relevance: tuple[int, ...] | None  # None: not judged
    group: str = ""  # queries that were drawn together, over the same documents, have one; "": drawn by itself


def read_judged(path: Path) -> tuple[list[Query], dict[str, str]]:
    """The queries of a judged file, and what is wrong with its other lines: line → error.

    Judgements are optional for a file as a whole: once one line has them, all must. Raises InputError for a
    file that cannot be read or has no usable line.
    """
    queries: list[Query] = []
    errors: dict[str, str] = {}
    for number, record in records(path, '{"query": …, "documents": […], "relevance": […]}'):
        where = f"{path}: line {number}"
        try:
            if isinstance(record, InputError):
                raise record
            queries.append(_query(record, where, path.parent))
        except InputError as error:
            errors[where] = f"{where}: {error}"
    if any(query.relevance for query in queries):
        for query in queries:
            if query.relevance is None:
                errors[query.where] = (
                    f'{query.where}: no "relevance", which other lines of the file have. Add it, or leave the line out.'
                )
        queries = [query for query in queries if query.relevance]
    if not queries:
        first = next(iter(errors.values()), f"{path} is empty")
        raise InputError(f"no query that can be used: {first}")
    return queries, errors


def builtin_sets() -> dict[str, list[Query]]:
    """The evaluation sets of the small checkpoint, by name. Of pages two queries in a row are over the same ten."""
    return {
        kind: [
            Query(
                f"{kind}, line {number}", item.query, item.documents, item.relevance,
                f"pages {(number + 1) // 2}" if kind == "pages" else "",
            )
            for number, item in enumerate(read_set(SMALL / "eval", kind), 1)
        ]
        for kind in KINDS
    }  # fmt: skip


def _query(record: Mapping[str, Any], where: str, folder: Path) -> Query:
    # A misspelt "relevance" would be taken for a line without judgements.
    if unknown := [key for key in record if key not in ("query", "documents", "relevance", "id")]:
        raise InputError(f'unknown key {shown(unknown[0])}. Known are "query", "documents", "relevance", "id".')
    query, documents = group_from_file(record, folder)
    relevance = record.get("relevance")
    if len(documents) < 2:
        raise InputError('"documents" must be a list of two or more: with fewer there is no order.')
    if relevance is None:
        return Query(where, query, tuple(documents), None)
    if not isinstance(relevance, list) or len(relevance) != len(documents):
        count = f"{len(relevance)} entries" if isinstance(relevance, list) else type(relevance).__name__
        raise InputError(f'"relevance" must have one number for each of {len(documents)} documents, not {count}.')
    if wrong := [grade for grade in relevance if type(grade) is not int or not 0 <= grade <= _MAX_GRADE]:
        raise InputError(f'"relevance" must be whole numbers from 0 to {_MAX_GRADE}, got {shown(wrong[0])}.')
    if not any(relevance):
        raise InputError("no document is relevant, so nDCG is not defined. Mark one, or leave the line out.")
    return Query(where, query, tuple(documents), tuple(relevance))
