"""Criteria that need no label: what they measure, that training is not touched, resume, and one question per expert."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from adamerge.callbacks import UnlabeledCriteria
from adamerge.data.batch import Outputs
from adamerge.model.merged_model import TaskStep
from adamerge.objectives.imitation import Imitation
from tests.support.fits import QUIET, batches, every_step, fit, make_data, make_method, values

pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:.*log_dir.*", "ignore:.*is not resumable.*")]


class Seen(Callback):
    """Keeps what is logged."""

    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, *_):
        self.metrics.append({key: value.item() for key, value in trainer.callback_metrics.items()})


def run(toy, folder, *callbacks, objective=None, steps=4, **options):
    method = make_method(toy, objective, lr=0.05)
    fit(method, make_data(), folder, steps=steps, callbacks=[*callbacks, *options.pop("callbacks", [])], **options)
    return method


def test_criteria_of_one_batch_are_entropies_as_a_share_of_the_largest(toy, tmp_path):
    seen = Seen()
    method = make_method(toy, Imitation(), lr=0.0)
    fit(method, batches(toy, 1), tmp_path, steps=1, callbacks=[UnlabeledCriteria(), seen])
    p = method.model.logits(toy.inputs["green"], "green").softmax(-1).detach()
    found = seen.metrics[0]
    assert found["unlabeled/entropy/green"] == pytest.approx(-(p * p.log()).sum(1).mean().item() / math.log(4))
    mean = p.mean(0)
    assert found["unlabeled/marginal/green"] == pytest.approx(-(mean * mean.log()).sum().item() / math.log(4), rel=1e-5)
    expert = method.model.teacher("green", toy.inputs["green"], toy.indices["green"]).logits
    differing = (p.argmax(1) != expert.argmax(1)).float().mean().item()
    assert found["unlabeled/disagreement/green"] == pytest.approx(differing)


def test_criteria_ask_no_expert_where_the_objective_does_not(toy, tmp_path):
    seen = Seen()
    run(toy, tmp_path, UnlabeledCriteria(), seen)
    assert "unlabeled/marginal/green" in seen.metrics[-1]
    assert not [key for key in seen.metrics[-1] if "disagreement" in key]


def test_criteria_leave_training_as_it_is(toy, tmp_path):
    plain = run(toy, tmp_path, objective=Imitation())
    watched = run(toy, tmp_path, UnlabeledCriteria(), objective=Imitation())
    assert torch.equal(values(plain), values(watched))


def test_criteria_go_on_after_a_resume(toy, tmp_path):
    whole, resumed = Seen(), Seen()
    saving = every_step(tmp_path / "checkpoints")
    run(toy, tmp_path, UnlabeledCriteria(), whole, objective=Imitation(), steps=6, **saving)
    checkpoint = tmp_path / "checkpoints" / "step=3.ckpt"
    run(toy, tmp_path, UnlabeledCriteria(), resumed, objective=Imitation(), steps=6, resume=checkpoint)
    for key, value in whole.metrics[-1].items():
        assert resumed.metrics[-1][key] == pytest.approx(value, abs=1e-6), key


def test_criteria_skip_what_is_not_finite_and_single_classes():
    criteria = UnlabeledCriteria()
    for logits in (torch.tensor([[math.nan, 0.0]]), torch.zeros(3, 1)):
        criteria.observe(SimpleNamespace(task="a", outputs=SimpleNamespace(logits=logits)))
    assert criteria._seen == {}


def test_task_step_asks_its_expert_once():
    asked = []

    def teacher(task, inputs, indices):
        asked.append(task)
        return Outputs(torch.zeros(1, 2), torch.zeros(1, 2), {})

    outputs = Outputs(torch.zeros(1, 2), torch.zeros(1, 2), {})
    step = TaskStep("a", torch.zeros(1), torch.zeros(1), outputs, torch.zeros(1, 1), teacher, None)
    assert step.teacher() is step.teacher()
    assert asked == ["a"]


def test_means_of_coefficients_are_logged_by_expert(toy, tmp_path):
    seen = Seen()
    method = run(toy, tmp_path, seen, steps=2)
    for name, row in zip(method.model.pool.expert_names, values(method), strict=True):
        assert abs(seen.metrics[-1][f"coefficient/{name}"] - row.mean()) < 0.1
