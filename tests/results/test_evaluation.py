"""Scores against numbers made by hand, bootstrap, summary and table."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassF1Score

from adamerge import InputError
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.first_look import check_metrics
from adamerge.results.evaluation import (
    TableRow,
    TaskScore,
    bootstrap,
    gap_closed,
    normalised,
    score_task,
    score_tasks,
    scores_in,
    summary,
)
from adamerge.results.summary_table import table
from tests.support.toy import CLASSES, EXPERTS


def labelled(outputs, labels, **options) -> UnlabeledTasks:
    """A task "a" whose images are the logits themselves."""
    images = TensorDataset(torch.tensor(outputs), torch.tensor(labels))
    return UnlabeledTasks({"a": Task(adapt=images, evaluate=images)}, **options)


def as_they_are(inputs, task):
    assert task == "a"
    return inputs


def score(*hits: bool) -> TaskScore:
    correct = torch.tensor(hits)
    return TaskScore(correct.float().mean().item(), 0.1, correct)


def made_rows():
    hits = {"pretrained": (2, 5), "task_arithmetic_0.3": (4, 6), "mine": (6, 7), "oracle": (7, 7), "experts": (8, 8)}
    rows = {}
    for name, (a, b) in hits.items():
        scores = {"a": score(*[i < a for i in range(10)]), "b": score(*[i < b for i in range(10)])}
        rows[name] = TableRow(
            scores, uses_labels=name == "oracle", uses_data=name in ("mine", "oracle"), seconds=1.5, seed=3
        )
    return rows


# One task


def test_score_task_accuracy_and_hits_by_hand():
    outputs = [[2.0, 1.0, 0.0], [0.0, 5.0, 1.0], [0.0, 1.0, 3.0], [4.0, 1.0, 2.0]]
    result = score_task(as_they_are, labelled(outputs, [0, 1, 1, 2], evaluation_batch_size=3), "a")
    assert result.accuracy == 0.5
    assert result.correct.tolist() == [True, True, False, False]


def test_score_task_measures_a_task_s_own_metrics():
    outputs = [[2.0, 1.0, 0.0], [0.0, 5.0, 1.0], [0.0, 1.0, 3.0], [4.0, 1.0, 2.0]]
    data, macro = labelled(outputs, [0, 1, 1, 2]), MulticlassF1Score(3, average="macro")
    data.tasks["a"] = replace(data.tasks["a"], metrics={"F1": macro})
    scores = {"a": score_task(as_they_are, data, "a")}
    assert scores["a"].measures == {"F1": pytest.approx((2 / 3 + 2 / 3 + 0) / 3)}
    content = summary({"mine": TableRow(scores)}, "split")
    assert content["measures"] == {"F1": {"unit": "", "lower_is_better": False}}
    assert "F1 ↑" in table(content).markdown()
    for metrics, message in (
        ({"F1": MulticlassF1Score(2)}, r"metrics\.F1: MulticlassF1Score on 3 classes"),
        ({"F1": MulticlassF1Score(3, average="none")}, r"metrics\.F1"),
        ({"F1": 3}, r"metrics\.F1: expected a metric of torchmetrics"),
    ):
        with pytest.raises(InputError, match=message):
            check_metrics("a", Task(classes=["x", "y", "z"], metrics=metrics))


def test_score_task_micro_accuracy_counts_images_not_classes():
    outputs = [[5.0, 0.0]] * 10
    assert score_task(as_they_are, labelled(outputs, [0] * 9 + [1]), "a").accuracy == pytest.approx(0.9)


def test_score_task_calibration_error_by_hand():
    """Two confidences, 0.9 (half right) and 0.6 (all right), in two of the 15 bins."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]).log().tolist()
    result = score_task(as_they_are, labelled(logits, [0, 1, 0, 0]), "a")
    assert result.calibration_error == pytest.approx(0.5 * abs(0.9 - 0.5) + 0.5 * abs(0.6 - 1.0), abs=1e-6)


def test_score_task_logits_between_0_and_1_are_logits_not_probabilities():
    result = score_task(as_they_are, labelled([[0.0, 1.0]] * 4, [1, 1, 1, 1]), "a")
    confidence = 1 / (1 + torch.tensor(-1.0).exp().item())
    assert result.calibration_error == pytest.approx(1 - confidence, abs=1e-6)


@pytest.mark.parametrize("label", [3, -1])
def test_score_task_label_outside_the_head_is_named(label):
    data = labelled([[0.0, 1.0, 2.0]] * 2, [0, label])
    with pytest.raises(InputError, match=rf"data\.tasks\.a: .*found (label )?{label}[.,]"):
        score_task(as_they_are, data, "a")


def test_score_tasks_uses_the_given_parameters_and_each_tasks_head(toy, toy_model):
    generator = torch.Generator().manual_seed(5)
    tasks, images, labels = {}, {}, {}
    for task in EXPERTS:
        images[task] = torch.randn(12, 1, 4, 4, generator=generator)
        labels[task] = torch.randint(CLASSES[task], (12,), generator=generator)
        tasks[task] = Task(adapt=[torch.zeros(1)], evaluate=TensorDataset(images[task], labels[task]))
    data = UnlabeledTasks(tasks, evaluation_batch_size=5)
    scores = score_tasks(toy_model, toy_model.pool.base, data)
    assert list(scores) == list(EXPERTS)
    for task in EXPERTS:
        with torch.no_grad():
            expected = toy.heads[task](toy.encoder(images[task])).argmax(-1) == data.evaluation[task].source.tensors[1]
        assert torch.equal(scores[task].correct, expected)
    assert list(score_tasks(toy_model, toy_model.merge(), data, tasks=["blue"])) == ["blue"]


# Bootstrap


def test_bootstrap_interval_contains_the_mean_and_is_as_wide_as_theory():
    scores = {"a": score(*[i < 140 for i in range(200)]), "b": score(*[i < 80 for i in range(200)])}
    low, high = bootstrap(scores)
    mean = (0.7 + 0.4) / 2
    assert low < mean < high
    expected = 2 * 1.96 * ((0.7 * 0.3 / 200 + 0.4 * 0.6 / 200) ** 0.5 / 2)
    assert high - low == pytest.approx(expected, rel=0.15)


def test_bootstrap_is_seeded():
    scores = {"a": score(*[i % 3 == 0 for i in range(50)])}
    assert bootstrap(scores, seed=1) == bootstrap(scores, seed=1)
    assert bootstrap(scores, samples=40, seed=1) != bootstrap(scores, samples=40, seed=2)


def test_bootstrap_all_right_has_no_width():
    assert bootstrap({"a": score(True, True)}, samples=30) == (1.0, 1.0)


def test_bootstrap_difference_of_identical_rows_is_zero():
    scores = {"a": score(True, False, True), "b": score(False, False, True)}
    assert bootstrap(scores, scores, samples=150) == (0.0, 0.0)


def test_bootstrap_difference_is_paired_by_image():
    """The first is right wherever the second is: paired, the difference is certainly positive."""
    second = {"a": score(*[i % 2 == 0 for i in range(60)])}
    first = {"a": score(*[i % 2 == 0 or i % 10 == 1 for i in range(60)])}
    low, high = bootstrap(first, second)
    assert 0 < low < 0.1 < high
    assert bootstrap(first)[0] < bootstrap(second)[1]  # unpaired, the intervals overlap
    assert bootstrap(second, first)[1] < 0


# Rows


def test_row_mean_is_over_tasks():
    assert TableRow({"a": score(True, False), "b": score(True, True, True, True)}).mean == 0.75


def test_normalised_is_the_mean_of_ratios_to_the_tasks_own_expert():
    row, experts = {"a": 0.5, "b": 0.75}, {"a": 1.0, "b": 0.75}
    assert normalised(row, experts) == pytest.approx((0.5 + 1.0) / 2)
    assert normalised(experts, experts) == 1.0
    assert normalised(row, {"a": 0.0, "b": 0.75}) is None


def test_gap_closed_is_zero_at_the_start_one_at_the_experts_and_linear_between():
    assert gap_closed(0.4, 0.4, 0.8) == 0
    assert gap_closed(0.5, 0.4, 0.8) == pytest.approx(0.25)
    assert gap_closed(0.8, 0.4, 0.8) == 1
    assert gap_closed(0.5, 0.4, 0.4) is None


# Summary


def test_scores_of_a_stored_summary_are_those_of_its_rows_sample_by_sample():
    rows = made_rows()
    rows["mine"] = TableRow(rows["mine"].scores | {"b": TaskScore(0.375, None, torch.tensor([0.25, 0.5]))})
    stored = json.loads(json.dumps(summary(rows, "split")))
    for name, row in rows.items():
        scores = scores_in(stored["rows"][name])
        assert bootstrap(scores) == bootstrap(row.scores)
        for task, score in row.scores.items():
            assert torch.equal(scores[task].correct, score.correct)
            assert scores[task].accuracy == score.accuracy


def test_summary_has_the_documented_schema():
    content = summary(made_rows(), "split")
    assert content["format"] == 1
    assert content["protocol"] == "split"
    assert content["tasks"] == ["a", "b"]
    assert list(content["rows"]) == ["pretrained", "task_arithmetic_0.3", "mine", "oracle", "experts"]
    row = content["rows"]["mine"]
    assert row["per_task"] == {"a": pytest.approx(0.6), "b": pytest.approx(0.7)}
    assert row["mean"] == pytest.approx(0.65)
    assert row["normalised"] == pytest.approx((0.6 / 0.8 + 0.7 / 0.8) / 2)
    assert row["gap_closed"] == pytest.approx((0.65 - 0.5) / (0.8 - 0.5))
    assert row["interval"][0] < 0.65 < row["interval"][1]
    assert (row["uses_labels"], row["uses_data"], row["seconds"], row["seed"]) == (False, True, 1.5, 3)
    assert content["rows"]["oracle"]["uses_labels"] is True
    assert row["calibration_error"] == {"a": 0.1, "b": 0.1}


def test_summary_extra_facts_of_a_row_are_kept():
    rows = {"best": TableRow({"a": score(True)}, extra={"coefficient": 0.4})}
    row = summary(rows, "split")["rows"]["best"]
    assert row["coefficient"] == 0.4
    assert row["normalised"] is None
    assert row["gap_closed"] is None


def test_summary_without_a_gap_is_still_json():
    same = TableRow({"a": score(True, False)})
    rows = {"task_arithmetic_0.3": same, "experts": same}
    content = json.loads(json.dumps(summary(rows, "split"), allow_nan=False))
    assert content["rows"]["experts"]["gap_closed"] is None


# Table


def rendered(content, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table(content, "The title").terminal(width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_table_shows_every_row_within_the_width(width):
    text = rendered(summary(made_rows(), "split"), width)
    assert max(map(len, text.splitlines())) <= width
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["mine"][1:4] == ["60.0", "70.0", "65.0"]
    assert lines["oracle"][1] == "*"
    assert "The title" in text
    assert "inputs that adapted are not scored" in text
    assert "* uses labels" in text
    assert text.splitlines()[1].split() == ["accuracy,", "%", "a", "b", "mean", "95", "%", "gap", "norm.", "ECE", "s"]
    assert "…" not in text


@pytest.mark.parametrize(("hits", "interval_shown"), [(1, True), (2, False)])
def test_table_of_six_tasks_fits_into_80_columns(hits, interval_shown):
    names = ("mnist", "digits", "latin", "greek", "cyrillic", "math")
    rows = {"task_arithmetic_best": TableRow({name: score(True, hits == 2) for name in names}, uses_labels=True)}
    content = summary(rows, "transductive")
    content["rows"]["task_arithmetic_best"]["interval"] = [0.5, 0.54]
    text = rendered(content, 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in names)
    assert ("±2.0" in text) == interval_shown
    assert "adapted on the scored inputs" in text
