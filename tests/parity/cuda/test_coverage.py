"""Every graph for CUDA has a kernel for each node and never waits for the host; what would break that is found."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from m0kit.config import ModelConfig
from m0kit.precision import SCHEMES
from m0kit_export.builder import CONTRIB, OPSET
from m0kit_export.cuda import cuda_graphs
from m0kit_export.graphs import build_graphs
from m0kit_parity.cuda.coverage import on_host, uncovered
from m0kit_parity.samples.checkpoints import Shape, model_config
from m0kit_quant.outlying import WIDER
from m0kit_quant.recipe import Recipe

PRECISIONS = tuple(name for name in SCHEMES if name != "fp32")  # which has no graphs for CUDA


def graph(text: str, opset: int = OPSET) -> onnx.ModelProto:
    """A graph in ONNX's own text: its inputs and outputs in brackets, nodes behind."""
    header = f'<ir_version: 11, opset_import: ["" : {opset}, "{CONTRIB}" : 1]>'
    return parser.parse_model(f"{header} planted {text}")


def cuda_models(config: ModelConfig, precision: str) -> dict[str, onnx.ModelProto]:
    recipe = Recipe.default(precision)
    graphs = cuda_graphs(config, recipe, build_graphs(config, recipe))
    return {name: each.model for name, each in graphs.items()}


# --- m0kit's graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", ["tiny", "full"])
def test_every_node_of_a_graph_for_cuda_has_a_kernel_for_its_types(shape: Shape, precision: str) -> None:
    models = cuda_models(model_config(shape), precision)
    assert len(models) == 3
    assert {name: said for name, model in models.items() if (said := uncovered(model))} == {}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", ["tiny", "full"])
def test_no_node_of_a_graph_for_cuda_is_left_to_the_host(shape: Shape, precision: str) -> None:
    """Not even shape arithmetic, so that a session may be opened without the CPU."""
    models = cuda_models(model_config(shape), precision)
    assert {name: said for name, model in models.items() if (said := on_host(model))} == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["int8", "int4", "nf4"])
def test_so_has_a_matrix_that_is_stored_wider_for_a_column(precision: str, device: str) -> None:
    recipe = Recipe.default(precision, device)
    columns = ("visual.blocks.0.mlp.fc2.weight", "model.layers.1.mlp.down_proj.weight")
    wider = recipe.storing(dict.fromkeys(columns, WIDER))
    config = model_config("tiny")
    for model in (each.model for each in cuda_graphs(config, wider, build_graphs(config, wider)).values()):
        assert not uncovered(model)
        assert not on_host(model)


@pytest.mark.parametrize("precision", SCHEMES)
def test_the_portable_graphs_would_wait_for_the_host(precision: str) -> None:
    graphs = build_graphs(model_config("tiny"), Recipe.default(precision))
    for name in ("vision", "decoder"):
        said = uncovered(graphs[name].model)
        assert sum("(Loop)" in sentence for sentence in said) == 6
        assert any("(Slice): it reads its input starts in CPU memory" in sentence for sentence in said)
        assert on_host(graphs[name].model)
    assert any("MatMulIntegerToFloat" in sentence for sentence in said) == (
        precision in ("int8", "int4", "nf4")  # which have the vision encoder, or parts of it, in int8
    )


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT])
def test_a_wider_type_that_is_put_into_a_real_graph_is_found(kind: int) -> None:
    """Both are islands: double has kernels and is refused, float has none for pages."""
    model = cuda_models(model_config("tiny"), "fp16")["decoder"]
    place, node = next((at, n) for at, n in enumerate(model.graph.node) if n.op_type == "PagedAttention")
    model.graph.node.insert(place, helper.make_node("Cast", [node.input[0]], ["wide"], name="planted", to=kind))
    node.input[0] = "wide"
    said = uncovered(model)
    assert any(sentence.startswith(f"{node.name} (PagedAttention): ") for sentence in said)
    assert any(sentence.startswith("planted (Cast): it computes in double") for sentence in said) == (
        kind == TensorProto.DOUBLE
    )


# --- planted faults ------------------------------------------------------------------------------------

PLANTED = {
    "an operator without a kernel": (
        "(uint8[N] x) => (uint8[N] y) { one = Constant<value: tensor = uint8[1] {4}> () "
        'y = BitShift<direction = "RIGHT"> (x, one) }',
        ["y (BitShift): onnxruntime-gpu 1.31.1 has no CUDA kernel of it"],
    ),
    "an island of double": (
        "(float16[N] x) => (float16[N] y) { wide = Cast<to = 11> (x) root = Sqrt (wide) y = Cast<to = 10> (root) }",
        [
            f"{node}: it computes in double, for which most GPUs have next to no units"
            for node in ("wide (Cast)", "root (Sqrt)", "y (Cast)")
        ],
    ),
    "an If": (
        "(bool which, float16[N] x) => (float16[N] y) { y = If (which) <"
        "then_branch = a () => (float16[N] same) { same = Identity (x) }, "
        "else_branch = b () => (float16[N] other) { other = Neg (x) }> }",
        ["y (If): the host waits for what it is to decide by"],
    ),
    "a size that only the result tells": (
        "(float16[N] x) => (int64[1, M] y) { y = NonZero (x) }",
        ["y (NonZero): the host waits for how much it gives out"],
    ),
    "an operator that does not exist": (
        "(float16[N] x) => (float16[N] y) { y = Sqroot (x) }",
        [f"y (Sqroot): onnxruntime-gpu 1.31.1 has no such operator at the opsets ai.onnx {OPSET}, {CONTRIB} 1"],
    ),
    "two types where one is wanted": (
        "(float16[N] x, float[N] z) => (float16[N] y) { y = Add (x, z) }",
        ["y (Add): its input B is float, and T is float16 here"],
    ),
    "an input that nothing makes": (
        "(float16[N] x) => (float16[N] y) { y = Add (x, lost) }",
        ["y (Add): nothing before it makes its input lost"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_named(what: str) -> None:
    text, said = PLANTED[what]
    assert uncovered(graph(text)) == said


def test_a_type_without_a_kernel_is_named_with_those_that_have_one() -> None:
    text = "(bfloat16[N, 4] x, int64[4] ends) => (bfloat16[N, 8] y) { y = Pad (x, ends) }"
    (said,) = uncovered(graph(text))
    assert said == (
        "y (Pad): onnxruntime-gpu 1.31.1 has no CUDA kernel of it for data bfloat16, pads int64, output bfloat16; "
        "it has: T bool/double/float/float16"
    )


def test_a_version_that_no_kernel_serves_is_named() -> None:
    text = "(float16[N] x) => (float16[N] y) { y = Swish (x) }"
    assert uncovered(graph(text, opset=24)) == ["y (Swish): onnxruntime-gpu 1.31.1 has no CUDA kernel of it"]
    assert "has no such operator" in uncovered(graph(text, opset=23))[0]


def test_a_loop_is_reported_and_what_is_in_it_too() -> None:
    text = (
        "(int64 turns, float16[N] x, uint8[N] z) => (float16[N] y) { yes = Constant<value: tensor = bool {1}> () "
        "y = Loop (turns, yes, x) <body = b (int64 turn, bool on, float16[N] now) => (bool on, float16[N] next) { "
        "bits = BitwiseAnd (z, z) next = Sqrt (now) }> }"
    )
    assert uncovered(graph(text)) == [
        "bits (BitwiseAnd): onnxruntime-gpu 1.31.1 has no CUDA kernel of it",
        "y (Loop): the host waits for the device in every turn of it",
    ]


def test_a_type_behind_a_fault_is_not_complained_about_as_well() -> None:
    text = "(float16[N] x) => (float16[N] y) { lost = Sqroot (x) more = Sqrt (lost) y = Add (more, x) }"
    assert [sentence.partition(":")[0] for sentence in uncovered(graph(text))] == ["lost (Sqroot)"]


# --- what the host reads, and what is left to it -------------------------------------------------------


def test_a_shape_that_the_device_computes_is_read_by_the_host() -> None:
    text = "(int64[2] to, float16[N] x) => (float16[A, B] y) { twice = Add (to, to) y = Expand (x, twice) }"
    assert uncovered(graph(text)) == [
        "y (Expand): it reads its input shape in CPU memory, and twice (Add) makes it on the device, "
        "for which the host waits"
    ]


def test_shapes_that_are_constant_or_fed_or_come_from_shape_are_not() -> None:
    text = (
        "(int64[1] to, float16[N, 4] x) => (float16[A, 4] y, float16[B, 4] z, float16[N, 4] w) {"
        "flat = Constant<value: tensor = int64[2] {-1, 4}> () y = Reshape (x, flat) "
        "z = Expand (x, to) shape = Shape (x) w = Reshape (y, shape) }"
    )
    assert uncovered(graph(text)) == []
    assert on_host(graph(text)) == []


def test_shape_arithmetic_is_left_to_the_host_and_listed() -> None:
    text = (
        "(float16[N, 4] x) => (float16[M] y) { shape = Shape (x) at = Constant<value: tensor = int64[1] {0}> () "
        "rows = Gather (shape, at) half = Div (rows, at) y = Reshape (x, half) }"
    )
    assert uncovered(graph(text)) == []
    assert on_host(graph(text)) == ["rows (Gather)", "half (Div)"]


def test_what_is_left_to_the_host_and_is_no_shape_arithmetic_is_a_fault() -> None:
    text = "(float16[N, 4] x) => (float[1] y) { shape = Shape (x) long = Cast<to = 1> (shape) y = ReduceMax (long) }"
    assert uncovered(graph(text)) == [
        "long (Cast): it is left to the host, where all that it reads lies, and no shape arithmetic: float/int64",
        "y (ReduceMax): it is left to the host, where all that it reads lies, and no shape arithmetic: float",
    ]


@pytest.mark.parametrize(("num_values", "is_on_host"), [(100, True), (101, False)])
def test_a_large_constant_keeps_arithmetic_on_the_device(num_values: int, is_on_host: bool) -> None:
    text = "(float16[N, 4] x) => (int64[M] y) { shape = Shape (x) y = Concat<axis = 0> (shape, many) }"
    model = graph(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(num_values, np.int64), "many"))
    assert on_host(model) == (["y (Concat)"] if is_on_host else [])


@pytest.mark.parametrize("given", [["metadata"], [""], []])
def test_pages_without_their_longest_lengths_make_the_host_wait(given: Sequence[str]) -> None:
    model = cuda_models(model_config("tiny"), "fp16")["decoder"]
    node = next(node for node in model.graph.node if node.op_type == "PagedAttention")
    assert node.input[16] == "metadata"
    del node.input[16:]
    node.input.extend(given)
    wanted = f"{node.name} (PagedAttention): without attention_metadata it asks the device for them, and the host waits"
    assert uncovered(model) == ([] if given == ["metadata"] else [wanted])
