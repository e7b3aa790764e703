"""An artifact is opened for those who signed it and are trusted, and refused in one sentence otherwise."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.hub import cached
from tests.sealed import edit_manifest

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest
from m0kit.artifact.signature import NAMESPACE, REQUIRE, SIGNATURE, required, sign, signer
from m0kit.errors import ArtifactError, DependencyError, OutputError, SignatureError

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="this machine has no ssh-keygen")
NAME = "alice@example.com"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of two people, and a file of the signers that are trusted: the first."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "bob"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(command, check=True)
    (folder / "signers").write_text(trusted(folder))
    return folder


def trusted(keys: Path, options: str = "", name: str = NAME) -> str:
    """A line of the file of signers with alice's key."""
    return " ".join([name, *([options] if options else []), *(keys / "alice.pub").read_text().split()[:2]]) + "\n"


@pytest.fixture
def folder(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "m0-fp32"))


@pytest.fixture
def signed(folder: Path, keys: Path) -> Path:
    sign(folder, keys / "alice", print)
    return folder


def run(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "m0kit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_who_signed_is_named_and_an_unsigned_one_opens_where_nothing_is_required(signed: Path, keys: Path) -> None:
    manifest = (signed / "manifest.json").read_bytes()
    assert signer(signed, manifest, keys / "signers") == NAME
    assert read_manifest(signed, require_signature=keys / "signers") == read_manifest(signed)
    (signed / SIGNATURE).unlink()
    read_manifest(signed)


def test_ssh_keygen_itself_takes_it_for_good(signed: Path, keys: Path) -> None:
    command = ["ssh-keygen", "-Y", "verify", "-f", str(keys / "signers"), "-I", NAME, "-n", NAMESPACE]
    with open(signed / "manifest.json", "rb") as file:
        subprocess.run([*command, "-s", str(signed / SIGNATURE)], stdin=file, check=True, capture_output=True)


def test_one_of_several_names_and_comments_among_the_signers_are_fine(signed: Path, keys: Path, tmp_path: Path) -> None:
    lines = "# the team\n" + trusted(keys, name="bob@example.com,carol@example.com") + trusted(keys, 'namespaces="git"')
    (tmp_path / "signers").write_text(lines)
    manifest = (signed / "manifest.json").read_bytes()
    assert signer(signed, manifest, tmp_path / "signers") == "bob@example.com"


def _sign_for(namespace: str) -> Callable[[Path, Path], object]:
    def signing(folder: Path, keys: Path) -> None:
        command = ["ssh-keygen", "-Y", "sign", "-q", "-n", namespace, "-f", str(keys / "alice")]
        with open(folder / "manifest.json", "rb") as file:
            done = subprocess.run(command, stdin=file, check=True, capture_output=True)
        (folder / SIGNATURE).write_bytes(done.stdout)

    return signing


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda a, _: (a / SIGNATURE).unlink(), r"is not signed \(there is no manifest\.json\.sig\)"),
    "of somebody else": (
        lambda a, keys: sign(a, keys / "bob", print),
        "its signer is not among those that are trusted",
    ),
    "for another purpose": (_sign_for("file"), "is a signature for 'file', not for m0kit-artifact"),
    "changed manifest": (
        lambda a, _: edit_manifest(a, lambda raw: raw["model"]["prompt"].update(logit_bias=0.5)),
        "it is not of this manifest, which was changed since, or is of another artifact",
    ),
    "laid out anew": (lambda a, _: edit_manifest(a, lambda _: None), "it is not of this manifest"),
    "no signature": (lambda a, _: (a / SIGNATURE).write_text("yes"), "is no signature of OpenSSH"),
    "empty": (lambda a, _: (a / SIGNATURE).write_text(""), "is no signature of OpenSSH"),
    "blanks": (
        lambda a, _: (a / SIGNATURE).write_text("-----BEGIN SSH SIGNATURE-----\n" + "\n" * 65_000 + "-"),
        "is no signature of OpenSSH",
    ),
    "half": (lambda a, _: os.truncate(a / SIGNATURE, 150), "is no signature of OpenSSH"),
    "large": (lambda a, _: os.truncate(a / SIGNATURE, 1 << 30), "cannot be read: has more than the 65536 bytes"),
    "a device": (lambda a, _: ((a / SIGNATURE).unlink(), (a / SIGNATURE).symlink_to("/dev/zero")), "a device"),
    "a folder": (lambda a, _: ((a / SIGNATURE).unlink(), (a / SIGNATURE).mkdir()), "is a folder, and no file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_signed_by_a_trusted_one_is_refused_in_a_sentence(signed: Path, keys: Path, case: str) -> None:
    change, said = REFUSED[case]
    change(signed, keys)
    with pytest.raises(SignatureError, match=rf"^{signed}.*{said}.*\.$") as caught:
        read_manifest(signed, require_signature=keys / "signers")
    assert isinstance(caught.value, ArtifactError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('valid-before="20200101"', "its signer's key has expired"),
        ('valid-after="20990101"', "its signer's key is not valid yet"),
        ('namespaces="git,file"', "its signer may not sign for m0kit-artifact"),
        (None, "its signer is not among those that are trusted"),
    ],
)
def test_a_key_that_is_not_trusted_for_this_now_is_told_why(
    signed: Path, keys: Path, tmp_path: Path, line: str | None, said: str
) -> None:
    (tmp_path / "signers").write_text("" if line is None else trusted(keys, line))
    with pytest.raises(
        SignatureError, match=rf"^{signed / SIGNATURE}: {said}\. Trusted are those in .*signers; nothing"
    ):
        read_manifest(signed, require_signature=tmp_path / "signers")


def test_signers_that_cannot_be_read_are_named(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SignatureError, match=rf"^{tmp_path / 'nobody'}: the trusted signers cannot be read: No such file"
    ):
        read_manifest(signed, require_signature=tmp_path / "nobody")
    with pytest.raises(SignatureError, match="is a folder, and no file"):
        read_manifest(signed, require_signature=tmp_path)


def test_without_openssh_nothing_is_opened_and_it_is_said(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DependencyError, match=r"ssh-keygen, which is not here\. Install OpenSSH"):
        read_manifest(signed, require_signature=keys / "signers")
    with pytest.raises(DependencyError, match="ssh-keygen"):
        sign(signed, keys / "alice", print)


def test_the_environment_requires_it_of_every_reader(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE, "")
    assert required() is None
    monkeypatch.setenv(REQUIRE, str(keys / "signers"))
    assert required() == keys / "signers"
    assert read_manifest(signed)
    (signed / SIGNATURE).unlink()
    with pytest.raises(SignatureError, match="is not signed"):
        read_manifest(signed)
    with pytest.raises(SignatureError, match="is not signed"):
        Reranker.load(signed, threads=1)
    assert Reranker.load(signed, threads=1, require_signature=False)


def test_a_loaded_one_asks_again_where_it_is_sent_to(signed: Path, keys: Path) -> None:
    import pickle

    packed = pickle.dumps(Reranker.load(signed, threads=1, require_signature=keys / "signers"))
    assert pickle.loads(packed).score([("q", "d")]).shape == (1,)
    sign(signed, keys / "bob", print)
    with pytest.raises(SignatureError, match="not among those"):
        pickle.loads(packed)


def test_a_changed_file_is_found_behind_a_good_signature(signed: Path, keys: Path) -> None:
    with open(signed / "head.onnx.data", "r+b") as file:
        file.write(b"X")
    with pytest.raises(ArtifactError, match=r"head\.onnx\.data: its content has changed"):
        Reranker.load(signed, require_signature=keys / "signers")


def test_signing_again_replaces_the_signature_and_leaves_nothing_beside_it(signed: Path, keys: Path) -> None:
    before = {path.name for path in signed.iterdir()}
    sign(signed, keys / "bob", print)
    assert {path.name for path in signed.iterdir()} == before
    assert stat.S_IMODE((signed / SIGNATURE).stat().st_mode) == 0o644
    with pytest.raises(SignatureError, match="not among those"):
        read_manifest(signed, require_signature=keys / "signers")


def test_a_link_in_the_signatures_place_is_replaced_and_what_it_leads_to_stays(
    folder: Path, keys: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("mine")
    (folder / SIGNATURE).symlink_to(tmp_path / "precious")
    sign(folder, keys / "alice", print)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (folder / SIGNATURE).is_symlink()


def test_a_key_that_is_none_and_a_place_that_is_taken_are_said(folder: Path, keys: Path) -> None:
    for key in (keys / "nobody", keys / "signers"):
        with pytest.raises(SignatureError, match=rf"was not signed, ssh-keygen could not use the key {key}"):
            sign(folder, key, print)
    (folder / SIGNATURE).mkdir()
    with pytest.raises(OutputError, match="is a folder, and a signature goes there"):
        sign(folder, keys / "alice", print)
    assert {path.name for path in folder.iterdir()} >= {"manifest.json", SIGNATURE}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_commands_sign_and_require(folder: Path, keys: Path) -> None:
    option = ("--require-signature", keys / "signers")
    for command in (("inspect", folder), ("doctor", folder), ("rerank", folder, "--query", "q", __file__)):
        refused = run(*option, *command)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"error: {folder}: is not signed")
    done = run("sign", folder, "--key", keys / "alice")
    assert (done.returncode, done.stdout) == (0, "")
    assert str(folder / SIGNATURE) in done.stderr
    shown = run("inspect", folder, M0KIT_REQUIRE_SIGNATURE=str(keys / "signers"))
    assert shown.returncode == 0
    assert f"signed by    {NAME}" in shown.stdout.splitlines()


def test_only_what_is_whole_is_signed(folder: Path, keys: Path) -> None:
    with open(folder / "head.onnx.data", "r+b") as file:
        file.write(b"X")
    refused = run("sign", folder, "--key", keys / "alice")
    assert refused.returncode == 1
    assert "its content has changed" in refused.stderr
    assert not (folder / SIGNATURE).exists()


def test_in_a_hub_cache_the_signature_is_a_link_like_the_other_files(signed: Path, keys: Path, tmp_path: Path) -> None:
    snapshot = cached(signed, tmp_path / "home")
    assert (snapshot / SIGNATURE).is_symlink()
    assert read_manifest(snapshot, require_signature=keys / "signers")
    raw = json.loads((snapshot / "manifest.json").read_text("utf-8"))
    assert SIGNATURE not in raw["files"]
