"""An engine that computes wrongly is found before anything is scored, and one that was right is not asked again."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tests.alone import optional

from m0kit import Reranker
from m0kit.artifact.answers import Setting, Trial
from m0kit.artifact.manifest import read_manifest, write_manifest
from m0kit.cli.commands import cli
from m0kit.cli.doctor import doctor
from m0kit.errors import ArtifactError, WrongAnswerError
from m0kit.scoring import sessions

onnx = optional("onnx")
OPEN = sessions.open_graph  # before a test puts another in its place
TEXT = ("slm markdown", "some text about small language models")


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def image(picture: Callable[..., Image.Image]) -> tuple[str, Image.Image]:
    return "slm markdown", picture(60, 90)


def engine(scale: float = 1.0, graph: str = "decoder", output: str = "") -> sessions.GraphOpener:
    """ONNX Runtime with one product that is off: the first of the graph's products is multiplied by `scale`."""

    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        model = None
        if name == graph and scale != 1.0:
            proto = onnx.load(folder / f"{name}.onnx", load_external_data=False)
            product = next(node for node in proto.graph.node if node.op_type == "Gemm" and output in node.name)
            product.attribute.append(onnx.helper.make_attribute("alpha", scale))
            model = proto.SerializeToString()
        return OPEN(folder, name, threads=1, also=also, model=model)

    return opener


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs in the order in which m0kit's own engine runs them."""
    names: list[str] = []
    real = sessions.OnnxRuntimeGraph.run

    def noting(self: sessions.OnnxRuntimeGraph, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        names.append(self._name)
        return real(self, feeds, outputs)

    monkeypatch.setattr(sessions.OnnxRuntimeGraph, "run", noting)
    return names


def test_a_product_that_is_off_is_refused_with_what_differs_and_what_to_do(artifact: Path) -> None:
    with pytest.raises(WrongAnswerError) as caught:
        Reranker.load(artifact, open_graph=engine(1.5))
    assert isinstance(caught.value, ArtifactError)
    message = str(caught.value)
    assert message.startswith(f"{artifact}: this engine computes this fp32 artifact wrongly: ")
    assert "must have the logit" in message
    assert "Nothing was scored. Use ONNX Runtime" in message


def test_our_own_engine_is_named_with_version_and_processor(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    wrong = engine(1.5)
    monkeypatch.setattr(sessions, "open_graph", lambda folder, name, **_: wrong(folder, name))
    for _ in range(2):  # a bad verdict is never remembered
        runs.clear()
        with pytest.raises(WrongAnswerError) as caught:
            Reranker.load(artifact)
        assert "decoder" in runs
    message = str(caught.value)
    assert f"ONNX Runtime {sessions.engine_version()} on this CPU (" in message
    assert "device cpu, memory fast, kv fp32, computes this fp32 artifact wrongly" in message
    assert "Install another version (pip install -U onnxruntime), or export in another precision" in message


def test_a_gpu_is_named_in_the_place_of_the_processor(
    artifact: Path,
) -> None:
    manifest = read_manifest(artifact)
    setting = Setting("1.31.1", "cuda:1", "fast", "NVIDIA H100")
    with pytest.raises(WrongAnswerError) as caught:
        Trial(artifact, manifest, setting, "fp16").check("text", lambda pairs: [0.0] * len(pairs))
    message = str(caught.value)
    assert "ONNX Runtime 1.31.1 on the GPU cuda:1 (NVIDIA H100), memory fast, kv fp16, computes this fp32" in message
    assert "this CPU" not in message
    assert "pip install -U onnxruntime-gpu" in message


def test_many_rows_and_a_few_behind_a_kept_prefix_are_both_run(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, int]] = []
    real = sessions.OnnxRuntimeGraph.run

    def noting(self: Any, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        if self._name == "decoder":
            rows.append((len(feeds["token_ids"]), feeds["past_key_values.0.key"].shape[1]))
        return real(self, feeds, outputs)

    monkeypatch.setattr(sessions.OnnxRuntimeGraph, "run", noting)
    Reranker.load(artifact)
    (many, none), (few, past) = rows
    assert many >= 32
    assert none == 0
    assert few < 32
    assert past >= 32


@pytest.mark.parametrize("where", ["decoder", "head"])
@pytest.mark.parametrize("scale", [float("nan"), 0.0, -1.0])
def test_no_wrong_number_passes(artifact: Path, where: str, scale: float) -> None:
    with pytest.raises(WrongAnswerError):
        Reranker.load(artifact, open_graph=engine(scale, where))


def test_a_wrong_image_encoder_is_refused_when_the_first_image_comes(artifact: Path, image: Any) -> None:
    reranker = Reranker.load(artifact, open_graph=engine(1.5, "vision"))
    assert np.isfinite(reranker.score([TEXT])).all()
    for _ in range(2):
        with pytest.raises(WrongAnswerError, match=r"The query '\w+' on an image must have the logit"):
            reranker.score([image])
    with pytest.raises(WrongAnswerError):
        reranker.trace(image)


def test_a_wrong_image_encoder_of_the_set_is_refused_where_that_runs(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, image: Any
) -> None:
    wrong = engine(1.5, "vision.cpu")
    assert np.isfinite(Reranker.load(artifact, open_graph=wrong).score([image])).all()  # the portable one is right
    monkeypatch.setattr(sessions, "open_graph", lambda folder, name, *, runs, **_: wrong(folder, runs.get(name, name)))
    with pytest.raises(WrongAnswerError, match=r"The query '\w+' on an image must have the logit"):
        Reranker.load(artifact).score([image])


def test_what_was_right_is_not_asked_again(artifact: Path, runs: list[str], image: Any) -> None:
    Reranker.load(artifact)
    assert runs == ["decoder", "decoder", "head"]
    runs.clear()
    reranker = Reranker.load(artifact, threads=2)
    assert runs == []
    reranker.score([image])
    assert runs == ["vision.cpu", "decoder", "head"] * 2
    reranker.score([image])
    assert runs == ["vision.cpu", "decoder", "head"] * 3
    runs.clear()
    Reranker.load(artifact).score([image, TEXT])
    assert runs.count("vision.cpu") == 1


@pytest.mark.parametrize("options", [{"kv": "fp16"}, {"kv": "int8"}, {"memory": "low"}])
def test_every_way_of_computing_is_asked_once(artifact: Path, runs: list[str], options: dict[str, Any]) -> None:
    Reranker.load(artifact)
    for expected in (True, False):
        runs.clear()
        Reranker.load(artifact, **options)
        assert bool(runs) == expected


@pytest.mark.parametrize(
    "changed",
    [
        "m0kit.scoring.sessions.engine_version",
        "m0kit.artifact.answers._processor",
    ],
)
def test_another_version_or_processor_is_asked_anew(
    artifact: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    Reranker.load(artifact)
    runs.clear()
    monkeypatch.setattr(changed, lambda: "9.9.9" if "version" in changed else ("another", "one"))
    Reranker.load(artifact)
    assert runs


def test_another_artifact_is_asked_anew(artifact: Path, tmp_path: Path, runs: list[str]) -> None:
    Reranker.load(artifact)
    shutil.copytree(artifact, tmp_path / "copy")
    runs.clear()
    Reranker.load(tmp_path / "copy")
    assert runs == []  # the same one in another place
    manifest = read_manifest(artifact)
    model = replace(manifest.model, prompt=replace(manifest.model.prompt, logit_bias=0.5))
    write_manifest(tmp_path / "copy", replace(manifest, model=model))
    Reranker.load(tmp_path / "copy")
    assert runs


def test_verdicts_on_other_engines_and_on_ours_are_kept_apart(artifact: Path, runs: list[str]) -> None:
    for _ in range(2):  # not remembered
        runs.clear()
        Reranker.load(artifact, open_graph=engine())
        assert runs
    runs.clear()
    Reranker.load(artifact)
    assert runs
    with pytest.raises(WrongAnswerError):  # though ours was right
        Reranker.load(artifact, open_graph=engine(1.5))


def test_limits_of_the_caller_do_not_change_the_answers(artifact: Path, image: Any) -> None:
    reranker = Reranker.load(artifact, max_pixels=3136, max_length=1100)
    assert np.isfinite(reranker.score([TEXT, image])).all()
    assert len(reranker.try_answers(again=True)) == 5
    assert reranker.config.image.max_pixels == 3136


def test_answers_are_asked_where_nothing_can_be_remembered(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(artifact / "head.onnx"))  # a file: nothing can be made in it
    for _ in range(2):
        runs.clear()
        Reranker.load(artifact)
        assert runs == ["decoder", "decoder", "head"]


def test_texts_alone_do_not_open_the_image_encoder(artifact: Path) -> None:
    opened: list[str] = []

    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        opened.append(name)
        return sessions.open_graph(folder, name, threads=1, also=also)

    Reranker.load(artifact, open_graph=opener).score([TEXT])
    assert sorted(opened) == ["decoder", "head"]


# --- commands --------------------------------------------------------------------------------------


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    off = engine(1.5, "vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "open_graph", lambda folder, name, **_: off(folder, name))
        yield


def test_doctor_asks_every_time(artifact: Path, runs: list[str]) -> None:
    for _ in range(2):
        runs.clear()
        done = CliRunner().invoke(doctor, [str(artifact)], catch_exceptions=False)
        assert done.exit_code == 0
        assert "known answers on cpu: 5 right; a logit is off by" in done.stdout
        assert {"vision.cpu", "decoder", "head"} == set(runs)
    told = json.loads(CliRunner().invoke(doctor, [str(artifact), "--json"], catch_exceptions=False).stdout)
    answers = told["artifact"]["answers"]
    assert len(answers) == 5
    assert all(abs(a["logit"] - a["known"]["logit"]) <= a["tolerance"] for a in answers)


def test_doctor_says_what_is_wrong(artifact: Path, wrong: None) -> None:
    done = CliRunner().invoke(doctor, [str(artifact)], catch_exceptions=False)
    assert done.exit_code == 1
    assert "cannot run" in done.stdout
    assert "on an image must have the logit" in done.stdout


def test_inspect_asks_when_it_verifies(artifact: Path, runs: list[str], wrong: None) -> None:
    assert CliRunner().invoke(cli, ["inspect", str(artifact)], catch_exceptions=False).exit_code == 0
    assert runs == []
    with pytest.raises(WrongAnswerError):
        CliRunner().invoke(cli, ["inspect", str(artifact), "--verify"], catch_exceptions=False)


def test_an_artifact_without_answers_is_scored_and_said_to_be_unchecked(unasked: Path, runs: list[str]) -> None:
    reranker = Reranker.load(unasked)
    assert runs == []
    assert np.isfinite(reranker.score([TEXT])).all()
    for command in (["doctor"], ["inspect", "--verify"]):
        done = CliRunner().invoke(cli, [command[0], str(unasked), *command[1:]], catch_exceptions=False)
        assert done.exit_code == 0
        assert "none in this artifact, so what an engine computes cannot be checked" in done.stdout
    assert os.listdir(unasked)
