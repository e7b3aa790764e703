"""Which wheels another machine needs, with a registry of our own in pip's place."""

import json
from pathlib import Path

import pytest
from tests.runtime.bundle.making import Index, make_wheel

from m0kit.bundle import wheels
from m0kit.bundle.wheels import PLATFORMS, Target, Wheel, gather, own_wheel, read_lock
from m0kit.errors import M0kitError

LINUX = Target("3.11", "linux-x86_64")
HASH = "--hash=sha256:" + "ab" * 32
OURS = (
    "Requires-Dist: base>=1",
    'Requires-Dist: engine[fast]>=2; extra == "cpu"',
    'Requires-Dist: pages; extra == "pdf"',
    "Provides-Extra: cpu",
    "Provides-Extra: pdf",
)
ENGINE = (
    'Requires-Dist: backport; python_version < "3.12"',
    'Requires-Dist: colour; sys_platform == "win32"',
    'Requires-Dist: wings>=3; extra == "fast"',
    "Provides-Extra: fast",
)
RESOLVED = [("base", "1.5", ()), ("engine", "2.0", ENGINE), ("wings", "3.1", ())]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return make_wheel(tmp_path / "built", "m0kit", "0.1", *OURS)


def gathered(own: Path, folder: Path, index: Index, target: Target = LINUX, lock: Path | None = None) -> list[str]:
    folder.mkdir()
    wheels = gather(own, ["cpu"], target, folder, index, lock)
    assert {wheel.path for wheel in wheels} == set(folder.iterdir())
    return [wheel.name for wheel in wheels]


def test_what_extras_bring_is_there_with_its_own_extras(own: Path, tmp_path: Path) -> None:
    index = Index({"m0kit": [*RESOLVED, ("backport", "1", ())]})
    assert gathered(own, tmp_path / "w", index) == ["backport", "base", "engine", "m0kit", "wings"]
    assert index.asked == [[f"m0kit[cpu] @ {(tmp_path / 'w' / own.name).as_uri()}"]]


def test_conditions_are_read_as_of_the_target_whatever_pip_thought(own: Path, tmp_path: Path) -> None:
    """pip reads them as of the Python that it runs in, so it brings too much, or too little."""
    index = Index({"m0kit": [*RESOLVED, ("backport", "1", ())], "colour": [("colour", "1", ())]})
    names = gathered(own, tmp_path / "w", index, Target("3.13", "windows-x86_64"))
    assert names == ["base", "colour", "engine", "m0kit", "wings"]
    assert index.asked[1:] == [["colour"]]


def test_what_cannot_be_had_is_named(own: Path, tmp_path: Path) -> None:
    index = Index({"m0kit": RESOLVED})
    with pytest.raises(M0kitError, match=r"^backport: cannot be had"):
        gathered(own, tmp_path / "w", index)
    assert len(index.asked) == 2


def test_a_version_that_does_not_fit_is_not_taken(own: Path, tmp_path: Path) -> None:
    index = Index({"m0kit": [("base", "0.9", ()), *RESOLVED[1:], ("backport", "1", ())]})
    with pytest.raises(M0kitError, match=r"^base>=1: cannot be had"):
        gathered(own, tmp_path / "w", index)


def test_two_versions_of_one_package_are_an_error(own: Path, tmp_path: Path) -> None:
    index = Index({"m0kit": [*RESOLVED, ("base", "1.6", ())]})
    with pytest.raises(M0kitError, match=r"base-1.5.* and base-1.6"):
        gathered(own, tmp_path / "w", index)


def test_an_extra_that_there_is_not_is_named_with_those_that_there_are(own: Path, tmp_path: Path) -> None:
    with pytest.raises(M0kitError, match=r"no extra 'cuda'\. There are: cpu, pdf"):
        gather(own, ["cuda"], LINUX, tmp_path, Index({}))


def test_with_a_lock_all_that_pip_is_given_has_a_hash(own: Path, tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"base==1.5 {HASH}\n")
    index = Index({"m0kit": [*RESOLVED, ("backport", "1", ())]})
    gathered(own, tmp_path / "w", index, lock=lock)
    assert index.pins == [[f"base==1.5 {HASH}"]]
    assert index.asked[0][0].endswith(f"--hash=sha256:{Wheel(own).sha256}")


def test_of_a_lock_a_target_gets_its_own_lines(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(
        f"# by hand\nold==1 ; python_full_version < '3.12' \\\n    {HASH} \\\n    {HASH}\n"
        f"new==2 ; python_full_version >= '3.12' \\\n    {HASH}\n\nboth==3 {HASH}\n"
    )
    assert read_lock(lock, LINUX) == [f"old==1 {HASH} {HASH}", f"both==3 {HASH}"]
    assert read_lock(lock, Target("3.12", "macos-arm64")) == [f"new==2 {HASH}", f"both==3 {HASH}"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("base==1\n", "base has no hashes"), ("-r other.txt\n", "is no pin"), ("base==1 --hash=md5:00\n", "no hashes")],
)
def test_a_lock_of_another_form_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "lock.txt").write_text(text)
    with pytest.raises(M0kitError, match=said):
        read_lock(tmp_path / "lock.txt", LINUX)


@pytest.mark.parametrize("name", ["m0kit-0.1.txt", "m0kit-0.1-py3-none-any.whl"])
def test_what_is_no_wheel_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x05\x06 not a zip")
    with pytest.raises(M0kitError, match="is no wheel that can be read"):
        Wheel(tmp_path / name)


def test_ones_own_wheel_may_be_given_and_another_packages_may_not(own: Path, tmp_path: Path) -> None:
    assert own_wheel(tmp_path, own) == own
    with pytest.raises(M0kitError, match="is not m0kit's wheel"):
        own_wheel(tmp_path, make_wheel(tmp_path, "other"))


def test_a_wheel_that_was_installed_from_a_file_is_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_wheel(tmp_path / "of mine", "m0kit")

    class Installed:
        version = "1.0"

        def read_text(self, name: str) -> str:
            assert name == "direct_url.json"
            return json.dumps({"url": source.as_uri(), "archive_info": {}})

    monkeypatch.setattr(wheels, "distribution", lambda _: Installed())
    assert own_wheel(tmp_path) == source


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_has_tags_and_conditions(platform: str) -> None:
    target = Target("3.12", platform)
    assert target.tags
    assert all(platform.split("-")[-1] in tag or "amd64" in tag for tag in target.tags)
    assert target.markers["python_version"] == "3.12"
