"""One CUDA graph run without a GPU: ONNX's reference evaluator with the operators of this folder.

Owns that a graph is given what a session on CUDA would take: inputs by their names, types and shapes, and the pool's
pages as they are, to be written in place. Not fast; for graphs of small models.

    graph = CudaReference(Path("m0-fp16/decoder.cuda.onnx"))
    graph.run({"token_ids": …, "past_key_values.0.key": pool[0], …}, ["hidden"])    # and pool has the new keys
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from m0kit_parity.cuda.arithmetic import Array
from m0kit_parity.cuda.operators import OPERATORS
from m0kit_parity.cuda.standard import ONNX, STANDARD

_OWN = {(operator.op_domain, operator.__name__): operator for operator in (*OPERATORS, *STANDARD)}


class CudaReference:
    """A graph in memory; `m0kit.scoring.sessions.Graph` as the engine sees it. Any inner result is an output, too."""

    def __init__(self, model: Path | onnx.ModelProto) -> None:
        """`model`: a graph, or its file. Raises NotImplementedError for operators that are not computed here."""
        proto = onnx.load(model) if isinstance(model, Path) else model
        nodes = {(node.domain, node.op_type) for node in proto.graph.node}
        if unknown := sorted(nodes - _OWN.keys() - {("", name) for name in ONNX}):
            named = ", ".join(f"{domain or 'ai.onnx'}.{name}" for domain, name in unknown)
            raise NotImplementedError(f"{named}: no operator here computes this as a GPU does, in 16 bits too")
        self._evaluator = ReferenceEvaluator(proto, new_ops=list(_OWN.values()))
        self._inputs = {value.name: value.type.tensor_type for value in proto.graph.input}

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """What is asked for, by name. What operators update in place, they update in the arrays of `feeds`.

        Raises ValueError for an input that is missing, unknown or not of the graph's type and shape.
        """
        if feeds.keys() != self._inputs.keys():
            missing, unknown = self._inputs.keys() - feeds.keys(), feeds.keys() - self._inputs.keys()
            raise ValueError(f"the graph's inputs: missing are {sorted(missing)}, unknown are {sorted(unknown)}")
        for name, array in feeds.items():
            self._check(name, array)
        with np.errstate(all="ignore"):  # hardware does not warn of infinities
            results = self._evaluator.run(list(outputs), dict(feeds))
        return dict(zip(outputs, results, strict=True))

    def _check(self, name: str, array: Array) -> None:
        expected = self._inputs[name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(expected.elem_type)
        shape = [dim.dim_value if dim.HasField("dim_value") else None for dim in expected.shape.dim]
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
        if array.dtype != dtype or not fits:
            raise ValueError(
                f"the input {name} is {array.dtype} {list(array.shape)}, the graph takes {dtype} "
                f"[{', '.join('?' if n is None else str(n) for n in shape)}]"
            )
