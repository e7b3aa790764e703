"""Random checkpoints have the published layout to the parameter, and mistakes show in their scores."""

import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.parity import sensitivity

from m0kit.errors import OutputError
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.names import expected_shapes
from m0kit_export.settings import decoder_config, vision_config
from m0kit_parity.reference import Reference
from m0kit_parity.samples import checkpoints
from m0kit_parity.samples.checkpoints import (
    ConfigForm,
    DType,
    draw,
    model_config,
    write_checkpoint,
)

TEXTS = [("colour of the sky", "The sky is blue."), ("opening hours", "The museum has three floors.")]


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_full_has_the_published_number_of_parameters() -> None:
    config = model_config("full")
    shapes = expected_shapes(config)
    lm_head = config.decoder.vocab_size * config.decoder.hidden_size
    assert count(shapes) == 2_211_347_969
    assert count(shapes) + lm_head == 2_444_721_665, "the published total"
    vision = {name: shape for name, shape in shapes.items() if name.startswith("visual.")}
    decoder = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
    assert (count(vision), count(decoder)) == (665_271_296, 1_543_714_304)


def test_full_has_the_published_dimensions() -> None:
    decoder, vision, prompt = model_config("full").decoder, model_config("full").vision, model_config("full").prompt
    assert (decoder.hidden_size, decoder.num_layers, decoder.num_heads, decoder.num_kv_heads) == (1536, 28, 12, 2)
    assert (decoder.head_dim, decoder.intermediate_size, decoder.vocab_size) == (128, 8960, 151936)
    assert decoder.mrope_section == (16, 24, 24)
    assert (vision.depth, vision.width, vision.num_heads, vision.mlp_size) == (32, 1280, 16, 5120)
    assert (prompt.vision_start_id, prompt.vision_end_id, prompt.image_pad_id) == (151652, 151653, 151655)


def test_full_and_wide_differ_from_each_other_in_depth_alone() -> None:
    assert model_config("wide", num_layers=28, vision_depth=32) == model_config("full")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_checkpoint(tmp_path / name, "tiny", seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    first, other = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "c" / "model.safetensors")
    # The head's last bias is set, not drawn: it centres the scores.
    assert [name for name in first if torch.equal(first[name], other[name])] == ["score.2.bias"]


def test_a_tensor_does_not_depend_on_the_number_of_layers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", "tiny")
    write_checkpoint(tmp_path / "b", "tiny", num_layers=1, vision_depth=1)
    a, b = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    assert set(b.names) < set(a.names)
    assert all(torch.equal(a.read(name), b.read(name)) for name in b.names)


def test_values_drawn_in_slices_are_those_drawn_at_once() -> None:
    """Streaming a large tensor must not repeat or lose a value at the seams."""
    slices = list(draw("model.embed_tokens.weight", (3 << 12, 1 << 12), 0, 0.0))  # three slices of 2**24
    assert [len(values) for values in slices] == [1 << 24] * 3
    once = np.random.Generator(np.random.SFC64([0, *b"model.embed_tokens.weight"])).standard_normal(1 << 10, np.float32)
    np.testing.assert_array_equal(slices[0][: 1 << 10], once)
    assert not np.array_equal(slices[0], slices[1])


@pytest.mark.parametrize("dtype", get_args(DType))
def test_shards_hold_together_what_one_file_holds(dtype: DType, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", "tiny", dtype=dtype)
    write_checkpoint(tmp_path / "many", "tiny", dtype=dtype, max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(tmp_path / "many" / file).values()
    )
    for file in files:
        held = load_file(tmp_path / "many" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        assert sum(tensor.nbytes for tensor in held.values()) <= 100_000 or len(held) == 1
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert one.names == many.names
    for name in one.names:
        assert one.read(name).dtype == getattr(torch, dtype)
        assert torch.equal(one.read(name), many.read(name))


def test_both_namings_are_stored_as_they_were_published(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", "tiny", naming="published")
    write_checkpoint(tmp_path / "new", "tiny", naming="new")
    old = set(load_file(tmp_path / "old" / "model.safetensors"))
    new = set(load_file(tmp_path / "new" / "model.safetensors"))
    assert {"visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.bias", "score.2.weight"} <= old
    assert {
        "model.visual.patch_embed.proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.bias",
        "score.2.weight",
    } <= new
    a, b = open_checkpoint(tmp_path / "old"), open_checkpoint(tmp_path / "new")
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.names)


def test_every_form_of_config_means_the_same_model(tmp_path: Path) -> None:
    raws = {}
    for form in get_args(ConfigForm):
        write_checkpoint(tmp_path / form, "tiny", config_form=form)
        raws[form] = json.loads((tmp_path / form / "config.json").read_text())
        assert open_checkpoint(tmp_path / form).config == model_config("tiny")
    assert "text_config" in raws["nested"]
    assert "hidden_size" not in raws["nested"]
    assert "rms_norm_eps" in raws["published"]
    assert "hidden_act" not in raws["defaults_left_out"]
    assert "spatial_merge_size" not in raws["defaults_left_out"]["vision_config"]


@pytest.mark.parametrize("form", get_args(ConfigForm))
def test_the_published_dimensions_survive_every_form_of_config(form: ConfigForm) -> None:
    """Where most fields equal the defaults of their classes and are left out."""
    raw = checkpoints.config_json(model_config("full"), "bfloat16", form)
    assert decoder_config(raw) == model_config("full").decoder
    assert vision_config(raw) == model_config("full").vision


def test_lm_head_is_written_on_request_and_left_out_of_use(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "with", "tiny", lm_head=True)
    write_checkpoint(tmp_path / "without", "tiny")
    with_, without = open_checkpoint(tmp_path / "with"), open_checkpoint(tmp_path / "without")
    assert (with_.dropped, without.dropped) == (("lm_head.weight",), ())
    assert with_.names == without.names
    references = [Reference.load(tmp_path / name) for name in ("with", "without")]
    np.testing.assert_array_equal(references[0].score(TEXTS), references[1].score(TEXTS))


def test_the_licence_travels_with_it(tiny: Path) -> None:
    assert open_checkpoint(tiny).licence == "cc-by-nc-4.0"


def test_a_folder_that_exists_is_not_touched_and_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c" / "mine").mkdir(parents=True)
    with pytest.raises(OutputError, match="exists and is not empty"):
        write_checkpoint(tmp_path / "c", "tiny")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["mine"]
    monkeypatch.setattr("m0kit_parity.samples.checkpoints.write_small_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path / "d", "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_scores_of_different_pairs_spread_over_the_range(tiny_reference: Reference) -> None:
    names = ("text_text", "multilingual", "code", "mixed", "text_image", "image_text", "image_image")
    scores = tiny_reference.score(sensitivity.pairs_of(*names))
    assert len(scores) > 30
    assert scores.std() > 0.12
    assert scores.max() - scores.min() > 0.5


@pytest.mark.parametrize("mistake", sensitivity.MISTAKES)
def test_a_mistake_moves_scores_visibly(mistake: str, tiny_reference: Reference) -> None:
    names = ("text_image", "image_text") if mistake in sensitivity.OF_IMAGES else ("text_text", "text_image")
    sensitivity.assert_noticed(tiny_reference, mistake, sensitivity.pairs_of(*names))
