"""Standard operators in 16 bits: those of onnx that are kept round once, and those that are replaced are PyTorch's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from tests.parity.cuda.nodes import (
    BF16,
    FLOATS,
    HALVES,
    Array,
    assert_near,
    assert_within,
    computed,
    model,
    normal,
    tensor,
    unit,
    wide,
)
from torch.nn import functional

from m0kit_parity.cuda.arithmetic import rounded
from m0kit_parity.cuda.operators import OPERATORS
from m0kit_parity.cuda.standard import ONNX, STANDARD

X, Y = normal(6, 8), normal(6, 8, seed=1)
POSITIVE, COLUMN = np.abs(X) + np.float32(0.1), np.array([[1], [2]])


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


KEPT: dict[str, tuple[list[Array], dict[str, Any]]] = {
    "Abs": ([X], {}),
    "Add": ([X, Y], {}),
    "Cast": ([X], {"to": onnx.TensorProto.FLOAT}),
    "Clip": ([X, np.float32(-0.5), np.float32(0.5)], {}),
    "Concat": ([X, Y], {"axis": 0}),
    "Cos": ([30 * X], {}),
    "Div": ([X, Y], {}),
    "Equal": ([X, X], {}),
    "Erf": ([X], {}),
    "Exp": ([X], {}),
    "Expand": ([X[None], ints(2, 6, 8)], {}),
    "Gather": ([X, ints(3, 0, 3)], {"axis": 0}),
    "GatherElements": ([X, np.zeros((2, 8), np.int64)], {"axis": 0}),
    "GatherND": ([X, COLUMN], {}),
    "Greater": ([X, Y], {}),
    "GreaterOrEqual": ([X, Y], {}),
    "Identity": ([X], {}),
    "Less": ([X, Y], {}),
    "LessOrEqual": ([X, Y], {}),
    "Log": ([POSITIVE], {}),
    "Max": ([X, Y], {}),
    "Min": ([X, Y], {}),
    "Mul": ([X, Y], {}),
    "Neg": ([X], {}),
    "Pad": ([X, ints(0, 1, 0, 2)], {}),
    "Pow": ([POSITIVE, np.float32(2)], {}),
    "Reciprocal": ([X], {}),
    "ReduceMax": ([X, ints(-1)], {}),
    "Relu": ([X], {}),
    "Reshape": ([X, ints(-1, 4)], {}),
    "ScatterElements": ([X, np.zeros((1, 8), np.int64), Y[:1]], {"axis": 0}),
    "ScatterND": ([X, COLUMN, Y[:2]], {}),
    "Sin": ([30 * X], {}),
    "Slice": ([X, ints(1), ints(5), ints(1)], {}),
    "Split": ([X, ints(2, 6)], {"axis": 1, "outputs": ("y0", "y1")}),
    "Sqrt": ([POSITIVE], {}),
    "Squeeze": ([X[None], ints(0)], {}),
    "Sub": ([X, Y], {}),
    "Tanh": ([X], {}),
    "Tile": ([X, ints(2, 1)], {}),
    "Transpose": ([X], {"perm": [1, 0]}),
    "Unsqueeze": ([X, ints(0)], {}),
    "Where": ([X > 0, X, Y], {}),
}
# Of numbers that are never in 16 bits.
WHOLE = {"And", "BitShift", "BitwiseAnd", "Constant", "ConstantOfShape", "Not", "Or", "Range", "Shape", "Size"}


def test_each_operator_of_onnx_that_is_kept_is_held_here() -> None:
    assert KEPT.keys() | WHOLE == ONNX
    assert not ONNX & {operator.__name__ for operator in STANDARD}


def by_onnx(op_type: str, inputs: list[Array], more: dict[str, Any]) -> list[Array]:
    """By onnx's own evaluator, with none of our operators."""
    names = more.get("outputs", ("y0",))
    evaluator = ReferenceEvaluator(model(op_type, inputs, domain="", **more))
    return list(evaluator.run(list(names), {f"x{i}": x for i, x in enumerate(inputs)}))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op_type", sorted(KEPT))
def test_onnx_rounds_once_in_16_bits(op_type: str, dtype: Any) -> None:
    """The same operator on the same values in float32, rounded: to the bit."""
    inputs, more = KEPT[op_type]
    halves = [rounded(x, dtype) if x.dtype == np.float32 else x for x in inputs]
    floats = [x.astype(np.float32) if x.dtype == dtype else x for x in halves]
    for half, exact in zip(by_onnx(op_type, halves, more), by_onnx(op_type, floats, more), strict=True):
        assert half.dtype == (dtype if exact.dtype == np.float32 and op_type != "Cast" else exact.dtype)
        np.testing.assert_array_equal(wide(half), wide(rounded(exact, half.dtype)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_cast_to_16_bits_is_to_the_nearest_even_and_beyond_the_range_infinite(dtype: Any) -> None:
    step = 2 * unit(np.dtype(dtype))
    values = np.array([1 + step / 2, 1 + 3 * step / 2, 3.4e38, -3.4e38], np.float32)
    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    result = computed("Cast", values, domain="", to=to, types=[dtype])
    np.testing.assert_array_equal(wide(result), [1, 1 + 2 * step, np.inf, -np.inf])


@pytest.mark.parametrize(("op_type", "first", "second"), [("Add", 40000, 40000), ("Mul", 300, 300), ("Sub", -4e4, 4e4)])
def test_what_leaves_float16_is_infinite(op_type: str, first: float, second: float) -> None:
    halves = [np.array([value], np.float16) for value in (first, second)]
    assert np.isinf(computed(op_type, *halves, domain=""))


# --- replaced ------------------------------------------------------------------------------------------

# Sums of some hundred values in another order, in roundings of float32; 16 bits are rounded once besides.
SUM = 64.0
REPLACED: list[tuple[str, tuple[Array, ...], dict[str, Any], Callable[..., torch.Tensor]]] = [
    ("MatMul", (normal(2, 5, 96), normal(2, 96, 7)), {}, torch.matmul),
    ("MatMul", (normal(5, 96), normal(96, 7)), {}, torch.matmul),
    ("Gemm", (normal(5, 96), normal(7, 96), normal(7)), {"transB": 1}, lambda a, b, c: a @ b.T + c),
    ("Gemm", (normal(96, 5), normal(96, 7)), {"transA": 1, "alpha": 0.5}, lambda a, b: 0.5 * a.T @ b),
    ("Gemm", (normal(5, 96), normal(96, 7), normal(5, 1)), {"beta": 0.25}, lambda a, b, c: a @ b + 0.25 * c),
    ("LayerNormalization", (normal(5, 96) + 3, normal(96), normal(96, seed=1)), {"epsilon": 1e-6},
     lambda x, w, b: functional.layer_norm(x, (96,), w, b, 1e-6)),
    ("LayerNormalization", (normal(5, 4, 24), normal(4, 24)), {"axis": 1},
     lambda x, w: functional.layer_norm(x, (4, 24), w, None, 1e-5)),
    ("RMSNormalization", (100 * normal(5, 96), normal(96)), {"epsilon": 1e-6},
     lambda x, w: functional.rms_norm(x, (96,), w, 1e-6)),
    ("SimplifiedLayerNormalization", (100 * normal(5, 96), normal(96)), {"epsilon": 1e-6},
     lambda x, w: functional.rms_norm(x, (96,), w, 1e-6)),
    ("Softmax", (3 * normal(5, 96),), {}, lambda x: torch.softmax(x, -1)),
    ("Softmax", (3 * normal(5, 96),), {"axis": 0}, lambda x: torch.softmax(x, 0)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", range(len(REPLACED)), ids=[f"{case[0]}-{i}" for i, case in enumerate(REPLACED)])
def test_an_operator_of_our_own_rounds_once(place: int, dtype: Any) -> None:
    op_type, floats, given, exact = REPLACED[place]
    inputs = [rounded(x, dtype) for x in floats]
    result = computed(op_type, *inputs, domain="", **given)
    assert result.dtype == dtype
    assert_near(result, exact(*map(tensor, inputs)), SUM if dtype == np.float32 else 1.01)


@pytest.mark.parametrize("op_type", ["RMSNormalization", "SimplifiedLayerNormalization"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_norm_of_float32_with_a_scale_in_16_bits_comes_out_in_16(op_type: str, dtype: Any) -> None:
    """What narrows a residual stream in float32 for the products behind it, in one step."""
    x, scale = 1e5 * normal(5, 96), rounded(normal(96, seed=1), dtype)
    result = computed(op_type, x, scale, domain="", types=[dtype], epsilon=1e-6)
    assert result.dtype == dtype
    assert_near(result, functional.rms_norm(tensor(x), (96,), tensor(scale), 1e-6), 1.01)


def test_second_results_of_norms_are_in_float32() -> None:
    x, scale = normal(5, 96, dtype=np.float16), normal(96, dtype=np.float16)
    floats = [np.float16, np.float32, np.float32]
    result = computed("LayerNormalization", x, scale, domain="", outputs=("y", "mean", "inverse"), types=floats)
    assert [each.dtype for each in result] == floats
    assert_near(result[1], wide(x).mean(axis=1, keepdims=True), SUM)
    assert_near(result[2], 1 / np.sqrt(wide(x).var(axis=1, keepdims=True) + 1e-5), SUM)
    _, inverse = computed("SimplifiedLayerNormalization", x, scale, domain="", outputs=("y", "r"), types=floats[:2])
    assert_near(inverse, 1 / np.sqrt(np.square(wide(x)).mean(axis=1, keepdims=True) + 1e-5), SUM)


def test_a_sigmoid_in_float16_is_rounded_once() -> None:
    x = np.linspace(-9, 20, 1001).astype(np.float16)  # below, results are no normal numbers of float16
    exact = torch.sigmoid(tensor(x)).numpy()
    # Before that 1 less a value near 1 is taken, in float32.
    assert_within(computed("Sigmoid", x, domain=""), exact, unit(x.dtype) * exact + 2 * unit(np.dtype(np.float32)))
    assert computed("Sigmoid", np.array([-60000], np.float16), domain="") == 0


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
def test_a_sigmoid_that_rounds_each_step_loses_what_is_small_beside_1(dtype: Any) -> None:
    x = np.linspace(-20, 20, 1001).astype(dtype)
    result = computed("Sigmoid", x, domain="")
    assert result.dtype == dtype
    # Off by a few units of 1 at most, since every step is between 0 and 2; not by a part of what is small.
    assert (np.abs(wide(result) - torch.sigmoid(tensor(x)).numpy()) <= 3 * unit(np.dtype(dtype))).all()
    assert (wide(result) <= 1).all()
    assert (wide(result)[x < (-6 if dtype == BF16 else -18)] == 0).all()


@pytest.mark.parametrize(("dtype", "roundings"), [(np.float32, 8), (np.float16, 1.01), (BF16, 2.01)], ids=str)
def test_gelu_keeps_what_is_small(dtype: Any, roundings: float) -> None:
    """In part: float16 is rounded once, bfloat16 twice. Below -3.5 results are no normal numbers of float16."""
    x = np.linspace(-3.5, 12, 1001).astype(dtype)
    result = computed("Gelu", x, domain="")
    assert result.dtype == dtype
    assert_near(result, functional.gelu(tensor(x)), roundings, atol_part=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("width", [16, 24])
def test_rotation_is_that_of_onnx_with_its_roundings(
    width: int, interleaved: int, by_head: bool, by_position: bool, dtype: Any
) -> None:
    angles = normal(40, 8) * 3
    tables = [rounded(table, dtype) for table in (np.cos(angles), np.sin(angles))]
    ids = np.array([[3, 9, 4, 4, 39, 0], [0, 1, 2, 3, 4, 5]])
    x = normal(2, 3, 6, width, dtype=dtype) if by_head else normal(2, 6, 3 * width, dtype=dtype)
    inputs = [x, *(tables if by_position else (table[ids] for table in tables)), *([ids] if by_position else [])]
    given = {"interleaved": interleaved, "num_heads": 3, "rotary_embedding_dim": 16}
    result = computed("RotaryEmbedding", *inputs, domain="", **given)
    exact = by_onnx("RotaryEmbedding", [x.astype(np.float64) if x.dtype != np.int64 else x for x in inputs], given)
    assert result.dtype == dtype
    assert_near(result, exact[0], 3.01)  # two products and their sum, each at most as large as the largest value


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_integers_times_their_scales_are_rounded_once(axis: int, dtype: Any) -> None:
    integers = np.random.default_rng(4).integers(-128, 128, (6, 8), np.int8)
    scale = normal((6, 8)[axis], dtype=dtype)
    exact = integers * wide(scale.reshape(6, 1) if axis == 0 else scale)
    result = computed("DequantizeLinear", integers, scale, domain="", axis=axis, types=[dtype])
    assert result.dtype == dtype
    np.testing.assert_array_equal(wide(result), wide(rounded(exact.astype(np.float32), dtype)))


def test_a_zero_point_of_integers_is_refused() -> None:
    inputs = np.zeros((2, 2), np.int8), np.ones(2, np.float16), np.zeros(2, np.int8)
    with pytest.raises(NotImplementedError, match="the input zero_point is not computed here, leave it out"):
        computed("DequantizeLinear", *inputs, domain="", types=[np.float16])


def test_tables_of_another_width_are_an_error() -> None:
    x, table = normal(1, 6, 48), normal(1, 6, 4)
    with pytest.raises(ValueError, match="tables of 4 columns turn 8 channels, not 16"):
        computed("RotaryEmbedding", x, table, table, domain="", num_heads=3)


@pytest.mark.parametrize(
    ("op_type", "given", "told"),
    [
        ("Gelu", {"approximate": "tanh"}, "Gelu Gelu: approximate=tanh is not computed here, only approximate=none is"),
        ("LayerNormalization", {"stash_type": 10}, "stash_type=10 is not computed here, only stash_type=1 is"),
    ],
)
def test_another_attribute_is_refused_by_name(op_type: str, given: dict[str, Any], told: str) -> None:
    with pytest.raises(NotImplementedError, match=told):
        computed(op_type, X, X[0], domain="", **given)


def test_no_two_operators_have_one_name() -> None:
    names = [(operator.op_domain, operator.__name__) for operator in (*OPERATORS, *STANDARD)]
    assert len(set(names)) == len(names)
