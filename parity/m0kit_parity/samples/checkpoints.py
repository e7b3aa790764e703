"""Random checkpoints in exactly the published layout, to prove things on where the real weights are not.

Random but *sensitive*: gains, biases and norms are scaled so that attention has contrast and scores of
different pairs spread over (0, 1); a wrong position, patch order or layer then shows. Streamed to disk one
slice at a time, so that `full` needs no more memory than `tiny`.

    write_checkpoint(Path("full"), "full")
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from m0kit.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from m0kit.files import named_errors, replacing, require_unoccupied
from m0kit.terminal import bar
from m0kit_export.names import expected_shapes, spelled
from m0kit_parity.samples.vocabulary import QWEN2_VOCAB_SIZE, write_qwen2_tokenizer, write_small_tokenizer

if TYPE_CHECKING:
    import torch

Shape = Literal["tiny", "wide", "full"]
DType = Literal["float32", "float16", "bfloat16"]
Naming = Literal["published", "new"]  # before and after transformers 4.52
ConfigForm = Literal["published", "defaults_left_out", "nested"]

# Bias of the head's last layer that brings the middle of the logits of seed 0 to 2.65, the middle of the
# scores to one half. Measured: deep random networks give all prompts a common direction.
HEAD_BIAS = {"tiny": 4.3, "wide": 1.4, "full": -4.5}
_SLICE = 1 << 24  # values drawn at once
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def model_config(shape: Shape, num_layers: int | None = None, vision_depth: int | None = None) -> ModelConfig:
    """Dimensions of a random checkpoint; `wide` has the published widths and few layers."""
    image = ImageConfig(3136, 602112, _MEAN, _STD, 0.00392156862745098, 14, 2, 2)
    if shape == "tiny":
        vocab = 384
        decoder = DecoderConfig(64, num_layers or 3, 4, 2, 16, 96, 1e-6, 1e6, (2, 3, 3), vocab, 32768)
        vision = VisionConfig(vision_depth or 2, 32, 4, 128, 3, 14, 2, 2, 1e-6, 1e4)
        first_special = vocab - 14
    else:
        layers, depth = (28, 32) if shape == "full" else (2, 2)
        decoder = DecoderConfig(1536, num_layers or layers, 12, 2, 128, 8960, 1e-6, 1e6, (16, 24, 24), 151936, 32768)
        vision = VisionConfig(vision_depth or depth, 1280, 16, 5120, 3, 14, 2, 2, 1e-6, 1e4)
        first_special = QWEN2_VOCAB_SIZE
    # In the order of the published special tokens: vision_start is the tenth.
    prompt = PromptConfig(first_special + 9, first_special + 10, first_special + 12)
    return ModelConfig(decoder, vision, image, prompt)


def write_checkpoint(
    folder: Path,
    shape: Shape,
    *,
    seed: int = 0,
    dtype: DType = "bfloat16",
    num_layers: int | None = None,
    vision_depth: int | None = None,
    naming: Naming = "published",
    config_form: ConfigForm = "published",
    max_shard_bytes: int = 2 << 30,
    lm_head: bool | None = None,
    device: str | None = None,
    progress: bool = False,
) -> ModelConfig:
    """Write a checkpoint folder, aside first, renamed when complete; returns its dimensions.

    Values depend on `seed` and the tensor's name alone, not on naming, sharding or the number of layers. `device` has
    PyTorch draw them there, which takes seconds on a GPU: other values, and those of that device and PyTorch alone.
    `lm_head` adds the tensor that the published files very likely hold and scoring has no use for
    (default: for `full` only). Raises OutputError when the folder is not empty.
    """
    require_unoccupied(folder)
    config = model_config(shape, num_layers, vision_depth)
    shapes = expected_shapes(config)
    if lm_head or (lm_head is None and shape == "full"):
        shapes["lm_head.weight"] = (config.decoder.vocab_size, config.decoder.hidden_size)
    with replacing(folder) as aside, named_errors(folder):
        _write_weights(aside, shapes, seed, HEAD_BIAS[shape], dtype, naming, max_shard_bytes, device, progress)
        raw = config_json(config, dtype, config_form)
        (aside / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
        (aside / "preprocessor_config.json").write_text(json.dumps(_preprocessor(config.image), indent=2), "utf-8")
        (aside / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\nRandom weights.\n", "utf-8")
        if shape == "tiny":
            write_small_tokenizer(aside, config.decoder.vocab_size)
        else:
            write_qwen2_tokenizer(aside)
    return config


def _write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    head_bias: float,
    dtype: DType,
    naming: Naming,
    max_shard_bytes: int,
    device: str | None,
    progress: bool,
) -> None:
    """Shards as transformers cuts them: a new file when the next tensor would pass the limit, and an index."""
    import torch

    from m0kit_parity.samples.safetensors import write

    torch_type: torch.dtype = getattr(torch, dtype)

    def drawn(shard: Mapping[str, tuple[int, ...]], written: Any) -> Iterator[torch.Tensor]:
        for name, shape in shard.items():
            if device is not None:
                yield draw_on(device, name, shape, seed, head_bias).to(torch_type).cpu()
                written.update(math.prod(shape) * torch_type.itemsize)
                continue
            for values in draw(name, shape, seed, head_bias):
                yield torch.from_numpy(values).to(torch_type)
                written.update(values.size * torch_type.itemsize)

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = max_shard_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * torch_type.itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = shape
        room -= size
    total = sum(math.prod(shape) for shape in shapes.values()) * torch_type.itemsize
    places: dict[str, str] = {}
    with bar(total=total, unit="B", unit_scale=True, desc="writing", shown=progress) as written:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            header = {spelled(name, nested=naming == "new"): (torch_type, shape) for name, shape in shard.items()}
            places |= dict.fromkeys(header, file)
            write(folder / file, header, drawn(shard, written))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")


def draw(name: str, shape: tuple[int, ...], seed: int, head_bias: float) -> Iterator[NDArray[np.float32]]:
    """The values of one tensor, flat, in slices."""
    rng = np.random.Generator(np.random.SFC64([seed, *name.encode()]))
    centre, spread = _scale(name, shape, head_bias)
    left = math.prod(shape)
    while left:
        values = rng.standard_normal(min(left, _SLICE), np.float32)
        values *= np.float32(spread)
        values += np.float32(centre)
        left -= len(values)
        yield values


def draw_on(device: str, name: str, shape: tuple[int, ...], seed: int, head_bias: float) -> "torch.Tensor":
    """The same kind of values from PyTorch's generator of a device, float32 there."""
    import torch

    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    centre, spread = _scale(name, shape, head_bias)
    values = torch.empty(shape, device=device)
    return values.normal_(0, 1, generator=generator).mul_(spread).add_(centre)


def _scale(name: str, shape: tuple[int, ...], head_bias: float) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values.

    A matrix of gain g (deviation g/√in) keeps normalised inputs at deviation g. Queries and keys get more,
    so that attention prefers some tokens; what adds to the residual stream gets less, so that it grows
    slowly. The last layer of the head spreads logits by about 2, so scores over all of (0, 1).
    """
    if name == "score.2.bias":
        return head_bias, 0.0
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    if "norm" in name or "ln_q" in name:
        return (0.0, 0.2) if name.endswith("bias") else (1.0, 0.25)
    if name.endswith("bias"):
        return 0.0, 0.5 if "_proj" in name or "qkv" in name else 0.1
    if "embed_tokens" in name or "lm_head" in name:
        return 0.0, 1.0
    gains = {"q_proj": 1.6, "k_proj": 1.6, "qkv": 1.3, "o_proj": 0.7, "attn.proj": 0.7, "down_proj": 0.8, "fc2": 0.7}
    gain = next((g for key, g in gains.items() if key in name), 4.0 if name == "score.2.weight" else 1.2)
    return 0.0, gain / math.sqrt(fan_in)


def config_json(config: ModelConfig, dtype: DType, form: ConfigForm) -> dict[str, Any]:
    """What config.json of such a checkpoint says."""
    d, v, p = config.decoder, config.vision, config.prompt
    flat: dict[str, Any] = {
        "architectures": ["JinaVLForRanking"],
        "auto_map": {"AutoModel": "modeling.JinaVLForRanking"},
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": d.hidden_size,
        "image_token_id": p.image_pad_id,
        "initializer_range": 0.02,
        "intermediate_size": d.intermediate_size,
        "max_position_embeddings": d.max_positions,
        "model_type": "qwen2_vl",
        "num_attention_heads": d.num_heads,
        "num_hidden_layers": d.num_layers,
        "num_key_value_heads": d.num_kv_heads,
        "rms_norm_eps": d.rms_norm_eps,
        "rope_scaling": {"mrope_section": list(d.mrope_section), "type": "mrope"},
        "rope_theta": d.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_sliding_window": False,
        "video_token_id": p.image_pad_id + 1,
        "vision_config": {
            "depth": v.depth,
            "embed_dim": v.width,
            "hidden_act": "quick_gelu",
            "hidden_size": d.hidden_size,
            "in_channels": v.in_channels,
            "in_chans": v.in_channels,
            "mlp_ratio": v.mlp_size // v.width,
            "model_type": "qwen2_vl",
            "num_heads": v.num_heads,
            "patch_size": v.patch_size,
            "spatial_merge_size": v.merge_size,
            "temporal_patch_size": v.temporal_patch_size,
        },
        "vision_end_token_id": p.vision_end_id,
        "vision_start_token_id": p.vision_start_id,
        "vocab_size": d.vocab_size,
    }
    if form == "published":
        return flat
    from transformers import Qwen2VLConfig

    if form == "nested":
        known = {key: value for key, value in flat.items() if key != "auto_map"}
        nested: dict[str, Any] = Qwen2VLConfig(**known).to_dict()
        return nested | {"architectures": ["JinaVLForRanking"]}
    # As transformers 4 saved it: what equals the default of its class is left out.
    text = {"hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "attention_dropout": 0.0,
            "initializer_range": 0.02, "use_sliding_window": False, "tie_word_embeddings": False}  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "hidden_act": "quick_gelu", "mlp_ratio": 4, "num_heads": 16,
              "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    short = {key: value for key, value in flat.items() if key not in text or text[key] != value}
    short["vision_config"] = {
        key: value for key, value in flat["vision_config"].items() if key not in vision or vision[key] != value
    }
    return short


def _preprocessor(image: ImageConfig) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(image.mean),
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": list(image.std),
        "max_pixels": image.max_pixels,
        "merge_size": image.merge_size,
        "min_pixels": image.min_pixels,
        "patch_size": image.patch_size,
        "processor_class": "Qwen2VLProcessor",
        "resample": 3,
        "rescale_factor": image.rescale,
        "size": {"longest_edge": image.max_pixels, "shortest_edge": image.min_pixels},
        "temporal_patch_size": image.temporal_patch_size,
    }
