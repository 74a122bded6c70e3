"""Start and result measured on held-out samples, and the start where the result is not better."""

import json
import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from adamerge import Coefficients, ExpertPool, InputError, MergedModel
from adamerge.callbacks import ExportMergedWeights, KeepBest, NeverWorse
from adamerge.callbacks.never_worse import measure
from adamerge.checkpoints.checkpoint import MemoryCheckpoint
from adamerge.methods import GradientMerging
from adamerge.model.batch_norm import BatchNormPolicy
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.results.agreement import Agreement, Comparison
from adamerge.results.report.facts import read_run
from adamerge.results.report.run_page import evidence
from tests.support.fits import QUIET, every_step, fit, make_data, make_method, values
from tests.support.small_resnet import TASKS, SmallBackbone, SmallResNet, trained
from tests.support.small_resnet import data as images

pytestmark = QUIET


def data():
    return make_data(count=40, holdout=0.25)


def by_hand(method, stream_data, coefficients=None):
    """Mean agreement and divergence over tasks, from the model itself."""
    if coefficients is not None:
        with torch.no_grad():
            method.model.coefficients.raw.copy_(coefficients)
    hits, kl = [], []
    for task, stream in stream_data.holdout_streams.items():
        inputs = torch.stack([stream[i].inputs for i in range(len(stream))])
        expert = method.model.expert_parameters(task)
        p, q = (method.model.logits(inputs, task, w).log_softmax(-1) for w in (method.model.merge(), expert))
        hits.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        kl.append((q.exp() * (q - p)).sum(-1).mean().item())
    return sum(hits) / len(hits), sum(kl) / len(kl)


@pytest.mark.parametrize("lr", [0.02, 50.0])
def test_never_worse_ends_with_the_better_of_start_and_result(toy, tmp_path, lr, caplog):
    method, callback = make_method(toy, Imitation(), "row", "none", lr=lr), NeverWorse()
    start, export = values(method), ExportMergedWeights(tmp_path / "out")
    caplog.set_level(logging.INFO, "adamerge")
    stream_data = data()
    fit(method, stream_data, tmp_path, steps=6, callbacks=[callback, export])
    facts = callback.evidence
    before, after = Agreement(**facts["start"]), Agreement(**facts["result"])
    assert (before.agreement, before.kl) == pytest.approx(by_hand(method, stream_data, start), rel=1e-4)
    assert before.rows == after.rows == 15
    good = lr < 1
    assert facts["exported"] == ("result" if good else "start")
    assert facts["kl_error"] == callback.comparison.kl_error > 0
    recipe = json.loads(export.files["recipe"].read_text())
    assert recipe["evidence"] == facts
    exported = json.loads(export.files["coefficients"].read_text())["coefficients"]["red"]
    flat = [value for group in exported.values() for value in (group if isinstance(group, list) else [group])]
    assert (flat == pytest.approx([0.3] * len(flat))) is not good
    assert ("so the start is exported" in caplog.text) is not good
    note = evidence(read_run(tmp_path / "out"))
    assert note.is_warning is not good


def test_start_that_learning_did_not_move_is_exported(toy, tmp_path):
    callback = NeverWorse()
    fit(make_method(toy, Imitation(), lr=0.0), data(), tmp_path, callbacks=[callback])
    assert callback.evidence["exported"] == "start"
    assert callback.evidence["start"] == callback.evidence["result"]


def test_never_worse_after_a_resume_equals_uninterrupted(toy, tmp_path):
    def run(folder, resume=None, **options):
        callback, method = NeverWorse(), make_method(toy, Imitation(), "row", "none", lr=50.0)
        steps = every_step(folder) if resume is None else {"callbacks": []}
        steps["callbacks"].append(callback)
        trainer = fit(method, data(), folder, steps=4, resume=resume, **steps)
        return callback.evidence, values(method), trainer

    whole, learned, trainer = run(tmp_path)
    again, relearned, _ = run(tmp_path, tmp_path / "step=2.ckpt")
    assert again == whole
    assert torch.equal(relearned, learned)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    ended, kept, _ = run(tmp_path, tmp_path / "last.ckpt")
    assert ended == whole
    assert torch.equal(kept, learned)


def test_tasks_without_an_expert_are_not_proved(toy, tmp_path, caplog):
    method = make_method(toy, Entropy())
    method.model.teachers = {}
    callback, stream_data = NeverWorse(), data()
    trainer = fit(method, stream_data, tmp_path, steps=2, callbacks=[callback])
    nothing = {"exported": "result", "start": None, "result": None}
    assert callback.evidence == nothing | {"tasks_without_expert": list(stream_data.streams)}
    assert measure(trainer, method).result() is None
    assert not torch.equal(values(method), torch.full_like(values(method), 0.3))
    assert "no held-out task has an expert" in caplog.text
    method.model.teachers = {"red": "red"}
    assert measure(trainer, method).result().rows == len(stream_data.holdout_streams["red"])


def compared(*tasks):
    """A comparison of tasks, each given as (hits, divergences) of the start and of the result."""
    columns = [
        [
            len(hits),
            sum(hits),
            sum(new_hits),
            sum(kl),
            sum(new_kl),
            sum((a - b) ** 2 for a, b in zip(kl, new_kl, strict=True)),
            sum(a != b for a, b in zip(hits, new_hits, strict=True)),
        ]
        for (hits, kl), (new_hits, new_kl) in tasks
    ]
    return Comparison(torch.tensor(columns, dtype=torch.float64))


def test_error_of_paired_divergences():
    ones, kl = [1] * 4, [0.1, 0.2, 0.3, 0.4]
    for mean in (0.0, 0.5, -0.5):  # the deviations from it are 1, -1, 1 and -1
        after = [k + sign + mean for k, sign in zip(kl, (1, -1, 1, -1), strict=True)]
        comparison = compared(((ones, kl), (ones, after)))
        assert comparison.kl_error == pytest.approx(((1 + mean**2) / 4) ** 0.5)
        assert comparison.is_better is (mean < 0)
    many, few = ((ones * 16, [0.2] * 64), (ones * 16, [0.3] * 64)), (([1], [3.0]), ([1], [1.0]))
    assert compared(many, few).kl_error == pytest.approx((0.1**2 / 64 + 2**2 / 1) ** 0.5 / 2)  # one row decides


def test_agreement_may_fall_by_chance_only_and_divergence_not_at_all():
    def stays_better(lost, won, count=100, kl=0.1):  # by default all samples are nearer to the experts
        before, after = ([1] * a + [0] * b + [1] * (count - lost - won) for a, b in ((lost, won), (0, lost + won)))
        after[lost : lost + won] = [1] * won
        return compared(((before, [0.2] * count), (after, [kl] * count))).is_better

    assert [stays_better(*rows) for rows in ((1, 0), (2, 0), (3, 1), (4, 1), (55, 45), (56, 44))] == [
        True, False, True, False, True, False,
    ]  # fmt: skip
    assert not stays_better(0, 0, kl=0.2)
    assert not stays_better(0, 5, kl=0.21)


def test_tasks_count_alike_and_parts_add_up():
    small, large = (([1], [1.0]), ([0], [2.0])), (([0] * 99, [1.0] * 99), ([1] * 99, [0.0] * 99))
    both = compared(small, large)
    assert (both.start.agreement, both.result.agreement) == (0.5, 0.5)
    assert (both.start.kl, both.result.kl, both.rows) == (1.0, 1.0, 100)
    parts = compared(small, ((large[0][0][:9], large[0][1][:9]), (large[1][0][:9], large[1][1][:9])))
    empty = (([], []), ([], []))
    rest = compared(empty, ((large[0][0][9:], large[0][1][9:]), (large[1][0][9:], large[1][1][9:])))
    assert torch.equal((parts + rest).sums, both.sums)
    assert (rest.start.agreement, rest.rows) == (0.0, 90)


@pytest.mark.parametrize("chooser_is_last", [False, True])
def test_a_resume_of_an_ended_run_keeps_the_start_that_another_callback_would_not(toy, tmp_path, chooser_is_last):
    def run(resume=None):
        callbacks = [KeepBest(every=1), NeverWorse()]
        method = make_method(toy, Entropy(), "row", "none", lr=0.5)
        order = callbacks[::-1] if chooser_is_last and resume is None else callbacks
        trainer = fit(method, data(), tmp_path, callbacks=order, resume=resume)
        assert callbacks[1].evidence["exported"] == "start"
        return trainer, values(method)

    trainer, _ = run()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(run(tmp_path / "last.ckpt")[1], torch.full_like(run()[1], 0.3))


class Learned(Callback):
    """Remembers the coefficients before the proof."""

    def on_fit_end(self, trainer, pl_module):
        self.raw = pl_module.model.coefficients.raw.detach().clone()


def test_both_are_measured_with_the_statistics_that_they_would_be_exported_with(tmp_path):
    models = trained()
    pool = ExpertPool.from_state_dicts(models["base"], {task: models[task] for task in TASKS}, exclude=["fc.*"])
    files = {task: MemoryCheckpoint(task, models[task]) for task in TASKS}
    heads = SmallBackbone().heads(None, files, dict.fromkeys(TASKS))
    model = MergedModel(SmallResNet(), pool, Coefficients(pool, "row", 0.5, "none"), heads)
    policy, streams = BatchNormPolicy("recalibrate", batches=2), images(holdout=0.1)
    policy.start(model)
    adapting, start = dict(model.encoder_buffers), model.coefficients.raw.detach().clone()
    method = GradientMerging(model, Imitation(), optimizer=partial(torch.optim.Adam, lr=0.2))
    callback, learned = NeverWorse(policy), Learned()
    fit(method, streams, tmp_path, steps=2, callbacks=[learned, callback])
    assert all(torch.equal(model.encoder_buffers[name], buffer) for name, buffer in adapting.items())
    for kind, raw in (("start", start), ("result", learned.raw)):
        model.coefficients.raw.data.copy_(raw)
        merge = {name: tensor.detach() for name, tensor in model.merge().items()}
        merge |= policy.final(model, merge, streams)
        kl = []
        for task, stream in streams.holdout_streams.items():
            inputs = torch.stack([stream[i].inputs for i in range(len(stream))])
            expert, ours = (
                model.logits(inputs, task, params).log_softmax(-1) for params in (model.expert_parameters(task), merge)
            )
            kl.append((expert.exp() * (expert - ours)).sum(-1).mean().item())
        assert callback.evidence[kind]["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)


def test_experts_are_asked_about_held_out_samples_before_the_first_step(toy, tmp_path):
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            for task, stream in trainer.datamodule.holdout_streams.items():
                indices = torch.stack([stream[i].indices for i in range(len(stream))])
                assert pl_module.model.teacher_cache.get(task, indices) is not None
            self.has_looked = True

    look = Look()
    fit(make_method(toy, Imitation()), data(), tmp_path, steps=1, callbacks=[look, NeverWorse()])
    assert look.has_looked


def test_never_worse_without_held_out_samples_is_refused(toy, tmp_path):
    with pytest.raises(InputError, match=r"NeverWorse: expected held-out inputs, found none\. Set data\.holdout"):
        fit(make_method(toy), make_data(), tmp_path, callbacks=[NeverWorse()])
