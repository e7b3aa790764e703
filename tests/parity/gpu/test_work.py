"""Operations of a pair: those that PyTorch counts in the reference, less what m0kit leaves out."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from m0kit_parity.gpu.work import decoder_flops, image_flops, pair_flops
from m0kit_parity.proof.cases import draw_page
from m0kit_parity.reference import Reference
from m0kit_parity.samples.checkpoints import model_config


def test_the_image_encoder_takes_what_pytorch_counts(tiny_reference: Reference) -> None:
    inputs, vision = tiny_reference.inputs(("a", draw_page(["a page"], (112, 84)))), tiny_reference.config.vision
    with FlopCounterMode(display=False) as counted:
        tiny_reference.core.visual(inputs.patches[0], grid_thw=inputs.grids[0][None])
    P = len(inputs.patches[0])
    attention = vision.depth * 2 * 2 * P * P * vision.width  # which it does not count on a CPU
    assert image_flops(tiny_reference.config, P) == counted.get_total_flops() + attention


def test_the_decoder_takes_what_pytorch_counts_but_for_rows_of_the_last_layer(tiny_reference: Reference) -> None:
    d, inputs = tiny_reference.config.decoder, tiny_reference.inputs(("which?", "a text of some length " * 20))
    T, inner = len(inputs.token_ids), d.num_heads * d.head_dim
    with FlopCounterMode(display=False) as counted:
        tiny_reference.logits(tiny_reference.hidden(tiny_reference.feeds([inputs])))
    unasked = (T - 1) * 2 * (2 * d.hidden_size * inner + 3 * d.hidden_size * d.intermediate_size)
    attention = (d.num_layers - 1) * 2 * 2 * inner * (T * (T + 1) // 2) + 2 * 2 * inner * T
    expected = counted.get_total_flops() - unasked + attention
    assert decoder_flops(tiny_reference.config, T) == expected


def test_kept_tokens_cost_their_attention_alone(tiny_reference: Reference) -> None:
    config = tiny_reference.config
    whole = decoder_flops(config, 300)
    assert decoder_flops(config, 12, kept=288) < whole / 10
    assert decoder_flops(config, 12, kept=288) > decoder_flops(config, 12)


@pytest.mark.parametrize(("tokens", "patches", "tera"), [(256, [], 0.67), (790, [3072], 7.6)])
def test_the_published_model_takes_what_is_known_of_it(tokens: int, patches: list[int], tera: float) -> None:
    assert pair_flops(model_config("full"), tokens, patches) / 1e12 == pytest.approx(tera, rel=0.06)
