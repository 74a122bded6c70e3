"""Assembly: everything a run needs, built from its configuration."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from adamerge.backbones import Backbone, check_classes, own_base, read_of, valid_of
from adamerge.commands.run.build import build, build_optional, build_tasks, pool_of
from adamerge.commands.run.processes import is_sharded
from adamerge.commands.run.stages import coefficients_of
from adamerge.data.batch import described
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.model.batch_norm import BatchNormPolicy
from adamerge.model.merged_model import MergedModel
from adamerge.model.sharding import ShardedModel
from adamerge.pool.pool import ExpertPool

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
        _start_statistics(config, of.batch_norm, model)
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
    _start_statistics(config, batch_norm, model)
    return Assembly(backbone, data, pool, heads, model, start, batch_norm)


def _start_statistics(config: DictConfig, policy: BatchNormPolicy, model: MergedModel) -> None:
    """Set the statistics to adapt with; a merge that a run starts from has its own, as its base."""
    if config.get("start") is None:
        policy.start(model)


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
