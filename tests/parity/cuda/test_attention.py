"""PagedAttention and MultiHeadAttention in numpy against PyTorch's dense attention, and what they refuse."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.parity.cuda.nodes import BF16, FLOATS, HALVES, Array, assert_near, computed, model, normal, tensor, wide

from m0kit_parity.cuda.reference import CudaReference

Int32 = NDArray[np.int32]

H, K, C, PAGE = 4, 2, 8, 4  # query heads, heads of keys, channels, tokens of a page

# Roundings of 16 bits between two exact products: of a share, of the answer; the shares' errors add up as they may.
ROUNDINGS = 4.0
# The same in float32, where both sides only sum in another order.
ROUNDINGS_FP32 = 64.0


def roundings(dtype: np.dtype[Any]) -> float:
    return ROUNDINGS_FP32 if dtype == np.float32 else ROUNDINGS


def dense(q: Array, k: Array, v: Array, *, causal: bool, scale: float | None = None) -> torch.Tensor:
    """q (n, H, C), k and v (m, K, C) → (n, H·C) by PyTorch in float64; the last row sees all keys."""
    n, m = len(q), len(k)
    seen = torch.ones(n, m, dtype=torch.bool)
    if causal:
        seen = torch.tril(seen, diagonal=m - n)
    heads = [tensor(x).transpose(0, 1)[None] for x in (q, k, v)]
    answers = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=True)
    return answers[0].transpose(0, 1).reshape(n, -1)


@dataclass
class Run:
    """What one run of PagedAttention is given."""

    pool: Array  # (2, N, PAGE, K, C)
    new: list[int]
    past: list[int]
    table: list[list[int]]
    metadata: list[int] | None = None
    slots: list[int] | None = None
    seed: int = 1

    def tokens(self) -> tuple[Array, Array, Array]:
        """q (T, H, C), k and v (T, K, C)"""
        total, dtype = sum(self.new), self.pool.dtype
        q, k, v = (normal(total, heads, C, seed=self.seed + i, dtype=dtype) for i, heads in enumerate((H, K, K)))
        return q, k, v

    def inputs(self) -> list[Array | None]:
        i32 = lambda values: None if values is None else np.array(values, np.int32)  # noqa: E731
        rows = [x.reshape(len(x), x.shape[1] * C) for x in self.tokens()]
        table = np.full((len(self.table), max(map(len, self.table), default=0)), -1, np.int32)
        for row, pages in zip(table, self.table, strict=True):
            row[: len(pages)] = pages
        lengths = [i32([0, *np.cumsum(self.new)]), i32(self.past), table]
        return [*rows, *self.pool, *lengths, None, None, i32(self.slots), *[None] * 5, i32(self.metadata)]

    def answers(self, **attributes: Any) -> Array:
        """(T, H·C); the pool has the new keys and values."""
        result = computed("PagedAttention", *self.inputs(), num_heads=H, kv_num_heads=K, **attributes)
        assert result.dtype == self.pool.dtype
        return np.asarray(result)


def paged(num_pages: int, dtype: np.dtype[Any]) -> Array:
    """A pool full of numbers that would show."""
    return np.full((2, num_pages, PAGE, K, C), 9, dtype)


def put(pool: Array, pages: list[int], k: Array, v: Array) -> None:
    """Keys and values (m, K, C) into these pages, token by token."""
    for position, both in enumerate(zip(k, v, strict=True)):
        for half, values in zip(pool, both, strict=True):
            half[pages[position // PAGE], position % PAGE] = values


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_one_sequence_without_a_past_is_dense_attention(scale: float | None, causal: bool, dtype: Any) -> None:
    run = Run(paged(5, dtype), new=[9], past=[0], table=[[4, 0, 2]])
    attributes = {} if scale is None else {"scale": scale}
    exact = dense(*run.tokens(), causal=causal, scale=scale)
    assert_near(run.answers(is_causal=int(causal), **attributes), exact, roundings(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scores_far_beyond_float16_are_no_overflow(dtype: Any) -> None:
    """They are summed in float32 and never stored in 16 bits."""
    pool = paged(1, dtype)
    q, k = np.full((2, H * C), 250, dtype), np.full((2, K * C), 250, dtype)
    lengths = [np.array(x, np.int32) for x in ([0, 2], [0], [[0]])]
    answers = computed("PagedAttention", q, k, k, *pool, *lengths, num_heads=H, kv_num_heads=K)
    assert (answers == 250).all()


def test_new_keys_are_written_and_nothing_else_is() -> None:
    run = Run(paged(6, np.dtype(np.float16)), new=[3, 2], past=[5, 0], table=[[3, 1], [0]])
    before, (_, k, v) = run.pool.copy(), run.tokens()
    run.answers()
    put(before, [1, 0], np.concatenate([before[0, 1, :1], k]), np.concatenate([before[1, 1, :1], v]))
    np.testing.assert_array_equal(run.pool, before)


def test_a_table_may_be_wider_than_a_sequence_needs_and_then_names_no_page() -> None:
    runs = [Run(paged(4, BF16), new=[5], past=[0], table=[pages]) for pages in ([2, 0], [2, 0, -1, -1])]
    narrow, padded = (run.answers() for run in runs)
    np.testing.assert_array_equal(narrow, padded)


@pytest.mark.parametrize("metadata", [[3, 8], [3, 8, 0], [0, 0], [100, 1000]])
def test_bounds_that_are_large_enough_change_nothing(metadata: list[int]) -> None:
    told = Run(paged(4, BF16), new=[3, 1], past=[5, 0], table=[[2, 0], [1]], metadata=metadata)
    untold = Run(paged(4, BF16), new=[3, 1], past=[5, 0], table=[[2, 0], [1]])
    np.testing.assert_array_equal(told.answers(), untold.answers())


def test_a_slot_mapping_says_where_keys_go_and_minus_one_that_they_do_not() -> None:
    run = Run(paged(4, np.dtype(np.float16)), new=[4], past=[0], table=[[2]], slots=[8, 9, -1, 13])
    before, (q, k, v) = run.pool.copy(), run.tokens()
    put(before, [2], k[:2], v[:2])
    before[0, 3, 1], before[1, 3, 1] = k[3], v[3]
    exact = dense(q, before[0, 2], before[1, 2], causal=True)
    assert_near(run.answers(), exact, ROUNDINGS)
    np.testing.assert_array_equal(run.pool, before)


def test_a_sequence_without_new_tokens_costs_nothing_and_a_run_without_any_is_empty() -> None:
    run = Run(paged(3, np.dtype(np.float16)), new=[0, 2, 0], past=[4, 0, 0], table=[[0], [2], [1]])
    assert_near(run.answers(), dense(*run.tokens(), causal=True), ROUNDINGS)
    assert Run(paged(3, np.dtype(np.float16)), new=[], past=[], table=[]).answers().shape == (0, H * C)


# --- a prefix and its suffixes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A document of `length` tokens and its suffixes; `resident`: its prefix was computed in an earlier run."""

    length: int
    suffixes: tuple[int, ...]
    resident: bool


documents = st.builds(
    Document,
    st.integers(1, 3 * PAGE + 1),
    st.lists(st.integers(1, PAGE + 2), min_size=1, max_size=3).map(tuple),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(documents, min_size=1, max_size=3), st.sampled_from(FLOATS), st.randoms(use_true_random=False))
def test_prefixes_and_suffixes_on_shared_pages_see_what_the_whole_text_sees(
    wanted: list[Document], dtype: Any, random: Any
) -> None:
    """Full pages are shared; the first suffix stands behind the prefix, others on copies of its last, partial page."""
    pool = paged(64, dtype)
    free = list(range(64))
    random.shuffle(free)
    run = Run(pool, [], [], [])
    parts: list[tuple[int, int]] = []  # document and tokens of each sequence
    for number, document in enumerate(wanted):
        pages = [free.pop() for _ in range(-(-document.length // PAGE))]
        if not document.resident:
            run.new.append(document.length)
            run.past.append(0)
            run.table.append(pages)
            parts.append((number, document.length))
        for place, length in enumerate(document.suffixes):
            if place > 0 and not document.resident and document.length % PAGE:
                break  # there is no page to copy yet
            full = document.length // PAGE
            own = pages[full:] if place == 0 else [free.pop() for _ in pages[full:]]
            more = -(-(document.length + length) // PAGE) - full - len(own)
            run.new.append(length)
            run.past.append(document.length)
            run.table.append([*pages[:full], *own, *(free.pop() for _ in range(more))])
            parts.append((number, length))

    q, k, v = run.tokens()
    ends = np.cumsum([0, *run.new])
    texts = {}
    for number, document in enumerate(wanted):
        if document.resident:
            kept = [normal(document.length, K, C, seed=50 + 2 * number + i, dtype=dtype) for i in range(2)]
            for place, past in enumerate(run.past):
                if parts[place][0] == number:
                    put(pool, run.table[place][: -(-past // PAGE)], *kept)
            texts[number] = kept
    answers = run.answers()
    for (start, end), past, (number, _) in zip(pairwise(ends), run.past, parts, strict=True):
        if past == 0:
            texts[number] = [k[start:end], v[start:end]]
        before = texts[number] if past else [k[:0], v[:0]]
        keys, values = (np.concatenate([old, new[start:end]]) for old, new in zip(before, (k, v), strict=True))
        assert_near(answers[start:end], dense(q[start:end], keys, values, causal=True), roundings(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
def test_a_prefix_and_its_suffix_in_one_run_or_in_two_are_the_same_to_the_bit(length: int, dtype: Any) -> None:
    both = Run(paged(6, dtype), new=[length, 3], past=[0, length], table=[[4, 1, 5], [4, 1, 5]])
    together = both.answers()
    pool = paged(6, dtype)
    rows = [x.reshape(len(x), -1) for x in both.tokens()]
    apart = []
    for part, past in ((slice(0, length), 0), (slice(length, None), length)):
        new = [x[part] for x in rows]
        lengths = [np.array(x, np.int32) for x in ([0, len(new[0])], [past], [[4, 1, 5]])]
        apart.append(computed("PagedAttention", *new, *pool, *lengths, num_heads=H, kv_num_heads=K))
    np.testing.assert_array_equal(together, np.concatenate(apart))
    np.testing.assert_array_equal(pool, both.pool)


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"table": [[1, -1]]}, r"sequence 0 has 5 tokens and needs 2 pages .* its row has \[1, -1\]"),
        ({"table": [[1, 7]]}, r"the pool's 6, its row has \[1, 7\]"),
        ({"table": [[1]]}, r"its row has \[1\]"),
        ({"table": [[2, 2]], "new": [8]}, "two tokens of this run are written to one slot"),
        ({"metadata": [4, 5]}, "says at most 4 new tokens of a sequence, there are 5"),
        ({"metadata": [5, 4]}, "says at most 4 keys of a sequence, there are 5"),
        ({"metadata": [5]}, r"attention_metadata is int32 \[1\]"),
        ({"past": [-1]}, "shorter than nothing"),
        ({"past": [0, 0]}, "one more than the 2 of past_seqlens"),
        ({"slots": [1, 2]}, r"slot_mapping is \[2\], but \[5\] was expected"),
    ],
)
def test_what_a_gpu_would_compute_wrongly_or_write_elsewhere_is_an_error(change: dict[str, Any], told: str) -> None:
    given = {"new": [5], "past": [0], "table": [[1, 2]], **change}
    with pytest.raises(ValueError, match=f"^PagedAttention PagedAttention: .*{told}"):
        Run(paged(6, np.dtype(np.float16)), **given).answers()


def test_two_suffixes_on_one_partial_page_are_an_error() -> None:
    with pytest.raises(ValueError, match="two tokens of this run are written to one slot"):
        Run(paged(6, BF16), new=[1, 1], past=[5, 5], table=[[0, 1], [0, 1]]).answers()


def test_a_pool_that_cannot_be_written_is_an_error() -> None:
    run = Run(paged(6, BF16), new=[1], past=[0], table=[[0]])
    run.pool.flags.writeable = False
    with pytest.raises(ValueError, match="the pool is read-only, and is updated in place"):
        run.answers()


def test_a_pool_of_another_type_than_the_tokens_is_an_error() -> None:
    inputs = Run(paged(6, BF16), new=[1], past=[0], table=[[0]]).inputs()
    inputs[3] = paged(6, np.dtype(np.float16))[0]
    with pytest.raises(ValueError, match=r"key_cache is float16, .*; they have one type"):
        computed("PagedAttention", *inputs, num_heads=H, kv_num_heads=K)


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"do_rotary": 1}, "do_rotary=1 is not computed here, only do_rotary=0 is"),
        ({"local_window_size": 64}, "local_window_size=64 is not computed here, only local_window_size=-1 is"),
        ({"kv_cache_layout": "LATENT"}, "kv_cache_layout=LATENT is not computed here, only"),
        ({"k_quant_type": "PER_TENSOR"}, "k_quant_type=PER_TENSOR is not computed here, only k_quant_type=NONE is"),
        ({"softcap": 30.0}, "softcap=30.0 is not computed here"),
        ({"no_such": 1}, "no_such=1 is not computed here, no such attribute is"),
    ],
)
def test_an_attribute_that_is_not_computed_is_refused_by_name(attributes: dict[str, Any], told: str) -> None:
    inputs = Run(paged(6, BF16), new=[1], past=[0], table=[[0]]).inputs()
    with pytest.raises(NotImplementedError, match=f"PagedAttention PagedAttention: {told}"):
        CudaReference(model("PagedAttention", inputs, num_heads=H, kv_num_heads=K, **attributes))


def test_attributes_that_say_what_is_so_anyway_are_taken() -> None:
    run = Run(paged(6, BF16), new=[1], past=[0], table=[[0]])
    run.answers(do_rotary=0, local_window_size=-1, softcap=0.0, kv_cache_layout="SEPARATE", k_quant_type="NONE")


@pytest.mark.parametrize(
    ("place", "name"), [(8, "cos_cache"), (11, "head_sink"), (12, "q_norm_weight"), (14, "k_scale")]
)
def test_an_input_that_is_not_computed_is_refused_by_name(place: int, name: str) -> None:
    inputs = Run(paged(6, BF16), new=[1], past=[0], table=[[0]]).inputs()
    inputs[place] = np.ones(C, BF16)
    with pytest.raises(NotImplementedError, match=f"the input {name} is not computed here, leave it out"):
        computed("PagedAttention", *inputs, num_heads=H, kv_num_heads=K)


def test_packed_qkv_is_refused() -> None:
    inputs = Run(paged(6, BF16), new=[1], past=[0], table=[[0]]).inputs()
    inputs[1:3] = None, None
    with pytest.raises(NotImplementedError, match="packed QKV and one cache for both are not computed here"):
        computed("PagedAttention", *inputs, num_heads=H, kv_num_heads=K)


# --- MultiHeadAttention --------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from(FLOATS), st.sampled_from([None, 0.2]))
def test_rows_of_a_batch_each_see_what_is_there_of_themselves(
    lengths: list[int], dtype: Any, scale: float | None
) -> None:
    longest = max(lengths) + 2
    q, k, v = (normal(len(lengths) * longest, H, C, seed=i, dtype=dtype) for i in range(3))
    rows = [x.reshape(len(lengths), longest, H * C).copy() for x in (q, k, v)]
    for i, length in enumerate(lengths):
        for part in rows:
            part[i, length:] = np.nan  # nothing may depend on it
    attributes = {"num_heads": H} | ({} if scale is None else {"scale": scale})
    answers = computed("MultiHeadAttention", *rows, None, np.array(lengths, np.int32), **attributes)
    for i, length in enumerate(lengths):
        first = i * longest
        exact = dense(*(x[first : first + length] for x in (q, k, v)), causal=False, scale=scale)
        assert_near(answers[i, :length], exact, roundings(dtype))
        assert np.isnan(wide(answers[i, length:])).all()


def batch(shape: tuple[int, ...] = (2, 3, H * C)) -> list[Array | None]:
    return [normal(*shape, seed=i, dtype=np.float16) for i in range(3)]


def test_without_lengths_all_rows_are_there() -> None:
    whole = computed("MultiHeadAttention", *batch(), num_heads=H)
    told = computed("MultiHeadAttention", *batch(), None, np.array([3, 3], np.int32), num_heads=H)
    np.testing.assert_array_equal(wide(whole), wide(told))


@pytest.mark.parametrize("lengths", [[3], [0, 3], [3, 4], [[3, 3]]])
def test_lengths_that_cannot_be_are_an_error(lengths: Any) -> None:
    with pytest.raises(ValueError, match="key_padding_mask is not 2 lengths of 1 to 3"):
        computed("MultiHeadAttention", *batch(), None, np.array(lengths, np.int32), num_heads=H)


def test_a_bias_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="the input bias is not computed here"):
        computed("MultiHeadAttention", *batch(), np.ones(3 * H * C, np.float16), num_heads=H)


def test_keys_of_other_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="of one shape"):
        computed("MultiHeadAttention", *batch()[:2], np.zeros((2, 4, H * C), np.float16), num_heads=H)
