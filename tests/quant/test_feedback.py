"""Error feedback: products get better, by the method that GPTQ's paper describes, on the scales that were there."""

import numpy as np
import pytest
from numpy.typing import NDArray

from m0kit_quant import feedback, int4, int8
from m0kit_quant.feedback import DAMPING, Plane, fed_back
from m0kit_quant.scheme import Scheme
from m0kit_quant.schemes import SCHEMES

Float32 = NDArray[np.float32]
FED = [SCHEMES["int8"](), SCHEMES["int4"](64), SCHEMES["nf4"]()]


def named(scheme: Scheme) -> str:
    return scheme.name


def inputs(width: int, rows: int = 600, seed: int = 0) -> Float32:
    """Rows (T, K) whose inputs go together and have a mean, as a trained model's do."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((rows, width // 4)) @ rng.standard_normal((width // 4, width))
    return np.asarray(shared + 0.3 * rng.standard_normal((rows, width)) + rng.standard_normal(width) * 4, np.float32)


def random(*shape: int, seed: int = 1) -> Float32:
    return np.asarray(0.1 * np.random.default_rng(seed).standard_normal(shape), np.float32)


def moment(x: Float32) -> Float32:
    return np.asarray(x.T @ x / len(x), np.float32)


@pytest.mark.parametrize("scheme", FED, ids=named)
@pytest.mark.parametrize("shape", [(24, 128), (5, 192)])
def test_products_get_better_than_half_as_far_off(scheme: Scheme, shape: tuple[int, int]) -> None:
    x, weight = inputs(shape[1]), random(*shape)
    plane = Plane.of(moment(x))

    def error(importance: Float32 | Plane | None) -> float:
        parts = scheme.encode(weight, importance)
        assert {key: (part.shape, part.dtype) for key, part in parts.items()} == scheme.layout(shape)
        return float(np.linalg.norm(x @ (weight - scheme.decode(parts, shape)).T))

    assert error(plane) < 0.5 * min(error(None), error(plane.energy))


@pytest.mark.parametrize("scheme", FED, ids=named)
def test_scales_are_those_of_inputs_weighed_one_by_one(scheme: Scheme) -> None:
    weight, plane = random(6, 128), Plane.of(moment(inputs(128)))
    fed, alone = scheme.encode(weight, plane), scheme.encode(weight, plane.energy)
    for key in fed.keys() - {scheme.name}:
        assert np.array_equal(fed[key], alone[key])
    assert not np.array_equal(fed[scheme.name], alone[scheme.name])


@pytest.mark.parametrize("scheme", FED, ids=named)
def test_where_inputs_do_not_go_together_each_weight_gets_its_nearest_value(scheme: Scheme) -> None:
    weight = random(6, 128)
    plane = Plane.of(np.diag(np.linspace(0.5, 2, 128)).astype(np.float32))
    fed, alone = (scheme.decode(scheme.encode(weight, each), weight.shape) for each in (plane, plane.energy))
    # The search of int4 refits a scale to codes that were chosen with another.
    assert (np.abs(weight - fed) <= np.abs(weight - alone) + 1e-6).all()


def test_codes_are_those_of_the_papers_own_steps() -> None:
    """GPTQ as it is written, without a Cholesky factor: each column's error goes to the others by the inverse."""
    weight, seen = random(7, 40), moment(inputs(40))
    step = 0.02
    wanted = weight.astype(np.float64)
    energy = np.diagonal(seen).astype(np.float64)
    inverse = np.linalg.inv(seen + DAMPING * energy.mean() * np.eye(40))
    codes = np.zeros(weight.shape, np.int8)
    left = np.argsort(energy, kind="stable")[::-1].tolist()
    while left:
        j = left.pop(0)
        codes[:, j] = np.rint(wanted[:, j] / step)
        wanted -= np.outer((wanted[:, j] - codes[:, j] * step) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    nearest: feedback.Nearest = lambda _a, _e, _j, x: (np.rint(x / step), np.rint(x / step) * step)  # noqa: E731
    assert np.array_equal(fed_back(weight, Plane.of(seen), nearest, np.int8), codes)


@pytest.mark.parametrize("scheme", FED, ids=named)
def test_how_much_is_done_at_once_changes_nothing(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, plane = random(9, 128), Plane.of(moment(inputs(128)))
    whole = scheme.encode(weight, plane)
    monkeypatch.setattr(feedback, "_ROWS", 4)
    monkeypatch.setattr(feedback, "_COLUMNS", 24)
    in_pieces = scheme.encode(weight, plane)
    assert all(np.array_equal(in_pieces[key], whole[key]) for key in whole)


def test_values_stay_within_what_products_allow() -> None:
    x, weight = inputs(128), random(16, 128)
    weight[:, ::7] *= 30  # the errors of those at their end go to the others
    values, _ = int8.quantize(weight, Plane.of(moment(x)))
    assert np.abs(values.astype(int)).max() == int8.LIMIT
    assert int4.unpack(int4.quantize(weight, 32, Plane.of(moment(x))).packed).max() == 15


@pytest.mark.parametrize("scheme", FED, ids=named)
def test_inputs_that_are_always_zero_and_rows_of_zeros_are_no_harm(scheme: Scheme) -> None:
    weight, seen = random(4, 64), np.zeros((64, 64), np.float32)
    weight[2] = 0
    for plane in (Plane.of(seen), Plane.of(np.pad(moment(inputs(32)), (0, 32)))):
        stored = scheme.decode(scheme.encode(weight, plane), weight.shape)
        assert np.isfinite(stored).all()
        assert not stored[2].any()


def test_what_bitsandbytes_reads_row_after_row_is_fed_back_where_blocks_run_on() -> None:
    scheme, x, weight = SCHEMES["nf4"](), inputs(41), random(3, 41)  # 123 values: half a byte is left over
    stored = [scheme.decode(scheme.encode(weight, each), weight.shape) for each in (Plane.of(moment(x)), None)]
    assert np.linalg.norm(x @ (weight - stored[0]).T) < 0.7 * np.linalg.norm(x @ (weight - stored[1]).T)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_moment_that_is_not_finite_is_refused(value: float) -> None:
    seen = moment(inputs(32))
    seen[3, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        Plane.of(seen)


def test_rows_of_a_table_are_fed_back_in_all_eight_bits() -> None:
    scheme, table, noticed = SCHEMES["int8"](table=True), random(50, 64), moment(inputs(64))
    stored = [scheme.decode(scheme.encode(table, each), table.shape) for each in (Plane.of(noticed), None)]
    errors = [np.einsum("nd,de,ne->", table - each, noticed, table - each) for each in stored]
    assert errors[0] < 0.2 * errors[1]
    assert np.abs(scheme.encode(table, Plane.of(noticed))["int8"].astype(int)).max() == int8.LEVELS
