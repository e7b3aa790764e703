"""NF4 against bitsandbytes, bit by bit, and against the operator of ONNX Runtime that reads it.

Where two products are compared, both are sums of `in` fp32 terms in orders of their own. Each sum is within
in·2⁻²⁴·Σ|a·w| of the true one, whatever the order, so two of them are within twice that: no more is allowed.
"""

import logging
import subprocess
import sys
from statistics import NormalDist
from typing import Any

import bitsandbytes as bnb
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tests.quant import products

from m0kit.errors import CheckpointError, DependencyError
from m0kit_quant import int8, nf4
from m0kit_quant.nf4 import (
    BLOCK_SIZE,
    LEVELS,
    NF4,
    bitsandbytes_functional,
    dequantize,
    quantize,
    stored_sizes,
)

Float32 = NDArray[np.float32]

SHAPES = [(1, 1), (1, 2), (7, 1), (6, 33), (1, 64), (5, 32), (4, 96), (48, 56), (3, 65), (2, 160), (3, 1536), (64, 128)]


def random(*shape: int, seed: int = 0, scale: float = 0.1) -> Float32:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def bits(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def by_definition(weight: Float32) -> tuple[list[int], list[np.float32]]:
    """(codes, absmax) value by value: the level nearest to w/absmax, of two as near the lower."""
    middles = [(LEVELS[i] + LEVELS[i + 1]) / np.float32(2) for i in range(15)]
    codes, scales = [], []
    flat = weight.reshape(-1)
    for start in range(0, len(flat), BLOCK_SIZE):
        block = flat[start : start + BLOCK_SIZE]
        largest = max(abs(value) for value in block)
        divisor = max(largest, np.float32(1e-38))  # bitsandbytes' own floor
        whole = len(block) == BLOCK_SIZE
        for value in block:
            # a last, shorter block is divided, the others are multiplied by the reciprocal
            scaled = value * (np.float32(1) / divisor) if whole else value / divisor
            codes.append(sum(bool(scaled > middle) for middle in middles))
        scales.append(largest if whole else divisor)
    return codes, scales


def unpacked(weight: NF4) -> list[int]:
    codes = np.stack([weight.packed >> 4, weight.packed & 15], axis=1).reshape(-1)
    return [int(code) for code in codes[: weight.shape[0] * weight.shape[1]]]


def operator(weight: NF4) -> ort.InferenceSession:
    """MatMulBnb4 alone: A (T, in) → Y (T, out)."""
    rows, columns = weight.shape
    graph = helper.make_graph(
        [
            helper.make_node(
                "MatMulBnb4",
                ["A", "B", "absmax"],
                ["Y"],
                domain="com.microsoft",
                K=columns,
                N=rows,
                block_size=BLOCK_SIZE,
                quant_type=1,
            )
        ],
        "product",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["T", columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["T", rows])],
        [
            helper.make_tensor("B", TensorProto.UINT8, weight.packed.shape, weight.packed.tobytes(), raw=True),
            helper.make_tensor("absmax", TensorProto.FLOAT, weight.absmax.shape, weight.absmax.tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, activations: Float32) -> Float32:
    result: Float32 = session.run(None, {"A": activations})[0]
    return result


def assert_same_product(got: Float32, expected: Float32, activations: Float32, weight: NF4) -> None:
    allowed = 2 * weight.shape[1] * 2.0**-24 * (np.abs(activations) @ np.abs(dequantize(weight)).T)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert (np.abs(got.astype(np.float64) - expected) <= allowed).all()


# --- rounding --------------------------------------------------------------------------------------------


def test_levels_are_those_of_bitsandbytes_and_of_the_normal_distribution() -> None:
    assert np.array_equal(LEVELS, bnb.functional.get_4bit_type("nf4", device="cpu").numpy())
    # create_normal_map: quantiles of eight equal steps up and seven down, scaled to 1 (rounded by scipy, in fp32)
    quantile, end = NormalDist().inv_cdf, 0.9677083
    up = [quantile(end + (0.5 - end) * i / 8) / quantile(end) for i in range(8)]
    down = [-quantile(end + (0.5 - end) * i / 7) / quantile(end) for i in range(7)]
    np.testing.assert_allclose(LEVELS, sorted([*up, 0.0, *down]), rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_rounds_as_bitsandbytes_rounds_the_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_BLOCK_VALUES", 128)  # several pieces, the last of them short
    weight = random(*shape)
    codes, state = bnb.functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    ours = quantize(weight)
    assert ours.shape == shape
    assert np.array_equal(ours.packed, codes.numpy().reshape(-1))
    assert np.array_equal(bits(ours.absmax), bits(state.absmax.numpy()))


@pytest.mark.parametrize("shape", SHAPES)
def test_reads_as_bitsandbytes_reads(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one line: 0.50 misplaces the scales of a matrix whose rows are no multiple of the block, on AVX-512."""
    monkeypatch.setattr(nf4, "_PIECE", 128)
    weight = random(*shape)
    codes, state = bnb.functional.quantize_4bit(
        torch.from_numpy(weight).reshape(-1), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    theirs = bnb.functional.dequantize_4bit(codes, state).numpy().reshape(shape)
    ours = dequantize(quantize(weight))
    assert ours.dtype == np.float32
    assert np.array_equal(bits(ours), bits(theirs))


# All magnitudes that occur and those at the ends of fp32, where reciprocals overflow or lose digits.
SCALES = st.sampled_from([1e-45, 1e-40, 1e-38, 2e-38, 1e-20, 0.02, 1.0, 1e20, 2.9e38, 3.4e38])
MIDDLES = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)


SPECIAL = np.concatenate(
    [LEVELS, MIDDLES, np.nextafter(MIDDLES, np.float32(2)), np.nextafter(MIDDLES, np.float32(-2)), np.float32([-0.0])]
)


@st.composite
def matrices(draw: st.DrawFn) -> Float32:
    """Up to three blocks, with half the values on a level, on a threshold or one step beside it."""
    columns, scale = draw(st.integers(1, 70)), np.float32(draw(SCALES))
    rows = draw(st.integers(1, max(1, 190 // columns)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    free = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    drawn = np.where(rng.random(free.shape) < 0.5, rng.choice(SPECIAL, free.shape), free)
    matrix: Float32 = drawn * scale
    return matrix


@given(weight=matrices())
def test_rounds_to_the_nearest_level_as_defined(weight: Float32) -> None:
    ours = quantize(weight)
    with np.errstate(all="ignore"):  # subnormal reciprocals are what is tested
        codes, scales = by_definition(weight)
    assert unpacked(ours) == codes
    assert np.array_equal(bits(ours.absmax), bits(np.array(scales, np.float32)))


@given(weight=matrices())
def test_reads_codes_as_defined(weight: Float32) -> None:
    ours = quantize(weight)
    size = weight.size
    expected = LEVELS[unpacked(ours)] * np.repeat(ours.absmax, BLOCK_SIZE)[:size]
    assert np.array_equal(bits(dequantize(ours)), bits(expected.reshape(weight.shape)))


def test_a_block_of_zeros_stays_zero_and_the_largest_value_stays_itself() -> None:
    weight = random(3, 128)
    weight[1] = 0
    weight[2, 5], weight[2, 70] = 7.5, -7.5
    read = dequantize(quantize(weight))
    assert not read[1].any()
    assert (read[2, 5], read[2, 70]) == (7.5, -7.5)


@pytest.mark.parametrize("shape", [(3, 1536), (5, 33)])
def test_rounding_twice_is_rounding_once(shape: tuple[int, int]) -> None:
    once = dequantize(quantize(random(*shape)))
    assert np.array_equal(dequantize(quantize(once)), once)


def test_error_is_within_half_the_widest_gap() -> None:
    weight = random(40, 1536)
    ours = quantize(weight)
    half_gap = np.float32(np.diff(LEVELS).max() / 2) * np.repeat(ours.absmax, BLOCK_SIZE).reshape(weight.shape)
    assert (np.abs(dequantize(ours) - weight) <= half_gap * np.float32(1 + 1e-6)).all()  # the bound itself is rounded


def test_takes_read_only_matrices_in_any_memory_order() -> None:
    weight = random(6, 64)
    expected = quantize(weight)
    turned = np.asfortranarray(weight)
    turned.setflags(write=False)
    ours = quantize(turned)
    assert np.array_equal(ours.packed, expected.packed)
    assert np.array_equal(ours.absmax, expected.absmax)
    weight.setflags(write=False)
    assert np.array_equal(quantize(weight).packed, expected.packed)


def test_a_matrix_of_many_pieces_is_that_of_bitsandbytes() -> None:
    weight = random(700, 1537)  # more than a million values, the last block cut short
    codes, state = bnb.functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    ours = quantize(weight)
    assert np.array_equal(ours.packed, codes.numpy().reshape(-1))
    assert np.array_equal(bits(ours.absmax), bits(state.absmax.numpy()))


# --- the operator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_operator_reads_the_same_matrix_to_the_bit(shape: tuple[int, int]) -> None:
    weight = quantize(random(*shape))
    read = run(operator(weight), np.eye(shape[1], dtype=np.float32)).T
    # Other terms of each sum are zeros, which change nothing but the sign of a zero.
    assert np.array_equal(read, dequantize(weight))


@pytest.mark.parametrize("num_rows", [1, 2, 17])
@pytest.mark.parametrize("shape", [(5, 64), (48, 56), (256, 1536)])
def test_the_operator_multiplies_as_modelled(shape: tuple[int, int], num_rows: int) -> None:
    weight, activations = quantize(random(*shape)), random(num_rows, shape[1], seed=1, scale=1)
    assert_same_product(run(operator(weight), activations), products.nf4(activations, weight), activations, weight)


@pytest.mark.parametrize("num_rows", [1, 17])
@pytest.mark.parametrize("shape", [(5, 64), (256, 1536)])
def test_the_operator_multiplies_as_bitsandbytes_layer(shape: tuple[int, int], num_rows: int) -> None:
    original, activations = random(*shape), random(num_rows, shape[1], seed=1, scale=1)
    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
    )
    layer.load_state_dict({"weight": torch.from_numpy(original)})
    layer = layer.to("cpu").train()  # on CPUs with bf16 instructions, evaluation mode multiplies in bf16
    assert layer.weight.dtype == torch.uint8
    with torch.no_grad():
        theirs = layer(torch.from_numpy(activations)).numpy()
    weight = quantize(original)
    assert np.array_equal(layer.weight.numpy().reshape(-1), weight.packed)
    assert_same_product(run(operator(weight), activations), theirs, activations, weight)


def test_rows_do_not_depend_on_what_else_is_scored() -> None:
    """To the bit when only the values of other rows change; their number may change the order of sums."""
    weight, activations = quantize(random(96, 1536)), random(37, 1536, seed=1, scale=1)
    session = operator(weight)
    together = run(session, activations)
    others = activations.copy()
    others[1:] = random(36, 1536, seed=2, scale=100)
    assert np.array_equal(run(session, others)[0], together[0])
    for num_rows in (1, 2, 5, 16):
        part = activations[:num_rows]
        assert_same_product(run(session, part), together[:num_rows], part, weight)


def test_the_comparison_of_products_can_fail() -> None:
    weight, activations = quantize(random(5, 64)), random(2, 64, seed=1, scale=1)
    swapped = NF4(weight.shape, (weight.packed >> 4) | (weight.packed << 4), weight.absmax)
    with pytest.raises(AssertionError):
        assert_same_product(run(operator(swapped), activations), products.nf4(activations, weight), activations, weight)


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (0, 63), (2, 32)])  # the last one is in a block cut short
def test_values_that_are_no_numbers_are_refused(value: float, place: tuple[int, int]) -> None:
    weight = random(3, 33) if place == (2, 32) else random(1, 64)
    weight[place] = value
    with pytest.raises(CheckpointError, match=r"a matrix of shape \[\d, \d+\] holds NaN or infinite values"):
        quantize(weight)


@pytest.mark.parametrize("weight", [np.zeros(64, np.float32), np.zeros((1, 64)), np.zeros((1, 1, 64), np.float32)])
def test_only_float32_matrices_are_taken(weight: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="takes a float32 matrix, got float"):
        quantize(weight)


def test_an_empty_matrix_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"shape \[0, 64\] has nothing to quantise"):
        quantize(np.zeros((0, 64), np.float32))


def test_parts_that_do_not_fit_the_shape_are_refused() -> None:
    packed, absmax = np.zeros(96, np.uint8), np.zeros(3, np.float32)
    assert stored_sizes((3, 64)) == (96, 3)
    assert stored_sizes((3, 33)) == (50, 2)
    NF4((3, 64), packed, absmax)
    with pytest.raises(ValueError, match=r"packed must be uint8 \[128\], got uint8 \[96\]"):
        NF4((4, 64), packed, absmax)
    with pytest.raises(ValueError, match=r"packed must be uint8 \[96\], got int8"):
        NF4((3, 64), packed.astype(np.int8), absmax)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"absmax must be float32 \[3\], got float32 \[4\]"):
        NF4((3, 64), packed, np.zeros(4, np.float32))


def test_without_bitsandbytes_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    level = logging.getLogger("bitsandbytes.backends.cpu.ops").level
    with pytest.raises(DependencyError, match=r"pip install 'm0kit\[nf4\]'"):
        bitsandbytes_functional()
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == level


def test_neither_rounding_nor_reading_needs_bitsandbytes_or_torch() -> None:
    script = """
import sys, numpy as np
from m0kit_quant.nf4 import NF4, dequantize, quantize
dequantize(NF4((1, 64), np.zeros(32, np.uint8), np.ones(1, np.float32)))
quantize(np.ones((1, 64), np.float32))
assert not {"torch", "bitsandbytes", "onnx"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
