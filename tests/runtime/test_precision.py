"""Which device computes what: the table, its error, and that models say so before anything is opened."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from tests.sealed import edit_manifest

from m0kit import Reranker
from m0kit.errors import ArtifactDamagedError, DeviceError
from m0kit.precision import SCHEMES, check_device, provider_of, supported
from m0kit.scoring import sessions

CUDA = ("cuda", "cuda:0", "cuda:1", "CUDAExecutionProvider")
CPU = ("cpu", "CPUExecutionProvider")
OTHER = ("CoreMLExecutionProvider", "TensorrtExecutionProvider", "tpu")


@pytest.mark.parametrize(
    ("devices", "schemes"),
    [
        (CPU + CUDA, ("fp32", "fp16", "bf16", "int8", "int4", "nf4")),
        (OTHER, ("fp32", "fp16", "bf16")),
    ],
)
def test_the_table_of_devices(devices: tuple[str, ...], schemes: tuple[str, ...]) -> None:
    for device in devices:
        assert supported(device) == schemes
        for scheme in SCHEMES:
            if scheme in schemes:
                check_device(device, [scheme], "model")
            else:
                with pytest.raises(DeviceError):
                    check_device(device, [scheme], "model")


@pytest.mark.parametrize(
    ("devices", "name"), [(CPU, "cpu"), (CUDA, "cuda"), *(((device,), device) for device in OTHER)]
)
def test_a_device_has_one_name_however_it_is_spelled(devices: tuple[str, ...], name: str) -> None:
    assert {provider_of(device) for device in devices} == {name}


def test_the_error_names_what_is_lacking_once_and_what_works() -> None:
    with pytest.raises(DeviceError) as caught:
        check_device("CoreMLExecutionProvider", ["nf4", "fp32", "int8", "nf4"], "m0-mixed")
    assert str(caught.value) == (
        "m0-mixed: device 'CoreMLExecutionProvider' has no kernels for int8, nf4 in ONNX Runtime, and m0kit does not "
        "move work to the host's CPU by itself. What works there: fp32, fp16, bf16; or device 'cpu'."
    )
    assert isinstance(caught.value, RuntimeError)


def test_nothing_at_all_runs_anywhere() -> None:
    for device in itertools.chain(CPU, CUDA, OTHER):
        check_device(device, [], "model")


# --- artifacts -------------------------------------------------------------------------------------


def stored_as(artifact: Path, folder: Path, *schemes: str) -> Path:
    """A copy whose manifest says that its matrices are stored in these schemes."""
    shutil.copytree(artifact, folder)
    rules = [{"match": "*", "scheme": scheme} for scheme in schemes]
    edit_manifest(folder, lambda raw: (raw.update(scheme="mixed"), raw["recipe"].update(weights=rules)))
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of graphs in the order in which they are opened; there is a CUDA, if one asks."""
    names: list[tuple[str, dict[str, Any]]] = []
    real = sessions.open_graph

    def noting(folder: Path, name: str, **settings: Any) -> sessions.Graph:
        names.append((name, dict(settings)))
        return real(folder, name, **settings)

    monkeypatch.setattr(sessions, "open_graph", noting)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *CPU[1:]])
    return names


@pytest.mark.parametrize(
    ("schemes", "lacking"), [(("int8",), "int8"), (("fp16", "int8"), "int8"), (("int8", "int4"), "int4, int8")]
)
def test_what_a_device_lacks_is_refused_before_anything_is_opened_or_hashed(
    artifact: Path,
    tmp_path: Path,
    opened: list[Any],
    schemes: tuple[str, ...],
    lacking: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = OTHER[0]
    folder = stored_as(artifact, tmp_path / "m0", *schemes)
    monkeypatch.setattr("m0kit.opening.verify_files", lambda *_: pytest.fail("gigabytes were read first"))
    with pytest.raises(DeviceError) as caught:
        Reranker.load(folder, device=device)
    assert str(caught.value).startswith(f"{folder}: device {device!r} has no kernels for {lacking} in ONNX Runtime")
    assert "What works there: fp32, fp16, bf16; or device 'cpu'" in str(caught.value)
    assert opened == []


def test_an_engine_of_ones_own_may_know_more(artifact: Path, tmp_path: Path) -> None:
    folder = stored_as(artifact, tmp_path / "m0", "int8")
    Reranker.load(folder, device=OTHER[0], open_graph=lambda folder, name, /, **_: sessions.open_graph(folder, name))


@pytest.mark.parametrize(
    ("schemes", "memory", "packed"),
    [
        (("fp32",), "fast", False),
        (("bf16", "fp16"), "fast", False),
        (("nf4", "fp32"), "fast", False),
        (("int8", "fp32"), "fast", True),
        (("int8", "fp32"), "low", False),
        (("int8", "int4"), "fast", True),
        (("int8", "int4"), "low", True),
    ],
)
def test_integer_products_are_packed_and_floats_stay_mapped(
    artifact: Path, tmp_path: Path, opened: list[Any], schemes: tuple[str, ...], memory: Any, packed: bool
) -> None:
    """Without packing int4 is three times slower and does not round its inputs as the scheme says."""
    reranker = Reranker.load(stored_as(artifact, tmp_path / "m0", *schemes), threads=1, memory=memory)
    assert reranker.manifest.schemes == tuple(sorted(schemes))
    reranker.score([("query", "document")])
    assert {name for name, _ in opened} == {"decoder", "head"}
    assert [settings["prepack"] for _, settings in opened] == [packed] * len(opened)


def test_a_scheme_of_a_newer_m0kit_is_damage_with_the_known_ones(artifact: Path, tmp_path: Path) -> None:
    folder = stored_as(artifact, tmp_path / "m0", "fp32", "int3")
    with pytest.raises(ArtifactDamagedError, match=r"scheme 'int3' is not known; known are fp32, fp16, .*nf4"):
        Reranker.load(folder)
