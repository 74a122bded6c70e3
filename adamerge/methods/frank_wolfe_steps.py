r"""Frank-Wolfe over the convex hull of the experts, in the space of the coefficients.

A vertex is a model: expert e (coefficients 1 for e, 0 else), the base (all 0) or the start. The linear
minimization oracle needs inner products of the gradient with the vertices only up to a constant, and
:math:`\langle \nabla, \theta_e \rangle - \langle \nabla, \theta_0 \rangle = \langle \nabla, \tau_e \rangle`
is the engine's gradient of the coefficient: checkpoints, task vectors and displacements give one vertex.

Legend: E experts, G groups, V vertices, k chosen vertices. Groups move independently: the feasible set
is a product of hulls, one per group, unless one vertex is chosen for the whole model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adamerge.model.constraints import project_onto_simplex

StepRule = Literal["harmonic", "constant", "line_search"]


@dataclass(frozen=True)
class Vertices:
    """The experts and, optionally, base and start, in this order.

    Args:
        num_experts: E.
        has_base: Whether the base is a vertex.
        start: The start's coefficients (E, G) if it is a vertex.
        is_joint: Whether one vertex is chosen for all groups together.
        scale: Coefficient of an expert's own vertex: at 1 it is the expert, above 1 it lies beyond it.
    """

    num_experts: int
    has_base: bool = False
    start: Tensor | None = None
    is_joint: bool = False
    scale: float = 1.0

    def __len__(self) -> int:
        """Return V."""
        return self.num_experts + self.has_base + (self.start is not None)

    def scores(self, gradient: Tensor) -> Tensor:
        """Return the inner products of the gradient (E, G) with each vertex less the base, (V, G)."""
        rows = [gradient * self.scale]
        if self.has_base:
            rows.append(torch.zeros_like(gradient[:1]))
        if self.start is not None:
            rows.append((gradient * self.start).sum(0, keepdim=True))
        return self.joined(torch.cat(rows))

    def joined(self, scores: Tensor) -> Tensor:
        """Sum (V, G) over the groups, where one vertex serves all."""
        return scores.sum(1, keepdim=True).expand_as(scores) if self.is_joint else scores

    def gap(self, gradient: Tensor, values: Tensor) -> Tensor:
        """Return what the best vertex promises, (G,): how far a linear loss would fall from ``values`` (E, G)."""
        here = self.joined((gradient * values).sum(0, keepdim=True))[0]
        return here - self.scores(gradient).amin(0)

    def coefficients(self, choice: Tensor) -> Tensor:
        """Return the coefficients (E, G) of the vertices with the numbers ``choice`` (G,)."""
        experts = torch.arange(self.num_experts, device=choice.device).unsqueeze(1)
        points = (experts == choice).to(torch.get_default_dtype() if self.start is None else self.start.dtype)
        points *= self.scale
        return points if self.start is None else torch.where(self.is_start(choice), self.start, points)

    def is_start(self, choice: Tensor) -> Tensor:
        """Return where a choice is the start."""
        return choice == self.num_experts + int(self.has_base)


class FrankWolfe(Optimizer):
    """Move towards the vertex that the gradient favours; groups in which no vertex descends stay.

    Args:
        raw: Coefficients (E, G), unconstrained: their gradient is the engine's.
        vertices: What to move towards.
        step_rule: The step size at iteration t = 0, 1, ..: ``"harmonic"`` 2 / (t + 2), ``"constant"`` 1, or
            ``"line_search"``, the size in [0, 1] with the lowest loss; times ``factor``.
        factor: On the step size, in (0, 1].
        limit: Iterations after which nothing moves any more.
        tolerance: Gap, summed over the groups, at which nothing moves any more.
        loss_at: Loss at coefficients (E, G), for the line search.
        search_passes: Most losses that the line search asks for in an iteration, at least 4.
        ranking: Scores (V, G) to choose by instead of the inner products; then no group is skipped.
        averages: Choose by a running average of the gradients, which forgets the noise of single batches.

    Attributes:
        is_done: Whether ``limit`` or ``tolerance`` is reached.
        picks: Share of the groups that the last iteration moved towards each vertex, (V,); None before the first.
    """

    def __init__(
        self,
        raw: nn.Parameter,
        vertices: Vertices,
        *,
        step_rule: StepRule = "harmonic",
        factor: float = 1.0,
        limit: int | None = None,
        tolerance: float | None = None,
        loss_at: Callable[[Tensor], float] | None = None,
        search_passes: int = 12,
        ranking: Callable[[], Tensor] | None = None,
        averages: bool = False,
    ) -> None:
        super().__init__([raw], {})
        self._raw = raw
        self.vertices = self._hull = vertices
        self._step_rule, self._factor = step_rule, factor
        self._limit = math.inf if limit is None else limit
        self._tolerance = -math.inf if tolerance is None else tolerance
        self._loss_at, self._search_passes, self._ranking = loss_at, search_passes, ranking
        self.is_done = False
        self.picks: Tensor | None = None
        # In the state from the first step on, so that checkpoints hold it.
        self.state[raw].update(iteration=0, kept=torch.ones_like(raw[0]))
        if averages:
            self.state[raw].update(steps=0, average=torch.zeros_like(raw))

    @property
    def iteration(self) -> int:
        """Iterations so far."""
        return int(self.state[self._raw]["iteration"])

    @property
    def kept(self) -> Tensor:
        """Share of the start in the iterate, (G,)."""
        kept: Tensor = self.state[self._raw]["kept"]
        return kept

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Evaluate the closure, if any, and move the coefficients in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradient = self._raw.grad
        if gradient is None:  # the step is skipped
            return loss
        average = self._averaged(gradient)
        if not self._stops(average):
            self._move(gradient, average)
            self.is_done = self.iteration >= self._limit
        return loss

    def _averaged(self, gradient: Tensor) -> Tensor:
        """Take a gradient (E, G) into the running average, and return that."""
        state = self.state[self._raw]
        if "average" not in state:
            return gradient
        share = min(1.0, averaging(state["steps"]))
        state["average"] = (1 - share) * state["average"] + share * gradient
        state["steps"] += 1
        average: Tensor = state["average"]
        return average

    def gap(self, gradient: Tensor) -> Tensor:
        """Return the duality gap at the current coefficients, a scalar, for a gradient (E, G)."""
        gap = self._gap(gradient)
        return gap[0] if self._hull.is_joint else gap.sum()

    def _gap(self, gradient: Tensor) -> Tensor:
        return self._hull.gap(gradient, self._raw.detach())

    def _stops(self, gradient: Tensor) -> bool:
        self.is_done = self.iteration >= self._limit or float(self.gap(gradient)) <= self._tolerance
        return self.is_done

    def _move(self, gradient: Tensor, average: Tensor) -> None:
        """Move by the gradient of the batch, towards what the average chooses."""
        choice = (self.vertices.scores(average) if self._ranking is None else self._ranking()).argmin(0)
        direction = self.vertices.coefficients(choice).to(self._raw) - self._raw
        moves = torch.ones_like(choice, dtype=torch.bool)
        if self._ranking is None:
            moves = self._gap(average) > 0
            direction = torch.where(moves, direction, 0)
        self.picks = self._shares(choice.unsqueeze(0), moves)
        size = self._size(direction)
        self._raw.add_(size * direction)
        state = self.state[self._raw]
        shrunk = state["kept"] * (1 - size) + size * self.vertices.is_start(choice)
        state["kept"] = torch.where(moves, shrunk, state["kept"])
        state["iteration"] += 1

    def _shares(self, chosen: Tensor, moves: Tensor) -> Tensor:
        """Return how often each vertex is among the chosen ones (k, G) of groups that move, as shares of all, (V,)."""
        return torch.bincount(chosen[:, moves].flatten(), minlength=len(self.vertices)) / max(1, chosen.numel())

    def _size(self, direction: Tensor) -> float:
        if self._step_rule == "harmonic":
            return harmonic(self.iteration) * self._factor
        if self._step_rule == "constant":
            return self._factor
        loss_at, start = self._loss_at, self._raw.detach()
        assert loss_at is not None, "the line search needs a loss"
        return line_search(lambda size: loss_at(start + size * direction), self._search_passes) * self._factor


class SoftFrankWolfe(FrankWolfe):
    r"""Choose the k best vertices, then fit how far to go towards each: :math:`\lambda + \sum_j w_j (s_j - \lambda)`.

    One iteration is ``inner_steps`` steps, each on the gradient of its own batch: the first chooses the
    vertices; all move the weights w, which start at 0, by projected gradient with Adam's scaling
    onto :math:`w \ge 0, \sum_j w_j \le 1`, group by group. A group in which no vertex descends stays.

    Args:
        raw: Coefficients (E, G), unconstrained.
        vertices: What to choose from.
        top_k: k.
        inner_steps: Steps in an iteration.
        lr: Learning rate of the weights: each moves by at most about lr per step.
        limit: Iterations after which nothing moves any more.
        tolerance: Gap at which no further iteration begins.
        averages: Choose the vertices by a running average of the gradients; the weights follow each batch's own.
    """

    def __init__(
        self,
        raw: nn.Parameter,
        vertices: Vertices,
        *,
        top_k: int,
        inner_steps: int,
        lr: float,
        limit: int | None = None,
        tolerance: float | None = None,
        averages: bool = False,
    ) -> None:
        super().__init__(raw, vertices, limit=limit, tolerance=tolerance, averages=averages)
        self._hull = replace(vertices, is_joint=False)  # the weights differ by group
        self._top_k, self._inner_steps, self._lr = top_k, inner_steps, lr
        self.state[raw]["inner"] = 0

    def _stops(self, gradient: Tensor) -> bool:
        return self.state[self._raw]["inner"] == 0 and super()._stops(gradient)

    def _move(self, gradient: Tensor, average: Tensor) -> None:
        state = self.state[self._raw]
        if state["inner"] == 0:
            # as floating point: what torch makes of a parameter's state when it is loaded
            scores = self.vertices.scores(average)
            chosen = scores.topk(min(self._top_k, len(scores)), dim=0, largest=False).indices
            zero = self._raw.new_zeros(chosen.shape)
            moves = self._gap(average) > 0
            self.picks = self._shares(chosen, moves)
            state.update(
                start=self._raw.detach().clone(), chosen=chosen.to(zero), moves=moves.to(zero), before=state["kept"],
                weights=zero, mean=zero.clone(), square=zero.clone(),
            )  # fmt: skip
        state["inner"] += 1
        self._fit(state, gradient)
        if state["inner"] == self._inner_steps:
            state["inner"] = 0
            state["iteration"] += 1

    def _fit(self, state: dict[str, Any], gradient: Tensor) -> None:
        """Take one projected step of the weights (k, G), and move the coefficients accordingly."""
        choices = state["chosen"].long()
        directions = [self.vertices.coefficients(choice).to(self._raw) - state["start"] for choice in choices]
        slope = torch.stack([(gradient * direction).sum(0) for direction in directions])
        state["mean"] = 0.9 * state["mean"] + 0.1 * slope
        state["square"] = 0.999 * state["square"] + 0.001 * slope.square()
        mean = state["mean"] / (1 - 0.9 ** state["inner"])
        square = state["square"] / (1 - 0.999 ** state["inner"])
        weights = (state["weights"] - self._lr * mean / (square.sqrt() + 1e-12)).clamp(min=0)
        weights = torch.where(weights.sum(0) <= 1, weights, project_onto_simplex(weights)) * state["moves"]
        state["weights"] = weights
        moved = state["start"].clone()
        kept = state["before"] * (1 - weights.sum(0))
        for choice, weight, direction in zip(choices, weights, directions, strict=True):
            moved += weight * direction
            kept = kept + weight * self.vertices.is_start(choice)
        self._raw.copy_(moved)
        state["kept"] = kept


def harmonic(iteration: int) -> float:
    """Return Frank-Wolfe's classical step size, iterations counted from 0.

    >>> [round(harmonic(t), 2) for t in range(4)]
    [1.0, 0.67, 0.5, 0.4]
    """
    return 2 / (iteration + 2)


def averaging(step: int) -> float:
    """Return the newest gradient's share in the running average: 4 / (t + 8)^(2/3), steps counted from 0.

    It makes stochastic Frank-Wolfe converge (Mokhtari et al., JMLR 2020, arXiv:1804.09554).

    >>> [round(averaging(t), 2) for t in (0, 19, 117)]
    [1.0, 0.44, 0.16]
    """
    return float(4 / (step + 8) ** (2 / 3))


def line_search(loss: Callable[[float], float], evaluations: int = 12) -> float:
    """Return the step size in [0, 1] with the lowest loss by golden sections; 0 where none is below that of 0.

    >>> round(line_search(lambda size: (size - 0.3) ** 2), 2)
    0.3
    """
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.0, 1.0
    sizes = [high - ratio * (high - low), low + ratio * (high - low)]
    seen = {size: loss(size) for size in (0.0, 1.0, *sizes)}
    for _ in range(evaluations - len(seen)):
        left, right = sizes
        if seen[left] <= seen[right]:
            high = right
            sizes = [high - ratio * (high - low), left]
        else:
            low = left
            sizes = [right, low + ratio * (high - low)]
        seen |= {size: loss(size) for size in sizes if size not in seen}
    return min(seen, key=lambda size: (seen[size], size))
