"""From a Hydra configuration to objects, a run folder and a result."""

import contextlib
import json
import logging
import os
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from adamerge.backbones import Backbone, check_classes
from adamerge.callbacks import CollapseGuard, ExportMergedWeights, GracefulStop
from adamerge.callbacks.progress import MergingProgress
from adamerge.coefficients import Coefficients
from adamerge.data import UnlabeledTasks
from adamerge.errors import GuardError, InputError
from adamerge.evaluation import Stopwatch, write_summary
from adamerge.files import atomic_path, ensure_writable, save_json
from adamerge.methods.method import MergingMethod
from adamerge.model import MergedModel
from adamerge.pool import ExpertPool
from adamerge.preflight import build, build_init, build_optional, strings
from adamerge.scoring import Made, score_run
from adamerge.task_vectors import dtype_of

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
LAST = Path("checkpoints") / "last.ckpt"


@dataclass
class Assembly:
    """Everything a run needs, built from its configuration."""

    backbone: Backbone
    data: UnlabeledTasks
    pool: ExpertPool
    heads: dict[str, nn.Module]
    model: MergedModel


def assemble(config: DictConfig) -> Assembly:
    """Build data, pool, heads and merged model.

    Raises:
        InputError: If something does not fit; the message names the option.
    """
    backbone: Backbone = build(config, "backbone")
    data: UnlabeledTasks = build(config, "data", preprocess=backbone.preprocess())
    pool = build_pool(config, backbone)
    experts = {name: pool.checkpoint(name) for name in pool.expert_names}
    heads = backbone.heads(pool.source, experts, data.tasks)
    encoder = backbone.encoder()
    coefficients = Coefficients(
        pool,
        build(config, "granularity"),
        init=build_init(config),
        constraint=build(config, "constraint"),
    )
    teachers = {name: task.expert for name, task in data.tasks.items() if task.expert}
    model = MergedModel(encoder, pool, coefficients, heads, teachers)
    check_classes(data.tasks, heads, _feature_width(model, data))
    return Assembly(backbone, data, pool, heads, model)


def build_pool(config: DictConfig, backbone: Backbone) -> ExpertPool:
    """Open the pool that the configuration names, for a backbone."""
    node = config.pool
    return ExpertPool.from_files(
        node.base,
        dict(node.experts),
        storage=node.get("storage") or "auto",
        dtype=dtype_of(node.get("dtype")),
        include=strings(node.get("include")),
        exclude=[*backbone.exclude, *(strings(node.get("exclude")) or [])] or None,
        key_map=backbone.prefix,
        transform=build_optional(config, "transform"),
        task_vectors=node.get("task_vectors"),
    )


def adapt(config: DictConfig, folder: Path, *, resume: bool = False) -> dict[str, Any] | None:
    """Adapt, export and evaluate; everything goes into ``folder``.

    Args:
        config: The composed configuration; ``run_dir`` must be ``folder``.
        folder: The run's folder, made if needed.
        resume: Go on from the folder's last checkpoint.

    Returns:
        The content of ``summary.json``, or None where ``evaluate`` is off.

    Raises:
        InputError: If the configuration or a file is wrong.
        GuardError: If the loss or a coefficient became NaN or infinite, or, once the export is written, if a
            collapse guard stopped the run.
        SystemExit: If the run was stopped by a signal and saved.
    """
    if resume and not (folder / LAST).is_file():
        raise InputError(f"{folder}: nothing to resume: no {LAST}. Start the run without resume.")
    seed_everything(config.seed, workers=True, verbose=False)
    with Console(stderr=True).status("Reading the pool and building the heads"):
        assembly = assemble(config)
    ensure_writable(folder)
    save_config(config, folder / CONFIG_FILE)
    objective = build(config, "objective")
    method: MergingMethod = build(config, "method", model=assembly.model, objective=objective)
    export = ExportMergedWeights(
        folder,
        head_info=head_info(assembly.data),
        sidecar=assembly.backbone.sidecar(),
        recipe={"config": plain(config), "command": [Path(sys.argv[0]).name, *sys.argv[1:]]},
    )
    trainer: Trainer = build(config, "trainer", callbacks=_callbacks(config, folder, export), logger=_loggers(config))
    watch = Stopwatch()
    trainer.fit(method, datamodule=assembly.data, ckpt_path=str(folder / LAST) if resume else None, weights_only=True)
    trainer.save_checkpoint(folder / LAST)  # the last step, whatever checkpoint_every is
    summary = None
    if trainer.is_global_zero and config.evaluate and not assembly.data.evaluation:
        log.warning("Nothing is scored: no task has evaluation images (data.tasks.<name>.evaluate).")
    elif trainer.is_global_zero and config.evaluate:
        seconds = watch.seconds()
        uses_labels = bool(getattr(objective, "uses_labels", False))
        merged = Made(str(config.name), export.files["merged"], seconds, int(config.seed), uses_labels)
        rows = score_run(assembly.model, assembly.data, merged, references=config.references)
        summary = write_summary(rows, assembly.data.protocol, folder / "summary.json")
        record_metrics(export.files["recipe"], summary, seconds)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, CollapseGuard) and callback.reason:
            raise GuardError(callback.reason)
    return summary


def save_config(config: DictConfig, path: Path) -> None:
    """Write the resolved configuration, atomically."""
    with atomic_path(path) as temporary:
        OmegaConf.save(config, temporary, resolve=True)


def load_config(folder: Path) -> DictConfig:
    """Read a run's configuration; the folder may have moved since.

    Relative paths in it start from the folder that the run was launched in, so this process moves there.

    Args:
        folder: The run's, absolute.

    Raises:
        InputError: If the folder is not a run's.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"{folder}: not a run folder: it has no {CONFIG_FILE}. Name a folder that `adamerge adapt` made."
        )
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    config.run_dir = str(folder)
    if config.get("cwd") and Path(config.cwd).is_dir():
        os.chdir(config.cwd)
    for logger in (config.get("logger") or {}).values():
        if "save_dir" in logger:
            logger.save_dir = str(folder)
    return config


def check_unused(folder: Path) -> None:
    """Refuse to start in the folder of another run, whose files would mix with the new ones.

    Raises:
        InputError: If the folder holds a run.
    """
    found = [name for name in (CONFIG_FILE, "merged.safetensors", str(LAST)) if (folder / name).exists()]
    if found:
        raise InputError(
            f"{folder} holds a run already ({found[0]}). Choose another run_dir, or go on with it: resume={folder}."
        )


def remove_unstarted(folder: Path) -> None:
    """Remove the folder of a run that failed before its first step; a folder with anything else in it is left alone."""
    own = {folder / "adapt.log", folder / CONFIG_FILE}
    if any(path.is_file() for path in folder.rglob("*") if path not in own):
        return
    shutil.rmtree(folder, ignore_errors=True)
    parents = folder.absolute().parents
    if len(parents) > 1 and parents[1].name == "runs":  # runs/<name>/<time>: its parents go too, where empty
        for path in parents[:2]:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def differences(config: DictConfig, stored: DictConfig) -> list[str]:
    """Return the dotted options in which two configurations of one run differ, leaving out where it runs."""
    first, second = (_flat(plain(c)) for c in (config, stored))
    ignored = ("run_dir", "resume", "cwd", "logger.")
    keys = [key for key in {**first, **second} if not key.startswith(ignored)]
    return sorted(key for key in keys if first.get(key) != second.get(key))


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain containers."""
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def head_info(data: UnlabeledTasks) -> dict[str, Any]:
    """Return class names and templates by task, for ``heads.safetensors``."""
    return {name: {"classes": task.class_names, "templates": list(task.templates)} for name, task in data.tasks.items()}


def record_metrics(path: Path, summary: Mapping[str, Any], seconds: float) -> None:
    """Add the metrics to ``merge.json``."""
    content = json.loads(path.read_text(encoding="utf-8"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    save_json({**content, "metrics": summary["rows"], "seconds": seconds, "peak_memory_bytes": peak}, path)


def _callbacks(config: DictConfig, folder: Path, export: ExportMergedWeights) -> list[Callback]:
    checkpoints = ModelCheckpoint(
        dirpath=folder / LAST.parent,
        filename="step={step}",
        auto_insert_metric_name=False,
        every_n_train_steps=config.checkpoint_every,
        save_top_k=0,
        save_last=True,
        enable_version_counter=False,
    )
    own = [build(config, f"callbacks.{name}") for name in config.callbacks or {}]
    return [MergingProgress(), checkpoints, *own, export, GracefulStop(folder / LAST)]


def _loggers(config: DictConfig) -> list[Any] | bool:
    return [build(config, f"logger.{name}") for name in config.logger or {}] or False


def _feature_width(model: MergedModel, data: UnlabeledTasks) -> int:
    """Run one image through the encoder, to know F."""
    name, stream = next(iter(data.streams.items()))
    inputs = stream[0].inputs.unsqueeze(0)
    try:
        with torch.no_grad():
            return int(model(inputs, model.pool.base).shape[-1])
    except RuntimeError as error:
        raise InputError(
            f"data.tasks.{name}: the encoder cannot take inputs of shape {tuple(inputs.shape)} ({error}). Do the data "
            "set's transform and the backbone's image size agree?"
        ) from error
