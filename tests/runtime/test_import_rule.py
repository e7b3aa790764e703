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
needed = []
for name in modules:
    try:
        importlib.import_module(name)
    except m0kit.M0kitError as error:     # what an extra brings, where that is not installed
        assert name.startswith(("m0kit.integrations.", "m0kit.server.")) and "pip install 'm0kit[" in str(error), error
        needed += [name] if "integrations" in name else []
    except ModuleNotFoundError as error:  # likewise; `m0kit serve` says it in words
        assert name.startswith("m0kit.server."), error
        assert error.name.partition(".")[0] in ("starlette", "uvicorn", "h11", "prometheus_client"), error
print(len(modules), *needed)
"""


def test_every_runtime_module_imports_with_the_heavy_packages_blocked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(blocked=BLOCKED)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = list(Path(m0kit.__file__).parent.rglob("*.py"))  # a folder is a module as well, and m0kit itself no other
    count, *needed = done.stdout.split()
    assert int(count) == len(files) - 1 > 8
    assert len(needed) <= 3


def test_the_block_would_be_noticed() -> None:
    script = _SCRIPT.format(blocked=(*BLOCKED, "numpy"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "numpy" in done.stderr
