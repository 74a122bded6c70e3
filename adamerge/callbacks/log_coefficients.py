"""Send coefficients to TensorBoard, Weights & Biases or MLflow, as a heat map and as distributions."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from adamerge.errors import InputError, check_number
from adamerge.methods.method import MergingMethod
from adamerge.model.coefficients import Coefficients
from adamerge.model.merged_model import MergedModel
from adamerge.results.report.drawing import pixels
from adamerge.results.report.facts import Learned
from adamerge.results.report.run_charts import coefficient_map, distribution_of

_IMAGE, _VALUES = "coefficients/heat_map", "coefficients"  # names in the loggers


class LogCoefficients(Callback):
    """Send the coefficients to the run's loggers: at the start, every so often, and at the end.

    TensorBoard and Weights & Biases get a heat map (experts by depth), a histogram per expert, and each expert's mean
    as a scalar; MLflow, which has no histograms, gets a picture of them. The run's configuration goes to all three.
    Other loggers are left alone. Losses by task and the mean coefficient are scalars that every logger gets anyway.

    Args:
        every_n_steps: Optimizer steps between two pictures.

    Raises:
        InputError: If ``every_n_steps`` is less than 1, no logger of the run can take pictures, or matplotlib is not
            installed.
    """

    def __init__(self, every_n_steps: int = 25) -> None:
        check_number("LogCoefficients.every_n_steps", every_n_steps, 1, whole=True)
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError(
                "LogCoefficients: it draws with matplotlib, which is not installed: pip install matplotlib."
            )
        self._every = every_n_steps
        self._logged = -1  # step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a method that is not adamerge's, and a run without a logger that takes pictures."""
        if not isinstance(pl_module, MergingMethod):
            raise InputError(f"LogCoefficients: expected a method of adamerge, found {type(pl_module).__name__}.")
        if not _senders(trainer.loggers):
            loggers = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
            raise InputError(
                f"LogCoefficients: no logger of the run takes pictures, found {loggers}. Choose logger=tensorboard, "
                "wandb or mlflow."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the configuration, and the coefficients that the run starts from."""
        assert isinstance(pl_module, MergingMethod)
        for logger in _senders(trainer.loggers) if pl_module.recipe else ():
            logger.log_hyperparams(dict(pl_module.recipe))
        self._log(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Send the coefficients where it is time to."""
        if trainer.global_step % self._every == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the coefficients that the run ends with."""
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step, model = trainer.global_step, pl_module.model
        if step == self._logged or not trainer.is_global_zero:
            return
        assert isinstance(model, MergedModel)
        self._logged = step
        learned = learned_of(model.coefficients)
        rows = dict(zip(model.pool.expert_names, model.coefficients().detach().float().cpu(), strict=True))
        for logger, send in _senders(trainer.loggers).items():
            logger.log_metrics({f"{_VALUES}/mean/{name}": row.mean().item() for name, row in rows.items()}, step)
            send(logger, learned, rows, step)


def log_scores(loggers: Iterable[Logger], row: Mapping[str, Any], step: int) -> None:
    """Send the accuracies of a row of ``summary.json`` to the loggers that take pictures: by task, and the mean."""
    scores = {f"test/acc/{task}": value for task, value in row["per_task"].items()}
    for logger in _senders(loggers):
        logger.log_metrics({**scores, "test/acc": row["mean"]}, step)
        logger.finalize("success")


def learned_of(coefficients: Coefficients) -> Learned:
    """Return the coefficients by label, as charts take them."""
    values = coefficients().detach().float().cpu().numpy()
    index = coefficients.index
    labels = {label: values[:, first : first + count] for label, (first, count) in index.labels.items()}
    return Learned(list(coefficients.expert_names), "", "", labels)


def _to_tensorboard(logger: Any, learned: Learned, values: Mapping[str, Tensor], step: int) -> None:
    logger.experiment.add_image(_IMAGE, pixels(coefficient_map(learned)), step, dataformats="HWC")
    for name, row in values.items():
        logger.experiment.add_histogram(f"{_VALUES}/{name}", row, step)


def _to_wandb(logger: Any, learned: Learned, values: Mapping[str, Tensor], step: int) -> None:
    import wandb

    logger.log_image(_IMAGE, [pixels(coefficient_map(learned))], step)
    logger.log_metrics({f"{_VALUES}/{name}": wandb.Histogram(row.tolist()) for name, row in values.items()}, step)


def _to_mlflow(logger: Any, learned: Learned, values: Mapping[str, Tensor], step: int) -> None:
    charts = {_IMAGE: coefficient_map(learned), f"{_VALUES}/histograms": distribution_of(learned)}
    for key, chart in charts.items():
        logger.experiment.log_image(logger.run_id, pixels(chart), key=key, step=step)


Sender = Callable[[Any, Learned, Mapping[str, Tensor], int], None]


def _senders(loggers: Iterable[Logger]) -> dict[Logger, Sender]:
    """Return how each logger that takes pictures gets them."""
    senders: Mapping[type[Logger], Sender] = {
        TensorBoardLogger: _to_tensorboard,
        WandbLogger: _to_wandb,
        MLFlowLogger: _to_mlflow,
    }
    return {logger: send for logger in loggers for kind, send in senders.items() if isinstance(logger, kind)}
