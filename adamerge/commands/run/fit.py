"""Fit: one stage of a run, its first stage, and the folds that prove what few samples teach."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from adamerge.callbacks import GracefulStop, NeverWorse, UnlabeledCriteria
from adamerge.callbacks.checkpoint_io import write_atomically
from adamerge.callbacks.elapsed import Elapsed, seconds_of
from adamerge.callbacks.progress import MergingProgress
from adamerge.commands.run.assembly import Assembly, assemble
from adamerge.commands.run.build import build
from adamerge.commands.run.folder import (
    LAST,
    LAST_GOOD,
    last_checkpoint,
    plain,
)
from adamerge.commands.run.processes import trainer_options
from adamerge.commands.run.recorded import check_start
from adamerge.commands.run.stages import FOLDS, PROOF, STAGE, START
from adamerge.errors import GuardError, InputError, NonfiniteError
from adamerge.methods.method import MergingMethod
from adamerge.model.coefficients import save_coefficients
from adamerge.model.teacher_files import TeacherFiles
from adamerge.results.agreement import Agreement
from adamerge.results.recipes import flat
from adamerge.system import ranks
from adamerge.system.files import save_json
from adamerge.system.reading import read_json_mapping

log = logging.getLogger(__name__)


def fit_first(config: DictConfig, folder: Path, assembly: Assembly, *, resume: bool) -> None:
    """Run the first stage in its folder, and leave in the run's what the second starts from.

    That is a file of its own, as an export on request may write the stage's ``coefficients.json`` at any time.
    """
    trainer = fit(config, folder / STAGE, assembly, callbacks_of(config), "Stage 1 of 2", resume=resume)
    if trainer.is_global_zero:
        for path in (folder / STAGE / "coefficients.json", folder / START):
            save_coefficients(assembly.model.coefficients, path, assembly.pool)
    ranks.wait()  # for the files
    raise_reason(trainer)


def fit(
    config: DictConfig, folder: Path, assembly: Assembly, callbacks: list[Callback], description: str, *, resume: bool
) -> Trainer:
    """Run one stage to its end, from its own last checkpoint where it has one; seeded by itself, as a resume is.

    Args:
        config: Of the run or stage.
        folder: The stage's own.
        assembly: What learns.
        callbacks: Those of the configuration (:func:`callbacks_of`), and an export.
        description: What its progress is called.
        resume: Whether a checkpoint in the folder is gone on from.
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
    callbacks = [*observers, saves, *callbacks, elapsed, GracefulStop(folder / LAST)]
    options = {"default_root_dir": folder, **trainer_options()}
    loggers = [build(config, f"logger.{name}") for name in config.logger or {}]
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


def callbacks_of(config: DictConfig) -> list[Callback]:
    """Build the callbacks that a configuration names."""
    return [build(config, f"callbacks.{name}") for name in config.callbacks or {}]


def prove(
    config: DictConfig, folder: Path, assembly: Assembly, callbacks: list[Callback], *, resume: bool
) -> tuple[Assembly, float]:
    """Learn on all parts of few samples but one, for each part, and tell ``never_worse`` what that part says of it.

    The folds that have ended stay in a file, where a resumed run finds them.

    Args:
        config: The run's.
        folder: The run's.
        assembly: The run's; its data say in how many parts samples are held out, if they are.
        callbacks: The run's.
        resume: Whether the run goes on.

    Returns:
        What the run itself learns with, and the seconds that folds learned.
    """
    guards = [callback for callback in callbacks if isinstance(callback, NeverWorse)]
    count = assembly.data.folds
    if not guards or not count or not any(task in assembly.model.teachers for task in assembly.data.streams):
        return assembly, 0.0
    path, of_fold = folder / PROOF, config.copy()
    folds = _folds_in(path) if resume and path.is_file() else []
    of_fold.run_dir, of_fold.logger = str(folder / FOLDS), None
    log.info("data.holdout=auto: the samples are few, so %d parts of them are held out one after the other.", count)
    for number in range(len(folds), count):
        fold = replace(assemble(config, of=assembly), data=assembly.data.fold(number))
        others = callbacks_of(config)
        judge = next(callback for callback in others if isinstance(callback, NeverWorse))
        judge.is_fold = True
        fit(of_fold, folder / FOLDS, fold, others, f"Fold {number + 1} of {count}", resume=resume)
        folds.append({**(judge.evidence or {}), "seconds": seconds_of(folder / FOLDS / LAST)})
        if ranks.is_first():
            shutil.rmtree(folder / FOLDS)  # before the next fold could go on from it
            save_json({"folds": folds}, path)
        ranks.wait()
    for guard in guards:
        guard.folds = [(Agreement(**fold["start"]), Agreement(**fold["result"])) for fold in folds]
    return assemble(config, of=assembly), sum(fold["seconds"] for fold in folds)


def _folds_in(path: Path) -> list[dict[str, Any]]:
    """Read what folds have measured: agreements as mappings, and seconds.

    Raises:
        InputError: If the file holds anything else.
    """
    folds = read_json_mapping(path).get("folds")
    if not isinstance(folds, list) or not all(isinstance(fold, dict) and _is_whole(flat(fold)) for fold in folds):
        raise InputError(f"{path}: not what folds have measured. Remove it, and they learn again.")
    return folds


def _is_whole(fold: Mapping[str, Any]) -> bool:
    numbers = [f"{kind}.{number}" for kind in ("start", "result") for number in ("agreement", "kl", "rows")]
    return all(isinstance(fold.get(name), (int, float)) for name in (*numbers, "seconds"))
