"""Draws the README's picture from what m0kit says: one query on the ten embedded pages, best five first.

python docs/draw.py ARTIFACT [docs/demo.svg]     # the artifact of `m0kit checkpoint small`, fp32
"""

import base64
import json
import sys
from pathlib import Path

from PIL import Image

from m0kit import Reranker
from m0kit_parity.small.files import SMALL

WIDTH, PAGE, GAP, BAR = 760, 136, 16, 136
STYLE = """
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1d2430 }
.quiet { fill: #66707f } .page { fill: #fff; stroke: #c3cad5 } .track { fill: #e6eaf0 } .bar { fill: #2f6fdb }
@media (prefers-color-scheme: dark) {
  text { fill: #e6eaf0 } .quiet { fill: #9aa4b2 } .track { fill: #333b47 } .bar { fill: #6ea2ff }
}
"""


def main(artifact: str, output: str = "docs/demo.svg") -> None:
    """Rank the pages and write the picture."""
    case = json.loads((SMALL / "eval" / "pages.jsonl").read_text("utf-8").partition("\n")[0])
    paths = [SMALL / "eval" / document["image"] for document in case["documents"]]
    with Reranker.load(artifact) as reranker:
        found = reranker.rerank(case["query"], paths, top_n=5)
    shown = "\n".join(
        drawing(GAP + place * (PAGE + 10), paths[hit["index"]], hit["relevance_score"], case["relevance"][hit["index"]])
        for place, hit in enumerate(found)
    )
    command = f'$ m0kit rerank small-fp32/ --query "{case["query"]}" pages/*.png --top-n 5'
    Path(output).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 212" role="img" aria-label="{len(paths)} pages '
        f'ranked by one query">\n<style>{STYLE}</style>\n<text x="{GAP}" y="30">{command.replace(">", "&gt;")}</text>\n'
        f"{shown}\n</svg>\n",
        "utf-8",
    )


def drawing(x: int, path: Path, score: float, relevance: int) -> str:
    """A page as it is, its score as a bar and a number, and whether it answers the query."""
    with Image.open(path) as image:
        width, height = image.size
    shown = min(PAGE - 8, 80 * width / height)
    data = base64.b64encode(path.read_bytes()).decode()
    told = {0: "", 1: "in part", 2: "right", 3: "right"}[relevance]
    return (
        f'<rect class="page" x="{x}" y="50" width="{PAGE}" height="88" rx="4"/>'
        f'<image x="{x + (PAGE - shown) / 2:.1f}" y="54" width="{shown:.1f}" height="80" '
        f'href="data:image/png;base64,{data}"/>'
        f'<rect class="track" x="{x}" y="148" width="{BAR}" height="8" rx="4"/>'
        f'<rect class="bar" x="{x}" y="148" width="{BAR * score:.0f}" height="8" rx="4"/>'
        f'<text x="{x}" y="178">{score:.2f}</text>'
        f'<text class="quiet" x="{x}" y="198">{path.name}</text>'
        f'<text class="quiet" x="{x + PAGE}" y="178" text-anchor="end">{told}</text>'
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
