"""Who an artifact is from: a signature over its manifest, by OpenSSH. Owns its place, making and checking it.

    sign(Path("m0-fp32"), Path("~/.ssh/id_ed25519"))              # writes m0-fp32/manifest.json.sig
    signer(Path("m0-fp32"), manifest_bytes, Path("allowed_signers"))   # "alice@example.com", or SignatureError

The manifest holds the hash of every file, so a signature of it is one of all. Keys, agents, hardware tokens and the
file of trusted signers (ssh-keygen(1), ALLOWED SIGNERS) are those that an operator already has; `ssh-keygen` does the
rest.
"""

import base64
import binascii
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from m0kit.errors import DependencyError, OutputError, SignatureError
from m0kit.files import open_regular, read_regular, writing

SIGNATURE: Final = "manifest.json.sig"
NAMESPACE: Final = "m0kit-artifact"  # so that what was signed for another purpose is no signature of an artifact
REQUIRE: Final = "M0KIT_REQUIRE_SIGNATURE"  # environment: the file of trusted signers
_MOST_BYTES: Final = 64 << 10  # a signature by RSA of 16,384 bits, the largest, has 6 KB
_SECONDS: Final = 60  # a signature is checked in 5 ms
_ARMOUR: Final = re.compile(rb"-----BEGIN SSH SIGNATURE-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END SSH SIGNATURE-----\s*")
# What ssh-keygen says on stderr → why, for the sentence alone: whether it is good is told by the exit code.
_WHY: Final = {
    "key has expired": "its signer's key has expired",
    "key is not yet valid": "its signer's key is not valid yet",
    "not permitted for use in signature namespace": f"its signer may not sign for {NAMESPACE}",
    "incorrect signature": "it is not of this manifest, which was changed since, or is of another artifact",
    "No principal matched": "its signer is not among those that are trusted",
    "revoked": "its signer's key was revoked",
}


def required(signers: str | os.PathLike[str] | None = None) -> Path | None:
    """The file of trusted signers, where a signature is required: the one given, or the environment's."""
    named = os.fspath(signers) if signers is not None else os.environ.get(REQUIRE)
    return Path(named) if named else None


def sign(folder: Path, key: Path, tell: Callable[[str], object]) -> None:
    """Sign the manifest in `folder` with a private key, or a public one whose private key an agent holds.

    ssh-keygen asks for a passphrase on the terminal; each line that it says goes to `tell`: what was wrong, or that a
    token wants to be touched. The signature is written aside and renamed. Raises SignatureError, DependencyError,
    OutputError.
    """
    words = [_program(), "-Y", "sign", "-q", "-n", NAMESPACE, "-f", os.fspath(key)]
    with (
        open_regular(folder / "manifest.json") as manifest,
        subprocess.Popen(words, stdin=manifest, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            tell(f"ssh-keygen: {line.decode('utf-8', 'replace').rstrip()}")
        signature = process.stdout.read()  # less than a pipe holds, so it has not waited for that
    if process.returncode or not _ARMOUR.fullmatch(signature):
        raise SignatureError(
            f"{folder}: was not signed, ssh-keygen could not use the key {key}. Give a private key in OpenSSH's form, "
            "or a public one whose private key the agent holds."
        )
    place = folder / SIGNATURE
    if place.is_dir():
        raise OutputError(f"{place}: is a folder, and a signature goes there. Remove it.")
    with writing(place) as file:
        file.write(signature)


def signer(folder: Path, manifest: bytes, signers: Path) -> str:
    """Who of the trusted `signers` signed these bytes, by the signature in `folder`.

    Raises SignatureError for a signature that is missing, of something else or of somebody else, and for a file of
    signers that cannot be read; DependencyError without OpenSSH.
    """
    place = folder / SIGNATURE
    try:
        open_regular(signers).close()
    except OSError as error:
        raise SignatureError(
            f"{signers}: the trusted signers cannot be read: {error.strerror}. Give a file of lines "
            '"name ssh-ed25519 AAAA…" (ssh-keygen(1), ALLOWED SIGNERS).'
        ) from error
    try:
        raw = read_regular(place, _MOST_BYTES)
    except FileNotFoundError:
        raise SignatureError(
            f"{folder}: is not signed (there is no {SIGNATURE}), and a signature is required. Get it from where the "
            "artifact came from, or sign it with `m0kit sign`."
        ) from None
    except OSError as error:
        raise SignatureError(f"{place}: cannot be read: {error.strerror}.") from error
    if (namespace := _namespace(raw)) != NAMESPACE:
        what = (
            "no signature of OpenSSH"
            if namespace is None
            else f"a signature for {namespace!r:.80}, not for {NAMESPACE}"
        )
        raise SignatureError(f"{place}: is {what}. Sign the artifact with `m0kit sign`.")
    program = _program()
    # Of the bytes that were looked at, whatever becomes of the file meanwhile.
    with tempfile.TemporaryDirectory(prefix="m0kit-signature-") as scratch:
        copy = Path(scratch, SIGNATURE)
        copy.write_bytes(raw)
        common = ["-s", os.fspath(copy), "-f", os.path.abspath(signers)]
        names = _run([program, "-Y", "find-principals", *common], b"", place).decode("utf-8", "replace")
        name = names.partition("\n")[0].strip()  # of one who has several
        _run([program, "-Y", "verify", "-I", name, "-n", NAMESPACE, *common], manifest, place)
    return name


def _run(command: list[str], data: bytes, place: Path) -> bytes:
    """What ssh-keygen prints; the command ends with the file of signers."""
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SignatureError(
            f"{place}: cannot be checked, ssh-keygen did not answer ({type(error).__name__})."
        ) from error
    if done.returncode:
        raise _refused(place, command[-1], done.stderr.decode("utf-8", "replace"))
    return done.stdout


def _refused(place: Path, signers: str, said: str) -> SignatureError:
    why = next((why for part, why in _WHY.items() if part in said), "ssh-keygen does not take it for good")
    return SignatureError(f"{place}: {why}. Trusted are those in {signers}; nothing was loaded.")


def _namespace(raw: bytes) -> str | None:
    """What a signature says it is for; None for what is no signature (PROTOCOL.sshsig)."""
    match = _ARMOUR.fullmatch(raw)
    try:
        blob = base64.b64decode(match[1] if match else b"", validate=False)
    except binascii.Error:
        return None
    if blob[:6] != b"SSHSIG":
        return None
    key_end = 14 + int.from_bytes(blob[10:14], "big")  # behind magic and version comes the public key
    start = key_end + 4
    length = int.from_bytes(blob[key_end:start], "big")
    return blob[start : start + length].decode("utf-8", "replace") if start + length <= len(blob) else None


def _program() -> str:
    found = shutil.which("ssh-keygen")
    if found is None:
        raise DependencyError(
            "signatures need the program ssh-keygen, which is not here. Install OpenSSH (openssh-client)."
        )
    return found
