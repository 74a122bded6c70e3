"""Whether tensors hold NaN or infinite values."""

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; one pass, and no memory besides."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    least, most = torch.aminmax(tensor.detach())  # both are NaN where a value is
    return math.isfinite(least.item()) and math.isfinite(most.item())
