"""From a Hydra configuration to objects, a run folder and a result. Only here and in the CLI is Hydra known."""

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from adamerge.backbones import Backbone, check_classes
from adamerge.callbacks import ExportMergedWeights, GracefulStop
from adamerge.callbacks.progress import MergingProgress
from adamerge.checkpoints import load_state_dict
from adamerge.coefficients import Coefficients
from adamerge.data import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.evaluation import Row, Stopwatch, TaskScore, score_tasks, write_summary
from adamerge.files import atomic_path, ensure_writable, save_json
from adamerge.methods.method import MergingMethod
from adamerge.model import MergedModel
from adamerge.pool import ExpertPool
from adamerge.preflight import build, build_optional, strings

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
        init=plain(config)["init"],
        constraint=build(config, "constraint"),
    )
    teachers = {name: task.expert for name, task in data.tasks.items() if task.expert}
    model = MergedModel(encoder, pool, coefficients, heads, teachers)
    check_classes(data.tasks, heads, _feature_width(model, data))
    return Assembly(backbone, data, pool, heads, model)


def build_pool(config: DictConfig, backbone: Backbone) -> ExpertPool:
    """Open the pool that the configuration names, for a backbone."""
    node = config.pool
    dtype = None if node.get("dtype") is None else getattr(torch, str(node.dtype), None)
    if node.get("dtype") is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"pool.dtype: expected float32, bfloat16 or float16, found {node.dtype!r}.")
    return ExpertPool.from_files(
        node.base,
        dict(node.experts),
        storage=node.get("storage") or "auto",
        dtype=dtype,
        include=strings(node.get("include")),
        exclude=[*backbone.exclude, *(strings(node.get("exclude")) or [])] or None,
        key_map=backbone.prefix,
        transform=build_optional(config, "transform"),
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
        GuardError: If the loss or a coefficient became NaN or infinite.
        SystemExit: If the run was stopped by a signal and saved.
    """
    if resume and not (folder / LAST).is_file():
        raise InputError(f"{folder}: nothing to resume: no {LAST}. Start the run without resume.")
    seed_everything(config.seed, workers=True, verbose=False)
    assembly = assemble(config)
    ensure_writable(folder)
    save_config(config, folder / CONFIG_FILE)
    objective = build(config, "objective")
    method: MergingMethod = build(config, "method", model=assembly.model, objective=objective)
    export = ExportMergedWeights(
        folder,
        head_info=head_info(assembly.data),
        sidecar=assembly.backbone.sidecar(),
        recipe={"config": plain(config)},
    )
    trainer: Trainer = build(config, "trainer", callbacks=_callbacks(config, folder, export), logger=_loggers(config))
    watch = Stopwatch()
    trainer.fit(method, datamodule=assembly.data, ckpt_path=str(folder / LAST) if resume else None, weights_only=True)
    if not trainer.is_global_zero or not config.evaluate:
        return None
    rows = score_run(config, assembly, export.files["merged"], watch.seconds())
    summary = write_summary(rows, assembly.data.protocol, folder / "summary.json")
    record_metrics(export.files["recipe"], summary, watch.seconds())
    return summary


def score_run(config: DictConfig, assembly: Assembly, checkpoint: Path, seconds: float) -> dict[str, Row]:
    """Score an exported checkpoint and, with ``references``, what it should be compared with."""
    model, pool, data = assembly.model, assembly.pool, assembly.data
    if not data.evaluation:
        raise InputError(
            "evaluate: no task has evaluation images. Give data.tasks.<name>.evaluate, or set evaluate=false."
        )
    rows: dict[str, Row] = {}
    if config.references:
        rows["pretrained"] = Row(score_tasks(model, {**pool.base}, data, "Scoring the pretrained model"))
        initial = Coefficients(pool, "task", 0.3 if len(pool.expert_names) <= 8 else "mean", "none")
        start = "task_arithmetic_0.3" if len(pool.expert_names) <= 8 else "weight_average"
        params = MergedModel(model.encoder, pool, initial, assembly.heads).merge()
        rows[start] = Row(score_tasks(model, params, data, "Scoring task arithmetic"))
    merged = checkpoint_parameters(checkpoint, pool)
    rows[str(config.name)] = Row(
        score_tasks(model, merged, data, "Scoring the merged checkpoint"),
        uses_data=True,
        seconds=seconds,
        seed=config.seed,
    )
    if config.references:
        rows["experts"] = score_experts(model, data)
    return rows


def score_experts(model: MergedModel, data: UnlabeledTasks) -> Row:
    """Score each task with its own expert, one expert in memory at a time."""
    scores: dict[str, TaskScore] = {}
    for task in data.evaluation:
        params = model.expert_parameters(model.teacher_of(task))
        scores |= score_tasks(model, params, data, f"Scoring the expert of {task}", tasks=[task])
    return Row(scores)


def checkpoint_parameters(path: Path, pool: ExpertPool) -> dict[str, Tensor]:
    """Read the merged parameters of an exported checkpoint, by the encoder's names.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it lacks a parameter of the pool, or has another shape.
    """
    tensors = load_state_dict(path)
    params = {}
    for name, shape in pool.shapes.items():
        key = pool.keys.file_key(name)
        if key not in tensors or tuple(tensors[key].shape) != shape:
            found = tuple(tensors[key].shape) if key in tensors else "nothing"
            raise InputError(
                f"{path}: tensor {key!r}: expected shape {shape}, found {found}. Is it a merge of this pool?"
            )
        params[name] = tensors[key].to(pool.device, pool.compute_dtype)
    return params


def save_config(config: DictConfig, path: Path) -> None:
    """Write the resolved configuration, atomically."""
    with atomic_path(path) as temporary:
        OmegaConf.save(config, temporary, resolve=True)


def load_config(folder: Path) -> DictConfig:
    """Read a run's configuration; the folder may have moved since.

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
    for logger in (config.get("logger") or {}).values():
        if "save_dir" in logger:
            logger.save_dir = str(folder)
    return config


def remove_unstarted(folder: Path) -> None:
    """Remove the folder of a run that failed before it wrote a result; anything unknown in it is left alone."""
    for name in ("adapt.log", CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)
    default = folder.parents[1].name == "runs"  # runs/<name>/<time>: its parents go too, where empty
    inner = sorted(folder.rglob("*"), reverse=True)  # such as a logger's
    for path in (*inner, folder, *folder.parents[: 2 if default else 0]):
        with contextlib.suppress(OSError):  # not a folder, or not empty
            path.rmdir()


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
    save_json({**content, "metrics": summary["rows"], "seconds": seconds}, path)


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
    stream = next(iter(data.streams.values()))
    with torch.no_grad():
        return int(model(stream[0].inputs.unsqueeze(0), model.pool.base).shape[-1])
