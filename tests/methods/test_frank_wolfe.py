"""Frank-Wolfe: the mathematics on matrices, and the method under Lightning's Trainer."""

import json
import math

import pytest
import torch
from lightning.pytorch import Callback

from adamerge import Coefficients, ExpertPool, InputError, MergedModel
from adamerge.callbacks import ExportMergedWeights
from adamerge.data.batch import Outputs
from adamerge.methods import FrankWolfeMerging
from adamerge.methods.frank_wolfe_steps import FrankWolfe, SoftFrankWolfe, Vertices, harmonic, line_search
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from tests.support.fits import QUIET, batches, every_step, fit, make_data
from tests.support.toy import EXPERTS, make_toy, perturbed, run_step

pytestmark = QUIET


def make(toy, objective=None, groups="layer", constraint="simplex", init=0.3, **options):
    pool = toy.pool()
    model = MergedModel(toy.encoder, pool, Coefficients(pool, groups, init, constraint), toy.heads)
    return FrankWolfeMerging(model, objective or Imitation(), **options)


def values(method):
    return method.model.coefficients().detach().clone()


class Recorder(Callback):
    """Keeps metrics and coefficients after each batch."""

    def __init__(self):
        self.metrics, self.values = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({key: value.item() for key, value in trainer.callback_metrics.items()})
        self.values.append(values(pl_module))


# The oracle


def test_oracle_checkpoint_task_vector_and_displacement_give_the_same_vertex(toy64):
    """The inner products differ by a constant per parameter, so the order of the experts does not."""
    pool = toy64.pool()
    coefficients = Coefficients(pool, "layer")
    model = toy64.model(pool, coefficients)
    params = {name: t.detach().requires_grad_() for name, t in model.merge().items()}
    loss = sum(Entropy()(_Step(model.logits(toy64.inputs[task], task, params))) for task in EXPERTS)
    gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    chosen_by_engine = run_step(model, Entropy(), toy64).gradient.argmin(0)
    for name, gradient in gradients.items():
        tau, base = pool.task_vectors(name), pool.base[name]
        scores = {
            "task vector": [(gradient * t).sum() for t in tau],
            "checkpoint": [(gradient * (base + t)).sum() for t in tau],
            "displacement": [(gradient * (base + t - params[name].detach())).sum() for t in tau],
        }
        chosen = {kind: int(torch.stack(s).argmin()) for kind, s in scores.items()}
        if gradient.abs().max() > 1e-12:
            assert len(set(chosen.values())) == 1, name
            assert chosen_by_engine[coefficients.groups[name][0]] == chosen["task vector"], name


class _Step:
    """Just enough of a TaskStep."""

    def __init__(self, logits):
        self.outputs = Outputs(logits)


def test_cosine_ranking_counter_example():
    """A short expert along the negative gradient wins by cosine, a long one by the linear loss it minimizes."""
    gradient, base = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    checkpoints = torch.tensor([[-0.1, 0.0], [-1.0, 3.0]])
    by_product = {int((checkpoints @ gradient).argmin()), int(((checkpoints - base) @ gradient).argmin())}
    cosine = torch.cosine_similarity(checkpoints, gradient.expand(2, 2)).argmin()
    cosine_of_task_vectors = torch.cosine_similarity(checkpoints - base, gradient.expand(2, 2)).argmin()
    assert by_product == {1}
    assert cosine == 0
    assert cosine_of_task_vectors == 1  # not even invariant to the origin


def test_vertices_scores_and_points_by_hand():
    start = torch.tensor([[0.3, 0.3], [0.2, 0.0]])
    vertices = Vertices(2, has_base=True, start=start)
    gradient = torch.tensor([[1.0, -2.0], [-4.0, 3.0]])
    expected = torch.tensor([[1.0, -2.0], [-4.0, 3.0], [0.0, 0.0], [0.3 - 0.8, -0.6]])
    torch.testing.assert_close(vertices.scores(gradient), expected)
    assert vertices.coefficients(torch.tensor([1, 0])).tolist() == [[0, 1], [1, 0]]
    assert vertices.coefficients(torch.tensor([2, 2])).tolist() == [[0, 0], [0, 0]]
    assert torch.equal(vertices.coefficients(torch.tensor([3, 3])), start)
    joint = Vertices(2, is_joint=True)
    assert joint.scores(gradient).tolist() == [[-1, -1], [-1, -1]]
    assert joint.gap(gradient, torch.tensor([[1.0, 0.0], [0.0, 0.0]])).tolist() == [2, 2]


def test_scaled_vertices_by_hand():
    vertices = Vertices(2, has_base=True, start=torch.tensor([[0.3], [0.2]]), scale=2.0)
    gradient = torch.tensor([[1.0], [-4.0]])
    torch.testing.assert_close(vertices.scores(gradient)[:, 0], torch.tensor([2.0, -8.0, 0.0, -0.5]))
    assert vertices.coefficients(torch.tensor([1])).tolist() == [[0], [2]]
    assert vertices.coefficients(torch.tensor([2])).tolist() == [[0], [0]]
    assert vertices.gap(gradient, torch.tensor([[0.0], [1.0]])).tolist() == [4]


# The steps, on a quadratic


def minimize(optimizer_of, target, start, steps):
    """Minimize the distance to ``target`` (E, G); return the coefficients and gaps after each step."""
    raw = torch.nn.Parameter(start.clone())
    optimizer = optimizer_of(raw)
    trace, gaps = [], []
    for _ in range(steps):
        raw.grad = 2 * (raw.detach() - target)
        gaps.append(optimizer.vertices.gap(raw.grad, raw.detach()).sum().item())
        optimizer.step()
        trace.append(raw.detach().clone())
    return trace, gaps, optimizer


TARGET = torch.tensor([[0.5, 0.1, 0.0], [0.2, 0.1, 1.0], [0.3, 0.8, 0.0]])
UNIFORM = torch.full((3, 3), 1 / 3)


@pytest.mark.parametrize("rule", ["harmonic", "line_search"])
def test_frank_wolfe_stays_on_the_simplex_and_its_gap_falls(rule):
    def optimizer(raw):
        loss_at = lambda values: (values - TARGET).square().sum().item()  # noqa: E731
        return FrankWolfe(raw, Vertices(3), step_rule=rule, loss_at=loss_at)

    trace, gaps, _ = minimize(optimizer, TARGET, UNIFORM, 200)
    for point in trace:
        assert point.min() >= 0
        torch.testing.assert_close(point.sum(0), torch.ones(3))
    assert min(gaps) >= -1e-6
    assert sum(gaps[-10:]) < 0.1 * sum(gaps[:10])
    assert (trace[-1] - TARGET).abs().max() < 0.1


def test_soft_frank_wolfe_finds_an_interior_point_and_stays_on_the_simplex():
    trace, gaps, optimizer = minimize(
        lambda raw: SoftFrankWolfe(raw, Vertices(3), top_k=2, inner_steps=20, lr=0.05), TARGET, UNIFORM, 400
    )
    for point in trace:
        assert point.min() >= -1e-6
        torch.testing.assert_close(point.sum(0), torch.ones(3), rtol=0, atol=1e-5)
    assert (trace[-1] - TARGET).abs().max() < 0.03
    assert gaps[-1] < 0.1 * gaps[0]
    assert optimizer.iteration == 20


def test_soft_frank_wolfe_reaches_past_the_experts_where_vertices_are_scaled():
    target = torch.tensor([[0.9], [0.7], [0.0]])

    def end(scale):
        optimizer = lambda raw: SoftFrankWolfe(  # noqa: E731
            raw, Vertices(3, has_base=True, scale=scale), top_k=3, inner_steps=20, lr=0.05
        )
        return minimize(optimizer, target, torch.zeros(3, 1), 400)[0][-1]

    assert end(1.0).sum() <= 1 + 1e-6
    assert (end(2.0) - target).abs().max() < 0.03


def test_soft_frank_wolfe_moves_to_at_most_k_vertices():
    target = torch.tensor([[0.9], [0.9], [0.9], [0.9]])
    trace, _, _ = minimize(
        lambda raw: SoftFrankWolfe(raw, Vertices(4), top_k=2, inner_steps=30, lr=0.1), target, torch.zeros(4, 1), 30
    )
    assert (trace[-1] > 0).sum() == 2
    assert trace[-1].sum() <= 1 + 1e-6


def test_compat_step_sizes_add_up_and_keep_most_of_the_start():
    """The released constants: sum .121 over 10 iterations, 88.5 % of the start remains (93.6 % after 3)."""
    sizes = [harmonic(t) * 0.1 * 0.3 for t in range(10)]
    assert sum(sizes) == pytest.approx(0.121, abs=5e-4)
    start = torch.full((3, 3), 0.3)
    trace, _, optimizer = minimize(
        lambda raw: FrankWolfe(raw, Vertices(3), factor=0.1 * 0.3), torch.ones(3, 3), start, 10
    )
    assert optimizer.kept.tolist() == pytest.approx([0.885] * 3, abs=5e-4)
    assert math.prod(1 - size for size in sizes[:3]) == pytest.approx(0.936, abs=5e-4)
    remaining = 0.3 * optimizer.kept
    assert (trace[-1] >= remaining - 1e-6).all()  # the start's own coefficients, and vertices on top


def test_frank_wolfe_skips_groups_in_which_no_vertex_descends():
    raw = torch.nn.Parameter(torch.tensor([[1.0, 0.5], [0.0, 0.5]]))
    optimizer = FrankWolfe(raw, Vertices(2))
    raw.grad = torch.tensor([[-1.0, 1.0], [2.0, -1.0]])  # group 0 is at its best vertex, group 1 is not
    optimizer.step()
    assert raw.tolist() == [[1, 0], [0, 1]]
    assert optimizer.kept.tolist() == [1, 0]
    raw.grad = torch.zeros(2, 2)
    optimizer.step()
    assert raw.tolist() == [[1, 0], [0, 1]]


def test_frank_wolfe_average_of_gradients_outvotes_a_single_batch():
    usual, odd = torch.tensor([[-1.0], [0.0]]), torch.tensor([[0.0], [-1.5]])
    ends = {}
    for averages in (False, True):
        raw = torch.nn.Parameter(torch.zeros(2, 1))
        optimizer = FrankWolfe(raw, Vertices(2), averages=averages)
        for gradient in (*[usual] * 100, odd):
            raw.grad = gradient.clone()
            optimizer.step()
        ends[averages] = raw.detach()[:, 0]
    assert ends[True].tolist() == [1, 0]
    assert ends[False][1] == pytest.approx(harmonic(100))


def test_frank_wolfe_start_vertex_brings_the_start_back():
    start = torch.tensor([[0.9], [0.9]])
    raw = torch.nn.Parameter(start.clone())
    optimizer = FrankWolfe(raw, Vertices(2, start=start))
    for gradient, expected, kept in (([[1.0], [-1.0]], [0, 1], 0.0), ([[-1.0], [-1.0]], None, 2 / 3)):
        raw.grad = torch.tensor(gradient)
        optimizer.step()
        assert optimizer.kept.item() == pytest.approx(kept)
        if expected:
            assert raw[:, 0].tolist() == expected
    assert raw[:, 0].tolist() == pytest.approx([0.6, 1 / 3 + 0.6])


def test_frank_wolfe_limit_and_tolerance_stop_it():
    raw = torch.nn.Parameter(UNIFORM.clone())
    optimizer = FrankWolfe(raw, Vertices(3), step_rule="constant", factor=0.5, limit=2)
    seen = []
    for _ in range(4):
        raw.grad = -torch.rand(3, 3)
        optimizer.step()
        seen.append((optimizer.is_done, raw.detach().clone()))
    assert [done for done, _ in seen] == [False, True, True, True]
    assert torch.equal(seen[1][1], seen[3][1])
    optimizer = FrankWolfe(raw, Vertices(3), tolerance=1e9)
    optimizer.step()
    assert optimizer.is_done
    assert torch.equal(raw.detach(), seen[3][1])


def test_line_search_is_exact_within_its_sections_and_never_goes_up():
    assert line_search(lambda size: (size - 0.7) ** 2) == pytest.approx(0.7, abs=0.02)
    assert line_search(lambda size: size) == 0
    assert line_search(lambda size: -size) == 1
    assert line_search(lambda size: 1.0) == 0


@pytest.mark.parametrize("passes", [4, 5, 12])
def test_line_search_asks_for_no_more_losses_than_it_may(passes):
    sizes = []
    line_search(lambda size: sizes.append(size) or (size - 0.7) ** 2, passes)
    assert len(sizes) == passes


# The method


@pytest.mark.parametrize(
    ("groups", "options"),
    [
        ("task", {}),
        ("row", {}),
        ("task", {"step_rule": "line_search"}),
        ("layer", {"step_rule": "line_search"}),
        ("row", {"step_rule": "constant", "step_size": 0.2}),
        ("layer", {"granularity": "task"}),
        ("task", {"mode": "soft", "inner_steps": 3, "inner_lr": 0.2}),
        ("row", {"mode": "soft", "inner_steps": 3, "inner_lr": 0.2}),
        ("layer", {"mode": "soft", "inner_steps": 3, "granularity": "task", "top_k": 9}),
    ],
    ids=str,
)
def test_fit_keeps_the_simplex_a_gap_and_lowers_the_loss(toy, tmp_path, options, groups):
    recorder = Recorder()
    method = make(toy, groups=groups, **options)
    fit(method, batches(toy, 10), tmp_path, steps=10, callbacks=[recorder])
    for point in recorder.values:
        assert point.min() >= 0
        torch.testing.assert_close(point.sum(0), torch.ones(point.shape[1]), rtol=0, atol=1e-5)
    assert min(metrics["adapt/gap"] for metrics in recorder.metrics) >= -1e-6
    losses = [metrics["adapt/loss"] for metrics in recorder.metrics]
    assert min(losses[1:]) < losses[0]
    if options.get("step_rule") == "line_search":
        assert losses == sorted(losses, reverse=True)


def test_fit_line_search_gap_falls_by_task(toy, tmp_path):
    recorder = Recorder()
    fit(make(toy, groups="task", step_rule="line_search"), batches(toy, 15), tmp_path, 15, callbacks=[recorder])
    gaps = [metrics["adapt/gap"] for metrics in recorder.metrics]
    assert min(gaps[-5:]) < 0.2 * gaps[0]


def test_fit_imitation_of_one_of_several_experts_goes_to_that_expert(toy, tmp_path):
    method = make(toy, groups="task", step_rule="line_search")
    fit(method, batches(toy, 3, tasks=["green"]), tmp_path, steps=3)
    assert values(method)[:, 0].tolist() == pytest.approx([0, 1, 0], abs=0.02)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"step_rule": "line_search"}, marks=pytest.mark.slow),
        {"mode": "soft", "granularity": "task"},
    ],
    ids=str,
)
def test_fit_irrelevant_experts_and_a_duplicate_change_little(toy, tmp_path, options):
    """Sixteen random experts and a copy: the weight stays with the experts of the tasks, the copy takes a share."""

    def fitted(**added):
        pool = ExpertPool.from_state_dicts(toy.base, toy.experts | added, duplicates="allow")
        model = MergedModel(toy.encoder, pool, Coefficients(pool, "task", 0.0, "none"), toy.heads)
        method = FrankWolfeMerging(model, Imitation(), **options)
        trainer = fit(method, batches(toy, 40, tasks=["green"]), tmp_path, steps=40)
        return dict(zip(pool.expert_names, values(method)[:, 0].tolist(), strict=True)), trainer

    alone, before = fitted()
    noise = {f"noise{number}": perturbed(toy.base) for number in range(16)}
    crowded, after = fitted(**noise, copy=toy.experts["green"])
    assert alone["green"] > 0.9
    assert crowded["green"] + crowded["copy"] > 0.9
    assert after.callback_metrics["adapt/loss"] < before.callback_metrics["adapt/loss"] + 0.01


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_fit_pool_of_one_expert(toy, tmp_path, mode):
    toy.experts = {"red": toy.experts["red"]}
    method = make(toy, groups="task", mode=mode, constraint="none", vertices=["experts", "base"], inner_lr=0.2)
    fit(method, batches(toy, 12, tasks=["red"]), tmp_path, steps=12)
    assert 0.5 < values(method).item() <= 1
    fixed = make(toy, groups="task", mode=mode)  # on the simplex there is but one point
    fit(fixed, batches(toy, 2, tasks=["red"]), tmp_path, steps=2)
    assert values(fixed).item() == 1


def test_fit_cosine_ranking_and_released_constants_barely_move(toy, tmp_path):
    options = {"ranking": "cosine", "step_size": 0.1, "scaling": 0.3, "vertices": ["experts", "start"]}
    method = make(toy, constraint="none", **options)
    fit(method, batches(toy, 10), tmp_path, steps=10)
    facts = method.export_recipe()["frank_wolfe"]
    assert facts["iterations"] == 10
    assert facts["start"] >= 0.885 - 1e-3
    assert (values(method) - 0.3).abs().max() <= 0.115 * 0.7 + 1e-3
    assert (values(method) != 0.3).any()
    joint = make(toy, constraint="none", **options, granularity="task")
    fit(joint, batches(toy, 2), tmp_path, steps=2)
    assert torch.equal(values(joint), values(joint)[:, :1].expand_as(values(joint)))


def test_cosine_ranking_sums_the_cosines_of_each_group(toy):
    method = make(toy, groups="task", constraint="none", ranking="cosine", vertices=["experts", "base", "start"])
    pool, gradients = method.model.pool, {}
    for name in pool.names:
        gradients[name] = torch.randn(pool.shapes[name])
        method.on_parameter_gradient(name, gradients[name])
    checkpoints = [*toy.experts.values(), toy.base]
    start = {n: toy.base[n] + 0.3 * sum(x[n] - toy.base[n] for x in toy.experts.values()) for n in pool.names}
    expected = [
        sum(torch.cosine_similarity(g.flatten(), weights[n].flatten(), dim=0) for n, g in gradients.items())
        for weights in (*checkpoints, start)
    ]
    torch.testing.assert_close(method._ranking()[:, 0], torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("accumulate", "options"),
    [
        (2, {}),
        (1, {"step_rule": "line_search", "vertices": ["experts", "start"]}),
        (1, {"mode": "soft", "inner_steps": 3, "top_k": 2, "inner_lr": 0.1, "average_gradients": True}),
    ],
    ids=str,
)
def test_fit_resumed_from_the_middle_equals_uninterrupted(toy, tmp_path, options, accumulate):
    settings = {"accumulate_grad_batches": accumulate}
    whole = make(toy, constraint="none", groups="row", **options)
    fit(whole, make_data(batch_size=3), tmp_path, steps=7, **settings, **every_step(tmp_path))
    for step in (2, 4):
        resumed = make(toy, constraint="none", groups="row", **options)
        trainer = fit(
            resumed, make_data(batch_size=3), tmp_path, steps=7, resume=tmp_path / f"step={step}.ckpt", **settings
        )
        assert trainer.global_step == 7
        assert torch.equal(values(resumed), values(whole))
        assert resumed.export_recipe() == whole.export_recipe()


def test_fit_stops_at_its_steps_and_at_its_tolerance(toy, tmp_path):
    assert fit(make(toy, steps=3), batches(toy, 9), tmp_path, steps=9).global_step == 3
    assert fit(make(toy, tolerance=1e9), batches(toy, 9), tmp_path, steps=9).global_step == 1
    soft = make(toy, steps=2, mode="soft", inner_steps=3)
    assert fit(soft, batches(toy, 9), tmp_path, steps=9).global_step == 6


def test_export_names_the_support_and_its_weights(toy, tmp_path):
    method = make(toy, groups="task", steps=2)
    export = ExportMergedWeights(tmp_path / "out")
    fit(method, batches(toy, 9), tmp_path, steps=9, callbacks=[export])
    facts = json.loads(export.files["recipe"].read_text())["frank_wolfe"]
    assert facts["iterations"] == 2
    assert facts["start"] == 0  # the first step has size 1
    assert 1 <= len(facts["support"]) <= 2
    assert sum(entry["mean"] for entry in facts["support"].values()) == pytest.approx(1)


def test_frozen_groups_keep_their_initial_value(toy, tmp_path):
    from adamerge.model.granularity import Chunk

    pieces = Chunk({"proj": 0}, default=1)
    method = make(toy, groups=pieces, constraint="none")
    fit(method, batches(toy, 3), tmp_path, steps=3)
    (group,) = method.model.coefficients.groups["proj"]
    torch.testing.assert_close(values(method)[:, group], torch.full((3,), 0.3))
    assert not torch.allclose(values(method), torch.tensor(0.3))


# Refusals


@pytest.mark.parametrize("constraint", ["box", "clamp", "sigmoid"])
def test_constraints_other_than_simplex_and_none_are_refused(toy, constraint):
    with pytest.raises(InputError, match=f"constraint must be simplex or none, found {constraint}"):
        make(toy, constraint=constraint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "medium"}, "method.mode: .*found 'medium'"),
        ({"search_passes": 3}, "method.search_passes: .*>= 4, found 3"),
        ({"step_rule": "armijo"}, "method.step_rule: .*found 'armijo'"),
        ({"granularity": "layer"}, "method.granularity: .*found 'layer'"),
        ({"vertices": ["experts", "bass"]}, "method.vertices: .*found 'bass'. Did you mean 'base'"),
        ({"vertices": ["base"]}, "method.vertices: expected a list with 'experts'"),
        ({"vertices": "experts"}, "method.vertices: expected a list with 'experts', found 'experts'"),
        ({"vertices": ["experts", "base"]}, "constraint.total is 'equal'. Set constraint.total=at_most"),
        ({"vertex_scale": 2.0}, "method.vertex_scale: .*constraint=simplex, found 2.0"),
        ({"vertex_scale": 0, "constraint": "none"}, "method.vertex_scale: .*> 0, found 0"),
        ({"vertex_scale": 2.0, "constraint": "none", "ranking": "cosine"}, "cosine.*method.vertex_scale=2.0"),
        ({"step_size": 2.0}, r"method.step_size.*\(0, 1\], found 2.0"),
        ({"steps": 0}, "method.steps: .*>= 1, found 0"),
        ({"step_size": "small"}, "method.step_size: expected a number > 0, found 'small'"),
        ({"top_k": 0}, "method.top_k: .*>= 1"),
        ({"ranking": "cosine", "average_gradients": True}, "average_gradients"),
        ({"ranking": "cosine", "mode": "soft"}, "cosine.*found method.mode=soft"),
    ],
)
def test_options_are_checked(toy, options, message):
    with pytest.raises(InputError, match=message):
        make(toy, **options)


def test_cosine_is_refused_where_a_parameter_has_several_groups(toy, tmp_path):
    with pytest.raises(InputError, match=r"found several groups in .*granularity=task or layer"):
        make(toy, groups="row", ranking="cosine")
    method = make(toy, ranking="cosine")
    with pytest.raises(InputError, match="ranks by one batch's gradient on one device"):
        fit(method, batches(toy, 2), tmp_path, steps=1, accumulate_grad_batches=2)


def test_float64_pool_stays_float64(tmp_path):
    toy = make_toy(torch.float64)
    method = make(toy, mode="soft", inner_steps=2)
    fit(method, batches(toy, 4), tmp_path, steps=4, precision="64-true")
    assert values(method).dtype == torch.float64
