"""Patterns of adapters are tried where they can be stopped, and told by name."""

import re
import subprocess
import warnings
from typing import Any

import peft
import pytest
from tests.export import tiny_model

from m0kit.errors import AdapterError
from m0kit_export import patterns
from m0kit_export.names import expected_shapes
from m0kit_export.patterns import try_patterns
from m0kit_parity.samples.checkpoints import model_config

WHERE = "adapter_config.json of adapter tuned"
# Of the published model, before transformers 4.52 and as it has them now.
OLD = [name.rpartition(".")[0] for name in expected_shapes(model_config("full"))]
NEW = [
    ("model." + name if name.startswith("visual") else name.replace("model.", "model.language_model.")) for name in OLD
]

# What backtracks on a name of forty letters for longer than the universe is old, in each place that takes a pattern.
SLOW = r"(\w+\.?)+!"
PLACES: dict[str, Any] = {
    "target_modules": SLOW,
    "exclude_modules": SLOW,
    "modules_to_save": ["score", SLOW],
    "layers_pattern": SLOW,
    "rank_pattern": {"q_proj": 4, SLOW: 8},
    "alpha_pattern": {SLOW: 8},
}

# As Unsloth, ms-swift and LLaMA-Factory write them.
REAL: tuple[dict[str, Any], ...] = (
    {
        "target_modules": r"(?:.*?(?:vision|image|visual|patch_embed|embedding).*?(?:layers|blocks|layer|block).*?"
        r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:\bqkv\b|\bproj\b|\bfc1\b|\bfc2\b).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
    },
    {"target_modules": r"^(model)(?!.*visual).*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"},
    {"target_modules": r"^(?!.*visual).*(?:q_proj|v_proj|down_proj).*", "exclude_modules": ".*(visual|score).*"},
    {"target_modules": r"(?i).*\.Q_PROJ", "layers_pattern": ["layers", "h"], "layers_to_transform": [0, 1]},
    {"rank_pattern": {rf"model\.layers\.{i}\.self_attn\.q_proj": 4 for i in range(28)}, "modules_to_save": ["score"]},
    {"rank_pattern": dict.fromkeys(OLD, 4), "alpha_pattern": dict.fromkeys(OLD, 8)},
    {"target_modules": "all-linear", "exclude_modules": None, "modules_to_save": None, "layers_pattern": ""},
)


@pytest.mark.parametrize("option", PLACES)
def test_a_pattern_that_backtracks_for_ever_is_told_by_name(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "DEADLINE_S", 2)
    with pytest.raises(AdapterError) as refused:
        try_patterns({"r": 4, option: PLACES[option]}, OLD, WHERE)
    assert str(refused.value).startswith(f"{WHERE}: {option} holds {SLOW!r}")
    assert "it backtracks" in str(refused.value)


@pytest.mark.parametrize("raw", REAL, ids=range(len(REAL)))
def test_patterns_that_trainers_write_are_taken(raw: dict[str, Any]) -> None:
    try_patterns(raw, ["", *OLD, *NEW], WHERE)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern"])
@pytest.mark.parametrize("wrong", ["(", "a**", "[b-a]", "(?P<idx>x)(?P<idx>y)", "\\", "(?<=a*)b"])
def test_what_is_no_pattern_is_told_by_name(option: str, wrong: str) -> None:
    value = wrong if option in ("target_modules", "exclude_modules") else [wrong]
    with pytest.raises(AdapterError, match=f"{option} holds .*, which is no regular expression"):
        try_patterns({option: value}, OLD, WHERE)


def test_names_alone_cost_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    raw = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["score.0"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    }
    try_patterns(raw, OLD, WHERE)


@pytest.mark.parametrize(
    "option", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern"]
)
def test_peft_is_asked_the_same_of_every_pattern(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PEFT hands to `re` on the tiny model is what was tried before, so that nothing else can hang there."""
    pattern = {"layers_pattern": "(layers|blocks)"}.get(option, "(q|v)_proj")
    value: Any = {"modules_to_save": ["(merger|ln_q)"], "rank_pattern": {pattern: 2}, "target_modules": f".*{pattern}"}
    value = value.get(option, pattern)
    config = {"target_modules": ["q_proj", "v_proj"], option: value}
    if option == "layers_pattern":
        config["layers_to_transform"] = [1]
    seen: set[tuple[str, str, str]] = set()
    whole, start = re.fullmatch, re.match

    def watch(how: str, match: Any) -> Any:
        def watched(pattern: Any, string: str, flags: Any = 0) -> Any:
            if isinstance(pattern, str):
                seen.add((how, pattern, string))
            return match(pattern, string, flags)

        return watched

    model = tiny_model.make_model()
    names = {name for name, _ in model.named_modules()}
    monkeypatch.setattr(re, "fullmatch", watch("whole", whole))
    monkeypatch.setattr(re, "match", watch("start", start))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(**config))
    monkeypatch.undo()
    own = [text for text in ("(q|v)_proj", "(layers|blocks)", "(merger|ln_q)") if text in str(value)]
    asked = {one for one in seen if any(text in one[1] for text in own)}
    assert asked
    used = patterns.USES[option].format(value if isinstance(value, str) else next(iter(value)))
    how = "whole" if option in ("target_modules", "exclude_modules") else "start"
    assert {(kind, text) for kind, text, _ in asked} == {(how, used)}
    assert {string for _, _, string in asked} <= {*names, *patterns.BESIDES}
