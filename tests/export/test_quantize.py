"""Every precision holds the numbers its scheme says, computes with them, and is the same from any source.

How a scheme rounds is proved in the tests of m0kit_quant, how a product is spelled in test_builder; here it is what
stands in an artifact's files, and what comes out of it.
"""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.export.artifacts import artifacts_of
from tests.export.killed import PRELUDE
from tests.export.without import TORCH, m0kit_without

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest, verify_files
from m0kit.artifact.ports import GRAPHS
from m0kit.errors import ArtifactDamagedError, ArtifactError, CheckpointError, OutputError, RecipeError
from m0kit.precision import SCHEMES
from m0kit.scoring.sessions import open_graph
from m0kit_export import export
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_export.frequencies import Frequencies
from m0kit_export.graphs import build_graphs, schemes_of
from m0kit_export.sources import CheckpointSource, stored_frequencies
from m0kit_parity.samples.checkpoints import write_checkpoint
from m0kit_parity.samples.outliers import write_injected
from m0kit_quant.calibration import channel_scales
from m0kit_quant.equalize import Rescaled, channel_groups, equalizing_scale
from m0kit_quant.recipe import Recipe
from m0kit_quant.rotate import Rotated
from m0kit_quant.weights import Float32

LOSSY = ("int8", "int4", "nf4")
RNG = np.random.default_rng(0)
IMAGES = [Image.fromarray(RNG.integers(0, 256, size, np.uint8)) for size in ((56, 84, 3), (28, 112, 3))]
TEXTS: list[Any] = [("a query", "small"), ("a query", "a longer document " * 20), ("which", "0123456789"), ("x", "y")]
PAIRS: list[Any] = [*TEXTS, ("q", IMAGES[0]), ("another", IMAGES[1]), (IMAGES[0], "text of some length")]


def score(artifact: Path, pairs: list[Any] = PAIRS) -> Float32:
    return Reranker.load(artifact, threads=1).score(pairs, raw=True)


def stored_parts(artifact: Path) -> dict[str, NDArray[Any]]:
    """By initializer, read by the onnx package through the graphs' own references."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for name in GRAPHS
        for tensor in onnx.load(artifact / f"{name}.onnx").graph.initializer
        if tensor.name.startswith(("model.", "visual.", "score."))
    }


def decoded(artifact: Path) -> dict[str, Float32]:
    """What the stored parts of every tensor stand for."""
    parts, manifest = stored_parts(artifact), read_manifest(artifact)
    recipe = Recipe.from_dict(manifest.recipe, "manifest")
    weights = [w for graph in build_graphs(manifest.model, recipe).values() for w in graph.weights]
    return {w.name: w.scheme.decode({p.key: parts[p.name] for p in w.parts}, w.shape) for w in weights}


def data_hashes(artifact: Path) -> dict[str, str]:
    files = read_manifest(artifact).files
    return {name: files[name].sha256 for name in sorted(files) if name.endswith(".data")}


def uniform(scheme: str, equalize: bool = False) -> Recipe:
    rules = [{"match": "score.*", "scheme": "fp32"}, {"match": "visual.patch_embed.*", "scheme": "fp32"}]
    rules = [*rules, {"match": "*", "scheme": scheme}]
    return Recipe.from_dict({"precision": scheme, "equalize": equalize, "weights": rules}, "test")


@pytest.fixture(scope="module")
def injected(tiny: Path) -> Path:
    """The same function as `tiny`, with channels a thousand times larger than the others."""
    folder = tiny.with_name("injected")
    write_injected(tiny, folder, 1000)
    return folder


@pytest.fixture(scope="module")
def in_precision_injected(injected: Path) -> Callable[[str], Path]:
    """precision → the artifact of `injected`; not to be written to."""
    return artifacts_of(injected, "injected")


# --- what stands in the files ------------------------------------------------------------------------------

# Root mean square of what rounding takes, relative to that of the matrix, the worst of all. Measured on normally
# distributed values: 7 bits a row 0.013, 4 bits a block of 32 to 128 0.090, NF4 0.094; for the sake of products
# feedback adds up to 0.04 on trained weights. Bounds leave a fifth and more. A wrong nibble, transposition or place is
# 1 and more.
ROUNDING = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "int8": 0.06, "int4": 0.16, "nf4": 0.16}


def assert_stored(artifact: Path, checkpoint: Path, scales: dict[str, Float32]) -> None:
    """Every tensor decodes to the checkpoint's with these scales, within the rounding of its scheme."""
    __tracebackhide__ = True
    source = CheckpointSource.open(checkpoint)
    recipe = Recipe.from_dict(read_manifest(artifact).recipe, "manifest")
    basis = Rotated(source, source.config) if recipe.rotate else source
    meant = Rescaled(basis, channel_groups(source.config), scales)
    found, seen = decoded(artifact), set()
    assert set(found) == set(source.names)
    for name, values in found.items():
        wanted = meant.read(name).reshape(values.shape)
        if values.ndim == 1:
            is_half = recipe.precision == "fp16" and name.endswith("bias") and "norm" not in name and "ln_q" not in name
            assert np.array_equal(values, wanted.astype(np.float16 if is_half else np.float32)), name
            continue
        scheme = recipe.scheme(name, values.shape).name
        seen.add(scheme)
        size = np.sqrt(np.square(wanted).mean())
        error = np.sqrt(np.square(values - wanted).mean())
        assert error <= ROUNDING[scheme] * size, f"{name} in {scheme}: {error / size:.4f}"
        assert error > 1e-3 * size or scheme not in LOSSY, f"{name} is not in {scheme}"
    assert seen == set(recipe.schemes)


@pytest.mark.parametrize("precision", SCHEMES)
def test_stored_parts_decode_to_the_checkpoints_weights_within_the_schemes_rounding(
    tiny: Path, in_precision: Callable[[str], Path], precision: str
) -> None:
    """No channel of this one is larger than its neighbours, so that none is scaled."""
    assert_stored(in_precision(precision), tiny, {})


@pytest.mark.parametrize("precision", LOSSY)
def test_stored_parts_decode_to_the_equalised_weights_within_the_schemes_rounding(
    injected: Path, in_precision_injected: Callable[[str], Path], precision: str
) -> None:
    source, recipe = CheckpointSource.open(injected), Recipe.default(precision)
    assert recipe.rotate
    assert recipe.equalize
    basis, schemes = Rotated(source, source.config), schemes_of(build_graphs(source.config, recipe))
    scales = channel_scales(basis, source.config, schemes, None)
    # What norms make has no channels of its own in another basis; values and what MLPs have inside do.
    scaled = {name.rpartition(".")[2] for name, scale in scales.items() if (scale != 1).any()}
    assert scaled == {"v", "v_proj", "up_proj"}
    assert_stored(in_precision_injected(precision), injected, scales)
    with pytest.raises(
        AssertionError, match=r"visual\.blocks\.0\.attn\.qkv"
    ):  # the measure tells scaled weights from others
        assert_stored(in_precision_injected(precision), injected, {})


@pytest.mark.parametrize("precision", LOSSY)
def test_a_quantised_artifact_is_small(in_precision: Callable[[str], Path], precision: str) -> None:
    """Bytes of a matrix's parts, without the pages between them: 8.x or 4.x bits a weight."""
    manifest = read_manifest(in_precision(precision))
    recipe = Recipe.from_dict(manifest.recipe, "manifest")
    bits = {"int8": 8, "int4": 4, "nf4": 4}
    graphs = build_graphs(manifest.model, recipe)
    assert set(manifest.schemes) == {rule.scheme for rule in recipe.rules}
    for weight in (w for graph in graphs.values() for w in graph.weights if w.scheme.name in LOSSY):
        values = int(np.prod(weight.shape))
        # scales: 32 bits a row of 32 and more, or 36 bits a block of 32 (and half a byte where blocks are odd)
        assert bits[weight.scheme.name] <= weight.num_bytes * 8 / values <= bits[weight.scheme.name] + 1.5, weight.name


# --- what comes out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", SCHEMES)
def test_every_precision_opens_and_scores(in_precision: Callable[[str], Path], precision: str) -> None:
    artifact = in_precision(precision)
    verify_files(artifact, read_manifest(artifact))
    scores = Reranker.load(artifact, threads=1).score(PAIRS)
    assert scores.dtype == np.float32
    assert ((scores > 0) & (scores < 1)).all()
    assert np.ptp(score(artifact)) > 1  # pairs are told apart


def rewritten(tiny: Path, folder: Path, tensors: dict[str, Float32]) -> Path:
    """The checkpoint with other values, in float32."""
    shutil.copytree(tiny, folder)
    shapes = {name: tensor.shape for name, tensor in load_file(tiny / "model.safetensors").items()}
    values = {name: torch.from_numpy(tensors[name].copy()).reshape(shape) for name, shape in shapes.items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Logits of a whole model whose weights are the decoded ones, against the model that holds the parts. Products that
# take their inputs as they are differ by fp32 rounding (measured 1e-5), those of nf4's first layer and block, which are
# rounded to 16 bits, by 256 times less than 8 bits make of it (3e-4). Inputs rounded to 8 bits (int8; int4 as the
# runtime opens it) move a logit by up to 0.16: there are few terms at widths of 32 to 96. Logits spread over 4.
UNROUNDED = 5e-5
ROUNDED = 0.4
FINELY_ROUNDED = 1e-3


@pytest.mark.parametrize("precision", LOSSY)
def test_the_graphs_compute_with_what_the_stored_parts_stand_for(
    tmp_path: Path, tiny: Path, in_precision: Callable[[str], Path], precision: str
) -> None:
    artifact = in_precision(precision)
    export_artifact(rewritten(tiny, tmp_path / "c", decoded(artifact)), tmp_path / "out", progress=False)
    meant = score(tmp_path / "out")
    assert np.abs(score(artifact) - meant).max() < (FINELY_ROUNDED if precision == "nf4" else ROUNDED)
    assert np.ptp(meant) > 1


def test_int4_products_that_are_not_packed_compute_with_what_the_stored_parts_stand_for(
    tmp_path: Path, tiny: Path
) -> None:
    """ONNX Runtime then writes the weights out and rounds no input, so nothing hides a part read wrongly."""
    rules = [{"match": "score.*", "scheme": "fp32"}, {"match": "visual.*", "scheme": "fp32"}]
    rules.append({"match": "*", "scheme": "int4", "block": 32})
    recipe = Recipe.from_dict({"precision": "int4", "weights": rules}, "this test")
    export_artifact(tiny, tmp_path / "int4", recipe=recipe, progress=False)
    export_artifact(rewritten(tiny, tmp_path / "c", decoded(tmp_path / "int4")), tmp_path / "out", progress=False)
    meant = score(tmp_path / "out", TEXTS)
    plain = Reranker.load(tmp_path / "int4", open_graph=partial(open_graph, threads=1))
    assert np.abs(plain.score(TEXTS, raw=True) - meant).max() < UNROUNDED
    assert np.abs(score(tmp_path / "int4", TEXTS) - meant).max() > UNROUNDED  # so the measure can see it


@pytest.mark.parametrize("precision", SCHEMES)
def test_the_score_of_a_pair_does_not_depend_on_the_batch(in_precision: Callable[[str], Path], precision: str) -> None:
    """Activations are rounded row by row; the order of fp32 sums may change with the number of rows."""
    reranker = Reranker.load(in_precision(precision), threads=1)
    together = reranker.score(PAIRS)
    assert np.abs(together - reranker.score(PAIRS[::-1])[::-1]).max() <= 1e-5
    alone = np.concatenate([reranker.score([pair]) for pair in PAIRS])
    assert np.abs(together - alone).max() <= 1e-5


def test_bf16_is_the_same_to_the_bit_for_a_checkpoint_in_bf16(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "tiny", dtype="bfloat16")
    for precision in ("fp32", "bf16"):
        export_artifact(tmp_path / "checkpoint", tmp_path / precision, recipe=Recipe.default(precision), progress=False)
    assert np.array_equal(score(tmp_path / "bf16"), score(tmp_path / "fp32"))
    sizes = [read_manifest(tmp_path / p).num_bytes for p in ("fp32", "bf16")]
    assert sizes[1] < 0.75 * sizes[0]


# --- equalisation --------------------------------------------------------------------------------------------


def test_equalising_leaves_the_function_as_it_is(
    tmp_path: Path, tiny_artifact: Path, injected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors are powers of two, so fp32 loses nothing; the exporter itself leaves groups in fp32 alone."""
    export_artifact(injected, tmp_path / "plain", recipe=uniform("fp32"), progress=False)
    export_artifact(injected, tmp_path / "asked", recipe=uniform("fp32", equalize=True), progress=False)
    assert data_hashes(tmp_path / "asked") == data_hashes(tmp_path / "plain")

    def all_groups(weights: Any, config: Any, *_: Any) -> dict[str, Float32]:
        return {group.name: equalizing_scale(weights, group) for group in channel_groups(config)}

    monkeypatch.setattr(export, "channel_scales", all_groups)
    export_artifact(injected, tmp_path / "scaled", recipe=uniform("fp32", equalize=True), progress=False)
    changed = decoded(tmp_path / "scaled")
    assert sum(not np.array_equal(changed[name], w) for name, w in decoded(tmp_path / "plain").items()) > 20
    # Equal but for sums that a library takes in another order by the place of a tensor in memory.
    expected = score(tiny_artifact)
    assert np.abs(score(tmp_path / "plain") - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.abs(score(tmp_path / "scaled") - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["int8"])
def test_equalising_saves_products_of_few_bits_from_outliers(
    tmp_path: Path, tiny_artifact: Path, injected: Path, scheme: str
) -> None:
    """One channel of 64 a thousand times larger leaves the others of its row no bits at all."""
    errors = []
    for equalize in (False, True):
        folder = tmp_path / str(equalize)
        export_artifact(injected, folder, recipe=uniform(scheme, equalize), progress=False)
        errors.append(float(np.abs(score(folder) - score(tiny_artifact)).mean()))
    assert errors[1] < errors[0] / 3


# --- another basis -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rotated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 artifact of `tiny` in another basis."""
    folder = tmp_path_factory.mktemp("rotated") / "fp32"
    export_artifact(tiny, folder, recipe=replace(Recipe.default("fp32"), rotate=True), progress=False)
    return folder


def test_another_basis_leaves_the_function_as_it_is(rotated: Path, tiny: Path, tiny_artifact: Path) -> None:
    assert_stored(rotated, tiny, {})
    expected, found = score(tiny_artifact), score(rotated)
    # Every weight is rounded once more (6e-8), as each product is in fp32, whose sums come in the CPU's own order: 4e-7
    # of the largest logit on an Intel Xeon, 3.3e-6 on an AMD EPYC.
    assert 0 < np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    plain = decoded(tiny_artifact)
    assert sum(not np.array_equal(values, plain[name]) for name, values in decoded(rotated).items()) > 20


@pytest.mark.parametrize("precision", LOSSY)
def test_quantising_into_another_basis_writes_what_exporting_the_checkpoint_writes(
    tmp_path: Path, tiny: Path, tiny_artifact: Path, precision: str
) -> None:
    recipe = replace(Recipe.default(precision), rotate=True)
    export_artifact(tiny, tmp_path / "exported", recipe=recipe, progress=False)
    quantize_artifact(tiny_artifact, tmp_path / "quantised", recipe=recipe, progress=False)
    assert read_manifest(tmp_path / "quantised").files == read_manifest(tmp_path / "exported").files
    assert_stored(tmp_path / "exported", tiny, {})


def test_an_artifact_in_another_basis_is_no_source(tmp_path: Path, rotated: Path) -> None:
    with pytest.raises(ArtifactError, match=r"another basis.*export from the checkpoint"):
        quantize_artifact(rotated, tmp_path / "out", recipe=Recipe.default("int8"), progress=False)
    assert not (tmp_path / "out").exists()


# --- from an artifact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOSSY)
@pytest.mark.parametrize(
    ("checkpoint", "source"),
    # float16 holds the values of the first exactly, so it makes no difference; channels of the other are scaled
    [("in_precision", "fp32"), ("in_precision", "fp16"), ("in_precision_injected", "fp32")],
)
def test_quantising_an_artifact_writes_what_exporting_the_checkpoint_writes(
    request: pytest.FixtureRequest, tmp_path: Path, checkpoint: str, source: str, precision: str
) -> None:
    in_precision = request.getfixturevalue(checkpoint)
    made = quantize_artifact(in_precision(source), tmp_path / "out", recipe=Recipe.default(precision), progress=False)
    exported = read_manifest(in_precision(precision))
    assert read_manifest(tmp_path / "out") == made
    assert data_hashes(tmp_path / "out") == data_hashes(in_precision(precision))
    assert made.files == exported.files  # graphs and tokenizer, too
    assert (made.model, made.scheme, made.recipe, made.graphs) == (
        *(exported.model, exported.scheme, exported.recipe, exported.graphs),
    )
    fingerprint = read_manifest(in_precision(source)).fingerprint
    assert made.provenance["artifact"] == {"fingerprint": fingerprint, "scheme": source}
    assert {**made.provenance, "artifact": None} == {**exported.provenance, "artifact": None}


@pytest.mark.parametrize("precision", SCHEMES)
def test_quantising_needs_no_pytorch_and_writes_the_same_bytes(
    tmp_path: Path, tiny_artifact: Path, in_precision: Callable[[str], Path], precision: str
) -> None:
    done = m0kit_without(TORCH, "quantize", tiny_artifact, "-o", tmp_path / "out", "--precision", precision)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert read_manifest(tmp_path / "out").files == read_manifest(in_precision(precision)).files


def test_quantising_reads_its_first_tensor_before_any_heavy_package_is_there(
    tmp_path: Path, tiny_artifact: Path
) -> None:
    """What a start costs, not by the clock: the modules that are there. Without them it is half a second."""
    script = """
import sys
from pathlib import Path
from m0kit_export import sources
from m0kit_export.export import quantize_artifact
from m0kit_quant.recipe import Recipe

def read(self, name):
    print(len(sys.modules), sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
    raise KeyboardInterrupt

heavy = {"torch", "transformers", "peft", "safetensors", "onnxruntime", "huggingface_hub"}
sources.ArtifactSource.read = read
try:
    quantize_artifact(Path(sys.argv[1]), Path(sys.argv[2]), recipe=Recipe.default("int4"), progress=False)
except KeyboardInterrupt:
    pass
"""
    command = [sys.executable, "-c", script, str(tiny_artifact), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    number, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert int(number) < 700  # PyTorch alone brings more than a thousand


def test_quantising_an_artifact_of_other_frequencies_keeps_them(tmp_path: Path, tiny_artifact: Path) -> None:
    """They are those of the PyTorch that exported it, whatever another one on another CPU would round them to."""
    manifest = read_manifest(tiny_artifact)
    stored = stored_frequencies(tiny_artifact, manifest.model)
    computed = Frequencies.of(manifest.model)
    for name in ("vision", "decoder"):
        assert np.array_equal(getattr(stored, name), getattr(computed, name))
    shutil.copytree(tiny_artifact, tmp_path / "odd")
    model = onnx.load(tmp_path / "odd" / "decoder.onnx", load_external_data=False)
    constant = next(t for t in model.graph.initializer if t.raw_data == computed.decoder.tobytes())
    constant.raw_data = np.nextafter(computed.decoder, np.float32(0)).tobytes()
    onnx.save(model, tmp_path / "odd" / "decoder.onnx")
    odd = stored_frequencies(tmp_path / "odd", manifest.model)
    assert np.array_equal(odd.decoder, np.nextafter(computed.decoder, np.float32(0)))
    del model.graph.node[:]
    onnx.save(model, tmp_path / "odd" / "decoder.onnx")
    with pytest.raises(ArtifactDamagedError, match="hold no rotary frequencies"):
        stored_frequencies(tmp_path / "odd", manifest.model)


@pytest.mark.parametrize("precision", LOSSY)
def test_quantising_a_bf16_artifact_starts_from_its_rounded_weights(
    tmp_path: Path, tiny: Path, in_precision: Callable[[str], Path], precision: str
) -> None:
    quantize_artifact(in_precision("bf16"), tmp_path / "out", recipe=Recipe.default(precision), progress=False)
    rounded = rewritten(tiny, tmp_path / "c", decoded(in_precision("bf16")))
    export_artifact(rounded, tmp_path / "meant", recipe=Recipe.default(precision), progress=False)
    assert data_hashes(tmp_path / "out") == data_hashes(tmp_path / "meant")
    assert data_hashes(tmp_path / "out") != data_hashes(in_precision(precision))


def test_floats_can_be_changed_into_floats(tmp_path: Path, in_precision: Callable[[str], Path]) -> None:
    quantize_artifact(in_precision("fp32"), tmp_path / "bf16", recipe=Recipe.default("bf16"), progress=False)
    assert data_hashes(tmp_path / "bf16") == data_hashes(in_precision("bf16"))
    assert read_manifest(tmp_path / "bf16").scheme == "bf16"


def test_the_source_is_never_the_place_that_is_written(tmp_path: Path, tiny_artifact: Path) -> None:
    source = tmp_path / "artifact"
    shutil.copytree(tiny_artifact, source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    recipe = Recipe.default("int8")
    for place in (source, tmp_path / "x" / ".." / "artifact", tmp_path / "link"):
        with pytest.raises(OutputError, match="is the artifact that is read"):
            quantize_artifact(source, place, recipe=recipe, overwrite=True, progress=False)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"artifact", "link"}


def test_what_lost_bits_or_is_no_artifact_is_refused(
    tmp_path: Path, tiny: Path, in_precision: Callable[[str], Path]
) -> None:
    with pytest.raises(ArtifactError, match=r"int4.* lost bits already"):
        quantize_artifact(in_precision("int4"), tmp_path / "out", recipe=Recipe.default("int8"), progress=False)
    with pytest.raises(ArtifactError, match="not a finished artifact"):
        quantize_artifact(tiny, tmp_path / "out", recipe=Recipe.default("int8"), progress=False)
    assert not list(tmp_path.iterdir())


def test_quantise_overwrites_what_export_overwrites(tmp_path: Path, tiny_artifact: Path) -> None:
    out, recipe = tmp_path / "out", Recipe.default("int8")
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="exists and is not empty"):
        quantize_artifact(tiny_artifact, out, recipe=recipe, progress=False)
    with pytest.raises(OutputError, match="is not an artifact, so it is not overwritten"):
        quantize_artifact(tiny_artifact, out, recipe=recipe, overwrite=True, progress=False)
    assert (out / "thesis.tex").read_text() == "years"
    (out / "thesis.tex").unlink()
    quantize_artifact(tiny_artifact, out, recipe=Recipe.default("fp16"), progress=False)
    with pytest.raises(OutputError, match="--overwrite"):
        quantize_artifact(tiny_artifact, out, recipe=recipe, progress=False)
    assert read_manifest(out).scheme == "fp16"
    quantize_artifact(tiny_artifact, out, recipe=recipe, overwrite=True, progress=False)
    assert read_manifest(out).scheme == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_recipe_that_does_not_fit_is_said_before_anything_is_written(
    tmp_path: Path, tiny: Path, tiny_artifact: Path
) -> None:
    large = {"precision": "int4", "weights": [{"match": "*", "scheme": "int4", "block": 128}]}
    rules = [{"match": "model.layer.*", "scheme": "int8"}, {"match": "*", "scheme": "fp32"}]
    typo = {"precision": "x", "weights": rules}
    for attempt in (
        lambda recipe: export_artifact(tiny, tmp_path / "out", recipe=recipe, progress=False),
        lambda recipe: quantize_artifact(tiny_artifact, tmp_path / "out", recipe=recipe, progress=False),
    ):
        with pytest.raises(RecipeError, match="has 1176 inputs, which no block of 128 divides"):
            attempt(Recipe.from_dict(large, "test"))
        with pytest.raises(RecipeError, match=r"'model\.layer\.\*' matches no matrix .*did you mean model\.layers\."):
            attempt(Recipe.from_dict(typo, "test"))
    assert not list(tmp_path.iterdir())


def test_the_manifest_tells_the_recipe(in_precision: Callable[[str], Path]) -> None:
    for precision in SCHEMES:
        manifest = read_manifest(in_precision(precision))
        assert manifest.scheme == precision
        assert Recipe.from_dict(manifest.recipe, "manifest") == Recipe.default(precision)
        assert manifest.provenance["calibration"] is None
    assert read_manifest(in_precision("int4")).schemes == ("fp32", "int4", "int8")


# --- damage and interruption -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "tensor", "key"),
    [
        ("decoder", "model.embed_tokens.weight", "int8"),
        ("decoder", "model.embed_tokens.weight", "scale"),
        ("decoder", "model.layers.1.mlp.down_proj.weight", "int4"),
        ("decoder", "model.layers.1.mlp.down_proj.weight", "scale"),
        ("decoder", "model.layers.1.mlp.down_proj.weight", "zero_point"),
        ("vision", "visual.blocks.1.mlp.fc1.weight", "int8"),
        ("vision", "visual.blocks.1.mlp.fc1.weight", "scale"),
        ("head", "score.2.bias", ""),
    ],
)
def test_a_byte_of_any_part_that_changes_before_it_is_read_back_is_caught(
    tmp_path: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, graph: str, tensor: str, key: str
) -> None:
    check = export.check_weights

    def damaged(folder: Path, name: str, *rest: Any) -> None:
        if name == f"{graph}.onnx":
            initializer = next(
                i
                for i in onnx.load(folder / name, load_external_data=False).graph.initializer
                if i.name == (f"{tensor}.{key}" if key else tensor)
            )
            place = ExternalDataInfo(initializer)
            path = folder / place.location
            content = bytearray(path.read_bytes())
            content[place.offset + place.length - 1] ^= 0x10
            path.write_bytes(content)
        check(folder, name, *rest)

    monkeypatch.setattr(export, "check_weights", damaged)
    name = f"{tensor}.{key}" if key else tensor
    with pytest.raises(OutputError, match=rf"{graph}\.onnx\.data: {name} reads back differently"):
        quantize_artifact(tiny_artifact, tmp_path / "out", recipe=Recipe.default("int4"), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_its_scheme_cannot_hold_is_named(tmp_path: Path, tiny: Path) -> None:
    values = {name: t.float().numpy() for name, t in load_file(tiny / "model.safetensors").items()}
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = 3.4e38  # bf16 ends at 3.39e38
    broken = rewritten(tiny, tmp_path / "c", {**values, "score.2.weight": values["score.2.weight"].copy()})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 3\.4e\+38, which bf16"):
        export_artifact(broken, tmp_path / "out", recipe=Recipe.default("bf16"), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "nf4"])
def test_a_matrix_beyond_float16_is_kept_in_every_precision(tmp_path: Path, tiny: Path, precision: str) -> None:
    values = {name: t.float().numpy() for name, t in load_file(tiny / "model.safetensors").items()}
    values["model.layers.1.mlp.up_proj.weight"] = values["model.layers.1.mlp.up_proj.weight"] * np.float32(1e6)
    values["model.layers.1.mlp.down_proj.weight"] = values["model.layers.1.mlp.down_proj.weight"] * np.float32(1e-6)
    far = rewritten(tiny, tmp_path / "c", {**values, "score.2.weight": values["score.2.weight"].copy()})
    export_artifact(far, tmp_path / "out", recipe=Recipe.default(precision), progress=False)
    (score,) = Reranker.load(tmp_path / "out").score([("q", "d")])
    assert 0 < score < 1


# Forked children quantise and kill themselves before their k-th file operation, for some k over the whole of it.
KILLED = (
    PRELUDE
    + """
source, root = Path(sys.argv[1]), Path(sys.argv[2])

def quantize(place):
    return lambda: quantize_artifact(source, place, recipe=Recipe.default("int4"), progress=False)

quantize(root / "first")()  # imports, and remembers the hashes of the source
total = operations(quantize(root / "all"))
for k in sorted({*range(1, total, max(1, total // 5)), *range(total - 5, total + 1)}):
    place = root / str(k) / "out"
    place.parent.mkdir()
    print(k, exit_code(quantize(place), k))
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_quantising_leaves_no_artifact_that_looks_finished(
    tmp_path: Path, tiny_artifact: Path, in_precision: Callable[[str], Path]
) -> None:
    command = [sys.executable, "-c", KILLED, str(tiny_artifact), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    killed = {int(k): int(code) for k, code in (line.split() for line in out.splitlines())}
    assert list(killed.values()).count(-signal.SIGKILL) > 7
    ends = set()
    for k in killed:
        place = tmp_path / str(k) / "out"
        ends.add(place.exists())
        if place.exists():
            verify_files(place, read_manifest(place))
            assert data_hashes(place) == data_hashes(in_precision("int4"))
        for left in place.parent.glob(".*"):  # what a kill leaves says so by its name
            assert left.name == ".out.unfinished"
    assert ends == {False, True}
    verify_files(tiny_artifact, read_manifest(tiny_artifact))


# --- memory --------------------------------------------------------------------------------------------------------

PEAK = textwrap.dedent("""
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from m0kit_export.export import export_artifact
    from m0kit_quant.recipe import Recipe

    def peak():
        return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) >> 10

    int4 = Recipe.default("int4")
    export_artifact(sys.argv[1], Path(sys.argv[3]) / "small", recipe=int4, progress=False)
    before = peak()
    manifest = export_artifact(sys.argv[2], Path(sys.argv[3]) / "large", recipe=int4, progress=False)
    print(peak() - before, manifest.num_bytes >> 20)
""")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_quantising_streams(tmp_path: Path, tiny: Path, heavy: Path) -> None:
    """MiB: a piece of a million values takes some 30 while its scales are sought. All weights are 390 in fp32."""
    command = [sys.executable, "-c", PEAK, str(tiny), str(heavy), str(tmp_path)]
    grown, written = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert 45 < written < 60
    assert grown < 80
