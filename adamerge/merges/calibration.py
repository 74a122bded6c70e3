"""The unlabeled samples from which an expert's statistics are taken."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.utils.data import Subset

from adamerge.data.batch import Inputs
from adamerge.data.random_states import permutation
from adamerge.errors import InputError
from adamerge.model.merged_model import MergedModel

if TYPE_CHECKING:
    from adamerge.data.unlabeled_tasks import UnlabeledTasks


def tasks_of(model: MergedModel, data: "UnlabeledTasks") -> dict[str, list[str]]:
    """Return each expert's tasks: those that it teaches.

    Raises:
        InputError: If an expert has none, so that nothing is known of its inputs.
    """
    tasks: dict[str, list[str]] = {expert: [] for expert in model.pool.expert_names}
    for task in data.streams:
        if task in model.teachers:
            tasks[model.teachers[task]].append(task)
    without = [expert for expert, taught in tasks.items() if not taught]
    if without:
        raise InputError(
            f"Expert {without[0]!r} has no data: expected a task of its name, or one that names it with "
            f"data.tasks.<task>.expert={without[0]}."
        )
    return tasks


def batches(data: "UnlabeledTasks", task: str, examples: int) -> Iterator[Inputs]:
    """Yield inputs (B, ...) of a task: a random sample of its adaptation stream that depends on the data's seed only.

    Args:
        data: Its streams carry no labels.
        task: Which.
        examples: Most samples in all.
    """
    stream = data.streams[task]
    order = permutation(len(stream), f"{data.seed}/calibration/{task}")[:examples]
    for batch in data.loader(Subset(stream, sorted(order.tolist())), data.evaluation_batch_size):
        yield batch.inputs
