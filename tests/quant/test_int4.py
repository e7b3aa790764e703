"""int4: packing, the search for scales, and that ONNX Runtime's MatMulNBits means by the bytes what we mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tests.quant import product_graphs, products

from m0kit_quant import int8
from m0kit_quant.int4 import BLOCKS, Int4, dequantize, pack, quantize, unpack

Float32 = NDArray[np.float32]
# Errors are compared as float32 sums: of two that are closer than this either may win.
SUMS = 1e-4
# ONNX Runtime adds up x·q·s and x·z·s apart, in float32 in some order: this much of the sum of their sizes may be
# lost. 3e-7 were seen.
ADDED = 2.0**-20
MOST = float(
    np.float32(1e37)
)  # ten times below float32's largest: the range of a block, from −m to m, must be a number too


def random(*shape: int, seed: int = 0, scale: float = 0.1) -> Float32:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def error_of(weight: Float32, stored: Float32, block: int, importance: Float32 | None = None) -> NDArray[np.float64]:
    """Squared error of each block (N, B) in float64."""
    error = np.square(weight.astype(np.float64) - stored)
    weighed = error if importance is None else error * importance
    return np.asarray(weighed.reshape(len(weight), -1, block).sum(axis=2))


def min_max(weight: Float32, block: int) -> NDArray[np.float64]:
    """What the stored values stand for when the range of a block decides, in float64 (N, K)."""
    w = weight.astype(np.float64).reshape(len(weight), -1, block)
    low, high = np.minimum(w.min(axis=2, keepdims=True), 0), np.maximum(w.max(axis=2, keepdims=True), 0)
    step = np.where(high > low, high - low, 1) / 15
    zero = np.rint(-low / step)
    return np.asarray((np.clip(np.rint(w / step) + zero, 0, 15) - zero) * step).reshape(weight.shape)


# --- packing ---------------------------------------------------------------------------------------


@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 9).map(lambda n: 2 * n)), elements=st.integers(0, 15)
    )
)
def test_packing_is_undone(values: NDArray[np.uint8]) -> None:
    packed = pack(values)
    assert (packed.dtype, packed.shape) == (np.uint8, (len(values), values.shape[1] // 2))
    assert np.array_equal(unpack(packed), values)
    assert np.array_equal(pack(unpack(packed)), packed)


def test_the_first_of_two_is_in_the_low_half() -> None:
    assert pack(np.array([[1, 2, 15, 0]], np.uint8)).tolist() == [[0x21, 0x0F]]
    assert unpack(np.array([0x21, 0xF0], np.uint8)).tolist() == [1, 2, 0, 15]


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7])
def test_zero_points_are_packed_row_by_row_and_a_last_half_is_eight(blocks: int) -> None:
    weight = random(5, 32 * blocks)
    weight[:, :32] = np.abs(weight[:, :32])  # zero points of 0 beside others
    stored = quantize(weight, 32)
    assert stored.packed.shape == (5, blocks, 16)
    assert stored.scale.shape == (5, blocks)
    assert stored.zero_point.shape == (5, (blocks + 1) // 2)
    assert [part.dtype for part in stored] == [np.uint8, np.float32, np.uint8]
    zero = unpack(stored.zero_point)
    assert (zero[:, 0] == 0).all()
    if blocks % 2:
        assert (zero[:, -1] == 8).all()
    for block in range(blocks):
        alone = quantize(weight[:, 32 * block : 32 * block + 32], 32)
        assert np.array_equal(alone.packed[:, 0], stored.packed[:, block])
        assert np.array_equal(unpack(alone.zero_point)[:, 0], zero[:, block])


@pytest.mark.parametrize(
    ("block", "inputs", "said"),
    [
        (32, 48, "block 32 does not divide 48 inputs"),
        (128, 64, "block 128 does not divide 64 inputs"),
        (16, 64, "block 16 is not one of 32, 64, 128"),
        (256, 256, "block 256 is not one of"),
        (0, 64, "block 0 is not one of"),
        (-32, 64, "block -32 is not one of"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(block: int, inputs: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        quantize(random(3, inputs), block)


# --- the search ------------------------------------------------------------------------------------

SPECIAL: dict[str, Float32] = {
    "zeros": np.zeros((2, 64), np.float32),
    "one block of zeros": np.concatenate([np.zeros((2, 32)), np.ones((2, 32))], axis=1).astype(np.float32),
    "constant": np.full((2, 64), 0.37, np.float32),
    "negative constant": np.full((2, 64), -0.37, np.float32),
    "all negative": -np.abs(random(3, 128)) - np.float32(0.05),
    "all positive": np.abs(random(3, 128)) + np.float32(0.05),
    "outlier": np.where(np.arange(128) == 5, 100, random(3, 128)).astype(np.float32),
    "negative outlier": np.where(np.arange(128) == 5, -100, random(3, 128)).astype(np.float32),
    "two outliers": np.where(np.arange(128) % 64 == 5, np.where(np.arange(128) < 64, 100, -100), random(3, 128)).astype(
        np.float32
    ),
    "far from zero": random(3, 128, scale=1e-3) + np.float32(7),
    "subnormal": np.full((1, 32), 1e-42, np.float32),
    "tiny squares": random(3, 64, scale=1e-26),
    "huge squares": random(3, 64, scale=1e26),
    "largest": (np.sign(random(3, 64)) * MOST).astype(np.float32),
}
matrices = st.sampled_from(BLOCKS).flatmap(
    lambda block: st.tuples(
        st.just(block),
        hnp.arrays(
            np.float32,
            st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda n: n * block)),
            elements=st.floats(-MOST, MOST, width=32) | st.floats(-1, 1, width=32) | st.just(0.0),
            fill=st.floats(-1, 1, width=32),
        ),
    )
)


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_blocks_are_stored_no_worse_than_by_their_range(name: str, block: int) -> None:
    weight = SPECIAL[name]
    check_stored(weight, block if weight.shape[1] % block == 0 else 32)


@given(matrices)
def test_any_block_is_stored_no_worse_than_by_its_range(drawn: tuple[int, Float32]) -> None:
    block, weight = drawn
    check_stored(weight, block)


def check_stored(weight: Float32, block: int) -> None:
    stored = quantize(weight, block)
    assert np.isfinite(stored.scale).all()
    assert (stored.scale >= np.finfo(np.float32).tiny).all()
    values = dequantize(stored)
    assert (values.dtype, values.shape) == (np.float32, weight.shape)
    assert np.isfinite(values).all()
    assert (values[weight == 0] == 0).all()  # a zero point is a whole number, so zero is exact
    largest = np.abs(weight).reshape(len(weight), -1, block).max(axis=2).astype(np.float64)
    # Beyond that, values are rounded, and a scale is a quotient of float32 sums of up to 128 terms: 2⁻²⁰ of the
    # largest each. What is less than SMALLEST counts as zero.
    roundings = block**0.5 * (2.0**-20 * largest + int8.SMALLEST)
    plain = error_of(weight, min_max(weight, block), block)
    assert (error_of(weight, values, block) ** 0.5 <= plain**0.5 * (1 + SUMS) + roundings).all()


@pytest.mark.parametrize("name", ["constant", "negative constant", "one block of zeros"])
def test_blocks_of_one_value_are_exact(name: str) -> None:
    weight = SPECIAL[name]
    # 15 steps of v/15, a quotient of two float32 sums of 32 terms.
    np.testing.assert_allclose(dequantize(quantize(weight, 32)), weight, rtol=2.0**-20, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_blocks_of_one_sign_use_all_sixteen_levels(sign: int) -> None:
    weight = (sign * np.linspace(0, 1, 64)).astype(np.float32)[None]
    stored = quantize(weight, 64)
    assert unpack(stored.zero_point)[0, 0] == (0 if sign > 0 else 15)
    assert set(unpack(stored.packed).reshape(-1).tolist()) == set(range(16))
    assert np.abs(dequantize(stored) - weight).max() < 0.55 / 15


def test_an_outlier_costs_its_own_block_alone() -> None:
    weight = random(4, 128)
    before = dequantize(quantize(weight, 32))
    weight[:, 70] = 50
    after = dequantize(quantize(weight, 32))
    assert np.array_equal(before[:, :64], after[:, :64])
    assert np.array_equal(before[:, 96:], after[:, 96:])
    np.testing.assert_allclose(after[:, 70], 50, rtol=0.01)


@pytest.mark.parametrize(("block", "plain", "best"), [(32, 0.081, 0.079), (64, 0.091, 0.087), (128, 0.101, 0.095)])
def test_the_search_is_worth_it_on_normal_weights(block: int, plain: float, best: float) -> None:
    weight = random(200, 1024, scale=1)
    errors = [
        (error_of(weight, values, block).sum() / weight.size) ** 0.5
        for values in (min_max(weight, block), dequantize(quantize(weight, block)))
    ]
    assert errors == pytest.approx([plain, best], abs=0.001)


def test_importance_lowers_the_error_that_counts() -> None:
    weight = random(50, 256)
    importance = np.exp(2 * np.random.default_rng(1).standard_normal(256)).astype(np.float32)
    plain = error_of(weight, dequantize(quantize(weight, 128)), 128, importance).sum()
    weighed = error_of(weight, dequantize(quantize(weight, 128, importance)), 128, importance).sum()
    assert weighed < 0.85 * plain
    same = quantize(weight, 128, np.full(256, 2, np.float32))  # only ratios count
    assert all(np.array_equal(a, b) for a, b in zip(same, quantize(weight, 128), strict=True))


def test_inputs_that_are_never_seen_cost_nothing() -> None:
    weight = random(3, 64)
    unseen = [7, 8]
    weight[:, unseen] = 0.45, -0.45  # less than twice the others' largest: the range may shrink to 0.6 of itself
    importance = np.ones(64, np.float32)
    importance[unseen] = 0
    error = np.delete(weight - dequantize(quantize(weight, 64, importance)), unseen, axis=1)
    plain = np.delete(weight - dequantize(quantize(weight, 64)), unseen, axis=1)
    assert np.square(error).sum() < 0.8 * np.square(plain).sum()
    nothing = quantize(weight, 64, np.zeros(64, np.float32))
    assert np.isfinite(dequantize(nothing)).all()


@given(st.integers(0, 2**32), st.sampled_from(BLOCKS), st.integers(1, 5), st.integers(1, 3))
def test_a_row_is_stored_by_itself(seed: int, block: int, rows: int, blocks: int) -> None:
    weight = random(rows, block * blocks, seed=seed)
    importance = random(1, block * blocks, seed=seed + 1)[0] ** 2
    stored = quantize(weight, block, importance)
    for row in range(rows):
        alone = quantize(weight[row : row + 1], block, importance)
        assert all(np.array_equal(a[0], b[row]) for a, b in zip(alone, stored, strict=True))


@pytest.mark.parametrize("block_values", [1, 64, 200, 10_000])
def test_how_rows_are_shared_out_does_not_matter(block_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(13, 96)
    expected = quantize(weight, 32)
    monkeypatch.setattr(int8, "_BLOCK_VALUES", block_values)
    assert all(np.array_equal(a, b) for a, b in zip(quantize(weight, 32), expected, strict=True))


@pytest.mark.parametrize("exponent", [-60, 9, 60])
def test_a_power_of_two_changes_the_scale_alone(exponent: int) -> None:
    weight = random(5, 192)
    stored, scaled = quantize(weight, 64), quantize(np.ldexp(weight, exponent), 64)
    assert np.array_equal(stored.packed, scaled.packed)
    assert np.array_equal(stored.zero_point, scaled.zero_point)
    assert np.array_equal(np.ldexp(stored.scale, exponent), scaled.scale)


def test_a_view_is_stored_as_its_copy() -> None:
    view = random(128, 40).T[::2]
    ours, theirs = quantize(view, 64), quantize(np.ascontiguousarray(view), 64)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- what ONNX Runtime makes of it -----------------------------------------------------------------

SHAPES = [(block, blocks) for block in BLOCKS for blocks in (1, 2, 3, 5)]  # odd: half a byte of zero points to spare


def sample(block: int, blocks: int, outputs: int = 48, rows: int = 17) -> tuple[Int4, Float32]:
    weight = random(outputs, block * blocks)
    weight[: outputs // 3] += np.float32(0.2)  # zero points away from the middle
    weight[-1] = -np.abs(weight[-1])
    x = random(rows, block * blocks, seed=1, scale=1)
    x[0] = 0
    x[1, 3] = 100
    return quantize(weight, block), x


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(("block", "blocks"), SHAPES)
def test_onnx_runtime_reads_the_weights_we_wrote(block: int, blocks: int, level: int) -> None:
    stored, _ = sample(block, blocks)
    identity = np.eye(block * blocks, dtype=np.float32)
    # Each product has one term: at most the rounding of (q − z)·s, which an engine may spell q·s − z·s.
    bound = 2.0**-22 * 15 * stored.scale.max()
    np.testing.assert_allclose(
        product_graphs.four_bits(stored, identity, level).T, dequantize(stored), rtol=0, atol=bound
    )


@pytest.mark.parametrize(("block", "blocks"), SHAPES)
def test_onnx_runtime_with_rounded_activations_reads_them_too(block: int, blocks: int) -> None:
    """One value a block is the largest of its block: 127 steps, without any rounding."""
    stored, _ = sample(block, blocks)
    identity = np.eye(block * blocks, dtype=np.float32)
    ours = product_graphs.four_bits(stored, identity, 4).T
    np.testing.assert_allclose(ours, dequantize(stored), rtol=0, atol=2.0**-21 * 15 * stored.scale.max())


def apart(stored: Int4) -> NDArray[np.float64]:
    """(q + z)·s (N, K): what is added up where weights and their zero points are multiplied apart."""
    q, zero = unpack(stored.packed).astype(np.float64), unpack(stored.zero_point).astype(np.float64)
    return np.asarray(((q + zero[:, : q.shape[1], None]) * stored.scale[..., None]).reshape(len(q), -1))


@pytest.mark.parametrize(("block", "blocks"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_onnx_runtime_gives_the_model_product(block: int, blocks: int, rows: int) -> None:
    stored, x = sample(block, blocks, rows=max(rows, 2))
    x = x[-rows:]
    y, expected = product_graphs.four_bits(stored, x, 4), products.int4(x, stored)
    w = np.abs(dequantize(stored)).astype(np.float64)
    bound = ADDED * (np.abs(x).astype(np.float64) @ apart(stored).T)
    # An input within a few roundings of the middle of two steps may go to either: then a whole step of it more.
    grouped = x.reshape(rows, blocks, block)
    steps = np.abs(grouped).max(axis=2, keepdims=True) / np.float32(127)
    position = np.divide(grouped, steps, out=np.zeros_like(grouped), where=steps > 0)
    undecided = np.abs(np.abs(position - np.floor(position)) - 0.5) < 1e-4
    bound += np.where(undecided, steps, 0).reshape(x.shape).astype(np.float64) @ w.T
    assert undecided.mean() < 1e-3
    assert (np.abs(y - expected) <= bound + 1e-30).all()


def test_that_bound_is_far_below_what_rounded_activations_change() -> None:
    stored, x = sample(64, 3)
    exact = x.astype(np.float64) @ dequantize(stored).T
    bound = ADDED * (np.abs(x).astype(np.float64) @ apart(stored).T)
    off = np.abs(products.int4(x, stored) - exact)
    assert np.median(off[2:] / bound[2:]) > 50
    # Half a step of its block for each input.
    steps = np.abs(x.reshape(len(x), 3, 64)).max(axis=2, keepdims=True).astype(np.float64) / 127
    half = np.broadcast_to(steps / 2, (len(x), 3, 64)).reshape(x.shape)
    assert (off <= 1.001 * half @ np.abs(dequantize(stored)).T + 1e-6).all()


def test_without_packing_the_operator_rounds_no_activations() -> None:
    """So a model in int4 is opened with packing, which is also three times as fast."""
    stored, x = sample(64, 3)
    exact = x.astype(np.float64) @ dequantize(stored).T
    bound = ADDED * (np.abs(x).astype(np.float64) @ apart(stored).T)
    assert (np.abs(product_graphs.four_bits(stored, x, 4, prepack=False) - exact) <= bound).all()


def test_a_row_of_the_product_depends_on_itself_alone() -> None:
    stored, x = sample(32, 5)
    whole = products.int4(x, stored)
    for row in range(len(x)):
        assert np.array_equal(products.int4(x[row : row + 1], stored)[0], whole[row])
    assert not whole[0].any()
