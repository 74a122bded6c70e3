"""Start a run from a rule's merge: it becomes the base, and coefficients of the experts' way from it begin at 0.

start=wudi | start={rule: wudi, steps: 100} | start=auto: the rule whose merge is nearest to the experts on unlabeled
samples; where no merge can be a run's start, ``init``. What was chosen is recorded in the run's configuration, where a
resume, a replay and a score find it.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from adamerge.checkpoints.writing import save_state_dict
from adamerge.commands.run import processes
from adamerge.commands.run.assembly import Assembly, assemble
from adamerge.commands.run.build import build
from adamerge.commands.run.folder import START_MERGE, is_started
from adamerge.commands.run.start_rules import check_start_rule, is_merged, rules_of, why_unmerged
from adamerge.data.batch import to
from adamerge.errors import InputError
from adamerge.merges import merged_state_dict
from adamerge.merges.calibration import batches
from adamerge.model.answers import Outputs
from adamerge.results.agreement import Agreement, Tally
from adamerge.results.model_writer import folder_of, write_model
from adamerge.system.progress import Stopwatch

log = logging.getLogger(__name__)

EXAMPLES = 256  # samples of a task that its expert is asked about, at most


def begin(config: DictConfig, folder: Path) -> DictConfig:
    """Return a run's configuration with the merge that it starts from as the base; make the merge unless it is there.

    Args:
        config: Composed; returned as it is without ``start``, or where a resumed run has begun already.
        folder: The run's.
    """
    start = config.get("start")
    if start is None or is_merged(config) or is_started(folder):
        return config
    check_start_rule(config)
    if reason := why_unmerged(config):
        log.warning("start=auto: %s: this run starts from init=%s.", reason, config.init)
        return config
    assembly = assembled(config)
    path = folder.absolute() / START_MERGE
    rules = rules_of(start)
    watch, candidates = Stopwatch(), dict[str, Any]()
    chosen = next(iter(rules))
    state_dict: Mapping[str, Tensor] | None = None
    if len(rules) > 1:
        chosen, state_dict, candidates = _chosen(rules, assembly)
    rule = build(OmegaConf.create({"merge": rules[chosen]}), "merge")
    if state_dict is None:
        state_dict = merge_of(rule, assembly)
    seconds = watch.seconds()
    save_state_dict(state_dict, path)
    if (base := folder_of(assembly.pool.source)) is not None:  # the merge has its configuration and tokenizer
        write_model(path, base, path.parent)
    given = {option: OmegaConf.select(config, option) for option in ("start", "init", "pool.base", "pool.sha256")}
    facts = {"rule": chosen, "node": rules[chosen], "merged": str(START_MERGE), "given": given, "seconds": seconds}
    facts |= {"uses_labels": bool(getattr(rule, "uses_labels", False)), "candidates": candidates}
    return from_merge(config, facts, path)


def as_given(config: DictConfig) -> DictConfig:
    """Return a run's configuration as it was before :func:`begin`, to compare: it is not to be built."""
    given = OmegaConf.select(config, "start.given")
    if given is None:
        return config
    config = config.copy()
    OmegaConf.set_struct(config, False)
    of_pool = OmegaConf.select(config, "backbone.pool") == config.pool  # as those backbones have it that read the files
    for option, value in given.items():
        OmegaConf.update(config, option, value, merge=False)
    if of_pool:
        config.backbone.pool = config.pool
    return config


def as_begun(config: DictConfig, stored: DictConfig) -> DictConfig:
    """Return a composed configuration with the start that the run which is stored of it has begun with."""
    if not is_merged(stored):
        return config
    return from_merge(config, stored.start, Path(stored.run_dir) / START_MERGE)


def from_merge(config: DictConfig, facts: Any, path: Path) -> DictConfig:
    """Return a configuration with a merge as the base, whose facts are recorded as ``start``."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.init = 0.0
    config.start = facts
    config.pool.base = str(path)
    config.pool.sha256 = {k: v for k, v in (config.pool.get("sha256") or {}).items() if k != "base"}
    return config


def assembled(config: DictConfig) -> Assembly:
    """Build everything that a merge of the raw experts may ask for; its coefficients stay unused."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.granularity = {"_target_": "adamerge.model.granularity.TaskWise"}
    config.init, config.first_stage, config.start, config.transform = "mean", None, None, None
    if "views" in config.data:
        config.data.views = None  # rules are given the samples themselves
    seed_everything(config.seed, workers=True, verbose=False)
    assembly = assemble(config)
    assembly.model.to_device(processes.device_of(config))
    return assembly


def merge_of(rule: Any, assembly: Assembly) -> dict[str, Tensor]:
    """Return the state dict of a rule's merge, with the statistics of BatchNorm layers that belong to it."""
    tensors = merged_state_dict(assembly.pool, rule, model=assembly.model, data=assembly.data).items()
    return dict(assembly.batch_norm.complete(tensors, assembly.model, assembly.pool, assembly.data))


def _chosen(
    rules: Mapping[str, Mapping[str, Any]], assembly: Assembly
) -> tuple[str, Mapping[str, Tensor], dict[str, Any]]:
    """Return the rule whose merge is nearest to the experts on unlabeled samples, its merge, and what was measured."""
    answers = _answers(assembly)
    best: tuple[float, str, Mapping[str, Tensor]] | None = None
    facts: dict[str, Any] = {}
    for text, node in rules.items():
        watch = Stopwatch()
        try:
            state_dict = merge_of(build(OmegaConf.create({"merge": dict(node)}), "merge"), assembly)
        except InputError as error:
            log.info("start=auto: %s is left out: %s", text, error)
            continue
        measured = agreement_of(state_dict, answers, assembly)
        facts[text] = {**asdict(measured), "seconds": watch.seconds()}
        log.info(
            "start=auto: %s agrees with the experts on %.1f %%, %.4f nats from them",
            text, 100 * measured.agreement, measured.kl,
        )  # fmt: skip
        if best is None or measured.kl < best[0]:
            best = measured.kl, text, state_dict
    if best is None:
        raise InputError("start=auto: no rule merges this pool; name one, or leave start out.")
    log.info("start=auto: starts from %s, the nearest in nats", best[1])
    return best[1], best[2], facts


Answers = Mapping[str, list[tuple[Any, Outputs]]]  # task to inputs (B, ...) and what the expert says of them


@torch.no_grad()
def _answers(assembly: Assembly) -> Answers:
    """Ask the experts about a random sample of each task's unlabeled samples."""
    model, data, answers = assembly.model, assembly.data, dict[str, list[tuple[Any, Outputs]]]()
    for task in data.streams:
        if task not in model.teachers:
            continue
        inputs = [to(part, model.pool.device) for part in batches(data, task, EXAMPLES)]
        outputs = model.expert_outputs(model.teachers[task], [(task, part) for part in inputs])
        answers[task] = list(zip(inputs, outputs, strict=True))
    if not answers:
        raise InputError("start=auto: no task has an expert to agree with; name a rule, such as start=tsvm.")
    return answers


@torch.no_grad()
def agreement_of(state_dict: Mapping[str, Tensor], answers: Answers, assembly: Assembly) -> Agreement:
    """Measure a merge, by the names of the pool's files, against the experts' answers."""
    pool, tally = assembly.pool, Tally(answers)
    buffers = [name for name in assembly.model.encoder_buffers if name in pool.keys]
    tensors = {name: state_dict[pool.keys.file_key(name)] for name in (*pool.names, *buffers)}
    params = {
        name: tensor.to(pool.device, pool.compute_dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
    for task, parts in answers.items():
        for inputs, expert in parts:
            tally.add(task, assembly.model.outputs(inputs, task, params).rows(), expert)
    result = tally.result(pool.device)
    assert result is not None
    return result
