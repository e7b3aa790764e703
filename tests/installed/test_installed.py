"""The runtime as users get it: the built wheel and its `[cpu]` in an environment that holds nothing else.

Its own tests run there, without PyTorch, on the committed artifacts; once with the lowest versions that pyproject.toml
names, once with the newest it allows: in each run what meets a library, in `make test-all` every test.
"""

import shutil
import zipfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from packaging.requirements import Requirement
from tests.artifacts.make import unpack
from tests.installed.environment import (
    ROOT,
    Environment,
    build_wheel,
    find_python,
    lowest,
    make_environment,
    requirements,
)

HEAVY = ("torch", "transformers", "peft", "accelerate", "onnx", "safetensors", "ml-dtypes", "optimum", "openvino")
# Files of the runtime's tests of which nothing can run there, and why. One that is new here is a loss to look at.
SKIPPED_WHOLE = {
    "tests/runtime/server": "needs m0kit[serve]",
    "tests/runtime/jobs/test_ray_engine.py": "needs Ray, pyarrow and psutil",
    "tests/runtime/scoring/test_cuda_engine.py": "needs onnx, which runs what a GPU would",
    "tests/runtime/test_opening_on_gpus.py": "needs onnx, which runs what a GPU would",
}
# What single tests may miss: what the runtime is held against, and extras that `[cpu]` does not bring.
MISSING = (
    "torch",
    "transformers",
    "pyarrow",
    "dashscope",
    "m0kit[parquet]",
    "m0kit[pdf]",
    "m0kit[ray]",
    "m0kit[serve]",
    "an installed runtime has no",
    "needs onnx",
    "needs schemathesis",
)
# What reads, computes or prints by another package; the rest is Python's own files, processes and databases.
WHAT_MEETS_A_LIBRARY = (
    "tests/artifacts",
    "tests/runtime/artifact",
    "tests/runtime/cli/test_commands.py",
    "tests/runtime/keeping/test_states.py",
    "tests/runtime/reading",
    "tests/runtime/scoring",
    "tests/runtime/test_exactness.py",
    "tests/runtime/test_reranker.py",
)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="class")
def environment(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Of the class's Python, with the versions it asks for."""
    python = find_python(request.cls.version)
    if python is None:
        pytest.skip(f"there is no python{request.cls.version} on this machine")
    folder = tmp_path_factory.mktemp("installed") / "venv"
    return make_environment(folder, python, wheel, request.cls.extras, request.cls.pins)


class Installed:
    """What is tried in each environment."""

    version: str
    pins: tuple[str, ...] = ()
    extras: tuple[str, ...] = ("cpu",)
    tests: tuple[str, ...] = ("tests/artifacts", "tests/runtime")
    runs: tuple[str, ...] = ()  # of those that are skipped elsewhere

    def test_it_brings_what_is_named_and_nothing_heavy(self, environment: Environment) -> None:
        versions = environment.versions()
        assert not [name for name in HEAVY if name in versions]
        named = [one for extra in self.extras for one in requirements(extra)]
        for requirement in [*requirements(), *named, *map(Requirement, self.pins)]:
            found = versions[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(found), f"{requirement}: {found}"

    def test_the_command_ranks(self, environment: Environment, tmp_path: Path) -> None:
        unpack(tmp_path)
        (tmp_path / "notes.txt").write_text("notes on markdown", "utf-8")
        done = environment.run("m0kit", "rerank", tmp_path / "int8", "--query", "markdown", tmp_path / "notes.txt")
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
        assert "notes.txt" in done.stdout
        done = environment.run("m0kit", "export", "nowhere", "-o", tmp_path / "out")
        assert done.returncode == 1
        assert "m0kit[export]" in done.stderr
        assert "Traceback" not in done.stderr

    def test_the_runtimes_own_tests_pass(self, environment: Environment, tmp_path: Path) -> None:
        shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tmp_path)  # pytest's settings
        shutil.copytree(ROOT / "docs", tmp_path / "docs")  # which are held against the code
        report = tmp_path / "report.xml"
        words = ("-q", "-m", "not slow and not broad", "-p", "no:cacheprovider", f"--junit-xml={report}")
        done = environment.run("python", "-m", "pytest", *words, *self.tests, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
        whole, single, num_passed = set(), [], 0
        for case in ET.parse(report).iter("testcase"):
            skipped = case.find("skipped")
            if skipped is None:
                num_passed += 1
            elif not case.get("classname"):  # a file that could not be imported
                place = str(case.get("name")).replace(".", "/")
                whole.add(place if (ROOT / place).is_dir() else f"{place}.py")
            else:
                single.append(f"{case.get('classname')}.{case.get('name')}: {skipped.get('message')}")
        assert whole == {name for name in SKIPPED_WHOLE if name.startswith(self.tests) and name not in self.runs}
        assert not [line for line in single if not any(name in line for name in MISSING)]
        assert num_passed > len(single)


class TestTheLowestVersions(Installed):
    """On the oldest Python: newer ones have no wheels of the oldest numpy."""

    version = "3.11"
    pins = tuple(lowest([*requirements(), *requirements("cpu")]))
    tests = WHAT_MEETS_A_LIBRARY


class TestTheNewestVersions(Installed):
    version = "3.13"
    tests = WHAT_MEETS_A_LIBRARY


class TestAServerOnAPythonBetween(Installed):
    """What loads, scores, prints and serves; the rest differs little between two Pythons that pass all of it."""

    version = "3.12"
    extras = ("cpu", "serve", "pdf")
    pins = tuple(lowest([*requirements("serve"), *requirements("pdf")]))
    tests = (
        "tests/artifacts",
        "tests/runtime/cli/test_commands.py",
        "tests/runtime/test_reranker.py",
        "tests/runtime/server",
    )
    runs = ("tests/runtime/server",)


@pytest.mark.slow
class TestAllOfItWithTheLowestVersions(Installed):
    version = "3.11"
    pins = TestTheLowestVersions.pins


@pytest.mark.slow
class TestAllOfItOnAPythonBetween(Installed):
    version = "3.12"


@pytest.mark.slow
class TestAllOfItWithTheNewestVersions(Installed):
    version = "3.13"


@pytest.mark.slow
class TestTheNewestVersionsOnTheOldestPython(Installed):
    version = "3.11"


def test_the_wheel_holds_the_packages_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {"m0kit", "m0kit_export", "m0kit_quant", "m0kit_parity"} <= tops
    assert not [top for top in tops if "test" in top]
    for package in ("m0kit", "m0kit_export", "m0kit_quant", "m0kit_parity"):
        assert f"{package}/py.typed" in names


def test_the_lowest_versions_are_read_from_the_bounds() -> None:
    wanted = [Requirement("numpy>=1.26,<3"), Requirement("tokenizers>=0.23.1,<0.24"), Requirement("x~=2.1")]
    assert lowest(wanted) == ["numpy==1.26", "tokenizers==0.23.1", "x==2.1"]
    with pytest.raises(AssertionError, match="from which version on"):
        lowest([Requirement("numpy<3")])
