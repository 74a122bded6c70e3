"""What all methods share: batches per step, what a step carries, and the checks before the first step."""

from itertools import product

import pytest
import torch

from adamerge import Coefficients, InputError, MergedModel
from adamerge.commands import cli
from adamerge.methods import FrankWolfeMerging, GradientMerging
from adamerge.methods import method as module
from adamerge.objectives import check_objective
from adamerge.objectives.alignment import Alignment
from adamerge.objectives.combine import Combine
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.objectives.infomax import InfoMax
from tests.support.fits import QUIET, fit, make_data, make_method, values
from tests.support.toy import EXPERTS

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:.*log_dir.*", "ignore:.*is not resumable.*"),
]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


# Steps


def test_batches_per_step_sums_the_losses_of_its_batches(toy, tmp_path):
    """Two batches of 2 cost twice the mean over their 4 samples, for an objective that is a mean over samples."""
    twice = make_method(toy, constraint="none", optimizer=sgd)
    fit(twice, make_data(batch_size=2, count=16, batches_per_step=2), tmp_path, steps=1)
    once = make_method(toy, constraint="none", optimizer=sgd)
    fit(once, make_data(batch_size=4, count=16), tmp_path, steps=1)
    torch.testing.assert_close(values(twice) - 0.3, 2 * (values(once) - 0.3), rtol=1e-3, atol=1e-6)


def test_batches_per_step_hands_each_batch_to_the_objective(toy, tmp_path):
    seen = []

    def objective(step):
        seen.append((step.task, step.indices.tolist(), step.outputs.logits.shape[0], step.num_tasks))
        assert len(step.inputs) == len(step.indices) == len(step.outputs.features)
        assert torch.equal(step.initial, torch.full_like(step.initial, 0.3))
        return Entropy()(step)

    fit(make_method(toy, objective), make_data(batch_size=2, count=20, batches_per_step=3), tmp_path, steps=1)
    steps = seen[-9:]
    assert [task for task, *_ in steps] == [task for task in EXPERTS for _ in range(3)]
    for task in EXPERTS:
        indices = [i for name, batch, size, count in steps if name == task for i in batch]
        assert len(set(indices)) == 6
    assert all(size == 2 and count == 9 for _, _, size, count in steps)


def test_batches_per_step_with_teachers_resumes_and_is_checked(toy, tmp_path):
    method = make_method(toy, Imitation())
    fit(method, make_data(batch_size=2, count=20, batches_per_step=2), tmp_path, steps=3)
    with pytest.raises(InputError, match=r"data\.batches_per_step: expected a whole number >= 1, found 0"):
        make_data(batches_per_step=0)


def test_anchor_counts_once_per_step_whatever_the_batches(toy, tmp_path):
    moved = []
    for count in (1, 2):
        objective = Alignment(logit_weight=1e-9, anchor=1.0)
        method = make_method(toy, objective, constraint="none", optimizer=sgd, reduction="sum")
        with torch.no_grad():
            method.model.coefficients.raw.add_(0.1)  # so that the anchor pulls
        fit(method, make_data(batch_size=2, count=20, batches_per_step=count), tmp_path, steps=1)
        moved.append(0.4 - values(method))
    pull = 0.1 / values(method).numel()
    for step in moved:
        torch.testing.assert_close(step, torch.full_like(step, pull), rtol=1e-3, atol=1e-6)


def test_observers_see_training_steps_only(toy, tmp_path):
    method = make_method(toy)
    seen = []
    method.observers.append(lambda step: seen.append(step.task))
    fit(method, make_data(), tmp_path, steps=2)
    assert seen == [*EXPERTS, *EXPERTS]


# Before the first step


def refused(toy, tmp_path, objective, message):
    method = make_method(toy, objective)
    steps = []
    method.training_step = lambda *args: steps.append(args)
    with pytest.raises(InputError, match=message):
        fit(method, make_data(), tmp_path, steps=1)
    assert not steps
    assert torch.equal(values(method), torch.full_like(values(method), 0.3))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda step: step.outputs.logits.sum(-1), r"must return a scalar tensor, found a tensor of shape \(4,\)"),
        (lambda step: 0.5, "must return a scalar tensor, found float"),
        (lambda step: step.outputs.logits.sum() / 0, r"gives -?inf for task 'red' before the first step"),
        (lambda step: step.outputs.logits.detach().sum(), "does not depend on the merged model's outputs"),
        (lambda step: (step.outputs.logits * 0).sum() + 1, "does not change with the coefficients on the first batch"),
        (lambda step: torch.ones((), requires_grad=True) * 2, "does not change with the coefficients"),
    ],
    ids=["vector", "number", "infinite", "detached", "constant", "own parameter"],
)
def test_objective_that_cannot_work_is_refused_before_the_first_step(toy, tmp_path, objective, message):
    refused(toy, tmp_path, objective, message)


def test_objective_hidden_layer_that_does_not_exist_is_refused_before_the_first_step(toy, tmp_path):
    refused(toy, tmp_path, Alignment(hidden_layers=["blocks.0.dwn"]), r"hidden_layers: 'blocks\.0\.dwn' matches no")


def test_objective_task_weight_of_an_unknown_task_is_refused(toy, tmp_path):
    refused(toy, tmp_path, Alignment(task_weights={"rad": 2.0}), r"objective\.task_weights: no task 'rad'\. Did you")


def test_trying_an_objective_leaves_the_random_state_alone(toy, tmp_path, monkeypatch):
    method = make_method(toy, lambda step: Entropy()(step) + torch.rand(()) * 0)
    attempt, states = module.try_objective, []

    def remember(*arguments):
        states.append(torch.get_rng_state())
        attempt(*arguments)
        states.append(torch.get_rng_state())

    monkeypatch.setattr(module, "try_objective", remember)
    fit(method, make_data(), tmp_path, steps=1)
    assert torch.equal(*states)


class Two:
    def __call__(self, step, other):
        return step


class Layers:
    hidden_layers = "blocks.0"

    def __call__(self, step):
        return step


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("entropy", "objective: expected a callable that takes a TaskStep, found 'entropy'"),
        (Entropy, "objective: expected a callable that takes a TaskStep, found <class"),
        (Two(), r"objective Two: expected a call with \(step\), found \(step, other\)"),
        (lambda: 0, r"objective .*: expected a call with \(step\), found \(\)"),
        (Layers(), r"Layers\.hidden_layers: expected a list of module paths or globs, found 'blocks.0'"),
    ],
    ids=["text", "class", "two arguments", "none", "hidden_layers"],
)
def test_check_objective_refuses_what_cannot_be_called_with_a_step(toy, objective, message):
    with pytest.raises(InputError, match=message):
        check_objective(objective)
    with pytest.raises(InputError, match=message):
        make_method(toy, objective)


@pytest.mark.slow
def test_objective_of_a_separate_package_runs_and_its_mistakes_are_one_line(configs, tmp_path, monkeypatch, capsys):
    """A package on PYTHONPATH with its own yaml, through the command line."""
    package = tmp_path / "elsewhere" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "objectives.py").write_text(
        "from dataclasses import dataclass\n\n"
        "@dataclass(frozen=True)\nclass Confidence:\n    power: float = 2.0\n\n"
        "    def __call__(self, step):\n"
        "        return -(step.outputs.logits.softmax(-1) ** self.power).sum(-1).mean()\n\n"
        "class Vector(Confidence):\n    def __call__(self, step):\n        return step.outputs.logits.sum(-1)\n\n"
        "class Broken(Confidence):\n    def __call__(self, step):\n        return step.outputs.logit.mean()\n\n"
        "class Signature(Confidence):\n    def __call__(self, logits, labels):\n        return logits.sum()\n"
    )
    (configs / "objective").mkdir()
    yaml = configs / "objective" / "confidence.yaml"
    yaml.write_text("_target_: my_package.objectives.Confidence\npower: 3.0\n")
    arguments = [
        "--config-dir", str(configs), "pool=two", "data=tiny", "objective=confidence", "trainer=cpu", "steps=1",
        "evaluate=false", "report=false",
    ]  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["adapt", *arguments, "run_dir=run"])
    assert exit_info.value.code == 0
    assert (tmp_path / "run" / "merged.safetensors").is_file()
    for command, name, words in (
        ("adapt", "Vector", "must return a scalar"),
        ("check", "Signature", "expected a call with (step)"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([command, *arguments, "run_dir=no", f"objective._target_=my_package.objectives.{name}"])
        assert exit_info.value.code == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    with pytest.raises(AttributeError, match="logit"):  # a fault of its own: where it is, and no folder in the way
        cli.main(["adapt", *arguments, "run_dir=no", "objective._target_=my_package.objectives.Broken"])
    assert not (tmp_path / "no").exists()


# Pairs


OBJECTIVES = {
    "entropy": Entropy(),
    "reliable": Entropy(reliable=0.99),
    "imitation": Imitation(),
    "hard": Imitation(targets="hard", drop_unsure=True),
    "infomax": InfoMax(),
    "alignment": Alignment(hidden_layers=("blocks.*.down",), hidden_weight=0.01, feature_weight=0.1),
    "combine": Combine({"infomax": InfoMax(), "imitation": Imitation()}, {"infomax": 0.1}),
}
METHODS = {
    "gradient": {},
    "hard": {"step_rule": "line_search"},
    "soft": {"mode": "soft", "inner_steps": 2},
}
GRANULARITIES = ("task", "block", "layer", "chunk", "column", "row")
CONSTRAINTS = ("box", "clamp", "sigmoid", "simplex", "none")


def pairs():
    """A set of settings that holds each pair of choices at least once, found greedily."""
    axes = (tuple(OBJECTIVES), GRANULARITIES, CONSTRAINTS, tuple(METHODS))
    allowed = [c for c in product(*axes) if c[3] == "gradient" or c[2] in ("simplex", "none")]
    open_pairs = {(i, c[i], j, c[j]) for c in allowed for i in range(4) for j in range(i + 1, 4)}

    def new(choice):
        return {(i, choice[i], j, choice[j]) for i in range(4) for j in range(i + 1, 4)} & open_pairs

    result = []
    while open_pairs:
        best = max(allowed, key=lambda choice: len(new(choice)))
        open_pairs -= new(best)
        result.append(best)
    return result


def make_pair(toy, objective, granularity, constraint, method):
    pool = toy.pool()
    model = MergedModel(toy.encoder, pool, Coefficients(pool, granularity, 0.3, constraint), toy.heads)
    kind = GradientMerging if method == "gradient" else FrankWolfeMerging
    return kind(model, OBJECTIVES[objective], **METHODS[method])


@pytest.mark.parametrize(("objective", "granularity", "constraint", "method"), pairs())
def test_pairs_of_choices_move_the_coefficients_within_their_constraint(
    toy, tmp_path, objective, granularity, constraint, method
):
    merging = make_pair(toy, objective, granularity, constraint, method)
    before = merging.model.coefficients().detach().clone()
    fit(merging, make_data(), tmp_path, steps=3)
    after = merging.model.coefficients().detach()
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    if constraint != "none":
        assert ((after >= 0) & (after <= 1)).all()
    if constraint == "simplex":
        torch.testing.assert_close(after.sum(0), torch.ones(after.shape[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("constraint", ["box", "clamp", "sigmoid"])
@pytest.mark.parametrize("method", ["hard", "soft"])
def test_impossible_pairs_are_refused_with_the_reason(toy, constraint, method):
    with pytest.raises(InputError, match="moves in the convex hull of the experts, so constraint must be simplex or"):
        make_pair(toy, "entropy", "layer", constraint, method)
