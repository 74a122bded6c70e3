"""Run: objects from a configuration, one or two stages fitted, the export, its score and the report."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig

from adamerge.callbacks import ExportMergedWeights
from adamerge.callbacks.elapsed import seconds_of
from adamerge.callbacks.log_coefficients import log_scores
from adamerge.commands.run.assembly import Assembly, assemble
from adamerge.commands.run.fit import fit, fit_first, fit_folds, raise_reason
from adamerge.commands.run.folder import CONFIG_FILE, LAST, is_started, plain, save_config
from adamerge.commands.run.precision import settled
from adamerge.commands.run.stages import STAGE, START, first_stage
from adamerge.commands.run.start_rules import is_merged
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import shorten
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
        fit_first(todo, folder, assembly, resume=resume)
        assembly = assemble(config, of=assembly)
    folds = fit_folds(config, folder, assembly, resume=resume)
    if folds.comparisons:
        assembly = assemble(config, of=assembly)
    export = _export(config, folder, assembly)
    description = "Stage 2 of 2" if first else "Adapting"
    trainer = fit(config, folder, assembly, [export], description, folds=folds.comparisons, resume=resume)
    seconds = seconds_of(folder / LAST) + seconds_of(folder / STAGE / LAST) + folds.seconds
    times |= {"adapt": seconds, "export": export.seconds}
    scoring = Stopwatch()
    if assembly.model.is_sharded:
        ranks.wait()  # for the export: all devices score it, each with its part of the weights
    summary = _score(config, assembly, trainer, export, times["adapt"])
    if summary is not None:
        times["score"] = scoring.seconds()
    if trainer.is_global_zero:
        _tell_unreadable(assembly.data)
        steps = trainer.global_step + (int(first.steps) if first else 0) + folds.steps
        costs = costs_of(times, steps, assembly.pool.device, resumed=resume)
        if config.get("report", True):  # of a sharded pool this device has a part only
            report_run(folder, None if assembly.model.is_sharded else assembly.pool, costs)
    raise_reason(trainer)
    return summary


def _export(config: DictConfig, folder: Path, assembly: Assembly) -> ExportMergedWeights:
    """Return the callback that writes the merged weights into a run's folder."""
    return ExportMergedWeights(
        folder,
        head_info=head_info(assembly.data),
        sidecar=assembly.backbone.sidecar(),
        recipe={**_provenance(config), **assembly.start},
        batch_norm=assembly.batch_norm,
    )


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


def head_info(data: UnlabeledTasks) -> dict[str, Any]:
    """Return class names and templates by task, for ``heads.safetensors``."""
    return {name: {"classes": task.class_names, "templates": list(task.templates)} for name, task in data.tasks.items()}


def record_metrics(path: Path, summary: Mapping[str, Any], seconds: float) -> None:
    """Add the metrics to ``merge.json``."""
    metrics = {name: {k: v for k, v in row.items() if k != "correct"} for name, row in summary["rows"].items()}
    scores = {key: summary[key] for key in ("metrics", "measures") if summary.get(key)}
    facts = {"metrics": metrics, "scores": scores, "unreadable_evaluation": summary.get("unreadable", {})}
    save_json({**read_json_mapping(path), **facts, "seconds": seconds, "peak_memory_bytes": peak_memory()}, path)
