"""Figures are of one model: an artifact of other weights, adapters or bases is told from one that computes wrongly."""

from pathlib import Path
from typing import Any

import pytest

from m0kit.errors import InputError
from m0kit_parity.proof.origin import require_same_origin

BASE = {"model.safetensors": "aa", "config.json": "bb"}
CHECKPOINT = {"source": "their/checkpoint", "licence": None, "fingerprint": BASE}


def lora(name: str = "code", weight: float = 1.0, sha256: str = "cc", config: str = "dd") -> dict[str, Any]:
    hashes = {"adapter_model.safetensors": sha256 * 32, "adapter_config.json": config}
    return {"name": name, "weight": weight, "sha256": hashes}


def recorded(adapter: dict[str, Any]) -> dict[str, Any]:
    """As a recording names it: by its path, with every file of its folder."""
    return {
        "path": f"/my/{adapter['name']}",
        "weight": adapter["weight"],
        "sha256": adapter["sha256"] | {"README.md": "x"},
    }


def compare(made: dict[str, Any], theirs: dict[str, Any]) -> None:
    require_same_origin(Path("m0"), made, theirs, "record again.")


@pytest.mark.parametrize("adapters", [[], [lora()], [lora(), lora("legal", 0.5, "ee")]])
def test_the_same_weights_pass(adapters: list[dict[str, Any]]) -> None:
    made = {"base": "my/checkpoint", "base_files": BASE, "adapters": adapters}
    compare(made, {"checkpoint": CHECKPOINT, "adapters": list(map(recorded, adapters))})
    renamed = {"weights-1.safetensors": "aa", "tokenizer.json": "zz"}
    compare({**made, "base_files": renamed}, {"checkpoint": CHECKPOINT, "adapters": list(map(recorded, adapters))})


@pytest.mark.parametrize(("made", "theirs"), [({}, {}), ({}, {"checkpoint": CHECKPOINT, "adapters": []}),
                                              ({"base_files": BASE, "adapters": [lora()]}, {})])  # fmt: skip
def test_what_a_side_does_not_state_is_not_compared(made: dict[str, Any], theirs: dict[str, Any]) -> None:
    compare(made, theirs)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([lora()], [], "m0 holds the adapter code, and PyTorch's side has no adapter. Give --adapter"),
        ([], [lora()], "m0 holds no adapter, and PyTorch's side has the adapter code."),
        ([lora()], [lora("legal", sha256="ee")], "the adapter code, and PyTorch's side has the adapter legal"),
        (
            [lora()],
            [lora(sha256="ee")],
            r"code \(sha256 cccccccc…\), and PyTorch's side has the adapter code \(sha256 ee",
        ),
        ([lora(weight=0.5)], [lora()], "the adapter code × 0.5 "),
        ([lora(), lora("b", sha256="ee")], [lora("b", sha256="ee"), lora()], "the adapters code and b, and"),
        ([lora(config="other")], [lora()], "the adapter code"),
    ],
)
def test_other_adapters_are_named_on_both_sides(ours: Any, theirs: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        compare({"adapters": ours}, {"adapters": list(map(recorded, theirs))})


def test_before_files_are_read_their_number_is_compared() -> None:
    compare({"adapters": [lora()]}, {"adapters": [{"path": "x:0.5"}]})
    with pytest.raises(InputError, match="no adapter"):
        compare({"adapters": [lora()]}, {"adapters": []})


def test_another_base_is_named() -> None:
    other = {"source": "their/checkpoint", "fingerprint": {"model.safetensors": "ff"}}
    with pytest.raises(InputError, match=r"m0 was exported from other weights \(mine\) than .* \(their/checkpoint\)"):
        compare({"base": "mine", "base_files": BASE, "adapters": []}, {"checkpoint": other, "adapters": []})


def test_a_base_in_four_bits_is_not_what_pytorch_computes() -> None:
    made = {"base": "mine", "base_files": BASE, "adapters": [lora()], "qlora": {"scheme": "nf4"}}
    with pytest.raises(InputError, match=r"merged on a base in 4 bits \(--qlora\)"):
        compare(made, {"checkpoint": CHECKPOINT, "adapters": [recorded(lora())]})
