"""Images of every kind through the real app: the score that Reranker gives, or 422 with our sentence and its place."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")

import numpy as np
from PIL import GifImagePlugin, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin
from tests.artifacts.make import picture
from tests.fuzz.surfaces import EPS, bmp_runs, chunk, png, scans
from tests.runtime.server.inside import Inside, inside

from m0kit.errors import InputError
from m0kit.reading.formats import FORMATS

PAGE = picture(40, 60)
FRAMES = [PAGE, PAGE.rotate(180)]
ORIENTATION = 0x0112
# Of everybody in this process. What is registered grows when a format is first used, and is no setting.
PILLOW = {
    "pixels": lambda: Image.MAX_IMAGE_PIXELS,
    "truncated": lambda: ImageFile.LOAD_TRUNCATED_IMAGES,
    "block": lambda: ImageFile.MAXBLOCK,
    "safe block": lambda: ImageFile.SAFEBLOCK,
    "text chunk": lambda: PngImagePlugin.MAX_TEXT_CHUNK,
    "text memory": lambda: PngImagePlugin.MAX_TEXT_MEMORY,
    "frames": lambda: GifImagePlugin.LOADING_STRATEGY,
    "libtiff": lambda: (TiffImagePlugin.READ_LIBTIFF, TiffImagePlugin.WRITE_LIBTIFF),
    "blocks": lambda: (Image.core.get_alignment(), Image.core.get_block_size(), Image.core.get_blocks_max()),
}


@pytest.fixture(scope="module")
def app(artifact: Path) -> Iterator[Inside]:
    with inside(artifact) as one:
        yield one


@pytest.fixture(autouse=True)
def _pillow_is_as_it_was() -> Iterator[None]:
    before = {name: told() for name, told in PILLOW.items()}
    yield
    assert {name: told() for name, told in PILLOW.items()} == before


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(PAGE, kind, exif=exif)


def uri(raw: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(raw).decode()}"


def asked(app: Inside, **fields: Any) -> tuple[int, Any]:
    answer = app.ask("POST", "/v1/rerank", json.dumps(fields).encode())
    return answer.status, json.loads(answer.body)


def score(app: Inside, raw: bytes) -> float:
    """Of an image over HTTP."""
    status, told = asked(app, query="slm", documents=["a text", {"image": uri(raw)}])
    assert status == 200, told
    (found,) = [one["relevance_score"] for one in told["results"] if one["index"] == 1]
    assert isinstance(found, float)
    return found


GOOD: dict[str, bytes] = {
    "png": saved(PAGE, "PNG"),
    "one-pixel": saved(PAGE.crop((0, 0, 1, 1)), "PNG"),
    "long": saved(PAGE.resize((1, 150)), "PNG"),
    "grey": saved(PAGE.convert("L"), "PNG"),
    "grey-alpha": saved(PAGE.convert("LA"), "PNG"),
    "alpha": saved(PAGE.convert("RGBA").rotate(30, expand=True), "PNG"),
    "one-bit": saved(PAGE.convert("1"), "PNG"),
    "palette": saved(PAGE.quantize(16), "PNG"),
    "palette-transparent": saved(PAGE.quantize(16), "PNG", transparency=3),
    "sixteen-bits": saved(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), "PNG"),
    "interlaced-jpeg": saved(PAGE, "JPEG", progressive=True),
    "cmyk": saved(PAGE.convert("CMYK"), "JPEG"),
    "grey-jpeg": saved(PAGE.convert("L"), "JPEG"),
    "webp": saved(PAGE, "WEBP"),
    "webp-lossless": saved(PAGE.convert("RGBA"), "WEBP", lossless=True),
    "gif": saved(PAGE, "GIF"),
    "bmp": saved(PAGE, "BMP"),
    "tiff": saved(PAGE, "TIFF"),
    "tiff-lzw": saved(PAGE, "TIFF", compression="tiff_lzw"),
    "tiff-cmyk": saved(PAGE.convert("CMYK"), "TIFF"),
    "ppm": saved(PAGE, "PPM"),
    "avif": saved(PAGE, "AVIF"),
    "animated-png": saved(PAGE, "PNG", save_all=True, append_images=FRAMES[1:]),
    "animated-webp": saved(PAGE, "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
    "animated-gif": saved(PAGE, "GIF", save_all=True, append_images=FRAMES[1:]),
    "names-another-format": saved(PAGE, "JPEG"),  # in a data URI of image/png
    "with-a-tail": saved(PAGE, "PNG") + b"PK\3\4" + bytes(1000),
    **{f"turned-{number}": turned(number) for number in range(1, 9)},
    **{f"turned-jpeg-{number}": turned(number, "JPEG") for number in (6, 9, 65535)},
}


def jpeg_of(width: int, height: int) -> bytes:
    raw = saved(PAGE, "JPEG")
    frame = raw.index(b"\xff\xc0")
    return raw[: frame + 5] + struct.pack(">HH", height, width) + raw[frame + 9 :]


BAD: dict[str, tuple[bytes, str]] = {
    "no-bytes": (b"", "holds no bytes"),
    "one-byte": (b"\x89", "not an image that can be read"),
    "long": (saved(Image.new("L", (1, 20_000)), "PNG"), "1×20000"),
    "wide": (saved(Image.new("L", (20_000, 1)), "PNG"), "20000×1"),
    "no-pixels": (png(0, 9), "not an image that can be read"),
    "bomb-png": (png(50_000, 50_000), "more than the limit of"),
    "bomb-png-long": (png(70_000_000, 1), "over the limit of 50000000. Shrink it."),
    "over-the-limit": (png(8000, 8000), "the image has 8000×8000 pixels, over the limit of 50000000. Shrink it."),
    "bomb-jpeg": (jpeg_of(65_000, 65_000), "more than the limit of"),
    "bomb-jpeg-scans": (scans(saved(PAGE, "JPEG", progressive=True), 600), "8000×8000"),
    "bomb-gif": (b"GIF89a\xff\xff\xff\xff" + saved(PAGE, "GIF")[10:], "limit of"),
    "bomb-bmp": (bmp_runs(), "9000×9000"),
    "bomb-webp": (b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(8), "pixels"),
    "bomb-text": (png(8, 8, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(64 << 20)))), ""),
    "bomb-profile": (png(8, 8, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(64 << 20)))), ""),
    "cut-png": (saved(PAGE, "PNG")[:-60], "is damaged or cut off. Save it again."),
    "cut-jpeg": (saved(PAGE, "JPEG")[:700], "is damaged or cut off"),
    "cut-webp": (saved(PAGE, "WEBP")[:90], "not an image that can be read"),
    "cut-header": (saved(PAGE, "PNG")[:20], "not an image that can be read"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "They are an SVG drawing: render it"),
    "pdf": (b"%PDF-1.7\n%%EOF\n", "They are a PDF: render it to PNG."),
    "eps": (EPS, "They are PostScript: render it to PNG."),
    "psd": (b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\1\0\0\0\1\0\x08\0\3" + bytes(12), "They are a Photoshop file"),
    "fits": (b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800), "They are text."),
    "icon": (saved(PAGE, "ICO"), "They are an icon"),
    "jpeg-2000": (saved(PAGE, "JPEG2000"), "They are JPEG 2000"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "They are HEIC"),
    "gzip": (b"\x1f\x8b" + bytes(40), "They are compressed (gzip)"),
    "html": (b"<!doctype html><html></html>", "They are a web page in place of the file"),
    "pcx": (saved(PAGE, "PCX"), "not an image that can be read"),
    "tga": (saved(PAGE, "TGA"), "not an image that can be read"),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_image_has_the_score_that_reranker_gives(app: Inside, name: str) -> None:
    assert score(app, GOOD[name]) == app.reranker.score([("slm", GOOD[name])])[0]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_that_is_read_is_refused_in_our_words(app: Inside, name: str) -> None:
    raw, said = BAD[name]
    status, told = asked(app, query="slm", documents=["a text", {"image": uri(raw)}])
    assert status == 422, told
    assert told["code"] in ("INVALID_INPUT", "TOO_MUCH")
    assert told["detail"].startswith("documents[1].image: ")
    assert told["errors"] == [{"field": "documents[1].image", "message": told["detail"]}]
    assert said in told["detail"]
    with pytest.raises(InputError) as caught:
        app.reranker.score([("slm", {"image": raw})])
    if told["code"] == "INVALID_INPUT" and raw:  # the same sentence as everywhere, so none of a library
        assert told["detail"] == f"documents[1].image: {caught.value.reason}"
    status, told = asked(app, query={"image": uri(raw)}, documents=["a text"])
    assert (status, told["detail"].partition(":")[0]) == (422, "query.image")


def test_what_is_refused_leaves_the_others_as_they_were(app: Inside) -> None:
    before = score(app, GOOD["png"])
    for raw, _ in BAD.values():
        asked(app, query="slm", documents=[{"image": uri(raw)}])
    assert score(app, GOOD["png"]) == before
    assert app.ask("GET", "/ready").status == 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_seen_as_a_viewer_turns_it(app: Inside, orientation: int) -> None:
    with Image.open(io.BytesIO(turned(orientation))) as image:
        upright = ImageOps.exif_transpose(image)
    assert upright.getexif().get(ORIENTATION, 1) == 1
    assert score(app, turned(orientation)) == score(app, saved(upright, "PNG"))
    assert (orientation == 1) == (score(app, turned(orientation)) == score(app, GOOD["png"]))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_of_several_frames_the_first_is_seen(app: Inside, kind: str) -> None:
    assert score(app, GOOD[f"animated-{kind}"]) == score(app, GOOD["png"]) != score(app, saved(FRAMES[1], "PNG"))


def test_every_format_that_is_told_of_is_here(app: Inside) -> None:
    found = set()
    for raw in GOOD.values():
        with Image.open(io.BytesIO(raw)) as image:
            found.add(image.format)
    assert found == set(FORMATS) == set(json.loads(app.ask("GET", "/info").body)["formats"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_images": 1}, "documents[1].image: more than 1 images are in the request."),
        ({"max_image_bytes": 100}, "documents[0].image: the image has"),
        ({"max_image_pixels": 2399}, "documents[0].image: the image has 60×40 pixels, over the limit of 2399."),
        ({"max_request_pixels": 4799}, "documents[1].image: with this image the request has over 4799 pixels."),
        ({"max_request_tokens": 10}, "the request takes the work of"),
        ({"max_documents": 1}, "documents: 2 documents, and 1 may be in a request."),
    ],
)
def test_limits_hold_before_anything_is_decoded(
    artifact: Path, changes: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [{"image": uri(GOOD["png"])}, {"image": uri(GOOD["webp"])}]
    with inside(artifact, **changes) as app:

        def decodes(*_: object) -> None:
            raise AssertionError("it is decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", decodes)
        status, told = asked(app, query="slm", documents=documents)
    assert (status, told["code"]) == (422, "TOO_MUCH")
    assert told["detail"].startswith(said)
