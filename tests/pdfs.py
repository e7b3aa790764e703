"""PDFs for tests, written here: no file of somebody else.

raw = pdf([text("slm markdown"), text("page two")])
"""

import hashlib
from collections.abc import Mapping, Sequence

A4 = (595, 842)


def text(said: str, size: int = 24, x: int = 72, y: int = 700) -> bytes:
    """What a page shows: lines in Helvetica."""
    lines = said.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)").split("\n")
    told = " ".join(f"({line}) Tj T*" for line in lines)
    return f"BT /F1 {size} Tf {size + 4} TL {x} {y} Td {told} ET".encode("latin-1", "replace")


def box(x: float, y: float, width: float, height: float, colour: str = "1 0 0") -> bytes:
    return f"{colour} rg {x} {y} {width} {height} re f".encode()


def pdf(
    pages: Sequence[bytes],
    size: tuple[float, float] = A4,
    page: str | Sequence[str] = "",
    more: Mapping[int, bytes] | None = None,
    catalog: str = "",
    trailer: str = "",
) -> bytes:
    """A PDF of these contents; `page` are more entries of each page, `more` further objects, from 1000 on."""
    entries = [page] * len(pages) if isinstance(page, str) else list(page)
    kids = " ".join(f"{10 + 2 * i} 0 R" for i in range(len(pages)))
    objects: dict[int, bytes] = {
        1: f"<< /Type /Catalog /Pages 2 0 R {catalog} >>".encode(),
        2: f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    }
    for i, (content, entry) in enumerate(zip(pages, entries, strict=True)):
        media = "" if "/MediaBox" in entry else f"/MediaBox [0 0 {size[0]} {size[1]}]"
        resources = "" if "/Resources" in entry else "/Resources << /Font << /F1 3 0 R >> >>"
        head = f"<< /Type /Page /Parent 2 0 R {media} {resources} /Contents {11 + 2 * i} 0 R {entry} >>"
        objects[10 + 2 * i] = head.encode()
        objects[11 + 2 * i] = stream(content)
    return written({**objects, **(more or {})}, trailer)


def stream(content: bytes, entries: str = "") -> bytes:
    return f"<< /Length {len(content)} {entries} >>\nstream\n".encode() + content + b"\nendstream"


def written(objects: Mapping[int, bytes], trailer: str = "") -> bytes:
    """Objects with header, table of references and trailer; the catalog is object 1."""
    out, places = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", dict[int, int]()
    for number, content in sorted(objects.items()):
        places[number] = len(out)
        out += f"{number} 0 obj\n".encode() + content + b"\nendobj\n"
    table = "".join(f"{number} 1\n{place:010} 00000 n \n" for number, place in places.items())
    end = f"xref\n0 1\n0000000000 65535 f \n{table}trailer\n<< /Size {max(places) + 1} /Root 1 0 R {trailer} >>\n"
    return out + end.encode() + f"startxref\n{len(out)}\n%%EOF\n".encode()


def locked(pages: Sequence[bytes], password: bytes = b"user") -> bytes:
    """An encrypted PDF (RC4 of 40 bits, revision 2). Only its trailer matters to who lacks the password.

    With the empty password it opens to anyone: then its contents are encrypted as they should be.
    """
    padding = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")
    owner = rc4(hashlib.md5(padding).digest()[:5], (password + padding)[:32])
    permissions, file_id = -4, b"0123456789abcdef"
    seed = (password + padding)[:32] + owner + permissions.to_bytes(4, "little", signed=True) + file_id
    key = hashlib.md5(seed).digest()[:5]

    def of(number: int) -> bytes:
        return hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()[:10]

    encrypt = f"<< /Filter /Standard /V 1 /R 2 /O <{owner.hex()}> /U <{rc4(key, padding).hex()}> /P {permissions} >>"
    contents = [rc4(of(11 + 2 * i), content) for i, content in enumerate(pages)]
    ids = f"/Encrypt 900 0 R /ID [<{file_id.hex()}> <{file_id.hex()}>]"
    return pdf(contents, more={900: encrypt.encode()}, trailer=ids)


def rc4(key: bytes, data: bytes) -> bytes:
    state, j, out = list(range(256)), 0, bytearray()
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)
