"""The ports that a model must have, and how those that it does not have are told."""

from dataclasses import replace
from pathlib import Path

import pytest

from m0kit.artifact.manifest import read_manifest
from m0kit.artifact.ports import (
    GRAPHS,
    KV,
    SETS,
    GraphPorts,
    Port,
    check_ports,
    cuda_type,
    data_name,
    decoder_name,
    difference,
    expected_ports,
    past_names,
    present_names,
    set_graphs,
    table_names,
)
from m0kit_parity.samples.checkpoints import model_config

CONFIG = model_config("tiny")
NAMES = (*GRAPHS, *(decoder_name(kv) for kv in KV if kv != "fp32"))
PORTS = {name: expected_ports(CONFIG, name) for name in NAMES}
RUNS = {which: set_graphs(which) for which in SETS}
OF_SETS = {name: expected_ports(CONFIG, name) for own in RUNS.values() for name in own.values()}


def test_they_are_those_that_the_exporter_writes(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    names = (*NAMES, *(name for own in manifest.runs.values() for name in own.values()))
    assert manifest.graphs == {name: expected_ports(manifest.model, name) for name in names}


def test_graphs_of_the_model_pass_with_every_set_and_without_any() -> None:
    check_ports(CONFIG, PORTS, {}, None)
    check_ports(CONFIG, PORTS | OF_SETS, RUNS, "float16")


def test_a_graph_of_a_set_is_named_after_the_portable_one_and_reads_its_data() -> None:
    assert set_graphs("cpu") == {"vision": "vision.cpu"}
    assert OF_SETS["vision.cpu"] == PORTS["vision"]  # so it is fed alike
    assert {data_name(name) for name in ("vision", "vision.cpu")} == {"vision.onnx.data"}
    assert {data_name(decoder_name(kv)) for kv in KV} == {"decoder.onnx.data"}


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ({"npu": {"vision": "vision.npu"}}, r"^runs: 'npu' is not known; known are cpu, cuda$"),
        ({"cpu": {}}, r"^runs: cpu is \{\}, and it can only be \{'vision': 'vision\.cpu'\}$"),
        ({"cpu": {"vision": "head"}}, r"^runs: cpu is \{'vision': 'head'\}, and it can only be"),
        ({"cpu": {"vision": "vision.cpu", "head": "head"}}, r"^runs: cpu is .*'head': 'head'\}, and it can only be"),
        (
            {"cuda": {"vision": "vision.cuda"}},
            r"^runs: cuda is \{'vision': 'vision\.cuda'\}, and it can only",
        ),
    ],
)
def test_a_set_that_is_another_is_named(runs: dict[str, dict[str, str]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_ports(CONFIG, PORTS | OF_SETS, runs, "float16")


def test_a_set_has_its_graphs_and_these_their_ports() -> None:
    with pytest.raises(ValueError, match=r"^graphs: vision\.cpu is missing$"):
        check_ports(CONFIG, PORTS, RUNS, "float16")
    for which, first in (("cpu", "vision.cpu"), ("cuda", "decoder.cuda")):  # by name
        others = {name: OF_SETS[name] for name in RUNS[which].values()}
        with pytest.raises(ValueError, match=rf"^graphs: '{first}' is not known; known are vision, decoder, head"):
            check_ports(CONFIG, PORTS | others, {}, None)
    with pytest.raises(ValueError, match=r"^graphs: vision\.cpu has other inputs than this model: hidden"):
        check_ports(CONFIG, {**PORTS, **OF_SETS, "vision.cpu": PORTS["head"]}, RUNS, "float16")


def test_graphs_for_gpus_have_the_ports_of_the_type_that_the_weights_are_in() -> None:
    """Those of fp32 have none: nothing there computes in it."""
    whole = {"vision": "vision.cuda", "decoder": "decoder.cuda", "head": "head.cuda"}
    assert set_graphs("cuda") == whole
    for dtype in ("float16", "bfloat16"):
        own = {name: expected_ports(CONFIG, name, dtype) for name in whole.values()}
        check_ports(CONFIG, PORTS | own, {"cuda": whole}, dtype)
        other = {"float16": "bfloat16", "bfloat16": "float16"}[dtype]
        with pytest.raises(ValueError, match=rf"^graphs: vision\.cuda has other outputs .*: image_embeds {dtype} "):
            check_ports(CONFIG, PORTS | own, {"cuda": whole}, other)
    with pytest.raises(ValueError, match=r"^runs: there are no graphs for CUDA that compute in float32$"):
        check_ports(CONFIG, PORTS | own, {"cuda": whole}, None)


@pytest.mark.parametrize(
    ("schemes", "dtype"),
    [
        (["fp32"], None),
        ([], None),
        (["fp16", "fp32"], "float16"),
        (["bf16"], "bfloat16"),
        (["bf16", "fp32"], "bfloat16"),
        (["bf16", "fp16"], "float16"),
        (["int8"], "float16"),
        (["int4", "int8"], "float16"),
        (["nf4", "int8", "fp32"], "float16"),
    ],
)
def test_what_gpus_compute_in_follows_from_how_matrices_are_stored(schemes: list[str], dtype: str | None) -> None:
    assert cuda_type(schemes) == dtype


def test_names_are_those_of_the_decoders_ports_in_their_order() -> None:
    layers = range(CONFIG.decoder.num_layers)
    for kv in KV:
        ports = PORTS[decoder_name(kv)]
        given = [name for i in layers for name in (*past_names(i), *(table_names(i) if kv == "int8" else ()))]
        assert [port.name for port in ports.inputs[7:]] == given
        assert [port.name for port in ports.outputs[1:]] == [name for i in layers for name in present_names(i)]
    assert past_names(1) == ("past_key_values.1.key", "past_key_values.1.value")


def test_layers_are_counted_before_ports_are_made_of_them() -> None:
    deep = replace(CONFIG, decoder=replace(CONFIG.decoder, num_layers=1024))
    with pytest.raises(ValueError, match="num_layers is 1024, and the graph decoder has the inputs of 3 layers"):
        check_ports(deep, PORTS, {}, None)
    odd = replace(PORTS["decoder"], inputs=PORTS["decoder"].inputs[:-1])
    with pytest.raises(ValueError, match=r"has the inputs of 2\.5 layers"):
        check_ports(CONFIG, {**PORTS, "decoder": odd}, {}, None)


def test_a_graph_too_many_is_named() -> None:
    with pytest.raises(ValueError, match=r"graphs: 'decoder\.kv-fp8' is not known; known are vision, decoder, head"):
        check_ports(CONFIG, {**PORTS, "decoder.kv-fp8": PORTS["decoder"]}, {}, None)


def test_a_difference_names_the_port_and_what_it_should_be() -> None:
    a, b = Port("a", "float32", ("T", 2)), Port("b", "int64", ())
    assert difference((a, b), (a, b)) == ""
    assert difference((a, b), (a, replace(b, dtype="int32"))) == "b int32 [] in place of b int64 []"
    assert difference((a, b), (a,)) == "b int64 [] is missing"
    assert difference((a,), (a, b)) == "b int64 [] is one too many"
    assert difference((a, b), (b, a)) == "b int64 [] in place of a float32 [T, 2]"
    assert difference((), ()) == ""


def test_a_graph_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="graphs: vision is missing"):
        check_ports(CONFIG, {"head": PORTS["head"]}, {}, None)
    with pytest.raises(ValueError, match="head has other outputs than this model: logit float32"):
        check_ports(CONFIG, {**PORTS, "head": GraphPorts(PORTS["head"].inputs, ())}, {}, None)
