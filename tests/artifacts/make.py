"""Makes the committed artifacts: the tiny random model in every precision, and PyTorch's logits of some pairs.

The runtime is tested on them where it is installed alone, without what the exporter needs. `tiny.tar.xz` holds one
folder per precision; it is an archive because weights are aligned to pages, which is mostly air in so small a model.

    python tests/artifacts/make.py     # makes them again
"""

import io
import json
import shutil
import tarfile
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m0kit.precision import SCHEMES

HERE = Path(__file__).parent
ARCHIVE = HERE / "tiny.tar.xz"
EXPECTED = HERE / "expected.json"
COMMAND = "python tests/artifacts/make.py"


def picture(height: int, width: int) -> Image.Image:
    """An RGB image without any symmetry, from whole numbers alone: no library draws it otherwise in another version."""
    row, column = np.indices((height, width))
    channels = [(row * a + column * b + row * column // c) % 256 for a, b, c in ((3, 5, 7), (7, 2, 11), (1, 9, 5))]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def pairs() -> list[tuple[Any, Any]]:
    """All four kinds of (query, document), several scripts, long and short text among them."""
    queries = ["slm markdown", "Wie groß ist der Tempel?", "数据库 索引", "x", picture(60, 90)]
    documents = [
        "A small language model that turns HTML into Markdown.",
        "The temple is 42 metres long.\n\nIts columns are Doric.",
        "B-tree 索引 keeps rows in order. " * 40,
        "x",
        picture(120, 200),
        picture(31, 250),
    ]
    return [(query, document) for query in queries for document in documents]


def make(folder: Path) -> dict[str, list[float]]:
    """Write the artifacts into `folder`, one folder per precision; returns PyTorch's logits of `pairs()` for each.

    PyTorch computes with the weights as they are stored: what is left is what the kernels round.
    """
    from safetensors.numpy import save_file

    from m0kit_export.export import export_artifact
    from m0kit_parity.reference import Reference
    from m0kit_parity.samples.checkpoints import write_checkpoint
    from m0kit_quant.recipe import Recipe

    folder.mkdir(parents=True, exist_ok=True)
    logits = {}
    # By a plain name, since the manifest says where the weights came from.
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        write_checkpoint(Path("tiny"), "tiny")
        for precision in SCHEMES:
            export_artifact("tiny", folder / precision, recipe=Recipe.default(precision), progress=False)
            stored = Path(shutil.copytree("tiny", precision))
            save_file(_decoded(folder / precision), stored / "model.safetensors")
            logits[precision] = [float(logit) for logit in Reference.load(stored).score(pairs(), raw=True)]
    return logits


def _decoded(artifact: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 matrix that the stored parts of every tensor stand for."""
    import onnx

    from m0kit.artifact.manifest import read_manifest
    from m0kit.artifact.ports import GRAPHS
    from m0kit_export.graphs import build_graphs
    from m0kit_export.names import expected_shapes
    from m0kit_quant.recipe import Recipe

    manifest = read_manifest(artifact)
    files = [onnx.load(artifact / f"{name}.onnx") for name in GRAPHS]
    parts = {tensor.name: onnx.numpy_helper.to_array(tensor) for file in files for tensor in file.graph.initializer}
    graphs = build_graphs(manifest.model, Recipe.from_dict(manifest.recipe, "manifest")).values()
    weights = [weight for graph in graphs for weight in graph.weights]
    shapes = expected_shapes(manifest.model)
    return {
        w.name: np.ascontiguousarray(
            w.scheme.decode({part.key: parts[part.name] for part in w.parts}, w.shape).reshape(shapes[w.name])
        )
        for w in weights
    }


def unpack(folder: Path) -> None:
    """The committed artifacts, one folder per precision."""
    with tarfile.open(ARCHIVE) as archive:
        # Python has had filters since 3.11.4; what is unpacked here is the repository's own.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def _pack(folder: Path) -> None:
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())  # no owner, no time
            entry.size = path.stat().st_size
            archive.addfile(entry, io.BytesIO(path.read_bytes()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        logits = make(Path(made).resolve())
        _pack(Path(made))
        tools = json.loads((Path(made) / "fp32" / "manifest.json").read_text("utf-8"))["provenance"]["tools"]
    expected = {
        "what": "PyTorch's logits (fp32) of the pairs in make.py with the weights that each artifact stores",
        "floats": "hexadecimal, which lose nothing",
        "command": COMMAND,
        "seed": 0,
        "tools": tools,
        "logits": {precision: [logit.hex() for logit in values] for precision, values in logits.items()},
    }
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n", "utf-8")
