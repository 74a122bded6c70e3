"""Unlabeled data: tasks, streams of batches, and the field's benchmarks."""

from typing import TYPE_CHECKING

from adamerge.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from adamerge.data.batch import TaskBatch as TaskBatch
    from adamerge.data.task import Protocol as Protocol
    from adamerge.data.task import Task as Task
    from adamerge.data.texts import Text as Text
    from adamerge.data.texts import Texts as Texts
    from adamerge.data.unlabeled_tasks import UnlabeledTasks as UnlabeledTasks

__all__ = ["Protocol", "Task", "TaskBatch", "Text", "Texts", "UnlabeledTasks"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Protocol": "adamerge.data.task",
        "Task": "adamerge.data.task",
        "TaskBatch": "adamerge.data.batch",
        "Text": "adamerge.data.texts",
        "Texts": "adamerge.data.texts",
        "UnlabeledTasks": "adamerge.data.unlabeled_tasks",
    },
)
