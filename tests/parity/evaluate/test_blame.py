"""What is damaged comes first, whatever else is rounded, and the parts are those that the artifact has."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.parity.evaluate.conftest import invoke, judged, row

from m0kit.errors import ArtifactError
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_parity.evaluate import blame as blaming
from m0kit_parity.evaluate.blame import blame, kinds_of, layers_of, prepared, sample, sides_of
from m0kit_parity.evaluate.blamed import to_html, to_json, to_text
from m0kit_parity.evaluate.judged import Query, builtin_sets
from m0kit_parity.evaluate.mixed import BASELINE, WHOLE, Mixed, Side
from m0kit_quant.equalize import Rescaled
from m0kit_quant.recipe import Recipe
from m0kit_quant.weights import Float32

BAD = "model.layers.1.self_attn.o_proj"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blaming, "PAIRS", {"text": 2, "image": 1})


def export_damaged(checkpoint: Path, output: Path, precision: str, name: str) -> None:
    """An artifact in which one matrix is lost in noise."""
    real = Rescaled.read

    def noisy(self: Rescaled, tensor: str) -> Float32:
        values = real(self, tensor)
        if tensor != f"{name}.weight":
            return values
        return values + np.random.default_rng(0).normal(0, 10 * values.std(), values.shape).astype(np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rescaled, "read", noisy)
        export_artifact(checkpoint, output, recipe=Recipe.default(precision), progress=False)


def test_a_damaged_matrix_comes_first(base: Path, small: Path, tmp_path: Path, few: None) -> None:
    """Also where its channels were scaled together with another matrix's, which fits them better."""
    export_damaged(small, tmp_path / "bad", "int4", BAD)
    found = blame(base, tmp_path / "bad", builtin_sets(), threads=1)
    first = {axis: shares[0] for axis, shares in found.axes.items()}
    assert first["matrices"].name == BAD
    assert first["kinds"].name == "model.layers.*.self_attn.o_proj"
    assert first["layers"].name == "model.layers.1"
    assert all(first[axis].share > 0.8 for axis in ("kinds", "layers", "matrices"))
    assert first["matrices"].left < 0.5 * found.whole.logit
    # All that is there is asked for: what is stored in fp32 cannot be blamed.
    assert not [share for share in found.axes["kinds"] if share.name.startswith(("visual.patch_embed", "score"))]
    assert found.pairs == {"text": 2, "image": 1}
    growth = {one.layer: one.error for one in found.growth}
    assert list(growth) == [f"visual.blocks.{i}" for i in range(4)] + [f"model.layers.{i}" for i in range(6)]
    assert growth["model.layers.1"]["document"] > 3 * growth["model.layers.0"]["document"]
    assert set(growth["visual.blocks.0"]) == {"image"}
    text = to_text(found)
    assert re.search(rf"^By single matrix: {re.escape(BAD)} \(\d+%\)", text, re.MULTILINE)
    assert to_json(found)["axes"]["layers"][0]["name"] == "model.layers.1"
    assert BAD in to_html(found)


def test_the_passes_are_the_artifacts_own(base: Path, tmp_path: Path, few: None) -> None:
    """Mixed in nothing the logits are the baseline's, in everything the artifact's, whatever scaled its channels."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(line) + "\n" for line in [
        {"query": "area", "document": "a red bicycle"}, {"query": "two", "document": {"image": _page(tmp_path)}},
    ]), "utf-8")  # fmt: skip
    for precision, calibration in (("fp16", None), ("nf4", None), ("int8", pairs)):
        folder = tmp_path / precision
        quantize_artifact(base, folder, recipe=Recipe.default(precision), calibration=calibration, progress=False)
        mixed = Mixed(*sides_of(base, folder))
        matrices = [f"model.layers.0.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj")]
        assert max(map(mixed.distance, matrices)) < 0.1, "channels are scaled alike"  # nf4's is 0.08
        found = prepared(base, folder, sample(builtin_sets()), 1)
        logits = []
        for pair in found:
            mixed.begin([BASELINE, WHOLE, replace(WHOLE, inputs=False)], pair.roles)
            logits.append([*mixed.logits(pair.tokens, pair.images), pair.logit, pair.own])
        plain, own, unrounded, theirs, theirs_own = np.transpose(logits)
        assert plain == pytest.approx(theirs, abs=1e-4)  # sums in another order, of logits of about 1
        # Where inputs are rounded, a last bit that falls otherwise grows to about what rounding them costs, or now and
        # then to three times as much (`m0kit_export.answers.NOISE`).
        assert np.abs(own - theirs_own).max() < 1e-4 + 3 * np.sqrt(np.mean((own - unrounded) ** 2))


def _page(folder: Path) -> str:
    Image.new("RGB", (56, 84), "white").save(folder / "page.png")
    return "page.png"


def test_the_same_weights_leave_nothing_to_blame(base: Path, few: None) -> None:
    found = blame(base, base, builtin_sets(), threads=1)
    assert found.whole.logit == 0
    assert found.axes["kinds"] == found.axes["layers"] == found.axes["matrices"] == ()
    assert "Nothing differs" in to_text(found)
    assert "Nothing differs" in to_html(found)


def test_what_cannot_be_blamed_is_said_before_anything_slow(base: Path, tuned: Path, tmp_path: Path) -> None:
    pairs = judged(tmp_path, row())
    with pytest.raises(ArtifactError, match=r"were made of other weights \(adapters in their manifests\)"):
        invoke(base, tuned, "--pairs", pairs, "--blame")
    quantize_artifact(base, tmp_path / "int8", recipe=Recipe.default("int8"), progress=False)
    with pytest.raises(ArtifactError, match="has lost bits itself"):
        invoke(tmp_path / "int8", base, "--pairs", pairs, "--blame")


def test_the_command_tells_it_in_each_form(base: Path, tmp_path: Path, few: None, fast: list[Any]) -> None:
    quantize_artifact(base, tmp_path / "m0-int8", recipe=Recipe.default("int8"), progress=False)
    pairs = judged(tmp_path, row(relevance=[2, 0, 1]))
    arguments = (base, tmp_path / "m0-int8", "--pairs", pairs, "--no-speed", "--threads", 1, "--blame")
    done = invoke(*arguments, "--html", tmp_path / "r.html")
    assert "m0-int8 against base, on 2 text pairs: scores move by" in done.stdout
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "Where the errors of m0-int8 come from</h2>" in page
    assert page.index("Queries that changed") < page.index("Where the errors of") < page.index("<h2>Figures")
    (report,) = json.loads(invoke(*arguments, "--json").stdout)["blame"]
    assert report["pairs"] == {"text": 2, "image": 0}
    assert sum(share["share"] for share in report["axes"]["kinds"]) == pytest.approx(1)
    assert "blame" not in json.loads(invoke(*arguments[:-1], "--json").stdout)


def test_parts_are_named_as_a_recipe_names_them(base: Path) -> None:
    config = Side.open(base).manifest.model
    names = [
        "model.embed_tokens.weight", "visual.patch_embed.proj.weight", "visual.merger.mlp.0.weight",
        "model.layers.0.mlp.up_proj.weight", "model.layers.5.mlp.up_proj.weight", "score.2.weight",
    ]  # fmt: skip
    kinds, layers = kinds_of(names), layers_of(names, config)
    assert list(kinds) == [
        "model.embed_tokens", "visual.patch_embed.proj", "visual.merger.mlp.0", "model.layers.*.mlp.up_proj", "score.2",
    ]  # fmt: skip
    assert kinds["model.layers.*.mlp.up_proj"].has(names[4])
    assert list(layers) == [
        "model.embed_tokens", "visual.patch_embed", "visual.merger", "model.layers.0", "model.layers.5", "score",
    ]  # fmt: skip
    deep = replace(config, decoder=replace(config.decoder, num_layers=28))
    assert list(layers_of([f"model.layers.{i}.mlp.up_proj.weight" for i in range(28)], deep)) == [
        f"model.layers.{i}–{i + 3}" for i in range(0, 28, 4)
    ]


def test_the_sample_is_the_same_each_time_and_of_both_kinds(few: None) -> None:
    page: Mapping[str, Any] = {"image": "p.png"}
    sets = {"a": [Query(f"line {i}", f"q{i}", ("d", "e", page), None) for i in range(5)]}
    pairs = sample(sets)
    assert pairs == sample(sets)
    assert [isinstance(document, str) for _, document in pairs] == [True] * 2 + [False]
