"""Models of which each process holds a part: the same result as one process that holds all."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import LambdaCallback
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from adamerge import Coefficients, ExpertPool, InputError, MergedModel, merge
from adamerge.callbacks import CollapseGuard, ExportMergedWeights, KeepBest
from adamerge.errors import GuardError
from adamerge.methods import FrankWolfeMerging, GradientMerging, ShardedStrategy
from adamerge.model.encoder import EncoderOptions
from adamerge.model.granularity import Block, Chunk, Column, Layer, Row, TaskWise
from adamerge.model.merge import merge_into
from adamerge.model.sharding import ShardedModel
from adamerge.model.task_step import TaskStep
from adamerge.objectives.alignment import Alignment
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.pool.part import PoolPart
from adamerge.system import ranks
from tests.support.adapters import random_adapter
from tests.support.command_line import as_rank, call, refusal
from tests.support.fits import QUIET, every_step, fit, values
from tests.support.processes import run_ranks as run_processes
from tests.support.rank_data import BadOnSecond, make_data
from tests.support.toy import EXPERTS, ToyBlock, group_ids, make_toy, perturbed, save_files
from tests.support.traffic import Traffic

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:.*workers.*"),
    pytest.mark.filterwarnings("ignore:.*is not resumable.*"),
]

GRANULARITIES = {
    "task": TaskWise(),
    "block": Block(),
    "layer": Layer(),
    "chunk": Chunk(5),
    "row": Row(),
    "column": Column(),
}
run_ranks = partial(run_processes, timeout=200)  # torch starts slowly on busy machines
ADAM = partial(torch.optim.Adam, lr=0.02)


# Parts of groups and pools


@given(st.sampled_from(sorted(GRANULARITIES)), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=9))
def test_groups_of_a_part_are_those_of_its_entries(name, cuts):
    shapes = {"a": (7, 5), "b": (6,), "c": (), "d": (3, 2, 2, 2), "e": (5, 1), "f": (1, 9)}
    index = GRANULARITIES[name](shapes)
    ranges = {}
    for (key, shape), pair in zip(shapes.items(), cuts, strict=False):
        size = torch.Size(shape).numel()
        first, last = sorted(round(share * size) for share in pair)
        ranges[key] = range(first, last)
    part = index.part(ranges)
    assert (part.size, part.labels, part.frozen) == (index.size, index.labels, index.frozen)
    for key, entries in ranges.items():
        whole = group_ids(index, key, shapes[key]).flatten()
        assert torch.equal(group_ids(part, key, (len(entries),)), whole[entries.start : entries.stop])
        assert len(part.segments[key]) <= 5 * len(index.segments[key])


def files(folder, toy):
    path = folder / "pool"
    path.mkdir(exist_ok=True)
    return save_files(path, toy.base, toy.experts)


@pytest.fixture
def mapped(tmp_path, toy64):
    base, experts = files(tmp_path, toy64)
    return ExpertPool.from_files(base, experts, mapped=True)


@pytest.mark.parametrize("name", GRANULARITIES)
def test_merges_of_parts_make_up_the_whole(name, mapped, toy64):
    index = GRANULARITIES[name](mapped.shapes)
    lambdas = torch.rand(len(EXPERTS), index.size, dtype=torch.float64)
    whole = {key: torch.empty(shape, dtype=torch.float64) for key, shape in mapped.shapes.items()}
    merge_into(whole, toy64.pool(), index, lambdas)
    pieces = {key: [] for key in mapped.names}
    for number in range(3):
        ranges = {
            key: range(number * tensor.numel() // 3, (number + 1) * tensor.numel() // 3)
            for key, tensor in whole.items()
        }
        part = PoolPart(mapped, ranges)
        out = {key: torch.empty(len(entries), dtype=torch.float64) for key, entries in ranges.items()}
        merge_into(out, part, index.part(ranges), lambdas)
        for key, tensor in out.items():
            pieces[key].append(tensor)
    for key, tensor in whole.items():
        torch.testing.assert_close(torch.cat(pieces[key]), tensor.flatten(), rtol=0, atol=1e-14)


def test_mapped_pool_is_the_pool_and_holds_nothing(mapped, toy64):
    pool = toy64.pool()
    assert mapped.shapes == pool.shapes
    assert mapped.nbytes == 0
    for name in pool.names:
        assert torch.equal(mapped.base[name], pool.base[name])
        assert torch.equal(mapped.task_vectors(name), pool.task_vectors(name))
    own, expected = mapped.expert_parameters("green"), pool.expert_parameters("green")
    assert {name: tensor.sum() for name, tensor in own.items()} == {n: t.sum() for n, t in expected.items()}
    coefficients = [Coefficients(p, "layer", init=0.4) for p in (mapped, pool)]
    first, second = (merge(p, c, detach=True) for p, c in zip((mapped, pool), coefficients, strict=True))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_mapped_pool_refuses_what_needs_memory(tmp_path, toy64):
    base, experts = files(tmp_path, toy64)
    for options, found in (({"storage": "stream"}, "stream"), ({"dtype": torch.bfloat16}, "bfloat16")):
        with pytest.raises(InputError, match=f"{found}.*trainer=fsdp"):
            ExpertPool.from_files(base, experts, mapped=True, **options)


# Two processes


def make_model(
    folder, dtype, granularity="layer", constraint="box", options=None, exclude=None, adapters=False, replicated=False
):
    """The toy's model; of several processes in parts, unless it is replicated. Rank 0's files serve all."""
    toy = make_toy(dtype)
    if ranks.is_first():
        base, experts = files(folder, toy)
        for seed, name in enumerate(EXPERTS if adapters else ()):
            random_adapter(folder / "pool" / name, ADAPTED, rank=seed + 1, seed=seed, lora_alpha=0.1)
    ranks.wait()
    base, experts = (
        folder / "pool" / "base.safetensors",
        {n: folder / "pool" / (n if adapters else f"{n}.safetensors") for n in EXPERTS},
    )
    pool = ExpertPool.from_files(base, experts, mapped=ranks.count() > 1 and not replicated, exclude=exclude)
    kind = ShardedModel if ranks.count() > 1 and not replicated else MergedModel
    init = 0.3 if constraint == "box" else "mean"
    coefficients = Coefficients(pool, GRANULARITIES.get(granularity, granularity), init, constraint)
    return kind(toy.encoder, pool, coefficients, toy.heads, options=options)


def trained(folder, batch_size, objective=Entropy, dtype=torch.float64, steps=4, method=None, trainer=None, **others):
    """Fit, and return what was learned, what all processes report, and what was exported."""
    model_options = {
        key: others.pop(key)
        for key in ("granularity", "constraint", "options", "exclude", "adapters", "replicated")
        if key in others
    }
    model = make_model(folder, dtype, **model_options)
    merging = (method or partial(GradientMerging, optimizer=ADAM))(model, objective())
    strategy = ShardedStrategy() if isinstance(model, ShardedModel) else "ddp"
    settings = {"strategy": strategy, "devices": ranks.count()} if ranks.count() > 1 else {}
    settings |= trainer() if trainer else {}
    export = ExportMergedWeights(folder / f"export{ranks.count()}")
    settings["callbacks"] = [*settings.get("callbacks", []), export]
    done = fit(merging, make_data(batch_size, dtype=dtype, **others), folder, steps, **settings)
    ranks.wait()
    assert model.weights.gives_gradients == (getattr(model_options.get("options"), "engine", "merged") == "merged")
    return values(merging), float(done.callback_metrics["adapt/loss"]), load_file(export.dirpath / "merged.safetensors")


def guards():
    return {"callbacks": [CollapseGuard(window=2, disagreement=0.1), KeepBest(every=2)]}


ADAPTED = {"stem": (4, 1, 2, 2), "blocks.0.up": (7, 16), "blocks.0.down": (16, 7), "blocks.1.up": (6, 16)}
BESIDE = {"objective": Imitation, "options": EncoderOptions(engine="beside", checkpoint=True), "distribute": "tasks"}
FRANK_WOLFE = {"constraint": "simplex"}
CASES = {
    **{name: {"granularity": name} for name in GRANULARITIES},
    "imitation, tasks": {"objective": Imitation, "distribute": "tasks"},
    "hidden layers": {"objective": partial(Alignment, hidden_layers=("blocks.0",), logit_weight=0.0)},
    "line search": {"method": partial(FrankWolfeMerging, step_rule="line_search"), **FRANK_WOLFE},
    "recomputed": {"options": EncoderOptions(checkpoint=True)},
    "small passes": {"method": partial(GradientMerging, optimizer=ADAM, micro_batch=5)},
    "accumulated": {"trainer": partial(dict, accumulate_grad_batches=2)},
    "two batches per step": {"objective": Imitation, "batches_per_step": 2, "counts": dict.fromkeys(EXPERTS, 17)},
    "excluded": {"objective": Imitation, "exclude": ["blocks.1.*", "scale"]},
    "directions": {"granularity": "rank"},
    "directions beside": {"granularity": "rank", **BESIDE},
    "adapters": {"adapters": True, "granularity": "row"},
    "adapters beside": {"adapters": True, "granularity": "row", **BESIDE},
    "adapters beside, replicated": {"adapters": True, "granularity": "rank", "replicated": True, **BESIDE},
    "guards": {"objective": Imitation, "trainer": guards, "holdout": 0.4, "counts": {"red": 20, "green": 9, "blue": 5}},
}
FAST = ("chunk", "imitation, tasks")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_two_processes_with_half_each_learn_what_one_does(case, tmp_path):
    options = CASES[case]
    whole, loss, exported = trained(tmp_path, 8, **options)
    found = run_ranks(partial(trained, tmp_path, 4, **options), 2)
    for part, part_loss, merged in found:
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)
        assert part_loss == pytest.approx(loss, abs=1e-10)
        for name, tensor in exported.items():
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-10, msg=name)
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.slow
def test_in_single_precision_parts_agree_to_rounding(tmp_path):
    whole, _, _ = trained(tmp_path, 8, dtype=torch.float32, granularity="row")
    for part, _, _ in run_ranks(partial(trained, tmp_path, 4, dtype=torch.float32, granularity="row"), 2):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_under_autocast_parts_agree_to_its_rounding(tmp_path):
    options = {"dtype": torch.float32, "objective": Imitation, "trainer": partial(dict, precision="bf16-mixed")}
    whole, _, _ = trained(tmp_path, 8, **options)
    for part, _, _ in run_ranks(partial(trained, tmp_path, 4, **options), 2):
        torch.testing.assert_close(part, whole, rtol=0, atol=5e-3)


def exchanged(folder, **options):
    """Count what the third step of a fit exchanges; also the sizes of coefficients and weights."""
    model = make_model(folder, torch.float32, "row", **options)
    traffic = Traffic()
    count = LambdaCallback(
        on_train_batch_start=lambda trainer, *_: traffic.__enter__() if trainer.global_step == 2 else None,
        on_train_batch_end=lambda trainer, *_: traffic.__exit__(None, None, None) if trainer.global_step == 3 else None,
    )
    data = make_data(4, dtype=torch.float32)
    fit(
        GradientMerging(model, Entropy(), ADAM),
        data,
        folder,
        3,
        strategy=ShardedStrategy(),
        devices=2,
        callbacks=[count],
    )
    weights = sum(parameter.numel() for parameter in model.weights.parameters.values()) * 4
    return traffic.bytes, model.coefficients().nbytes, weights


def test_weights_are_gathered_twice_gradients_reduced_once_and_of_coefficients_only_the_gradient(tmp_path):
    for found, coefficients, weights in run_ranks(partial(exchanged, tmp_path), 2):
        assert found["allreduce_"] == coefficients + 4 * (len(EXPERTS) + 1)  # and a loss per task, and whether finite
        assert weights <= found["_reduce_scatter_base_"] <= 1.1 * weights  # rows are padded
        assert weights <= found["_allgather_base_"] <= 2.2 * weights  # the root's are kept from forward to backward


@pytest.mark.slow
def test_weights_beside_which_adapters_are_have_no_gradient_to_exchange(tmp_path):
    options = {"options": EncoderOptions(engine="beside"), "adapters": True}
    for found, coefficients, weights in run_ranks(partial(exchanged, tmp_path, **options), 2):
        assert found["allreduce_"] == coefficients + 4 * (len(EXPERTS) + 1)
        assert not found["_reduce_scatter_base_"]
        assert found["_allgather_base_"] <= 2.2 * weights


def bypassed(folder):
    """Run blocks that use a weight without its module."""

    def forward(block, x):
        return x + block.down(functional.linear(block.norm(x), block.up.weight).tanh())

    ToyBlock.forward = forward
    with pytest.raises(InputError) as caught:
        trained(folder, 4, adapters=True, options=EncoderOptions(engine="beside"))
    return str(caught.value)


@pytest.mark.slow
def test_weight_used_without_its_module_is_refused_beside(tmp_path):
    assert all("cannot follow 'blocks.0.up.weight'" in said for said in run_ranks(partial(bypassed, tmp_path), 2))


@pytest.mark.slow
def test_three_processes_some_with_nothing_of_a_parameter_or_a_task(tmp_path):
    counts = {"red": 4, "green": 2, "blue": 1}
    whole, _, _ = trained(tmp_path, 9, counts=counts, granularity="column", objective=Imitation)
    options = {"counts": counts, "granularity": "column", "objective": Imitation}
    for part, _, _ in run_ranks(partial(trained, tmp_path, 3, **options), 3):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)


def held(folder):
    """What one process keeps after a step: entries of parameters, bytes of the pool's part, and gathered copies."""
    model = make_model(folder, torch.float64, "row")
    merging = GradientMerging(model, Entropy(), ADAM)
    fit(merging, make_data(4), folder, 1, strategy=ShardedStrategy(), devices=2)
    assert all(isinstance(block, FSDPModule) for block in (model.encoder, *model.encoder.blocks))
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    return (
        {name: len(entries) for name, entries in model.weights.ranges.items()},
        model.weights.part.nbytes,
        model.pool.nbytes,
    )


def test_each_process_holds_its_part(tmp_path, toy64):
    (first, first_bytes, mapped), (second, second_bytes, _) = run_ranks(partial(held, tmp_path), 2)
    assert mapped == 0
    sizes = {name: tensor.numel() for name, tensor in toy64.pool().base.items()}
    assert {name: first[name] + second[name] for name in sizes if name != "scale"} == {
        name: size for name, size in sizes.items() if name != "scale"
    }
    whole = 8 * sum(sizes.values()) * (1 + len(EXPERTS))
    assert max(first_bytes, second_bytes) < 0.7 * whole  # rows of 7 and 5 are no halves, stacks are padded


def resumed(folder):
    def run(**options):
        merging = GradientMerging(make_model(folder, torch.float64, "chunk"), Imitation(), ADAM)
        fit(merging, make_data(4), folder, 5, strategy=ShardedStrategy(), devices=2, **options)
        return values(merging)

    return run(**every_step(folder)), run(resume=folder / "step=2.ckpt")


@pytest.mark.slow
def test_a_resume_goes_on_to_the_same_bits(tmp_path):
    for whole, again in run_ranks(partial(resumed, tmp_path), 2):
        assert torch.equal(whole, again)


def stopped(folder):
    with pytest.raises(GuardError) as caught:
        trained(folder, 4, objective=BadOnSecond)
    return str(caught.value)


@pytest.mark.slow
def test_what_goes_wrong_on_one_process_stops_all(tmp_path):
    first, second = run_ranks(partial(stopped, tmp_path), 2)
    assert first == second
    assert "'red' is nan" in first


class AsksUndeclared:
    """An objective that asks the experts and does not say so."""

    def __call__(self, step: TaskStep):
        return (step.outputs.logits - step.teacher().logits).square().mean()


class SecondLook:
    """An objective with passes of its own."""

    def __call__(self, step: TaskStep):
        return step.forward(step.inputs * 0.9).logits.square().mean()


def refusals(folder):
    found = []
    for objective in (AsksUndeclared, SecondLook):
        with pytest.raises(InputError) as caught:
            trained(folder, 4, objective=objective)
        found.append(str(caught.value))
    return found


@pytest.mark.slow
def test_objectives_that_would_leave_processes_waiting_are_refused(tmp_path):
    for undeclared, second in run_ranks(partial(refusals, tmp_path), 2):
        assert "uses_teacher = True" in undeclared
        assert "step.forward" in second
        assert "trainer=ddp" in second


class Tied(torch.nn.Module):
    """Blocks that share a weight with each other, so that they cannot be gathered one by one."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 5)])
        self.blocks[1].weight = self.blocks[0].weight
        self.norm = torch.nn.BatchNorm1d(16)

    def forward(self, images):
        x = self.norm(images.flatten(1))
        for block in self.blocks:
            x = block(x).tanh()
        return x


def tied(folder, batch_size):
    torch.manual_seed(3)
    toy, encoder = make_toy(torch.float64), Tied().double()
    encoder.norm.running_mean.uniform_()
    base = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    experts = {name: perturbed(base) for name in EXPERTS}
    for expert in experts.values():
        expert["blocks.1.weight"] = expert["blocks.0.weight"]
    pool = ExpertPool.from_state_dicts(base, experts, exclude=["norm.running_*"])
    kind = ShardedModel if ranks.count() > 1 else MergedModel
    merging = GradientMerging(kind(encoder, pool, Coefficients(pool, "row"), toy.heads), Imitation(), ADAM)
    settings = {"strategy": ShardedStrategy(), "devices": ranks.count()} if ranks.count() > 1 else {}
    fit(merging, make_data(batch_size), folder, 3, **settings)
    return values(merging)


@pytest.mark.slow
def test_tied_weights_and_buffers(tmp_path):
    whole = tied(tmp_path, 8)
    for part in run_ranks(partial(tied, tmp_path, 4), 2):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)


def test_strategy_refuses_a_model_that_is_not_in_parts(tmp_path):
    toy = make_toy()
    pool = toy.pool()
    merging = GradientMerging(toy.model(pool, Coefficients(pool)), Entropy())
    with pytest.raises(InputError, match="needs a ShardedModel, found MergedModel"):
        fit(merging, make_data(4, dtype=torch.float32), tmp_path, 1, strategy=ShardedStrategy(), devices=1)


# The command line


@pytest.mark.slow
def test_adapt_in_parts_writes_what_one_process_does(arguments, tmp_path, capsys):
    own = [word for word in arguments if not word.startswith("run_dir")]
    small = [*own, "optimizer.lr=0.01", "granularity=row", "first_stage={steps: 2}"]
    assert call("adapt", *small, "data.batch_size=4", "run_dir=one") == 0
    parts = [*small, "pool.storage=auto", "trainer=fsdp", "trainer.accelerator=cpu", "data.batch_size=2", "run_dir=two"]
    (first, printed, _), (second, silent, said) = run_ranks(partial(as_rank, "adapt", *parts), 2)
    assert (first, second) == (0, 0)
    assert "accuracy" in printed
    assert (silent, said) == ("", "")
    whole, merged = (load_file(tmp_path / name / "merged.safetensors") for name in ("one", "two"))
    for name, tensor in whole.items():
        torch.testing.assert_close(merged[name], tensor, rtol=2e-3, atol=2e-5, msg=name)  # rounded to half precision
    rows = [json.loads((tmp_path / name / "summary.json").read_text())["rows"] for name in ("one", "two")]
    for name, row in rows[0].items():
        assert rows[1][name]["mean"] == pytest.approx(row["mean"], abs=0.051), name  # an image of 20 on the edge
    again = run_ranks(partial(as_rank, "adapt", "resume=two"), 2)
    assert [code for code, _, _ in again] == [0, 0]
    # The export is that of the coefficients, byte for byte, in one process too.
    capsys.readouterr()
    assert call("export", "two", "--coefficients", "two/coefficients.json", "--output", "replayed") == 0
    assert (tmp_path / "replayed/merged.safetensors").read_bytes() == (tmp_path / "two/merged.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("pool.storage=stream", "pool.storage: not with trainer=fsdp, found stream"),
        ("+pool.dtype=int8", "pool.dtype: not with trainer=fsdp, found int8"),
        ("transform=ties", "transform: not with trainer=fsdp, found adamerge.transforms.Ties"),
        ("encoder.compile=true", "encoder.compile: not with trainer=fsdp, found True"),
        ("teacher_cache=answers", "teacher_cache: not with trainer=fsdp, found answers"),
    ],
)
def test_what_does_not_go_with_parts_is_refused_before_a_weight_is_read(override, found, arguments, capsys):
    text = refusal(capsys, "check", *arguments, "trainer=fsdp", "pool.storage=auto", override)
    assert found in text
