"""Data and objectives for runs on several processes."""

import torch
from torch.utils.data import TensorDataset

from adamerge.data import Task, UnlabeledTasks
from adamerge.objectives.entropy import Entropy
from adamerge.system import ranks
from tests.support.toy import EXPERTS

COUNTS = {"red": 24, "green": 7, "blue": 1}  # longer than a global batch, shorter, shorter than the ranks


def make_data(batch_size, counts=COUNTS, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    tasks = {}
    for task in EXPERTS:
        images = torch.randn(counts[task], 1, 4, 4, generator=generator, dtype=dtype)
        tasks[task] = Task(adapt=TensorDataset(images, torch.zeros(counts[task], dtype=torch.long)))
    return UnlabeledTasks(tasks, batch_size=batch_size, **options)


class BadOnSecond:
    """Entropy that is not a number for one task on the second process, from its second call on."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += step.task == "red"
        loss = Entropy()(step)
        return loss * float("nan") if step.task == "red" and ranks.rank() == 1 and self.calls > 2 else loss
