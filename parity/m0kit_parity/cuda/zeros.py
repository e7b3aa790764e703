"""Graphs as files, with weights that are all zero and take no room on the disk.

Owns that alone: what to do with a graph whose numbers mean nothing is its caller's.

    path = write_graph(folder, "decoder.cuda", graph.model)
"""

from pathlib import Path

import onnx


def write_graph(folder: Path, name: str, model: onnx.ModelProto) -> Path:
    """`folder`/`name`.onnx, and the data files that it reads, which are made longer where others read them, too."""
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            with (folder / place["location"]).open("ab") as file:
                file.truncate(max(file.tell(), int(place["offset"]) + int(place["length"])))
    return path
