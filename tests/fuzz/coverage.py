"""Inputs that atheris finds by coverage, for the parsers that are Python alone. Owns which those are.

    python -m tests.fuzz.coverage json 60 7 /tmp/found   # the target, seconds, a seed, a folder that is there

What the runner's surfaces reach through native libraries, coverage cannot see; what it can, it reaches deeper here.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent.parent


def _json() -> Callable[[bytes], object]:
    from m0kit.schema import parse

    def target(raw: bytes) -> object:
        with contextlib.suppress(ValueError):
            return parse(raw)
        return None

    return target


def _lines() -> Callable[[bytes], object]:
    import io

    from m0kit.jobs.rows import read_lines

    return lambda raw: list(read_lines(io.BytesIO(raw), Path("/nowhere")))


def _formats() -> Callable[[bytes], object]:
    from m0kit.reading.formats import described, no_text, parse

    def target(raw: bytes) -> object:
        no_text(raw), described(raw)
        return parse(raw[1:], "input", (".txt", ".png", "", ".ppm")[raw[:1][0] % 4 if raw else 0])

    return target


def _uri() -> Callable[[bytes], object]:
    from m0kit.reading.inputs import parse_content

    return lambda raw: parse_content({"image": "data:" + raw.decode("utf-8", "surrogateescape")}, "pair 0: document")


def _recipe() -> Callable[[bytes], object]:
    from m0kit_quant.recipe import Recipe

    path = Path(tempfile.gettempdir(), f"m0kit-fuzz-{os.getpid()}.toml")

    def target(raw: bytes) -> object:
        path.write_bytes(raw)
        return Recipe.read(path)

    return target


def _body() -> Callable[[bytes], object]:
    from m0kit.errors import M0kitError
    from m0kit.server.wire.requests import parse_rerank, parse_score

    def target(raw: bytes) -> object:
        for dialect in ("v1", "v2", "plain"):
            with contextlib.suppress(M0kitError):
                parse_rerank(raw, dialect)
        return parse_score(raw)

    return target


def _head() -> Callable[[bytes], object]:
    import asyncio

    from m0kit.server.guard import Guard
    from m0kit.server.metrics import Metrics
    from m0kit.server.settings import ModelSettings, Settings

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(app, Settings((ModelSettings("none"),)), Metrics())
    loop = asyncio.new_event_loop()

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    def target(raw: bytes) -> object:
        """Method, path and headers, a line each: what the guard makes of them."""
        method, _, rest = raw.partition(b" ")
        path, *lines = rest.split(b"\n")
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
        told = {"method": method.decode("latin-1"), "path": path.decode("latin-1"), "raw_path": path}
        scope = {"type": "http", "headers": headers, "query_string": b"", "server": ("127.0.0.1", 80), **told}
        loop.run_until_complete(guard(scope, receive, send))
        assert sent[0]["status"] < 500, sent
        return sent

    return target


TARGETS: Final[dict[str, Callable[[], Callable[[bytes], object]]]] = {
    "json": _json,
    "lines": _lines,
    "formats": _formats,
    "uri": _uri,
    "recipe": _recipe,
    "body": _body,
    "head": _head,
}
_SEEDS: Final[dict[str, list[bytes]]] = {
    "json": [b'{"a": [1, -2.5e3, "\\ud83d\\ude42", null, true]}'],
    "lines": [
        b'{"query": "q", "document": {"image": "page.png"}, "id": 7}\n{"query": {"text": "q"}, "document": "d"}\n'
    ],
    "formats": [
        b"xtext",
        b"x\x89PNG\r\n",
        b"xBM",
        b"xP6 1 1 255\n",
        b"x%PDF-",
        b"xversion https://git-lfs.github.com/spec/",
    ],
    "uri": [b"image/png;base64,iVBORw0KGgo=", b";base64,%2B%2f"],
    "body": [
        b'{"query": "q", "documents": ["d", {"text": "t"}, {"image": "data:;base64,iVBORw0KGgo="}], "top_n": "2"}',
        b'{"query": {"id": "a"}, "texts": [{"content": [{"type": "text", "text": "t"}]}], "truncate": "false"}',
        b'{"text_1": ["q"], "text_2": {"content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}}',
        b'{"query": "q", "documents": [{"a": "b"}], "rank_fields": ["a"], "stream": 1, "truncation_side": "right"}',
    ],
    "head": [
        b"POST /v1/rerank\nhost: localhost:8080\ncontent-type: application/json; charset=utf-8\ncontent-length: 3",
        b"PUT /v1/documents/a\nhost: [::1]\norigin: http://[::1]\ncontent-type: image/png\ncontent-encoding: gzip",
        b"GET /\nhost: 127.0.0.1\nsec-fetch-site: cross-site\nsec-fetch-mode: navigate\nsec-fetch-dest: document",
        b"GET /live\nhost: x\nx-request-id: r-1\ntraceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01",
    ],
    "recipe": [b'precision = "x"\nequalize = true\n[[weights]]\nmatch = "*"\nscheme = "int4"\nblock = [128, 64]\n'],
}


def available() -> bool:
    """Whether this Python has atheris."""
    return importlib.util.find_spec("atheris") is not None


def run(name: str, seconds: float, seed: int) -> str:
    """Fuzz a target in a process of its own; a line that tells what came of it, with FAILED where something did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.fuzz.coverage", name, f"{seconds:.0f}", str(seed), folder]
        environment = {**os.environ, "TMPDIR": folder}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        found = sorted(Path(folder).glob("failed-*"))
        executions = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        told = f"atheris {name}: {executions[-1] if executions else '?'} executions in {seconds:.0f} s"
        if done.returncode == 0 and not found:
            return told
        raw = found[0].read_bytes() if found else b""
        return f"{told}: FAILED on {raw[:500]!r}\n{done.stderr[-2000:]}"


def _main(name: str, seconds: str, seed: str, folder: str) -> None:
    import atheris

    with atheris.instrument_imports(include=["m0kit", "m0kit_quant"]):
        target = TARGETS[name]()
    from m0kit.errors import M0kitError

    def once(raw: bytes) -> None:
        with contextlib.suppress(M0kitError):
            target(raw)

    corpus = Path(folder) / "corpus"
    corpus.mkdir()
    for number, raw in enumerate(_SEEDS[name]):
        (corpus / str(number)).write_bytes(raw)
    options: list[Any] = [
        sys.argv[0],
        f"-max_total_time={max(1, int(float(seconds)))}",
        f"-seed={int(seed) % 2**31 or 1}",
    ]
    options += ["-print_final_stats=1", "-max_len=4096", "-timeout=20", "-rss_limit_mb=2048", "-verbosity=1"]
    atheris.Setup([*map(str, options), f"-artifact_prefix={folder}/failed-", str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _main(*sys.argv[1:])
