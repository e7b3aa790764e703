"""What m0kit reads that others wrote: a table of surfaces. Owns their seeds, how they are damaged, and what must hold.

To add one: write a function that imports what it needs and returns a `Surface`, and name it in SURFACES.

    def notes() -> Surface:
        from m0kit.notes import read_notes

        def target(folder: Path) -> object:                  # what a user would call; an M0kitError may come out
            found = read_notes(folder / "input")
            if found.total != len(found.items):              # what must hold where none came out
                raise Wrong("it counts what is not there")
            return found.items                               # what was said: no secret may be in it

        return Surface(
            seeds={"whole": {"input": b"..."}, **committed("notes")},   # + files in tests/fuzz/seeds/notes/
            mutate=lambda random, files: {"input": mutate.data(random, files["input"])},
            target=target,
        )

An input may be several files (`base` are those that all inputs share), and links and pipes among them: "../canary" is
a folder of somebody else beside the input's. An input that failed becomes a seed: `--replay` with `-o` writes it.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import struct
import tarfile
import tempfile
import tomllib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest import mock

from tests.fuzz import mutate, server
from tests.fuzz.runner import MTIME_NS, SECRET, Files, Link, Pipe, Surface, Wrong, committed, controls, remove_at_end

# A program that empties a file, where somebody runs it.
EPS: Final = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary/victim) (w) file closefile\n"
_ARTIFACTS: Final = Path(__file__).parent.parent / "artifacts" / "tiny.tar.xz"


# --- what surfaces share ---------------------------------------------------------------------------------


@functools.cache
def artifact() -> dict[str, bytes]:
    """The committed tiny artifact in fp32."""
    with tarfile.open(_ARTIFACTS) as archive:
        found = {entry.name: archive.extractfile(entry) for entry in archive if entry.name.startswith("fp32/")}
        return {name.removeprefix("fp32/"): file.read() for name, file in found.items() if file is not None}


@functools.cache
def checkpoint() -> dict[str, bytes]:
    """The tiny random checkpoint."""
    from m0kit_parity.samples.checkpoints import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "tiny", "tiny")
        return tree(Path(folder) / "tiny")


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def always() -> Iterator[None]:
    """What is written holds neither the time nor anything else that is another one in another process."""
    with mock.patch("time.time", return_value=1e9), mock.patch("secrets.token_hex", lambda size: "0" * 2 * size):
        yield


def one(random: Random, files: Files, change: Mapping[str, Callable[[Random, bytes], bytes]]) -> Files:
    """One of the files that are there, changed in its way."""
    there = [name for name in change if isinstance(files.get(name), bytes)]
    if not there:
        return files
    name = random.choice(there)
    raw = files[name]
    assert isinstance(raw, bytes)
    return {**files, name: change[name](random, raw)}


def places(random: Random, files: Files, names: Sequence[str]) -> Files:
    """A name that leads elsewhere, or is no file."""
    targets = ("../canary/secret.txt", "@/canary/victim", "../canary", "/dev/zero", "nowhere", "/dev/full", names[0])
    return {**files, random.choice(names): Pipe() if random.random() < 0.1 else Link(random.choice(targets))}


def command(one: Any, *words: object) -> str:
    """What a command of m0kit says, on both streams. Raises Wrong where that is no plain text, or unexpected."""
    from m0kit.terminal import run

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run(lambda: one.main([str(word) for word in words], standalone_mode=False))
    said = out.getvalue()
    if what := controls(said.replace("\n", "")):
        raise Wrong(f"`m0kit {one.name}` prints {what}")
    if "error: unexpected" in said or code not in (0, 1, 2, 3):
        raise Wrong(f"`m0kit {one.name}` says {said[said.find('error: unexpected') :][:100]!r}, exit code {code}")
    return said


# --- images and contents ---------------------------------------------------------------------------------


def image() -> Surface:
    from m0kit.config import ImageConfig
    from m0kit.reading.inputs import Picture, parse_content
    from m0kit.scoring.image import patchify, resize

    config = ImageConfig(4 * 28 * 28, 16 * 28 * 28, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 1 / 255, 14, 2, 2)

    def target(folder: Path) -> None:
        content = parse_content((folder / "input").read_bytes(), "pair 0: document")
        assert isinstance(content, Picture)
        pixels = resize(content, config, "pair 0: document")
        patches = patchify(pixels, config)
        if patches.values.shape != (int(pixels.grid_thw.prod()), 1176):
            raise Wrong(f"{int(pixels.grid_thw.prod())} patches of shape {patches.values.shape}")

    seeds = committed("image")
    raws = [files["input"] for files in seeds.values() if isinstance(files["input"], bytes)]
    made = {
        "png-57-bytes": png(70_000_000, 1),
        "png-many-pixels": png(50_000, 50_000),
        "png-profile-bomb": png(8, 8, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(64 << 20)))),
        "png-text-bomb": png(8, 8, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(64 << 20)))),
        "once-jpeg-600-scans": scans(_bytes(seeds["progressive.jpg"]), 600),
        "once-bmp-run-lengths": bmp_runs(),
        "eps": EPS,
    }
    return Surface(
        seeds={**seeds, **{name: {"input": raw} for name, raw in made.items()}},
        mutate=lambda random, files: {"input": mutate.data(random, _bytes(files), raws)[: 1 << 17]},
        target=target,
    )


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of 57 bytes and `more` chunks that says it has so many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def scans(jpeg: bytes, times: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times, and that claims 8000×8000 pixels."""
    frame = jpeg.index(b"\xff\xc2")
    jpeg = jpeg[: frame + 5] + struct.pack(">HH", 8000, 8000) + jpeg[frame + 9 :]
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * times + jpeg[-2:]


def bmp_runs() -> bytes:
    """A BMP in run lengths whose lines are one pixel and an end each."""
    side = 9000
    runs = b"\1\5\0\0" * side + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(runs), 0, 0, 54 + 1024) + head + bytes(1024) + runs


def content() -> Surface:
    """A value as Python's callers, JSON lines and Parquet have it; strings of images above all."""
    from m0kit.config import ImageConfig
    from m0kit.errors import InputError
    from m0kit.reading.inputs import Picture, from_file, parse_content, parse_pair
    from m0kit.scoring.image import resize

    config = ImageConfig(4 * 28 * 28, 16 * 28 * 28, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 1 / 255, 14, 2, 2)

    def target(folder: Path) -> object:
        try:
            value = json.loads((folder / "input").read_bytes())
        except (ValueError, RecursionError):  # what reads JSON is the next surface's
            return None
        said: list[object] = []
        for parse in (
            parse_content,
            lambda v, _: parse_pair(v),
            lambda v, where: parse_content(from_file(v, folder), where),
        ):
            try:
                found = parse(value, "pair 0: document")
                if isinstance(found, Picture):
                    resize(found, config, "pair 0: document")
            except InputError as error:
                said.append(error)
        return said

    page = _bytes(committed("image")["page.png"])
    letters = base64.b64encode(page).decode()
    values: dict[str, Any] = {
        "text": "slm markdown",
        "explicit": {"text": "slm markdown"},
        "uri": {"image": f"data:image/png;base64,{letters}"},
        "percent": {"image": "data:image/png;charset=x;base64," + letters.replace("+", "%2B").replace("/", "%2f")},
        "bare": {"image": letters},
        "bytes": {"image": {"bytes": letters, "path": "page.png"}},
        "path": {"image": "page.png"},
        "url": {"image": "http://localhost/page.png"},
        "pair": ["slm", {"image": "page.png"}],
        "zero": {"image": "/dev/zero"},
        "linked-zero": {"image": "zero"},
        "pipe": {"image": "pipe"},
        "secret": {"image": "../canary/secret.txt"},
        "linked-secret": {"image": "link.png"},
        "folder": {"image": "."},
        "descriptor": {"image": "/proc/self/fd/0"},
        "memory": {"image": "/proc/self/mem"},
        "id": {"id": "page.png"},
    }
    return Surface(
        seeds={**{n: {"input": json.dumps(v).encode()} for n, v in values.items()}, **committed("content")},
        mutate=lambda random, files: {"input": mutate.json_tree(random, _bytes(files))},
        target=target,
        base={"page.png": page, "pipe": Pipe(), "zero": Link("/dev/zero"), "link.png": Link("../canary/secret.txt")},
    )


# --- jobs ------------------------------------------------------------------------------------------------


def _score(pair: Any) -> float:
    """A score that depends on the pair alone."""
    return zlib.crc32(repr(sorted(str(value)[:999] for value in pair.values())).encode("utf-8", "replace")) / 2**32


class _Scorer:
    """Stands for a Reranker: reads contents as it does, and needs no engine."""

    def stream(self, pairs: Sequence[Any], **_: Any) -> Iterator[tuple[int, Any]]:
        from m0kit.config import ImageConfig
        from m0kit.errors import InputError
        from m0kit.reading.inputs import Picture, parse_pair
        from m0kit.scoring.image import resize
        from m0kit.scoring.schedule import Result

        config = ImageConfig(4 * 28 * 28, 16 * 28 * 28, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 1 / 255, 14, 2, 2)
        for position, pair in enumerate(pairs):
            try:
                found = parse_pair(pair)
                for part in (found.query, found.document):
                    if isinstance(part, Picture):
                        resize(part, config, f"pair {position}")
                yield position, Result(_score(pair), _score(pair))
            except InputError as error:
                yield position, Result(float("nan"), float("nan"), error)


def _scored(folder: Path, name: str, stop_after: int | None = None) -> object:
    """Score a file with a stand-in for the engine, and look at the output."""
    import numpy as np

    from m0kit.errors import M0kitError
    from m0kit.jobs.engine import score_rows
    from m0kit.jobs.job import score_file

    class StoppedError(M0kitError):
        pass

    def engine(_: Path, __: Mapping[str, Any], work: Any) -> Any:
        done = 0
        for window in work:
            for result in score_rows(_Scorer(), window):  # type: ignore[arg-type]
                yield result
                done += 1
                if done == stop_after:
                    raise StoppedError
            yield None

    output = folder / "out.jsonl"
    try:
        summary = score_file(_artifact_for_jobs(), folder / name, output, engine=engine)
    except StoppedError:
        return None
    rows = [json.loads(line) for line in output.read_bytes().splitlines()]
    if [row["row"] for row in rows] != list(range(summary.rows)):
        raise Wrong("the output has not a row for each")
    for row in rows:
        if (row["score"] is None) == (row["error"] is None):
            raise Wrong("a row has neither a score nor an error, or both")
        if row["score"] is not None and not 0 <= row["score"] <= float(np.float32(1)):
            raise Wrong("a row has a score that none could have")
    return rows


@functools.cache
def _artifact_for_jobs() -> Path:
    """A folder that stays until the process ends, which removes it. What it is, is looked up once."""
    import onnxruntime  # noqa: F401  (before children are forked)

    from m0kit import reranker  # noqa: F401
    from m0kit.jobs import job as jobs

    folder = Path(tempfile.mkdtemp(prefix="m0kit-fuzz-artifact-"))
    remove_at_end(str(folder))
    for name, content in artifact().items():
        (folder / name).write_bytes(content)
    known = jobs.dependencies(folder, {})
    jobs.dependencies = lambda *_: known  # type: ignore[assignment]
    return folder


def lines() -> Surface:
    """Rows of JSON lines, scored into a file."""
    _artifact_for_jobs()
    page = _bytes(committed("image")["page.png"])
    uri = f"data:image/png;base64,{base64.b64encode(page).decode()}"
    documents: dict[str, Any] = {
        "text": "a text",
        "text-object": {"text": "a text"},
        "file": {"image": "page.png"},
        "uri": {"image": uri},
        "zero": {"image": "/dev/zero"},
        "pipe": {"image": "pipe"},
        "secret": {"image": "../canary/secret.txt"},
        "bomb": {"image": "data:image/png;base64," + base64.b64encode(png(70_000_000, 1)).decode()},
    }
    ids: dict[str, str] = {
        "number": "9" * 19,
        "long": "9" * 400,
        "nan": "NaN",
        "infinite": "-Infinity",
        "exponent": "1e999",
        "surrogate": '"\\ud800"',
        "nested": "[" * 9000 + "]" * 9000,
        "twice": '1, "id": 2',
        "object": '{"a": [1]}',
    }
    plain = b'{"query": "q", "document": "d", "id": "a"}\n'
    seeds: dict[str, Files] = {
        f"document-{n}": {"rows.jsonl": plain + json.dumps({"query": "q", "document": d}).encode() + b"\n" + plain}
        for n, d in documents.items()
    }
    seeds |= {
        f"id-{n}": {"rows.jsonl": plain + b'{"query": "q", "document": "d", "id": ' + letters.encode() + b"}\n" + plain}
        for n, letters in ids.items()
    }
    seeds |= {
        "whole": {"rows.jsonl": plain * 3},
        "no-line-end": {"rows.jsonl": plain.strip()},
        "mark": {"rows.jsonl": b"\xef\xbb\xbf" + plain + b"\xef\xbb\xbf" + plain},
        "utf-16": {"rows.jsonl": b"\xff\xfe" + plain.decode().encode("utf-16-le")},
        "output-is-a-link": {"rows.jsonl": plain, ".out.jsonl.unfinished": Link("../canary/victim")},
        "errors-are-a-link": {"rows.jsonl": b"x\n", "out.jsonl.errors.jsonl": Link("../canary/victim")},
        "errors-aside-are-a-link": {
            "rows.jsonl": b"x\n",
            ".out.jsonl.errors.jsonl.unfinished": Link("../canary/victim"),
        },
    }

    def change(random: Random, raw: bytes) -> bytes:
        rows = raw.split(b"\n")
        at = random.randrange(len(rows))
        rows[at] = mutate.json_tree(random, rows[at]).replace(b"\n", b"") if random.random() < 0.8 else rows[at]
        return b"\n".join(rows) if random.random() < 0.9 else mutate.data(random, b"\n".join(rows))

    def mutated(random: Random, files: Files) -> Files:
        if random.random() < 0.05:
            names = (".out.jsonl.unfinished", "out.jsonl.errors.jsonl", ".out.jsonl.errors.jsonl.unfinished")
            return places(random, files, names)
        return one(random, files, {"rows.jsonl": change})

    return Surface(
        seeds={**seeds, **committed("lines")},
        mutate=mutated,
        target=lambda folder: _scored(folder, "rows.jsonl"),
        base={"page.png": page, "pipe": Pipe()},
    )


def parquet() -> Surface:
    """Rows of Parquet, scored into a file."""
    import pyarrow as pa
    import pyarrow.parquet

    pa.set_cpu_count(1)
    _artifact_for_jobs()
    seeds = committed("parquet", "rows.parquet")
    raws = [_bytes(files, "rows.parquet") for files in seeds.values()]

    def change(random: Random, raw: bytes) -> bytes:
        footer = int.from_bytes(raw[-8:-4], "little") + 8 if len(raw) > 8 else 0
        if not 8 < footer < len(raw) or random.random() < 0.3:
            return mutate.data(random, raw, raws)
        # What says where and what everything is stands at the end.
        changed = mutate.data(random, raw[-footer:-8], [other[-200:-8] for other in raws])
        length = len(changed) if random.random() < 0.9 else random.choice(mutate.NUMBERS) % 2**32
        return raw[:-footer] + changed + length.to_bytes(4, "little") + b"PAR1"

    return Surface(
        seeds=seeds,
        mutate=lambda random, files: one(random, files, {"rows.parquet": change}),
        target=lambda folder: _scored(folder, "rows.parquet"),
        base={"page.png": _bytes(committed("image")["page.png"])},
    )


def journal() -> Surface:
    """What lies beside the output of a job that was stopped."""
    rows = [{"query": f"query {i % 3}", "document": f"document {i}", "id": i} for i in range(8)]
    rows[5]["document"] = ""  # an error
    source = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    partial, aside = ".out.jsonl.partial", ".out.jsonl.partial-journal"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "rows.jsonl").write_bytes(source)
        os.utime(folder / "rows.jsonl", ns=(MTIME_NS, MTIME_NS))
        _scored(folder, "rows.jsonl", stop_after=7)
        base: dict[str, bytes | Link | Pipe] = dict(tree(folder))
    stopped = base[partial]
    assert isinstance(stopped, bytes)
    wanted = {row["id"]: _score({k: row[k] for k in ("query", "document")}) for row in rows if row["document"]}

    def target(folder: Path) -> object:
        found = _scored(folder, "rows.jsonl")
        assert isinstance(found, list)
        for row in found:
            if row["score"] is not None and abs(row["score"] - wanted.get(row["id"], 9)) > 1e-6:
                raise Wrong("a score that was never computed was taken over")
            if row["error"] is not None and row["id"] in wanted:
                raise Wrong("an error that never was is told")
        if [row["id"] for row in found] != list(range(len(rows))):
            raise Wrong("an id that is not the row's was taken over")
        return found

    seeds: dict[str, Files] = {
        "whole": {partial: stopped},
        "super-journal": {partial: stopped, aside: super_journal("canary/victim")},
        "journal-is-a-link": {partial: stopped, aside: Link("../canary/victim")},
        "wal": {
            partial: stopped,
            f"{partial}-wal": Link("../canary/victim"),
            f"{partial}-shm": Link("../canary/victim"),
        },
        "link": {partial: Link("../canary/victim")},
        "unfinished-is-a-link": {partial: stopped, ".out.jsonl.unfinished": Link("../canary/victim")},
        "planted-score": {partial: edited(stopped, "UPDATE rows SET score = 0.75, logit = 0.75 WHERE row = 2")},
        "planted-row": {partial: edited(stopped, "UPDATE rows SET row = 7 WHERE row = 2")},
        "finishing": {partial: edited(stopped, "INSERT INTO facts VALUES ('finishing', 'True')")},
        "endless-view": {
            partial: edited(
                stopped,
                "ALTER TABLE rows RENAME TO was; CREATE VIEW rows AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL "
                "SELECT i + 1 FROM n) SELECT i AS row, '1' AS id, 1.0 AS score, 1.0 AS logit, NULL AS truncated, "
                "NULL AS error, NULL AS files FROM n",
            )
        },
        "files": {partial: edited(stopped, "UPDATE rows SET files = '[1' WHERE row = 2")},
        **committed("journal"),
    }

    def mutated(random: Random, files: Files) -> Files:
        if random.random() < 0.1:
            names = (
                aside,
                f"{partial}-wal",
                f"{partial}-shm",
                ".out.jsonl.unfinished",
                "out.jsonl.errors.jsonl",
                partial,
            )
            return places(random, files, names)
        if random.random() < 0.1:
            return {**files, aside: mutate.data(random, super_journal("canary/victim"))}
        return one(random, files, {partial: mutate.database, aside: mutate.data})

    del base[partial]
    return Surface(seeds, mutated, target, base)


def super_journal(name: str) -> bytes:
    """A journal of SQLite that says it is one of several, and that `name` lists them: it is deleted with them."""
    letters = name.encode()
    head = bytes.fromhex("d9d505f920a163d7") + struct.pack(">IIIII", 0, 0, 0, 512, 4096)
    end = struct.pack(">I", 0) + letters + struct.pack(">II", len(letters), sum(letters)) + head[:8]
    return head.ljust(512, b"\0") + end


def edited(raw: bytes, sql: str) -> bytes:
    """A database after some SQL."""
    import sqlite3

    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        db.deserialize(raw)
        db.execute("PRAGMA ignore_check_constraints = ON")
        with contextlib.suppress(sqlite3.Error):  # another version of the tables
            db.executescript(sql)
        return db.serialize()
    finally:
        db.close()


# --- index -----------------------------------------------------------------------------------------------


def index() -> Surface:
    """An index: its database, journals, segments and links, opened for reading and for writing."""
    from m0kit.cli.index import index as commands
    from m0kit.errors import RecordDamagedError
    from m0kit.keeping.store import Store, StoredDocument

    def key(name: str) -> bytes:
        return hashlib.sha256(name.encode()).digest()

    documents = [
        StoredDocument(n, "text", f"the text of {n}".encode() * 9, key(n), f"{n}.txt") for n in ("a", "b", "c")
    ]
    documents.append(StoredDocument("page", "image", _bytes(committed("image")["page.png"]), key("page"), "page.png"))
    records = {d.key: bytes([i + 1]) * (5000 + i) for i, d in enumerate(documents)}
    with tempfile.TemporaryDirectory() as made, always():
        folder = Path(made) / "index"
        with Store.create(folder, {"artifact": "x", "kv": "fp16"}) as store:
            store.add(documents[:3], {d.key: [records[d.key]] for d in documents[:3]})
            store.add(documents[3:], {d.key: [records[d.key]] for d in documents[3:]})
            store.remove(["b"])  # leaves room to compact
        base = tree(folder)
    written = {d.id: d for d in documents if d.id != "b"}

    def read(store: Store) -> bool:
        """Whether all is there, each as it was written."""
        complete = True
        for name in dict.fromkeys([*store.ids(), *written]):
            try:
                found = store.document(name)
                record = None if found is None else store.get(found.key)
            except RecordDamagedError:
                complete = False
                continue
            if found is None:
                complete = False
                continue
            if name in written and found != written[name]:
                raise Wrong("a document is not what was written")
            if name not in written and name != "new":
                raise Wrong("there is a document that was never written")
            if record is not None and name in written and bytes(record) != records[found.key]:
                raise Wrong("a document has a state that is not its own")
            complete = complete and record is not None
        return complete

    def target(folder: Path) -> object:
        said = []
        with Store.open(folder) as store:
            complete = read(store)
            found = store.verify()
            said.append((store.stats(), found, store.edition))
            if found.clean and not found.pending and not complete:
                raise Wrong("`verify` finds nothing where something is missing")
        if zlib.crc32((folder / "index.sqlite").read_bytes()) % 4 == 0:
            said.append(command(commands, "verify", folder) + command(commands, "stats", folder))
        with Store.open(folder, writable=True) as store:
            store.add([StoredDocument("new", "text", b"new", key("new"), "")], {key("new"): [b"n" * 100]})
            read(store)
            store.compact()
            store.prune(max_bytes=6 << 20)
            if read(store) < complete:
                raise Wrong("writing lost what was there")
        return said

    main = _bytes(base, "index.sqlite")
    segment = "segments/000001.kv"
    attacks = {
        "lost-sequence": "DELETE FROM sqlite_sequence",
        "low-sequence": "UPDATE sqlite_sequence SET seq = 0",
        "swapped-keys": "UPDATE documents SET key = (SELECT key FROM documents WHERE id = 'c') WHERE id = 'a'",
        "swapped-starts": "UPDATE pieces SET start = 4096 - start WHERE start < 8192",
        "negative-size": "UPDATE segments SET size = -4096",
        "large-size": "UPDATE segments SET size = 1 << 60",
        "escape-in-id": "UPDATE documents SET id = 'a' || char(27) || '[2J' WHERE id = 'a'",
        "endless-view": (
            "ALTER TABLE meta RENAME TO was; CREATE VIEW meta AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT "
            "i + 1 FROM n) SELECT 'x' || i AS name, '1' AS value FROM n"
        ),
        "endless-trigger": (
            "CREATE TRIGGER t AFTER INSERT ON documents BEGIN INSERT INTO documents (id, kind, key, content, source) "
            "SELECT id || 'x', kind, key, content, source FROM documents; END"
        ),
    }
    seeds: dict[str, Files] = {
        "whole": {},
        "super-journal": {"index.sqlite-journal": super_journal("canary/victim")},
        "lock-super-journal": {"lock.sqlite-journal": super_journal("canary/victim")},
        "journal-is-a-link": {"index.sqlite-journal": Link("../canary/victim")},
        "wal": {"index.sqlite-wal": Link("../canary/victim"), "index.sqlite-shm": Link("../canary/victim")},
        "lock-is-a-link": {"lock.sqlite": Link("../canary/victim")},
        "database-is-a-link": {"index.sqlite": Link("../canary/victim")},
        "segment-is-a-link": {segment: Link("../../canary/000001.kv")},
        "segment-is-a-pipe": {segment: Pipe()},
        "next-segment-is-a-link": {"segments/000002.kv": Link("../../canary/000001.kv")},
        "unknown-segment-is-a-link": {"segments/000099.kv": Link("../../canary/000001.kv")},
        "segments-cut-off": {segment: base[segment][:5000]},
        **{name: {"index.sqlite": edited(main, sql)} for name, sql in attacks.items()},
        **committed("index"),
    }

    def mutated(random: Random, files: Files) -> Files:
        files = {**base, **files}
        if random.random() < 0.1:
            return places(
                random,
                files,
                ("index.sqlite-journal", "index.sqlite-wal", "lock.sqlite", segment, "segments/000002.kv"),
            )
        if random.random() < 0.05:
            return {**files, "index.sqlite-journal": mutate.data(random, super_journal("canary/victim"))}
        change: dict[str, Callable[[Random, bytes], bytes]] = {"index.sqlite": mutate.database, segment: mutate.data}
        if random.random() < 0.8:
            del change[segment]
        return one(random, files, change)

    return Surface(seeds, mutated, target, base)


# --- artifact --------------------------------------------------------------------------------------------


class _NoEngine:
    """Opens nothing, and computes nothing."""

    def __call__(self, *_: Any, **__: Any) -> "_NoEngine":
        return self

    def run(self, *_: Any) -> dict[str, Any]:
        raise AssertionError("nothing was to be scored")


def fitted(raw: Any) -> None:
    """Make a manifest's digest fit."""
    if isinstance(raw, dict):
        raw.pop("sha256", None)
        with contextlib.suppress(ValueError, RecursionError):
            raw["sha256"] = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def with_files(files: Files, *names: str) -> Files:
    """An artifact whose manifest lists files as they are."""
    raw = json.loads(_bytes({**artifact(), **files}, "manifest.json"))
    for name in names:
        content = _bytes(files, name)
        raw["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    fitted(raw)
    return {**files, "manifest.json": json.dumps(raw).encode()}


def manifest() -> Surface:
    """manifest.json, its digest made to fit and not; and the files that it lists."""
    from m0kit.artifact.manifest import read_manifest, verify_files
    from m0kit.cli.commands import inspect
    from m0kit.errors import M0kitError
    from m0kit.reranker import Reranker

    whole = json.loads(artifact()["manifest.json"])
    whole.pop("sha256")
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def target(folder: Path) -> object:
        said = [command(inspect, folder)]
        read = read_manifest(folder)
        raw = json.loads((folder / "manifest.json").read_bytes())
        told = raw.pop("sha256", None)
        if raw != whole and told in (None, digest):
            raise Wrong("a manifest that was changed after it was written was taken")
        verify_files(folder, read)
        said.append(command(inspect, folder, "--json"))
        with contextlib.suppress(AssertionError, M0kitError):
            Reranker.load(folder, open_graph=_NoEngine(), kv="int8").close()
        return said

    def attack(change: Callable[[Any], object]) -> Files:
        raw = json.loads(artifact()["manifest.json"])
        change(raw)
        fitted(raw)
        return {"manifest.json": json.dumps(raw).encode()}

    text = artifact()["manifest.json"]
    seeds: dict[str, Files] = {
        "whole": {"manifest.json": text},
        "layers": attack(lambda m: m["model"]["decoder"].update(num_layers=10**9)),
        "heads": attack(lambda m: m["model"]["decoder"].update(num_kv_heads=10**9, num_heads=10**9)),
        "pixels": attack(lambda m: m["model"]["image"].update(max_pixels=10**15)),
        "nan": attack(lambda m: m["model"]["prompt"].update(logit_bias=float("nan"))),
        "infinite": attack(lambda m: m["model"]["decoder"].update(rope_theta=float("inf"))),
        "fraction": attack(lambda m: m["model"]["decoder"].update(num_layers=3.5)),
        "digits": {"manifest.json": text.replace(b'"num_layers": 3', b'"num_layers": ' + b"9" * 400)},
        "twice": {"manifest.json": text.replace(b'"scheme": "fp32"', b'"scheme": "int8", "scheme": "fp32"', 1)},
        "deep": {"manifest.json": b"[" * 100_000 + b"]" * 100_000},
        "escape-in-licence": attack(lambda m: m["provenance"].update(licence="mit\x1b[2K\rfiles  all as exported")),
        "newline-in-base": attack(lambda m: m["provenance"].update(base="x\nfiles        9 checked, all as exported")),
        "no-digest": {"manifest.json": json.dumps({**whole, "scheme": "int8"}).encode()},
        "no-answers": {"manifest.json": json.dumps({k: v for k, v in whole.items() if k != "known_answers"}).encode()},
        "outside": attack(lambda m: m["files"].update({"../canary/secret.txt": m["files"]["head.onnx"]})),
        "unlisted-data": attack(lambda m: m["files"].pop("decoder.onnx.data")),
        "manifest-is-a-link": {"manifest.json": Link("/dev/zero")},
        "manifest-is-a-pipe": {"manifest.json": Pipe()},
        "data-is-a-link": {"manifest.json": text, "decoder.onnx.data": Link("../canary/weights.data")},
        "tokenizer-is-a-pipe": {"manifest.json": text, "tokenizer.json": Pipe()},
        **committed("manifest", "manifest.json"),
    }

    def change(random: Random, raw: bytes) -> bytes:
        return mutate.json_tree(random, raw, fitted if random.random() < 0.7 else lambda _: None)

    def mutated(random: Random, files: Files) -> Files:
        if random.random() < 0.04:
            return places(random, files, ("manifest.json", "head.onnx", "head.onnx.data", "tokenizer.json"))
        return one(random, files, {"manifest.json": change})

    return Surface(seeds, mutated, target, artifact())


def graph() -> Surface:
    """The graphs' protobuf, with a hash that fits. What an engine dies of is told, and is no failure."""
    import numpy as np
    import onnxruntime  # noqa: F401  (before children are forked)

    from m0kit.artifact.manifest import read_manifest, verify_files
    from m0kit.scoring.sessions import open_graph

    def target(folder: Path) -> object:
        verify_files(folder, read_manifest(folder))
        name = (folder / "which").read_text()
        opened = open_graph(folder, name, threads=1)
        if name != "head":
            return None
        logit = opened.run({"hidden": np.zeros((1, 64), np.float32)}, ["logit"])["logit"]
        return np.asarray(logit)[:100]

    seeds: dict[str, Files] = {}
    for number, name in enumerate(("head", "head", "head", "head", "decoder", "vision")):  # the large ones take longer
        own = f"{name}.onnx"
        seeds[f"whole-{number}-{name}"] = {
            own: artifact()[own],
            "manifest.json": artifact()["manifest.json"],
            "which": name.encode(),
        }
    raw = artifact()["head.onnx"]
    for number, place in enumerate(("../canary/weights.data", "/etc/passwd", "", ".", "manifest.json", "canary.data")):
        moved = located(raw, place)
        files: Files = {"head.onnx": moved, "which": b"head"}
        if place == "canary.data":
            files = {**files, place: Link("../canary/weights.data")}
        seeds[f"location-{number}"] = with_files(files, "head.onnx")
    seeds |= committed("graph", "head.onnx")

    def mutated(random: Random, files: Files) -> Files:
        own = f"{_bytes(files, 'which').decode()}.onnx"
        files = one(random, files, {own: mutate.protobuf})
        return with_files(files, own) if random.random() < 0.95 else files

    return Surface(seeds, mutated, target, artifact(), native_may_die=True)


def located(raw: bytes, place: str) -> bytes:
    """A graph whose weights are said to lie in another file."""
    import onnx

    model = onnx.load_from_string(raw)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    return bytes(model.SerializeToString())


def tokenizer() -> Surface:
    """tokenizer.json, read as the runtime reads it, and some text through it."""
    from m0kit.config import PromptConfig
    from m0kit.scoring.prompt import PromptBuilder

    config = PromptConfig(379, 380, 382)
    texts = ("slm markdown", "数据库 e\u0301 🙂\r\n\t x", "a" * 3000, " " * 300, "<|image_pad|>")

    def target(folder: Path) -> object:
        builder = PromptBuilder(folder / "tokenizer.json", config)
        return [builder.build(text, text).token_ids[:9] for text in texts]

    text = artifact()["tokenizer.json"]

    def attack(**changes: Any) -> Files:
        return {"tokenizer.json": json.dumps({**json.loads(text), **changes}).encode()}

    def split(pattern: str) -> Any:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    grown = {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 4,
    }
    seeds: dict[str, Files] = {
        "whole": {"tokenizer.json": text},
        "grows": attack(normalizer=grown),
        "prepends": attack(normalizer={"type": "Prepend", "prepend": "x" * (1 << 20)}),
        "backtracks": attack(pre_tokenizer=split("(a+)+$|(a|a)*b")),
        "empty-pattern": attack(pre_tokenizer=split("")),
        "template": attack(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "padding": attack(
            padding={
                "strategy": {"Fixed": 1 << 40},
                "direction": "Right",
                "pad_to_multiple_of": 1 << 40,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            }
        ),
        "truncation": attack(
            truncation={"max_length": 3, "stride": 9, "strategy": "LongestFirst", "direction": "Right"}
        ),
        "unigram": attack(model={"type": "Unigram", "unk_id": 9, "vocab": [["a", float(-1)]]}),
        "no-vocabulary": attack(model={"type": "BPE", "vocab": {}, "merges": []}),
        "wordpiece": attack(
            model={
                "type": "WordPiece",
                "unk_token": "x",
                "continuing_subword_prefix": "é",
                "vocab": {},
                "max_input_chars_per_word": 3,
            }
        ),
        "zero": {"tokenizer.json": Link("/dev/zero")},
        "pipe": {"tokenizer.json": Pipe()},
        **committed("tokenizer", "tokenizer.json"),
    }
    return Surface(seeds, lambda r, files: one(r, files, {"tokenizer.json": mutate.json_tree}), target)


# --- checkpoints -----------------------------------------------------------------------------------------


def checkpoint_folder() -> Surface:
    """A checkpoint: config, preprocessing, index of shards, safetensors, tokenizer, licence."""
    from m0kit_export.checkpoint import open_checkpoint

    base = checkpoint()
    weights = "model.safetensors"

    def target(folder: Path) -> object:
        opened = open_checkpoint(folder)
        for name in opened.names[:3]:
            if tuple(opened.read(name).shape) != opened.shape(name):
                raise Wrong("a tensor has not the shape that is told")
        opened.num_bytes()
        opened.fingerprint()
        return opened

    def config(**changes: Any) -> Files:
        return {"config.json": json.dumps({**json.loads(base["config.json"]), **changes}).encode()}

    shard = "model-00001-of-00001.safetensors"
    names = list(tensors(base[weights]))
    split = {"config.json": base["config.json"], weights: Link("nowhere")}
    listed = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    seeds: dict[str, Files] = {
        "whole": {"config.json": base["config.json"]},
        "preprocessor": {"preprocessor_config.json": base["preprocessor_config.json"]},
        "tokenizer": {"tokenizer.json": base["tokenizer.json"]},
        "weights": {weights: base[weights]},
        "shards": {**split, shard: base[weights], "model.safetensors.index.json": json.dumps(listed).encode()},
        "shard-outside": {
            **split,
            "model.safetensors.index.json": json.dumps(
                {"weight_map": dict.fromkeys(names, "../canary/victim")}
            ).encode(),
        },
        "layers": config(num_hidden_layers=10**9),
        "digits": {
            "config.json": base["config.json"].replace(b'"hidden_size"', b'"x": ' + b"9" * 400 + b', "hidden_size"', 1)
        },
        "deep": {"config.json": b'{"a":' * 100_000 + b"1" + b"}" * 100_000},
        "licence": {"README.md": b"---\n" + b"license:\n" * 30_000, "LICENSE": b"x" * 70_000},
        "blanks": {"README.md": b"---" + b" \n" * 32_000},
        "escape-in-licence": {"README.md": b"---\nlicense: mit\x1b[2J\n---\n"},
        "pickle": {weights: Link("nowhere"), "pytorch_model.bin": b"cos\nsystem\n(S'true'\ntR."},
        "code": {
            "config.json": config(auto_map={"AutoModel": "modeling.Model"})["config.json"],
            "modeling.py": b"1 / 0",
        },
        "config-is-zero": {"config.json": Link("/dev/zero")},
        "config-is-a-pipe": {"config.json": Pipe()},
        "weights-are-a-pipe": {weights: Pipe()},
        "readme-is-a-link": {"README.md": Link("../canary/secret.txt")},
        **committed("checkpoint"),
    }
    change: dict[str, Callable[[Random, bytes], bytes]] = {
        **dict.fromkeys(("config.json", "preprocessor_config.json", "tokenizer.json"), mutate.json_tree),
        "model.safetensors.index.json": mutate.json_tree,
        **dict.fromkeys((weights, shard), safetensors),
        "README.md": mutate.data,
    }
    return Surface(seeds, lambda random, files: one(random, files, change), target, base)


def tensors(raw: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    size = int.from_bytes(raw[:8], "little")
    return {name: entry for name, entry in json.loads(raw[8 : 8 + size]).items() if name != "__metadata__"}


def safetensors(random: Random, raw: bytes) -> bytes:
    """A safetensors file with another header, or other bytes."""
    size = int.from_bytes(raw[:8], "little")
    if random.random() < 0.15 or size > len(raw):
        return mutate.data(random, raw)
    if random.random() < 0.15:
        at = 8 + size + random.randrange(len(raw) - 7 - size)
        return raw[:at] + random.choice((b"\xff\xff\xff\x7f", b"\0\0\x80\x7f", b"\0\0\xc0\xff")) + raw[at + 4 :]
    header = mutate.json_tree(random, raw[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


def adapter() -> Surface:
    """An adapter: its config, patterns among it, and weights."""
    import torch

    from m0kit_export import patterns
    from m0kit_export.adapter import AdapterSpec
    from m0kit_export.checkpoint import open_checkpoint
    from m0kit_export.merge import AdapterStack
    from m0kit_parity.samples.adapters import write_adapter

    torch.set_num_threads(1)
    owner = tempfile.mkdtemp(prefix="m0kit-fuzz-base-")
    remove_at_end(owner)
    for name, raw in checkpoint().items():
        (Path(owner) / name).write_bytes(raw)
    opened = open_checkpoint(owner)
    forms = {}
    with tempfile.TemporaryDirectory() as made:
        for form in ("plain", "patterns", "dora"):
            write_adapter(Path(made) / form, owner, form)
            forms[form] = tree(Path(made) / form)
            written = json.loads(forms[form]["adapter_config.json"]) | {"base_model_name_or_path": "base"}
            written["target_modules"] = sorted(written["target_modules"])  # PEFT's is a set
            forms[form] = {
                "adapter_config.json": json.dumps(written).encode(),
                "adapter_model.safetensors": forms[form]["adapter_model.safetensors"],
            }
    weights = "adapter_model.safetensors"

    # A helper tries patterns, and is given the time that many names may take; here there are few.
    patterns.WAIT_S = 0.1  # type: ignore[misc]

    def target(folder: Path) -> object:
        stack = AdapterStack.open([AdapterSpec(folder)], opened)
        if zlib.crc32((folder / "adapter_config.json").read_bytes()) % 8 == 0:
            stack.merged("model.layers.0.self_attn.q_proj.weight")
        return stack.provenance()

    def config(**changes: Any) -> Files:
        raw = {**json.loads(forms["plain"]["adapter_config.json"]), **changes}
        return {**forms["plain"], "adapter_config.json": json.dumps(raw).encode()}

    # Without end in Python's re, where a name does not match.
    endless = r"(([a-z_.0-9]+)+)+!"
    seeds: dict[str, Files] = {
        **{"patterns" if form == "patterns" else f"whole-{form}": files for form, files in forms.items()},
        "target-pattern": config(target_modules=endless),
        "exclude-pattern": config(exclude_modules=endless),
        "rank-pattern": config(rank_pattern={endless: 4}),
        "alpha-pattern": config(alpha_pattern={endless: 4}),
        "layers-pattern": config(layers_to_transform=[0], layers_pattern=endless),
        "layers-patterns": config(layers_to_transform=[0], layers_pattern=[r"(a|a)*" * 20, endless]),
        "broken-pattern": config(target_modules="(("),
        "rank": config(r=10**9),
        "negative-rank": config(r=-1),
        "rank-text": config(r="8"),
        "alpha": config(lora_alpha=float("nan")),
        "large-alpha": config(lora_alpha=10**400),
        "many-targets": config(target_modules=["x" * 100] * 20_000),
        "escape": config(peft_type="LORA\x1b[2J"),
        "config-is-zero": {**forms["plain"], "adapter_config.json": Link("/dev/zero")},
        "weights-are-a-pipe": {**forms["plain"], weights: Pipe()},
        **committed("adapter"),
    }
    change = {"adapter_config.json": mutate.json_tree, weights: safetensors}
    return Surface(seeds, lambda random, files: one(random, files, change), target)


# --- parity ----------------------------------------------------------------------------------------------


def golden() -> Surface:
    """A golden folder: its manifest, arrays and inputs, their hashes made to fit and not."""
    import numpy as np

    from m0kit.artifact.manifest import read_manifest
    from m0kit.trace import Trace
    from m0kit_parity.proof.cases import Case, Content, Group
    from m0kit_parity.proof.golden import Golden, record

    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "manifest.json").write_bytes(artifact()["manifest.json"])
        model = read_manifest(Path(made)).model

        class Tracer:
            def trace(self, *_: Any, **__: Any) -> Trace:
                some = np.arange(6, dtype=np.float32).reshape(2, 3)
                ids = np.arange(4, dtype=np.int64)
                grid = np.array([[1, 2, 2]], np.int64)
                return Trace(
                    token_ids=ids,
                    positions=np.zeros((3, 4), np.int64),
                    grid_thw=grid,
                    patches=(some,),
                    image_embeds=(some,),
                    hidden=some,
                    logit=0.5,
                    score=0.25,
                    layers=None,
                )

        page = Content("file", _bytes(committed("image")["page.png"]))
        case = Case(
            "tiny", "why", "mixed", False, (Group(Content("text", b"query"), (Content("text", b"text"), page)),)
        )
        record(
            Path(made) / "golden", [case], Tracer(), model=model, command="m0kit parity record", provenance={"a": "b"}
        )
        base = tree(Path(made) / "golden")
    base["manifest.json"] = json.dumps(json.loads(base["manifest.json"]) | {"created": "2026-01-01"}).encode()
    picture = next(name for name in base if name.endswith(".png"))

    def target(folder: Path) -> object:
        opened = Golden.open(folder)
        said: list[object] = [opened.command, opened.created, opened.provenance, opened.layers]
        fits = json.loads((folder / "manifest.json").read_bytes()).get("files") == files_of(base)
        for name in opened.case_names:
            case = opened.read(name)
            said.append((case.name, case.why, case.kind))
            for pair in case.pairs:
                said += [content.label() for content in pair.inputs if content.form != "text"]
            if fits and any((folder / n).read_bytes() != raw for n, raw in base.items() if n != "manifest.json"):
                raise Wrong("a file that was changed was taken")
        opened.require(model)
        return said

    def files_of(files: Files) -> Any:
        return json.loads(_bytes(files, "manifest.json"))["files"]

    def fitting(files: Files, *names: str) -> Files:
        """With the hashes of files as they are."""
        files = {**base, **files}
        raw = json.loads(_bytes(files, "manifest.json"))
        for name in names:
            content = _bytes(files, name)
            raw["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return {**files, "manifest.json": json.dumps(raw).encode()}

    def arrays(**some: Any) -> Files:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=True, **some)
        return fitting({"tiny.npz": buffer.getvalue()}, "tiny.npz")

    outside = json.loads(base["manifest.json"])
    outside["cases"][0]["file"] = "../canary/secret.txt"
    outside["files"]["../canary/secret.txt"] = {
        "bytes": 1,
        "sha256": hashlib.sha256(f"{SECRET}\n".encode() * 200).hexdigest(),
    }
    seeds: dict[str, Files] = {
        "whole": dict(base),
        "eps": fitting({picture: EPS}, picture),
        "png-bomb": fitting({picture: png(70_000_000, 1)}, picture),
        "once-npz-bomb": arrays(**{"0.0.token_ids": np.zeros(1 << 28, np.int8)}),
        "npz-objects": arrays(**{"0.0.token_ids": np.array([{}, None], object)}),
        "outside": {**base, "manifest.json": json.dumps(outside).encode()},
        "npz-is-zero": {**base, "tiny.npz": Link("/dev/zero")},
        "manifest-is-a-pipe": {**base, "manifest.json": Pipe()},
        "picture-is-a-link": {**base, picture: Link("../../canary/secret.txt")},
        **committed("golden"),
    }

    def mutated(random: Random, files: Files) -> Files:
        kind = random.random()
        if kind < 0.5:
            return one(random, files, {"manifest.json": mutate.json_tree})
        name = "tiny.npz" if kind < 0.9 else picture
        change = functools.partial(mutate.archive, member=mutate.array) if name == "tiny.npz" else mutate.data
        files = one(random, files, {name: change})
        return fitting(files, name) if random.random() < 0.9 else files

    return Surface(seeds, mutated, target)


def recipe() -> Surface:
    """TOML: recipes of quantisation, and cases of parity."""
    import m0kit_parity.proof.cases
    import m0kit_quant.recipe
    from m0kit.errors import InputError, RecipeError

    names = list(json.loads(artifact()["manifest.json"])["provenance"]["base_files"])
    matrices = [
        "visual.blocks.0.mlp.fc1.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        *names,
    ]

    def target(folder: Path) -> object:
        said: list[object] = []
        path = folder / "input.toml"
        try:
            found = m0kit_quant.recipe.Recipe.read(path)
            said.append(found)
            found.check(matrices)
            said += [found.scheme(name, (64, 384)) for name in matrices]
            if m0kit_quant.recipe.Recipe.from_dict(found.to_dict(), "again") != found:
                raise Wrong("a recipe is not the same after it was written")
        except RecipeError as error:
            said.append(error)
        try:
            said.append(m0kit_parity.proof.cases.read_case(path).why)
        except InputError as error:
            said.append(error)
        return said

    folders = (
        Path(m0kit_quant.recipe.__file__).parent / "recipes",
        Path(m0kit_parity.proof.cases.__file__).parent / "cases",
    )
    texts = {p.stem: p.read_bytes() for folder in folders for p in sorted(folder.glob("*.toml"))}
    small = {
        name: raw
        for name, raw in texts.items()
        if len(raw) < 4000 and name not in ("image_4k", "long_2k", "long_truncated")
    }
    page = b'why = "x"\nkind = "text-image"\n[[groups]]\nquery = "q"\ndocuments = [{page = ["x"], size = [%s]}]\n'
    small |= {
        "huge-page": page % b"1000000, 1000000",
        "long-page": page % b"1, 100000000",
        "many-times": page.replace(b'"q"', b'{text = "x", times = 1000000000000}') % b"9, 9",
        "deep": b"a = " + b"[" * 20_000 + b"]" * 20_000,
        "pattern": b'precision = "x"\n[[weights]]\nmatch = "' + b"*a" * 300 + b'"\nscheme = "int8"\n',
        "digits": b"precision = " + b"9" * 5000,
        "dotted": b".".join([b"a"] * 9000) + b" = 1",
    }

    def change(random: Random, raw: bytes) -> bytes:
        if random.random() < 0.4 or len(raw) > 5000:
            return mutate.data(random, raw)
        try:
            root = tomllib.loads(raw.decode())
        except (ValueError, RecursionError):
            return mutate.data(random, raw)
        try:
            return "\n".join(f"{_toml(k)} = {_toml(v)}" for k, v in mutate.tree(random, root).items()).encode(
                "utf-8", "replace"
            )
        except (TypeError, AttributeError):  # dates, or no table any more
            return mutate.data(random, raw)

    return Surface(
        seeds={**{name: {"input.toml": raw} for name, raw in small.items()}, **committed("recipe", "input.toml")},
        mutate=lambda random, files: one(random, files, {"input.toml": change}),
        target=target,
    )


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return '""' if value is None else json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")


# --- terminal --------------------------------------------------------------------------------------------


def terminal() -> Surface:
    """Any text through all that prints: errors, notes, and what a manifest says."""
    import click

    from m0kit.cli.commands import inspect
    from m0kit.cli.options import tell
    from m0kit.errors import InputError, OutputError
    from m0kit.terminal import run

    whole = json.loads(artifact()["manifest.json"])

    def target(folder: Path) -> object:
        text = (folder / "input").read_text("utf-8", "surrogatepass")

        def fail(error: BaseException) -> Callable[[], object]:
            def raised() -> object:
                raise error

            return raised

        errors: list[BaseException] = [
            InputError(f"{text}: no such file."),
            OutputError(text),
            OSError(2, "No such file", text),
            OSError(text),
            click.UsageError(text),
            click.BadParameter(text),
            ImportError(text, name=text[:99]),
            RuntimeError(text),
            MemoryError(text),
            SystemExit(text),
            KeyError(text),
        ]
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape", write_through=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            for error in errors:
                run(fail(error))
            run(lambda: tell("error", [(text, text)]))
            run(lambda: tell("note", [text.partition(" ")[::2]]))
        said = out.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
        if what := controls(said.replace("\n", "")):
            raise Wrong(f"an error prints {what}")
        for line in said.splitlines():
            if "\n" in text and line.startswith("files        9"):
                raise Wrong("a text makes a line of its own")
        raw = json.loads(json.dumps(whole))
        raw["scheme"] = raw["provenance"]["licence"] = raw["provenance"]["base"] = text
        raw["provenance"]["adapters"] = [{"name": text, "weight": text, "licence": text}]
        raw["recipe"]["weights"] = [{"match": text, "scheme": "fp32"}]
        with contextlib.suppress(UnicodeEncodeError):
            fitted(raw)
            (folder / "manifest.json").write_bytes(json.dumps(raw).encode())
            inspected = command(inspect, folder)
            if any(line.startswith("files        9") for line in inspected.splitlines()):
                raise Wrong("a text makes a line of its own")
            said += inspected
        return said

    texts = [
        *mutate.TEXTS,
        "x\nfiles        9 checked, all as exported",
        "a plain text",
        "\x1b]0;title\x07",
        "\x9d0;x\x9c",
        "\u009b2J",
    ]
    return Surface(
        seeds={f"{i:02}": {"input": text.encode("utf-8", "surrogatepass")} for i, text in enumerate(texts)}
        | committed("terminal"),
        mutate=lambda r, files: one(r, files, {"input": _text}),
        target=target,
    )


def _text(random: Random, raw: bytes) -> bytes:
    return mutate.text(random, raw.decode("utf-8", "surrogatepass")).encode("utf-8", "surrogatepass")


def _bytes(files: Files, name: str = "input") -> bytes:
    content = files[name]
    assert isinstance(content, bytes)
    return content


SURFACES: Final[Mapping[str, Callable[[], Surface]]] = {
    "image": image,
    "content": content,
    "lines": lines,
    "parquet": parquet,
    "journal": journal,
    "index": index,
    "manifest": manifest,
    "graph": graph,
    "tokenizer": tokenizer,
    "checkpoint": checkpoint_folder,
    "adapter": adapter,
    "golden": golden,
    "recipe": recipe,
    "terminal": terminal,
    "request": server.request,
    "side": server.side,
    "header": server.header,
    "pdf": server.pdf,
    "http": server.http,
}
