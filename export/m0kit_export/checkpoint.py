"""A checkpoint of jina-reranker-m0, or of a fine-tune: its dimensions, and its tensors one at a time.

Owns the layout of the published files (config.json in its old and new forms, the two namings of tensors,
shards, linear layers in bitsandbytes' 4 bits) and refuses whatever it does not know. Weights stay
memory-mapped: a tensor costs memory only while it is in use. Never runs code of the checkpoint and never
opens a pickle. Knows nothing about adapters.

    >>> checkpoint = open_checkpoint("jinaai/jina-reranker-m0")         # doctest: +SKIP
    >>> checkpoint.read("model.norm.weight").shape                      # doctest: +SKIP
    torch.Size([1536])
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, NotRequired, TypedDict

import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open

from m0kit.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from m0kit.errors import CheckpointError
from m0kit.files import open_regular, read_regular, sha256_of
from m0kit.schema import fitting, parse
from m0kit_export.folder import find_folder
from m0kit_export.frequencies import powers
from m0kit_export.names import canonical_name, expected_shapes
from m0kit_export.packed import Packed, Stored, join_pieces, unpack
from m0kit_export.tokenizer import TOKENIZER, read_tokenizer
from m0kit_quant.nf4 import bitsandbytes_functional

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

# Each ten times, or more, what the published model, or a fine-tune of it, has.
_MAX_JSON_BYTES: Final = 16 << 20  # an index of the published model: 100 kB
_MAX_HEADER_BYTES: Final = 4 << 20  # 100 kB, and ten times that where a trainer tells its story in the metadata
_MAX_NAME: Final = 512  # letters of a tensor's name: 100, in the wrappers of a trainer
_MAX_TEXT: Final = 4 << 20  # letters of a README: 1 MB with the results of benchmarks in its front matter
_MAX_LICENCE: Final = 64  # letters of a licence's id: 40

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
_LICENCE = re.compile(rf"[ \t]*['\"]?([\w.+-]{{1,{_MAX_LICENCE}}})(?![\w.+-])")
_LICENCE_TITLES = {
    "attribution-noncommercial 4.0": "cc-by-nc-4.0",
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
}
_SHARD_NAME = re.compile(r"[\w-][\w.-]{0,120}\.safetensors")
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_BUFFER = re.compile(r"(?:(?:model|visual)\.)(?:layers\.\d+\.self_attn\.)?rotary(?:_pos)?_emb\.(?:original_)?inv_freq")
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


class _Tensor(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 31)]], Meta(max_length=8)]


class _Index(TypedDict):
    """Which file holds a tensor, if there are several."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


class _Token(TypedDict):
    id: int
    content: str


class _Vocabulary(TypedDict, total=False):
    vocab: dict[str, int]


class _Tokenizer(TypedDict):
    """What is looked at of tokenizer.json."""

    model: _Vocabulary
    added_tokens: NotRequired[list[_Token]]


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

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU as stored (fp32, fp16 or bf16), mapped from its file: do not write into it.

        One that is stored in 4 bits is read as bitsandbytes reads it, in the dtype it was quantised from.
        Raises CheckpointError when it holds a NaN or an infinity, or the file changed since it was opened.
        """
        stored = self._locate(name)
        if isinstance(stored, Packed):
            tensor = unpack(stored, lambda piece: _read_raw(self.folder / piece.file, piece.name))
            _check_finite(tensor, stored.name, stored.file)
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
        return sum(math.prod(s.shape) * _ITEM_BYTES[s.dtype] for s in stored)

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
    raw = read_json_object(folder / "config.json")
    quant_type = _quant_type(raw)
    weight_files, stored = _read_headers(folder)
    if quant_type is not None:
        bitsandbytes_functional()
        stored = join_pieces(stored, lambda piece: _read_raw(folder / piece.file, piece.name))
        _check_quant_type(quant_type, stored)
    image_files, image = _read_image_config(folder)
    tokenizer_files, tokenizer = read_tokenizer(folder)
    tokens, highest = _read_token_ids(folder, raw, tokenizer, tokenizer_files[0])
    try:
        config = ModelConfig(
            decoder=_decoder_config(raw),
            vision=_vision_config(raw),
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
    _check_fit(config, raw, len(stored))
    if highest >= config.decoder.vocab_size:
        raise CheckpointError(
            f"{tokenizer_files[0]} in {folder.name} has a token with the id {highest}, the vocabulary of config.json "
            f"ends at {config.decoder.vocab_size - 1}: the files are not of one model"
        )
    stored, buffers = _without_buffers(folder, stored, config)
    names, dropped, in_use = _match_tensors(expected_shapes(config), stored, config.decoder, _ties_embeddings(raw))
    return Checkpoint(
        source=str(source),
        folder=folder,
        config=config,
        names=names,
        dropped=(*dropped, *buffers),
        packed=tuple(name for name in names if isinstance(in_use[name], Packed)),
        licence=find_licence(folder, raw),
        tokenizer=tokenizer,
        _stored=in_use,
        _files=tuple(sorted({"config.json", *tokenizer_files, *image_files, *weight_files})),
    )


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → (shape, safetensors dtype) of a safetensors file. Raises CheckpointError that names the file."""
    reason = "truncated, damaged or a placeholder of a download that never finished"
    try:
        with open_regular(path) as file:
            size, there = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            if size > _MAX_HEADER_BYTES and size < there:
                raise ValueError(f"its header has {size} bytes, of which {_MAX_HEADER_BYTES} are read")  # noqa: TRY301
            header = parse(file.read(size)) if size < there else {}
        with safe_open(path, framework="pt") as mapped:  # its checks are those of where the values are
            mapped.keys()
        tensors = fitting({**header, "__metadata__": None}, dict[str, _Tensor | None])
    except OSError as error:
        reason = error.strerror or reason
    except SafetensorError:
        pass
    except ValueError as error:
        reason = str(error)
    else:
        if long := next((name for name in tensors if len(name) > _MAX_NAME), None):
            raise CheckpointError(
                f"{path.name} holds a tensor whose name has {len(long)} letters ({long[:40]}…), of which m0kit reads "
                f"{_MAX_NAME}. Save it without what was wrapped around the model"
            )
        return {name: (tuple(tensor["shape"]), tensor["dtype"]) for name, tensor in tensors.items() if tensor}
    raise CheckpointError(f"{path.name} is not a readable safetensors file: {reason}. Fetch it again")


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file, memory-mapped. Raises CheckpointError on NaN, infinity or damage."""
    tensor = _read_raw(path, name)
    _check_finite(tensor, name, path.name)
    return tensor


def file_sha256(path: Path) -> str:
    """sha256 of a file as hex, read in pieces. Raises CheckpointError."""
    try:
        return sha256_of(path)
    except OSError:
        raise CheckpointError(f"cannot read {path.name} in {path.parent.name}") from None


def find_licence(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """Licence id of a model folder: README front matter, then LICENSE, then the config's own field."""
    stated = _front_matter(_read_text(folder / "README.md"))
    licence = stated.get("license")
    if licence == "other":  # the hub's word for a licence outside its list
        licence = stated.get("license_name")
    if licence is not None:
        return licence
    for path in sorted(folder.glob("LICENSE*")):
        text = " ".join(_read_text(path)[: 1 << 16].split()).lower()  # a title stands at the top
        for title, name in _LICENCE_TITLES.items():
            if title in text:
                return name
    named = raw.get("license")
    return named if isinstance(named, str) and len(named) <= _MAX_LICENCE else None


def _front_matter(readme: str) -> dict[str, str]:
    """The licence fields of what stands between two lines of dashes at the top of a model card."""
    first, *lines = readme.splitlines() or [""]
    end = next((number for number, line in enumerate(lines) if line.startswith("---")), None)
    if first.rstrip() != "---" or end is None:
        return {}
    stated = {}
    for line in lines[:end]:
        name, colon, value = line.partition(":")
        if colon and name in ("license", "license_name") and (match := _LICENCE.match(value)):
            stated[name] = match[1]
    return stated


def read_json_object(path: Path, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """A JSON object from a file. Raises `error` that names the file."""
    where = f"{path.name} in {path.parent.name}"
    try:
        raw = parse(read_regular(path, _MAX_JSON_BYTES))
    except FileNotFoundError:
        raise error(f"{path.parent.name} has no {path.name}. Give the folder that holds it") from None
    except OSError as problem:
        raise error(f"{where}: {problem.strerror or type(problem).__name__}. Fetch it again") from None
    except ValueError as problem:
        raise error(f"{where} is not readable JSON: {problem}. Fetch it again") from None
    if not isinstance(raw, dict):
        raise error(f"{where} holds {type(raw).__name__}, not an object")
    return raw


def check_tensors(path: Path, names: Sequence[str]) -> None:
    """Raises CheckpointError on NaN, infinity or damage in any of these tensors of a file, which is opened once."""
    for name, tensor in _read_all(path, names):
        _check_finite(tensor, name, path.name)


def _read_raw(path: Path, name: str) -> torch.Tensor:
    return next(tensor for _, tensor in _read_all(path, [name]))


def _read_all(path: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    name = next(iter(names), "its header")
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, AttributeError, OSError, OverflowError, RuntimeError, TypeError, ValueError):
        raise CheckpointError(
            f"cannot read {name} from {path.name}: the file changed or is damaged. Fetch it again"
        ) from None


def _check_finite(tensor: torch.Tensor, name: str, file: str) -> None:
    # In pieces: the mask of the whole embedding would be a quarter of a gigabyte.
    if not all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.reshape(-1), 1 << 24)):
        raise CheckpointError(
            f"{name} in {file} holds NaN or infinite values: the training diverged or the file is "
            "damaged. Export an earlier state, or fetch it again"
        )


def _read_text(path: Path) -> str:
    """The beginning of a text, which holds the front matter or the title of a licence."""
    try:
        with open_regular(path) as file:
            return file.read(_MAX_TEXT).decode("utf-8-sig", errors="replace")
    except OSError:
        return ""


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
        fits = tensor.dtype in (*_ITEM_BYTES, "F64") and tensor.shape == ((dim + 1) // 2,)
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


def _ties_embeddings(raw: Mapping[str, Any]) -> bool:
    nested = raw.get("text_config")
    return (
        raw.get("tie_word_embeddings", nested.get("tie_word_embeddings") if isinstance(nested, dict) else None) is True
    )


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
        if tensor.dtype not in _ITEM_BYTES:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} is {tensor.dtype}; weights must be "
                f"{', '.join(_ITEM_BYTES)}. Save the checkpoint unquantised"
            )
        found[name] = tensor
    if tied and _EMBEDDING not in found and _LM_HEAD in found:
        found[_EMBEDDING] = found.pop(_LM_HEAD)  # one tensor, saved under the name that came first
    missing = [name for name in expected if name not in found]
    if missing and all(name.startswith("score.") for name in missing):
        raise CheckpointError(f"the scoring head is missing ({_some(missing)}): this is a Qwen2-VL, not a reranker")
    if missing:
        raise CheckpointError(f"tensors are missing: {_some(missing)}. The checkpoint is incomplete")
    names = tuple(expected)
    dropped = tuple(name for name in found if name not in expected)
    return names, dropped, {name: found[name] for name in names}


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


def _decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
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
    first, second, third = rope.triple("mrope_section")
    named = _Section(rope.where, {f"mrope_section[{i}]": s for i, s in enumerate((first, second, third))}, {})
    sections = (named.whole("mrope_section[0]"), named.whole("mrope_section[1]"), named.whole("mrope_section[2]"))
    return (thetas.pop() if thetas else _ROPE_THETA), sections


def _vision_config(raw: Mapping[str, Any]) -> VisionConfig:
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


def _check_fit(config: ModelConfig, raw: Mapping[str, Any], num_tensors: int) -> None:
    """What no single part of the config can see."""
    decoder, vision = config.decoder, config.vision
    output = (raw.get("vision_config") or {}).get("hidden_size", _VISION_DEFAULTS["hidden_size"])
    if output != decoder.hidden_size:
        raise CheckpointError(
            f"vision_config: hidden_size is {output!r:.40}, the decoder's is {decoder.hidden_size}: "
            "images would not fit between the words"
        )
    if decoder.num_layers + vision.depth > num_tensors:  # also keeps a nonsense depth from filling the memory
        raise CheckpointError(
            f"config.json speaks of {decoder.num_layers} + {vision.depth} layers, the files hold only "
            f"{num_tensors} tensors"
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
    if (folder / "preprocessor_config.json").exists():
        found["preprocessor_config.json"] = _image_config(
            "preprocessor_config.json", read_json_object(folder / "preprocessor_config.json")
        )
    if (folder / "processor_config.json").exists():
        nested = read_json_object(folder / "processor_config.json").get("image_processor")
        if nested is not None:
            found["processor_config.json"] = _image_config("processor_config.json", nested)
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


def _some(names: list[str]) -> str:
    """A few of many names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
