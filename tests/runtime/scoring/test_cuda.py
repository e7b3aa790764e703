"""CUDA starts where all is there; what is missing is named, and so is what failed in a run."""

import ctypes
import io
import pickle
import sys
import threading
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from m0kit.errors import DeviceError, DeviceLostError, InputError, M0kitError
from m0kit.scoring import cuda, gpus
from m0kit.scoring.gpus import CUDA, NO_DRIVER, Devices, Gpu

READY = Devices((Gpu("A", 24 * 10**9),), "", (13, 0), "580.65.06")
MISSING = "{}: cannot open shared object file: No such file or directory"


class Engine(ModuleType):
    """What `start` needs of onnxruntime, which prints where a library is missing."""

    __version__ = "1.31.1"

    def __init__(self, folder: Path, cuda_version: str | None = "13.0") -> None:
        super().__init__("onnxruntime")
        self.__file__ = str(folder / "onnxruntime" / "__init__.py")
        self.cuda_version = cuda_version
        self.preloaded = 0
        self.severity: int | None = None
        self.providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        # As the real one does it: `print` is looked up in the module, then among the builtins.
        code = "def preload_dlls():\n global preloaded\n preloaded += 1\n print('Failed to load libcublasLt.so.13')"
        exec(code, self.__dict__)

    def get_available_providers(self) -> list[str]:
        return self.providers

    def set_default_logger_severity(self, severity: int) -> None:
        self.severity = severity


class Loader:
    """Loads what is there; the provider needs libraries in their order."""

    def __init__(self, *there: str, needed: tuple[str, ...] = ("libcublasLt.so.13", "libcublas.so.13", CUDA)) -> None:
        self.there, self.needed = set(there), needed
        self.last = "libonnxruntime_providers_cuda.so: undefined symbol: Provider_GetHost"
        self.loaded: list[str] = []

    def __call__(self, name: str) -> Any:
        self.loaded.append(name)
        if name.endswith("libonnxruntime_providers_cuda.so"):
            for library in self.needed:
                if library not in self.there:
                    raise OSError(MISSING.format(library))
            raise OSError(self.last)
        self.there.add(Path(name).name)
        return object()


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says what GPUs there are."""

    def say(devices: Devices) -> None:
        monkeypatch.setattr(gpus, "devices", lambda _: devices)

    monkeypatch.setattr(sys, "platform", "linux")
    say(READY)
    return say


def test_what_wheels_have_is_loaded_and_nothing_printed(found: Any, tmp_path: Path) -> None:
    engine, load = Engine(tmp_path), Loader("libcublasLt.so.13", "libcublas.so.13", CUDA)
    with redirect_stdout(io.StringIO()) as printed:
        assert cuda.start(engine, load) is READY
        assert cuda.start(engine, load) is READY
    assert printed.getvalue() == ""
    assert engine.preloaded == 2
    assert engine.severity == 4
    assert not hasattr(engine, "print"), "it has its own again"
    assert load.loaded[0] == str(tmp_path / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so")


def test_threads_that_start_at_once_all_start(found: Any, tmp_path: Path) -> None:
    engine, load, done = Engine(tmp_path), Loader("libcublasLt.so.13", "libcublas.so.13", CUDA), []
    threads = [threading.Thread(target=lambda: done.append(cuda.start(engine, load))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [READY] * 8


def test_wheels_are_looked_for_on_all_of_pythons_path(
    found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime looks beside itself alone."""
    library = tmp_path / "user" / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "none"), str(tmp_path / "user")])
    load = Loader("libcublas.so.13", CUDA)
    cuda.start(Engine(tmp_path), load)
    assert str(library) in load.loaded


@pytest.mark.parametrize("name", ["libcublasLt.so.13", "libcublas.so.13"])
def test_a_missing_library_is_named(found: Any, tmp_path: Path, name: str) -> None:
    there = {"libcublasLt.so.13", "libcublas.so.13", CUDA} - {name}
    with pytest.raises(DeviceError) as caught:
        cuda.start(Engine(tmp_path), Loader(*there))
    assert str(caught.value) == (
        f"device cuda: {name} is missing, which onnxruntime-gpu 1.31.1 needs. pip install 'm0kit[gpu]' brings it; "
        "or say device 'cpu'."
    )


def test_libraries_of_another_cuda_are_named(found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13"
    other.parent.mkdir(parents=True)
    other.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(DeviceError, match=r"so.12 is missing \(there is libcublasLt.so.13, .* another CUDA"):
        cuda.start(Engine(tmp_path, "12.8"), Loader(CUDA, needed=("libcublasLt.so.12", CUDA)))


def test_a_wheel_whose_library_does_not_help_is_tried_once(
    found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def load(name: str) -> Any:
        if Path(name).name.startswith("libonnxruntime"):
            raise OSError(MISSING.format("libcublasLt.so.13"))

    with pytest.raises(DeviceError, match=r"libcublasLt\.so\.13 is missing"):
        cuda.start(Engine(tmp_path), load)


def test_an_onnxruntime_without_cuda_says_what_to_install(
    found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tmp_path)
    engine.providers = ["CPUExecutionProvider"]
    monkeypatch.setattr(cuda, "both_installed", lambda: "")
    with pytest.raises(DeviceError, match=r"has CPUExecutionProvider, not CUDA.*pip install 'm0kit\[gpu\]' in"):
        cuda.start(engine, Loader())
    monkeypatch.setattr(cuda, "both_installed", lambda: "Both are installed.")
    with pytest.raises(DeviceError, match=r"not CUDAExecutionProvider. Both are installed.$"):
        cuda.start(engine, Loader())


def test_without_a_driver_it_says_so(found: Any, tmp_path: Path) -> None:
    found(Devices((), NO_DRIVER))
    with pytest.raises(DeviceError, match=r"^device cuda: there is no NVIDIA driver here .*; or say device 'cpu'\.$"):
        cuda.start(Engine(tmp_path), Loader())


def test_a_driver_that_is_too_old_is_told_with_both_versions(found: Any, tmp_path: Path) -> None:
    found(Devices((), "CUDA error 3", (12, 4), "550.54.14"))
    with pytest.raises(DeviceError) as caught:
        cuda.start(Engine(tmp_path), Loader())
    assert str(caught.value) == (
        "device cuda: the NVIDIA driver 550.54.14 is too old: it runs CUDA up to 12.4, and onnxruntime-gpu 1.31.1 is "
        "made for CUDA 13. Update the driver to 580 or newer; or say device 'cpu'."
    )


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.30' not found", r"too old for it \(GLIBCXX_3.4.30 is missing\)"),
        ("file too short", "cannot be loaded. Install onnxruntime-gpu 1.31.1 again"),
        ("libonnxruntime_providers_cuda.so: cannot open shared object file: No such file", "is missing. Install"),
    ],
)
def test_a_provider_that_cannot_be_loaded_says_why(found: Any, tmp_path: Path, said: str, why: str) -> None:
    load = Loader(needed=())
    load.last = said
    with pytest.raises(DeviceError, match=why):
        cuda.start(Engine(tmp_path), load)


def test_where_both_packages_are_installed_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": "1.32.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(cuda, "version", version)
    assert cuda.both_installed() == ""
    versions["onnxruntime-gpu"] = "1.31.1"
    assert cuda.both_installed().startswith("onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed")


def test_options_keep_float32_whole_and_the_arena_small() -> None:
    assert cuda.provider_options() == {
        "device_id": "0",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_skip_layer_norm_strict_mode": "1",
    }
    assert cuda.provider_options(3, 4 << 30)["gpu_mem_limit"] == str(4 << 30)
    assert cuda.provider_options(3)["device_id"] == "3"


# --- what failed -----------------------------------------------------------------------------------------

FAILURE = "CUDA failure {}: some words ; GPU=0 ; hostname=secret ; file=/onnxruntime_src/x.cc ; line=1 ; expr=f(); "


def no_driver(name: str) -> Any:
    raise OSError(MISSING.format(name))


@pytest.mark.parametrize(
    ("text", "kind", "why"),
    [
        (FAILURE.format(700), DeviceLostError, r"cuda:1 was lost .*\(CUDA error 700\).* start it again"),
        (FAILURE.format(719), DeviceLostError, "CUDA error 719"),
        (FAILURE.format(46), DeviceLostError, "CUDA error 46"),
        ("CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR ; GPU=0", DeviceLostError, "was lost"),
        ("cudaErrorDevicesUnavailable", DeviceLostError, "was lost"),
        ("device-side assert triggered", DeviceLostError, "was lost"),
        (FAILURE.format(2), M0kitError, "memory of the GPU cuda:1 ran out. Lower max_pixels"),
        ("Failed to allocate memory for requested buffer of size 99", M0kitError, "ran out"),
        ("Available memory of 5 is smaller than requested bytes of 9", M0kitError, "ran out"),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", M0kitError, "ran out"),
        (FAILURE.format(35), DeviceError, "driver is too old"),
        (FAILURE.format(209), DeviceError, "no kernels for the GPU cuda:1"),
        ("but fallback to CPU EP has been explicitly disabled by the user.", DeviceError, "no CUDA kernel for one of"),
        ("Could not find an implementation for Foo(1) node", DeviceError, "no CUDA kernel for one of"),
        (FAILURE.format(1), M0kitError, r"failed on the GPU cuda:1 \(RuntimeError, CUDA error 1\)"),
        ("Invalid rank for input", M0kitError, r"failed on the GPU cuda:1 \(RuntimeError\)"),
    ],
)
def test_a_failure_is_told_for_what_it_is(text: str, kind: type[M0kitError], why: str) -> None:
    error = cuda.told(RuntimeError(text), 1, no_driver)
    assert type(error) is kind
    with pytest.raises(kind, match=why):
        raise error
    assert "secret" not in str(error)
    assert "/onnxruntime_src" not in str(error)


def test_memory_that_ran_out_is_told_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "free_memory", lambda device_id, _: {2: 1_200_000_000}[device_id])
    assert "(1.2 GB are free beside" in str(cuda.told(RuntimeError("Failed to allocate memory"), 2))


def test_an_error_of_ours_stays_what_it_is() -> None:
    error = InputError("no words")
    assert cuda.told(error) is error


def test_a_lost_gpu_is_a_device_error_that_travels() -> None:
    error = pickle.loads(pickle.dumps(cuda.told(RuntimeError(FAILURE.format(719)), 0, no_driver)))
    assert type(error) is DeviceLostError
    assert isinstance(error, DeviceError)


@pytest.mark.skipif(sys.platform != "linux", reason="the loader's words are Linux's")
def test_the_loader_says_what_is_missing_as_expected() -> None:
    with pytest.raises(OSError, match=r"^libnone\.so\.7: cannot open shared object file"):
        ctypes.CDLL("libnone.so.7")
