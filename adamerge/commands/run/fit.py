"""Fit: one stage of a run, its first stage, and the folds that prove what few samples teach."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, ModelCheckpoint
from omegaconf import DictConfig

from adamerge.callbacks import GracefulStop, LogCoefficients, NeverWorse, UnlabeledCriteria
from adamerge.callbacks.checkpoint_io import write_atomically
from adamerge.callbacks.elapsed import Elapsed, seconds_of
from adamerge.callbacks.never_worse import has_experts
from adamerge.callbacks.progress import MergingProgress
from adamerge.commands.run.assembly import Assembly, assemble
from adamerge.commands.run.build import build
from adamerge.commands.run.folder import LAST, LAST_GOOD, last_checkpoint, plain
from adamerge.commands.run.processes import trainer_options
from adamerge.commands.run.recorded import check_start
from adamerge.commands.run.stages import STAGE, START, fold_folder
from adamerge.errors import GuardError, InputError, NonfiniteError
from adamerge.methods.method import MergingMethod
from adamerge.model.batch_norm import BatchNormPolicy
from adamerge.model.coefficients import save_coefficients
from adamerge.model.teacher_files import TeacherFiles
from adamerge.results.agreement import Comparison
from adamerge.system import ranks

log = logging.getLogger(__name__)

_WRITE_TO_LOGGERS = (LogCoefficients, LearningRateMonitor, DeviceStatsMonitor)


@dataclass
class Folds:
    """What folds measured, and their costs.

    Attributes:
        comparisons: Start and result of each fold, on the samples that it lacks.
        steps: Optimizer steps of all.
        seconds: Seconds that they learned.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def fit_first(config: DictConfig, folder: Path, assembly: Assembly, *, resume: bool) -> None:
    """Run the first stage in its folder, and leave in the run's what the second starts from.

    That is a file of its own, as an export on request may write the stage's ``coefficients.json`` at any time.
    """
    trainer = fit(config, folder / STAGE, assembly, [], "Stage 1 of 2", resume=resume)
    if trainer.is_global_zero:
        for path in (folder / STAGE / "coefficients.json", folder / START):
            save_coefficients(assembly.model.coefficients, path, assembly.pool)
    ranks.wait()  # for the files
    raise_reason(trainer)


def fit(
    config: DictConfig,
    folder: Path,
    assembly: Assembly,
    exports: list[Callback],
    description: str,
    *,
    resume: bool,
    folds: Sequence[Comparison] | None = (),
) -> Trainer:
    """Run one stage to its end, from its own last checkpoint where it has one; seeded by itself, as a resume is.

    Args:
        config: Of the run or stage.
        folder: The stage's own.
        assembly: What learns.
        exports: Callbacks beside those of the configuration.
        description: What its progress is called.
        resume: Whether a checkpoint in the folder is gone on from.
        folds: What folds measured before; None in a fold, which has no logger.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    objective = build(config, "objective")
    method: MergingMethod = build(config, "method", model=assembly.model, objective=objective)
    method.teacher_files = TeacherFiles(config.teacher_cache) if config.get("teacher_cache") else None
    method.recipe, method.start = plain(config), assembly.start.get("start", {})
    elapsed = Elapsed()
    observers = [MergingProgress(description), UnlabeledCriteria()]
    saves = ModelCheckpoint(
        dirpath=folder / LAST.parent, filename="step={step}", auto_insert_metric_name=False,
        every_n_train_steps=config.checkpoint_every, save_top_k=0, save_last=True, enable_version_counter=False,
    )  # fmt: skip
    configured = _callbacks(config, folds, assembly.batch_norm)
    callbacks = [*observers, saves, *configured, *exports, elapsed, GracefulStop(folder / LAST)]
    options = {"default_root_dir": folder, **trainer_options()}
    loggers = [build(config, f"logger.{name}") for name in config.logger or {}] if folds is not None else []
    trainer: Trainer = build(config, "trainer", callbacks=callbacks, logger=loggers or False, **options)
    write_atomically(trainer)
    saved = last_checkpoint(folder) if resume else None
    if saved is not None:
        check_start(method.start, folder)
    try:
        trainer.fit(method, datamodule=assembly.data, ckpt_path=saved, weights_only=True)
    except NonfiniteError as error:
        if not method.learns_coefficients:
            raise GuardError(str(error)) from error
        if trainer.is_global_zero:
            save_coefficients(assembly.model.coefficients, folder / LAST_GOOD, assembly.pool)
        raise GuardError(
            f"{error} The last good coefficients are in {folder / LAST_GOOD}: start from them with init=FILE."
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if saved is None or elapsed.has_started or isinstance(error, (InputError, GuardError)):
            raise
        raise InputError(
            f"{saved}: does not belong to this run, or is damaged: {type(error).__name__} as it was restored "
            f"({' '.join(str(error).split())[:200]}). Put a copy back, or start the run again in another folder."
        ) from error
    trainer.save_checkpoint(folder / LAST)  # the last step, whatever checkpoint_every is
    return trainer


def raise_reason(trainer: Trainer) -> None:
    """End with an error where a callback stopped the run for a ``reason`` that the user should know."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if reason := getattr(callback, "reason", None):
            raise GuardError(reason)


def _callbacks(
    config: DictConfig, folds: Sequence[Comparison] | None, batch_norm: BatchNormPolicy | None = None
) -> list[Callback]:
    """Build the callbacks that a configuration names, the proof last; a fold has none that write to a logger."""
    callbacks: list[Callback] = [build(config, f"callbacks.{name}") for name in config.callbacks or {}]
    for callback in callbacks:
        if isinstance(callback, NeverWorse):
            callback.folds, callback.batch_norm = folds, batch_norm
    callbacks.sort(key=lambda callback: isinstance(callback, NeverWorse))
    return callbacks if folds is not None else [item for item in callbacks if not isinstance(item, _WRITE_TO_LOGGERS)]


def fit_folds(config: DictConfig, folder: Path, assembly: Assembly, *, resume: bool) -> Folds:
    """Learn on all parts of few samples but one, for each part, where ``never_worse`` is to judge by them.

    The last checkpoint of a fold that has ended says what it measured, also to a resumed run.

    Args:
        config: The run's.
        folder: The run's; each fold has a folder of its own in there.
        assembly: The run's; its data say in how many parts samples are held out, if they are.
        resume: Whether the run goes on.
    """
    folds, count = Folds(), assembly.data.folds
    if not count or not has_experts(assembly.model, assembly.data):
        return folds
    if not any(isinstance(callback, NeverWorse) for callback in _callbacks(config, ())):
        return folds
    log.info(
        "data.holdout=auto: the samples are few, so the run learns %d times on parts of them, which the rest judges, "
        "and then on all (data.holdout=0.2: once, on four fifths).", count,
    )  # fmt: skip
    for number in range(1, count + 1):
        fold = replace(assemble(config, of=assembly), data=assembly.data.fold(number - 1))
        path = fold_folder(folder, number)
        trainer = fit(config, path, fold, [], f"Fold {number} of {count}", folds=None, resume=resume)
        judge = next(item for item in trainer.callbacks if isinstance(item, NeverWorse))  # type: ignore[attr-defined]
        assert judge.comparison is not None
        folds.comparisons.append(judge.comparison)
        folds.steps += trainer.global_step
        ranks.wait()  # for the checkpoint
        folds.seconds += seconds_of(path / LAST)
        fold.model.weights.forget()
        del fold, trainer, judge
        gc.collect()  # merged weights that a trainer and its method hold in circles
    return folds
