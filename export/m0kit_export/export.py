"""Weights → artifact, one tensor at a time: written aside, read back, renamed.

Owns the order of the steps and the safety of the result. Where weights come from is `sources`, what the graphs
compute is `graphs`, how weights become fewer bits is `m0kit_quant`, what the folder contains is
`m0kit.artifact.manifest`.

    export_artifact("jinaai/jina-reranker-m0", Path("m0-int8"), recipe=Recipe.default("int8"))
    quantize_artifact(Path("m0-fp32"), Path("m0-int4"), recipe=Recipe.default("int4"))
"""

import math
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m0kit.artifact.manifest import (
    MANIFEST,
    TOKENIZER,
    FileEntry,
    Manifest,
    read_manifest,
    write_manifest,
)
from m0kit.artifact.ports import set_graphs, set_name
from m0kit.errors import CheckpointError, OutputError, RecipeError
from m0kit.files import destination, flush, named_errors, occupied, recover, replacing, sha256_of
from m0kit.terminal import say
from m0kit_export.adapter import AdapterSpec, QLora
from m0kit_export.answers import known_answers, open_tokenizer
from m0kit_export.builder import Graph
from m0kit_export.calibrate import calibrate, read_pairs
from m0kit_export.feeding import feed_back
from m0kit_export.folder import find_folder
from m0kit_export.graphs import build_graphs, check_recipe, graph_sets, kept_decoders, schemes_of
from m0kit_export.sources import ArtifactSource, CheckpointSource, Source
from m0kit_export.stored import DataFiles, check_weights
from m0kit_quant import nf4
from m0kit_quant.calibration import Calibration, channel_scales
from m0kit_quant.equalize import ChannelGroup, Rescaled, channel_groups
from m0kit_quant.halves import Fit, fit_halves
from m0kit_quant.outlying import WIDER, losing, outlying
from m0kit_quant.recipe import Recipe
from m0kit_quant.rotate import Rotated
from m0kit_quant.scheme import Scheme
from m0kit_quant.weights import Weights

_SPARE_BYTES = 64 << 20  # for the tokenizer, graphs, manifest and the file system's own needs
_FP32 = Recipe.default("fp32")


def export_artifact(
    checkpoint: str | Path,
    output: Path,
    *,
    adapters: Sequence[AdapterSpec] = (),
    recipe: Recipe = _FP32,
    calibration: Path | None = None,
    qlora: QLora | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write the artifact of a checkpoint (folder or hub id) with its adapters merged in order.

    `qlora`: the adapters were trained on the base in 4 bits, and are merged on it as it was then.
    `calibration` is a file of pairs (see `calibrate`): an fp32 artifact is written beside `output` first, run on
    them, and removed. Everything written is read back from the finished file and compared bit by bit. The folder
    appears under its name only when it is whole. Peak memory is a few copies of the largest tensor,
    with feedback (`feeding`) also one layer on some ten thousand rows.

    Raises CheckpointError, AdapterError, RecipeError, OutputError.
    """
    # What is wrong with the place, the folder or the pairs is said before PyTorch comes, and what is wrong with the
    # recipe before minutes of work.
    recover(output)  # what a killed run left there may hold the old artifact
    _check_place(output, overwrite)
    find_folder(checkpoint, revision, cache_dir)
    for adapter in adapters:
        adapter.check()
    if qlora is not None:
        nf4.require_bitsandbytes()
    if calibration is not None:
        read_pairs(calibration)
    source = CheckpointSource.open(checkpoint, adapters, revision, cache_dir, qlora)
    check_recipe(recipe, source.config)
    with replacing(output, overwrite=overwrite) as folder:
        _check_place(output, overwrite)
        if calibration is None:
            return _write(source, folder, output, recipe, None, progress)
        return _write(
            source, folder, output, recipe, _seen(source, folder, output, recipe, calibration, progress), progress
        )


def quantize_artifact(
    folder: Path,
    output: Path,
    *,
    recipe: Recipe,
    calibration: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """The same from an fp32, fp16 or bf16 artifact: from fp32 bit for bit what export from the checkpoint writes.

    Raises ArtifactError, RecipeError, OutputError.
    """
    check_recipe(recipe, read_manifest(folder).model)
    if destination(output) == destination(folder):
        raise OutputError(f"{output}: is the artifact that is read. Choose another folder.")
    recover(output)  # what a killed run left there may hold the old artifact
    _check_place(output, overwrite)
    if calibration is not None:
        read_pairs(calibration)
    source = ArtifactSource.open(folder)  # hashes every file
    with replacing(output, overwrite=overwrite) as aside:
        _check_place(output, overwrite)
        if calibration is None:
            return _write(source, aside, output, recipe, None, progress)
        if recipe.rotate:  # the products of `folder` have their inputs in another basis
            statistics = _seen(source, aside, output, recipe, calibration, progress)
        else:
            statistics = calibrate(folder, calibration, progress=progress)
        return _write(source, aside, output, recipe, statistics, progress)


def _seen(source: Source, folder: Path, output: Path, recipe: Recipe, calibration: Path, progress: bool) -> Calibration:
    """What the products see in fp32, in the basis of the recipe; the artifact for it lies beside `folder` meanwhile."""
    plain = folder.with_name("fp32")
    plain.mkdir()
    _write(source, plain, output, replace(_FP32, rotate=recipe.rotate), None, progress)
    statistics = calibrate(plain, calibration, progress=progress, require_signature=False)
    shutil.rmtree(plain)
    return statistics


def _write(
    source: Source, folder: Path, output: Path, recipe: Recipe, calibration: Calibration | None, progress: bool
) -> Manifest:
    """Fill the empty `folder`, which is going to be `output`."""
    frequencies = source.frequencies
    graphs = build_graphs(source.config, recipe, frequencies=frequencies)
    _check_complete(source, graphs)
    tokenizer = open_tokenizer(source.tokenizer)  # before minutes of work
    if calibration is not None:
        _check_seen(calibration, graphs)
    num_bytes = sum(graph.data_bytes for graph in graphs.values())
    _check_room(folder, output, num_bytes + _SPARE_BYTES)
    with _interruptible(), named_errors(output):
        # None: no bar where stderr is no terminal, a log file above all; there each phase is one line
        disable = None if progress else True
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=disable, mininterval=0.5) as bar:
            basis: Weights = Rotated(source, source.config) if recipe.rotate else source
            weights, groups = basis, channel_groups(source.config)
            scales: dict[str, NDArray[np.float32]] = {}
            if recipe.equalize:
                scales = _equalized(basis, source, groups, schemes_of(graphs), calibration, bar, progress)
                weights = Rescaled(basis, groups, scales)
            fit = _fitted(source, weights, graphs, recipe.equalize, bar, progress)
            if fit.scales:
                scales |= fit.scales
                weights = Rescaled(basis, groups, scales)
            wider: dict[str, Any] = {
                name: {"scheme": each.scheme, "lost": each.lost if math.isfinite(each.lost) else None}
                for name, each in fit.wider.items()
            }
            if recipe.widen:
                apart = _outlying(source, weights, graphs, bar, progress)
                wider |= {name: {"scheme": WIDER, "times": round(times, 1)} for name, times in apart.items()}
            if wider:
                recipe = recipe.storing({name: each["scheme"] for name, each in wider.items()})
                graphs = build_graphs(source.config, recipe, frequencies=frequencies)
                num_bytes = sum(graph.data_bytes for graph in graphs.values())
            _begin("writing", bar, num_bytes, progress)
            importance = calibration.importance(source.config, scales) if calibration else {}
            with DataFiles(folder, graphs, bar) as data:
                if recipe.feedback:
                    feed_back(source.config, tokenizer, weights, graphs, data.write)
                data.write_rest(weights, importance)
            # Graphs that read the same data files.
            others = kept_decoders(source.config.decoder, recipe, frequencies.decoder)
            runs: dict[str, dict[str, str]] = {}
            for which, own in graph_sets(source.config, recipe, graphs, frequencies).items():
                runs[which] = set_graphs(which)
                others |= {set_name(name, which): graph for name, graph in own.items()}
            for name, graph in (graphs | others).items():
                (folder / f"{name}.onnx").write_bytes(graph.model.SerializeToString(deterministic=True))
            _begin("reading back", bar, num_bytes, progress)
            for name in graphs:
                check_weights(folder, f"{name}.onnx", data.hashes, bar)
            (folder / TOKENIZER).write_bytes(source.tokenizer)
            _begin("computing known answers", bar, num_bytes, progress)
            known = known_answers(folder, source.config, graphs, bar.update)
            sizes = {path: path.stat().st_size for path in sorted(folder.iterdir())}
            _begin("hashing", bar, sum(sizes.values()), progress)
            files = {path.name: FileEntry(size, sha256_of(path, bar.update)) for path, size in sizes.items()}
        manifest = Manifest(
            model=source.config,
            scheme=recipe.precision,
            graphs={name: graph.ports for name, graph in (graphs | others).items()},
            runs=runs,
            files=files,
            provenance={
                **source.provenance(),
                "calibration": calibration.about if calibration else None,
                "stored_wider": wider,
                "tools": _tools(),
            },
            recipe=recipe.to_dict(),
            known_answers=known,
        )
        for path in folder.iterdir():
            flush(path)
        write_manifest(folder, manifest)
    return manifest


def _equalized(
    weights: Weights,
    source: Source,
    groups: Sequence[ChannelGroup],
    schemes: Mapping[str, Scheme],
    calibration: Calibration | None,
    bar: Any,
    progress: bool,
) -> dict[str, NDArray[np.float32]]:
    """The scales that share the ranges of channels between layers, with the bar moving."""
    num_bytes = {
        group.name: sum(4 * math.prod(source.shape(name)) for name in group.consumers)
        for group in groups
        if not all(schemes[name].is_float for name in group.consumers)
    }
    if num_bytes:  # with floats alone there is nothing to do, hence nothing to announce
        _begin("equalizing", bar, sum(num_bytes.values()), progress)
    return channel_scales(weights, source.config, schemes, calibration, lambda name: bar.update(num_bytes.get(name, 0)))


def _fitted(
    source: Source, weights: Weights, graphs: Mapping[str, Graph], equalize: bool, bar: Any, progress: bool
) -> Fit:
    """What keeps float16 from losing too much of the weights, with the bar moving."""
    num_bytes = {w.name: w.num_bytes for g in graphs.values() for w in g.weights if w.scheme.name == "fp16"}
    if not num_bytes:
        return Fit({}, {})
    _begin("measuring float16", bar, sum(num_bytes.values()), progress)
    move: Callable[[str], object] = lambda name: bar.update(num_bytes[name])  # noqa: E731
    half = {w.name for g in graphs.values() for w in g.weights if w.half}
    return fit_halves(weights, source.config, schemes_of(graphs), half, equalize=equalize, done=move)


def _outlying(
    source: Source, weights: Weights, graphs: Mapping[str, Graph], bar: Any, progress: bool
) -> dict[str, float]:
    """Matrices with columns that stand far out, with the bar moving."""
    schemes = schemes_of(graphs)
    num_bytes = {name: 4 * math.prod(source.shape(name)) for name in losing(schemes)}
    if not num_bytes:
        return {}
    _begin("looking for outlying columns", bar, sum(num_bytes.values()), progress)
    return outlying(weights, schemes, lambda name: bar.update(num_bytes[name]))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the block as KeyboardInterrupt, whatever else comes out of it.

    One that arrives inside torch's own code comes out as a ValueError, as if the file were damaged.
    """
    before, pressed = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        if callable(before):
            before(number, frame)

    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield  # nobody to interrupt: Ctrl-C is ignored, or goes to the main thread
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        if pressed:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(phase: str, bar: Any, num_bytes: int, progress: bool) -> None:
    bar.reset(num_bytes)
    bar.set_description(phase)
    if progress and bar.disable:
        say(f"{phase}: {num_bytes / 2**20:.1f} MiB")


def _check_complete(source: Source, graphs: dict[str, Graph]) -> None:
    """No tensor of the checkpoint is forgotten, none is made up."""
    used = {weight.name for graph in graphs.values() for weight in graph.weights}
    if odd := sorted(used.symmetric_difference(source.names)):
        raise CheckpointError(f"{source.name}: graphs and checkpoint differ in the tensors {odd[:5]}.")


def _check_seen(calibration: Calibration, graphs: dict[str, Graph]) -> None:
    """Every product whose weights lose bits was computed in calibration: pairs of text never reach the vision graph."""
    names = losing(schemes_of(graphs))
    if unseen := [name for name in names if name.removesuffix(".weight") not in calibration.energy]:
        raise RecipeError(
            f"no pair of the calibration set reaches {unseen[0]} and {len(unseen) - 1} more matrices. "
            "Add pairs with an image, a few at least, or calibrate for a recipe that leaves these matrices as floats."
        )


def _tools() -> dict[str, str]:
    """Versions of what can change a weight."""
    tools = {"python": platform.python_version()}
    for tool in ("m0kit", "torch", "transformers", "peft", "safetensors", "onnx", "numpy", "bitsandbytes"):
        try:
            tools[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return tools


def _check_room(folder: Path, output: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OutputError(
            f"{output}: the artifact takes {num_bytes / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free there."
        )


def _check_place(output: Path, overwrite: bool) -> None:
    """Raises OutputError when nothing may be written there."""
    with named_errors(output):
        if occupied(output):
            if not overwrite:
                raise OutputError(f"{output}: exists and is not empty. Choose another folder, or --overwrite.")
            if not (output / MANIFEST).is_file():
                raise OutputError(f"{output}: is not an artifact, so it is not overwritten. Choose another folder.")
        if destination(output).is_mount():
            raise OutputError(f"{output}: is a mount point, which no folder can replace. Choose a folder inside it.")
