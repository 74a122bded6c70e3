"""Send coefficients to TensorBoard, Weights & Biases or MLflow, as a heat map and as distributions."""

import bisect
import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from adamerge.errors import InputError
from adamerge.methods.method import MergingMethod
from adamerge.model.coefficients import Coefficients
from adamerge.model.granularity import Block
from adamerge.model.merged_model import MergedModel

Image = np.ndarray[Any, np.dtype[np.uint8]]

_IMAGE, _VALUES = "coefficients/heat_map", "coefficients"  # names in the loggers
_MOST_TICKS = 32


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
        if every_n_steps < 1:
            raise InputError(f"LogCoefficients.every_n_steps: expected a number of steps >= 1, found {every_n_steps}.")
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError(
                "LogCoefficients: it draws with matplotlib, which is not installed: pip install matplotlib."
            )
        self._every = every_n_steps
        self._logged = -1  # step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what it cannot work with."""
        if not isinstance(pl_module, MergingMethod):
            raise InputError(f"LogCoefficients: expected a method of adamerge, found {type(pl_module).__name__}.")
        if not any(isinstance(logger, tuple(_SENDERS)) for logger in trainer.loggers):
            found = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
            raise InputError(
                f"LogCoefficients: no logger of the run takes pictures, found {found}. Choose logger=tensorboard, "
                "wandb or mlflow."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the configuration, and the coefficients that the run starts from."""
        assert isinstance(pl_module, MergingMethod)
        for logger in trainer.loggers:
            if isinstance(logger, tuple(_SENDERS)) and pl_module.recipe:
                logger.log_hyperparams(dict(pl_module.recipe))
        self._log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
        values = model.coefficients().detach().float().cpu()
        order = [name for name, _ in model.encoder.named_parameters()]
        image = functools.cache(lambda: heat_map(*by_depth(model.coefficients, order), title=f"step {step}"))
        means = {f"{_VALUES}/mean/{name}": row.mean().item() for name, row in _rows(model.coefficients, values)}
        for logger in trainer.loggers:
            for kind, send in _SENDERS.items():
                if isinstance(logger, kind):
                    logger.log_metrics(means, step)
                    send(logger, image(), dict(_rows(model.coefficients, values)), step)


def log_scores(loggers: Iterable[Logger], row: Mapping[str, Any], step: int) -> None:
    """Send the accuracies of a row of ``summary.json`` to the loggers that take pictures: by task, and the mean."""
    scores = {f"test/acc/{task}": value for task, value in row["per_task"].items()}
    for logger in loggers:
        if isinstance(logger, tuple(_SENDERS)):
            logger.log_metrics({**scores, "test/acc": row["mean"]}, step)
            logger.finalize("success")


def by_depth(coefficients: Coefficients, order: Sequence[str]) -> tuple[Tensor, list[str], tuple[str, ...]]:
    """Return the coefficients as a table of experts and depth.

    Args:
        coefficients: (E, G).
        order: Names of parameters as the encoder has them, from its input to its output.

    Returns:
        Values (E, C), one column per tensor or shared group, with the mean of its coefficients; the columns' names; the
        experts' names.
    """
    index = coefficients.index
    labels = sorted(index.labels, key=lambda label: index.labels[label][0])
    firsts = [index.labels[label][0] for label in labels]
    at = {name: position for position, name in enumerate(order)}
    depth: dict[str, int] = {}
    for name in sorted(index.segments, key=lambda name: at.get(name, len(at))):
        for segment in index.segments[name]:
            depth.setdefault(labels[bisect.bisect_right(firsts, segment.first) - 1], len(depth))
    labels.sort(key=lambda label: depth.get(label, len(depth)))
    values = coefficients().detach().float().cpu()
    spans = (index.labels[label] for label in labels)
    columns = [values[:, first : first + count].mean(1) for first, count in spans]
    return torch.stack(columns, 1), labels, coefficients.expert_names


def heat_map(values: Tensor, columns: Sequence[str], rows: Sequence[str], title: str = "") -> Image:
    """Draw a table as colours; return the pixels (height, width, 3), 8 bits each.

    Args:
        values: (E, C).
        columns: Names of the C columns; where parameters belong to a block, the block is named at its first one.
        rows: Names of the E rows.
        title: Above it.
    """
    from matplotlib.figure import Figure

    width = min(20.0, max(6.0, 2.5 + 0.1 * len(columns)))
    figure = Figure(figsize=(width, 2.4 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(drawn, ax=axes, label="coefficient", fraction=0.05)
    ticks = _ticks(columns)
    axes.set_xticks([at for at, _ in ticks], [name for _, name in ticks], rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_title(title, fontsize=9)
    return _pixels(figure)


def histograms(values: Mapping[str, Tensor]) -> Image:
    """Draw the distribution of each expert's coefficients; return the pixels (height, width, 3), 8 bits each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    every = torch.cat(list(values.values()))
    low, high = every.min().item(), every.max().item()
    margin = 0.5 if high - low < 1e-6 else 0.0
    for name, row in values.items():
        axes.hist(row.numpy(), bins=50, range=(low - margin, high + margin), histtype="step", label=name)
    axes.set_xlabel("coefficient")
    axes.set_ylabel("groups")
    axes.legend(fontsize=8)
    return _pixels(figure)


def _pixels(figure: Any) -> Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _ticks(columns: Sequence[str]) -> list[tuple[int, str]]:
    """Return where names stand: one per block, or column outside of blocks, thinned out where there are many."""
    names = [match.group() if (match := re.search(Block.pattern, name)) else name for name in columns]
    starts = [at for at, name in enumerate(names) if at == 0 or name != names[at - 1]]
    return [(at, names[at]) for at in starts[:: -(-len(starts) // _MOST_TICKS)]]


def _rows(coefficients: Coefficients, values: Tensor) -> Iterable[tuple[str, Tensor]]:
    return zip(coefficients.expert_names, values, strict=True)


def _to_tensorboard(logger: Any, image: Image, values: Mapping[str, Tensor], step: int) -> None:
    logger.experiment.add_image(_IMAGE, image, step, dataformats="HWC")
    for name, row in values.items():
        logger.experiment.add_histogram(f"{_VALUES}/{name}", row, step)


def _to_wandb(logger: Any, image: Image, values: Mapping[str, Tensor], step: int) -> None:
    import wandb

    logger.log_image(_IMAGE, [image], step)
    logger.log_metrics({f"{_VALUES}/{name}": wandb.Histogram(row.tolist()) for name, row in values.items()}, step)


def _to_mlflow(logger: Any, image: Image, values: Mapping[str, Tensor], step: int) -> None:
    for key, picture in ((_IMAGE, image), (f"{_VALUES}/histograms", histograms(values))):
        logger.experiment.log_image(logger.run_id, picture, key=key, step=step)


_SENDERS: Mapping[type[Logger], Callable[[Any, Image, Mapping[str, Tensor], int], None]] = {
    TensorBoardLogger: _to_tensorboard,
    WandbLogger: _to_wandb,
    MLFlowLogger: _to_mlflow,
}
