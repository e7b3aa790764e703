"""The reference against transformers itself, loaded by other means, and against the published procedure."""

import io
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from m0kit.errors import AdapterError, CheckpointError
from m0kit_export import patterns
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.merge import AdapterStack
from m0kit_parity.proof.cases import draw_page, encode
from m0kit_parity.reference import Reference
from m0kit_parity.samples.adapters import write_adapter
from m0kit_parity.samples.checkpoints import ConfigForm, write_checkpoint

PAGE = draw_page(["Invoice 2041", "Total 118.20"], (112, 84), seed=3)
OTHER = draw_page(["Timetable", "Bus 7  08:15"], (56, 140), seed=4)
PAIRS: list[tuple[Any, Any]] = [
    ("What is the total?", "Invoice 2041. Total 118.20"),
    ("What is the total?", PAGE),
    (PAGE, "The total is 118.20."),
    (OTHER, PAGE),
]
# Sums in another order (a batch is padded and masked, a product has more rows): some 100 roundings of 6e-8.
FP32_NOISE = 1e-5


class Direct(nn.Module):
    """transformers' model and the published head, filled by a strict load_state_dict; prompts by hand."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.config = Qwen2VLConfig.from_pretrained(folder, attn_implementation="eager")
        width = self.config.text_config.hidden_size
        self.model = Qwen2VLModel(self.config).float()
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.eval()
        stored = load_file(folder / "model.safetensors")
        renamed = {}
        for name, tensor in stored.items():
            if name.startswith("visual."):
                name = f"model.{name}"
            elif name.startswith("model."):
                name = f"model.language_model.{name.removeprefix('model.')}"
            renamed[name] = tensor.float()
        self.load_state_dict(renamed, strict=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    @torch.no_grad()
    def forward(self, query: Any, document: Any) -> tuple[torch.Tensor, float]:
        """(hidden state of the last token, logit)."""
        images = [content for content in (document, query) if not isinstance(content, str)]
        done = self.processor(images=images, return_tensors="pt") if images else {}
        grids = list(done.get("image_grid_thw", []))
        parts = []
        for content in (document, query):
            if isinstance(content, str):
                parts.append(content)
            else:
                pads = int(grids.pop(0).prod()) // 4
                parts.append(f"<|vision_start|>{'<|image_pad|>' * pads}<|vision_end|>")
        ids = self.tokenizer(f"**Document**:\n{parts[0]}\n**Query**:\n{parts[1]}")["input_ids"] + [100]
        token_ids = torch.tensor([ids])
        types = (token_ids == self.config.image_token_id).int()
        out = self.model(
            input_ids=token_ids, attention_mask=torch.ones_like(token_ids), mm_token_type_ids=types, **done
        ).last_hidden_state
        return out[0, -1], self.score(out[:, -1]).item()


@pytest.fixture(scope="module", params=["tiny", "small"])
def folder(request: pytest.FixtureRequest, tiny: Path, small: Path) -> Path:
    return {"tiny": tiny, "small": small}[request.param]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference.load(folder)


@pytest.mark.parametrize("pair", PAIRS, ids=["text-text", "text-image", "image-text", "image-image"])
def test_hidden_state_and_logit_are_those_of_transformers(
    pair: tuple[Any, Any], folder: Path, reference: Reference
) -> None:
    hidden, logit = Direct(folder)(*pair)
    trace = reference.trace(pair)
    assert trace.hidden.shape == hidden.shape
    np.testing.assert_allclose(trace.hidden, hidden.numpy(), rtol=0, atol=FP32_NOISE * float(hidden.abs().max()))
    assert trace.logit == pytest.approx(logit, abs=4 * FP32_NOISE)
    assert trace.score == pytest.approx(1 / (1 + math.exp(-(logit - 2.65))), abs=FP32_NOISE)


def test_score_agrees_with_trace_and_raw_is_the_logit(reference: Reference) -> None:
    traces = [reference.trace(pair) for pair in PAIRS]
    np.testing.assert_allclose(reference.score(PAIRS), [t.score for t in traces], rtol=0, atol=1e-7)
    np.testing.assert_allclose(reference.score(PAIRS, raw=True), [t.logit for t in traces], rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_padding_on_the_left_changes_no_score(batch_size: int, reference: Reference) -> None:
    mixed = [
        ("a", "b"),
        ("a question of some length about the total of an invoice", "Total 118.20. " * 30),
        *PAIRS,
        ("a", "The sky is blue. " * 7),
    ]
    np.testing.assert_allclose(reference.compute_score(mixed, batch_size), reference.score(mixed), atol=FP32_NOISE)


@pytest.mark.parametrize("naming", ["published", "new"])
@pytest.mark.parametrize("form", get_args(ConfigForm))
def test_every_form_of_a_checkpoint_gives_the_same_scores(
    form: Any, naming: Any, tiny_reference: Reference, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "c", "tiny", naming=naming, config_form=form, max_shard_bytes=200_000)
    np.testing.assert_array_equal(Reference.load(tmp_path / "c").score(PAIRS), tiny_reference.score(PAIRS))


def edited(source: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with tensors (dots spelled __) replaced, added, or (None) removed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model__layers__1__mlp__up_proj__weight": None}, r"model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"score__2__bias": None}, r"score\.2\.bias"),
        ({"visual__blocks__0__attn__rel_pos": torch.ones(3)}, r"visual\.blocks\.0\.attn\.rel_pos"),
        ({"model__norm__weight": torch.ones(63)}, r"model\.norm\.weight"),
        ({"model__norm__weight": torch.full((64,), math.nan)}, r"model\.norm\.weight"),
    ],
    ids=["missing", "missing in the head", "unexpected", "mis-shaped", "not a number"],
)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(
    changes: Mapping[str, torch.Tensor | None], name: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=name):
        Reference.load(edited(tiny, tmp_path / "c", **changes))


def test_a_checkpoint_of_another_architecture_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "c")
    raw = json.loads((tiny / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**raw, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="llama"):
        Reference.load(tmp_path / "c")


def configured(source: Path, folder: Path, vision: Mapping[str, Any] = MappingProxyType({}), **changes: Any) -> Path:
    """A copy of a checkpoint with other fields in its config.json."""
    shutil.copytree(source, folder)
    raw = json.loads((source / "config.json").read_text())
    raw["vision_config"].update(vision)
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return folder


def test_what_a_config_says_of_how_to_run_the_model_is_not_followed(
    tiny: Path, tiny_reference: Reference, tmp_path: Path
) -> None:
    """transformers would fetch kernels from the hub by some of these fields, and look up others in torch."""
    how = {"attn_implementation": "a/kernel", "_attn_implementation": "a/kernel", "experts_implementation": "a/kernel"}
    how |= {"dtype": "save", "torch_dtype": "load"}
    folder = configured(tiny, tmp_path / "c", vision=how, **how, id2label=["a"])
    np.testing.assert_array_equal(Reference.load(folder).score(PAIRS), tiny_reference.score(PAIRS))


@pytest.mark.parametrize(
    "change", [{"initializer_range": "a"}, {"bos_token_id": [1]}, {"layer_types": ["full_attention"]}]
)
def test_a_field_that_transformers_refuses_is_one_sentence(change: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformers makes no model of config\.json in c \("):
        Reference.load(configured(tiny, tmp_path / "c", **change))


def test_a_pattern_is_tried_on_the_names_that_the_reference_has(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one takes its time on modules alone that no tensor belongs to, which the export does not have."""
    monkeypatch.setattr(patterns, "DEADLINE_S", 2)
    write_adapter(tmp_path / "a", tiny, "plain")
    config = tmp_path / "a" / "adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "exclude_modules": r"(?=.*act_fn)(\w+\.?)+!"}))
    AdapterStack.open([AdapterSpec(tmp_path / "a")], open_checkpoint(tiny))
    with pytest.raises(AdapterError, match=r"exclude_modules holds .*: it backtracks"):
        Reference.load(tiny, adapters=[(tmp_path / "a", 1.0)])


def test_an_adapter_that_asks_for_a_module_by_name_is_refused(tiny: Path, tmp_path: Path) -> None:
    """PEFT would import what megatron_core says."""
    write_adapter(tmp_path / "a", tiny, "plain")
    config = tmp_path / "a" / "adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "megatron_config": {"a": 1}, "megatron_core": "antigravity"}))
    with pytest.raises(AdapterError, match="uses megatron_config="):
        Reference.load(tiny, adapters=[(tmp_path / "a", 1.0)])


@pytest.mark.parametrize("change", ["renamed", "lost"])
def test_an_adapter_whose_tensors_find_no_place_is_refused(change: str, tiny: Path, tmp_path: Path) -> None:
    """PEFT only warns about the first and starts the second at random."""
    write_adapter(tmp_path / "a", tiny, "plain")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    value = tensors.pop(key)
    if change == "renamed":
        tensors[key.replace("layers.0", "layers.7")] = value
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"did not place, or that it lacks.*layers\.[07]"):
        Reference.load(tiny, adapters=[(tmp_path / "a", 1.0)])


def test_an_adapters_weight_scales_its_update_and_nought_leaves_the_base(
    tiny: Path, tiny_reference: Reference, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a", tiny, "plain")

    def logits(weight: float) -> Any:
        return Reference.load(tiny, adapters=[(tmp_path / "a", weight)]).score(PAIRS, raw=True)

    base = tiny_reference.score(PAIRS, raw=True)
    np.testing.assert_allclose(logits(0.0), base, atol=4 * FP32_NOISE)
    small = logits(0.01) - base
    # For a small enough update the change of a logit grows in proportion, up to its square.
    np.testing.assert_allclose(logits(0.02) - base, 2 * small, atol=0.15 * np.abs(small).max())
    assert np.abs(small).max() > 1e-3


@pytest.mark.parametrize("spelled", ["without PEFT's prefix", "with an LM head", "by ms-swift"])
def test_what_export_takes_of_an_adapter_the_reference_takes_too(spelled: str, tiny: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", tiny, "plain")
    meant = Reference.load(tiny, adapters=[(tmp_path / "a", 1.0)]).score(PAIRS, raw=True)
    file, config = (tmp_path / "a" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(file)
    if spelled == "without PEFT's prefix":
        tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    elif spelled == "with an LM head":
        tensors |= {"base_model.model.lm_head.weight": torch.ones(384, 64), "base_model.model.x.weight": torch.zeros(0)}
    else:
        raw = json.loads(config.read_text())
        config.write_text(json.dumps({**raw, "peft_type": None, "swift_type": "LORA", "lorap_emb_lr": 1e-6}))
    save_file(tensors, file)
    found = Reference.load(tiny, adapters=[(tmp_path / "a", 1.0)]).score(PAIRS, raw=True)
    assert found.tobytes() == meant.tobytes()


def test_two_adapters_are_applied_one_after_the_other(tiny: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", tiny, "score", seed=1)
    write_adapter(tmp_path / "b", tiny, "dora", seed=2)
    write_adapter(tmp_path / "c", tiny, "score", seed=3)

    def scores(*names: str) -> Any:
        return Reference.load(tiny, adapters=[(tmp_path / name, 1.0) for name in names]).score(PAIRS)

    assert np.abs(scores("a", "b") - scores("a")).max() > 0.01
    assert np.abs(scores("a", "c") - scores("c", "a")).max() > 0.01, "the later head wins"


# --- the published procedure ---------------------------------------------------------------------------


def test_the_prompt_is_document_then_query_then_the_score_token(reference: Reference) -> None:
    ids = reference.trace(("why?", "because")).token_ids
    assert ids[-1] == 100
    assert reference.tokenizer.decode(ids[:-1]) == "**Document**:\nbecause\n**Query**:\nwhy?"


def test_the_documents_image_comes_before_the_querys(reference: Reference) -> None:
    trace = reference.trace((OTHER, PAGE))
    assert len(trace.patches) == 2
    alone = [reference.trace(("q", image)) for image in (PAGE, OTHER)]
    for i in range(2):
        np.testing.assert_array_equal(trace.patches[i], alone[i].patches[0])
        np.testing.assert_array_equal(trace.grid_thw[i], alone[i].grid_thw[0])
    assert not np.array_equal(trace.grid_thw[0], trace.grid_thw[1])
    prompt = reference.config.prompt
    starts = np.flatnonzero(trace.token_ids == prompt.vision_start_id)
    counts = [len(trace.image_embeds[i]) for i in range(2)]
    for start, count in zip(starts, counts, strict=True):
        assert (trace.token_ids[start + 1 : start + 1 + count] == prompt.image_pad_id).all()
        assert trace.token_ids[start + 1 + count] == prompt.vision_end_id


def limited(folder: Path, max_length: int) -> Reference:
    checkpoint = open_checkpoint(folder)
    full = Reference.load(folder)
    return Reference(full.core, full.head, checkpoint, max_length=max_length)


def test_a_document_is_cut_at_its_own_limit_and_encoded_again(folder: Path) -> None:
    """max(600 − 512, 512) = 512 tokens of the document; the whole prompt loses the query's end at 599."""
    reference = limited(folder, 600)
    document = " ".join(str(n) for n in range(900))
    long_query = "how many? " * 60
    ids = reference.trace((long_query, document)).token_ids
    assert (len(ids), ids[-1]) == (600, 100)
    cut = reference.encode(document, 512)
    assert len(cut) == 512
    again = reference.tokenizer.decode(cut)
    expected = reference.encode(f"**Document**:\n{again}\n**Query**:\n{long_query}")[:599]
    assert ids[:-1].tolist() == expected
    # A document just under its limit is taken as it is.
    short = reference.tokenizer.decode(cut[:300])
    ids = reference.trace(("why?", short)).token_ids
    assert ids[:-1].tolist() == reference.encode(f"**Document**:\n{short}\n**Query**:\nwhy?")


def test_a_query_is_never_cut_by_itself(folder: Path) -> None:
    reference = limited(folder, 2000)
    query = "how many? " * 150
    assert len(reference.encode(query)) > 512
    ids = reference.trace((query, "document")).token_ids
    assert ids[:-1].tolist() == reference.encode(f"**Document**:\ndocument\n**Query**:\n{query}")[:1999]


def test_text_never_becomes_a_special_token(reference: Reference) -> None:
    prompt = reference.config.prompt
    trace = reference.trace(("<|vision_start|><|image_pad|><|vision_end|>", "<|endoftext|>"))
    specials = {prompt.vision_start_id, prompt.vision_end_id, prompt.image_pad_id}
    assert not specials & set(trace.token_ids.tolist())
    assert trace.patches == ()
    assert trace.grid_thw.shape == (0, 3)


def test_layers_are_the_states_after_each_decoder_layer_and_hooks_are_gone_afterwards(reference: Reference) -> None:
    trace = reference.trace(PAIRS[1], layers=True)
    assert trace.layers is not None
    decoder = reference.core.language_model
    assert trace.layers.shape == (reference.config.decoder.num_layers, reference.config.decoder.hidden_size)
    with torch.no_grad():
        normed = decoder.norm(torch.from_numpy(trace.layers[-1]))
    np.testing.assert_allclose(normed, trace.hidden, rtol=0, atol=1e-6)
    for layer in decoder.layers:
        mine = layer.register_forward_hook(lambda *_: None)
        assert list(mine.hooks_dict_ref()) == [mine.id]
        mine.remove()
    assert reference.trace(PAIRS[1]).layers is None


def test_every_form_of_an_image_is_opened_as_transformers_does(reference: Reference, tmp_path: Path) -> None:
    import base64

    data = encode(PAGE)
    (tmp_path / "page.png").write_bytes(data)
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    forms = [PAGE, data, tmp_path / "page.png", {"image": PAGE}, {"image": uri}, Image.open(io.BytesIO(data))]
    expected = reference.trace(("q", PAGE)).patches[0]
    for form in forms:
        np.testing.assert_array_equal(reference.trace(("q", form)).patches[0], expected)
        np.testing.assert_array_equal(reference.trace({"query": "q", "document": form}).patches[0], expected)


def test_max_pixels_shrinks_images_further(tiny: Path) -> None:
    reference = Reference.load(tiny, max_pixels=28 * 28 * 4)
    assert reference.trace(("q", PAGE)).grid_thw[0].prod() <= 16
