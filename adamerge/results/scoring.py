"""Score a merged checkpoint and its references."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.model.batch_norm import BatchNormPolicy
from adamerge.model.coefficients import Coefficients
from adamerge.model.merged_model import MergedModel
from adamerge.pool.lazy import LazyTensors
from adamerge.pool.lora import open_expert
from adamerge.results.evaluation import TableRow, TaskScore, score_tasks
from adamerge.results.text_scores import ExpertAnswers

log = logging.getLogger(__name__)

_ARITHMETIC = ("task_arithmetic_0.3", "weight_average")
REFERENCES = ("pretrained", "experts", *(name + end for name in _ARITHMETIC for end in ("", "_transformed")))
_USUAL = 8  # experts up to which 0.3 is the field's coefficient of task arithmetic


@dataclass(frozen=True)
class MergeResult:
    """A merged checkpoint: its row's name, file, seconds that it took, seed, and whether labels were used."""

    name: str
    file: Path
    seconds: float
    seed: int
    uses_labels: bool = False


def score_run(
    model: MergedModel,
    data: UnlabeledTasks,
    result: MergeResult,
    batch_norm: BatchNormPolicy | None = None,
    *,
    references: bool,
    from_start: bool = False,
) -> dict[str, TableRow]:
    """Score an exported checkpoint as it was written.

    Args:
        model: The model of the run.
        data: Its tasks.
        result: The checkpoint.
        batch_norm: Which statistics task arithmetic's BatchNorm layers have; default the base's.
        references: Whether to score the pretrained model, task arithmetic and the experts beside it.
        from_start: Whether the pool's base is the merge that a run starts from: it is scored as ``start``, in the place
            of the first two.

    Raises:
        InputError: If no task has evaluation inputs, or the file is no merge of the model's pool.
    """
    if not data.evaluation:
        raise InputError("No task has evaluation inputs to score. Give data.tasks.<name>.evaluate (or dataset).")
    pool = model.pool
    experts = ExpertAnswers(model, data)
    merged = checkpoint_parameters(result.file, model)
    rows: dict[str, TableRow] = {}
    if references and from_start:
        rows["start"] = TableRow(*scores_of(model, model.base_parameters(), data, "Scoring the start"))
    elif references:
        rows["pretrained"] = TableRow(
            *scores_of(model, model.base_parameters(), data, "Scoring the pretrained model", experts)
        )
        usual = len(pool.expert_names) <= _USUAL
        coefficients = Coefficients(pool, "task", 0.3 if usual else "mean", "none")
        start = type(model)(model.encoder, pool, coefficients, model.heads, read=model.read, valid=model.valid)
        name = _ARITHMETIC[0 if usual else 1] + ("_transformed" if pool.transform else "")
        with torch.no_grad():
            params = start.merge()
        params = params | ({} if batch_norm is None else batch_norm.final(model, params, data))
        rows[name] = TableRow(*scores_of(model, params, data, "Scoring task arithmetic", experts))
    scores, unseen = scores_of(model, merged, data, "Scoring the merged checkpoint", experts)
    rows[result.name] = TableRow(
        scores, unseen, uses_labels=result.uses_labels, uses_data=True, seconds=result.seconds, seed=result.seed
    )
    without = [task for task in data.evaluation if task not in model.teachers]
    if references and without:
        log.warning("The row of the experts is left out: no expert for %s (data.tasks.<name>.expert).", without)
    elif references:
        rows["experts"] = score_experts(model, data, experts)
    return rows


def scores_of(
    model: MergedModel,
    params: Mapping[str, Tensor],
    data: UnlabeledTasks,
    description: str,
    experts: ExpertAnswers | None = None,
) -> tuple[dict[str, TaskScore], dict[str, TaskScore]]:
    """Score given parameters on the tasks, and on the unseen ones; texts beside experts, asked here by default."""
    experts = experts or ExpertAnswers(model, data)
    unseen = list(data.unseen_evaluation)
    return score_tasks(model, params, data, description, experts=experts), (
        score_tasks(model, params, data, f"{description}: unseen tasks", unseen) if unseen else {}
    )


def score_experts(model: MergedModel, data: UnlabeledTasks, experts: ExpertAnswers | None = None) -> TableRow:
    """Score each task with its own expert, one expert in memory at a time."""
    scores: dict[str, TaskScore] = {}
    experts = experts or ExpertAnswers(model, data)
    for task in data.evaluation:
        params = model.raw_expert(model.teacher_of(task))
        scores |= score_tasks(model, params, data, f"Scoring the expert of {task}", [task], experts)
    return TableRow(scores)


def checkpoint_parameters(path: Path, model: MergedModel) -> Mapping[str, Tensor]:
    """Read the encoder's parameters and buffers from an exported checkpoint, by the encoder's names.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it lacks a parameter of the pool, or has another shape.
    """
    pool = model.pool
    file = open_expert(path, pool.source, pool.keys.map if isinstance(pool.keys.map, str) else "")
    shapes = {key: file.spec(key)[0] for key in file.keys}
    for name, shape in pool.shapes.items():
        key = pool.keys.file_key(name)
        if shapes.get(key) != shape:
            raise InputError(
                f"{path}: tensor {key!r}: expected shape {shape}, found {shapes.get(key, 'nothing')}. "
                "Is it a merge of this pool?"
            )
    dtypes = {name: model.weights.dtype_of(shape) for name, shape in pool.shapes.items()}
    names = {name for name, _ in model.encoder.named_parameters()}  # not a classifier, which is fixed too
    fixed = ((name, tensor) for name, tensor in pool.fixed.items() if name in names)
    for name, like in chain(fixed, model.encoder.named_buffers()):  # a foreign checkpoint has its own
        if name in pool.keys and shapes.get(pool.keys.file_key(name)) == tuple(like.shape):
            dtypes[name] = like.dtype

    def read(name: str) -> Tensor:
        # Statistics may be written to; parameters stay in the mapped file where they can.
        return file.get(pool.keys.file_key(name)).to(pool.device, dtypes[name], copy=name not in pool.shapes)

    params = LazyTensors(read, dtypes)
    return params if model.is_sharded else dict(params)
