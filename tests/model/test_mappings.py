"""Networks on mappings of tensors of unequal lengths: padding never counts, wherever the parts of a batch run."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from adamerge import Coefficients, ExpertPool, InputError, MergedModel, Outputs, merge
from adamerge.callbacks import KeepBest
from adamerge.callbacks.unlabeled import RunningCriteria
from adamerge.data.batch import pad, read_output
from adamerge.merges.fisher import Fisher, fisher_sums_of_rows
from adamerge.merges.regmean import RegMean, RegMeanPlusPlus
from adamerge.methods import ShardedStrategy
from adamerge.model.encoder import EncoderOptions, Runner, facts_of, fused
from adamerge.model.task_step import TaskStep
from adamerge.objectives.alignment import Alignment
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.objectives.infomax import InfoMax
from tests.support.fits import QUIET
from tests.support.gradients import gradient, one_by_one
from tests.support.processes import run_ranks
from tests.support.texts import TASKS, learned, make_data, make_model, read, texts, valid
from tests.support.toy import make_toy, save_files

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:.*workers.*"),
    pytest.mark.filterwarnings("ignore:.*resumable.*"),
]
LAYERS = ("layers.*",)


OBJECTIVES = [Entropy(), Imitation(), Alignment(hidden_layers=LAYERS, anchor=0), InfoMax(0)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_padded_batch_has_the_gradient_of_its_samples_one_by_one(objective):
    model = make_model()
    samples = {task: texts(6, seed) for seed, task in enumerate(TASKS)}
    whole = gradient(
        model, objective, {task: pad(of_task) for task, of_task in samples.items()}, dict.fromkeys(TASKS, 1)
    )
    torch.testing.assert_close(whole, one_by_one(model, objective, samples), rtol=0, atol=1e-12)
    assert whole.abs().max() > 1e-3


def test_values_at_padding_change_nothing():
    model = make_model()
    batch = pad(texts(6, 0))
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 5)}
    first, second = (gradient(model, Imitation(), {"one": inputs}, {"one": 1}) for inputs in (batch, other))
    assert torch.equal(first, second)


# Parts of a batch


def test_accumulated_batches_are_one_batch(tmp_path):
    whole = learned(tmp_path, make_data(8))
    parts = learned(tmp_path, make_data(2), accumulate_grad_batches=4)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert (whole - 0.3).abs().max() > 1e-3


def test_batches_of_a_step_are_summed_by_their_rows(tmp_path):
    whole = learned(tmp_path, make_data(8), lr=0.5)
    parts = learned(tmp_path, make_data(2, batches_per_step=4), lr=0.5 / 4)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 8, None])
def test_micro_batches_change_nothing(micro_batch):
    model, batches = make_model(), {task: pad(texts(4, 1, longest=4)) for task in TASKS}
    values = model.coefficients().detach()
    gradients = []
    for limit in ("auto", micro_batch):
        with model.merged(values, micro_batch=limit) as merged:
            for group in merged.groups(batches):
                merged.backward(sum(outputs.rows().square().mean() for outputs in merged(group).values()))
        gradients.append(merged.gradient)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_rows_that_only_the_output_tells_are_refused_in_steps_of_several_parts(tmp_path):
    model = make_model()
    model.read, model.valid = lambda output, inputs: replace(read(output, inputs), valid=valid(inputs)), None
    learned(tmp_path, make_data(2), 1, model=model)
    with pytest.raises(InputError, match=r"method valid\(inputs\)"):
        learned(tmp_path, make_data(2), 1, model=model, accumulate_grad_batches=2)


def of_rank(folder, sharded, batch_size, distribute="samples", accumulate=1):
    options = (
        {"strategy": ShardedStrategy() if sharded else "ddp", "devices": 2}
        if torch.distributed.is_initialized()
        else {}
    )
    data = make_data(batch_size, distribute=distribute)
    model = make_model(folder if sharded else None)
    return learned(folder, data, 2, model=model, accumulate_grad_batches=accumulate, **options)


@pytest.mark.parametrize(
    ("sharded", "distribute", "accumulate"), [(False, "samples", 2), (False, "tasks", 1), (True, "samples", 1)]
)
def test_two_processes_with_unequal_lengths_learn_what_one_does(sharded, distribute, accumulate, tmp_path):
    expected = of_rank(tmp_path, sharded, 8 * accumulate)
    results = run_ranks(of_rank, 2, tmp_path, sharded, 4, distribute, accumulate, timeout=200)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_keep_best_weighs_held_out_texts_by_their_rows(tmp_path):
    losses = []
    for batch_size in (1, 8):
        keep = KeepBest(every=1)
        learned(tmp_path, make_data(batch_size, holdout=0.5), 1, lr=0, callbacks=[keep])
        losses.append(keep.best[1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_criteria_count_rows():
    criteria, logits = RunningCriteria(1), torch.tensor([[[9.0, 0.0], [0.0, 9.0]], [[9.0, 0.0], [0.0, 9.0]]])
    mask = torch.tensor([[True, False], [True, False]])
    step = TaskStep("one", logits, torch.arange(2), Outputs(logits, valid=mask), torch.zeros(1, 1), None, None)
    criteria.observe(step, asks_expert=False)
    criteria.update()
    assert criteria.criteria("one")["marginal"] < 0.01  # padding alone names the other class


# Teachers


def test_cached_answers_are_those_of_the_rows_in_any_order():
    model, samples = make_model(), texts(6, 3)
    fresh = model.teacher("one", pad(samples), torch.arange(6), LAYERS)
    assert len(fresh.rows()) == sum(max(0, len(s["input_ids"]) - 1) for s in samples)
    assert fresh.features is None
    order = torch.tensor([4, 0, 5])
    cached = model.teacher_cache.get("one", order)
    again = make_model().teacher("one", pad([samples[i] for i in order]), order, LAYERS)
    torch.testing.assert_close(cached.rows(), again.rows(), rtol=0, atol=1e-12)
    for name in ("layers.0", "layers.1"):
        torch.testing.assert_close(cached.hidden[name], again.hidden[name], rtol=0, atol=1e-12)


# Merges that read the network's inputs


@pytest.mark.parametrize("rule", [RegMean(), RegMeanPlusPlus(), Fisher(draws=2)], ids=lambda rule: type(rule).__name__)
def test_rules_leave_padding_out(rule):
    results = []
    for batch_size in (1, 8):
        model = make_model()
        results.append(dict(rule(model.pool, model, make_data(4, evaluation_batch_size=batch_size))))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=0, atol=1e-8)
    assert any(not torch.equal(tensor, model.pool.base[name]) for name, tensor in results[0].items())


def test_fisher_of_all_classes_is_the_definition_where_a_text_has_one_row():
    model, batch = make_model(), pad([text for text in texts(30, 5) if len(text["input_ids"]) == 2][:3])
    params = {name: tensor.clone() for name, tensor in model.expert_parameters("one").items()}
    sums = list(fisher_sums_of_rows(lambda p, inputs: model.outputs(inputs, "one", p).rows(), params, batch))
    leaf = params["head.bias"].clone().requires_grad_()
    expected = 0
    for logits in model.outputs(batch, "one", {**params, "head.bias": leaf}).rows():
        for p, score in zip(logits.softmax(-1).detach(), logits.log_softmax(-1), strict=True):
            expected = expected + p * torch.autograd.grad(score, leaf, retain_graph=True)[0].square()
    assert [count for _, count in sums] == [1, 1, 1]
    torch.testing.assert_close(sum(part["head.bias"] for part, _ in sums), expected)
    with pytest.raises(InputError, match=r"draws=1"):
        list(fisher_sums_of_rows(lambda p, i: model.outputs(i, "one", p).rows(), params, pad(texts(3, 5))))


# Networks


def test_a_glob_takes_the_outermost_modules_that_run_and_a_name_must(tmp_path):
    model = make_model()
    outputs = next(iter(model.expert_outputs("one", [("one", pad(texts(3, 0)))], ("*",))))
    assert {"embedding", "layers.0", "layers.1", "head"} <= outputs.hidden.keys()
    assert not {"layers", "unused"} & outputs.hidden.keys()
    for name in ("layers", "unused"):
        with pytest.raises(InputError, match=f"'{name}'"):
            next(iter(make_model().expert_outputs("one", [("one", pad(texts(3, 0)))], (name,))))


def test_what_a_network_keeps_to_itself_does_not_go_to_it():
    model, batch = make_model(), pad(texts(4, 0))
    expected = model.logits(batch, "one")
    assert torch.equal(model.logits({**batch, "_answer": torch.ones(4, 1)}, "one"), expected)
    with pytest.raises(TypeError, match="answer"):
        model.logits({**batch, "answer": torch.ones(4, 1)}, "one")


def test_classes_on_any_axis_give_the_same_rows():
    class Segments(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 3, 1)

        def forward(self, images):
            return self.layer(images)

    network, images = Segments(), torch.randn(2, 1, 4, 5)
    base = network.state_dict()
    pool = ExpertPool.from_state_dicts(base, {"one": {name: tensor + 0.5 for name, tensor in base.items()}})
    last = partial(read_output, class_axis=1)
    losses = []
    for reads in (last, lambda output, _: Outputs(output.movedim(1, -1).contiguous())):
        model = MergedModel(network, pool, Coefficients(pool, "layer"), {}, read=reads)
        assert model.logits(images, "one").shape == (2, 4, 5, 3)
        losses.append(gradient(model, Imitation(), {"one": images}, {"one": 1}))
    torch.testing.assert_close(*losses)
    with pytest.raises(InputError, match=r"\(2, 3, 4, 5\).*classes"):
        MergedModel(network, pool, Coefficients(pool, "layer"), {}).logits(images, "one")


def test_micro_batch_counts_positions_as_wide_as_an_embedding():
    ids = {"input_ids": torch.ones(16, 48, dtype=torch.long), "attention_mask": torch.ones(16, 48, dtype=torch.long)}
    assert facts_of(ids, 384).entries == 48 * 384
    assert facts_of({**ids, "pixel_values": torch.ones(16, 3, 8, 8)}, 2).entries == 48 * 2 + 192
    many = {task: {key: tensor.repeat(10, 1) for key, tensor in ids.items()} for task in TASKS}
    assert fused(many, "auto", 384) == [["one"], ["two"]]
    assert fused(many, "auto", 8) == [["one", "two"]]


def test_recomputed_and_compiled_modules_see_the_same(tmp_path):
    batches = {task: pad(texts(4, 1)) for task in TASKS}
    expected = make_model()
    recomputing = make_model()
    recomputing._runner = type(expected._runner)(recomputing.encoder, EncoderOptions(checkpoint=True))
    one, two = (gradient(model, Entropy(), batches, dict.fromkeys(TASKS, 1)) for model in (expected, recomputing))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_a_whole_checkpoint_by_the_files_names_runs(tmp_path):
    toy = make_toy()
    base = {**{f"visual.{name}": tensor for name, tensor in toy.base.items()}, "text.weight": torch.ones(3)}
    experts = {name: {f"visual.{key}": tensor for key, tensor in e.items()} for name, e in toy.experts.items()}
    path, paths = save_files(tmp_path, base, {name: {**e, "text.weight": torch.ones(3)} for name, e in experts.items()})
    pool = ExpertPool.from_files(path, paths, key_map="visual.")
    coefficients = Coefficients(pool, "layer")
    model = MergedModel(toy.encoder, pool, coefficients, toy.heads)
    state_dict = merge(pool, coefficients, detach=True)
    assert "text.weight" in state_dict
    expected = model.logits(toy.inputs["red"], "red")
    torch.testing.assert_close(model.logits(toy.inputs["red"], "red", state_dict), expected, rtol=1e-5, atol=1e-6)


def test_valid_rows_are_counted_before_the_network_runs():
    batch = pad(texts(5, 2))
    assert make_model().count_rows(batch) == int(valid(batch).sum())


def test_channels_last_is_of_the_images_of_a_mapping():
    class Both(torch.nn.Module):
        def forward(self, pixel_values, input_ids):
            self.seen = pixel_values.is_contiguous(memory_format=torch.channels_last), input_ids.is_contiguous()
            return pixel_values.flatten(1)

    network = Both()
    inputs = {"pixel_values": torch.ones(2, 3, 4, 4), "input_ids": torch.ones(2, 3, 4, 4, dtype=torch.long)}
    Runner(network, EncoderOptions(channels_last=True))(network, inputs)
    assert network.seen == (True, True)
