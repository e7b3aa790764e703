"""Python with onnxruntime-gpu on a CUDA device that is not there: no GPU, no driver, none of NVIDIA's libraries.

ONNX Runtime's own code does all that comes before a kernel: it lists its kernels, optimises graphs, gives each node a
place, opens sessions, checks shapes, binds, copies, launches and waits, and the last two are counted. Kernels compute
nothing, so numbers mean nothing. Owns how that is set up (`pretend.c` answers for the device); not what is asked of it:
`table`, `placing` and `rehearse` are run in it, and any program may be. Needs Linux, a C compiler and binutils.

    pip install --no-deps --target SITE onnxruntime-gpu==1.31.1
    python -m m0kit_parity.cuda.pretend SITE -m m0kit_parity.cuda.table
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from m0kit.errors import DependencyError
from m0kit.terminal import say

_SOURCE = Path(__file__).with_name("pretend.c")
_PROVIDER = "libonnxruntime_providers_cuda.so"
_OTHER = "libonnxruntime_providers_tensorrt.so"
_NVIDIA = re.compile(r"lib(cu[a-zA-Z]+)\.so\.\d+")


def main(arguments: Sequence[str]) -> int:
    """Run Python with the arguments after the first, which is the folder that holds onnxruntime/; its exit code."""
    if len(arguments) < 2:
        say("python -m m0kit_parity.cuda.pretend SITE PROGRAM…: SITE holds onnxruntime-gpu")
        return 2
    with tempfile.TemporaryDirectory(prefix="m0kit-pretend-") as folder:
        try:
            environment = prepare(Path(arguments[0]), Path(folder))
        except DependencyError as error:
            say(str(error))
            return 2
        return subprocess.run([sys.executable, *arguments[1:]], env=environment, check=False).returncode


class Counted(NamedTuple):
    """What was asked of the device until now. A kernel that is launched is not computed."""

    launches: int  # kernels and products
    waits: int  # of the host, for the device
    bytes_to_host: int


def counted() -> Counted:
    """In this process, which is one that `main` started."""
    numbers = (ctypes.c_long * 3)()
    ctypes.CDLL(None).m0kit_counted(numbers)
    return Counted(*numbers)


def prepare(site: Path, folder: Path) -> dict[str, str]:
    """The environment in which Python finds the onnxruntime of `site` and the device, both set up in `folder`.

    Raises DependencyError when `site` holds no onnxruntime-gpu, or there is nothing to compile with.
    """
    package = site.absolute() / "onnxruntime"
    provider = package / "capi" / _PROVIDER
    if not provider.is_file():
        raise DependencyError(
            f"{site}: no onnxruntime-gpu is in it. pip install --no-deps --target {site} onnxruntime-gpu==1.31.1"
        )
    device = folder / "device.so"
    _compile(provider, device)
    for name in _linked_with(provider):
        (folder / name).symlink_to(device)
    (folder / "libcudnn.so.9").symlink_to(device)  # opened when the first session starts

    # The package as it is, file by file, but for the one library that cannot start without TensorRT.
    capi = folder / "site" / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    for here, there in ((package, capi.parent), (package / "capi", capi)):
        for item in here.iterdir():
            if item.name not in ("capi", _OTHER):
                (there / item.name).symlink_to(item)
    (capi / _OTHER).symlink_to(device)

    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(capi.parents[1]), *([inherited] if inherited else [])]),
        "LD_PRELOAD": str(device),
        "LD_LIBRARY_PATH": str(folder),
        "M0KIT_PRETENDED": str(capi),
    }


def _compile(provider: Path, to: Path) -> None:
    """`pretend.c` with an answer for all that the provider is linked with: what it has none for is "done"."""
    options = ["-std=gnu11", "-shared", "-fPIC", "-O1", "-w", "-x", "c"]
    _run("cc", *options, str(_SOURCE), "-o", str(to), "-ldl")
    answered = {line.split()[-1] for line in _run("nm", "-D", "--defined-only", str(to)).splitlines()}
    wanted = {line.split()[-1].partition("@")[0] for line in _run("nm", "-D", "-u", str(provider)).splitlines()}
    missing = sorted(name for name in wanted - answered if re.match(r"(__)?cu[a-z]*[A-Z]", name))
    source = _SOURCE.read_text("utf-8") + "".join(f"DONE({name})\n" for name in missing)
    _run("cc", *options, "-", "-o", str(to), "-ldl", given=source)


def _linked_with(provider: Path) -> set[str]:
    """NVIDIA's libraries among those that it needs."""
    needed = re.findall(r"NEEDED\s+(\S+)", _run("objdump", "-p", str(provider)))
    return {name for name in needed if _NVIDIA.fullmatch(name)}


def _run(*command: str, given: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=given, text=True, capture_output=True, check=True)
    except FileNotFoundError:
        raise DependencyError(f"{command[0]} is needed to set the device up. apt install gcc binutils") from None
    except subprocess.CalledProcessError as error:
        raise DependencyError(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from None
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
