"""Fisher merging: entries weighted by how much each expert's own predictions depend on them.

Legend: B examples, C classes, ``*S`` the shape of one parameter.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from adamerge.data.batch import Inputs, size, take, to
from adamerge.errors import InputError, check_number
from adamerge.merges import Merged
from adamerge.merges.calibration import batches, tasks_of
from adamerge.merges.tensors import task_vector
from adamerge.model.merged_model import MergedModel
from adamerge.pool.pool import ExpertPool

if TYPE_CHECKING:
    from adamerge.data.unlabeled_tasks import UnlabeledTasks

log = logging.getLogger(__name__)

_BUDGET = 1 << 26  # entries of per-example gradients at a time: 256 MB in float32
Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Fisher:
    r"""Average experts entry by entry, weighted by the diagonals of their Fisher information.

    :math:`\theta = \theta_0 + \sum_i c_i F_i \tau_i / \sum_i c_i F_i` with
    :math:`F_i = \frac1N \sum_x \sum_c p_c(x) (\partial \log p_c(x) / \partial \theta)^2 + \epsilon`, p the expert's own
    predictions, so no labels. The squares are per example and class: the square of a batch's summed gradient, which
    some released code takes, is another quantity. No tensor that merges is skipped; heads do not merge.

    Of inputs that are mappings, such as texts, examples run one at a time. One with several rows, such as a text's
    positions, needs ``draws``: a class is drawn for each row, and the square of the sum's gradient has the expectation
    of the sum of squares, as the rows' scores are independent with mean 0. N then counts rows.

    Cost: C backward passes per example (or ``draws``), by vectorised differentiation in chunks of at
    most 256 MB (one model's gradient, where that is more); memory of four models besides, whatever the number of
    experts.

    Args:
        examples: Most unlabeled examples per task.
        draws: Classes drawn per example from p, an unbiased estimate for heads with many classes; None for all.
        normalise: :math:`c_i = 1 / (\|F_i\| + \epsilon)`, the norm over the whole model and before epsilon is added, so
            that an expert with unsure predictions does not drown the others; otherwise 1.
        floor: Epsilon. Where every expert's F is far below it, the plain average results;
            1e-6 in FusionBench.
        seed: Seed of ``draws``.

    Reference:
        Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv:2111.09832.
    """

    examples: int = 256
    draws: int | None = None
    normalise: bool = True
    floor: float = 1e-10
    seed: int = 0
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("Fisher.examples", self.examples, 1, whole=True)
        check_number("Fisher.floor", self.floor, 0, 1)
        if self.draws is not None:
            check_number("Fisher.draws", self.draws, 1, whole=True)

    def __call__(self, pool: ExpertPool, model: MergedModel, data: "UnlabeledTasks") -> Merged:
        """Yield names and merged parameters, once all experts have seen their data."""
        sums = {name: torch.zeros_like(tensor) for name, tensor in pool.base.items()}
        weights = {name: torch.zeros_like(tensor) for name, tensor in pool.base.items()}
        for row, (expert, tasks) in enumerate(tasks_of(model, data).items()):
            log.info("Fisher information of expert %s", expert)
            information = self._estimate(model, data, expert, tasks)
            add_expert(sums, weights, information, lambda name, row=row: task_vector(pool, name, row), self)  # type: ignore[misc]
        for name in pool.names:
            weight = weights.pop(name)  # where no expert has any, the base's value stays
            yield name, pool.base[name] + torch.where(weight > 0, sums.pop(name) / weight, 0)

    def _estimate(self, model: MergedModel, data: "UnlabeledTasks", expert: str, tasks: list[str]) -> dict[str, Tensor]:
        """Return an expert's Fisher diagonal over the examples of its tasks, name to (*S)."""
        fixed = model.expert_parameters(expert)
        params = {name: fixed.pop(name) for name in model.pool.names}
        generator = torch.Generator().manual_seed(self.seed)
        totals = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
        count = 0
        for task in tasks:

            def rows(p: Params, inputs: Inputs, task: str = task) -> Tensor:
                return model.outputs(inputs, task, {**fixed, **p}).rows()

            for batch in batches(data, task, self.examples):
                inputs = to(batch, model.pool.device)
                if isinstance(inputs, Tensor):
                    sums = fisher_sums(rows, params, [inputs], self.draws, generator)
                else:
                    sums = fisher_sums_of_rows(rows, params, inputs, self.draws, generator)
                for information, examples in sums:
                    count += examples
                    for name, tensor in information.items():
                        totals[name] += tensor
        return {name: tensor / max(1, count) for name, tensor in totals.items()}


def add_expert(
    sums: dict[str, Tensor],
    weights: dict[str, Tensor],
    information: Params,
    tau: Callable[[str], Tensor],
    options: Fisher,
) -> None:
    """Add one expert's c F tau and c F to the running sums, in place; ``tau`` gives its task vector by name."""
    norm = math.sqrt(sum(tensor.double().square().sum().item() for tensor in information.values())) + options.floor
    factor = 1 / norm if options.normalise and norm else 1.0
    for name, tensor in information.items():
        floored = tensor + options.floor
        sums[name].addcmul_(floored, tau(name), value=factor)
        weights[name].add_(floored, alpha=factor)


def fisher_sums(
    logits: Callable[[Params, Tensor], Tensor],
    params: Params,
    inputs: Iterable[Tensor],
    draws: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Yield sums over some examples of sum_c p_c (d log p_c / d theta)^2, and the number of examples.

    Args:
        logits: ``(params, inputs (B, ...)) -> (B, C)``.
        params: Name to (*S); differentiated.
        inputs: Batches (B, ...).
        draws: Classes drawn per example instead of all.
        generator: For ``draws``, on the CPU.
    """

    def score(p: Params, example: Tensor, label: Tensor) -> Tensor:
        return logits(p, example.unsqueeze(0)).log_softmax(-1)[0].gather(0, label.unsqueeze(0))[0]

    gradients = vmap(vmap(grad(score), (None, None, 0)), (None, 0, 0))  # (B, K, *S)
    size = sum(tensor.numel() for tensor in params.values())
    for batch in inputs:
        with torch.no_grad():
            probabilities = logits(params, batch).softmax(-1)
        labels, shares = _classes(probabilities, draws, generator)  # (B, K) both
        classes = max(1, min(labels.shape[1], _BUDGET // size))
        examples = max(1, _BUDGET // (size * classes))
        for start in range(0, len(batch), examples):
            some = slice(start, start + examples)
            totals: dict[str, Tensor] = {}
            for first in range(0, labels.shape[1], classes):
                part = (some, slice(first, first + classes))
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be vectorised over examples
                    by_name = gradients(params, batch[some], labels[part])
                for name, gradient in by_name.items():
                    total = torch.einsum("bk,bk...->...", shares[part], gradient.detach().square_())
                    totals[name] = totals[name] + total if name in totals else total
            yield totals, len(batch[some])


def fisher_sums_of_rows(
    rows: Callable[[Params, Inputs], Tensor],
    params: Params,
    inputs: Inputs,
    draws: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Yield, for each example, what :func:`fisher_sums` does, and the number of its rows.

    Args:
        rows: ``(params, inputs (1, ...)) -> (N, C)``.
        params: Name to (*S); differentiated.
        inputs: (B, ...).
        draws: Classes drawn per row instead of all.
        generator: For ``draws``, on the CPU.

    Raises:
        InputError: If an example has several rows and no classes are drawn.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    for number in range(size(inputs)):
        log_probabilities = rows(leaves, take(inputs, slice(number, number + 1))).log_softmax(-1)
        if len(log_probabilities) > 1 and draws is None:
            raise InputError(
                f"Fisher.draws: an example has {len(log_probabilities)} rows of {log_probabilities.shape[-1]} classes: "
                "too many backward passes. Set draws=1."
            )
        labels, shares = _classes(log_probabilities.detach().exp(), draws, generator)  # (N, K) both
        totals = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
        for label, share in zip(labels.T, shares.T, strict=True) if len(labels) else ():
            score = log_probabilities.gather(1, label.unsqueeze(1)).sum()
            gradients = torch.autograd.grad(score, list(leaves.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    totals[name].addcmul_(gradient, gradient * share[0])
        yield totals, len(labels)


def _classes(probabilities: Tensor, draws: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return which classes to differentiate, and the weight of each: (B, K) both."""
    if draws is None:
        return torch.arange(probabilities.shape[1], device=probabilities.device).expand_as(probabilities), probabilities
    labels = torch.multinomial(probabilities.cpu(), draws, replacement=True, generator=generator)
    labels = labels.to(probabilities.device)
    return labels, torch.full_like(labels, 1, dtype=probabilities.dtype) / draws
