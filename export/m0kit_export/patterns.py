"""The patterns of an adapter's config, tried where they can be stopped.

    try_patterns(raw, names, "adapter_config.json of adapter tuned")

PEFT matches what stands in target_modules, exclude_modules, modules_to_save, layers_pattern, rank_pattern and
alpha_pattern with Python's `re`, which backtracks, on some patterns for longer than anyone waits, and cannot be
stopped. So before PEFT comes, a process of its own matches the same patterns against the same names, by the same
engine, since another one is slow elsewhere; it has a deadline. Owns how PEFT puts a pattern to use.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from m0kit.errors import AdapterError

# All patterns against all names. Of the hundreds of the published model's, with a rank for each layer, half a second.
DEADLINE_S: Final = 20  # of a processor, where the system counts them: a busy machine decides nothing
WAIT_S: Final = 10 * DEADLINE_S  # of the clock, for where it does not
# Letters of all patterns together; a rank and an alpha for each matrix, by its full name, are 30,000.
_MAX_LETTERS: Final = 1 << 16

_PLAIN: Final = re.compile(r"[\w.-]*")  # a name: nothing in it is tried twice
# How PEFT 0.21 uses each (tuners_utils.check_target_module_exists, other.get_pattern_key): {} is the pattern.
USES: Final = {
    "target_modules": "{}",  # the whole name
    "exclude_modules": "{}",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
BESIDES: Final = ("embed_tokens", "lm_head")  # PEFT also asks whether these are meant, when it saves
_ALL_LINEAR: Final = "all-linear"  # PEFT's word for it, which is no pattern

# A line for each pattern that is done: null, or what is wrong with it. The limit keeps what compiles here from
# failing there, deeper in a stack.
_HELPER: Final = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
sys.setrecursionlimit(300)
work = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (work["seconds"], work["seconds"]))  # also when nobody waits any more
except (ImportError, ValueError, OSError):
    pass
for whole, pattern in work["patterns"]:
    wrong = None
    try:
        re.compile(pattern)
        use = re.compile(whole)
        match = use.fullmatch if whole == pattern else use.match
        for name in work["names"]:
            match(name)
    except (re.error, ArithmeticError, IndexError, MemoryError, RecursionError) as error:
        wrong = str(error) if isinstance(error, re.error) else type(error).__name__
    print(json.dumps(wrong), flush=True)
"""


def try_patterns(raw: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Match every pattern of a config, whose fields have the right types, with the names of modules as PEFT will.

    Raises AdapterError that begins with `where` and names the pattern: one that is none, that is empty where PEFT
    takes that for all, or that is not done by the deadline.
    """
    found = list(_patterns(raw))
    if sum(len(pattern) for _, pattern in found) > _MAX_LETTERS:
        raise AdapterError(f"{where}: its patterns have more than {_MAX_LETTERS} letters. Write them shorter")
    for option, pattern in found:
        if not pattern:
            raise AdapterError(f"{where}: {option} holds an empty pattern. Leave it out, or name modules")
    tried = [(option, pattern) for option, pattern in found if not _PLAIN.fullmatch(pattern)]
    if not tried:
        return
    work: dict[str, Any] = {"patterns": [(USES[option].format(pattern), pattern) for option, pattern in tried]}
    work |= {"names": [*names, *BESIDES], "seconds": DEADLINE_S}
    done = _answers(json.dumps(work).encode())
    for (option, pattern), wrong in zip(tried, done, strict=False):
        if wrong is not None:
            raise AdapterError(
                f"{where}: {option} holds {pattern!r:.200}, which is no regular expression ({wrong:.80})"
            )
    if len(done) < len(tried):
        option, pattern = tried[len(done)]
        raise AdapterError(
            f"{where}: {option} holds {pattern!r:.200}, with which the names of this model's modules were not compared "
            f"in {DEADLINE_S} seconds: it backtracks. Write it without one repetition inside another, or name modules"
        )


def _answers(work: bytes) -> list[str | None]:
    """Of the patterns that were done before the deadline."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _HELPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as helper:
        try:
            told, _ = helper.communicate(work, timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            helper.kill()
            told, _ = helper.communicate()
        except BaseException:
            helper.kill()
            raise
    return [json.loads(line) for line in told.splitlines()]


def _patterns(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(option, pattern) of all that PEFT takes for one; a list of target modules holds names, not patterns."""
    for option in ("target_modules", "exclude_modules"):
        value = raw.get(option)
        if isinstance(value, str) and value and value.lower() != _ALL_LINEAR:
            yield option, value
    layers = raw.get("layers_pattern") or []
    for option, several in (
        ("modules_to_save", raw.get("modules_to_save") or []),
        ("layers_pattern", [layers] if isinstance(layers, str) else layers),
        ("rank_pattern", raw.get("rank_pattern") or {}),
        ("alpha_pattern", raw.get("alpha_pattern") or {}),
    ):
        yield from ((option, pattern) for pattern in several)
