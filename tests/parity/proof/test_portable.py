"""Portable graphs use standard operators only: other engines compute the same, and so do the graphs of a set."""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tests.hub import cached

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest
from m0kit.errors import DependencyError, M0kitError
from m0kit_export.export import export_artifact
from m0kit_parity.proof.cases import builtin_cases
from m0kit_parity.proof.cli import parity
from m0kit_parity.proof.compare import Verdict
from m0kit_parity.proof.golden import Golden, record
from m0kit_parity.proof.portable import ENGINES, portable_encoder
from m0kit_parity.proof.report import check
from m0kit_parity.reference import Reference
from m0kit_quant.recipe import Recipe


@pytest.fixture(scope="module")
def golden(tiny_reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    folder = tmp_path_factory.mktemp("portable") / "golden"
    cases = builtin_cases(["text_text", "tiny", "text_image", "image_text", "image_image"])
    record(folder, cases, tiny_reference, model=tiny_reference.config, command="record", provenance={}, layers=True)
    return Golden.open(folder)


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_another_engine_stays_within_the_same_tolerances(engine: str, golden: Golden, tiny_artifact: Path) -> None:
    reranker = Reranker.load(tiny_artifact, open_graph=ENGINES[engine])
    report = check(golden, reranker, "fp32", {}, layers=True)
    failed = [(case.name, s) for case in report.cases for s in case.stages if s.verdict is Verdict.FAIL]
    assert not failed
    assert {case.kind for case in report.cases} == {"text-text", "text-image", "image-text", "image-image"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_both_image_encoders_of_onnx_runtime_stay_within_the_same_tolerances(
    precision: str, golden: Golden, tiny: Path, tmp_path: Path
) -> None:
    manifest = export_artifact(tiny, tmp_path / "a", recipe=Recipe.default(precision), progress=False)
    encoder = portable_encoder("cpu", tmp_path / "a", manifest, 1)
    assert encoder is not None
    report = check(golden, Reranker.load(tmp_path / "a", threads=1), precision, {}, portable=encoder)
    assert report.verdict is Verdict.PASS
    seen = Counter(stage.stage for case in report.cases for stage in case.stages)
    assert seen["portable_embeds"] == seen["image_embeds"] > 3
    # Both were run: they add in another order.
    shares = {(s.stage, s.share) for case in report.cases for s in case.stages if s.stage.endswith("_embeds")}
    assert len(shares) > seen["image_embeds"]


def test_where_no_set_runs_there_is_no_second_image_encoder(tiny: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    assert portable_encoder("OpenVINOExecutionProvider", tiny_artifact, read_manifest(tiny_artifact), 1) is None
    manifest = export_artifact(tiny, tmp_path / "a", recipe=Recipe.default("int8"), progress=False)
    assert portable_encoder("cpu", tmp_path / "a", manifest, 1) is None


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_another_engine_runs_what_lies_in_a_hub_cache(engine: str, tiny_artifact: Path, tmp_path: Path) -> None:
    """These engines refuse weights that are links out of the folder."""
    places = (tiny_artifact, cached(tiny_artifact, tmp_path))
    here, there = (Reranker.load(place, open_graph=ENGINES[engine]) for place in places)
    assert there.score([("q", "text")], raw=True) == here.score([("q", "text")], raw=True)
    assert not list(Path(tempfile.gettempdir()).glob("m0kit-graph-*"))


def test_another_engine_is_really_another(golden: Golden, tiny_artifact: Path) -> None:
    """Equal to the last bit in every pair would mean that one engine was run under all names."""
    inputs = [pair.inputs for pair in golden.read("text_text").pairs]
    pairs = [(query.value(), document.value()) for query, document in inputs]
    logits = {
        name: Reranker.load(tiny_artifact, threads=1, open_graph=engine).score(pairs, raw=True).tolist()
        for name, engine in ENGINES.items()
    }
    assert len({tuple(values) for values in logits.values()}) == len(ENGINES) == 3


def test_the_command_line_chooses_the_engine(golden: Golden, tiny_artifact: Path) -> None:
    arguments = ["check", str(tiny_artifact), str(golden.folder), "--cases", "tiny", "--engine", "onnx", "--json"]
    done = CliRunner().invoke(parity, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["engine"] == "onnx"


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
@pytest.mark.parametrize(
    ("precision", "operator"), [("int8", "MatMulIntegerToFloat"), ("int4", "MatMulNBits"), ("nf4", "MatMulBnb4")]
)
def test_an_operator_that_only_onnx_runtime_has_is_named_before_anything_is_computed(
    precision: str, operator: str, engine: str, golden: Golden, tiny: Path, tmp_path: Path
) -> None:
    export_artifact(tiny, tmp_path / "a", recipe=Recipe.default(precision), progress=False)
    done = CliRunner().invoke(parity, ["check", str(tmp_path / "a"), str(golden.folder), "--engine", engine])
    assert isinstance(done.exception, M0kitError)
    text = str(done.exception)
    for part in (str(tmp_path / "a"), precision, operator, f"engine {engine}", "fp32, fp16 and bf16", "onnxruntime"):
        assert part in text
    assert "opening" not in done.stderr


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_whatever_else_an_engine_raises_names_the_graph_and_the_engine(
    engine: str, tiny: Path, tiny_artifact: Path, tmp_path: Path
) -> None:
    opener = ENGINES[engine]
    assert opener is not None
    head = opener(tiny_artifact, "head")
    with pytest.raises(M0kitError, match=f"the head graph failed in the engine {engine}: "):
        head.run({"hidden": np.zeros((1, 7), np.float32)}, ["logit"])
    export_artifact(tiny, tmp_path / "a", recipe=Recipe.default("nf4"), progress=False)
    with pytest.raises(M0kitError, match=f"the engine {engine} cannot open the decoder graph: .*MatMul(Bnb4|Integer)"):
        opener(tmp_path / "a", "decoder")


@pytest.mark.parametrize(("engine", "extra"), [("openvino", "dev"), ("onnx", "export")])
def test_a_missing_engine_says_what_to_install(
    engine: str, extra: str, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(DependencyError, match=rf"pip install 'm0kit\[{extra}\]'"):
        Reranker.load(tiny_artifact, open_graph=ENGINES[engine])
