"""The engine for GPUs on the pretended device: pairs of texts and of images, through ONNX Runtime's own CUDA provider.

Owns what is counted: how often the host waits in a run, which must not grow with the layers, for then some layer would
read what the device computes; and how much is launched. Names, types and shapes of all that is bound are checked by
ONNX Runtime and its kernels on the way. Weights are zero, and scores mean nothing.

    python -m m0kit_parity.cuda.pretend SITE -m m0kit_parity.cuda.rehearse
"""

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from m0kit.artifact.ports import cuda_type, set_name
from m0kit.precision import SCHEMES
from m0kit.scoring.cuda_device import CudaDevice
from m0kit.scoring.cuda_engine import CudaEngine
from m0kit.scoring.engine import Part
from m0kit.scoring.prepare import Document, Prepared, Preparer
from m0kit.scoring.prompt import PromptBuilder
from m0kit.terminal import show, show_text
from m0kit_export.cuda import cuda_graphs
from m0kit_export.graphs import build_graphs
from m0kit_parity.cuda.pretend import Counted, counted
from m0kit_parity.cuda.zeros import write_graph
from m0kit_parity.drawing.table import table
from m0kit_parity.samples.checkpoints import model_config
from m0kit_parity.samples.vocabulary import write_small_tokenizer
from m0kit_quant.recipe import Recipe

LAYERS: Final = (2, 5)
_POOL_BYTES: Final = 64 << 20
_GPU: Final = 1  # of the two that are pretended: where a number is forgotten, it is 0, and ONNX Runtime refuses it


def main() -> int:
    """Print what a run took, by precision and layers; 1 where the host waits more often for more layers."""
    rows = [["precision", "layers", "launches", "waits", "bytes to the host"]]
    is_wrong = False
    for precision in SCHEMES:
        if cuda_type(Recipe.default(precision).schemes) is None:
            continue
        took = [run(precision, num_layers) for num_layers in LAYERS]
        rows += [
            [precision, str(num_layers), str(each.launches), str(each.waits), str(each.bytes_to_host)]
            for num_layers, each in zip(LAYERS, took, strict=True)
        ]
        is_wrong |= len({(each.waits, each.bytes_to_host) for each in took}) > 1
    show_text(table(rows))
    show("The host waits more often where there are more layers." if is_wrong else "Waits do not grow with the layers.")
    return is_wrong


def run(precision: str, num_layers: int) -> Counted:
    """What the third run of the same pairs asks of the device, when nothing is opened or grown any more."""
    config, recipe = model_config("tiny", num_layers, num_layers), Recipe.default(precision)
    dtype = cuda_type(recipe.schemes)
    assert dtype is not None
    with tempfile.TemporaryDirectory(prefix="m0kit-rehearse-") as name:
        folder = Path(name)
        write_small_tokenizer(folder, config.decoder.vocab_size)
        for graph, built in cuda_graphs(config, recipe, build_graphs(config, recipe)).items():
            write_graph(folder, set_name(graph, "cuda"), built.model)
        device = CudaDevice(_GPU)
        engine = CudaEngine(config, device, partial(device.open, folder), dtype, salt=b"", pool_bytes=_POOL_BYTES)
        preparer = Preparer(config, PromptBuilder(folder / "tokenizer.json", config.prompt), salt=b"")
        try:
            for turn in range(3):
                by_document: dict[Document, list[Prepared]] = {}
                for prepared in _pairs(preparer, turn):
                    by_document.setdefault(prepared.document, []).append(prepared)
                parts = [Part(document, pairs) for document, pairs in by_document.items()]
                before = counted()
                engine.begin(parts)()
                after = counted()
        finally:
            engine.close()
    return Counted(*(now - then for now, then in zip(after, before, strict=True)))


def _pairs(preparer: Preparer, turn: int) -> Iterator[Prepared]:
    """Other documents each turn, so that none is kept already."""
    page, photo = (
        Image.fromarray(np.full((height, width, 3), turn, np.uint8)) for height, width in ((120, 200), (64, 96))
    )
    for query, document in (("words", f"a text {turn}"), ("words", f"{turn} " * 300), ("words", page), (photo, page)):
        yield preparer.prepare((query, document))


if __name__ == "__main__":
    sys.exit(main())
