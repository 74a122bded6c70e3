"""Short fits of the toy problem with Lightning's Trainer, for the tests of methods and callbacks."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from adamerge import Coefficients, MergedModel
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.batch import TaskBatch
from adamerge.methods import GradientMerging
from adamerge.objectives.entropy import Entropy
from tests.support.toy import CLASSES, EXPERTS, Toy

# Lightning's advice about what these tests choose on purpose, and a deprecation inside it.
QUIET = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
)


def make_data(batch_size: int = 4, count: int = 14, seed: int = 0, **options) -> UnlabeledTasks:
    """Random images with random labels; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    tasks = {}
    for task in EXPERTS:
        images = torch.randn(count, 1, 4, 4, generator=generator)
        labels = torch.randint(CLASSES[task], (count,), generator=generator)
        tasks[task] = Task(dataset=TensorDataset(images, labels))
    return UnlabeledTasks(tasks, batch_size=batch_size, seed=seed, **options)


def batches(toy: Toy, steps: int, tasks=EXPERTS) -> DataLoader[Mapping[str, TaskBatch]]:
    """The toy's own batch, again and again, as a plain loader."""
    batch = {task: TaskBatch(toy.inputs[task], toy.indices[task]) for task in tasks}
    return DataLoader([batch] * steps, batch_size=None)


def make_method(
    toy: Toy, objective=None, granularity="layer", constraint="box", lr=0.02, init=0.3, **options
) -> GradientMerging:
    pool = toy.pool()
    model = MergedModel(toy.encoder, pool, Coefficients(pool, granularity, init, constraint), toy.heads)
    options.setdefault("optimizer", partial(torch.optim.Adam, lr=lr))
    return GradientMerging(model, objective or Entropy(), **options)


def fit(method: GradientMerging, data, folder, steps: int = 6, *, resume=None, **options) -> Trainer:
    """Run ``steps`` optimizer steps on one thread of the CPU."""
    loaders = {"datamodule": data} if isinstance(data, LightningDataModule) else {"train_dataloaders": data}
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False, **settings,
    )  # fmt: skip
    trainer.fit(method, **loaders, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def every_step(folder) -> dict[str, object]:
    """Trainer options that save a checkpoint after each optimizer step, named by its number."""
    checkpoints = ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
    )
    return {"callbacks": [checkpoints], "enable_checkpointing": True}


def values(method: GradientMerging) -> Tensor:
    return method.model.coefficients.raw.detach().clone()


def with_trainer(data: UnlabeledTasks, max_steps=4, world=1, rank=0, accumulate=1, processed=0) -> UnlabeledTasks:
    """A data module as it is inside a fit."""
    current = SimpleNamespace(processed=processed)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=current)))
    data.trainer = SimpleNamespace(
        world_size=world, global_rank=rank, max_steps=max_steps, accumulate_grad_batches=accumulate, fit_loop=loop
    )
    return data
