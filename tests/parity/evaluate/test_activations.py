"""Statistics of activations are what their definitions say, of the tokens that they name."""

import numpy as np
import pytest
from PIL import Image

from m0kit.errors import InputError
from m0kit_parity.evaluate.activations import MASSIVE, activation_statistics, to_text
from m0kit_parity.reference import Reference


@pytest.fixture(scope="module")
def page():
    drawn = np.full((56, 84, 3), 255, np.uint8)
    drawn[3:9, 5:40] = 0
    return Image.fromarray(drawn)


def test_figures_are_those_of_the_hidden_states(tiny, page):
    reference = Reference.load(tiny)
    pairs = [("what it says", "a text"), ("what it says", page)]
    kept = {}

    def keep(module, inputs, output):
        kept.setdefault(id(module), []).append(output.reshape(-1, output.shape[-1]))

    layer, norm = reference.core.language_model.layers[1], reference.core.visual.blocks[1].norm2
    hooks = [module.register_forward_hook(keep) for module in (layer, norm)]
    found = activation_statistics(reference, pairs)
    for hook in hooks:
        hook.remove()
    assert found.pairs == 2
    residual = {one.place: one for one in found.residual}
    normed = {one.place: one for one in found.normed}
    assert list(residual) == [
        *("visual.patch_embed", "visual.blocks.0", "visual.blocks.1"),
        *("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2"),
    ]
    ratios = [float(x.abs().max() / x.abs().median()) for x in kept[id(layer)]]
    assert residual["model.layers.1"].ratio == pytest.approx(max(ratios), rel=1e-6)
    (image,) = kept[id(norm)]  # one pair has one
    largest = image.abs().amax(0)
    assert normed["visual.blocks.1.norm2"].ratio == pytest.approx(float(largest.max() / largest.median()), rel=1e-6)
    rows = image.abs().amax(1) / image.abs().median(1).values
    assert normed["visual.blocks.1.norm2"].row == pytest.approx(float(rows.median()), rel=1e-6)


def test_a_massive_activation_is_found_with_its_channel_and_its_tokens(tiny, page):
    reference = Reference.load(tiny)
    layers, blocks = reference.core.language_model.layers, reference.core.visual.blocks

    def spike(rows):
        def hook(module, inputs, output):
            flat = output.reshape(-1, output.shape[-1])  # a view
            flat[rows, 7] = -3 * MASSIVE * flat.abs().median()
            return output

        return hook

    hooks = [layers[0].register_forward_hook(spike([0, 2])), blocks[0].register_forward_hook(spike([5]))]
    found = {one.place: one for one in activation_statistics(reference, [("a cup", page)]).residual}
    for hook in hooks:
        hook.remove()
    (decoder,), (encoder,) = (found[place].massive for place in ("model.layers.0", "visual.blocks.0"))
    assert (decoder.channel, encoder.channel) == (7, 7)
    assert decoder.ratio == pytest.approx(3 * MASSIVE, rel=0.05)  # the median is of a few values more
    assert [count for _, count in decoder.tokens] == [1, 1]
    assert decoder.tokens[0][0] == "first token"
    assert encoder.tokens in ((("flat patch", 1),), (("other patch", 1),))
    assert found["model.layers.0"].massive_tokens == pytest.approx(2 / 14, abs=0.2)
    assert not found["visual.patch_embed"].massive


def test_no_pair_is_an_error(tiny):
    with pytest.raises(InputError, match="at least one pair"):
        activation_statistics(tiny, [])


def test_the_table_has_a_line_for_every_layer_and_norm(tiny, page):
    text = to_text(activation_statistics(tiny, [("a cup", page)]))
    for place in ("visual.blocks.1", "model.layers.2", "visual.merger.ln_q", "model.norm", "model.embed_tokens"):
        assert any(line.split()[:1] == [place] for line in text.splitlines())
