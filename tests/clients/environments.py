"""The environments that real clients run in: what is in each, and making them. Owns the folder they are kept in.

The newest of all clients do not fit into one: langchain-cohere holds cohere below 6, infinity-client httpx below 0.28.
What each client needs is pinned too, by `pins/` and `npm/package-lock.json`, so that a run can be done again.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
FOLDER: Final = Path(os.environ.get("CLIENTS") or HERE.parents[1] / ".clients")
PYTHON: Final = {
    "newest": (
        "cohere", "cohere-haystack", "jina-haystack", "huggingface-api-haystack", "vllm-haystack", "litellm",
        "rerankers", "requests", "xinference-client",
    ),
    "chains": (
        "langchain-cohere", "langchain-community", "llama-index-postprocessor-jinaai-rerank",
        "llama-index-postprocessor-cohere-rerank", "llama-index-postprocessor-tei-rerank",
        "llama-index-postprocessor-xinference-rerank", "llama-index-postprocessor-siliconflow-rerank",
    ),
    "infinity": ("infinity-client", "langchain-community"),
}  # fmt: skip
NPM: Final = "npm"
ALL: Final = (*PYTHON, NPM)


def pins(environment: str) -> dict[str, str]:
    """Versions of all that is in an environment, by their names as registries write them."""
    if environment == NPM:
        told = json.loads((HERE / NPM / "package.json").read_text("utf-8"))
        return dict(told["dependencies"])
    lines = (HERE / "pins" / f"{environment}.txt").read_text("utf-8").split()
    return {_normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def is_made(environment: str) -> bool:
    """Whether it is there, of these pins."""
    try:
        return (FOLDER / environment / "made").read_text("utf-8") == _state(environment)
    except OSError:
        return False


def missing() -> list[str]:
    """Those that are not made."""
    return [environment for environment in ALL if not is_made(environment)]


def make(environment: str) -> None:
    """Anew, where it is not there. Raises subprocess.CalledProcessError."""
    if is_made(environment):
        return
    folder = FOLDER / environment
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    shutil.rmtree(folder, ignore_errors=True)
    if environment == NPM:
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / NPM / name, folder)
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, env=clean, check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", folder], env=clean, check=True)
        constraints = HERE / "pins" / f"{environment}.txt"
        words = ["install", "--quiet", "--only-binary", ":all:", "--constraint", constraints, *PYTHON[environment]]
        subprocess.run([folder / "bin" / "python", "-m", "pip", *words], env=clean, check=True)
    (folder / "made").write_text(_state(environment), "utf-8")


def command(environment: str) -> tuple[list[str | Path], Path]:
    """What answers for the clients of an environment, and the folder it runs in."""
    folder = FOLDER / environment
    program = HERE / "programs" / (f"{NPM}.mjs" if environment == NPM else f"{environment}.py")
    if environment == NPM:  # node looks for packages where a program is
        return ["node", shutil.copy(program, folder)], folder
    return [folder / "bin" / "python", program], folder


def _state(environment: str) -> str:
    files = [HERE / NPM / "package-lock.json"] if environment == NPM else [HERE / "pins" / f"{environment}.txt"]
    names = " ".join(PYTHON.get(environment, ()))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) + names.encode()).hexdigest()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
