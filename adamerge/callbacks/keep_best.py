"""Keep the coefficients that do best on held-out unlabeled data, and stop when they no longer improve."""

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError, check_number
from adamerge.methods.method import MergingMethod
from adamerge.system import ranks

log = logging.getLogger(__name__)


class KeepBest(Callback):
    """Evaluate the objective on the held-out streams, and end with the best coefficients seen.

    Needs ``data.holdout``. No label is used: the criterion is the objective itself, logged as
    ``holdout/loss``, on inputs that it does not adapt on. The start is a candidate too. Checkpoints hold
    the current coefficients; what ``fit`` ends with, and exports, are the best.

    Args:
        every: Optimizer steps between evaluations.
        patience: Evaluations without a new best after which the run stops; None for never.

    Attributes:
        best: Step and loss of the best coefficients; None before the first evaluation.
    """

    def __init__(self, every: int = 25, patience: int | None = None) -> None:
        for option, value in (("every", every), ("patience", patience)):
            if option == "every" or value is not None:
                check_number(f"KeepBest.{option}", value, 1, whole=True)
        self._every = every
        self._patience = patience
        self._learned: list[Tensor] = []  # what the method had learned at its best
        self._latest, self._waited = -1, 0  # the step of the last evaluation, and evaluations without a new best
        self.best: tuple[int, float] | None = None

    def check_data(self, data: object) -> None:
        """Refuse data without held-out inputs.

        Raises:
            InputError: If no inputs are held out.
        """
        check_held_out("KeepBest", data)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the coefficients that the run starts from."""
        self.check_data(getattr(trainer, "datamodule", None))
        if self.best is None:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Evaluate now and then, and stop when patience has run out."""
        if trainer.global_step % self._every or trainer.global_step == self._latest:
            return
        pl_module.log("holdout/loss", self._evaluate(trainer, pl_module))
        if self._patience is not None and self._waited >= self._patience:
            log.info("No better coefficients for %d evaluations; stopped", self._waited)
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the coefficients that the run ends with."""
        if trainer.global_step != self._latest:
            self._evaluate(trainer, pl_module)

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best coefficients in place, before they are exported."""
        if self._learned and self.best is not None:
            assert isinstance(pl_module, MergingMethod)
            for parameter, best in zip(pl_module.learned, self._learned, strict=True):
                parameter.copy_(best)
            log.info("Kept the coefficients of step %d: %.4f on the held-out inputs", *self.best)

    def _evaluate(self, trainer: Trainer, method: LightningModule) -> float:
        assert isinstance(method, MergingMethod)
        loss = holdout_loss(trainer, method)
        self._latest = trainer.global_step
        self._waited += 1
        if self.best is None or loss < self.best[1]:
            self.best, self._waited = (trainer.global_step, loss), 0
            self._learned = [parameter.detach().cpu().clone() for parameter in method.learned]
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the best coefficients so far, for checkpoints."""
        return {"learned": self._learned, "best": self.best, "latest": self._latest, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self._learned, self.best = state_dict["learned"], state_dict["best"]
        self._latest, self._waited = state_dict["latest"], state_dict["waited"]


def check_held_out(callback: str, data: object) -> None:
    """Refuse data without held-out samples, for a callback that measures on them."""
    if not isinstance(data, UnlabeledTasks) or not data.holdout_streams:
        cause = ", as data.holdout=auto divides so few into folds" if getattr(data, "folds", 0) else ""
        raise InputError(
            f"{callback}: expected held-out inputs, found none{cause}. Set data.holdout, for example to 0.2."
        )


@torch.no_grad()
def holdout_loss(trainer: Trainer, method: MergingMethod) -> float:
    """Return the objective on the held-out streams: means over each task's rows, weighted as in training.

    The devices share the work, and get the same.
    """
    data: UnlabeledTasks = trainer.datamodule  # type: ignore[attr-defined]
    totals = dict.fromkeys(data.holdout_streams, 0.0)
    rows = dict.fromkeys(data.holdout_streams, 0)
    counts_all = method.model.valid is None
    values = method.model.coefficients()
    with trainer.precision_plugin.forward_context():
        for batch in data.holdout_batches():
            if not batch and not method.model.is_sharded:
                continue
            moved = {task: part.to(method.device) for task, part in batch.items()}
            _, result = method.run(moved, values, needs_gradient=False)
            for task, loss in result.losses.items():
                count = method.model.count_rows(batch[task].inputs)
                rows[task] += count
                totals[task] += float(loss) * count / (len(data.holdout_streams[task]) if counts_all else 1)
    sums = ranks.total(torch.tensor([[*totals.values()], [*rows.values()]], dtype=torch.float64).to(method.device))
    means = (sums[0] if counts_all else sums[0] / sums[1].clamp(min=1)).tolist()
    weights = method.weights(totals)
    return float(sum(weights[task] * mean for task, mean in zip(totals, means, strict=True)))
