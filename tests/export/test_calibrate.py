"""Calibration sees what the products see, counts text and images alike, says which line is bad, and leaves no trace."""

import base64
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from torch import nn

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest, verify_files
from m0kit.artifact.ports import GRAPHS
from m0kit.errors import OutputError, RecipeError, SignatureError
from m0kit_export import export
from m0kit_export.builder import Weight
from m0kit_export.calibrate import calibrate, read_pairs
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_export.graphs import build_graphs, schemes_of
from m0kit_export.sources import CheckpointSource
from m0kit_parity.reference import Reference
from m0kit_parity.samples.outliers import write_injected
from m0kit_quant.calibration import Calibration, channel_scales, floored
from m0kit_quant.equalize import Rescaled, channel_groups
from m0kit_quant.recipe import Recipe
from m0kit_quant.rotate import Rotated

TEXTS = [("a query", "small"), ("which", "a longer document " * 15)]


def noise(seed: int, height: int = 56, width: int = 84) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two pairs of text and one with an image, in a folder of their own."""
    folder = tmp_path / "set"
    folder.mkdir()
    noise(0).save(folder / "page.png")
    rows = [{"query": query, "document": document} for query, document in TEXTS]
    return write_lines(folder / "pairs.jsonl", *rows, {"query": "q", "document": {"image": "page.png"}})


# --- the statistics --------------------------------------------------------------------------------------


@contextmanager
def inputs_of_products(reference: Reference) -> Iterator[dict[str, list[NDArray[np.float64]]]]:
    """In PyTorch, the rows (T, K) that every linear layer takes, in the order of the calls."""
    seen: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    last = f"model.layers.{reference.config.decoder.num_layers - 1}."

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(1) if name == "visual.patch_embed.proj" else inputs[0].flatten(0, -2)
            # In the last layer only the last token asks and goes through the MLP.
            if name.startswith(last) and not name.endswith(("k_proj", "v_proj")):
                x = x[-1:]
            seen[name].append(x.double().numpy())

        return note

    roots = {"visual": reference.core.visual, "model": reference.core.language_model, "score": reference.head}
    handles = [
        module.register_forward_pre_hook(hook(f"{root}.{path}"))
        for root, top in roots.items()
        for path, module in top.named_modules()
        if isinstance(module, nn.Linear | nn.Conv3d)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_the_statistics_are_those_of_pytorchs_inputs(tiny: Path, tiny_artifact: Path, pairs: Path) -> None:
    found = calibrate(tiny_artifact, pairs, threads=1, progress=False)
    reference = Reference.load(tiny)
    with inputs_of_products(reference) as seen:
        reference.score(TEXTS)
        texts = {name: np.concatenate(rows) for name, rows in seen.items()}
        seen.clear()
        reference.score([("q", pairs.with_name("page.png"))])
        images = {name: np.concatenate(rows) for name, rows in seen.items()}
    matrices = {n for n in CheckpointSource.open(tiny).names if n.endswith(".weight") and "norm" not in n}
    products = {name.removesuffix(".weight") for name in matrices if "embed_tokens" not in name and "ln_q" not in name}
    assert set(found.peak) == set(found.energy) == set(images) == products
    assert {name for name in images if name not in texts} == {name for name in products if name.startswith("visual.")}
    for name in products:
        kinds = [kind[name] for kind in (texts, images) if name in kind]
        peak = np.max([np.abs(rows).max(axis=0) for rows in kinds], axis=0)
        energy = np.mean([np.square(rows).mean(axis=0) for rows in kinds], axis=0)  # whatever their numbers of rows
        assert found.peak[name].dtype == found.energy[name].dtype == np.float32
        # Two engines in float32: a value differs by 1e-5 of the largest of its layer, as in test_graphs.
        assert np.abs(found.peak[name] - peak).max() <= 1e-5 * peak.max(), name
        assert np.abs(found.energy[name] - energy).max() <= 2e-5 * energy.max(), name


def test_text_and_images_count_alike_whatever_their_numbers(tiny_artifact: Path, pairs: Path) -> None:
    once = calibrate(tiny_artifact, pairs, threads=1, progress=False)
    lines = pairs.read_text().splitlines()
    more = write_lines(pairs.with_name("more.jsonl"), *lines, *lines[:2], *lines[:2])
    twice = calibrate(tiny_artifact, more, threads=1, progress=False)
    assert (once.about["pairs"], twice.about["pairs"]) == ({"text": 2, "image": 1}, {"text": 6, "image": 1})
    for name, energy in once.energy.items():
        assert np.allclose(twice.energy[name], energy, rtol=1e-5, atol=0), name
        assert np.array_equal(twice.peak[name], once.peak[name])
    texts = calibrate(tiny_artifact, write_lines(pairs.with_name("t.jsonl"), *lines[:2]), threads=1, progress=False)
    name = "model.layers.1.mlp.down_proj"
    assert not np.allclose(texts.energy[name], once.energy[name], rtol=1e-2, atol=0)


def test_it_says_how_many_pairs_of_which_file(tiny_artifact: Path, pairs: Path) -> None:
    about = calibrate(tiny_artifact, pairs, threads=1, progress=False).about
    assert about == {"pairs": {"text": 2, "image": 1}, "sha256": hashlib.sha256(pairs.read_bytes()).hexdigest()}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_artifact_of_any_float_type_can_be_observed(
    tiny_artifact: Path, in_precision: Callable[[str], Path], pairs: Path, precision: str
) -> None:
    whole = calibrate(tiny_artifact, pairs, threads=1, progress=False)
    found = calibrate(in_precision(precision), pairs, threads=1, progress=False)
    assert set(found.energy) == set(whole.energy)
    for name, energy in whole.energy.items():  # float16 holds this checkpoint exactly, bfloat16 has 8 bits
        tolerance = 1e-5 if precision == "fp16" else 0.1
        assert np.abs(found.energy[name] - energy).max() <= tolerance * energy.max(), name


@pytest.mark.parametrize("name", GRAPHS)
def test_observing_changes_nothing_that_comes_out(tiny_artifact: Path, name: str) -> None:
    """And nothing is observed unless asked; observed MLPs are not cut into chunks."""
    manifest = read_manifest(tiny_artifact)
    plain, observed = (build_graphs(manifest.model, Recipe.default("fp32"), o)[name] for o in (False, True))
    assert plain.weights == observed.weights
    assert observed.ports.outputs[: len(plain.ports.outputs)] == plain.ports.outputs
    products = [w.name.removesuffix(".weight") for w in plain.weights if len(w.shape) == 2 and "embed" not in w.name]
    added = [port.name for port in observed.ports.outputs[len(plain.ports.outputs) :]]
    products += ["visual.patch_embed.proj"] if name == "vision" else []
    assert sorted(added) == sorted(f"{product}.{what}" for product in products for what in ("peak", "energy", "rows"))


# --- the file --------------------------------------------------------------------------------------------


def test_pairs_are_read_in_every_form(tmp_path: Path) -> None:
    content = io.BytesIO()
    noise(1).save(content, "png")
    data = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    path = write_lines(
        tmp_path / "pairs.jsonl",
        {"query": "a", "document": "b"},
        "",
        {"query": {"text": "a"}, "documents": ["b", {"image": "x/y.png"}, {"image": data}]},
        {"query": {"image": "q.png"}, "document": {"text": "é\u2028"}, "label": 1},
    )
    (tmp_path / "x").mkdir()
    for name in ("x/y.png", "q.png"):
        (tmp_path / name).write_bytes(content.getvalue())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\\u2028", "\u2028".encode()))
    assert "\u2028" in path.read_text("utf-8")
    assert read_pairs(path) == (
        [
            (1, ("a", "b")),
            (3, ({"text": "a"}, "b")),
            (3, ({"text": "a"}, {"image": tmp_path / "x/y.png"})),
            (3, ({"text": "a"}, {"image": data})),
            (4, ({"image": tmp_path / "q.png"}, {"text": "é\u2028"})),
        ],
        {},
    )


GOOD = '{"query": "a", "document": "b"}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no pairs"),
        (["", "  "], "holds no pairs"),
        (["{query: a}"], "line 1: the line is not JSON"),
        (["[" * 100_000], "line 1: .* nested too deeply"),
        (['"a"'], "line 1: expected"),
        (["null"], "line 1: expected"),
        (['{"document": "b"}'], "line 1: expected \"query\" with .*, got 'document'"),
        (['{"query": "a"}'], "line 1: expected .*, got 'query'"),
        (['{"query": "a", "documents": "b"}'], 'line 1: "documents" must be a list with something in it'),
        (['{"query": "a", "documents": []}'], 'line 1: "documents" must be a list with something in it'),
        (['{"query": 3, "document": "b"}'], "line 1: query: expected text .* got int"),
        (['{"query": "a", "document": {"image": 3}}'], "line 1: document: expected text .* got int"),
        (['{"query": "a", "document": {"picture": "x.png"}}'], "line 1: document: unknown key 'picture'"),
        (['{"query": "a", "documents": ["b", null]}'], "line 1: document 2: expected text .* got NoneType"),
        (["1", "2", "3", "4", "5", "6"], r"line 1: .* line 5: .* And 1 more\."),
    ],
)
def test_a_file_without_a_line_of_use_names_its_lines_and_the_form(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", *lines)
    with pytest.raises(RecipeError, match=rf"pairs\.jsonl: .*{message}") as caught:
        read_pairs(path)
    assert '{"query": …, "document": …} or {"query": …, "documents": […]}' in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    if lines[:1] != ["1"] and any(line.strip() for line in lines):
        pairs, errors = read_pairs(write_lines(path, GOOD, *lines, GOOD))
        assert pairs == [(1, ("a", "b")), (3, ("a", "b"))]
        assert list(errors) == [2]
        assert errors[2].startswith("line 2: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.jsonl: No such file"):
        read_pairs(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin").write_bytes('{"query": "é", "document": "b"}'.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin: line 1: the line is not UTF-8 text .* Save it as UTF-8"):
        read_pairs(tmp_path / "latin")
    (tmp_path / "wide").write_text('{"query": "é", "document": "b"}', "utf-16")
    with pytest.raises(RecipeError, match=r"wide: is UTF-16\."):
        read_pairs(tmp_path / "wide")


@pytest.mark.parametrize("damage", ["missing", "cut short", "no image"])
def test_an_image_that_cannot_be_read_costs_its_line_alone(tiny_artifact: Path, pairs: Path, damage: str) -> None:
    page = pairs.with_name("page.png")
    whole = calibrate(tiny_artifact, pairs, threads=1, progress=False)
    content = page.read_bytes()
    page.unlink()
    if damage != "missing":
        page.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"<html>")
    with pytest.warns(UserWarning, match=r"pairs\.jsonl: line 3: .*page\.png.* It is left out\."):
        found = calibrate(tiny_artifact, pairs, threads=1, progress=False)
    assert found.about["left_out_lines"] == [3]
    assert sum(found.about["pairs"].values()) < sum(whole.about["pairs"].values())
    assert "left_out_lines" not in whole.about


# --- exporting with it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def injected(tiny: Path) -> Path:
    """With outliers, so that scales of channels matter."""
    folder = tiny.with_name("injected-for-calibration")
    write_injected(tiny, folder, 1000)
    return folder


def without_equalising(scheme: str) -> Recipe:
    rules = [{"match": pattern, "scheme": "fp32"} for pattern in ("score.*", "visual.patch_embed.*")]
    rules.append({"match": "*", "scheme": scheme})
    return Recipe.from_dict({"precision": scheme, "weights": rules}, "test")


def products_of(artifact: Path) -> Iterator[tuple[Weight, dict[str, NDArray[Any]]]]:
    """The matrices of products that lost bits, each with what is stored."""
    manifest = read_manifest(artifact)
    for name, graph in build_graphs(manifest.model, Recipe.from_dict(manifest.recipe, "manifest")).items():
        stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(artifact / f"{name}.onnx").graph.initializer}
        for weight in graph.weights:
            if not weight.scheme.is_float and not weight.scheme.table:
                yield weight, {part.key: stored[part.name] for part in weight.parts}


def errors_of(artifact: Path, checkpoint: Path, statistics: Calibration) -> dict[str, float]:
    """By matrix that lost bits: its squared error, each input weighed by its mean square in calibration."""
    source = CheckpointSource.open(checkpoint)
    errors = {}
    for weight, parts in products_of(artifact):
        values = weight.scheme.decode(parts, weight.shape).astype(np.float64)
        energy = statistics.energy[weight.name.removesuffix(".weight")]
        errors[weight.name] = float((np.square(values - source.read(weight.name)) * energy).sum())
    return errors


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_calibrated_scales_err_less_on_what_was_seen(tmp_path: Path, injected: Path, pairs: Path, scheme: str) -> None:
    recipe = without_equalising(scheme)
    export_artifact(injected, tmp_path / "fp32", progress=False)
    statistics = calibrate(tmp_path / "fp32", pairs, threads=1, progress=False)
    quantize_artifact(tmp_path / "fp32", tmp_path / "plain", recipe=recipe, progress=False)
    quantize_artifact(tmp_path / "fp32", tmp_path / "calibrated", recipe=recipe, calibration=pairs, progress=False)
    plain, calibrated = (errors_of(tmp_path / name, injected, statistics) for name in ("plain", "calibrated"))
    assert len(plain) > 20
    # int8 chooses among the same scales, so no matrix may get worse; int4 fits them anew, block by block
    slack = 1.001 if scheme == "int8" else 1.05
    assert all(calibrated[name] <= slack * error for name, error in plain.items())
    # and where outliers meet a clipped weight, the choice is another: in two matrices of 31 for int8, in eight for int4
    assert any(calibrated[name] < 0.99 * error for name, error in plain.items())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_error_of_an_input_counts_as_much_as_the_input_after_scaling(
    tmp_path: Path, injected: Path, pairs: Path, precision: str
) -> None:
    """What is scaled up in a matrix meets inputs scaled down: their mean square falls by the square of the factor."""
    recipe, checkpoint = replace(Recipe.default(precision), feedback=False), CheckpointSource.open(injected)
    source = Rotated(checkpoint, checkpoint.config)  # as the recipe has it, with what is seen in that basis
    seen_in = replace(Recipe.default("fp32"), rotate=recipe.rotate)
    export_artifact(injected, tmp_path / "fp32", recipe=seen_in, progress=False)
    statistics = calibrate(tmp_path / "fp32", pairs, progress=False)
    export_artifact(injected, tmp_path / "out", recipe=recipe, calibration=pairs, progress=False)
    config = checkpoint.config
    scales = channel_scales(source, config, schemes_of(build_graphs(config, recipe)), statistics)
    groups = channel_groups(config)
    factors = {tensor: scales[g.name][g.columns] for g in groups if g.name in scales for tensor in g.consumers}
    rescaled = Rescaled(source, groups, scales)
    matters = 0
    for weight, parts in products_of(tmp_path / "out"):
        energy = statistics.energy[weight.name.removesuffix(".weight")]
        values = rescaled.read(weight.name)
        meant = weight.scheme.encode(values, floored(energy / factors.get(weight.name, np.float32(1)) ** 2))
        for key, stored in parts.items():
            assert np.array_equal(stored, meant[key]), f"{weight.name}.{key}"
        other = weight.scheme.encode(values, floored(energy))
        matters += any(not np.array_equal(stored, other[key]) for key, stored in parts.items())
    assert matters > 3


@pytest.mark.parametrize("precision", ["int8", "int4", "nf4"])
def test_export_with_calibration_changes_what_is_stored_and_tells_so(
    tmp_path: Path, tiny: Path, tiny_artifact: Path, in_precision: Callable[[str], Path], pairs: Path, precision: str
) -> None:
    recipe = Recipe.default(precision)
    manifest = export_artifact(tiny, tmp_path / "out", recipe=recipe, calibration=pairs, progress=False)
    assert read_manifest(tmp_path / "out") == manifest
    verify_files(tmp_path / "out", manifest)
    sha256 = hashlib.sha256(pairs.read_bytes()).hexdigest()
    assert manifest.provenance["calibration"] == {"pairs": {"text": 2, "image": 1}, "sha256": sha256}
    assert str(tmp_path) not in json.dumps(manifest.provenance["calibration"])
    plain = read_manifest(in_precision(precision))
    for name in ("decoder.onnx.data", "vision.onnx.data"):
        assert manifest.files[name].sha256 != plain.files[name].sha256
    for name in ("decoder.onnx", "vision.onnx", "head.onnx", "head.onnx.data", "tokenizer.json"):
        assert manifest.files[name] == plain.files[name]
    assert {path.name for path in tmp_path.iterdir()} == {"set", "out"}  # the fp32 artifact it ran is gone
    seen = [("a", "b"), ("q", noise(3)), ("which", "document")]
    assert np.ptp(Reranker.load(tmp_path / "out", threads=1).score(seen, raw=True)) > 0.5
    again = quantize_artifact(tiny_artifact, tmp_path / "again", recipe=recipe, calibration=pairs, progress=False)
    assert again.files == manifest.files
    assert again.provenance["calibration"] == manifest.provenance["calibration"]


def test_calibrated_channel_scales_save_int8_from_outliers(
    tmp_path: Path, tiny_artifact: Path, injected: Path, pairs: Path
) -> None:
    seen: list[Any] = [*TEXTS, ("q", pairs.with_name("page.png")), ("other", noise(7)), ("x", "other text, not seen")]
    expected = Reranker.load(tiny_artifact, threads=1).score(seen, raw=True)
    errors = []
    for name, recipe, calibration in (
        ("plain", without_equalising("int8"), None),
        ("calibrated", Recipe.default("int8"), pairs),
    ):
        export_artifact(injected, tmp_path / name, recipe=recipe, calibration=calibration, progress=False)
        scores = Reranker.load(tmp_path / name, threads=1).score(seen, raw=True)
        errors.append(float(np.abs(scores - expected).mean()))
    assert errors[1] < errors[0] / 3


def test_what_export_wrote_itself_to_calibrate_on_needs_no_signature(
    tmp_path: Path, tiny: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M0KIT_REQUIRE_SIGNATURE", str(tmp_path / "signers"))
    export_artifact(tiny, tmp_path / "out", recipe=Recipe.default("int8"), calibration=pairs, progress=False)
    with pytest.raises(SignatureError, match="the trusted signers cannot be read"):
        quantize_artifact(
            tmp_path / "out", tmp_path / "other", recipe=Recipe.default("int4"), calibration=pairs, progress=False
        )


def test_pairs_of_text_alone_calibrate_what_they_reach(tmp_path: Path, tiny: Path, tiny_artifact: Path) -> None:
    path = write_lines(tmp_path / "texts.jsonl", *({"query": q, "document": d} for q, d in TEXTS))
    for attempt in (
        lambda recipe: export_artifact(tiny, tmp_path / "out", recipe=recipe, calibration=path, progress=False),
        lambda recipe: quantize_artifact(
            tiny_artifact, tmp_path / "other", recipe=recipe, calibration=path, progress=False
        ),
    ):
        with pytest.raises(RecipeError, match=r"reaches visual\.blocks\.0.* and \d+ more matrices. Add pairs with an"):
            attempt(Recipe.default("int8"))
        assert [p.name for p in tmp_path.iterdir()] == ["texts.jsonl"]
    rules = [{"match": "visual.*", "scheme": "fp16"}, {"match": "*", "scheme": "int8"}]
    recipe = Recipe.from_dict({"precision": "mixed", "equalize": True, "weights": rules}, "test")
    manifest = export_artifact(tiny, tmp_path / "out", recipe=recipe, calibration=path, progress=False)
    assert manifest.provenance["calibration"]["pairs"] == {"text": 2, "image": 0}


def test_what_is_wrong_is_said_before_minutes_of_work(
    tmp_path: Path, tiny: Path, tiny_artifact: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: object, **__: object) -> None:
        pytest.fail("began to work")

    monkeypatch.setattr(export, "DataFiles", begun)
    monkeypatch.setattr(export, "calibrate", begun)
    bad = write_lines(tmp_path / "bad.jsonl", "{")
    (tmp_path / "file").write_text("data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    before = {path.name for path in tmp_path.iterdir()}
    int8 = Recipe.default("int8")
    with pytest.raises(RecipeError, match="line 1: the line is not JSON"):
        export_artifact(tiny, tmp_path / "out", recipe=int8, calibration=bad, progress=False)
    with pytest.raises(OutputError, match="cannot be written"):
        export_artifact(tiny, tmp_path / "file" / "out", recipe=int8, calibration=pairs, progress=False)
    with pytest.raises(OutputError, match="exists and is not empty"):
        export_artifact(tiny, tmp_path / "full", recipe=int8, calibration=pairs, progress=False)
    with pytest.raises(OutputError, match="exists and is not empty"):
        quantize_artifact(tiny_artifact, tmp_path / "full", recipe=int8, calibration=pairs, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.filterwarnings("ignore:.*It is left out")
@pytest.mark.parametrize("problem", ["a damaged image", "Ctrl-C"])
def test_nothing_is_left_when_calibration_ends_early(
    tmp_path: Path, tiny: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    seen = []

    def pressed(folder: Path, *_: object, **__: object) -> Calibration:
        seen.append(read_manifest(folder).scheme)
        raise KeyboardInterrupt

    if problem == "Ctrl-C":
        monkeypatch.setattr(export, "calibrate", pressed)
    else:
        pairs.with_name("page.png").write_bytes(b"no image")
    with pytest.raises(KeyboardInterrupt if problem == "Ctrl-C" else RecipeError):
        export_artifact(tiny, tmp_path / "out", recipe=Recipe.default("int8"), calibration=pairs, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert seen == (["fp32"] if problem == "Ctrl-C" else [])


def test_an_artifact_is_replaced_only_by_a_whole_one(tmp_path: Path, tiny: Path, pairs: Path) -> None:
    out, int8 = tmp_path / "out", Recipe.default("int8")
    export_artifact(tiny, out, progress=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    page = pairs.with_name("page.png")
    content = page.read_bytes()
    page.write_bytes(b"no image")
    with (
        pytest.warns(UserWarning, match="line 3: .* It is left out"),
        pytest.raises(RecipeError, match="no pair of the calibration set reaches"),
    ):
        export_artifact(tiny, out, recipe=int8, calibration=pairs, overwrite=True, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    page.write_bytes(content)
    export_artifact(tiny, out, recipe=int8, calibration=pairs, overwrite=True, progress=False)
    assert read_manifest(out).scheme == "int8"
    assert {path.name for path in tmp_path.iterdir()} == {"set", "out"}


def test_each_pair_is_run_by_itself_with_the_runtimes_own_prompts(
    tiny_artifact: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Spied(Reranker):
        def score(self, pairs: Any, *args: Any, **options: Any) -> Any:
            calls.append(pairs)
            return super().score(pairs, *args, **options)

    monkeypatch.setattr("m0kit.reranker.Reranker", Spied)
    calibrate(tiny_artifact, pairs, threads=1, progress=False)
    assert calls == [[pair] for _, pair in read_pairs(pairs)[0]]


def test_a_file_of_pairs_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pairs.jsonl")
    for path in (tmp_path / "pairs.jsonl", Path("/dev/zero")):
        with pytest.raises(RecipeError, match=f"{path}: is a device, a pipe or a socket"):
            read_pairs(path)
