"""Checkpoints and artifacts of full size in seconds, so that what is measured is scoring.

Owns a way to write an artifact that leaves out what proves nothing about its speed: a search for the best 4 bits
(here: nearest of the block's range), reading back, known answers. The graphs, the layout of the data files and the
manifest are those of any export; how good a precision is, is measured on artifacts that `m0kit export` wrote.

    write_artifact(open_checkpoint(Path("full")), Path("m0-fp16"), "fp16", "cuda")
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from m0kit.artifact.manifest import TOKENIZER, FileEntry, Manifest, write_manifest
from m0kit.artifact.ports import set_graphs, set_name
from m0kit.files import replacing, require_unoccupied, sha256_of
from m0kit_export.builder import Graph, Weight
from m0kit_export.checkpoint import Checkpoint
from m0kit_export.graphs import build_graphs, graph_sets, kept_decoders
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import Layout, Parts

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TOP = 15  # the largest value of four bits


def write_artifact(checkpoint: Checkpoint, folder: Path, precision: str, device: str) -> None:
    """An artifact of a checkpoint, its weights rounded on a device by PyTorch; about ten seconds at full size.

    Its known answers are missing, so that none are asked for. Raises OutputError when the folder is not empty.
    """
    require_unoccupied(folder)
    recipe = Recipe.default(precision)
    graphs = build_graphs(checkpoint.config, recipe)
    with replacing(folder) as aside, ThreadPoolExecutor() as threads:
        written = [
            threads.submit(_write_data, aside, name, graph, checkpoint, device) for name, graph in graphs.items()
        ]
        for one in written:
            one.result()
        every = {**graphs, **kept_decoders(checkpoint.config.decoder, recipe)}
        runs: dict[str, dict[str, str]] = {}
        for which, own in graph_sets(checkpoint.config, recipe, graphs).items():
            runs[which] = set_graphs(which)
            every |= {set_name(name, which): graph for name, graph in own.items()}
        for name, graph in every.items():
            (aside / f"{name}.onnx").write_bytes(graph.model.SerializeToString(deterministic=True))
        (aside / TOKENIZER).write_bytes(checkpoint.tokenizer.encode())
        paths = sorted(aside.iterdir())
        hashes = threads.map(sha256_of, paths)
        files = {path.name: FileEntry(path.stat().st_size, h) for path, h in zip(paths, hashes, strict=True)}
        manifest = Manifest(
            model=checkpoint.config,
            scheme=precision,
            graphs={name: graph.ports for name, graph in every.items()},
            runs=runs,
            files=files,
            provenance={"base": checkpoint.source, "licence": None},
            recipe=recipe.to_dict(),
        )
        write_manifest(aside, manifest)


def _write_data(folder: Path, name: str, graph: Graph, checkpoint: Checkpoint, device: str) -> None:
    with open(folder / f"{name}.onnx.data", "wb") as file:
        for weight in graph.weights:
            parts = encode(weight, checkpoint.read(weight.name).to(device).reshape(weight.shape))
            for part in weight.parts:
                stored = np.ascontiguousarray(parts[part.key]).reshape(part.shape)
                assert stored.dtype == part.dtype, f"{part.name}: {stored.dtype}"
                file.seek(part.offset)
                file.write(stored.reshape(-1).view(np.uint8).data)


def encode(weight: Weight, values: torch.Tensor) -> Parts:
    """What is stored of one tensor."""
    name = weight.scheme.name
    if name in _FLOATS:
        rounded = values.to(_FLOATS[name]).cpu()
        if name == "bf16":
            return {"": rounded.view(torch.int16).numpy().view(ml_dtypes.bfloat16)}
        return {"": rounded.numpy()}
    if name != "int4":
        return weight.scheme.encode(values.float().cpu().numpy())
    layout: Layout = weight.scheme.layout(weight.shape)
    rows, blocks, half = layout["int4"][0]
    w = values.float().reshape(rows, blocks, 2 * half)
    low, high = w.amin(2, keepdim=True).clamp(max=0), w.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / _TOP).clamp(min=1e-12)
    zero = (-low / scale).round().clamp(0, _TOP)
    q = ((w / scale).round() + zero).clamp(0, _TOP).to(torch.uint8)
    zero = zero[..., 0].to(torch.uint8)
    if blocks % 2:
        zero = torch.nn.functional.pad(zero, (0, 1), value=8)  # as `m0kit_quant.int4` fills the last half
    return {
        "int4": (q[..., ::2] | q[..., 1::2] << 4).cpu().numpy(),
        "scale": scale[..., 0].cpu().numpy().astype(layout["scale"][1]),
        "zero_point": (zero[:, ::2] | zero[:, 1::2] << 4).cpu().numpy(),
    }
