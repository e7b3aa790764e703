"""Graphs put together by hand, run in ONNX Runtime: nodes, constants, loops, places of weights, products."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tests.quant import products

from m0kit.artifact.ports import GraphPorts, Port
from m0kit.scoring.sessions import open_graph
from m0kit_export.builder import ALIGNMENT, IR_VERSION, OPSET, Builder, Graph
from m0kit_quant import int4, int8, nf4
from m0kit_quant.floats import FLOATS
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import CONTRIB, Parts
from m0kit_quant.schemes import SCHEMES
from m0kit_quant.weights import EMBEDDING

F32, F16, I64 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int64)
RNG = np.random.default_rng(0)
W, BIAS = RNG.standard_normal((3, 5), np.float32), RNG.standard_normal(3, np.float32)
X = RNG.standard_normal((4, 5), np.float32)


def recipe(scheme: str, block: int | None = None) -> Recipe:
    """Every matrix alike."""
    rule = {"match": "*", "scheme": scheme, **({"block": block} if block else {})}
    return Recipe.from_dict({"precision": scheme, "weights": [rule]}, "test")


FP32 = recipe("fp32")


def write(folder: Path, graph: Graph, values: dict[str, NDArray[Any]]) -> dict[str, Parts]:
    """Write the graph with its weights where it says; returns the parts of each weight."""
    content = bytearray(graph.data_bytes)
    written = {}
    for weight in graph.weights:
        parts = written[weight.name] = weight.scheme.encode(values[weight.name])
        assert set(parts) == {part.key for part in weight.parts}
        for part in weight.parts:
            raw = parts[part.key].tobytes()
            assert len(raw) == part.num_bytes
            content[part.offset : part.offset + len(raw)] = raw
    name = graph.model.graph.name
    (folder / f"{name}.onnx.data").write_bytes(content)
    (folder / f"{name}.onnx").write_bytes(graph.model.SerializeToString())
    onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
    return written


def run(folder: Path, graph: Graph, values: dict[str, NDArray[Any]], **feeds: NDArray[Any]) -> list[Any]:
    """Write the graph and run it as it is, without the settings of the runtime."""
    write(folder, graph, values)
    path = str(folder / f"{graph.model.graph.name}.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def linear_graph(stored: Recipe, shape: tuple[int, int] = (3, 5), **options: Any) -> Graph:
    b = Builder("one", stored)
    b.linear("layer", "x", shape, out="y", **options)
    return b.finish(GraphPorts((Port("x", "float32", ("T", shape[1])),), (Port("y", "float32", ("T", shape[0])),)))


def test_linear_keeps_the_checkpoints_layout(tmp_path: Path) -> None:
    (y,) = run(tmp_path, linear_graph(FP32, bias=False), {"layer.weight": W}, x=X)
    assert np.allclose(y, X @ W.T, rtol=0, atol=1e-5)  # one product in another order


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scheme", FLOATS)
def test_linear_adds_its_bias_and_is_float32_outside(tmp_path: Path, scheme: str, half: bool) -> None:
    graph = linear_graph(recipe(scheme), bias=True, half=half)
    stored = {part.name: part.dtype for weight in graph.weights for part in weight.parts}
    assert stored == {"layer.weight": FLOATS[scheme], "layer.bias": F16 if scheme == "fp16" else F32}
    (y,) = run(tmp_path, graph, {"layer.weight": W, "layer.bias": BIAS}, x=X)
    assert y.dtype == np.float32
    # float16 has 11 bits and bfloat16 8; five products of values up to 3 add up
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[scheme]
    assert np.allclose(y, X @ W.T + BIAS, rtol=0, atol=tolerance)


@pytest.mark.parametrize("half", [False, True])
def test_a_bf16_weight_is_widened_and_nothing_else_rounds(tmp_path: Path, half: bool) -> None:
    kept = W.astype(FLOATS["bf16"]).astype(np.float32)
    (y,) = run(
        tmp_path, linear_graph(recipe("bf16"), bias=True, half=half), {"layer.weight": W, "layer.bias": BIAS}, x=X
    )
    assert np.allclose(y, X @ kept.T + BIAS, rtol=0, atol=1e-5)  # one product in another order


@pytest.mark.parametrize(
    ("scheme", "half", "computes_in"),
    [("fp32", True, F32), ("fp16", False, F32), ("fp16", True, F16), ("bf16", False, F32), ("bf16", True, F32)],
)
def test_only_half_products_compute_in_float16(scheme: str, half: bool, computes_in: Any) -> None:
    model = onnx.shape_inference.infer_shapes(linear_graph(recipe(scheme), bias=True, half=half).model)
    (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm")
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    types |= {t.name: t.data_type for t in model.graph.initializer}
    types["x"] = TensorProto.FLOAT
    wanted = helper.np_dtype_to_tensor_dtype(computes_in)
    assert {types[name] for name in (*gemm.input, *gemm.output)} == {wanted}


def test_weights_are_placed_one_after_another_at_memory_pages() -> None:
    b = Builder("places", recipe("fp16"))
    b.linear("a", "x", (3, 5), bias=True)
    b.vector("b", 4096, "fp16")
    b.lookup("c", "ids", (2, 1024))
    b.vector("d", 7)
    weights = b.finish(GraphPorts((), ())).weights
    parts = [part for weight in weights for part in weight.parts]
    assert [w.name for w in weights] == [p.name for p in parts] == ["a.weight", "a.bias", "b", "c", "d"]
    assert [p.offset for p in parts] == [0, 4096, 8192, 16384, 20480]
    assert [w.num_bytes for w in weights] == [p.num_bytes for p in parts] == [30, 6, 8192, 4096, 28]
    assert b.finish(GraphPorts((), ())).data_bytes == 20480 + 28


PARTS = {
    "int8": [("int8", (96, 5), 480), ("scale", (5,), 20)],
    "int4": [("int4", (5, 3, 16), 240), ("scale", (5, 3), 60), ("zero_point", (5, 2), 10)],
    "nf4": [("nf4", (240,), 240), ("absmax", (8,), 32)],
}


@pytest.mark.parametrize("scheme", PARTS)
def test_each_part_of_a_weight_has_a_place_of_its_own(scheme: str) -> None:
    graph = linear_graph(recipe(scheme, 32 if scheme == "int4" else None), (5, 96), bias=True)
    matrix, bias = graph.weights
    assert (matrix.name, matrix.shape, matrix.scheme.name) == ("layer.weight", (5, 96), scheme)
    assert [(p.name, p.shape, p.num_bytes) for p in matrix.parts] == [
        (f"layer.weight.{key}", shape, size) for key, shape, size in PARTS[scheme]
    ]
    assert (bias.name, bias.scheme.name) == ("layer.bias", "fp32")
    parts = [*matrix.parts, *bias.parts]
    assert [p.offset for p in parts] == [i * ALIGNMENT for i in range(len(parts))]
    external = [t for t in graph.model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    for tensor, part in zip(external, parts, strict=True):
        assert (tensor.name, tuple(tensor.dims)) == (part.name, part.shape)
        assert {entry.key: entry.value for entry in tensor.external_data} == {
            "location": "one.onnx.data",
            "offset": str(part.offset),
            "length": str(part.num_bytes),
        }
        assert not tensor.raw_data


def test_a_weight_declared_twice_is_a_mistake_of_ours() -> None:
    b = Builder("twice", FP32)
    b.vector("a", 1)
    with pytest.raises(AssertionError, match="a is declared twice"):
        b.vector("a", 1)


def test_a_graph_without_weights_has_no_data() -> None:
    assert Builder("empty", FP32).finish(GraphPorts((), ())).data_bytes == 0


def test_equal_constants_are_shared_and_unequal_ones_are_not() -> None:
    b = Builder("constants", FP32)
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
    b = Builder("names", FP32)
    names = [b.op("Relu", "x"), b.op("Relu", "x"), *b.split("x", [1, 2]), b.cast("x", F16)]
    assert len(set(names)) == 5


def test_split_and_cast(tmp_path: Path) -> None:
    b = Builder("split", FP32)
    first, second = b.split("x", [2, 3])
    b.op("Identity", second, out="right")
    b.op("Cast", b.cast(first, np.int64), to=TensorProto.FLOAT, out="left")
    graph = b.finish(
        GraphPorts(
            (Port("x", "float32", ("T", 5)),),
            (
                Port("left", "float32", ("T", 2)),
                Port("right", "float32", ("T", 3)),
            ),
        )
    )
    left, right = run(tmp_path, graph, {}, x=X)
    assert np.array_equal(left, np.trunc(X[:, :2]))
    assert np.array_equal(right, X[:, 2:])


@pytest.mark.parametrize("times", [0, 1, 5])
def test_loop_carries_one_tensor(tmp_path: Path, times: int) -> None:
    """Doubles x so often; the body uses a constant and a weight of the graph around it."""
    b = Builder("loop", FP32)
    step = b.vector("step", 1)
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
    graph = b.finish(
        GraphPorts(
            (
                Port("x", "float32", ("T",)),
                Port("times", "int64", ()),
            ),
            (Port("y", "float32", ("T",)),),
        )
    )
    x = np.array([1, 10], np.float32)
    (y,) = run(tmp_path, graph, {"step": np.ones(1, np.float32)}, x=x, times=np.array(times))
    assert np.array_equal(y, 2 * x * 2**times + 2**times - 1)


def test_the_model_states_its_versions() -> None:
    model = linear_graph(FP32, bias=False).model
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert (model.ir_version, model.producer_name) == (IR_VERSION, "m0kit")


# --- products in few bits --------------------------------------------------------------------------------

# (N, K): outputs and inputs that are no multiples of a vector register; 96 inputs are three blocks of 32.
QUANTISED = [
    ("int8", None, (37, 96)),
    ("int8", None, (64, 1000)),
    ("int4", 32, (37, 96)),
    ("int4", 64, (64, 192)),
    ("int4", 128, (5, 256)),
    ("nf4", None, (37, 96)),
    ("nf4", None, (64, 192)),
]


def product_of(scheme: str, x: NDArray[Any], parts: Parts, shape: tuple[int, int]) -> NDArray[Any]:
    if scheme == "int8":
        return products.int8(x, parts["int8"], parts["scale"])
    if scheme == "int4":
        return products.int4(x, int4.Int4(parts["int4"], parts["scale"], parts["zero_point"]))
    return products.nf4(x, nf4.NF4(shape, parts["nf4"], parts["absmax"]))


def varied(num_rows: int, width: int, seed: int = 1) -> NDArray[np.float32]:
    """Rows of very different sizes, one of them of zeros, one with an outlier."""
    x = np.random.default_rng(seed).standard_normal((num_rows, width), np.float32)
    x *= np.exp2(np.arange(num_rows) % 7 - 3).astype(np.float32)[:, None]
    x[1] = 0
    x[2, 5] = 300
    return x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scheme", "block", "shape"), QUANTISED)
def test_the_product_is_the_numpy_models_on_the_same_parts(
    tmp_path: Path, scheme: str, block: int | None, shape: tuple[int, int], bias: bool
) -> None:
    rng = np.random.default_rng(0)
    values = {
        "layer.weight": rng.standard_normal(shape, np.float32),
        "layer.bias": rng.standard_normal(shape[0], np.float32),
    }
    graph = linear_graph(recipe(scheme, block), shape, bias=bias)
    parts = write(tmp_path, graph, values)
    x = varied(12, shape[1])
    # As the runtime opens int4: without packing the operator does not round the activations.
    y = open_graph(tmp_path, "one", threads=1, prepack=scheme == "int4").run({"x": x}, ["y"])["y"]
    meant = product_of(scheme, x, parts["layer.weight"], shape)
    assert np.abs(meant[[0, 2, 3]]).min() > 0
    if bias:
        meant = meant + values["layer.bias"]
    # int8: sums are exact, and three roundings of 2^-24 are left. The others add up to 1,000 terms in fp32, so
    # their error goes with the size of the row; a wrong nibble, block or zero point is of the size of the row.
    size = np.abs(meant) if scheme == "int8" and not bias else np.abs(meant).max(axis=1, keepdims=True)
    assert (np.abs(y - meant) <= 1e-6 * size).all() if scheme == "int8" else (np.abs(y - meant) <= 3e-6 * size).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_int8_sums_are_exact_where_pairs_of_products_are_largest(tmp_path: Path, sign: int) -> None:
    """255 · 64 twice in 16 bits: CPUs without dot products of 8 bits would saturate with one more."""
    shape = (16, 512)
    graph = linear_graph(recipe("int8"), shape, bias=False)
    parts = write(tmp_path, graph, {"layer.weight": np.full(shape, sign, np.float32)})["layer.weight"]
    assert np.array_equal(parts["int8"], np.full(shape[::-1], 64 * sign))
    x = np.full((3, shape[1]), 1, np.float32)
    x[1] = -1
    x[2, ::2] = -1
    y = open_graph(tmp_path, "one", threads=1).run({"x": x}, ["y"])["y"]
    assert np.allclose(y, sign * np.array([[512], [-512], [0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("scheme", "block", "shape"), QUANTISED)
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it(
    tmp_path: Path, scheme: str, block: int | None, shape: tuple[int, int]
) -> None:
    weight = np.random.default_rng(0).standard_normal(shape, np.float32)
    write(tmp_path, linear_graph(recipe(scheme, block), shape, bias=False), {"layer.weight": weight})
    graph = open_graph(tmp_path, "one", threads=1, prepack=scheme == "int4")
    x = varied(40, shape[1])
    together = graph.run({"x": x}, ["y"])["y"]
    for rows in ([3], [2, 3], [0, 3, 8, 9, 39], [3, 0, 1]):
        apart = graph.run({"x": x[rows]}, ["y"])["y"]
        if scheme == "int8":
            assert np.array_equal(apart, together[rows])
        else:  # kernels for few rows add in another order; the outlier would be 1e-2 in the other rows
            size = np.abs(together[rows]).max(axis=1, keepdims=True)
            assert (np.abs(apart - together[rows]) <= 2e-6 * size).all()


def test_activations_are_rounded_as_the_numpy_model_rounds_them(tmp_path: Path) -> None:
    b = Builder("rows", FP32)
    integers, scale = int8.activation_nodes(b, "x")
    b.op("Cast", integers, to=TensorProto.FLOAT, out="q")
    b.op("Identity", scale, out="a")
    graph = b.finish(
        GraphPorts(
            (Port("x", "float32", ("T", 64)),),
            (
                Port("q", "float32", ("T", 64)),
                Port("a", "float32", ("T", 1)),
            ),
        )
    )
    x = varied(20, 64)
    x[3] = np.arange(64) / 2 + 63.5 - 31.5  # halves of a step: ties go to the even number
    x[3, 0] = 127
    x[4] = 1e-38  # below the smallest scale
    q, a = run(tmp_path, graph, {}, x=x)
    wanted, scales = int8.quantize_activation(x)
    assert np.array_equal(q, wanted)
    assert np.array_equal(a, scales)
    assert (q[1] == int8.ZERO_POINT).all()
    assert q.min() == 1  # −127 … 127: a row is symmetric about its zero point
    assert q.max() == 255


def test_activations_are_rounded_once_for_all_products_that_take_them(tmp_path: Path) -> None:
    b = Builder("shared", recipe("int8"))
    b.op("Add", b.linear("a", "x", (4, 8), bias=False), b.linear("b", "x", (4, 8), bias=False), out="y")
    b.linear("c", "y", (4, 4), bias=False, out="z")
    graph = b.finish(GraphPorts((Port("x", "float32", ("T", 8)),), (Port("z", "float32", ("T", 4)),)))
    assert [node.op_type for node in graph.model.graph.node].count("QuantizeLinear") == 2  # of x and of y


def test_what_a_loop_rounded_inside_is_not_used_outside(tmp_path: Path) -> None:
    weight = RNG.standard_normal((8, 8), np.float32)
    b = Builder("loop", recipe("int8"))
    start = b.mark()
    grown = b.op("Add", "carried", b.linear("inside", "x", (8, 8), bias=False))
    go_on = b.op("Identity", "go")
    value = helper.make_tensor_value_info
    body = b.subgraph(
        "body",
        [
            value("index", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("carried", TensorProto.FLOAT, [None, 8]),
        ],
        [value(go_on, TensorProto.BOOL, []), value(grown, TensorProto.FLOAT, [None, 8])],
        start,
    )
    looped = b.loop("times", "x", body)
    b.op("Add", looped, b.linear("outside", "x", (8, 8), bias=False), out="y")
    graph = b.finish(
        GraphPorts(
            (
                Port("x", "float32", ("T", 8)),
                Port("times", "int64", ()),
            ),
            (Port("y", "float32", ("T", 8)),),
        )
    )
    x = varied(5, 8)
    (y,) = run(tmp_path, graph, {"inside.weight": weight, "outside.weight": weight}, x=x, times=np.array(2))
    product = products.int8(x, *int8.quantize(weight))
    assert np.allclose(y, x + 3 * product, rtol=1e-5, atol=1e-5)


# --- rows of a table -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "block", "width"),
    [("fp32", None, 7), ("fp16", None, 7), ("bf16", None, 7), ("int8", None, 7), ("int4", 32, 96), ("int4", 64, 128)],
)
def test_looked_up_rows_are_what_the_stored_parts_stand_for(
    tmp_path: Path, scheme: str, block: int | None, width: int
) -> None:
    """To the bit; 96 values in blocks of 32 have three zero points, the last of them alone in its byte."""
    table = np.random.default_rng(0).standard_normal((11, width), np.float32) + 0.3
    b = Builder("rows", recipe(scheme, block))
    b.op("Identity", b.lookup(EMBEDDING, "ids", table.shape), out="y")
    graph = b.finish(GraphPorts((Port("ids", "int64", ("T",)),), (Port("y", "float32", ("T", width)),)))
    (weight,) = graph.weights
    assert weight.scheme == SCHEMES[scheme](block, table=True)
    parts = write(tmp_path, graph, {EMBEDDING: table})[EMBEDDING]
    ids = np.array([10, 0, 3, 3, 7])
    y = open_graph(tmp_path, "rows", threads=1).run({"ids": ids}, ["y"])["y"]
    assert y.dtype == np.float32
    assert np.array_equal(y, weight.scheme.decode(parts, table.shape)[ids])
    none = open_graph(tmp_path, "rows", threads=1).run({"ids": ids[:0]}, ["y"])["y"]
    assert none.shape == (0, width)


# --- operators and their domains ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schemes", "kinds", "contrib"),
    [
        (("fp32", "fp32"), ("table", "matrix"), False),
        (("bf16", "fp16"), ("table", "matrix"), False),
        (("int8", "fp32"), ("table", "matrix"), False),  # rows are read with standard operators
        (("int4", "fp32"), ("table", "matrix"), False),
        (("fp32", "int8"), ("table", "matrix"), True),
        (("fp32", "int4"), ("table", "matrix"), True),
        (("fp32", "nf4"), ("table", "matrix"), True),
    ],
)
def test_the_domain_of_other_operators_is_named_when_one_is_there(
    tmp_path: Path, schemes: Sequence[str], kinds: Sequence[str], contrib: bool
) -> None:
    rules = [{"match": name, "scheme": scheme} for name, scheme in zip((EMBEDDING, "*"), schemes, strict=True)]
    b = Builder("domains", Recipe.from_dict({"precision": "mixed", "weights": rules}, "test"))
    b.linear("layer", b.lookup(EMBEDDING, "ids", (9, 64)), (32, 64), bias=True, out="y")
    graph = b.finish(GraphPorts((Port("ids", "int64", ("T",)),), (Port("y", "float32", ("T", 32)),)))
    write(tmp_path, graph, {w.name: np.ones(w.shape, np.float32) for w in graph.weights})  # checks the graph, too
    model = graph.model
    assert [o.domain for o in model.opset_import] == ["", *([CONTRIB] if contrib else [])]
    assert (CONTRIB in {node.domain for node in model.graph.node}) == contrib


def test_the_domain_is_named_for_an_operator_inside_a_loop_alone() -> None:
    b = Builder("inside", recipe("int8"))
    start = b.mark()
    b.linear("layer", "x", (4, 8), bias=False, out="z")
    b.subgraph("body", [], [], start)
    assert CONTRIB in {o.domain for o in b.finish(GraphPorts((), ())).model.opset_import}


# --- observing -------------------------------------------------------------------------------------------------


def test_an_observed_product_tells_the_largest_and_the_squares_of_its_inputs(tmp_path: Path) -> None:
    b = Builder("watched", FP32, observe=True)
    h = b.linear("first", "x", (4, 8), bias=True)
    b.linear("second", h, (3, 4), bias=False, out="y")
    graph = b.finish(GraphPorts((Port("x", "float32", ("T", 8)),), (Port("y", "float32", ("T", 3)),)))
    names = [port.name for port in graph.ports.outputs]
    assert names == ["y", *(f"{name}.{what}" for name in ("first", "second") for what in ("peak", "energy", "rows"))]
    values = {
        "first.weight": RNG.standard_normal((4, 8), np.float32),
        "first.bias": RNG.standard_normal(4, np.float32),
        "second.weight": RNG.standard_normal((3, 4), np.float32),
    }
    x = varied(9, 8)
    seen = dict(zip(names, run(tmp_path, graph, values, x=x), strict=True))
    inputs = {"first": x, "second": x @ values["first.weight"].T + values["first.bias"]}
    for name, given in inputs.items():
        assert np.allclose(seen[f"{name}.peak"], np.abs(given).max(axis=0), rtol=1e-5)
        assert np.allclose(seen[f"{name}.energy"], np.square(given).sum(axis=0), rtol=1e-5)
        assert seen[f"{name}.rows"].tolist() == [len(given)]
    assert np.array_equal(seen["first.peak"], np.abs(x).max(axis=0))
    assert names[:1] == [
        port.name for port in linear_graph(FP32, bias=False).ports.outputs
    ]  # and nothing when not observed
