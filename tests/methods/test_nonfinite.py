"""Losses, gradients and coefficients that are not finite: named, stopped or skipped, and nothing of them kept."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from adamerge import Coefficients, GuardError, InputError, MergedModel
from adamerge.callbacks import CollapseGuard
from adamerge.methods import FrankWolfeMerging
from adamerge.objectives.entropy import Entropy
from tests.support.fits import QUIET, batches, every_step, fit, make_data, make_method, values
from tests.support.toy import EXPERTS

pytestmark = QUIET


class Poisoned:
    """Entropy, but at some steps, counted from 0, the loss or the gradient of one task is not finite."""

    def __init__(self, *steps, task="green", value=math.nan, gradient=False):
        self.steps, self.task, self.value, self.gradient = steps, task, value, gradient
        self.method = None

    def __call__(self, step):
        loss = Entropy()(step)
        if step.task != self.task or self.method.trainer.global_step not in self.steps or self.method.preparing:
            return loss
        zero = (step.outputs.features * 0).sum()
        return loss + zero.sqrt() if self.gradient else loss + zero + self.value


class Prepared(Callback):
    """Tells the objective that the trial before the first step is over."""

    def on_train_start(self, trainer, pl_module):
        pl_module.preparing = False


class Snapshots(Callback):
    """Coefficients, and a digest of the optimizer's state, after each step."""

    def __init__(self):
        self.values, self.states = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(values(pl_module))
        state = trainer.optimizers[0].state[pl_module.model.coefficients.raw]
        self.states.append({key: torch.as_tensor(value).clone() for key, value in state.items()})


def prepare(method, objective):
    objective.method, method.preparing = method, True
    return method


def make(toy, objective, **options):
    return prepare(make_method(toy, objective, **options), objective)


def make_frank_wolfe(toy, objective, **options):
    pool = toy.pool()
    model = MergedModel(toy.encoder, pool, Coefficients(pool, "layer", 0.2, "simplex"), toy.heads)
    return prepare(FrankWolfeMerging(model, objective, on_nonfinite="skip", **options), objective)


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("kind", ["adam", "hard", "line_search", "soft"])
def test_skipped_step_changes_neither_coefficients_nor_optimizer(toy, tmp_path, caplog, kind, gradient):
    objective = Poisoned(2, gradient=gradient)
    if kind == "adam":
        method = make(toy, objective, on_nonfinite="skip")
    elif kind == "line_search":
        method = make_frank_wolfe(toy, objective, step_rule="line_search")
    else:
        method = make_frank_wolfe(toy, objective, mode=kind)
    seen = Snapshots()
    trainer = fit(method, make_data(), tmp_path, steps=5, callbacks=[Prepared(), seen])
    assert trainer.global_step == 5
    assert torch.equal(seen.values[1], seen.values[2])
    assert seen.states[1].keys() == seen.states[2].keys()
    assert all(torch.equal(seen.states[1][key], seen.states[2][key]) for key in seen.states[1])
    assert not torch.equal(seen.values[2], seen.values[4])
    assert torch.isfinite(seen.values[4]).all()
    assert method.skipped == 1
    (line,) = [record.message for record in caplog.records if "Skipped" in record.message]
    assert line.startswith("Step 2: ")
    assert line.endswith("Skipped, 1 so far.")


def test_skipped_batch_of_several_that_accumulate_leaves_the_others(toy, tmp_path):
    runs = []
    for poisoned in ((), (1,)):
        objective = Poisoned()
        method = make(toy, objective, on_nonfinite="skip")

        class At(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, objective=objective, at=poisoned):
                objective.steps = (trainer.global_step,) if batch_idx in at else ()

        fit(method, make_data(), tmp_path, steps=1, accumulate_grad_batches=2, callbacks=[Prepared(), At()])
        runs.append(values(method))
    assert not torch.equal(runs[0], runs[1])
    assert torch.isfinite(runs[1]).all()
    assert method.skipped == 1


def test_more_skipped_steps_than_allowed_stop_the_run(toy, tmp_path):
    method = make(toy, Poisoned(1, 2, 4), on_nonfinite="skip", max_skipped=2)
    with pytest.raises(GuardError, match=r"Step 4: .* 2 batches were skipped before, as method\.max_skipped allows"):
        fit(method, make_data(), tmp_path, callbacks=[Prepared()])


def test_stop_names_task_images_and_tensor(toy, tmp_path):
    method = make(toy, Poisoned(1))
    with pytest.raises(GuardError, match=r"Step 1: the loss of task 'green' is nan on the inputs at positions \d, \d,"):
        fit(method, make_data(), tmp_path, callbacks=[Prepared()])
    method = make(toy, Poisoned(1, gradient=True))
    names = "|".join(name.replace(".", r"\.") for name in method.model.pool.names)
    with pytest.raises(GuardError, match=rf"not finite: tensor '({names})' for task 'green', inputs at positions \d"):
        fit(method, make_data(), tmp_path, callbacks=[Prepared()])


def test_step_to_a_coefficient_that_is_not_finite_is_taken_back(toy, tmp_path):
    seen = Snapshots()
    method = make_method(toy, constraint="none", optimizer=partial(torch.optim.SGD, lr=1e-2))

    class Explode(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                optimizer.param_groups[0]["lr"] = math.inf

    with pytest.raises(GuardError, match=r"Step 2: the step made the coefficient of expert 'red', group '.+' infinite"):
        fit(method, make_data(), tmp_path, callbacks=[seen, Explode()])
    assert torch.equal(values(method), seen.values[1])


def test_resume_counts_on(toy, tmp_path):
    save = every_step(tmp_path / "checkpoints")
    method = make(toy, Poisoned(1), on_nonfinite="skip")
    fit(method, make_data(), tmp_path, steps=3, **{**save, "callbacks": [*save["callbacks"], Prepared()]})
    again = make(toy, Poisoned(4), on_nonfinite="skip")
    fit(again, make_data(), tmp_path, resume=tmp_path / "checkpoints" / "step=3.ckpt", callbacks=[Prepared()])
    assert again.skipped == 2


def test_collapse_guard_forgets_a_batch_that_is_not_finite(toy, tmp_path):
    guard = CollapseGuard(window=2)
    data = batches(toy, 5)
    toy.inputs["green"] = toy.inputs["green"].clone()

    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                batch["green"].inputs.mul_(math.nan)

    method = make_method(toy, on_nonfinite="skip")
    fit(method, data, tmp_path, steps=2, callbacks=[Spoil(), guard])
    before = guard._criteria.criteria("green")["marginal"]
    assert math.isfinite(before)
    clean = {task: toy.inputs[task].clone() for task in EXPERTS}
    toy.inputs.update(clean)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_nonfinite": "ignore"}, "expected 'stop' or 'skip', found 'ignore'"),
        ({"max_skipped": -1}, "method.max_skipped: .*>= 0"),
        ({"max_skipped": "few"}, "method.max_skipped: .*'few'"),
        ({"micro_batch": 0}, "method.micro_batch: .*>= 1"),
        ({"task_weights": {"green": "much"}}, "method.task_weights.green: .*'much'"),
    ],
)
def test_wrong_option_is_refused(toy, options, words):
    with pytest.raises(InputError, match=words):
        make_method(toy, **options)


def test_objective_that_draws_random_numbers_resumes_to_the_same_bits(toy, tmp_path):
    class Dropping:
        def __call__(self, step):
            return (Entropy()(step) * torch.rand(())) + 0 * step.outputs.logits.sum()

    save = every_step(tmp_path / "checkpoints")
    whole = make_method(toy, Dropping())
    fit(whole, make_data(), tmp_path, **save)
    torch.manual_seed(123)
    resumed = make_method(toy, Dropping())
    fit(resumed, make_data(), tmp_path, resume=tmp_path / "checkpoints" / "step=3.ckpt")
    assert torch.equal(values(resumed), values(whole))
    assert isinstance(save["callbacks"][0], ModelCheckpoint)
