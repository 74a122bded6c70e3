import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamerge import Coefficients, InputError, Outputs, TaskStep
from adamerge.objectives import Objective
from adamerge.objectives.alignment import Alignment
from adamerge.objectives.combine import Combine
from adamerge.objectives.entropy import Entropy, softmax_entropy
from adamerge.objectives.imitation import Imitation
from adamerge.objectives.infomax import InfoMax, marginal_entropy
from tests.support.toy import run_step


def make_step(logits: torch.Tensor, teacher: torch.Tensor | None = None) -> TaskStep:
    """A step whose merged model and teacher say these logits."""
    size = len(logits)
    outputs = Outputs(logits, torch.zeros(size, 1))

    def answer(task, inputs, indices):
        assert teacher is not None, "the objective asked a teacher that it does not need"
        return Outputs(teacher, torch.zeros(size, 1))

    return TaskStep("task", torch.zeros(size, 1), torch.arange(size), outputs, torch.zeros(1, 1), answer, None)


logits = st.lists(st.floats(-20, 20), min_size=2, max_size=6).map(lambda v: torch.tensor([v], dtype=torch.float64))


ALL = [
    Entropy(),
    Entropy(reliable=0.9),
    Imitation(),
    Imitation(2.0),
    Imitation(targets="hard"),
    Imitation(drop_unsure=True),
    InfoMax(),
    Alignment(anchor=0.0),
    Combine({"entropy": Entropy(), "imitation": Imitation()}, {"entropy": 0.5}),
]


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_objectives_keep_the_protocol(objective):
    assert isinstance(objective, Objective)
    assert tuple(objective.hidden_layers) == ()
    loss = objective(make_step(torch.randn(3, 4), torch.randn(3, 4)))
    assert loss.ndim == 0


def test_task_step_has_no_place_for_labels():
    assert set(TaskStep.__dataclass_fields__) == {
        "task", "inputs", "indices", "outputs", "coefficients", "initial", "num_tasks", "_teacher", "_forward",
        "_asked",
    }  # fmt: skip


# Entropy


def test_entropy_of_known_distributions_in_nats():
    values = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -math.inf, -math.inf]])
    uniform, skewed = math.log(4), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert softmax_entropy(values[:1]).item() == pytest.approx(uniform, rel=1e-6)
    finite = values.clamp(min=-1e4)
    assert Entropy()(make_step(finite)).item() == pytest.approx((uniform + skewed) / 2, rel=1e-6)


@given(logits, st.floats(-50, 50))
def test_softmax_entropy_is_bounded_and_blind_to_a_shift(logits, shift):
    entropy = softmax_entropy(logits).item()
    assert -1e-9 <= entropy <= math.log(logits.shape[1]) + 1e-9
    assert softmax_entropy(logits + shift).item() == pytest.approx(entropy, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_softmax_entropy_of_saturated_predictions_is_finite_with_finite_gradient(dtype):
    saturated = torch.tensor([[100.0, 0.0, -100.0], [60000.0, -60000.0, 0.0]], dtype=dtype, requires_grad=True)
    entropy = softmax_entropy(saturated)
    entropy.sum().backward()
    assert torch.isfinite(entropy).all()
    assert torch.isfinite(saturated.grad).all()
    assert entropy.abs().max() < 1e-6
    # what is avoided: log(p + 1e-8), whose constant vanishes in float16
    if dtype == torch.float16:
        p = saturated.detach().softmax(-1)
        assert not torch.isfinite(-(p * (p + 1e-8).log()).sum(-1)).all()


def test_softmax_entropy_takes_logits_of_any_rank():
    values = torch.randn(2, 3, 5)
    assert softmax_entropy(values).shape == (2, 3)
    torch.testing.assert_close(softmax_entropy(values)[1, 2], softmax_entropy(values[1, 2:3])[0])


# Imitation


def test_imitation_equals_the_divergence_computed_by_hand():
    teacher, student = torch.tensor([[0.8, 0.2], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    by_hand = 0.5 * sum(
        t * math.log(t / s) for t, s in zip(teacher.flatten().tolist(), student.flatten().tolist(), strict=True)
    )
    assert Imitation()(make_step(student.log(), teacher.log())).item() == pytest.approx(by_hand, rel=1e-5)
    reverse = Imitation()(make_step(teacher.log(), student.log())).item()
    assert reverse != pytest.approx(by_hand, rel=1e-2), "the teacher comes first"


@given(logits, st.floats(0.2, 10))
def test_imitation_of_itself_is_zero_and_never_negative(logits, temperature):
    objective = Imitation(temperature)
    assert objective(make_step(logits, logits)).item() == pytest.approx(0, abs=1e-9)
    assert objective(make_step(logits, logits.flip(-1))).item() >= -1e-9


def test_imitation_temperature_divides_logits_and_multiplies_by_its_square():
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    expected = 9 * Imitation()(make_step(student / 3, teacher / 3)).item()
    assert Imitation(3.0)(make_step(student, teacher)).item() == pytest.approx(expected, rel=1e-5)


def test_imitation_gradient_is_the_difference_of_the_distributions():
    student, teacher = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4)
    Imitation()(make_step(student, teacher)).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach())


def test_imitation_half_precision_saturated_is_finite():
    student = torch.tensor([[100.0, -100.0]], dtype=torch.float16)
    assert math.isfinite(Imitation()(make_step(student, -student)).item())


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_imitation_temperature_not_positive_is_refused(temperature):
    with pytest.raises(InputError, match=rf"objective\.temperature: expected a number > 0, found {temperature}"):
        Imitation(temperature)


def test_imitation_hard_is_cross_entropy_to_the_experts_class_by_hand():
    merged, expert = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    by_hand = -(math.log(0.5) + math.log(0.1)) / 2
    assert Imitation(targets="hard")(make_step(merged.log(), expert.log())).item() == pytest.approx(by_hand, rel=1e-5)
    tokens = torch.randn(2, 3, 5)  # logits of any rank
    assert Imitation(targets="hard")(make_step(tokens, tokens)).ndim == 0


@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_imitation_drop_unsure_leaves_out_less_confident_experts_that_disagree(targets):
    merged = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]]).log().requires_grad_()
    expert = torch.tensor([[0.3, 0.7], [0.3, 0.7], [0.6, 0.4]]).log()  # unsure, surer, agrees
    objective = Imitation(targets=targets, drop_unsure=True)
    kept = Imitation(targets=targets)(make_step(merged[1:], expert[1:]))
    assert objective(make_step(merged, expert)).item() == pytest.approx(kept.item(), rel=1e-5)
    nothing_left = objective(make_step(merged[:1], expert[:1]))
    nothing_left.backward()
    assert nothing_left.item() == 0
    assert (merged.grad == 0).all()


def test_imitation_options_are_checked():
    with pytest.raises(InputError, match=r"objective\.targets: expected 'soft' or 'hard', found 'firm'"):
        Imitation(targets="firm")
    with pytest.raises(InputError, match=r"objective\.temperature: expected 1 with targets=hard, found 2"):
        Imitation(2.0, targets="hard")


# Entropy of reliable samples


def test_entropy_reliable_keeps_samples_below_the_share_of_log_classes():
    p = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    entropies = -(p * p.log()).sum(-1)
    assert entropies[0] < 0.4 * math.log(4) < entropies[1]
    assert Entropy(reliable=0.4)(make_step(p.log())).item() == pytest.approx(entropies[0].item(), rel=1e-9)
    none_left = p[1:].log().requires_grad_()
    loss = Entropy(reliable=0.4)(make_step(none_left))
    loss.backward()
    assert loss.item() == 0
    assert (none_left.grad == 0).all()
    with pytest.raises(InputError, match=r"objective\.reliable: .*\(0, 1\], found 40"):
        Entropy(reliable=40)


# InfoMax


def test_infomax_by_hand_and_lowest_for_confident_balanced_predictions():
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    mean = p.mean(0)
    by_hand = -(p * p.log()).sum(-1).mean() + 0.5 * (mean * mean.log()).sum()
    assert InfoMax(0.5)(make_step(p.log())).item() == pytest.approx(by_hand.item(), rel=1e-9)
    balanced, collapsed = torch.tensor([[99.0, 0.0], [0.0, 99.0]]), torch.tensor([[99.0, 0.0], [99.0, 0.0]])
    assert InfoMax()(make_step(balanced)).item() == pytest.approx(-math.log(2), rel=1e-5)
    assert InfoMax()(make_step(collapsed)).item() == pytest.approx(0, abs=1e-6)
    assert InfoMax(0.0)(make_step(p.log())).item() == pytest.approx(Entropy()(make_step(p.log())).item())
    with pytest.raises(InputError, match=r"objective\.diversity: expected a number >= 0"):
        InfoMax(-1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_marginal_entropy_of_saturated_half_precision_is_finite_with_finite_gradient(dtype):
    saturated = torch.tensor([[60000.0, -60000.0], [0.0, 100.0]], dtype=dtype, requires_grad=True)
    value = marginal_entropy(saturated)
    value.backward()
    assert value.item() == pytest.approx(math.log(2), rel=1e-3)
    assert torch.isfinite(saturated.grad).all()


# Alignment


def alignment_step(coefficients: torch.Tensor, initial: torch.Tensor | None, num_tasks: int = 1) -> TaskStep:
    """Two samples; the merged model's outputs are 0, the expert's known."""
    hidden = {"a": torch.zeros(2, 3, 2), "b.c": torch.zeros(2, 4)}
    merged = Outputs(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.zeros(2, 5), hidden)
    theirs = {"a": torch.full((2, 3, 2), 2.0), "b.c": torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 3.0]])}
    expert = Outputs(torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log(), torch.full((2, 5), 0.5), theirs)
    return TaskStep(
        "task", torch.zeros(2, 1), torch.arange(2), merged, coefficients, lambda *_: expert, None, initial, num_tasks
    )


def test_alignment_terms_by_hand():
    step = alignment_step(torch.zeros(2, 3), torch.zeros(2, 3))
    divergence = Imitation()(make_step(step.outputs.logits, step.teacher().logits)).item()
    only_logits = Alignment(anchor=0.0)
    assert only_logits(step).item() == pytest.approx(divergence, rel=1e-6)
    layers = {"hidden_layers": ["a", "b.*"], "anchor": 0.0, "logit_weight": 0.0}
    squared_norms = 6 * 4.0 + (1.0 + 9.0) / 2  # layer a; layer b.c averaged over the two samples
    assert Alignment(**layers)(step).item() == pytest.approx(squared_norms)
    assert Alignment(**layers, distance="mean")(step).item() == pytest.approx((4.0 + 10 / 8) / 2)
    assert Alignment(**{**layers, "hidden_layers": ["a"]}, hidden_weight=0.5)(step).item() == pytest.approx(12.0)
    features = Alignment(logit_weight=0.0, feature_weight=2.0, anchor=0.0)
    assert features(step).item() == pytest.approx(2 * 5 * 0.25)
    weighted = Alignment(anchor=0.0, task_weights={"task": 3.0, "other": 9.0})
    assert weighted(step).item() == pytest.approx(3 * divergence, rel=1e-6)


def test_alignment_anchor_is_the_mean_distance_to_the_start_and_times_experts_in_the_code():
    initial = torch.full((2, 3), 0.3)
    coefficients = torch.tensor([[0.3, 0.4, 0.1], [0.3, 0.3, 0.9]])
    mean = (0.1 + 0.2 + 0.6) / 6
    free = Alignment(anchor=0.0)(alignment_step(coefficients, initial)).item()
    paper = Alignment(anchor=5.0)(alignment_step(coefficients, initial)).item() - free
    code = Alignment(anchor=5.0, anchor_scale="code")(alignment_step(coefficients, initial)).item() - free
    assert paper == pytest.approx(5 * mean, rel=1e-4)
    assert code == pytest.approx(2 * 5 * mean, rel=1e-4)  # two experts
    shared = Alignment(anchor=5.0)(alignment_step(coefficients, initial, num_tasks=4)).item() - free
    assert 4 * shared == pytest.approx(paper, rel=1e-4)  # the sum over the tasks holds it once
    with pytest.raises(InputError, match=r"objective\.anchor: the step does not say where"):
        Alignment()(alignment_step(coefficients, None))


def test_alignment_options_are_checked():
    for options, message in (
        ({"temperature": 0}, "objective.temperature: expected a number > 0"),
        ({"distance": "max"}, "objective.distance: expected 'sum' or 'mean'"),
        ({"anchor_scale": "both"}, "objective.anchor_scale: expected 'paper' or 'code'"),
        ({"anchor": -1}, "objective.anchor: expected a number >= 0"),
        ({"logit_weight": 0}, "objective: expected a term that compares with the expert, found none"),
    ):
        with pytest.raises(InputError, match=message):
            Alignment(**options)


# Combine


def test_combine_is_the_weighted_sum_and_the_union_of_what_the_terms_need():
    step = make_step(torch.randn(3, 4), torch.randn(3, 4))
    both = Combine({"a": Entropy(), "b": Imitation()}, {"b": 0.5})
    assert both(step).item() == pytest.approx((Entropy()(step) + 0.5 * Imitation()(step)).item())
    assert both.uses_teacher
    assert not Combine({"a": Entropy()}).uses_teacher
    layers = Combine({"a": Alignment(hidden_layers=("x", "y")), "b": Entropy(hidden_layers=("y", "z"))}).hidden_layers
    assert layers == ("x", "y", "z")


def test_combine_options_are_checked():
    with pytest.raises(InputError, match=r"objective\.terms: expected at least one"):
        Combine({})
    with pytest.raises(InputError, match=r"objective\.terms\.a: expected an objective .*found 'entropy'"):
        Combine({"a": "entropy"})
    with pytest.raises(InputError, match=r"objective\.weights: no term 'entropi'\. Did you mean 'entropy'\?"):
        Combine({"entropy": Entropy()}, {"entropi": 1.0})


# On the toy problem


@pytest.mark.parametrize("objective", ALL, ids=str)
@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_objective_falls_on_the_toy_problem(toy, objective, granularity):
    pool = toy.pool()
    coefficients = Coefficients(pool, granularity, constraint="box")
    model = toy.model(pool, coefficients)
    optimizer = torch.optim.Adam([coefficients.raw], lr=0.02)
    losses = []
    for _ in range(15):
        result = run_step(model, objective, toy)
        losses.append(sum(result.losses.values()).item())
        coefficients.raw.grad = result.gradient
        optimizer.step()
        coefficients.project()
    assert losses[-1] < 0.98 * losses[0]
    assert ((coefficients() >= 0) & (coefficients() <= 1)).all()


def test_imitation_of_a_single_expert_finds_that_expert(toy64):
    toy64.experts = {"red": toy64.experts["red"]}
    pool = toy64.pool()
    coefficients = Coefficients(pool, "task", init=0.2)
    model = toy64.model(pool, coefficients)
    optimizer = torch.optim.Adam([coefficients.raw], lr=0.05)
    for _ in range(60):
        result = run_step(model, Imitation(), toy64, tasks=["red"])
        coefficients.raw.grad = result.gradient
        optimizer.step()
        coefficients.project()
    assert coefficients().item() == pytest.approx(1.0, abs=0.05)
    own = copy.deepcopy(toy64.encoder)
    own.load_state_dict(toy64.experts["red"])
    assert result.losses["red"] < 1e-3
