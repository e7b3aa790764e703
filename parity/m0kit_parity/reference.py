"""The PyTorch reference: jina-reranker-m0 on transformers' Qwen2-VL modules, with the published scoring procedure.

What an artifact is held against, so it shares as little as it can with the runtime: prompts by transformers'
tokenizer, images by its `load_image` and Pillow processor, positions by its `get_rope_index`, adapters by
PEFT itself. From the exporter it takes only what reads and refuses: checkpoints with missing, unexpected or
mis-shaped tensors, tokenizers, and adapters whose patterns never end. No code of a checkpoint is ever run.

    reference = Reference.load("jinaai/jina-reranker-m0", adapters=[("./my-lora", 1.0)])
    reference.score([("slm markdown", Path("page.png"))])

One intended difference from the published code: text of a user never becomes a special token.
"""

import base64
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from m0kit.config import ModelConfig
from m0kit.errors import AdapterError, CheckpointError
from m0kit.files import read_regular
from m0kit.reading.decoding import open_image
from m0kit.reading.formats import MAX_IMAGE_BYTES
from m0kit.terminal import bar
from m0kit.trace import Trace
from m0kit_export.answers import open_tokenizer
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_export.folder import read_json_object
from m0kit_export.lora import CONFIG, WEIGHTS, peft_name, read_config
from m0kit_export.names import is_nested
from m0kit_export.patterns import try_patterns
from m0kit_export.skeleton import peft_at_work
from m0kit_export.tensors import read_header, read_tensor

PAD_ID = 0  # masked in every batch, so any token will do


class _Shell(nn.Module):
    """The model's parts under the names that an adapter was trained with; what PEFT is put on."""

    model: Any

    def get_input_embeddings(self) -> nn.Module:  # PEFT asks for them, as of any model of transformers
        embeddings: nn.Module = self.model.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> None:
        return None


class PublishedNames(_Shell):
    """As before transformers 4.52: `visual`, `model`, `score`."""

    def __init__(self, core: Qwen2VLModel, score: nn.Module) -> None:
        super().__init__()
        self.visual, self.model, self.score = core.visual, core.language_model, score


class NewNames(_Shell):
    """As since transformers 4.52: `model.visual`, `model.language_model`, `score`."""

    def __init__(self, core: Qwen2VLModel, score: nn.Module) -> None:
        super().__init__()
        self.model, self.score = core, score


def empty_model(checkpoint: Checkpoint) -> tuple[Qwen2VLModel, nn.Sequential]:
    """Backbone and head of a checkpoint's dimensions, without weights (on the device "meta")."""
    raw = read_json_object(checkpoint.folder / "config.json")
    known = _declared(raw, Qwen2VLConfig, Qwen2VLTextConfig)
    for section, kind in (("text_config", Qwen2VLTextConfig), ("vision_config", Qwen2VLVisionConfig)):
        if raw.get(section):
            known[section] = _declared(raw[section], kind)
    width = checkpoint.config.decoder.hidden_size
    try:
        with init_empty_weights(include_buffers=False):
            core = Qwen2VLModel(Qwen2VLConfig(**known, dtype="float32", attn_implementation="sdpa"))
    except Exception as error:  # transformers checks its fields, each in its own way
        raise CheckpointError(
            f"transformers makes no model of config.json in {checkpoint.folder.name} ({type(error).__name__}). Save "
            "the checkpoint again with transformers"
        ) from error
    with init_empty_weights(include_buffers=False):
        score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    return core, score


def _declared(raw: Mapping[str, Any], *kinds: type) -> dict[str, Any]:
    """Of a config what these classes declare as the model's; the others choose code, devices and dtypes to run it."""
    names = {"rope_scaling", "rope_theta", *(name for kind in kinds for name in kind.__annotations__)}
    return {name: raw[name] for name in raw if name in names}


@dataclass(frozen=True, slots=True)
class Inputs:
    """One pair as tensors."""

    token_ids: list[int]
    patches: list[torch.Tensor]  # (P, 1176) each
    grids: list[torch.Tensor]  # (3,) each


class Reference:
    """The model in PyTorch, fp32 unless said otherwise."""

    def __init__(
        self, core: Qwen2VLModel, score: nn.Module, checkpoint: Checkpoint, max_length: int | None = None
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self.core, self.head = core, score
        self._max_length = max_length or self.config.prompt.max_length
        self.tokenizer = _tokenizer(checkpoint)
        image = self.config.image
        self._processor = Qwen2VLImageProcessorPil(
            min_pixels=image.min_pixels,
            max_pixels=image.max_pixels,
            image_mean=list(image.mean),
            image_std=list(image.std),
            rescale_factor=image.rescale,
            patch_size=image.patch_size,
            temporal_patch_size=image.temporal_patch_size,
            merge_size=image.merge_size,
        )

    @classmethod
    def load(
        cls,
        source: str | Path,
        adapters: Sequence[tuple[str | Path, float]] = (),
        dtype: torch.dtype = torch.float32,
        *,
        device: str = "cpu",
        max_pixels: int | None = None,
        progress: bool = False,
    ) -> "Reference":
        """Load a checkpoint (folder or hub id) and apply adapters in order, each with its weight.

        `device` is PyTorch's name of where the model runs; prompts, images and positions are made on the CPU.
        All but the last adapter are merged by PEFT; the last stays what PEFT runs beside the base.
        Raises CheckpointError, AdapterError.
        """
        checkpoint = open_checkpoint(source)
        core, head = empty_model(checkpoint)
        shell, score = PublishedNames(core, head), cast(nn.Module, head)
        for name in bar(checkpoint.names, unit="tensor", desc="loading", shown=progress):
            _set(shell, name, checkpoint.read(name).to(device, dtype))
        if empty := [name for name, p in shell.named_parameters() if p.is_meta]:
            raise CheckpointError(f"{source}: the model has parameters that no tensor fills: {empty[:3]}")
        core.eval().to(device)  # its buffers: rotary frequencies stay float32
        for index, (path, weight) in enumerate(adapters):
            score = _apply(core, score, Path(path), weight, merge=index < len(adapters) - 1)
        reference = cls(core, score.eval(), checkpoint)
        if max_pixels is not None:
            reference._processor.size = {**dict(reference._processor.size), "longest_edge": max_pixels}
        return reference

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = next(self.core.parameters()).device
        return device

    @property
    def norm(self) -> NDArray[np.float32]:
        """The gain of the final norm (D,)."""
        gain: torch.Tensor = self.core.language_model.norm.weight
        return gain.detach().float().cpu().numpy()

    # --- scores ------------------------------------------------------------------------------------

    def score(self, pairs: Iterable[Any], raw: bool = False) -> NDArray[np.float32]:
        """Scores (or logits) of (query, document) pairs, one at a time and without padding."""
        logits = [self.logits(self._hidden([self.inputs(pair)])).item() for pair in pairs]
        return np.asarray(logits if raw else [self._normalise(logit) for logit in logits], np.float32)

    def compute_score(self, pairs: Sequence[Any], batch_size: int = 8) -> list[float]:
        """The published scoring call: batches padded on the left."""
        scores: list[float] = []
        for start in range(0, len(pairs), batch_size):
            batch = [self.inputs(pair) for pair in pairs[start : start + batch_size]]
            scores += [self._normalise(logit) for logit in self.logits(self._hidden(batch)).tolist()]
        return scores

    @torch.inference_mode()
    def trace(self, pair: Any, layers: bool = False) -> Trace:
        """Every stage of one pair."""
        inputs = self.inputs(pair)
        embeds = [
            self.core.visual(p.to(self.device), grid_thw=g[None].to(self.device)).pooler_output
            for p, g in zip(inputs.patches, inputs.grids, strict=True)
        ]
        seen: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda _module, _inputs, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
            )
            for layer in (self.core.language_model.layers if layers else [])
        ]
        try:
            hidden = self._hidden([inputs])
        finally:
            for hook in hooks:
                hook.remove()
        logit = self.logits(hidden).item()
        grids = torch.stack(inputs.grids) if inputs.grids else torch.zeros((0, 3), dtype=torch.int64)
        return Trace(
            token_ids=np.asarray(inputs.token_ids, np.int64),
            positions=self._positions([inputs])[0][:, 0].numpy(),
            grid_thw=grids.numpy(),
            patches=tuple(p.numpy() for p in inputs.patches),
            image_embeds=tuple(e.float().cpu().numpy() for e in embeds),
            hidden=hidden[0].float().cpu().numpy(),
            logit=logit,
            score=self._normalise(logit),
            layers=torch.stack(seen).float().cpu().numpy() if layers else None,
        )

    def _normalise(self, logit: float) -> float:
        return float(torch.sigmoid(torch.tensor(logit - self.config.prompt.logit_bias, dtype=torch.float64)))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (B, D) → (B,) float32"""
        out: torch.Tensor = self.head(hidden)[:, 0].float()
        return out

    def _hidden(self, batch: Sequence[Inputs]) -> torch.Tensor:
        """(B, D): the last position after the final norm, prompts padded on the left."""
        return self.hidden(self.feeds(batch))

    def feeds(self, batch: Sequence[Inputs]) -> dict[str, torch.Tensor | None]:
        """What transformers' model takes of a batch, where the model runs."""
        positions, token_ids, mask = self._positions(batch)
        patches = [p for inputs in batch for p in inputs.patches]
        grids = [g for inputs in batch for g in inputs.grids]
        made = {
            "input_ids": token_ids,
            "attention_mask": mask if len(batch) > 1 else None,
            "position_ids": positions,
            "pixel_values": torch.cat(patches) if patches else None,
            "image_grid_thw": torch.stack(grids) if grids else None,
        }
        return {name: None if value is None else value.to(self.device) for name, value in made.items()}

    @torch.inference_mode()
    def hidden(self, feeds: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        """(B, D) of what `feeds` made of B pairs."""
        out: torch.Tensor = self.core(**feeds, use_cache=False).last_hidden_state
        return out[:, -1]

    def _positions(self, batch: Sequence[Inputs]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Positions (3, B, T), token ids (B, T) and mask (B, T)."""
        longest = max(len(inputs.token_ids) for inputs in batch)
        padding = [longest - len(inputs.token_ids) for inputs in batch]
        token_ids = torch.tensor([[PAD_ID] * n + i.token_ids for n, i in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        grids = [g for inputs in batch for g in inputs.grids]
        positions, _ = self.core.get_rope_index(
            token_ids,
            mm_token_type_ids=(token_ids == self.config.prompt.image_pad_id).int(),
            image_grid_thw=torch.stack(grids) if grids else None,
            attention_mask=mask,
        )
        return positions, token_ids, mask

    # --- inputs ------------------------------------------------------------------------------------

    def inputs(self, pair: Any) -> Inputs:
        """The published prompt: document, query, score token; the document's image before the query's."""
        query, document = (pair["query"], pair["document"]) if isinstance(pair, Mapping) else pair
        prompt = self.config.prompt
        query, document = _content(query), _content(document)
        limit = max(self._max_length - prompt.max_query_length, prompt.max_query_length)
        if isinstance(document, str):
            cut = self.encode(document, limit)
            if len(cut) >= limit:
                document = self.tokenizer.decode(cut, skip_special_tokens=False)
        patches: list[torch.Tensor] = []
        grids: list[torch.Tensor] = []
        pieces: list[str | list[int]] = []
        for header, content in ((prompt.document_header, document), (prompt.query_header, query)):
            pieces.append(header)
            if isinstance(content, str):
                pieces.append(content)
                continue
            done = self._processor(images=[content], return_tensors="pt")
            patches.append(done["pixel_values"].to(next(self.core.parameters()).dtype))
            grids.append(done["image_grid_thw"][0])
            pads = int(grids[-1].prod()) // self.config.image.merge_size**2
            pieces.append([prompt.vision_start_id, *[prompt.image_pad_id] * pads, prompt.vision_end_id])
        token_ids: list[int] = []
        text = ""
        for piece in [*pieces, []]:
            if isinstance(piece, str):
                text += piece
                continue
            token_ids += self.encode(text)
            token_ids += piece
            text = ""
        return Inputs([*token_ids[: self._max_length - 1], prompt.score_token_id], patches, grids)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        ids: list[int] = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            truncation=max_length is not None,
            max_length=max_length,
        )["input_ids"]
        return ids


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    open_tokenizer(checkpoint.tokenizer.encode())  # refused before transformers and the library's own take it
    try:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(checkpoint.tokenizer))
    except Exception as error:  # the library raises plain Exception, here of what it can read and not write
        raise CheckpointError(
            f"the tokenizer of {checkpoint.source} cannot be used by transformers. Fetch it again"
        ) from error


def _content(value: Any) -> str | Image.Image:
    """Text, or an image as transformers would open it. The reference trusts its inputs."""
    if isinstance(value, Mapping):
        ((kind, value),) = value.items()
        if kind == "image" and isinstance(value, str):
            value = base64.b64decode(value.partition(",")[2])
    if isinstance(value, str | Image.Image):
        return value
    raw = value if isinstance(value, bytes) else read_regular(value, MAX_IMAGE_BYTES)
    image: Image.Image = load_image(open_image(raw, "an image"))
    return image


def _set(root: nn.Module, name: str, values: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if module.get_parameter(leaf).shape != values.shape:
        raise CheckpointError(
            f"{name} has shape {list(values.shape)}; the model takes {module.get_parameter(leaf).shape}"
        )
    setattr(module, leaf, nn.Parameter(values, requires_grad=False))


def _apply(core: Qwen2VLModel, score: nn.Module, path: Path, weight: float, merge: bool) -> nn.Module:
    """Let PEFT put an adapter into the model's modules; returns the head, which it may have replaced."""
    with tempfile.TemporaryDirectory(prefix="m0kit-adapter-") as plain:
        return _apply_plain(core, score, _as_peft_saves(path, Path(plain)), weight, merge)


def _as_peft_saves(path: Path, folder: Path) -> Path:
    """The adapter if PEFT would have saved it so, else a copy in `folder` under PEFT's names."""
    weights = path / WEIGHTS
    names = {key: peft_name(key, shape) for key, (shape, _) in read_header(weights).items()}
    raw = read_config(path, path.name)
    if raw.get("peft_type") and all(key == name for key, name in names.items()):
        return path
    tensors = {name: read_tensor(weights, key) for key, name in names.items() if name is not None}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({**raw, "peft_type": "LORA"}), "utf-8")
    return folder


def _apply_plain(core: Qwen2VLModel, score: nn.Module, path: Path, weight: float, merge: bool) -> nn.Module:
    keys = set(read_header(path / WEIGHTS))
    nested = is_nested(key.removeprefix("base_model.model.") for key in keys)
    shell = (NewNames if nested else PublishedNames)(core, score)
    raw = read_config(path, path.name)
    try_patterns(raw, [name for name, _ in shell.named_modules()], f"{CONFIG} of {path.name}")
    with peft_at_work(path.name, raw):  # what it only warns of is an error below
        wrapped = peft.PeftModel.from_pretrained(shell, str(path))
        placed = {_plain(key) for key in peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)}
    # PEFT may or may not have saved an adapted embedding with the base's own weights.
    spare = {key for key in keys if key.endswith("embed_tokens.base_layer.weight") and key in wrapped.state_dict()}
    if odd := placed.symmetric_difference(_plain(key) for key in keys - spare):
        raise AdapterError(f"{path}: tensors that PEFT did not place, or that it lacks: {sorted(odd)[:3]}")
    if weight != 1:
        for module in wrapped.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("default", weight)
    inner = wrapped.merge_and_unload() if merge else wrapped.eval().base_model.model
    head: nn.Module = inner.score
    return head


def _plain(key: str) -> str:
    return key.replace(".default.", ".")
