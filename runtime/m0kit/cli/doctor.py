"""`m0kit doctor`: which precision suits this machine, and why; changes nothing.

    m0kit doctor                  which precision to export for this machine
    m0kit doctor m0-int8          whether that artifact suits it, and comes out right on its CPU and its GPUs

Owns the command and the known answers that are scored for it. What is known of a machine is
`m0kit.machine.detect`'s, the rules are `m0kit.machine.advice`'s. Exit code 1 when nothing can be scored here: no usable
ONNX Runtime, or an artifact that cannot run or whose known answers come out wrong on any device.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from m0kit.artifact.answers import Answer, summary
from m0kit.artifact.manifest import Manifest, read_manifest
from m0kit.cli.options import JSON, artifact_argument
from m0kit.errors import DeviceError, WrongAnswerError
from m0kit.machine.advice import Fit, OnGpu, advise, device_name, engine_problem, fit, in_gb, on_gpus
from m0kit.machine.detect import FEATURE_NAMES, Machine, cuda_problem, detect, engine
from m0kit.precision import provider_of
from m0kit.reranker import Reranker
from m0kit.scoring.cuda import PROVIDER
from m0kit.scoring.gpus import Gpu
from m0kit.terminal import show, show_json


def answers_here(folder: Path, manifest: Manifest) -> list[Answer]:
    """Score all known answers of an artifact on the device that it was made for, or the CPU where that is not there.

    Raises WrongAnswerError, and what Reranker.load raises.
    """
    device = str(manifest.recipe.get("device", "cpu"))
    providers = engine()[1]
    there = provider_of(device) == "cuda" and PROVIDER in providers and not cuda_problem(providers)
    return Reranker.load(folder, device=device if there else "cpu").try_answers(again=True)


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of an artifact's known answers on one device."""

    device: str
    answers: Sequence[Answer]
    wrong: str = ""  # what is wrong; then there are no answers


def tried_on(folder: Path, device: str) -> Tried:
    """Score all known answers on a device. Raises what Reranker.load raises of anything but the device."""
    try:
        with Reranker.load(folder, device=device) as reranker:
            return Tried(device, reranker.try_answers(again=True))
    except (WrongAnswerError, DeviceError) as error:
        return Tried(device, (), str(error))


def _judged(suited: Fit, tried: Sequence[Tried]) -> Fit:
    """What `suited` says of the machine, and what came out there."""
    wrong = tuple(each.wrong for each in tried if each.wrong)
    if tried and len(wrong) == len(tried):
        return Fit("cannot run", wrong)
    if wrong:
        return Fit("works", wrong)
    if tried and suited.verdict == "cannot run":  # on the CPU
        return Fit("works", tuple(f"on a GPU alone; on the CPU {why}" for why in suited.why))
    return suited


def _rows(machine: Machine) -> Sequence[tuple[str, str]]:
    states = {True: "yes", False: "no", None: "unknown"}
    memory = "unknown" if machine.memory is None else in_gb(machine.memory)
    free = "unknown" if machine.available is None else in_gb(machine.available)
    return (
        ("cpu", f"{machine.cpu}, {machine.arch}, {machine.system}; {machine.cores} cores usable"),
        (
            "instructions",
            ", ".join(f"{FEATURE_NAMES[n]} {states[v]}" for n, v in machine.features.items()) or "unknown",
        ),
        ("memory", f"{memory}, available {free}"),
        *([("gpu", _told(index, gpu)) for index, gpu in enumerate(machine.gpus)] or [("gpu", "no NVIDIA GPU found")]),
        ("cuda", _cuda(machine)),
        ("onnxruntime", f"{machine.onnxruntime}: {', '.join(machine.providers)}" if machine.onnxruntime else "missing"),
        ("free disk", "unknown" if machine.free_disk is None else in_gb(machine.free_disk)),
    )


def _told(index: int, gpu: Gpu) -> str:
    facts = ["memory unknown" if gpu.memory is None else in_gb(gpu.memory)]
    facts += [] if gpu.free is None else [f"free {in_gb(gpu.free)}"]
    facts += [] if gpu.capability is None else [f"compute capability {'.'.join(map(str, gpu.capability))}"]
    facts += [] if gpu.driver is None else [f"driver {gpu.driver}"]
    return f"cuda:{index} {gpu.name} ({', '.join(facts)})"


def _cuda(machine: Machine) -> str:
    if PROVIDER not in machine.providers:
        return "not in this onnxruntime"
    return "does not start; see the note" if machine.cuda else "starts"


@click.command()
@artifact_argument(required=False)
@JSON
@click.pass_context
def doctor(ctx: click.Context, artifact: Path | None, as_json: bool) -> None:
    """Say which precision suits this machine and why, or whether ARTIFACT does."""
    manifest = read_manifest(artifact) if artifact else None
    machine = detect(artifact or Path())
    advice = advise(machine)
    suited = fit(machine, manifest.scheme, manifest.num_bytes) if manifest else None
    there: tuple[OnGpu, ...] = ()
    if manifest:
        there = on_gpus(machine, (manifest.scheme, *manifest.schemes), manifest.num_bytes)
    tried: list[Tried] = []
    if artifact and suited and not engine_problem(machine):
        devices = [] if suited.verdict == "cannot run" else ["cpu"]
        devices += [each.device for each in there if not each.problem]
        tried = [tried_on(artifact, device) for device in devices]
        suited = _judged(suited, tried)
    wrong = {each.device: each.wrong for each in tried if each.wrong}
    if as_json:
        facts: dict[str, Any] = {"machine": asdict(machine), "advice": asdict(advice)}
        if manifest and suited:
            facts["artifact"] = {"path": str(artifact), "scheme": manifest.scheme, "bytes": manifest.num_bytes}
            facts["artifact"] |= asdict(suited) | {"wrong": wrong}
            facts["artifact"]["answers"] = [{"device": t.device, **asdict(a)} for t in tried for a in t.answers]
            facts["artifact"]["gpus"] = [asdict(each) for each in there]
        show_json(facts)
    else:
        for name, value in _rows(machine):
            show(f"{name:12} {value}")
        show("", f"full model: {advice.precision} on the {device_name(advice.device)}: {advice.why}.")
        for name, against in advice.others.items():
            show(f"  not {name}{'' if against.possible else ' (impossible here)'}: {against.why}.")
        for note in advice.notes:
            show(f"note: {note}")
        if manifest and suited:
            show("", f"{artifact}: {manifest.scheme}, {in_gb(manifest.num_bytes)}: {suited.verdict}")
            for reason in suited.why:
                show(f"  {reason}")
            for each in there:
                if each.device not in wrong:
                    runs = (
                        "it runs there" if "cuda" in manifest.runs else "it runs there slowly: fp32 has no CUDA graphs"
                    )
                    show(f"  {each.device}: {each.problem or runs}. What fits: {', '.join(each.fits) or 'nothing'}")
            for result in tried:
                if not result.wrong:
                    show(f"  known answers on {result.device}: {summary(result.answers)}")
    ctx.exit(1 if engine_problem(machine) or wrong or (suited and suited.verdict == "cannot run") else 0)
