"""What a pair takes: floating-point operations of the products and of attention, from the model's dimensions alone.

Owns the count. A multiplication with its addition is two. Left out is what is not a product (norms, rotations,
activations: under a percent) and what m0kit does not compute: in the last layer every row but the last.

    pair_flops(config, 790, [3072])        # a page of 768 visual tokens with its prompt
"""

from collections.abc import Sequence

from m0kit.config import ModelConfig
from m0kit.scoring.prepare import Prepared


def pair_flops(config: ModelConfig, num_tokens: int, patches: Sequence[int] = ()) -> float:
    """Operations of one pair of so many tokens, visual ones included, with images of so many patches each."""
    return sum(image_flops(config, count) for count in patches) + decoder_flops(config, num_tokens)


def image_flops(config: ModelConfig, num_patches: int) -> float:
    """Operations of the image encoder: every patch sees every other one of its image."""
    v, width = config.vision, config.vision.width
    block = 2 * (4 * width * width + 2 * width * v.mlp_size) + 4 * num_patches * width
    merged = width * v.merge_size**2
    merger = 2 * (merged * merged + merged * config.decoder.hidden_size) / v.merge_size**2
    return num_patches * (2 * v.patch_values * width + v.depth * block + merger)


def decoder_flops(config: ModelConfig, num_tokens: int, kept: int = 0) -> float:
    """Operations of the decoder and the head for `num_tokens` tokens behind `kept` ones whose keys are there."""
    d = config.decoder
    width, inner = d.hidden_size, d.num_heads * d.head_dim
    keys = 2 * 2 * width * d.num_kv_heads * d.head_dim
    rest = 2 * (2 * width * inner + 3 * width * d.intermediate_size)
    seen = num_tokens * kept + num_tokens * (num_tokens + 1) / 2
    layers = (d.num_layers - 1) * (num_tokens * rest + 4 * inner * seen) + d.num_layers * num_tokens * keys
    return layers + rest + 4 * inner * (kept + num_tokens) + 2 * width * (width + 1)


def prepared_flops(config: ModelConfig, pair: Prepared) -> float:
    """Operations of a pair as it was prepared, nothing kept."""
    images = [*pair.document.images, *pair.images]
    return pair_flops(config, len(pair.prompt.token_ids), [int(image.grid_thw.prod()) for image in images])
