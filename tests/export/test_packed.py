"""Checkpoints in bitsandbytes' 4 bits: written by transformers, read as transformers dequantises them, or refused."""

import copy
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.export import four_bit, tiny_model

from m0kit.errors import CheckpointError, DependencyError
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_quant.nf4 import dequantize, quantize

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_bit.write_checkpoint(tmp_path_factory.mktemp("plain") / "base", torch.bfloat16)


OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "fp4 twice": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "stored as bf16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "head plain": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["score", "lm_head"]},
}


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_transformers_saves_is_read_as_transformers_dequantises_it(
    plain: Path, tmp_path: Path, name: str, shard_size: str
) -> None:
    model = four_bit.load_in_4bit(plain, torch.bfloat16, **OPTIONS[name])
    tiny_model.write_checkpoint(tmp_path / "base", {}, {})
    (tmp_path / "base" / WEIGHTS).unlink()
    model.save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    assert (tmp_path / "base" / INDEX).exists() == (shard_size == "40KB")
    checkpoint = open_checkpoint(tmp_path / "base")
    packed = four_bit.quantised_names(model)
    assert set(checkpoint.packed) == packed
    assert len(packed) == 2 * 4 + 2 + 2 * 7 + (0 if name == "head plain" else 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = tiny_model.published_tensors(model.dequantize(dtype=torch.bfloat16))
    assert set(checkpoint.names) == set(expected)
    for tensor in checkpoint.names:
        ours = checkpoint.read(tensor)
        assert ours.dtype == torch.bfloat16
        assert checkpoint.shape(tensor) == ours.shape
        assert torch.equal(ours, expected[tensor]), tensor
    assert checkpoint.num_bytes() == sum(2 * t.numel() for t in expected.values())


def pack(tensors: Tensors, double_quant: bool, storage: torch.dtype = torch.uint8) -> Tensors:
    """Every matrix but the embedding as Linear4bit would put it into a state dict."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "embed_tokens" in name:
            result[name] = tensor
            continue
        codes, state = bnb.functional.quantize_4bit(
            tensor, quant_type="nf4", compress_statistics=double_quant, quant_storage=storage
        )
        result[name] = codes
        result |= {f"{name}.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
    return result


def quantisation(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **changes}


def write_packed(folder: Path, dtype: torch.dtype = torch.float32, double_quant: bool = False) -> tuple[Path, Tensors]:
    """(the tiny checkpoint in 4 bits, what it was made from)."""
    tensors = {name: t.to(dtype) for name, t in tiny_model.published_tensors(tiny_model.make_model()).items()}
    config = tiny_model.published_config() | {"quantization_config": quantisation()}
    return tiny_model.write_checkpoint(folder, pack(tensors, double_quant), config), tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_whose_rows_are_no_multiple_of_the_block_are_read_right(tmp_path: Path, dtype: torch.dtype) -> None:
    """48, 56 and 32 wide: where a block runs on into the next row."""
    folder, tensors = write_packed(tmp_path / "base", dtype)
    checkpoint = open_checkpoint(folder)
    assert Q in checkpoint.packed
    for name in checkpoint.names:
        expected = tensors[name]
        if name in checkpoint.packed:
            expected = torch.from_numpy(dequantize(quantize(expected.float().numpy()))).to(dtype)
        assert torch.equal(checkpoint.read(name), expected), name


def test_pieces_may_lie_in_other_shards_than_their_weight(tmp_path: Path) -> None:
    folder, _ = write_packed(tmp_path / "base", double_quant=True)
    whole = open_checkpoint(folder)
    expected = {name: whole.read(name).clone() for name in whole.names}
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    tiny_model.write_json(folder / INDEX, index)
    (folder / WEIGHTS).unlink()
    checkpoint = open_checkpoint(folder)
    assert {checkpoint.fingerprint().keys() >= {file} for file in parts} == {True}
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in checkpoint.names)


# --- refusals --------------------------------------------------------------------------------------------

Edit = Callable[[Tensors], object]


def state(**changes: Any) -> Edit:
    """quant_state with some fields changed; None removes one."""

    def apply(tensors: Tensors) -> None:
        fields = json.loads(bytes(tensors[STATE].tolist())) | changes
        text = json.dumps({key: value for key, value in fields.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return apply


def unchanged(_: Tensors) -> None:
    """Edit nothing."""


def put(part: str, value: torch.Tensor) -> Edit:
    return lambda t: t.update({f"{Q}{part}": value})


def text(content: bytes) -> Edit:
    return put(".quant_state.bitsandbytes__nf4", torch.tensor(list(content), dtype=torch.uint8))


def drop(part: str) -> Edit:
    return lambda t: t.pop(f"{Q}{part}")


BLOCKS = math.ceil(48 * 48 / 64)
REFUSED: dict[str, tuple[Edit, str]] = {
    "weight missing": (drop(""), f"holds {Q}[.a-z_0-9]+, but there is no {Q}"),
    "scales missing": (drop(".absmax"), rf"{Q}\.absmax is missing"),
    "levels missing": (drop(".quant_map"), rf"{Q}\.quant_map is missing"),
    "state missing": (drop(".quant_state.bitsandbytes__nf4"), f"{Q} in {WEIGHTS} has 0 quant_states"),
    "two states": (
        lambda t: t.update({f"{Q}.quant_state.bitsandbytes__fp4": t[STATE].clone()}),
        f"{Q} in {WEIGHTS} has 2 quant_states",
    ),
    "nested scales without double quantisation": (
        put(".nested_absmax", torch.ones(1)),
        rf"holds {Q}\.nested_absmax, but {Q} has no double quantisation",
    ),
    "codes too few": (put("", torch.zeros(1151, 1, dtype=torch.uint8)), rf"{Q} in .* is U8 \[1151, 1\]; .*\[1152, 1\]"),
    "codes lying": (put("", torch.zeros(1, 1152, dtype=torch.uint8)), rf"{Q} in .* is U8 \[1, 1152\]"),
    "codes a plain matrix": (put("", torch.zeros(48, 48)), rf"{Q} in .* is F32 \[48, 48\]"),
    "codes as I64": (put("", torch.zeros(1152, 1, dtype=torch.int64)), rf"{Q} in .* is I64 .* must be U8"),
    "scales too few": (put(".absmax", torch.ones(BLOCKS - 1)), r"absmax in .* is F32 \[35\]; .* F32 \[36\]"),
    "scales in bytes": (put(".absmax", torch.ones(BLOCKS, dtype=torch.uint8)), r"absmax in .* is U8 \[36\]"),
    "levels too few": (put(".quant_map", torch.ones(15)), r"quant_map in .* is F32 \[15\]"),
    "state as numbers": (put(".quant_state.bitsandbytes__nf4", torch.ones(9)), r"is F32 \[9\], expected a short text"),
    "state too long": (
        put(".quant_state.bitsandbytes__nf4", torch.full((5000,), 32, dtype=torch.uint8)),
        r"is U8 \[5000\], expected a short text",
    ),
    "state no JSON": (text(b"\xff{}"), "not readable JSON"),
    "state a list": (text(b"[]"), "holds list"),
    "state of fp4": (state(quant_type="fp4"), "has quant_type 'fp4'; known are nf4"),
    "no block size": (state(blocksize=None), "has blocksize None"),
    "block of 100": (state(blocksize=100), "has blocksize 100; known are 32, 64"),
    "block of 64.0": (state(blocksize=64.0), "has blocksize 64.0"),
    "double": (state(dtype="float64"), "has dtype 'float64'; known are float32, float16, bfloat16"),
    "a list as dtype": (state(dtype=["float32"]), r"has dtype \['float32'\]"),
    "no shape": (state(shape=None), "has shape None"),
    "a line": (state(shape=[2304]), r"has shape \[2304\]"),
    "negative shape": (state(shape=[-48, -48]), r"has shape \[-48, -48\]"),
    "shape of a bool": (state(shape=[True, 2304]), r"has shape \[True, 2304\]"),
    "another shape of the same size": (state(shape=[24, 96]), r"has shape \[24, 96\], config.json asks for \[48, 48\]"),
    "half of double quantisation": (state(nested_blocksize=256), "has nested_dtype None"),
    "nested blocks of 64": (
        state(nested_blocksize=64, nested_dtype="float32", nested_offset=0.0),
        "has nested_blocksize 64; known are 256",
    ),
    "offset as text": (
        state(nested_blocksize=256, nested_dtype="float32", nested_offset="0"),
        "has nested_offset '0', expected a number",
    ),
    "offset endless": (
        state(nested_blocksize=256, nested_dtype="float32", nested_offset=math.inf),
        "has nested_offset inf, expected a number",
    ),
    "double quantisation without its pieces": (
        state(nested_blocksize=256, nested_dtype="float32", nested_offset=0.0),
        "nested_absmax is missing",
    ),
    "unknown field": (state(zero_point=0), "has 'zero_point', which m0kit does not know"),
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed") / "base")[0]


def edited(packed: Path, folder: Path, edit: Edit, quantization: Any = None) -> Path:
    tensors = load_file(packed / WEIGHTS)
    edit(tensors)
    config = tiny_model.published_config() | {"quantization_config": quantization or quantisation()}
    return tiny_model.write_checkpoint(folder, tensors, config)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(packed: Path, tmp_path: Path, name: str) -> None:
    edit, message = REFUSED[name]
    folder = edited(packed, tmp_path / "base", edit)
    with pytest.raises(CheckpointError, match=message) as refused:
        open_checkpoint(folder)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": False}, "is of bitsandbytes 8-bit; of quantised checkpoints"),
        ({"load_in_4bit": False}, "is of 'bitsandbytes'"),
        ({"load_in_4bit": "yes"}, "is of 'bitsandbytes'"),
        ({"quant_method": "gptq"}, "is of 'gptq'; .* Dequantise this one"),
        ({"quant_method": ["x"]}, r"is of \['x'\]"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'"),
        ({"bnb_4bit_quant_type": "fp4"}, "weight in .* is nf4, config.json says fp4"),
    ],
)
def test_quantisation_that_is_another_is_refused(
    packed: Path, tmp_path: Path, quantization: dict[str, Any], message: str
) -> None:
    folder = edited(packed, tmp_path / "base", unchanged, quantisation(**quantization))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_quantisation_and_weights_must_go_together(packed: Path, tmp_path: Path) -> None:
    tensors = tiny_model.published_tensors(tiny_model.make_model())
    config = tiny_model.published_config() | {"quantization_config": quantisation()}
    with pytest.raises(CheckpointError, match="no tensor is stored in 4 bits"):
        open_checkpoint(tiny_model.write_checkpoint(tmp_path / "plain", tensors, config))
    with pytest.raises(CheckpointError, match=r"model\.layers|visual|score"):
        open_checkpoint(tiny_model.write_checkpoint(tmp_path / "silent", load_file(packed / WEIGHTS)))
    with pytest.raises(CheckpointError, match=r"quantization_config holds \[1\], expected an object"):
        open_checkpoint(edited(packed, tmp_path / "list", unchanged, [1]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scales_that_are_no_numbers_are_refused_when_read(packed: Path, tmp_path: Path, value: float) -> None:
    checkpoint = open_checkpoint(edited(packed, tmp_path / "base", put(".absmax", torch.full((BLOCKS,), value))))
    with pytest.raises(CheckpointError, match=f"{Q} in {WEIGHTS} holds NaN or infinite values"):
        checkpoint.read(Q)


def test_levels_of_its_own_are_refused_when_read(packed: Path, tmp_path: Path) -> None:
    def shift(tensors: Tensors) -> None:
        tensors[f"{Q}.quant_map"][3] += 0.01

    checkpoint = open_checkpoint(edited(packed, tmp_path / "base", shift))
    with pytest.raises(CheckpointError, match=f"{Q} in {WEIGHTS} has levels of its own, not those of nf4"):
        checkpoint.read(Q)


@pytest.mark.parametrize(
    "edit",
    [put(".absmax", torch.ones(3)), put(".absmax", torch.ones(BLOCKS, dtype=torch.uint8)), put("", torch.ones(2, 1))],
    ids=["scales shorter", "scales in bytes", "codes shorter"],
)
def test_pieces_that_change_while_in_use_never_reach_the_kernels(packed: Path, tmp_path: Path, edit: Edit) -> None:
    folder = edited(packed, tmp_path / "base", unchanged)
    checkpoint = open_checkpoint(folder)
    edited(packed, folder, edit)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} changed while in use: {Q}"):
        checkpoint.read(Q)


def test_without_bitsandbytes_the_message_names_the_extra(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(DependencyError, match=r"pip install 'm0kit\[nf4\]'"):
        open_checkpoint(packed)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 10**12), st.floats(), st.text(max_size=5), st.just(10**400)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(
    field=st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset", "odd"]),
    value=JSON,
)
def test_any_value_in_a_state_is_refused_or_harmless(
    packed: Path, tmp_path_factory: pytest.TempPathFactory, field: str, value: Any
) -> None:
    tensors = copy.copy(load_file(packed / WEIGHTS))
    state(**{field: value})(tensors)
    config = tiny_model.published_config() | {"quantization_config": quantisation()}
    folder = tiny_model.write_checkpoint(tmp_path_factory.getbasetemp() / "any", tensors, config)
    try:
        checkpoint: Checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return
    assert checkpoint.read(Q).shape == (48, 48)
