"""Run: objects from a configuration, one or two stages fitted, the export, its score and the report."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch import nn

from adamerge.backbones import Backbone, check_classes, own_base, read_of, valid_of
from adamerge.callbacks import ExportMergedWeights, GracefulStop, UnlabeledCriteria
from adamerge.callbacks.checkpoint_io import write_atomically
from adamerge.callbacks.elapsed import Elapsed, seconds_of
from adamerge.callbacks.log_coefficients import log_scores
from adamerge.callbacks.progress import MergingProgress
from adamerge.commands.run.build import build, build_optional, build_tasks, pool_of
from adamerge.commands.run.folder import (
    CONFIG_FILE,
    LAST,
    LAST_GOOD,
    is_started,
    last_checkpoint,
    plain,
    save_config,
)
from adamerge.commands.run.precision import settled
from adamerge.commands.run.processes import is_sharded, trainer_options
from adamerge.commands.run.recorded import check_start
from adamerge.commands.run.stages import STAGE, START, coefficients_of, first_stage
from adamerge.commands.run.start_rules import is_merged
from adamerge.data.batch import described
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import GuardError, InputError, NonfiniteError, shorten
from adamerge.methods.method import MergingMethod
from adamerge.model.batch_norm import BatchNormPolicy
from adamerge.model.coefficients import save_coefficients
from adamerge.model.merged_model import MergedModel
from adamerge.model.sharding import ShardedModel
from adamerge.model.teacher_files import TeacherFiles
from adamerge.pool.pool import ExpertPool
from adamerge.results.evaluation import summary
from adamerge.results.report.record import costs_of
from adamerge.results.report.write import report_run
from adamerge.results.scoring import MergeResult, score_run
from adamerge.system import progress, ranks
from adamerge.system.files import ensure_writable, save_json
from adamerge.system.memory import peak_memory
from adamerge.system.progress import Stopwatch
from adamerge.system.reading import read_json_mapping

log = logging.getLogger(__name__)


@dataclass
class Assembly:
    """Everything a run needs, built from its configuration.

    Attributes:
        start: For ``merge.json``: the file whose coefficients the run starts from, and the groups that follow from it.
        batch_norm: Which statistics the merged model's BatchNorm layers have; ``model`` has those to adapt with.
    """

    backbone: Backbone
    data: UnlabeledTasks
    pool: ExpertPool
    heads: dict[str, nn.Module]
    model: MergedModel
    start: dict[str, Any] = field(default_factory=dict)
    batch_norm: BatchNormPolicy = field(default_factory=lambda: BatchNormPolicy("base"))


def assemble(config: DictConfig, of: Assembly | None = None) -> Assembly:
    """Build data, pool, heads and merged model.

    Args:
        config: The configuration of a run or stage.
        of: Another stage of the same run, whose data, pool, heads and encoder are taken over.

    Raises:
        InputError: If something does not fit; the message names the option.
    """
    if of is not None:
        coefficients, start = coefficients_of(config, of.pool)
        options = build_optional(config, "encoder")
        readers = of.model.read, of.model.valid
        model = type(of.model)(of.model.encoder, of.pool, coefficients, of.heads, of.model.teachers, options, *readers)
        model.teacher_cache = of.model.teacher_cache
        of.batch_norm.start(model)
        return replace(of, model=model, start=start)
    backbone: Backbone = build(config, "backbone")
    data: UnlabeledTasks = build_tasks(config, backbone, backbone.preprocess())
    pool = build_pool(config, backbone)
    experts = {name: pool.checkpoint(name) for name in pool.expert_names}
    heads = backbone.heads(pool.source, experts, data.tasks)
    encoder = backbone.encoder()
    coefficients, start = coefficients_of(config, pool)
    teachers = {name: task.expert for name, task in data.tasks.items() if task.expert and name not in data.unseen}
    kind = ShardedModel if is_sharded(config) else MergedModel
    options, readers = build_optional(config, "encoder"), (read_of(backbone), valid_of(backbone))
    model = kind(encoder, pool, coefficients, heads, teachers, options, *readers)
    if config.get("teachers") is not None:  # runs of former versions have no such options
        model.teacher_cache = build(config, "teachers")
    width = _feature_width(model, data)
    if heads:
        check_classes(data.tasks, heads, width)
    batch_norm: BatchNormPolicy = build(config, "batch_norm")
    batch_norm.start(model)
    return Assembly(backbone, data, pool, heads, model, start, batch_norm)


def build_pool(
    config: DictConfig, backbone: Backbone, *, download: bool = True, for_export: bool = False
) -> ExpertPool:
    """Open the pool that the configuration names, for a backbone, whose own base stands in where the pool has none.

    Args:
        config: The whole configuration.
        backbone: As the configuration names it.
        download: Whether weights that only the backbone names may be downloaded.
        for_export: Whether each parameter is read once, so that it need not be kept in memory.
    """
    base = None if config.pool.get("base") else own_base(backbone, download=download)
    transform = build_optional(config, "transform")
    files = pool_of(config, backbone, base)
    dtypes = {OmegaConf.select(config, f"encoder.{kind}_dtype") for kind in ("compute", "base")}
    streams = bool(dtypes & {"bfloat16", "int8"}) and config.pool.get("storage") == "stream"
    if transform is None and (for_export or streams) and not is_sharded(config):
        return files.open_mapped()
    return files.open(transform=transform, mapped=is_sharded(config))


def adapt(
    config: DictConfig, folder: Path, *, resume: bool = False, first: DictConfig | None = None
) -> dict[str, Any] | None:
    """Adapt, export and evaluate; everything goes into ``folder``, a first stage into a folder of its own in there.

    Args:
        config: The composed configuration; ``run_dir`` must be ``folder``.
        folder: The run's folder, made if needed.
        resume: Go on from the folder's last checkpoint, or from the beginning where there is none yet.
        first: The first stage's configuration as it is stored, where ``config`` is; else it follows from ``config``.

    Returns:
        The content of ``summary.json``, or None where ``evaluate`` is off.

    Raises:
        InputError: If the configuration or a file is wrong.
        GuardError: If the loss or a coefficient became NaN or infinite, or, once the export is written, if a
            callback stopped the run for a ``reason``.
        SystemExit: If the run was stopped by a signal and saved.
    """
    config = settled(config)
    if resume and not is_started(folder):
        log.info("%s: nothing was saved before the run was stopped, so it starts from the beginning.", folder)
    first = first_stage(config) if first is None else first
    todo = first if first is not None and not (folder / START).is_file() else None
    prepared = Stopwatch()
    with progress.phase("Reading the pool and building the heads"):
        assembly = assemble(config if todo is None else todo)
    if ranks.is_first():
        ensure_writable(folder)
        if first is not None:
            save_config(first, folder / STAGE / CONFIG_FILE)
        save_config(config, folder / CONFIG_FILE)
    times = {"prepare": prepared.seconds()}
    if todo is not None:
        _fit_first(todo, folder, assembly, resume=resume)
        assembly = assemble(config, of=assembly)
    export = ExportMergedWeights(
        folder,
        head_info=head_info(assembly.data),
        sidecar=assembly.backbone.sidecar(),
        recipe={**_provenance(config), **assembly.start},
        batch_norm=assembly.batch_norm,
    )
    trainer = _fit(config, folder, assembly, [export], "Stage 2 of 2" if first else "Adapting", resume=resume)
    times |= {"adapt": seconds_of(folder / LAST) + seconds_of(folder / STAGE / LAST), "export": export.seconds}
    scoring = Stopwatch()
    if assembly.model.is_sharded:
        ranks.wait()  # for the export: all devices score it, each with its part of the weights
    summary = _score(config, assembly, trainer, export, times["adapt"])
    if summary is not None:
        times["score"] = scoring.seconds()
    if trainer.is_global_zero:
        _tell_unreadable(assembly.data)
        steps = trainer.global_step + (int(first.steps) if first else 0)
        costs = costs_of(times, steps, assembly.pool.device, resumed=resume)
        if config.get("report", True):  # of a sharded pool this device has a part only
            report_run(folder, None if assembly.model.is_sharded else assembly.pool, costs)
    _raise_reason(trainer)
    return summary


def _score(
    config: DictConfig, assembly: Assembly, trainer: Trainer, export: ExportMergedWeights, seconds: float
) -> dict[str, Any] | None:
    """Score an export and write its summary; None where nothing is scored, or another process writes it."""
    if not config.evaluate or not (trainer.is_global_zero or assembly.model.is_sharded):
        return None
    if not assembly.data.evaluation:
        log.warning("Nothing is scored: no task has evaluation inputs (data.tasks.<name>.evaluate).")
        return None
    start = config.start if is_merged(config) else {}
    seconds += start.get("seconds", 0.0)
    uses_labels = getattr(trainer.lightning_module.objective, "uses_labels", False) or start.get("uses_labels", False)
    merged = MergeResult(str(config.name), export.dirpath / export.filename, seconds, int(config.seed), uses_labels)
    compared = {"references": bool(config.references), "from_start": bool(start)}
    rows = score_run(assembly.model, assembly.data, merged, assembly.batch_norm, **compared)
    if not trainer.is_global_zero:
        return None
    content = summary(rows, assembly.data.protocol, assembly.data.unreadable_evaluation())
    save_json(content, export.dirpath / "summary.json")
    record_metrics(export.files["recipe"], content, seconds)
    log_scores(trainer.loggers, content["rows"][merged.name], trainer.global_step)
    return content


def _provenance(config: DictConfig) -> dict[str, Any]:
    """Return what ``merge.json`` says of a run: its options, and the command it was begun with, or else this one."""
    settings = plain(config)
    command = settings.pop("command", None) or (Path(sys.argv[0]).name, *sys.argv[1:])
    return {"config": settings, "command": [str(word) for word in command]}


def _tell_unreadable(data: UnlabeledTasks) -> None:
    """Log which inputs were left out: processes that load data may have no log."""
    for kind, images in (("adapt", data.unreadable()), ("score", data.unreadable_evaluation())):
        for task, names in images.items():
            log.warning(
                "data.tasks.%s: %d inputs to %s cannot be read: %s", task, len(names), kind, shorten(names, 1000)
            )


def _fit_first(config: DictConfig, folder: Path, assembly: Assembly, *, resume: bool) -> None:
    """Run the first stage in its folder, and leave in the run's what the second starts from.

    That is a file of its own, as an export on request may write the stage's ``coefficients.json`` at any time.
    """
    trainer = _fit(config, folder / STAGE, assembly, [], "Stage 1 of 2", resume=resume)
    if trainer.is_global_zero:
        for path in (folder / STAGE / "coefficients.json", folder / START):
            save_coefficients(assembly.model.coefficients, path, assembly.pool)
    ranks.wait()  # for the files
    _raise_reason(trainer)


def _fit(
    config: DictConfig, folder: Path, assembly: Assembly, exports: list[Callback], description: str, *, resume: bool
) -> Trainer:
    """Run one stage to its end, from its own last checkpoint where it has one; seeded by itself, as a resume is."""
    seed_everything(config.seed, workers=True, verbose=False)
    objective = build(config, "objective")
    method: MergingMethod = build(config, "method", model=assembly.model, objective=objective)
    method.teacher_files = TeacherFiles(config.teacher_cache) if config.get("teacher_cache") else None
    method.recipe, method.start = plain(config), assembly.start.get("start", {})
    elapsed = Elapsed()
    observers = [MergingProgress(description), UnlabeledCriteria()]
    callbacks = [*observers, *_callbacks(config, folder), *exports, elapsed, GracefulStop(folder / LAST)]
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


def _raise_reason(trainer: Trainer) -> None:
    """End with an error where a callback stopped the run for a ``reason`` that the user should know."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if reason := getattr(callback, "reason", None):
            raise GuardError(reason)


def head_info(data: UnlabeledTasks) -> dict[str, Any]:
    """Return class names and templates by task, for ``heads.safetensors``."""
    return {name: {"classes": task.class_names, "templates": list(task.templates)} for name, task in data.tasks.items()}


def record_metrics(path: Path, summary: Mapping[str, Any], seconds: float) -> None:
    """Add the metrics to ``merge.json``."""
    metrics = {name: {k: v for k, v in row.items() if k != "correct"} for name, row in summary["rows"].items()}
    facts = {"metrics": metrics, "unreadable_evaluation": summary.get("unreadable", {})}
    save_json({**read_json_mapping(path), **facts, "seconds": seconds, "peak_memory_bytes": peak_memory()}, path)


def _callbacks(config: DictConfig, folder: Path) -> list[Callback]:
    checkpoints = ModelCheckpoint(
        dirpath=folder / LAST.parent, filename="step={step}", auto_insert_metric_name=False,
        every_n_train_steps=config.checkpoint_every, save_top_k=0, save_last=True, enable_version_counter=False,
    )  # fmt: skip
    return [checkpoints, *(build(config, f"callbacks.{name}") for name in config.callbacks or {})]


def _feature_width(model: MergedModel, data: UnlabeledTasks) -> int:
    """Run one input through the encoder, to know F."""
    name, stream = next(iter(data.streams.items()))
    inputs = data.collate([stream[0].inputs])
    try:
        with torch.no_grad():
            return int(model(inputs, model.base_parameters()).shape[-1])
    except RuntimeError as error:
        raise InputError(
            f"data.tasks.{name}: the encoder cannot take {described(inputs)} ({error}). Do the data set's transform "
            "and what the backbone takes agree?"
        ) from error
