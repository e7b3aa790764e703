"""Recipes: those that come along, how rules are chosen, and that whatever is wrong is said with its place."""

import os
import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit.errors import RecipeError
from m0kit.precision import SCHEMES, Products, supported
from m0kit_export.graphs import build_graphs, check_recipe
from m0kit_export.names import expected_shapes
from m0kit_parity.samples.checkpoints import model_config
from m0kit_quant.floats import Fp16Scheme, Fp32Scheme
from m0kit_quant.int4 import Int4Scheme
from m0kit_quant.int8 import Int8Scheme
from m0kit_quant.nf4 import Nf4Scheme
from m0kit_quant.recipe import DEVICES, Recipe, Rule
from m0kit_quant.weights import EMBEDDING

DEFAULTS = [(precision, device) for device in DEVICES for precision in supported(device)]


def recipe(*rules: dict[str, Any], **others: Any) -> Recipe:
    return Recipe.from_dict({"precision": "mine", "weights": list(rules), **others}, "mine.toml")


def matrices(shape: str) -> dict[str, tuple[int, int]]:
    """Of a model of that shape: matrices by their names, (out, in)."""
    shapes = expected_shapes(model_config(shape))  # type: ignore[arg-type]
    two = {name: s for name, s in shapes.items() if len(s) == 2}
    patches = shapes["visual.patch_embed.proj.weight"]
    return {**two, "visual.patch_embed.proj.weight": (patches[0], patches[1] * patches[2] * patches[3] * patches[4])}


# --- those that come along -------------------------------------------------------------------------


def test_there_is_one_for_every_precision_and_device() -> None:
    assert set(DEFAULTS) == {(precision, device) for precision in SCHEMES for device in ("cpu", "cuda")}


@pytest.mark.parametrize(("precision", "device"), DEFAULTS)
def test_a_default_recipe_fits_the_published_model(precision: str, device: str) -> None:
    found = Recipe.default(precision, device)
    assert (found.precision, found.device) == (precision, device)
    assert set(found.schemes) <= set(supported(device))
    assert precision in found.schemes
    names = matrices("full")
    found.check(names)
    stored = {name: found.scheme(name, shape) for name, shape in names.items()}
    for name, shape in names.items():
        assert stored[name].layout(shape)
        assert stored[name].table == (name == EMBEDDING)
    assert found.equalize == (precision in ("fp16", "int8", "int4", "nf4"))


@pytest.mark.parametrize(("precision", "device"), DEFAULTS)
def test_what_meets_pixels_and_what_makes_the_score_stay_floats(precision: str, device: str) -> None:
    found = Recipe.default(precision, device)
    for name, shape in matrices("full").items():
        if name.startswith(("score.", "visual.patch_embed.")):
            assert found.scheme(name, shape).is_float


@pytest.mark.parametrize("device", DEVICES)
def test_nearly_all_of_the_products_have_the_bits_of_the_name(device: str) -> None:
    names = {name: shape for name, shape in matrices("full").items() if name.startswith("model.layers.")}
    every = sum(rows * columns for rows, columns in names.values())
    for precision in supported(device):
        found = Recipe.default(precision, device)
        named = sum(n * k for name, (n, k) in names.items() if found.scheme(name, (n, k)).name == precision)
        assert named >= 0.94 * every  # all but one layer of 28, and in int4 keys and values


@pytest.mark.parametrize(("precision", "device"), DEFAULTS)
def test_graphs_can_be_built_of_a_default_recipe(precision: str, device: str) -> None:
    graphs = build_graphs(model_config("wide" if precision == "int4" else "tiny"), Recipe.default(precision, device))
    assert {weight.scheme.name for graph in graphs.values() for weight in graph.weights} >= {precision}


@pytest.mark.parametrize(("word", "near"), [("int9", "int8"), ("fp23", "fp32"), ("nf", "nf4"), ("INT4", None)])
def test_an_unknown_precision_is_named_with_those_near_it(word: str, near: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.default(word)
    assert str(caught.value).startswith(f"precision {word!r} is not known")
    assert str(caught.value).endswith("Choose one of fp32, fp16, bf16, int8, int4, nf4.")
    if near:
        assert "did you mean" in str(caught.value)
        assert near in str(caught.value).split("?")[0]


def test_what_a_device_has_no_kernels_for_is_refused_with_what_works_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "int8", Products("MatMulIntegerToFloat", ("cpu",)))
    said = r"int8 has no kernels on cuda in ONNX Runtime; there fp32, fp16, bf16, int4, nf4 work\.$"
    with pytest.raises(RecipeError, match=f"^{said}"):
        Recipe.default("int8", "cuda")
    with pytest.raises(RecipeError, match=rf"^mine\.toml: {said}"):
        recipe({"match": "a", "scheme": "fp16"}, {"match": "*", "scheme": "int8"}, device="cuda")


# --- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "device"), DEFAULTS)
def test_a_default_recipe_survives_the_manifest(precision: str, device: str) -> None:
    found = Recipe.default(precision, device)
    assert Recipe.from_dict(found.to_dict(), "manifest") == found


rules = st.one_of(
    st.builds(Rule, st.text(min_size=1), st.sampled_from([s for s in SCHEMES if s != "int4"])),
    st.builds(
        Rule,
        st.text(min_size=1),
        st.just("int4"),
        st.lists(st.sampled_from([32, 64, 128]), min_size=1, max_size=4).map(tuple),
    ),
)
recipes = st.builds(
    Recipe,
    st.text(min_size=1),
    st.just("cpu"),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(rules, min_size=1, max_size=5).map(tuple),
)


@given(recipes)
def test_any_recipe_survives_the_manifest(found: Recipe) -> None:
    assert Recipe.from_dict(found.to_dict(), "manifest") == found


@pytest.mark.parametrize("flag", ["rotate", "widen", "feedback"])
def test_a_recipe_that_does_not_do_so_says_nothing_of_it(flag: str) -> None:
    """So that its artifacts are those of before, byte for byte."""
    assert flag not in recipe(GOOD, **{flag: False}).to_dict()
    assert recipe(GOOD, **{flag: True}).to_dict()[flag] is True


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'precision = "größer"\nequalize = true\n[[weights]]\nmatch = "a.*"\nscheme = "int4"\nblock = 64\n'
        '[[weights]]\nmatch = "*"\nscheme = "int4"\n',
        "utf-8",
    )
    found = Recipe.read(path)
    rules = Rule("a.*", "int4", (64,)), Rule("*", "int4", (128, 64, 32))
    assert found == Recipe("größer", "cpu", rotate=False, equalize=True, widen=False, feedback=False, rules=rules)
    assert found.schemes == ("int4",)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as another editor saves it
    assert Recipe.read(path) == found


# --- which rule ------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_decides() -> None:
    found = recipe(
        {"match": "model.layers.0.*", "scheme": "fp32"},
        {"match": "model.layers.?.mlp.*", "scheme": "int8"},
        {"match": "*", "scheme": "nf4"},
    )
    name = "model.layers.{}.{}.weight"
    assert found.scheme(name.format(0, "mlp.up_proj"), (4, 64)) == Fp32Scheme()
    assert found.scheme(name.format(1, "mlp.up_proj"), (4, 64)) == Int8Scheme()
    assert found.scheme(name.format(12, "mlp.up_proj"), (4, 64)) == Nf4Scheme()
    assert found.scheme(name.format(1, "self_attn.q_proj"), (4, 64)) == Nf4Scheme()
    assert found.schemes == ("fp32", "int8", "nf4")


def test_patterns_know_upper_and_lower_case() -> None:
    found = recipe({"match": "Model.*", "scheme": "fp16"}, {"match": "*", "scheme": "fp32"})
    assert found.scheme("model.norm", (1, 1)).name == "fp32"


def test_the_embedding_is_a_table() -> None:
    found = recipe({"match": "*", "scheme": "int8"})
    assert found.scheme(EMBEDDING, (10, 64)) == Int8Scheme(table=True)
    assert recipe({"match": "*", "scheme": "int4"}).scheme(EMBEDDING, (10, 64)) == Int4Scheme(64, table=True)


@pytest.mark.parametrize(
    ("blocks", "inputs", "chosen"),
    [
        ([128, 64, 32], 256, 128),
        ([128, 64, 32], 192, 64),
        ([128, 64, 32], 96, 32),
        ([32, 128], 256, 32),
        (64, 128, 64),
        (None, 1536, 128),
        (None, 8960, 128),
        (None, 160, 32),
    ],
)
def test_the_first_block_that_divides_is_taken(blocks: Any, inputs: int, chosen: int) -> None:
    rule = {"match": "*", "scheme": "int4"} | ({} if blocks is None else {"block": blocks})
    assert recipe(rule).scheme("a", (5, inputs)) == Int4Scheme(chosen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("blocks", "inputs"), [([128, 64], 96), (32, 48), (None, 1176)])
def test_inputs_that_no_block_divides_are_refused_with_rules_that_work(blocks: Any, inputs: int, device: str) -> None:
    rule = {"match": "visual.*", "scheme": "int4"} | ({} if blocks is None else {"block": blocks})
    name, shape = "visual.blocks.3.mlp.fc2.weight", (5, inputs)
    with pytest.raises(RecipeError) as caught:
        recipe(rule, device=device).scheme(name, shape)
    said = str(caught.value)
    assert said.startswith(f"{name} has {inputs} inputs, which no block of ")
    assert "Put this before the rule 'visual.*':" in said
    instead = tomllib.loads(said[said.index("[[weights]]") :])["weights"]
    assert instead[0]["match"] == "visual.blocks.*.mlp.fc2.weight"  # of all layers at once
    stored = recipe(*instead, rule, device=device).scheme(name, shape)
    assert stored == (Int4Scheme(32) if inputs == 96 else {"cpu": Int8Scheme(), "cuda": Fp16Scheme()}[device])


@pytest.mark.parametrize("shape", ["tiny", "wide", "full"])
@pytest.mark.parametrize("rule", [{"scheme": "int4"}, {"scheme": "int4", "block": 128}, {"scheme": "nf4"}])
def test_following_the_messages_leads_to_a_recipe_that_fits(shape: str, rule: dict[str, Any]) -> None:
    rules = [{"match": "*", **rule}]
    for _ in range(20):
        try:
            check_recipe(recipe(*rules), model_config(shape))  # type: ignore[arg-type]
        except RecipeError as error:
            said = str(error)
            rules = [*tomllib.loads(said[said.index("[[weights]]") :])["weights"], *rules]
        else:
            return
    pytest.fail(f"still no recipe: {rules}")


def test_a_matrix_without_a_rule_is_named() -> None:
    with pytest.raises(
        RecipeError, match=r'^the recipe says nothing about b\.weight\. Add a last rule with match = "\*"'
    ):
        recipe({"match": "a.*", "scheme": "fp16"}).scheme("b.weight", (1, 1))


def test_a_scheme_that_cannot_store_a_table_is_refused_with_the_way_out() -> None:
    with pytest.raises(RecipeError, match=rf"^{EMBEDDING}: .*cannot store a table\. Put this before the rule '\*'"):
        recipe({"match": "*", "scheme": "nf4"}).scheme(EMBEDDING, (10, 64))


def test_a_rule_that_matches_nothing_is_refused_with_names_near_it() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "score.0.weight"]
    found = recipe({"match": "model.layers.0.mlp.upproj.weight", "scheme": "fp16"}, {"match": "*", "scheme": "fp32"})
    with pytest.raises(RecipeError) as caught:
        found.check(iter(names))
    assert "the rule 'model.layers.0.mlp.upproj.weight' matches no matrix of this model" in str(caught.value)
    assert "did you mean model.layers.0.mlp.up_proj.weight" in str(caught.value)
    recipe({"match": "score.*", "scheme": "fp16"}, {"match": "*", "scheme": "fp32"}).check(iter(names))


def test_building_graphs_checks_the_rules() -> None:
    found = recipe({"match": "visual.blocks.*.mpl.*", "scheme": "fp16"}, {"match": "*", "scheme": "fp32"})
    with pytest.raises(RecipeError, match=r"visual\.blocks\.\*\.mpl\.\*"):
        build_graphs(model_config("tiny"), found)


# --- what is wrong ---------------------------------------------------------------------------------

GOOD = {"match": "*", "scheme": "fp32"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"devise": "cpu"}, "'devise' is not known (did you mean device?). Known: precision, device"),
    "no precision": ({"precision": None}, "precision must be a name, got None"),
    "empty precision": ({"precision": ""}, "precision must be a name, got ''"),
    "unknown device": ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
    "device list": ({"device": ["cpu"]}, "device must be one of cpu, cuda, got ['cpu']"),
    "equalize text": ({"equalize": "yes"}, "equalize must be true or false, got 'yes'"),
    "rotate text": ({"rotate": "yes"}, "rotate must be true or false, got 'yes'"),
    "equalize number": ({"equalize": 1}, "equalize must be true or false, got 1"),
    "no rules": ({"weights": []}, "needs at least one [[weights]] rule"),
    "rules missing": ({"weights": None}, "needs at least one [[weights]] rule"),
    "one table": ({"weights": GOOD}, "needs at least one [[weights]] rule"),
    "rule text": ({"weights": [GOOD, "fp16"]}, "rule 2: expected a table with match and scheme, got 'fp16'"),
    "odd rule key": ({"weights": [GOOD | {"bloc": 32}]}, "rule 1: 'bloc' is not known (did you mean block?)"),
    "inputs text": (
        {"weights": [{**GOOD, "scheme": "int8", "inputs": "16"}]},
        "inputs must be of 8, 16 bits, got '16'",
    ),
    "inputs of three": ({"weights": [{**GOOD, "scheme": "int8", "inputs": 3}]}, "inputs must be of 8, 16 bits, got 3"),
    "inputs of floats": ({"weights": [{**GOOD, "inputs": 16}]}, "inputs belongs to int8, fp32 has none to choose"),
    "no match": ({"weights": [{"scheme": "fp16"}]}, "rule 1: match must be a pattern of tensor names, got None"),
    "match number": ({"weights": [GOOD | {"match": 3}]}, "rule 1: match must be a pattern of tensor names, got 3"),
    "no scheme": ({"weights": [{"match": "*"}]}, "rule 1: scheme None is not known"),
    "near scheme": ({"weights": [GOOD | {"scheme": "int9"}]}, "rule 1: scheme 'int9' is not known (did you mean int"),
    "scheme list": ({"weights": [GOOD | {"scheme": ["fp16"]}]}, "rule 1: scheme ['fp16'] is not known"),
    "block of fp32": ({"weights": [GOOD | {"block": 32}]}, "rule 1: block belongs to int4, fp32 has none to choose"),
    "block 16": ({"weights": [GOOD | {"scheme": "int4", "block": 16}]}, "block must be of 32, 64, 128, got 16"),
    "block text": ({"weights": [GOOD | {"scheme": "int4", "block": "32"}]}, "block must be of 32, 64, 128, got '32'"),
    "block list": ({"weights": [GOOD | {"scheme": "int4", "block": [64, 48]}]}, "of 32, 64, 128, got [64, 48]"),
    "no block": ({"weights": [GOOD | {"scheme": "int4", "block": []}]}, "block must be of 32, 64, 128, got []"),
    "block true": ({"weights": [GOOD | {"scheme": "int4", "block": True}]}, "of 32, 64, 128, got True"),
    "block half": ({"weights": [GOOD | {"scheme": "int4", "block": 32.0}]}, "of 32, 64, 128, got 32.0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_its_place(what: str) -> None:
    change, said = WRONG[what]
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"precision": "mine", "weights": [GOOD], **change}, "mine.toml")
    assert str(caught.value).startswith("mine.toml: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"precision = ", b"[[weights]", b"\xff\xfe", b'precision = "a"\nprecision = "b"'])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"^{path}: (not TOML|it is not text in UTF-8)"):
        Recipe.read(path)


RULE = '[[weights]]\nmatch = "*"\nscheme = "fp32"\n'
TOO_MUCH: dict[str, tuple[str, str]] = {
    "digits": (f'precision = "a"\nequalize = {"9" * 5000}\n{RULE}', "it holds a number of thousands of digits"),
    "depth": (f'precision = "a"\nequalize = {"[" * 50_000}', "it is nested too deeply"),
    "a key in parts": (".".join("a" * 100_000) + " = 1", "a line in it has more than 100 dots"),
    "rules": (f'precision = "a"\n{RULE * 4097}', "has 4097 rules; 4096 are read. Use patterns."),
    "bytes": ("#" * (1 << 18) + "\n#", "cannot be read (has more than the 262144 bytes that are read of it)"),
    "a pattern": (
        f'precision = "a"\n{RULE.replace("*", "*a" * 200)}',
        "match must be a pattern of tensor names, got '*a",
    ),
    "a name": (f'precision = "{"a" * 300}"\n{RULE}', "precision must be a name, got 'aaa"),
    "a date": (f"precision = 1979-05-27\n{RULE}", "precision must be a name, got datetime.date"),
    "no number": (f'precision = "a"\nequalize = nan\n{RULE}', "equalize must be true or false, got nan"),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_more_than_a_recipe_can_be_is_refused_at_once(tmp_path: Path, what: str) -> None:
    content, said = TOO_MUCH[what]
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.read(path)
    assert str(caught.value).startswith(f"{path}: {said}") or f": {said}" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.toml")
    for path in (tmp_path / "mine.toml", Path("/dev/zero")):
        with pytest.raises(RecipeError, match=rf"^{path}: cannot be read \(is a device, a pipe or a socket"):
            Recipe.read(path)


@pytest.mark.parametrize("match", ["*a" * 120 + "b", "[" * 250, "?" * 256, "[!-a]*" * 40, "[a--z]*", "***" * 80])
def test_no_pattern_of_a_recipe_takes_long_or_is_broken(match: str) -> None:
    names = [*matrices("full"), "a" * 100]
    with pytest.raises(RecipeError, match="matches no matrix of this model"):
        recipe({"match": match, "scheme": "fp32"}).check([name for name in names if match != "***" * 80])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(
            RecipeError, match=rf"^{path}: cannot be read \((No such file|is a folder).*\)\. Give a TOML"
        ):
            Recipe.read(path)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([*SCHEMES, "*", "cuda"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {}, optional={"match": anything, "scheme": st.sampled_from([*SCHEMES]) | anything, "block": anything, "x": anything}
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "precision": anything | st.just("mine"),
            "device": anything | st.sampled_from(DEVICES),
            "equalize": anything | st.booleans(),
            "weights": anything | st.lists(entries | anything, max_size=3),
            "other": anything,
        },
    )
)
def test_whatever_a_manifest_holds_is_a_recipe_or_a_recipe_error(raw: dict[str, Any]) -> None:
    try:
        found = Recipe.from_dict(raw, "place")
    except RecipeError as error:
        assert str(error).startswith("place: ")  # noqa: PT017  (either outcome is right)
    else:
        assert Recipe.from_dict(found.to_dict(), "place") == found


@given(st.text(string.printable, max_size=60))
def test_whatever_a_file_holds_is_a_recipe_or_a_recipe_error(text: str) -> None:
    for content in (text, f'precision = "a"\n{text}', f'precision = "a"\n[[weights]]\n{text}'):
        try:
            Recipe.from_toml(content.encode(), "place")
        except RecipeError as error:
            assert str(error).startswith("place: ")  # noqa: PT017  (either outcome is right)
