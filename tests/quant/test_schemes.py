"""Schemes under their names: layout and encoding agree, decoding comes near, tables read the same in ONNX Runtime."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.quant import product_graphs

from m0kit import precision
from m0kit_quant import int4, int8, nf4
from m0kit_quant.floats import FLOATS, Bf16Scheme, Fp16Scheme, Fp32Scheme
from m0kit_quant.int4 import Int4Scheme
from m0kit_quant.int8 import Int8Scheme
from m0kit_quant.nf4 import Nf4Scheme
from m0kit_quant.scheme import Scheme
from m0kit_quant.schemes import SCHEMES

Float32 = NDArray[np.float32]
MATRICES = [
    *(SCHEMES[name]() for name in SCHEMES if name != "int4"),
    *(Int4Scheme(block) for block in int4.BLOCKS),
]
TABLES = [
    *(SCHEMES[name](table=True) for name in SCHEMES if name not in ("int4", "nf4")),
    *(Int4Scheme(block, table=True) for block in int4.BLOCKS),
]


def spelled(scheme: Scheme) -> str:
    return f"{scheme.name}{scheme.block or ''}{'-table' if scheme.table else ''}"


def random(*shape: int, seed: int = 0, scale: float = 0.1) -> Float32:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def test_every_known_scheme_is_tried_here() -> None:
    assert {scheme.name for scheme in MATRICES} == set(SCHEMES)
    assert {name for name, scheme in SCHEMES.items() if scheme.is_float} == set(FLOATS) == {"fp32", "fp16", "bf16"}


def test_the_runtime_knows_the_same_schemes_in_the_same_order() -> None:
    assert list(precision.SCHEMES) == list(SCHEMES)


# --- what is stored --------------------------------------------------------------------------------


@given(st.sampled_from([*MATRICES, *TABLES]), st.integers(1, 40), st.integers(1, 4), st.integers(1, 150))
def test_what_is_encoded_fits_the_layout(scheme: Scheme, rows: int, blocks: int, columns: int) -> None:
    shape = (rows, blocks * scheme.block if scheme.block else columns)
    weight = random(*shape)
    layout, parts = scheme.layout(shape), scheme.encode(weight)
    assert list(layout) == list(parts)
    assert {key: (part.shape, part.dtype) for key, part in parts.items()} == layout
    decoded = scheme.decode(parts, shape)
    assert (decoded.shape, decoded.dtype) == (shape, np.float32)
    assert weight.tobytes() == random(*shape).tobytes()  # not written to


@pytest.mark.parametrize("scheme", MATRICES, ids=spelled)
def test_bytes_of_the_layout_are_those_of_the_bits(scheme: Scheme) -> None:
    """What a matrix of the published model costs: bits for each weight, scales and zero points included."""
    shape = (8960, 1536)
    stored = sum(int(np.prod(part)) * dtype.itemsize for part, dtype in scheme.layout(shape).values())
    bits = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8 + 32 / 1536, "nf4": 4 + 32 / 64}.get(scheme.name)
    if scheme.block:
        bits = 4 + (32 + 4) / scheme.block
    assert stored * 8 == bits * shape[0] * shape[1]


# Root of the mean squared error over that of normal weights, at most; each within 3 % of what is seen.
ERRORS = {
    "fp32": 0.0, "fp16": 2.2e-4, "bf16": 1.75e-3, "int8": 0.0152, "int432": 0.0810, "int464": 0.0890, "int4128": 0.0973,
    "nf4": 0.0945, "fp32-table": 0.0, "fp16-table": 2.2e-4, "bf16-table": 1.75e-3, "int8-table": 0.0077,
    "int432-table": 0.0810, "int464-table": 0.0890, "int4128-table": 0.0973,
}  # fmt: skip


@pytest.mark.parametrize("scheme", [*MATRICES, *TABLES], ids=spelled)
def test_decoding_comes_as_near_as_the_bits_allow(scheme: Scheme) -> None:
    weight = random(300, 512)
    decoded = scheme.decode(scheme.encode(weight), weight.shape).astype(np.float64)
    error = float((np.square(decoded - weight).sum() / np.square(weight).sum()) ** 0.5)
    most = ERRORS[spelled(scheme)]
    assert 0.9 * most <= error <= most  # an error that is smaller than it can be is another scheme's


# Of the largest |value| of the stretch that shares a scale, how far a value comes back off at most: half a step, in
# int8 and int4 of a range that the search may have shrunk to 0.6 (values beyond it lose up to 0.4), in NF4 half the
# widest gap. A little more for the roundings in fp32 on the way.
FARTHEST = {"int8": 0.4, "int8-table": 0.5 / 127, "int4": 0.8, "int4-table": 0.8, "nf4": 0.152}


@given(
    st.sampled_from([s for s in (*MATRICES, *TABLES) if not s.is_float]),
    st.integers(0, 2**32 - 1),
    st.integers(-98, 126),
    st.integers(0, 30),
)
def test_every_stretch_comes_back_near_whatever_its_size(scheme: Scheme, seed: int, top: int, spread: int) -> None:
    """Rows and blocks a billion times apart, up to the ends of fp32: no scale under- or overflows."""
    rng = np.random.default_rng(seed)
    width = {"nf4": nf4.BLOCK_SIZE, "int4": scheme.block or 0}.get(scheme.name, 256)
    sizes = 2.0 ** (top - rng.integers(0, spread + 1, (5, 256 // width)).repeat(width, axis=1))
    weight = (rng.uniform(-1, 1, (5, 256)) * np.maximum(sizes, 2.0**-98)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.1] = 0
    weight[rng.integers(5)] = 0
    decoded = scheme.decode(scheme.encode(weight), weight.shape).astype(np.float64)
    peak = np.abs(weight).reshape(5, -1, width).max(axis=2).repeat(width, axis=1)
    name = f"{scheme.name}{'-table' if scheme.table else ''}"
    assert (np.abs(decoded - weight) <= FARTHEST[name] * (1 + 1e-5) * peak).all()


@given(st.sampled_from([*MATRICES, *TABLES]), st.integers(0, 2**32 - 1))
def test_values_too_small_for_a_scheme_come_back_as_small(scheme: Scheme, seed: int) -> None:
    """Subnormal values and all below 1e-30 may be lost, but never come back as anything else."""
    rng = np.random.default_rng(seed)
    weight = (rng.uniform(-1, 1, (4, 256)) * 10.0 ** rng.integers(-45, -29, (4, 256))).astype(np.float32)
    decoded = scheme.decode(scheme.encode(weight), weight.shape)
    assert (np.abs(decoded - weight) <= 1e-30).all()


@pytest.mark.parametrize("scheme", [*MATRICES, *TABLES], ids=spelled)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    weight = random(6, 256)
    weight[1], weight[2:4, :128] = 0, 0
    assert not scheme.decode(scheme.encode(weight), weight.shape)[weight == 0].any()


def test_the_numbers_are_those_of_the_schemes_modules() -> None:
    weight, importance = random(9, 128), random(1, 128, seed=1)[0] ** 2
    values, scale = int8.quantize(weight, importance)
    parts = Int8Scheme().encode(weight, importance)
    assert np.array_equal(parts["int8"], values)
    assert np.array_equal(parts["scale"], scale)
    assert np.array_equal(Int8Scheme().decode(parts, weight.shape), int8.dequantize(values, scale))
    four = int4.quantize(weight, 64, importance)
    parts = Int4Scheme(64).encode(weight, importance)
    for part, expected in zip(("int4", "scale", "zero_point"), four, strict=True):
        assert np.array_equal(parts[part], expected)
    assert np.array_equal(Int4Scheme(64).decode(parts, weight.shape), int4.dequantize(four))
    levels = nf4.quantize(weight)
    parts = Nf4Scheme().encode(weight, importance)
    assert np.array_equal(parts["nf4"], levels.packed)
    assert np.array_equal(parts["absmax"], levels.absmax)


@pytest.mark.parametrize("scheme", [Int8Scheme(), Int4Scheme(64)], ids=spelled)
def test_importance_reaches_the_search(scheme: Scheme) -> None:
    weight, importance = random(30, 128), np.exp(3 * random(1, 128, seed=1, scale=1)[0])
    plain, weighed = scheme.encode(weight), scheme.encode(weight, importance)
    assert not np.array_equal(plain["scale"], weighed["scale"])


# --- floats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
def test_values_of_a_float_type_are_stored_exactly(name: str) -> None:
    weight = (random(20, 33, scale=1) * np.exp2(np.arange(33) - 20)).astype(FLOATS[name]).astype(np.float32)
    parts = SCHEMES[name]().encode(weight)
    assert np.array_equal(SCHEMES[name]().decode(parts, weight.shape), weight)


@given(st.integers(0, 2**16 - 1))
def test_every_finite_bfloat16_is_exact(bits: int) -> None:
    value = np.array([[bits]], np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    if np.isfinite(value).all():
        stored = Bf16Scheme().encode(value)[""]
        assert stored.view(np.uint16).item() == bits


def test_float32_is_not_copied() -> None:
    weight = random(3, 4)
    assert Fp32Scheme().encode(weight)[""] is weight


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("fp16", 65520.0, "65520"),
        ("fp16", -1e5, "100000"),
        ("fp16", np.inf, "inf"),
        ("bf16", 3.4e38, "3.4e\\+38"),
        ("fp32", np.inf, "inf"),
        ("fp32", np.nan, "nan"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float, shown: str) -> None:
    weight = random(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=f"^holds {shown}, which {name} cannot$"):
        SCHEMES[name]().encode(weight)


def test_the_largest_value_of_float16_is_in_range() -> None:
    weight = np.full((1, 1), 65519.0, np.float32)  # rounds to 65504
    assert Fp16Scheme().encode(weight)[""].item() == 65504


# --- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "shape", "said"),
    [
        (Nf4Scheme(table=True), (4, 64), "cannot store a table"),
        (Int4Scheme(128), (4, 192), "block 128 does not divide 192 inputs"),
    ],
)
def test_a_scheme_that_does_not_fit_says_so(scheme: Scheme, shape: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scheme.layout(shape)


@pytest.mark.parametrize("block", [None, 16])
def test_a_block_that_a_scheme_does_not_have_is_refused(block: int | None) -> None:
    with pytest.raises(ValueError, match=f"block {block} is not one of 32, 64, 128"):
        Int4Scheme(block)


# --- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])  # odd: zero points of a row end in the middle of a byte
@pytest.mark.parametrize("scheme", TABLES, ids=spelled)
def test_onnx_runtime_looks_up_exactly_what_is_decoded(scheme: Scheme, blocks: int) -> None:
    table = random(40, 128 * blocks if scheme.block == 128 else 64 * blocks if scheme.block == 64 else 32 * blocks)
    table[3] = 0
    table[5] = np.abs(table[5])
    table[6, ::3] *= 50
    parts = scheme.encode(table)
    ids: NDArray[np.int64] = np.r_[np.random.default_rng(0).integers(0, 40, 60), np.arange(40), 39, 0].astype(np.int64)
    found = product_graphs.lookup(scheme, parts, table.shape, ids)
    expected = scheme.decode(parts, table.shape)[ids]
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    one: Any = product_graphs.lookup(scheme, parts, table.shape, ids[:1])
    assert np.array_equal(one, expected[:1])
    assert product_graphs.lookup(scheme, parts, table.shape, ids[:0]).shape == (0, table.shape[1])
