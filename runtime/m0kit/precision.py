"""Which device can compute with weights stored in which way. Owns that one table and its error.

ONNX Runtime gives a node that the chosen execution provider has no kernel for to the host's CPU without a word;
so what a device cannot do is refused here, when an artifact is made for it and again when it is opened.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from m0kit.errors import DeviceError


@dataclass(frozen=True, slots=True)
class Products:
    """What computes with weights that are stored in one way."""

    operator: str | None = None  # of ONNX Runtime's own; None: standard ones, which any provider may be tried with
    devices: tuple[str, ...] = ()  # those that have kernels for it, as of ONNX Runtime 1.32
    rounds: bool = False  # whether the CPU rounds activations, which CUDA's graphs never do


# `m0kit_quant.schemes` has the same names; this is what the runtime must know of them.
SCHEMES: Final[dict[str, Products]] = {
    "fp32": Products(),
    "fp16": Products(),
    "bf16": Products(),
    "int8": Products(
        "MatMulIntegerToFloat", ("cpu", "cuda"), rounds=True
    ),  # on CUDA weights are widened as they are used
    "int4": Products("MatMulNBits", ("cpu", "cuda"), rounds=True),
    "nf4": Products("MatMulBnb4", ("cpu", "cuda")),
}

# What the full model (2.4 billion parameters) takes on disk, and its weights in a GPU's memory: 10⁹ bytes, measured.
GIGABYTES: Final = {"fp32": 8.9, "fp16": 4.45, "bf16": 4.45, "int8": 2.24, "int4": 1.45, "nf4": 1.4}


def provider_of(device: str) -> str:
    """ "cpu", "cuda", or the device's own name where neither."""
    if device == "CPUExecutionProvider":
        return "cpu"
    return "cuda" if device.startswith(("cuda", "CUDA")) else device


def supported(device: str) -> tuple[str, ...]:
    """The schemes that the device has kernels for."""
    provider = provider_of(device)
    return tuple(name for name, each in SCHEMES.items() if each.operator is None or provider in each.devices)


def check_device(device: str, schemes: Iterable[str], what: str) -> None:
    """Raises DeviceError when the device lacks kernels for one of the schemes that `what` uses."""
    known = supported(device)
    if lacking := sorted(set(schemes) - set(known)):
        raise DeviceError(
            f"{what}: device {device!r} has no kernels for {', '.join(lacking)} in ONNX Runtime, and m0kit does not "
            f"move work to the host's CPU by itself. What works there: {', '.join(known)}; or device 'cpu'."
        )
