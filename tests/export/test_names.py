"""Names of tensors before and since transformers 4.52 are two spellings of the same."""

import pytest

from m0kit_export.names import canonical_name, expected_shapes, is_nested, spelled
from m0kit_parity.samples.checkpoints import model_config

NAMES = list(expected_shapes(model_config("tiny")))
NESTED = [spelled(name, nested=True) for name in NAMES]


def test_every_name_comes_back_from_either_spelling() -> None:
    assert [spelled(name, nested=False) for name in NAMES] == NAMES
    assert [canonical_name(name) for name in NESTED] == NAMES == [canonical_name(name) for name in NAMES]
    assert len({*NAMES, *NESTED}) == 2 * len(NAMES) - sum(name.startswith("score.") for name in NAMES)


@pytest.mark.parametrize(
    ("name", "nested"),
    [
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("model.embed_tokens", "model.language_model.embed_tokens"),
        ("visual.merger.mlp.0", "model.visual.merger.mlp.0"),
        ("score.2.bias", "score.2.bias"),
    ],
)
def test_both_towers_moved_under_model_and_the_head_did_not(name: str, nested: str) -> None:
    assert spelled(name, nested=True) == nested


def test_the_layers_of_the_head_have_roles_for_names_in_one_source() -> None:
    assert canonical_name("score.dense.weight") == "score.0.weight"
    assert canonical_name("score.out_proj.bias") == "score.2.bias"


def test_the_spelling_of_most_decides() -> None:
    assert is_nested(NESTED)
    assert not is_nested(NAMES)
    assert not is_nested([*NAMES, NESTED[0]])
    assert is_nested([NAMES[0], *NESTED])
    assert is_nested(["score.0.weight"])  # which is the same in both
