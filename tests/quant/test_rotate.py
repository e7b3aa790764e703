"""The other basis: an orthogonal one, the same on every machine, in which a small model in numpy computes the same."""

import hashlib
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.quant.layers import Layers, attention
from tests.quant.weights import Tensors, random_weights

from m0kit.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from m0kit_export.names import expected_shapes
from m0kit_parity.samples.checkpoints import model_config
from m0kit_quant.rotate import Rotated, spread
from m0kit_quant.weights import EMBEDDING

# Of the published model, the small one and tiny: the decoder's stream and the image encoder's, which keeps ones.
STREAMS = [(1536, False), (1280, True), (192, False), (128, True), (64, False), (32, True)]
# Each of some 2·log₄(width) additions rounds by 1e-16, of values of up to √width.
EXACT = 1e-12
# Weights are rounded to float32 once more, by 6e-8 each; sums of a few dozen and a softmax grow it.
FLOAT32_NOISE = 1e-5


def config_of(hidden_heads=3, pairs=(1, 1, 1), vision=3, heads=1, layers=2, inner=10, merge=2):
    head_dim = 2 * sum(pairs)
    return ModelConfig(
        DecoderConfig(hidden_heads * head_dim, layers, hidden_heads, 1, head_dim, inner, 1e-6, 1e6, pairs, 50, 100),
        VisionConfig(layers, 4 * vision * heads, heads, 12, 3, 2, 1, merge, 1e-6, 1e4),
        ImageConfig(16, 1024, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255, 2, 1, merge),
        PromptConfig(1, 2, 3, score_token_id=4),
    )


def forward(config, weights, seed=1):
    """Image embeddings, residual stream, final hidden states and logits of a random image and text, in float64."""
    layers = Layers(weights)
    read, linear, layer_norm = layers.read, layers.linear, layers.layer_norm
    rng = np.random.default_rng(seed)
    v, d = config.vision, config.decoder

    def rms_norm(name, x):
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * read(f"{name}.weight")

    patches = rng.standard_normal((2 * v.merge_size**2, v.patch_values))
    x = patches @ read("visual.patch_embed.proj.weight").reshape(v.width, -1).T
    for i in range(v.depth):
        block = f"visual.blocks.{i}"
        q, k, value = np.split(linear(f"{block}.attn.qkv", layer_norm(f"{block}.norm1", x)), 3, axis=1)
        x = x + linear(f"{block}.attn.proj", attention(q, k, value, v.head_dim))
        h = linear(f"{block}.mlp.fc1", layer_norm(f"{block}.norm2", x))
        x = x + linear(f"{block}.mlp.fc2", h / (1 + np.exp(-1.702 * h)))
    h = layer_norm("visual.merger.ln_q", x).reshape(2, -1)
    embeds = linear("visual.merger.mlp.2", np.tanh(linear("visual.merger.mlp.0", h)))  # anything nonlinear

    x = np.concatenate([read(EMBEDDING)[rng.integers(0, d.vocab_size, 4)], embeds])
    for i in range(d.num_layers):
        layer = f"model.layers.{i}"
        h = rms_norm(f"{layer}.input_layernorm", x)
        q, k, value = (linear(f"{layer}.self_attn.{p}_proj", h) for p in "qkv")
        x = x + linear(f"{layer}.self_attn.o_proj", attention(q, k, value, d.head_dim), bias=False)
        h = rms_norm(f"{layer}.post_attention_layernorm", x)
        gate, up = (linear(f"{layer}.mlp.{p}_proj", h, bias=False) for p in ("gate", "up"))
        x = x + linear(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up, bias=False)
    hidden = rms_norm("model.norm", x)
    logits = linear("score.2", np.maximum(linear("score.0", hidden), 0))
    return embeds, x, hidden, logits


def difference(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


# --- the basis -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1536, 1280, 192, 128, 1, 2, 3, 7, 30, 1000])
@pytest.mark.parametrize("keeps_ones", [False, True])
def test_the_basis_is_orthogonal_and_its_own_inverse(width, keeps_ones):
    Q = spread(np.eye(width), width, keeps_ones=keeps_ones)
    assert Q.dtype == np.float64
    assert np.abs(Q @ Q.T - np.eye(width)).max() < EXACT
    assert np.abs(Q - Q.T).max() < EXACT
    if keeps_ones:
        assert np.ptp(Q.sum(axis=1)) < EXACT
        assert abs(abs(Q.sum(axis=1)[0]) - 1) < EXACT


@pytest.mark.parametrize(("width", "keeps_ones"), STREAMS)
def test_a_channel_is_spread_over_all_evenly(width, keeps_ones):
    """Its largest share is at most 1.5 times what equal shares would be; of a random basis it would be 3 to 4 times."""
    shares = np.abs(spread(np.eye(width), width, keeps_ones=keeps_ones))
    assert shares.max() * np.sqrt(width) < 1.5


def test_stretches_below_each_other_are_spread_each_by_itself():
    x = np.random.default_rng(0).standard_normal((3 * 12, 5)).astype(np.float32)
    each = [spread(part, 12) for part in np.split(x, 3)]
    assert np.array_equal(spread(x, 12), np.concatenate(each))
    assert x.dtype == np.float32  # and was not written to


# sha256 of the bytes: neither the order of additions nor a fused multiplication is a machine's to choose.
BYTES = {
    (1536, False): "1cae881664c07502",
    (1280, True): "87b3ebafe40f4009",
    (192, False): "b976a9753a43a257",
    (128, True): "02904251dc5c4865",
}


@pytest.mark.parametrize(("width", "keeps_ones"), BYTES)
def test_the_bytes_are_the_same_everywhere(width, keeps_ones):
    integers = np.random.Generator(np.random.SFC64(7)).integers(-(1 << 23), 1 << 23, (width, 9))
    turned = spread(integers * 2.0**-20, width, keeps_ones=keeps_ones)
    assert hashlib.sha256(turned.astype("<f8").tobytes()).hexdigest()[:16] == BYTES[width, keeps_ones]


# --- the weights -----------------------------------------------------------------------------------


@st.composite
def models(draw):
    return config_of(
        hidden_heads=draw(st.integers(1, 5)),
        pairs=draw(st.sampled_from([(1, 1, 1), (2, 1, 1)])),
        vision=draw(st.integers(1, 3)),
        heads=draw(st.sampled_from([1, 2])),
        layers=draw(st.integers(1, 2)),
        inner=draw(st.integers(1, 9)),
        merge=draw(st.integers(1, 3)),
    )


@given(models(), st.integers(0, 2**32))
def test_a_model_computes_the_same(config, seed):
    weights = random_weights(config, seed)
    embeds, stream, hidden, logits = forward(config, weights)
    new_embeds, new_stream, new_hidden, new_logits = forward(config, Rotated(weights, config))
    back = lambda x: spread(x.T, config.decoder.hidden_size).T  # noqa: E731
    assert difference(back(new_embeds), embeds) < FLOAT32_NOISE
    assert difference(back(new_stream), stream) < FLOAT32_NOISE
    assert difference(back(new_hidden) * weights.read("model.norm.weight"), hidden) < FLOAT32_NOISE
    assert difference(new_logits, logits) < FLOAT32_NOISE
    if config.decoder.hidden_size > 6:
        assert difference(new_stream, stream) > 0.1  # so the measure can see it


@pytest.mark.parametrize("shape", ["tiny", "wide"])
def test_every_tensor_keeps_its_shape_and_norms_become_plain(shape):
    config = model_config(shape)
    shapes = expected_shapes(config)
    small = {name: (4, *size[1:]) if name == EMBEDDING else size for name, size in shapes.items()}
    if shape == "wide":  # one matrix of each kind is enough
        small = {name: size for name, size in small.items() if ".0." in name or "norm" in name or name == EMBEDDING}
        small = {name: size for name, size in small.items() if int(np.prod(size)) < 1 << 23}
    weights = Tensors({name: np.ones(size, np.float32) for name, size in small.items()})
    rotated = Rotated(weights, config)
    same = set()
    for name, size in small.items():
        if name.endswith("bias") and f"{name.removesuffix('bias')}weight" not in small:
            continue
        read = rotated.read(name)
        assert read.shape == size
        assert read.dtype == np.float32
        if "norm" in name or "ln_q" in name:
            assert (read == (1 if name.endswith("weight") else 0)).all()
        elif read is weights.read(name):
            same.add(name)
    # What lies between two products, and the head behind its first: no channel of either is one of the stream.
    expected = {name for name in small if name.endswith("_proj.bias")}
    expected |= {"score.0.bias", "score.2.weight", "score.2.bias"}
    assert same == expected & small.keys()


def test_rows_and_columns_come_in_stretches_that_change_nothing(monkeypatch):
    """A stretch is what a thread works on at a time: here of one row, and of all."""
    config = config_of()
    weights = random_weights(config)
    whole = {name: Rotated(weights, config).read(name) for name in expected_shapes(config)}

    def one_by_one(fill, num_rows, _width):
        for row in range(num_rows):
            fill(row, row + 1)

    monkeypatch.setattr("m0kit_quant.rotate.by_rows", one_by_one)
    for name, tensor in whole.items():
        assert np.array_equal(Rotated(weights, config).read(name), tensor)


def test_a_massive_channel_is_none_in_the_other_basis():
    """Two channels of 3,000 that share out among 1,536 are 77 each at most, and of eight bits some are left."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 1536))
    x[:, 7] = 3000
    x[:, 1100] = -1000

    def rounded(rows):
        step = np.abs(rows).max(axis=1, keepdims=True) / 127
        return np.rint(rows / step) * step

    turn = partial(spread, width=1536)
    usual = np.ones(1536, bool)
    usual[[7, 1100]] = False
    plain, turned = (np.abs(y - x)[:, usual].mean() for y in (rounded(x), turn(rounded(turn(x.T).T).T).T))
    assert plain > 0.7  # nothing is left of them
    assert turned < plain / 3  # steps of 0.8 in place of 24
