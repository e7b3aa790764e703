"""Every published form of a checkpoint opens to the same thing; whatever else it may be is refused by name."""

import hashlib
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.export import tiny_model
from tests.export.tiny_model import edit_json, linked
from transformers import Qwen2VLConfig

from m0kit.config import ModelConfig
from m0kit.errors import CheckpointError
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_export.names import canonical_name, expected_shapes
from m0kit_parity.samples.checkpoints import write_checkpoint

Edit = Callable[[Path], object]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path) -> dict[str, Any]:
    """Split the weights in two, as transformers does; returns the index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    tiny_model.write_json(folder / INDEX, index)
    (folder / WEIGHTS).unlink()
    return index


# --- all forms are one -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("plain") / "base"
    write_checkpoint(folder, "tiny", dtype="float32")
    return open_checkpoint(folder)


@pytest.mark.parametrize("form", ["published", "defaults_left_out", "nested"])
@pytest.mark.parametrize("naming", ["published", "new"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_forms_open_to_the_same_model(
    tmp_path: Path, plain: Checkpoint, form: Any, naming: Any, shard_bytes: int, dtype: Any
) -> None:
    write_checkpoint(
        tmp_path / "base", "tiny", dtype=dtype, naming=naming, config_form=form, max_shard_bytes=shard_bytes
    )
    assert (tmp_path / "base" / INDEX).exists() == (shard_bytes < 1 << 30)
    checkpoint = open_checkpoint(tmp_path / "base")
    assert checkpoint.config == plain.config
    assert checkpoint.names == plain.names
    for name in plain.names:
        tensor = checkpoint.read(name)
        assert tensor.dtype == getattr(torch, dtype)
        assert checkpoint.shape(name) == tensor.shape
        assert torch.equal(tensor, plain.read(name).to(tensor.dtype)), name


@pytest.mark.parametrize("form", ["published", "defaults_left_out", "nested", "by hand"])
def test_dimensions_are_those_that_transformers_reads(tmp_path: Path, form: Any) -> None:
    if form == "by hand":
        tiny_model.write_checkpoint(tmp_path / "base")
    else:
        write_checkpoint(tmp_path / "base", "tiny", config_form=form)
    theirs = Qwen2VLConfig.from_pretrained(tmp_path / "base")
    config = open_checkpoint(tmp_path / "base").config
    text, vision = theirs.text_config, theirs.vision_config
    assert asdict(config.decoder) == {
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "num_heads": text.num_attention_heads,
        "num_kv_heads": text.num_key_value_heads,
        "head_dim": text.hidden_size // text.num_attention_heads,
        "intermediate_size": text.intermediate_size,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_parameters["rope_theta"],
        "mrope_section": tuple(text.rope_parameters["mrope_section"]),
        "vocab_size": text.vocab_size,
        "max_positions": text.max_position_embeddings,
    }
    ours = config.vision
    assert (ours.depth, ours.width, ours.num_heads) == (vision.depth, vision.embed_dim, vision.num_heads)
    assert ours.mlp_size == vision.embed_dim * vision.mlp_ratio
    assert (ours.patch_size, ours.merge_size) == (vision.patch_size, vision.spatial_merge_size)
    assert config.prompt.image_pad_id == theirs.image_token_id
    assert config.prompt.vision_start_id == theirs.vision_start_token_id


def test_every_text_field_may_be_left_out_when_it_is_transformers_default(folder: Path) -> None:
    """rms_norm_eps left out means 1e-5, the default of the class, and not the 1e-6 of the published model."""
    for name in ("rms_norm_eps", "max_position_embeddings", "hidden_act", "use_sliding_window", "rope_theta"):
        edit_json(folder / "config.json", lambda raw, name=name: raw.pop(name))
    theirs = Qwen2VLConfig.from_pretrained(folder).text_config
    decoder = open_checkpoint(folder).config.decoder
    assert decoder.rms_norm_eps == theirs.rms_norm_eps == 1e-5
    assert decoder.rope_theta == theirs.rope_parameters["rope_theta"]
    assert decoder.max_positions == theirs.max_position_embeddings


def test_names_are_all_the_parameters_of_the_model(original: Path) -> None:
    expected = {name: tuple(t.shape) for name, t in tiny_model.published_tensors(tiny_model.make_model()).items()}
    checkpoint = open_checkpoint(original)
    assert {name: checkpoint.shape(name) for name in checkpoint.names} == expected
    assert expected_shapes(checkpoint.config) == expected
    assert checkpoint.num_bytes() == 4 * sum(t.numel() for t in load_file(original / WEIGHTS).values())


def test_the_head_is_known_under_both_its_names(folder: Path, original: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for old, new in (("score.0", "score.dense"), ("score.2", "score.out_proj")):
            for leaf in ("weight", "bias"):
                tensors[f"{new}.{leaf}"] = tensors.pop(f"{old}.{leaf}")

    edit_tensors(folder, rename)
    assert torch.equal(open_checkpoint(folder).read("score.0.weight"), open_checkpoint(original).read("score.0.weight"))
    assert canonical_name("score.out_proj.bias") == "score.2.bias"


def test_lm_head_is_dropped_and_said_so(folder: Path) -> None:
    assert open_checkpoint(folder).dropped == ()
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(tiny_model.VOCAB, tiny_model.HIDDEN)}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dropped == ("lm_head.weight",)
    assert "lm_head.weight" not in checkpoint.names
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        checkpoint.read("lm_head.weight")


def test_fingerprint_hashes_every_file_that_was_read(folder: Path) -> None:
    shard(folder)
    (folder / "notes.txt").write_text("not read")
    seen = open_checkpoint(folder).fingerprint()
    assert sorted(seen) == sorted(p.name for p in folder.iterdir() if p.name not in ("notes.txt", "README.md"))
    assert seen[INDEX] == hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()


# --- preprocessing ---------------------------------------------------------------------------------------


def test_image_limits_come_from_the_file_up_to_the_published_ones(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    assert open_checkpoint(folder).config.image.max_pixels == 602112
    edit_json(path, lambda raw: raw.update(max_pixels=12845056))
    assert open_checkpoint(folder).config.image.max_pixels == 602112
    edit_json(path, lambda raw: raw.update(max_pixels=100352))
    assert open_checkpoint(folder).config.image.max_pixels == 100352
    edit_json(
        path, lambda raw: (raw.pop("max_pixels"), raw.update(size={"longest_edge": 50176, "shortest_edge": 3136}))
    )
    assert open_checkpoint(folder).config.image.max_pixels == 50176


def test_processor_config_of_transformers_5_is_read(folder: Path, original: Path) -> None:
    nested = {"image_processor": tiny_model.preprocessor_config(), "processor_class": "Qwen2VLProcessor"}
    tiny_model.write_json(folder / "processor_config.json", nested)
    assert open_checkpoint(folder).config == open_checkpoint(original).config  # both, and they agree
    (folder / "preprocessor_config.json").unlink()
    assert open_checkpoint(folder).config == open_checkpoint(original).config
    assert "processor_config.json" in open_checkpoint(folder).fingerprint()


def test_rotary_frequencies_are_not_computed_before_their_number_fits(folder: Path) -> None:
    """A width that nothing was held against yet would ask for gigabytes of them."""
    edit_tensors(folder, lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(6)}))
    width = 1 << 30
    edit_json(
        folder / "config.json",
        lambda raw: raw.update(
            hidden_size=4 * width, rope_scaling={"mrope_section": [width // 2, 0, 0]}, num_attention_heads=4
        ),
    )
    with pytest.raises(CheckpointError, match="hidden_size is 4294967296, expected a whole number"):
        open_checkpoint(folder)
    edit_json(
        folder / "config.json",
        lambda raw: (
            raw.update(hidden_size=width, rope_scaling={"mrope_section": [width // 2, 0, 0]}, num_attention_heads=1,
                       num_key_value_heads=1),
            raw["vision_config"].update(hidden_size=width),
        ),
    )  # fmt: skip
    with limited_memory(), pytest.raises(CheckpointError, match="hidden_size must be at most 1048576, got 1073741824"):
        open_checkpoint(folder)


# --- refusals --------------------------------------------------------------------------------------------


def config(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "config.json", lambda raw: raw.update(changes))


def config_in(section: str, **changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "config.json", lambda raw: raw[section].update(changes))


def images(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "preprocessor_config.json", lambda raw: raw.update(changes))


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    return lambda folder: edit_tensors(folder, edit)


def index(edit: Callable[[dict[str, Any]], object]) -> Edit:
    def apply(folder: Path) -> None:
        shard(folder)
        edit_json(folder / INDEX, edit)

    return apply


def write(name: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, keep: float) -> Edit:
    return lambda folder: (folder / name).write_bytes(
        (content := (folder / name).read_bytes())[: int(len(content) * keep)]
    )


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def both(folder: Path) -> None:
    shutil.copyfile(folder / WEIGHTS, folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / WEIGHTS)


def lose_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def swap_two(raw: dict[str, Any]) -> None:
    shards = raw["weight_map"]
    other = next(name for name, file in shards.items() if file != shards[Q])
    shards[Q], shards[other] = shards[other], shards[Q]


def disagree(folder: Path) -> None:
    nested = {"image_processor": {**tiny_model.preprocessor_config(), "min_pixels": 6272}}
    tiny_model.write_json(folder / "processor_config.json", nested)


def headless(t: dict[str, torch.Tensor]) -> None:
    for name in [name for name in t if name.startswith("score.")]:
        del t[name]


def twice(t: dict[str, torch.Tensor]) -> None:
    t["model.language_model.norm.weight"] = t["model.norm.weight"].clone()


def scheme_of(dtype: torch.dtype) -> Edit:
    return tensors(lambda t: t.update({Q: t[Q].to(dtype)}))


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


def piped(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


ONE = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}  # a tensor that has no values
ABSURD = {**ONE, "shape": [0, 2**62]}


def edit_header(folder: Path, edit: Callable[[str], str]) -> None:
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = edit(content[8 : 8 + size].decode()).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def huge_header(folder: Path) -> None:
    """Sparse: it takes no room on the disk."""
    with open(folder / WEIGHTS, "wb") as file:
        file.write((1 << 34).to_bytes(8, "little"))
        file.truncate(1 << 35)


REFUSED: dict[str, tuple[Edit, str]] = {
    # files
    "no config": (remove("config.json"), "base has no config.json"),
    "config cut short": (truncate("config.json", 0.5), "config.json in base is not readable JSON"),
    "config a list": (write("config.json", "[]"), "config.json in base holds list, not an object"),
    "config not UTF-8": (write("config.json", b"\xff\xfe{}"), "config.json in base is not readable JSON"),
    "config nested deeply": (write("config.json", '{"a":' * 100_000), "config.json in base is not readable"),
    "config with a huge number": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("160", "1" * 5000)),
        "config.json",
    ),
    "config with a key twice": (
        lambda f: edit_text(f / "config.json", '{"arch', '{"vocab_size": 9, "arch'), "has the key 'vocab_size' twice"
    ),
    "config nested as no config is": (config(id2label=nested(101)), "config.json in base .* nested too deeply"),
    "config without end": (write("config.json", b" " * (17 << 20)), "config.json in base: has more than the 16777216"),
    "config a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "is a folder, and no f"),
    "config a device": (lambda f: linked(f, "config.json", "/dev/zero"), "config.json in base: is a device"),
    "weights a device": (lambda f: linked(f, WEIGHTS, "/dev/zero"), f"{WEIGHTS} is not .*: is a device"),
    "weights a pipe": (lambda f: piped(f, WEIGHTS), f"{WEIGHTS} is not .*: is a device, a pipe"),
    "tokenizer a pipe": (lambda f: piped(f, "tokenizer.json"), "tokenizer.json in base: is a device, a pipe"),
    "tokenizer with an id of text": (
        lambda f: edit_json(f / "tokenizer.json", lambda raw: raw["added_tokens"][0].update(id="150")),
        "tokenizer.json in base is not a tokenizer",
    ),
    "tokenizer with an id beyond all": (
        lambda f: edit_json(f / "tokenizer.json", lambda raw: raw["model"]["vocab"].update({"!": 2**31})),
        "tokenizer.json in base has a token with the id 2147483648, the vocabulary of config.json ends at 159",
    ),
    "no tokenizer": (remove("tokenizer.json"), "base has no tokenizer.json"),
    "tokenizer without a model": (write("tokenizer.json", "{}"), "tokenizer.json in base is not a tokenizer"),
    "tokenizer of another model": (
        lambda f: edit_json(f / "tokenizer.json", lambda raw: raw["added_tokens"][2].update(id=99)),
        r"image_token_id is 152, but tokenizer.json gives <\|image_pad\|> the id 99",
    ),
    "no preprocessing": (remove("preprocessor_config.json"), "base has no preprocessor_config.json"),
    "preprocessing of two minds": (disagree, "preprocessor_config.json and processor_config.json disagree"),
    "no weights": (remove(WEIGHTS), f"base holds neither {WEIGHTS} nor {INDEX}"),
    "pickle only": (pickled, r"base holds its weights as a pickle \(pytorch_model.bin\)"),
    "both single and sharded": (both, f"base holds both {WEIGHTS} and {INDEX}"),
    "weights cut short": (truncate(WEIGHTS, 0.9), f"{WEIGHTS} is not a readable safetensors file"),
    "weights empty": (truncate(WEIGHTS, 0), f"{WEIGHTS} is not a readable safetensors file"),
    "weights a download pointer": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        f"{WEIGHTS} is not a readable safetensors file: .* placeholder",
    ),
    "weights a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), WEIGHTS),
    # tensors
    "tensor missing": (tensors(lambda t: t.pop(Q)), f"tensors are missing: {Q}"),
    "tensor unknown": (
        tensors(lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(3)})),
        f"{WEIGHTS} holds model.layers.1.self_attn.q_norm.weight, which jina-reranker-m0 does not have",
    ),
    "layer too many": (
        tensors(lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(tiny_model.HIDDEN)})),
        "model.layers.2.input_layernorm.weight",
    ),
    "tensor transposed": (
        tensors(lambda t: t.update({UP: torch.zeros(tiny_model.HIDDEN, tiny_model.MLP)})),
        r"model.layers.0.mlp.up_proj.weight in model.safetensors has shape \[48, 56\], config.json asks for \[56, 48\]",
    ),
    "tensor under two names": (tensors(twice), "the same tensor under two names"),
    "lm_head of another vocabulary": (
        tensors(lambda t: t.update({"lm_head.weight": torch.zeros(5, tiny_model.HIDDEN)})),
        r"lm_head.weight in model.safetensors has shape \[5, 48\]",
    ),
    "no scoring head": (tensors(headless), r"the scoring head is missing \(score.0.weight.*\): this is a Qwen2-VL"),
    "int8 weights": (scheme_of(torch.int8), f"{Q} in {WEIGHTS} is I8; weights must be F32"),
    "float8 weights": (scheme_of(torch.float8_e4m3fn), f"{Q} in {WEIGHTS} is F8_E4M3; weights must be F32"),
    "float64 weights": (scheme_of(torch.float64), f"{Q} in {WEIGHTS} is F64"),
    # the header of the weights
    "tensor twice": (
        lambda f: edit_header(f, lambda text: text.replace('{"', '{"' + Q + '":' + json.dumps(ONE) + ',"', 1)),
        f"{WEIGHTS} is not a readable safetensors file: it has the key '{Q[:60]}' twice",
    ),
    "tensor without a shape": (
        lambda f: edit_header(f, lambda text: text.replace('"shape":', '"form":', 1)), f"{WEIGHTS} is not"
    ),
    "tensor of an absurd shape": (
        lambda f: edit_header(f, lambda text: text.replace('{"', '{"x":' + json.dumps(ABSURD) + ',"', 1)),
        f"{WEIGHTS} is not a readable safetensors file",
    ),
    "tensor outside the file": (
        lambda f: edit_header(f, lambda text: text.replace('"data_offsets":[0', '"data_offsets":[-4')),
        f"{WEIGHTS} is not a readable safetensors file",
    ),
    "tensor with a name without end": (
        lambda f: edit_header(f, lambda text: text.replace('{"', '{"' + "a" * 600 + '":' + json.dumps(ONE) + ',"', 1)),
        "a tensor whose name has 600 letters",
    ),
    "header of gigabytes": (huge_header, f"{WEIGHTS} is not .*: its header has 17179869184 bytes, of which 4194304"),
    # shards
    "shard missing": (lose_shard, f"shard model-00002-of-00002.safetensors of {INDEX} is missing"),
    "index cut short": (lambda f: (shard(f), truncate(INDEX, 0.5)(f)), f"{INDEX} in base is not readable JSON"),
    "index without a map": (index(lambda raw: raw.pop("weight_map")), f"{INDEX} has no weight_map"),
    "index with an empty map": (index(lambda raw: raw["weight_map"].clear()), f"{INDEX} has no weight_map"),
    "index that swaps two": (index(swap_two), f"holds .*, which {INDEX} expects elsewhere"),
    "index that forgets one": (index(lambda raw: raw["weight_map"].pop(Q)), f"{Q}, which {INDEX} does not know"),
    "index that promises one more": (
        index(lambda raw: raw["weight_map"].update({"more": raw["weight_map"][Q]})),
        f"lacks more, promised by {INDEX}",
    ),
    "index that leaves the folder": (
        index(lambda raw: raw["weight_map"].update({Q: "../secret.safetensors"})),
        f"{INDEX} sends {Q} to '../secret.safetensors': expected the plain name of a shard",
    ),
    "index with an absolute path": (
        index(lambda raw: raw["weight_map"].update({Q: "/etc/x.safetensors"})), f"{INDEX} sends {Q} to '/etc"
    ),
    "index with a number": (index(lambda raw: raw["weight_map"].update({Q: 3})), f"{INDEX} has no weight_map that"),
    "index to a name without end": (
        index(lambda raw: raw["weight_map"].update({Q: "m" * 300 + ".safetensors"})), f"{INDEX} sends {Q} to 'mmm"
    ),
    "index with a key twice": (
        lambda f: (shard(f), edit_text(f / INDEX, '{"metadata"', '{"metadata": {}, "metadata"')),
        f"{INDEX} in base is not readable JSON: it has the key 'metadata' twice",
    ),
    "index to a pickle": (index(lambda raw: raw["weight_map"].update({Q: "m.bin"})), f"{INDEX} sends {Q} to 'm.bin'"),
    # config.json
    "another architecture": (config(model_type="qwen2_5_vl"), "model_type is 'qwen2_5_vl'.* has 'qwen2_vl'"),
    "no model type": (lambda f: edit_json(f / "config.json", lambda raw: raw.pop("model_type")), "model_type is None"),
    "quantised": (config(quantization_config={"load_in_4bit": True}), "config.json has a quantization_config"),
    "three labels": (config(num_labels=3), "num_labels is 3; a reranker gives one score"),
    "another activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'; jina-reranker-m0 has 'silu'"),
    "sliding window": (config(use_sliding_window=True), "use_sliding_window is True"),
    "linear attention": (config(layer_types=["linear_attention"] * 2), "layer_types"),
    "heads that do not divide": (config(num_attention_heads=5), r"hidden_size \(48\) does not split into 5 heads"),
    "no heads": (config(num_attention_heads=0), r"hidden_size \(48\) does not split into 0 heads"),
    "key heads that do not divide": (config(num_key_value_heads=3), "must be a multiple of num_kv_heads"),
    "another head width": (config(head_dim=32), "head_dim is 32"),
    "width as text": (config(hidden_size="48"), "hidden_size is '48', expected a whole number"),
    "layers as true": (config(num_hidden_layers=True), "num_hidden_layers is True, expected a whole number"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_layers must be at most 1024, got 1000000000"),
    "a thousand layers": (config(num_hidden_layers=1000), "speaks of 1000 . 2 layers, the files hold only"),
    "a huge vocabulary": (config(vocab_size=2**24), r"embed_tokens.weight .* config.json asks for \[16777216"),
    "negative width": (config(intermediate_size=-56), "intermediate_size is -56"),
    "epsilon as text": (config(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6', expected a number"),
    "epsilon infinite": (config(rms_norm_eps=float("inf")), "config.json .* it holds Infinity, which is no number"),
    "epsilon beyond every number": (config(rms_norm_eps=1e200), "rms_norm_eps is 1e.200, expected a number"),
    "epsilon zero": (config(rms_norm_eps=0), "rms_norm_eps must be positive"),
    "stretched positions": (config(rope_scaling={"type": "yarn", "factor": 4}), "type is 'yarn'"),
    "sections of another width": (config(rope_scaling={"type": "mrope", "mrope_section": [1, 2, 2]}), "mrope_section"),
    "sections of two": (config(rope_scaling={"type": "mrope", "mrope_section": [3, 3]}), "expected three numbers"),
    "two thetas": (config(rope_scaling={"mrope_section": [2, 2, 2], "rope_theta": 5.0}), "rope_theta has two values"),
    "levels that disagree": (
        config(text_config={"vocab_size": 160, "hidden_size": 64}),
        "config.json: hidden_size is 48, in its text_config 64",
    ),
    "vision a list": (config(vision_config=[1]), r"vision_config holds \[1\], expected an object"),
    "vision of another output": (config_in("vision_config", hidden_size=64), "vision_config: hidden_size is 64"),
    "vision of Qwen2.5": (config_in("vision_config", model_type="qwen2_5_vl"), "vision_config: model_type"),
    "vision heads that do not divide": (config_in("vision_config", num_heads=3), r"vision width \(32\)"),
    "vision without heads": (config_in("vision_config", num_heads=0), "num_heads must be positive, got 0"),
    "two channel counts": (config_in("vision_config", in_chans=1), "vision_config: in_chans is 1"),
    "token outside the vocabulary": (config(image_token_id=160), "image_token_id|image_pad_id"),
    "vocabulary without the score token": (config(vocab_size=99), "vocabulary ends at 98"),
    # preprocessing
    "no resize": (images(do_resize=False), "preprocessor_config.json: do_resize is False"),
    "bilinear": (images(resample=2), "preprocessor_config.json: resample is 2"),
    "another patch size": (images(patch_size=16), "preprocessing has patch_size 16, the vision encoder 14"),
    "mean of two": (images(image_mean=[0.5, 0.5]), "image_mean is .*, expected three numbers"),
    "no deviation": (images(rescale_factor=0), "rescale must be positive"),
    "pixels divided by nothing": (images(image_std=[0.5, 0, 0.5]), r"image_std is \[0.5, 0, 0.5\], and pixels are"),
    "limits crossed": (images(min_pixels=602113), r"min_pixels \(602113\) must not exceed max_pixels"),
    "limit as text": (images(max_pixels="many"), "max_pixels is 'many'"),
    "size a number": (images(size=5), "preprocessor_config.json: size holds 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(folder: Path, name: str) -> None:
    edit, message = REFUSED[name]
    edit(folder)
    with pytest.raises(CheckpointError, match=message) as refused:
        open_checkpoint(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_value_that_is_no_number_is_refused_by_name(folder: Path, value: float, dtype: torch.dtype) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q] = tensors[Q].to(dtype)
        tensors[Q][-1, -1] = value

    edit_tensors(folder, damage)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"{re.escape(Q)} in {WEIGHTS} holds NaN or infinite values"):
        checkpoint.read(Q)
    checkpoint.read("model.norm.weight")


def test_a_file_that_changes_while_in_use_is_noticed(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    edit_tensors(folder, lambda t: t.update({Q: t[Q][:3].clone()}))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} changed while in use: {Q}"):
        checkpoint.read(Q)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"cannot read {Q} from {WEIGHTS}"):
        checkpoint.read(Q)
    with pytest.raises(CheckpointError, match=f"cannot read {WEIGHTS}"):
        checkpoint.fingerprint()


# --- whatever the bytes ----------------------------------------------------------------------------------

MEMORY = 2 << 30  # far more than a tiny checkpoint needs, far less than what its header could claim


@contextmanager
def limited_memory() -> Iterator[None]:
    """Address space capped, so that a claim that is believed fails at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def open_and_read(folder: Path) -> None:
    """All of it; only a CheckpointError may come out."""
    with suppress(CheckpointError), limited_memory():
        checkpoint = open_checkpoint(folder)
        assert isinstance(checkpoint.config, ModelConfig)
        assert list(checkpoint.names) == list(expected_shapes(checkpoint.config))
        for name in checkpoint.names:
            assert checkpoint.read(name).shape == checkpoint.shape(name)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A few bytes changed, cut out or put in; places are fractions, so they fit any file."""
    edits = draw(
        st.lists(
            st.tuples(
                st.floats(0, 1, exclude_max=True),
                st.integers(0, 40),
                st.one_of(
                    st.binary(max_size=8),
                    st.sampled_from([b"-1", b"1e999", b"9" * 30, b"NaN", b"null", b"true", b"[]", b"{}", b'"', b"]"]),
                ),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def apply(content: bytes) -> bytes:
        for place, length, new in edits:
            start = int(place * len(content))
            content = content[:start] + new + content[start + length :]
        return content

    return apply


@pytest.fixture(scope="module")
def victim(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(original, tmp_path_factory.mktemp("victim") / "base"))


def with_file(folder: Path, name: str, content: bytes) -> None:
    kept = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        open_and_read(folder)
    finally:
        (folder / name).write_bytes(kept)


@given(damage=damages(), in_header=st.booleans())
def test_any_damage_to_the_safetensors_header_is_refused_or_harmless(
    victim: Path, damage: Callable[[bytes], bytes], in_header: bool
) -> None:
    content = (victim / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + size], content[8 + size :]
    if in_header:  # its length corrected, so that the JSON itself is what is damaged
        header = damage(header)
        with_file(victim, WEIGHTS, len(header).to_bytes(8, "little") + header + rest)
    else:
        with_file(victim, WEIGHTS, damage(content[: 8 + size]) + rest)


@given(size=st.integers(0, 2**64 - 1))
def test_any_claimed_length_of_the_header_is_refused(victim: Path, size: int) -> None:
    with_file(victim, WEIGHTS, size.to_bytes(8, "little") + (victim / WEIGHTS).read_bytes()[8:])


@given(damage=damages(), name=st.sampled_from(["config.json", "preprocessor_config.json", "tokenizer.json"]))
def test_any_damage_to_the_bytes_of_a_json_file_is_refused_or_harmless(
    victim: Path, damage: Callable[[bytes], bytes], name: str
) -> None:
    with_file(victim, name, damage((victim / name).read_bytes()))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 10**12), st.floats(), st.text(max_size=5), st.just(10**400)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_any_value_of_any_field_of_a_json_file_is_refused_or_harmless(victim: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["config.json", "preprocessor_config.json", "tokenizer.json"]))
    raw = json.loads((victim / name).read_text())
    extra = ["text_config", "layer_types", "head_dim", "id2label", "num_labels", "rope_parameters", "size", "license"]
    section = data.draw(st.sampled_from([raw, *(value for value in raw.values() if isinstance(value, dict))]))
    field = data.draw(st.sampled_from([*section, *extra]))
    section[field] = data.draw(JSON)
    with_file(victim, name, json.dumps(raw).encode())


@given(data=st.data())
def test_any_value_in_the_index_is_refused_or_harmless(victim: Path, data: st.DataObject) -> None:
    folder = victim.with_name("sharded")
    if not folder.exists():
        shutil.copytree(victim, folder)
        shard(folder)
    raw = json.loads((folder / INDEX).read_text())
    if data.draw(st.booleans()):
        raw["weight_map"][data.draw(st.sampled_from([Q, "", "new"]))] = data.draw(JSON)
    else:
        raw["weight_map"] = data.draw(JSON)
    with_file(folder, INDEX, json.dumps(raw).encode())


@pytest.mark.skipif(sys.platform != "linux", reason="the cap is set from /proc")
def test_the_cap_on_memory_can_fail() -> None:
    with pytest.raises((RuntimeError, MemoryError)), limited_memory():
        torch.zeros(MEMORY, dtype=torch.float64)
