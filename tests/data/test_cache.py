"""Inputs that are kept: decoded once, the same bits, shared by workers, never frozen where they are random."""

import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adamerge import InputError
from adamerge.data import Task, UnlabeledTasks
from adamerge.data import cache as caching
from adamerge.data.batch import pad
from adamerge.data.cache import nature_of
from adamerge.data.datasets import InputCache, Unlabeled
from adamerge.objectives.imitation import Imitation
from tests.support.fits import QUIET, every_step, fit, make_method, values, with_trainer
from tests.support.toy import EXPERTS

TO_TENSOR = v2.Compose([v2.Resize(4), v2.CenterCrop(4), v2.Grayscale(), v2.ToImage(), v2.ToDtype(torch.float32, True)])


@pytest.fixture
def folder(tmp_path) -> ImageFolder:
    """Twelve JPEG files of two classes."""
    generator = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9 + i % 3, 12, 3), dtype=np.uint8)).save(path)
    return ImageFolder(str(tmp_path / "images"))


class Counted(Dataset):
    """Counts how often each item is decoded, over all processes."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset
        self.counts = torch.zeros(len(dataset), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        self.counts[index] += 1
        return self.dataset[index]


def make(dataset, *, steps: int = 6, setup: bool = True, **options) -> UnlabeledTasks:
    tasks = {"a": Task(adapt=dataset)}
    data = UnlabeledTasks(tasks, **{"batch_size": 4, "preprocess": TO_TENSOR, **options})
    with_trainer(data, max_steps=steps)
    if setup:
        data.setup("fit")
    return data


def batches_of(data) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [step["a"] for step in data.train_dataloader()]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache", ["auto", "ram"])
def test_cache_gives_the_same_bits_and_decodes_each_image_once(folder, cache, num_workers):
    counted = Counted(folder)
    plain = batches_of(make(folder, cache="off", setup=False))
    data = make(counted, cache=cache, num_workers=num_workers)
    counted.counts.zero_()  # what the look at the first input took
    kept = batches_of(data)  # two passes
    for (inputs, indices), (expected, positions) in zip(kept, plain, strict=True):
        assert torch.equal(inputs, expected)
        assert torch.equal(indices, positions)
    # Workers that read ahead may both decode an image that neither has finished.
    assert counted.counts.max() == 1 if num_workers == 0 else counted.counts.sum() < 24
    before = counted.counts.clone()
    assert len(list(data.teacher_loader("a"))) == 1
    assert torch.equal(counted.counts, before)  # other loaders use it, too


def test_cache_off_decodes_each_time(folder):
    counted = Counted(folder)
    data = make(counted, cache="off", prefetch=0)
    counted.counts.zero_()
    batches_of(data)
    assert counted.counts.tolist() == [2] * 12
    assert data.streams["a"].cache is None


def test_cache_beyond_the_limit_keeps_a_part_and_says_so(folder, monkeypatch, caplog):
    monkeypatch.setattr(caching, "free_memory", lambda: 4 * 6 * 16 * 4)  # a quarter holds six images of 16 floats
    counted = Counted(folder)
    with caplog.at_level(logging.INFO, "adamerge"):
        data = make(counted, prefetch=0)
    assert "50 % of the inputs are made once and kept" in caplog.text
    counted.counts.zero_()
    kept = batches_of(data)
    assert sorted(counted.counts.tolist()) == [1] * 6 + [2] * 6
    for batch, expected in zip(kept, batches_of(make(folder, cache="off")), strict=True):
        assert torch.equal(batch[0], expected[0])


def test_cache_counts_only_what_a_run_visits(folder, caplog):
    with caplog.at_level(logging.INFO, "adamerge"):
        make(folder, steps=2)
    assert "of the images" not in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "free_memory", lambda: 4 * 8 * 16 * 4)
        make(folder, steps=2)  # 8 of 12
    assert "of the images" not in caplog.text


def test_cache_ram_that_does_not_fit_is_refused(folder, monkeypatch):
    monkeypatch.setattr(caching, "free_memory", lambda: 100)
    with pytest.raises(InputError, match=r"data\.cache: 'ram' needs 0\.0 GB of free memory.*data\.cache=auto"):
        make(folder, cache="ram")


def test_cache_ram_that_workers_cannot_share_is_refused(folder, monkeypatch):
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    monkeypatch.setattr(caching.os.path, "isdir", lambda path: True)
    with pytest.raises(InputError, match=r"'ram' needs .* of shared memory .*data\.num_workers=0"):
        make(folder, cache="ram", num_workers=1)


@pytest.mark.parametrize(
    "draw",
    [
        lambda image: image + torch.rand(()),
        lambda image: image + random.random(),
        lambda image: image + float(np.random.rand()),
        lambda image: image + float(np.random.default_rng().random()),  # its own generator: only the values tell
        lambda image: image + 0 * torch.rand(()),  # nothing to see in the values
    ],
    ids=["torch", "python", "numpy", "own generator", "no effect"],
)
def test_random_transform_is_not_frozen(folder, draw, caplog):
    preprocess = v2.Compose([TO_TENSOR, draw])
    states = torch.get_rng_state(), random.getstate()
    with caplog.at_level(logging.INFO, "adamerge"):
        data = make(folder, preprocess=preprocess)
    assert "not kept, because their transforms draw random numbers: a." in caplog.text
    assert data.streams["a"].cache is None
    assert data.train_dataloader()._ahead == 0  # a thread would draw in another order
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    with pytest.raises(InputError, match=r"data\.cache: 'ram' would freeze the inputs of task 'a'"):
        make(folder, preprocess=preprocess, cache="ram")


def test_tensors_in_memory_are_neither_kept_nor_read_ahead():
    data = make(TensorDataset(torch.randn(12, 1, 4, 4), torch.zeros(12)))
    assert nature_of(data.streams["a"]).in_memory
    assert data.streams["a"].cache is None
    assert data.train_dataloader()._ahead == 0


def test_inputs_that_differ_in_shape_or_dtype_are_left_out():
    cache = InputCache([0, 5, 7], torch.zeros(2, 2), shared=False)
    cache.put(0, torch.ones(2, 3))
    cache.put(5, torch.ones(2, 2).double())
    cache.put(7, torch.ones(2, 2))
    cache.put(8, torch.ones(2, 2))
    assert [cache.get(position) is None for position in (0, 5, 7, 8)] == [True, True, False, True]
    cache.get(7).zero_()  # a copy
    assert torch.equal(cache.get(7), torch.ones(2, 2))


def test_held_out_images_are_kept_too(folder):
    counted = Counted(folder)
    data = make(counted, holdout=0.25)
    counted.counts.zero_()
    for _ in range(3):
        list(data.holdout_batches())
    assert counted.counts.sum() == 3


# Read ahead


def test_thread_reads_ahead_and_keeps_the_order(folder):
    loader = make(folder, steps=9).train_dataloader()
    assert loader._ahead == 2
    expected = batches_of(make(folder, steps=9, prefetch=0, cache="off"))
    for step, (inputs, indices) in zip(loader, expected, strict=True):
        assert torch.equal(step["a"].inputs, inputs)
        assert torch.equal(step["a"].indices, indices)


def test_thread_left_early_ends_and_its_errors_arrive(folder):
    iterator = iter(make(folder, steps=9).train_dataloader())
    next(iterator)
    iterator.close()

    class Broken(Counted):
        def __getitem__(self, index):
            raise OSError("no such image") if self.counts[index] > 1 else None

    broken = make(folder)
    broken.streams["a"] = Unlabeled(Broken(folder), TO_TENSOR)
    broken.streams["a"].source.counts.fill_(2)
    with pytest.raises(InputError, match="no such image"):
        list(broken.train_dataloader())


@QUIET
def test_fit_is_the_same_with_and_without_cache_thread_and_workers_and_after_a_resume(folder, toy, tmp_path):
    results = []
    for options in ({"cache": "off", "prefetch": 0}, {"cache": "ram"}, {"cache": "ram", "num_workers": 1}):
        tasks = {task: Task(adapt=folder) for task in EXPERTS}
        checkpoints = tmp_path / f"checkpoints{len(results)}"
        for resume, settings in ((None, every_step(checkpoints)), (checkpoints / "step=3.ckpt", {})):
            data = UnlabeledTasks(tasks, batch_size=4, preprocess=TO_TENSOR, **options)
            method = make_method(toy, Imitation())
            fit(method, data, tmp_path, steps=5, resume=resume, **settings)
            results.append(values(method))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize(("workers", "calls"), [(0, 6), (1, None)])
def test_mappings_of_unequal_length_are_made_once_in_one_process(tmp_path, workers, calls):
    made = []

    def tokens(text):
        made.append(text)
        return {"input_ids": torch.arange(len(text))}

    texts = ["a", "bb", "ccc", "dddd", "a b", "c"]
    data = UnlabeledTasks(
        {"a": Task(adapt=texts)}, batch_size=3, preprocess=tokens, collate=pad, cache="ram", num_workers=workers
    )
    with_trainer(data, max_steps=6).setup("fit")
    assert (data.streams["a"].cache is not None) == (workers == 0)
    made.clear()
    if workers == 0:
        first, again = (list(data.train_dataloader()) for _ in range(2))
        assert len(made) == calls
        assert all(
            torch.equal(a["a"].inputs["input_ids"], b["a"].inputs["input_ids"])
            for a, b in zip(first, again, strict=True)
        )
