"""m0kit's command in a process in which some packages cannot be imported. Not a test file."""

import subprocess
import sys
import textwrap

TORCH = ("torch", "transformers", "peft", "safetensors", "bitsandbytes", "onnxruntime")

_SCRIPT = textwrap.dedent("""
    import sys
    from importlib.machinery import PathFinder

    blocked, sys.argv = sys.argv[1].split(","), ["m0kit", *sys.argv[2:]]
    find = PathFinder.find_spec
    PathFinder.find_spec = lambda name, *place: None if name in blocked else find(name, *place)
    from m0kit.cli.commands import main
    main()
""")


def m0kit_without(packages: tuple[str, ...], *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _SCRIPT, ",".join(packages), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
