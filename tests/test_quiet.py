"""Nothing leaves the machine and nothing is left behind: commands are run as a user runs them, and watched.

Each runs with an empty home, temporary folder and working folder, in which every file is looked for afterwards. Python
itself tells which addresses are asked for, in every process that is started. Where the system can, a network
without a way out counts the attempts of native code too, and strace tells them one by one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from m0kit.quiet import ENVIRONMENT

# Loaded by every Python process of a command. Writes down addresses, and libraries that were imported too early.
_WATCH = """
import os, sys

SWITCHES = {
    "onnxruntime": "ORT_DISABLE_TELEMETRY",
    "huggingface_hub": "HF_HUB_DISABLE_TELEMETRY",
    "ray": "RAY_USAGE_STATS_ENABLED",
    "nncf": "NNCF_CI",
}

def note(line):
    with open(os.environ["WATCHED"], "a") as file:
        file.write(line + "\\n")

def watch(event, args):
    if event == "import" and SWITCHES.get(args[0], "PATH") not in os.environ:
        note("import " + args[0])
    elif event == "socket.connect" or event == "socket.sendto":
        if isinstance(args[1], tuple):
            note("address " + str(args[1][0]))
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        note("address " + str(args[0]))

sys.addaudithook(watch)
"""
_HERE = re.compile(r"127\.[\d.]+|::1|::|0\.0\.0\.0|localhost|None|::ffff:127\.[\d.]+")  # loopback and wildcards


@dataclass(frozen=True)
class Watched:
    """What a command did. Addresses and early imports are of all its Python processes."""

    files: dict[str, set[str]]  # "home", "tmp", "work" → names of files and of empty folders
    addresses: set[str]
    early: set[str]
    refused: int | None  # attempts to reach another machine, native code's too; None where that cannot be counted
    traced: str | None


def _can(command: Sequence[str]) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


_NO_WAY_OUT = ("unshare", "-n", "sh", "-c")
_COUNT = 'ip link set lo up; "$@"; rc=$?; cat /proc/net/snmp /proc/net/snmp6 > "$NETWORK" 2>/dev/null; exit $rc'
COUNTS = _can([*_NO_WAY_OUT, "ip link set lo up"])
TRACES = _can(["strace", "-f", "-e", "trace=connect", "true"])


def _run(folder: Path, command: Sequence[str], code: int = 0, trace: bool = False, **environment: str) -> Watched:
    places = {name: folder / name for name in ("home", "tmp", "work", "hooks")}
    for place in places.values():
        place.mkdir(exist_ok=True)
    (places["hooks"] / "sitecustomize.py").write_text(_WATCH)
    notes, network, log = folder / "notes", folder / "network", folder / "trace"
    notes.touch()
    left_out = {*ENVIRONMENT, "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "HF_HOME"}  # a user has none of them
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    paths = [str(places["hooks"]), *filter(None, [kept.get("PYTHONPATH")])]
    kept |= {"HOME": str(places["home"]), "TMPDIR": str(places["tmp"]), "PYTHONPATH": os.pathsep.join(paths)}
    kept |= {"PYTHONDONTWRITEBYTECODE": "1", "WATCHED": str(notes), "NETWORK": str(network), **environment}
    full = [sys.executable, *command]
    if trace:
        full = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,bind", "-o", str(log), *full]
    elif COUNTS:
        full = [*_NO_WAY_OUT, _COUNT, "sh", *full]
    done = subprocess.run(full, env=kept, cwd=places["work"], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    seen = [line.split(" ", 1) for line in notes.read_text().splitlines()]
    return Watched(
        {name: _names(places[name]) for name in ("home", "tmp", "work")},
        {text for kind, text in seen if kind == "address"},
        {text for kind, text in seen if kind == "import"},
        _refused(network.read_text()) if network.exists() else None,
        log.read_text() if trace else None,
    )


def _names(folder: Path) -> set[str]:
    """Files and empty folders."""
    found = [path for path in folder.rglob("*") if not path.is_dir() or not any(path.iterdir())]
    return {path.relative_to(folder).as_posix() for path in found}


def _refused(counters: str) -> int:
    ours = [line.split()[1:] for line in counters.splitlines() if line.startswith("Ip: ")]
    found = dict(zip(*ours, strict=True))
    sixth = re.search(r"^Ip6OutNoRoutes\s+(\d+)", counters, re.MULTILINE)
    return int(found["OutNoRoutes"]) + (int(sixth[1]) if sixth else 0)


def _outside(addresses: set[str]) -> set[str]:
    return {address for address in addresses if not _HERE.fullmatch(address)}


@pytest.fixture(scope="module")
def golden(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    command = ["parity", "record", str(tiny), "-o", str(folder / "golden"), "--cases", "text_text"]
    subprocess.run([sys.executable, "-m", "m0kit", *command], check=True, capture_output=True)
    return folder / "golden"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"query": "a", "document": "b c"}) + "\n")
    return path


_CACHE = {".cache/m0kit/verified.json"}
_JOB = {*_CACHE, ".cache/m0kit/journal.key"}
_TORCH = re.compile(r"torchinductor_\w+")  # an empty folder that PyTorch makes where temporary files are


@pytest.mark.parametrize(
    ("command", "home", "work"),
    [
        ("score {artifact} {pairs}", _CACHE, set()),
        ("score {artifact} {pairs} -o out.jsonl", _JOB, {"out.jsonl"}),
        ("index add {artifact} library {pairs}", _CACHE, {"library/*"}),
        ("doctor", set(), set()),
        ("bench memory {artifact} --max-tokens 256 --max-visual-tokens 192", _CACHE, set()),
        ("parity check {artifact} {golden} --engine openvino", _CACHE, set()),
        ("parity check {artifact} {golden} --engine onnx", _CACHE, set()),
        ("parity run {tiny} {artifact} --cases text_text", _CACHE, set()),
        ("checkpoint tiny out", set(), {"out/*"}),
        ("adapter {tiny} embedding out", set(), {"out/*"}),
        ("export {tiny} -o out --precision nf4", set(), {"out/*"}),
        ("quantize {artifact} -o out --precision int8", _CACHE, {"out/*"}),
    ],
    ids=lambda value: value.replace("{", "").replace("}", "") if isinstance(value, str) else "",
)
def test_no_command_reaches_another_machine_or_leaves_a_file(
    command: str,
    home: set[str],
    work: set[str],
    tmp_path: Path,
    tiny: Path,
    tiny_artifact: Path,
    golden: Path,
    pairs: Path,
) -> None:
    if "openvino" in command:
        pytest.importorskip("openvino")
    places = {"artifact": tiny_artifact, "tiny": tiny, "golden": golden, "pairs": pairs}
    words = [word.format(**places) for word in command.split()]
    if words[0] == "index":  # of documents
        pairs.write_text(json.dumps({"id": "1", "text": "b c"}) + "\n")
    seen = _run(tmp_path, ["-m", "m0kit", *words])
    assert seen.addresses == set()
    assert seen.early == set()
    assert seen.refused in (0, None)
    assert seen.files["home"] == home
    assert {name for name in seen.files["tmp"] if not _TORCH.fullmatch(name)} == set()
    folders = {name.split("/")[0] + "/*" if "/" in name else name for name in seen.files["work"]}
    assert folders == work


def test_a_cluster_started_here_keeps_to_this_machine(tiny_artifact: Path, pairs: Path) -> None:
    pytest.importorskip("ray")
    command = ["score", str(tiny_artifact), str(pairs), "-o", "out.jsonl", "--engine", "ray"]
    with tempfile.TemporaryDirectory(prefix="m0-") as short:  # Ray puts sockets there, whose names have a limit
        seen = _run(Path(short), ["-m", "m0kit", *command])
    assert _outside(seen.addresses) == set()
    assert seen.early == set()
    assert seen.refused in (0, None)
    assert seen.files["home"] == {*_JOB, ".ray/auth_token"}
    assert {name for name in seen.files["tmp"] if not name.startswith("ray/")} == set()
    assert seen.files["work"] == {"out.jsonl"}


@pytest.mark.skipif(not TRACES, reason="strace is not installed, or may not trace here")
def test_no_system_call_names_another_machine(tmp_path: Path, tiny_artifact: Path, pairs: Path) -> None:
    seen = _run(tmp_path, ["-m", "m0kit", "score", str(tiny_artifact), str(pairs)], trace=True)
    assert seen.traced is not None
    assert [line for line in seen.traced.splitlines() if "AF_INET" in line] == []


@pytest.mark.parametrize("package", ["m0kit", "m0kit_export.checkpoint", "m0kit_parity.bench.peers"])
def test_libraries_are_silenced_before_they_are_imported(package: str, tmp_path: Path) -> None:
    seen = _run(tmp_path, ["-c", f"import {package}, onnxruntime, huggingface_hub"])
    assert seen.early == set()
    assert seen.files["home"] == set()


def test_what_the_user_set_stays(tmp_path: Path) -> None:
    script = "import m0kit, os; assert os.environ['HF_HUB_DISABLE_TELEMETRY'] == '0'"
    _run(tmp_path, ["-c", script], HF_HUB_DISABLE_TELEMETRY="0")


def test_an_onnxruntime_that_was_imported_first_is_told_to_be_silent(tmp_path: Path, tiny_artifact: Path) -> None:
    """Its own files are there by then. What it would say of sessions is kept back."""
    script = f"""
import onnxruntime
told = []
onnxruntime.disable_telemetry_events = lambda: told.append(True)
from m0kit import Reranker
Reranker.load({str(tiny_artifact)!r})
assert told
"""
    _run(tmp_path, ["-c", script])


def test_openvino_and_nncf_find_no_reporter(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    script = """
from m0kit.quiet import silence_openvino
silence_openvino()
import openvino.tools.ovc
assert type(openvino.tools.ovc.telemetry).__module__.endswith("telemetry_stub")
"""
    seen = _run(tmp_path, ["-c", script])
    assert seen.files["home"] == set()
    assert seen.addresses == set()


def test_watching_sees_what_it_looks_for(tmp_path: Path) -> None:
    script = """
import huggingface_hub, os, socket, subprocess, sys
from pathlib import Path
Path.home().joinpath("left").touch()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
    try:
        out.connect(("192.0.2.1", 9))
    except OSError:
        pass
subprocess.run([sys.executable, "-c", "import socket; socket.getaddrinfo('127.0.0.1', 80)"])
"""
    seen = _run(tmp_path, ["-c", script])
    assert seen.addresses == {"192.0.2.1", "127.0.0.1"}
    assert _outside(seen.addresses) == {"192.0.2.1"}
    assert seen.early == {"huggingface_hub"}
    assert seen.files["home"] == {"left"}
    assert seen.refused is None or seen.refused > 0
