"""`m0kit bundle`: m0kit, what it needs and an artifact in one folder, for a machine without a network.

Owns the command; the folder is `m0kit.bundle`'s. It runs where there is a network, and has pip fetch wheels.
"""

import platform
import re
import sys
from pathlib import Path

import click

from m0kit.artifact.hub import is_id, resolve
from m0kit.bundle.stick import Plan, bundle
from m0kit.bundle.wheels import PLATFORMS, Target
from m0kit.cli.options import REVISION_HELP
from m0kit.terminal import say

_OLDEST = (3, 11)


@click.command("bundle")
@click.argument("artifact")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--extra", "extras", default="cpu,serve,pdf", show_default=True, help="What to be able to do there, by commas."
)
@click.option("--python", "version", metavar="3.X", help="Python there; the one that runs this by default.")
@click.option("--platform", "system", type=click.Choice(PLATFORMS), help="System there; this one by default.")
@click.option(
    "--wheel", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="m0kit's own wheel, if it is built."
)
@click.option(
    "--lock",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take the versions, and only files, that this lock names: deploy/requirements-cpu.txt.",
)
@click.option("--revision", help=REVISION_HELP.format("ARTIFACT"))
def bundle_command(
    artifact: str,
    output: Path,
    extras: str,
    version: str | None,
    system: str | None,
    wheel: Path | None,
    lock: Path | None,
    revision: str | None,
) -> None:
    """Gather wheels with hashes, ARTIFACT and a script that installs them, for a machine without a network.

    There `sh install.sh` checks SHA256SUMS, and installs from the folder alone. m0kit.cdx.json lists what is in it.
    """
    named = [name.strip() for name in extras.split(",") if name.strip()]
    if {"cpu", "gpu"} <= set(named):
        raise click.UsageError("--extra cpu and gpu bring the same package, one without CUDA: give one of them.")
    target = Target(_python(version), system or _here())
    folder = resolve(artifact, revision, what="artifact")
    name = artifact.partition("@")[0].rpartition("/")[2] if is_id(artifact) else None
    done = bundle(folder, output, Plan(target, tuple(named), wheel, lock), name=name)
    say(
        f"{output}: {done.wheels} wheels for Python {target.python} on {target.platform} and the artifact, "
        f"{done.num_bytes / 2**20:.0f} MiB"
    )


def _python(version: str | None) -> str:
    """Raises click.UsageError."""
    if version is None:
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    found = re.fullmatch(r"3\.(\d{1,2})", version)
    if found is None or (3, int(found[1])) < _OLDEST:
        raise click.UsageError(f"--python {version}: expected 3.11 or newer, without a patch's number.")
    return version


def _here() -> str:
    """Raises click.UsageError."""
    names = {"arm64": "arm64", "aarch64": "aarch64", "x86_64": "x86_64", "AMD64": "x86_64"}
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    found = f"{system}-{names.get(platform.machine(), platform.machine())}"
    if found not in PLATFORMS:
        raise click.UsageError(f"this system is {found}, for which there are no bundles: say --platform.")
    return found
