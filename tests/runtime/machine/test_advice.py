"""Every machine gets one recommendation, by the rules."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit.machine.advice import NEEDS, Against, OnGpu, advise, fit, on_gpus
from m0kit.machine.detect import FEATURES, Machine
from m0kit.precision import SCHEMES, supported
from m0kit.scoring import gpus
from m0kit.scoring.gpus import Gpu

GB = 10**9
CPU = ("CPUExecutionProvider",)
CUDA = ("CUDAExecutionProvider", "CPUExecutionProvider")


def machine(**known: Any) -> Machine:
    """A laptop with VNNI, 16 GB and much free disk, except for what is `known` of it."""
    flags = {"avx2": True, "avx512": True, "vnni": True, "amx": False}
    usual = Machine("Linux", "x86_64", "a CPU", flags, 8, 16 * GB, 12 * GB, (), "1.32.0", CPU, 100 * GB)
    return replace(usual, **known)


def features(arch: str, *present: str) -> dict[str, bool | None]:
    return {name: name in present for name in FEATURES[arch]}


RULES = [
    # what machine, precision, device, a word of the reason
    ({}, "int8", "cpu", "VNNI"),
    ({"features": features("x86_64", "avx2")}, "int8", "cpu", "AVX2"),
    ({"features": features("x86_64", "avx2", "vnni", "amx")}, "int8", "cpu", "AMX"),
    ({"arch": "arm64", "features": features("arm64", "dotprod", "i8mm")}, "int8", "cpu", "i8mm"),
    ({"arch": "riscv64", "features": {}}, "int8", "cpu", "size"),
    ({"memory": int(4.8 * GB)}, "int8", "cpu", "4.8 GB are there"),
    ({"memory": int(4.8 * GB) - 1}, "int4", "cpu", "int8 wants 4.8 GB"),
    ({"memory": GB // 2}, "int4", "cpu", "smallest"),
    ({"memory": None}, "int8", "cpu", "size"),
    ({"free_disk": 2 * GB}, "int4", "cpu", "disk has no room"),
    ({"free_disk": None}, "int8", "cpu", "VNNI"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),)}, "fp16", "cuda", "T4 through CUDA with 16.0 GB"),
    ({"providers": CUDA, "gpus": (Gpu("GTX", 6 * GB),)}, "int8", "cuda", "with 6.0 GB"),
    ({"providers": CUDA, "gpus": (Gpu("GTX", 4 * GB),)}, "int4", "cuda", "with 4.0 GB"),
    ({"providers": CUDA, "gpus": (Gpu("MX", 2 * GB),)}, "int8", "cpu", "VNNI"),
    ({"providers": CUDA, "gpus": (Gpu("Jetson", None),)}, "fp16", "cuda", "Jetson"),
    ({"providers": CUDA, "gpus": (Gpu("MX", 2 * GB), Gpu("T4", 16 * GB))}, "fp16", "cuda", "T4"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),), "free_disk": 3 * GB}, "int8", "cuda", "T4"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),), "free_disk": 2 * GB}, "int4", "cuda", "T4"),
    ({"providers": CUDA, "gpus": ()}, "int8", "cpu", "VNNI"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),), "cuda": "no libcublas"}, "int8", "cpu", "VNNI"),
    ({"providers": CPU, "gpus": (Gpu("T4", 16 * GB),)}, "int8", "cpu", "VNNI"),
    ({"providers": CUDA, "gpus": (Gpu("V100", 32 * GB, None, (7, 0)),)}, "int8", "cpu", "VNNI"),
    ({"onnxruntime": None, "providers": ()}, "int8", "cpu", "VNNI"),
]


@pytest.mark.parametrize(("known", "precision", "device", "word"), RULES)
def test_the_rules(known: dict[str, Any], precision: str, device: str, word: str) -> None:
    advice = advise(machine(**known))
    assert (advice.precision, advice.device) == (precision, device)
    assert word in advice.why


sizes = st.none() | st.integers(0, 200 * GB)
machines = st.sampled_from(["x86_64", "arm64", "ppc64le"]).flatmap(
    lambda arch: st.builds(
        Machine,
        st.sampled_from(["Linux", "Darwin", "Windows", ""]),
        st.just(arch),
        st.text(max_size=5),
        st.fixed_dictionaries({name: st.sampled_from([True, False, None]) for name in FEATURES.get(arch, ())}),
        st.integers(1, 256),
        sizes,
        sizes,
        st.lists(st.builds(Gpu, st.just("gpu"), sizes), max_size=2).map(tuple),
        st.sampled_from([None, "1.22.1", "1.30.0", "1.32.0", "2.0", "odd"]),
        st.sampled_from([(), CPU, CUDA, ("CoreMLExecutionProvider", *CPU)]),
        sizes,
    )
)


@given(machines)
def test_every_machine_gets_one_recommendation_and_a_reason_against_each_other_precision(any_machine: Machine) -> None:
    advice = advise(any_machine)
    assert {advice.precision, *advice.others} == set(NEEDS)
    assert advice.precision not in advice.others
    assert advice.why
    assert all(against.why for against in advice.others.values())
    assert all("None" not in text for text in (advice.why, *advice.notes, *(o.why for o in advice.others.values())))
    need, has = NEEDS[advice.precision], any_machine
    if advice.device == "cuda":
        assert "CUDAExecutionProvider" in has.providers
        assert any(gpu.memory is None or gpu.memory >= need.gpu * GB for gpu in has.gpus)
    elif has.memory is not None and has.memory >= NEEDS["int8"].peak * GB:
        assert has.memory >= need.peak * GB, "never more than the machine holds"
    if has.free_disk is not None and has.free_disk >= NEEDS["int4"].disk * GB:
        assert has.free_disk >= need.disk * GB
    json.dumps(advice.notes)


@given(machines, st.sampled_from([*NEEDS, "int2"]), st.integers(0, 10 * GB))
def test_every_artifact_gets_a_verdict_with_reasons(any_machine: Machine, scheme: str, num_bytes: int) -> None:
    result = fit(any_machine, scheme, num_bytes)
    assert result.why
    if result.verdict == "suits":
        assert scheme in NEEDS
        if any_machine.memory is not None:
            assert any_machine.memory >= num_bytes * NEEDS[scheme].peak / NEEDS[scheme].disk


def test_the_table_has_the_precisions_and_kernels_that_the_runtime_has() -> None:
    assert set(NEEDS) == set(SCHEMES)
    assert set(supported("cuda")) == set(NEEDS)


def test_less_memory_never_asks_for_a_larger_precision() -> None:
    order = [advise(machine(memory=gb * GB)).precision for gb in range(32)]
    assert [NEEDS[name].peak for name in order] == sorted(NEEDS[name].peak for name in order)
    on_gpu = [advise(machine(providers=CUDA, gpus=(Gpu("g", gb * GB),))) for gb in range(32)]
    assert [a.precision for a in on_gpu if a.device == "cuda"] == ["int4", *["int8"] * 2, *["fp16"] * 25]


def test_reasons_against_are_those_of_the_machine() -> None:
    cpu = advise(machine()).others
    assert cpu["fp32"].possible
    assert "computes in fp32" in cpu["fp16"].why
    assert "less memory" in cpu["int4"].why
    assert "QLoRA" in cpu["nf4"].why
    gpu = advise(machine(providers=CUDA, gpus=(Gpu("T4", 16 * GB),))).others
    assert gpu["int8"] == gpu["int4"]
    assert "only saves memory" in gpu["int8"].why
    little = advise(machine(providers=CUDA, gpus=(Gpu("GTX", 6 * GB),))).others
    assert little["fp16"] == Against(False, "needs about 6.7 GB of GPU memory, there are 6.0 GB")
    old = advise(machine(providers=CUDA, gpus=(Gpu("T4", 16 * GB, None, (7, 5)),))).others
    assert old["bf16"] == Against(False, "T4 has no bf16, which came with compute capability 8.0")
    assert old["fp32"].possible
    small = advise(machine(memory=2 * GB)).others
    assert "read again and again" in small["int8"].why
    assert "wants 4.8 GB of memory, here are 4.0 GB" in advise(machine(memory=4 * GB)).others["int8"].why
    assert not advise(machine(memory=GB // 4)).others["int8"].possible
    full = advise(machine(free_disk=3 * GB)).others
    assert full["fp32"] == Against(False, "takes 8.9 GB of disk, 3.0 GB are free")


NOTES = [
    ({"onnxruntime": None}, "not installed: pip install 'm0kit"),
    ({"onnxruntime": "1.29.1"}, "1.29.1 is too old: artifacts need 1.30"),
    ({"gpus": (Gpu("T4", 16 * GB),)}, "T4 is not used: .* pip install 'm0kit.gpu.'"),
    ({"providers": CUDA, "cuda": "device cuda: there is no NVIDIA driver"}, "there is no NVIDIA driver"),
    ({"gpus": (Gpu("T4", 16 * GB),), "cuda": "both are installed"}, "both are installed"),
    ({"providers": CUDA, "gpus": (Gpu("MX", 2 * GB),)}, "MX is not used: its memory"),
    ({"providers": CUDA, "gpus": (Gpu("V100", 32 * GB, None, (7, 0)),)}, "V100 is not used: CUDA 13 has kernels from"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB, None, (7, 5)),)}, "T4 is older than Ampere .* more slowly"),
    ({"providers": CUDA, "gpus": (Gpu("Jetson", None),)}, "memory is unknown; fp16 needs about 6.7 GB"),
    ({"providers": ("CoreMLExecutionProvider", *CPU)}, "not considered: CoreMLExecutionProvider"),
    ({"free_disk": GB}, "int4 takes 1.45 GB of disk, 1.0 GB are free"),
    ({"features": features("x86_64")}, "this CPU has no instructions"),
    ({"features": dict.fromkeys(FEATURES["arm64"])}, "it is unknown whether this CPU has"),
    ({"memory": None}, "the memory is unknown; int8 wants 4.8 GB"),
    ({"memory": GB}, "even the smallest takes about 1.7 GB"),
    ({"available": GB}, "only 1.0 GB of memory are free now; scoring a page takes 2.4 GB"),
]


@pytest.mark.parametrize(("known", "note"), NOTES)
def test_what_else_is_worth_knowing_is_said_where_it_holds(known: dict[str, Any], note: str) -> None:
    assert [text for text in advise(machine(**known)).notes if re.search(note, text)]
    assert advise(machine()).notes == ()
    assert advise(machine(providers=("AzureExecutionProvider", *CPU))).notes == ()


def test_onnxruntime_is_held_to_its_oldest_version() -> None:
    verdicts = {
        version: fit(machine(onnxruntime=version), "int8", GB).verdict for version in ("1.29.9", "1.30.0", "2.0")
    }
    assert verdicts == {"1.29.9": "cannot run", "1.30.0": "suits", "2.0": "suits"}


FITS = [
    # what machine, precision, GB, verdict, a word of the reason
    ({}, "int8", 2.6, "suits", "int8 on the CPU"),
    ({}, "fp32", 8.9, "works", "int8 on the CPU suits this machine better. fp32: exact"),
    ({"memory": 4 * GB, "available": 4 * GB}, "int4", 1.45, "suits", "int4 on the CPU"),
    ({"memory": 4 * GB}, "fp32", 8.9, "works", "read from disk again and again"),
    ({"memory": GB // 4}, "int8", 2.6, "cannot run", "0.6 GB of private memory, the machine has 0.2 GB"),
    ({"available": GB}, "int8", 2.6, "works", "only 1.0 GB of memory are free now"),
    ({"memory": 4 * GB, "available": 4 * GB}, "int8", 0.02, "suits", "int8 on the CPU"),
    ({"free_disk": 0}, "int8", 2.6, "suits", "int8 on the CPU"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),)}, "int8", 2.6, "works", "only saves memory"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),)}, "fp16", 4.45, "suits", "fp16 on the GPU"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 6 * GB),)}, "fp16", 4.45, "works", "int8 on the GPU"),
    ({}, "int2", 1.0, "works", "knows nothing of the precision int2"),
    ({"onnxruntime": None}, "int8", 2.6, "cannot run", "not installed"),
]


@pytest.mark.parametrize(("known", "scheme", "gigabytes", "verdict", "word"), FITS)
def test_an_artifact_is_held_against_the_machine(
    known: dict[str, Any], scheme: str, gigabytes: float, verdict: str, word: str
) -> None:
    result = fit(machine(**known), scheme, int(gigabytes * GB))
    assert result.verdict == verdict
    assert word in " ".join(result.why)


def test_each_gpu_is_told_what_fits_on_it() -> None:
    old, small = Gpu("T4", 16 * GB, 15 * GB, (7, 5)), Gpu("A2", 16 * GB, 4 * GB, (8, 6))
    both = machine(providers=CUDA, gpus=(old, small))
    first, second = on_gpus(both, ("fp16",), int(4.45 * GB))
    assert first == OnGpu("cuda:0", "", ("fp32", "fp16", "int8", "int4", "nf4"))
    assert (second.device, second.fits) == ("cuda:1", ("int4", "nf4"))
    assert second.problem == gpus.problem(small, ("fp16",), int(4.45 * GB)) != ""
    assert [each.problem for each in on_gpus(both, ("bf16",), GB)] == [gpus.problem(old, ("bf16",), GB), ""]
    assert [each.problem for each in on_gpus(both, ("new",), GB)] == ["there are no CUDA kernels for new"] * 2
    assert on_gpus(replace(both, providers=CPU), ("fp16",), GB)[0].problem == "this onnxruntime has no CUDA"
    assert on_gpus(replace(both, cuda="no libcublas"), ("fp16",), GB)[0].problem == "CUDA does not start"
    assert on_gpus(machine(), ("fp16",), GB) == ()
