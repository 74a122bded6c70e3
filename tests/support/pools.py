"""Pools of random weights, and the engine's two passes over them."""

import torch
from safetensors.torch import save_file

from adamerge import Coefficients, ExpertPool
from adamerge.model.granularity import Chunk
from adamerge.model.merge import merge_into, pull_back
from tests.support.adapters import random_adapter
from tests.support.toy import save_files

GRANULARITIES = ["task", "block", "layer", Chunk(7), "row", "column"]
# More entries than a tile, odd sizes, a vector, a scalar, rows shorter and longer than the batched product wants.
SHAPES = {
    "wide": (3, 50_001),
    "tall": (9_001, 33),
    "thin": (60_000, 3),
    "conv": (5, 7, 3, 3),
    "bias": (101,),
    "one": (),
}


def random_pool(tmp_path=None, experts: int = 3, file_dtype=torch.float32, **options) -> ExpertPool:
    generator = torch.Generator().manual_seed(0)
    base, *others = (
        {f"m.{name}": torch.randn(shape, generator=generator).to(file_dtype) for name, shape in SHAPES.items()}
        for _ in range(experts + 1)
    )
    named = {f"expert{e}": tensors for e, tensors in enumerate(others)}
    return ExpertPool.from_files(*save_files(tmp_path, base, named), **options)


def passes(pool: ExpertPool, granularity) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the merge and the gradient pass for fixed random coefficients and gradients."""
    generator = torch.Generator().manual_seed(1)
    coefficients = Coefficients(pool, granularity, init=0.1)
    values = torch.rand(coefficients.raw.shape, generator=generator).to(pool.device)
    gradients = {name: torch.randn(shape, generator=generator).to(pool.device) for name, shape in pool.shapes.items()}
    out = {name: torch.empty(shape, device=pool.device) for name, shape in pool.shapes.items()}
    merge_into(out, pool, coefficients.index, values)
    return out, pull_back(pool, coefficients.index, gradients)


LORA_SHAPES = {"a": (12, 7), "b": (9, 16), "conv": (6, 4, 3, 3), "c": (1, 20)}


def lora_files(folder, dtype=torch.float64, ranks=(2, 1, 3)):
    """A base and three adapters of unlike ranks, of which each leaves one weight alone."""
    generator = torch.Generator().manual_seed(5)
    base = {f"{name}.weight": torch.randn(s, generator=generator).to(dtype) for name, s in LORA_SHAPES.items()}
    base |= {f"{name}.bias": torch.randn(s[0], generator=generator).to(dtype) for name, s in LORA_SHAPES.items()}
    save_file(base, folder / "base.safetensors")
    experts = {}
    for seed, rank in enumerate(ranks):
        shapes = {name: shape for i, (name, shape) in enumerate(LORA_SHAPES.items()) if i != seed}
        experts[f"e{seed}"] = random_adapter(folder / f"e{seed}", shapes, rank, seed, lora_alpha=3)
    return folder / "base.safetensors", experts


def large_pool() -> ExpertPool:
    """Enough rows for more than 10,000 coefficients."""
    base = {"w": torch.zeros(6000, 2), "b": torch.zeros(3)}
    return ExpertPool.from_state_dicts(
        base, {name: {key: torch.randn_like(value) for key, value in base.items()} for name in ("a", "b")}
    )
