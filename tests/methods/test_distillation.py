"""All weights learn: the step equals plain training, nothing else moves, resume, what is exported."""

import json
from functools import partial

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from adamerge import Coefficients, GuardError, InputError, MergedModel, load_state_dict
from adamerge.callbacks import ExportMergedWeights, KeepBest
from adamerge.callbacks.keep_best import holdout_loss
from adamerge.commands.export import _restore
from adamerge.methods import Distillation
from adamerge.model.merge import merge
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from tests.support.fits import QUIET, batches, every_step, fit, make_data
from tests.support.toy import EXPERTS

pytestmark = QUIET


ADAM = partial(torch.optim.Adam, lr=0.01)


def make(toy, objective=None, optimizer=ADAM, **options):
    pool = toy.pool()
    model = MergedModel(toy.encoder, pool, Coefficients(pool, "task", 0.3), toy.heads)
    return Distillation(model, objective or Imitation(), optimizer, **options)


def weights(method):
    return {name: tensor.clone() for name, tensor in method.model.merge().items()}


@pytest.mark.parametrize(
    ("accumulate", "micro_batch", "anchor"), [(1, "auto", 0), (2, "auto", 0), (1, 2, 0), (1, "auto", 3.0), (2, 2, 3.0)]
)
def test_steps_equal_plain_training_of_all_weights(toy, tmp_path, accumulate, micro_batch, anchor):
    method = make(toy, optimizer=partial(torch.optim.SGD, lr=0.1), micro_batch=micro_batch, anchor=anchor)
    fit(method, batches(toy, 2 * accumulate), tmp_path, steps=2, accumulate_grad_batches=accumulate)
    pool = toy.pool()
    start = {name: t.detach().clone() for name, t in merge(pool, Coefficients(pool, "task", 0.3)).items()}
    student = {name: tensor.requires_grad_() for name, tensor in start.items()}
    first = {name: tensor.detach().clone() for name, tensor in start.items()}
    squares = sum(float((toy.experts[task][n] - toy.base[n]).square().sum()) for task in EXPERTS for n in start)
    optimizer = torch.optim.SGD(student.values(), lr=0.1)
    for _ in range(2):
        losses = []
        for task in EXPERTS:
            answers = toy.heads[task](functional_call(toy.encoder, toy.experts[task], (toy.inputs[task],)))
            logits = toy.heads[task](functional_call(toy.encoder, student, (toy.inputs[task],)))
            target = answers.detach().log_softmax(-1)
            losses.append(functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean"))
        optimizer.zero_grad()
        moved = sum((tensor - first[name]).square().sum() for name, tensor in student.items())
        (torch.stack(losses).mean() + anchor * moved / squares).backward()
        optimizer.step()
    for name, tensor in weights(method).items():
        torch.testing.assert_close(tensor, student[name].detach(), rtol=1e-5, atol=1e-6)


def test_weights_alone_learn_and_the_pool_stays(toy, tmp_path):
    method = make(toy)
    pool, before = method.model.pool, {name: tensor.clone() for name, tensor in toy.base.items()}
    trainer = fit(method, make_data(), tmp_path, steps=2)
    assert [name for name, p in method.named_parameters() if p.requires_grad] == [
        f"trained.{number}" for number in range(len(pool.names))
    ]
    (group,) = trainer.optimizers[0].param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in method.trained]
    assert method.model.coefficients().unique().tolist() == pytest.approx([0.3])
    assert all(torch.equal(toy.base[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(toy.base[name], tensor) for name, tensor in pool.base.items())
    start = merge(pool, method.model.coefficients)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in weights(method).items())


def test_fit_resumed_from_the_middle_equals_uninterrupted(toy, tmp_path):
    whole = make(toy)
    fit(whole, make_data(), tmp_path, **every_step(tmp_path))
    resumed = make(toy)
    fit(resumed, make_data(), tmp_path, resume=tmp_path / "step=4.ckpt")
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    with pytest.raises(InputError, match=r"method=distillation.*no coefficients.*resume=RUN_DIR"):
        _restore(whole.model.coefficients, tmp_path / "step=4.ckpt")


def test_export_is_what_was_trained(toy, tmp_path):
    method, export = make(toy), ExportMergedWeights(tmp_path / "out")
    fit(method, make_data(), tmp_path, steps=2, callbacks=[export])
    written, trained = load_state_dict(export.files["merged"]), weights(method)
    assert written.keys() == toy.base.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in trained.items())
    recipe = json.loads(export.files["recipe"].read_text())
    assert recipe["trained_weights"] == sum(tensor.numel() for tensor in trained.values())
    assert "coefficients" not in export.files
    assert not (tmp_path / "out" / "coefficients.json").exists()


def test_keep_best_ends_with_the_best_weights(toy, tmp_path):
    method, keep = make(toy, Entropy(), partial(torch.optim.SGD, lr=200.0)), KeepBest(every=1)
    trainer = fit(method, make_data(holdout=0.3), tmp_path, steps=3, callbacks=[keep])
    assert holdout_loss(trainer, method) == pytest.approx(keep.best[1], rel=1e-5)


class Blown(torch.optim.SGD):
    """An optimizer whose second step makes the third parameter infinite."""

    count = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.count += 1
        if self.count == 2:
            self.param_groups[0]["params"][2].data.fill_(torch.inf)
        return loss


def test_step_that_is_not_finite_is_taken_back_and_named(toy, tmp_path):
    method, first = make(toy, optimizer=partial(Blown, lr=0.1)), make(toy, optimizer=partial(torch.optim.SGD, lr=0.1))
    fit(first, batches(toy, 1), tmp_path, steps=1)
    with pytest.raises(GuardError, match=f"the weight '{method.model.pool.names[2]}' infinite or NaN"):
        fit(method, batches(toy, 3), tmp_path, steps=3)
    expected = weights(first)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(method).items())
