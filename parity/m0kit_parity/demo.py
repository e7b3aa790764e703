"""`make demo`: the whole way on embedded data, by the commands a user would type.

Exports the small trained checkpoint with and without its code adapter, reranks texts, code and page images, reads
pages once and asks them twice, holds the artifact against the PyTorch reference, shows what 8 and 4 bits cost, and
serves it to a client.

    python -m m0kit_parity.demo
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from m0kit.terminal import run, show
from m0kit_parity.small.evaluate import Item, read_set
from m0kit_parity.small.files import SMALL

_ADDRESS: Final = re.compile(r"serving at (http://\S+?)[,;]")
TEXT, CODE, PAGES = "text", "code", "pages"


def main() -> None:
    """Run every step; stops with the exit code of the first that fails."""
    with tempfile.TemporaryDirectory(prefix="m0kit-demo-") as temporary:
        root = Path(temporary)
        base, code = root / "small-fp32", root / "small-code-fp32"
        _say("1. Export the embedded checkpoint, then again with its code-search adapter merged in")
        m0kit("export", SMALL / "base", "-o", base)
        m0kit("export", SMALL / "base", "--adapter", SMALL / "adapters" / "code", "-o", code)
        m0kit("inspect", code, "--verify")
        _say("2. Rerank texts")
        _rerank(base, TEXT, root)
        _say("3. Rerank code: without the adapter, then with it")
        _rerank(base, CODE, root)
        _rerank(code, CODE, root)
        _say("4. Rerank page images")
        pages = _rerank(base, PAGES, root)
        _say("5. Read the pages once, ask again")
        m0kit("index", "add", base, root / "library", *pages)
        m0kit("index", "stats", root / "library")
        m0kit("rerank", base, "--index", root / "library", "--query", _case(PAGES).query, "--top-n", "3")
        _say("6. Parity with the PyTorch reference, stage by stage")
        adapted = (SMALL / "base", "--adapter", SMALL / "adapters" / "code")
        m0kit("parity", "run", *adapted, code, "--html", "m0kit-parity.html")
        _say("7. The same in 8 and 4 bits: what it costs in ranking")
        few = [root / "small-int8", root / "small-int4"]
        for artifact in few:
            m0kit("quantize", base, "-o", artifact, "--precision", artifact.name.removeprefix("small-"))
        m0kit("evaluate", base, *few, "--no-speed", "--html", "m0kit-evaluate.html")
        _say("8. Serve it, with the pages that were read, and ask as any client of a reranker does")
        _serve(base, root / "library")
        _say("All done. The reports are m0kit-parity.html and m0kit-evaluate.html in this folder.")


def _case(kind: str) -> Item:
    """The first held-out query of a set, with its documents."""
    return read_set(SMALL / "eval", kind)[0]


def _rerank(artifact: Path, kind: str, root: Path) -> list[Path]:
    """Write the documents of one held-out query to files and rerank them; returns the files."""
    case = _case(kind)
    folder = root / kind
    folder.mkdir(exist_ok=True)
    paths = []
    for index, (document, relevance) in enumerate(zip(case.documents, case.relevance, strict=True)):
        if isinstance(document, Path):
            paths.append(document)
            continue
        path = folder / f"{index}{'-relevant' if relevance else ''}.txt"
        path.write_text(document, "utf-8")
        paths.append(path)
    if kind == PAGES:
        best = [paths[i].name for i, relevance in enumerate(case.relevance) if relevance]
        show(f"(the right answer is {' or '.join(best)})")
    m0kit("rerank", artifact, "--query", case.query, "--top-n", "5", *paths)
    return paths


def _serve(artifact: Path, library: Path) -> None:
    """Start a server, rank the pages of its index by their ids over HTTP, and stop it."""
    command = ["serve", str(artifact), "--index", str(library), "--port", "0", "--log-level", "warning"]
    show(f"$ {shlex.join(['m0kit', *command])} &")
    with subprocess.Popen([sys.executable, "-m", "m0kit", *command], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        found = None
        for line in server.stderr:
            show(line.rstrip())
            if found := _ADDRESS.search(line):
                break
        if found is None:
            sys.exit(server.wait() or 1)
        threading.Thread(target=_show_all, args=(server.stderr,), daemon=True).start()
        try:
            ids = _asked(found[1], "/v1/documents")["ids"]
            documents = [{"id": name} for name in ids]
            body = {"query": _case(PAGES).query, "documents": documents, "top_n": 3}
            asked = json.dumps(body | {"documents": [documents[0], "…"]}, ensure_ascii=False)
            show(f"$ curl {found[1]}/v1/rerank --json {shlex.quote(asked)}")
            answer = _asked(found[1], "/v1/rerank", body)
            for result in answer["results"]:
                show(f"{result['relevance_score']:.4f}  {result['document']['id']}")
            show(f"({len(json.dumps(body))} bytes were sent, for {len(ids)} pages)")
        finally:
            server.terminate()


def _show_all(lines: Iterable[str]) -> None:
    for line in lines:
        show(line.rstrip())


def _asked(address: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)


def m0kit(*arguments: object) -> None:
    """Show a command and run it; ends the demo with its exit code where it fails."""
    words = [str(argument) for argument in arguments]
    shown = shlex.join(words) if len(words) < 12 else shlex.join(words[:7]) + " …"
    show(f"$ m0kit {shown}")
    done = subprocess.run([sys.executable, "-m", "m0kit", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _say(text: str) -> None:
    show("", f"== {text}")


if __name__ == "__main__":
    sys.exit(run(main))
