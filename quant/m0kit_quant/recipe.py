"""Recipes: which scheme stores which matrix. A small TOML file; the one used travels in the manifest.

    precision = "int4"                  # the name under which the artifact goes
    device = "cpu"                      # where it runs most, "cpu" or "cuda"; it runs on both
    rotate = true                       # first put the residual stream into another basis (m0kit_quant.rotate)
    equalize = true                     # then share channel ranges between layers (m0kit_quant.equalize)
    widen = true                        # store a matrix with a column far out in bf16 (m0kit_quant.outlying)
    feedback = true                     # make up for each rounding error in those that follow (m0kit_quant.feedback)

    [[weights]]                         # the first rule that matches a tensor's name decides
    match = "visual.patch_embed.*"      # a glob over the checkpoint's names
    scheme = "fp32"

    [[weights]]
    match = "*"
    scheme = "int4"
    block = [128, 64, 32]               # the first that divides the inputs; or one number

Rules concern the matrices alone: norms stay float32, and so do biases unless their matrix is fp16.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

from m0kit.errors import RecipeError
from m0kit.files import read_regular
from m0kit.precision import supported
from m0kit.schema import parse_toml
from m0kit_quant.scheme import Scheme
from m0kit_quant.schemes import SCHEMES
from m0kit_quant.weights import EMBEDDING

DEVICES: Final = ("cpu", "cuda")
_FLAGS: Final = ("rotate", "equalize", "widen", "feedback")
_FITS_ALL: Final = {"cpu": "int8", "cuda": "fp16"}  # the fewest bits that any matrix fits, a table too
# A rule of its own for each of the published model's 324 matrices is 25 kB.
_MAX_BYTES: Final = 1 << 18
_MAX_RULES: Final = 4096
_MAX_LETTERS: Final = 256  # of a pattern, and of the recipe's name; the longest name of a matrix has 45


@dataclass(frozen=True, slots=True)
class Rule:
    """One [[weights]] entry."""

    match: str
    scheme: str
    block: tuple[int, ...] = ()  # in the order of preference, where the scheme has a choice
    inputs: int | None = None  # bits that inputs of the product are rounded to, likewise


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe."""

    precision: str
    device: str
    rotate: bool
    equalize: bool
    widen: bool
    feedback: bool
    rules: tuple[Rule, ...]

    @classmethod
    def default(cls, precision: str, device: str = "cpu") -> "Recipe":
        """What m0kit carries for a precision and a device. Raises RecipeError for one it does not know."""
        if precision not in SCHEMES:
            raise RecipeError(
                f"precision {precision!r} is not known{_near(precision, SCHEMES)}. Choose one of {_list(SCHEMES)}."
            )
        if precision not in supported(device):
            raise RecipeError(
                f"{precision} has no kernels on {device} in ONNX Runtime; there {_list(supported(device))} work."
            )
        folder = resources.files("m0kit_quant") / "recipes"
        special = folder / f"{precision}.{device}.toml"
        data = (special if special.is_file() else folder / f"{precision}.toml").read_bytes()
        return cls.from_toml(data, f"the default recipe of {precision}", device)

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """A recipe file, with or without a byte order mark. Raises RecipeError."""
        try:
            data = read_regular(path, _MAX_BYTES)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise RecipeError(f"{path}: cannot be read ({reason}). Give a TOML file.") from error
        except ValueError:  # a null character, or half of a surrogate pair
            raise RecipeError(f"{str(path)!r} cannot be the name of a file.") from None
        return cls.from_toml(data, str(path))

    @classmethod
    def from_toml(cls, data: bytes, source: str, device: str | None = None) -> "Recipe":
        """Raises RecipeError that names `source` and what is wrong."""
        try:
            raw = parse_toml(data)
        except ValueError as error:
            raise RecipeError(f"{source}: {error}.") from None
        if device is not None:
            raw["device"] = device
        return cls.from_dict(raw, source)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> "Recipe":
        """The form it has in a manifest. Raises RecipeError that names `source` and what is wrong."""
        _only(raw, ("precision", "device", *_FLAGS, "weights"), source)
        precision, device = raw.get("precision"), raw.get("device", "cpu")
        if not isinstance(precision, str) or not 0 < len(precision) <= _MAX_LETTERS:
            raise RecipeError(f"{source}: precision must be a name, got {precision!r:.60}.")
        if device not in DEVICES:
            raise RecipeError(f"{source}: device must be one of {_list(DEVICES)}, got {device!r:.60}.")
        flags = {name: _flag(raw, name, source) for name in _FLAGS}
        entries = raw.get("weights")
        if not isinstance(entries, list) or not entries:
            raise RecipeError(f"{source}: needs at least one [[weights]] rule.")
        if len(entries) > _MAX_RULES:
            raise RecipeError(f"{source}: has {len(entries)} rules; {_MAX_RULES} are read. Use patterns.")
        rules = tuple(_rule(entry, f"{source}: rule {number}") for number, entry in enumerate(entries, 1))
        for rule in rules:
            if rule.scheme not in supported(device):
                raise RecipeError(
                    f"{source}: {rule.scheme} has no kernels on {device} in ONNX Runtime; "
                    f"there {_list(supported(device))} work."
                )
        return cls(precision, device, **flags, rules=rules)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest; `from_dict` reads it."""
        rules = [
            {
                "match": r.match,
                "scheme": r.scheme,
                **({"block": list(r.block)} if r.block else {}),
                **({"inputs": r.inputs} if r.inputs else {}),
            }
            for r in self.rules
        ]
        flags = {
            **({"rotate": True} if self.rotate else {}),
            "equalize": self.equalize,
            **({"widen": True} if self.widen else {}),
            **({"feedback": True} if self.feedback else {}),
        }
        return {"precision": self.precision, "device": self.device, **flags, "weights": rules}

    def storing(self, schemes: Mapping[str, str]) -> "Recipe":
        """The same with a rule of its own, before all others, for each matrix in `schemes` (by its full name)."""
        return replace(self, rules=(*(Rule(name, scheme) for name, scheme in schemes.items()), *self.rules))

    def scheme(self, name: str, shape: tuple[int, ...]) -> Scheme:
        """How the matrix `name` (out, in) is stored. Raises RecipeError when no rule says, or a block does not fit."""
        for rule in self.rules:
            if not fnmatch.fnmatchcase(name, rule.match):
                continue
            kind = SCHEMES[rule.scheme]
            block = next((b for b in rule.block if shape[1] % b == 0), None)
            if rule.block and block is None:
                smaller = next((b for b in kind.blocks[::-1] if shape[1] % b == 0), None)
                raise RecipeError(
                    f"{name} has {shape[1]} inputs, which no block of {_list(rule.block)} divides. {_before(rule)}",
                    *self._instead(name, rule.scheme, smaller),
                )
            scheme = kind(block, table=name == EMBEDDING, inputs=rule.inputs)
            try:
                scheme.layout(shape)
            except ValueError as error:
                said = f"{name}: {error}. {_before(rule)}"
                raise RecipeError(said, *self._instead(name, rule.scheme)) from None
            return scheme
        raise RecipeError(f'the recipe says nothing about {name}. Add a last rule with match = "*".')

    def _instead(self, name: str, kind: str, block: int | None = None) -> list[str]:
        """A rule to put before the one that does not fit, as lines of TOML."""
        match = re.sub(r"\.\d+\.", ".*.", name)
        scheme = [f'scheme = "{kind}"', f"block = {block}"] if block else [f'scheme = "{_FITS_ALL[self.device]}"']
        return ["", "[[weights]]", f'match = "{match}"', *scheme]

    def check(self, names: Iterable[str]) -> None:
        """Raises RecipeError for a rule that matches none of the matrices, with the names that come near."""
        names = list(names)
        for rule in self.rules:
            if not fnmatch.filter(names, rule.match):
                raise RecipeError(f"the rule {rule.match!r} matches no matrix of this model{_near(rule.match, names)}.")

    @property
    def schemes(self) -> tuple[str, ...]:
        """Names of the schemes that the rules use, without repetition."""
        return tuple(dict.fromkeys(rule.scheme for rule in self.rules))


def _before(rule: Rule) -> str:
    return f"Put this before the rule {rule.match!r}:"


def _rule(entry: Any, where: str) -> Rule:
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{where}: expected a table with match and scheme, got {entry!r:.60}.")
    _only(entry, ("match", "scheme", "block", "inputs"), where)
    match, scheme, block = entry.get("match"), entry.get("scheme"), entry.get("block")
    if not isinstance(match, str) or not 0 < len(match) <= _MAX_LETTERS:
        raise RecipeError(f"{where}: match must be a pattern of tensor names, got {match!r:.60}.")
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise RecipeError(
            f"{where}: scheme {scheme!r:.60} is not known{_near(str(scheme), SCHEMES)}. Known: {_list(SCHEMES)}."
        )
    known = SCHEMES[scheme].blocks
    if not known and block is not None:
        owners = _list(name for name, each in SCHEMES.items() if each.blocks)
        raise RecipeError(f"{where}: block belongs to {owners}, {scheme} has none to choose.")
    blocks = block if isinstance(block, list) else list(known[::-1]) if block is None else [block]
    if (known and not blocks) or any(type(b) is not int or b not in known for b in blocks):
        raise RecipeError(f"{where}: block must be of {_list(known)}, got {block!r:.60}.")
    inputs, choice = entry.get("inputs"), SCHEMES[scheme].input_bits
    if inputs is not None and (type(inputs) is not int or inputs not in choice):
        raise RecipeError(
            f"{where}: inputs must be of {_list(choice)} bits, got {inputs!r:.60}."
            if choice
            else f"{where}: inputs belongs to int8, {scheme} has none to choose."
        )
    return Rule(match, scheme, tuple(blocks), inputs)


def _flag(raw: Mapping[str, Any], name: str, where: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise RecipeError(f"{where}: {name} must be true or false, got {value!r:.60}.")
    return value


def _only(raw: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: {key!r:.60} is not known{_near(str(key), known)}. Known: {_list(known)}.")


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word[:_MAX_LETTERS], list(words), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _list(words: Iterable[Any]) -> str:
    return ", ".join(map(str, words))
