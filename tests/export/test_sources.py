"""A checkpoint and the artifacts made of it say the same of the same tensors, or an artifact is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.sealed import edit_manifest, put_file

from m0kit import Reranker
from m0kit.artifact.manifest import TOKENIZER, FileEntry, read_manifest, write_manifest
from m0kit.errors import ArtifactDamagedError, ArtifactError, ArtifactNotFoundError
from m0kit.files import sha256_of
from m0kit_export.adapter import QLora
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_export.names import expected_shapes
from m0kit_export.sources import ArtifactSource, CheckpointSource
from m0kit_parity.samples.checkpoints import write_checkpoint
from m0kit_quant import nf4
from m0kit_quant.floats import FLOATS
from m0kit_quant.recipe import Recipe


def mixed(precision: str, *rules: tuple[str, str]) -> Recipe:
    weights = [{"match": match, "scheme": scheme} for match, scheme in rules]
    return Recipe.from_dict({"precision": precision, "weights": weights}, "test")


@pytest.mark.parametrize("precision", FLOATS)
def test_an_artifact_gives_the_checkpoints_tensors_as_they_are_stored(
    tiny: Path, in_precision: Callable[[str], Path], precision: str
) -> None:
    checkpoint, artifact = CheckpointSource.open(tiny), ArtifactSource.open(in_precision(precision))
    assert artifact.config == checkpoint.config
    assert artifact.tokenizer == checkpoint.tokenizer == (tiny / TOKENIZER).read_bytes()
    assert sorted(artifact.names) == sorted(checkpoint.names)
    for name in checkpoint.names:
        given, meant = artifact.read(name), checkpoint.read(name)
        assert given.dtype == meant.dtype == np.float32
        assert artifact.shape(name) == checkpoint.shape(name) == given.shape == meant.shape, name
        # float16 holds this checkpoint exactly; of bfloat16 only matrices are stored in it
        exact = precision != "bf16" or meant.ndim == 1
        assert np.array_equal(given, meant if exact else meant.astype(FLOATS["bf16"]).astype(np.float32)), name


def test_an_fp32_artifact_gives_every_bit_of_a_checkpoint_in_fp32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "tiny", dtype="float32")
    export_artifact(tmp_path / "checkpoint", tmp_path / "out", progress=False)
    checkpoint, artifact = CheckpointSource.open(tmp_path / "checkpoint"), ArtifactSource.open(tmp_path / "out")
    for name in checkpoint.names:
        assert np.array_equal(artifact.read(name), checkpoint.read(name)), name
    values = checkpoint.read("model.norm.weight")
    assert (values != values.astype(np.float16)).any()


def test_the_kernel_of_the_patches_comes_back_in_the_checkpoints_shape(tiny: Path, tiny_artifact: Path) -> None:
    """It is stored as a matrix."""
    name = "visual.patch_embed.proj.weight"
    assert len(ArtifactSource.open(tiny_artifact).read(name).shape) == 5
    assert ArtifactSource.open(tiny_artifact).shape(name) == open_checkpoint(tiny).shape(name)


def test_an_artifact_hands_its_origin_on_and_names_itself(tiny: Path, in_precision: Callable[[str], Path]) -> None:
    folder = in_precision("fp16")
    manifest = read_manifest(folder)
    told = ArtifactSource.open(folder).provenance()
    assert told == {
        **manifest.provenance,
        "artifact": {"fingerprint": manifest.fingerprint, "scheme": "fp16"},
    }
    for key in ("base", "base_files", "adapters", "licence", "dropped_tensors"):
        assert told[key] == CheckpointSource.open(tiny).provenance()[key]
    assert "artifact" not in manifest.provenance


@pytest.mark.parametrize("precision", ["int8", "int4", "nf4"])
def test_weights_that_lost_bits_are_no_source(in_precision: Callable[[str], Path], precision: str) -> None:
    with pytest.raises(ArtifactError, match=rf"artifact-{precision}: holds .*{precision}.* have lost bits already"):
        ArtifactSource.open(in_precision(precision))


def test_what_counts_is_how_weights_are_stored_and_not_what_the_recipe_calls_itself(tmp_path: Path, tiny: Path) -> None:
    lossy = mixed("fp32", ("model.layers.1.mlp.*", "int8"), ("*", "fp32"))
    export_artifact(tiny, tmp_path / "lossy", recipe=lossy, progress=False)
    with pytest.raises(ArtifactError, match="holds int8 weights"):
        ArtifactSource.open(tmp_path / "lossy")
    floats = mixed("my own", ("model.layers.1.mlp.*", "bf16"), ("*", "fp16"))
    export_artifact(tiny, tmp_path / "floats", recipe=floats, progress=False)
    name = "model.layers.1.mlp.up_proj.weight"
    stored = ArtifactSource.open(tmp_path / "floats").read(name)
    assert np.array_equal(stored, CheckpointSource.open(tiny).read(name).astype(FLOATS["bf16"]).astype(np.float32))


def test_a_folder_that_is_no_whole_artifact_is_refused(tmp_path: Path, tiny_artifact: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match="no such folder"):
        ArtifactSource.open(tmp_path / "nowhere")
    shutil.copytree(tiny_artifact, tmp_path / "damaged")
    data = tmp_path / "damaged" / "decoder.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ArtifactDamagedError, match=r"decoder\.onnx\.data"):
        ArtifactSource.open(tmp_path / "damaged")


@pytest.mark.parametrize("damage", ["name", "shape"])
def test_an_artifact_without_one_of_the_tensors_is_refused(tmp_path: Path, tiny_artifact: Path, damage: str) -> None:
    """One whose hashes are right: written by something else than the exporter."""
    folder = tmp_path / "odd"
    shutil.copytree(tiny_artifact, folder)
    model = onnx.load(folder / "head.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "score.0.bias")
    if damage == "name":
        tensor.name = "score.0.other"
    else:
        tensor.dims[0] -= 1
        place(tensor, length=str(4 * tensor.dims[0]))
    onnx.save(model, folder / "head.onnx")
    manifest = read_manifest(folder)
    entry = FileEntry((folder / "head.onnx").stat().st_size, sha256_of(folder / "head.onnx"))
    write_manifest(folder, replace(manifest, files={**manifest.files, "head.onnx": entry}))
    with pytest.raises(ArtifactDamagedError, match=r"score\.0\.bias is missing or has another shape"):
        ArtifactSource.open(folder)


def test_a_qlora_base_is_what_its_training_saw(tiny: Path) -> None:
    plain, rounded = CheckpointSource.open(tiny), CheckpointSource.open(tiny, qlora=QLora(False, ("score.2",)))
    assert rounded.config == plain.config
    assert rounded.names == plain.names
    changed = {name for name in plain.names if not np.array_equal(plain.read(name), rounded.read(name))}
    matrices = {name for name, shape in expected_shapes(plain.config).items() if len(shape) == 2}
    # bitsandbytes replaces linear layers: neither rows that are looked up nor the convolution of the patches
    assert changed == matrices - {"model.embed_tokens.weight", "score.2.weight"}
    assert "qlora" not in plain.provenance()
    told = dict(rounded.provenance())
    assert told.pop("qlora")["scheme"] == "nf4"
    assert told == plain.provenance()
    name = "model.layers.0.mlp.gate_proj.weight"
    meant = nf4.dequantize(nf4.quantize(plain.read(name)))
    # its own dequantisation rounds to float16, the checkpoint's type
    assert np.allclose(rounded.read(name), meant, rtol=2**-10, atol=0)


# --- what somebody else may have written ---------------------------------------------------------------


@pytest.fixture
def copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "m0-fp32"))


def changed(folder: Path, graph: str, change: Callable[[onnx.ModelProto], object]) -> None:
    """A graph of the artifact changed, with hashes that fit."""
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    change(model)
    put_file(folder, f"{graph}.onnx", model.SerializeToString())


def place(tensor: onnx.TensorProto, **values: str) -> None:
    for entry in tensor.external_data:
        entry.value = values.get(entry.key, entry.value)


def first(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)


@pytest.mark.parametrize("where", ["beside", "absolute", "link", "not listed", "another graph's"])
def test_no_file_but_the_artifacts_own_gets_into_a_new_one(copy: Path, tmp_path: Path, where: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret words " * 10_000)
    location = {"beside": "../secret", "absolute": str(secret), "another graph's": "vision.onnx.data"}.get(
        where, "other.data"
    )
    if where == "link":
        (copy / "other.data").symlink_to(secret)
    elif where == "not listed":
        shutil.copy(secret, copy / "other.data")
    changed(copy, "head", lambda model: place(first(model), location=location))
    out = tmp_path / "out"
    for act in (
        lambda: quantize_artifact(copy, out, recipe=Recipe.default("fp16"), progress=False),
        lambda: Reranker.load(copy, open_graph=lambda *_, **__: pytest.fail("opened")),
    ):
        with pytest.raises(
            ArtifactDamagedError, match=r"head\.onnx: reads the file .* may read head\.onnx\.data alone"
        ):
            act()
    assert not out.exists()


@pytest.mark.parametrize("values", [{"offset": str(1 << 40)}, {"length": "4"}, {"offset": "-1"}, {"length": "9" * 30}])
def test_no_bytes_beyond_a_data_file_are_mapped(copy: Path, values: dict[str, str]) -> None:
    changed(copy, "head", lambda model: place(first(model), **values))
    with pytest.raises(ArtifactDamagedError, match=r"head\.onnx: the tensor "):
        ArtifactSource.open(copy)


def test_weights_of_another_type_are_refused_by_name(copy: Path) -> None:
    def as_integers(model: onnx.ModelProto) -> None:
        first(model).data_type = onnx.TensorProto.INT32

    changed(copy, "head", as_integers)
    with pytest.raises(ArtifactDamagedError, match="is not stored as floats"):
        ArtifactSource.open(copy)


def test_dimensions_that_the_graphs_do_not_have_end_at_once(copy: Path, tmp_path: Path) -> None:
    for section, name, value in (
        ("vision", "depth", 1000),
        ("decoder", "vocab_size", 1 << 24),
        ("vision", "mlp_size", 9),
    ):
        edit_manifest(copy, lambda raw, s=section, n=name, v=value: raw["model"][s].update({n: v}))  # type: ignore[misc]
        with pytest.raises(ArtifactDamagedError, match="is missing or has another shape"):
            quantize_artifact(copy, tmp_path / "out", recipe=Recipe.default("fp16"), progress=False)
        shutil.copy(copy / "manifest.json", tmp_path)


@pytest.mark.parametrize("damage", ["none", "no input", "another shape", "outside", "not finite"])
def test_rotary_frequencies_that_are_none_are_refused(copy: Path, damage: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        cos = next(node for node in model.graph.node if node.op_type == "Cos")
        angle = next(node for node in model.graph.node if node.output[0] == cos.input[0])
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == angle.input[1])
        if damage == "none":
            angle.op_type = "Add"
        elif damage == "no input":
            del cos.input[:]
        elif damage == "another shape":
            tensor.dims[:] = [10**9]
        elif damage == "outside":
            model.graph.initializer.remove(tensor)
            model.graph.initializer.append(first(model))
            model.graph.initializer[-1].name = tensor.name
        else:
            tensor.raw_data = b"\xff" * len(tensor.raw_data)

    changed(copy, "decoder", change)
    with pytest.raises(ArtifactDamagedError, match="hold no rotary frequencies"):
        _ = ArtifactSource.open(copy).frequencies


def test_a_manifest_that_says_little_of_its_origin_is_quantised_all_the_same(copy: Path, tmp_path: Path) -> None:
    edit_manifest(copy, lambda raw: raw.update(provenance={}))
    assert quantize_artifact(copy, tmp_path / "out", recipe=Recipe.default("fp16"), progress=False).licence
