"""No file makes a terminal do anything: every command is given hostile names and texts, and what it prints is read.

Each command runs with its streams in a pipe and with a terminal behind them. The commands are those that there are: a
new one fails here until it has an input that is hostile to it.
"""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import pytest
from tests.alone import ALONE

from m0kit import terminal
from m0kit.artifact.manifest import read_manifest, write_manifest
from m0kit.cli import doctor
from m0kit.cli.commands import cli
from m0kit.machine.detect import Gpu, detect
from m0kit.plain import plain

ROOT = Path(__file__).parent.parent
# Escape sequences in both their forms, a link, every control character that a file's name may hold, directions, and
# what nobody sees. FORGED stands where a line would begin if one of them worked.
NASTY = (
    "x\x1b[2J\x1b[1;1H\x1b]8;;file:a\x1b\\\x07\x08\x0b\x0c\x0e\x7f\x85FORGED\x9b2J\x9d0;a\x9c\nFORGED\rFORGED\tz"
    "\u2028FORGED\u2029\u200e\u200f\u061c\u202a\u202d\u202e\u2066\u2069\u200b\u2060\ufeff\xad"
)
NAME = NASTY  # of a file; 255 bytes at most, so it is not longer
TEXT = f"\0{NASTY}//\ud800"  # for JSON
SEEN = r"x\x1b[2J\x1b[1;1H"  # so much of it must be there to read
IN_JSON = r"x\u001b[2J\u001b[1;1H"

pytestmark = pytest.mark.skipif(os.name != "posix" or ALONE, reason="names and terminals of POSIX; all four packages")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every command below a group."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@dataclass(frozen=True)
class Place:
    """What a case is made of. Everything in it has a hostile name, and holds hostile texts where it can."""

    folder: Path  # empty
    artifact: Path
    checkpoint: Path
    adapter: Path
    golden: Path
    library: Path  # an index; a copy for each case
    documents: Path  # folder with a text file, an image that is none, and JSON lines
    pairs: Path  # JSON lines for `score`, of which one is bad
    judged: Path  # likewise for `evaluate`

    @property
    def missing(self) -> Path:
        return self.folder / NAME


@dataclass(frozen=True)
class Case:
    """A command line, and what of the hostile text can be read in what it prints ("": the command quotes nothing)."""

    arguments: Callable[[Place], Sequence[object]]
    seen: str = SEEN
    stdin: bytes = b""


CASES: dict[tuple[str, ...], list[Case]] = {
    ("inspect",): [
        Case(lambda p: [p.artifact]),
        Case(lambda p: [p.artifact, "--verify"]),
        Case(lambda p: [p.artifact, "--json"], IN_JSON),
        Case(lambda p: [p.missing]),
    ],
    ("sign",): [
        Case(lambda p: [p.artifact, "--key", p.missing]),
        Case(lambda p: [p.artifact, "--key", p.documents]),
        Case(lambda p: [p.missing, "--key", p.missing]),
    ],
    ("doctor",): [Case(lambda p: [p.artifact]), Case(lambda p: [p.artifact, "--json"], IN_JSON)],
    ("rerank",): [
        Case(lambda p: [p.artifact, "--query", NASTY, p.documents]),
        Case(lambda p: [p.artifact, "--query", NASTY, p.documents, p.missing, "--json"], IN_JSON),
        Case(lambda p: [p.artifact, "--query", "q", p.missing, "--strict"]),
        Case(lambda p: [p.artifact, "--query", "q", "--index", p.library]),
        Case(lambda p: [p.artifact, "--query", "q", "--index", p.library, "--candidates", "-"], stdin=NASTY.encode()),
        Case(lambda p: [p.artifact, "--query", "q", "--device", NASTY, p.documents]),
        Case(lambda p: [p.artifact, "--query", "q", f"--{NASTY}"]),
        Case(lambda p: [p.artifact, "--query", "q", "--top-n", NASTY]),
        Case(lambda p: [p.artifact, "--query-image", p.missing, p.documents]),
        Case(lambda p: [p.artifact, "--query", NASTY, p.documents, "--html", p.missing]),
        Case(lambda p: [p.artifact, "--query", "q", p.documents, "--html", p.missing / "page.html"]),
    ],
    ("score",): [
        Case(lambda p: [p.artifact, p.pairs]),
        Case(lambda p: [p.artifact], IN_JSON, json.dumps({"id": TEXT, "query": "q", "document": "d"}).encode()),
        Case(lambda p: [p.artifact, p.pairs, "-o", p.folder / f"{NAME[:40]}.jsonl"]),
        Case(lambda p: [p.artifact, p.pairs, "--strict"]),
        Case(lambda p: [p.artifact, p.missing]),
    ],
    ("index", "add"): [
        Case(lambda p: [p.artifact, p.missing, p.documents]),
        Case(lambda p: [p.artifact, p.missing, p.documents, "--json"], IN_JSON),
        Case(lambda p: [p.artifact, p.missing]),
        Case(lambda p: [p.artifact, p.library, "--kv", "fp32"]),
    ],
    ("index", "stats"): [Case(lambda p: [p.missing]), Case(lambda p: [p.library], "")],
    ("index", "verify"): [Case(lambda p: [damaged(p)]), Case(lambda p: [damaged(p), "--json"], IN_JSON)],
    ("index", "prune"): [Case(lambda p: [p.library, "--remove", "-"], stdin=NASTY.replace("\n", "").encode())],
    ("index", "compact"): [Case(lambda p: [damaged(p)])],
    ("export",): [
        Case(lambda p: [p.checkpoint, "--adapter", p.adapter, "-o", p.missing]),
        Case(lambda p: [p.checkpoint, "--adapter", p.adapter, "-o", p.missing, "--json"], IN_JSON),
        Case(lambda p: [p.checkpoint, "-o", p.missing, "--recipe", recipe(p)]),
        Case(lambda p: [p.checkpoint, "-o", p.missing, "--precision", "int8", "--calibrate", p.pairs]),
        Case(lambda p: [foreign_tensor(p), "-o", p.missing]),
        Case(lambda p: [p.checkpoint, "--adapter", foreign_adapter(p), "-o", p.missing]),
        Case(lambda p: [f"organisation/{NASTY}", "-o", p.missing]),
    ],
    ("quantize",): [
        Case(lambda p: [p.artifact, "-o", p.missing, "--precision", "int8"]),
        Case(lambda p: [p.artifact, "-o", p.missing, "--recipe", recipe(p)]),
        Case(lambda p: [p.missing, "-o", p.folder / "out", "--precision", "int8"]),
    ],
    ("evaluate",): [
        Case(lambda p: [p.artifact, p.artifact, "--pairs", p.judged, "--no-speed"]),
        Case(lambda p: [p.artifact, p.artifact, "--pairs", p.judged, "--no-speed", "--json"], IN_JSON),
        Case(lambda p: [p.artifact, p.artifact, "--pairs", p.judged, "--no-speed", "--blame"]),
        Case(lambda p: [p.checkpoint, "--precision", "int8", "--pairs", p.judged, "--no-speed", "--work", p.missing]),
        Case(lambda p: [p.artifact, "--precision", "int8"]),
        Case(lambda p: [p.checkpoint]),
    ],
    ("parity", "record"): [Case(lambda p: [p.checkpoint, "--cases", "tiny", "-o", p.missing])],
    ("parity", "check"): [
        Case(lambda p: [p.artifact, p.golden]),
        Case(lambda p: [p.artifact, p.golden, "--json"], IN_JSON),
        Case(lambda p: [p.artifact, p.golden, "--cases", NASTY]),
        Case(lambda p: [p.artifact, p.golden, "--layers"]),
        Case(lambda p: [p.artifact, p.missing]),
    ],
    ("parity", "published"): [Case(lambda p: [p.artifact, "--inputs", p.documents])],
    ("parity", "run"): [
        Case(lambda p: [p.checkpoint, p.artifact, "--cases", NASTY]),
        Case(lambda p: [p.checkpoint, p.artifact, "--adapter", p.missing]),
    ],
    ("checkpoint",): [Case(lambda p: ["tiny", p.missing]), Case(lambda p: [NASTY, p.missing])],
    ("adapter",): [Case(lambda p: [p.checkpoint, "plain", p.missing]), Case(lambda p: [p.missing, "plain", p.missing])],
    ("bench", "pairs"): [Case(lambda _: ["--precision", NASTY]), Case(lambda _: ["--peer", NASTY])],
    ("bench", "growth"): [Case(lambda p: [p.missing]), Case(lambda p: [p.artifact, "--plot", p.missing / "plot.svg"])],
    ("bench", "memory"): [
        Case(lambda p: [p.artifact, "--max-tokens", "64", "--max-visual-tokens", "64"]),
        Case(lambda p: [p.artifact, "--max-tokens", "64", "--max-visual-tokens", "64", "--json"], IN_JSON),
    ],
    ("bench", "ranking"): [Case(lambda p: [p.missing])],
    ("bench", "reuse"): [
        Case(lambda p: [p.artifact, "--only", "indexing", "--documents", "1", "--repeats", "1"]),
        Case(lambda p: [p.artifact, "--only", NASTY]),
    ],
    ("bench", "serve"): [Case(lambda p: [p.missing]), Case(lambda p: [p.artifact, "--option", NASTY])],
    ("bench", "overhead"): [Case(lambda p: [p.missing])],
    ("bench", "soak"): [Case(lambda p: [p.missing])],
    ("bench", "kill"): [Case(lambda p: [p.missing])],
    ("bench", "cluster"): [Case(lambda p: [p.missing])],
    ("bundle",): [
        Case(lambda p: [p.missing, "-o", p.folder / "out"]),
        Case(lambda p: [p.artifact, "-o", p.folder / "out", "--extra", NASTY], SEEN.lower()),
    ],
    ("serve",): [
        Case(lambda p: [p.missing]),
        Case(lambda p: [p.artifact, "--print-config"], ""),
        Case(lambda p: [p.artifact, "--config", p.missing]),
        Case(lambda p: [p.artifact, "--host", NASTY]),
        Case(lambda p: [p.artifact, "--host", NASTY, "--without-keys"]),
        Case(lambda p: [p.artifact, "--api-key-file", p.missing]),
        Case(lambda p: [p.artifact, "--index", p.missing / "x", "--uds", p.missing / "y"]),
    ],
    ("figures",): [Case(lambda _: ["--only", NASTY])],
    ("bench", "store"): [Case(lambda _: ["--max-records", NASTY])],
}


@pytest.fixture(scope="module")
def shared(tiny: Path, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """What no case changes."""
    from m0kit_parity.proof.cases import builtin_cases
    from m0kit_parity.proof.golden import record
    from m0kit_parity.reference import Reference
    from m0kit_parity.samples.adapters import write_adapter

    root = tmp_path_factory.mktemp("hostile")
    artifact, checkpoint, adapter, golden = (root / what / NAME for what in ("artifact", "base", "adapter", "golden"))
    shutil.copytree(tiny_artifact, artifact)
    manifest = read_manifest(artifact)
    provenance = {**manifest.provenance, "licence": TEXT[1:-1], "base": TEXT[1:-1]}
    rules = [{**rule, "match": rule["match"]} for rule in manifest.recipe["weights"]]
    recipe = {**manifest.recipe, "weights": [{**rules[0], "match": NASTY}, *rules]}
    write_manifest(artifact, replace(manifest, provenance=provenance, recipe=recipe))
    shutil.copytree(tiny, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "license": TEXT[1:-1]}))
    (checkpoint / "README.md").unlink(missing_ok=True)
    write_adapter(adapter, tiny, "plain")
    reference = Reference.load(tiny)
    record(
        golden,
        builtin_cases(["tiny"], False),
        reference,
        model=reference.config,
        command=f"m0kit {NASTY}",
        provenance={},
    )
    told = json.loads((golden / "manifest.json").read_text())
    told["cases"][0] |= {"name": NASTY, "why": NASTY}
    (golden / "manifest.json").write_text(json.dumps(told))

    documents = root / "documents" / NAME
    documents.mkdir(parents=True)
    (documents / f"{NAME[:50]}.txt").write_text(NASTY.replace("\x00", ""), "utf-8")
    (documents / f"{NAME[:50]}.png").write_bytes(b"none")
    lines = [{"id": f"{NASTY[:20]}{i}", "text": f"{NASTY} {i}"} for i in range(3)]
    lines += [{"id": NASTY, "text": "its id has two lines"}, {NASTY: 1}]
    (documents / f"{NAME[:50]}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = documents.parent / f"{NAME[:50]}.jsonl"
    good = {"id": NASTY, "query": NASTY, "document": NASTY}
    bad = [{"query": NASTY, "document": {NASTY: 1}}, {"query": "q", "document": {"image": NASTY}}]
    pairs.write_text("\n".join(map(json.dumps, [good, *bad])))
    judged = documents.parent / f"judged {NAME[:50]}.jsonl"
    group = {"query": NASTY, "documents": [NASTY, "d"], "relevance": [1, 0]}
    judged.write_text("\n".join(map(json.dumps, [group, {**group, NASTY: 1}, {**group, "relevance": [NASTY, 0]}])))
    library = root / "library" / NAME
    lines_file = next(documents.glob("*.jsonl"))
    ran(["index", "add", tiny_artifact, library, lines_file], False)
    return Place(root, artifact, checkpoint, adapter, golden, library, documents, pairs, judged)


@pytest.fixture
def place(shared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("M0KIT_DEBUG", raising=False)
    library = tmp_path / "library" / NAME
    shutil.copytree(shared.library, library)
    return replace(shared, folder=tmp_path, library=library)


def damaged(place: Place) -> Path:
    """The index with every state changed."""
    for segment in (place.library / "segments").iterdir():
        segment.write_bytes(bytes(byte ^ 1 for byte in segment.read_bytes()))
    return place.library


def recipe(place: Place) -> Path:
    file = place.folder / NAME[:60]
    rules = f'[[weights]]\nmatch = "*"\nscheme = {json.dumps(NASTY)}\n'
    file.write_text(f"precision = {json.dumps(NASTY)}\n{rules}")
    return file


def foreign_tensor(place: Place) -> Path:
    """A checkpoint with a tensor that no model has."""
    from safetensors.numpy import load_file, save_file

    folder = place.folder / "other"
    shutil.copytree(place.checkpoint, folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        pytest.fail(f"the tiny checkpoint has {sorted(file.name for file in folder.iterdir())}")
    tensors = load_file(weights)
    tensors[NASTY] = next(iter(tensors.values()))
    save_file(tensors, weights)
    return folder


def foreign_adapter(place: Place) -> Path:
    folder = place.folder / "adapter" / NAME
    shutil.copytree(place.adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": [NASTY]}))
    return folder


class _Stdin(io.BytesIO):
    name = "<stdin>"


def ran(arguments: Sequence[object], as_terminal: bool, stdin: bytes = b"") -> str:
    """All that a command prints to stdout and stderr: to pipes, or to a terminal."""
    if as_terminal:
        reader, writer = os.openpty()
    else:
        reader, writer = os.pipe()
    found = io.BytesIO()

    def drain() -> None:
        with contextlib.suppress(OSError):  # Linux ends a terminal with an error
            while data := os.read(reader, 1 << 16):
                found.write(data)

    thread = threading.Thread(target=drain)
    thread.start()
    sys.stdout.flush()
    sys.stderr.flush()
    kept, streams = [os.dup(n) for n in (1, 2)], (sys.stdin, sys.stdout, sys.stderr)
    try:
        for number in (1, 2):
            os.dup2(writer, number)
        os.close(writer)
        sys.stdin = io.TextIOWrapper(_Stdin(stdin))
        sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False, buffering=1) for n in (1, 2))  # noqa: SIM115
        words = [str(argument) for argument in arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            terminal.run(lambda: cli.main(words, prog_name="m0kit", standalone_mode=False, auto_envvar_prefix="M0KIT"))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
    thread.join(60)
    os.close(reader)
    return found.getvalue().decode()


def harmless(printed: str) -> None:
    """No line but ours, and in each of them nothing that acts. A bar may go back to its line's beginning."""
    text = printed.replace("\r\n", "\n")
    for line in re.split(r"[\n\r]|\x1b\[A", text):
        assert plain(line, None) == line
        assert not line.startswith("FORGED"), text
    assert "Traceback" not in text, text
    assert "unexpected" not in text.replace("unexpected tensor", ""), text


@pytest.mark.parametrize("as_terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("path", list(commands(cli)), ids=" ".join)
def test_no_command_prints_what_acts_on_a_terminal(path: tuple[str, ...], as_terminal: bool, place: Place) -> None:
    assert path in CASES, f"give {' '.join(path)} an input that is hostile to it"
    for number, case in enumerate(CASES[path]):
        folder = place.folder / str(number)
        folder.mkdir()
        library = folder / "library" / NAME
        shutil.copytree(place.library, library)
        printed = ran([*path, *case.arguments(replace(place, folder=folder, library=library))], as_terminal, case.stdin)
        harmless(printed)
        assert case.seen in printed, (number, printed)


def test_the_cases_are_of_commands_that_there_are() -> None:
    assert set(CASES) <= {*commands(cli)}


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("as_terminal", [False, True], ids=["pipe", "terminal"])
def test_what_the_system_says_of_itself_is_only_shown(
    as_terminal: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(detect(), cpu=NASTY, system=NASTY, gpus=(Gpu(NASTY, None),))
    monkeypatch.setattr(doctor, "detect", lambda _: machine)
    printed = ran(["doctor", *(["--json"] if form == "json" else [])], as_terminal)
    harmless(printed)
    assert (IN_JSON if form == "json" else SEEN) in printed


@pytest.mark.parametrize("as_terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize(("variable", "command"), [("M0KIT_SCORE_THREADS", "score"), ("M0KIT_RERANK_DEVICE", "rerank")])
def test_what_the_environment_holds_is_only_shown(
    variable: str, command: str, as_terminal: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, NASTY)
    words = ["--query", "q", place.documents] if command == "rerank" else [place.pairs]
    printed = ran([command, place.artifact, *words], as_terminal)
    harmless(printed)
    assert SEEN in printed


# --- the source ----------------------------------------------------------------------------------------------

PACKAGES = ("runtime/m0kit", "export/m0kit_export", "quant/m0kit_quant", "parity/m0kit_parity")
OWNER = "runtime/m0kit/terminal.py"
PRINTING = ("click.echo", "click.secho", "click.echo_via_pager", "click.confirm", "click.prompt", "traceback.print_")
STREAMS = ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__")
ALLOWED = {  # file → what it does with a stream, other than printing to it or asking whether it is a terminal
    "parity/m0kit_parity/child.py": "leads what is printed in its process to stderr",
    "runtime/m0kit/reading/pdf_child.py": "hands pages through a pipe to the process that started it",
    "runtime/m0kit/server/logs.py": "writes the server's log, each text in it made plain",
}


def test_only_one_file_prints() -> None:
    """So that no line goes by what makes it harmless."""
    using = set()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            tree = list(ast.walk(ast.parse(file.read_text("utf-8"))))
            asked = {node.value for node in tree if isinstance(node, ast.Attribute) and node.attr == "isatty"}
            for node in tree:
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                prints = called == "print" or called.startswith(PRINTING)
                assert not prints or name == OWNER, f"{name}:{node.lineno}: print with m0kit.terminal"
                if isinstance(node, ast.Attribute) and node not in asked and ast.unparse(node) in STREAMS:
                    using.add(name)
    assert using == {OWNER, *ALLOWED}, "print with m0kit.terminal, or say here what it is for"


def test_no_bar_has_a_name_that_is_not_ours_unless_it_is_made_plain() -> None:
    """`terminal.bar` makes it plain; a bar of tqdm's own has a constant."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    assert "postfix" not in node.func.attr, f"{name}:{node.lineno}"
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm":
                    for option in node.keywords:
                        if option.arg in ("desc", "postfix", "bar_format") and name != OWNER:
                            assert isinstance(option.value, ast.Constant), f"{name}:{node.lineno}"
