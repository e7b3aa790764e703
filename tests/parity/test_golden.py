"""What was recorded comes back to the bit; what was changed since is noticed."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m0kit.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from m0kit.errors import CheckpointError, InputError, OutputError
from m0kit.trace import Trace
from m0kit_parity.cases import Case, Content, Group, draw_page, encode, text_content
from m0kit_parity.compare import Verdict, compare_pair
from m0kit_parity.golden import Golden, record
from m0kit_parity.tolerances import tolerances

MODEL = ModelConfig(
    DecoderConfig(32, 2, 2, 1, 16, 64, 1e-6, 1e6, (2, 3, 3), 512, 1024),
    VisionConfig(2, 32, 2, 64, 3, 14, 2, 2, 1e-6, 1e4),
    ImageConfig(3136, 602112, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), 1 / 255, 14, 2, 2),
    PromptConfig(500, 501, 502),
)
COMMAND = "m0kit parity record CHECKPOINT -o golden"


class Fake:
    """A reference whose numbers follow from its inputs, as a model's do."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.seen: list[tuple[Any, Any]] = []

    def trace(self, pair: tuple[Any, Any], layers: bool = False) -> Trace:
        self.seen.append(pair)
        images = sum(not isinstance(content, str) for content in pair)
        rng = np.random.RandomState(len(self.seen))

        def floats(*shape: int) -> Any:
            return rng.standard_normal(shape).astype(np.float32)

        trace = Trace(
            token_ids=rng.randint(0, 500, 9),
            positions=rng.randint(0, 9, (3, 9)),
            grid_thw=np.array([[1, 2, 2]] * images, dtype=np.int64).reshape(images, 3),
            patches=tuple(floats(4, 1176) for _ in range(images)),
            image_embeds=tuple(floats(1, 32) for _ in range(images)),
            hidden=floats(32),
            logit=float(rng.standard_normal()),
            score=float(rng.random_sample()),
            layers=floats(2, 32) if layers else None,
        )
        return dataclasses.replace(trace, **self.changes)


PAGE = encode(draw_page(["page"], (56, 56)))
CASES = (
    Case(
        "texts",
        "why not",
        "text-text",
        False,
        (
            Group(text_content("q\r\n é"), (text_content("d"), text_content("e"))),
            Group(text_content("r"), (text_content("d"),)),
        ),
    ),
    Case(
        "pages",
        "why",
        "image-image",
        False,
        (Group(Content("pillow", PAGE), (Content("file", PAGE), Content("file", PAGE))),),
    ),
)


def recorded(folder: Path, **options: Any) -> Golden:
    arguments = {"model": MODEL, "command": COMMAND, "provenance": {"seed": 0}, **options}
    record(folder, arguments.pop("cases", CASES), arguments.pop("tracer", Fake()), **arguments)
    return Golden.open(folder)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("layers", [False, True])
def test_every_stage_comes_back_to_the_bit(tmp_path: Path, layers: bool) -> None:
    golden = recorded(tmp_path / "g", layers=layers)
    again = Fake()
    assert golden.case_names == ("texts", "pages")
    pairs = [pair for name in golden.case_names for pair in golden.read(name).pairs]
    assert [(p.group, p.document) for p in pairs] == [(0, 0), (0, 1), (1, 0), (0, 0), (0, 1)]
    for pair in pairs:
        expected = again.trace((pair.inputs[0].value(), pair.inputs[1].value()), layers)
        results = compare_pair(expected, pair.trace, tolerances("fp32"), layers)
        assert all(r.verdict is Verdict.PASS and r.value == 0 for r in results)
        assert (pair.trace.logit, pair.trace.score) == (expected.logit, expected.score)
        assert (pair.trace.layers is not None) == layers
        assert pair.drifted == ()


def test_inputs_come_back_as_they_were_given(tmp_path: Path) -> None:
    golden = recorded(tmp_path / "g")
    assert golden.read("texts").pairs[0].inputs[0].value() == "q\r\n é"
    query, document = golden.read("pages").pairs[0].inputs
    assert (query.form, query.data) == ("pillow", PAGE)
    assert (document.form, document.value()) == ("file", PAGE)
    # one page, though it stands in four places
    assert len([p for p in (tmp_path / "g" / "inputs").iterdir() if p.suffix == ".png"]) == 1


def test_two_recordings_of_one_thing_are_equal_but_for_the_date(tmp_path: Path) -> None:
    recorded(tmp_path / "a")
    recorded(tmp_path / "b")
    for path in (tmp_path / "a").rglob("*"):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == other.read_bytes()


def test_provenance_is_kept(tmp_path: Path) -> None:
    golden = recorded(tmp_path / "g", provenance={"seed": 7, "versions": {"torch": "1"}})
    assert golden.command == COMMAND
    assert golden.provenance == {"seed": 7, "versions": {"torch": "1"}}
    assert golden.created.endswith("+00:00")


def test_nothing_is_left_behind_when_the_reference_fails(tmp_path: Path) -> None:
    class Broken(Fake):
        def trace(self, pair: tuple[Any, Any], layers: bool = False) -> Trace:
            if len(self.seen) == 3:
                raise InputError("no")
            return super().trace(pair, layers)

    recorded(tmp_path / "g")
    before = (tmp_path / "g" / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="no"):
        recorded(tmp_path / "g", tracer=Broken())
    assert [p.name for p in tmp_path.iterdir()] == ["g"]
    assert (tmp_path / "g" / "manifest.json").read_bytes() == before


def test_a_link_means_the_folder_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "g").symlink_to(Path("disk") / "golden")
    recorded(tmp_path / "g")
    assert recorded(tmp_path / "g", cases=CASES[:1]).case_names == ("texts",)
    assert (tmp_path / "g").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["golden"]


def test_a_golden_folder_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    recorded(tmp_path / "g")
    assert recorded(tmp_path / "g", cases=CASES[:1]).case_names == ("texts",)
    assert not (tmp_path / "g" / "pages.npz").exists()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("work", "file"):
        with pytest.raises(OutputError, match="choose another place"):
            recorded(tmp_path / name)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "dear"


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        recorded(tmp_path / "file" / "golden")


@pytest.mark.parametrize("stage", ["hidden", "score", "image_embeds"])
def test_a_reference_with_nan_is_refused_when_recorded(tmp_path: Path, stage: str) -> None:
    bad = {
        "hidden": np.full(32, np.nan, np.float32),
        "score": float("nan"),
        "image_embeds": (np.full((1, 32), np.inf, np.float32),),
    }
    with pytest.raises(CheckpointError, match=f"case texts, query 0, document 0: .* {stage}"):
        recorded(tmp_path / "g", tracer=Fake(**{stage: bad[stage]}))
    assert list(tmp_path.iterdir()) == []


def test_two_cases_of_one_name_or_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="each name once"):
        recorded(tmp_path / "g", cases=(CASES[0], CASES[0]))
    with pytest.raises(InputError, match="none"):
        recorded(tmp_path / "g", cases=())


@pytest.mark.parametrize("name", ["texts.npz", "inputs/*.txt", "inputs/*.png"])
def test_a_changed_or_missing_file_is_noticed(tmp_path: Path, name: str) -> None:
    golden = recorded(tmp_path / "g")
    case = "pages" if name.endswith("png") else "texts"
    path = sorted((tmp_path / "g").glob(name))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="changed since") as caught:
        golden.read(case)
    assert COMMAND in str(caught.value)
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        golden.read(case)


def test_a_file_outside_the_folder_is_never_read(tmp_path: Path) -> None:
    recorded(tmp_path / "g")
    manifest = json.loads((tmp_path / "g" / "manifest.json").read_text())
    for name in ("../secret.npz", "/etc/hostname", "inputs/../../x"):
        manifest["cases"][0]["file"] = name
        manifest["files"][name] = {"sha256": "0"}
        edit(tmp_path / "g", **manifest)
        with pytest.raises(InputError, match="does not know"):
            Golden.open(tmp_path / "g").read("texts")


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    import hashlib

    recorded(tmp_path / "g")
    path = tmp_path / "g" / "texts.npz"
    np.savez(path, allow_pickle=True, **{"0.0.token_ids": np.array([{}], dtype=object)})
    files = json.loads((tmp_path / "g" / "manifest.json").read_text())["files"]
    files["texts.npz"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(tmp_path / "g", files=files)
    with pytest.raises(InputError, match="damaged"):
        Golden.open(tmp_path / "g").read("texts")


def test_pixels_that_decode_differently_here_are_named(tmp_path: Path) -> None:
    recorded(tmp_path / "g")
    cases = json.loads((tmp_path / "g" / "manifest.json").read_text())["cases"]
    cases[1]["groups"][0]["documents"][1]["input"]["pixels_sha256"] = "0" * 64
    edit(tmp_path / "g", cases=cases)
    pairs = Golden.open(tmp_path / "g").read("pages").pairs
    assert [pair.drifted for pair in pairs] == [(), ("document",)]


def test_the_same_model_is_accepted_and_another_one_named_with_the_command(tmp_path: Path) -> None:
    golden = recorded(tmp_path / "g")
    golden.require(MODEL)
    golden.require(ModelConfig.from_dict(json.loads(json.dumps(MODEL.to_dict()))))
    image = dataclasses.replace(MODEL.image, max_pixels=300_000)
    with pytest.raises(InputError, match=r"image\.max_pixels is 602112 there and 300000") as caught:
        golden.require(dataclasses.replace(MODEL, image=image))
    assert COMMAND in str(caught.value)
    decoder = dataclasses.replace(MODEL.decoder, num_layers=3, vocab_size=600)
    with pytest.raises(InputError, match=r"decoder\.num_layers"):
        golden.require(dataclasses.replace(MODEL, decoder=decoder))


def test_layers_that_were_not_recorded_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{COMMAND} --layers"):
        recorded(tmp_path / "g").require(MODEL, layers=True)
    recorded(tmp_path / "h", layers=True).require(MODEL, layers=True)


def test_another_format_version_says_how_to_record_again(tmp_path: Path) -> None:
    recorded(tmp_path / "g")
    edit(tmp_path / "g", version=99)
    with pytest.raises(InputError, match=f"version 99.*{COMMAND}"):
        Golden.open(tmp_path / "g")


def test_a_folder_that_is_no_golden_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="m0kit parity record CHECKPOINT"):
        Golden.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not a readable JSON"):
        Golden.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "artifact"}')
    with pytest.raises(InputError, match="not a golden folder"):
        Golden.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "m0kit golden", "version": 1}')
    with pytest.raises(InputError, match="no cases, command"):
        Golden.open(tmp_path)


def test_a_golden_folder_may_be_moved(tmp_path: Path) -> None:
    recorded(tmp_path / "g")
    shutil.move(tmp_path / "g", tmp_path / "elsewhere")
    assert len(Golden.open(tmp_path / "elsewhere").read("pages").pairs) == 2


def test_an_unknown_case_lists_the_recorded_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it holds texts, pages"):
        recorded(tmp_path / "g").read("nope")
