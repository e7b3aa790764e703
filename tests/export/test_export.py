"""An artifact is whole or not there, holds what was meant, says where it came from, and costs little memory."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from tests.export.killed import PRELUDE
from torch import nn

from m0kit import Reranker, files
from m0kit.artifact.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest, verify_files, write_manifest
from m0kit.artifact.ports import GRAPHS, KV, decoder_name, set_graphs
from m0kit.errors import CheckpointError, OutputError
from m0kit_export import export
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.export import export_artifact
from m0kit_quant.floats import FLOATS
from m0kit_quant.recipe import Recipe

FP16 = Recipe.default("fp16")
WHOLE = {MANIFEST, TOKENIZER, *(f"{name}.onnx{end}" for name in GRAPHS for end in ("", ".data"))}
WHOLE |= {*(f"{decoder_name(kv)}.onnx" for kv in KV), "vision.cpu.onnx"}
ON_CUDA = {f"{name}.onnx" for name in set_graphs("cuda").values()}  # where weights have 16 bits or fewer


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_whole(folder: Path) -> Manifest:
    """Every file is there and is what the manifest says, by our own hashing."""
    manifest = read_manifest(folder)
    whole = WHOLE | (set() if manifest.scheme == "fp32" else ON_CUDA)
    assert {path.name for path in folder.iterdir()} == whole
    assert set(manifest.files) == whole - {MANIFEST}
    for name, entry in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.size, entry.sha256), name
    return manifest


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """(name, licence) → an adapter that changes layer 1 of the decoder."""

    def make(name: str = "tuned", licence: str | None = None, seed: int = 0) -> Path:
        root = nn.Module()
        root.model = nn.Module()
        root.model.layers = nn.ModuleList([nn.Module(), nn.Module()])
        root.model.layers[1].mlp = nn.Module()
        size = open_checkpoint(tiny).config.decoder
        root.model.layers[1].mlp.up_proj = nn.Linear(size.hidden_size, size.intermediate_size, bias=False)
        adapted = peft.get_peft_model(root, peft.LoraConfig(r=4, target_modules=["layers.1.mlp.up_proj"]))
        with torch.no_grad():
            for i, parameter in enumerate(p for p in adapted.parameters() if p.requires_grad):
                generator = torch.Generator().manual_seed(100 * seed + i)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(tmp_path / name)
        front = f"---\nlicense: {licence}\n---\n" if licence else "no front matter"
        (tmp_path / name / "README.md").write_text(front)
        return tmp_path / name

    return make


# --- what is written -----------------------------------------------------------------------------------


def test_a_whole_artifact_holds_every_file_with_its_hash(tiny_artifact: Path, tiny: Path) -> None:
    manifest = assert_whole(tiny_artifact)
    verify_files(tiny_artifact, manifest)
    assert (tiny_artifact / TOKENIZER).read_bytes() == (tiny / TOKENIZER).read_bytes()
    assert manifest.model == open_checkpoint(tiny).config
    assert (tiny_artifact.stat().st_mode & 0o777) == 0o755


@pytest.mark.parametrize("scheme", FLOATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_weight_is_the_checkpoints_to_the_bit(tmp_path: Path, tiny: Path, scheme: str, dtype: str) -> None:
    shutil.copytree(tiny, tmp_path / "checkpoint")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (t.float() + torch.randn(t.shape, generator=generator) / 64).to(getattr(torch, dtype))
        for name, t in load_file(tiny / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    export_artifact(tmp_path / "checkpoint", tmp_path / "out", recipe=Recipe.default(scheme), progress=False)
    seen = 0
    for name in GRAPHS:
        for tensor in onnx.load(tmp_path / "out" / f"{name}.onnx").graph.initializer:
            if tensor.name in tensors:
                seen += 1
                stored = numpy_helper.to_array(tensor)
                is_norm = "norm" in tensor.name or "ln_q" in tensor.name
                rounded = scheme == "fp16" or (scheme == "bf16" and not tensor.name.endswith("bias"))
                assert stored.dtype == FLOATS[scheme if rounded and not is_norm else "fp32"]
                meant = tensors[tensor.name].float().numpy().astype(stored.dtype)
                assert np.array_equal(stored, meant.reshape(stored.shape)), tensor.name
    assert seen == len(tensors)


def test_weights_start_at_memory_pages(tiny_artifact: Path) -> None:
    for name in GRAPHS:
        for tensor in onnx.load(tiny_artifact / f"{name}.onnx", load_external_data=False).graph.initializer:
            places = {entry.key: entry.value for entry in tensor.external_data}
            assert int(places.get("offset", 0)) % 4096 == 0


def test_two_exports_are_the_same_to_the_byte(tmp_path: Path, tiny: Path, adapter: Callable[..., Path]) -> None:
    specs = [AdapterSpec(adapter(), 0.5)]
    for name in ("one", "two"):
        torch.manual_seed(len(list(tmp_path.iterdir())))  # the state of generators outside has no say
        export_artifact(tiny, tmp_path / name, adapters=specs, progress=False)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_matrix_with_a_weight_that_fp16_cannot_hold_is_stored_wider_and_named(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path / "checkpoint")
    tensors = {name: t.float() for name, t in load_file(tiny / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -70000
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    recipe = replace(FP16, equalize=False)
    manifest = export_artifact(tmp_path / "checkpoint", tmp_path / "out", recipe=recipe, progress=False)
    wider = {"model.layers.1.mlp.up_proj.weight": {"scheme": "fp32", "lost": None}}
    assert manifest.provenance["stored_wider"] == wider


# --- where it came from ----------------------------------------------------------------------------------


def test_provenance_names_base_adapters_licences_and_tools(
    tmp_path: Path, tiny: Path, adapter: Callable[..., Path]
) -> None:
    paths = [adapter("first", "apache-2.0", 1), adapter("second", None, 2)]
    specs = [AdapterSpec(paths[0]), AdapterSpec(paths[1], 0.25)]
    export_artifact(tiny, tmp_path / "out", adapters=specs, progress=False)
    told = read_manifest(tmp_path / "out").provenance
    assert told["base"] == str(tiny)
    assert told["licence"] == "cc-by-nc-4.0"
    assert told["base_files"] == {
        name: hashlib.sha256((tiny / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")
    }
    for entry, path, weight, licence in zip(told["adapters"], paths, (1, 0.25), ("apache-2.0", None), strict=True):
        assert entry["name"] == path.name
        assert entry["weight"] == weight
        assert entry["licence"] == licence
        assert entry["sha256"] == {
            name: hashlib.sha256((path / name).read_bytes()).hexdigest()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
    assert told["tools"]["peft"] == peft.__version__


def test_adapters_change_what_they_name_and_nothing_else(
    tmp_path: Path, tiny: Path, tiny_artifact: Path, adapter: Callable[..., Path]
) -> None:
    path = adapter()
    export_artifact(tiny, tmp_path / "out", adapters=[AdapterSpec(path, 0.5)], progress=False)
    lora = load_file(path / "adapter_model.safetensors")
    (a,) = (t for name, t in lora.items() if "lora_A" in name)
    (b,) = (t for name, t in lora.items() if "lora_B" in name)
    for name in GRAPHS:
        base, tuned = (onnx.load(folder / f"{name}.onnx") for folder in (tiny_artifact, tmp_path / "out"))
        for old, new in zip(base.graph.initializer, tuned.graph.initializer, strict=True):
            before, after = numpy_helper.to_array(old), numpy_helper.to_array(new)
            if old.name == "model.layers.1.mlp.up_proj.weight":
                before = before + 0.5 * 8 / 4 * (b @ a).numpy()  # weight · alpha / r
                assert np.allclose(after, before, rtol=0, atol=1e-5)
            else:
                assert np.array_equal(after, before), old.name


# --- the place -------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("data")
    for place in (tmp_path / "out", tmp_path / "file"):
        with pytest.raises(OutputError, match="exists and is not empty"):
            export_artifact(tiny, place, progress=False)
        with pytest.raises(OutputError, match="is not an artifact, so it is not overwritten"):
            export_artifact(tiny, place, overwrite=True, progress=False)
    assert files_of(tmp_path / "out") == {"thesis.tex": b"years"}
    assert (tmp_path / "file").read_text() == "data"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_folder_is_taken_and_parents_are_made(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "a" / "b" / "out"):
        export_artifact(tiny, place, progress=False)
        assert_whole(place)
        assert len(list(place.parent.iterdir())) <= 2


def test_overwrite_replaces_an_artifact_whole(tmp_path: Path, tiny: Path) -> None:
    out = tmp_path / "out"
    export_artifact(tiny, out, progress=False)
    (out / "stray").write_text("of an older version")
    with pytest.raises(OutputError, match="--overwrite"):
        export_artifact(tiny, out, progress=False)
    manifest = export_artifact(tiny, out, recipe=FP16, overwrite=True, progress=False)
    assert manifest.scheme == "fp16"
    assert assert_whole(out) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_means_the_folder_it_leads_to(tmp_path: Path, tiny: Path, tiny_artifact: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(Path("disk") / "artifact")
    export_artifact(tiny, tmp_path / "out", progress=False)
    with pytest.raises(OutputError, match="out: exists and is not empty"):
        export_artifact(tiny, tmp_path / "out", progress=False)
    export_artifact(tiny, tmp_path / "out", recipe=FP16, overwrite=True, progress=False)
    assert assert_whole(tmp_path / "disk" / "artifact").scheme == "fp16"
    export.quantize_artifact(tiny_artifact, tmp_path / "out", recipe=FP16, overwrite=True, progress=False)
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["artifact"]


def test_a_failed_replacement_brings_the_old_artifact_back(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_artifact(tiny, out, progress=False)
    before = files_of(out)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr(files, "exchange", lambda *_: False)
    with pytest.raises(KeyboardInterrupt):
        export_artifact(tiny, out, recipe=FP16, overwrite=True, progress=False)
    assert files_of(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_disk_space_is_checked_before_anything_is_written(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 64 << 20))
    monkeypatch.setattr(export, "DataFiles", lambda *_: pytest.fail("began to write"))
    with pytest.raises(OutputError, match=r"the artifact takes 0\.06 GiB; 0\.06 GiB are free there"):
        export_artifact(tiny, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_meanwhile_is_named_and_left_clean(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_manifest", full)
    with pytest.raises(OutputError, match=r"out: cannot be written \(No space left on device\)"):
        export_artifact(tiny, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_named(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match="cannot be written"):
            export_artifact(tiny, place, progress=False)
    (tmp_path / "mounted").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda self: self.name == "mounted")
        with pytest.raises(OutputError, match="is a mount point"):
            export_artifact(tiny, tmp_path / "mounted", progress=False)

    def refused(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OutputError, match="out: no permission to write there"):
        export_artifact(tiny, tmp_path / "out", progress=False)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_a_folder_without_write_permission_is_named(tmp_path: Path, tiny: Path) -> None:
    """As another user when the tests run as root, who may do anything."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                for folder in (tmp_path, *tmp_path.parents[:2]):  # pytest's own, for nobody's eyes else
                    folder.chmod(folder.stat().st_mode | 0o011)
                os.seteuid(65534)
            with pytest.raises(OutputError, match="no permission"), files.replacing(locked / "out"):
                pass
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


# --- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_a_byte_that_changes_between_writing_and_reading_back_is_caught(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    read_back, build = export.check_weights, export.build_graphs
    built: dict[str, Any] = {}

    def noted(*args: Any, **options: Any) -> dict[str, Any]:
        built.update(found := build(*args, **options))
        return found

    def damaged(folder: Path, file: str, *rest: Any) -> None:
        if file == f"{name}.onnx":
            weights = built[name].weights
            (part,) = weights[len(weights) // 2].parts
            path = folder / f"{name}.onnx.data"
            content = bytearray(path.read_bytes())
            content[part.offset + part.num_bytes - 1] ^= 0x01
            path.write_bytes(content)
        read_back(folder, file, *rest)

    monkeypatch.setattr(export, "build_graphs", noted)
    monkeypatch.setattr(export, "check_weights", damaged)
    with pytest.raises(OutputError, match=rf"{name}\.onnx\.data: .* reads back differently"):
        export_artifact(tiny, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_data_file_cut_short_is_caught(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_back = export.check_weights

    def damaged(folder: Path, file: str, *rest: Any) -> None:
        path = folder / f"{file}.data"
        os.truncate(path, path.stat().st_size - 1)
        read_back(folder, file, *rest)

    monkeypatch.setattr(export, "check_weights", damaged)
    with pytest.raises(OutputError, match="reads back differently"):
        export_artifact(tiny, tmp_path / "out", progress=False)


def test_graphs_and_checkpoint_that_differ_in_tensors_are_refused(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = export.build_graphs
    headless = lambda *a, **k: {n: g for n, g in build(*a, **k).items() if n != "head"}  # noqa: E731
    monkeypatch.setattr(export, "build_graphs", headless)
    with pytest.raises(CheckpointError, match=r"score\.0\.bias"):
        export_artifact(tiny, tmp_path / "out", progress=False)


# --- interruption --------------------------------------------------------------------------------------------

# Forked children export and kill themselves before their k-th file operation, for k over the whole export.
KILLED = (
    PRELUDE
    + """
from m0kit import files
from m0kit.artifact.manifest import read_manifest, verify_files
from m0kit.errors import OutputError
from m0kit_export import export as export_module
source, root, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
if mode == "two renames":
    files.exchange = lambda *_: False

def export(place):
    recipe = Recipe.default("fp16")
    return lambda: export_artifact(source, place, recipe=recipe, overwrite=mode != "new", progress=False)

def state(place):
    return read_manifest(place).scheme if place.exists() else "nothing"

export_artifact(source, root / "old", progress=False)
if mode != "new":
    shutil.copytree(root / "old", root / "all")
total = operations(export(root / "all"))
last = 20 if mode == "two renames" else 13  # what comes after the weights are written
for k in sorted({*range(1, total - last, max(1, total // 4)), *range(total - last, total + 1)}):
    place = root / str(k) / "out"
    place.parent.mkdir()
    if mode != "new":
        shutil.copytree(root / "old", place)
    code, left = exit_code(export(place), k), state(place)
    if left != "nothing":
        verify_files(place, read_manifest(place))
    seen = "-"
    if mode == "new" and left != "nothing":  # finished: it is not replaced, but what was left goes
        try:
            export(place)()
        except OutputError:
            pass
    else:
        build = export_module.build_graphs
        def watched(*args, **options):
            global seen
            seen = state(place)
            return build(*args, **options)
        export_module.build_graphs = watched
        export(place)()
        export_module.build_graphs = build
    names = sorted(path.name for path in place.parent.iterdir())
    print(k, code, left, seen, state(place), *names)
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["new", "overwrite", "two renames"])
def test_killed_at_any_moment_the_same_command_makes_all_well(tmp_path: Path, tiny: Path, mode: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tiny), str(tmp_path), mode]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    rows = [line.split() for line in out.splitlines()]
    assert [row[1] for row in rows].count(str(-signal.SIGKILL)) > 10
    before = {row[2] for row in rows}
    # Between two renames there is nothing for a moment; swapping names has no such moment.
    assert before == {"new": {"nothing", "fp16"}, "overwrite": {"fp32", "fp16"}}.get(mode, {"fp32", "nothing", "fp16"})
    for row in rows:
        assert row[4:] == ["fp16", "out"], row
        if mode == "two renames":
            assert row[3] != "nothing", row  # the old one was put back before the work began
    assert mode != "two renames" or any(row[2] == "nothing" and row[3] == "fp32" for row in rows)


# Runs the command; at the first file that it opens after many weights were written, it says so and waits for its end.
HELD = """
import os, sys
written, said = set(), []

def watch(event, args):
    if event != "open" or said:
        return
    if any(os.path.getsize(path) > 10 << 20 for path in written if os.path.exists(path)):
        said.append("weights are written")
        print(*said, flush=True)
        os.read(0, 1)
    if str(args[0]).endswith(".data") and ".unfinished" in str(args[0]):
        written.add(str(args[0]))

sys.addaudithook(watch)
from m0kit.cli.commands import main
sys.argv[0] = "m0kit"
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_leaves_nothing_behind_and_exits_with_130(tmp_path: Path, heavy: Path) -> None:
    command = [sys.executable, "-c", HELD, "export", str(heavy), "-o", str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        held = process.stdout.readline()
        assert any(path.stat().st_size > 10 << 20 for path in tmp_path.glob(".out.unfinished/new/*.data"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert held == "weights are written\n"
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("comes_out_as", [CheckpointError, ValueError, OutputError])
def test_ctrl_c_stays_one_when_a_library_turns_it_into_an_error(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, comes_out_as: type[Exception]
) -> None:
    def swallowing(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise comes_out_as("the file is damaged") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(export, "DataFiles", swallowing)
    with pytest.raises(KeyboardInterrupt):
        export_artifact(tiny, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_that_nobody_interrupted_stay_what_they_are(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise CheckpointError("the file is damaged")

    monkeypatch.setattr(export, "DataFiles", failing)
    with pytest.raises(CheckpointError, match="the file is damaged"):
        export_artifact(tiny, tmp_path / "out", progress=False)


def test_it_works_outside_the_main_thread(tmp_path: Path, tiny: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(export_artifact, tiny, tmp_path / "out", progress=False).result()
    assert_whole(tmp_path / "out")


# --- memory ---------------------------------------------------------------------------------------------------

PEAK = textwrap.dedent("""
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from m0kit_export.export import export_artifact

    def peak():
        return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) >> 10

    export_artifact(sys.argv[1], Path(sys.argv[3]) / "small", progress=False)
    before = peak()
    manifest = export_artifact(sys.argv[2], Path(sys.argv[3]) / "large", progress=False)
    print(peak() - before, manifest.num_bytes >> 20)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_goes_with_the_largest_tensor_and_not_with_the_checkpoint(
    tmp_path: Path, tiny: Path, heavy: Path
) -> None:
    """The largest tensor of `heavy` is 3 MiB; pieces of 16 MiB are hashed and read back."""
    command = [sys.executable, "-c", PEAK, str(tiny), str(heavy), str(tmp_path)]
    grown, written = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert written > 300
    assert grown < 80


OPENED = textwrap.dedent("""
    import sys
    from m0kit import Reranker

    def private():
        return int(next(x for x in open("/proc/self/status") if x.startswith("RssAnon")).split()[1]) >> 10

    Reranker.load(sys.argv[1], threads=1).score([("a", "b")])
    before = private()
    reranker = Reranker.load(sys.argv[2], threads=1)
    opened = private()
    reranker.score([("a", "b")])
    print(opened - before, private() - before)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads private memory from /proc")
@pytest.mark.parametrize("scheme", FLOATS)
def test_opening_and_scoring_leave_the_weights_in_their_files(
    tmp_path: Path, tiny_artifact: Path, heavy: Path, scheme: str
) -> None:
    manifest = export_artifact(heavy, tmp_path / "heavy", recipe=Recipe.default(scheme), progress=False)
    write_manifest(tmp_path / "heavy", replace(manifest, known_answers=None))  # which would run when it is opened
    command = [sys.executable, "-c", OPENED, str(tiny_artifact), str(tmp_path / "heavy")]
    opened, used = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert manifest.num_bytes > 180 << 20
    # MiB: 30 layers of nodes take some 20; weights widened or repacked would take hundreds
    assert opened < 60
    assert used < 60


# --- it works ----------------------------------------------------------------------------------------------------


def test_the_artifact_opens_where_it_is_moved(tmp_path: Path, tiny_artifact: Path) -> None:
    shutil.copytree(tiny_artifact, tmp_path / "elsewhere")
    pairs = [("a", "b"), ("c", "d")]
    here, there = (Reranker.load(f, threads=1).score(pairs) for f in (tiny_artifact, tmp_path / "elsewhere"))
    assert np.array_equal(here, there)
