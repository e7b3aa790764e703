"""The form of an operator in numpy: ONNX's `OpRun`, strict about what it does not compute.

Owns that a node's attributes are those that its class computes. An attribute is a keyword of `_run`; one that may only
have one value, which is the schema's default, stands in `fixed`. A class has its operator's name.

    class QuickGelu(Operator):
        def _run(self, x, alpha=1.702): ...
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import onnx
from onnx.reference.op_run import OpRun

from m0kit_parity.cuda.arithmetic import Array
from m0kit_quant.scheme import CONTRIB


class Operator(OpRun):  # type: ignore[misc]  # onnx has no types
    """One node. Raises NotImplementedError for an attribute or input that is not computed here, by its name."""

    op_domain: ClassVar[str] = CONTRIB
    op_schema: ClassVar[None] = None  # onnx knows none; a standard operator of the same name has other attributes
    fixed: ClassVar[Mapping[str, object]] = {}

    def __init__(self, onnx_node: onnx.NodeProto, run_params: dict[str, Any]) -> None:
        super().__init__(onnx_node, run_params)
        computed = inspect.signature(self._run).parameters
        for name in sorted(self.attributes_names_ - set(computed)):
            value = getattr(self, name)
            if name not in self.fixed or value != self.fixed[name]:
                allowed = f"only {name}={self.fixed[name]} is" if name in self.fixed else "no such attribute is"
                raise NotImplementedError(f"{self.told}: {name}={value} is not computed here, {allowed}")
            self.attributes_names_.discard(name)

    def run(self, *inputs: Any, **context: Any) -> tuple[Any, ...]:
        """As onnx has it, and nothing for an output that the node leaves out: its name "" is also a missing input's."""
        results = super().run(*inputs, **context)
        return tuple(result if name else None for name, result in zip(self.onnx_node.output, results, strict=False))

    @property
    def told(self) -> str:
        """The node for messages."""
        return f"{self.op_type} {self.onnx_node.name or self.onnx_node.output[0]}"

    def refuse(self, **inputs: Array | None) -> None:
        """Raises NotImplementedError that names an optional input that is given."""
        for name, array in inputs.items():
            if array is not None:
                raise NotImplementedError(f"{self.told}: the input {name} is not computed here, leave it out")

    def of_one_type(self, **inputs: Array | None) -> None:
        """Raises ValueError unless all that are given have one type."""
        types = {name: array.dtype for name, array in inputs.items() if array is not None}
        if len(set(types.values())) > 1:
            raise ValueError(f"{self.told}: {', '.join(f'{n} is {t}' for n, t in types.items())}; they have one type")
