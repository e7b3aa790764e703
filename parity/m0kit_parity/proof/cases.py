"""The inputs parity is proved on: small TOML files, one per case, and how their contents are made.

Owns the case format, text and page recipes, and JSON Lines files of a user's own pairs. Does not know
models, scores or golden folders. Adding a file to the folder `cases` adds a case.

    >>> builtin_cases(["tiny"])[0].name
    'tiny'

A case file has `why` (one sentence: what breaks if this breaks), `kind`, optionally `heavy = true`
(minutes on the published model, left out unless asked for), and one or more `[[groups]]`, each a `query`
and its `documents`, which are ranked against each other. A content is one of

- a string, or `{text = "…"}`; with `times = N` the text is repeated and `{n}` in it counts;
- `{page = ["line", …], size = [width, height]}`: a drawn page; optional `seed` (another chart on the
  page), `mode` (Pillow's, default RGB), `format` (PNG, JPEG, WEBP or GIF, default PNG),
  `orientation` (EXIF, 1 to 8), `form` ("file": the encoded bytes; "pillow": an opened image, default file).

No content is stored as a binary. Pages are drawn the same to the byte by one version of Pillow; a
golden folder keeps the bytes that were used, so that checking never depends on drawing.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m0kit.errors import InputError
from m0kit.files import read_regular
from m0kit.reading.decoding import load, open_image
from m0kit.reading.formats import MAX_IMAGE_BYTES, read_text
from m0kit.reading.inputs import Picture, Text, at, group_from_file, parse_content, shown
from m0kit.reading.lines import records
from m0kit.schema import parse_toml

Form = Literal["text", "file", "pillow"]
_T = TypeVar("_T")

KINDS: Final = ("text-text", "text-image", "image-text", "image-image", "mixed")

CASES: Final = Path(__file__).parent / "cases"

_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
_MODES: Final = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")
_WANTED: Final = '{"query": …, "documents": […]}'
_MAX_BYTES: Final = 1 << 20  # of a case file; the longest has 4 kB
_MAX_LETTERS: Final = 1 << 22  # of a repeated text; a prompt keeps some 50,000
_MAX_PIXELS: Final = 16_000_000  # of a drawn page, which takes 30 bytes for each; a 4K page has half
_EXIF_ORIENTATION: Final = 0x0112
_PLACE: Final = "an image"


@dataclass(frozen=True, slots=True)
class Content:
    """One query or document as it is handed to both sides, and as a golden folder keeps it.

    `form` says what scoring gets: "text" a string; "file" the bytes of an encoded image; "pillow" an image
    that Pillow opened from those bytes, which is preprocessed by other rules (no EXIF rotation).
    """

    form: Form
    data: bytes  # UTF-8 text, or an encoded image

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def value(self) -> str | bytes | Image.Image:
        """What `Reranker.trace` and `Reference.trace` take. Raises InputError for an unreadable image."""
        if self.form == "text":
            return self.data.decode("utf-8")
        return self.data if self.form == "file" else self._open()

    def pixels_sha256(self) -> str | None:
        """Hash over size, mode, palette and pixels as this machine's Pillow decodes them; None for a text."""
        if self.form == "text":
            return None
        image = self._open()
        load(image, _PLACE)
        head = f"{image.mode} {image.width}×{image.height}\n".encode()
        return hashlib.sha256(head + bytes(image.getpalette() or ()) + image.tobytes()).hexdigest()

    def label(self, length: int = 60) -> str:
        """A few words for tables."""
        if self.form != "text":
            image = self._open()
            return f"[{image.format} {image.mode} {image.width}×{image.height}]"
        text = " ".join(self.data.decode("utf-8").split())
        return text if len(text) <= length else f"{text[: length - 1]}…"

    def _open(self) -> Image.Image:
        return open_image(self.data, _PLACE)


@dataclass(frozen=True, slots=True)
class Group:
    """A query and the documents ranked for it."""

    query: Content
    documents: tuple[Content, ...]

    def __post_init__(self) -> None:
        if not self.documents:
            raise ValueError("a query needs at least one document")


@dataclass(frozen=True, slots=True)
class Case:
    """One case file. `why` ends up in the report."""

    name: str
    why: str
    kind: str
    heavy: bool
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if not self.why.strip() or not self.groups:
            raise ValueError("a case needs a reason (why) and at least one group")
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise ValueError(f"name is {self.name!r}, expected letters, digits, hyphens and underscores")


def builtin_cases(names: Iterable[str] = (), heavy: bool = False, folder: Path = CASES) -> tuple[Case, ...]:
    """The cases of `folder` by name, or all of them; heavy ones only if named or with `heavy`.

    Raises InputError for an unknown name or a file that is not a case.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in files]
    if unknown:
        raise InputError(f"no case is called {', '.join(unknown)}; there are {', '.join(files)}")
    cases = (read_case(files[name]) for name in wanted or files)
    return tuple(case for case in cases if wanted or heavy or not case.heavy)


def read_case(path: Path) -> Case:
    """Raises InputError that names the file and the field for anything that is not a case."""
    try:
        raw = parse_toml(read_regular(path, _MAX_BYTES))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{path}: not a readable TOML file in UTF-8 ({reason})") from error
    except ValueError as error:
        raise InputError(f"{path}: not a readable TOML file in UTF-8 ({error})") from error
    try:
        _known(raw, {"why", "kind", "heavy", "groups"})
        groups = raw.get("groups")
        if not isinstance(groups, list):
            raise ValueError("a case needs [[groups]]")  # noqa: TRY301 - one way out below
        return Case(
            name=path.stem,
            why=_field(raw, "why", str),
            kind=_field(raw, "kind", str),
            heavy=_field(raw, "heavy", bool, False),
            groups=tuple(_group(g, _content) for g in groups),
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


@dataclass(frozen=True, slots=True)
class Published:
    """A group whose scores were printed by the model's makers."""

    name: str
    group: Group
    scores: tuple[float, ...]


def published_groups(inputs: Path, path: Path = CASES / "published" / "model_card.toml") -> tuple[Published, ...]:
    """The published examples with the inputs that the user put into the folder `inputs`.

    Texts are read as `m0kit.reading.formats` reads them, images in any of the endings .png, .jpg, .jpeg, .webp, .gif.
    Raises InputError that lists every missing file and says where the inputs come from.
    """
    raw = parse_toml(path.read_bytes())
    slots: dict[str, Content] = {}
    missing = []
    for slot in dict.fromkeys(
        name
        for group in raw["groups"]
        for name in (*([group["query"]["file"]] if "file" in group["query"] else []), *group["documents"])
    ):
        found = [inputs / (slot + ending) for ending in _slot_endings(slot) if (inputs / (slot + ending)).is_file()]
        if len(found) != 1:
            missing.append(f"{slot}{{{','.join(_slot_endings(slot))}}}")
        elif found[0].suffix == ".txt":
            slots[slot] = text_content(read_text(found[0]))
        else:
            slots[slot] = image_content(found[0])
    if missing:
        about = " ".join(raw["about"].split())
        raise InputError(f"{inputs}: exactly one file each is needed for {', '.join(missing)}. {about}")
    return tuple(
        Published(
            group["name"],
            Group(
                slots[group["query"]["file"]] if "file" in group["query"] else text_content(group["query"]["text"]),
                tuple(slots[name] for name in group["documents"]),
            ),
            tuple(group["scores"]),
        )
        for group in raw["groups"]
    )


def _slot_endings(slot: str) -> tuple[str, ...]:
    return (".txt",) if slot.startswith("text") else (".png", ".jpg", ".jpeg", ".webp", ".gif")


def pairs_file(path: Path) -> tuple[Case, dict[int, str]]:
    """A user's own pairs, one JSON object per line, and what is wrong with the lines that are left out.

    A line is {"query": …, "documents": […]} or {"query": …, "document": …}; other keys are ignored. Raises InputError
    that names file and line where none can be used.
    """
    groups, errors = [], {}
    for number, record in records(path, _WANTED):
        try:
            if isinstance(record, InputError):
                raise record
            query, documents = group_from_file(record, path.parent)
            groups.append(Group(_own_content(query, "query"), tuple(_own_content(d, "document") for d in documents)))
        except InputError as error:
            errors[number] = f"{path}: line {number}: {error}"
    if not groups:
        raise InputError(next(iter(errors.values()), f"{path}: no pairs; expected lines such as {_WANTED}"))
    kinds = {_kind(group.query, document) for group in groups for document in group.documents}
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in path.stem) or "pairs"
    kind = kinds.pop() if len(kinds) == 1 else "mixed"
    return Case(name, f"pairs of {path.name}", kind, False, tuple(groups)), errors


def draw_page(lines: Sequence[str], size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A page as a document scan looks to the model: a title bar, lines of text, a bar chart.

    A faint texture lies over everything, so that every patch differs and a swapped, shifted or
    dropped patch shows. Equal arguments give equal pixels.
    """
    width, height = size
    # The legacy generator's stream is frozen by numpy's compatibility policy; the newer one's is not.
    random = np.random.RandomState(seed)
    texture = random.randint(0, 31, (height, width, 3)).astype(np.uint8)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    accent = tuple(int(v) for v in random.randint(0, 160, 3))
    step = max(8, min(width, height) // 14)
    font = ImageFont.load_default(max(6, step * 3 // 4))
    draw.rectangle((0, 0, width - 1, step), fill=accent)
    for row, line in enumerate(lines):
        color = (255, 255, 255) if row == 0 else (20, 20, 20)
        draw.text((step // 2, row * step + step // 8), line, fill=color, font=font)
    bars = random.randint(1, 100, 6)
    left, bottom, top = step // 2, height - step // 2, height * 2 // 3
    slot = max(1, (width - step) // len(bars))
    for i, bar in enumerate(bars):
        x, y = left + i * slot, bottom - (bottom - top) * int(bar) // 100
        if y < bottom:
            draw.rectangle((x, y, x + slot * 2 // 3, bottom), fill=accent)
    image = Image.fromarray((np.asarray(image, np.uint16) * 15 // 17).astype(np.uint8) + texture)
    if mode in ("RGBA", "LA"):
        # A gradient of transparency, so that a wrong background colour shows.
        alpha = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8), (height, width))
        image.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
        return image if mode == "RGBA" else image.convert("LA")
    if mode == "P":
        image = image.quantize(32, dither=Image.Dither.NONE)
        image.info["transparency"] = int(np.asarray(image)[height // 2, width // 2])
        return image
    return image.convert(mode)


def encode(image: Image.Image, format_name: str = "PNG", orientation: int | None = None) -> bytes:
    """The image as file bytes, with an EXIF orientation if given."""
    out = io.BytesIO()
    options: dict[str, Any] = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[_EXIF_ORIENTATION] = orientation
        options["exif"] = exif
    if format_name == "JPEG":
        options["quality"] = 90
    if format_name == "WEBP":
        options["lossless"] = True
    image.save(out, format_name, **options)
    return out.getvalue()


def text_content(text: str) -> Content:
    """A text as both sides get it."""
    return Content("text", text.encode("utf-8"))


def _kind(query: Content, document: Content) -> str:
    return "-".join("text" if c.form == "text" else "image" for c in (query, document))


def _group(raw: object, content: Callable[[object], Content]) -> Group:
    if not isinstance(raw, Mapping):
        raise ValueError("expected a query with its documents")
    _known(raw, {"query", "documents"})
    documents = raw.get("documents")
    if "query" not in raw or not isinstance(documents, list):
        raise ValueError('expected "query" and a list "documents"')
    return Group(content(raw["query"]), tuple(content(d) for d in documents))


def _content(raw: object) -> Content:
    """A content of a case file."""
    if isinstance(raw, str):
        return text_content(raw)
    if not isinstance(raw, Mapping):
        raise ValueError(f"a content is a string or a table, got {shown(raw)}")
    if "page" in raw:
        return _page(raw)
    _known(raw, {"text", "times"})
    text, times = _field(raw, "text", str), _field(raw, "times", int, 0)
    if not 0 <= times * (len(text) + 10) <= _MAX_LETTERS:
        raise ValueError(f"times is {shown(times)}, which makes less than nothing or more than {_MAX_LETTERS} letters")
    if not times:
        return text_content(text)
    return text_content("".join(text.replace("{n}", str(n)) for n in range(1, times + 1)))


def _page(raw: Mapping[str, Any]) -> Content:
    _known(raw, {"page", "size", "seed", "mode", "format", "orientation", "form"})
    lines, size = raw["page"], raw.get("size")
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("page is a list of lines")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"size is [width, height] in pixels, got {shown(size)}")
    if size[0] * size[1] > _MAX_PIXELS:
        raise ValueError(f"size has {size[0] * size[1]:.10g} pixels; {_MAX_PIXELS} are drawn")
    if not 0 <= _field(raw, "seed", int, 0) < 1 << 32:
        raise ValueError("seed is a whole number from 0 to 4294967295")
    mode = _choice(raw, "mode", _MODES, "RGB")
    format_name = _choice(raw, "format", _FORMATS, "PNG")
    form = _choice(raw, "form", ("file", "pillow"), "file")
    orientation = _field(raw, "orientation", int, 0)
    if not 0 <= orientation <= 8:
        raise ValueError(f"orientation is 1 to 8, got {orientation}")
    image = draw_page(lines, (size[0], size[1]), _field(raw, "seed", int, 0), mode)
    try:
        data = encode(image, format_name, orientation or None)
    except OSError as error:  # Pillow's way to say that a format has no such mode
        raise ValueError(f"{format_name} cannot hold an image of mode {mode}") from error
    return Content("file" if form == "file" else "pillow", data)


def _own_content(value: Any, where: str) -> Content:
    """A content of a user's file of pairs. Raises InputError for what is no image that m0kit reads."""
    parsed = parse_content(value, where)
    if isinstance(parsed, Text):
        return text_content(parsed.text)
    assert isinstance(parsed, Picture)
    assert isinstance(parsed.source, bytes)
    open_image(parsed.source, at(where, parsed.path))
    return Content("file", parsed.source)


def image_content(path: Path) -> Content:
    """An image file as it is. Raises InputError when it is missing or no image that m0kit reads."""
    try:
        data = read_regular(path, MAX_IMAGE_BYTES)
    except OSError as error:
        raise InputError(f"{path}: no readable image file there ({error.strerror})") from error
    open_image(data, str(path))
    return Content("file", data)


def _known(raw: Mapping[str, Any], names: set[str]) -> None:
    unknown = sorted(set(raw) - names)
    if unknown:
        raise ValueError(f"unknown field {', '.join(unknown)}; known are {', '.join(sorted(names))}")


def _field(raw: Mapping[str, Any], name: str, kind: type[_T], default: _T | None = None) -> _T:
    value = raw.get(name, default)
    if type(value) is not kind:  # a bool is not a whole number here
        raise ValueError(f"{name} must be {kind.__name__}, got {shown(value)}")
    return value


def _choice(raw: Mapping[str, Any], name: str, allowed: Sequence[str], default: str) -> str:
    value = raw.get(name, default)
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(allowed)}, got {shown(value)}")
    return str(value)
