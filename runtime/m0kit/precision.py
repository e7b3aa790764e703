"""Which device can compute with weights stored in which way. Owns that one table and its error.

ONNX Runtime gives a node that the chosen execution provider has no kernel for to the host's CPU without a word;
so what a device cannot do is refused here, when an artifact is made for it and again when it is opened.
"""

from collections.abc import Iterable
from typing import Final

from m0kit.errors import DeviceError

SCHEMES: Final = ("fp32", "fp16", "bf16", "int8", "int4", "nf4")

# Kernels as of ONNX Runtime 1.32. fp32, fp16 and bf16 are standard operators, which any provider may be tried with.
# int8 is MatMulIntegerToFloat, for which CUDA has none; int4 is MatMulNBits, nf4 is MatMulBnb4.
_EVERYWHERE: Final = frozenset({"fp32", "fp16", "bf16"})
_KERNELS: Final = {"cpu": frozenset(SCHEMES), "cuda": _EVERYWHERE | {"int4", "nf4"}}


def provider_of(device: str) -> str:
    """ "cpu", "cuda", or the device's own name where neither."""
    if device == "CPUExecutionProvider":
        return "cpu"
    return "cuda" if device.startswith(("cuda", "CUDA")) else device


def supported(device: str) -> tuple[str, ...]:
    """The schemes that the device has kernels for."""
    kernels = _KERNELS.get(provider_of(device), _EVERYWHERE)
    return tuple(scheme for scheme in SCHEMES if scheme in kernels)


def check_device(device: str, schemes: Iterable[str], what: str) -> None:
    """Raises DeviceError when the device lacks kernels for one of the schemes that `what` uses."""
    known = supported(device)
    if lacking := sorted(set(schemes) - set(known)):
        raise DeviceError(
            f"{what}: device {device!r} has no kernels for {', '.join(lacking)} in ONNX Runtime, and m0kit does not "
            f"move work to the host's CPU by itself. What works there: {', '.join(known)}; or device 'cpu'."
        )
