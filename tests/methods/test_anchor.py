"""The anchor: a penalty's gradient, added once per step however it is run, whose strength follows from the samples."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from adamerge import InputError
from adamerge.callbacks import ExportMergedWeights
from adamerge.data.views import Views
from adamerge.methods.anchor import EVIDENCE, strength
from adamerge.objectives.imitation import Imitation
from tests.support.fits import QUIET, batches, every_step, fit, make_data, make_method, values
from tests.support.toy import EXPERTS

pytestmark = QUIET
SGD = partial(torch.optim.SGD, lr=0.5)


class Anchored(nn.Module):
    """Imitation with the penalty written into the objective, where autograd differentiates it."""

    uses_teacher = True

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __call__(self, step):
        penalty = (step.coefficients - step.initial).square().mean()
        return Imitation()(step) + self.factor * penalty  # a mean over tasks counts it once


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("constraint", ["none", "box", "sigmoid"])
def test_anchor_equals_the_penalty_in_the_objective(toy, tmp_path, accumulate, constraint):
    results = []
    for objective, anchor in ((Imitation(), 100.0), (Anchored(100.0), 0.0)):
        method = make_method(toy, objective, "row", constraint, optimizer=SGD, anchor=anchor)
        fit(method, batches(toy, 3 * accumulate), tmp_path, steps=3, accumulate_grad_batches=accumulate)
        results.append(values(method))
    torch.testing.assert_close(*results)
    free = make_method(toy, Imitation(), "row", constraint, optimizer=SGD)
    fit(free, batches(toy, 3 * accumulate), tmp_path, steps=3, accumulate_grad_batches=accumulate)
    assert not torch.allclose(results[0], values(free), atol=1e-6)


def test_stronger_anchor_stays_nearer_to_the_start(toy, tmp_path):
    travels = []
    for anchor in (0.0, 1.0, 100.0):
        method = make_method(toy, Imitation(), "row", "none", anchor=anchor)
        fit(method, make_data(), tmp_path, steps=6)
        travels.append(float((values(method) - 0.3).abs().mean()))
    assert travels[0] > travels[1] > travels[2]


def test_strength_follows_from_the_number_of_samples_not_of_views():
    count = 14 // 2 * len(EXPERTS)  # half adapts
    assert strength("auto", make_data()) == pytest.approx(EVIDENCE / count)
    assert strength("auto", make_data(views=Views(lambda image: image, 5))) == pytest.approx(EVIDENCE / count)
    assert strength(0.5, None) == 0.5
    assert strength(0.5, None, 3) == 0.5
    with pytest.raises(InputError, match=r"method\.anchor=auto: the number of samples is not known"):
        strength("auto", None)


@pytest.mark.parametrize(
    ("options", "batches_per_step", "means"),
    [
        ({}, 1, 1),
        ({"reduction": "sum"}, 1, len(EXPERTS)),
        ({"reduction": "sum", "task_weights": {"red": 3.0}}, 2, 2 * (len(EXPERTS) + 2)),
    ],
)
def test_anchor_counts_as_often_as_the_means_that_a_loss_sums(toy, tmp_path, options, batches_per_step, means):
    count = 14 // 2 * len(EXPERTS)
    method, export = make_method(toy, Imitation(), anchor="auto", **options), ExportMergedWeights(tmp_path / "out")
    fit(method, make_data(batches_per_step=batches_per_step), tmp_path, steps=1, callbacks=[export])
    assert json.loads(export.files["recipe"].read_text())["anchor"] == pytest.approx(means * EVIDENCE / count)


def test_anchored_fit_resumed_from_the_middle_equals_uninterrupted(toy, tmp_path):
    whole, resumed = (make_method(toy, Imitation(), anchor="auto") for _ in range(2))
    fit(whole, make_data(), tmp_path, **every_step(tmp_path))
    fit(resumed, make_data(), tmp_path, resume=tmp_path / "step=3.ckpt")
    assert torch.equal(values(resumed), values(whole))


@pytest.mark.parametrize("anchor", [-1, "atuo", float("nan")])
def test_wrong_anchor_is_refused(toy, anchor):
    with pytest.raises(InputError, match=r"method\.anchor: expected"):
        make_method(toy, anchor=anchor)
