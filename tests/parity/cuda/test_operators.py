"""com.microsoft operators in numpy against PyTorch, the schemes' own decoding, and ONNX Runtime's kernels for CPUs."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.parity.cuda.nodes import (
    BF16,
    FLOATS,
    Array,
    assert_near,
    assert_within,
    computed,
    model,
    normal,
    on_cpu,
    tensor,
    unit,
    wide,
)
from torch.nn import functional

from m0kit_parity.cuda.arithmetic import rounded
from m0kit_parity.cuda.reference import CudaReference
from m0kit_quant.int4 import Int4Scheme
from m0kit_quant.int4 import pack as pack_int4
from m0kit_quant.int4 import unpack as unpack_int4
from m0kit_quant.nf4 import Nf4Scheme

# Sums of some hundred values in another order, in roundings of float32; 16 bits are rounded once besides.
SUM = 64.0
CPU = [np.dtype(np.float32), np.dtype(np.float16)]  # bfloat16 has hardly a kernel there


def once(dtype: Any) -> float:
    """Roundings that a product may differ by: the sum's in float32, and one."""
    return SUM if dtype == np.float32 else 1.01


def test_a_tolerance_is_exceeded_by_one_value_that_is_off() -> None:
    """The tests below are worth what this is."""
    exact = normal(8, 8, dtype=np.float16)
    off = exact.copy()
    off[3, 3] += np.float16(4 * unit(exact.dtype) * np.abs(exact).max())
    assert_near(exact, wide(exact), 1)
    with pytest.raises(AssertionError, match=r"off from .*, allowed"):
        assert_near(off, wide(exact), 2)


# --- products ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("swapped", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_fused_matmul_scales_and_swaps(swapped: tuple[int, int], dtype: Any) -> None:
    a, b = normal(2, 5, 96, dtype=dtype), normal(2, 96, 7, dtype=dtype)
    exact = 0.25 * tensor(a) @ tensor(b)
    stored = [x.swapaxes(-1, -2).copy() if swap else x for x, swap in zip((a, b), swapped, strict=True)]
    result = computed("FusedMatMul", *stored, alpha=0.25, transA=swapped[0], transB=swapped[1])
    assert result.dtype == dtype
    assert_near(result, exact, once(dtype))


@pytest.mark.parametrize("dtype", CPU, ids=str)
def test_fused_matmul_is_that_of_onnx_runtime(dtype: Any) -> None:
    inputs = normal(5, 96, dtype=dtype), normal(7, 96, seed=1, dtype=dtype)
    ours, theirs = (run("FusedMatMul", *inputs, alpha=0.25, transB=1) for run in (computed, on_cpu))
    assert_near(ours, wide(theirs), 2 * once(dtype))


def test_a_product_that_leaves_float16_is_infinite_and_its_scale_comes_first() -> None:
    """alpha is applied before the one rounding, as cuBLAS does it."""
    a, b = np.full((1, 64), 100, np.float16), np.full((64, 1), -100, np.float16)
    assert computed("FusedMatMul", a, b) == -np.inf
    assert computed("FusedMatMul", a, b, alpha=0.01) == -6400
    assert np.isfinite(computed("FusedMatMul", a.astype(BF16), b.astype(BF16)).astype(float))


def test_types_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="FusedMatMul FusedMatMul: A is float16, B is bfloat16; they have one type"):
        computed("FusedMatMul", normal(2, 2, dtype=np.float16), normal(2, 2, dtype=BF16))


def assert_product(result: Array, a: Array, matrix: Array, steps: Array, bias: Array | None = None) -> None:
    """result = a @ matrixᵀ + bias, where making each weight may round values of the size of `steps` by a unit."""
    exact = wide(a) @ wide(matrix).T
    total = exact if bias is None else exact + wide(bias)
    one = unit(result.dtype)
    by_weights = np.abs(wide(a)) @ (one * wide(steps)).T
    by_sums = once(result.dtype) * one * np.maximum(np.abs(exact).max(), np.abs(total).max())
    assert_within(result, total, by_weights + (by_sums if bias is None else 2 * by_sums))


def int4_parts(dtype: Any, rows: int, width: int, block: int) -> tuple[list[Array], Array, Array]:
    """Packed weights, scales in `dtype` and zero points; the matrix (rows, width) that they stand for.

    And what is rounded on the way to it, all in all: zero · scale, in bfloat16 code · scale, and their difference.
    """
    scheme = Int4Scheme(block)
    parts = scheme.encode(normal(rows, width))
    parts["scale"] = parts["scale"].astype(dtype)
    scales = parts["scale"].astype(np.float32)
    matrix = scheme.decode({**parts, "scale": scales}, (rows, width))
    codes, zeros = (unpack_int4(parts[name]).reshape(rows, -1) for name in ("int4", "zero_point"))
    zeros, scales = (np.repeat(x[:, : width // block], block, axis=1) for x in (zeros, scales))
    steps = zeros * scales + (codes * scales if dtype == BF16 else 0) + np.abs(matrix)
    return [parts["int4"], parts["scale"], parts["zero_point"]], matrix, 1.01 * steps


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("width", "block"), [(96, 32), (128, 64), (128, 128)])
@pytest.mark.parametrize("biased", [False, True])
def test_int4_products_are_those_of_the_scheme(biased: bool, width: int, block: int, dtype: Any) -> None:
    parts, matrix, steps = int4_parts(dtype, 7, width, block)
    a, bias = normal(2, 3, width, dtype=dtype), normal(7, seed=3, dtype=dtype)
    given = {"K": width, "N": 7, "bits": 4, "block_size": block, "accuracy_level": 4}
    result = computed("MatMulNBits", a, *parts, *([None, bias] if biased else []), **given)
    assert result.dtype == dtype
    assert_product(result, a, matrix, steps, bias if biased else None)


def eight_bits(dtype: Any, middle: bool = False) -> tuple[list[Array], Array, Array]:
    """A matrix (7, 96) in blocks of 32: what it is stored as, what that stands for, and what is rounded on the way."""
    random = np.random.default_rng(5)
    codes, zero = (random.integers(0, 256, shape, np.uint8) for shape in ((7, 3, 32), (7, 3)))
    if middle:
        zero[:] = 128
    scale = np.abs(normal(7, 3, dtype=dtype))
    upper, lower = (wide(x) * wide(scale)[..., None] for x in (codes, zero[..., None]))
    steps = np.abs(upper - lower) + (0 if middle else lower) + (upper if dtype == BF16 else 0)
    return [codes, scale, zero], (upper - lower).reshape(7, 96), 1.01 * steps.reshape(7, 96)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("zero", ["bytes", "floats", "middle"])
def test_products_of_8_bits(zero: str, dtype: Any) -> None:
    """128 times a scale is exact: in float16 a weight is rounded once then."""
    (codes, scale, zero_point), matrix, steps = eight_bits(dtype, middle=zero == "middle")
    a = normal(5, 96, dtype=dtype)
    inputs: list[Array | None] = [codes, scale, zero_point]
    if zero == "floats":
        inputs[2] = zero_point.astype(dtype)  # all of 0…255 are exact in 16 bits
    if zero == "middle":
        inputs[2] = None
    result = computed("MatMulNBits", a, *inputs, K=96, N=7, bits=8, block_size=32)
    assert_product(result, a, matrix, steps)


def test_a_code_at_its_zero_point_is_what_rounding_left() -> None:
    """The product of zero and scale is rounded, that of code and scale is not: float16 keeps their difference."""
    scale = np.full((1, 1), 1 + 2**-10, np.float16)
    codes, zero = np.full((1, 1, 16), 0xFF, np.uint8), np.full((1, 1), 15, np.uint8)
    a = np.zeros((1, 32), np.float16)
    a[0, 0] = 1
    result = computed("MatMulNBits", a, codes, scale, zero, K=32, N=1, bits=4, block_size=32)
    assert result == 15 * (1 + 2**-10) - (15 + 2**-6)


@pytest.mark.parametrize("dtype", CPU, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_few_bits_are_those_of_onnx_runtime(bits: int, dtype: Any) -> None:
    parts, *_ = int4_parts(dtype, 7, 96, 32) if bits == 4 else eight_bits(dtype)
    inputs = [normal(5, 96, dtype=dtype), *parts]
    ours, theirs = (run("MatMulNBits", *inputs, K=96, N=7, bits=bits, block_size=32) for run in (computed, on_cpu))
    # On the CPU weights of float16 are not rounded before the product, nor is it promised where they are.
    assert_near(ours, wide(theirs), SUM if dtype == np.float32 else 4)


@pytest.mark.parametrize("bits", [2, 3])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    parts, *_ = int4_parts(np.float16, 7, 96, 32)
    with pytest.raises(NotImplementedError, match=f"bits={bits} is not computed here, only 4 and 8 are"):
        computed("MatMulNBits", normal(5, 96, dtype=np.float16), *parts, K=96, N=7, bits=bits, block_size=32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [64, 96, 33], ids="of {} inputs".format)
def test_nf4_products_are_those_of_the_scheme(width: int, dtype: Any) -> None:
    scheme, shape = Nf4Scheme(), (7, width)  # at 96 and 33 blocks run on from row to row
    parts = scheme.encode(normal(*shape))
    absmax = parts["absmax"].astype(dtype)
    matrix = scheme.decode({**parts, "absmax": absmax.astype(np.float32)}, shape)
    a = normal(5, width, dtype=dtype)
    result = computed("MatMulBnb4", a, parts["nf4"], absmax, K=width, N=7, block_size=64, quant_type=1)
    assert result.dtype == dtype
    assert_product(result, a, matrix, 2.01 * np.abs(matrix))  # a level is rounded, and its product


@pytest.mark.parametrize("dtype", CPU, ids=str)
def test_nf4_products_are_those_of_onnx_runtime(dtype: Any) -> None:
    parts = Nf4Scheme().encode(normal(7, 64))
    inputs = [normal(5, 64, dtype=dtype), parts["nf4"], parts["absmax"].astype(dtype)]
    given = {"K": 64, "N": 7, "block_size": 64, "quant_type": 1}
    ours, theirs = (run("MatMulBnb4", *inputs, **given) for run in (computed, on_cpu))
    assert_near(ours, wide(theirs), SUM if dtype == np.float32 else 4)  # as above


def test_fp4_is_refused() -> None:
    parts = Nf4Scheme().encode(normal(7, 64))
    inputs = [normal(5, 64), parts["nf4"], parts["absmax"]]
    with pytest.raises(NotImplementedError, match="quant_type=0 is not computed here, only quant_type=1 is"):
        CudaReference(model("MatMulBnb4", inputs, K=64, N=7, block_size=64, quant_type=0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("bits", "blocks"), [(4, 2), (4, 3), (8, 3)])
@pytest.mark.parametrize("zero", [False, True])
def test_rows_of_a_table_in_few_bits(zero: bool, bits: int, blocks: int, dtype: Any) -> None:
    random = np.random.default_rng(6)
    top = 1 << bits
    codes, points = (random.integers(0, top, shape, np.uint8) for shape in ((9, 32 * blocks), (9, blocks)))
    scales = np.abs(normal(9, blocks, dtype=dtype))
    middle = points if zero else np.full_like(points, top // 2)
    table = (codes.reshape(9, blocks, 32) - middle[..., None].astype(np.float64)) * wide(scales)[..., None]
    packed: list[Array] = [codes, np.pad(points, ((0, 0), (0, blocks % 2 if bits == 4 else 0)))]
    if bits == 4:
        packed = [pack_int4(x) for x in packed]
    ids = np.array([[3, 3, 0], [8, 1, 2]])
    inputs = [packed[0], ids, scales, *packed[1:]][: 4 if zero else 3]
    given: dict[str, Any] = {"bits": bits, "block_size": 32, "quantize_axis": 1, "gather_axis": 0, "types": [dtype]}
    rows = computed("GatherBlockQuantized", *inputs, **given)
    np.testing.assert_array_equal(wide(rows), wide(rounded(table.reshape(9, -1), dtype)[ids]))
    if dtype in CPU:
        theirs = on_cpu("GatherBlockQuantized", *inputs, **given)
        assert_near(rows, wide(theirs), 1.01, atol_part=0)  # there the product is in 16 bits, too


# --- norms ---------------------------------------------------------------------------------------------

WIDTH = 96


def added(*parts: Array) -> Array:
    """The sum, rounded as it grows."""
    total = parts[0]
    for part in parts[1:]:
        total = rounded(total.astype(np.float32) + part.astype(np.float32), total.dtype)
    return total


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_skip_is_added_before_a_layer_norm(rank: int, biased: bool, dtype: Any) -> None:
    shape = (2, 3, WIDTH)[-rank:]
    x, skip = (normal(*shape, seed=i, dtype=dtype) for i in range(2))
    gamma, beta, bias = (normal(WIDTH, seed=i, dtype=dtype) for i in range(2, 5))
    inputs = [x, skip, gamma, beta, *([bias] if biased else [])]
    result, total = computed("SkipLayerNormalization", *inputs, outputs=("y", "", "", "sum"), epsilon=1e-6)
    expected = added(x, *([bias] if biased else []), skip)
    np.testing.assert_array_equal(wide(total), wide(expected))
    exact = functional.layer_norm(tensor(total), (WIDTH,), tensor(gamma), tensor(beta), 1e-6)
    assert result.dtype == total.dtype == dtype
    assert_near(result, exact, once(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_skip_is_added_before_an_rms_norm(biased: bool, dtype: Any) -> None:
    x, skip = (normal(5, WIDTH, seed=i, dtype=dtype) for i in range(2))
    gamma, bias = (normal(WIDTH, seed=i, dtype=dtype) for i in range(2, 4))
    inputs = [x, skip, gamma, *([bias] if biased else [])]
    result, total = computed("SkipSimplifiedLayerNormalization", *inputs, outputs=("y", "", "", "sum"), epsilon=1e-6)
    np.testing.assert_array_equal(wide(total), wide(added(x, *([bias] if biased else []), skip)))
    assert_near(result, functional.rms_norm(tensor(total), (WIDTH,), tensor(gamma), 1e-6), once(dtype))
    assert result.dtype == total.dtype == dtype
    alone = computed("SkipSimplifiedLayerNormalization", *inputs, epsilon=1e-6)
    np.testing.assert_array_equal(wide(alone), wide(result))  # whether the sum is asked for or not


@pytest.mark.parametrize("dtype", CPU, ids=str)
@pytest.mark.parametrize("op_type", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_norms_with_a_skip_are_those_of_onnx_runtime(op_type: str, dtype: Any) -> None:
    x, skip = (normal(1, 5, WIDTH, seed=i, dtype=dtype) for i in range(2))
    vectors = [normal(WIDTH, seed=i, dtype=dtype) for i in range(2, 5 if op_type == "SkipLayerNormalization" else 4)]
    names = ("y", "", "", "sum")
    ours, theirs = (run(op_type, x, skip, *vectors, outputs=names, epsilon=1e-6) for run in (computed, on_cpu))
    # On the CPU three are summed in float32 and rounded once: a sum differs by a rounding, and what is normed with it.
    assert_near(ours[1], wide(theirs[1]), 2 if dtype == np.float16 else SUM)
    assert_near(ours[0], wide(theirs[0]), 4 if dtype == np.float16 else SUM)


@pytest.mark.parametrize("op_type", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_squares_beyond_float16_are_summed_and_a_sum_beyond_it_shows(op_type: str) -> None:
    x, gamma = np.array([[30000, -20000, 100, 0]], np.float16), np.ones(4, np.float16)
    names = ("y", "", "", "sum")
    result, total = computed(op_type, x, np.zeros_like(x), gamma, outputs=names)
    assert np.isfinite(result).all()
    result, total = computed(op_type, x, np.full_like(x, 40000), gamma, outputs=names)
    assert total[0, 0] == np.inf
    assert not np.isfinite(result).all()


@pytest.mark.parametrize("op_type", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_a_mean_that_cuda_does_not_give_out_is_refused(op_type: str) -> None:
    x, gamma = normal(2, 4), np.ones(4, np.float32)
    with pytest.raises(NotImplementedError, match="mean and inv_std_var are not computed on CUDA, leave them out"):
        computed(op_type, x, x, gamma, outputs=("y", "mean"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("groups", "epsilon"), [(1, 1e-6), (3, 1e-6), (3, 2.0**42)])
def test_a_gated_rms_norm_is_rounded_once(groups: int, epsilon: float, dtype: Any) -> None:
    """With an epsilon like the last nothing is normed, and what remains is SiLU(gate) · x · scale / √epsilon."""
    x, gate = (rounded(3 * normal(5, groups * 32, seed=i), dtype) for i in range(2))
    scale = normal(32, seed=2, dtype=dtype)
    result = computed("GatedRMSNorm", x, scale, gate, epsilon=epsilon, activation="silu")
    by_group = functional.rms_norm(tensor(x).reshape(5, groups, 32), (32,), tensor(scale), epsilon).reshape(5, -1)
    assert result.dtype == dtype
    exact = by_group * functional.silu(tensor(gate))
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)  # below it a rounding is one of the smallest number
    allowed = (8 if dtype == np.float32 else 1.01) * unit(np.dtype(dtype)) * np.maximum(exact.abs().numpy(), smallest)
    assert_within(result, exact, allowed)


def test_another_activation_of_the_gate_is_refused() -> None:
    inputs = normal(2, 4), np.ones(4, np.float32), normal(2, 4)
    with pytest.raises(NotImplementedError, match="activation=sigmoid is not computed here, only activation=silu is"):
        CudaReference(model("GatedRMSNorm", inputs, activation="sigmoid"))


# --- activations ---------------------------------------------------------------------------------------

SWEEP = np.linspace(-12, 12, 1001)


@pytest.mark.parametrize(("alpha", "dtype"), [(a, t) for a in (1.0, 1.702) for t in FLOATS], ids=str)
def test_quick_gelu_loses_no_more_than_its_steps_do(alpha: float, dtype: Any) -> None:
    x = SWEEP.astype(dtype)
    exact = tensor(x) * torch.sigmoid(alpha * tensor(x))
    # The gate is between 0 and 1 and off by some units of 1: of alpha · x (relative, where the gate changes least),
    # e^-x, 1 + e^-x, the quotient and the difference; the result by as many units of x.
    allowed = 4 * unit(np.dtype(dtype)) * np.maximum(np.abs(wide(x)), 1)
    result = computed("QuickGelu", x, alpha=alpha)
    assert result.dtype == dtype
    assert (np.abs(wide(result) - exact.numpy()) <= allowed).all()


def test_quick_gelu_is_nothing_where_16_bits_cannot_tell_its_gate_from_nothing() -> None:
    assert (computed("QuickGelu", np.array([-7.7, -9, -60000], np.float16), alpha=1.0) == 0).all()
    assert (computed("QuickGelu", np.array([-5.6], BF16), alpha=1.0) == 0).all()
    assert computed("QuickGelu", np.array([60000], np.float16)) == 60000  # though alpha · x is infinite


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_quick_gelu_is_that_of_onnx_runtime(alpha: float) -> None:
    x = SWEEP.astype(np.float32)
    ours, theirs = (run("QuickGelu", x, alpha=alpha) for run in (computed, on_cpu))
    assert_near(ours, wide(theirs), 8)  # theirs has an exponential of its own, near enough in float32


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bias_gelu_adds_and_uses_the_error_function(dtype: Any) -> None:
    x, bias = rounded(3 * normal(5, WIDTH), dtype), normal(WIDTH, seed=1, dtype=dtype)
    result = computed("BiasGelu", x, bias)
    assert result.dtype == dtype
    # The gate is between 0 and 2 and off by some units of 1: of x / √2, its error function and the sum; as above.
    total = added(x, bias)
    allowed = 3 * unit(np.dtype(dtype)) * np.maximum(np.abs(wide(total)), 1)
    assert_within(result, functional.gelu(tensor(total)), allowed)
    if dtype == np.float32:
        assert_near(result, wide(on_cpu("BiasGelu", x, bias)), 8)
    if dtype == np.float16:  # what is small beside 1 is lost
        assert computed("BiasGelu", np.array([-4], dtype), np.array([0], dtype)) == 0


# --- rotation ------------------------------------------------------------------------------------------

HEADS, LENGTH = 3, 6


def turned(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """x (B, S, H, C) by cos and sin (B, S, C/2) as complex numbers in float64."""
    pairs = wide(x)
    half = cos.shape[-1]
    first, second = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else (pairs[..., :half], pairs[..., half:])
    result = (first + 1j * second) * (wide(cos) + 1j * wide(sin))[:, :, None]
    if interleaved:
        return np.stack([result.real, result.imag], axis=-1).reshape(x.shape)
    return np.concatenate([result.real, result.imag], axis=-1)


def tables(dtype: Any, half: int = 8) -> tuple[Array, Array]:
    angles = np.arange(40)[:, None] * 10000.0 ** -np.linspace(0, 1, half, endpoint=False)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["positions", "first"])
def test_heads_turn_by_their_positions(first: bool, by_head: bool, interleaved: bool, dtype: Any) -> None:
    x = normal(2, LENGTH, HEADS, 16, dtype=dtype)
    cos, sin = tables(dtype)
    positions = np.array([[3, 9, 4, 4, 39, 0], [0, 1, 2, 3, 4, 5]])
    if first:
        positions = np.arange(LENGTH)[None].repeat(2, axis=0) + 7
    exact = turned(x, cos[positions], sin[positions], interleaved)
    exact = exact.swapaxes(1, 2) if by_head else exact.reshape(2, LENGTH, -1)
    given = x.swapaxes(1, 2).copy() if by_head else x.reshape(2, LENGTH, -1)
    ids = np.array([7]) if first else positions
    more = {} if by_head else {"num_heads": HEADS}
    inputs = given, ids, cos, sin
    result = computed("RotaryEmbedding", *inputs, interleaved=int(interleaved), **more)
    assert result.dtype == dtype
    assert_near(result, exact, 3.01)  # two products and their sum, each at most as large as the largest value
    if dtype in CPU:
        theirs = on_cpu("RotaryEmbedding", *inputs, interleaved=int(interleaved), **more)
        assert_near(result, wide(theirs), 3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_channels_beyond_the_rotation_stay_as_they_are(dtype: Any) -> None:
    x = normal(1, LENGTH, HEADS * 24, dtype=dtype)
    cos, sin = tables(dtype)
    ids = np.arange(LENGTH)[None]
    result = computed("RotaryEmbedding", x, ids, cos, sin, num_heads=HEADS, rotary_embedding_dim=16)
    parts = [y.reshape(1, LENGTH, HEADS, 24) for y in (x, result)]
    np.testing.assert_array_equal(*(wide(part[..., 16:]) for part in parts))
    assert_near(parts[1][..., :16], turned(parts[0][..., :16], cos[ids], sin[ids], False), 3.01)


@pytest.mark.parametrize(
    ("ids", "given", "told"),
    [
        ([[0, 1, 2, 3, 4, 40]], {}, "a position is not in the tables, which have 40 rows"),
        ([[0, 1, 2, 3, 4, -1]], {}, "a position is not in the tables, which have 40 rows"),
        ([[0, 1]], {}, r"position_ids is \[1, 2\], not \[1, 6\]"),
        ([0], {"num_heads": 2}, "heads of 24 do not fit tables of 8 columns"),
        ([0], {"rotary_embedding_dim": 12}, "rotary_embedding_dim 12 needs num_heads and tables half as wide"),
    ],
)
def test_positions_and_tables_that_do_not_fit_are_an_error(ids: Any, given: dict[str, Any], told: str) -> None:
    x = normal(1, LENGTH, HEADS * 16)
    with pytest.raises(ValueError, match=told):
        computed("RotaryEmbedding", x, np.array(ids), *tables(np.float32), **{"num_heads": HEADS, **given})


def test_a_scale_that_no_kernel_reads_is_refused() -> None:
    inputs = normal(1, LENGTH, HEADS * 16), np.array([0]), *tables(np.float32)
    with pytest.raises(NotImplementedError, match=r"scale=2.0 is not computed here, only scale=1.0 is"):
        CudaReference(model("RotaryEmbedding", inputs, num_heads=HEADS, scale=2.0))
    plain, scaled = (on_cpu("RotaryEmbedding", *inputs, num_heads=HEADS, **more) for more in ({}, {"scale": 2.0}))
    np.testing.assert_array_equal(plain, scaled)


@pytest.mark.parametrize(("dtype", "bits", "left"), [(np.float16, 10, 2**-20), (BF16, 7, 0.0)])
def test_float16_multiplies_and_adds_at_once_and_bfloat16_does_not(dtype: Any, bits: int, left: float) -> None:
    """x · cos - rounded(x · sin), of which the second alone is rounded before the sum."""
    tilted = np.full((1, 1, 2), 1 + 2.0**-bits, dtype)
    low, _ = computed("RotaryEmbedding", tilted, np.array([[0]]), tilted[0, :, :1], tilted[0, :, :1], num_heads=1)[0, 0]
    assert low == left
