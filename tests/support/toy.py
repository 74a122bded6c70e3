"""A small encoder with every kind of parameter, and a pool of experts made from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge import Coefficients, ExpertPool, MergedModel, Outputs, TaskStep
from adamerge.methods.step import StepResult
from adamerge.model.groups import GroupIndex
from adamerge.model.merged_encoder import MergedEncoder

EXPERTS = ("red", "green", "blue")
CLASSES = {"red": 3, "green": 4, "blue": 3}


class ToyBlock(nn.Module):
    """A residual block, wide inside."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class ToyEncoder(nn.Module):
    """Images (B, 1, 4, 4) to features (B, 5): parameters of 0, 1, 2 and 4 dimensions, an integer and a float buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 2, stride=2)
        self.blocks = nn.ModuleList([ToyBlock(16, 7), ToyBlock(16, 6)])
        self.proj = nn.Parameter(torch.randn(16, 5) * 0.3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("offset", torch.full((5,), 0.1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(1)
        for block in self.blocks:
            x = block(x)
        return x @ self.proj * self.scale + self.offset


@dataclass
class Toy:
    """An encoder, its state dict, three experts, a head and a batch for each task."""

    encoder: nn.Module
    base: dict[str, Tensor]
    experts: dict[str, dict[str, Tensor]]
    heads: dict[str, nn.Module]
    inputs: dict[str, Tensor]
    indices: dict[str, Tensor]

    def pool(self, **options: object) -> ExpertPool:
        return ExpertPool.from_state_dicts(self.base, self.experts, **options)

    def model(self, pool: ExpertPool, coefficients: Coefficients, **options: object) -> MergedModel:
        return MergedModel(self.encoder, pool, coefficients, self.heads, **options)


def make_toy(dtype: torch.dtype = torch.float32, seed: int = 0, batch: int = 4) -> Toy:
    """Make a toy problem; the same seed gives the same values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = ToyEncoder().to(dtype)
        base = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
        experts = {name: perturbed(base) for name in EXPERTS}
        heads = {task: nn.Linear(5, CLASSES[task]).to(dtype) for task in EXPERTS}
        inputs = {task: torch.randn(batch, 1, 4, 4, dtype=dtype) for task in EXPERTS}
    indices = {task: torch.arange(batch) for task in EXPERTS}
    return Toy(encoder, base, experts, heads, inputs, indices)


def perturbed(base: Mapping[str, Tensor], size: float = 0.1) -> dict[str, Tensor]:
    """Return a state dict that differs from ``base`` in every entry of its floating-point tensors."""
    return {
        name: tensor + size * torch.randn_like(tensor) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in base.items()
    }


def save_files(folder, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], prefix: str = ""):
    """Write base and experts as safetensors; return the paths as ``from_files`` takes them."""
    paths = {}
    for name, tensors in {"base": base, **experts}.items():
        paths[name] = folder / f"{name}.safetensors"
        save_file({prefix + key: tensor.contiguous() for key, tensor in tensors.items()}, paths[name])
    return paths.pop("base"), paths


def group_ids(index: GroupIndex, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the group of each entry of a parameter (*S), from the documented meaning of segments."""
    flat = torch.full((torch.Size(shape).numel(),), -1)
    for start, outer, groups, inner, first, _ in index.segments[name]:
        block = torch.arange(first, first + groups).view(1, groups, 1).expand(outer, groups, inner)
        assert (flat[start : start + block.numel()] == -1).all(), f"{name}: two segments overlap"
        flat[start : start + block.numel()] = block.flatten()
    return flat.view(shape)


def merge_by_formula(pool: ExpertPool, index: GroupIndex, values: Tensor) -> dict[str, Tensor]:
    """theta0 + sum_e lambda[e, g(n)] tau[e, n], written out entry by entry; plain autograd."""
    merged = {}
    for name, shape in pool.shapes.items():
        weights = values[:, group_ids(index, name, shape)]  # (E, *S)
        merged[name] = pool.base[name] + (weights * pool.task_vectors(name)).sum(0)
    return merged


def run_engine(
    model: MergedModel,
    inputs: Mapping[str, Tensor],
    loss: Callable[[str, Outputs, MergedEncoder], Tensor],
    *,
    values: Tensor | None = None,
    weights: Mapping[str, float] | None = None,
    **options,
) -> StepResult:
    """Run one step of the engine on a loss of each task's outputs."""
    losses = {}
    with model.merged(model.coefficients() if values is None else values, **options) as merged:
        for group in merged.groups(inputs):
            found = {task: loss(task, outputs, merged) for task, outputs in merged(group).items()}
            merged.backward(sum(value * (weights or {}).get(task, 1.0) for task, value in found.items()))
            losses |= {task: value.detach() for task, value in found.items()}
    return StepResult(losses, merged.gradient)


def run_step(
    model: MergedModel, objective: Callable[[TaskStep], Tensor], toy: Toy, *, tasks=EXPERTS, hidden_layers=(), **options
) -> StepResult:
    """Run one engine step with an objective, as the methods do."""
    teacher = partial(model.teacher, hidden_layers=hidden_layers)

    def loss(task: str, outputs: Outputs, merged: MergedEncoder) -> Tensor:
        batch = toy.inputs[task], toy.indices[task]
        return objective(TaskStep(task, *batch, outputs, merged.coefficients, teacher, merged.forward))

    inputs = {task: toy.inputs[task] for task in tasks}
    return run_engine(model, inputs, loss, hidden_layers=hidden_layers, **options)


def squares(task: str, outputs: Outputs, merged: MergedEncoder) -> Tensor:
    """A loss for :func:`run_engine`."""
    return outputs.logits.square().mean()
