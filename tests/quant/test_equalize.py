"""Channels that may be scaled, scaling them, and the choice of the scale: against a small model in numpy."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.quant.layers import Layers, attention
from tests.quant.weights import Tensors, random_weights

from m0kit.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from m0kit_export.names import expected_shapes
from m0kit_parity.samples.checkpoints import model_config
from m0kit_quant.equalize import MAX_BITS, Rescaled, channel_groups, equalizing_scale

# The model below adds in float64, so scaling by powers of two leaves only roundings of 1e-16 in another order.
FLOAT64_NOISE = 1e-12
# Any other scale rounds each weight of float32 twice, by 6e-8 each; sums of a few dozen and a softmax grow it.
FLOAT32_NOISE = 1e-5


def config_of(kv_heads=2, repeats=3, pairs=(1, 1, 1), layers=1, inner=10, merge=2):
    head_dim = 2 * sum(pairs)
    heads = kv_heads * repeats
    return ModelConfig(
        DecoderConfig(heads * head_dim, layers, heads, kv_heads, head_dim, inner, 1e-6, 1e6, pairs, 50, 100),
        VisionConfig(layers, 8, 2, 12, 3, 2, 1, merge, 1e-6, 1e4),
        ImageConfig(16, 1024, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255, 2, 1, merge),
        PromptConfig(1, 2, 3, score_token_id=4),
    )


def forward(config, weights, seed=1):
    """What every layer adds and what the merger makes, on random inputs: all groups, without positions."""
    layers = Layers(weights)
    read, linear, layer_norm = layers.read, layers.linear, layers.layer_norm
    rng = np.random.default_rng(seed)
    v, d = config.vision, config.decoder
    outputs = []

    x = rng.standard_normal((2 * v.merge_size**2, v.width))
    for i in range(v.depth):
        block = f"visual.blocks.{i}"
        q, k, value = np.split(linear(f"{block}.attn.qkv", layer_norm(f"{block}.norm1", x)), 3, axis=1)
        outputs.append(linear(f"{block}.attn.proj", attention(q, k, value, v.head_dim)))
        h = linear(f"{block}.mlp.fc1", layer_norm(f"{block}.norm2", x))
        outputs.append(linear(f"{block}.mlp.fc2", h / (1 + np.exp(-1.702 * h))))
    h = layer_norm("visual.merger.ln_q", x).reshape(2, -1)
    outputs.append(linear("visual.merger.mlp.2", np.tanh(linear("visual.merger.mlp.0", h))))  # anything nonlinear

    x = rng.standard_normal((5, d.hidden_size))
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)
    for i in range(d.num_layers):
        layer = f"model.layers.{i}"
        h = normed * read(f"{layer}.input_layernorm.weight")
        q, k, value = (linear(f"{layer}.self_attn.{p}_proj", h) for p in "qkv")
        a = attention(q, k, value, d.head_dim)
        outputs.append(linear(f"{layer}.self_attn.o_proj", a, bias=False))
        h = normed * read(f"{layer}.post_attention_layernorm.weight")
        gate, up = (linear(f"{layer}.mlp.{p}_proj", h, bias=False) for p in ("gate", "up"))
        outputs.append(linear(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up, bias=False))
    return outputs


def largest_difference(ours, theirs):
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True))


def int8_error(x, matrix):
    """Relative error of x @ matrix.T with 8 bits per row of x and 7 per row of the matrix."""
    rounded = []
    for rows, levels in ((x, 127), (matrix, 63)):
        step = np.abs(rows).max(axis=1, keepdims=True) / levels
        rounded.append(np.rint(rows / step) * step)
    exact = x @ matrix.T
    return np.sqrt(np.square(rounded[0] @ rounded[1].T - exact).sum() / np.square(exact).sum())


def group_named(config, ending):
    return next(group for group in channel_groups(config) if group.name.endswith(ending))


# --- the groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tiny", "wide", "full"])
def test_groups_name_tensors_of_the_model_and_fit_their_shapes(shape):
    config = model_config(shape)
    shapes = expected_shapes(config)
    groups = channel_groups(config)
    assert len(groups) == 3 * config.vision.depth + 1 + 4 * config.decoder.num_layers
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        assert all(first + group.num_channels <= shapes[name][0] for name, first in group.producers)
        assert all(shapes[name][1] == len(group.columns) for name in group.consumers)
        assert np.array_equal(np.unique(group.columns), np.arange(group.num_channels))
        assert not group.columns.flags.writeable


def test_every_matrix_of_a_layer_whose_inputs_pass_nothing_nonlinear_is_a_consumer():
    config = model_config("tiny")
    taken = {name for group in channel_groups(config) for name in group.consumers}
    matrices = {name for name, shape in expected_shapes(config).items() if len(shape) == 2}
    nonlinear = {name for name in matrices if name.endswith(("fc2.weight", "merger.mlp.2.weight"))}
    assert matrices - taken == nonlinear | {"model.embed_tokens.weight", "score.0.weight", "score.2.weight"}


# --- scaling ---------------------------------------------------------------------------------------


@st.composite
def models(draw):
    pairs = draw(st.sampled_from([(1, 1, 1), (2, 1, 1)]))
    return config_of(
        kv_heads=draw(st.integers(1, 3)),
        repeats=draw(st.integers(1, 3)),
        pairs=pairs,
        layers=draw(st.integers(1, 2)),
        inner=draw(st.integers(1, 9)),
        merge=draw(st.integers(1, 3)),
    )


@given(models(), st.integers(0, 2**32), st.booleans())
def test_scaling_all_groups_at_once_preserves_the_function(config, seed, powers_of_two):
    weights, groups = random_weights(config, seed), channel_groups(config)
    rng = np.random.default_rng(seed)
    bits = {group.name: rng.uniform(-10, 10, group.num_channels) for group in groups}
    scales = {name: np.exp2(np.rint(b) if powers_of_two else b).astype(np.float32) for name, b in bits.items()}
    ours, theirs = forward(config, Rescaled(weights, groups, scales)), forward(config, weights)
    assert largest_difference(ours, theirs) < (FLOAT64_NOISE if powers_of_two else FLOAT32_NOISE)


def test_the_numpy_model_notices_a_consumer_that_was_forgotten():
    config = config_of()
    weights, groups = random_weights(config), channel_groups(config)
    before = forward(config, weights)
    for group in groups:
        scales = {group.name: np.full(group.num_channels, 2, np.float32)}
        for kept in [group.consumers[:i] + group.consumers[i + 1 :] for i in range(len(group.consumers))]:
            broken = Rescaled(weights, [replace(group, consumers=kept)], scales)
            assert largest_difference(forward(config, broken), before) > 1e-2, (group.name, kept)
        for kept in [group.producers[:i] + group.producers[i + 1 :] for i in range(len(group.producers))]:
            broken = Rescaled(weights, [replace(group, producers=kept)], scales)
            assert largest_difference(forward(config, broken), before) > 1e-2, (group.name, kept)


@given(st.integers(0, 2**32))
def test_powers_of_two_are_undone_to_the_bit(seed):
    config = config_of()
    weights, groups = random_weights(config, seed), channel_groups(config)
    rng = np.random.default_rng(seed)
    scales = {g.name: np.exp2(rng.integers(-12, 13, g.num_channels)).astype(np.float32) for g in groups}
    there = Rescaled(weights, groups, scales)
    back = Rescaled(there, groups, {name: 1 / scale for name, scale in scales.items()})
    for name, tensor in weights.tensors.items():
        assert back.read(name).dtype == np.float32
        assert np.array_equal(back.read(name), tensor)


def test_what_no_scale_touches_comes_back_itself_and_the_source_is_not_written_to():
    config = config_of()
    weights, groups = random_weights(config), channel_groups(config)
    for tensor in weights.tensors.values():
        tensor.setflags(write=False)
    scales = {group.name: np.ones(group.num_channels, np.float32) for group in groups}
    scales["visual.blocks.0.attn.v"][3] = 4
    scaled = Rescaled(weights, groups, scales)
    changed = {name for name, tensor in weights.tensors.items() if scaled.read(name) is not tensor}
    assert changed == {f"visual.blocks.0.attn.{name}" for name in ("qkv.weight", "qkv.bias", "proj.weight")}
    ours, theirs = scaled.read("visual.blocks.0.attn.qkv.bias"), weights.read("visual.blocks.0.attn.qkv.bias")
    assert np.array_equal(np.flatnonzero(ours != theirs), [2 * 8 + 3])  # in the last third, the values


@pytest.mark.parametrize(
    ("name", "scale", "said"),
    [
        ("model.norm", np.ones(36), "no such group"),
        ("model.layers.0.mlp.up_proj", np.ones(9), r"up_proj: has shape \[9\], not \[10\]"),
        ("model.layers.0.mlp.up_proj", np.zeros(10), "not a positive finite"),
        ("model.layers.0.mlp.up_proj", -np.ones(10), "not a positive finite"),
        ("model.layers.0.mlp.up_proj", np.full(10, np.nan), "not a positive finite"),
        ("model.layers.0.mlp.up_proj", np.full(10, np.inf), "not a positive finite"),
    ],
)
def test_a_scale_that_fits_nothing_is_refused(name, scale, said):
    config = config_of()
    with pytest.raises(ValueError, match=said):
        Rescaled(random_weights(config), channel_groups(config), {name: scale.astype(np.float32)})


# --- the choice ------------------------------------------------------------------------------------


def test_an_even_model_is_left_as_it_is():
    config = model_config("tiny")
    shapes = expected_shapes(config)
    even = Tensors({name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()})
    for group in channel_groups(config):
        for activation in (None, np.full(group.num_channels, 3.0)):
            assert np.all(equalizing_scale(even, group, activation) == 1), group.name


@pytest.mark.parametrize(("strength", "expected"), [(0.25, 4), (0.5, 16), (0.75, 64)])
def test_with_activations_it_is_the_formula_of_smoothquant(strength, expected):
    config = config_of(inner=4)
    group = group_named(config, "up_proj")
    weights = Tensors({"model.layers.0.mlp.down_proj.weight": np.ones((36, 4), np.float32)})
    scale = equalizing_scale(weights, group, np.array([3.0, 3.0, 3.0, 3.0 * 256]), strength)
    assert scale.dtype == np.float32
    assert scale.tolist() == [1, 1, 1, expected]


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_columns_as_small_as_their_inputs_are_large_take_all_of_it_at_any_strength(strength):
    config = config_of(inner=4)
    group = group_named(config, "up_proj")
    matrix = np.tile(np.array([1, 1, 1, 2.0**-8], np.float32), (36, 1))
    weights = Tensors({"model.layers.0.mlp.down_proj.weight": matrix})
    assert equalizing_scale(weights, group, np.array([1, 1, 1, 256.0]), strength).tolist() == [1, 1, 1, 256]


def test_the_usual_channel_keeps_one_whatever_the_medians_of_the_two_sides():
    config = config_of(inner=5)
    group = group_named(config, "up_proj")
    matrix = np.tile(np.exp2(np.array([0, 0, 0, 3, 3], np.float32)), (36, 1))
    weights = Tensors({"model.layers.0.mlp.down_proj.weight": matrix})
    # a/w is 1 on all but the third, where it is 2^5: s is 2^2.5, and halves are rounded to even
    assert equalizing_scale(weights, group, np.exp2([0.0, 0, 5, 3, 3])).tolist() == [1, 1, 4, 1, 1]


@pytest.mark.parametrize("factor", [2, 32, 1024])
@pytest.mark.parametrize("ending", ["input_layernorm", "post_attention_layernorm", "v_proj", "up_proj",
                                    "norm1", "norm2", "attn.v", "ln_q"])  # fmt: skip
def test_without_activations_it_undoes_outliers_up_to_one_power_of_two(ending, factor):
    config = model_config("tiny")
    weights, group = random_weights(config), group_named(config, ending)
    chosen = [1, group.num_channels - 2]
    outliers = np.ones(group.num_channels, np.float32)
    outliers[chosen] = 1 / factor
    plain = equalizing_scale(weights, group)
    found = equalizing_scale(Rescaled(weights, [group], {group.name: outliers}), group)
    bits = np.log2(found * outliers / plain)
    assert np.abs(bits[chosen]).max() <= 1
    assert np.abs(np.delete(bits, chosen)).max() <= 1


def test_what_another_group_does_to_the_rows_does_not_matter():
    config = model_config("tiny")
    weights, groups = random_weights(config), channel_groups(config)
    norm, values = group_named(config, "input_layernorm"), group_named(config, "v_proj")
    activation = np.exp(2 * np.random.default_rng(0).standard_normal(norm.num_channels))
    outliers = np.ones(values.num_channels, np.float32)
    outliers[5] = 1 / 1024
    spiky = Rescaled(weights, groups, {values.name: outliers})
    expected = equalizing_scale(weights, norm, activation)
    assert not np.all(expected == 1)
    assert np.array_equal(equalizing_scale(spiky, norm, activation), expected)


def test_without_activations_a_small_gain_alone_does_not_make_inputs_larger():
    """A residual stream with a few huge channels has small gains there, and columns as everywhere."""
    config = model_config("tiny")
    weights, group = random_weights(config), group_named(config, "input_layernorm")
    weights.tensors["model.layers.0.input_layernorm.weight"][[3, 40]] /= 32
    assert np.all(equalizing_scale(weights, group)[[3, 40]] == 1)


def test_a_group_without_gain_is_left_alone():
    """Rounding s to 2^±1 would make the largest columns twice as large and save nothing on the inputs."""
    config = config_of(inner=64)
    group = group_named(config, "up_proj")
    weights = Tensors({"model.layers.0.mlp.down_proj.weight": np.ones((36, 64), np.float32)})
    activation = np.full(64, 4.0)
    activation[:30] = 1.0  # the larger half stays the largest, and the smaller would ask for larger weights of others
    scale = equalizing_scale(weights, group, activation)
    assert np.all(scale == 1)


@pytest.mark.parametrize("calibrated", [False, True])
def test_int8_products_with_outliers_are_as_good_as_without(calibrated):
    config = model_config("tiny")
    weights, group = random_weights(config), group_named(config, "post_attention_layernorm")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, group.num_channels)) * weights.read(group.producers[0][0])
    outliers = np.ones(group.num_channels, np.float32)
    outliers[[7, 30]] = 1 / 1024
    spiky = Rescaled(weights, [group], {group.name: outliers})
    activation = np.abs(x / outliers).max(axis=0) if calibrated else None
    cured = equalizing_scale(spiky, group, activation)
    matrix = weights.read(group.consumers[0])
    plain = int8_error(x, matrix)
    ill = int8_error(x / outliers, matrix * outliers)
    healed = int8_error(x / outliers / cured, matrix * outliers * cured)
    assert ill > 10 * plain
    assert healed < 1.2 * plain  # a scale is off by √2 at most, on some of the channels


@given(st.integers(0, 2**32), st.sampled_from([0.0, np.nan, np.inf, 1e-38, 1e30]), st.booleans())
def test_dead_and_damaged_channels_keep_one_and_every_scale_is_a_sane_power_of_two(seed, value, calibrated):
    config = model_config("tiny")
    group = group_named(config, "up_proj")
    weights = random_weights(config, seed)
    rng = np.random.default_rng(seed)
    row, column = rng.choice(group.num_channels, 2, replace=False)
    weights.tensors[group.producers[0][0]][row] = value
    weights.tensors[group.consumers[0]][:, column] = 0
    activation = np.exp(3 * rng.standard_normal(group.num_channels))
    activation[row] = value
    with np.errstate(over="ignore", invalid="ignore"):
        scale = equalizing_scale(weights, group, activation if calibrated else None)
    mantissa, exponent = np.frexp(scale)
    assert np.all(mantissa == 0.5)
    assert np.all(np.abs(exponent - 1) <= MAX_BITS)
    assert scale[column] == 1
    if value in (0, np.inf) or np.isnan(value):
        assert scale[row] == 1


def test_a_dead_group_is_left_alone():
    config = config_of()
    dead = Tensors({name: np.zeros(shape, np.float32) for name, shape in expected_shapes(config).items()})
    for group in channel_groups(config):
        assert np.all(equalizing_scale(dead, group) == 1)


def test_only_one_tensor_is_in_use_at_a_time():
    config = model_config("tiny")
    source = random_weights(config)

    class OneAtATime:
        last = None

        def read(self, name):
            assert self.last is None or self.last() is None, f"{name} is read while another tensor is in use"
            tensor = source.read(name).copy()
            self.last = weakref.ref(tensor)
            return tensor

    for group in channel_groups(config):
        equalizing_scale(OneAtATime(), group)


@pytest.mark.parametrize(
    ("activation", "strength", "said"),
    [
        (np.ones(9), 0.5, r"up_proj: the activation has shape \[9\].* 10 channels"),
        (-np.ones(10), 0.5, "negative"),
        (None, 1.5, "strength is 1.5"),
        (None, float("nan"), "strength is nan"),
    ],
)
def test_bad_activations_and_strengths_are_refused(activation, strength, said):
    config = config_of()
    with pytest.raises(ValueError, match=said):
        equalizing_scale(random_weights(config), group_named(config, "up_proj"), activation, strength)
