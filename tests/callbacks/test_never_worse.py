"""Start and result measured on held-out samples, and the start where the result is not better."""

import json
import logging

import pytest
import torch

from adamerge import InputError
from adamerge.callbacks import ExportMergedWeights, NeverWorse
from adamerge.callbacks.never_worse import measure
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.results.agreement import Agreement, Comparison
from adamerge.results.report.facts import read_run
from adamerge.results.report.run_page import evidence
from tests.support.fits import QUIET, every_step, fit, make_data, make_method, values

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
        ]
        for (hits, kl), (new_hits, new_kl) in tasks
    ]
    return Comparison(torch.tensor(columns, dtype=torch.float64))


def test_error_of_paired_divergences():
    ones, kl = [1] * 4, [0.1, 0.2, 0.3, 0.4]
    for mean in (0.0, 0.5, -0.5):  # the deviations from it are 1, -1, 1 and -1
        after = [k + sign + mean for k, sign in zip(kl, (1, -1, 1, -1), strict=True)]
        comparison = compared(((ones, kl), (ones, after)))
        assert comparison.kl_error == pytest.approx((4 / 3 / 4) ** 0.5)
        assert comparison.is_better is (mean < 0)


def test_agreement_may_fall_by_chance_only_and_divergence_not_at_all():
    start, nearer = [0.2] * 100, [0.1] * 100

    def stays_better(count, before, after):  # in agreement; all samples are nearer to the experts
        hits = [[1] * number + [0] * (count - number) for number in (before, after)]
        return compared(((hits[0], start[:count]), (hits[1], nearer[:count]))).is_better

    assert [stays_better(100, 90, after) for after in (86, 85)] == [True, False]  # the standard error is 0.047
    assert [stays_better(18, 18, after) for after in (17, 15)] == [True, False]
    assert not compared((([1], start[:1]), ([1], start[:1]))).is_better


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


def test_never_worse_without_held_out_samples_is_refused(toy, tmp_path):
    with pytest.raises(InputError, match=r"NeverWorse: expected held-out inputs, found none\. Set data\.holdout"):
        fit(make_method(toy), make_data(), tmp_path, callbacks=[NeverWorse()])
