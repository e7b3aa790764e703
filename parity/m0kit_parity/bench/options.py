"""What several benchmarks are asked: options that they share, and other engines. Owns names, and imports no engine."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click

from m0kit.errors import DependencyError, InputError

THREADS = click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default=True)
PLOT = click.option("--plot", "plot_file", type=click.Path(path_type=Path, dir_okay=False), help="Write an SVG.")
PACKAGES: Final = ("torch", "transformers")  # whose versions a figure depends on too
# Each peer, and the packages that it needs with what installs them; read without importing PyTorch.
_LLAMA: Final = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
PEERS: Final[Mapping[str, Mapping[str, str]]] = {
    "openvino-int8": {"openvino": "openvino", "nncf": "nncf"},
    **dict.fromkeys(("llama-f16", "llama-q8_0", "llama-q4_0", "llama-q4_k"), _LLAMA),
}


def require_packages(peers: Sequence[str]) -> None:
    """Raises InputError for a peer that is not known, DependencyError for a package that one needs; imports nothing."""
    for name in peers:
        if name not in PEERS:
            raise InputError(f"peer {name!r} is not known. Say {', '.join(PEERS)}.")
        for package, install in PEERS[name].items():
            if importlib.util.find_spec(package) is None:
                raise DependencyError(f"the peer {name} needs {install}. pip install {install}")
