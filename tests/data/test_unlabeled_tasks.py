"""Streams: no labels, fixed by (seed, task, step), resumable, sharded; splits; what is refused."""

from itertools import islice

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from adamerge import InputError
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.batch import TaskBatch, pad
from adamerge.data.datasets import Unlabeled
from adamerge.data.streams import StreamLoader
from tests.support.fits import with_trainer


class Numbers(Dataset):
    """Item i is (i as a tensor (1,), label i % 3)."""

    classes = ("zero", "one", "two")

    def __init__(self, length: int, start: int = 0) -> None:
        self.length, self.start = length, start

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return torch.tensor([float(self.start + index)]), (self.start + index) % 3


class SecretLabel:
    """A label that nobody may look at."""

    def __int__(self) -> int:
        raise AssertionError("the label was read")

    __float__ = __index__ = __eq__ = __len__ = __iter__ = __int__
    __hash__ = None


class Secret(Numbers):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, SecretLabel]:
        return super().__getitem__(index)[0], SecretLabel()


def make(lengths=None, tasks=None, **options) -> UnlabeledTasks:
    tasks = tasks or {name: Task(adapt=Numbers(length)) for name, length in (lengths or {"a": 10, "b": 6}).items()}
    return UnlabeledTasks(tasks, **{"batch_size": 3, **options})


def steps_of(data: UnlabeledTasks, count: int, **trainer) -> list[dict[str, list[int]]]:
    """Positions in each task's stream, step by step."""
    loader = with_trainer(data, max_steps=count, **trainer).train_dataloader()
    return [{task: batch.indices.tolist() for task, batch in step.items()} for step in loader]


def values_of(dataset) -> list[int]:
    return [int(dataset[i][0]) for i in range(len(dataset))]


# Labels stay out


def test_task_batch_has_no_place_for_labels():
    assert TaskBatch._fields == ("inputs", "indices")


def test_unlabeled_items_are_input_and_position_only():
    item = Unlabeled(Numbers(5, start=10))[3]
    assert isinstance(item, TaskBatch)
    assert item.inputs.item() == 13
    assert item.indices.item() == 3


@pytest.mark.parametrize("protocol", ["split", "transductive"])
def test_train_dataloader_never_touches_a_label(protocol):
    data = make(tasks={"a": Task(dataset=Secret(8))}, protocol=protocol)
    batches = list(with_trainer(data, max_steps=6).train_dataloader())
    assert len(batches) == 6
    assert all(set(vars(type(batch["a"]))["_fields"]) == {"inputs", "indices"} for batch in batches)
    assert all(len(batch) == 2 for batch in data.teacher_loader("a"))
    with pytest.raises(AssertionError, match="the label was read"):  # the trap works
        list(data.evaluation_loader("a"))


def test_stream_batch_is_the_input_at_each_position():
    data = make(tasks={"a": Task(dataset=Numbers(12))})
    for step in with_trainer(data).train_dataloader():
        inputs, indices = step["a"]
        assert inputs.shape == (3, 1)
        assert [data.streams["a"][i].inputs.item() for i in indices.tolist()] == inputs[:, 0].tolist()


# Protocols


@pytest.mark.parametrize("length", [2, 9, 10])
def test_split_adaptation_and_evaluation_are_disjoint_and_cover_all(length):
    data = make(tasks={"a": Task(dataset=Numbers(length))})
    adapt, evaluate = values_of(data.streams["a"]), values_of(data.evaluation["a"])
    assert set(adapt) & set(evaluate) == set()
    assert sorted(adapt + evaluate) == list(range(length))
    assert len(adapt) - len(evaluate) in (0, 1)


def test_split_is_seeded_and_differs_between_seeds_and_tasks():
    def halves(seed):
        data = make(tasks={name: Task(dataset=Numbers(30)) for name in ("a", "b")}, seed=seed)
        return {name: values_of(data.streams[name]) for name in ("a", "b")}

    assert halves(1) == halves(1)
    assert halves(1) != halves(2)
    assert halves(1)["a"] != halves(1)["b"]


def test_transductive_adapts_on_the_scored_images():
    data = make(tasks={"a": Task(dataset=Numbers(7))}, protocol="transductive")
    assert values_of(data.streams["a"]) == values_of(data.evaluation["a"]) == list(range(7))


def test_transductive_adapt_and_evaluate_given_uses_the_scored_images():
    task = Task(adapt=Numbers(5), evaluate=Numbers(4, start=50))
    data = make(tasks={"a": task}, protocol="transductive")
    assert values_of(data.streams["a"]) == values_of(data.evaluation["a"]) == [50, 51, 52, 53]


def test_split_adapt_and_evaluate_given_are_taken_as_they_are():
    data = make(tasks={"a": Task(adapt=Numbers(5), evaluate=Numbers(4, start=50))})
    assert values_of(data.streams["a"]) == [0, 1, 2, 3, 4]
    assert values_of(data.evaluation["a"]) == [50, 51, 52, 53]


def test_adapt_alone_has_nothing_to_score():
    assert make(tasks={"a": Task(adapt=Numbers(5))}).evaluation == {}


def test_limit_takes_a_seeded_sample_of_the_adaptation_images_only():
    tasks = {"a": Task(adapt=Numbers(50), evaluate=Numbers(20))}
    samples = [values_of(make(tasks=tasks, limit=5, seed=seed).streams["a"]) for seed in (0, 0, 1)]
    assert len(set(samples[0])) == 5
    assert samples[0] == samples[1] != samples[2]
    assert len(make(tasks=tasks, limit=5).evaluation["a"]) == 20
    assert len(make(tasks=tasks, limit=500).streams["a"]) == 50


# Sources of images


def test_image_folder_of_files_works_with_preprocess_and_class_names(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (4, 4), (100 * label, i, 0)).save(tmp_path / name / f"{i}.png")
    folder = ImageFolder(str(tmp_path))
    data = make(tasks={"pets": Task(dataset=folder)}, preprocess=pil_to_tensor)
    assert data.tasks["pets"].class_names == ["cat", "dog"]
    batch = next(iter(with_trainer(data).train_dataloader()))["pets"]
    assert batch.inputs.shape == (3, 3, 4, 4)
    inputs, labels = next(iter(data.evaluation_loader("pets")))
    assert (inputs[:, 0, 0, 0] // 100).tolist() == labels.tolist()


def test_torchvision_dataset_works():
    fake = FakeData(size=6, image_size=(3, 4, 4), num_classes=2)
    data = make(tasks={"fake": Task(dataset=fake)}, preprocess=pil_to_tensor)
    assert next(iter(with_trainer(data).train_dataloader()))["fake"].inputs.shape == (3, 3, 4, 4)
    assert len(data.evaluation["fake"]) == 3


def test_dataset_of_inputs_without_labels_adapts_but_cannot_be_scored():
    bare = [torch.tensor([float(i)]) for i in range(4)]
    data = make(tasks={"a": Task(adapt=bare, evaluate=bare)})
    assert values_of(data.streams["a"]) == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"data\.tasks\.a: item 0 .* expected a label to score by, found none"):
        list(data.evaluation_loader("a"))


def test_dataset_items_longer_than_pairs_use_the_first_two():
    triples = TensorDataset(torch.arange(4.0), torch.tensor([1, 0, 1, 0]), torch.full((4,), 9))
    data = make(tasks={"a": Task(dataset=triples)}, protocol="transductive")
    assert data.streams["a"][2].inputs.item() == 2
    assert [int(label) for _, label in (data.evaluation["a"][i] for i in range(4))] == [1, 0, 1, 0]


def test_preprocess_leaves_tensors_alone():
    def refuse(item):
        raise AssertionError(f"called with {item}")

    data = make(tasks={"a": Task(dataset=Numbers(4))}, preprocess=refuse)
    assert len(values_of(data.streams["a"]) + values_of(data.evaluation["a"])) == 4


def test_class_names_from_the_task_win_over_the_datasets():
    assert Task(dataset=Numbers(2)).class_names == ["zero", "one", "two"]
    assert Task(dataset=Numbers(2), classes=("x", "y", "z")).class_names == ["x", "y", "z"]
    assert Task(adapt=[torch.zeros(1)]).class_names is None


# Order


def test_stream_order_is_a_function_of_seed_task_and_step():
    same = [steps_of(make(seed=3), 8) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != steps_of(make(seed=4), 8)


def test_stream_order_does_not_depend_on_other_tasks_or_their_order():
    both, turned = steps_of(make({"a": 10, "b": 6}), 8), steps_of(make({"b": 6, "a": 10}), 8)
    alone = steps_of(make({"a": 10}), 8)
    assert [step["a"] for step in both] == [step["a"] for step in turned] == [step["a"] for step in alone]
    assert [step["b"] for step in both] == [step["b"] for step in turned]


def test_stream_order_does_not_depend_on_global_random_state():
    first = steps_of(make(), 4)
    torch.manual_seed(99)
    assert steps_of(make(), 4) == first


def test_stream_order_does_not_depend_on_num_workers():
    assert steps_of(make(num_workers=1), 5) == steps_of(make(num_workers=0), 5)


def test_stream_visits_every_image_once_per_pass():
    seen = [i for step in steps_of(make({"a": 10}), 10) for i in step["a"]]  # 30 of 10 images: three passes
    passes = [seen[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_stream_shorter_than_the_batch_gives_each_image_once_a_step():
    steps = steps_of(make({"a": 10, "b": 2}, batch_size=4), 3)
    assert [len(step["a"]) for step in steps] == [4, 4, 4]
    assert [sorted(step["b"]) for step in steps] == [[0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batch_of_one_process(world):
    lengths = {"a": 17, "b": 12}
    ranks = [steps_of(make(lengths, batch_size=2), 7, world=world, rank=rank) for rank in range(world)]
    single = steps_of(make(lengths, batch_size=2 * world), 7)
    for task in lengths:
        joined = [[i for rank in ranks for i in rank[step][task]] for step in range(7)]
        assert joined == [step[task] for step in single]


def test_texts_of_similar_length_share_a_batch_each_once_a_pass():
    ids = [torch.zeros(3 + 7 * i % 50, dtype=torch.long) for i in range(40)]
    tasks = {"a": Task(adapt=[({"input_ids": one}, 0) for one in ids])}
    options = {"tasks": tasks, "batch_size": 4, "collate": pad}
    padded = {}
    for group in (False, True):
        steps = steps_of(make(**options, group_by_length=group), 10)
        assert sorted(i for step in steps for i in step["a"]) == list(range(40))
        padded[group] = sum(max(len(ids[i]) for i in step["a"]) for step in steps)
    assert padded[True] < 0.8 * padded[False]
    halves = [steps_of(make(**{**options, "batch_size": 2}, group_by_length=True), 10, world=2, rank=r) for r in (0, 1)]
    assert [first["a"] + second["a"] for first, second in zip(*halves, strict=True)] == [step["a"] for step in steps]
    with pytest.raises(InputError, match=r"group_by_length: data\.tasks\.a: expected texts, found Tensor"):
        make(group_by_length=True)


def test_ranks_of_a_short_stream_share_each_image_once():
    ranks = [steps_of(make({"a": 4}, batch_size=8), 3, world=2, rank=rank) for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        assert sorted(first["a"] + second["a"]) == [0, 1, 2, 3]
        assert len(first["a"]) == len(second["a"]) == 2


@pytest.mark.parametrize(
    ("max_steps", "accumulate", "world", "expected"), [(7, 1, 1, 7), (7, 2, 1, 14), (-1, 1, 1, 6), (-1, 1, 2, 3)]
)
def test_train_dataloader_length_is_the_run_or_one_pass(max_steps, accumulate, world, expected):
    data = make({"a": 18, "b": 6})
    trainer = {"max_steps": max_steps, "accumulate": accumulate, "world": world}
    assert len(with_trainer(data, **trainer).train_dataloader()) == expected


def test_train_dataloader_without_trainer_is_one_pass():
    loader = make({"a": 10}).train_dataloader()
    assert isinstance(loader, StreamLoader)
    assert len(loader) == 3
    assert loader.state_dict() == {"position": 0}


# Resume


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_loader_resumes_in_the_middle_with_the_same_batches(num_workers):
    whole = steps_of(make(), 9)
    first = with_trainer(make(num_workers=num_workers), max_steps=9, processed=4).train_dataloader()
    assert len(list(islice(first, 4))) == 4
    state = first.state_dict()
    assert state == {"position": 4}
    second = with_trainer(make(num_workers=num_workers), max_steps=9).train_dataloader()
    second.load_state_dict(state)
    rest = [{task: batch.indices.tolist() for task, batch in step.items()} for step in islice(second, 5)]
    assert rest == whole[4:]
    assert len(list(second)) == 9  # the position counts for one pass only, exhausted or not


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_loader_resumes_in_a_later_epoch_before_it_is_told_which(num_workers):
    whole = steps_of(make({"a": 10}), 9)
    first = with_trainer(make({"a": 10}), max_steps=3, processed=2).train_dataloader()
    first.sampler.set_epoch(2)
    second = with_trainer(make({"a": 10}, num_workers=num_workers), max_steps=3).train_dataloader()
    second.load_state_dict(first.state_dict())
    ahead = iter(second)
    second.sampler.set_epoch(2)
    assert [{"a": step["a"].indices.tolist()} for step in ahead] == whole[8:]


def test_stream_loader_saved_at_the_end_of_an_epoch_resumes_in_the_next():
    whole = steps_of(make({"a": 10}), 6)
    first = with_trainer(make({"a": 10}), max_steps=3, processed=3).train_dataloader()
    second = with_trainer(make({"a": 10}), max_steps=3).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert [{"a": step["a"].indices.tolist()} for step in second] == whole[3:]


def test_stream_loader_next_epoch_goes_on_where_the_first_ended():
    whole = steps_of(make({"a": 10}), 6)
    loader = with_trainer(make({"a": 10}), max_steps=3).train_dataloader()
    joined = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        joined += [{"a": step["a"].indices.tolist()} for step in loader]
    assert joined == whole


# What the teachers are asked


def test_teacher_loader_without_steps_gives_all_in_order():
    data = make({"a": 10})
    assert [i for batch in data.teacher_loader("a") for i in batch[1].tolist()] == list(range(10))


@pytest.mark.parametrize("world", [1, 2])
def test_teacher_loader_gives_what_a_rank_visits_in_the_first_steps(world):
    for rank in range(world):
        visited = {i for step in steps_of(make({"a": 40}), 3, world=world, rank=rank) for i in step["a"]}
        data = with_trainer(make({"a": 40}), world=world, rank=rank)
        asked = [i for batch in data.teacher_loader("a", steps=3) for i in batch[1].tolist()]
        assert asked == sorted(visited)
        assert len(asked) == 9
    assert [i for batch in data.teacher_loader("a", steps=99) for i in batch[1].tolist()] == list(range(40))


def test_evaluation_loader_keeps_order_and_labels():
    data = make(tasks={"a": Task(adapt=Numbers(2), evaluate=Numbers(5))}, evaluation_batch_size=2)
    batches = list(data.evaluation_loader("a"))
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert torch.cat([inputs for inputs, _ in batches])[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 0, 1]


# What is refused


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Task(dataset=[]), {}, r"data\.tasks\.a\.dataset: the data set is empty. Check its folder"),
        (Task(adapt=[]), {}, r"data\.tasks\.a\.adapt: the data set is empty"),
        (Task(adapt=Numbers(3), evaluate=[]), {}, r"data\.tasks\.a\.evaluate: the data set is empty"),
        (Task(dataset=Numbers(3), adapt=Numbers(3)), {}, r"data\.tasks\.a: give either dataset, or adapt and evaluate"),
        (Task(dataset=Numbers(3), evaluate=Numbers(3)), {}, r"data\.tasks\.a: give either dataset, or adapt"),
        (Task(evaluate=Numbers(3)), {}, r"data\.tasks\.a: no adaptation inputs\..*protocol=transductive"),
        (Task(), {}, r"data\.tasks\.a: no adaptation inputs"),
        (Task(), {"protocol": "transductive"}, r"data\.tasks\.a: no adaptation inputs"),
        (Task(dataset=Numbers(1)), {}, r"data\.tasks\.a\.dataset: one input cannot be split; expected at least two"),
        (Task(adapt=Endless()), {}, r"data\.tasks\.a\.adapt: Endless has no length\. Expected a map-style"),
        (Task(adapt=Numbers(3)), {"limit": 0}, r"data\.limit: expected a whole number >= 1, found 0"),
        (Task(adapt=Numbers(3)), {"batch_size": 0}, r"data\.batch_size: expected a whole number >= 1, found 0"),
        (Task(adapt=Numbers(3)), {"protocol": "splitt"}, r"data\.protocol: expected 'split' or .*found 'splitt'"),
        (Task(adapt=Numbers(3)), {"cache": "disk"}, r"data\.cache: expected 'auto' or 'ram' or 'off', found 'disk'"),
        (Task(adapt=Numbers(3)), {"prefetch": -1}, r"data\.prefetch: expected a whole number >= 0, found -1"),
        (Task(adapt=Numbers(3)), {"num_workers": 1.5}, r"data\.num_workers: expected a whole number >= 0, found 1\.5"),
    ],
)
def test_unlabeled_tasks_bad_input_is_named(task, options, message):
    with pytest.raises(InputError, match=message):
        make(tasks={"a": task}, **options)


def test_unlabeled_tasks_without_tasks_is_refused():
    with pytest.raises(InputError, match=r"data\.tasks: expected at least one task, found none"):
        UnlabeledTasks({})
