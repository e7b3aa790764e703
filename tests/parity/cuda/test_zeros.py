"""Graphs on disk without their weights' values: every tensor can be read, and is zero."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from m0kit_export.cuda import cuda_graphs
from m0kit_export.graphs import build_graphs
from m0kit_parity.cuda.zeros import write_graph
from m0kit_parity.samples.checkpoints import model_config
from m0kit_quant.recipe import Recipe


def test_every_weight_of_graphs_that_share_a_file_is_there_and_zero(tmp_path: Path) -> None:
    config, recipe = model_config("tiny"), Recipe.default("int4")
    portable = build_graphs(config, recipe)
    graphs = {**portable, **{f"{name}.cuda": graph for name, graph in cuda_graphs(config, recipe, portable).items()}}
    paths = [write_graph(tmp_path, name, graph.model) for name, graph in graphs.items()]
    num_weights = 0
    for path in paths:
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.external_data:
                assert not np.any(numpy_helper.to_array(tensor, str(tmp_path)))
                num_weights += 1
    assert num_weights > 100
    assert sorted(each.name for each in tmp_path.glob("*.data")) == [
        "decoder.onnx.data",
        "head.onnx.data",
        "vision.onnx.data",
    ]
