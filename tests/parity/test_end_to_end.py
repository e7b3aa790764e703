"""The claim itself: what comes out of an artifact is what PyTorch with PEFT computes, adapter by adapter.

Checkpoint and adapter → export → artifact on one side, Reference with the same adapter on the other, over
every built-in case but the heavy ones: all four kinds of pairs.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m0kit import Reranker
from m0kit.reranker import best_first
from m0kit_export.adapter import AdapterSpec
from m0kit_export.export import export_artifact
from m0kit_parity.proof.cases import KINDS, Case, builtin_cases
from m0kit_parity.proof.compare import Verdict
from m0kit_parity.proof.golden import record
from m0kit_parity.proof.report import Report
from m0kit_parity.proof.tolerances import tolerances
from m0kit_parity.reference import Reference
from m0kit_parity.samples.adapters import FORMS, write_adapter
from m0kit_parity.samples.checkpoints import write_checkpoint
from m0kit_parity.small import evaluate
from m0kit_parity.small.files import SMALL
from m0kit_quant.recipe import Recipe

Hold = Callable[..., Report]

CODE, HEAD = SMALL / "adapters" / "code", SMALL / "adapters" / "score"

# A process in which these cannot be imported, as where they are not installed.
_WITHOUT_PYTORCH = """
import sys
for name in ("torch", "transformers", "peft", "safetensors", "onnx", "accelerate", "m0kit_export"):
    sys.modules[name] = None
from m0kit.cli.commands import main
main()
"""


@pytest.fixture(scope="module")
def cases() -> tuple[Case, ...]:
    found = builtin_cases()
    assert {case.kind for case in found} == set(KINDS)
    return found


@pytest.fixture(scope="module")
def base_reports(tiny: Path, small: Path, hold: Hold, cases: tuple[Case, ...]) -> dict[str, Report]:
    return {"tiny": hold(tiny, cases), "small": hold(small, cases)}


def assert_holds(report: Report) -> None:
    bad = [
        f"{case.name}: {stage.stage} {stage.value:.3g} of {stage.limit:g} {stage.worst}"
        for case in report.cases
        for stage in case.stages
        if stage.verdict is Verdict.FAIL
    ]
    assert not bad, "\n".join(bad)
    assert report.verdict in (Verdict.PASS, Verdict.NEAR_TIE)


def scores(report: Report) -> dict[str, np.ndarray[Any, Any]]:
    """By kind of pair, the reference's."""
    found: dict[str, list[float]] = {}
    for case in report.cases:
        found.setdefault(case.kind, []).extend(pair.reference_score for pair in case.pairs)
    return {kind: np.array(values) for kind, values in found.items()}


def moved(report: Report, base: Report) -> dict[str, float]:
    """The largest change of a score by an adapter, by kind of pair."""
    before, after = scores(base), scores(report)
    return {kind: float(np.abs(after[kind] - before[kind]).max()) for kind in before}


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_without_adapters_an_artifact_equals_pytorch_at_every_stage(
    name: str, base_reports: Mapping[str, Report]
) -> None:
    report = base_reports[name]
    assert_holds(report)
    every = np.concatenate(list(scores(report).values()))
    assert every.std() > 0.1, "scores that lie close together would prove nothing"
    ranked = [stage for case in report.cases for ranking in case.rankings for stage in [ranking.stage]]
    assert len(ranked) > 10


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_an_artifact_in_another_basis_equals_pytorch_at_every_stage(
    name: str, tiny: Path, small: Path, hold: Hold, cases: tuple[Case, ...]
) -> None:
    """Within the tolerances of fp32: weights are rounded once more, by as much as each of the products."""
    recipe = replace(Recipe.default("fp32"), rotate=True)
    assert_holds(hold({"tiny": tiny, "small": small}[name], cases, recipe=recipe))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_adapter_gives_pefts_scores(
    form: str, tiny: Path, hold: Hold, cases: tuple[Case, ...], base_reports: Mapping[str, Report], tmp_path: Path
) -> None:
    write_adapter(tmp_path / form, tiny, form)
    report = hold(tiny, cases, {tmp_path / form: 1.0})
    assert_holds(report)
    # A hundred tolerances (1e-4) at least in every kind of pair: an adapter that was dropped would fail.
    assert min(moved(report, base_reports["tiny"]).values()) > 0.01
    assert max(moved(report, base_reports["tiny"]).values()) > 0.1


# On trained weights updates of a fifth matter less than on random ones, yet far more than the tolerance.
@pytest.mark.parametrize("form", ["dora", "embedding", "vision-decoder"])
def test_adapters_on_trained_weights_give_pefts_scores(
    form: str, small: Path, hold: Hold, cases: tuple[Case, ...], base_reports: Mapping[str, Report], tmp_path: Path
) -> None:
    write_adapter(tmp_path / form, small, form, naming="published")
    report = hold(small, cases, {tmp_path / form: 1.0})
    assert_holds(report)
    assert max(moved(report, base_reports["small"]).values()) > 0.02


@pytest.mark.parametrize(
    "adapters",
    [{CODE: 1.0}, {HEAD: 1.0}, {CODE: 0.5}, {CODE: 1.0, HEAD: 1.0}, {HEAD: 1.0, CODE: -0.7}],
    ids=lambda a: " then ".join(f"{path.name} {weight:g}" for path, weight in a.items()),
)
def test_trained_adapters_with_weights_and_in_order_give_pefts_scores(
    adapters: Mapping[Path, float],
    small: Path,
    hold: Hold,
    cases: tuple[Case, ...],
    base_reports: Mapping[str, Report],
) -> None:
    light = [case for case in cases if case.name in ("code", "text_text", "mixed", "image_text")]
    report = hold(small, light, adapters)
    assert_holds(report)
    before = {case.name: [pair.reference_score for pair in case.pairs] for case in base_reports["small"].cases}
    changes = [
        abs(pair.reference_score - before[case.name][i]) for case in report.cases for i, pair in enumerate(case.pairs)
    ]
    assert max(changes) > 0.02


def test_the_code_adapter_turns_rankings_round_on_both_sides_alike(small: Path, tmp_path: Path) -> None:
    items = evaluate.read_set(SMALL / "eval", "code")[:6]
    quality = {}
    orders = {}
    for name, specs in (("base", []), ("code", [AdapterSpec(CODE)])):
        export_artifact(small, tmp_path / name, adapters=specs, progress=False)
        reranker = Reranker.load(tmp_path / name, threads=1)
        reference = Reference.load(small, adapters=[(spec.path, spec.weight) for spec in specs])
        ours = [reranker.score([(item.query, d) for d in item.documents]) for item in items]
        theirs = [reference.score([(item.query, d) for d in item.documents]) for item in items]
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), rtol=0, atol=1e-4)
        orders[name] = [best_first(s.tolist()) for s in ours]
        assert orders[name] == [best_first(s.tolist()) for s in theirs]
        quality[name] = np.mean(
            [evaluate.ndcg_at_k(s.tolist(), item.relevance) for s, item in zip(ours, items, strict=True)]
        )
    assert all(a != b for a, b in zip(orders["base"], orders["code"], strict=True))
    assert quality["code"] > quality["base"] + 0.1, "it was trained to be better at this"


# Both hold values that 11 bits cannot: weights drawn in fp32, and an fp16 checkpoint changed by an adapter.
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_half_precision_stays_within_its_own_tolerances_and_uses_them(
    name: str, small: Path, hold: Hold, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    if name == "tiny":
        write_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
        report = hold(tmp_path / "tiny", cases, precision="fp16")
    else:
        report = hold(small, cases, {CODE: 1.0}, precision="fp16")
    assert_holds(report)
    used = max(stage.value for case in report.cases for stage in case.stages if stage.stage == "hidden")
    # One rounding to 11 bits is 2**-12 in the mean; less would mean that it was fp32 that ran.
    assert used > 2**-12


def test_values_that_half_precision_holds_exactly_lose_nothing_in_it(
    small: Path, hold: Hold, cases: tuple[Case, ...]
) -> None:
    """The trained checkpoint is stored in fp16: the scheme is one of storage, arithmetic stays fp32."""
    report = hold(small, cases[:3], precision="fp16")
    for case in report.cases:
        for stage in case.stages:
            assert stage.value <= tolerances("fp32")[stage.stage].limit, stage


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "nf4"])
def test_every_precision_stays_within_its_own_tolerances_and_uses_them(
    precision: str, small: Path, hold: Hold, cases: tuple[Case, ...]
) -> None:
    report = hold(small, cases, precision=precision)
    assert_holds(report)
    used = max(stage.value for case in report.cases for stage in case.stages if stage.stage == "hidden")
    assert used > 10 * tolerances("fp32")["hidden"].limit, "it was rounded to fewer bits than these"


@pytest.mark.parametrize(
    ("precision", "module", "damage"),
    [
        ("int4", "int4", lambda right: lambda values: right(values[..., ::-1])),  # neighbours change places
        (
            "int8",
            "int8",
            lambda right: lambda *a: (right(*a)[0], np.roll(right(*a)[1], 1)),
        ),  # scales of the next output
    ],
)
def test_weights_that_are_stored_wrongly_fail_the_tolerances_of_few_bits(
    precision: str, module: str, damage: Callable[..., Any], small: Path, hold: Hold, cases: tuple[Case, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Wide as they are: a mistake in a layout is not a matter of rounding."""
    scheme = import_module(f"m0kit_quant.{module}")
    name = "pack" if precision == "int4" else "quantize"
    monkeypatch.setattr(scheme, name, damage(getattr(scheme, name)))
    report = hold(small, [case for case in cases if case.name == "text_image"], precision=precision)
    failed = {s.stage for case in report.cases for s in case.stages if s.value > tolerances(precision)[s.stage].limit}
    assert {"image_embeds", "hidden"} <= failed


def m0kit(*arguments: object, script: str | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    start = ["-c", script] if script else ["-m", "m0kit"]
    done = subprocess.run(
        [sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_two_halves_run_apart_and_the_second_needs_no_pytorch(tiny: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora", tiny, "plain")
    artifact, golden = tmp_path / "artifact", tmp_path / "golden"
    export_artifact(tiny, artifact, adapters=[AdapterSpec(tmp_path / "lora", 0.5)], progress=False)
    picked = [word for name in ("tiny", "image_image", "image_text", "mixed") for word in ("--cases", name)]
    adapter = ["--adapter", f"{tmp_path / 'lora'}:0.5"]
    m0kit("parity", "record", tiny, *adapter, *picked, "--layers", "-o", golden)
    done = m0kit("parity", "check", artifact, golden, "--layers", "--json", script=_WITHOUT_PYTORCH)
    report = json.loads(done.stdout)
    assert report["verdict"] in ("pass", "near-tie")
    assert {case["name"] for case in report["cases"]} == {"tiny", "image_image", "image_text", "mixed"}
    assert {stage["stage"] for pair in report["cases"][0]["pairs"] for stage in pair["stages"]} >= {"layers", "hidden"}
    assert "torch" in report["golden"]["provenance"]["versions"]

    # The block above is a real one.
    m0kit("parity", "record", tiny, "-o", tmp_path / "never", script=_WITHOUT_PYTORCH, code=1)

    # Without the adapter's half weight it is another model, which is said before anything is computed.
    export_artifact(tiny, tmp_path / "bare", progress=False)
    done = m0kit("parity", "check", tmp_path / "bare", golden, script=_WITHOUT_PYTORCH, code=1)
    assert (done.stdout, "adapter" in done.stderr) == ("", True)


_DAMAGES = {
    "image_embeds": "visual.blocks.1.mlp.fc2.weight",
    "hidden": "model.layers.1.mlp.down_proj.weight",
    "logit": "score.2.weight",
}


@pytest.mark.parametrize("stage", _DAMAGES)
def test_a_changed_layer_fails_the_check_at_the_stage_it_belongs_to(stage: str, tiny: Path, tmp_path: Path) -> None:
    """The later stages fail as well, none before does."""
    damaged, artifact, golden = tmp_path / "damaged", tmp_path / "artifact", tmp_path / "golden"
    shutil.copytree(tiny, damaged)
    tensors = load_file(damaged / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    weight = tensors[_DAMAGES[stage]]
    noise = torch.randn(weight.shape, generator=generator)
    tensors[_DAMAGES[stage]] = (weight * (1 + 0.02 * noise)).to(weight.dtype)
    save_file(tensors, damaged / "model.safetensors")
    export_artifact(damaged, artifact, progress=False)
    case = builtin_cases(["text_image"])
    reference = Reference.load(tiny)
    record(golden, case, reference, model=reference.config, command="record", provenance={})
    done = m0kit("parity", "check", artifact, golden, "--json", script=_WITHOUT_PYTORCH, code=1)
    failed: set[str] = set()
    for pair in json.loads(done.stdout)["cases"][0]["pairs"]:
        failed |= {s["stage"] for s in pair["stages"] if s["verdict"] == "fail"}
    order_of_stages = ["token_ids", "positions", "grid_thw", "patches", "image_embeds", "hidden", "logit"]
    assert stage in failed
    assert not failed & set(order_of_stages[: order_of_stages.index(stage)])
