"""`make demo`: the whole way on embedded data, by the commands a user would type.

Exports the small trained checkpoint with and without its code adapter, reranks texts, code and page images,
holds the artifact against the PyTorch reference, and shows what 8 and 4 bits cost in ranking.

    python -m m0kit_parity.demo
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = Path(__file__).parent / "data" / "small"
TEXT, CODE, PAGES = "text", "code", "pages"


def main() -> None:
    """Run every step; stops with the exit code of the first that fails."""
    with tempfile.TemporaryDirectory(prefix="m0kit-demo-") as temporary:
        root = Path(temporary)
        base, code = root / "small-fp32", root / "small-code-fp32"
        _say("1. Export the embedded checkpoint, then again with its code-search adapter merged in")
        _m0kit("export", SMALL / "base", "-o", base)
        _m0kit("export", SMALL / "base", "--adapter", SMALL / "adapters" / "code", "-o", code)
        _m0kit("inspect", code, "--verify")
        _say("2. Rerank texts")
        _rerank(base, TEXT, root)
        _say("3. Rerank code: without the adapter, then with it")
        _rerank(base, CODE, root)
        _rerank(code, CODE, root)
        _say("4. Rerank page images")
        _rerank(base, PAGES, root)
        _say("5. Parity with the PyTorch reference, stage by stage")
        _m0kit(
            "parity",
            SMALL / "base",
            "--adapter",
            SMALL / "adapters" / "code",
            code,
            "--html",
            "m0kit-parity.html",
        )
        _say("6. The same in 8 and 4 bits: what it costs in ranking")
        few = [root / "small-int8", root / "small-int4"]
        for artifact in few:
            _m0kit("quantize", base, "-o", artifact, "--precision", artifact.name.removeprefix("small-"))
        _m0kit("evaluate", base, *few, "--no-speed", "--html", "m0kit-evaluate.html")
        _say("All done. The reports are m0kit-parity.html and m0kit-evaluate.html in this folder.")


def _rerank(artifact: Path, kind: str, root: Path) -> None:
    """Write the documents of one held-out query to files and rerank them."""
    with open(SMALL / "eval" / f"{kind}.jsonl", encoding="utf-8") as file:
        case = json.loads(file.readline())
    folder = root / kind
    folder.mkdir(exist_ok=True)
    paths = []
    for index, (document, relevance) in enumerate(zip(case["documents"], case["relevance"], strict=True)):
        if isinstance(document, dict):
            paths.append(SMALL / "eval" / document["image"])
            continue
        path = folder / f"{index}{'-relevant' if relevance else ''}.txt"
        path.write_text(document, "utf-8")
        paths.append(path)
    if kind == PAGES:
        best = [paths[i].name for i, relevance in enumerate(case["relevance"]) if relevance]
        print(f"(the right answer is {' or '.join(best)})")
    _m0kit("rerank", artifact, "--query", case["query"], "--top-n", "5", *paths)


def _m0kit(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    shown = shlex.join(words) if len(words) < 12 else shlex.join(words[:7]) + " …"
    print(f"$ m0kit {shown}", flush=True)
    done = subprocess.run([sys.executable, "-m", "m0kit", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
