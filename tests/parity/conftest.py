"""What parity's tests share: the tiny random checkpoint and the small trained one, each on both sides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from m0kit import Reranker
from m0kit.scoring.prompt import PromptBuilder
from m0kit_export.adapter import AdapterSpec
from m0kit_export.export import export_artifact
from m0kit_parity.proof.cases import Case
from m0kit_parity.proof.golden import Golden, record
from m0kit_parity.proof.report import Report, check
from m0kit_parity.reference import Reference
from m0kit_parity.samples.checkpoints import model_config
from m0kit_parity.samples.vocabulary import write_qwen2_tokenizer
from m0kit_parity.small.files import SMALL
from m0kit_quant.recipe import Recipe

Hold = Callable[..., Report]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that two are no faster, and slower beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small() -> Path:
    return SMALL / "base"


@pytest.fixture(scope="session")
def tiny_reference(tiny: Path) -> Reference:
    return Reference.load(tiny)


@pytest.fixture(scope="session")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Hold:
    """Export, record, check: the whole way of a checkpoint with its adapters through both sides."""

    def run(
        source: Path,
        cases: Sequence[Case],
        adapters: Mapping[Path, float] | None = None,
        precision: str = "fp32",
        recipe: Recipe | None = None,
    ) -> Report:
        recipe = recipe or Recipe.default(precision)
        folder = tmp_path_factory.mktemp("hold")
        specs = [AdapterSpec(path, weight) for path, weight in (adapters or {}).items()]
        export_artifact(source, folder / "artifact", adapters=specs, recipe=recipe, progress=False)
        reference = Reference.load(source, adapters=[(spec.path, spec.weight) for spec in specs])
        given: dict[str, Any] = {"model": reference.config, "norm": reference.norm, "command": "record"}
        record(folder / "golden", cases, reference, provenance={}, **given)
        reranker = Reranker.load(folder / "artifact", threads=1)
        return check(Golden.open(folder / "golden"), reranker, precision, {}, rotated=recipe.rotate)

    return run


@pytest.fixture(scope="module", params=["tiny", "real"])
def prompts(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    """With the small vocabulary, where words are many tokens, and with the real one, where they are one."""
    if request.param == "tiny":
        return PromptBuilder(tiny / "tokenizer.json", model_config("tiny").prompt)
    folder = tmp_path_factory.mktemp("qwen2")
    write_qwen2_tokenizer(folder)
    return PromptBuilder(folder / "tokenizer.json", model_config("wide").prompt)
