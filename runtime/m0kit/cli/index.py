"""`m0kit index …`: adding documents to an index, looking at it, giving space back."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import click

from m0kit.artifact.ports import KV, Kept
from m0kit.cli.documents import count, find, read
from m0kit.cli.options import ARTIFACT, DOCUMENTS, JSON, SIZE, exit_code, loading, open_reranker, tell
from m0kit.errors import InputError, RecordDamagedError, StoreError
from m0kit.index import add, open_index
from m0kit.keeping.store import Store
from m0kit.plain import plain
from m0kit.reading.inputs import Given
from m0kit.reading.lines import strings
from m0kit.scoring.prepare import content_of
from m0kit.terminal import bar, say, show, show_json

_INDEX = click.argument("index_folder", metavar="INDEX", type=click.Path(path_type=Path))


@click.group()
def index() -> None:
    """Keep documents that were read once, so that a new query costs a fraction."""


@index.command("add")
@ARTIFACT
@_INDEX
@DOCUMENTS
@click.option(
    "--kv",
    type=click.Choice(KV),
    help="How states are kept, for a new index: 56, 28 or 14 KiB a token of the published model.  [default: fp16]",
)
@click.option("--max-bytes", type=SIZE, help="Limit of a new index on disk: 20G, 500M. None by default.")
@JSON
@loading
@click.pass_context
def add_command(
    ctx: click.Context,
    artifact: Path,
    index_folder: Path,
    documents: tuple[str, ...],
    kv: Kept | None,
    max_bytes: int | None,
    load: dict[str, Any],
    as_json: bool,
) -> None:
    """Read DOCUMENTS with ARTIFACT and keep them in INDEX, which is made where there is none.

    A document is a text file (UTF-8), an image or a page of a PDF; a folder or a pattern in quotes stands for those in
    it, `-` for one from stdin. A file of JSON lines (.jsonl, .ndjson) holds one a line, {"id": …, "text": …} or {"id":
    …, "image": …}. A file's id is its path as given, with #page=3 for that page of a PDF; a line's is file:line where
    "id" is null or missing, and a number's its digits. An id that comes again in one call must stand for the same
    document; one that INDEX has is replaced. Without DOCUMENTS, what INDEX knows but has no state of (damaged, pruned)
    is read again.
    """
    exists = index_folder.is_dir() and any(index_folder.iterdir())
    if exists:
        there = _kv_of(index_folder)
        if kv is not None and kv != there:
            raise click.UsageError(f"--kv: {index_folder} keeps {there}. Make another index.")
        kv = there
    elif not documents:
        raise click.UsageError(f"{index_folder} does not exist yet: give documents.")
    reranker = open_reranker(artifact, load, kv=kv or "fp16")
    with open_index(index_folder, reranker, max_bytes) as store:
        files, passed = find(documents), list[tuple[str, str]]()
        these = _named(read(files, passed)) if documents else _pending(store)
        with bar(unit="document", total=count(files) or None) as shown:
            done = add(reranker, store, these, shown.update, again=not documents)
    tell("note", passed)
    tell("note", ((name, "was too long and was cut") for name in done.truncated))
    tell("error", (_place_and_reason(name, error) for name, error in done.failed))
    if as_json:
        show_json(asdict(done))
    else:
        told = f"{index_folder}: {done.read} read ({done.tokens} tokens), {done.known} known already"
        told += f", {done.repeated} given twice" if done.repeated else ""
        told += f", {done.replaced} of them in the place of another content" if done.replaced else ""
        told += f", {done.dropped} states dropped to keep to the limit" if done.dropped else ""
        show(told + (f", {len(done.failed)} failed" if done.failed else ""))
    given = len(done.failed) + done.read + done.known + done.repeated
    ctx.exit(exit_code(len(done.failed), given, "read") if done.failed else 0)


@index.command()
@_INDEX
@JSON
def stats(index_folder: Path, as_json: bool) -> None:
    """What INDEX holds, and how much space it takes."""
    with Store.open(index_folder) as store:
        found = store.stats()
    if as_json:
        show_json(asdict(found))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.documents.items())) or "none"
    limit = "no limit" if found.max_bytes is None else f"limit {found.max_bytes / 2**20:.1f} MiB"
    rows = [
        ("documents", kinds),
        ("states", f"{found.records}, {found.live_bytes / 2**20:.1f} MiB with the documents themselves"),
        ("on disk", f"{found.disk_bytes / 2**20:.1f} MiB ({limit}), {found.dead_bytes / 2**20:.1f} MiB to compact"),
        ("precision", f"{found.identity.get('precision')}, states in {found.identity.get('kv')}"),
        ("artifact", found.identity.get("artifact")),
    ]
    for name, value in rows:
        show(f"{name:12} {value}")


@index.command()
@_INDEX
@JSON
@click.pass_context
def verify(ctx: click.Context, index_folder: Path, as_json: bool) -> None:
    """Read everything in INDEX against its checksums. Exit code 1 when something is damaged."""
    with Store.open(index_folder) as store:
        total = store.stats().live_bytes
        with bar(total=total, unit="B", unit_scale=True) as shown:
            found = store.verify(shown.update)
    damaged = sorted({name for names in found.damaged.values() for name in names})
    if as_json:
        facts = {"states": found.records, "damaged": damaged, "damaged_contents": list(found.contents)}
        facts |= {"segments": list(found.segments), "without_state": list(found.pending), "lost": found.lost}
        show_json(facts)
    else:
        show(f"{index_folder}: {found.records} states read, {len(found.damaged)} damaged")
        for name in damaged:
            show(f"damaged: the state of {name}; `m0kit index add ARTIFACT {index_folder}` reads it again")
        for name in found.contents:
            show(f"damaged: the document {name} itself; add it again from its source")
        for name in found.segments:
            show(f"missing or too short: {name}")
        if found.lost:
            show(f"lost: {found.lost} documents, of which only contents are there; add those again from their sources")
        if found.pending:
            show(f"{len(found.pending)} documents have no state and are computed whenever they are asked for")
    ctx.exit(0 if found.clean else 1)


@index.command()
@_INDEX
@click.option("--max-bytes", type=SIZE, help="Drop the states used longest ago until INDEX takes so much.")
@click.option("--unused-days", type=click.FloatRange(0), help="Drop the states not used for so long.")
@click.option("--remove", type=click.File("rb"), help="Forget the documents whose ids stand in this file.")
@click.pass_context
def prune(
    ctx: click.Context, index_folder: Path, max_bytes: int | None, unused_days: float | None, remove: Any
) -> None:
    """Drop states, or whole documents, from INDEX. A document without a state can still be asked for."""
    if max_bytes is None and unused_days is None and remove is None:
        raise click.UsageError("Say what to drop: --max-bytes, --unused-days or --remove.")
    ids = list(read_ids(remove)) if remove else []
    with Store.open(index_folder, writable=True) as store:
        before = store.stats()
        absent = store.remove(name for name, error in ids if error is None)
        bad = [error for _, error in ids if error]
        tell("error", [*(("", str(error)) for error in bad), *((repr(name), "no such document") for name in absent)])
        store.prune(max_bytes=max_bytes, unused_days=unused_days)
        after = store.stats()
    removed = sum(before.documents.values()) - sum(after.documents.values())
    told = f"{index_folder}: " + (f"{removed} documents removed, " if remove else "")
    freed = max(0, before.disk_bytes - after.disk_bytes)
    told += f"{before.records - after.records} states dropped, {_size(freed)} given back"
    if after.dead_bytes:
        told += f"; `m0kit index compact {index_folder}` gives back {_size(after.dead_bytes)} more"
    show(told)
    if max_bytes is not None and after.disk_bytes > max_bytes:
        say(f"note: {_size(after.disk_bytes)} are left, of documents themselves and the database")
    num_failed = len(absent) + len(bad)
    ctx.exit(exit_code(num_failed, len(dict(ids)), "removed") if num_failed else 0)


@index.command()
@_INDEX
def compact(index_folder: Path) -> None:
    """Give the space of dropped states in INDEX back to the file system."""
    with Store.open(index_folder, writable=True) as store:
        total = store.stats().dead_bytes
        with bar(total=total, unit="B", unit_scale=True) as shown:
            found = store.compact(shown.update)
    for names in found.damaged.values():
        say(f"note: the damaged state of {', '.join(names)} was left out")
    show(f"{index_folder}: {_size(found.freed_bytes)} given back")


def _size(num_bytes: int) -> str:
    return f"{num_bytes} bytes" if num_bytes < 2**20 else f"{num_bytes / 2**20:.1f} MiB"


def _place_and_reason(name: str, error: str) -> tuple[str, str]:
    """The two parts of a message, so that one that many documents have is told once."""
    before, there, reason = error.partition(f"{plain(name)}: ")
    return (before + plain(name), reason) if there else ("", error)


def read_ids(file: BinaryIO) -> Iterator[tuple[str, InputError | None]]:
    """An id for each line that is not blank; for one that cannot be read its place, and why. Raises InputError."""
    for number, text in strings(file, file.name):
        if isinstance(text, InputError):
            yield f"{file.name}:{number}", InputError(f"{file.name}:{number}: {text}")
        else:
            yield text, None


def _named(documents: Iterable[Given]) -> Iterator[Given]:
    """Ids that UTF-8 can write, for files whose names it cannot."""
    for name, content, source in documents:
        place = click.format_filename(source)
        yield place if name == source else name, content, place


def _kv_of(folder: Path) -> Kept | None:
    """How the index keeps states."""
    try:
        store = Store.open(folder)
    except StoreError:  # perhaps because of what a killed writer left, which this rolls back
        store = Store.open(folder, writable=True)
    with store:
        return next((kv for kv in KV if kv == store.identity.get("kv")), None)


def _pending(store: Store) -> Iterator[Given]:
    """Documents whose state is not there or damaged."""
    found = store.verify()
    damaged = [name for names in found.damaged.values() for name in names]
    for name in dict.fromkeys([*found.pending, *damaged]):
        try:
            document = store.document(name)
        except RecordDamagedError as error:  # the document itself
            yield name, InputError(f"{name}: {error}"), ""
            continue
        if document is not None:
            yield name, content_of(document), document.source
