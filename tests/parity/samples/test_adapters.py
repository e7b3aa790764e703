"""Adapters are PEFT's own in every form, whatever the names of modules, and trained in every tensor."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from m0kit.errors import AdapterError, OutputError
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_export.merge import AdapterStack
from m0kit_export.names import canonical_name
from m0kit_parity.proof.cases import draw_page
from m0kit_parity.reference import NewNames, Reference, empty_model
from m0kit_parity.samples.adapters import ALPHA, FORMS, RANK, UPDATE, write_adapter
from m0kit_parity.samples.cli import FORM_NAMES

PAIRS = [("colour of the sky", "The sky is blue."), ("page", draw_page(["a page", "of lines"], (84, 56)))]


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT remarks on one-dimensional tensors and on embeddings
@pytest.mark.parametrize("form", FORMS)
def test_the_file_holds_what_peft_itself_would_save(
    form: str, tiny: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a", tiny, form)
    config = peft.LoraConfig.from_pretrained(tmp_path / "a")
    model = peft.get_peft_model(NewNames(*empty_model(checkpoint)), config, low_cpu_mem_usage=True)
    expected = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(model).items()}
    assert {key: tuple(value.shape) for key, value in tensors(tmp_path / "a").items()} == expected
    assert (config.r, config.lora_alpha) == (RANK, ALPHA)


@pytest.mark.parametrize("form", FORMS)
def test_both_namings_are_one_adapter(form: str, tiny: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    for naming in ("new", "published"):
        write_adapter(tmp_path / naming, tiny, form, naming=naming)
    new, old = tensors(tmp_path / "new"), tensors(tmp_path / "published")
    assert new.keys() != old.keys()
    prefix = "base_model.model."
    renamed = {prefix + canonical_name(key.removeprefix(prefix)): value for key, value in new.items()}
    assert renamed.keys() == old.keys()
    assert all(torch.equal(renamed[key], old[key]) for key in old)
    references = [Reference.load(tiny, adapters=[(tmp_path / naming, 1.0)]) for naming in ("new", "published")]
    # The same modules in the same order on both sides: nothing may round differently.
    np.testing.assert_array_equal(references[0].score(PAIRS), references[1].score(PAIRS))
    stacks = [AdapterStack.open([AdapterSpec(tmp_path / naming)], checkpoint) for naming in ("new", "published")]
    for name in checkpoint.names:
        assert torch.equal(stacks[0].merged(name), stacks[1].merged(name))


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_is_trained_and_of_realistic_size(
    form: str, tiny: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a", tiny, form)
    for key, value in tensors(tmp_path / "a").items():
        base = canonical_name(key.removeprefix("base_model.model.")).replace(".base_layer", "")
        if key.endswith("embed_tokens.base_layer.weight"):  # saved beside its update, itself untouched
            assert torch.equal(value, checkpoint.read(base))
        else:
            assert value.dtype == torch.float32
            assert value.isfinite().all()
            assert value.count_nonzero() == value.numel()
            if base in checkpoint.names:
                assert not torch.equal(value, checkpoint.read(base).float())
    stack = AdapterStack.open([AdapterSpec(tmp_path / "a")], checkpoint)
    ratios = {}
    for name in checkpoint.names:
        before = checkpoint.read(name).float()
        change = (stack.merged(name) - before).square().mean().sqrt() / before.square().mean().sqrt()
        if change:
            ratios[name] = float(change)
    assert ratios
    if form == "tokens":
        del ratios["model.embed_tokens.weight"]  # three rows of hundreds
    # An update of UPDATE of the tensor, rank 8 of widths from 16: its sample varies by about a third; ranks
    # and alphas of their own (`patterns`) change it by what they are, DoRA adds that of the magnitudes.
    low, high = (0.1 * UPDATE, 3 * UPDATE) if form == "patterns" else (UPDATE / 2.5, 2.5 * UPDATE)
    assert all(low < ratio < high for ratio in ratios.values()), ratios


def test_forms_reach_the_parts_they_are_named_after(tiny: Path, tmp_path: Path) -> None:
    def reached(form: str) -> str:
        write_adapter(tmp_path / form, tiny, form)
        return " ".join(tensors(tmp_path / form))

    assert "visual" not in reached("decoder")
    assert "visual.merger" in reached("vision-decoder")
    assert "lora_magnitude_vector" in reached("dora")
    assert "score.2.bias" in reached("score")
    assert "lora_embedding_A" in reached("embedding")
    assert "trainable_tokens_delta" in reached("tokens")
    assert "lora_B.bias" in reached("lora-bias")
    every, own = reached("bias-all"), reached("bias-lora-only")
    assert "fc1.base_layer.bias" in every
    assert "fc2.bias" in every
    assert "fc1.base_layer.bias" in own
    assert "fc2.bias" not in own
    reached("patterns")
    ranks = {value.shape[0] for key, value in tensors(tmp_path / "patterns").items() if "lora_A" in key}
    assert ranks == {2, 4, RANK}
    assert json.loads((tmp_path / "patterns" / "adapter_config.json").read_text())["alpha_pattern"]


def test_another_seed_is_another_adapter_and_the_same_seed_the_same(tiny: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_adapter(tmp_path / name, tiny, "plain", seed=seed)
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a)


def test_what_cannot_be_made_is_refused_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'lokr'; there are plain, rslora"):
        write_adapter(tmp_path / "a", tiny, "lokr")
    (tmp_path / "a" / "mine").mkdir(parents=True)
    with pytest.raises(OutputError, match="exists and is not empty"):
        write_adapter(tmp_path / "a", tiny, "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_command_line_knows_every_form() -> None:
    assert tuple(FORMS) == FORM_NAMES
