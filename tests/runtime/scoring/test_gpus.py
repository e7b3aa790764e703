"""GPUs are what the driver tells; a driver is pretended by functions that ctypes calls as it would a library's."""

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit.errors import DeviceError
from m0kit.precision import GIGABYTES
from m0kit.scoring.gpus import (
    ALLOWANCE,
    CUDA,
    NO_DRIVER,
    Devices,
    Gpu,
    check,
    chosen,
    devices,
    fits,
    free_memory,
    named,
    problem,
)

GB = 10**9
BUS = b"0000:%02x:00.0"


def driver(
    sizes: tuple[int, ...] = (24 * GB,),
    *,
    init: int = 0,
    version: int = 13000,
    capability: tuple[int, int] = (8, 6),
    context: int = 0,
    free: int = 20 * GB,
) -> Any:
    """CUDA's driver with GPUs of these sizes; `init` is what it answers when it is started."""
    contexts: list[int] = []

    def write(value: Any) -> Any:
        def function(place: Any, *_: Any) -> int:
            place[0] = value(*_) if callable(value) else value
            return 0

        return function

    def text(value: Any) -> Any:
        def function(place: int, length: int, device: int) -> int:
            ctypes.memmove(place, value(device)[: length - 1] + b"\0", len(value(device)) + 1)
            return 0

        return function

    def retain(place: Any, device: int) -> int:
        contexts.append(device)
        place[0] = 1234
        return context

    def release(device: int) -> int:
        contexts.remove(device)
        return 0

    def memory(some: Any, all_of_it: Any) -> int:
        some[0], all_of_it[0] = free, sizes[0]
        return 0

    ints = POINTER(c_int)
    library = SimpleNamespace(
        cuInit=CFUNCTYPE(c_int, c_uint)(lambda _: init),
        cuDriverGetVersion=CFUNCTYPE(c_int, ints)(write(version)),
        cuDeviceGetCount=CFUNCTYPE(c_int, ints)(write(len(sizes))),
        cuDeviceGet=CFUNCTYPE(c_int, ints, c_int)(write(lambda index: index)),
        cuDeviceGetName=CFUNCTYPE(c_int, c_void_p, c_int, c_int)(text(lambda device: b"GPU %d" % device)),
        cuDeviceGetPCIBusId=CFUNCTYPE(c_int, c_void_p, c_int, c_int)(text(lambda device: BUS % device)),
        cuDeviceTotalMem_v2=CFUNCTYPE(c_int, POINTER(c_size_t), c_int)(write(lambda device: sizes[device])),
        cuDeviceGetAttribute=CFUNCTYPE(c_int, ints, c_int, c_int)(write(lambda which, _: capability[which - 75])),
        cuDevicePrimaryCtxRetain=CFUNCTYPE(c_int, POINTER(c_void_p), c_int)(retain),
        cuDevicePrimaryCtxRelease_v2=CFUNCTYPE(c_int, c_int)(release),
        cuCtxPushCurrent_v2=CFUNCTYPE(c_int, c_void_p)(lambda found: 0 if found == 1234 else 201),
        cuCtxPopCurrent_v2=CFUNCTYPE(c_int, POINTER(c_void_p))(lambda _: 0),
        cuMemGetInfo_v2=CFUNCTYPE(c_int, POINTER(c_size_t), POINTER(c_size_t))(memory),
    )
    library.contexts = contexts
    return library


def management(memory: dict[bytes, tuple[int, int]], *, init: int = 0) -> Any:
    """NVML with GPUs by their place on the bus: total and free bytes."""
    handles = dict(enumerate(memory, 1))
    library = SimpleNamespace(shut=0)

    def version(place: int, length: int) -> int:
        ctypes.memmove(place, b"580.65.06\0", 10)
        return 0

    def handle(bus: bytes, place: Any) -> int:
        place[0] = next((number for number, each in handles.items() if each == bus), 0)
        return 0 if place[0] else 6  # NVML_ERROR_NOT_FOUND

    def info(found: int, place: Any) -> int:
        place[0], place[1] = memory[handles[found]]
        return 0

    def shut() -> int:
        library.shut += 1
        return 0

    library.nvmlInit_v2 = CFUNCTYPE(c_int)(lambda: init)
    library.nvmlShutdown = CFUNCTYPE(c_int)(shut)
    library.nvmlSystemGetDriverVersion = CFUNCTYPE(c_int, c_void_p, c_uint)(version)
    library.nvmlDeviceGetHandleByPciBusId_v2 = CFUNCTYPE(c_int, c_char_p, POINTER(c_void_p))(handle)
    library.nvmlDeviceGetMemoryInfo = CFUNCTYPE(c_int, c_void_p, POINTER(c_ulonglong))(info)
    return library


def loader(cuda: Any = None, nvml: Any = None) -> Any:
    def load(name: str) -> Any:
        found = cuda if name == CUDA else nvml
        if found is None:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return found

    return load


def test_a_gpu_is_told_with_memory_capability_and_driver() -> None:
    nvml = management({BUS % 0: (25 * GB, 20 * GB), BUS % 1: (81 * GB, 79 * GB)})
    found = devices(loader(driver((24 * GB, 80 * GB)), nvml))
    assert found == Devices(
        (
            Gpu("GPU 0", 24 * GB, 20 * GB, (8, 6), "580.65.06"),
            Gpu("GPU 1", 80 * GB, 79 * GB, (8, 6), "580.65.06"),
        ),
        "",
        (13, 0),
        "580.65.06",
    )
    assert nvml.shut == 1


def test_a_gpu_is_found_by_its_place_whatever_number_it_has_elsewhere() -> None:
    """CUDA_VISIBLE_DEVICES=1 makes the machine's second GPU CUDA's first; NVML counts all."""
    nvml = management({BUS % 9: (25 * GB, 1 * GB), BUS % 0: (25 * GB, 20 * GB)})
    assert devices(loader(driver(), nvml)).gpus[0].free == 20 * GB


@pytest.mark.parametrize(
    "nvml",
    [
        None,
        management({}, init=999),
        management({BUS % 9: (25 * GB, 20 * GB)}),
        management({BUS % 0: (80 * GB, 70 * GB)}),
        SimpleNamespace(),
    ],
    ids=["not there", "does not start", "does not know it", "knows the whole of a share", "another library"],
)
def test_free_memory_that_is_not_told_is_unknown(nvml: Any) -> None:
    (gpu,) = devices(loader(driver(), nvml)).gpus
    assert (gpu.name, gpu.memory, gpu.free) == ("GPU 0", 24 * GB, None)


def test_without_a_driver_there_are_none_and_a_reason() -> None:
    assert devices(loader()) == Devices((), NO_DRIVER)


def test_a_library_that_is_no_driver_is_none() -> None:
    found = devices(loader(SimpleNamespace()))
    assert found.gpus == ()
    assert "none of NVIDIA's drivers" in found.why


@pytest.mark.parametrize(
    ("library", "why"),
    [
        (driver(init=100), "shows no GPU"),
        (driver(()), "shows no GPU"),
        (driver(init=3), "before it was forked"),
        (driver(init=803), "was updated"),
        (driver(init=777), "CUDA error 777"),
    ],
)
def test_a_driver_that_does_not_start_says_why(library: Any, why: str) -> None:
    found = devices(loader(library, management({})))
    assert found.gpus == ()
    assert why in found.why
    assert (found.cuda, found.driver) == ((13, 0), "580.65.06"), "which may be what is wrong"


def test_free_memory_as_this_process_sees_it_leaves_no_context_behind() -> None:
    library = driver(free=7 * GB)
    assert free_memory(0, loader(library)) == 7 * GB
    assert library.contexts == []


@pytest.mark.parametrize("library", [None, driver(init=100), driver(context=2), SimpleNamespace()])
def test_free_memory_is_unknown_where_it_cannot_be_asked(library: Any) -> None:
    assert free_memory(0, loader(library)) is None


# --- which ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "ids"),
    [
        ("cuda", (0,)),
        ("cuda:0", (0,)),
        ("cuda:1", (1,)),
        ("CUDAExecutionProvider", (0,)),
        ("cuda:0,cuda:1", (0, 1)),
        ("cuda:3, cuda:1,cuda", (3, 1, 0)),
        ("cpu", ()),
        ("", ()),
        ("cuda:", ()),
        ("cuda:-1", ()),
        ("cuda:x", ()),
        ("cuda:²", ()),
        ("CPUExecutionProvider", ()),
    ],
)
def test_a_device_names_gpus(device: str, ids: tuple[int, ...]) -> None:
    assert named(device) == ids


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("cuda:0,cpu", "'cpu' cannot stand beside GPUs"),
        ("cpu,cuda", "'cpu' cannot stand beside GPUs"),
        ("cuda:0,", "'' cannot stand beside GPUs"),
        ("cuda:0,cuda:x", "'cuda:x' cannot stand"),
        ("cuda:0,cuda:0", "names a GPU twice"),
        ("cuda,cuda:0", "names a GPU twice"),
        ("cuda:1,cuda:0,cuda:1", "names a GPU twice"),
    ],
)
def test_gpus_stand_alone_and_once(device: str, why: str) -> None:
    with pytest.raises(DeviceError, match=f"^device '{device}'.*{why}.*cuda:0,cuda:1"):
        named(device)


def test_a_gpu_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    two = Devices((Gpu("A", 1), Gpu("B", 1)))
    assert chosen(1, two).name == "B"
    with pytest.raises(DeviceError, match=r"'cuda:7' is not there; there are cuda:0 \(A\), cuda:1 \(B\)"):
        chosen(7, two)
    with pytest.raises(DeviceError, match=r"^device cuda: there is no NVIDIA driver here"):
        chosen(0, Devices((), NO_DRIVER))


# --- whether it fits -----------------------------------------------------------------------------------

T4 = Gpu("T4", 16 * GB, 15 * GB, (7, 5))


def test_bf16_needs_ampere() -> None:
    assert "T4 has no bf16 (compute capability 7.5" in problem(T4, ("fp16", "bf16"), 0)
    assert "fp16" in problem(T4, ("bf16",), 0)
    for capability in ((8, 0), (9, 0), (10, 0), None):
        assert problem(Gpu("new", None, None, capability), ("bf16",), 0) == ""


def test_a_gpu_that_cuda_has_no_kernels_for_is_refused_by_name() -> None:
    old = Gpu("V100", 32 * GB, 30 * GB, (7, 0))
    assert problem(old, ("fp16",), 0).startswith(
        "V100 is too old (compute capability 7.0; CUDA 13 has kernels from 7.5"
    )
    assert fits(old, "fp16", GB) == ()
    with pytest.raises(DeviceError, match=r"^m0-fp16: V100 is too old .* Take another device\.$"):
        check(old, ("fp16",), 0, "m0-fp16")
    check(T4, ("fp16",), 0, "m0-fp16")


@pytest.mark.parametrize(
    ("free", "fitting"),
    [(12 * GB, "fp32"), (7 * GB, "fp16"), (4.5 * GB, "int8"), (4 * GB, "int4"), (3.62 * GB, "nf4"), (2 * GB, None)],
)
def test_what_does_not_fit_is_told_with_what_would(free: float, fitting: str | None) -> None:
    gpu = Gpu("small", 24 * GB, int(free), (7, 5))
    said = problem(gpu, ("fp32",), 8_900_000_000)
    if fitting == "fp32":
        assert said == ""
    elif fitting is None:
        assert "too little for any precision" in said
    else:
        assert f"it takes 11.1 GB on small, of which {free / 1e9:.1f} GB is free. Export it in {fitting}" in said


def test_a_limit_counts_as_the_memory_that_there_is() -> None:
    assert problem(T4, ("fp16",), 4_450_000_000) == ""
    assert "4.0 GB is allowed. Export it in int4" in problem(T4, ("fp16",), 4_450_000_000, 4 * GB)


@given(st.sampled_from(sorted(GIGABYTES)), st.integers(0, 20 * GB), st.floats(0.01, 2))
def test_a_precision_that_is_named_fits(scheme: str, free: int, scale: float) -> None:
    gpu = Gpu("g", 24 * GB, free, (7, 5))
    num_bytes = int(GIGABYTES[scheme] * scale * GB)
    said = problem(gpu, (scheme,), num_bytes)
    if scheme != "bf16":
        assert (said == "") is (num_bytes + ALLOWANCE <= free)
    if (name := next((name for name in GIGABYTES if f"Export it in {name}, which fits" in said), None)) is not None:
        assert problem(gpu, (name,), int(GIGABYTES[name] * scale * GB)) == ""


def test_what_is_not_known_speaks_for_the_gpu() -> None:
    assert problem(Gpu("g", None), ("fp32",), 10**12) == ""
