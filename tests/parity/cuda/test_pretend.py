"""A CUDA device that is not there, with a provider of a few lines in place of onnxruntime-gpu's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m0kit.errors import DependencyError
from m0kit_parity.cuda.pretend import main, prepare

PROVIDER = r"""
int cudaMalloc(void **, unsigned long), cudaMemcpyAsync(void *, void *, unsigned long, int, void *);
int cudaLaunchKernel(), cudaStreamSynchronize(), cudaOfNextYear();
int work(void) {
  char here[3];
  void *there;
  return cudaMalloc(&there, 3) + cudaMemcpyAsync(there, "abc", 3, 1, 0) + cudaMemcpyAsync(here, there, 3, 2, 0) +
         cudaLaunchKernel() + cudaStreamSynchronize() + cudaOfNextYear() + (here[2] != 'c');
}
int too_much(void) { void *there; return cudaMalloc(&there, 1ul << 40); }
"""
PROGRAM = """
import ctypes
import onnxruntime
from m0kit_parity.cuda.pretend import counted
provider = ctypes.CDLL(onnxruntime.PROVIDER)
assert provider.work() == 0
assert provider.too_much() == 2
print(counted(), onnxruntime.FILES)
"""
PACKAGE = """
from pathlib import Path
capi = Path(__file__).parent / "capi"
PROVIDER = str(capi / "libonnxruntime_providers_cuda.so")
FILES = sorted(each.name for each in capi.iterdir())
"""
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, ("cc", "nm", "objdump"))),
    reason="the device is compiled, for Linux",
)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    capi = tmp_path / "site" / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    (capi.parent / "__init__.py").write_text(PACKAGE)
    (capi / "libonnxruntime_providers_tensorrt.so").write_bytes(b"would not load")
    provider = capi / "libonnxruntime_providers_cuda.so"
    command = ["cc", "-w", "-shared", "-fPIC", "-x", "c", "-", "-o", str(provider)]
    subprocess.run(command, input=PROVIDER, text=True, check=True)
    return tmp_path / "site"


@needs_compiler
def test_what_a_provider_asks_for_is_answered_and_counted(site: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(site), "-c", PROGRAM]) == 0
    printed = capfd.readouterr().out
    assert "Counted(launches=1, waits=1, bytes_to_host=3)" in printed
    assert "libonnxruntime_providers_tensorrt.so" in printed  # ours, in its place


@needs_compiler
def test_all_is_set_up_beside_the_site_which_stays_as_it_is(site: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    aside = tmp_path / "aside"
    aside.mkdir()
    environment = prepare(site, aside)
    assert {path: path.read_bytes() for path in before} == before
    assert all(str(aside) in environment[name] for name in ("PYTHONPATH", "LD_PRELOAD", "LD_LIBRARY_PATH"))


@needs_compiler
def test_the_programs_exit_code_is_passed_on(site: Path) -> None:
    assert main([str(site), "-c", "raise SystemExit(7)"]) == 7


def test_a_folder_without_onnxruntime_gpu_is_refused_with_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DependencyError, match=r"pip install --no-deps --target .* onnxruntime-gpu=="):
        prepare(tmp_path, tmp_path)
    assert main([str(tmp_path), "-c", ""]) == 2
    assert "no onnxruntime-gpu is in it" in capsys.readouterr().err


def test_too_few_arguments_say_what_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "SITE PROGRAM" in capsys.readouterr().err
