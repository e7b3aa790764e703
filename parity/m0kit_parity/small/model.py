"""The small checkpoint's shape and its files: configuration, saving in the published layout, loading.

Owns the numbers below, the two namings of the tensors and the prompt as token ids. The modules are
transformers' own (Qwen2VLModel) with the published head on top; nothing of the architecture is written here.

    model = load(folder)                      # fp32 from the fp16 files, nothing missing, nothing left over
    scores = model.score_documents(query, [text, image, Path("page.png")])      # in (0, 1)

A document or a query is a text or a PIL image.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from m0kit.files import read_regular
from m0kit.reading.decoding import open_image
from m0kit.reading.formats import MAX_IMAGE_BYTES
from m0kit_export.names import canonical_name

SCORE_TOKEN: Final = 100
LOGIT_BIAS: Final = 2.65
FP16_MAX: Final = 65504.0

Content = str | Image.Image


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token; KeyError when the tokenizer lacks it."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return int(found)


def config_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json as it is published for jina-reranker-m0 (flat), with small numbers."""

    def token(text: str) -> int:
        return token_id(tokenizer, text)

    return {
        "architectures": ["JinaVLForRanking"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "modeling.JinaVLForRanking"},
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": 192,
        "image_token_id": token("<|image_pad|>"),
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 32768,
        "max_window_layers": 6,
        "model_type": "qwen2_vl",
        "num_attention_heads": 6,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pad_token_id": token("<|endoftext|>"),
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [4, 6, 6], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "transformers_version": "4.47.1",
        "use_cache": False,
        "use_sliding_window": False,
        "video_token_id": token("<|video_pad|>"),
        "vision_config": {
            "depth": 4,
            "embed_dim": 128,
            "hidden_act": "quick_gelu",
            "hidden_size": 192,
            "in_channels": 3,
            "in_chans": 3,
            "mlp_ratio": 4,
            "model_type": "qwen2_vl",
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_token_id": token("<|vision_pad|>"),
        "vocab_size": tokenizer.get_vocab_size(),
    }


PREPROCESSOR: Final[dict[str, Any]] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 602112,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2VLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 602112, "shortest_edge": 3136},
    "temporal_patch_size": 2,
}


class Ranker(nn.Module):
    """Qwen2VLModel and the published head. Adapters see `model.language_model.…` and `score`."""

    def __init__(self, raw: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        super().__init__()
        known = {key: value for key, value in raw.items() if key not in ("architectures", "auto_map")}
        known["torch_dtype"] = "float32"
        self.model = Qwen2VLModel(Qwen2VLConfig(**known))
        width = raw["hidden_size"]
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = False
        self.processor = Qwen2VLImageProcessorPil(**{k: v for k, v in PREPROCESSOR.items() if k != "size"})

    @property
    def config_ids(self) -> tuple[int, int, int]:
        """Ids of vision start, image pad and vision end."""
        config = self.model.config
        return config.vision_start_token_id, config.image_token_id, config.vision_end_token_id

    @torch.no_grad()
    def score_pairs(self, pairs: Sequence[tuple[Content, Content]]) -> list[float]:
        """Logits, one pair at a time through transformers' own forward: no padding, no shortcut."""
        return [float(self._logit(query, document)) for query, document in pairs]

    def score_documents(self, query: Content, documents: Sequence[Content | Path]) -> list[float]:
        """sigmoid(logit − 2.65) of each document; a path is an image file."""
        opened = [_opened(d) if isinstance(d, Path) else d for d in documents]
        logits = torch.tensor(self.score_pairs([(query, d) for d in opened]))
        scores: list[float] = torch.sigmoid(logits - LOGIT_BIAS).tolist()
        return scores

    def _logit(self, query: Content, document: Content) -> Tensor:
        images = [part for part in (document, query) if not isinstance(part, str)]
        extra: dict[str, Any] = {}
        counts: list[int] = []
        if images:
            pixels = self.processor(images, return_tensors="pt")
            extra = {"pixel_values": pixels["pixel_values"], "image_grid_thw": pixels["image_grid_thw"]}
            counts = (pixels["image_grid_thw"].prod(-1) // 4).tolist()
        ids = torch.tensor([encode_prompt(self.tokenizer, query, document, counts)])
        if images:
            extra["mm_token_type_ids"] = (ids == self.config_ids[1]).int()
        hidden = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).last_hidden_state
        logit: Tensor = self.score(hidden[:, -1])[0, 0]
        return logit


def _opened(path: Path) -> Image.Image:
    return open_image(read_regular(path, MAX_IMAGE_BYTES), str(path)).convert("RGB")


def encode_prompt(tokenizer: Tokenizer, query: Content, document: Content, counts: Sequence[int]) -> list[int]:
    """Token ids of the published prompt with the score token. counts: visual tokens of the images in it.

    User text is data: a special token written in it is encoded as plain characters.
    """
    remaining = list(counts)
    start, pad, end = (token_id(tokenizer, f"<|{n}|>") for n in ("vision_start", "image_pad", "vision_end"))
    ids: list[int] = []
    pending = ""

    def flush() -> None:
        nonlocal pending
        if pending:
            tokenizer.encode_special_tokens = True
            ids.extend(tokenizer.encode(pending, add_special_tokens=False).ids)
            tokenizer.encode_special_tokens = False
        pending = ""

    for header, part in (("**Document**:\n", document), ("\n**Query**:\n", query)):
        pending += header
        if isinstance(part, str):
            pending += part
            continue
        flush()
        ids += [start, *[pad] * remaining.pop(0), end]
    flush()
    return [*ids, SCORE_TOKEN]


def build(tokenizer: Tokenizer) -> Ranker:
    """Random weights; the caller sets the seed."""
    return Ranker(config_dict(tokenizer), tokenizer)


def save(model: Ranker, folder: Path) -> None:
    """model.safetensors in half precision with the published names, config.json, preprocessor_config.json."""
    tensors = {
        canonical_name(name): value.detach().clamp(-FP16_MAX, FP16_MAX).to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.safetensors.part"
    save_file(tensors, str(temporary), metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(folder / "model.safetensors")
    for name, content in (("config.json", config_dict(model.tokenizer)), ("preprocessor_config.json", PREPROCESSOR)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Ranker:
    """The checkpoint in fp32. Every tensor of the file is used and none is missing."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Ranker(json.loads((folder / "config.json").read_text(encoding="utf-8")), tokenizer)
    stored = load_file(str(folder / "model.safetensors"))
    names = {canonical_name(name): name for name in model.state_dict()}
    model.load_state_dict({names[name]: value.float() for name, value in stored.items()}, strict=True)
    return model.eval()


def load_adapter(ranker: Ranker, folder: Path) -> Ranker:
    """The same model with a PEFT adapter's layers put in place (in `ranker` itself)."""
    wrapped = PeftModel.from_pretrained(ranker, str(folder))
    adapted: Ranker = wrapped.eval().base_model.model
    return adapted
