"""Ways to damage what a file holds: bytes, JSON, protobuf, archives, SQLite, text. Owns no file and no surface.

    mutate.json_tree(Random("image/0/17"), b'{"size": 4}')    # → b'{"size": 9223372036854775808}'

Each takes a Random and what it changes, and gives the changed thing; equal Randoms give equal results. What cannot be
parsed any more is changed as plain bytes.
"""

import io
import json
import re
import sqlite3
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

# Where widths, signs and limits end; and what a length field may say to cost memory.
NUMBERS: Final = (
    *(0, 1, 2, 3, 7, 8, 16, 28, 100, 127, 128, 255, 256, 4095, 4096, 32767, 32768, 65535, 65536, 10**6, 10**8, 10**9),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1, -2, -128, -(2**31), -(2**63)),
)
# Text that means something to somebody: terminals, shells, formats, file systems, regular expressions.
TEXTS: Final = (
    *(
        "",
        " ",
        "\0",
        "\x1b[2J",
        "\x1b]8;;http://x\x07y\x1b]8;;\x07",
        "\x9b31m",
        "\r",
        "a\nerror: b",
        "\u202eabc",
        "\u2066x",
    ),
    *(
        "\u200f",
        "\u2028",
        "\ufeff",
        "é",
        "e\u0301",
        "数据库",
        "🙂",
        "\ud800",
        "a" * 300,
        "%s%n",
        "{0}",
        "$(id)",
        "`id`",
    ),
    *(
        "..",
        ".",
        "/",
        "../canary/secret.txt",
        "/dev/zero",
        "/etc/passwd",
        "C:\\x",
        "\\\\x\\y",
        "x/../..",
        "file:///etc/passwd",
    ),
    *("http://localhost/x", "data:image/png;base64,", "NaN", "Infinity", "1e999", "0x10", "null", "true", "-0", "1_0"),
    *("(a+)+$", "(.*)*x", "([a-z]+)*!", "(" * 60, "[", "(?P<", "\\", ".*.*.*.*.*.*=.*", "__class__", "<|image_pad|>"),
    *("sqlite_master", "'; DROP TABLE meta; --", "<script>x</script>", "=1+1"),
)
# No value of JSON, written as it is; @ stands for what was there.
_LITERALS: Final = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "1e400",
        "0." + "3" * 400,
        "9" * 400,
        "-" + "9" * 400,
        "1e-400",
    ),
    *(
        '"\\ud800"',
        '"\\u0000"',
        "[" * 5000 + "]" * 5000,
        '{"a":' * 3000 + "1" + "}" * 3000,
        '{"a":1,"a":2}',
        "@,",
        "",
        "01",
    ),
    *("[@]", '{"": @}', "@.0", "1.5", "-0", "-0.0", "tru", "'a'", "// x\n@", "\x1b[2J", '"\x1b[2J"', "\ufeff@"),
)


def data(random: Random, raw: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Bytes, some of them others, gone, doubled, moved, or from another input."""
    out = bytearray(raw or b"\0")
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        at, size = random.randrange(len(out)), random.choice((1, 1, 2, 4, 8, 16, 64, 256))
        match random.randrange(11):
            case 0 | 1:
                out[at] ^= 1 << random.randrange(8)
            case 2:
                out[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            case 3 | 4:  # a length, a size, an offset
                width, order = random.choice((2, 4, 4, 8)), random.choice(("little", "big"))
                number = random.choice(NUMBERS) % 256**width
                out[at : at + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
            case 5:
                del out[at : at + size]
            case 6:
                out[at:at] = out[at : at + size] * random.choice((1, 1, 3, 50))
            case 7:
                out[at:at] = random.randbytes(size)
            case 8:
                if random.random() < 0.3:
                    del out[at:]
            case 9:
                other = random.choice(others) if others else raw
                start = random.randrange(len(other) or 1)
                out[at : at + size] = other[start : start + size]
            case 10:  # digits of a number in letters
                if found := list(re.finditer(rb"\d+", bytes(out[at : at + 200]))):
                    where = random.choice(found)
                    out[at + where.start() : at + where.end()] = str(random.choice(NUMBERS)).encode()
        out = out or bytearray(b"\0")
    return bytes(out[: 1 << 21])


def text(random: Random, value: str) -> str:
    """Text with pieces of other text in it, or characters of any kind."""
    at, size = random.randrange(len(value) + 1), random.choice((0, 0, 1, 4, 30))
    piece = random.choice(
        (
            lambda: random.choice(TEXTS),
            lambda: chr(random.randrange(0x20)),
            lambda: chr(random.randrange(0x7F, 0xA1)),
            lambda: chr(random.randrange(0x2000, 0x2070)),
            lambda: chr(random.randrange(0x110000)),
            lambda: value[at : at + 40] * random.choice((2, 100)),
        )
    )()
    return value[:at] + piece + value[at + size :]


def value(random: Random, old: Any) -> Any:
    """Another value of JSON, near the old one or far from it."""
    if isinstance(old, bool) or old is None:
        near: Any = not old
    elif isinstance(old, int):
        near = old + random.choice((-1, 1, -old, old, 10**9, -(10**9))) if random.random() < 0.5 else old * 1000
    elif isinstance(old, float):
        near = random.choice((-old, old * 1e6, old / 1e6, 0.0, old + 1, round(old) if abs(old) < 1e300 else 1))
    elif isinstance(old, str):
        near = text(random, old)
    elif isinstance(old, list):
        near = random.choice((old[:-1], old + old[:1], old * 200 if len(old) < 50 else old, old[::-1], [old]))
    else:
        near = dict(list(old.items())[: random.randrange(len(old) + 1)])
    far = (
        None,
        True,
        random.choice(NUMBERS),
        random.choice(TEXTS),
        0.5,
        1e308,
        [],
        {},
        [[]],
        str(old)[:80],
        {"a": near},
    )
    return near if random.random() < 0.6 else random.choice(far)


def tree(random: Random, root: Any) -> Any:
    """Nested dictionaries and lists with another value, a key more, less or with another name, somewhere."""
    root = json.loads(json.dumps(root))
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = _places(root)
        if not places:
            return value(random, root)
        holder, key = random.choice(places)
        action = random.randrange(10)
        if action < 6:
            holder[key] = value(random, holder[key])
        elif action == 6:
            del holder[key]
        elif action == 7 and isinstance(holder, dict):
            holder[random.choice((*TEXTS, str(key) + "x"))] = holder.pop(key)
        elif action == 8:
            other, its = random.choice(places)
            holder[key] = json.loads(json.dumps(other[its]))
        elif isinstance(holder, dict):
            holder[random.choice(TEXTS)] = value(random, holder[key])
        else:
            holder.insert(0, holder[key])
    return root


def json_tree(random: Random, raw: bytes, mend: Callable[[Any], object] = lambda _: None) -> bytes:
    """JSON, changed as a tree, in its letters, or as bytes; `mend` may make a digest fit the changed tree."""
    kind = random.random()
    if kind < 0.15:
        return data(random, raw)
    try:
        root = json.loads(raw)
    except (ValueError, RecursionError):
        return data(random, raw)
    if kind < 0.75:
        root = tree(random, root)
        mend(root)
        return _dumped(root)
    places = _places(root)
    if not places:
        return random.choice(_LITERALS).encode("utf-8", "surrogatepass")
    holder, key = random.choice(places)
    old, holder[key] = json.dumps(holder[key]), "\u0001here"
    if random.random() < 0.2 and isinstance(holder, dict):  # the key twice
        literal = f"{old}, {json.dumps(key)}: {json.dumps(value(random, key))}"
    else:
        literal = random.choice(_LITERALS).replace("@", old)
    return _dumped(root).replace(b'"\\u0001here"', literal.encode("utf-8", "surrogatepass"), 1)


def protobuf(random: Random, raw: bytes) -> bytes:
    """A message with a field of another value, twice, gone, or from elsewhere, at any depth."""
    fields = _fields(raw)
    if not fields or random.random() < 0.1:
        return data(random, raw)
    at = random.randrange(len(fields))
    number, wire, content = fields[at]
    match random.randrange(8):
        case 0:
            del fields[at]
        case 1:
            fields[at:at] = [fields[at]] * random.choice((1, 1, 1000))
        case 2:
            fields[at] = (random.randrange(1, 40), wire, content)
        case 3:
            other = random.choice(fields)
            fields[at] = (number, other[1], other[2])
        case _ if isinstance(content, int):
            fields[at] = (number, wire, random.choice((*NUMBERS, content + 1, content - 1)) % 2**64)
        case _ if wire == 2 and _fields(content) and random.random() < 0.85:
            fields[at] = (number, wire, protobuf(random, content))
        case _ if wire == 2 and random.random() < 0.5:
            letters = content.decode("utf-8", "replace")
            fields[at] = (number, wire, text(random, letters).encode("utf-8", "surrogatepass"))
        case _:
            fields[at] = (number, wire, data(random, content))
    return b"".join(_field(*field) for field in fields)


def archive(random: Random, raw: bytes, member: Callable[[Random, bytes], bytes] = data) -> bytes:
    """A ZIP file with a changed member, or a changed directory, which may deny what is there."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as source:
            if sum(info.file_size for info in source.infolist()) > 1 << 20:
                return data(random, raw)
            members = [(info.filename, source.read(info)) for info in source.infolist()]
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return data(random, raw)
    if random.random() < 0.4:
        out = bytearray(raw)
        heads = [m.start() for m in re.finditer(rb"PK(?:\x01\x02|\x03\x04|\x05\x06)", raw)]
        at = random.choice(heads) + random.randrange(4, 46)
        width = random.choice((2, 4))
        out[at : at + width] = (random.choice(NUMBERS) % 256**width).to_bytes(width, "little")
        return bytes(out)
    at = random.randrange(len(members)) if members else 0
    if members and random.random() < 0.7:
        members[at] = (members[at][0], member(random, members[at][1]))
    elif members:
        members[at] = (text(random, members[at][0]).encode("utf-8", "replace").decode()[:60000], members[at][1])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as target:
        for name, content in members:
            target.writestr(zipfile.ZipInfo(name or "x"), content)
    return buffer.getvalue()


def array(random: Random, raw: bytes) -> bytes:
    """An .npy file whose header says something else, or with other bytes."""
    end = raw.find(b"\n") + 1
    if end < 12 or random.random() < 0.3:
        return data(random, raw)
    header = text(random, raw[10:end].decode("latin-1"))
    if random.random() < 0.7:
        shape = random.choice(("(10000000000,)", "(1, 0, -1)", "(2147483648, 4294967296)", "()", "(1,)", "(3.5,)"))
        kind = random.choice(("<f4", "|O", "<M8[ns]", "|S0", "<f8", "<U1000000", ">i8", "<c16"))
        header = re.sub(r"\(.*?\)", shape, raw[10:end].decode("latin-1"))
        header = re.sub(r"'[<>|]\w+'", f"'{kind}'", header) if random.random() < 0.5 else header
    letters = header.encode("latin-1", "replace")
    return raw[:8] + (len(letters) % 65536).to_bytes(2, "little") + letters + raw[end:]


def database(random: Random, raw: bytes) -> bytes:
    """An SQLite file with other values in its rows, other tables, views or triggers, or other bytes."""
    if random.random() < 0.4:
        return data(random, raw)
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        db.deserialize(raw)
        db.execute("PRAGMA ignore_check_constraints = ON")
        # With the triggers of the file in place an edit would be m0kit's own, and no damage.
        db.execute("PRAGMA writable_schema = ON")
        triggers = db.execute("SELECT * FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        db.execute("DELETE FROM sqlite_schema WHERE type = 'trigger'")
        db.execute("PRAGMA writable_schema = RESET")
        _edit(random, db)
        db.execute("PRAGMA writable_schema = ON")
        db.executemany("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", triggers)
        return db.serialize()
    except (sqlite3.Error, OverflowError, UnicodeError, ValueError):
        return data(random, raw)
    finally:
        db.close()


_SCHEMAS: Final = (
    "CREATE VIEW v AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
    "CREATE TRIGGER t AFTER UPDATE ON {0} BEGIN UPDATE {0} SET rowid = rowid + 1; END",
    "CREATE TRIGGER t AFTER INSERT ON {0} BEGIN INSERT INTO {0} SELECT * FROM {0}; END",
    "CREATE TRIGGER t BEFORE DELETE ON {0} BEGIN SELECT RAISE(IGNORE); END",
    "CREATE TABLE extra (x)",
    "CREATE INDEX i ON {0} (1)",
    "DROP TABLE {0}",
    "ALTER TABLE {0} ADD COLUMN extra DEFAULT 7",
    "ALTER TABLE {0} RENAME TO was_{0}",
    "PRAGMA user_version = 99",
    "PRAGMA application_id = 99",
    "PRAGMA page_size = 512; VACUUM",
)


def _edit(random: Random, db: sqlite3.Connection) -> None:
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        table = random.choice(tables)
        if random.random() < 0.2:
            db.executescript(random.choice(_SCHEMAS).format(table))
            tables = [
                name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
            ]
            continue
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        column = random.choice(columns)
        rows = db.execute(f"SELECT DISTINCT {column} FROM {table}").fetchall()
        if not rows:
            continue
        old = random.choice(rows)[0]
        new = _cell(random, old, [row[0] for row in rows])
        if random.random() < 0.15:
            db.execute(f"DELETE FROM {table} WHERE {column} IS ?", (old,))
        else:
            many = "" if random.random() < 0.2 else f" WHERE {column} IS ?2"
            db.execute(f"UPDATE OR REPLACE {table} SET {column} = ?1{many}", (new, old) if many else (new,))


def _cell(random: Random, old: Any, others: Sequence[Any]) -> Any:
    """Another value of a row's column."""
    match random.randrange(6):
        case 0:
            return random.choice(others)
        case 1:
            return random.choice(NUMBERS) % 2**62
        case 2:
            return -random.choice(NUMBERS[:20])
        case _ if isinstance(old, int):
            return (old + random.choice((-1, 1, 4096, -4096))) % 2**62
        case 3 | 4 if isinstance(old, str):
            return text(random, old)
        case _ if isinstance(old, str):
            return json_tree(random, old.encode("utf-8", "replace")).decode("utf-8", "replace")
        case _ if isinstance(old, bytes):
            return data(random, old) if random.random() < 0.7 else random.randbytes(32)
    return random.choice((None, 0.5, str(old)))


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of all values in a tree."""
    found: list[tuple[Any, Any]] = []
    left = [root]
    while left:
        holder = left.pop()
        if isinstance(holder, dict | list):
            items = holder.items() if isinstance(holder, dict) else enumerate(holder)
            for key, inner in items:
                found.append((holder, key))
                left.append(inner)
    return found


def _dumped(root: Any) -> bytes:
    return json.dumps(root, ensure_ascii=True).encode()


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = raw[at]  # IndexError where it is cut off
        number, shift, at = number | (byte & 0x7F) << shift, shift + 7, at + 1
        if not byte & 0x80:
            return number, at
        if shift > 63:
            raise IndexError


def _fields(raw: bytes) -> list[tuple[int, int, Any]]:
    """(number, wire type, value) of each field; nothing for what is no message."""
    fields: list[tuple[int, int, Any]] = []
    at = 0
    try:
        while at < len(raw):
            key, at = _varint(raw, at)
            content: Any
            match key & 7:
                case 0:
                    content, at = _varint(raw, at)
                case 1 | 5:
                    size = 8 if key & 7 == 1 else 4
                    content, at = raw[at : at + size], at + size
                case 2:
                    size, at = _varint(raw, at)
                    content, at = raw[at : at + size], at + size
                case _:
                    return []
            if at > len(raw) or not key >> 3:
                return []
            fields.append((key >> 3, key & 7, content))
    except IndexError:
        return []
    return fields


def _field(number: int, wire: int, content: Any) -> bytes:
    head = _encoded(number << 3 | wire)
    if wire == 0:
        return head + _encoded(content if isinstance(content, int) else 0)
    if isinstance(content, int):
        content = _encoded(content)
    return head + (_encoded(len(content)) if wire == 2 else b"") + content


def _encoded(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out + bytes([number]))
