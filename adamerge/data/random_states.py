"""Random numbers that depend on a key alone, and the states of the generators for checkpoints."""

import contextlib
import random
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def permutation(length: int, key: str) -> Tensor:
    """Return a random order of ``length`` positions that depends on ``key`` alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


@contextlib.contextmanager
def seeded(key: str) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators by ``key`` alone, and give them their states back."""
    states = generator_states(cuda=False)
    seed = zlib.crc32(key.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # the processor's only: images are not drawn on a GPU
    try:
        yield
    finally:
        set_generator_states(states)


def generator_states(cuda: bool = True) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators as tensors and plain values, for checkpoints."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    key = torch.from_numpy(numpy["state"]["key"].view(np.int32).copy())
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_initialized() else [],
    }


def set_generator_states(states: Mapping[str, Any]) -> None:
    """Undo what has been drawn since :func:`generator_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = dict(states["numpy"])
    key = numpy["state"]["key"].cpu().numpy().view(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
