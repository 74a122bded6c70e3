import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import run_step

from adamerge import Coefficients, InputError, Outputs, TaskStep
from adamerge.objectives import Objective
from adamerge.objectives.entropy import Entropy, softmax_entropy
from adamerge.objectives.imitation import Imitation


def make_step(logits: torch.Tensor, teacher: torch.Tensor | None = None) -> TaskStep:
    """A step whose merged model and teacher say these logits."""
    size = len(logits)
    outputs = Outputs(logits, torch.zeros(size, 1))

    def answer(task, inputs, indices):
        assert teacher is not None, "the objective asked a teacher that it does not need"
        return Outputs(teacher, torch.zeros(size, 1))

    return TaskStep("task", torch.zeros(size, 1), torch.arange(size), outputs, torch.zeros(1, 1), answer, None)


logits = st.lists(st.floats(-20, 20), min_size=2, max_size=6).map(lambda v: torch.tensor([v], dtype=torch.float64))


@pytest.mark.parametrize("objective", [Entropy(), Imitation()])
def test_objectives_keep_the_protocol(objective):
    assert isinstance(objective, Objective)
    assert tuple(objective.hidden_layers) == ()
    loss = objective(make_step(torch.randn(3, 4), torch.randn(3, 4)))
    assert loss.ndim == 0


def test_task_step_has_no_place_for_labels():
    assert set(TaskStep.__dataclass_fields__) == {
        "task", "inputs", "indices", "outputs", "coefficients", "_teacher", "_forward"
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


# On the toy problem


@pytest.mark.parametrize("objective", [Entropy(), Imitation(), Imitation(2.0)], ids=str)
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
