"""RegMean and RegMean++: Linear layers by least squares on the experts' own activations.

Legend: X_i inputs (tokens, in) of one Linear layer in expert i; W_i its weight (out, in); D_i its task vector.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adamerge.data.batch import Inputs, to
from adamerge.errors import InputError, check_number, shorten
from adamerge.merges import Merged
from adamerge.merges.activations import Rows, linear_inputs, without_padding
from adamerge.merges.blocks import open_chain
from adamerge.merges.calibration import batches, tasks_of
from adamerge.merges.tensors import average, task_vector
from adamerge.model.merged_model import MergedModel
from adamerge.pool.pool import ExpertPool

if TYPE_CHECKING:
    from adamerge.data.unlabeled_tasks import UnlabeledTasks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _LeastSquares:
    examples: int = 256
    off_diagonal: float = 0.95
    ridge: float = 1e-6
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(f"{name}.examples", self.examples, 1, whole=True)
        check_number(f"{name}.off_diagonal", self.off_diagonal, 0, 1)
        check_number(f"{name}.ridge", self.ridge, 0, 1)


@dataclass(frozen=True)
class RegMean(_LeastSquares):
    r"""The weight whose outputs are nearest to every expert's, on that expert's inputs.

    Per Linear layer, with :math:`G_i = X_i^T X_i / \text{tokens}`, its off-diagonal entries times ``off_diagonal``,
    plus ``ridge`` times its mean diagonal on the diagonal: :math:`W^T = (\sum_i G_i)^{-1} \sum_i G_i W_i^T`, solved in
    float64 for the task vectors, so that inputs which no sample has get a mean of the experts. The projections inside
    ``nn.MultiheadAttention`` count as Linear layers. All else (biases, norms, convolutions, embeddings, raw parameters
    such as open_clip's ``proj``) is averaged, as no least-squares problem belongs to it.

    Cost: one forward pass per expert and a solve (in, in) per layer; memory of three in x in matrices per layer,
    whatever the number of experts. The samples carry no labels.

    Args:
        examples: Most unlabeled examples per task.
        off_diagonal: In [0, 1]; 0 weights input features alone, 1 is plain least squares.
        ridge: Relative; keeps the system solvable where a layer has more inputs than tokens. Our choice: the papers
            have none.

    Reference:
        Jin et al., Dataless knowledge fusion, arXiv:2212.09849; ``off_diagonal`` 0.95 as in FusionBench.
    """

    @torch.no_grad()
    def __call__(self, pool: ExpertPool, model: MergedModel, data: "UnlabeledTasks") -> Merged:
        """Yield names and merged parameters, once all experts have seen their data."""
        systems = Systems(pool, self.off_diagonal, self.ridge)
        for row, (expert, tasks) in enumerate(tasks_of(model, data).items()):
            log.info("Activations of expert %s", expert)
            grams = Grams(systems.names)
            expert_parameters = model.expert_parameters(expert)
            for task in tasks:
                for inputs in batches(data, task, self.examples):
                    moved = to(inputs, pool.device)
                    take = partial(grams.take, of_network=moved)
                    with linear_inputs(model.encoder, expert_parameters, take) as params:
                        model(moved, params)
            systems.add(grams, row)
        systems.check_any()
        for name in pool.names:
            yield name, systems.solve(name) if name in systems else average(pool, name)


@dataclass(frozen=True)
class RegMeanPlusPlus(_LeastSquares):
    r"""RegMean, block by block, on activations that the merged blocks before have made.

    Embeddings and whatever else comes before the blocks are averaged. Then, for each block in turn: every task's
    activations go through its expert's own block, which gives the Gram matrices of its Linear layers; these are merged
    as in :class:`RegMean` and the rest of the block averaged; the activations go on through the merged block. What
    comes behind the blocks is averaged too (the released codes leave the final norm at the base's value).

    Cost: two forward passes per expert and a solve per layer; memory of one block's Gram matrices, and of the
    activations (tokens, width) of all samples.

    Args:
        examples: Most unlabeled examples per task.
        off_diagonal: In [0, 1]; 0 weights input features alone, 1 is plain least squares.
        ridge: Relative; keeps the system solvable where a layer has more inputs than tokens. Our choice: the papers
            have none.
        blocks: Path of the module that holds the blocks, each of which feeds the next; None finds it.

    Reference:
        RegMean++, arXiv:2508.03121; 256 examples and ``off_diagonal`` 0.95 as there.
    """

    blocks: str | None = None

    @torch.no_grad()
    def __call__(self, pool: ExpertPool, model: MergedModel, data: "UnlabeledTasks") -> Merged:
        """Yield names and merged parameters, block after block."""
        tasks = tasks_of(model, data)
        merged = {name: average(pool, name) for name in pool.names}  # Linear layers of blocks are replaced below
        chain = open_chain(model, self.blocks)
        first = next(batches(data, next(iter(data.streams)), 1))
        chain.check(to(first, pool.device), merged)
        activations = {
            expert: [
                chain.enter(to(inputs, pool.device), merged)
                for task in expert_tasks
                for inputs in batches(data, task, self.examples)
            ]
            for expert, expert_tasks in tasks.items()
        }
        solved = 0
        for block in range(len(chain)):
            log.info("Block %d of %d", block + 1, len(chain))
            systems = Systems(pool, self.off_diagonal, self.ridge)
            for row, expert in enumerate(tasks):
                grams = Grams(systems.names)
                chain.observe(block, model.expert_parameters(expert), activations[expert], grams.take)
                systems.add(grams, row)
            merged |= {name: systems.solve(name) for name in systems.weights}
            solved += len(systems.weights)
            for calls in activations.values():
                chain.advance(block, merged, calls)
        if not solved:
            systems.check_any()
        for name in pool.names:
            yield name, merged.pop(name)


class Grams:
    """X^T X of the Linear layers' inputs, and how many tokens there were.

    Args:
        names: Weights that merge; others are passed over.
    """

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names
        self._products: dict[Rows, Tensor] = {}
        self._tokens: dict[Rows, int] = {}

    def take(self, rows: Rows, inputs: Tensor, of_network: Inputs) -> None:
        """Add the inputs (..., in) of some rows of a weight; ``of_network`` says which of them are padding."""
        if rows.name not in self._names:
            return
        tokens = without_padding(inputs, of_network, rows.name)
        product = tokens.T @ tokens
        self._products[rows] = self._products.get(rows, 0) + product
        self._tokens[rows] = self._tokens.get(rows, 0) + len(tokens)

    def pop_means(self) -> Iterator[tuple[Rows, Tensor]]:
        """Yield each Gram matrix, (in, in), and forget it."""
        for rows in list(self._products):
            yield rows, self._products.pop(rows) / self._tokens[rows]


class Systems:
    """The normal equations of every Linear layer, summed over the experts one by one.

    Args:
        pool: Base and experts.
        off_diagonal: Factor of the Gram matrices' off-diagonal entries.
        ridge: Added to their diagonals, relative to the mean diagonal.
    """

    def __init__(self, pool: ExpertPool, off_diagonal: float, ridge: float) -> None:
        self.names = pool.shapes
        self._pool = pool
        self._options = off_diagonal, ridge
        self._sums: dict[Rows, tuple[Tensor, Tensor]] = {}

    @property
    def weights(self) -> list[str]:
        """The weights that have equations."""
        return list(dict.fromkeys(rows.name for rows in self._sums))

    def __contains__(self, name: str) -> bool:
        return any(rows.name == name for rows in self._sums)

    def add(self, grams: Grams, row: int) -> None:
        """Add one expert's equations; its Gram matrices are used up."""
        for rows, gram in grams.pop_means():
            vector = task_vector(self._pool, rows.name, row)[rows.start : rows.stop]
            gram, right = equations(gram, vector, *self._options)
            if rows in self._sums:
                self._sums[rows][0].add_(gram)
                self._sums[rows][1].add_(right)
            else:
                self._sums[rows] = gram, right

    def solve(self, name: str) -> Tensor:
        """Return the merged weight (out, in); rows without equations are averaged."""
        weight = average(self._pool, name)
        for rows, (gram, right) in self._sums.items():
            if rows.name == name:
                part = slice(rows.start, rows.stop)
                weight[part] = self._pool.base[name][part] + solve(gram, right)
        return weight

    def check_any(self) -> None:
        """Refuse a model in which nothing is a Linear layer.

        Raises:
            InputError: If no layer has been seen.
        """
        if not self._sums:
            raise InputError(
                f"RegMean: the encoder runs no Linear layer whose weight merges, among {shorten(self.names)}; the "
                "merge would be the plain average: use --rule weight_average."
            )


def equations(gram: Tensor, vector: Tensor, off_diagonal: float, ridge: float) -> tuple[Tensor, Tensor]:
    """Return one expert's side of the normal equations: shrunk G (in, in) and G D^T (in, out)."""
    diagonal = gram.diagonal().clone()
    gram = off_diagonal * gram
    gram.diagonal().copy_(diagonal + ridge * diagonal.mean())
    return gram, gram @ vector.T


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """Return the merged task vector (out, in) from the sums over the experts, solved in float64.

    Raises:
        InputError: If the system is singular.
    """
    try:
        solution: Tensor = torch.linalg.solve(gram.double(), right.double())
        return solution.T.to(right.dtype)
    except RuntimeError as error:  # torch's LinAlgError
        raise InputError(
            f"RegMean: a layer's system of {len(gram)} equations is singular: there are more inputs than tokens, or "
            "dead ones. Give ridge above 0 (such as 1e-6), or more examples."
        ) from error
