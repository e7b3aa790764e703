"""What a checkpoint's JSON files say of its model, as m0kit's own configuration.

Owns the layout of config.json in its old and new forms, of the preprocessing files and of the special tokens, and
refuses whatever it does not know. Knows nothing of tensors.

    read_settings(folder).config.decoder.num_layers
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from m0kit.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from m0kit.errors import CheckpointError
from m0kit.schema import fitting, parse
from m0kit_export.folder import read_json_object
from m0kit_export.tokenizer import TOKENIZER, read_tokenizer

# What a field that config.json leaves out means. A config saved by transformers omits what equals the
# defaults of its class, and transformers fills the same defaults when it loads; so these are the defaults
# of the classes (Qwen2VLTextConfig, Qwen2VLVisionConfig: those of a 72B model), not the values of the
# published 2B. Guessing the 2B's would turn an omitted rms_norm_eps of 1e-5 silently into 1e-6, while a
# wrong width, depth or vocabulary can never pass: the shapes of the tensors contradict it.
_TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
_VISION_DEFAULTS: Mapping[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TOKEN_DEFAULTS: Mapping[str, int] = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
}
_TOKEN_TEXTS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
}
_ROPE_THETA = 1e6  # Qwen2VLTextConfig.default_theta
_MROPE_SECTION = (16, 24, 24)  # Qwen2VLRotaryEmbedding, when rope_parameters has none
_VISION_ROPE_THETA = 1e4
_VISION_NORM_EPS = 1e-6  # fixed in Qwen2VLVisionBlock and PatchMerger

# compute_score of the published code hands these two to the processor whatever preprocessor_config.json
# says. A smaller limit in the file is taken as meant; a larger one (12845056, inherited from Qwen2-VL) the
# published scores have never seen.
_MIN_PIXELS = 4 * 28 * 28
_MAX_PIXELS = 768 * 28 * 28
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


class _Token(TypedDict):
    id: int
    content: str


class _Vocabulary(TypedDict, total=False):
    vocab: dict[str, int]


class _Tokenizer(TypedDict):
    """What is looked at of tokenizer.json."""

    model: _Vocabulary
    added_tokens: NotRequired[list[_Token]]


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the JSON files say."""

    config: ModelConfig
    raw: Mapping[str, Any]  # config.json
    quant_type: str | None  # "nf4" or "fp4" where linear layers are stored so by bitsandbytes
    ties_embeddings: bool  # the LM head is the embedding
    tokenizer: str  # as in tokenizer.json
    files: tuple[str, ...]  # those that were read


def read_settings(folder: Path) -> Settings:
    """Read and check them, against each other too. Raises CheckpointError."""
    raw = read_json_object(folder / "config.json")
    quant_type = _quant_type(raw)
    image_files, image = _read_image_config(folder)
    tokenizer_files, tokenizer = read_tokenizer(folder)
    tokens, highest = _read_token_ids(folder, raw, tokenizer, tokenizer_files[0])
    try:
        config = ModelConfig(
            decoder=decoder_config(raw),
            vision=vision_config(raw),
            image=image,
            prompt=PromptConfig(
                vision_start_id=tokens["vision_start_token_id"],
                vision_end_id=tokens["vision_end_token_id"],
                image_pad_id=tokens["image_token_id"],
            ),
        )
    except CheckpointError:
        raise
    except ValueError as error:  # our own sentences, from m0kit.config
        raise CheckpointError(f"{folder.name}: {error}. Correct config.json or the preprocessing file") from None
    output = (raw.get("vision_config") or {}).get("hidden_size", _VISION_DEFAULTS["hidden_size"])
    if output != config.decoder.hidden_size:
        raise CheckpointError(
            f"vision_config: hidden_size is {output!r:.40}, the decoder's is {config.decoder.hidden_size}: "
            "images would not fit between the words"
        )
    if highest >= config.decoder.vocab_size:
        raise CheckpointError(
            f"{tokenizer_files[0]} in {folder.name} has a token with the id {highest}, the vocabulary of config.json "
            f"ends at {config.decoder.vocab_size - 1}: the files are not of one model"
        )
    nested = raw.get("text_config")
    inner = nested.get("tie_word_embeddings") if isinstance(nested, dict) else None
    tied = raw.get("tie_word_embeddings", inner) is True
    return Settings(config, raw, quant_type, tied, tokenizer, ("config.json", *tokenizer_files, *image_files))


class _Section:
    """One object of a config file: typed fields, and messages that name file and field."""

    def __init__(self, where: str, values: object, defaults: Mapping[str, Any]) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} holds {values!r:.40}, expected an object")
        self.where, self.values, self.defaults = where, values, defaults

    def get(self, name: str) -> Any:
        return self.values[name] if name in self.values else self.defaults.get(name)

    def whole(self, name: str) -> int:
        value = self.get(name)
        if type(value) is float and value.is_integer():
            value = int(value)  # 602112.0: some tools write every number so
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise CheckpointError(f"{self.where}: {name} is {value!r:.40}, expected a whole number")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
            raise CheckpointError(f"{self.where}: {name} is {value!r:.40}, expected a number")
        return float(value)

    def triple(self, name: str) -> tuple[Any, Any, Any]:
        value = self.get(name)
        if not isinstance(value, list | tuple) or len(value) != 3:
            raise CheckpointError(f"{self.where}: {name} is {value!r:.60}, expected three numbers")
        for i, item in enumerate(value):
            _Section(self.where, {f"{name}[{i}]": item}, {}).number(f"{name}[{i}]")
        return value[0], value[1], value[2]

    def require(self, name: str, *accepted: object) -> None:
        value = self.get(name)
        if value not in accepted:
            raise CheckpointError(
                f"{self.where}: {name} is {value!r:.60}; jina-reranker-m0 has " + " or ".join(repr(a) for a in accepted)
            )


def _quant_type(raw: Mapping[str, Any]) -> str | None:
    """ "nf4" or "fp4" when config.json says that linear layers are stored so by bitsandbytes."""
    quantization = raw.get("quantization_config")
    if not quantization:
        return None
    where = "config.json: quantization_config"
    stated = _Section(where, quantization, {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"})
    method, quant_type = stated.get("quant_method"), stated.get("bnb_4bit_quant_type")
    if method != "bitsandbytes" or stated.get("load_in_8bit") or stated.get("load_in_4bit") is not True:
        kind = "bitsandbytes 8-bit" if stated.get("load_in_8bit") else f"{method!r:.40}"
        raise CheckpointError(
            f"{where} is of {kind}; of quantised checkpoints m0kit reads bitsandbytes 4-bit (load_in_4bit) "
            "alone. Dequantise this one and save it as bf16 or fp32"
        )
    if quant_type not in ("nf4", "fp4"):
        raise CheckpointError(f"{where}: bnb_4bit_quant_type is {quant_type!r:.40}; bitsandbytes has 'nf4' and 'fp4'")
    return str(quant_type)


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """From config.json, flat or nested. Raises CheckpointError."""
    top = _Section("config.json", raw, {})
    top.require("model_type", "qwen2_vl")
    id2label = raw.get("id2label")
    labels = raw.get("num_labels", len(id2label) if isinstance(id2label, dict) else 1)
    if labels not in (1, 2):  # 2 is transformers' default; the published code ignores it and has one logit
        raise CheckpointError(f"config.json: num_labels is {labels!r:.40}; a reranker gives one score")

    nested = raw.get("text_config")
    text = _Section("config.json" if nested is None else "text_config", nested or raw, _TEXT_DEFAULTS)
    if nested is not None:
        # transformers 4.52 to 4.57 wrote these fields at both levels and reads the inner one
        for name in _TEXT_DEFAULTS:
            if name in raw and raw[name] != text.get(name):
                raise CheckpointError(
                    f"config.json: {name} is {raw[name]!r:.40}, in its text_config {text.get(name)!r:.40}. "
                    "Remove the wrong one"
                )
    text.require("hidden_act", "silu")
    text.require("use_sliding_window", None, False)
    kinds = text.get("layer_types")
    if kinds and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise CheckpointError(
            f"{text.where}: layer_types is {kinds!r:.60}; jina-reranker-m0 has full attention everywhere"
        )
    hidden, heads = text.whole("hidden_size"), text.whole("num_attention_heads")
    if heads == 0 or hidden % heads:
        raise CheckpointError(f"{text.where}: hidden_size ({hidden}) does not split into {heads} heads")
    text.require("head_dim", None, hidden // heads)
    theta, section = _rope(text)
    return DecoderConfig(
        hidden_size=hidden,
        num_layers=text.whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads if text.get("num_key_value_heads") is None else text.whole("num_key_value_heads"),
        head_dim=hidden // heads,
        intermediate_size=text.whole("intermediate_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        rope_theta=theta,
        mrope_section=section,
        vocab_size=text.whole("vocab_size"),
        max_positions=text.whole("max_position_embeddings"),
    )


def _rope(text: _Section) -> tuple[float, tuple[int, int, int]]:
    """(theta, mrope_section) from rope_scaling (before transformers 5) or rope_parameters."""
    rope = _Section(
        f"{text.where}: rope_scaling",
        text.get("rope_scaling") or text.get("rope_parameters") or {},
        {"mrope_section": list(_MROPE_SECTION)},
    )
    rope.require("type", None, "mrope", "default")
    rope.require("rope_type", None, "mrope", "default")
    thetas = {float(section.number("rope_theta")) for section in (rope, text) if section.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise CheckpointError(f"{text.where}: rope_theta has two values, {sorted(thetas)}. Remove the wrong one")
    parts = {f"mrope_section[{i}]": part for i, part in enumerate(rope.triple("mrope_section"))}
    first, second, third = map(_Section(rope.where, parts, {}).whole, parts)
    return (thetas.pop() if thetas else _ROPE_THETA), (first, second, third)


def vision_config(raw: Mapping[str, Any]) -> VisionConfig:
    """From config.json. Raises CheckpointError."""
    vision = _Section("vision_config", raw.get("vision_config") or {}, _VISION_DEFAULTS)
    vision.require("model_type", None, "qwen2_vl", "qwen2_vl_vision")
    vision.require("hidden_act", "quick_gelu")
    channels = vision.whole("in_channels")
    vision.require("in_chans", None, channels)  # the name in the published file; transformers never read it
    width, ratio = vision.whole("embed_dim"), vision.number("mlp_ratio")
    rope = _Section("vision_config: rope_parameters", vision.get("rope_parameters") or {}, {})
    rope.require("rope_type", None, "axial", "default")
    theta = _VISION_ROPE_THETA if rope.get("rope_theta") is None else rope.number("rope_theta")
    patch = vision.whole("patch_size")
    vision.require("spatial_patch_size", None, patch)
    return VisionConfig(
        depth=vision.whole("depth"),
        width=width,
        num_heads=vision.whole("num_heads"),
        mlp_size=int(width * ratio),
        in_channels=channels,
        patch_size=patch,
        temporal_patch_size=vision.whole("temporal_patch_size"),
        merge_size=vision.whole("spatial_merge_size"),
        layer_norm_eps=_VISION_NORM_EPS,
        rope_theta=theta,
    )


def _read_token_ids(folder: Path, raw: Mapping[str, Any], text: str, file: str) -> tuple[dict[str, int], int]:
    """The special ids of config.json, and the highest of the tokenizer (`text`, from `file`).

    They must agree with the tokenizer where it names them.
    """
    stated = _Section("config.json", raw, _TOKEN_DEFAULTS)
    ids = {name: stated.whole(name) for name in _TOKEN_DEFAULTS}
    try:
        tokenizer = parse(text, wide=True)
    except ValueError as error:
        raise CheckpointError(f"{file} in {folder.name} is not readable JSON: {error}. Fetch it again") from None
    try:
        found = fitting(tokenizer, _Tokenizer)
    except ValueError as error:
        raise CheckpointError(f"{file} in {folder.name} is not a tokenizer ({error}). Fetch it again") from None
    known = {token["content"]: token["id"] for token in found.get("added_tokens", [])}
    for name, token in _TOKEN_TEXTS.items():
        if token in known and known[token] != ids[name]:
            raise CheckpointError(
                f"config.json: {name} is {ids[name]}, but {file} gives {token} the id "
                f"{known[token]}. The files are not of one model"
            )
        if token not in known and file != TOKENIZER:
            raise CheckpointError(
                f"{folder.name} has no {TOKENIZER}, and the files it would be made from do not name {token}: "
                "tokenizer_config.json is missing or not its own. Copy it, or tokenizer.json, from the published model"
            )
    return ids, max([*found["model"].get("vocab", {}).values(), *known.values()], default=0)


def _read_image_config(folder: Path) -> tuple[list[str], ImageConfig]:
    """(file names, preprocessing). transformers 5 nests it in processor_config.json."""
    found: dict[str, ImageConfig] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            raw = read_json_object(folder / name)
            values = raw.get("image_processor") if name == "processor_config.json" else raw
            if values is not None:
                found[name] = _image_config(name, values)
    if not found:
        raise CheckpointError(f"{folder.name} has no preprocessor_config.json. Copy it from the published model")
    if len(set(found.values())) > 1:
        raise CheckpointError(f"{' and '.join(found)} disagree about images. Remove the one out of date")
    return list(found), next(iter(found.values()))


def _image_config(where: str, raw: object) -> ImageConfig:
    values = _Section(
        where,
        raw,
        {
            "image_mean": list(_CLIP_MEAN),
            "image_std": list(_CLIP_STD),
            "rescale_factor": 1 / 255,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
    )
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        values.require(name, None, True)
    values.require("resample", None, _BICUBIC)
    size = _Section(f"{where}: size", values.get("size") or {}, {})

    def limit(name: str, edge: str, default: int) -> int:
        # the order of Qwen2VLImageProcessor: its own argument, then the size in either spelling
        for section, key in ((values, name), (size, edge), (size, name)):
            if section.get(key) is not None:
                return section.whole(key)
        return default

    mean, std = values.triple("image_mean"), values.triple("image_std")
    if not all(deviation > 0 for deviation in std):
        raise CheckpointError(f"{where}: image_std is {list(std)}, and pixels are divided by it. Correct the file")
    try:
        return ImageConfig(
            min_pixels=limit("min_pixels", "shortest_edge", _MIN_PIXELS),
            max_pixels=min(limit("max_pixels", "longest_edge", _MAX_PIXELS), _MAX_PIXELS),
            mean=(float(mean[0]), float(mean[1]), float(mean[2])),
            std=(float(std[0]), float(std[1]), float(std[2])),
            rescale=values.number("rescale_factor"),
            patch_size=values.whole("patch_size"),
            temporal_patch_size=values.whole("temporal_patch_size"),
            merge_size=values.whole("merge_size"),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}. Correct the file") from None
