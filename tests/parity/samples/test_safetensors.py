"""A file written slice by slice is what the safetensors package reads, and writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m0kit_parity.samples.safetensors import write

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "c": torch.arange(5, dtype=torch.float16),
}
FORMS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("slices", [1, 2, 7])
def test_what_is_written_in_slices_is_read_whole(tmp_path: Path, slices: int) -> None:
    values = (part for tensor in TENSORS.values() for part in tensor.reshape(-1).tensor_split(slices))
    assert write(tmp_path / "file", FORMS, values) == 24 + 4 + 10
    read = load_file(tmp_path / "file")
    assert list(read) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_file_has_the_size_and_the_values_of_the_packages_own(tmp_path: Path) -> None:
    write(tmp_path / "ours", FORMS, TENSORS.values())
    save_file(TENSORS, tmp_path / "theirs", {"format": "pt"})
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    header = int.from_bytes(ours[:8], "little")
    assert header % 8 == 0
    assert sorted(ours[8 + header :]) == sorted(theirs[-38:])  # it sorts tensors by the size of their values
