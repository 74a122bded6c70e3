"""Held-out unlabeled images: what is held out, the best coefficients of a run, early stopping, resume."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from adamerge import InputError
from adamerge.callbacks import ExportMergedWeights, KeepBest
from adamerge.objectives.imitation import Imitation
from tests.support.fits import QUIET, batches, every_step, fit, make_data, make_method, values
from tests.support.toy import EXPERTS

pytestmark = QUIET


class Values(Callback):
    """Keeps the coefficients after each batch."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(values(pl_module))


def held_out(**options):
    return make_data(count=40, holdout=0.25, **options)


def test_holdout_divides_the_adaptation_images_and_numbers_them_apart():
    data, whole = held_out(), make_data(count=40)
    for task in EXPERTS:
        adapt, rest = data.streams[task], data.holdout_streams[task]
        assert (len(adapt), len(rest)) == (15, 5)
        images = [stream[i].inputs for stream in (adapt, rest) for i in range(len(stream))]
        expected = [whole.streams[task][i].inputs for i in range(20)]
        key = lambda image: image.flatten().tolist()  # noqa: E731
        assert sorted(map(key, images)) == sorted(map(key, expected))
        indices = [int(stream[i].indices) for stream in (adapt, rest) for i in range(len(stream))]
        assert indices == list(range(20))
    seen = [part for batch in data.holdout_batches() for part in batch["green"].indices.tolist()]
    assert seen == [15, 16, 17, 18, 19]
    assert list(whole.holdout_batches()) == []


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_holdout_share_is_checked(share):
    with pytest.raises(InputError, match=r"data\.holdout: expected a number in \[0, 1\)"):
        make_data(holdout=share)
    with pytest.raises(InputError, match=r"data\.holdout: 0\.9 of 2 inputs of 'red' leaves none to adapt on"):
        make_data(count=4, holdout=0.9)
    with pytest.raises(
        InputError, match=r"auto of 1 inputs of .* leaves none .* expected more inputs, or none held out"
    ):
        make_data(count=2, holdout="auto")


@pytest.mark.parametrize(("count", "expected"), [(240, 24), (1000, 64)])
def test_a_fifth_is_held_out_but_no_more_than_is_of_use(count, expected):
    data = make_data(count=count, holdout="auto")
    assert {len(stream) for stream in data.holdout_streams.values()} == {expected}
    assert data.folds == 0


@pytest.mark.parametrize(("count", "folds"), [(4, 2), (6, 3), (8, 4), (40, 4)])
def test_few_inputs_are_held_out_part_after_part(count, folds):
    data = make_data(count=count, holdout="auto", views=None)
    assert data.folds == folds
    assert not data.holdout_streams
    for task, stream in data.streams.items():
        whole = {tuple(stream[i].inputs.flatten().tolist()) for i in range(len(stream))}
        parts = []
        for number in range(folds):
            fold = data.fold(number)
            adapt, held_out = fold.streams[task], fold.holdout_streams[task]
            parts += [tuple(held_out[i].inputs.flatten().tolist()) for i in range(len(held_out))]
            rest = {tuple(adapt[i].inputs.flatten().tolist()) for i in range(len(adapt))}
            assert rest == whole.difference(parts[-len(held_out) :])
        assert (len(parts), set(parts)) == (len(stream), whole)


def brute_force(method, data):
    """The mean over tasks of the divergence on the held-out images, from the model itself."""
    total, params = 0.0, method.model.merge()
    for task, stream in data.holdout_streams.items():
        inputs = torch.stack([stream[i].inputs for i in range(len(stream))])
        expert = method.model.expert_parameters(task)
        p, q = (method.model.logits(inputs, task, w).log_softmax(-1) for w in (params, expert))
        total += (q.exp() * (q - p)).sum(-1).mean().item() / len(data.holdout_streams)
    return total


def test_keep_best_ends_with_the_coefficients_of_the_lowest_holdout_loss(toy, tmp_path):
    data, keep, trace = held_out(), KeepBest(every=2), Values()
    method = make_method(toy, Imitation(), "row", "none", lr=0.5)  # far too large: it overshoots
    export = ExportMergedWeights(tmp_path / "out")
    trainer = fit(method, data, tmp_path, steps=10, callbacks=[keep, trace, export])
    step, loss = keep.best
    assert trainer.global_step == 10
    assert step < 10
    start = torch.full_like(values(method), 0.3)
    assert torch.equal(values(method), trace.values[step - 1] if step else start)
    assert loss == pytest.approx(brute_force(method, data), rel=1e-4)
    with torch.no_grad():
        method.model.coefficients.raw.copy_(trace.values[-1])
    assert loss < brute_force(method, data)
    exported = json.loads(export.files["coefficients"].read_text())
    assert exported["format"] == 1


def test_keep_best_stops_when_patience_has_run_out(toy, tmp_path):
    keep = KeepBest(every=1, patience=3)
    ascent = make_method(toy, Imitation(), "row", "none", optimizer=lambda p: torch.optim.SGD(p, lr=5.0, maximize=True))
    trainer = fit(ascent, held_out(), tmp_path, steps=50, callbacks=[keep])
    assert trainer.global_step == 3
    assert keep.best[0] == 0
    assert torch.equal(values(ascent), torch.full_like(values(ascent), 0.3))


def test_keep_best_resumed_equals_uninterrupted(toy, tmp_path):
    def run(**options):
        method, keep = make_method(toy, Imitation(), "row", "none", lr=0.3), KeepBest(every=2)
        own = every_step(tmp_path) if "resume" not in options else {}
        own["callbacks"] = [keep, *own.get("callbacks", [])]
        fit(method, held_out(), tmp_path, steps=8, **own, **options)
        return values(method), keep.best

    whole = run()
    for step in (1, 4, 8):
        resumed = run(resume=tmp_path / f"step={step}.ckpt")
        assert resumed[1] == whole[1]
        assert torch.equal(resumed[0], whole[0])


def test_keep_best_needs_held_out_images_and_checks_its_options(toy, tmp_path):
    for data in (make_data(), batches(toy, 1)):
        with pytest.raises(InputError, match=r"KeepBest: expected held-out inputs, found none\. Set data\.holdout"):
            fit(make_method(toy), data, tmp_path, steps=1, callbacks=[KeepBest()])
    with pytest.raises(InputError, match=r"KeepBest\.every: .*>= 1, found 0"):
        KeepBest(every=0)
    with pytest.raises(InputError, match=r"KeepBest\.patience: .*>= 1"):
        KeepBest(patience=0)
