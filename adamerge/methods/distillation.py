"""All weights learn: a control, which says what merging costs against training a model on the same samples."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adamerge.errors import InputError
from adamerge.methods.gradient import GradientMerging
from adamerge.methods.step import StepResult
from adamerge.model.merge import state_dict_of
from adamerge.model.weights import TrainedWeights


class Distillation(GradientMerging):
    """Train every merged parameter itself, from the merge that the coefficients start with; these do not move.

    With ``objective=imitation`` this is knowledge distillation from E teachers into one student that starts as their
    merge: start, samples, steps and answers are those of a run that learns coefficients. The result is no merge, and
    has no coefficients to replay. The anchor is that of coefficients, in terms of weights: A times the squared distance
    from the start, over the sum of the squared norms of the task vectors; it is that of coefficients which all moved
    alike, where task vectors are orthogonal. Memory: besides the engine's, two models, one more with an anchor, and
    the optimizer's state.
    A fit raises :class:`~adamerge.InputError` where processes hold parts of the model.

    Attributes:
        trained: The parameters that learn, in the pool's order; there is none before a fit.

    Reference:
        Hinton et al., Distilling the knowledge in a neural network, arXiv:1503.02531.
    """

    learns_coefficients = False

    def configure_model(self) -> None:
        """Turn the start's parameters into ones that train, before optimizer and checkpoint ask for them."""
        if isinstance(self.model.weights, TrainedWeights):
            return
        if self.model.is_sharded:
            raise InputError("method=distillation: not with trainer=fsdp: each device trains all weights. Use ddp.")
        if (dtype := self.model.weights.base_dtype) != "float32":
            raise InputError(
                f"encoder.base_dtype: {dtype} weights do not train, as method=distillation would. Leave it out."
            )
        self.model.coefficients.raw.requires_grad_(False)
        weights = TrainedWeights(self.model.encoder, self.model.pool, self.model.coefficients)
        self.model.weights = weights
        self.trained = nn.ParameterList(weights.parameters.values())
        # What the anchor pulls to; without gradient, and of a run that is resumed the same.
        self._start = [p.detach().clone() for p in self.trained] if self.options.anchor else []
        self._gradients: dict[str, Tensor] = {}  # of a step, times the scale of its losses

    def on_fit_start(self) -> None:
        """Move the start to the weights' device, too."""
        super().on_fit_start()
        self._start = [start.to(p.device) for p, start in zip(self.trained, self._start, strict=False)]
        norms = sum(float(norm.double().square().sum()) for norm in self.model.pool.norms.values())
        self._pull = self._strength / norms  # on the squared distance

    @property
    def learned(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves: all that merge."""
        return list(self.trained)

    def _name_of(self, number: int, mask: Tensor) -> str:
        """Name one of :attr:`learned`."""
        return f"the weight {self.model.pool.names[number]!r}"

    def on_parameter_gradient(self, name: str, gradient: Tensor) -> None:
        """Keep the gradient (*S) of one parameter for the surrogate."""
        known = self._gradients.get(name)
        self._gradients[name] = gradient if known is None else known + gradient  # of several batches in one step

    def _surrogate(self, loss: Tensor, values: Tensor, result: StepResult | None) -> Tensor:
        """Return the loss with the gradients of all weights; of none where a step is skipped."""
        gradients, self._gradients = self._gradients, {}
        scale = self._scaler.get_scale() if self._scaler else 1.0
        for name, parameter in zip(self.model.pool.names, self.trained, strict=True):
            change = parameter - parameter.detach()
            if result is None or name not in gradients:
                loss = loss + (change * 0).sum()
            else:
                loss = loss + (change * gradients[name]).sum() / scale
        return loss

    def _anchored(self, loss: Tensor, result: StepResult, values: Tensor) -> tuple[Tensor, StepResult]:
        """Add the anchor to the loss, and to the gradients of the weights."""
        scale = self._scaler.get_scale() if self._scaler else 1.0
        for name, parameter, start in zip(self.model.pool.names, self.trained, self._start, strict=True):
            change = parameter.detach() - start
            loss = loss + self._pull * change.square().sum()
            self.on_parameter_gradient(name, change * (2 * self._pull * scale))
        return loss, result

    def exported(self) -> Mapping[str, Tensor]:
        """Return the state dict of the trained weights, with every key of the base."""
        return state_dict_of(self.model.pool, self.model.weights.merge(self.model.coefficients))

    def export_recipe(self) -> dict[str, Any]:
        """Return what ``merge.json`` tells: how many numbers were trained, and the anchor."""
        return {**super().export_recipe(), "trained_weights": sum(parameter.numel() for parameter in self.trained)}
