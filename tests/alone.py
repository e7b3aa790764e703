"""Is the runtime installed alone here? Not a test file.

Its tests also run without what the exporter and PyTorch's side need. They get the committed artifacts there; what
holds the runtime against another package is skipped, and tests/installed knows which modules that are.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

import pytest

ALONE = find_spec("torch") is None
DEVELOPMENT = ("torch", "transformers", "onnx", "ml_dtypes", "safetensors", "peft", "pyarrow", "ray", "psutil")


class _Absent:
    """Stands for a package that is not installed: a test that touches it is skipped."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith(("_", "pytest")):  # pytest looks at what a file of tests holds
            raise AttributeError(attribute)
        pytest.skip(f"needs {self._name}")


def optional(name: str) -> Any:
    """The module, for the head of a file of tests of which most do without it."""
    return import_module(name) if find_spec(name.partition(".")[0]) else _Absent(name)
