"""docs/artifact.md is the contract as the code has it, and docs/versions.md names the numbers that count."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import m0kit
from m0kit.artifact.manifest import FORMAT, FORMAT_VERSION
from m0kit.artifact.ports import KV, GraphPorts, Kept, Port, decoder_name, expected_ports, set_graphs
from m0kit.jobs import journal
from m0kit.keeping import tables
from m0kit_parity.proof import golden
from m0kit_parity.samples.checkpoints import model_config

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "artifact.md").read_text("utf-8")
GRAPHS = ("vision", "head", *map(decoder_name, KV), "vision.cuda", "decoder.cuda")
Piece = tuple[int, int, int, int, int, int, int, int, int]
Past = dict[str, NDArray[Any]]
ROW = re.compile(r"^\| `([^`]+)` \| (\w+) \| `\[(.*)\]` \|", re.MULTILINE)


def told_of(name: str) -> GraphPorts:
    """The tables of the graph's section: what goes in, what comes out."""
    section = PAGE.partition(f"\n{'####' if name.endswith('.cuda') else '###'} `{name}`\n")[2].partition("\n##")[0]
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
    expected, told = expected_ports(model_config("full"), name), told_of(name)
    if name.startswith("decoder.kv"):  # the page says what is other than in "decoder"
        whole = told_of("decoder")
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
    on_gpus = {f"{graph}.onnx" for graph in set_graphs("cuda").values()}
    assert not (parts | fields | tops | answers | set(manifest["files"]) | on_gpus) - named


def test_the_head_for_gpus_has_the_ports_of_the_other() -> None:
    config = model_config("full")
    assert expected_ports(config, "head.cuda") == expected_ports(config, "head")
    assert "`head.cuda` with those of `head`" in PAGE


class Decoder:
    """Runs a decoder of an artifact by what the page says, and by nothing of m0kit."""

    def __init__(self, folder: Path, kv: Kept) -> None:
        self.model = json.loads((folder / "manifest.json").read_text("utf-8"))["model"]["decoder"]
        name = "decoder" if kv == "fp32" else f"decoder.kv-{kv}"
        self.session, self.kv = onnxruntime.InferenceSession(folder / f"{name}.onnx"), kv
        heads, width, self.layers = (self.model[field] for field in ("num_kv_heads", "head_dim", "num_layers"))
        stored = {"fp32": np.float32, "fp16": np.float16, "int8": np.uint8}[kv]
        self.none = {f"past_key_values.{at}": np.zeros((heads, 0, width), stored) for at in self.places()}
        if kv == "int8":
            self.none |= {f"{name}_table": np.zeros((1, 3, heads, width), np.float32) for name in list(self.none)}

    def places(self) -> list[str]:
        return [f"{layer}.{name}" for layer in range(self.layers) for name in ("key", "value")]

    def run(
        self, ids: list[int], places: list[int], pieces: list[Piece], last: list[Piece], rows: list[int], past: Past
    ) -> Past:
        """Fills up to multiples of 4, and gives all outputs without what fills up."""
        fill, pairs = -len(ids) % 4, -len(rows) % 4 or 4 * (not rows)
        pieces = pieces + [(r, r + 1, 0, 0, r, r + 1, 0, 0, 0) for r in range(len(ids), len(ids) + fill)]
        last = last + [(i, i + 1, 0, 0, 0, 1, 0, 0, 0) for i in range(len(rows), len(rows) + pairs)]
        feeds = {
            "token_ids": np.array(ids + ids[:1] * fill),
            "positions": np.tile(places + places[:1] * fill, (3, 1)),
            "image_embeds": np.zeros((0, self.model["hidden_size"]), np.float32),
            "image_token_index": np.zeros(0, np.int64),
            "pieces": np.array(pieces),
            "last_index": np.array(rows + [0] * pairs),
            "last_pieces": np.array(last),
        }
        names = ["hidden", *(f"present.{at}" for at in self.places())]
        out = dict(zip(names, self.session.run(names, feeds | self.none | past), strict=True))
        present = {at: out[f"present.{at}"][:, : len(ids)] for at in self.places()}
        return {"hidden": out["hidden"][: len(rows)], **present}

    def kept(self, present: Past) -> Past:
        """What a run gave for a document's prefix, as a past."""
        if self.kv != "int8":
            return {f"past_key_values.{at}": present[at] for at in self.places()}
        past: Past = {}
        for at in self.places():
            values = present[at]  # (K, T, C)
            low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
            scale = np.maximum(high - low, 1e-9) / 255
            past[f"past_key_values.{at}"] = np.rint((values - low) / scale).astype(np.uint8)
            past[f"past_key_values.{at}_table"] = np.stack([scale[:, 0], low[:, 0], values[:, 0]])[None]
        return past


# Of hidden states, which go up to 3. fp32: the same rows through the same kernels, but where a CPU's sums differ. The
# others round keys and values, to 1/2000 and to 1/500 of their size. Measured: 0, 6e-4, 1e-2.
@pytest.mark.parametrize(("kv", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-3), ("int8", 3e-2)])
def test_pieces_mean_what_the_page_says(kv: Kept, tolerance: float, tiny_artifact: Path) -> None:
    decoder = Decoder(tiny_artifact, kv)
    document, queries = [5, 9, 11, 3, 70, 8, 21, 4, 33], [[12, 6, 100], [7, 40, 41, 42, 100]]
    P, ends = len(document), [len(document) + len(query) for query in queries]
    alone = [
        decoder.run([*document, *query], list(range(T)), [(0, T, 0, 0, 0, T, 0, 0, 0)],
                    [(0, 1, 0, 0, 0, T, 0, 0, 0)], [T - 1], {})["hidden"]
        for query, T in zip(queries, ends, strict=True)
    ]  # fmt: skip
    # One document in a run, with two queries behind it.
    S, E = ends[0], ends[0] + len(queries[1])
    shared = decoder.run(
        [*document, *queries[0], *queries[1]],
        [*range(S), *range(P, ends[1])],
        [(0, P, 0, 0, 0, P, 0, 0, 0), (P, S, 0, P, P, S, 0, 0, 0), (S, E, 0, P, S, E, 0, 0, 0)],
        [(0, 1, 0, P, P, S, 0, 0, 0), (1, 2, 0, P, S, E, 0, 0, 0)],
        [S - 1, E - 1],
        {},
    )["hidden"]
    np.testing.assert_allclose(shared, np.concatenate(alone), atol=1e-5)
    # The document first, then one query on what was kept of it.
    present = decoder.run(document, list(range(P)), [(0, P, 0, 0, 0, P, 0, 0, 0)], [], [], {})
    T = len(queries[1])
    piece = (0, T, 0, 0, 0, T, 0, P, 0)
    later = decoder.run(
        queries[1], list(range(P, P + T)), [piece], [(0, 1, *piece[2:])], [T - 1], decoder.kept(present)
    )["hidden"]
    np.testing.assert_allclose(later, alone[1], atol=tolerance)


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
        ("index format", tables.FORMAT_VERSION),
        ("journal format", journal.FORMAT),
        ("golden format", golden.VERSION),
    ],
)
def test_a_version_is_the_one_in_the_code(what: str, now: object) -> None:
    text = (DOCS / "versions.md").read_text("utf-8")
    (told,) = re.findall(rf"^\| {what} \| [^|]* \| ([^|]*) \|", text, re.MULTILINE)
    assert told == str(now)
