"""Makes the committed seeds: small files of the formats that libraries write. Owns what is among them.

    python -m tests.fuzz.make_seeds

They are committed so that an input is the same under every version of what wrote them. What an attack is made of by
hand, or by a few lines, is in `surfaces`.
"""

import datetime as dt
import io
from typing import Any

import numpy as np
from PIL import Image
from tests.artifacts.make import picture
from tests.fuzz.runner import SEEDS


def images() -> dict[str, bytes]:
    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    page = picture(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [picture(12, 12), picture(12, 12).rotate(90)]
    return {
        "page.png": saved(page, "PNG"),
        "grey.png": saved(page.convert("LA"), "PNG"),
        "palette.png": saved(page.quantize(16), "PNG", transparency=3),
        "sixteen.png": saved(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), "PNG"),
        "animated.png": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "page.jpg": saved(page, "JPEG", exif=exif),
        "progressive.jpg": saved(page, "JPEG", progressive=True),
        "cmyk.jpg": saved(page.convert("CMYK"), "JPEG"),
        "page.webp": saved(page, "WEBP"),
        "animated.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "page.bmp": saved(page.resize((9, 7)), "BMP"),
        "page.tiff": saved(page, "TIFF"),
        "lzw.tiff": saved(page, "TIFF", compression="tiff_lzw"),
        "jpeg.tiff": saved(page, "TIFF", compression="jpeg"),
        "deflate.tiff": saved(page, "TIFF", compression="tiff_adobe_deflate"),
        "page.ppm": saved(page.resize((9, 7)), "PPM"),
        "plain.ppm": b"P3\n# c\n2 2\n255\n" + b"1 2 3 " * 4,
        "page.avif": saved(page, "AVIF"),
        "pretends.png": saved(page, "TIFF")[:100],
    }


def tables() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def written(columns: dict[str, Any], **options: Any) -> bytes:
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, **options)
        return file.getvalue()

    def with_ids(ids: pa.Array) -> bytes:
        return written({"query": ["q"] * len(ids), "document": ["d"] * len(ids), "id": ids})

    long = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["d" * 20_000_000]))
    image = pa.array(
        [{"bytes": None, "path": "page.png"}] * 2, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    zone = dt.UTC
    return {
        "whole": written({"query": ["q", "r"], "document": ["d", "e"], "id": ["a", "b"]}),
        "images": written({"query": ["q", "r"], "document": image}),
        "plain": written({"query": ["q"], "document": ["d"]}, compression="none", use_dictionary=False),
        "pages": written({"query": ["q"] * 50, "document": [f"d {i}" for i in range(50)]}, row_group_size=10),
        "zstd": written({"query": ["q"] * 5, "document": ["d"] * 5}, compression="zstd"),
        "infinite-ids": with_ids(pa.array([float("inf"), float("-inf"), float("nan"), 1.5])),
        "early-timestamps": with_ids(pa.array([-(2**62), 0, 2**62], pa.timestamp("us"))),
        "late-timestamps": with_ids(pa.array([2**62], pa.timestamp("ms", "UTC"))),
        "nanoseconds": with_ids(pa.array([1, 2**62], pa.timestamp("ns"))),
        "odd-zone": with_ids(pa.array([dt.datetime(2020, 1, 1, tzinfo=zone)], pa.timestamp("us", "+99:99"))),
        "dates": with_ids(pa.array([-(2**31), 2**31 - 1], pa.date32())),
        "durations": with_ids(pa.array([2**62], pa.duration("ms"))),
        "times": with_ids(pa.array([86_400_000_000 - 1], pa.time64("us"))),
        "decimals": with_ids(pa.array(["9" * 38], pa.string()).cast(pa.decimal128(38, 0))),
        "unsigned": with_ids(pa.array([2**64 - 1], pa.uint64())),
        "binaries": with_ids(pa.array([b"\xff\0\x1b"])),
        "lists": with_ids(pa.array([[1, 2], None, []])),
        "maps": with_ids(pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64()))),
        "nulls": with_ids(pa.nulls(3)),
        "escapes": with_ids(pa.array(["\x1b[2J\r\n\u202e"])),
        "null-columns": written({"query": pa.nulls(1000, pa.string()), "document": pa.nulls(1000)}),
        "once-20-million-nulls": written(
            {"query": pa.nulls(2 * 10**7), "document": pa.nulls(2 * 10**7)},
            row_group_size=1 << 30,
            write_batch_size=1 << 27,
        ),
        "once-long-value": written({"query": ["q"] * 300, "document": long}, compression="zstd"),
    }


def main() -> None:
    for folder, made in (("image", images()), ("parquet", tables())):
        (SEEDS / folder).mkdir(parents=True, exist_ok=True)
        for name, raw in made.items():
            (SEEDS / folder / name).write_bytes(raw)
            print(f"{folder}/{name}: {len(raw)} bytes")


if __name__ == "__main__":
    main()
