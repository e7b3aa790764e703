"""The README names only commands, options, extras and targets that exist."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from m0kit import Reranker
from m0kit.cli import cli
from m0kit_export.export import export_artifact
from m0kit_export.graphs import check_recipe
from m0kit_parity.checkpoints import model_config
from m0kit_parity.cli import SMALL
from m0kit_quant.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
# Indented blocks and code in a line; a comment behind a command is not part of it.
SPANS = [*re.findall(r"^    (.+)$", README, re.MULTILINE), *re.findall(r"`([^`\n]+)`", README)]
COMMANDS = sorted({span.partition("  #")[0].strip() for span in SPANS if span.startswith("m0kit ")})


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_and_its_options_exist(line: str) -> None:
    command: click.Command = cli
    context = click.Context(cli, info_name="m0kit")
    words = shlex.split(line)[1:]
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0].split("|")[0])
        if found is None:  # `parity CHECKPOINT ARTIFACT`: the group's own command
            assert command.name == "parity", f"no command {words[0]}"
            from m0kit_parity.cli import both

            found = both
        else:
            words = words[1:]
        context = click.Context(found, parent=context, info_name=found.name)
        command = found
    known = {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in words if word.startswith("-") and word not in known]
    assert not unknown, f"{line}: {unknown}, known are {sorted(known)}"


def test_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"\[(\w+)\]'", README))
    assert {"cpu", "gpu", "export", "optimum", "dev"} <= named <= set(extras)


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).is_file()]


def test_the_python_example_is_python_and_its_names_exist() -> None:
    example = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    compile(example, "README.md", "exec")
    used = set(re.findall(r"(?:Reranker|reranker)\.(\w+)\(", example))
    assert used == {"load", "score", "rerank"}
    for name in [*used, "predict", "rank", "compute_score", "evaluate"]:
        assert callable(getattr(Reranker, name))
        assert f"`{name}`" in README or name in used


def test_the_recipe_stores_the_small_checkpoint_and_fits_the_published_model(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.toml").write_text(text, "utf-8")
    recipe = Recipe.read(tmp_path / "mine.toml")
    check_recipe(recipe, model_config("full"))
    export_artifact(SMALL / "base", tmp_path / "mine", recipe=recipe, progress=False)
    good, bad = Reranker.load(tmp_path / "mine").score([("a red bicycle", "red bicycle"), ("a red bicycle", "x = 1")])
    assert 0 < bad < 1
    assert 0 < good < 1
