"""Attention of packed rows as com.microsoft has it on CUDA: PagedAttention and MultiHeadAttention.

Owns both operators in numpy and what they refuse. The specification is ONNX Runtime's schema. Beyond it they take
float32, so that a graph's mathematics can be compared without rounding. Scores and softmax are in float32; the
exponentials, at most 1, go into the second product in the type of the values, as tensor cores take them.

    ReferenceEvaluator(model, new_ops=[PagedAttention, MultiHeadAttention])
"""

from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from m0kit_parity.cuda.arithmetic import Array, rounded, widened
from m0kit_parity.cuda.operator import Operator

Int32 = NDArray[np.int32]


class PagedAttention(Operator):
    """Sequences that see what is theirs in a pool of pages, which is updated in place.

    All new keys and values are written before any is read, so one sequence can see what another of the same run writes.
    What an operator on a GPU answers with other numbers, or not at all, is a ValueError here: a page that is needed and
    not there, a slot that two tokens write, bounds that are too small.
    """

    fixed: ClassVar = {
        "do_rotary": 0, "rotary_interleaved": 0, "rotary_offset": 0, "local_window_size": -1, "softcap": 0.0,
        "kv_cache_layout": "SEPARATE", "v_head_size": 0, "k_quant_type": "NONE", "v_quant_type": "NONE",
        "k_cache_dtype": "", "v_cache_dtype": "",
    }  # fmt: skip

    def _run(
        self,
        query: Array,  # (T, H·C)
        key: Array | None,  # (T, K·C)
        value: Array | None,  # (T, K·C)
        key_cache: Array,  # (N, tokens of a page, K, C)
        value_cache: Array | None,
        cumulative_sequence_length: Int32,  # (S + 1,)
        past_seqlens: Int32,  # (S,)
        block_table: Int32,  # (S, M)
        cos_cache: Array | None = None,
        sin_cache: Array | None = None,
        slot_mapping: Int32 | None = None,  # (T,); -1: not stored
        head_sink: Array | None = None,
        q_norm_weight: Array | None = None,
        k_norm_weight: Array | None = None,
        k_scale: Array | None = None,
        v_scale: Array | None = None,
        attention_metadata: Int32 | None = None,  # (2,) or (3,)
        *,
        num_heads: int,
        kv_num_heads: int,
        scale: float = 0.0,
        is_causal: int = 1,
    ) -> tuple[Array, Array, Array]:
        """(T, H·C) and the two caches, which are the arrays that were given."""
        self.refuse(
            cos_cache=cos_cache, sin_cache=sin_cache, head_sink=head_sink,
            q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        if key is None or value is None or value_cache is None:
            raise NotImplementedError(f"{self.told}: packed QKV and one cache for both are not computed here")
        self.of_one_type(query=query, key=key, value=value, key_cache=key_cache, value_cache=value_cache)
        head_dim = key_cache.shape[3]
        num_tokens, page_tokens = len(query), key_cache.shape[1]
        for name, array, expected in (
            ("query", query, (num_tokens, num_heads * head_dim)),
            ("key", key, (num_tokens, kv_num_heads * head_dim)),
            ("value", value, (num_tokens, kv_num_heads * head_dim)),
            ("key_cache", key_cache, (len(key_cache), page_tokens, kv_num_heads, head_dim)),
            ("value_cache", value_cache, key_cache.shape),
        ):
            self._check_shape(name, array, expected)
        first, past = self._lengths(cumulative_sequence_length, past_seqlens, num_tokens)
        new = np.diff(first)
        slots = self._slots(past + new, block_table, page_tokens, len(key_cache))
        self._check_bounds(attention_metadata, new, past + new)

        written = [seen[count:] for seen, count in zip(slots, past, strict=True)]
        self._store(np.concatenate([*written, np.empty(0, np.int64)]), slot_mapping, key, key_cache)
        self._store(np.concatenate([*written, np.empty(0, np.int64)]), slot_mapping, value, value_cache)
        output = np.empty(query.shape, query.dtype)
        for seen, (start, end) in zip(slots, pairwise(first), strict=True):
            page, within = np.divmod(seen, page_tokens)
            rows = query[start:end].reshape(-1, num_heads, head_dim)
            keys, values = key_cache[page, within], value_cache[page, within]  # (seen, K, C)
            output[start:end] = attended(rows, keys, values, scale or head_dim**-0.5, causal=is_causal == 1)
        return output, key_cache, value_cache

    def _check_shape(self, name: str, array: Array, expected: tuple[int, ...]) -> None:
        if array.shape != expected:
            raise ValueError(f"{self.told}: {name} is {list(array.shape)}, but {list(expected)} was expected")

    def _lengths(self, cumulative: Int32, past: Int32, num_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token of each sequence and the end of the last (S + 1,), tokens before it (S,)."""
        for name, array in (("cumulative_sequence_length", cumulative), ("past_seqlens", past)):
            if array.dtype != np.int32 or array.ndim != 1:
                raise ValueError(
                    f"{self.told}: {name} is {array.dtype} {list(array.shape)}, int32 in one row is needed"
                )
        if len(cumulative) != len(past) + 1 or cumulative[0] != 0 or cumulative[-1] != num_tokens:
            raise ValueError(
                f"{self.told}: cumulative_sequence_length {cumulative.tolist()} must go from 0 to the {num_tokens} "
                f"tokens, one more than the {len(past)} of past_seqlens"
            )
        if (np.diff(cumulative) < 0).any() or (past < 0).any():
            raise ValueError(f"{self.told}: a sequence is shorter than nothing: {cumulative.tolist()} {past.tolist()}")
        return cumulative.astype(np.int64), past.astype(np.int64)

    def _slots(
        self, lengths: NDArray[np.int64], block_table: Int32, page_tokens: int, num_pages: int
    ) -> list[NDArray[np.int64]]:
        """Where the tokens of each sequence are, old and new, page after page."""
        if block_table.dtype != np.int32 or block_table.ndim != 2 or len(block_table) != len(lengths):
            raise ValueError(
                f"{self.told}: block_table is {block_table.dtype} {list(block_table.shape)}, "
                f"int32 with a row for each of {len(lengths)} sequences is needed"
            )
        slots = []
        for sequence, length in enumerate(lengths):
            position = np.arange(length)
            needed = -(-length // page_tokens)
            pages = block_table[sequence, :needed].astype(np.int64)
            if len(pages) < needed or (pages < 0).any() or (pages >= num_pages).any():
                raise ValueError(
                    f"{self.told}: sequence {sequence} has {length} tokens and needs {needed} pages of the pool's "
                    f"{num_pages}, its row has {pages.tolist()}"
                )
            slots.append(pages[position // page_tokens] * page_tokens + position % page_tokens)
        return slots

    def _check_bounds(self, bounds: Int32 | None, new: NDArray[np.int64], keys: NDArray[np.int64]) -> None:
        """Bounds may be too large, which costs time; 0 is "unknown"."""
        if bounds is None:
            return
        if bounds.dtype != np.int32 or bounds.shape not in ((2,), (3,)):
            raise ValueError(
                f"{self.told}: attention_metadata is {bounds.dtype} {list(bounds.shape)}, int32 [2] is needed"
            )
        for bound, lengths, what in ((bounds[0], new, "new tokens"), (bounds[1], keys, "keys")):
            if 0 < bound < lengths.max(initial=0) or bound < 0:
                raise ValueError(
                    f"{self.told}: attention_metadata says at most {bound} {what} of a sequence, "
                    f"there are {lengths.max(initial=0)}"
                )

    def _store(self, slots: NDArray[np.int64], mapping: Int32 | None, new: Array, cache: Array) -> None:
        """Writes new (T, K·C) into slots (T,) of the cache."""
        rows = new.reshape(len(new), *cache.shape[2:])
        if mapping is not None:
            self._check_shape("slot_mapping", mapping, slots.shape)
            kept = mapping >= 0
            slots, rows = mapping[kept].astype(np.int64), rows[kept]
        if len(np.unique(slots)) < len(slots):
            raise ValueError(f"{self.told}: two tokens of this run are written to one slot of the pool")
        if not cache.flags.writeable:
            raise ValueError(f"{self.told}: the pool is read-only, and is updated in place")
        page, within = np.divmod(slots, cache.shape[1])
        cache[page, within] = rows


class MultiHeadAttention(Operator):
    """Rows of equal length, of which the first so many are there; each sees those of its own row of the batch."""

    fixed: ClassVar = {"mask_filter_value": -10000.0, "unidirectional": 0}

    def _run(
        self,
        query: Array,  # (B, S, H·C)
        key: Array,
        value: Array,
        bias: Array | None = None,
        key_padding_mask: Int32 | None = None,  # (B,) how many keys are there
        *,
        num_heads: int,
        scale: float = 0.0,
    ) -> tuple[Array]:
        """(B, S, H·C); rows beyond the length are not a number here, as nothing may depend on them."""
        self.refuse(bias=bias)
        self.of_one_type(query=query, key=key, value=value)
        if key.shape != query.shape or value.shape != query.shape or query.ndim != 3:
            raise ValueError(f"{self.told}: query, key and value are of one shape (B, S, H·C) here")
        batch, longest, width = query.shape
        lengths = np.full(batch, longest, np.int32) if key_padding_mask is None else key_padding_mask
        if lengths.dtype != np.int32 or lengths.shape != (batch,) or not ((lengths > 0) & (lengths <= longest)).all():
            raise ValueError(f"{self.told}: key_padding_mask is not {batch} lengths of 1 to {longest} in int32")
        output = np.full(query.shape, np.nan, query.dtype)
        for i, length in enumerate(lengths):
            q, k, v = (x[i, :length].reshape(length, num_heads, -1) for x in (query, key, value))
            output[i, :length] = attended(q, k, v, scale or (width // num_heads) ** -0.5, causal=False)
        return (output,)


def attended(query: Array, keys: Array, values: Array, scale: float, *, causal: bool) -> Array:
    """query (n, H, C), keys (m, K, C), values (m, K, V) → (n, H·V) in their type; `causal`: the last sees all keys.

    H/K query heads in a row share a head of keys.
    """
    (num_rows, num_heads, width), (num_keys, kv_heads, _) = query.shape, keys.shape
    if num_rows == 0:
        return np.empty((0, num_heads * values.shape[2]), query.dtype)
    group = num_heads // kv_heads
    asking = widened(query).reshape(num_rows, kv_heads, group, width).transpose(1, 2, 0, 3)
    with np.errstate(all="ignore"):
        scores = asking.reshape(kv_heads, -1, width) @ widened(keys).transpose(1, 2, 0) * np.float32(scale)
        if causal:
            hidden = np.arange(num_keys) > np.arange(num_keys - num_rows, num_keys)[:, None]
            scores.reshape(kv_heads, group, num_rows, num_keys)[:, :, hidden] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        share = np.exp(scores, out=scores)
        total = share.sum(axis=-1, keepdims=True)
        answers: Any = widened(rounded(share, values.dtype)) @ widened(values).transpose(1, 0, 2) / total
    answers = answers.reshape(kv_heads, group, num_rows, -1).transpose(2, 0, 1, 3).reshape(num_rows, -1)
    return rounded(answers, query.dtype)
