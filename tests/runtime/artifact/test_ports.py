"""The ports that a model must have, and how those that it does not have are told."""

from dataclasses import replace
from pathlib import Path

import pytest

from m0kit.artifact.manifest import read_manifest
from m0kit.artifact.ports import (
    GRAPHS,
    KV,
    GraphPorts,
    Port,
    check_ports,
    decoder_name,
    difference,
    expected_ports,
    past_names,
    present_names,
    table_names,
)
from m0kit_parity.samples.checkpoints import model_config

CONFIG = model_config("tiny")
NAMES = (*GRAPHS, *(decoder_name(kv) for kv in KV if kv != "fp32"))
PORTS = {name: expected_ports(CONFIG, name) for name in NAMES}


def test_they_are_those_that_the_exporter_writes(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest.graphs == {name: expected_ports(manifest.model, name) for name in NAMES}


def test_graphs_of_the_model_pass() -> None:
    check_ports(CONFIG, PORTS)


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
        check_ports(deep, PORTS)
    odd = replace(PORTS["decoder"], inputs=PORTS["decoder"].inputs[:-1])
    with pytest.raises(ValueError, match=r"has the inputs of 2\.5 layers"):
        check_ports(CONFIG, {**PORTS, "decoder": odd})


def test_a_graph_too_many_is_named() -> None:
    with pytest.raises(ValueError, match=r"graphs: 'decoder\.kv-fp8' is not known; known are vision, decoder, head"):
        check_ports(CONFIG, {**PORTS, "decoder.kv-fp8": PORTS["decoder"]})


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
        check_ports(CONFIG, {"head": PORTS["head"]})
    with pytest.raises(ValueError, match="head has other outputs than this model: logit float32"):
        check_ports(CONFIG, {**PORTS, "head": GraphPorts(PORTS["head"].inputs, ())})
