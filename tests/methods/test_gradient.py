"""Gradient merging under Lightning's Trainer: what trains, what it equals, resume, guards, options."""

import functools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.func import functional_call
from torch.nn import functional

from adamerge import Coefficients, GuardError, InputError
from adamerge.methods import GradientMerging
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.results.baselines import LabelledCrossEntropy
from tests.support.fits import QUIET, batches, every_step, fit, make_data, make_method, values
from tests.support.toy import EXPERTS, group_ids, make_toy, run_step

pytestmark = QUIET


def lr_of(lr):
    return functools.partial(torch.optim.SGD, lr=lr)


class Recorder(Callback):
    """Keeps what was logged, and the coefficients, after each batch."""

    def __init__(self):
        self.metrics, self.raw = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({key: value.item() for key, value in trainer.callback_metrics.items()})
        self.raw.append(values(pl_module))

    def losses(self):
        return [metrics["adapt/loss"] for metrics in self.metrics]


# What trains


def test_only_the_coefficients_are_parameters_of_module_optimizer_and_state(toy, tmp_path):
    method = make_method(toy)
    trainer = fit(method, batches(toy, 1), tmp_path, steps=1)
    assert [name for name, p in method.named_parameters() if p.requires_grad] == ["model.coefficients.raw"]
    assert [name for name, _ in method.named_parameters()] == ["model.coefficients.raw"]
    (group,) = trainer.optimizers[0].param_groups
    assert [id(p) for p in group["params"]] == [id(method.model.coefficients.raw)]
    assert list(method.state_dict()) == ["model.coefficients.raw"]


def test_fit_leaves_base_experts_encoder_and_heads_bit_identical(toy, tmp_path):
    method = make_method(toy, Imitation(), "row")
    pool = method.model.pool

    def snapshot():
        tensors = [toy.base, *toy.experts.values(), toy.encoder.state_dict(), pool.base]
        tensors += [{name: pool.task_vectors(name) for name in pool.names}]
        tensors += [head.state_dict() for head in (*toy.heads.values(), *method.model.heads.values())]
        return [{name: tensor.clone() for name, tensor in state.items()} for state in tensors]

    before, start = snapshot(), values(method)
    fit(method, make_data(), tmp_path, steps=3)
    assert not torch.equal(values(method), start)
    for first, second in zip(before, snapshot(), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(p.grad is None for p in toy.encoder.parameters())


def test_fit_keeps_encoder_and_heads_in_eval_mode(toy, tmp_path):
    method = make_method(toy)
    modes = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modules = [pl_module.model.encoder, *pl_module.model.heads.values()]
            modes.extend(m.training for root in modules for m in root.modules())

    fit(method, batches(toy, 2), tmp_path, steps=2, callbacks=[Look()])
    assert modes
    assert not any(modes)


# What it computes


def test_fit_layer_wise_clamp_adam_equals_adamerging_by_plain_autograd(toy, tmp_path):
    """50 steps of AdaMerging's setting: the sum over tasks of mean entropies, Adam with lr 1e-3, clamp."""
    lr, steps = 1e-3, 50
    method = make_method(toy, constraint="clamp", lr=lr, init=0.02, reduction="sum")
    fit(method, batches(toy, steps), tmp_path, steps=steps)

    base = {name: tensor for name, tensor in toy.base.items() if tensor.is_floating_point()}
    names = list(base)
    raw = torch.full((len(EXPERTS), len(names)), 0.02, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=lr)
    for _ in range(steps):
        weights = raw.clamp(0, 1)
        params = {
            name: base[name] + sum(weights[e, n] * (toy.experts[x][name] - base[name]) for e, x in enumerate(EXPERTS))
            for n, name in enumerate(names)
        }
        loss = torch.zeros(())
        for task in EXPERTS:
            logits = toy.heads[task](functional_call(toy.encoder, params, (toy.inputs[task],)))
            log_p = logits.log_softmax(-1)
            loss = loss - (log_p.exp() * log_p).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ours = method.model.coefficients
    columns = [int(group_ids(ours.index, name, base[name].shape).unique()) for name in names if name in ours.groups]
    kept = [n for n, name in enumerate(names) if name in ours.groups]
    expected, got = raw.detach()[:, kept], ours.raw.detach()[:, columns]
    assert (expected - 0.02).abs().max() > 0.02  # it moved
    assert (expected < 0).any()  # and met the clamp
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_training_step_value_is_the_loss_and_gradient_the_engines(reduction, monkeypatch):
    toy = make_toy(torch.float64)
    weights = {"red": 2.0, "blue": 0.5}
    method = make_method(toy, constraint="sigmoid", reduction=reduction, task_weights=weights)
    seen = {}
    run = method.run

    def remember(*args, **kwargs):
        loss, seen["result"] = run(*args, **kwargs)
        return loss, seen["result"]

    method.run = remember
    plain = SimpleNamespace(precision_plugin=None, global_step=0, world_size=1)
    monkeypatch.setattr(GradientMerging, "trainer", plain)
    monkeypatch.setattr(GradientMerging, "global_step", 0)
    monkeypatch.setattr(method, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(method, "log_dict", lambda *args, **kwargs: None)
    loss = method.training_step(next(iter(batches(toy, 1))), 0)
    result = seen["result"]
    share = 1 / 3 if reduction == "mean" else 1.0
    expected = sum(result.losses[task] * weights.get(task, 1.0) * share for task in EXPERTS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, method.model.coefficients.raw)
    (through,) = torch.autograd.grad(
        (method.model.coefficients() * result.gradient).sum(), method.model.coefficients.raw
    )
    assert torch.equal(gradient, through)

    # and both are those of plain autograd on the explicit sum
    params = method.model.merge()
    total = torch.zeros((), dtype=torch.float64)
    for task in EXPERTS:
        log_p = method.model.logits(toy.inputs[task], task, params).log_softmax(-1)
        total = total - (log_p.exp() * log_p).sum(-1).mean() * weights.get(task, 1.0) * share
    (plain_gradient,) = torch.autograd.grad(total, method.model.coefficients.raw)
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-9, atol=1e-12)


def test_fit_reduction_sum_moves_as_far_as_mean_times_the_tasks(toy, tmp_path):
    moved = {}
    for reduction in ("mean", "sum"):
        method = make_method(toy, constraint="none", optimizer=lr_of(1e-2), reduction=reduction)
        recorder = Recorder()
        fit(method, batches(toy, 1), tmp_path, steps=1, callbacks=[recorder])
        moved[reduction] = (values(method) - 0.3, recorder.losses()[0])
    torch.testing.assert_close(moved["sum"][0], 3 * moved["mean"][0], rtol=1e-4, atol=1e-7)
    assert moved["sum"][1] == pytest.approx(3 * moved["mean"][1], rel=1e-5)


def test_fit_task_weight_zero_is_as_if_the_task_were_absent(toy, tmp_path):
    ignored = make_method(toy, optimizer=lr_of(0.1), reduction="sum", task_weights={"green": 0.0})
    fit(ignored, make_data(), tmp_path, steps=3)
    data = make_data()
    del data.streams["green"]
    absent = make_method(toy, optimizer=lr_of(0.1), reduction="sum")
    fit(absent, data, tmp_path, steps=3)
    torch.testing.assert_close(values(ignored), values(absent), rtol=0, atol=1e-6)
    assert not torch.equal(values(absent), torch.full_like(values(absent), 0.3))


def test_fit_lowers_the_loss(toy, tmp_path):
    for objective in (Entropy(), Imitation()):
        recorder = Recorder()
        fit(make_method(toy, objective, "row"), batches(toy, 20), tmp_path, steps=20, callbacks=[recorder])
        assert recorder.losses()[-1] < 0.9 * recorder.losses()[0]


def test_fit_logs_losses_by_task_and_the_coefficients(toy, tmp_path):
    recorder = Recorder()
    method = make_method(toy, optimizer=lr_of(0.0))
    fit(method, batches(toy, 1), tmp_path, steps=1, callbacks=[recorder])
    metrics = recorder.metrics[0]
    tasks = [metrics[f"adapt/loss/{task}"] for task in EXPERTS]
    assert metrics["adapt/loss"] == pytest.approx(sum(tasks) / 3, rel=1e-5)
    assert metrics["adapt/coefficient"] == pytest.approx(0.3, rel=1e-5)
    assert metrics["adapt/coefficient/min"] == metrics["adapt/coefficient/max"] == pytest.approx(0.3)
    assert metrics["adapt/travel"] == 0


@pytest.mark.parametrize("constraint", ["box", "simplex"])
def test_fit_projects_after_each_step(toy, tmp_path, constraint):
    recorder = Recorder()
    method = make_method(toy, constraint=constraint, lr=0.5, init="mean")
    fit(method, batches(toy, 4), tmp_path, steps=4, callbacks=[recorder])
    for raw in recorder.raw:
        assert raw.min() >= 0
        assert raw.max() <= 1
        assert constraint == "box" or torch.allclose(raw.sum(0), torch.ones(raw.shape[1]), atol=1e-6)
    assert (recorder.raw[-1] == 0).any()  # the projection had something to do


def test_fit_gradient_clipping_bounds_the_step(toy, tmp_path):
    limit, lr = 1e-3, 1.0
    free = make_method(toy, constraint="none", optimizer=lr_of(lr))
    fit(free, batches(toy, 1), tmp_path, steps=1)
    clipped = make_method(toy, constraint="none", optimizer=lr_of(lr))
    fit(clipped, batches(toy, 1), tmp_path, steps=1, gradient_clip_val=limit)
    step, short = values(free) - 0.3, values(clipped) - 0.3
    assert step.norm() > 10 * limit
    assert short.norm().item() == pytest.approx(limit, rel=1e-3)
    torch.testing.assert_close(short / short.norm(), step / step.norm(), rtol=0, atol=1e-3)


def test_fit_accumulated_batches_step_on_their_mean_gradient(toy, tmp_path):
    accumulated = make_method(toy, constraint="none", optimizer=lr_of(0.1))
    fit(accumulated, make_data(batch_size=2, count=16), tmp_path, steps=1, accumulate_grad_batches=2)
    whole = make_method(toy, constraint="none", optimizer=lr_of(0.1))
    fit(whole, make_data(batch_size=4, count=16), tmp_path, steps=1)
    assert (values(whole) - 0.3).abs().max() > 1e-4
    torch.testing.assert_close(values(accumulated), values(whole), rtol=0, atol=1e-6)


def test_fit_scheduler_is_stepped_once_per_optimizer_step(toy, tmp_path):
    rates = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    scheduler = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    method = make_method(toy, lr=0.08, scheduler=scheduler)
    fit(method, batches(toy, 6), tmp_path, steps=3, callbacks=[Look()], accumulate_grad_batches=2)
    assert rates == pytest.approx([0.08, 0.08, 0.04, 0.04, 0.02, 0.02])


@pytest.mark.parametrize("micro_batch", [4, 8])
def test_fit_micro_batch_changes_nothing_but_rounding(toy, tmp_path, micro_batch):
    results = []
    for limit in (None, micro_batch):
        method = make_method(toy, optimizer=lr_of(0.1), micro_batch=limit)
        fit(method, batches(toy, 3), tmp_path, steps=3)
        results.append(values(method))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_fit_bf16_mixed_is_close_and_keeps_float32_coefficients(toy, tmp_path):
    results = {}
    for precision in ("32-true", "bf16-mixed"):
        method = make_method(toy, Imitation(), optimizer=lr_of(0.3))
        fit(method, make_data(), tmp_path, steps=4, precision=precision)
        results[precision] = values(method)
    assert results["bf16-mixed"].dtype == torch.float32
    moved = (results["32-true"] - 0.3).abs().max()
    assert moved > 0.01
    assert not torch.equal(results["bf16-mixed"], results["32-true"])  # autocast was on
    assert (results["bf16-mixed"] - results["32-true"]).abs().max() < 0.1 * moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", [Entropy, Imitation])
def test_half_precision_gradient_points_the_same_way(toy, dtype, objective):
    pool = toy.pool()
    model = toy.model(pool, Coefficients(pool, "row"))
    exact = run_step(model, objective(), toy)
    with torch.autocast("cpu", dtype):
        half = run_step(model, objective(), toy, scale=1024.0)
    assert all(torch.isfinite(loss) for loss in half.losses.values())
    assert half.gradient.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half.gradient.flatten(), exact.gradient.flatten(), dim=0) > 0.99


# Without the data module


def test_fit_plain_loader_with_imitation_asks_teachers_lazily(toy, tmp_path):
    lazy = make_method(toy, Imitation())
    asked = []
    outputs = lazy.model.expert_outputs
    lazy.model.expert_outputs = lambda expert, *rest: asked.append(expert) or outputs(expert, *rest)
    fit(lazy, batches(toy, 3), tmp_path, steps=3)
    assert asked == list(EXPERTS)  # once per task; later steps find them in the cache
    assert not torch.equal(values(lazy), torch.full_like(values(lazy), 0.3))


def test_fit_data_module_asks_each_teacher_once_for_what_is_visited(toy, tmp_path):
    method = make_method(toy, Imitation())
    asked = []
    outputs = method.model.expert_outputs

    def remember(expert, inputs, hidden):
        inputs = list(inputs)
        asked.append((expert, sum(len(batch) for _, batch in inputs)))
        return outputs(expert, inputs, hidden)

    method.model.expert_outputs = remember
    fit(method, make_data(batch_size=2, count=40), tmp_path, steps=3)  # 20 images adapt, 6 of them in 3 steps
    assert asked == [(expert, 6) for expert in EXPERTS]


def test_fit_labelled_oracle_runs_on_the_same_streams(toy, tmp_path):
    data = make_data()
    labels = {task: torch.zeros(len(stream), dtype=torch.long) for task, stream in data.streams.items()}
    recorder = Recorder()
    fit(make_method(toy, LabelledCrossEntropy(labels), "row"), data, tmp_path, steps=20, callbacks=[recorder])
    assert recorder.losses()[-1] < recorder.losses()[0]


# The same again


def test_fit_same_seed_gives_the_same_bits(toy, tmp_path):
    results = []
    for seed in (0, 0, 1):
        method = make_method(toy, Imitation())
        fit(method, make_data(seed=seed), tmp_path, steps=4)
        results.append(values(method))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("objective", "granularity", "constraint", "count"),
    [(Entropy(), "layer", "clamp", 14), (Imitation(), "row", "box", 14), (Imitation(), "layer", "simplex", 60)],
)
def test_fit_resumed_from_the_middle_equals_uninterrupted(
    toy, tmp_path, accumulate, objective, granularity, constraint, count
):
    def new():
        return make_method(toy, objective, granularity, constraint, lr=0.2)

    def data():
        return make_data(batch_size=3, count=count)

    whole = new()
    options = {"accumulate_grad_batches": accumulate}
    fit(whole, data(), tmp_path, steps=7, **options, **every_step(tmp_path))
    resumed = new()
    trainer = fit(resumed, data(), tmp_path, steps=7, resume=tmp_path / "step=3.ckpt", **options)
    assert trainer.global_step == 7
    assert torch.equal(values(resumed), values(whole))
    middle = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]["model.coefficients.raw"]
    assert not torch.equal(middle, values(whole))


def test_fit_resumed_with_a_scheduler_equals_uninterrupted(toy, tmp_path):
    def new():
        scheduler = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6)
        return make_method(toy, scheduler=scheduler, lr=0.2)

    whole = new()
    fit(whole, make_data(), tmp_path, **every_step(tmp_path))
    resumed = new()
    fit(resumed, make_data(), tmp_path, resume=tmp_path / "step=4.ckpt")
    assert torch.equal(values(resumed), values(whole))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_fit_resumed_in_any_epoch_equals_uninterrupted(toy, tmp_path, num_workers):
    """Without max_steps an epoch is one pass over the longest stream."""

    def run(method, **options):
        data = make_data(batch_size=3, count=14, num_workers=num_workers)  # 7 images: 2 steps an epoch
        return fit(method, data, tmp_path, **{"steps": -1, "max_epochs": 3, **options})

    whole = make_method(toy)
    assert run(whole, **every_step(tmp_path)).global_step == 6
    for step in (1, 2, 3) if num_workers == 0 else (3,):
        resumed = make_method(toy)
        assert run(resumed, resume=tmp_path / f"step={step}.ckpt").global_step == 6
        assert torch.equal(values(resumed), values(whole))


def test_checkpoint_is_small_and_holds_the_coefficients_only(toy, tmp_path):
    method = make_method(toy, Imitation())
    fit(method, make_data(), tmp_path, steps=1, **every_step(tmp_path))
    path = tmp_path / "step=1.ckpt"
    content = torch.load(path, weights_only=True)
    assert list(content["state_dict"]) == ["model.coefficients.raw"]
    assert torch.equal(content["state_dict"]["model.coefficients.raw"], values(method))
    assert path.stat().st_size < 20_000


# Guards


def poisoned(task, at, value=math.nan):
    """Entropy, and on one task from one step on a bad loss."""
    calls = []

    def objective(step):
        calls.append(step.task)
        loss = Entropy()(step)
        return loss * value if step.task == task and calls.count(task) > at else loss

    return objective


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_fit_bad_loss_stops_with_the_tasks_name_and_the_last_good_coefficients(toy, tmp_path, value):
    good = make_method(toy)
    fit(good, batches(toy, 2), tmp_path, steps=2)
    method = make_method(toy, poisoned("green", at=2, value=value))
    with pytest.raises(GuardError, match=r"Step 2: the loss of task 'green' is (nan|inf) on .*lower the learning rate"):
        fit(method, batches(toy, 5), tmp_path, steps=5)
    assert torch.equal(values(method), values(good))


def test_fit_bad_gradient_stops_with_expert_and_group_and_keeps_the_coefficients(toy, tmp_path):
    def objective(step):
        zero = (step.outputs.logits * 0).sum()
        return Entropy()(step) + zero.sqrt()  # finite, but its derivative is infinite times zero

    method = make_method(toy, objective)
    with pytest.raises(
        GuardError, match=r"Step 0: the gradient of the coefficient of expert 'red', group '.+' is not finite: tensor"
    ):
        fit(method, batches(toy, 1), tmp_path, steps=1)
    assert torch.equal(values(method), torch.full_like(values(method), 0.3))


class Broken:
    """An objective that returns the wrong thing."""

    hidden_layers = ()

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, step):
        return self.answer(step)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda step: step.outputs.logits.sum(-1),
            r"Broken must return a scalar tensor, found a tensor of shape \(4,\)",
        ),
        (lambda step: 0.5, "Objective Broken must return a scalar tensor, found float"),
        (lambda step: None, "Objective Broken must return a scalar tensor, found NoneType"),
        (lambda step: step.outputs.logits.detach().sum(), r"Objective Broken .*does not depend .*task 'red'"),
        (lambda step: torch.zeros(()), r"Objective Broken .*does not depend"),
    ],
    ids=["vector", "number", "none", "detached", "constant"],
)
def test_fit_objective_that_returns_the_wrong_thing_is_named(toy, tmp_path, answer, message):
    method = make_method(toy, Broken(answer))
    with pytest.raises(InputError, match=message):
        fit(method, batches(toy, 1), tmp_path, steps=1)
    assert torch.equal(values(method), torch.full_like(values(method), 0.3))


def test_fit_objective_hidden_layers_are_captured_for_merged_model_and_teacher(toy, tmp_path):
    class Match:
        uses_teacher = True
        hidden_layers = ("blocks.*.down",)

        def __call__(self, step):
            own, teacher = step.outputs.hidden, step.teacher().hidden
            assert set(own) == set(teacher) == {"blocks.0.down", "blocks.1.down"}
            return sum(functional.mse_loss(own[name], teacher[name]) for name in own)

    recorder = Recorder()
    fit(make_method(toy, Match(), "row"), make_data(), tmp_path, steps=12, callbacks=[recorder])
    assert recorder.losses()[-1] < recorder.losses()[0]


def test_gradient_merging_options_are_checked(toy):
    with pytest.raises(InputError, match="objective: expected a callable that takes a TaskStep, found 'entropy'"):
        make_method(toy, "entropy")
    with pytest.raises(InputError, match=re.escape("method.reduction: expected 'mean' or 'sum', found 'average'")):
        make_method(toy, reduction="average")


def test_fit_task_weight_of_an_unknown_task_is_refused(toy, tmp_path):
    with pytest.raises(InputError, match=r"method\.task_weights: no task 'gren'\. Did you mean 'green'\?"):
        fit(make_method(toy, task_weights={"gren": 2.0}), make_data(), tmp_path, steps=1)


def test_fit_imitation_of_a_task_without_expert_is_refused(toy, tmp_path):
    toy.heads["grey"] = toy.heads["red"]
    data = make_data()
    data.streams["grey"] = data.streams.pop("red")
    with pytest.raises(InputError, match="Task 'grey' has no expert of its own name to imitate"):
        fit(make_method(toy, Imitation()), data, tmp_path, steps=1)
