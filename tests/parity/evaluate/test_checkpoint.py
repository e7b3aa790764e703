"""A checkpoint in several precisions: what is finished stays finished, and no more lies on the disk than was said."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.hub import cached
from tests.parity.evaluate.conftest import invoke, judged, row

from m0kit.artifact.manifest import MANIFEST
from m0kit.errors import CheckpointError, InputError, OutputError
from m0kit_export.adapter import AdapterSpec
from m0kit_export.export import quantize_artifact
from m0kit_export.sources import CheckpointSource
from m0kit_parity.evaluate import blame as blaming
from m0kit_parity.evaluate import checkpoint as module
from m0kit_parity.evaluate.checkpoint import Work, baseline_of, sets_key_of
from m0kit_parity.evaluate.command import evaluate
from m0kit_parity.evaluate.compare import compare
from m0kit_parity.evaluate.judged import read_judged
from m0kit_parity.small.files import SMALL
from m0kit_quant.recipe import Recipe

STEPS = ("export_artifact", "score", "activations_of", "costs", "blame")


class Killed(BaseException):
    """As a signal does it: nothing on the way takes it for an error."""


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(blaming, "PAIRS", {"text": 1, "image": 0})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What was begun, in order; with "most" of them a run is killed before the next."""
    seen: dict[str, Any] = {"begun": [], "most": None, "run": 0, "artifacts": 0}

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if seen["most"] is not None and seen["run"] >= seen["most"]:
                raise Killed
            seen["run"] += 1
            what = next(part.name.partition("-")[0] for part in reversed([*_paths(arguments)]) if "-" in part.name)
            seen["begun"].append((name, what))
            result = real(*arguments, **options)
            artifacts = list(tmp_path.glob(f"*.evaluation/*/{MANIFEST}"))
            seen["artifacts"] = max(seen["artifacts"], len(artifacts))
            return result

        return step

    for name in STEPS:
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    return seen


def _paths(arguments: tuple[Any, ...]) -> list[Path]:
    flat = [one for argument in arguments for one in (argument if isinstance(argument, list) else [argument])]
    return [one for one in flat if isinstance(one, Path) and one.name != "base"]


def test_a_run_that_is_killed_after_each_step_does_none_twice(
    base: Path, small: Path, tmp_path: Path, fast: list[Any], steps: dict[str, Any]
) -> None:
    pairs = judged(tmp_path, row(relevance=[2, 0, 1]), row("two cats", relevance=[0, 1, 0]))
    command = (
        small, "--precision", "int8", "--precision", "int4", "--pairs", pairs, "--threads", 1, "--no-speed", "--blame",
        "--json",
    )  # fmt: skip
    steps["most"], runs = 1, 0
    while runs < 20:
        steps["run"] = 0
        runs += 1
        try:
            done = invoke(*command)
        except Killed:
            assert (tmp_path / "base.evaluation").is_dir()
        else:
            break
    wanted = [("export_artifact", "fp32"), ("score", "fp32"), ("activations_of", "fp32")]
    for name in ("int8", "int4"):
        wanted += [(step, name) for step in ("export_artifact", "score", "costs", "blame")]
    assert steps["begun"] == wanted
    assert runs == len(wanted)
    assert steps["artifacts"] == 2, "the baseline and one more"
    assert not (tmp_path / "base.evaluation").exists()

    report = json.loads(done.stdout)
    assert [a["label"] for a in report["artifacts"]] == ["fp32", "int8", "int4"]
    assert report["limits"] == {"fp32": None, "int8": 0.2, "int4": 1.0}
    assert [one["label"] for one in report["blame"]] == ["int8", "int4"]
    assert report["activations"]["pairs"] == 1
    # The very scores of the artifacts that other commands write.
    quantize_artifact(base, tmp_path / "own", recipe=Recipe.default("int8"), progress=False)
    told, _ = compare([base, tmp_path / "own"], {pairs.name: read_judged(pairs)[0]}, threads=1, speed=False)
    mine, theirs = report["artifacts"][1], told.artifacts[1]
    assert mine["fingerprint"] == theirs.fingerprint
    assert mine["quality"][pairs.name]["max_delta"] == theirs.quality[pairs.name].max_delta


def test_what_is_still_true_is_kept_and_what_is_not_is_done_again(
    small: Path, tmp_path: Path, fast: list[Any], steps: dict[str, Any]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    pairs = judged(tmp_path, row(relevance=[2, 0, 1]), row(documents=["a", {"image": "broken.png"}], relevance=[1, 0]))
    command = (small, "--precision", "int8", "--pairs", pairs, "--threads", 1, "--no-speed", "--work", "here")
    steps["most"] = 5  # all but the costs
    with pytest.raises(Killed):
        invoke(*command)
    Image.new("RGB", (56, 56)).save(tmp_path / "broken.png")
    steps["begun"], steps["most"] = [], None
    done = invoke(*command)
    assert steps["begun"] == [
        ("score", "fp32"), ("activations_of", "fp32"), ("score", "int8"), ("costs", "int8"),
    ]  # fmt: skip
    assert "judged.jsonl, 2 queries" in done.stdout
    assert "no channel of the residual stream is massive" in done.stdout
    assert re.search(r"^decoder +this +small-massive +Qwen2\.5-1\.5B", done.stdout, re.MULTILINE)
    assert "as activations go, its figures hold here" in done.stdout
    assert not (tmp_path / "here").exists()


def test_a_checkpoint_of_the_hub_is_evaluated_as_one_here(
    small: Path, tmp_path: Path, fast: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(small, tmp_path / "home")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    pairs = judged(tmp_path, row(relevance=[2, 0, 1]))
    options = ("--precision", "int8", "--pairs", pairs, "--threads", 1, "--no-speed", "--json")
    found = [json.loads(invoke(name, *options).stdout) for name in ("org/name", small)]
    hub, here = (report["artifacts"][1] for report in found)
    assert hub["quality"] == here["quality"]
    assert not list(tmp_path.glob("*.evaluation"))
    with pytest.raises(CheckpointError, match="no such folder here"):
        invoke("org/other", *options)


def test_a_bad_line_is_told_and_the_rest_reported(small: Path, tmp_path: Path, fast: list[Any]) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    pairs = judged(tmp_path, row(relevance=[2, 0, 1]), row(documents=["a", {"image": "broken.png"}], relevance=[1, 0]))
    page = tmp_path / "r.html"
    done = invoke(
        small, "--precision", "nf4", "--pairs", pairs, "--threads", 1, "--no-speed", "--html", page, code=3
    )  # fmt: skip
    assert "line 2, document 2" in done.stderr
    assert "judged.jsonl, 1 queries" in done.stdout
    assert "<h2>Activations</h2>" in page.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_the_work_folder_is_its_own(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = judged(tmp_path, row(relevance=[2, 0, 1]))
    command = (small, "--precision", "int8", "--pairs", pairs, "--work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="mine: exists, and is no folder of an evaluation"):
        invoke(*command, "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with Work.open(tmp_path / "busy") as work:
        with pytest.raises(OutputError, match="another process evaluates in it"):
            invoke(*command, "busy")
        work.finish()
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=1 << 20))
    with pytest.raises(OutputError, match=r"the baseline \(fp32\) and one more artifact take 0\.\d GiB; 0\.0 GiB are"):
        invoke(*command, "new")
    assert not (tmp_path / "new").exists(), "nothing was finished"


def test_what_does_not_go_together_is_said(base: Path, small: Path, tmp_path: Path) -> None:
    def usage(*arguments: object) -> str:
        return CliRunner().invoke(evaluate, [str(a) for a in arguments]).output

    assert "one CHECKPOINT, and 2 were given" in usage(small, base, "--precision", "int8")
    assert "is an artifact, and --precision goes with a checkpoint" in usage(base, "--precision", "int8")
    assert "is a checkpoint and no artifact. Say --precision" in usage(small)
    assert "--kv goes with artifacts" in usage(small, "--precision", "int8", "--kv", "fp16")
    for option in ("--adapter", "--revision", "--work"):
        assert f"{option} goes with a CHECKPOINT and --precision" in usage(base, option, "x")
    with pytest.raises(CheckpointError, match="there is no folder"):
        invoke(tmp_path / "gone", "--precision", "int8")
    pairs = judged(tmp_path, row())
    with pytest.raises(InputError, match="fp32 holds the checkpoint's own values"):
        invoke(small, "--precision", "fp32", "--pairs", pairs)
    assert not list(tmp_path.glob("*.evaluation"))


def test_the_baseline_holds_the_checkpoints_own_values(small: Path, tmp_path: Path) -> None:
    assert baseline_of(CheckpointSource.open(small)) == "fp32", "fp16 is no bf16"
    halved = tmp_path / "bf16"
    shutil.copytree(small, halved)
    weights = load_file(halved / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, halved / "model.safetensors")
    assert baseline_of(CheckpointSource.open(halved)) == "bf16"
    adapter = AdapterSpec(SMALL / "adapters" / "code", 1.0)
    assert baseline_of(CheckpointSource.open(halved, [adapter])) == "fp32", "merging rounds nothing away"


def test_a_set_is_known_by_its_file_and_its_images(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "p.png")
    pairs = judged(tmp_path, row({"image": "p.png"}, ["a", "b"]))

    queries, _ = read_judged(pairs)

    def key() -> str:
        return sets_key_of(pairs, queries)

    first = key()
    assert first == key()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "p.png")
    second = key()
    (tmp_path / "p.png").unlink()
    assert len({first, second, key()}) == 3
