"""nDCG@10 of an artifact on the evaluation set that m0kit carries, beside BM25 and chance. Owns the comparison alone.

ranking(Path("small-fp32"), threads=2)["text"]["m0kit"]
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from m0kit.reranker import Reranker
from m0kit.terminal import bar
from m0kit_parity.drawing.table import Rows
from m0kit_parity.small import evaluate
from m0kit_parity.small.files import SMALL


def ranking(artifact: Path, threads: int, queries: int | None = None) -> dict[str, dict[str, float]]:
    """Set → queries, m0kit, bm25, chance; of all queries, or so many of each set."""
    reranker = Reranker.load(artifact, threads=threads)

    def logits(query: str, documents: Sequence[str | Path]) -> list[float]:
        scored: list[float] = reranker.score([(query, document) for document in documents], raw=True).tolist()
        return scored

    results: dict[str, dict[str, float]] = {}
    for kind in bar(evaluate.KINDS, unit="set"):
        items = evaluate.read_set(SMALL / "eval", kind)[:queries]
        values = {
            "m0kit": evaluate.measure(logits, items)[1],
            "bm25": evaluate.measure(evaluate.bm25_text, items)[1],
            "chance": [evaluate.chance_ndcg(item.relevance) for item in items],
        }
        results[kind] = {"queries": len(items), **{name: statistics.fmean(v) for name, v in values.items()}}
    return results


def ranking_table(results: Mapping[str, Mapping[str, float]]) -> Rows:
    """A row for each set."""
    rows = [["nDCG@10", "queries", "m0kit", "BM25", "chance"]]
    for kind, r in results.items():
        rows.append([kind, str(int(r["queries"])), *(f"{r[name]:.3f}" for name in ("m0kit", "bm25", "chance"))])
    return rows
