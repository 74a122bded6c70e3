"""A method's objective, tried before the first step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.methods.checks import check_first_step


def try_objective(method: Any, data: UnlabeledTasks) -> None:
    """Run the first batch, before the first step, with random numbers that leave the run's alone."""
    batch = {task: part.to(method.device) for task, part in data.first_batch().items()}

    def step(values: Tensor, needs_gradient: bool) -> tuple[Mapping[str, Tensor], Tensor]:
        _, result = method.step([batch], values, needs_gradient=needs_gradient)
        return result.losses, result.gradient

    devices = [method.device] if method.device.type == "cuda" else []
    with torch.random.fork_rng(devices), method.trainer.precision_plugin.forward_context():
        check_first_step(method.objective, step, method.model.coefficients().detach())
