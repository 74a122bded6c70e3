"""The gradient of the coefficients by an objective, on batches as they are and on samples one by one."""

from functools import partial

import torch

from adamerge.data.batch import pad, size
from adamerge.model.task_step import TaskStep


def gradient(model, objective, batches, weights):
    """The gradient of one step on batches by task, each task's loss with a weight."""
    model.teacher_cache.clear()
    layers = tuple(objective.hidden_layers)
    with model.merged(model.coefficients().detach(), hidden_layers=layers) as merged:
        for group in merged.groups(batches):
            losses = []
            for task, outputs in merged(group).items():
                teacher = partial(model.teacher, hidden_layers=layers)
                indices = torch.arange(size(group[task]))
                step = TaskStep(task, group[task], indices, outputs, merged.coefficients, teacher, merged.forward)
                losses.append(objective(step) * weights[task])
            merged.backward(sum(losses))
    return merged.gradient


def one_by_one(model, objective, samples, collate=pad):
    """The mean over rows, each sample on its own."""
    total = 0
    for task, of_task in samples.items():
        counts = [model.count_rows(collate([sample])) for sample in of_task]
        for sample, count in zip(of_task, counts, strict=True):
            if count:
                total = total + gradient(model, objective, {task: collate([sample])}, {task: count / sum(counts)})
    return total
