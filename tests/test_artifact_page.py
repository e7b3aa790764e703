"""docs/artifact.md is the contract as the code has it, and docs/versions.md names the numbers that count."""

import json
import re
from pathlib import Path

import pytest

import m0kit
from m0kit.artifact.manifest import FORMAT, FORMAT_VERSION
from m0kit.artifact.ports import KV, GraphPorts, Port, decoder_name, expected_ports
from m0kit.jobs import journal
from m0kit.keeping import store
from m0kit_parity.proof import golden
from m0kit_parity.samples.checkpoints import model_config

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "artifact.md").read_text("utf-8")
GRAPHS = ("vision", "head", *map(decoder_name, KV))
ROW = re.compile(r"^\| `([^`]+)` \| (\w+) \| `\[(.*)\]` \|", re.MULTILINE)


def tables(name: str) -> GraphPorts:
    """The tables of the graph's section: what goes in, what comes out."""
    section = PAGE.partition(f"\n### `{name}`\n")[2].partition("\n##")[0]
    inputs, outputs = section.split("| output |") if "| output |" in section else (section, "")
    return GraphPorts(ports(inputs), ports(outputs))


def ports(text: str) -> tuple[Port, ...]:
    return tuple(Port(name, dtype, shape_of(shape)) for name, dtype, shape in ROW.findall(text))


def shape_of(text: str) -> tuple[int | str, ...]:
    return tuple(int(word) if word.isdigit() else word for word in text.split(", "))


def once(found: tuple[Port, ...]) -> list[Port]:
    """With one layer in the place of all, which must be alike."""
    written = [Port(re.sub(r"\.\d+\.", ".{i}.", port.name), port.dtype, port.shape) for port in found]
    return list(dict.fromkeys(written))


@pytest.mark.parametrize("name", GRAPHS)
def test_every_port_stands_in_the_page_with_its_type_and_shape(name: str) -> None:
    expected, told = expected_ports(model_config("full"), name), tables(name)
    if name.startswith("decoder.kv"):  # the page says what is other than in "decoder"
        whole = tables("decoder")
        told = GraphPorts(replaced(whole.inputs, told.inputs), replaced(whole.outputs, told.outputs))
    assert once(expected.inputs) == list(told.inputs)
    assert once(expected.outputs) == list(told.outputs)


def replaced(ports: tuple[Port, ...], others: tuple[Port, ...]) -> tuple[Port, ...]:
    by_name = {port.name: port for port in ports} | {port.name: port for port in others}
    return tuple(by_name.values())


def test_every_file_and_field_of_a_manifest_stands_in_the_page(tiny_artifact: Path) -> None:
    manifest = json.loads((tiny_artifact / "manifest.json").read_text("utf-8"))
    named = set(re.findall(r"`([\w.-]+)`", PAGE))
    parts = {f"model.{part}" for part in manifest["model"]}
    fields = {field for part in manifest["model"].values() for field in part}
    tops = set(manifest) - {"model"}
    answers = set(manifest["known_answers"]) | set(manifest["known_answers"]["pairs"][0])
    assert not (parts | fields | tops | answers | set(manifest["files"])) - named


def test_the_numbers_of_the_published_model_are_the_page_s() -> None:
    rows = dict(re.findall(r"^\| `model\.(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    for part, fields in model_config("full").to_dict().items():
        for field, told in re.findall(r"`(\w+)` (\d[\d.]*)(?![\d/])", rows[part]):
            assert float(told) == fields[field], f"{part}.{field}"


def test_the_page_is_of_the_format_that_is_written() -> None:
    assert f'| `format` | `"{FORMAT}"` |' in PAGE
    assert f"| `format_version` | {FORMAT_VERSION}: " in PAGE


@pytest.mark.parametrize(
    ("what", "now"),
    [
        ("package", m0kit.__version__),
        ("artifact format", FORMAT_VERSION),
        ("index format", store.FORMAT_VERSION),
        ("journal format", journal.FORMAT),
        ("golden format", golden.VERSION),
    ],
)
def test_a_version_is_the_one_in_the_code(what: str, now: object) -> None:
    text = (DOCS / "versions.md").read_text("utf-8")
    (told,) = re.findall(rf"^\| {what} \| [^|]* \| ([^|]*) \|", text, re.MULTILINE)
    assert told == str(now)
