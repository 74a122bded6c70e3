"""Checkpoints written tensor by tensor."""

from pathlib import Path

import pytest
import torch

from adamerge.checkpoints.checkpoint import drop_mapped_pages, open_checkpoint
from adamerge.checkpoints.writing import save_state_dict, save_tensors

TENSORS = {
    "half": torch.arange(7, dtype=torch.bfloat16),
    "whole": torch.randn(3, 5, dtype=torch.float64),
    "none": torch.empty(0, 4),
    "one": torch.tensor(3),
    "turned": torch.randn(4, 6).T,
}
SPECS = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_the_order_in_which_tensors_come_does_not_matter(tmp_path: Path) -> None:
    save_state_dict(TENSORS, tmp_path / "a", {"note": "x"})
    save_tensors(SPECS, reversed(list(TENSORS.items())), tmp_path / "b", {"note": "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = open_checkpoint(tmp_path / "a")
    for _ in range(2):
        assert all(torch.equal(read.get(name), tensor) for name, tensor in TENSORS.items())
        drop_mapped_pages()  # what is read again is the same


def test_tensors_that_end_early_leave_nothing(tmp_path: Path) -> None:
    def broken():
        yield "half", TENSORS["half"]
        raise KeyboardInterrupt

    for tensors, error in ((broken(), KeyboardInterrupt), (iter([("half", TENSORS["half"])]), ValueError)):
        with pytest.raises(error):
            save_tensors(SPECS, tensors, tmp_path / "a")
    assert not list(tmp_path.iterdir())
