import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from adamerge import Coefficients, ExpertPool, InputError, MergedModel
from adamerge.model.granularity import Chunk
from adamerge.objectives.entropy import softmax_entropy
from tests.support.toy import (
    CLASSES,
    EXPERTS,
    ToyEncoder,
    make_toy,
    merge_by_formula,
    perturbed,
    run_engine,
    run_step,
    squares,
)  # fmt: skip

GRANULARITIES = ["task", "block", "layer", Chunk({"proj": 0}, default=3), "row", "column"]


def entropy(step):
    return softmax_entropy(step.outputs.logits).mean()


def make_model(toy, granularity="layer", **options) -> MergedModel:
    pool = toy.pool()
    return toy.model(pool, Coefficients(pool, granularity, init=0.3, constraint="none"), **options)


def by_plain_autograd(toy, model, loss, weights=None, tasks=EXPERTS):
    """Losses and the gradient in the raw coefficients, through the formula and one forward per task."""
    params = merge_by_formula(model.pool, model.coefficients.index, model.coefficients())
    losses = {}
    for task in tasks:
        buffers = dict(toy.encoder.named_buffers())
        features = functional_call(
            toy.encoder, {**model.pool.fixed, **params, **buffers}, (toy.inputs[task],), strict=True
        )
        losses[task] = loss(toy.heads[task](features))
    total = sum(loss * (weights or {}).get(task, 1.0) for task, loss in losses.items())
    return losses, torch.autograd.grad(total, model.coefficients.raw)[0]


def in_raw(model, result):
    """The engine's gradient in the coefficients, as one in the raw tensor (frozen groups have none)."""
    return torch.autograd.grad((model.coefficients() * result.gradient).sum(), model.coefficients.raw)[0]


def snapshot(toy, pool):
    tensors = {f"encoder {k}": v for k, v in toy.encoder.state_dict().items()}
    tensors |= {f"base {k}": v for k, v in {**toy.base, **pool.base}.items()}
    tensors |= {f"{name} {k}": v for name, state in toy.experts.items() for k, v in state.items()}
    tensors |= {f"tau {name}": pool.task_vectors(name) for name in pool.names}
    tensors |= {f"head {task} {k}": v for task, head in toy.heads.items() for k, v in head.state_dict().items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


# What trains


def test_exactly_one_parameter_trains(toy):
    model = make_model(toy)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["coefficients.raw"]
    assert list(model.state_dict()) == ["coefficients.raw"]
    assert [name for name, _ in model.named_buffers()] == ["coefficients.initial"]


def test_steps_leave_base_experts_encoder_and_heads_bit_identical(toy):
    model = make_model(toy, "row")
    before, raw = snapshot(toy, model.pool), model.coefficients.raw.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        result = run_step(model, lambda step: entropy(step) + step.teacher().logits.mean() * 0, toy)
        model.coefficients.raw.grad = in_raw(model, result)
        optimizer.step()
    assert not torch.equal(model.coefficients.raw, raw)
    after = snapshot(toy, model.pool)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in toy.encoder.parameters())
    assert all(p.grad is None for head in toy.heads.values() for p in head.parameters())


def test_encoder_is_in_eval_mode_whatever_the_trainer_does(toy):
    encoder = nn.Sequential(toy.encoder, nn.Dropout(0.5))
    pool = ExpertPool.from_state_dicts(
        *(
            {f"0.{k}": v for k, v in toy.base.items()},
            {e: {f"0.{k}": v for k, v in s.items()} for e, s in toy.experts.items()},
        )
    )
    model = MergedModel(encoder, pool, Coefficients(pool), {"red": nn.Sequential(toy.heads["red"], nn.Dropout(0.5))})
    model.train()
    first, second = (model.logits(toy.inputs["red"], "red") for _ in range(2))
    assert torch.equal(first, second)


# Forward


def test_forward_zero_coefficients_is_the_base_model(toy64):
    pool = toy64.pool()
    model = toy64.model(pool, Coefficients(pool, init=0.0))
    expected = toy64.encoder(toy64.inputs["red"])
    torch.testing.assert_close(model(toy64.inputs["red"]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("expert", EXPERTS)
def test_logits_one_hot_coefficients_are_the_experts(toy64, expert):
    pool = toy64.pool()
    model = toy64.model(pool, Coefficients(pool, "task", init={name: float(name == expert) for name in EXPERTS}))
    own = copy.deepcopy(toy64.encoder)
    own.load_state_dict(toy64.experts[expert])
    expected = toy64.heads[expert](own(toy64.inputs[expert]))
    torch.testing.assert_close(model.logits(toy64.inputs[expert], expert), expected, rtol=1e-10, atol=1e-10)


def test_forward_with_params_uses_them_and_default_merges_anew(toy):
    model = make_model(toy)
    params = model.merge()
    first = model(toy.inputs["red"], params)
    assert torch.equal(first, model(toy.inputs["red"]))
    with torch.no_grad():
        model.coefficients.raw.zero_()
    assert torch.equal(first, model(toy.inputs["red"], params))
    assert not torch.equal(first, model(toy.inputs["red"]))


def test_forward_misspelt_or_missing_parameter_is_refused(toy):
    model = make_model(toy)
    params = {name: tensor.detach() for name, tensor in model.merge().items()}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*prjo"):
        model(toy.inputs["red"], {**params, "prjo": params["proj"]})
    params.pop("proj")
    with pytest.raises(RuntimeError, match=r"Missing key.*proj"):
        model(toy.inputs["red"], params)


def test_logits_are_differentiable_in_the_coefficients(toy):
    model = make_model(toy)
    model.logits(toy.inputs["green"], "green").square().sum().backward()
    assert model.coefficients.raw.grad.abs().sum() > 0
    assert model.logits(toy.inputs["green"], "green").shape == (4, CLASSES["green"])


# The step


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_step_equals_plain_autograd_and_a_loop_over_tasks(toy64, granularity):
    model = make_model(toy64, granularity)
    weights = {"red": 0.5, "blue": 3.0}
    losses, gradient = by_plain_autograd(toy64, model, lambda z: softmax_entropy(z).mean(), weights)
    fused = run_step(model, entropy, toy64, weights=weights)
    single = [run_step(model, entropy, toy64, tasks=[task], weights=weights) for task in EXPERTS]
    for task, loss in losses.items():
        assert fused.losses[task].item() == pytest.approx(loss.item(), rel=1e-12)
    assert list(fused.losses) == list(EXPERTS)
    torch.testing.assert_close(in_raw(model, fused), gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(one.gradient for one in single), fused.gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 4, 8, 9, 1000])
def test_step_micro_batches_give_the_same_gradient(toy64, limit):
    model = make_model(toy64, "row")
    sizes = []
    hook = toy64.encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    split = run_step(model, entropy, toy64, micro_batch=limit)
    hook.remove()
    assert sizes == {1: [4, 4, 4], 4: [4, 4, 4], 8: [8, 4], 9: [8, 4], 1000: [12]}[limit]
    torch.testing.assert_close(split.gradient, run_step(model, entropy, toy64).gradient, rtol=1e-9, atol=1e-12)


def test_step_tasks_of_other_shapes_are_not_fused(toy64):
    class Pooled(ToyEncoder):
        def forward(self, images):
            return super().forward(functional.adaptive_avg_pool2d(images, 4))

    toy64.encoder.__class__ = Pooled
    toy64.inputs["green"] = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    toy64.indices["green"] = torch.arange(2)
    model = make_model(toy64)
    result = run_step(model, entropy, toy64)
    losses, gradient = by_plain_autograd(toy64, model, lambda z: softmax_entropy(z).mean())
    assert set(result.losses) == set(losses)
    torch.testing.assert_close(in_raw(model, result), gradient, rtol=1e-9, atol=1e-12)


def test_step_scale_is_divided_out(toy64):
    model = make_model(toy64)
    scaled = run_step(model, lambda step: entropy(step) + step.coefficients.square().sum(), toy64, scale=1024.0)
    plain = run_step(model, lambda step: entropy(step) + step.coefficients.square().sum(), toy64)
    torch.testing.assert_close(scaled.gradient, plain.gradient, rtol=1e-12, atol=1e-12)


def test_step_forward_runs_the_merged_model_again_and_differentiates(toy64):
    model = make_model(toy64, "row")

    def consistency(step):
        view = step.forward(step.inputs.flip(-1))
        return (step.outputs.logits - view.logits).square().mean() + view.features.mean()

    params = merge_by_formula(model.pool, model.coefficients.index, model.coefficients())
    total = 0.0
    for task in EXPERTS:
        first, second = (
            functional_call(toy64.encoder, params, (x,)) for x in (toy64.inputs[task], toy64.inputs[task].flip(-1))
        )
        total = total + (toy64.heads[task](first) - toy64.heads[task](second)).square().mean() + second.mean()
    (expected,) = torch.autograd.grad(total, model.coefficients.raw)
    torch.testing.assert_close(run_step(model, consistency, toy64).gradient, expected, rtol=1e-9, atol=1e-12)


def test_step_gradient_of_a_coefficient_regulariser_is_added(toy64):
    model = make_model(toy64)
    anchor = torch.rand_like(model.coefficients.raw)
    plain = run_step(model, entropy, toy64, weights={"red": 2.0})
    regularised = run_step(
        model, lambda step: entropy(step) + (step.coefficients - anchor).square().sum(), toy64, weights={"red": 2.0}
    )
    added = 2 * (model.coefficients() - anchor) * (2 + 1 + 1)  # each task's loss holds it, with the task's weight
    torch.testing.assert_close(regularised.gradient - plain.gradient, added.detach(), rtol=1e-9, atol=1e-12)


def test_step_values_decide_and_the_raw_coefficients_stay_out_of_it(toy):
    model = make_model(toy)
    zero = torch.zeros_like(model.coefficients.raw)
    losses = run_engine(model, toy.inputs, lambda _, outputs, __: outputs.features.square().mean(), values=zero).losses
    expected = toy.encoder(toy.inputs["red"]).square().mean()
    assert losses["red"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.coefficients.raw.grad is None


def test_step_after_a_loss_that_raised_is_not_disturbed(toy64):
    model = make_model(toy64)
    expected = run_step(model, entropy, toy64)

    def fails_late(step):
        if step.task == "blue":
            raise ZeroDivisionError("the third task")
        return entropy(step)

    with pytest.raises(ZeroDivisionError, match="the third task"):
        run_step(model, fails_late, toy64, micro_batch=1)
    assert torch.equal(run_step(model, entropy, toy64).gradient, expected.gradient)


def test_step_activation_checkpointing_recomputes_with_the_merged_weights(toy64):
    class Checkpointed(ToyEncoder):
        def forward(self, images):
            return checkpoint(super().forward, images, use_reentrant=False)

    plain = run_step(make_model(toy64), entropy, toy64)
    toy64.encoder.__class__ = Checkpointed
    model = make_model(toy64)

    def with_teacher(step):  # the teacher's weights come and go between forward and backward
        step.teacher()
        return entropy(step)

    torch.testing.assert_close(run_step(model, with_teacher, toy64).gradient, plain.gradient, rtol=1e-9, atol=1e-12)


def test_step_tied_weights_get_the_gradient_of_both_uses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5, bias=False).double()
            self.second = nn.Linear(5, 5, bias=False).double()
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    encoder = Tied()
    base = encoder.state_dict()
    experts = {name: {"first.weight": (w := torch.randn(5, 5).double()), "second.weight": w} for name in ("a", "b")}
    pool = ExpertPool.from_state_dicts(base, experts)
    assert pool.names == ("first.weight",)
    model = MergedModel(encoder, pool, Coefficients(pool, "row"), {"a": nn.Identity()})
    x = torch.randn(3, 5).double()
    result = run_engine(model, {"a": x}, lambda _, outputs, __: outputs.logits.square().sum())
    w = merge_by_formula(pool, model.coefficients.index, model.coefficients())["first.weight"]
    (expected,) = torch.autograd.grad(((x @ w.T).tanh() @ w.T).square().sum(), model.coefficients.raw)
    torch.testing.assert_close(result.gradient, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model(x), (x @ w.T).tanh() @ w.T)


def test_step_unused_parameters_cost_nothing_and_get_no_gradient(toy64):
    class Shallow(ToyEncoder):
        def forward(self, images):
            return self.stem(images).flatten(1) @ self.proj

    toy64.encoder.__class__ = Shallow
    model = make_model(toy64)
    gradient = run_step(model, entropy, toy64).gradient
    used = {name: gradient[:, groups].abs().sum() > 0 for name, groups in model.coefficients.groups.items()}
    assert {name for name in used if used[name]} == {"stem.weight", "stem.bias", "proj"}


# Hidden layers and teachers


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_step_hidden_layers_are_captured_for_each_task_alone(toy, micro_batch):
    model = make_model(toy)
    seen = {}

    def keep(step):
        seen[step.task] = step.outputs.hidden
        step.forward(step.inputs * 0)  # must not replace what was captured
        return entropy(step)

    run_step(model, keep, toy, hidden_layers=("blocks.*.up", "stem"), micro_batch=micro_batch)
    params = {name: tensor.detach() for name, tensor in model.merge().items()}
    for task in EXPERTS:
        assert set(seen[task]) == {"blocks.0.up", "blocks.1.up", "stem"}
        stem = functional.conv2d(toy.inputs[task], params["stem.weight"], params["stem.bias"], stride=2)
        torch.testing.assert_close(seen[task]["stem"].detach(), stem)
        assert seen[task]["blocks.0.up"].shape == (4, 7)
        assert seen[task]["stem"].requires_grad
    assert not any(module._forward_hooks for module in toy.encoder.modules()), "hooks are removed"


def test_step_hidden_layer_that_matches_nothing_suggests_and_leaves_no_hook(toy):
    with pytest.raises(
        InputError, match=r"hidden_layers: 'block\.1' matches no module of the encoder\. Did you mean 'blocks"
    ):
        run_step(make_model(toy), entropy, toy, hidden_layers=("stem", "block.1"))
    assert not any(module._forward_hooks for module in toy.encoder.modules())


def expert_logits(toy, expert, task):
    own = copy.deepcopy(toy.encoder)
    own.load_state_dict(toy.experts[expert])
    return toy.heads[task](own(toy.inputs[task])).detach()


def test_teacher_is_the_raw_expert_without_gradient_and_cached(toy, monkeypatch):
    model = make_model(toy)
    fresh = model.teacher("green", toy.inputs["green"], toy.indices["green"])
    torch.testing.assert_close(fresh.logits, expert_logits(toy, "green", "green"))
    assert not fresh.logits.requires_grad
    calls = []
    monkeypatch.setattr(MergedModel, "expert_outputs", lambda self, *args: calls.append(args))
    order = torch.tensor([3, 0, 0])
    cached = model.teacher("green", toy.inputs["green"][order], order)
    assert torch.equal(cached.logits, fresh.logits[order])
    assert torch.equal(cached.features, fresh.features[order])
    assert calls == []


def test_teacher_inside_a_step_does_not_disturb_its_gradient(toy64):
    model = make_model(toy64, "row")

    def imitation(step):
        return (step.outputs.logits - step.teacher().logits).square().mean()

    fresh, cached = run_step(model, imitation, toy64), run_step(model, imitation, toy64)
    targets = {task: expert_logits(toy64, task, task) for task in EXPERTS}
    params = merge_by_formula(model.pool, model.coefficients.index, model.coefficients())
    total = sum(
        (toy64.heads[task](functional_call(toy64.encoder, params, (toy64.inputs[task],))) - targets[task])
        .square()
        .mean()
        for task in EXPERTS
    )
    (expected,) = torch.autograd.grad(total, model.coefficients.raw)
    torch.testing.assert_close(fresh.gradient, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(fresh.gradient, cached.gradient)


def test_teacher_hidden_layers_are_the_experts_and_asked_anew_when_the_cache_lacks_them(toy):
    model = make_model(toy)
    inputs, indices = toy.inputs["red"], toy.indices["red"]
    assert model.teacher("red", inputs, indices).hidden == {}
    own = toy.experts["red"]
    expected = functional.conv2d(inputs, own["stem.weight"], own["stem.bias"], stride=2)
    for _ in range(2):
        torch.testing.assert_close(model.teacher("red", inputs, indices, ("stem",)).hidden["stem"], expected)


def test_expert_parameters_make_the_model_the_expert():
    trained, base, expert = normalised()
    pool = ExpertPool.from_state_dicts(base, {"a": expert})
    model = MergedModel(Normalised(), pool, Coefficients(pool), {"a": nn.Identity()})
    trained.load_state_dict(expert)
    x = torch.randn(5, 4)
    torch.testing.assert_close(model.logits(x, "a", model.expert_parameters("a")), trained(x))


def test_teachers_may_be_named_and_shared(toy):
    model = make_model(toy, teachers={"red": "blue"})
    logits = model.teacher("red", toy.inputs["red"], toy.indices["red"]).logits
    torch.testing.assert_close(logits, expert_logits(toy, "blue", "red"))
    assert model.teacher_of("green") == "green"


def test_teacher_of_excluded_parameters_is_still_the_raw_expert(toy):
    pool = toy.pool(exclude=["proj"])
    model = toy.model(pool, Coefficients(pool))
    logits = model.teacher("red", toy.inputs["red"], toy.indices["red"]).logits
    torch.testing.assert_close(logits, expert_logits(toy, "red", "red"))


def test_teacher_unknown_expert_is_refused_at_once_and_missing_one_when_asked(toy):
    with pytest.raises(InputError, match=r"teachers\['red'\]: no expert 'gren' in the pool\. Did you mean 'green'"):
        make_model(toy, teachers={"red": "gren"})
    toy.heads["extra"] = toy.heads["red"]
    model = make_model(toy)
    with pytest.raises(InputError, match=r"Task 'extra' has no expert of its own name .*teachers=\{'extra': \.\.\.\}"):
        model.teacher("extra", toy.inputs["red"], toy.indices["red"])


def test_expert_outputs_read_the_expert_once_for_many_batches(toy, monkeypatch):
    model = make_model(toy)
    reads = []
    original = ExpertPool.expert_parameters
    monkeypatch.setattr(ExpertPool, "expert_parameters", lambda self, e, *to: reads.append(e) or original(self, e, *to))
    batches = [("red", toy.inputs["red"]), ("red", toy.inputs["green"])]
    first, second = model.expert_outputs("red", batches)
    assert reads == ["red"]
    torch.testing.assert_close(first.logits, expert_logits(toy, "red", "red"))
    assert not torch.equal(first.logits, second.logits)


# Buffers


class Normalised(nn.Module):
    """BatchNorm, and a buffer that is saved and is neither statistics nor an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.ones(3))

    def forward(self, x):
        return self.norm(self.linear(x)) * self.table


def normalised():
    trained = Normalised()
    with torch.no_grad():
        trained.norm.running_mean.uniform_(-1, 1)
        trained.norm.running_var.uniform_(0.5, 2)
        trained.table.uniform_()
    base = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    expert = perturbed(base)
    expert["norm.running_var"] = base["norm.running_var"] * 2
    expert["table"] = base["table"].clone()
    return trained.eval(), base, expert


def test_buffers_are_the_bases_not_those_of_the_encoder_that_lends_its_code():
    trained, base, expert = normalised()
    pool = ExpertPool.from_state_dicts(base, {"a": expert})
    model = MergedModel(Normalised(), pool, Coefficients(pool, init=0.0), {"a": nn.Identity()})
    x = torch.randn(5, 4)
    torch.testing.assert_close(model(x), trained(x))


def test_buffers_of_a_teacher_are_the_experts():
    trained, base, expert = normalised()
    pool = ExpertPool.from_state_dicts(base, {"a": expert})
    model = MergedModel(Normalised(), pool, Coefficients(pool), {"a": nn.Identity()})
    trained.load_state_dict(expert)
    x = torch.randn(5, 4)
    torch.testing.assert_close(model.teacher("a", x, torch.arange(5)).logits, trained(x).detach())


def test_buffers_that_the_experts_changed_may_be_excluded():
    trained, base, expert = normalised()
    expert["table"] = expert["table"] + 1
    pool = ExpertPool.from_state_dicts(base, {"a": expert})
    with pytest.raises(InputError, match=r"has 1 that the encoder lacks \('table'\).*pool\.exclude"):
        MergedModel(Normalised(), pool, Coefficients(pool), {"a": nn.Identity()})
    pool = ExpertPool.from_state_dicts(base, {"a": expert}, exclude=["table"])
    model = MergedModel(Normalised(), pool, Coefficients(pool, init=0.0), {"a": nn.Identity()})
    x = torch.randn(5, 4)
    torch.testing.assert_close(model(x), trained(x))


def test_buffers_of_another_shape_are_refused():
    _, base, expert = normalised()
    base["norm.running_mean"] = torch.zeros(1)
    pool = ExpertPool.from_state_dicts(base, {"a": expert})
    with pytest.raises(
        InputError, match=r"base: buffer 'norm\.running_mean': expected the encoder's shape \(3,\), found \(1,\)"
    ):
        MergedModel(Normalised(), pool, Coefficients(pool), {"a": nn.Identity()})


def test_buffers_are_not_changed_by_steps():
    _, base, expert = normalised()
    pool = ExpertPool.from_state_dicts(base, {"a": expert})
    encoder = Normalised()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    model = MergedModel(encoder, pool, Coefficients(pool), {"a": nn.Identity()})
    model.train()
    x = torch.randn(5, 4)
    first = model(x).detach()
    run_engine(model, {"a": x}, squares)
    assert torch.equal(model(x).detach(), first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


# Refusals


def test_encoder_and_pool_that_differ_are_named(toy):
    toy.encoder.extra = nn.Linear(2, 2)
    with pytest.raises(
        InputError, match=r"pool lacks 2 of the encoder's parameters \('extra\.weight', 'extra\.bias'\)"
    ):
        make_model(toy)


def test_encoder_with_a_forgotten_prefix_gets_a_hint(toy):
    wrapped = nn.ModuleDict({"visual": toy.encoder})
    pool = toy.pool()
    with pytest.raises(
        InputError,
        match=r"the pool lacks 16 .*\('visual\.proj'.* that the encoder lacks \('proj'.*Is the prefix of the",
    ):
        MergedModel(wrapped, pool, Coefficients(pool), toy.heads)


def test_encoder_with_a_broadcastable_shape_is_refused(toy):
    toy.encoder.stem.bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(InputError, match=r"Parameter 'stem\.bias': the encoder has \(1,\), the pool \(4,\)"):
        make_model(toy)


def test_encoder_that_ties_what_the_pool_merges_separately_is_refused(toy):
    toy.encoder.blocks[1].norm.weight = toy.encoder.blocks[0].norm.weight
    with pytest.raises(InputError, match=r"ties 'blocks\.1\.norm\.weight' to another.*pool\.tied=.*tied=\{alias"):
        make_model(toy)


def test_pool_with_an_excluded_classifier_that_the_encoder_lacks_is_accepted(toy):
    for number, state in enumerate([toy.base, *toy.experts.values()]):
        state["fc.weight"] = torch.full((3, 5), float(number))
    pool = toy.pool(exclude=["fc.*"])
    model = toy.model(pool, Coefficients(pool))
    assert model(toy.inputs["red"]).shape == (4, 5)
    assert model.teacher("red", toy.inputs["red"], toy.indices["red"]).features.shape == (4, 5)


def test_coefficients_of_another_pool_are_refused(toy):
    other = make_toy()
    other.experts.pop("blue")
    with pytest.raises(InputError, match=r"made for another pool: expected the experts 'red', 'green', 'blue', found"):
        toy.model(toy.pool(), Coefficients(other.pool()))


def test_head_of_an_unknown_task_suggests(toy):
    with pytest.raises(InputError, match=r"No head for task 'gren'; there are 'red', .*Did you mean 'green'"):
        make_model(toy).logits(toy.inputs["green"], "gren")


@pytest.mark.parametrize("task", ["imagenet.v2", "values", "type", ""])
def test_heads_any_task_name_is_accepted(toy, task):
    pool = toy.pool()
    model = MergedModel(toy.encoder, pool, Coefficients(pool), {task: toy.heads["red"]})
    assert model.logits(toy.inputs["red"], task).shape == (4, 3)


def test_to_device_moves_all_that_a_step_needs(toy):
    model = make_model(toy)
    assert model.to_device("cpu") is model
    run_step(model, entropy, toy)
    model.to_device("meta")
    places = [*model.heads["red"].parameters(), *model.parameters(), *model.pool.base.values()]
    assert {tensor.device.type for tensor in places} == {"meta"}


def test_model_of_half_precision_files_computes_in_float32_with_an_excluded_tensor():
    toy = make_toy(torch.float16)
    pool = toy.pool(exclude=["scale"])
    model = MergedModel(toy.encoder.float(), pool, Coefficients(pool), {t: h.float() for t, h in toy.heads.items()})
    features = model(toy.inputs["red"].float())
    assert features.dtype == torch.float32
    assert math.isfinite(features.sum().item())


def test_logits_of_more_than_two_axes_are_refused(toy):
    class Pixels(torch.nn.Module):
        def forward(self, features):
            return features[:, :, None, None].expand(-1, -1, 2, 5)

    model = MergedModel(toy.encoder, toy.pool(), Coefficients(toy.pool()), {"red": Pixels()})
    with pytest.raises(InputError, match=r"Task 'red': .*\(B, C\).*found shape \(4, \d+, 2, 5\)"):
        model.logits(toy.inputs["red"], "red")
