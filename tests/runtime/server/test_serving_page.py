"""docs/serving.md says what the command, the app and its numbers are; its lines of curl are sent."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")

from starlette.routing import Route
from tests.runtime.server.serving import served, until

from m0kit.cli.serve import serve
from m0kit.server import worker, workers
from m0kit.server.app import App, build
from m0kit.server.keys import MIN_CHARACTERS
from m0kit.server.metrics import CacheCounts, Metrics
from m0kit.server.problems import STATUS
from m0kit.server.settings import ALIASES, ModelSettings, Settings
from m0kit.terminal import LOST

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text("utf-8")


def rows(heading: str, skipped: int = 0) -> list[list[str]]:
    """The cells of a table below a heading, the n-th one there."""
    section = re.split(r"^## ", PAGE.split(f"\n## {heading}\n", 1)[1], flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in tables[skipped].splitlines()[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_settings_are_the_commands_options_with_their_defaults() -> None:
    told = {flag: default for first, default, *_ in rows("Settings") for flag in code(first)}
    wanted: dict[str, str] = {}
    for param in serve.params:
        if isinstance(param, click.Option):
            name = "/".join([*param.opts, *param.secondary_opts])
            is_said = param.default and isinstance(param.default, str | int | float) and not param.is_flag
            wanted[name] = f"`{param.default}`" if is_said else ""
    shown = {flag: default.replace(".0`", "`") for flag, default in wanted.items()}
    assert told == shown


def test_the_codes_are_those_that_there_are() -> None:
    told = rows("What waits, and what is refused")
    assert {code(first)[0]: int(status) for first, status, _ in told} == STATUS
    assert all(what for _, _, what in told)


def test_the_numbers_are_those_that_are_counted() -> None:
    metrics = Metrics(lambda: {"prefix": CacheCounts(1, 1, 1, 1)})
    metrics.request("/v1/rerank", 200, 1)
    metrics.stage("prepare", 1)
    metrics.documents("text")
    metrics.tokens("text", 1)
    metrics.rejected("overloaded")
    metrics.model_info("m", "int8", "0")
    text = metrics.render()[0].decode()
    kinds = dict(re.findall(r"^# TYPE (m0kit_\w+) (\w+)$", text, re.MULTILINE))
    kinds = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    labels = {
        name: set(re.findall(r'(\w+)="', found[1])) - {"le"}
        for name in kinds
        if (found := re.search(rf"^{name}(?:_count)?(?:\{{(.*?)\}})? ", text, re.MULTILINE)) and (found[1] or "")
    }
    told = {name: (kind, set(code(its))) for first, kind, its, _ in rows("Metrics") for name in code(first)}
    assert told == {name: (kind, labels.get(name, set())) for name, kind in kinds.items()}


def test_the_paths_are_the_apps(tmp_path: Path) -> None:
    told: set[tuple[str, str]] = set()
    for first, *_ in rows("What is spoken"):
        methods: list[str] = []
        for words in code(first):
            *named, path = words.split()
            methods = [*methods, *named] if not path.startswith("/") else methods
            if path.startswith("/"):
                told |= {(method, path) for method in [*methods, *named]}
                methods = []
            else:
                methods.append(path)
    there: set[tuple[str, str]] = set()
    for route in App(Settings((ModelSettings(str(tmp_path)),))).routes:
        assert isinstance(route, Route)
        path = route.path.replace(":path}", "}")
        there |= {(method, path) for method in route.methods or () if method != "HEAD"}
    assert told == there


def test_what_else_has_a_number_is_the_codes() -> None:
    codes = {first for first, _ in rows("Signals and exit codes", 1)}
    assert codes == {"0", "1", "2", *map(str, (LOST, worker.INTERRUPTED, worker.BROKEN_OFF))}
    assert {code(first)[0] for first, _ in rows("Signals and exit codes")} == {"SIGTERM", "SIGINT", "SIGHUP"}
    assert f"at least {MIN_CHARACTERS} characters" in PAGE
    for alias in ALIASES:
        assert f"`{alias}`" in PAGE
    assert workers.__doc__ is not None


def test_the_lines_of_curl_do_what_the_page_says(committed: Path, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("this machine has no curl")
    lines = re.findall(r"^    (curl .*)$", PAGE, re.MULTILINE)
    assert len(lines) >= 8
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).save(tmp_path / "page.png")
    documents = {"documents": [{"id": "a", "text": "tides"}, {"id": "b", "text": "foxes"}]}
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    answers: list[dict[str, Any]] = []
    app = build(Settings((ModelSettings(str(committed / "fp32"), index=tmp_path / "library", threads=1),)))
    with served(app) as at:
        until(lambda: app.is_ready)
        for line in lines:
            words = shlex.split(line.partition("    #")[0].replace(":8080", f":{at.port}"))
            done = subprocess.run(
                [curl, "-sS", "--fail-with-body", *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
            answers.append(json.loads(done.stdout))
    assert [len(each["results"]) for each in answers if "model" in each] == [2, 2]  # rankings
    assert [each["status"] for each in answers if "status" in each] == ["read", "read"]
    assert [each["read"] for each in answers if "read" in each] == [2]
    assert [each["ids"] for each in answers if "ids" in each] == [["b"]]
