"""Criteria that need no label and the guard against collapse: measures, actions, resume, and a run that is saved."""

import functools
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import Subset

from adamerge import Coefficients, ExpertPool, InputError, MergedModel, zoo
from adamerge.backbones import OpenClip
from adamerge.callbacks import CollapseGuard, ExportMergedWeights, UnlabeledCriteria
from adamerge.commands import cli
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.batch import Outputs
from adamerge.methods import GradientMerging
from adamerge.model.task_step import TaskStep
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.results.evaluation import score_tasks
from tests.support.fits import QUIET, batches, every_step, fit, make_data, make_method, values

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:.*log_dir.*", "ignore:.*is not resumable.*"),
]


class Sharpen:
    """Drives every prediction of one task into the class 0."""

    hidden_layers = ()

    def __init__(self, task):
        self.task = task

    def __call__(self, step):
        loss = -step.outputs.logits.log_softmax(-1)[:, 0].mean()
        return loss if step.task == self.task else loss * 0


def collapsing(toy, guard, tmp_path, steps=40, **options):
    method = make_method(toy, Sharpen("green"), "row", "none", lr=0.1)
    trainer = fit(method, batches(toy, steps), tmp_path, steps=steps, callbacks=[guard, *options.pop("also", [])])
    return method, trainer


def test_guard_warns_once_per_task_that_collapses(toy, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "adamerge"):
        _, trainer = collapsing(toy, CollapseGuard("warn", window=3), tmp_path)
    messages = [record.message for record in caplog.records if "collapses" in record.message]
    assert any("task 'green' collapses: its predictions name ever fewer classes" in text for text in messages)
    tasks = [text.split("task ")[1].split(" ")[0] for text in messages]
    assert len(tasks) == len(set(tasks))
    assert trainer.global_step == 40
    assert "guard/marginal/green" in trainer.callback_metrics


def test_guard_measures_the_marginal_entropy_as_a_share_of_its_largest_value(toy, tmp_path):
    guard = CollapseGuard(window=5)
    method = make_method(toy, lr=0.0)
    fit(method, batches(toy, 1), tmp_path, steps=1, callbacks=[guard])
    mean = method.model.logits(toy.inputs["green"], "green").softmax(-1).mean(0).detach()
    expected = -(mean * mean.log()).sum().item() / math.log(4)
    assert guard._criteria.criteria("green")["marginal"] == pytest.approx(expected, rel=1e-5)


def test_guard_lowers_the_weight_of_the_task_step_by_step(toy, tmp_path):
    guard = CollapseGuard("lower", window=3, marginal=0.8, factor=0.5)
    method, trainer = collapsing(toy, guard, tmp_path)
    assert trainer.global_step == 40
    assert math.log2(method.task_weights["green"]) in range(-40, 0)


def test_guard_stops_and_what_was_learned_is_exported(toy, tmp_path):
    guard = CollapseGuard("stop", window=3)
    export = ExportMergedWeights(tmp_path / "out")
    _, trainer = collapsing(toy, guard, tmp_path, also=[export])
    assert 3 < trainer.global_step < 40
    assert "collapses: its predictions name ever fewer classes" in guard.reason
    assert export.files["merged"].is_file()


def test_guard_that_stops_goes_back_to_before_the_collapse(toy, tmp_path):
    seen = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.setdefault(trainer.global_step, values(pl_module))

    guard = CollapseGuard("stop", window=3)
    method, trainer = collapsing(toy, guard, tmp_path, also=[Keep()])  # called after the guard
    step = int(guard.reason.split("until step ")[1].split(" ")[0])
    assert 3 <= step < trainer.global_step
    assert torch.equal(values(method), seen[step])


def test_guard_is_silent_while_nothing_collapses(toy, tmp_path):
    guard = CollapseGuard("stop", window=3, disagreement=0.5)
    trainer = fit(make_method(toy, Imitation()), make_data(), tmp_path, steps=10, callbacks=[guard])
    assert guard.reason is None
    assert trainer.global_step == 10


def test_guard_disagreement_asks_the_experts_and_acts_on_its_rise(toy, tmp_path):
    guard = CollapseGuard("stop", marginal=0.0, disagreement=0.2, window=1)

    class Against:
        def __call__(self, step):  # away from the expert's class
            return step.outputs.logits.log_softmax(-1).gather(-1, step.teacher().logits.argmax(-1, True)).mean()

    method = make_method(toy, Against(), "row", "none", lr=0.1)
    trainer = fit(method, make_data(batch_size=7), tmp_path, steps=60, callbacks=[guard])
    assert "it leaves its expert (disagreement" in guard.reason
    assert trainer.global_step < 60
    quiet = make_method(toy)
    asked = []
    quiet.model.expert_outputs = lambda *args: asked.append(args) or iter(())
    fit(quiet, make_data(), tmp_path, steps=1, callbacks=[CollapseGuard()])
    assert not asked


def test_guard_resumed_lowers_and_goes_on_as_uninterrupted(toy, tmp_path):
    def run(guard, **options):
        method = make_method(toy, Entropy(), "row", "none", lr=0.1)
        own = every_step(tmp_path) if "resume" not in options else {}
        own["callbacks"] = [guard, *own.get("callbacks", [])]
        fit(method, make_data(), tmp_path, steps=16, **own, **options)
        return method

    settings = {"action": "lower", "window": 2, "marginal": 0.95}
    whole = run(CollapseGuard(**settings))
    assert whole.task_weights
    resumed = run(CollapseGuard(**settings), resume=tmp_path / "step=9.ckpt")
    assert resumed.task_weights == whole.task_weights
    assert torch.equal(values(resumed), values(whole))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "shout"}, "CollapseGuard.action: .*found 'shout'"),
        ({"marginal": 2}, r"CollapseGuard.marginal: expected a number in \[0, 1\], found 2"),
        ({"disagreement": -1}, r"CollapseGuard.disagreement: expected a number in \[0, 1\]"),
        ({"window": 0}, "CollapseGuard.window: .*>= 1"),
    ],
)
def test_guard_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        CollapseGuard(**options)


# Criteria


class Seen(Callback):
    """Keeps what is logged."""

    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, *_):
        self.metrics.append({key: value.item() for key, value in trainer.callback_metrics.items()})


def adapt(toy, folder, *callbacks, objective=None, steps=4, **options):
    method = make_method(toy, objective, lr=0.05)
    fit(method, make_data(), folder, steps=steps, callbacks=[*callbacks, *options.pop("callbacks", [])], **options)
    return method


def test_criteria_of_one_batch_are_entropies_as_a_share_of_the_largest(toy, tmp_path):
    seen = Seen()
    method = make_method(toy, Imitation(), lr=0.0)
    fit(method, batches(toy, 1), tmp_path, steps=1, callbacks=[UnlabeledCriteria(), seen])
    p = method.model.logits(toy.inputs["green"], "green").softmax(-1).detach()
    found = seen.metrics[0]
    assert found["unlabeled/entropy/green"] == pytest.approx(-(p * p.log()).sum(1).mean().item() / math.log(4))
    mean = p.mean(0)
    assert found["unlabeled/marginal/green"] == pytest.approx(-(mean * mean.log()).sum().item() / math.log(4), rel=1e-5)
    expert = method.model.teacher("green", toy.inputs["green"], toy.indices["green"]).logits
    differing = (p.argmax(1) != expert.argmax(1)).float().mean().item()
    assert found["unlabeled/disagreement/green"] == pytest.approx(differing)


def test_criteria_ask_no_expert_where_the_objective_does_not(toy, tmp_path):
    seen = Seen()
    adapt(toy, tmp_path, UnlabeledCriteria(), seen)
    assert "unlabeled/marginal/green" in seen.metrics[-1]
    assert not [key for key in seen.metrics[-1] if "disagreement" in key]


def test_criteria_leave_training_as_it_is(toy, tmp_path):
    plain = adapt(toy, tmp_path, objective=Imitation())
    watched = adapt(toy, tmp_path, UnlabeledCriteria(), objective=Imitation())
    assert torch.equal(values(plain), values(watched))


def test_criteria_go_on_after_a_resume(toy, tmp_path):
    whole, resumed = Seen(), Seen()
    saving = every_step(tmp_path / "checkpoints")
    adapt(toy, tmp_path, UnlabeledCriteria(), whole, objective=Imitation(), steps=6, **saving)
    checkpoint = tmp_path / "checkpoints" / "step=3.ckpt"
    adapt(toy, tmp_path, UnlabeledCriteria(), resumed, objective=Imitation(), steps=6, resume=checkpoint)
    for key, value in whole.metrics[-1].items():
        assert resumed.metrics[-1][key] == pytest.approx(value, abs=1e-6), key


def test_criteria_skip_what_is_not_finite_and_single_classes():
    criteria = UnlabeledCriteria()
    for logits in (torch.tensor([[math.nan, 0.0]]), torch.zeros(3, 1)):
        criteria.observe(SimpleNamespace(task="a", outputs=Outputs(logits)))
    assert criteria._criteria._sums == {}


def test_task_step_asks_its_expert_once():
    asked = []

    def teacher(task, inputs, indices):
        asked.append(task)
        return Outputs(torch.zeros(1, 2), torch.zeros(1, 2), {})

    outputs = Outputs(torch.zeros(1, 2), torch.zeros(1, 2), {})
    step = TaskStep("a", torch.zeros(1), torch.zeros(1), outputs, torch.zeros(1, 1), teacher, None)
    assert step.teacher() is step.teacher()
    assert asked == ["a"]


def test_means_of_coefficients_are_logged_by_expert(toy, tmp_path):
    seen = Seen()
    method = adapt(toy, tmp_path, seen, steps=2)
    for name, row in zip(method.model.pool.expert_names, values(method), strict=True):
        assert abs(seen.metrics[-1][f"coefficient/{name}"] - row.mean()) < 0.1


# Whole runs


@pytest.mark.slow
def test_guard_saves_a_run_whose_stream_holds_one_class(tmp_path):
    """Entropy on 64 images of one class costs the other classes; the guard stops it before it does."""
    tasks, names = zoo.tasks(), ("latin", "mnist")
    files = zoo.files()
    experts = {name: files / "experts" / f"{name}.safetensors" for name in zoo.TASKS}
    pool = ExpertPool.from_files(files / "base.safetensors", experts, key_map="visual.")
    backbone = OpenClip(str(files), tokenizer=zoo.Tokenizer())
    heads = backbone.heads(pool.source, {}, {name: tasks[name] for name in names})
    streams = {}
    for name in names:
        images = tasks[name].dataset
        of_class = [i for i in range(len(images)) if int(images[i][1]) == 3]
        adapt, evaluate = Subset(images, of_class[:64]), Subset(images, range(0, len(images), 2))
        streams[name] = Task(adapt=adapt, evaluate=evaluate, classes=tasks[name].class_names)

    def mean_accuracy(steps, callbacks):
        data = UnlabeledTasks(streams, batch_size=16)
        model = MergedModel(backbone.encoder(), pool, Coefficients(pool, "row", 0.3, "none"), heads)
        method = GradientMerging(model, Entropy(), functools.partial(torch.optim.Adam, lr=0.01))
        trainer = fit(method, data, tmp_path, steps=steps, callbacks=callbacks)
        scores = score_tasks(model, model.merge(), data)
        return sum(score.accuracy for score in scores.values()) / len(scores), trainer.global_step

    guard = CollapseGuard("stop", window=5)
    start, _ = mean_accuracy(1, [])
    unguarded, _ = mean_accuracy(100, [])
    guarded, steps = mean_accuracy(100, [guard])
    print(f"start {start:.3f}, entropy {unguarded:.3f}, guarded {guarded:.3f}, stopped at step {steps}")
    assert steps < 100
    assert "collapses" in guard.reason
    assert unguarded < start - 0.05
    assert guarded > start - 0.02


@pytest.mark.slow
def test_guard_that_stops_a_run_of_the_command_exits_with_3(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["callbacks.collapse_guard.action=stop", "callbacks.collapse_guard.marginal=1.0", "data.limit=20"]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["adapt", "callbacks=collapse_guard", *options, "trainer=cpu", "evaluate=false", "run_dir=run"])
    assert exit_info.value.code == 3
    assert "collapses" in capsys.readouterr().err
    assert (tmp_path / "run" / "merged.safetensors").is_file()
