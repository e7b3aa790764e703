"""The table of CUDA kernels: what it must hold for m0kit's graphs, and ONNX Runtime's rules of which kernel serves."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from m0kit_export.builder import CONTRIB, OPSET
from m0kit_parity.cuda.kernels import Entry, Formal, Kernel, Signature, read_kernels

RELEASE = read_kernels().release


def entry(name: str) -> Entry:
    return read_kernels().operators[name]


def finds(name: str, inputs: list[str | None], outputs: list[str | None], opset: int = OPSET) -> Kernel | None:
    signature = entry(name).signature(opset)
    assert signature is not None
    return entry(name).kernel(signature, inputs, outputs)


def paged(kind: str, cache: str) -> Kernel | None:
    inputs = [*[kind] * 3, *[cache] * 2, *["int32"] * 3, *[None] * 8, "int32"]
    return finds(f"{CONTRIB}.PagedAttention", inputs, [kind, cache, cache], opset=1)


def test_the_table_is_of_a_release_that_m0kit_may_be_installed_with() -> None:
    package, _, release = RELEASE.partition(" ")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [Requirement(text) for text in project["optional-dependencies"]["gpu"]]
    assert [release in each.specifier for each in wanted if each.name == package] == [True]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_pages_are_read_in_both_halves_with_the_longest_lengths_in_cpu_memory(kind: str) -> None:
    kernel = paged(kind, kind)
    assert kernel is not None
    assert kernel.host_inputs == {16}
    assert entry(f"{CONTRIB}.PagedAttention").signatures[-1].inputs[16].name == "attention_metadata"


@pytest.mark.parametrize(("kind", "cache"), [("float", "float"), ("float16", "bfloat16"), ("bfloat16", "float16")])
def test_pages_are_not_read_in_float_nor_in_two_kinds_of_halves(kind: str, cache: str) -> None:
    assert paged(kind, cache) is None


def test_packed_attention_has_no_kernel_for_bfloat16() -> None:
    name = f"{CONTRIB}.PackedMultiHeadAttention"
    rest = [None, "int32", "int32"]
    assert finds(name, ["float16"] * 3 + rest, ["float16"], opset=1)
    assert finds(name, ["bfloat16"] * 3 + rest, ["bfloat16"], opset=1) is None


def test_an_operator_without_a_kernel_is_known_all_the_same() -> None:
    assert entry("BitShift").signatures
    assert not entry("BitShift").kernels


def test_operators_that_make_shapes_leave_them_in_cpu_memory() -> None:
    assert all(kernel.host_outputs == {0} for kernel in entry("Shape").kernels)
    assert all(kernel.host_inputs == {1} for kernel in entry("Expand").kernels)


def test_an_opset_has_the_newest_version_that_is_not_newer() -> None:
    cast = entry("Cast")
    assert [cast.signature(opset).since for opset in (12, 13, 22, 23)] == [9, 13, 21, 23]  # type: ignore[union-attr]
    assert entry("RMSNormalization").signature(22) is None


@pytest.mark.parametrize(
    ("first", "last", "serves"),
    [(13, None, {13}), (13, 14, {13, 14}), (12, 13, {12, 13})],
)
def test_an_open_range_serves_its_first_version_alone(first: int, last: int | None, serves: set[int]) -> None:
    kernel = Kernel(first, last, {}, frozenset(), frozenset())
    assert {version for version in range(10, 20) if kernel.serves(version)} == serves


def test_types_are_asked_by_parameter_or_by_the_name_of_an_input_and_left_out_ones_not_at_all() -> None:
    formals = (Formal("x", "T", False), Formal("shape", "int64", False), Formal("more", "V", True))
    signature = Signature(1, formals, (Formal("y", "T", False),), {})
    types = {"T": frozenset({"float16"}), "shape": frozenset({"int64"}), "V": frozenset({"bool"})}
    known = Entry((signature,), (Kernel(1, None, types, frozenset(), frozenset()),))
    good: list[str | None] = ["float16", "int64", "bool", "bool"]
    assert known.kernel(signature, good, ["float16"])
    for place, left_out in enumerate(good):
        wrong = ["float" if at == place else kind for at, kind in enumerate(good)]
        assert known.kernel(signature, wrong, ["float16"]) is None, left_out
        assert known.kernel(signature, [None if at == place else kind for at, kind in enumerate(good)], ["float16"])
    assert known.kernel(signature, good, ["float"]) is None
