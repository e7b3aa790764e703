"""The CUDA kernels of the onnxruntime-gpu that m0kit pins, with the signatures of their operators: a table.

Owns the table and how ONNX Runtime finds a node's kernel in it. How the table is made is `table`, what a graph may
consist of is `coverage`.

    read_kernels().operators["com.microsoft.PagedAttention"].kernels
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("kernels.json")


@dataclass(frozen=True, slots=True)
class Formal:
    """An input or output as its operator declares it."""

    name: str
    type: str  # a parameter such as T, or a type such as int64 where there is no choice
    repeats: bool  # stands for any number of them


@dataclass(frozen=True, slots=True)
class Signature:
    """An operator as one version of it is declared."""

    since: int
    inputs: tuple[Formal, ...]
    outputs: tuple[Formal, ...]
    only: Mapping[str, str]  # the parameters that stand for one type alone, and that

    def formals(self, side: Sequence[Formal], num: int) -> Iterator[Formal]:
        """What is declared of the first `num` inputs, or outputs, of a node."""
        for place in range(num):
            if place < len(side):
                yield side[place]
            elif side and side[-1].repeats:
                yield side[-1]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One CUDA kernel. Types are ONNX's, such as float16, float (of 32 bits), int64."""

    first: int  # version of the operator
    last: int | None  # None: not known to serve any after the first
    types: Mapping[str, frozenset[str]]  # by parameter, or by the name of an input or output
    host_inputs: frozenset[int]  # places that it reads from CPU memory
    host_outputs: frozenset[int]  # places that it writes there

    def serves(self, version: int) -> bool:
        """ONNX Runtime's rule: an open range serves its first version alone, for the next may mean something else."""
        return version == self.first or (self.last is not None and self.first < version <= self.last)


@dataclass(frozen=True, slots=True)
class Entry:
    """All versions of an operator, and its CUDA kernels, which may be none."""

    signatures: tuple[Signature, ...]  # by rising version
    kernels: tuple[Kernel, ...]

    def signature(self, opset: int) -> Signature | None:
        """As the opset has it; None where it does not."""
        return next((each for each in reversed(self.signatures) if each.since <= opset), None)

    def kernel(
        self, signature: Signature, inputs: Sequence[str | None], outputs: Sequence[str | None]
    ) -> Kernel | None:
        """The kernel for a node whose inputs and outputs have these types, None where one is left out."""
        present = [
            (formal, kind)
            for side, kinds in ((signature.inputs, inputs), (signature.outputs, outputs))
            for formal, kind in zip(signature.formals(side, len(kinds)), kinds, strict=False)
            if kind is not None
        ]
        for kernel in self.kernels:
            if kernel.serves(signature.since) and all(
                kind in kernel.types[key]
                for formal, kind in present
                for key in (formal.type, formal.name)
                if key in kernel.types
            ):
                return kernel
        return None


@dataclass(frozen=True, slots=True)
class Kernels:
    """The table. Operators of ONNX have their plain name, others their domain's before it."""

    release: str  # "onnxruntime-gpu 1.31.1"
    operators: Mapping[str, Entry]


@cache
def read_kernels() -> Kernels:
    """The table that m0kit carries."""
    table = json.loads(TABLE.read_text("utf-8"))
    return Kernels(table["release"], {name: _entry(row) for name, row in table["operators"].items()})


def _entry(row: Any) -> Entry:
    signatures = [
        Signature(int(since), _formals(inputs), _formals(outputs), only)
        for since, (inputs, outputs, only) in row["signatures"].items()
    ]
    kernels = [
        Kernel(
            first, last, {key: frozenset(kinds) for key, kinds in types.items()}, frozenset(inputs), frozenset(outputs)
        )
        for first, last, types, inputs, outputs in row["kernels"]
    ]
    return Entry(tuple(sorted(signatures, key=lambda signature: signature.since)), tuple(kernels))


def _formals(written: Sequence[str]) -> tuple[Formal, ...]:
    parts = [text.removesuffix("…").split() for text in written]
    return tuple(Formal(name, kind, text.endswith("…")) for text, (name, kind) in zip(written, parts, strict=True))
