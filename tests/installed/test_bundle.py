"""A bundle, made with pip as it is, installed where there is no index, serves a request there."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tests.artifacts.make import unpack
from tests.installed.environment import ROOT, build_wheel, clean_environment, pip

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
QUERY = {"query": "markdown", "documents": ["notes on markdown", "the tide"]}


@pytest.fixture(scope="module")
def stick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundled")
    unpack(folder)
    wheel = build_wheel(folder)
    pip(sys.executable, "download", "--no-deps", "--dest", str(folder / "probe"), "msgspec")  # skips without a registry
    words = [sys.executable, "-m", "m0kit", "bundle", str(folder / "int8"), "-o", str(folder / "stick")]
    words += ["--extra", "cpu,serve", "--wheel", str(wheel), "--lock", str(ROOT / "deploy" / "requirements-cpu.txt")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "stick"


@pytest.fixture(scope="module")
def installed(stick: Path) -> Path:
    """The environment that the script makes, which finds nothing but what lies beside it."""
    folder = stick.parent / "venv"
    nowhere = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable, "HOME": str(stick.parent)}
    environment = {k: v for k, v in clean_environment().items() if not k.startswith("PIP_")} | nowhere
    done = subprocess.run(
        ["sh", str(stick / "install.sh"), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
class TestABundle:
    def test_what_is_installed_is_what_the_list_names(self, stick: Path, installed: Path) -> None:
        words = [str(installed / "bin" / "python"), "-m", "pip", "list", "--format", "json"]
        done = subprocess.run(words, env=clean_environment(), capture_output=True, text=True, check=True)
        there = {each["name"].lower().replace("_", "-"): each["version"] for each in json.loads(done.stdout)}
        listed = json.loads((stick / "m0kit.cdx.json").read_text("utf-8"))
        parts = [listed["metadata"]["component"], *listed["components"]]
        named = {part["name"]: part["version"] for part in parts if part["type"] != "machine-learning-model"}
        assert there.items() - named.items() <= {("pip", there["pip"]), ("setuptools", there.get("setuptools"))}
        assert named.items() <= there.items()

    def test_it_serves_a_request(self, stick: Path, installed: Path) -> None:
        words = [str(installed / "bin" / "m0kit"), "serve", str(stick / "models" / "int8"), "--port", "0"]
        words += ["--threads", "1", "--log-format", "json"]
        with subprocess.Popen(words, env=clean_environment(), stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            try:
                lines = (json.loads(line) for line in process.stderr)
                place = next(line["address"] for line in lines if line["event"] == "ready")
                request = urllib.request.Request(
                    f"{place}/v1/rerank", json.dumps(QUERY).encode(), {"Content-Type": "application/json"}
                )
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                with opener.open(request, timeout=60) as answer:
                    results = json.load(answer)["results"]
                assert {result["index"] for result in results} == {0, 1}
            finally:
                process.send_signal(signal.SIGTERM)
            process.stderr.read()
        assert process.returncode == 0
