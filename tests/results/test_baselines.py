"""What uses labels: the oracle's loss, the grid search, constant coefficients."""

import pytest
import torch
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from adamerge import Coefficients, MergedModel, Outputs, TaskStep
from adamerge.data import Task, UnlabeledTasks
from adamerge.objectives import Objective
from adamerge.results.baselines import GRID, LabelledCrossEntropy, constant, search_task_arithmetic, stream_labels
from adamerge.results.evaluation import score_tasks
from tests.support.toy import CLASSES, EXPERTS


def step_of(task, logits, indices):
    outputs = Outputs(logits, torch.zeros(len(logits), 1))
    return TaskStep(task, torch.zeros(len(logits), 1), indices, outputs, torch.zeros(1, 1), None, None)


def data_taught_by(toy, value, **options):
    """Images labelled by the merge with one shared coefficient, so that a search must find it."""
    pool = toy.pool()
    teacher = toy.model(pool, Coefficients(pool, "task", value, "none"))
    tasks = {}
    for task in EXPERTS:
        images = torch.randn(60, 1, 4, 4)
        with torch.no_grad():
            labels = teacher.logits(images, task).argmax(-1)
        tasks[task] = Task(dataset=TensorDataset(images, labels))
    return UnlabeledTasks(tasks, **options)


def test_labelled_cross_entropy_is_that_of_the_labels_at_the_indices():
    labels = {"a": torch.tensor([0, 2, 1, 1]), "b": torch.tensor([1, 1, 1, 1])}
    logits, indices = torch.randn(3, 3, dtype=torch.float64), torch.tensor([3, 0, 1])
    loss = LabelledCrossEntropy(labels)(step_of("a", logits, indices))
    by_hand = -sum(logits.log_softmax(-1)[row, label] for row, label in enumerate([1, 0, 2])) / 3
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_labelled_cross_entropy_is_marked_and_works_as_an_objective():
    objective = LabelledCrossEntropy({"a": torch.tensor([1, 0])})
    assert objective.uses_labels
    assert isinstance(objective, Objective)
    logits = torch.randn(2, 2, requires_grad=True)
    objective(step_of("a", logits, torch.tensor([1, 0]))).backward()
    expected = torch.autograd.functional.jacobian(
        lambda z: functional.cross_entropy(z, torch.tensor([0, 1])), logits.detach()
    )
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("protocol", ["split", "transductive"])
def test_stream_labels_stand_in_the_streams_order(toy, protocol):
    images = TensorDataset(torch.arange(20.0), torch.arange(20) * 3)
    data = UnlabeledTasks({"a": Task(dataset=images)}, protocol=protocol, limit=6, seed=1)
    stream = data.streams["a"]
    assert len(stream) == 6
    assert stream_labels(stream).tolist() == [int(stream[i].inputs) * 3 for i in range(6)]


@pytest.mark.parametrize("value", [0.1, 0.7])
def test_search_task_arithmetic_finds_the_value_that_made_the_labels(toy, value):
    data = data_taught_by(toy, value)
    pool = toy.pool()
    model = toy.model(pool, Coefficients(pool, "layer", 0.3, "none"))
    assert search_task_arithmetic(model, data) == value
    assert torch.equal(model.coefficients(), torch.full_like(model.coefficients.raw, value))
    scores = score_tasks(model, model.merge(), data)
    assert all(score.accuracy == 1 for score in scores.values())


def test_search_task_arithmetic_picks_the_best_by_hand_on_adaptation_images_only(toy):
    """Random labels; the scored images are never looked at."""

    class Untouched(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            raise AssertionError("a scored image was read")

    generator = torch.Generator().manual_seed(4)
    tasks = {}
    for task in EXPERTS:
        images = torch.randn(50, 1, 4, 4, generator=generator)
        labels = torch.randint(CLASSES[task], (50,), generator=generator)
        tasks[task] = Task(adapt=TensorDataset(images, labels), evaluate=Untouched())
    data = UnlabeledTasks(tasks, batch_size=4, evaluation_batch_size=7)
    pool = toy.pool()

    def accuracy(value):
        model = toy.model(pool, Coefficients(pool, "task", 0.3, "none"))
        constant(model.coefficients, value)
        total = 0.0
        for task in EXPERTS:
            stream = data.streams[task]
            pairs = [(stream[i].inputs, int(stream.source[i][1])) for i in range(len(stream))]
            predicted = model.logits(torch.stack([image for image, _ in pairs]), task).argmax(-1)
            total += (predicted == torch.tensor([label for _, label in pairs])).double().mean().item()
        return total / len(EXPERTS)

    grid = (-0.5, 0.0, 0.5, 1.0, 2.0)
    with torch.no_grad():
        values = [accuracy(value) for value in grid]
    model = MergedModel(toy.encoder, pool, Coefficients(pool, "task", 0.3, "none"), toy.heads)
    assert sorted(values)[-1] - sorted(values)[-2] > 1e-3  # no tie
    assert search_task_arithmetic(model, data, grid) == grid[values.index(max(values))]


def test_grid_holds_the_fields_default():
    assert 0.3 in GRID
    assert list(GRID) == sorted(GRID)


def test_constant_zero_is_the_base_and_one_over_experts_the_average(toy64):
    pool = toy64.pool()
    model = toy64.model(pool, Coefficients(pool, "row", 0.3, "none"))
    constant(model.coefficients, 0.0)
    assert all(torch.equal(tensor, pool.base[name]) for name, tensor in model.merge().items())
    constant(model.coefficients, 1 / 3)
    for name, tensor in model.merge().items():
        average = sum(toy64.experts[expert][name] for expert in EXPERTS) / 3
        torch.testing.assert_close(tensor, average, rtol=1e-12, atol=1e-12)
