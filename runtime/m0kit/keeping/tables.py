"""The tables of an index's database, what holds in them while it is sound, and the limits of what they take.

Owns the format's version: the tables of a database are compared with these, letter by letter, before it is used.
Triggers count what each segment holds, and a record is marked as cold once for each use. What the trees of SQLite do
not hold twice has a check of its own: a document's row a sum, a number that nothing else tells its mirror.

    database.require_schema(db, SCHEMA)
    is_sound = not any(db.execute(query).fetchall() for query in UNSOUND)
"""

import re
from typing import Final

from m0kit.keeping.segments import ALIGN, MOST

FORMAT_VERSION: Final = 3  # raised when an older m0kit could no longer read the folder rightly
APPLICATION: Final = 0x6D306B78  # "m0kx", in the database's header
MIN_LIMIT: Final = 4 << 20  # below that the database alone would crowd the records out
MAX_LIMIT: Final = 1 << 60  # above every disk, and far from where whole numbers end
KEY_BYTES: Final = 32
MAX_NAME_BYTES: Final = 1 << 20  # of an id or a source, which stand in rows: longer than any path


def _held(row: str, sign: str) -> str:
    """SQL that counts a row of `pieces`, NEW or OLD, into its segment or out of it."""
    room = f"({row}.size + {ALIGN - 1}) / {ALIGN} * {ALIGN}"
    counted = {
        "pieces": "1",
        "records": f"({row}.content = 0)",
        "live": f"{row}.size",
        "taken": room,
        "fixed": f"({row}.content = 1) * ({room})",
        "cold": f"({row}.warm = 0) * ({room})",
    }
    changes = ", ".join(f"{name} = {name} {sign} {value}" for name, value in counted.items())
    return f"UPDATE segments SET {changes} WHERE number = {row}.segment;"


SCHEMA: Final = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL, sum INTEGER NOT NULL);
CREATE TABLE counts (
  name TEXT PRIMARY KEY,
  value INTEGER NOT NULL CHECK (typeof(value) = 'integer' AND value BETWEEN 0 AND {MOST}),
  mirror INTEGER NOT NULL CHECK (mirror = -value)
);
-- documents of each kind; how often an id came to mean something else; the highest number that a segment has had
INSERT INTO counts VALUES ('text', 0, 0), ('image', 0, 0), ('changes', 0, 0), ('segment', 0, 0);
CREATE TABLE segments (
  number INTEGER PRIMARY KEY,
  size INTEGER NOT NULL CHECK (typeof(size) = 'integer' AND size BETWEEN 0 AND {MAX_LIMIT}),
  mirror INTEGER NOT NULL CHECK (mirror = -size),
  pieces INTEGER NOT NULL DEFAULT 0, -- in it
  records INTEGER NOT NULL DEFAULT 0, -- of them
  live INTEGER NOT NULL DEFAULT 0, -- bytes of pieces
  taken INTEGER NOT NULL DEFAULT 0, -- filled up to where the next one may start
  fixed INTEGER NOT NULL DEFAULT 0, -- of these, by contents
  cold INTEGER NOT NULL DEFAULT 0 -- of these, by cold records
);
CREATE INDEX segments_empty ON segments (number) WHERE pieces = 0;
CREATE TABLE pieces (
  content INTEGER NOT NULL CHECK (content IN (0, 1)),
  key BLOB NOT NULL CHECK (typeof(key) = 'blob' AND length(key) = {KEY_BYTES}),
  segment INTEGER NOT NULL REFERENCES segments (number),
  start INTEGER NOT NULL CHECK (typeof(start) = 'integer' AND start BETWEEN 0 AND {MAX_LIMIT}),
  size INTEGER NOT NULL CHECK (typeof(size) = 'integer' AND size BETWEEN 0 AND {MAX_LIMIT}),
  crc INTEGER NOT NULL CHECK (typeof(crc) = 'integer'), -- of its kind, its key and its bytes
  used REAL NOT NULL CHECK (typeof(used) = 'real' AND used BETWEEN 0 AND 1e11),
  warm INTEGER NOT NULL CHECK (warm = 1 OR (warm = 0 AND content = 0)),
  PRIMARY KEY (content, key)
) WITHOUT ROWID;
CREATE INDEX pieces_by_segment ON pieces (segment, warm, used);
CREATE INDEX records_by_use ON pieces (warm, used) WHERE content = 0;
CREATE TRIGGER piece_added AFTER INSERT ON pieces BEGIN {_held("NEW", "+")} END;
CREATE TRIGGER piece_dropped AFTER DELETE ON pieces BEGIN {_held("OLD", "-")} END;
CREATE TRIGGER piece_changed AFTER UPDATE ON pieces
WHEN OLD.segment <> NEW.segment OR OLD.size <> NEW.size OR OLD.warm <> NEW.warm
BEGIN {_held("OLD", "-")} {_held("NEW", "+")} END;
CREATE TABLE documents (
  place INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE CHECK (typeof(id) = 'text' AND id <> ''),
  kind TEXT NOT NULL CHECK (kind IN ('text', 'image')),
  key BLOB NOT NULL CHECK (typeof(key) = 'blob' AND length(key) = {KEY_BYTES}),
  content BLOB NOT NULL CHECK (typeof(content) = 'blob'),
  source TEXT NOT NULL CHECK (typeof(source) = 'text'),
  sum INTEGER NOT NULL CHECK (typeof(sum) = 'integer') -- of all but its place
);
CREATE INDEX documents_by_key ON documents (key);
CREATE INDEX documents_by_content ON documents (content);
CREATE TRIGGER document_added AFTER INSERT ON documents
BEGIN UPDATE counts SET value = value + 1, mirror = mirror - 1 WHERE name = NEW.kind; END;
CREATE TRIGGER document_removed AFTER DELETE ON documents
BEGIN
  UPDATE counts SET value = value - 1, mirror = mirror + 1 WHERE name = OLD.kind;
  UPDATE counts SET value = value + 1, mirror = mirror - 1 WHERE name = 'changes';
END;
CREATE TRIGGER document_replaced AFTER UPDATE ON documents
WHEN OLD.kind <> NEW.kind OR OLD.key <> NEW.key OR OLD.content <> NEW.content
BEGIN
  UPDATE counts SET value = value - 1, mirror = mirror + 1 WHERE name = OLD.kind;
  UPDATE counts SET value = value + 1, mirror = mirror - 1 WHERE name IN ('changes', NEW.kind);
END;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {FORMAT_VERSION};
"""
_ROOM = f"(size + {ALIGN - 1}) / {ALIGN} * {ALIGN}"
_CHECKS = {  # of each table: SQLite holds them against what a writer does, and not for who only reads
    table: " AND ".join(f"({check})" for check in re.findall(r"CHECK \((.*)\),?(?: --.*)?$", columns, re.MULTILINE))
    for table, columns in re.findall(r"CREATE TABLE (\w+) \(\n(.*?)^\)", SCHEMA, re.MULTILINE | re.DOTALL)
}
# Each finds something only in a database that is not sound: pieces outside of their segment, and wrong counts.
UNSOUND: Final = (
    *(f"SELECT 1 FROM {table} WHERE ({checks}) IS NOT TRUE LIMIT 1" for table, checks in _CHECKS.items() if checks),
    "SELECT 1 FROM pieces JOIN segments ON number = segment "
    f"WHERE start % {ALIGN} <> 0 OR start + pieces.size > segments.size LIMIT 1",
    "SELECT number, pieces, records, live, taken, fixed, cold FROM segments EXCEPT SELECT segment, COUNT(*), "
    f"SUM(content = 0), SUM(size), SUM({_ROOM}), SUM((content = 1) * ({_ROOM})), SUM((warm = 0) * ({_ROOM})) "
    "FROM pieces GROUP BY segment",
    "SELECT kind, COUNT(*) FROM documents GROUP BY kind "
    "EXCEPT SELECT name, value FROM counts WHERE name IN ('text', 'image')",
    "SELECT name, value FROM counts WHERE name IN ('text', 'image') AND value <> 0 "
    "EXCEPT SELECT kind, COUNT(*) FROM documents GROUP BY kind",
    "SELECT 1 FROM (SELECT group_concat(name) AS names FROM (SELECT name FROM counts ORDER BY name)) "
    "WHERE names <> 'changes,image,segment,text' OR names IS NULL",
)
# SQLite by itself would read all records and sort them.
RECORDS_BY_USE: Final = "pieces INDEXED BY records_by_use WHERE content = 0"
OWNERLESS: Final = "content = 1 AND NOT EXISTS (SELECT 1 FROM documents WHERE documents.content = pieces.key)"
