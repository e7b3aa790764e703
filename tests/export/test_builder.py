"""Graphs put together by hand, run in ONNX Runtime: nodes, shared constants, loops, places of weights."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper

from m0kit_export.builder import ALIGNMENT, IR_VERSION, OPSET, Builder, Graph, Port, Weight, as_numpy

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
RNG = np.random.default_rng(0)
W, BIAS = RNG.standard_normal((3, 5), np.float32), RNG.standard_normal(3, np.float32)
X = RNG.standard_normal((4, 5), np.float32)


def run(folder: Path, graph: Graph, values: dict[str, NDArray[Any]], **feeds: NDArray[Any]) -> list[Any]:
    """Write the graph with its weights where it says, and run it."""
    content = bytearray(graph.data_bytes)
    for weight in graph.weights:
        raw = as_numpy(weight, values[weight.name]).tobytes()
        assert len(raw) == weight.num_bytes
        content[weight.offset : weight.offset + len(raw)] = raw
    name = graph.model.graph.name
    (folder / f"{name}.onnx.data").write_bytes(content)
    (folder / f"{name}.onnx").write_bytes(graph.model.SerializeToString())
    onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def linear_graph(storage: DTypeLike, **options: Any) -> Graph:
    b = Builder("one", storage)
    b.linear("layer", "x", W.shape, out="y", **options)
    return b.finish([Port("x", F32, ("T", 5))], [Port("y", F32, ("T", 3))])


def test_linear_keeps_the_checkpoints_layout(tmp_path: Path) -> None:
    (y,) = run(tmp_path, linear_graph(F32, bias=False), {"layer.weight": W}, x=X)
    assert np.allclose(y, X @ W.T, rtol=0, atol=1e-5)  # one product in another order


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("storage", [F32, F16])
def test_linear_adds_its_bias_and_is_float32_outside(tmp_path: Path, storage: Any, half: bool) -> None:
    graph = linear_graph(storage, bias=True, half=half)
    assert [w.dtype for w in graph.weights] == [storage, storage]
    (y,) = run(tmp_path, graph, {"layer.weight": W, "layer.bias": BIAS}, x=X)
    assert y.dtype == np.float32
    # float16 has 11 bits; five products of values up to 3 add up
    assert np.allclose(y, X @ W.T + BIAS, rtol=0, atol=1e-5 if storage == F32 else 1e-2)


@pytest.mark.parametrize(("storage", "half", "computes_in"), [(F32, True, F32), (F16, False, F32), (F16, True, F16)])
def test_only_half_products_compute_in_float16(storage: Any, half: bool, computes_in: Any) -> None:
    model = onnx.shape_inference.infer_shapes(linear_graph(storage, bias=True, half=half).model)
    (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm")
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    types |= {t.name: t.data_type for t in model.graph.initializer}
    types["x"] = TensorProto.FLOAT
    wanted = helper.np_dtype_to_tensor_dtype(computes_in)
    assert {types[name] for name in (*gemm.input, *gemm.output)} == {wanted}


def test_weights_are_placed_one_after_another_at_memory_pages() -> None:
    b = Builder("places", F16)
    for name, shape in (("a", (3, 5)), ("b", (4096,)), ("c", (2, 1024)), ("d", (1,))):
        b.weight(name, shape)
    b.weight("e", (7,), np.float32)
    weights = b.finish([], []).weights
    assert [w.offset for w in weights] == [0, 4096, 12288, 16384, 20480]
    assert [w.num_bytes for w in weights] == [30, 8192, 4096, 2, 28]
    assert all(w.offset % ALIGNMENT == 0 for w in weights)
    assert b.finish([], []).data_bytes == 20480 + 28
    for tensor, weight in zip(b.finish([], []).model.graph.initializer, weights, strict=True):
        places = {entry.key: entry.value for entry in tensor.external_data}
        assert places == {
            "location": "places.onnx.data",
            "offset": str(weight.offset),
            "length": str(weight.num_bytes),
        }
        assert not tensor.raw_data


def test_a_weight_declared_twice_is_a_mistake_of_ours() -> None:
    b = Builder("twice", F32)
    b.weight("a", (1,))
    with pytest.raises(AssertionError, match="a is declared twice"):
        b.weight("a", (1,))


def test_a_graph_without_weights_has_no_data() -> None:
    assert Builder("empty", F32).finish([], []).data_bytes == 0


def test_equal_constants_are_shared_and_unequal_ones_are_not() -> None:
    b = Builder("constants", F32)
    same = [b.const([1, 2]), b.const(np.array([1, 2])), b.const((1, 2), np.int64)]
    other = [
        b.const([[1, 2]]),
        b.const([1, 2], F32),
        b.const([2, 1]),
        b.const(1),
        b.const([1]),
        b.const(True, np.bool_),
    ]
    assert len(set(same)) == 1
    assert len({*same, *other}) == 1 + len(other)


def test_nodes_have_names_of_their_own() -> None:
    b = Builder("names", F32)
    names = [b.op("Relu", "x"), b.op("Relu", "x"), *b.split("x", [1, 2]), b.cast("x", F16)]
    assert len(set(names)) == 5


def test_split_and_cast(tmp_path: Path) -> None:
    b = Builder("split", F32)
    first, second = b.split("x", [2, 3])
    b.op("Identity", second, out="right")
    b.op("Cast", b.cast(first, np.int64), to=TensorProto.FLOAT, out="left")
    graph = b.finish([Port("x", F32, ("T", 5))], [Port("left", F32, ("T", 2)), Port("right", F32, ("T", 3))])
    left, right = run(tmp_path, graph, {}, x=X)
    assert np.array_equal(left, np.trunc(X[:, :2]))
    assert np.array_equal(right, X[:, 2:])


@pytest.mark.parametrize("times", [0, 1, 5])
def test_loop_carries_one_tensor(tmp_path: Path, times: int) -> None:
    """Doubles x so often; the body uses a constant and a weight of the graph around it."""
    b = Builder("loop", F32)
    step = b.weight("step", (1,))
    start = b.mark()
    outer = b.op("Add", "x", "x")  # added before, stays outside
    assert b.mark() == start + 1
    start = b.mark()
    grown = b.op("Add", b.op("Mul", "carried", b.const(2, F32)), step)
    body = b.subgraph(
        "body",
        [
            helper.make_tensor_value_info("index", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, [None]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info(grown, TensorProto.FLOAT, [None]),
        ],
        start,
    )
    body.node.append(helper.make_node("Identity", ["go"], ["go_on"]))
    b.loop("times", outer, body, out="y")
    graph = b.finish([Port("x", F32, ("T",)), Port("times", np.dtype(np.int64), ())], [Port("y", F32, ("T",))])
    x = np.array([1, 10], np.float32)
    (y,) = run(tmp_path, graph, {"step": np.ones(1, np.float32)}, x=x, times=np.array(times))
    assert np.array_equal(y, 2 * x * 2**times + 2**times - 1)


def test_the_model_states_its_versions() -> None:
    model = linear_graph(F32, bias=False).model
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert (model.ir_version, model.producer_name) == (IR_VERSION, "m0kit")


def test_values_are_stored_flat_contiguous_and_in_the_type_of_the_weight() -> None:
    weight = Weight("kernel", (2, 6), F16, 0)
    stored = as_numpy(weight, np.arange(12, dtype=np.float32).reshape(2, 3, 2).transpose(0, 1, 2))
    assert (stored.dtype, stored.shape, stored.flags.c_contiguous) == (F16, (2, 6), True)
    assert stored.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    with pytest.raises(ValueError, match="reshape"):
        as_numpy(weight, np.zeros(11))
