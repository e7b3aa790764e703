"""A document's keys and values come back as they were kept: to the bit, or as near as the form's bits allow."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from m0kit.artifact.ports import KV
from m0kit.config import DecoderConfig
from m0kit.keeping.states import DTYPES, Pasts, State

Array = NDArray[Any]
EPS = float(np.finfo(np.float32).eps)


def config_of(layers: int = 2, heads: int = 3, width: int = 4) -> DecoderConfig:
    """What a state depends on: no model has heads as narrow as some of these."""
    return cast(DecoderConfig, SimpleNamespace(num_layers=layers, num_kv_heads=heads, head_dim=width))


def random_presents(config: DecoderConfig, length: int, seed: int = 0, spread: float = 1.0) -> dict[str, Array]:
    """Channels of very different sizes around different middles, and a first token unlike all others."""
    rng = np.random.default_rng([seed, length])
    shape = config.num_kv_heads, length, config.head_dim
    out = {}
    for layer in range(config.num_layers):
        for name in ("key", "value"):
            values = rng.standard_normal(shape, np.float32) + rng.standard_normal((shape[0], 1, shape[2]), np.float32)
            values[:, 0] *= 30
            sizes = np.logspace(-2, 2, config.head_dim, dtype=np.float32) * np.float32(spread)
            out[f"present.{layer}.{name}"] = values * sizes
    return out


def state_of(config: DecoderConfig, length: int, kv: str, seed: int = 0) -> State:
    return State.from_presents(random_presents(config, length, seed), slice(0, length), config, kv)


def restored(state: State) -> Array:
    """(L, 2, K, T, C) float32, as the decoder reads it."""
    values = state.kv.astype(np.float32)
    if len(state.table):
        scale, low, first = (state.table[:, :, i, :, None] for i in range(3))
        values = values * scale + low
        values[:, :, :, :1] = first
    return values


def stacked(out: dict[str, Array], config: DecoderConfig) -> Array:
    """(L, 2, K, T, C) of presents."""
    return np.stack(
        [[out[f"present.{layer}.{name}"] for name in ("key", "value")] for layer in range(config.num_layers)]
    )


forms = st.sampled_from(KV)
configs = st.builds(
    lambda layers, heads, half: config_of(layers, heads, 2 * half),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 8),
)


# --- what is kept --------------------------------------------------------------------------------------


@given(configs, st.integers(1, 40), st.integers(0, 5), st.integers(0, 5), forms)
def test_a_state_is_the_rows_asked_for_and_a_copy(
    config: DecoderConfig, length: int, before: int, after: int, kv: str
) -> None:
    out = random_presents(config, before + length + after)
    rows = slice(before, before + length)
    state = State.from_presents(out, rows, config, kv)
    layers, heads, width = config.num_layers, config.num_kv_heads, config.head_dim
    assert state.kv.dtype == DTYPES[kv]
    assert state.kv.shape == (layers, 2, heads, length, width)
    assert state.table.dtype == np.float32
    assert state.table.shape == (layers * (kv == "int8"), 2, 3, heads, width)
    assert state.length == length
    assert state.num_bytes == state.kv.nbytes + state.table.nbytes
    own = {name: values[:, rows] for name, values in out.items()}
    if kv == "int8":  # of the rows asked for alone: nobody else's lowest and highest
        alone = State.from_presents(own, slice(0, length), config, kv)
        for part, expected in zip(state.buffers, alone.buffers, strict=True):
            np.testing.assert_array_equal(part, expected)
    else:
        np.testing.assert_array_equal(state.kv, stacked(own, config).astype(DTYPES[kv]))
    kept = state.kv.copy()
    for values in out.values():  # an engine may use its memory again
        values[:] = 0
    np.testing.assert_array_equal(state.kv, kept)


@given(configs, st.integers(1, 40), forms)
def test_what_was_written_is_read_back_to_the_bit(config: DecoderConfig, length: int, kv: str) -> None:
    state = state_of(config, length, kv)
    raw = np.frombuffer(b"".join(part.tobytes() for part in state.buffers), np.uint8)
    assert raw.size == state.num_bytes
    again = State.from_bytes(raw, config, kv)
    assert again.length == length
    for part, expected in zip(again.buffers, state.buffers, strict=True):
        assert (part.dtype, part.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(part, expected)
        assert part.base is not None, "a view: a mapped file is read where it lies"


@given(configs, st.integers(1, 40), forms, st.data())
def test_a_size_that_no_state_has_is_refused(config: DecoderConfig, length: int, kv: str, data: st.DataObject) -> None:
    size, one_more = (state_of(config, n, kv).num_bytes for n in (length, length + 1))
    wrong = data.draw(st.integers(size + 1, one_more - 1))
    with pytest.raises(ValueError, match=rf"^{wrong} bytes are not keys and values of a whole number of tokens$"):
        State.from_bytes(np.zeros(wrong, np.uint8), config, kv)


def test_fewer_bytes_than_the_table_takes_are_refused() -> None:
    config = config_of()
    fixed = state_of(config, 1, "int8").table.nbytes
    per_token = state_of(config, 2, "int8").num_bytes - state_of(config, 1, "int8").num_bytes
    assert fixed >= per_token  # so that a whole number of tokens fewer than none can be asked for
    with pytest.raises(ValueError, match="are not keys and values"):
        State.from_bytes(np.zeros(fixed - per_token, np.uint8), config, "int8")


@pytest.mark.parametrize(("kv", "num_bytes"), [("fp32", 56 << 10), ("fp16", 28 << 10), ("int8", 14 << 10)])
def test_a_token_of_the_published_model_takes_what_the_documentation_says(kv: str, num_bytes: int) -> None:
    config = config_of(layers=28, heads=2, width=128)
    sizes = [State.from_presents(random_presents(config, n), slice(0, n), config, kv).num_bytes for n in (3, 4)]
    assert sizes[1] - sizes[0] == num_bytes


# --- how near ------------------------------------------------------------------------------------------


TINY = float(np.finfo(np.float32).tiny)  # no step is smaller


def check_int8(out: dict[str, Array], config: DecoderConfig) -> State:
    """The first token is as it was; another value is off by half a step of its channel at most."""
    length = out["present.0.key"].shape[1]
    state = State.from_presents(out, slice(0, length), config, "int8")
    assert np.isfinite(state.table).all()
    assert (state.table[:, :, 0] > 0).all()
    exact, seen = stacked(out, config), restored(state)
    np.testing.assert_array_equal(seen[:, :, :, 0], exact[:, :, :, 0])
    exact, seen = exact[:, :, :, 1:].astype(np.float64), seen[:, :, :, 1:]
    if length > 1:
        low, high = exact.min(3, keepdims=True), exact.max(3, keepdims=True)
        # A step is 1/255 of what lies between the lowest and the highest. Beside half of one, float32 rounds the step,
        # the difference, the product and the sum, none of which is larger than the two ends together.
        allowed = (high - low) / 510 + 4 * EPS * (np.abs(low) + np.abs(high)) + TINY
        assert (np.abs(seen - exact) <= allowed).all()
    return state


@given(configs, st.integers(1, 40), st.integers(0, 1000), st.sampled_from([1e-30, 1e-3, 1.0, 300.0, 1e30]))
def test_int8_is_off_by_half_a_step_of_its_own_channel(
    config: DecoderConfig, length: int, seed: int, spread: float
) -> None:
    with np.errstate(all="raise", under="ignore"):
        check_int8(random_presents(config, length, seed, spread), config)


def test_a_large_channel_costs_its_neighbours_nothing() -> None:
    config = config_of()
    out = random_presents(config, 30)
    plain = restored(State.from_presents(out, slice(0, 30), config, "int8"))
    for values in out.values():
        values[:, :, 1] *= 1e4
    spiky = restored(State.from_presents(out, slice(0, 30), config, "int8"))
    np.testing.assert_array_equal(np.delete(spiky, 1, axis=4), np.delete(plain, 1, axis=4))
    assert not np.array_equal(spiky, plain)


def test_a_first_token_unlike_the_others_costs_them_nothing() -> None:
    config = config_of()
    out = random_presents(config, 30)
    plain = restored(State.from_presents(out, slice(0, 30), config, "int8"))
    for values in out.values():
        values[:, 0] *= -1e4
    spiky = restored(State.from_presents(out, slice(0, 30), config, "int8"))
    np.testing.assert_array_equal(spiky[:, :, :, 1:], plain[:, :, :, 1:])
    np.testing.assert_array_equal(spiky[:, :, :, 0], plain[:, :, :, 0] * np.float32(-1e4))


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-38, 3.0, -3e38], ids=str)
def test_a_channel_without_any_spread_is_kept(value: float, length: int) -> None:
    """Of two tokens the second is its channel's only value."""
    config = config_of()
    out = random_presents(config, length)
    for values in out.values():
        values[:, 1:, 2] = value
    with np.errstate(all="raise", under="ignore"):
        state = check_int8(out, config)
    seen = restored(state)[:, :, :, 1:, 2]
    np.testing.assert_array_equal(seen, np.full_like(seen, value))


def test_a_channel_goes_from_its_lowest_to_its_highest() -> None:
    config = config_of(1, 1, 2)
    values = np.array([[[50, -50], [-10, 0], [0, 255], [1, 1], [-4.5, 2.5]]], np.float32)
    state = State.from_presents({"present.0.key": values, "present.0.value": -values}, slice(0, 5), config, "int8")
    # 10, 11 and 5.5 of 11 are 231.8, 255 and 127.5 steps; the half goes to the even one, as 2.5 steps of 1 do.
    assert state.kv[0, 0, 0, 1:].tolist() == [[0, 0], [232, 255], [255, 1], [128, 2]]
    assert state.kv[0, 1, 0, 1:].tolist() == [[255, 255], [23, 0], [0, 254], [128, 252]]
    np.testing.assert_allclose(state.table[0, 0, :, 0], [[11 / 255, 1], [-10, 0], [50, -50]], rtol=1e-6)
    np.testing.assert_allclose(state.table[0, 1, :, 0], [[11 / 255, 1], [-1, -255], [-50, 50]], rtol=1e-6)


def test_float16_is_the_nearest() -> None:
    config = config_of()
    out = random_presents(config, 20)
    np.testing.assert_array_equal(
        State.from_presents(out, slice(0, 20), config, "fp16").kv, stacked(out, config).astype(np.float16)
    )


# --- what is fed ---------------------------------------------------------------------------------------

lengths = st.lists(st.integers(1, 12), max_size=5)


@given(st.lists(lengths, min_size=1, max_size=4), forms)
def test_pasts_stand_one_after_the_other_run_after_run(runs: list[list[int]], kv: str) -> None:
    """One memory serves runs of any size, and nothing of an earlier one is left."""
    config = config_of()
    pasts = Pasts(config, kv)
    for number, run in enumerate(runs):
        states = [state_of(config, length, kv, seed=10 * number + i) for i, length in enumerate(run)]
        copies = [[part.copy() for part in state.buffers] for state in states]
        feeds = pasts.feeds(states)
        assert len(feeds) == config.num_layers * (4 if kv == "int8" else 2)
        shape = config.num_kv_heads, sum(run), config.head_dim
        for layer in range(config.num_layers):
            for i, name in enumerate(("key", "value")):
                fed = feeds[f"past_key_values.{layer}.{name}"]
                assert (fed.dtype, fed.shape) == (DTYPES[kv], shape)
                assert fed.flags.c_contiguous or not states
                if states:
                    expected = np.concatenate([state.kv[layer, i] for state in states], axis=1)
                    np.testing.assert_array_equal(fed, expected)
                if kv == "int8" and states:
                    table = feeds[f"past_key_values.{layer}.{name}_table"]
                    assert table.dtype == np.float32
                    np.testing.assert_array_equal(table, np.stack([state.table[layer, i] for state in states]))
        for state, copy in zip(states, copies, strict=True):
            for part, expected in zip(state.buffers, copy, strict=True):
                np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("kv", KV)
def test_memory_is_used_again_and_grows_only_for_a_larger_run(kv: str) -> None:
    config = config_of()
    pasts = Pasts(config, kv)

    def fed(*lengths: int) -> Array:
        return pasts.feeds([state_of(config, n, kv) for n in lengths])["past_key_values.0.key"]

    first = fed(10, 5)
    assert np.shares_memory(first, fed(3, 4))
    assert np.shares_memory(first, fed(7, 8))
    larger = fed(10, 6)
    assert not np.shares_memory(first, larger)
    assert np.shares_memory(larger, fed(2, 2))


@pytest.mark.parametrize("kv", KV)
def test_a_single_state_is_fed_where_it_lies(kv: str) -> None:
    config = config_of()
    state = state_of(config, 6, kv)
    for name, fed in Pasts(config, kv).feeds([state]).items():
        if not name.endswith("table"):
            assert np.shares_memory(fed, state.kv)


@pytest.mark.parametrize("kv", KV)
def test_a_run_without_pasts_is_fed_none(kv: str) -> None:
    """The number of pasts is one all the same: rows that see none of it still name one."""
    config = config_of()
    pasts = Pasts(config, kv)
    pasts.feeds([state_of(config, 4, kv), state_of(config, 5, kv)])
    for feeds in (pasts.feeds([]), Pasts(config, kv).feeds([])):
        for layer in range(config.num_layers):
            for name in ("key", "value"):
                fed = feeds[f"past_key_values.{layer}.{name}"]
                assert (fed.dtype, fed.shape) == (DTYPES[kv], (config.num_kv_heads, 0, config.head_dim))
                if kv == "int8":
                    table = feeds[f"past_key_values.{layer}.{name}_table"]
                    assert (table.dtype, table.shape) == (np.float32, (1, 3, config.num_kv_heads, config.head_dim))
                    assert np.isfinite(table).all()
