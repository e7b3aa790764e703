"""A decoder of the CUDA form run in numpy: its pool is written in place, and a planted overflow shows."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tests.parity.cuda.nodes import FLOATS, Array, assert_near, normal, wide

from m0kit_parity.cuda.reference import CudaReference
from m0kit_quant.scheme import CONTRIB

D, H, K, C, F, LAYERS, PAGE = 64, 4, 2, 16, 128, 4, 128
TOKENS = 200


class Toy:
    """A decoder of LAYERS layers: rows x (T, D) and their positions → y (T, D); pasts are `past_key_values.{i}.key`."""

    def __init__(self, dtype: Any, planted: float = 1.0) -> None:
        self.dtype = np.dtype(dtype)
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, Array] = {}
        self._planted = planted
        self.model = self._decoder()

    def _decoder(self) -> onnx.ModelProto:
        element = helper.np_dtype_to_tensor_dtype(self.dtype)
        value = helper.make_tensor_value_info
        inputs = [
            value("x", element, [None, D]),
            value("positions", TensorProto.INT64, [1, None]),
            value("cumulative_sequence_length", TensorProto.INT32, [None]),
            value("past_seqlens", TensorProto.INT32, [None]),
            value("block_table", TensorProto.INT32, [None, None]),
            value("attention_metadata", TensorProto.INT32, [2]),
        ]
        outputs = [value("y", element, [None, D])]
        ones = self._tensor("ones", np.ones(D))
        angles = np.arange(2 * TOKENS)[:, None] * 10000.0 ** -np.linspace(0, 1, C // 2, endpoint=False)
        cos, sin = self._tensor("cos", np.cos(angles)), self._tensor("sin", np.sin(angles))
        x, h = "x", self._node("SimplifiedLayerNormalization", "x", ones, domain="", epsilon=1e-6)
        for i in range(LAYERS):
            pasts = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
            presents = [f"present.{i}.{part}" for part in ("key", "value")]
            inputs += [value(name, element, [None, PAGE, K, C]) for name in pasts]
            outputs += [value(name, element, [None, PAGE, K, C]) for name in presents]
            q, k, v = (self._linear(f"{i}.{n}", h, D, heads * C) for n, heads in (("q", H), ("k", K), ("v", K)))
            q, k = (self._turned(rows, heads, cos, sin) for rows, heads in ((q, H), (k, K)))
            lengths = ["cumulative_sequence_length", "past_seqlens", "block_table"]
            self._nodes.append(
                helper.make_node(
                    "PagedAttention", [q, k, v, *pasts, *lengths, *[""] * 8, "attention_metadata"],
                    [f"{i}.a", *presents], domain=CONTRIB, num_heads=H, kv_num_heads=K,
                )
            )  # fmt: skip
            x, h = self._normed(f"{i}.first", x, self._linear(f"{i}.o", f"{i}.a", H * C, D), ones)
            up = self._node("QuickGelu", self._linear(f"{i}.up", h, D, F), alpha=1.0)
            last = "y" if i == LAYERS - 1 else None
            x, h = self._normed(f"{i}.second", x, self._linear(f"{i}.down", up, F, D), ones, last)
        tensors = [numpy_helper.from_array(array, name) for name, array in self._tensors.items()]
        graph = helper.make_graph(self._nodes, "toy", inputs, outputs, tensors)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)

    def _tensor(self, name: str, values: NDArray[Any]) -> str:
        self._tensors[name] = values.astype(self.dtype)
        return name

    def _node(self, op_type: str, *inputs: str, domain: str = CONTRIB, **attributes: Any) -> str:
        out = f"{op_type}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, list(inputs), [out], domain=domain, **attributes))
        return out

    def _linear(self, name: str, x: str, width: int, out: int) -> str:
        scale = self._planted if name == f"{LAYERS // 2}.down" else 1.0
        weight = normal(out, width, seed=sum(name.encode())) * scale / np.sqrt(width)
        return self._node("FusedMatMul", x, self._tensor(name, weight), transB=1)

    def _turned(self, x: str, heads: int, cos: str, sin: str) -> str:
        shapes = [self._shape(*shape) for shape in ((1, -1, heads * C), (-1, heads * C))]
        rows = self._node("Reshape", x, shapes[0], domain="")
        turned = self._node("RotaryEmbedding", rows, "positions", cos, sin, num_heads=heads)
        return self._node("Reshape", turned, shapes[1], domain="")

    def _shape(self, *sizes: int) -> str:
        name = f"shape {sizes}"
        self._tensors[name] = np.array(sizes, np.int64)
        return name

    def _normed(self, name: str, x: str, skip: str, ones: str, out: str | None = None) -> tuple[str, str]:
        """The sum, and its norm."""
        total, result = f"{name}.sum", out or f"{name}.norm"
        self._nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization", [x, skip, ones], [result, "", "", total],
                domain=CONTRIB, epsilon=1e-6,
            )
        )  # fmt: skip
        return total, result


@dataclass(frozen=True)
class Sequences:
    """What one run asks: for each sequence its first and end row, and its pages."""

    rows: list[tuple[int, int]]
    pages: list[list[int]]

    def feeds(self, pool: Array) -> dict[str, Array]:
        """The rows of one long text; pool (2·LAYERS, N, PAGE, K, C)."""
        x = normal(TOKENS, D).astype(pool.dtype)
        new = [end - first for first, end in self.rows]
        bounds = [max(new), max(end for _, end in self.rows)]
        feeds = {
            "x": np.concatenate([x[first:end] for first, end in self.rows]),
            "positions": np.concatenate([np.arange(first, end) for first, end in self.rows])[None],
            "cumulative_sequence_length": np.array([0, *np.cumsum(new)], np.int32),
            "past_seqlens": np.array([first for first, _ in self.rows], np.int32),
            "block_table": np.array(self.pages, np.int32),
            "attention_metadata": np.array(bounds, np.int32),
        }
        for i in range(LAYERS):
            for part, name in enumerate(("key", "value")):
                feeds[f"past_key_values.{i}.{name}"] = pool[2 * i + part]
        return feeds


WHOLE = Sequences([(0, TOKENS)], [[3, 1]])


def new_pool(dtype: Any) -> Array:
    return np.zeros((2 * LAYERS, 5, PAGE, K, C), dtype)


@pytest.fixture(scope="module", params=FLOATS, ids=str)
def toy(request: pytest.FixtureRequest) -> Toy:
    return Toy(request.param)


def test_the_pool_of_the_caller_is_written_in_place(toy: Toy) -> None:
    graph, pool = CudaReference(toy.model), new_pool(toy.dtype)
    results = graph.run(WHOLE.feeds(pool), ["y", "present.0.key", f"present.{LAYERS - 1}.value"])
    assert results["y"].dtype == toy.dtype
    assert np.shares_memory(results["present.0.key"], pool[0])
    assert np.shares_memory(results[f"present.{LAYERS - 1}.value"], pool[-1])
    written = wide(pool).any(axis=(-1, -2))  # (2·LAYERS, N, PAGE)
    assert written[:, 3].all()
    assert written[:, 1, : TOKENS - PAGE].all()
    assert not written[:, 1, TOKENS - PAGE :].any()
    assert not written[:, [0, 2, 4]].any()


def test_a_prefix_and_its_suffix_in_one_run_are_what_they_are_in_two_and_as_one_text(toy: Toy) -> None:
    """But for products of other numbers of rows, which may be summed in another order."""
    graph, pools = CudaReference(toy.model), [new_pool(toy.dtype) for _ in range(3)]
    together = Sequences([(0, 150), (150, TOKENS)], [[2, 0], [2, 0]])
    one = graph.run(together.feeds(pools[0]), ["y"])["y"]
    two = [graph.run(Sequences([rows], [[2, 0]]).feeds(pools[1]), ["y"])["y"] for rows in together.rows]
    whole = graph.run(WHOLE.feeds(pools[2]), ["y"])["y"]
    # It came to 5 roundings in float32, of the largest value; and 16 bits may round what is near the middle either way.
    for other in (np.concatenate(two), whole):
        assert_near(one, wide(other), 64 if toy.dtype == np.float32 else 8)
    assert_near(pools[0], wide(pools[1]), 64 if toy.dtype == np.float32 else 8)


def test_16_bits_stay_near_float32(toy: Toy) -> None:
    halves, floats = (
        wide(CudaReference(each.model).run(WHOLE.feeds(new_pool(each.dtype)), ["y"])["y"])
        for each in (toy, Toy(np.float32))
    )
    parts = {"float32": 0.0, "float16": 0.003, "bfloat16": 0.025}  # three times what it came to, 9e-4 and 8e-3
    assert np.abs(halves - floats).mean() <= parts[toy.dtype.name] * np.abs(floats).mean()


def test_a_planted_overflow_shows_in_float16_and_nowhere_else() -> None:
    for dtype, overflows in zip(FLOATS, (False, True, False), strict=True):
        graph = CudaReference(Toy(dtype, planted=1e6 if dtype != np.float16 else 6e4).model)
        results = graph.run(WHOLE.feeds(new_pool(dtype)), ["y", "1.second.sum"])
        assert np.isfinite(wide(results["1.second.sum"])).all()  # before it
        assert np.isfinite(wide(results["y"])).all() != overflows


def test_any_inner_result_can_be_asked_for(toy: Toy) -> None:
    results = CudaReference(toy.model).run(WHOLE.feeds(new_pool(toy.dtype)), ["0.first.sum", "y"])
    assert list(results) == ["0.first.sum", "y"]
    assert results["0.first.sum"].shape == (TOKENS, D)


def test_a_graph_is_read_from_its_file_with_the_data_beside_it(toy: Toy, tmp_path: Path) -> None:
    stored = onnx.ModelProto()
    stored.CopyFrom(toy.model)
    path = tmp_path / "decoder.cuda.onnx"
    onnx.save(stored, path, save_as_external_data=True, location="decoder.onnx.data", size_threshold=0)
    assert (tmp_path / "decoder.onnx.data").stat().st_size > path.stat().st_size
    ours, files = (
        CudaReference(source).run(WHOLE.feeds(new_pool(toy.dtype)), ["y"])["y"] for source in (toy.model, path)
    )
    np.testing.assert_array_equal(wide(ours), wide(files))


# --- what is refused -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half() -> CudaReference:
    return CudaReference(Toy(np.float16).model)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"past_seqlens": None}, r"missing are \['past_seqlens'\], unknown are \[\]"),
        ({"token_ids": np.zeros(3)}, r"missing are \[\], unknown are \['token_ids'\]"),
        ({"x": np.zeros((TOKENS, D), np.float32)}, r"x is float32 \[200, 64\], the graph takes float16 \[\?, 64\]"),
        ({"x": np.zeros((TOKENS, 32), np.float16)}, r"x is float16 \[200, 32\], the graph takes float16 \[\?, 64\]"),
        ({"past_seqlens": np.zeros(1, np.int64)}, r"past_seqlens is int64 \[1\], the graph takes int32 \[\?\]"),
        ({"block_table": np.zeros(2, np.int32)}, r"block_table is int32 \[2\], the graph takes int32 \[\?, \?\]"),
    ],
)
def test_inputs_that_a_session_would_not_take_are_an_error(
    change: dict[str, Any], told: str, half: CudaReference
) -> None:
    feeds = {**WHOLE.feeds(new_pool(np.float16)), **change}
    with pytest.raises(ValueError, match=told):
        half.run({name: array for name, array in feeds.items() if array is not None}, ["y"])


def test_a_run_that_an_operator_refuses_leaves_the_pool_as_it_was(half: CudaReference) -> None:
    pool = new_pool(np.float16)
    with pytest.raises(ValueError, match="sequence 0 has 200 tokens and needs 2 pages"):
        half.run(replace(WHOLE, pages=[[3, -1]]).feeds(pool), ["y"])
    assert not pool.any()


def test_operators_that_nothing_here_computes_are_refused_by_name() -> None:
    nodes = [
        helper.make_node("GroupQueryAttention", ["x"], ["y"], domain=CONTRIB),
        helper.make_node("CumSum", ["y"], ["z"]),
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []), opset_imports=opsets)
    with pytest.raises(NotImplementedError, match=r"^ai\.onnx\.CumSum, com\.microsoft\.GroupQueryAttention: no"):
        CudaReference(model)
