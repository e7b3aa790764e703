"""A checkpoint of jina-reranker-m0, or of a fine-tune: its dimensions, and its tensors one at a time.

Owns which files hold the weights (shards, linear layers in bitsandbytes' 4 bits) and that they are those of the model
that `settings` describes, no more and no less. Weights stay memory-mapped: a tensor costs memory only while it is in
use. Never runs code of the checkpoint and never opens a pickle. Knows nothing about adapters.

    >>> checkpoint = open_checkpoint("jinaai/jina-reranker-m0")         # doctest: +SKIP
    >>> checkpoint.read("model.norm.weight").shape                      # doctest: +SKIP
    torch.Size([1536])
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from msgspec import Meta

from m0kit.config import DecoderConfig, ModelConfig
from m0kit.errors import CheckpointError
from m0kit.schema import fitting
from m0kit_export.folder import file_sha256, find_folder, find_licence, read_json_object
from m0kit_export.frequencies import powers
from m0kit_export.names import canonical_name, expected_shapes
from m0kit_export.packed import Packed, join_pieces, unpack
from m0kit_export.settings import read_settings
from m0kit_export.tensors import DTYPES, FLOATS, Stored, check_finite, read_header, read_raw, read_tensor
from m0kit_quant.nf4 import bitsandbytes_functional
from m0kit_quant.weights import EMBEDDING

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD_NAME = re.compile(r"[\w-][\w.-]{0,120}\.safetensors")
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_BUFFER = re.compile(r"(?:(?:model|visual)\.)(?:layers\.\d+\.self_attn\.)?rotary(?:_pos)?_emb\.(?:original_)?inv_freq")
_LM_HEAD = "lm_head.weight"


class _Index(TypedDict):
    """Which file holds a tensor, if there are several."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: exactly the tensors of `expected_shapes`, each with its shape."""

    source: str  # folder or hub id, as given
    folder: Path
    config: ModelConfig
    names: tuple[str, ...]  # canonical (published, before transformers 4.52), in the model's order
    dropped: tuple[str, ...]  # what the files hold and scoring has no use for: the LM head, rotary frequencies
    packed: tuple[str, ...]  # those of `names` that are stored in 4 bits: their rounding is in what is read
    licence: str | None  # "cc-by-nc-4.0"
    tokenizer: str = field(repr=False)  # as in tokenizer.json
    _stored: Mapping[str, Stored] = field(repr=False)
    _files: tuple[str, ...] = field(repr=False)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it. Raises CheckpointError for a name not in `names`."""
        return self._locate(name).shape

    def dtype(self, name: str) -> str:
        """In what one tensor is read, as safetensors spells it. Raises CheckpointError for a name not in `names`."""
        return self._locate(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU as stored (fp32, fp16 or bf16), mapped from its file: do not write into it.

        One that is stored in 4 bits is read as bitsandbytes reads it, in the dtype it was quantised from.
        Raises CheckpointError when it holds a NaN or an infinity, or the file changed since it was opened.
        """
        stored = self._locate(name)
        if isinstance(stored, Packed):
            tensor = unpack(stored, lambda piece: read_raw(self.folder / piece.file, piece.name))
            check_finite(tensor, stored.name, stored.file)
            return tensor
        tensor = read_tensor(self.folder / stored.file, stored.name)
        if tuple(tensor.shape) != stored.shape:
            raise CheckpointError(
                f"{stored.file} changed while in use: {stored.name} had shape {list(stored.shape)}, now has "
                f"{list(tensor.shape)}. Open the checkpoint again once nothing writes to it"
            )
        return tensor

    def num_bytes(self) -> int:
        """Bytes of all tensors in `names`, in the dtypes they are read in."""
        stored = (self._stored[name] for name in self.names)
        return sum(math.prod(s.shape) * DTYPES[s.dtype].itemsize for s in stored)

    def fingerprint(self) -> dict[str, str]:
        """sha256 (hex) of every file the checkpoint was read from, by file name. Reads all of them."""
        return {name: file_sha256(self.folder / name) for name in self._files}

    def _locate(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self.source} has no tensor {name!r} in use; see Checkpoint.names")
        return self._stored[name]


def open_checkpoint(source: str | Path, revision: str | None = None, cache_dir: Path | None = None) -> Checkpoint:
    """Read and check everything but the tensors' values.

    source: a folder, or a hub id "organisation/name", of which only weights, JSON files, README and licence
    are downloaded. revision and cache_dir concern hub ids only. Raises CheckpointError, and DependencyError
    when weights in 4 bits need bitsandbytes.
    """
    folder = find_folder(source, revision, cache_dir)
    settings = read_settings(folder)
    config = settings.config
    weight_files, stored = _read_headers(folder)
    if settings.quant_type is not None:
        bitsandbytes_functional()
        stored = join_pieces(stored, lambda piece: read_raw(folder / piece.file, piece.name))
        _check_quant_type(settings.quant_type, stored)
    layers, depth = config.decoder.num_layers, config.vision.depth
    if layers + depth > len(stored):  # also keeps a nonsense depth from filling the memory
        raise CheckpointError(
            f"config.json speaks of {layers} + {depth} layers, the files hold only {len(stored)} tensors"
        )
    stored, buffers = _without_buffers(folder, stored, config)
    names, dropped, in_use = _match_tensors(expected_shapes(config), stored, config.decoder, settings.ties_embeddings)
    return Checkpoint(
        source=str(source),
        folder=folder,
        config=config,
        names=names,
        dropped=(*dropped, *buffers),
        packed=tuple(name for name in names if isinstance(in_use[name], Packed)),
        licence=find_licence(folder, settings.raw),
        tokenizer=settings.tokenizer,
        _stored=in_use,
        _files=tuple(sorted({*settings.files, *weight_files})),
    )


def _read_headers(folder: Path) -> tuple[list[str], list[Stored]]:
    """Weight files (with the index) and everything they hold."""
    single, index = (folder / WEIGHTS).exists(), (folder / INDEX).exists()
    if single and index:
        raise CheckpointError(f"{folder.name} holds both {WEIGHTS} and {INDEX}: remove the one that is out of date")
    if not single and not index and (shards := _shards_without_index(folder)):
        return shards, [tensor for shard in shards for tensor in _stored_in(folder, shard)]
    if not single and not index:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder.name} holds its weights as a pickle ({pickles[0]}), which can run code when it is "
                "opened. Convert it with transformers' save_pretrained, which writes safetensors"
            )
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        found = f"; it holds {_some(others)}, which is no name of the published layout" if others else ""
        raise CheckpointError(f"{folder.name} holds neither {WEIGHTS} nor {INDEX}{found}")
    if single:
        return [WEIGHTS], _stored_in(folder, WEIGHTS)

    try:
        weight_map = fitting(read_json_object(folder / INDEX), _Index)["weight_map"]
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{INDEX} has no weight_map that says where each tensor is: {error}") from None
    for name, file in weight_map.items():
        if not _SHARD_NAME.fullmatch(file):
            raise CheckpointError(f"{INDEX} sends {name} to {file!r:.80}: expected the plain name of a shard")
    shards = sorted(set(weight_map.values()))
    stored: list[Stored] = []
    for shard in shards:
        if not (folder / shard).exists():
            raise CheckpointError(f"shard {shard} of {INDEX} is missing. Fetch it again")
        stored += _stored_in(folder, shard)
    for tensor in stored:
        if weight_map.get(tensor.name) != tensor.file:
            raise CheckpointError(
                f"{tensor.file} holds {tensor.name}, which {INDEX} "
                + ("expects elsewhere" if tensor.name in weight_map else "does not know")
                + ": index and shards are not of one model"
            )
    lost = sorted(set(weight_map) - {tensor.name for tensor in stored})
    if lost:
        raise CheckpointError(f"{weight_map[lost[0]]} lacks {_some(lost)}, promised by {INDEX}")
    return [INDEX, *shards], stored


def _shards_without_index(folder: Path) -> list[str]:
    """All of model-00001-of-0000N.safetensors, whose index was lost: it says nothing that they do not."""
    found = {path.name: match for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    if not found:
        return []
    totals = sorted({match[2] for match in found.values()})
    if len(totals) > 1:
        raise CheckpointError(
            f"{folder.name} holds shards of {' and of '.join(totals)} without {INDEX}: they are not of one model. "
            "Remove those that are out of date"
        )
    wanted = [f"model-{number:0{len(totals[0])}}-of-{totals[0]}.safetensors" for number in range(1, int(totals[0]) + 1)]
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"shard {_some(missing)} is missing, and {INDEX} too. Fetch them again")
    return wanted


def _stored_in(folder: Path, file: str) -> list[Stored]:
    header = read_header(folder / file)
    return [Stored(file, name, shape, dtype) for name, (shape, dtype) in header.items()]


def _without_buffers(folder: Path, stored: list[Stored], config: ModelConfig) -> tuple[list[Stored], tuple[str, ...]]:
    """(tensors, names of rotary frequencies), which are saved by old versions and must be those of the config."""
    d, v = config.decoder, config.vision
    buffers = [tensor for tensor in stored if _BUFFER.fullmatch(canonical_name(tensor.name))]
    for tensor in buffers:
        is_vision = canonical_name(tensor.name).startswith("visual.")
        theta, dim = (v.rope_theta, v.head_dim // 2) if is_vision else (d.rope_theta, d.head_dim)
        # The shape first: what config.json says has not been held against anything yet.
        fits = tensor.dtype in (*FLOATS, "F64") and tensor.shape == ((dim + 1) // 2,)
        if fits:
            values = read_tensor(folder / tensor.file, tensor.name)
            expected = torch.from_numpy(powers(theta, dim)).to(values.dtype)
            # Two units of the last place: another device may have rounded otherwise. Another theta is off by far more.
            limits = torch.finfo(values.dtype)
            fits = torch.allclose(values.double(), expected.double(), rtol=2 * limits.eps, atol=limits.smallest_normal)
        if not fits:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} holds other rotary frequencies than config.json describes "
                f"(rope_theta {theta:g}, {dim} values a head): the files are not of one model"
            )
    names = {tensor.name for tensor in buffers}
    return [tensor for tensor in stored if tensor.name not in names], tuple(sorted(names))


def _match_tensors(
    expected: Mapping[str, tuple[int, ...]], stored: list[Stored], decoder: DecoderConfig, tied: bool
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Stored]]:
    """(names, dropped, name → stored). Raises CheckpointError on anything missing, unknown or mis-shaped.

    `tied`: the LM head is the embedding, so that a file with either of the two has both.
    """
    allowed = {**expected, _LM_HEAD: (decoder.vocab_size, decoder.hidden_size)}
    found: dict[str, Stored] = {}
    for tensor in stored:
        name = canonical_name(tensor.name)
        if name in ("score.weight", "score.bias"):
            raise CheckpointError(
                f"{tensor.file} holds {tensor.name} {list(tensor.shape)}, a head of one linear layer, as "
                "AutoModelForSequenceClassification makes it; the head of jina-reranker-m0 is two with a ReLU between "
                "them (score.0, score.2). m0kit does not score with another head: fine-tune the published class"
            )
        if name not in allowed:
            raise CheckpointError(
                f"{tensor.file} holds {tensor.name}, which jina-reranker-m0 does not have. Quantised and "
                "adapted checkpoints must be merged to plain weights first"
            )
        if name in found:
            raise CheckpointError(
                f"{found[name].name} in {found[name].file} and {tensor.name} in {tensor.file} are the same "
                "tensor under two names. Remove one"
            )
        if tensor.shape != allowed[name]:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(allowed[name])}"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} is {tensor.dtype}; weights must be "
                f"{', '.join(FLOATS)}. Save the checkpoint unquantised"
            )
        found[name] = tensor
    if tied and EMBEDDING not in found and _LM_HEAD in found:
        found[EMBEDDING] = found.pop(_LM_HEAD)  # one tensor, saved under the name that came first
    missing = [name for name in expected if name not in found]
    if missing and all(name.startswith("score.") for name in missing):
        raise CheckpointError(f"the scoring head is missing ({_some(missing)}): this is a Qwen2-VL, not a reranker")
    if missing:
        raise CheckpointError(f"tensors are missing: {_some(missing)}. The checkpoint is incomplete")
    names = tuple(expected)
    dropped = tuple(name for name in found if name not in expected)
    return names, dropped, {name: found[name] for name in names}


def _check_quant_type(quant_type: str, stored: list[Stored]) -> None:
    """The tensors are what config.json says they are."""
    packed = [tensor for tensor in stored if isinstance(tensor, Packed)]
    if not packed:
        raise CheckpointError(
            "config.json has a quantization_config, but no tensor is stored in 4 bits. If the weights are plain "
            "ones, remove it"
        )
    for tensor in packed:
        if tensor.quant_type != quant_type:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} is {tensor.quant_type}, config.json says {quant_type}: "
                "the files are not of one model"
            )


def _some(names: list[str]) -> str:
    """A few of many names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
