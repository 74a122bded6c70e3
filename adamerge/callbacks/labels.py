"""Labels for the baselines that use them."""

from lightning.pytorch import Callback, LightningModule, Trainer

from adamerge.errors import InputError
from adamerge.methods.method import data_of
from adamerge.results.baselines import LabelledCrossEntropy, stream_labels


class HandOverLabels(Callback):
    """Give the labels behind the adaptation streams to :class:`~adamerge.results.baselines.LabelledCrossEntropy`.

    The streams themselves stay unlabeled. Results of such a run are marked ``uses_labels``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the labels, each input once.

        Raises:
            InputError: If the objective is another, or the data has no labels.
        """
        objective, data = getattr(pl_module, "objective", None), data_of(trainer)
        if not isinstance(objective, LabelledCrossEntropy):
            raise InputError(
                f"HandOverLabels: expected the objective adamerge.results.baselines.LabelledCrossEntropy, found "
                f"{type(objective).__name__}, which takes no labels. Remove the callback."
            )
        if data is None:
            raise InputError("HandOverLabels: expected the data of a run, adamerge.data.UnlabeledTasks, found none.")
        for task, stream in data.streams.items():
            try:
                objective.labels[task] = stream_labels(stream)
            except (TypeError, ValueError, IndexError) as error:
                raise InputError(f"data.tasks.{task}: expected items (input, label) to adapt on ({error}).") from error
