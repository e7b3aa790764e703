"""The wheels that another machine needs. Owns what that machine is, which belong there, and having pip fetch them.

    target = Target("3.11", "linux-x86_64")
    wheels = gather(own_wheel, ["cpu", "serve"], target, folder, pip_download)

pip resolves, but reads the conditions of requirements (`python_version < "3.12"`) as of the Python that it runs in. So
they are read here again, as of the target: what is missing then is fetched too, what is not needed goes.
"""

import email.parser
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from m0kit.errors import DependencyError, M0kitError
from m0kit.files import read_regular, sha256_of

_GLIBC: Final = 28  # 2.28: that of Debian 10 and RHEL 8; wheels of NVIDIA's libraries need 2.27
_METADATA_BYTES: Final = 1 << 20
_LOCK_BYTES: Final = 1 << 20
_HASH: Final = re.compile("sha256:[0-9a-f]{64}")
_MOST_ROUNDS: Final = 10
_POSIX: Final = {"os_name": "posix"}
_LINUX: Final = {**_POSIX, "sys_platform": "linux", "platform_system": "Linux"}
_SYSTEMS: Final[dict[str, dict[str, str]]] = {
    "linux-x86_64": {**_LINUX, "platform_machine": "x86_64"},
    "linux-aarch64": {**_LINUX, "platform_machine": "aarch64"},
    "macos-arm64": {**_POSIX, "sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    "windows-x86_64": {
        "os_name": "nt", "sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64",
    },
}  # fmt: skip
PLATFORMS: Final = tuple(_SYSTEMS)


@dataclass(frozen=True, slots=True)
class Target:
    """The machine where wheels are installed."""

    python: str  # "3.11"
    platform: str  # of PLATFORMS

    @property
    def markers(self) -> dict[str, str]:
        """What conditions of requirements see there, as PEP 508 names it."""
        return {
            **_SYSTEMS[self.platform],
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "python_version": self.python,
            # Conditions on a patch release are rare; "3.11.9" may still be asked for where it matters.
            "python_full_version": f"{self.python}.99",
            "implementation_version": f"{self.python}.99",
        }

    @property
    def tags(self) -> tuple[str, ...]:
        """Platforms of the wheels that run there, as pip wants them."""
        system, _, machine = self.platform.partition("-")
        if system == "macos":
            return (f"macosx_14_0_{machine}",)  # pip adds the older ones
        if system == "windows":
            return ("win_amd64",)
        old = ("manylinux2014", "manylinux2010", "manylinux1") if machine == "x86_64" else ("manylinux2014",)
        known = [*(f"manylinux_2_{minor}" for minor in range(_GLIBC, 4, -1)), *old, "linux"]
        return tuple(f"{name}_{machine}" for name in known)

    def applies(self, marker: Marker | None, extras: Iterable[str] = ()) -> bool:
        """Whether a condition holds there, for one of the extras that are asked for."""
        if marker is None:
            return True
        return any(marker.evaluate({**self.markers, "extra": extra}) for extra in (*extras, ""))


class Wheel:
    """A file NAME-VERSION-….whl. Raises M0kitError where it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
            with zipfile.ZipFile(path) as file:
                (place,) = (n for n in file.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1)
                with file.open(place) as stream:
                    metadata = stream.read(_METADATA_BYTES)
            self.name, self.version = name, str(version)
            self.metadata: Message = email.parser.BytesParser().parsebytes(metadata, headersonly=True)
            self.requires = [Requirement(line) for line in self.metadata.get_all("Requires-Dist", [])]
        except (InvalidWheelFilename, InvalidRequirement, ValueError, OSError, zipfile.BadZipFile) as error:
            raise M0kitError(f"{path}: is no wheel that can be read. Fetch or build it again.") from error

    @cached_property
    def sha256(self) -> str:
        """Of the file, as hex."""
        return sha256_of(self.path)

    @property
    def extras(self) -> list[str]:
        """That may be asked for."""
        return [canonicalize_name(name) for name in self.metadata.get_all("Provides-Extra", [])]


# Lines of a file of requirements, where they are installed, the folder for wheels, and lines of a lock.
Download = Callable[[Sequence[str], Target, Path, Sequence[str]], None]


def pip_download(wanted: Sequence[str], target: Target, folder: Path, lock: Sequence[str]) -> None:
    """Fetch wheels of the requirements and what those require. pip says itself what goes wrong. Raises M0kitError."""
    words = ["download", "--quiet", "--only-binary", ":all:", "--dest", str(folder), "--find-links", str(folder)]
    words += ["--implementation", "cp", "--python-version", target.python]
    words += [word for tag in target.tags for word in ("--platform", tag)]
    with tempfile.TemporaryDirectory(prefix="m0kit-") as scratch:
        for option, lines in (("requirement", wanted), ("constraint", lock)):
            file = Path(scratch) / f"{option}.txt"
            file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
            words += [f"--{option}", str(file)]
        _pip(words, f"the wheels for Python {target.python} on {target.platform}")


def read_lock(path: Path, target: Target) -> list[str]:
    """Lines `name==version --hash=sha256:…` of what a lock has for the target. Raises M0kitError for another form."""
    found = []
    try:
        text = read_regular(path, _LOCK_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise M0kitError(
            f"{path}: cannot be read as a text. Give a lock, such as deploy/requirements-cpu.txt."
        ) from error
    for line in text.replace("\\\n", " ").splitlines():
        pin, *hashes = line.partition("#")[0].split(" --hash=")
        if not pin.strip():
            continue
        try:
            requirement = Requirement(pin)
        except InvalidRequirement:
            raise M0kitError(
                f"{path}: {pin.strip()[:60]!r} is no pin. Expected name==version --hash=sha256:…."
            ) from None
        if not hashes or not all(_HASH.fullmatch(each.strip()) for each in hashes):
            raise M0kitError(f"{path}: {requirement.name} has no hashes. Expected name==version --hash=sha256:….")
        if target.applies(requirement.marker):
            told = " ".join(f"--hash={each.strip()}" for each in hashes)
            found.append(f"{requirement.name}{requirement.specifier} {told}")
    return found


def gather(
    own: Path, extras: Sequence[str], target: Target, folder: Path, download: Download, lock: Path | None = None
) -> list[Wheel]:
    """Fill `folder` with the wheel `own` and all that it needs with its extras; sorted by name.

    Raises M0kitError for an extra that there is not, and for what cannot be had.
    """
    shutil.copy2(own, folder)
    ours = Wheel(folder / own.name)
    names = [canonicalize_name(extra) for extra in extras]
    if unknown := [name for name in names if name not in ours.extras]:
        raise M0kitError(f"m0kit {ours.version} has no extra {unknown[0]!r}. There are: {', '.join(ours.extras)}.")
    brackets = f"[{','.join(names)}]" if names else ""
    pins = read_lock(lock, target) if lock else []
    hashed = f" --hash=sha256:{ours.sha256}" if lock else ""  # with one lock pip wants hashes of all
    missing = [f"{ours.name}{brackets} @ {ours.path.absolute().as_uri()}{hashed}"]
    for _ in range(_MOST_ROUNDS):
        download(missing, target, folder, pins)
        wheels = _by_name(folder)
        needed, lacking = _closure(Requirement(f"{ours.name}{brackets}"), wheels, target)
        if not lacking:
            for name, wheel in wheels.items():
                if name not in needed:
                    wheel.path.unlink()
            return [wheels[name] for name in sorted(needed)]
        if missing == sorted(lacking):
            break
        missing = sorted(lacking)
    raise M0kitError(f"{', '.join(missing)}: cannot be had with the other wheels. Give a --lock whose versions fit.")


def _by_name(folder: Path) -> dict[str, Wheel]:
    found: dict[str, Wheel] = {}
    for path in sorted(folder.glob("*.whl")):
        wheel = Wheel(path)
        if (other := found.setdefault(wheel.name, wheel)) is not wheel:
            raise M0kitError(
                f"{other.path.name} and {path.name}: the target would need both. Give a --lock whose versions fit."
            )
    return found


def _closure(root: Requirement, wheels: Mapping[str, Wheel], target: Target) -> tuple[set[str], set[str]]:
    """Names of wheels that are needed, and requirements that none of them meets."""
    seen: dict[str, set[str]] = {}
    lacking: set[str] = set()
    waiting = [root]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        wheel = wheels.get(name)
        if wheel is None or not requirement.specifier.contains(wheel.version, prereleases=True):
            lacking.add(f"{requirement.name}{requirement.specifier}")
            continue
        extras = {canonicalize_name(extra) for extra in requirement.extras}
        new = extras - seen[name] if name in seen else {"", *extras}
        seen.setdefault(name, set()).update(new)
        waiting += [each for each in wheel.requires if new and target.applies(each.marker, new)]
    return set(seen), lacking


def own_wheel(folder: Path, given: Path | None = None) -> Path:
    """m0kit's own: the one given, built from the checkout it is installed from, or fetched. Raises M0kitError."""
    if given is not None:
        if Wheel(given).name != "m0kit":
            raise M0kitError(f"{given}: is not m0kit's wheel. Give dist/m0kit-….whl.")
        return given
    installed = distribution("m0kit")
    source = _source(installed.read_text("direct_url.json"))
    if source is not None and source.suffix == ".whl" and source.is_file():
        return source
    if source is not None and (source / "pyproject.toml").is_file():
        _pip(["wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)], "m0kit's own wheel")
    else:
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        _pip([*words, f"m0kit=={installed.version}"], "m0kit's own wheel, which --wheel can name,")
    (wheel,) = folder.glob("m0kit-*.whl")
    return wheel


def _source(direct_url: str | None) -> Path | None:
    """The file or folder that a package was installed from, by the record of PEP 610."""
    url = urlsplit(str(json.loads(direct_url).get("url", ""))) if direct_url else None
    return Path(url2pathname(unquote(url.path))) if url and url.scheme == "file" else None


def _pip(words: Sequence[str], what: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *words]
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        probe = [sys.executable, "-m", "pip", "--version"]
        if subprocess.run(probe, check=False, capture_output=True).returncode:
            raise DependencyError("m0kit bundle needs pip. python -m ensurepip") from None
        raise M0kitError(f"{what} could not be had; what pip says of it stands above.") from error
