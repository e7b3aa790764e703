"""Adapters against PEFT itself: the whole tiny model, adapted, saved, loaded and merged the normal way.

Every comparison is exact (torch.equal): both sides run the same PEFT code, in fp32, on matrices of the
same shape, so there is nothing that could round differently.
"""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tests.export import tiny_model
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from m0kit.errors import AdapterError, CheckpointError
from m0kit_export import merge
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_export.merge import AdapterStack

Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj", "gate_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "qkv", "down_proj"], "use_dora": True},
    "rslora and dora": {"target_modules": ["k_proj"], "use_rslora": True, "use_dora": True},
    "all linear": {"target_modules": "all-linear"},
    "all linear but the images": {"target_modules": "all-linear", "exclude_modules": r".*visual.*"},
    "regular expression": {"target_modules": r".*language_model.*\.mlp\.(up|down)_proj"},
    "full names": {"target_modules": ["model.visual.merger.mlp.0", "score.2"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "rank and alpha patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"k_proj": 11, r"^model\.language_model\.layers\.1\.self_attn\.q_proj": 3},
    },
    "fan in fan out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "embedding by pattern": {"target_modules": r".*(embed_tokens|o_proj)"},
    "embedding with dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "patches": {"target_modules": ["patch_embed.proj"]},
    "patches with dora": {"target_modules": ["patch_embed.proj"], "use_dora": True},
    "all biases": {"target_modules": ["q_proj", "fc1"], "bias": "all"},
    "adapted biases": {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"},
    "low-rank biases": {"target_modules": ["q_proj", "fc1"], "lora_bias": True},
    "head and norms in full": {"target_modules": ["q_proj"], "modules_to_save": ["score", "norm"]},
    "head in full, all biases": {"target_modules": ["q_proj"], "modules_to_save": ["score"], "bias": "all"},
    "all of vision in full": {"target_modules": ["q_proj"], "modules_to_save": ["visual"]},
    "embedding in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "classification task": {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 100]},
    "some tokens by name": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 9]},
    },
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
}


class Published(Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """A transformers class with a config, for which PEFT has conversions of its own (unlike tiny_model.Reranker)."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Identity()
        self.score = nn.Sequential(
            nn.Linear(tiny_model.HIDDEN, tiny_model.HIDDEN), nn.ReLU(), nn.Linear(tiny_model.HIDDEN, 1)
        )


def save_adapter(folder: Path, model: nn.Module, options: Mapping[str, Any], seed: int = 1) -> Path:
    """An adapter with every trained tensor random: PEFT starts B at zero, where a lost A would go unseen."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **copy.deepcopy(dict(options))})
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted.save_pretrained(folder)
    return folder


def merge_whole(model: nn.Module, *adapters: tuple[Path, float]) -> Tensors:
    """The ground truth: PEFT on the whole model, one adapter after the other."""
    merged: nn.Module = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path, weight in adapters:
            adapted = peft.PeftModel.from_pretrained(merged, path)
            for layer in adapted.modules():
                if isinstance(layer, LoraLayer) and weight != 1.0:
                    layer.set_scale("default", weight)
            merged = adapted.merge_and_unload()
    return tiny_model.published_tensors(merged)


def open_stack(checkpoint: Checkpoint, *adapters: Path | tuple[Path, float]) -> AdapterStack:
    pairs = [a if isinstance(a, tuple) else (a, 1.0) for a in adapters]
    return AdapterStack.open([AdapterSpec(path, weight) for path, weight in pairs], checkpoint)


def assert_same(stack: AdapterStack, truth: Tensors, base: Tensors) -> None:
    changed = 0
    for name, expected in truth.items():
        merged = stack.merged(name)
        assert merged.dtype == torch.float32
        assert merged.is_contiguous()
        assert torch.equal(merged, expected), name
        changed += not torch.equal(expected, base[name])
    assert changed, "the adapter changes nothing: the comparison would prove nothing"


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    tiny_model.write_json(folder / CONFIG, {**raw, **changes})


def edit_tensors(folder: Path, edit: Callable[[Tensors], Tensors | None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edited = edit(tensors)
    save_file(tensors if edited is None else edited, folder / WEIGHTS)


def rename_to_old(tensors: Tensors) -> Tensors:
    return {tiny_model.old_name(key): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_merged_tensor_is_what_peft_makes_of_the_whole_model(
    form: str, model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS[form])
    truth = merge_whole(model, (adapter, 1.0))
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


@pytest.mark.parametrize("form", ["dora", "head and norms in full", "embedding", "all linear"])
def test_adapters_trained_on_a_transformers_class_merge_alike(form: str, tmp_path: Path) -> None:
    model = Published(Qwen2VLConfig(**tiny_model.published_config())).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    base = tiny_model.published_tensors(model)
    checkpoint = open_checkpoint(tiny_model.write_checkpoint(tmp_path / "checkpoint", base))
    adapter = save_adapter(tmp_path / "a", model, FORMS[form])
    assert_same(open_stack(checkpoint, adapter), merge_whole(model, (adapter, 1.0)), base)


@pytest.mark.parametrize("form", ["all linear", "embedding", "all biases", "some tokens", "all of vision in full"])
def test_adapters_with_names_from_before_transformers_4_52_merge_alike(
    form: str, model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS[form])
    truth = merge_whole(model, (adapter, 1.0))
    edit_tensors(adapter, rename_to_old)
    if form == "all linear":  # PEFT saved the full names it found
        targets = json.loads((adapter / CONFIG).read_text())["target_modules"]
        edit_config(adapter, target_modules=[tiny_model.old_name(f"{t}.").rstrip(".") for t in targets])
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


def test_expressions_match_the_names_that_the_adapter_was_trained_with(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    options = {
        "target_modules": r"model\.language_model\.layers\.\d\.self_attn\.[qk]_proj",
        "alpha_pattern": {r"model\.language_model\.layers\.0\.self_attn\.q_proj": 19},
    }
    adapter = save_adapter(tmp_path / "a", model, options)
    truth = merge_whole(model, (adapter, 1.0))
    edit_tensors(adapter, rename_to_old)
    edit_config(
        adapter,
        target_modules=r"model\.layers\.\d\.self_attn\.[qk]_proj",
        alpha_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 19},
    )
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


def test_renamed_tensors_under_a_config_that_was_not_renamed_still_fit(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["regular expression"])
    truth = merge_whole(model, (adapter, 1.0))
    edit_tensors(adapter, rename_to_old)
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


def test_an_alpha_that_only_the_other_naming_knows_is_refused(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    edit_config(adapter, alpha_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 19})
    with pytest.raises(AdapterError, match=r"alpha_pattern names modules as transformers before 4\.52"):
        open_stack(checkpoint, adapter)


def test_a_pattern_that_no_naming_knows_is_ignored_as_peft_ignores_it(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, {**FORMS["plain"], "alpha_pattern": {"lm_head": 3}})
    truth = merge_whole(model, (adapter, 1.0))
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


@pytest.mark.parametrize(
    "form", ["dora", "embedding", "patches", "low-rank biases", "head and norms in full", "some tokens"]
)
def test_keys_may_spell_out_the_name_of_the_adapter(
    form: str, model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS[form])
    truth = merge_whole(model, (adapter, 1.0))

    def spell_out(key: str) -> str:
        if ".lora_magnitude_vector" in key:
            return f"{key}.default.weight"
        if ".lora_embedding_" in key or ".trainable_tokens_delta" in key:
            return f"{key}.default"
        if ".lora_" in key:
            return ".default.".join(key.rsplit(".", 1))
        return key.replace(".score.", ".score.modules_to_save.default.")

    edit_tensors(adapter, lambda tensors: {spell_out(key): tensor for key, tensor in tensors.items()})
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


def test_half_precision_files_are_merged_in_fp32(model: tiny_model.Reranker, tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in tiny_model.published_tensors(model).items()}
    checkpoint = open_checkpoint(tiny_model.write_checkpoint(tmp_path / "checkpoint", base))
    rounded = copy.deepcopy(model).bfloat16().float()
    adapter = save_adapter(tmp_path / "a", model, FORMS["dora"])
    edit_tensors(adapter, lambda tensors: {key: tensor.half() for key, tensor in tensors.items()})
    truth = merge_whole(rounded, (adapter, 1.0))
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(rounded))


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a")])
def test_several_adapters_merge_one_after_another(
    order: tuple[str, ...], model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a", model, {"target_modules": ["q_proj"], "modules_to_save": ["score"]}, seed=1)
    save_adapter(tmp_path / "b", model, {"target_modules": ["q_proj", "score.0"], "use_dora": True}, seed=2)
    save_adapter(tmp_path / "c", model, {"target_modules": ["fc1"], "modules_to_save": ["score"]}, seed=3)
    paths = [tmp_path / name for name in order]
    truth = merge_whole(model, *((path, 1.0) for path in paths))
    assert_same(open_stack(checkpoint, *paths), truth, tiny_model.published_tensors(model))
    head = load_file(paths[-1] / WEIGHTS)["base_model.model.score.2.weight"]
    assert torch.equal(truth["score.2.weight"], head), "the later copy wins"


@pytest.mark.parametrize("weight", [0.5, -1.25, 0.0])
@pytest.mark.parametrize(
    "form", ["all linear", "rslora", "embedding", "patches", "low-rank biases", "rank and alpha patterns"]
)
def test_a_weight_is_pefts_scale(
    form: str, weight: float, model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS[form])
    truth = merge_whole(model, (adapter, weight))
    stack = open_stack(checkpoint, (adapter, weight))
    base = tiny_model.published_tensors(model)
    assert all(torch.equal(stack.merged(name), tensor) for name, tensor in truth.items())
    assert any(not torch.equal(base[name], truth[name]) for name in base) == (weight != 0.0)


@pytest.mark.parametrize(
    "form",
    [
        "dora",
        "head and norms in full",
        "all biases",
        "adapted biases",
        "some tokens",
        "pissa",
        "embedding in full",
    ],
)
def test_a_weight_is_refused_where_it_has_no_meaning(
    form: str, model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS[form])
    with pytest.raises(AdapterError, match=r"adapter a cannot have weight 0\.5: .* weight 1"):
        open_stack(checkpoint, (adapter, 0.5))


def test_without_adapters_a_tensor_is_the_checkpoints_own_in_fp32(
    model: tiny_model.Reranker, checkpoint: Checkpoint
) -> None:
    stack = open_stack(checkpoint)
    tensor = stack.merged("model.norm.weight")
    assert torch.equal(tensor, tiny_model.published_tensors(model)["model.norm.weight"])
    tensor.zero_()  # the caller's own: neither the file nor the next call may notice
    assert not torch.equal(stack.merged("model.norm.weight"), tensor)
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nothing\.weight'"):
        stack.merged("model.nothing.weight")


def test_a_merge_reads_one_module_and_leaves_the_random_state_alone(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = open_stack(checkpoint, save_adapter(tmp_path / "a", model, FORMS["all linear"]))
    read: list[str] = []
    original = Checkpoint.read

    def spy(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "read", spy)
    before = torch.random.get_rng_state()
    stack.merged("model.layers.1.self_attn.q_proj.weight")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert read == ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.bias"]


@pytest.mark.parametrize("form", ["embedding", "embedding by pattern", "embedding with dora"])
@pytest.mark.parametrize("rows", [1, 7, 159, 160])
def test_an_embedding_merged_some_tokens_at_a_time_is_the_same(
    form: str,
    rows: int,
    model: tiny_model.Reranker,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merge, "MERGED_ROWS", rows)
    adapter = save_adapter(tmp_path / "a", model, FORMS[form])
    truth = merge_whole(model, (adapter, 0.5 if "dora" not in form else 1.0))
    stack = open_stack(checkpoint, (adapter, 0.5 if "dora" not in form else 1.0))
    # Sums of `rank` products in another blocking: the last bit at most.
    torch.testing.assert_close(
        stack.merged("model.embed_tokens.weight"), truth["model.embed_tokens.weight"], rtol=1e-6, atol=1e-7
    )


def test_provenance_names_hashes_and_licence_but_no_path(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "tuned", model, FORMS["plain"])
    (adapter / "README.md").write_text("---\nbase_model: x\nlicense: apache-2.0\n---\n")
    [entry] = open_stack(checkpoint, (adapter, 0.25)).provenance()
    hashes = entry.pop("sha256")
    assert entry == {
        "name": "tuned",
        "weight": 0.25,
        "peft_type": "LORA",
        "rank": 4,
        "licence": "apache-2.0",
        "left_out": [],
    }
    assert set(hashes) == {CONFIG, WEIGHTS}
    assert all(len(value) == 64 for value in hashes.values())
    assert str(tmp_path) not in json.dumps(entry)


def lose(key: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[next(name for name in tensors if key in name)]

    return change


def put(key: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: tensor})


Q0 = "base_model.model.model.language_model.layers.0.self_attn.q_proj"

DAMAGED: dict[str, tuple[dict[str, Any], Callable[[Tensors], Any] | None, str]] = {
    "missing A": ({}, lose("lora_A"), r"lacks .*lora_A\.weight, which its config promises"),
    "missing module": (
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},
        None,
        r"lacks .*k_proj.* and 3 more",
    ),
    "unknown tensor": (
        {},
        put(f"{Q0}.lora_C.weight", torch.ones(1)),
        r"q_proj\.lora_C\.weight of adapter a has no",
    ),
    "unknown layer": (
        {},
        put(Q0.replace("0", "7") + ".lora_A.weight", torch.ones(4, 48)),
        "layers.7.* has no place",
    ),
    "module not targeted": ({"target_modules": ["q_proj"]}, None, r"v_proj.* has no place"),
    "no prefix": ({}, put("score.0.weight", torch.ones(48, 48)), "score.0.weight of adapter a has no place"),
    "another rank": (
        {"r": 8},
        None,
        r"q_proj\.lora_A\.weight of adapter a has rank 4, adapter_config\.json says 8 \(r = 8\)\. Correct r there",
    ),
    "another base": (
        {},
        put(f"{Q0}.lora_A.weight", torch.ones(4, 1536)),
        r"shape \[4, 1536\].* asks for \[4, 48\]",
    ),
    "twice": ({}, put(f"{Q0}.lora_A.default.weight", torch.ones(4, 48)), "are one tensor twice"),
    "nan": ({}, put(f"{Q0}.lora_A.weight", torch.full((4, 48), torch.nan)), r"q_proj\.lora_A\.weight .* NaN"),
    "integers": ({}, put(f"{Q0}.lora_A.weight", torch.ones(4, 48, dtype=torch.int8)), "is I8, expected F32"),
    "no target": ({"target_modules": ["c_attn"]}, None, r"PEFT cannot put adapter a .*c_attn.*match nothing"),
    "target is a norm": ({"target_modules": ["norm"]}, None, "something that takes no LoRA"),
    "broken expression": (
        {"target_modules": "(q_proj"},
        None,
        r"adapter_config.json of adapter a: target_modules holds '\(q_proj', which is no regular expression \(missing",
    ),
    "broken layers": ({"layers_pattern": ["layers", "[z-a]"]}, None, r"layers_pattern holds '\[z-a\]', which is no"),
    "broken module": ({"modules_to_save": ["*"]}, None, r"modules_to_save holds '\*', which is no regular expression"),
    "broken rank": ({"rank_pattern": {"q_proj": 4, "a{9999999999}": 4}}, None, r"rank_pattern holds 'a\{9999999999\}'"),
    "empty rank": ({"rank_pattern": {"": 4}}, None, "rank_pattern holds an empty pattern"),
    "empty module": ({"modules_to_save": [""]}, None, "modules_to_save holds an empty pattern"),
    "patterns without end": ({"alpha_pattern": {"q" * 70_000: 4}}, None, "its patterns have more than 65536 letters"),
    "groups without end": ({"target_modules": "(" * 1000 + ")" * 1000}, None, "no regular expression .RecursionError"),
    "targets without end": ({"target_modules": ["q_proj"] * 2001}, None, r"length <= 2000 - at `\$.target_modules`"),
    "modules without end": ({"modules_to_save": ["score"] * 501}, None, r"length <= 500 - at `\$.modules_to_save`"),
    "rank of the wrong kind": ({"r": "four"}, None, r"of adapter a: Expected `int`, got `str` - at `\$\.r`"),
    "rank in fractions": ({"r": 4.5}, None, r"Expected `int`, got `float` - at `\$\.r`"),
    "rank true": ({"r": True}, None, r"Expected `int`, got `bool` - at `\$\.r`"),
    "rank none": ({"r": 0}, None, r"Expected `int` >= 1 - at `\$\.r`"),
    "rank beyond every number": ({"r": 10**400}, None, "holds a whole number of more than 64 bits"),
    "alpha no number": ({"lora_alpha": float("nan")}, None, "it holds NaN, which is no number"),
    "alphas of text": ({"alpha_pattern": {"q_proj": "1"}}, None, r"got `str` - at `\$\.alpha_pattern"),
    "targets of numbers": ({"target_modules": [1]}, None, r"at `\$\.target_modules"),
    "layers of text": ({"layers_to_transform": ["1"]}, None, r"at `\$\.layers_to_transform"),
    "start a list": ({"init_lora_weights": [True]}, None, r"at `\$\.init_lora_weights`"),
    "base a list": ({"base_model_name_or_path": []}, None, r"at `\$\.base_model_name_or_path`"),
    "tokens beyond the vocabulary": ({"trainable_token_indices": [3, 160]}, None, "which ends at 159"),
    "tokens before it": ({"trainable_token_indices": [-1]}, None, r"at `\$\.trainable_token_indices"),
    "tokens twice": ({"trainable_token_indices": {"embed_tokens": [3, 3]}}, None, "names a token twice"),
    "copies over lora": ({"modules_to_save": ["tn"]}, None, "modules_to_save also covers"),
    "other method": ({"peft_type": "IA3"}, None, "PEFT type 'IA3'; m0kit merges LORA"),
    "no method": ({"peft_type": None}, None, "PEFT type None"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, None, "uses layer_replication="),
    "single parameters": ({"target_parameters": ["q_proj.weight"]}, None, "uses target_parameters="),
    "activated lora": ({"alora_invocation_tokens": [1, 2]}, None, "uses alora_invocation_tokens="),
    "an option of the future": ({"use_teleport": True}, None, "uses use_teleport=True, which m0kit does not"),
    "another rank by pattern": (
        {"rank_pattern": {"v_proj": 2}},
        None,
        r"v_proj\.lora_[AB]\.weight of adapter a has rank 4, .* says 2 \(r = 4, and a rank_pattern\)\. Correct r or",
    ),
    "emptied by ZeRO-3": (
        {},
        put(f"{Q0}.lora_A.weight", torch.zeros(0)),
        r"q_proj\.lora_A\.weight of adapter a is empty \(shape \[0\]\): it was saved under DeepSpeed ZeRO-3",
    ),
    "tied to what is not there": (
        {"ensure_weight_tying": True},
        put("base_model.model.lm_head.weight", torch.ones(160, 48)),
        r"trained with ensure_weight_tying, and holds .*lm_head\.weight but nothing of the embedding",
    ),
    "ms-swift's packed products": ({"use_merged_linear": True}, None, "uses use_merged_linear=True"),
    "ms-swift's other method": ({"peft_type": None, "swift_type": "LONGLORA"}, None, "PEFT type 'LONGLORA'"),
    "lossy start": ({"init_lora_weights": "loftq"}, None, "initialised with 'loftq'"),
    "random start": ({"init_lora_weights": "pissa_niter_4"}, None, "initialised with 'pissa_niter_4'"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    damage: str, model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    changes, edit, message = DAMAGED[damage]
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    edit_config(adapter, **changes)
    if edit is not None:
        edit_tensors(adapter, edit)
    with pytest.raises(AdapterError, match=message):
        open_stack(checkpoint, adapter)


LEFT_OUT: dict[str, tuple[str, tuple[int, ...]]] = {
    "the LM head": ("base_model.model.lm_head.weight", (160, 48)),
    "an adapted LM head": ("base_model.model.lm_head.base_layer.weight", (160, 48)),
    "LoRA on the LM head": ("base_model.model.lm_head.lora_A.weight", (4, 48)),
    "a trained LM head": ("base_model.model.lm_head.modules_to_save.default.weight", (160, 48)),
    "an empty LM head": ("base_model.model.lm_head.weight", (0,)),
    "an empty embedding": ("base_model.model.model.language_model.embed_tokens.weight", (0,)),
    "an empty piece of the base": (f"{Q0}.base_layer.weight", (0,)),
    "an empty norm": ("base_model.model.model.language_model.norm.weight", (0,)),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_scoring_has_no_use_for_is_left_out_and_said(
    what: str, model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    truth = merge_whole(model, (adapter, 1.0))
    key, shape = LEFT_OUT[what]
    edit_tensors(adapter, put(key, torch.ones(shape)))
    stack = open_stack(checkpoint, adapter)
    assert_same(stack, truth, tiny_model.published_tensors(model))
    assert stack.provenance()[0]["left_out"] == [key]


def test_an_adapter_that_also_targets_the_lm_head_is_what_peft_makes_of_the_model_without_one(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    edit_tensors(adapter, put("base_model.model.lm_head.weight", torch.ones(160, 48)))
    edit_config(adapter, target_modules=["q_proj", "v_proj", "lm_head"], modules_to_save=["lm_head"])
    truth = merge_whole(model, (adapter, 1.0))
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


def test_a_tied_embedding_that_was_trained_is_taken_and_its_copy_left_out(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["embedding in full"])
    truth = merge_whole(model, (adapter, 1.0))
    edit_tensors(adapter, put("base_model.model.lm_head.weight", torch.ones(160, 48)))
    edit_config(adapter, ensure_weight_tying=True)
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06},
        {"lora_dtype": "AUTO", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06},
        {"swift_type": "LORA", "peft_type": None, "use_qa_lora": False, "enable_lora": None, "model_key_mapping": None},
        {"ensure_weight_tying": True},
    ],
)
def test_options_without_effect_on_a_trained_adapter_are_taken(
    options: dict[str, Any], model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    truth = merge_whole(model, (adapter, 1.0))
    edit_config(adapter, **options)
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


@pytest.mark.parametrize("form", ["dora", "embedding", "head and norms in full", "some tokens"])
@pytest.mark.parametrize(
    "spell",
    [
        lambda bare: bare,
        lambda bare: f"base_model.model.base_model.model.{bare}",
        lambda bare: f"module.base_model.model.{bare}",
        lambda bare: f"_orig_mod.base_model.model.{bare}",
        lambda bare: f"base_model.model._orig_mod.{bare}",
        lambda bare: f"base_model.model.module.{bare}",
        lambda bare: f"base_model.model.{bare.replace('.self_attn.', '._orig_mod.self_attn.')}",
        lambda bare: f"module.{bare}",
    ],
)
def test_prefixes_may_be_missing_doubled_or_wrapped(
    form: str, spell: Callable[[str], str], model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS[form])
    truth = merge_whole(model, (adapter, 1.0))
    prefix = "base_model.model."
    edit_tensors(adapter, lambda tensors: {spell(key.removeprefix(prefix)): t for key, t in tensors.items()})
    assert_same(open_stack(checkpoint, adapter), truth, tiny_model.published_tensors(model))


def test_options_of_newer_versions_that_are_switched_off_do_not_matter(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    edit_config(adapter, use_teleport=False, teleport_config=None)
    assert open_stack(checkpoint, adapter).provenance()[0]["name"] == "a"


def test_a_low_rank_bias_on_a_module_without_bias_is_refused(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, {"target_modules": ["o_proj"], "lora_bias": True})
    with pytest.raises(AdapterError, match=r"lora_bias, but .*o_proj has no bias"):
        open_stack(checkpoint, adapter)


def test_biases_that_were_trained_but_never_saved_are_refused(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    edit_config(adapter, bias="lora_only")
    with pytest.raises(AdapterError, match=r"lacks .*base_layer\.bias"):
        open_stack(checkpoint, adapter)


def test_a_folder_without_the_right_files_is_refused(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="no adapter folder 'nowhere'"):
        open_stack(checkpoint, tmp_path / "nowhere")
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is a pickle"):
        open_stack(checkpoint, adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=f"has no {WEIGHTS}"):
        open_stack(checkpoint, adapter)
    (adapter / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        open_stack(checkpoint, adapter)
    (adapter / CONFIG).unlink()
    with pytest.raises(AdapterError, match=f"has no {CONFIG}"):
        open_stack(checkpoint, adapter)


def test_weights_that_overflow_are_refused_when_merged(
    model: tiny_model.Reranker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", model, FORMS["plain"])
    edit_tensors(adapter, lambda tensors: {key: tensor * 1e30 for key, tensor in tensors.items()})
    stack = open_stack(checkpoint, adapter)
    with pytest.raises(AdapterError, match=r"adapter a makes .*q_proj\.weight overflow"):
        stack.merged("model.layers.0.self_attn.q_proj.weight")
