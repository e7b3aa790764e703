"""Makes `kernels.json`: the CUDA kernels of the onnxruntime-gpu it runs with, and the signatures of their operators.

Owns how they are read: from the kernels as registered, not from documentation. What the file says is read by
`kernels`. It needs a device, for ONNX Runtime lists only kernels of a provider that starts, and falls over its TensorRT
provider where TensorRT is not installed; so it is run on the pretended device, and again for each release pinned.

    pip install --no-deps --target SITE onnxruntime-gpu==1.31.1
    python -m m0kit_parity.cuda.pretend SITE -m m0kit_parity.cuda.table
"""

import ctypes
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from m0kit.terminal import show

DOMAINS: Final = ("", "com.microsoft")
PROVIDER: Final = "CUDAExecutionProvider"

_OPEN: Final = 2**31 - 1  # ONNX Runtime's word for a range of versions without an end
_PORTS: Final = 32  # inputs and outputs that are asked about; no operator has as many
# ONNX Runtime's C interface, which is kept from release to release: places in OrtApi, OrtEpApi.
_API_VERSION, _GET_EP_API = 24, 317
_OPERATOR, _DOMAIN, _PROVIDER, _INPUT_MEMORY, _OUTPUT_MEMORY = 34, 35, 37, 38, 39

Row = tuple[int, int | None, dict[str, list[str]], list[int], list[int]]


def main(arguments: Sequence[str]) -> None:
    """Write the table to the file that is named, or to the one that m0kit carries."""
    to = Path(arguments[0]) if arguments else Path(__file__).with_name("kernels.json")
    import onnxruntime

    listed, signatures = kernels(onnxruntime), _signatures()
    lines = [
        f"{json.dumps(name)}: " + json.dumps({"signatures": signatures[name], "kernels": listed.get(name, [])})
        for name in sorted(signatures)
    ]
    release = json.dumps(f"onnxruntime-gpu {onnxruntime.__version__}")
    text = f'{{"release": {release}, "operators": {{\n' + ",\n".join(lines) + "\n}}\n"
    to.write_text(text, "utf-8")
    show(f"{to}: {sum(map(len, listed.values()))} kernels of {len(listed)} operators, {release}")


def kernels(onnxruntime: Any) -> dict[str, list[Row]]:
    """By operator: first and last version, types by parameter, inputs and outputs in CPU memory."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    memory = _Memory(Path(onnxruntime.__file__).parent / "capi")
    found: dict[str, dict[tuple[Any, ...], list[dict[str, frozenset[str]]]]] = defaultdict(lambda: defaultdict(list))
    for kernel in state.get_all_opkernel_def():
        if kernel.provider != PROVIDER or kernel.domain not in DOMAINS:
            continue
        first, last = kernel.version_range
        place = (first, None if last == _OPEN else last, *memory.of(kernel))
        types = {name: frozenset(map(_plain, given)) for name, given in kernel.type_constraints.items()}
        found[_name(kernel)][place].append(types)
    return {
        name: [
            (first, last, {key: sorted(given) for key, given in sorted(types.items())}, list(inputs), list(outputs))
            for (first, last, inputs, outputs), each in sorted(places.items(), key=lambda item: item[0][0])
            for types in joined(each)
        ]
        for name, places in found.items()
    }


def joined(each: Iterable[dict[str, frozenset[str]]]) -> list[dict[str, frozenset[str]]]:
    """The same kernels, those that differ in the types of one parameter made one."""
    left = [dict(types) for types in dict.fromkeys(tuple(sorted(types.items())) for types in each)]
    again = True
    while again:
        again = False
        for types in list(left):
            for other in left:
                differing = [key for key in types if types.keys() == other.keys() and types[key] != other[key]]
                if other is not types and types.keys() == other.keys() and len(differing) == 1:
                    types[differing[0]] |= other[differing[0]]
                    left.remove(other)
                    again = True
                    break
            if again:
                break
    return sorted(left, key=lambda types: [sorted(given) for _, given in sorted(types.items())])


def _signatures() -> dict[str, dict[str, list[Any]]]:
    """By operator and version: inputs, outputs ("name parameter", "…" where it repeats), parameters of one type."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: dict[str, dict[str, list[Any]]] = defaultdict(dict)
    schemas = [schema for schema in state.get_all_operator_schema() if schema.domain in DOMAINS]
    for schema in sorted(schemas, key=lambda schema: schema.since_version):
        if schema.deprecated:
            continue
        ports = [
            [f"{p.name} {_plain(p.typeStr)}{'…' if str(p.option).endswith('Variadic') else ''}" for p in side]
            for side in (schema.inputs, schema.outputs)
        ]
        given = {c.type_param_str: list(c.allowed_type_strs) for c in schema.type_constraints}
        only = {name: _plain(types[0]) for name, types in given.items() if len(types) == 1}
        found[_name(schema)][str(schema.since_version)] = [*ports, only]
    return dict(found)


def _name(of: Any) -> str:
    operator = of.op_name if hasattr(of, "op_name") else of.name
    return f"{of.domain}.{operator}" if of.domain else str(operator)


def _plain(kind: str) -> str:
    """tensor(float16) → float16; a list of tensors stays as it is."""
    found = re.fullmatch(r"tensor\((\w+)\)", kind)
    return found[1] if found else kind


class _Memory:
    """Which inputs and outputs of a kernel lie in CPU memory: Python is not told, the C interface is."""

    def __init__(self, capi: Path) -> None:
        library = ctypes.CDLL(str(next(capi.glob("libonnxruntime.so.*"))))
        library.OrtGetApiBase.restype = ctypes.c_void_p
        pointers = ctypes.POINTER(ctypes.c_void_p)
        base = ctypes.cast(library.OrtGetApiBase(), pointers)
        get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(base[0] or 0)
        api = ctypes.cast(get_api(_API_VERSION), pointers)
        get_ep_api = ctypes.CFUNCTYPE(ctypes.c_void_p)(api[_GET_EP_API] or 0)
        functions = ctypes.cast(get_ep_api(), pointers)
        text = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
        asked = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int))
        self._names = [text(functions[place] or 0) for place in (_OPERATOR, _DOMAIN, _PROVIDER)]
        self._asked = [asked(functions[place] or 0) for place in (_INPUT_MEMORY, _OUTPUT_MEMORY)]

    def of(self, kernel: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # pybind11 keeps the pointer to what a Python object stands for right behind the object's head.
        pointer = ctypes.cast(id(kernel) + object.__basicsize__, ctypes.POINTER(ctypes.c_void_p))[0]
        told = [(name(pointer) or b"").decode() for name in self._names]
        if told != [kernel.op_name, kernel.domain, kernel.provider]:
            raise AssertionError(f"ONNX Runtime's C interface takes the kernel of {kernel.op_name} for {told}")
        inputs, outputs = (self._in_cpu_memory(pointer, asked) for asked in self._asked)
        return inputs, outputs

    def _in_cpu_memory(self, pointer: int | None, asked: Any) -> tuple[int, ...]:
        memory = ctypes.c_int()
        found = []
        for port in range(_PORTS):
            if asked(pointer, port, ctypes.byref(memory)):
                raise AssertionError(f"ONNX Runtime's C interface does not say where port {port} lies")
            if memory.value:  # 0 is the device's own memory
                found.append(port)
        return tuple(found)


if __name__ == "__main__":
    main(sys.argv[1:])
