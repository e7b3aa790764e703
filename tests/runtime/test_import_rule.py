"""The runtime works where PyTorch and the ONNX tools are not installed."""

import subprocess
import sys
from pathlib import Path

import m0kit

BLOCKED = (
    "torch",
    "transformers",
    "peft",
    "onnx",
    "safetensors",
    "m0kit_export",
    "m0kit_quant",
    "m0kit_parity",
)

_SCRIPT = """
import importlib, pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None          # an import of it raises ImportError
import m0kit
modules = [m.name for m in pkgutil.walk_packages(m0kit.__path__, "m0kit.")]
for name in modules:
    importlib.import_module(name)
print(len(modules))
"""


def test_every_runtime_module_imports_with_the_heavy_packages_blocked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(blocked=BLOCKED)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = list(Path(m0kit.__file__).parent.rglob("*.py"))  # a folder is a module as well, and m0kit itself no other
    assert int(done.stdout) == len(files) - 1 > 8


def test_the_block_would_be_noticed() -> None:
    script = _SCRIPT.format(blocked=(*BLOCKED, "numpy"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "numpy" in done.stderr
