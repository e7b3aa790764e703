"""`make integrations`: LangChain, LlamaIndex and Haystack in environments of their own, and this folder's tests there.

    python -m tests.integrations                # with the newest versions that pyproject.toml allows, and the lowest
    python -m tests.integrations --only newest -k haystack       # the rest is pytest's

Owns the environments: of this Python, below the one that runs this, made again where pyproject.toml asks for something
else. What the development environment has is not in them, PyTorch least of all.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from tests.installed.environment import ROOT, TOOLS, Environment, clean_environment, lowest, pip, requirements

EXTRAS: Final = ("langchain", "llama-index", "haystack")
BOUNDS: Final = ("newest", "lowest")
SHOWN: Final = ("langchain-core", "llama-index-core", "haystack-ai", "pydantic", "numpy", "onnxruntime")
# langchain-classic has the retriever that a compressor is for.
ALSO: Final = ("langchain-classic>=1,<2",)


def wanted(which: str) -> list[str]:
    """What pip is asked for, beside m0kit itself."""
    tools = [str(requirement) for requirement in requirements("dev") if requirement.name in TOOLS]
    if which == "newest":
        return [*tools, *ALSO]
    return [*tools, *lowest([requirement for extra in EXTRAS for requirement in requirements(extra)])]


def environment(which: str) -> Environment:
    """The environment "newest" or "lowest", made if it is not there as it should be."""
    folder = Path(sys.prefix) / "integrations" / which
    extras = ("cpu", "pdf", *EXTRAS)
    asked = [f"-e{ROOT}[{','.join(extras)}]", *wanted(which)]
    named = [str(requirement) for extra in (None, *extras) for requirement in requirements(extra)]
    stamp = json.dumps([sys.version, asked, named])
    note = folder / "made-of.json"
    made = Environment(folder, tuple(asked))
    if not note.is_file() or note.read_text("utf-8") != stamp:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], env=clean_environment(), check=True)
        pip(str(folder / "bin" / "python"), "install", *asked)
        note.write_text(stamp, "utf-8")
    return made


def main() -> int:
    """1 where a test fails or an environment cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m tests.integrations")
    parser.add_argument("--only", choices=BOUNDS, help="one of the environments; both by default")
    chosen, words = parser.parse_known_args()
    failed = False
    for which in BOUNDS if chosen.only is None else (chosen.only,):
        try:
            made = environment(which)
        except (pytest.fail.Exception, pytest.skip.Exception) as error:  # what `pip` says where it is of no use
            print(f"{which}: {error}", file=sys.stderr)
            return 1
        versions = made.versions()
        print(f"{which}: {', '.join(f'{name} {versions[name]}' for name in SHOWN)}", flush=True)
        # Warnings of these frameworks, and of what they import, are theirs.
        command = [made.folder / "bin" / "python", "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
        here = {**clean_environment(), "HAYSTACK_TELEMETRY_ENABLED": "False"}
        tests = str(Path(__file__).parent.relative_to(ROOT))
        failed |= subprocess.run([*command, *words, tests], cwd=ROOT, env=here, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
