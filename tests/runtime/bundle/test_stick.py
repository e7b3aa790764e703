"""One folder for a machine without a network: what lies in it, that it is whole, and what is told when it cannot be."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.runtime.bundle.making import Index, make_wheel

from m0kit.bundle import stick
from m0kit.bundle.stick import SUMS, Plan, bundle
from m0kit.bundle.wheels import Target
from m0kit.cli.commands import cli
from m0kit.errors import ArtifactDamagedError, M0kitError, OutputError
from m0kit.reranker import Reranker

EXTRAS = ("Requires-Dist: base>=1", "Provides-Extra: cpu", "Provides-Extra: serve", "Provides-Extra: pdf")
INDEX = {"m0kit": [("base", "1.5", ("Requires-Python: >=3.8",))]}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(Target("3.11", "linux-x86_64"), wheel=make_wheel(tmp_path / "built", "m0kit", "0.1", *EXTRAS))


@pytest.fixture
def artifact(committed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(committed / "int8", tmp_path / "m0-int8"))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_wheels_artifact_script_list_and_sums_of_all(artifact: Path, plan: Plan, tmp_path: Path) -> None:
    done = bundle(artifact, tmp_path / "stick", plan, download=Index(INDEX))
    found = files(tmp_path / "stick")
    own = {"install.sh", "requirements.txt", "m0kit.cdx.json", SUMS}
    wheels = {"wheels/m0kit-0.1-py3-none-any.whl", "wheels/base-1.5-py3-none-any.whl"}
    assert found == own | wheels | {f"models/m0-int8/{name}" for name in files(artifact)}
    assert done.wheels == 2
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "stick" / SUMS).read_text().splitlines())
    assert sums.keys() == found - {SUMS}
    for name, digest in sums.items():
        assert hashlib.sha256((tmp_path / "stick" / name).read_bytes()).hexdigest() == digest


def test_requirements_and_the_list_have_the_wheels_hashes(artifact: Path, plan: Plan, tmp_path: Path) -> None:
    bundle(artifact, tmp_path / "stick", plan, name="m0", download=Index(INDEX))
    lines = (tmp_path / "stick" / "requirements.txt").read_text().splitlines()
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / "stick/wheels").iterdir())]
    assert lines == [
        f"base==1.5 --hash=sha256:{hashes[0]}",
        f"m0kit[cpu,serve,pdf]==0.1 --hash=sha256:{hashes[1]}",
    ]
    listed = json.loads((tmp_path / "stick" / "m0kit.cdx.json").read_text("utf-8"))
    assert listed["metadata"]["component"]["hashes"][0]["content"] == hashes[1]
    model, base = listed["components"]
    assert (model["type"], model["name"], base["hashes"][0]["content"]) == ("machine-learning-model", "m0", hashes[0])


def test_the_artifact_in_it_is_the_same_and_can_be_opened(artifact: Path, plan: Plan, tmp_path: Path) -> None:
    bundle(artifact, tmp_path / "stick", plan, download=Index(INDEX))
    pair = [("slm markdown", "some text")]
    with Reranker.load(artifact) as one, Reranker.load(tmp_path / "stick/models/m0-int8") as other:
        assert one.score(pair) == other.score(pair)


def test_links_of_a_hubs_cache_become_files(artifact: Path, plan: Plan, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    shutil.copytree(artifact, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    bundle(snapshot, tmp_path / "stick", plan, name="b", download=Index(INDEX))
    assert not [path for path in (tmp_path / "stick").rglob("*") if path.is_symlink()]
    assert files(tmp_path / "stick" / "models" / "b") == files(artifact)


def test_where_there_can_be_no_hard_links_files_are_copied(
    artifact: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(stick.os, "link", refuse)
    bundle(artifact, tmp_path / "stick", plan, download=Index(INDEX))
    copied = tmp_path / "stick" / "models" / "m0-int8" / "decoder.onnx"
    assert copied.stat().st_nlink == 1
    assert copied.read_bytes() == (artifact / "decoder.onnx").read_bytes()


def test_a_copy_that_went_wrong_is_no_bundle(
    artifact: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(source: Path, target: Path) -> None:
        data = bytearray(source.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)

    monkeypatch.setattr(stick.os, "link", damage)
    with pytest.raises(ArtifactDamagedError, match=r"models/m0-int8/.*was copied wrongly"):
        bundle(artifact, tmp_path / "stick", plan, download=Index(INDEX))
    assert not (tmp_path / "stick").exists()


def test_a_damaged_artifact_is_not_carried_anywhere(artifact: Path, plan: Plan, tmp_path: Path) -> None:
    data = bytearray((artifact / "decoder.onnx.data").read_bytes())
    data[7] ^= 1
    (artifact / "decoder.onnx.data").write_bytes(data)
    index = Index(INDEX)
    with pytest.raises(ArtifactDamagedError):
        bundle(artifact, tmp_path / "stick", plan, download=index)
    assert not index.asked
    assert not (tmp_path / "stick").exists()


def test_without_the_wheels_nothing_is_left(artifact: Path, plan: Plan, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(M0kitError, match="base>=1"):
        bundle(artifact, tmp_path / "stick", plan, download=Index({}))
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_holds_something_is_left_alone(artifact: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / "mine").write_text("mine")
    index = Index(INDEX)
    with pytest.raises(OutputError, match="exists and is not empty"):
        bundle(artifact, tmp_path / "stick", plan, download=index)
    assert files(tmp_path / "stick") == {"mine"}
    assert not index.asked


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_the_script_installs_nothing_from_a_folder_that_was_changed(artifact: Path, plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "a stick"
    bundle(artifact, folder, plan, name="it's m0", download=Index(INDEX))
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\necho asked >> "$ASKED"\n[ "$2" = venv ] || exit 0\nmkdir -p "$3/bin" && cp "$0" "$3/bin/python"\n'
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "ASKED": str(tmp_path / "asked")}

    def install() -> "subprocess.CompletedProcess[str]":
        words = ["sh", str(folder / "install.sh"), str(tmp_path / "venv")]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = install()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text() == "asked\nasked\n"  # for the environment, and for pip in it
    assert f"{folder}/models/it's m0" in done.stdout
    (tmp_path / "asked").unlink()
    with (folder / "requirements.txt").open("a") as file:
        file.write("more==1\n")
    done = install()
    assert done.returncode != 0
    assert "requirements.txt" in done.stdout + done.stderr
    assert not (tmp_path / "asked").exists()


def test_for_windows_there_is_a_script_of_its_own(artifact: Path, plan: Plan, tmp_path: Path) -> None:
    bundle(
        artifact, tmp_path / "s", Plan(Target("3.12", "windows-x86_64"), wheel=plan.wheel), download=Index(INDEX)
    )  # fmt: skip
    assert "install.sh" not in files(tmp_path / "s")
    script = (tmp_path / "s" / "install.cmd").read_bytes()
    assert b"py -3.12 -m venv" in script
    assert script.count(b"\n") == script.count(b"\r\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--python", "3.10"], "3.11 or newer"),
        (["--python", "3.11.9"], "without a patch"),
        (["--extra", "cpu,gpu"], "give one of them"),
    ],
)
def test_options_that_cannot_be_meant_are_wrong_usage(
    artifact: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    done = CliRunner().invoke(cli, ["bundle", str(artifact), "-o", str(tmp_path / "s"), *words])
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "s").exists()
