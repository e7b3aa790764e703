"""A checkpoint and the artifacts made of it say the same of the same tensors, or an artifact is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from m0kit.artifact import TOKENIZER, FileEntry, read_manifest, sha256_of, write_manifest
from m0kit.errors import ArtifactDamagedError, ArtifactError, ArtifactNotFoundError
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.export import export_artifact
from m0kit_export.names import expected_shapes
from m0kit_export.sources import ArtifactSource, CheckpointSource, QLora
from m0kit_parity.checkpoints import write_checkpoint
from m0kit_quant import nf4
from m0kit_quant.recipe import Recipe
from m0kit_quant.schemes import FLOATS


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
