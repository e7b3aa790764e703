"""`make fuzz`: many inputs of every surface, in as many processes as there are cores, and a table of what came of them.

python -m tests.fuzz                              # 100,000 inputs of each, with a random seed, which is printed
python -m tests.fuzz image index -n 5000 --seed 7
python -m tests.fuzz image --seed 7 --replay 123 -o failed.tar.xz   # one input again, written to a file
python -m tests.fuzz image --file failed.tar.xz                     # an input that was written, or a seed
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tests.fuzz import coverage
from tests.fuzz.runner import Result, Surface, alone, at_home, load, run, save
from tests.fuzz.surfaces import SURFACES

ROOT: Final = Path(__file__).parent.parent.parent
_PURE_SHARE: Final = 0.2  # of the time goes to atheris, where it is there


def surface_of(name: str) -> Surface:
    """Loaded here, with what it imports."""
    return SURFACES[name]()


def fuzz(name: str, inputs: int, seed: int, jobs: int = 1, seconds: float = float("inf")) -> Result:
    """Run inputs of a surface in processes of its own: children are forked from what has no threads."""
    step = [sys.executable, "-m", "tests.fuzz", name, "--seed", str(seed), "-n", str(inputs), "--seconds", str(seconds)]
    with ThreadPoolExecutor(jobs) as pool:
        outs = pool.map(lambda job: _worker([*step, "--worker", str(job), str(jobs)]), range(jobs))
        results = [_result(json.loads(out)) for out in outs]
    total = results[0]
    for result in results[1:]:
        total.add(result)
    return total


def _worker(command: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def _result(raw: dict[str, Any]) -> Result:
    raw |= {"errors": Counter(raw["errors"]), "died": Counter(raw["died"]), "slowest": tuple(raw["slowest"])}
    return Result(**raw)


def _row(result: Result) -> str:
    rate = result.inputs / result.seconds if result.seconds else 0.0
    errors = ", ".join(f"{count} {name}" for name, count in result.errors.most_common())
    errors += "".join(f", {count} × {name} in the engine" for name, count in result.died.items())
    failed = sum(map(len, result.failures.values()))
    slowest = f"{result.slowest[0]:.2f} s (input {result.slowest[1]})"
    numbers = f"{result.inputs:8} {rate:6.0f}/s of CPU {result.whole:8} whole {failed:6} failed"
    return f"{result.surface:11} {numbers}  {slowest:24} {errors}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("surfaces", nargs="*", metavar="SURFACE", help=", ".join(SURFACES))
    parser.add_argument("-n", type=int, default=100_000, help="inputs of each surface (100000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all of them together (no limit)")
    parser.add_argument("--seed", type=int, help="of all that is random; printed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replay", type=int, metavar="I", help="run input I alone")
    parser.add_argument("--file", type=Path, help="run this input")
    parser.add_argument("-o", type=Path, help="write the input that is replayed")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := [name for name in given.surfaces if name not in SURFACES]:
        parser.error(f"no surface is called {', '.join(unknown)}; there are {', '.join(SURFACES)}")
    seed = secrets.randbelow(1 << 32) if given.seed is None else given.seed
    if given.worker:
        at_home()
        number, jobs = given.worker
        (name,) = given.surfaces
        result = run(name, surface_of(name), seed, range(number, given.n, jobs), given.seconds)
        print(json.dumps(vars(result)))
        return 0
    if given.replay is not None or given.file:
        at_home()
        (name,) = given.surfaces
        return _replay(name, seed, given.replay, given.file, given.o)
    names = given.surfaces or list(SURFACES)
    pure = [target for target in coverage.TARGETS if not given.surfaces] if coverage.available() else []
    print(f"seed {seed}, {given.n} inputs of each, {given.jobs} processes", flush=True)
    share = given.seconds / len(names) * (1 - _PURE_SHARE * bool(pure))
    failed = False
    for name in names:
        try:
            result = fuzz(name, given.n, seed, given.jobs, share)
        except RuntimeError as error:  # of the surface itself, or out of memory: the others are looked at all the same
            print(f"{name}: {error}", flush=True)
            failed = True
            continue
        print(_row(result), flush=True)
        if result.failures:
            failed = True
            print(result.told(), flush=True)
    for target in pure:
        seconds = min(given.seconds * _PURE_SHARE / len(pure), 120)
        told = coverage.run(target, seconds, seed)
        print(told, flush=True)
        failed |= "FAILED" in told
    if not coverage.available():
        print("atheris is not installed, or there is none for this Python: nothing was guided by coverage")
    return int(failed)


def _replay(name: str, seed: int, number: int | None, file: Path | None, output: Path | None) -> int:
    surface = surface_of(name)
    if file is not None:
        where, files = str(file), load(file, surface.file)
    else:
        assert number is not None
        where, files = surface.input(name, seed, number)
    if output is not None:
        save({name: content for name, content in files.items() if surface.base.get(name) != content}, output)
        where += f", written to {output}"
    note = alone(files, surface, quiet=False)
    print(f"{name}: {where}")
    print(note.pop("trace", "").rstrip() or "no error")
    print(json.dumps(note, ensure_ascii=True))
    return int("failure" in note)


if __name__ == "__main__":
    sys.exit(main())
