"""The statistics of `activations` for an artifact: computed in numpy, one matrix of it in memory at a time.

A reference in PyTorch holds a whole model in float32, 9.6 GB of the published one, and would have to merge adapters
again; an artifact has them merged, and its data files are mapped. Owns the watching; what is counted is `activations`'.

    found = activations_of(Path("m0-bf16"), pairs)
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from m0kit.artifact.manifest import TOKENIZER
from m0kit.errors import InputError
from m0kit.scoring.tokens import open_tokenizer
from m0kit.terminal import bar
from m0kit_export.answers import Int64, Products, decode, encode
from m0kit_parity.evaluate.activations import (
    Activations,
    SeenNormed,
    SeenResidual,
    gathered,
    patch_labels,
    token_labels,
)
from m0kit_parity.evaluate.blame import PreparedPair, prepared_by
from m0kit_parity.evaluate.mixed import Side
from m0kit_quant.weights import Float32

# The first of the products that take what a norm hands on, and the norm.
_BEHIND: Final = (
    (r"(model\.layers\.\d+)\.self_attn\.q_proj", r"\1.input_layernorm"),
    (r"(model\.layers\.\d+)\.mlp\.gate_proj", r"\1.post_attention_layernorm"),
    (r"(visual\.blocks\.\d+)\.attn\.qkv", r"\1.norm1"),
    (r"(visual\.blocks\.\d+)\.mlp\.fc1", r"\1.norm2"),
    (r"(visual\.merger)\.mlp\.0", r"\1.ln_q"),
)


def activations_of(folder: Path, pairs: Sequence[tuple[Any, Any]], threads: int | None = None) -> Activations:
    """Statistics of an artifact in fp32 or bf16 over (query, document) pairs, which are cut short as `blame` does.

    Raises ArtifactError; InputError when no pair can be scored.
    """
    side = Side.open(folder)
    assert side.is_float
    found = prepared_by(folder, pairs, threads)
    if not found:
        raise InputError("statistics of activations need a pair that can be scored; there is none.")
    decoded = open_tokenizer((folder / TOKENIZER).read_bytes()).decode
    watch = _Watch(side)
    for pair in bar(found.values(), unit="pair", desc="activations"):
        watch.see(pair, token_labels(pair.tokens.token_ids.tolist(), side.manifest.model.prompt.image_pad_id, decoded))
    return gathered(len(found), watch.residual, watch.normed)


class _Watch(Products):
    """A forward pass that shows what lies between the products."""

    def __init__(self, side: Side) -> None:
        super().__init__(side.folder, side.graphs, lambda _: None)
        self.ways = 1  # of activations as they are, whatever form the weights have
        self._config = side.manifest.model
        self.residual: dict[str, SeenResidual] = {}
        self.normed: dict[str, SeenNormed] = {}
        self._labels: list[str] = []
        self._patches: list[str] = []
        self._begun: Float32 | None = None

    def see(self, pair: PreparedPair, labels: list[str]) -> None:
        """One pair, whose tokens are called so."""
        embeds = [np.zeros((1, 0, self._config.decoder.hidden_size), np.float32)]
        for patches, places in pair.images:
            self._labels = patch_labels([torch.from_numpy(patches)])
            embeds.append(encode(self, self._config, patches, places))
        self._labels = labels
        decode(self, self._config, [pair.tokens], np.concatenate(embeds, axis=1))

    def linear(self, name: str, x: Float32, *, bias: bool) -> Float32:
        for product, norm in _BEHIND:
            if match := re.fullmatch(product, name):
                rows = x[0].reshape(-1, self._config.vision.width) if name.startswith("visual.merger") else x[0]
                self.normed.setdefault(match.expand(norm), SeenNormed()).add(torch.from_numpy(rows))
        if self._begun is not None:  # by now with the embeddings of images
            begun, self._begun = self._begun, None
            self.after("model.embed_tokens", begun)
        y = x @ self.read(f"{name}.weight").T
        y = np.asarray(y + self.read(f"{name}.bias") if bias else y, np.float32)
        if name == "visual.patch_embed.proj":
            self.after("visual.patch_embed", y)
        return y

    def embedded(self, token_ids: Int64) -> Float32:
        self._begun = super().embedded(token_ids)
        return self._begun

    def after(self, layer: str, x: Float32) -> None:
        self.residual.setdefault(layer, SeenResidual()).add(torch.from_numpy(x[0]), self._labels)
