"""int8: the stored numbers, the product in exact integers, and that no CPU can saturate on them."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo
from tests.quant import product_graphs, products
from tests.quant.conftest import Made

from m0kit_quant import int8
from m0kit_quant.int8 import LEVELS, LIMIT, SMALLEST, ZERO_POINT, Int8Scheme, dequantize, quantize, quantize_activation

Float32 = NDArray[np.float32]
INT8, SIXTEEN = Int8Scheme(), Int8Scheme(inputs=16)
MOST = float(np.finfo(np.float32).max)
# Errors are compared as float32 sums: of two that are closer than this either may win.
SUMS = 1e-4
EXTREMES: dict[str, Float32] = {
    "zeros": np.zeros((3, 4), np.float32),
    "one zero row": np.array([[0, 0, 0], [1, -2, 3]], np.float32),
    "one value": np.array([[-7.5]], np.float32),
    "outlier": np.array([[1e-3] * 63 + [1e3]], np.float32),
    "negative outlier": np.array([[1e-3] * 63 + [-1e3]], np.float32),
    "constant": np.full((2, 5), 0.3, np.float32),
    "subnormal": np.array([[1e-45, -1e-45, 3e-45], [1e-40, 2e-40, -3e-40]], np.float32),
    "smallest normal": np.full((1, 3), 1.2e-38, np.float32),
    "tiny squares": np.array([[3e-25, -1e-25, 2e-25]], np.float32),
    "huge squares": np.array([[3e25, -1e25, 2e25]], np.float32),
    "largest": np.array([[MOST, -MOST, MOST / 3], [MOST, 1, 1e-45]], np.float32),
    "all sizes": np.array([[1e-30, 1e-10, 1, 1e10, 1e30]], np.float32),
}
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-MOST, MOST, width=32) | st.floats(-1, 1, width=32),
)


def random(*shape: int, seed: int = 0, scale: float = 0.1) -> Float32:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def squared_error(weight: Float32, stored: Float32, importance: Float32 | None = None) -> NDArray[np.float64]:
    """(N,) in float64."""
    error = np.square(weight.astype(np.float64) - stored.astype(np.float64))
    return np.asarray((error if importance is None else error * importance).sum(axis=1))


def by_largest(weight: Float32, limit: int = LIMIT) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """The largest |w| of a row becomes `limit`, in float64: values (K, N), scale (N,)."""
    scale = np.abs(weight).max(axis=1).astype(np.float64) / limit
    scale[scale == 0] = 1
    return np.rint(weight / scale[:, None]).astype(np.int8).T, scale


# --- what is stored --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_weights_keep_to_seven_bits_with_a_finite_scale(name: str) -> None:
    check_stored(EXTREMES[name])


@given(matrices)
def test_any_weights_keep_to_seven_bits_with_a_finite_scale(weight: Float32) -> None:
    check_stored(weight)


def check_stored(weight: Float32) -> None:
    values, scale = quantize(weight)
    assert (values.dtype, values.shape) == (np.int8, weight.shape[::-1])
    assert (scale.dtype, scale.shape) == (np.float32, weight.shape[:1])
    assert values.flags.c_contiguous  # as it lies in the data file
    assert np.abs(values.astype(int)).max() <= LIMIT == 64
    assert np.isfinite(scale).all()
    assert (scale >= np.finfo(np.float32).tiny).all()  # positive, and not lost where subnormals count as zero
    assert (scale[~weight.any(axis=1)] == 1).all()
    stored = dequantize(values, scale)
    plain_values, plain_scale = by_largest(weight)
    plain = squared_error(weight, (plain_values * plain_scale).T)
    # Never worse than the largest value deciding, but for roundings of the stored values themselves, 2⁻²⁴ of the
    # largest each and as much for the scale, and for what is so small that it counts as zero.
    roundings = weight.shape[1] ** 0.5 * (2.0**-23 * LIMIT * scale.astype(np.float64) + SMALLEST / LIMIT)
    assert (squared_error(weight, stored) ** 0.5 <= plain**0.5 * (1 + SUMS) + roundings).all()
    # Every value that was not clipped is within half a step.
    kept = np.abs(values.T.astype(int)) < LIMIT
    assert (np.abs(weight - stored.astype(np.float64)) <= 0.5001 * scale[:, None] + SMALLEST)[kept].all()


@pytest.mark.parametrize("exponent", [-60, -17, 0, 40, 90])
def test_a_power_of_two_changes_the_scale_alone(exponent: int) -> None:
    weight = random(5, 200, scale=1)
    values, scale = quantize(weight)
    again, scaled = quantize(np.ldexp(weight, exponent))
    assert np.array_equal(again, values)
    assert np.array_equal(scaled, np.ldexp(scale, exponent))


def test_clipping_is_chosen_where_it_pays_and_only_there() -> None:
    normal = random(16, 8960, scale=1)  # the widest of the published model: few values are near the largest
    outlier = np.r_[np.full(7, 0.01), 1.0].astype(np.float32)[None]
    values, scale = quantize(normal)
    plain_values, plain_scale = by_largest(normal)
    ours = squared_error(normal, dequantize(values, scale))
    assert ours.mean() < 0.92 * squared_error(normal, (plain_values * plain_scale).T).mean()  # 0.88
    assert quantize(outlier)[1][0] == pytest.approx(1 / LIMIT)  # 7 small errors weigh less than one large


def test_importance_lowers_the_error_that_counts() -> None:
    weight = random(100, 200, scale=1)
    importance = np.exp(2 * np.random.default_rng(1).standard_normal(200)).astype(np.float32)
    plain = squared_error(weight, dequantize(*quantize(weight)), importance)
    weighed = squared_error(weight, dequantize(*quantize(weight, importance)), importance)
    assert (weighed <= plain * (1 + SUMS)).all()
    assert weighed.mean() < 0.97 * plain.mean()


def test_inputs_that_do_not_matter_are_clipped_for_those_that_do() -> None:
    weight = np.array([[0.011, -0.013, 0.017, 1.0]], np.float32)
    importance = np.array([1, 1, 1, 0], np.float32)
    assert quantize(weight)[1][0] == pytest.approx(1 / LIMIT)
    assert quantize(weight, importance)[1][0] < 0.99 / LIMIT


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40))
def test_a_row_is_stored_by_itself(seed: int, rows: int, columns: int) -> None:
    weight = random(rows, columns, seed=seed)
    importance = random(1, columns, seed=seed + 1)[0] ** 2
    values, scale = quantize(weight, importance)
    for row in range(rows):
        alone, scale_alone = quantize(weight[row : row + 1], importance)
        assert np.array_equal(alone[:, 0], values[:, row])
        assert scale_alone[0] == scale[row]


@pytest.mark.parametrize("block_values", [1, 40, 41, 79, 1000])
def test_how_rows_are_shared_out_does_not_matter(block_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, table = random(23, 40), random(23, 40, seed=1)
    expected = (*quantize(weight), *int8.quantize_rows(table))
    monkeypatch.setattr(int8, "_BLOCK_VALUES", block_values)
    for ours, theirs in zip((*quantize(weight), *int8.quantize_rows(table)), expected, strict=True):
        assert np.array_equal(ours, theirs)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 30))
def test_every_row_is_filled_once(num_rows: int, width: int, block_values: int) -> None:
    count = np.zeros(num_rows, int)

    def fill(first: int, end: int) -> None:
        count[first:end] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "_BLOCK_VALUES", block_values)
        int8.by_rows(fill, num_rows, width)
    assert (count == 1).all()


def test_what_a_thread_raises_comes_out() -> None:
    def fill(first: int, end: int) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        int8.by_rows(fill, 3, 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_that_is_a_view_is_stored_as_its_copy(transposed: bool) -> None:
    base = random(40, 60)
    view = base.T[::2] if transposed else base[::2, 5:50]
    values, scale = quantize(view)
    again, expected = quantize(np.ascontiguousarray(view))
    assert np.array_equal(values, again)
    assert np.array_equal(scale, expected)


# --- rows that are looked up -----------------------------------------------------------------------


@given(matrices)
def test_looked_up_rows_are_within_half_a_step_of_eight_bits(table: Float32) -> None:
    check_rows(table)


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_rows_are_within_half_a_step_of_eight_bits(name: str) -> None:
    check_rows(EXTREMES[name])


def check_rows(table: Float32) -> None:
    values, scale = int8.quantize_rows(table)
    assert (values.dtype, values.shape) == (np.int8, table.shape)
    assert (scale.dtype, scale.shape) == (np.float32, table.shape[:1])
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert np.abs(values.astype(int)).max() <= LEVELS
    largest = np.abs(table).max(axis=1)
    assert (np.abs(values.astype(int)).max(axis=1)[largest > SMALLEST] == LEVELS).all()  # no bit is wasted
    error = np.abs(table - values.astype(np.float64) * scale[:, None])
    assert (error <= 0.5001 * scale[:, None].astype(np.float64)).all()  # 127.5 roundings of 2⁻²⁴ beyond the half


# --- activations and the product -------------------------------------------------------------------


def activations(seed: int, rows: int, columns: int) -> Float32:
    """Rows of very different sizes, one of zeros, one with an outlier, one of halves of a step."""
    x = random(rows, columns, seed=seed, scale=1) * np.exp2(np.arange(rows) % 40 - 20, dtype=np.float32)[:, None]
    x[0] = 0
    x[rows // 2, columns // 2] = 1e4
    x[-1] = (np.arange(columns) % 255 - 127) / np.float32(2)
    x[-1, 0] = 127 / np.float32(2)
    return x


def test_activations_are_within_half_a_step_around_their_zero_point() -> None:
    x = activations(0, 30, 50)
    q, a = quantize_activation(x)
    assert (q.dtype, q.shape, a.dtype, a.shape) == (np.uint8, x.shape, np.float32, (30, 1))
    assert q.min() == 1  # −127
    assert q.max() == 255
    assert (q[0] == ZERO_POINT).all()
    assert (np.abs(x - (q.astype(np.float64) - ZERO_POINT) * a) <= 0.5001 * a).all()
    assert np.array_equal(quantize_activation(x[3:4])[0][0], q[3])


@given(st.integers(0, 2**32), st.integers(3, 20), st.integers(2, 300))
def test_the_graph_quantises_the_same_to_the_bit(seed: int, rows: int, columns: int) -> None:
    x = activations(seed, rows, columns)
    weight = random(3, columns, seed=seed)
    _, integers, scale = product_graphs.linear(INT8, INT8.encode(weight), weight.shape, x, ("QuantizeLinear", "Mul"))
    q, a = quantize_activation(x)
    assert np.array_equal(scale, a)
    assert np.array_equal(integers, q)


@pytest.mark.parametrize("name", EXTREMES)
def test_the_graph_quantises_extreme_rows_the_same(name: str) -> None:
    x = EXTREMES[name]
    weight = random(3, x.shape[1])
    _, integers, scale = product_graphs.linear(INT8, INT8.encode(weight), weight.shape, x, ("QuantizeLinear", "Mul"))
    q, a = quantize_activation(x)
    assert np.array_equal(scale, a)
    assert np.array_equal(integers, q)


def test_the_product_is_that_of_exact_fractions() -> None:
    weight, x = random(4, 37), activations(1, 5, 37)
    values, scale = quantize(weight)
    q, a = quantize_activation(x)
    y = products.int8(x, values, scale)
    assert (y.dtype, y.shape) == (np.float32, (5, 4))
    for row in range(5):
        for out in range(4):
            total = sum((int(q[row, k]) - 128) * int(values[k, out]) for k in range(37))
            exact = total * Fraction(float(scale[out])) * Fraction(float(a[row, 0]))
            assert abs(Fraction(float(y[row, out])) - exact) <= abs(exact) * Fraction(2, 2**24)  # one rounding a scale


@given(st.integers(0, 2**32), st.integers(3, 20), st.integers(2, 300), st.integers(1, 40))
def test_onnx_runtime_gives_the_model_product(seed: int, rows: int, columns: int, outputs: int) -> None:
    weight, x = random(outputs, columns, seed=seed), activations(seed, rows, columns)
    parts = INT8.encode(weight)
    (y,) = product_graphs.linear(INT8, parts, weight.shape, x)
    expected = products.int8(x, parts["int8"], parts["scale"])
    # Integers are exact in both; then each rounds at most four times: the sum, its scale, the row's, the result.
    np.testing.assert_allclose(y, expected, rtol=4 * 2.0**-24, atol=0)


# What is left of eight bits' half a step is rounded to 1/254 of a step, half of that is off, and the float32
# in which it is taken from the input.
FINE = 0.5 / 254 / LEVELS + 2**-23


def test_two_rows_of_eight_bits_hold_sixteen_of_an_input() -> None:
    x = random(50, 70) * np.ldexp(np.float32(1), np.arange(-25, 25))[:, None]
    coarse, fine = (np.abs(s.rounded(x) - x) / np.abs(x).max(axis=1, keepdims=True) for s in (INT8, SIXTEEN))
    assert fine.max() <= FINE
    assert coarse.max() > 100 * fine.max()


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_onnx_runtime_gives_the_product_with_inputs_of_sixteen_bits(rows: int) -> None:
    weight, x = random(9, 130), random(rows, 130, seed=1)
    x[0] = 0
    parts = SIXTEEN.encode(weight)
    (y,) = product_graphs.linear(SIXTEEN, parts, weight.shape, x)
    expected = SIXTEEN.rounded(x).astype(np.float64) @ SIXTEEN.decode(parts, weight.shape).T.astype(np.float64)
    # Two sums in float32, each exact before it is scaled.
    assert np.abs(y - expected).max() <= 2**-22 * np.abs(expected).max()
    assert not y[0].any()


def test_the_product_is_near_the_true_one() -> None:
    weight, x = random(64, 256), random(50, 256, seed=1, scale=1)
    exact = x.astype(np.float64) @ weight.T
    error = np.square(products.int8(x, *quantize(weight)) - exact).sum() / np.square(exact).sum()
    # Steps of about 1/45 (weights, 2.9 deviations over 64) and 1/45 (inputs, 2.8 over 127) of a deviation, over √12.
    assert error**0.5 < 0.018


# --- saturation ------------------------------------------------------------------------------------


def planted() -> tuple[Float32, Float32]:
    """x (T, K), weight (N, K): inputs all at their largest, weights at the extreme of both neighbours.

    Where pairs are added in 16 bits, 255·v + 255·v is as large as sums get, of either sign.
    """
    x = np.ones((6, 64), np.float32) * np.exp2(np.arange(6, dtype=np.float32))[:, None]
    weight = np.full((6, 64), 0.5, np.float32)
    weight[1] *= -1
    weight[2, 1::2] *= -1  # neighbours of both signs: never too large
    weight[3, ::4] *= -1
    weight[4, 32:] *= -1
    weight[5] = random(1, 64)[0]
    return x, weight


def exact(q: NDArray[np.uint8], values: NDArray[np.int8]) -> NDArray[np.int64]:
    return np.asarray((q.astype(np.int64) - ZERO_POINT) @ values.astype(np.int64))


def without_vnni(q: NDArray[np.uint8], values: NDArray[np.int8]) -> NDArray[np.int64]:
    """VPMADDUBSW: neighbours multiplied and added in 16 bits, which saturate; their sums in 32; less the zero point."""
    pairs = (
        q[:, ::2, None].astype(np.int64) * values[None, ::2] + q[:, 1::2, None].astype(np.int64) * values[None, 1::2]
    )
    sums = np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)
    return np.asarray(sums - ZERO_POINT * values.astype(np.int64).sum(axis=0))


def test_the_planted_pattern_meets_the_largest_sums() -> None:
    x, weight = planted()
    q, _ = quantize_activation(x)
    values, _ = quantize(weight)
    assert (q == 255).all()
    assert (values[:, 0] == LIMIT).all()
    assert (values[:, 1] == -LIMIT).all()
    assert 2 * 255 * LIMIT < 2**15 <= 2 * 255 * (LIMIT + 1)  # one more would be too much


def test_pairs_in_16_bits_are_exact_for_seven_bits_and_wrong_for_eight() -> None:
    x, weight = planted()
    q, _ = quantize_activation(x)
    seven, _ = quantize(weight)
    eight, _ = by_largest(weight, 127)
    assert np.array_equal(without_vnni(q, seven), exact(q, seven))
    wrong = without_vnni(q, eight) != exact(q, eight)
    assert wrong[:, [0, 1, 3, 4]].all()
    assert not wrong[:, 2].any()
    off = np.abs(without_vnni(q, eight) - exact(q, eight)) / np.maximum(np.abs(exact(q, eight)), 1)
    assert off.max() > 0.5


@given(
    hnp.arrays(np.uint8, (2, 8)),
    hnp.arrays(np.int8, (8, 3), elements=st.integers(-LIMIT, LIMIT) | st.sampled_from([-LIMIT, LIMIT])),
)
def test_pairs_in_16_bits_are_exact_for_all_that_may_be_stored(q: NDArray[np.uint8], values: NDArray[np.int8]) -> None:
    assert np.array_equal(without_vnni(q, values), exact(q, values))


def test_onnx_runtime_is_exact_on_the_planted_pattern() -> None:
    x, weight = planted()
    q, _ = quantize_activation(x)
    values, _ = quantize(weight)
    ones = np.ones(len(weight), np.float32)
    (y,) = product_graphs.linear(INT8, {"int8": values, "scale": ones}, weight.shape, x * np.float32(127))
    # x is now 127·2ⁱ, so a row's scale is 2ⁱ; with scales of 1 the product is the integer sum itself.
    rows = np.exp2(np.arange(len(x)))[:, None]
    assert np.array_equal(y.astype(np.float64) / rows, exact(q, values).astype(np.float64))


@pytest.mark.parametrize("outliers", [False, True])
def test_no_stored_weight_of_an_artifact_uses_an_eighth_bit(made: Made, outliers: bool) -> None:
    folder = made("int8", outliers)
    largest = {name: int(np.abs(v.astype(int)).max()) for name, v in stored_integers(folder).items()}
    tables = {name: value for name, value in largest.items() if "embed_tokens" in name}
    products = {name: value for name, value in largest.items() if name not in tables}
    assert set(tables.values()) == {LEVELS}  # looked up, never multiplied as integers
    assert len(products) > 40
    assert max(products.values()) == LIMIT


def stored_integers(folder: Path) -> dict[str, NDArray[Any]]:
    """All int8 tensors of an artifact, from the data files."""
    found = {}
    for path in sorted(folder.glob("*.onnx")):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8:
                place = ExternalDataInfo(tensor)
                size = int(np.prod(tensor.dims))
                assert place.length == size
                raw = np.fromfile(folder / place.location, np.int8, size, offset=place.offset)
                found[tensor.name] = raw.reshape(tuple(tensor.dims))
    return found
