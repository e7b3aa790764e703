"""Outliers put into checkpoints: the scores stay, the activations show them, equalisation takes them out again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from m0kit.errors import CheckpointError, OutputError
from m0kit_export.checkpoint import open_checkpoint
from m0kit_parity.proof.cases import draw_page
from m0kit_parity.reference import PublishedNames, Reference
from m0kit_parity.samples.checkpoints import model_config, write_checkpoint
from m0kit_parity.samples.outliers import FRACTION, inject, outlier_scales, write_injected
from m0kit_quant.equalize import Rescaled, channel_groups, equalizing_scale

PAGE = draw_page(["Invoice 2041", "Total 118.20"], (112, 84), seed=3)
PAIRS = [
    ("Where is the red lamp?", "The lamp in the garden is red."),
    ("lamp", "The green chair is in the kitchen. The lamp in the cellar is blue."),
    ("What is the total?", PAGE),
    (PAGE, "The total is 118.20."),
]
# Powers of two round nothing, so on one machine the two are equal to the bit; where a library chooses another
# order of sums by the address of a tensor, some 100 roundings of 6e-8 are between them.
FP32_NOISE = 1e-5


class Stored:
    def __init__(self, folder):
        self.checkpoint = open_checkpoint(folder)
        self.config = self.checkpoint.config

    def read(self, name):
        return self.checkpoint.read(name).float().numpy()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():  # the models are small, and a second thread might add in another order
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def injected(tiny, small, tmp_path_factory):
    """Copies by (checkpoint, strength), each written once."""
    folder, made = tmp_path_factory.mktemp("injected"), {}

    def get(name, strength):
        if (name, strength) not in made:
            made[name, strength] = folder / f"{name}-{strength}"
            write_injected({"tiny": tiny, "small": small}[name], made[name, strength], strength)
        return made[name, strength]

    return get


@pytest.fixture(scope="module")
def observed(tiny, small, injected):
    """(scores, inputs of each group's consumers by its name) of a checkpoint by (name, strength or None)."""
    seen = {}

    def get(name, strength=None):
        if (name, strength) not in seen:
            source = {"tiny": tiny, "small": small}[name] if strength is None else injected(name, strength)
            seen[name, strength] = observe(source)
        return seen[name, strength]

    return get


def observe(folder):
    reference = Reference.load(folder)
    modules = PublishedNames(reference.core, reference.head)
    inputs = {group.name: [] for group in channel_groups(reference.config)}
    for group in channel_groups(reference.config):
        module = modules.get_submodule(group.consumers[0].removesuffix(".weight"))
        module.register_forward_pre_hook(
            lambda _module, given, to=inputs[group.name]: to.append(given[0].reshape(-1, given[0].shape[-1]).numpy())
        )
    scores = reference.score(PAIRS)
    return scores, {name: np.concatenate(rows) for name, rows in inputs.items()}


def channel_maxima(group, rows):
    largest = np.zeros(group.num_channels, np.float32)
    np.maximum.at(largest, group.columns, np.abs(rows).max(axis=0))
    return largest


def int8_error(x, matrix):
    """Relative error of x @ matrix.T with 8 bits per row of x and 7 per row of the matrix, each output by itself."""
    rounded = []
    for rows, levels in ((x, 127), (matrix, 63)):
        step = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30) / levels
        rounded.append(np.rint(rows / step) * step)
    exact = x @ matrix.T
    errors = np.square(rounded[0] @ rounded[1].T - exact).mean(axis=0) / np.square(exact).mean(axis=0)
    return float(np.sqrt(errors.mean()))


# --- the choice of channels ------------------------------------------------------------------------


def test_the_choice_depends_on_seed_and_name_alone():
    drawn = outlier_scales(model_config("tiny"), 32)
    again, deeper = outlier_scales(model_config("tiny"), 32), outlier_scales(model_config("tiny", num_layers=5), 32)
    other = outlier_scales(model_config("tiny"), 32, seed=1)
    assert drawn.keys() == {group.name for group in channel_groups(model_config("tiny"))}
    assert all(
        np.array_equal(scale, again[name]) and np.array_equal(scale, deeper[name]) for name, scale in drawn.items()
    )
    assert not all(np.array_equal(scale, other[name]) for name, scale in drawn.items())


@pytest.mark.parametrize(("strength", "factor"), [(2, 2), (10, 8), (32, 32), (1000, 1024), (1024, 1024)])
def test_the_factor_is_the_nearest_power_of_two_on_the_asked_share_of_channels(strength, factor):
    config = model_config("wide")
    for group in channel_groups(config):
        scale = outlier_scales(config, strength, fraction=0.05)[group.name]
        assert scale.dtype == np.float32
        assert set(scale.tolist()) == {1, 1 / factor}
        assert (scale != 1).sum() == max(1, round(0.05 * group.num_channels))


@pytest.mark.parametrize("strength", [0, 1, 1.5, 65537, -2, float("nan"), float("inf")])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength is {strength}"):
        outlier_scales(model_config("tiny"), strength)


@pytest.mark.parametrize("fraction", [-0.1, 0.6, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=f"fraction is {fraction}"):
        outlier_scales(model_config("tiny"), 8, fraction=fraction)


# --- what the copy computes ------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [2, 32, 1000])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_pytorch_gives_the_same_scores(observed, name, strength):
    (plain, _), (scores, _) = observed(name), observed(name, strength)
    assert np.ptp(plain) > 0.1  # the model tells these pairs apart, so a broken copy would be seen
    np.testing.assert_allclose(scores, plain, rtol=0, atol=FP32_NOISE)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_pytorch_notices_consumers_that_were_not_scaled(tiny, small, tmp_path, observed, monkeypatch, name):
    """That the scores above stay is due to the scaling on both sides, in this model and on these pairs."""
    read = Rescaled.read

    def forgets_columns(self, tensor):
        self._columns = {}
        return read(self, tensor)

    monkeypatch.setattr(Rescaled, "read", forgets_columns)
    write_injected({"tiny": tiny, "small": small}[name], tmp_path / "broken", 32)
    assert np.abs(observe(tmp_path / "broken")[0] - observed(name)[0]).max() > 0.01


@pytest.mark.parametrize("strength", [2, 32, 1000])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_activations_have_outliers_of_that_size(observed, injected, name, strength):
    (_, plain), (_, spiky) = observed(name), observed(name, strength)
    config = open_checkpoint(injected(name, strength)).config
    scales = outlier_scales(config, strength)
    for group in channel_groups(config):
        scale = scales[group.name]
        before, after = channel_maxima(group, plain[group.name]), channel_maxima(group, spiky[group.name])
        np.testing.assert_allclose(after * scale, before, rtol=FP32_NOISE, atol=FP32_NOISE * before.max())
        if np.mean(scale == 1) > 0.9:  # so few that the median is not about them
            chosen = scale != 1
            grown = (after[chosen] / np.median(after)) / (before[chosen] / np.median(before))
            np.testing.assert_allclose(grown, 1 / scale[chosen], rtol=0.1)


def test_the_largest_input_of_small_fits_into_float16(observed):
    """At 1024. On the real model it need not: its inputs are larger before anything is scaled."""
    _, spiky = observed("small", 1000)
    largest = {name: float(np.abs(rows).max()) for name, rows in spiky.items()}
    assert 1024 < max(largest.values()) < np.finfo(np.float16).max, largest


# --- what equalisation makes of it -----------------------------------------------------------------


@pytest.mark.parametrize("strength", [2, 32, 1000])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_weights_alone_tell_the_outliers_up_to_one_power_of_two(tiny, small, injected, name, strength):
    plain, spiky = Stored({"tiny": tiny, "small": small}[name]), Stored(injected(name, strength))
    for group in channel_groups(plain.config):
        outliers = outlier_scales(plain.config, strength)[group.name]
        before, found = equalizing_scale(plain, group), equalizing_scale(spiky, group)
        assert np.abs(np.log2(found * outliers / before)).max() <= 1, group.name


@pytest.mark.parametrize("calibrated", [False, True])
def test_eight_bits_lose_the_outliers_and_equalised_do_not(small, observed, injected, calibrated):
    plain, spiky = Stored(small), Stored(injected("small", 1000))
    (_, inputs), (_, spiky_inputs) = observed("small"), observed("small", 1000)
    ill, healed = [], []
    for group in channel_groups(plain.config):
        name, rows, x = group.consumers[0], inputs[group.name], spiky_inputs[group.name]
        scale = equalizing_scale(spiky, group, channel_maxima(group, x) if calibrated else None)[group.columns]
        before = int8_error(rows, plain.read(name))
        ill.append(int8_error(x, spiky.read(name)) / before)
        healed.append(int8_error(x / scale, spiky.read(name) * scale) / before)
    assert np.exp(np.mean(np.log(ill))) > 5
    assert np.exp(np.mean(np.log(healed))) < 1.05
    assert max(healed) < 1.5  # a channel's scale is off by up to √2, and it may be a group's most important one


# --- the files -------------------------------------------------------------------------------------


def formats(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (not a dict)
    return found


@pytest.mark.parametrize("strength", [2, 1000])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_every_tensor_is_stored_exactly(tiny, small, injected, name, strength):
    plain, copy = Stored({"tiny": tiny, "small": small}[name]), Stored(injected(name, strength))
    expected = inject(plain, plain.config, strength)
    assert copy.config == plain.config
    assert copy.checkpoint.names == plain.checkpoint.names
    for tensor in plain.checkpoint.names:
        assert np.array_equal(copy.read(tensor), expected.read(tensor)), tensor


def test_bfloat16_has_the_range_and_float16_gives_way_to_float32_where_it_has_not(injected, small):
    assert set(formats(injected("tiny", 1000)).values()) == {"BF16"}
    stored = formats(injected("small", 1000))
    assert set(stored.values()) == {"F16", "F32"}
    changed = {name for name, kind in stored.items() if kind == "F32"}
    columns = {name for group in channel_groups(Stored(small).config) for name in group.consumers}
    assert changed <= columns  # a column 1024 times smaller is subnormal; rows 1024 times larger are in range


def test_shards_naming_and_an_unused_head_stay(tmp_path):
    write_checkpoint(tmp_path / "source", "tiny", dtype="float16", naming="new", max_shard_bytes=60_000, lm_head=True)
    write_injected(tmp_path / "source", tmp_path / "copy", 1000, seed=5, fraction=0.1)
    names = lambda folder: sorted(path.name for path in (tmp_path / folder).iterdir())  # noqa: E731
    assert names("copy") == names("source")
    assert len([name for name in names("copy") if name.endswith(".safetensors")]) > 3
    plain, copy = Stored(tmp_path / "source"), Stored(tmp_path / "copy")
    assert formats(tmp_path / "copy").keys() == formats(tmp_path / "source").keys()
    assert any(name.startswith("model.language_model.") for name in formats(tmp_path / "copy"))
    assert copy.checkpoint.dropped == ("lm_head.weight",)
    expected = inject(plain, plain.config, 1000, seed=5, fraction=0.1)
    assert all(np.array_equal(copy.read(tensor), expected.read(tensor)) for tensor in copy.checkpoint.names)
    index = open_index(tmp_path / "copy")
    sizes = {"F16": 2, "F32": 4}
    stored = formats(tmp_path / "copy")
    total = sum(np.prod(copy.checkpoint.shape(t), dtype=int) * sizes[stored[spelled(t)]] for t in copy.checkpoint.names)
    head = plain.config.decoder.vocab_size * plain.config.decoder.hidden_size * 2
    assert index["metadata"]["total_size"] == total + head
    assert index["weight_map"] == open_index(tmp_path / "source")["weight_map"]


def spelled(name):
    if name.startswith("visual."):
        return f"model.{name}"
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def open_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))


def test_the_copy_says_what_it_is_and_keeps_its_licence(small, injected):
    copy = injected("small", 1000)
    assert open_checkpoint(copy).licence == open_checkpoint(small).licence == "apache-2.0"
    text = (copy / "README.md").read_text("utf-8")
    assert text.startswith((small / "README.md").read_text("utf-8"))
    assert f"{FRACTION:.2%} of the channels" in text
    assert "nearest to 1000" in text


def test_a_folder_that_exists_is_not_written_to(tiny, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="exists and is not empty"):
        write_injected(tiny, tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_checkpoint_leaves_nothing_behind(tiny, tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source, "tiny", num_layers=1, vision_depth=1)
    path = source / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = b"\xff\xff\xff\xff"  # NaN in the last tensor, found after the others were written
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="NaN"):
        write_injected(source, tmp_path / "copy", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
