"""Checkpoints as tools leave them: what is unambiguous is read as the published layout, what is wrong is said."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

from m0kit import Reranker
from m0kit.errors import CheckpointError
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.export import export_artifact
from m0kit_export.tokenizer import read_tokenizer
from m0kit_parity.samples.checkpoints import write_checkpoint
from m0kit_parity.samples.vocabulary import write_qwen2_tokenizer

Tensors = dict[str, torch.Tensor]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = [
    "How do cats drink?",
    "Wie trinken Kätzchen?  Ä, Ä and ﬁ",
    "子猫はどうやって水を飲みますか 123456",
    "def f(x):\n\n    return x  # don't\r\n\t",
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>",
    "a<|im_start|>b 🙂‍↔️ ́e",
    "",
]


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same(folder: Path, tiny: Path) -> None:
    """The same checkpoint in every tensor and setting."""
    found, meant = open_checkpoint(folder), open_checkpoint(tiny)
    assert (found.config, found.names) == (meant.config, meant.names)
    for name in meant.names:
        assert torch.equal(found.read(name), meant.read(name)), name


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"module.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
        lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp._checkpoint_wrapped_module."),
        lambda name: (
            f"module.model.language_{name}"
            if name.startswith("model.")
            else f"module.model.{name}"
            if name.startswith("visual.")
            else f"module.{name}"
        ),
    ],
)
def test_names_inside_training_wrappers_are_those_inside(folder: Path, tiny: Path, spell: Callable[[str], str]) -> None:
    rewrite(folder, lambda tensors: {spell(name): tensor for name, tensor in tensors.items()})
    assert_same(folder, tiny)


def test_one_tensor_with_and_without_a_wrapper_is_refused(folder: Path) -> None:
    rewrite(folder, lambda t: {**t, "_orig_mod.model.norm.weight": t["model.norm.weight"].clone()})
    with pytest.raises(CheckpointError, match="are the same tensor under two names"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["score.weight", "module.score.weight", "score.bias"])
def test_a_head_of_one_layer_is_named_as_another_head(folder: Path, name: str) -> None:
    def swap(tensors: Tensors) -> Tensors:
        rest = {key: value for key, value in tensors.items() if not key.startswith("score.")}
        return {**rest, name: torch.zeros(1, 64)}

    rewrite(folder, swap)
    with pytest.raises(CheckpointError, match=r"score\.\w+ \[1, 64\], a head of one linear layer.*score\.0, score\.2"):
        open_checkpoint(folder)


# --- buffers and tied tensors ----------------------------------------------------------------------


def inverse_frequency(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "theta", "dim"),
    [
        ("model.rotary_emb.inv_freq", 1e6, 16),
        ("model.language_model.rotary_emb.inv_freq", 1e6, 16),
        ("model.rotary_emb.original_inv_freq", 1e6, 16),
        ("module.model.layers.1.self_attn.rotary_emb.inv_freq", 1e6, 16),
        ("visual.rotary_pos_emb.inv_freq", 1e4, 4),
        ("model.visual.rotary_pos_emb.inv_freq", 1e4, 4),
    ],
)
def test_rotary_frequencies_are_left_out_if_they_are_those_of_the_config(
    folder: Path, tiny: Path, name: str, theta: float, dim: int, dtype: torch.dtype
) -> None:
    values = inverse_frequency(theta, dim)
    rewrite(folder, lambda tensors: {**tensors, name: values.to(dtype)})
    assert_same(folder, tiny)
    assert open_checkpoint(folder).dropped == (name,)
    for wrong in (values * 1.1, inverse_frequency(theta / 2, dim), values[1:], values.to(torch.int64)):
        rewrite(folder, lambda tensors, wrong=wrong: {**tensors, name: wrong.clone()})
        with pytest.raises(CheckpointError, match=r"inv_freq in .* holds other rotary frequencies than config\.json"):
            open_checkpoint(folder)


def test_an_embedding_saved_as_the_head_it_is_tied_to_is_found(folder: Path, tiny: Path) -> None:
    def move(tensors: Tensors) -> Tensors:
        return {"lm_head.weight" if name == "model.embed_tokens.weight" else name: t for name, t in tensors.items()}

    rewrite(folder, move)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert_same(folder, tiny)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"tensors are missing: model\.embed_tokens\.weight"):
        open_checkpoint(folder)


# --- files -----------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "sharded", "tiny", dtype="float16", max_shard_bytes=60_000)
    assert len(list((tmp_path / "sharded").glob("model-*"))) > 3
    return tmp_path / "sharded"


def test_shards_whose_index_is_lost_are_read(sharded: Path, tiny: Path) -> None:
    (sharded / INDEX).unlink()
    assert_same(sharded, tiny)


def test_a_shard_that_is_lost_with_the_index_is_named(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    lost = sorted(sharded.glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"shard {lost.name} is missing, and {INDEX} too"):
        open_checkpoint(sharded)


def test_shards_of_two_models_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(sorted(sharded.glob("model-*"))[0], sharded / "model-00001-of-00099.safetensors")
    with pytest.raises(CheckpointError, match=f"shards of .* and of 00099 without {INDEX}: they are not of one model"):
        open_checkpoint(sharded)


def test_strays_beside_the_index_and_a_pickle_beside_safetensors_do_no_harm(sharded: Path, tiny: Path) -> None:
    save_file({"odd": torch.zeros(1)}, sharded / "model-00001-of-00099.safetensors")
    (sharded / "pytorch_model.bin").write_bytes(b"never opened")
    (sharded / "training_args.bin").write_bytes(b"nor this")
    assert_same(sharded, tiny)


def test_weights_under_another_name_are_named(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"holds neither .*; it holds weights\.safetensors, which is no name"):
        open_checkpoint(folder)


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("preprocessor_config.json", "max_pixels"),
        ("preprocessor_config.json", "min_pixels"),
        ("preprocessor_config.json", "patch_size"),
        ("preprocessor_config.json", "merge_size"),
        ("config.json", "hidden_size"),
        ("config.json", "num_hidden_layers"),
        ("config.json", "vocab_size"),
        ("config.json", "image_token_id"),
    ],
)
def test_whole_numbers_with_a_decimal_point_are_whole_numbers(folder: Path, tiny: Path, file: str, field: str) -> None:
    value = json.loads((folder / file).read_text())[field]
    edit_json(folder / file, **{field: float(value)})
    assert f'"{field}": {value}.0' in (folder / file).read_text()
    assert_same(folder, tiny)
    edit_json(folder / file, **{field: value + 0.5})
    with pytest.raises(CheckpointError, match=rf"{file}: {field} is {value}\.5, expected a whole number"):
        open_checkpoint(folder)


def test_sections_of_positions_may_be_floats(folder: Path, tiny: Path) -> None:
    edit_json(folder / "config.json", rope_scaling={"type": "mrope", "mrope_section": [2.0, 3.0, 3.0]})
    assert_same(folder, tiny)


@pytest.mark.parametrize("rope", [{"type": "mrope"}, {"rope_type": "default"}, {"type": "mrope", "rope_type": "mrope"}])
def test_rope_may_be_spelled_as_any_version_spells_it(folder: Path, tiny: Path, rope: dict[str, str]) -> None:
    edit_json(folder / "config.json", rope_scaling={**rope, "mrope_section": [2, 3, 3]})
    assert_same(folder, tiny)


def test_sizes_of_images_may_be_edges(folder: Path, tiny: Path) -> None:
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    edges = {"shortest_edge": raw.pop("min_pixels"), "longest_edge": float(raw.pop("max_pixels"))}
    (folder / "preprocessor_config.json").write_text(json.dumps({**raw, "size": edges}))
    assert_same(folder, tiny)


def test_a_byte_order_mark_in_a_config_is_no_part_of_it(folder: Path, tiny: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert_same(folder, tiny)


# --- tokenizers ------------------------------------------------------------------------------------


def take_apart(folder: Path, told_in: str) -> Tokenizer:
    """vocab.json, merges.txt and the special tokens in one of three places, instead of tokenizer.json."""
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "vocab.json").write_text(json.dumps(raw["model"]["vocab"], ensure_ascii=False), "utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in raw["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    (folder / "tokenizer.json").unlink()
    added = raw["added_tokens"]
    if told_in == "added_tokens_decoder":
        decoder = {str(t["id"]): {key: value for key, value in t.items() if key != "id"} for t in added}
        edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    elif told_in == "added_tokens.json":
        (folder / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in added}))
    return Tokenizer.from_str(json.dumps(raw))


@pytest.mark.parametrize("told_in", ["added_tokens_decoder", "added_tokens.json"])
def test_a_tokenizer_made_of_vocabulary_and_merges_gives_the_published_ids(
    folder: Path, tiny: Path, told_in: str
) -> None:
    published = take_apart(folder, told_in)
    checkpoint = open_checkpoint(folder)
    made = Tokenizer.from_str(checkpoint.tokenizer)
    for special in (False, True):
        published.encode_special_tokens = made.encode_special_tokens = special
        for text in TEXTS:
            assert made.encode(text).ids == published.encode(text).ids, text
    assert {"vocab.json", "merges.txt"} < set(checkpoint.fingerprint())
    assert "tokenizer.json" not in checkpoint.fingerprint()
    export_artifact(folder, folder.with_name("made"), progress=False)
    export_artifact(tiny, folder.with_name("published"), progress=False)
    pairs = [(query, document) for query in TEXTS[:3] for document in TEXTS if document]
    scores = [Reranker.load(folder.with_name(name)).score(pairs) for name in ("made", "published")]
    assert scores[0].tobytes() == scores[1].tobytes()


def test_the_same_holds_for_the_published_vocabulary(tmp_path: Path) -> None:
    write_qwen2_tokenizer(tmp_path)
    published = take_apart(tmp_path, "added_tokens_decoder")
    made = Tokenizer.from_str(read_tokenizer(tmp_path)[1])
    for text in [*TEXTS, (Path(__file__).parents[2] / "README.md").read_text("utf-8")]:
        assert made.encode(text).ids == published.encode(text).ids, text


def test_transformers_reads_the_parts_alike(folder: Path) -> None:
    """What is compared above is what a user of transformers gets from the same folder."""
    published = take_apart(folder, "added_tokens_decoder")
    theirs = Qwen2Tokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        assert theirs(text)["input_ids"] == published.encode(text).ids


def test_parts_without_the_special_tokens_are_refused(folder: Path) -> None:
    take_apart(folder, "nowhere")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, and the .* not name <\|vision_start\|>"):
        open_checkpoint(folder)


@pytest.mark.parametrize("part", ["vocab.json", "merges.txt"])
def test_a_part_that_is_missing_or_damaged_is_said(folder: Path, part: str) -> None:
    take_apart(folder, "added_tokens_decoder")
    (folder / part).write_text("{" if part == "vocab.json" else "a\nb c d\n")
    said = {
        "vocab.json": "vocab.json in .* is not readable JSON",
        "merges.txt": "transformers cannot make one from vocab",
    }
    with pytest.raises(CheckpointError, match=said[part]):
        open_checkpoint(folder)
    (folder / part).unlink()
    other = {"vocab.json": "merges.txt", "merges.txt": "vocab.json"}[part]
    with pytest.raises(CheckpointError, match=f"has no tokenizer.json; of .*, it has {other} alone"):
        open_checkpoint(folder)


def test_a_tokenizer_of_another_class_is_named(folder: Path) -> None:
    take_apart(folder, "added_tokens_decoder")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(CheckpointError, match="tokenizer_class is 'LlamaTokenizer'"):
        open_checkpoint(folder)


def test_the_parts_are_read_with_the_number_that_transformers_writes_for_no_limit(folder: Path) -> None:
    take_apart(folder, "added_tokens_decoder")
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30, tokenizer_class="Qwen2Tokenizer")
    assert "1000000000000000000000000000000" in (folder / "tokenizer_config.json").read_text()
    open_checkpoint(folder)


@pytest.mark.parametrize("part", ["vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja"])
def test_nothing_but_files_that_were_looked_at_reaches_transformers(folder: Path, part: str) -> None:
    take_apart(folder, "added_tokens_decoder")
    (folder / part).unlink(missing_ok=True)
    os.mkfifo(folder / part)
    if part == "chat_template.jinja":  # which the tokenizer is made without
        open_checkpoint(folder)
    else:
        with pytest.raises(CheckpointError, match=f"{part} in .* is a device, a pipe or a socket"):
            open_checkpoint(folder)


def test_a_class_that_is_no_name_is_refused(folder: Path) -> None:
    take_apart(folder, "added_tokens_decoder")
    edit_json(folder / "tokenizer_config.json", tokenizer_class=["Qwen2Tokenizer"])
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json in .*: Expected `str \| null`, got `array`"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("vocab.json", {"a": 2**32 - 1}),
        ("vocab.json", {"a": -1}),
        ("vocab.json", {"a": "0"}),
        ("vocab.json", ["a"]),
        ("added_tokens.json", {"<|image_pad|>": 2**31}),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(2**31): {"content": "<|image_pad|>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"first": {"content": "<|image_pad|>"}}}),
    ],
)
def test_ids_beyond_every_vocabulary_are_refused_before_they_are_counted_up_to(
    folder: Path, part: str, content: Any
) -> None:
    take_apart(folder, "added_tokens_decoder")
    (folder / part).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{part} in .*: .*. Fetch it again"):
        open_checkpoint(folder)
