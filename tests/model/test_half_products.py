"""Products in bfloat16 without units for it: the same to rounding, forward and backward; float32 stays as it is."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adamerge.model.half_products import half_products


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.first = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)
        self.last = nn.Linear(6, 2, bias=False)

    def forward(self, images):
        rows = self.convolution(images).flatten(2).transpose(1, 2)
        rows = self.first(rows)
        return self.last(torch.bmm(rows, rows.transpose(1, 2)) @ rows)


class Products(TorchDispatchMode):
    """Notes the dtypes that products are computed in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function.overloadpacket).split(".")[-1] in ("mm", "addmm", "bmm", "convolution", "convolution_backward"):
            self.dtypes |= {value.dtype for value in args if isinstance(value, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Network()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.bfloat16()
    return network


def gradients(network, units, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    with Products() as products, half_products(torch.bfloat16, images.device):
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(network(images).float().flatten(0, 1), torch.zeros(18, dtype=torch.long))
        found = torch.autograd.grad(loss, list(network.parameters()))
    return found, products.dtypes


def test_passes_agree_with_those_in_bfloat16(network, monkeypatch):
    plain, dtypes = gradients(network, {"avx512_bf16": True}, monkeypatch)
    assert dtypes == {torch.bfloat16}
    found, dtypes = gradients(network, {}, monkeypatch)
    assert dtypes == {torch.float32}
    for one, other, parameter in zip(found, plain, network.parameters(), strict=True):
        assert one.dtype == other.dtype == parameter.dtype
        assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_float32_is_left_alone(network, monkeypatch, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    left, right = torch.randn(3, 4), torch.randn(4, 2)
    with Products() as products, half_products(dtype, left.device):
        assert torch.equal(left @ right, torch.mm(left, right))
    assert products.dtypes == {torch.float32}
