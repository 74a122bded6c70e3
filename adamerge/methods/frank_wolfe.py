"""Coefficients move towards experts, one or a few at a time (FW-Merging)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.data.batch import TaskBatch
from adamerge.errors import InputError, check_choice, check_number, did_you_mean
from adamerge.methods.frank_wolfe_steps import FrankWolfe, SoftFrankWolfe, StepRule, Vertices
from adamerge.methods.method import MergingMethod
from adamerge.methods.step import StepOptions
from adamerge.model.constraints import Simplex, Unconstrained
from adamerge.model.encoder import MicroBatch
from adamerge.model.merged_model import MergedModel
from adamerge.objectives import Objective

_VERTICES = ("experts", "base", "start")


class FrankWolfeMerging(MergingMethod):
    r"""Minimize an objective over the convex hull of the experts by the Frank-Wolfe method.

    The linear minimization oracle is the argmin over the vertices of the engine's gradient (E, G); the
    iterate is kept as coefficients, so memory does not grow with the iterations. ``hard``: one vertex s per
    iteration, :math:`\theta \leftarrow \theta + \gamma_t (s - \theta)`. ``soft``: the ``top_k`` best, with
    weights fitted on the simplex, see :class:`~adamerge.methods.frank_wolfe_steps.SoftFrankWolfe`. A group in which no
    vertex descends is skipped. The duality gap is logged as ``adapt/gap``; on mini-batches it is noisy.

    Differs from the paper, which uses labels: any objective, label-free. Differs from the released code,
    which ranks by the cosine of each tensor's gradient with the full checkpoint (not a linear minimization
    oracle: norms are lost and the base dominates) and shrinks 2 / (t + 2) by ``step_size`` .1 and ``scaling``
    .3: then ten iterations add up to .121 and keep 88.5 % of the start. To have that:
    ``ranking="cosine", step_size=0.1, scaling=0.3, vertices=["experts", "start"]``; cosine never skips.

    Args:
        model: The merged model; the constraint of its coefficients must be ``simplex`` or ``none``.
        objective: The loss, see :mod:`adamerge.objectives`.
        steps: Most iterations; None for as many as the trainer makes.
        step_rule: ``"harmonic"`` 2 / (t + 2), ``"constant"``, or ``"line_search"`` on the loss of the step's
            (last accumulated) batch; of ``hard``. The paper's own rule is not known to us.
        search_passes: Most forward passes of a line search, at least 4: an iteration costs as many beside its gradient.
        granularity: ``"group"``: each group of coefficients chooses its vertex; ``"task"``: one for the model.
        mode: ``"hard"`` or ``"soft"``.
        vertices: ``"experts"``, and optionally ``"base"`` and ``"start"`` (the initial coefficients).
        vertex_scale: What an expert's vertex is: the base plus this many of its task vector. 1, as in the paper,
            bounds the sum of a group's coefficients by 1; above, the hull reaches beyond the experts.
        tolerance: Stop when the gap falls to this; None for never.
        step_size: Factor of the step size, in (0, 1].
        scaling: A second one, as in the released code.
        ranking: ``"inner_product"``, or ``"cosine"`` where each parameter lies in one group.
        top_k: Vertices of ``soft``.
        inner_steps: Optimizer steps in one iteration of ``soft``: a run of S steps has S / inner_steps iterations.
        inner_lr: Learning rate of the weights of ``soft``.
        average_gradients: Choose vertices by a running average of the gradients, so that the noise of single batches
            does not choose irrelevant experts (Mokhtari et al., arXiv:1804.09554; not in FW-Merging).
        task_weights: This and what follows: see :class:`~adamerge.methods.step.StepOptions`.
        reduction: Of the tasks' losses.
        micro_batch: Most inputs in one forward pass.
        on_nonfinite: What a NaN or infinite number does.
        max_skipped: Skipped batches, beyond which the run stops after all.

    Raises:
        InputError: If an option is unknown, or the constraint or granularity does not fit.

    Reference:
        FW-Merging, ICCV 2025, arXiv:2503.12649; Jaggi, ICML 2013 (step sizes and gap).
    """

    def __init__(
        self,
        model: MergedModel,
        objective: Objective,
        steps: int | None = None,
        step_rule: StepRule = "harmonic",
        granularity: Literal["group", "task"] = "group",
        *,
        mode: Literal["hard", "soft"] = "hard",
        search_passes: int = 12,
        vertices: Sequence[str] = ("experts",),
        vertex_scale: float = 1.0,
        tolerance: float | None = None,
        step_size: float = 1.0,
        scaling: float = 1.0,
        ranking: Literal["inner_product", "cosine"] = "inner_product",
        top_k: int = 3,
        inner_steps: int = 10,
        inner_lr: float = 0.05,
        average_gradients: bool = False,
        task_weights: Mapping[str, float] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        micro_batch: MicroBatch = "auto",
        on_nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped: int = 10,
    ) -> None:
        options = StepOptions(task_weights, reduction, micro_batch, on_nonfinite, max_skipped)
        super().__init__(model, objective, options)
        check_choice("method.mode", mode, ("hard", "soft"))
        check_choice("method.step_rule", step_rule, ("harmonic", "constant", "line_search"))
        check_choice("method.granularity", granularity, ("group", "task"))
        check_choice("method.ranking", ranking, ("inner_product", "cosine"))
        for option, count in (("steps", steps), ("top_k", top_k), ("inner_steps", inner_steps)):
            if count is not None:
                check_number(f"method.{option}", count, 1, whole=True)
        check_number("method.search_passes", search_passes, 4, whole=True)
        for option, number in (("step_size", step_size), ("scaling", scaling), ("inner_lr", inner_lr)):
            check_number(f"method.{option}", number, 0, above=True)
        if tolerance is not None:
            check_number("method.tolerance", tolerance)
        factor = step_size * scaling  # above 1 a step would leave the hull
        check_number("method.step_size times method.scaling", factor, 0, 1, above=True)
        self._is_cosine, self._is_joint = ranking == "cosine", granularity == "task"
        self._check_vertices(vertices)
        self._check_hull(vertices, vertex_scale)
        if self._is_cosine:
            self._check_cosine(mode, vertex_scale, average_gradients)
        self._vertex_kinds, self._vertex_scale = tuple(vertices), vertex_scale
        self._batch: Mapping[str, TaskBatch] = {}
        self._cosines: dict[str, Tensor] = {}
        self._frank_wolfe: FrankWolfe
        limits: dict[str, Any] = {"limit": steps, "tolerance": tolerance, "averages": average_gradients}
        if mode == "soft":
            limits |= {"top_k": top_k, "inner_steps": inner_steps, "lr": inner_lr}
        else:
            scores = self._ranking if self._is_cosine else None
            limits |= {"step_rule": step_rule, "factor": factor, "loss_at": self._loss_at, "ranking": scores}
            limits["search_passes"] = search_passes
        self._optimizer: Callable[..., FrankWolfe] = partial(SoftFrankWolfe if mode == "soft" else FrankWolfe, **limits)

    def on_fit_start(self) -> None:
        """Refuse a ranking that does not fit the run, and prepare as all methods do."""
        if self._is_cosine and (self.trainer.accumulate_grad_batches > 1 or self.trainer.world_size > 1):
            raise InputError(
                "method.ranking: 'cosine' ranks by one batch's gradient on one device, found several. "
                "Raise data.batch_size instead, or set method.ranking=inner_product."
            )
        super().on_fit_start()

    def training_step(self, batch: Mapping[str, TaskBatch], batch_idx: int) -> Tensor:
        """Return the surrogate loss of one step, and keep its batch for the line search."""
        self._batch = batch
        return super().training_step(batch, batch_idx)

    def on_parameter_gradient(self, name: str, gradient: Tensor) -> None:
        """Compare a parameter's gradient with the vertices, where the ranking is the released code's."""
        if self._is_cosine:
            self._cosines[name] = self._cosine(name, gradient)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the duality gap, summed over the groups."""
        super().on_before_optimizer_step(optimizer)
        gradient = self.model.coefficients.raw.grad
        if gradient is not None:  # none where all batches of a step were skipped
            self.log("adapt/gap", self._frank_wolfe.gap(gradient))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, undo what rounding did to the simplex, and stop where nothing is left to do."""
        super().optimizer_step(*args, **kwargs)
        self.model.coefficients.project()
        self.trainer.should_stop = self.trainer.should_stop or self._frank_wolfe.is_done

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log which share of the groups an iteration moved towards each vertex."""
        if self._frank_wolfe.picks is not None:
            names = [*self.model.pool.expert_names, *(kind for kind in ("base", "start") if kind in self._vertex_kinds)]
            shares = zip(names, self._frank_wolfe.picks, strict=True)
            self.log_dict({f"pick/{name}": share for name, share in shares})
            self._frank_wolfe.picks = None

    def configure_optimizers(self) -> FrankWolfe:
        """Return the Frank-Wolfe steps as an optimizer of the coefficients."""
        self._frank_wolfe = self._optimizer(self.model.coefficients.raw, self._vertices())
        return self._frank_wolfe

    def export_recipe(self) -> dict[str, Any]:
        """Return the support, under the method's key: each expert that has weight, its mean weight and its groups."""
        values = self.model.coefficients().detach()
        facts = {
            "support": {
                name: {"mean": row.mean().item(), "groups": int(row.count_nonzero())}
                for name, row in zip(self.model.pool.expert_names, values, strict=True)
                if row.any()
            },
            "groups": values.shape[1],
            "start": self._frank_wolfe.kept.mean().item(),
            "iterations": self._frank_wolfe.iteration,
        }
        return {"frank_wolfe": facts}

    def _vertices(self) -> Vertices:
        start = self.model.coefficients.initial if "start" in self._vertex_kinds else None
        count, has_base = len(self.model.pool.expert_names), "base" in self._vertex_kinds
        return Vertices(count, has_base, start, self._is_joint, self._vertex_scale)

    def _loss_at(self, values: Tensor) -> float:
        """Return the objective at coefficients (E, G) on the current batch, the same on all devices."""
        with self.trainer.precision_plugin.forward_context():
            loss, _ = self.step([self._batch], values, needs_gradient=False)
        return float(loss)

    def _cosine(self, name: str, gradient: Tensor) -> Tensor:
        """Return the cosines of one parameter's gradient with all vertices, (V,)."""
        (group,) = self.model.coefficients.groups[name]
        base, tau = self.model.pool.base[name], self.model.pool.task_vectors(name)
        points = [base + task_vector for task_vector in tau]
        if "base" in self._vertex_kinds:
            points.append(base)
        if "start" in self._vertex_kinds:
            points.append(base + torch.tensordot(self.model.coefficients.initial[:, group].to(tau), tau, 1))
        flat = gradient.flatten()
        return torch.stack([torch.cosine_similarity(flat, point.flatten(), dim=0) for point in points])

    def _ranking(self) -> Tensor:
        """Return each group's sum of cosines, (V, G); a parameter counts as one, whatever its size."""
        groups = self.model.coefficients.groups
        vertices = self._vertices()
        scores = self.model.coefficients.raw.new_zeros(len(vertices), self.model.coefficients.index.size)
        for name, cosines in self._cosines.items():
            scores[:, groups[name][0]] += cosines
        return vertices.joined(scores)

    def _check_vertices(self, vertices: Sequence[str]) -> None:
        for kind in [vertices] if isinstance(vertices, str) else vertices:
            if kind not in _VERTICES:
                raise InputError(
                    f"method.vertices: expected some of {', '.join(_VERTICES)}, found {kind!r}."
                    f"{did_you_mean(kind, _VERTICES)}"
                )
        if isinstance(vertices, str) or "experts" not in vertices:
            raise InputError(f"method.vertices: expected a list with 'experts', found {vertices!r}.")

    def _check_hull(self, vertices: Sequence[str], scale: float) -> None:
        """Refuse constraints that the hull of the vertices does not meet."""
        constraint = self.model.coefficients.constraint
        if type(constraint) not in (Unconstrained, Simplex):
            raise InputError(
                f"method: Frank-Wolfe moves in the convex hull of the experts, so constraint must be simplex or none, "
                f"found {type(constraint).__name__.lower()}. Set constraint=simplex."
            )
        check_number("method.vertex_scale", scale, 0, above=True)
        if not isinstance(constraint, Simplex):
            return
        if scale != 1:
            raise InputError(
                f"method.vertex_scale: expected 1 with constraint=simplex, found {scale}. Set constraint=none."
            )
        if constraint.total == "equal" and "base" in vertices:
            raise InputError(
                "method.vertices: with the base as a vertex coefficients sum to less than 1, but constraint.total is "
                "'equal'. Set constraint.total=at_most, or leave 'base' out."
            )

    def _check_cosine(self, mode: str, scale: float, averages: bool) -> None:
        """Refuse what the released code's ranking has not: it compares whole parameters, of single batches."""
        several = [name for name, groups in self.model.coefficients.groups.items() if len(groups) > 1]
        for conflict, is_there in (
            ("method.mode=soft", mode == "soft"),
            ("method.average_gradients=true", averages),
            (f"method.vertex_scale={scale}", scale != 1),
            ("encoder.compute_dtype=bfloat16", self.model.weights.dtype is not None),
            ("encoder.engine=beside", not self.model.weights.gives_gradients),
            (f"several groups in {next(iter(several), None)!r}", bool(several)),
        ):
            if is_there:
                raise InputError(
                    f"method.ranking: 'cosine' ranks experts by whole parameters, found {conflict}. Set "
                    "granularity=task or layer and leave that option out, or set method.ranking=inner_product."
                )
