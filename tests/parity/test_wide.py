"""The published widths with few layers and the real vocabulary: memory while writing, sensitivity, parity."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.parity import sensitivity

from m0kit import Reranker
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.export import export_artifact
from m0kit_parity.proof.cases import builtin_cases
from m0kit_parity.proof.compare import Verdict
from m0kit_parity.proof.golden import Golden, record
from m0kit_parity.proof.portable import portable_encoder
from m0kit_parity.proof.report import check
from m0kit_parity.proof.tolerances import tolerances
from m0kit_parity.reference import Reference
from m0kit_parity.samples.checkpoints import model_config

MEBIBYTE = 1 << 20

# Both writers in one process, which tells how much private memory (not pages of mapped files) each took at
# its highest beyond what importing takes.
_WRITER = """
import json, sys, threading, time
from pathlib import Path
from m0kit_parity.samples.adapters import write_adapter
from m0kit_parity.samples.checkpoints import write_checkpoint

def private():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def peak(run):
    start, seen, done = private(), [], False
    def watch():
        while not done:
            seen.append(private() - start)
            time.sleep(0.005)
    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done = True
    watcher.join()
    return max(seen)

folder = Path(sys.argv[1])
print(json.dumps({
    "checkpoint": peak(lambda: write_checkpoint(folder / "wide", "wide")),
    "dora": peak(lambda: write_adapter(folder / "dora", folder / "wide", "dora")),
    "embedding": peak(lambda: write_adapter(folder / "embedding", folder / "wide", "embedding")),
}))
"""


@dataclass(frozen=True)
class Wide:
    checkpoint: Path
    adapters: dict[str, Path]
    peaks: dict[str, int]  # bytes


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    folder = tmp_path_factory.mktemp("wide")
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(folder)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    adapters = {name: folder / name for name in ("dora", "embedding")}
    return Wide(folder / "wide", adapters, json.loads(done.stdout))


@pytest.fixture(scope="module")
def reference(wide: Wide) -> Reference:
    return Reference.load(wide.checkpoint)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_takes_far_less_memory_than_what_is_written(wide: Wide) -> None:
    size = (wide.checkpoint / "model.safetensors").stat().st_size
    assert size > 600 * MEBIBYTE
    # A slice of 2**24 values in fp32, its copy in half precision, and what the allocator keeps of both.
    assert wide.peaks["checkpoint"] < 300 * MEBIBYTE
    # Slices of the base, their checks for NaN, and PEFT's modules; measured: 110 MB with every layer of `full`.
    assert (wide.adapters["dora"] / "adapter_model.safetensors").stat().st_size < 10 * MEBIBYTE
    assert wide.peaks["dora"] < 250 * MEBIBYTE
    # Here the adapter itself is large, because PEFT saves the embedding that it adapts.
    adapter = (wide.adapters["embedding"] / "adapter_model.safetensors").stat().st_size
    assert adapter > 400 * MEBIBYTE
    assert wide.peaks["embedding"] < adapter + 250 * MEBIBYTE


def test_the_checkpoint_has_the_published_widths_and_vocabulary(wide: Wide) -> None:
    checkpoint = open_checkpoint(wide.checkpoint)
    assert checkpoint.config == model_config("wide")
    assert checkpoint.shape("model.embed_tokens.weight") == (151936, 1536)
    assert checkpoint.config.prompt.image_pad_id == 151655
    assert checkpoint.read("model.norm.weight").dtype == torch.bfloat16


def test_scores_spread_over_the_range(reference: Reference) -> None:
    sensitivity.assert_spread(reference.score(sensitivity.pairs_of("text_text", "multilingual", "tiny", "mixed")))


@pytest.mark.parametrize("mistake", sensitivity.MISTAKES)
def test_a_mistake_moves_scores_visibly(mistake: str, reference: Reference) -> None:
    pairs = sensitivity.pairs_of("mixed")  # text, page, text, page
    sensitivity.assert_noticed(reference, mistake, pairs[1::2] if mistake in sensitivity.OF_IMAGES else pairs)


def test_parity_at_full_width_for_all_four_kinds_with_an_adapter(
    wide: Wide, reference: Reference, tmp_path: Path
) -> None:
    cases = builtin_cases(["text_text", "image_text", "image_image", "mixed"])
    base = reference.score(sensitivity.pairs_of("text_text"))
    adapter = wide.adapters["dora"]
    export_artifact(wide.checkpoint, tmp_path / "artifact", adapters=[AdapterSpec(adapter)], progress=False)
    adapted = Reference.load(wide.checkpoint, adapters=[(adapter, 1.0)])
    record(tmp_path / "golden", cases, adapted, model=adapted.config, command="record", provenance={}, layers=True)
    reranker = Reranker.load(tmp_path / "artifact", threads=1)
    portable = portable_encoder("cpu", tmp_path / "artifact", reranker.manifest, 1)
    report = check(Golden.open(tmp_path / "golden"), reranker, "fp32", {}, layers=True, portable=portable)
    failed = [(case.name, s) for case in report.cases for s in case.stages if s.verdict is Verdict.FAIL]
    assert not failed
    assert {s.stage for case in report.cases for s in case.stages} == set(tolerances("fp32"))
    changed = [pair.reference_score for case in report.cases if case.name == "text_text" for pair in case.pairs]
    assert np.abs(changed - base).max() > 0.05, "the adapter must matter"
