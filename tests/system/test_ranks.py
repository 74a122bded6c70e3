"""Runs on several processes: the same result as one process with the batches of all of them."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import TensorDataset

from adamerge.callbacks import CollapseGuard, KeepBest
from adamerge.data.datasets import Unlabeled
from adamerge.data.streams import Steps
from adamerge.errors import GuardError
from adamerge.methods import FrankWolfeMerging
from adamerge.model.coefficients import Coefficients
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.system import ranks
from tests.support.fits import QUIET, every_step, fit, make_method, values
from tests.support.processes import run_ranks
from tests.support.rank_data import COUNTS, BadOnSecond, make_data
from tests.support.toy import EXPERTS, make_toy

pytestmark = QUIET


def trained(
    folder, batch_size, objective=Entropy, dtype=torch.float64, steps=5, method=make_method, trainer=None, **data
):
    """Fit, and return what the first process would export, and what all report."""
    merging = method(make_toy(dtype), objective())
    settings = {"strategy": DDPStrategy(), "devices": ranks.count()} if ranks.count() > 1 else {}
    done = fit(merging, make_data(batch_size, dtype=dtype, **data), folder, steps, **settings, **(trainer or {}))
    return values(merging), float(done.callback_metrics["adapt/loss"])


def frank_wolfe(toy, objective, **options):
    pool = toy.pool()
    model = toy.model(pool, Coefficients(pool, "layer", "mean", "simplex"))
    return FrankWolfeMerging(model, objective, **options)


CASES = {
    "entropy": {},
    "imitation, limit": {"objective": Imitation, "limit": 5},
    "two batches per step": {"batches_per_step": 2, "counts": dict.fromkeys(EXPERTS, 16)},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
    "limited batches": {"trainer": {"limit_train_batches": 2}},
    "tasks": {"objective": Imitation, "distribute": "tasks"},
    "line search": {"method": partial(frank_wolfe, step_rule="line_search")},
    "soft, tasks": {"method": partial(frank_wolfe, mode="soft", inner_steps=2), "distribute": "tasks"},
}

FAST = ("entropy", "tasks", "line search")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_two_processes_learn_what_one_does(case, tmp_path):
    options = CASES[case]
    whole, loss = trained(tmp_path, 8, **options)
    found = run_ranks(partial(trained, tmp_path, 4, **options), 2)
    for part, part_loss in found:
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)
        assert part_loss == pytest.approx(loss, abs=1e-10)
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("distribute", ["samples", "tasks"])
def test_four_processes_learn_what_one_does_though_some_have_nothing_to_do(distribute, tmp_path):
    counts = {"red": 3, "green": 2, "blue": 1}
    whole, _ = trained(tmp_path, 8, steps=3, counts=counts)
    for part, _ in run_ranks(partial(trained, tmp_path, 2, steps=3, counts=counts, distribute=distribute), 4):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_in_single_precision_processes_agree_to_rounding(tmp_path):
    whole, _ = trained(tmp_path, 8, dtype=torch.float32)
    for part, _ in run_ranks(partial(trained, tmp_path, 4, dtype=torch.float32), 2):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)


def exchanged(folder):
    """Count the bytes that torch reduces in each step, and those that it would broadcast."""
    merging = make_method(make_toy(torch.float64))
    sent, broadcast = [], []

    def hook(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    def attach(trainer, module):
        trainer.strategy.model.register_comm_hook(None, hook)
        broadcast.extend(trainer.strategy.model.modules_buffers)

    counting = LambdaCallback(on_train_start=attach)
    fit(merging, make_data(4), folder, 3, strategy=DDPStrategy(), devices=2, callbacks=[counting])
    return sent, broadcast, merging.model.coefficients().numel()


def test_only_the_coefficients_gradient_is_exchanged(tmp_path):
    for sent, broadcast, count in run_ranks(partial(exchanged, tmp_path), 2):
        assert sent == [8 * count] * 3
        assert broadcast == []


def interrupted_and_resumed(folder):
    fit(make_method(make_toy(torch.float64)), make_data(4), folder, 5, strategy="ddp", devices=2, **every_step(folder))
    merging = make_method(make_toy(torch.float64))
    fit(merging, make_data(4), folder, 5, resume=folder / "step=2.ckpt", strategy="ddp", devices=2)
    return values(merging)


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_goes_on_as_one_would(tmp_path):
    whole, _ = trained(tmp_path, 8)
    for part in run_ranks(partial(interrupted_and_resumed, tmp_path), 2):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)


def guarded(folder, batch_size, distribute="samples"):
    guard, best = CollapseGuard(window=2, disagreement=0.1), KeepBest(every=2)
    counts = {"red": 20, "green": 12, "blue": 6}
    options = {"holdout": 0.5, "counts": counts, "distribute": distribute, "trainer": {"callbacks": [guard, best]}}
    found = trained(folder, batch_size, **options)
    return found, {task: guard._criteria.criteria(task) for task in guard._criteria.steps}, best.best


@pytest.mark.parametrize("distribute", ["samples", pytest.param("tasks", marks=pytest.mark.slow)])
def test_guards_see_the_same_on_two_processes_as_on_one(distribute, tmp_path):
    (whole, _), watched, best = guarded(tmp_path, 6)
    for (part, _), now, kept in run_ranks(partial(guarded, tmp_path, 3, distribute), 2):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)
        assert {task: pytest.approx(pair, abs=1e-6) for task, pair in watched.items()} == now
        assert kept == pytest.approx(best)


def stopped(folder):
    with pytest.raises(GuardError) as caught:
        trained(folder, 4, objective=BadOnSecond)
    return str(caught.value)


def test_what_goes_wrong_on_one_process_stops_all_with_the_same_words(tmp_path):
    first, second = run_ranks(partial(stopped, tmp_path), 2)
    assert first == second
    assert "'red' is nan" in first


class BadOnceOnSecond(BadOnSecond):
    """Entropy that is not a number for one task on the second process, at its third call only."""

    def __call__(self, step):
        loss = super().__call__(step)
        return Entropy()(step) if self.calls > 3 else loss


def skipping(folder):
    merging = make_method(make_toy(torch.float64), BadOnceOnSecond(), on_nonfinite="skip")
    fit(merging, make_data(4), folder, 4, strategy="ddp", devices=2)
    return values(merging), merging.skipped


def test_a_step_that_one_process_must_skip_is_skipped_by_all(tmp_path):
    (first, skipped), (second, also) = run_ranks(partial(skipping, tmp_path), 2)
    assert skipped == also == 1
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("by_task", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_parts_of_a_step_are_the_whole_step(world, by_task):
    streams = {task: Unlabeled(TensorDataset(torch.randn(count, 1))) for task, count in COUNTS.items()}
    whole = Steps(streams, 30, 0, 0, 1)
    parts = [Steps(streams, 30 // world, 0, rank, world, by_task) for rank in range(world)]
    for step in range(3):
        for task in streams:
            found = [part[step][task].indices for part in parts if task in part[step]]
            assert torch.equal(torch.cat(found), whole[step][task].indices)
    for task in streams:
        assert sum(part.share(task) for part in parts) == pytest.approx(world)
        assert {i for part in parts for i in part.visited(task, 2)} == set(whole.visited(task, 2))
