"""`m0kit doctor`: which precision suits this machine, and why; changes nothing.

    m0kit doctor                  which precision to export for this machine
    m0kit doctor m0-int8          whether that artifact suits it, and comes out right on it

Owns the command and the known answers that are scored for it. What is known of a machine is
`m0kit.machine.detect`'s, the rules are `m0kit.machine.advice`'s. Exit code 1 when nothing can be scored here: no usable
ONNX Runtime, or an artifact that cannot run or whose known answers come out wrong.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from m0kit.artifact.answers import Answer, summary
from m0kit.artifact.manifest import Manifest, read_manifest
from m0kit.cli.options import JSON, artifact_argument
from m0kit.errors import WrongAnswerError
from m0kit.machine.advice import Fit, advise, device_name, engine_problem, fit, in_gb
from m0kit.machine.detect import FEATURE_NAMES, Machine, detect, engine
from m0kit.precision import provider_of
from m0kit.reranker import Reranker
from m0kit.terminal import show, show_json


def answers_here(folder: Path, manifest: Manifest) -> list[Answer]:
    """Score all known answers of an artifact on the device that it was made for, or the CPU where that is not there.

    Raises WrongAnswerError, and what Reranker.load raises.
    """
    device = str(manifest.recipe.get("device", "cpu"))
    there = provider_of(device) == "cuda" and "CUDAExecutionProvider" in engine()[1]
    return Reranker.load(folder, device=device if there else "cpu").try_answers(again=True)


def _rows(machine: Machine) -> Sequence[tuple[str, str]]:
    states = {True: "yes", False: "no", None: "unknown"}
    sizes = {gpu: "memory unknown" if gpu.memory is None else in_gb(gpu.memory) for gpu in machine.gpus}
    memory = "unknown" if machine.memory is None else in_gb(machine.memory)
    free = "unknown" if machine.available is None else in_gb(machine.available)
    return (
        ("cpu", f"{machine.cpu}, {machine.arch}, {machine.system}; {machine.cores} cores usable"),
        (
            "instructions",
            ", ".join(f"{FEATURE_NAMES[n]} {states[v]}" for n, v in machine.features.items()) or "unknown",
        ),
        ("memory", f"{memory}, available {free}"),
        ("gpu", ", ".join(f"{gpu.name} ({size})" for gpu, size in sizes.items()) or "no NVIDIA GPU found"),
        ("onnxruntime", f"{machine.onnxruntime}: {', '.join(machine.providers)}" if machine.onnxruntime else "missing"),
        ("free disk", "unknown" if machine.free_disk is None else in_gb(machine.free_disk)),
    )


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
    answers: list[Answer] = []
    if artifact and manifest and suited and suited.verdict != "cannot run":
        try:
            answers = answers_here(artifact, manifest)
        except WrongAnswerError as error:
            suited = Fit("cannot run", (str(error),))
    if as_json:
        facts: dict[str, Any] = {"machine": asdict(machine), "advice": asdict(advice)}
        if manifest and suited:
            facts["artifact"] = {"path": str(artifact), "scheme": manifest.scheme, "bytes": manifest.num_bytes}
            facts["artifact"] |= asdict(suited) | {"answers": [asdict(answer) for answer in answers]}
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
            if suited.verdict != "cannot run":
                show(f"  known answers: {summary(answers)}")
    ctx.exit(1 if engine_problem(machine) or (suited and suited.verdict == "cannot run") else 0)
