"""The committed artifacts score as PyTorch does wherever the runtime runs, and are those of today's exporter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.artifacts.make import COMMAND, EXPECTED, pairs

from m0kit import Reranker
from m0kit.artifact.manifest import MANIFEST, read_manifest
from m0kit.precision import SCHEMES
from m0kit_parity.proof.tolerances import tolerances

# PyTorch computes with the weights as they are stored, so nothing is left of their rounding: bf16, which is widened,
# keeps fp32's tolerance. fp16 has its own: some versions on some CPUs compute in half precision. nf4 rounds the inputs
# of its first layer and block to 16 bits with a scale a row, which is finer than fp16's 11. int8 and int4 also round
# activations to 8 bits, which is int8's own. The kernel that made garbage of int4 in some versions was off
# by 2.6 here, pixels resized in another order by 0.15.
AS = {"fp32": "fp32", "fp16": "fp16", "bf16": "fp32", "int8": "int8", "int4": "int8", "nf4": "fp16"}
LIMITS = {precision: tolerances(AS[precision])["logit"] for precision in SCHEMES}


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("precision", SCHEMES)
def test_every_precision_has_pytorchs_logits(committed: Path, precision: str, memory: Any) -> None:
    expected = [float.fromhex(logit) for logit in json.loads(EXPECTED.read_text("utf-8"))["logits"][precision]]
    logits = Reranker.load(committed / precision, threads=1, memory=memory).score(pairs(), raw=True)
    assert logits.dtype == np.float32
    assert logits.shape == (len(expected),)
    assert np.ptp(expected) > 5, "the pairs do not differ, so that nothing would be shown"
    off = np.abs(logits - expected)
    assert off.max() <= LIMITS[precision].limit, f"pair {off.argmax()} is off by {off.max()}; {LIMITS[precision].why}"


def test_they_are_what_the_exporter_writes_today(committed: Path, tmp_path: Path) -> None:
    """Not versions of tools, and in data what a sum in another order may round otherwise on another CPU.

    With feedback a code that falls to the other side moves those that are rounded after it in its row.
    """
    pytest.importorskip("torch", reason="an installed runtime has no exporter")
    from tests.artifacts.make import make

    logits = make(tmp_path / "made")
    stale = f"the committed artifacts are not what the exporter writes today: {COMMAND}"
    expected = json.loads(EXPECTED.read_text("utf-8"))["logits"]
    assert set(expected) == set(logits), stale
    for precision, values in logits.items():
        old, new = committed / precision, tmp_path / "made" / precision
        fed = read_manifest(new).recipe.get("feedback", False)
        atol, share = (0.2, 0.98) if fed else (4e-4, 0.999)
        assert np.allclose(values, [float.fromhex(v) for v in expected[precision]], rtol=0, atol=atol), stale
        known, now_known = (read_manifest(folder).known_answers for folder in (old, new))
        assert np.allclose([a.logit for a in known.pairs], [a.logit for a in now_known.pairs], rtol=0, atol=atol), stale
        assert _comparable(old) == _comparable(new), stale
        for name in read_manifest(new).files:
            was, now = ((folder / name).read_bytes() for folder in (old, new))
            if name.endswith(".data"):
                equal = np.frombuffer(was, np.uint8) == np.frombuffer(now, np.uint8)
                assert equal.mean() > share, f"{precision}/{name}: {stale}"
            else:
                assert was == now, f"{precision}/{name}: {stale}"


def _comparable(folder: Path) -> dict[str, Any]:
    """The manifest without versions of tools, without hashes and without what the weights come out at."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["provenance"].pop("tools")
    manifest.pop("sha256")
    manifest["known_answers"] = [(a["query"], a["document"]) for a in manifest["known_answers"]["pairs"]]
    manifest["files"] = {name: entry["size"] for name, entry in manifest["files"].items()}
    return dict(manifest)
