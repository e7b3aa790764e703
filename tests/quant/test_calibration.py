"""Statistics of inputs and what is made of them: predicted errors, and scales that lower the real ones."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.quant import products
from tests.quant.weights import random_weights

from m0kit.config import ModelConfig
from m0kit_export.graphs import build_graphs, schemes_of
from m0kit_parity.samples.checkpoints import model_config
from m0kit_parity.samples.outliers import inject, outlier_scales
from m0kit_quant import int4, nf4
from m0kit_quant.calibration import Calibration, channel_scales, predicted_error
from m0kit_quant.equalize import Rescaled, channel_groups, equalizing_scale
from m0kit_quant.floats import Bf16Scheme
from m0kit_quant.int4 import Int4Scheme
from m0kit_quant.int8 import Int8Scheme
from m0kit_quant.nf4 import Nf4Scheme
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import Parts, Scheme
from m0kit_quant.weights import Weights

Float32 = NDArray[np.float32]
SCHEMES = [Int8Scheme(), Int4Scheme(32), Int4Scheme(64), Nf4Scheme(), Bf16Scheme()]
# int4 in blocks that divide the widths of this model; what is in floats is a group nobody need scale.
RECIPE = Recipe.from_dict(
    {
        "precision": "mixed",
        "weights": [
            {"match": "score.*", "scheme": "fp32"},
            {"match": "model.layers.1.mlp.*", "scheme": "fp16"},
            {"match": "model.layers.*.self_attn.*", "scheme": "int4", "block": 32},
            {"match": "*", "scheme": "int8"},
        ],
    },
    "test",
)


def mixed_schemes(config: ModelConfig) -> dict[str, Scheme]:
    return schemes_of(build_graphs(config, RECIPE))


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return model_config("tiny")


def inputs_of(config: ModelConfig, weights: Weights, rows: int = 200, seed: int = 5) -> dict[str, Float32]:
    """What the consumers of each group take, by the group: normal values, as large as what makes them is."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for group in channel_groups(config):
        size = np.zeros(group.num_channels)
        for name, first in group.producers:
            rows_of = weights.read(name)[first : first + group.num_channels]
            size += np.abs(rows_of) if rows_of.ndim == 1 else np.sqrt(np.square(rows_of).sum(axis=1))
        x = rng.standard_normal((rows, len(group.columns))) * size[group.columns]
        inputs[group.name] = x.astype(np.float32)
    return inputs


def observed(config: ModelConfig, inputs: dict[str, Float32]) -> Calibration:
    peak, energy = {}, {}
    for group in channel_groups(config):
        for tensor in group.consumers:
            module = tensor.removesuffix(".weight")
            peak[module] = np.abs(inputs[group.name]).max(axis=0)
            energy[module] = np.square(inputs[group.name]).mean(axis=0)
    return Calibration(peak, energy, {})


def multiplied(x: Float32, scheme: Scheme, parts: Parts, shape: tuple[int, ...]) -> NDArray[Any]:
    """x times the transposed matrix as the scheme has it."""
    if scheme.name == "int8":
        return products.int8(x, parts["int8"], parts["scale"])
    if scheme.name == "int4":
        return products.int4(x, int4.Int4(parts["int4"], parts["scale"], parts["zero_point"]))
    if scheme.name == "nf4":
        return products.nf4(x, nf4.NF4((shape[0], shape[1]), parts["nf4"], parts["absmax"]))
    return x @ scheme.decode(parts, shape).T


def real_error(x: Float32, weight: Float32, scheme: Scheme, importance: Float32 | None = None) -> float:
    """Mean over outputs of the squared error of the product, relative to the square of the product."""
    y = multiplied(x, scheme, scheme.encode(weight, importance), weight.shape)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    return float((np.square(y - exact).mean(axis=0) / np.square(exact).mean(axis=0)).mean())


# --- the prediction --------------------------------------------------------------------------------


def spread(kind: str, columns: int, rng: np.random.Generator) -> NDArray[Any]:
    """Sizes of channels."""
    if kind == "even":
        return np.ones(columns)
    if kind == "uneven":
        return np.exp(rng.standard_normal(columns))
    return np.where(np.arange(columns) == 11, 64.0, 1.0)


@pytest.mark.parametrize("kind", ["even", "uneven", "one outlier"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name}{s.block or ''}")
def test_the_predicted_error_is_the_real_one_where_rows_are_alike(scheme: Scheme, kind: str) -> None:
    """Uniform inputs: nearly every row, and every block of it, reaches the peak, as the prediction has it."""
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((64, 192)) * 0.1).astype(np.float32)
    x = (rng.uniform(-1, 1, (4000, 192)) * spread(kind, 192, rng)).astype(np.float32)
    peak, energy = np.abs(x).max(axis=0), np.square(x).mean(axis=0)
    importance = energy + np.float32(1e-3) * energy.mean()
    predicted = predicted_error(weight, scheme, peak, energy)
    # Where many channels share a scale one of them nearly reaches its peak in every row. Where a single one decides,
    # the mean square of a uniform value is a third of its peak's.
    assert 0.95 < predicted / real_error(x, weight, scheme, importance) < (1.15 if kind == "even" else 3.15)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name}{s.block or ''}")
def test_the_prediction_is_of_the_worst_rows_where_rows_differ(scheme: Scheme) -> None:
    """Normal inputs: the peak of thousands of rows is up to twice that of one, its square four times."""
    rng = np.random.default_rng(4)
    weight = (rng.standard_normal((64, 192)) * 0.1).astype(np.float32)
    x = (rng.standard_normal((4000, 192)) * np.exp(0.5 * rng.standard_normal(192))).astype(np.float32)
    peak, energy = np.abs(x).max(axis=0), np.square(x).mean(axis=0)
    predicted = predicted_error(weight, scheme, peak, energy)
    real = real_error(x, weight, scheme, energy + np.float32(1e-3) * energy.mean())
    assert 0.9 < predicted / real < 4


@pytest.mark.parametrize("scheme", [Int8Scheme(), Int4Scheme(32)], ids=lambda s: s.name)
def test_the_scale_that_is_predicted_best_is_among_the_best(scheme: Scheme) -> None:
    """Of normal inputs an outlier's peak is three deviations where a row has one: it is feared too much."""
    rng = np.random.default_rng(6)
    weight = (rng.standard_normal((48, 96)) * 0.1).astype(np.float32)
    x = (rng.standard_normal((500, 96)) * spread("one outlier", 96, rng)).astype(np.float32)
    predicted, real = [], []
    for power in (-2, 0, 2, 4, 6):
        scale = np.where(np.arange(96) == 11, 2.0**power, 1).astype(np.float32)
        scaled = x / scale
        peak, energy = np.abs(scaled).max(axis=0), np.square(scaled).mean(axis=0)
        predicted.append(predicted_error(weight * scale, scheme, peak, energy))
        real.append(real_error(scaled, weight * scale, scheme, energy + np.float32(1e-3) * energy.mean()))
    chosen = real[np.argmin(predicted)]
    assert np.argmax(predicted) == np.argmax(real)
    assert chosen < 0.65 * real[1]  # of power 0, without scaling
    assert chosen < 4 * min(real)


def test_inputs_that_were_never_seen_are_predicted_by_the_weights_alone() -> None:
    weight = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    nothing, little = np.zeros(64, np.float32), np.full(64, 1e-6, np.float32)
    for scheme in SCHEMES:
        stored = scheme.decode(scheme.encode(weight), weight.shape)
        expected = (np.square(weight - stored).sum(axis=1) / np.square(weight).sum(axis=1)).mean()
        assert predicted_error(weight, scheme, nothing, nothing) == pytest.approx(expected, rel=1e-3)
        assert predicted_error(weight, scheme, nothing, little) == pytest.approx(expected, rel=1e-3)
    assert predicted_error(np.zeros_like(weight), Int8Scheme(), nothing, nothing) == 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name}{s.block or ''}")
def test_how_large_an_output_is_says_nothing_of_its_worth(scheme: Scheme) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((40, 64)).astype(np.float32)
    peak, energy = np.full(64, 3, np.float32), np.ones(64, np.float32)
    rows = np.exp2(rng.integers(-12, 13, 40)).astype(np.float32)
    expected = predicted_error(weight, scheme, peak, energy)
    assert predicted_error(weight * rows[:, None], scheme, peak, energy) == pytest.approx(expected, rel=1e-4)


# --- importance ------------------------------------------------------------------------------------


def test_importance_is_the_energy_and_never_zero(config: ModelConfig) -> None:
    energy = np.array([0, 1, 4, 1e-12], np.float32)
    calibration = Calibration({}, {"a.b": energy, "dead": np.zeros(3, np.float32)}, {})
    found = calibration.importance(config, {})
    assert set(found) == {"a.b.weight", "dead.weight"}
    assert all(values.dtype == np.float32 and (values > 0).all() for values in found.values())
    np.testing.assert_allclose(found["a.b.weight"][1:3], energy[1:3], rtol=2e-3)
    assert found["a.b.weight"][0] == pytest.approx(1e-3 * energy.mean())


def test_importance_is_that_of_the_scaled_inputs(config: ModelConfig) -> None:
    weights = random_weights(config)
    inputs = inputs_of(config, weights)
    rng = np.random.default_rng(0)
    groups = {group.name: group for group in channel_groups(config)}
    *chosen, last = groups
    scales = {name: np.exp2(rng.integers(-4, 5, groups[name].num_channels)).astype(np.float32) for name in chosen}
    found = observed(config, inputs).importance(config, scales)
    scaled = {name: x / scales[name][groups[name].columns] for name, x in inputs.items() if name != last}
    expected = observed(config, {**scaled, last: inputs[last]}).importance(config, {})
    assert set(found) == set(expected)
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)  # float32 means of 200 squares
    unscaled = observed(config, inputs).importance(config, {})
    assert any(not np.allclose(found[name], unscaled[name], rtol=0.1) for name in found)


# --- the scales ------------------------------------------------------------------------------------


def test_only_groups_whose_consumers_lose_bits_have_scales_and_all_are_told(config: ModelConfig) -> None:
    weights = random_weights(config)
    calibration = observed(config, inputs_of(config, weights))
    groups = {group.name: group for group in channel_groups(config)}
    for given in (None, calibration):
        told: list[str] = []
        scales = channel_scales(weights, config, mixed_schemes(config), given, told.append)
        assert told == list(groups)
        floats = {"model.layers.1.post_attention_layernorm", "model.layers.1.mlp.up_proj"}
        assert set(groups) - set(scales) == floats
        for name, scale in scales.items():
            assert (scale.shape, scale.dtype) == ((groups[name].num_channels,), np.float32)
            assert (np.isfinite(scale) & (scale > 0)).all()
    assert channel_scales(weights, config, schemes_of(build_graphs(config, Recipe.default("fp16"))), calibration) == {}


def test_without_calibration_the_weights_alone_decide(config: ModelConfig) -> None:
    weights = inject(random_weights(config), config, 256)
    scales = channel_scales(weights, config, mixed_schemes(config), None)
    for group in channel_groups(config):
        if group.name in scales:
            assert np.array_equal(scales[group.name], equalizing_scale(weights, group))


@pytest.mark.parametrize("calibrated", [False, True])
def test_planted_outliers_are_undone(config: ModelConfig, calibrated: bool) -> None:
    plain = random_weights(config)
    spiky = inject(plain, config, 1024)
    outliers = outlier_scales(config, 1024)
    inputs = inputs_of(config, spiky)
    scales = channel_scales(spiky, config, mixed_schemes(config), observed(config, inputs) if calibrated else None)
    ratios = {}
    for group in channel_groups(config):
        if group.name not in scales:
            continue
        scale, chosen = scales[group.name], outliers[group.name] != 1
        # Ten bits too many: half of them are the least that lets eight bits see the others.
        assert np.log2(scale[chosen] / np.median(scale[~chosen])).min() >= 5, group.name
        # By this group's outliers alone: those of others make rows of its matrices larger, and their errors with them.
        alone = Rescaled(plain, [group], {group.name: outliers[group.name]})
        columns = outliers[group.name][group.columns]
        x = inputs[group.name]
        ratios[group.name] = errors(group.consumers, plain, alone, scale[group.columns], x, columns)
    none, found = np.array(list(ratios.values())).T
    assert np.median(none) > 20  # what outliers make of the error
    assert np.exp(np.log(found).mean()) < (1.5 if calibrated else 2)  # and what is left of that
    assert found.max() < 5


def errors(
    consumers: tuple[str, ...], plain: Weights, spiky: Weights, scale: Float32, x: Float32, outliers: Float32
) -> tuple[float, float]:
    """Squared errors with outliers, unscaled and scaled, in units of that without outliers."""
    schemes = {name: RECIPE.scheme(name, plain.read(name).shape) for name in consumers}
    before = sum(real_error(x * outliers, plain.read(name), schemes[name]) for name in consumers)
    none = sum(real_error(x, spiky.read(name), schemes[name]) for name in consumers)
    found = sum(real_error(x / scale, spiky.read(name) * scale, schemes[name]) for name in consumers)
    return none / before, found / before


def test_calibration_finds_outliers_that_no_weight_tells(config: ModelConfig) -> None:
    """Inputs of a channel may be large for what the layers before do, not for a large gain."""
    weights = random_weights(config)
    inputs = inputs_of(config, weights)
    rng = np.random.default_rng(9)
    for group in channel_groups(config):
        large = rng.choice(group.num_channels, 2, replace=False)
        inputs[group.name][:, np.isin(group.columns, large)] *= 200
    blind = channel_scales(weights, config, mixed_schemes(config), None)
    seeing = channel_scales(weights, config, mixed_schemes(config), observed(config, inputs))
    lower = []
    for group in channel_groups(config):
        if group.name not in seeing:
            continue
        x = inputs[group.name]
        schemes = {name: RECIPE.scheme(name, weights.read(name).shape) for name in group.consumers}

        def error(scale: Float32) -> float:
            columns = scale[group.columns]  # noqa: B023  (called within the turn)
            energy = np.square(x / columns).mean(axis=0)  # noqa: B023
            importance = energy + np.float32(1e-3) * energy.mean()
            return sum(
                real_error(x / columns, weights.read(name) * columns, scheme, importance)  # noqa: B023
                for name, scheme in schemes.items()  # noqa: B023
            )

        none = error(np.ones(group.num_channels, np.float32))
        found = error(seeing[group.name])
        assert found <= 1.02 * none, group.name  # none at all is among the choices; predicted is not quite real
        assert found < error(blind[group.name]), group.name
        lower.append(found / none)
    assert np.exp(np.log(lower).mean()) < 0.25


def test_no_candidate_is_predicted_better_than_the_scale_that_is_chosen(config: ModelConfig) -> None:
    """SmoothQuant's at three strengths, AWQ's at four powers, none; the first two both win somewhere."""
    weights = inject(random_weights(config), config, 64)
    calibration = observed(config, inputs_of(config, weights))
    scales = channel_scales(weights, config, mixed_schemes(config), calibration)
    winners = set()
    for group in channel_groups(config):
        if group.name not in scales:
            continue
        module = group.consumers[0].removesuffix(".weight")
        peak, energy = calibration.peak[module], calibration.energy[module]
        largest, size = np.zeros(group.num_channels), np.zeros(group.num_channels)
        np.maximum.at(largest, group.columns, peak)
        np.maximum.at(size, group.columns, np.sqrt(energy, dtype=np.float64))
        candidates = {"none": np.ones(group.num_channels, np.float32)}
        candidates |= {f"smooth {s}": equalizing_scale(weights, group, largest, s) for s in (0.25, 0.5, 0.75)}
        even = size / np.exp(np.log(size).mean())
        candidates |= {f"awq {p}": (even**p).astype(np.float32) for p in (0.25, 0.5, 0.75, 1.0)}

        def predicted(scale: Float32) -> float:
            columns = scale[group.columns]  # noqa: B023  (called within the turn)
            matrices = {name: weights.read(name) * columns for name in group.consumers}  # noqa: B023
            return sum(
                predicted_error(matrix, RECIPE.scheme(name, matrix.shape), peak / columns, energy / columns**2)  # noqa: B023
                for name, matrix in matrices.items()
            )

        errors = {name: predicted(scale) for name, scale in candidates.items()}
        best = min(errors, key=lambda name: errors[name])
        assert predicted(scales[group.name]) <= errors[best] * (1 + 1e-6), (group.name, best)
        winners.add(best.split()[0])
    assert winners >= {"smooth", "awq"}


def test_calibration_leaves_an_even_model_about_as_it_is(config: ModelConfig) -> None:
    weights = random_weights(config)
    rng = np.random.default_rng(1)
    inputs = {
        group.name: rng.uniform(-1, 1, (500, len(group.columns))).astype(np.float32) for group in channel_groups(config)
    }
    for scale in channel_scales(weights, config, mixed_schemes(config), observed(config, inputs)).values():
        assert 1 / 3 < scale.min() <= scale.max() < 3


def test_channels_without_any_input_do_no_harm(config: ModelConfig) -> None:
    weights = random_weights(config)
    inputs = inputs_of(config, weights)
    for number, x in enumerate(inputs.values()):
        x[:, :: 2 if number % 2 else 1] = 0
    for scale in channel_scales(weights, config, mixed_schemes(config), observed(config, inputs)).values():
        assert (np.isfinite(scale) & (scale > 0)).all()


def test_scales_of_calibration_leave_the_function_alone(config: ModelConfig) -> None:
    """Powers of AWQ are no powers of two, so each side rounds: float32's 2⁻²⁴ for the weight and its channel."""
    weights = random_weights(config)
    inputs = inputs_of(config, weights)
    scales = channel_scales(weights, config, mixed_schemes(config), observed(config, inputs))
    groups = channel_groups(config)
    scaled = Rescaled(weights, groups, scales)
    for group in groups:
        vectors = [(name, first) for name, first in group.producers if weights.read(name).ndim == 1]
        for name, first in vectors:
            made = weights.read(name)[first : first + group.num_channels].astype(np.float64)
            ours = scaled.read(name)[first : first + group.num_channels].astype(np.float64)
            for matrix in group.consumers:
                exact = made[group.columns] * weights.read(matrix).astype(np.float64)
                if matrix not in {n for g in groups for n, _ in g.producers}:  # whose rows no other group scales
                    product = ours[group.columns] * scaled.read(matrix).astype(np.float64)
                    np.testing.assert_allclose(product, exact, rtol=3 * 2.0**-24, atol=1e-30)
