"""What was recorded comes back to the bit; what was changed since is noticed."""

import copy
import dataclasses
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m0kit.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from m0kit.errors import CheckpointError, InputError, OutputError
from m0kit.schema import exactly
from m0kit.trace import Trace
from m0kit_parity.proof.cases import Case, Content, Group, draw_page, encode, text_content
from m0kit_parity.proof.compare import Verdict, compare_pair
from m0kit_parity.proof.golden import Golden, record
from m0kit_parity.proof.tolerances import tolerances

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


def test_the_gain_of_the_final_norm_comes_back_to_the_bit(tmp_path: Path) -> None:
    gain = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    assert np.array_equal(recorded(tmp_path / "g", norm=gain).norm(), gain)


def test_a_folder_without_the_gain_says_how_to_record_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no gain of the final norm.*record it again: {COMMAND}"):
        recorded(tmp_path / "g").norm()


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (np.ones(31, np.float32), "is of another model"),
        (np.ones((32, 1), np.float32), "is of another model"),
        (np.ones(32), "is of another model"),
        (np.full(32, np.nan, np.float32), "is damaged"),
    ],
    ids=["short", "table", "float64", "nan"],
)
def test_a_gain_that_is_none_of_the_model_is_refused(tmp_path: Path, gain: Any, said: str) -> None:
    with pytest.raises(InputError, match=rf"norm\.npy {said}.*record it again"):
        recorded(tmp_path / "g", norm=gain).norm()


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
        manifest["files"][name] = {"bytes": 9, "sha256": "0"}
        edit(tmp_path / "g", **manifest)
        with pytest.raises(InputError, match="does not know"):
            Golden.open(tmp_path / "g").read("texts")


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    recorded(tmp_path / "g")
    path = tmp_path / "g" / "texts.npz"
    np.savez(path, allow_pickle=True, **{"0.0.token_ids": np.array([{}], dtype=object)})
    files = json.loads((tmp_path / "g" / "manifest.json").read_text())["files"]
    files["texts.npz"] = {"bytes": len(path.read_bytes()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit(tmp_path / "g", files=files)
    with pytest.raises(InputError, match="damaged"):
        Golden.open(tmp_path / "g").read("texts")


def npz(folder: Path, members: dict[str, bytes] | bytes, **options: Any) -> None:
    """Put another archive in the place of the arrays of "texts", with a manifest that fits."""
    data = members
    if isinstance(members, dict):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", **{"compression": zipfile.ZIP_DEFLATED, **options}) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        data = stream.getvalue()
    assert isinstance(data, bytes)
    (folder / "texts.npz").write_bytes(data)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files["texts.npz"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder, files=files)


def npy(array: Any, **header: Any) -> bytes:
    stream = io.BytesIO()
    described = {**np.lib.format.header_data_from_array_1_0(array), **header}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue() + array.tobytes()


NINE = np.arange(9)
ONE = npy(NINE)


def overlapping() -> bytes:
    """Two entries of the directory that lead to the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("0.0.token_ids.npy", ONE)
        other = copy.copy(archive.filelist[0])
        other.filename = "0.0.hidden.npy"
        archive.filelist.append(other)
    return stream.getvalue()


def lying() -> bytes:
    """A gigabyte that its entry calls nine numbers."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.0.token_ids.npy", b"\0" * (1 << 26))
        archive.filelist[0].file_size = len(ONE)
    return stream.getvalue()


ARCHIVES: dict[str, tuple[Any, str]] = {
    "no archive": (b"PK\x03\x04", "BadZipFile"),
    "gigabytes": ({"0.0.token_ids.npy": b"\0" * (385 << 20)}, "it would unpack to 403701760 bytes, of which 3 pairs"),
    "more than it says": (lying(), "BadZipFile|not in numpy's format"),
    "members in one place": (overlapping(), "BadZipFile"),
    "a name outside": ({"../0.0.token_ids.npy": ONE}, r"an array is called '\.\./0\.0"),
    "a stage that is none": ({"0.0.secret.npy": ONE}, "an array is called '0.0.secret.npy'"),
    "a pair that is none": ("more", "an array called 7.0.hidden is of no pair"),
    "a stage less": ({"0.0.token_ids.npy": ONE}, "it lacks '0.0.positions'"),
    "packed by LZMA": (({"0.0.token_ids.npy": ONE}, {"compression": zipfile.ZIP_LZMA}), "otherwise than by deflate"),
    "a shape of 10¹²": (
        {"0.0.token_ids.npy": npy(NINE, shape=(10**12,))},
        r"of shape \(1000000000000,\) is not as long",
    ),
    "a negative shape": ({"0.0.token_ids.npy": npy(NINE, shape=(-3, -3))}, r"of shape \(-3, -3\) is not as long"),
    "texts": ({"0.0.token_ids.npy": npy(np.array(["a"]))}, "holds <U1, which is neither"),
    "fields": ({"0.0.token_ids.npy": npy(np.zeros(1, [("a", "i4")]))}, "neither float nor whole number"),
    "objects": ({"0.0.token_ids.npy": npy(np.zeros(9), descr="|O")}, "holds object, which is neither"),
    "a header without end": (
        {"0.0.token_ids.npy": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535},
        "an array is not in numpy's format",
    ),
    "a newer version": ({"0.0.token_ids.npy": ONE.replace(b"\x01\x00", b"\x03\x00", 1)}, "another version"),
    "no numbers": ({"0.0.hidden.npy": npy(np.array([1.0, np.nan]))}, "a value that is not finite"),
    "nothing": ({"0.0.hidden.npy": b""}, "an array is not in numpy's format"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_arrays_that_are_not_what_was_recorded_are_refused_by_name(tmp_path: Path, what: str) -> None:
    recorded(tmp_path / "g")
    members, message = ARCHIVES[what]
    options: dict[str, Any] = {}
    if members == "more":
        with zipfile.ZipFile(tmp_path / "g" / "texts.npz") as archive:
            members = {name: archive.read(name) for name in archive.namelist()} | {"7.0.hidden.npy": ONE}
    if isinstance(members, tuple):
        members, options = members
    npz(tmp_path / "g", members, **options)
    with pytest.raises(InputError, match=f"case 'texts' is damaged .*(?:{message})"):
        Golden.open(tmp_path / "g").read("texts")


def test_a_file_that_is_larger_than_the_manifest_says_is_not_read(tmp_path: Path) -> None:
    golden = recorded(tmp_path / "g")
    with open(tmp_path / "g" / "texts.npz", "r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(InputError, match=r"texts\.npz: missing or unreadable \(has more than the \d+ bytes"):
        golden.read("texts")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    golden = recorded(tmp_path / "g")
    (tmp_path / "g" / "texts.npz").unlink()
    os.mkfifo(tmp_path / "g" / "texts.npz")
    with pytest.raises(InputError, match=r"texts\.npz: missing or unreadable \(is a device, a pipe"):
        golden.read("texts")
    (tmp_path / "g" / "manifest.json").unlink()
    (tmp_path / "g" / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"manifest\.json: is a device, a pipe"):
        Golden.open(tmp_path / "g")
    with pytest.raises(OutputError, match="choose another place"):
        recorded(tmp_path / "g")


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return apply


FIRST = ("cases", 0, "groups", 0, "documents", 0)
MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a logit that is none": (put(*FIRST, "logit", value="nan"), "damaged .nan is no score"),
    "a score without end": (put(*FIRST, "score", value="0x1p+99999"), "is damaged"),
    "a score as a number": (put(*FIRST, "score", value=0.5), r"Expected `str`, got `float`"),
    "no documents": (put("cases", 0, "groups", 0, "documents", value=[]), "Expected `array` of length >= 1"),
    "no groups": (put("cases", 0, "groups", value={}), "Expected `array`, got `object`"),
    "an input of another form": (put(*FIRST, "input", "form", value="eps"), "Invalid enum value 'eps'"),
    "layers as a number": (put("layers", value=1), r"Expected `bool`, got `int` - at `\$\.layers`"),
    "bytes in fractions": (put("files", "texts.npz", "bytes", value=1.5), "Expected `int`, got `float`"),
    "fewer than no bytes": (put("files", "texts.npz", "bytes", value=-1), "Expected `int` >= 0"),
    "a command that is none": (put("command", value=["rm"]), r"Expected `str`, got `array` - at `\$\.command`"),
    "two cases of one name": (put("cases", 1, "name", value="texts"), "two of its cases have one name"),
    "a number without end": (put("layers", value=10**400), "a whole number of more than 64 bits"),
    "no number": (put("provenance", value={"seed": float("nan")}), "it holds NaN"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_of_another_form_is_refused_by_name(tmp_path: Path, what: str) -> None:
    recorded(tmp_path / "g")
    change, message = MANIFESTS[what]
    manifest = json.loads((tmp_path / "g" / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "g" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        Golden.open(tmp_path / "g").read("texts")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path / "g")
    path = tmp_path / "g" / "manifest.json"
    path.write_text(path.read_text().replace('"layers": false', '"layers": true, "layers": false'))
    with pytest.raises(InputError, match=r"not a readable JSON file \(it has the key 'layers' twice"):
        Golden.open(tmp_path / "g")


def test_a_text_that_is_none_is_damage(tmp_path: Path) -> None:
    recorded(tmp_path / "g")
    manifest = json.loads((tmp_path / "g" / "manifest.json").read_text())
    name = manifest["cases"][0]["groups"][0]["query"]["file"]
    (tmp_path / "g" / name).write_bytes(b"\xff")
    manifest["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"\xff").hexdigest()}
    edit(tmp_path / "g", **manifest)
    with pytest.raises(InputError, match="case 'texts' is damaged"):
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
    golden.require(exactly(json.loads(json.dumps(MODEL.to_dict())), ModelConfig))
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


def test_names_of_files_need_not_be_ascii_nor_unicode(tmp_path: Path) -> None:
    case = dataclasses.replace(CASES[0], name="prüfung")
    command = f"m0kit parity record {os.fsdecode(b'caf' + bytes([0xE9]))} -o golden"
    golden = recorded(tmp_path / "g", cases=(case,), command=command)
    assert golden.command == "m0kit parity record caf? -o golden"
    assert len(golden.read("prüfung").pairs) == 3
