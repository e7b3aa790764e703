"""What the runtime must know of a model: dimensions, image limits, prompt. Pure data, validated at birth.

Read from an artifact's manifest and written by the exporter, which took the values from the checkpoint's own files.
Owns no file access.

    read_manifest(folder).model.image.max_pixels        # 602112

Letters used for shapes everywhere in m0kit:
B pairs · T tokens, packed · I images · P patches of 14×14 pixels before merging · V = P/4 visual tokens ·
E vision width · D decoder width · H query heads · K key/value heads · C head width ·
1176 = 3 channels · 2 frames · 14 · 14.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

# What no model comes near: some loops and tables are as long as a number says, before any file can deny it.
_MOST: Final = {
    "num_layers": 1024,  # 28
    "depth": 1024,  # 32
    "vocab_size": 1 << 24,  # 151,936
    "max_positions": 1 << 24,  # 32,768
    "min_pixels": 1 << 24,  # 3,136; what is smaller is enlarged to so many
    "max_pixels": 1 << 31,  # 602,112; no image that is read has more than 89 million
}
_MOST_OTHERWISE: Final = 1 << 20  # widths, heads
_MOST_PROMPT: Final = 1 << 24  # tokens; 10,240


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Qwen2 decoder with grouped key/value heads and M-RoPE. Published values in the comments."""

    hidden_size: int  # D, 1536
    num_layers: int  # 28
    num_heads: int  # H, 12
    num_kv_heads: int  # K, 2
    head_dim: int  # C, 128
    intermediate_size: int  # 8960
    rms_norm_eps: float  # 1e-6
    rope_theta: float  # 1e6
    mrope_section: tuple[int, int, int]  # rotary pairs per axis (t, row, column): 16, 24, 24
    vocab_size: int  # 151936
    max_positions: int  # 32768

    def __post_init__(self) -> None:
        _require_sane(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section {list(self.mrope_section)} must add up to half of head_dim ({self.head_dim})"
            )

    @property
    def kv_size(self) -> int:
        """Width of one token's keys (or values) in one layer, K·C."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Qwen2-VL vision encoder with its 2×2 merger. Published values in the comments."""

    depth: int  # 32
    width: int  # E, 1280
    num_heads: int  # 16
    mlp_size: int  # 5120
    in_channels: int  # 3
    patch_size: int  # 14
    temporal_patch_size: int  # 2
    merge_size: int  # 2
    layer_norm_eps: float  # 1e-6
    rope_theta: float  # 10000

    def __post_init__(self) -> None:
        _require_sane(self)
        if self.width % self.num_heads or (self.width // self.num_heads) % 4:
            raise ValueError(
                f"vision width ({self.width}) must split into {self.num_heads} heads "
                "whose width is a multiple of 4 (rows and columns, sine and cosine)"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch: 1176 for the published model."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """Image preprocessing, as the checkpoint's preprocessor_config.json has it."""

    min_pixels: int  # 3136 = 4·28·28
    max_pixels: int  # 602112 = 768·28·28
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float  # 1/255
    patch_size: int  # 14
    temporal_patch_size: int  # 2
    merge_size: int  # 2

    def __post_init__(self) -> None:
        _require_sane(self)
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) must not exceed max_pixels ({self.max_pixels})")

    @property
    def factor(self) -> int:
        """Pixels per visual token and side: 28."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """The prompt of the published scoring procedure. The document comes first."""

    vision_start_id: int  # 151652
    vision_end_id: int  # 151653
    image_pad_id: int  # 151655
    score_token_id: int = 100
    logit_bias: float = 2.65  # score = sigmoid(logit − bias)
    document_header: str = "**Document**:\n"
    query_header: str = "\n**Query**:\n"
    max_length: int = 10240  # tokens of the whole prompt with the score token
    max_query_length: int = 512  # only ever used to derive the document limit

    def __post_init__(self) -> None:
        if self.max_length < 2 or self.max_query_length < 1:
            raise ValueError("max_length must be at least 2 and max_query_length at least 1")
        if self.max_length > _MOST_PROMPT:
            raise ValueError(f"max_length must be at most {_MOST_PROMPT}, got {self.max_length}")
        if not math.isfinite(self.logit_bias):
            raise ValueError(f"logit_bias must be finite, got {self.logit_bias}")
        if self.max_document_length + self.max_query_length > self.max_length:
            raise ValueError(
                f"document limit ({self.max_document_length}) + query limit ({self.max_query_length}) "
                f"must not exceed max_length ({self.max_length})"
            )

    @property
    def max_document_length(self) -> int:
        """Tokens of a text document: max(max_length − max_query_length, max_query_length), 9728."""
        return max(self.max_length - self.max_query_length, self.max_query_length)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All of it. `to_dict` is its form in the manifest."""

    decoder: DecoderConfig
    vision: VisionConfig
    image: ImageConfig
    prompt: PromptConfig

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            seen, eaten = getattr(self.image, name), getattr(self.vision, name)
            if seen != eaten:
                raise ValueError(f"preprocessing has {name} {seen}, the vision encoder {eaten}")
        for name in ("vision_start_id", "vision_end_id", "image_pad_id", "score_token_id"):
            if not 0 <= (number := getattr(self.prompt, name)) < self.decoder.vocab_size:
                raise ValueError(f"{name} is {number}, the vocabulary ends at {self.decoder.vocab_size - 1}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _require_sane(config: Any) -> None:
    """Numbers are positive, finite, and no larger than any model has them."""
    for field in fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if not math.isfinite(number):
                raise ValueError(f"{field.name} must be finite, got {value}")
            if number <= 0 and field.name != "mean":
                raise ValueError(f"{field.name} must be positive, got {value}")
            if isinstance(number, int) and number > (most := _MOST.get(field.name, _MOST_OTHERWISE)):
                raise ValueError(f"{field.name} must be at most {most}, got {value}")
