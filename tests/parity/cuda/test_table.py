"""How the table of CUDA kernels is put together; making it needs onnxruntime-gpu: `make kernels`."""

from collections.abc import Iterable
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from m0kit_parity.cuda.table import joined

Types = dict[str, frozenset[str]]
SOME = st.frozensets(st.sampled_from(["float", "float16", "int32"]), min_size=1)


def each(kernels: Iterable[Types]) -> set[tuple[tuple[str, str], ...]]:
    """All that they compute, one choice of types at a time."""
    return {
        tuple(zip(sorted(types), chosen, strict=True))
        for types in kernels
        for chosen in product(*(types[key] for key in sorted(types)))
    }


@given(st.lists(st.fixed_dictionaries({"T": SOME}, optional={"S": SOME, "M": SOME}), max_size=8))
def test_joined_kernels_serve_neither_more_nor_less(kernels: list[Types]) -> None:
    together = joined(kernels)
    assert each(together) == each(kernels)
    assert len(together) <= len(kernels)


def test_kernels_that_differ_in_one_parameter_become_one() -> None:
    kernels = [
        {"T": frozenset({kind}), "S": frozenset({size})}
        for kind, size in product(["float", "float16"], ["int32", "int64"])
    ]
    assert joined(kernels) == [{"T": frozenset({"float", "float16"}), "S": frozenset({"int32", "int64"})}]
