"""Frozen classifiers in a file beside the models."""

import pytest
import torch
from safetensors.torch import save_file

from adamerge.backbones.classifiers import read_classifiers
from adamerge.errors import InputError


def test_classifiers_are_linear_and_frozen(tmp_path):
    weight, bias, features = torch.randn(3, 4), torch.randn(3), torch.randn(2, 4)
    save_file({"a.weight": weight, "a.bias": bias, "b.c.weight": weight.half()}, tmp_path / "heads.safetensors")
    heads = read_classifiers(tmp_path / "heads.safetensors", ["a", "b.c"])
    assert torch.allclose(heads["a"](features), features @ weight.T + bias)
    assert torch.allclose(heads["b.c"](features), features @ weight.half().float().T)
    assert not any(parameter.requires_grad for head in heads.values() for parameter in head.parameters())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"movie.weight": torch.ones(2, 4)}, "no movies.weight. Did you mean 'movie'"),
        ({"movies.weight": torch.ones(4)}, r"movies: expected weight \(C, F\) and bias \(C,\), found"),
        ({"movies.weight": torch.ones(2, 4), "movies.bias": torch.ones(3)}, r"bias \(C,\), found"),
    ],
)
def test_classifiers_that_do_not_fit_are_named(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "heads.safetensors")
    with pytest.raises(InputError, match=message):
        read_classifiers(tmp_path / "heads.safetensors", ["movies"])


def test_classifiers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
        read_classifiers(tmp_path / "none.safetensors", ["movies"])
