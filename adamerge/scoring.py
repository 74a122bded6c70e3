"""Score a merged checkpoint, and what it should be compared with."""

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adamerge.batch_norm import BatchNormPolicy
from adamerge.checkpoints import load_state_dict
from adamerge.coefficients import Coefficients
from adamerge.data import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.evaluation import Row, TaskScore, score_tasks
from adamerge.model import MergedModel

log = logging.getLogger(__name__)

_USUAL = 8  # experts up to which 0.3 is the field's coefficient of task arithmetic


@dataclass(frozen=True)
class Made:
    """A merged checkpoint, and what it took: the row's name, file, seconds, seed, and whether labels were used."""

    name: str
    file: Path
    seconds: float
    seed: int
    uses_labels: bool = False


def score_run(
    model: MergedModel,
    data: UnlabeledTasks,
    made: Made,
    batch_norm: BatchNormPolicy | None = None,
    *,
    references: bool,
) -> dict[str, Row]:
    """Score an exported checkpoint as it was written.

    Args:
        model: Of the run.
        data: Its tasks.
        made: The checkpoint.
        batch_norm: Which statistics task arithmetic's BatchNorm layers have; default the base's.
        references: Whether to score the pretrained model, task arithmetic and the experts beside it.

    Raises:
        InputError: If no task has evaluation images, or the file is no merge of the model's pool.
    """
    if not data.evaluation:
        raise InputError("No task has evaluation images to score. Give data.tasks.<name>.evaluate (or dataset).")
    pool = model.pool
    merged = checkpoint_parameters(made.file, model)
    rows: dict[str, Row] = {}
    if references:
        rows["pretrained"] = Row(score_tasks(model, model.base_parameters(), data, "Scoring the pretrained model"))
        usual = len(pool.expert_names) <= _USUAL
        start = MergedModel(
            model.encoder, pool, Coefficients(pool, "task", 0.3 if usual else "mean", "none"), model.heads
        )
        name = ("task_arithmetic_0.3" if usual else "weight_average") + ("_transformed" if pool.transform else "")
        params = {key: tensor.detach() for key, tensor in start.merge().items()}
        params |= {} if batch_norm is None else batch_norm.final(start, params, data)
        rows[name] = Row(score_tasks(model, params, data, "Scoring task arithmetic"))
    rows[made.name] = Row(
        score_tasks(model, merged, data, "Scoring the merged checkpoint"),
        uses_labels=made.uses_labels,
        uses_data=True,
        seconds=made.seconds,
        seed=made.seed,
    )
    without = [task for task in data.evaluation if task not in model.teachers]
    if references and without:
        log.warning("The row of the experts is left out: no expert for %s (data.tasks.<name>.expert).", without)
    elif references:
        rows["experts"] = score_experts(model, data)
    return rows


def score_experts(model: MergedModel, data: UnlabeledTasks) -> Row:
    """Score each task with its own expert, one expert in memory at a time."""
    scores: dict[str, TaskScore] = {}
    for task in data.evaluation:
        params = model.expert_parameters(model.teacher_of(task))
        scores |= score_tasks(model, params, data, f"Scoring the expert of {task}", tasks=[task])
    return Row(scores)


def checkpoint_parameters(path: Path, model: MergedModel) -> dict[str, Tensor]:
    """Read the encoder's parameters and buffers from an exported checkpoint, by the encoder's names.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it lacks a parameter of the pool, or has another shape.
    """
    pool = model.pool
    tensors = load_state_dict(path)
    params = {}
    for name, shape in pool.shapes.items():
        key = pool.keys.file_key(name)
        if key not in tensors or tuple(tensors[key].shape) != shape:
            shown = tuple(tensors[key].shape) if key in tensors else "nothing"
            raise InputError(
                f"{path}: tensor {key!r}: expected shape {shape}, found {shown}. Is it a merge of this pool?"
            )
        params[name] = tensors[key].to(pool.device, pool.compute_dtype)
    own = {name for name, _ in model.encoder.named_parameters()}  # not a classifier, which is fixed too
    fixed = {name: tensor for name, tensor in pool.fixed.items() if name in own}
    rest = {**fixed, **dict(model.encoder.named_buffers())}  # a foreign checkpoint has its own
    for name, like in rest.items():
        found = tensors.get(pool.keys.file_key(name)) if name in pool.keys else None
        if found is not None and found.shape == like.shape:
            params[name] = found.to(pool.device, like.dtype)
    return params
