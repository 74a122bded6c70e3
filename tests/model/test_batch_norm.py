"""BatchNorm statistics of merges: exact on one layer, decisive on a small ResNet, and the same in every command."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from adamerge import Coefficients, ExpertPool, InputError, MergedModel
from adamerge.checkpoints.checkpoint import MemoryCheckpoint
from adamerge.commands.cli import main
from adamerge.commands.export import export_files, export_run
from adamerge.data import Task, UnlabeledTasks
from adamerge.model.batch_norm import FILE, BatchNormPolicy, average, load_statistics
from adamerge.pool.pool_file import PoolFile, PoolFiles
from adamerge.results.evaluation import score_tasks
from tests.support.small_resnet import TASKS, SmallBackbone, SmallResNet, data, images_of, save, trained


@pytest.fixture(scope="module")
def models():
    return trained()


@pytest.fixture
def model(models):
    """The uniform average of the two experts."""
    experts = {task: models[task] for task in TASKS}
    pool = ExpertPool.from_state_dicts(models["base"], experts, exclude=["fc.*"])
    checkpoints = {name: MemoryCheckpoint(name, tensors) for name, tensors in experts.items()}
    heads = SmallBackbone().heads(None, checkpoints, dict.fromkeys(TASKS))
    return MergedModel(SmallResNet(), pool, Coefficients(pool, "task", 0.5), heads)


def merged(model):
    return {name: tensor.detach() for name, tensor in model.merge().items()}


def mean_accuracy(model, params, images):
    return sum(score.accuracy for score in score_tasks(model, params, images).values()) / len(TASKS)


# What the policies compute


def test_recalibrate_closes_most_of_the_gap_that_wrong_statistics_open(model):
    images, params = data(), merged(model)
    found = {
        policy: mean_accuracy(model, params | BatchNormPolicy(policy).final(model, params, images), images)
        for policy in ("base", "average", "recalibrate")
    }
    assert found["base"] < found["average"] - 0.05
    assert found["average"] < found["recalibrate"] - 0.04
    assert found["recalibrate"] > 0.97


def test_base_changes_nothing_and_reads_no_image(model):
    before = model.encoder_buffers
    policy = BatchNormPolicy("base")
    policy.start(model)
    assert policy.final(model, merged(model), None) == {}
    assert all(torch.equal(model.encoder_buffers[name], tensor) for name, tensor in before.items())
    assert not policy.needs_data
    assert not policy.applies(model)
    assert BatchNormPolicy("average").applies(model)


def test_average_is_the_mean_of_the_experts_and_what_the_model_adapts_with(models, model):
    name = "stem.1.running_var"
    expected = (models["dark"][name] + models["bright"][name]) / 2
    for policy in ("average", "recalibrate"):
        BatchNormPolicy(policy).start(model)
        torch.testing.assert_close(model.encoder_buffers[name], expected)
    assert torch.equal(model.base_parameters()[name], models["base"][name])
    assert torch.equal(model.expert_parameters("dark")[name], models["dark"][name])
    assert not any(key.endswith("num_batches_tracked") for key in average(model.pool))
    assert BatchNormPolicy("average").final(model, merged(model), None).keys() == average(model.pool).keys()


def test_average_takes_the_bases_where_an_expert_has_none(models):
    name = "stem.1.running_mean"
    partial = {key: tensor for key, tensor in models["dark"].items() if key != name}
    pool = ExpertPool.from_state_dicts(models["base"], {"dark": partial, "bright": models["bright"]}, exclude=["fc.*"])
    torch.testing.assert_close(average(pool)[name], (models["base"][name] + models["bright"][name]) / 2)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3, momentum=None)

    def forward(self, x):
        return self.norm(self.linear(x))


def one_layer(counts, batch_size=8):
    """A model of one BatchNorm layer, and a task of each number of inputs, shifted against each other."""
    torch.manual_seed(1)
    base = Normalised().state_dict()
    expert = base | {"linear.weight": torch.randn(3, 4)}
    pool = ExpertPool.from_state_dicts(base, {"a": expert})
    tasks = {str(i): Task(adapt=TensorDataset(3 * i + torch.randn(n, 4))) for i, n in enumerate(counts)}
    heads = dict.fromkeys(tasks, nn.Identity())
    model = MergedModel(Normalised(), pool, Coefficients(pool, "task", 0.7), heads)
    return model, UnlabeledTasks(tasks, batch_size=batch_size)


def test_recalibrate_of_one_layer_is_the_mean_and_variance_over_all_inputs_of_all_tasks():
    model, images = one_layer([24, 24])
    params = merged(model)
    found = BatchNormPolicy(batches=3).final(model, params, images)
    stacked = torch.cat([torch.stack([stream[i].inputs for i in range(24)]) for stream in images.streams.values()])
    seen = nn.functional.linear(stacked, params["linear.weight"], model.pool.fixed["linear.bias"])
    torch.testing.assert_close(found["norm.running_mean"], seen.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["norm.running_var"], seen.var(0), rtol=1e-5, atol=1e-6)
    assert found["norm.running_mean"].dtype == torch.float32


def test_recalibrate_of_one_batch_is_what_torch_computes_with_a_cumulative_average(model):
    params, images = merged(model), data(batch_size=16)
    found = BatchNormPolicy(batches=1).final(model, params, images)
    plain = SmallResNet()
    plain.load_state_dict(params | {k: t for k, t in model.base_parameters().items() if k not in params})
    (batch,) = images.mixed_batches(1)
    torch.optim.swa_utils.update_bn([torch.cat(list(batch.values()))], plain)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_recalibrate_depends_on_the_seed_only_and_leaves_the_model_as_it_was(model):
    params, policy = merged(model), BatchNormPolicy(batches=2)
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    x = images_of("dark", 5, 3)[0]
    features = model(x, params)
    first = policy.final(model, params, data(seed=1))
    torch.rand(3)
    second = policy.final(model, params, data(seed=1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = policy.final(model, params, data(seed=2))
    assert not torch.equal(first["stem.1.running_mean"], other["stem.1.running_mean"])
    assert torch.equal(model(x, params), features)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    assert not any(module.training for module in model.encoder.modules())


def test_recalibrate_reads_at_most_one_pass_of_the_longest_stream_and_repeats_shorter_ones():
    _, images = one_layer([8, 24])
    found = list(images.mixed_batches(100))
    assert [len(batch["0"]) for batch in found] == [len(batch["1"]) for batch in found] == [8, 8, 8]


def test_policies_on_an_encoder_without_such_layers_do_nothing(toy_model):
    for policy in ("base", "average", "recalibrate"):
        BatchNormPolicy(policy).start(toy_model)
        assert BatchNormPolicy(policy).final(toy_model, toy_model.merge(), None) == {}


# Refusals


def test_recalibrate_without_data_or_with_one_value_per_channel_says_what_to_do(model):
    with pytest.raises(InputError, match=r"policy=recalibrate: needs unlabeled data, found none; choose average or b"):
        BatchNormPolicy().final(model, merged(model), None)
    single, images = one_layer([4], batch_size=1)
    with pytest.raises(InputError, match=r"more than 1 value per channel .* Set data\.batch_size to 2 or more"):
        BatchNormPolicy().final(single, merged(single), images)


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match=r"batch_norm\.policy: .* found 'recalibrated'\. Did you"):
        BatchNormPolicy("recalibrated")
    with pytest.raises(InputError, match=r"batch_norm\.batches: expected a whole number >= 1, found 0"):
        BatchNormPolicy(batches=0)


# Through the commands


@pytest.fixture
def setup(models, tmp_path):
    """A folder of configurations, and the options that choose them."""
    paths = save(models, tmp_path)
    for group, node in {
        "backbone": {"_target_": "tests.support.small_resnet.SmallBackbone"},
        "data": {"_target_": "tests.support.small_resnet.data", "seed": "${seed}", "batch_size": 32},
        "pool": {"base": str(paths.pop("base")), "experts": {name: str(path) for name, path in paths.items()}},
    }.items():
        (tmp_path / "configs" / group).mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(node), tmp_path / "configs" / group / "small.yaml")
    OmegaConf.save(OmegaConf.create({**node, "exclude": ["fc.*"]}), tmp_path / "pool.yaml")
    return ["--config-dir", str(tmp_path / "configs"), "backbone=small", "data=small", "pool=small"]


def ends(code, *arguments):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert done.value.code == code


def statistics_of(path):
    return {key: tensor for key, tensor in load_file(path).items() if "running" in key}


@pytest.mark.parametrize("policy", ["base", "average", "recalibrate"])
def test_adapt_exports_scores_and_replays_the_policys_statistics(setup, models, tmp_path, policy):
    run = tmp_path / "run"
    options = [
        "steps=3",
        "granularity=task",
        "init=0.5",
        "trainer=cpu",
        "logger=none",
        "report=false",
        f"batch_norm.policy={policy}",
    ]
    ends(0, "adapt", *setup, *options, f"run_dir={run}")
    written = statistics_of(run / "merged.safetensors")
    rows = json.loads((run / "summary.json").read_text())["rows"]
    if policy == "base":
        assert all(torch.equal(tensor, models["base"][key]) for key, tensor in written.items())
        assert not (run / FILE).exists()
    else:
        kept, _ = load_statistics(run / FILE)
        assert all(torch.equal(tensor, written[key]) for key, tensor in kept.items())
        assert kept.keys() == written.keys()
        recorded = json.loads((run / "merge.json").read_text())["batch_norm"]
        assert recorded == {"policy": policy, "batches": 32}
    low, high = {"base": (0, 0.9), "average": (0.85, 0.96), "recalibrate": (0.97, 1)}[policy]
    assert low <= rows["adapt"]["mean"] <= high
    assert rows["experts"]["mean"] > 0.98  # by their own statistics
    assert rows["pretrained"]["per_task"]["dark"] > 0.9
    expected = (run / "merged.safetensors").read_bytes()
    for again in (
        export_run(run, None, tmp_path / "again"),
        export_run(run, run / "coefficients.json", tmp_path / "replayed"),
    ):
        assert again["merged"].read_bytes() == expected
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "coefficients.json").write_bytes((run / "coefficients.json").read_bytes())
    anew = export_run(run, tmp_path / "alone" / "coefficients.json", tmp_path / "anew")
    assert anew["merged"].read_bytes() == expected


def test_export_of_files_takes_the_statistics_beside_the_coefficients(models, model, tmp_path):
    paths = save({name: {k: t for k, t in m.items() if "fc" not in k} for name, m in models.items()}, tmp_path)
    base, experts = paths.pop("base"), paths
    run = tmp_path / "run"
    files = PoolFiles(PoolFile(base), {name: PoolFile(path) for name, path in experts.items()})
    pool = ExpertPool.from_files(base, experts)
    coefficients = Coefficients(pool, "task", 0.5)
    from adamerge.results.export import export

    first = export(pool, coefficients, run, statistics=average(pool))
    again = export_files(files, first["coefficients"], tmp_path / "again")
    assert again["merged"].read_bytes() == first["merged"].read_bytes()
    other = export(pool, Coefficients(pool, "task", 0.4), tmp_path / "other")
    (tmp_path / "other" / FILE).write_bytes(first["batch_norm"].read_bytes())
    with pytest.raises(InputError, match=r"expected the statistics of coefficients\.json, found those"):
        export_files(files, other["coefficients"], tmp_path / "wrong")
    export(pool, coefficients, run)
    assert not (run / FILE).exists()  # that of the earlier export


@pytest.mark.parametrize("policy", ["base", "average", "recalibrate", None])
def test_merge_writes_the_policys_statistics_and_its_recipe_gives_the_same_bytes(setup, models, tmp_path, policy):
    chosen = [] if policy is None else ["--batch-norm", policy]
    overrides = [*setup[:2], *setup[2:4]] if policy == "recalibrate" else []
    arguments = ["merge", "--rule", "weight_average", "--pool", tmp_path / "pool.yaml", *chosen]
    ends(0, *arguments, "--out", tmp_path / "merged", *overrides)
    written = statistics_of(tmp_path / "merged" / "merged.safetensors")
    name = "stem.1.running_mean"
    mean = (models["dark"][name] + models["bright"][name]) / 2
    assert torch.equal(written[name], models["base"][name]) == (policy == "base")
    assert torch.allclose(written[name], mean, atol=1e-6) == (policy in ("average", None))
    trusted = ["--trust-code"] if policy == "recalibrate" else []  # backbone and data of these tests
    ends(0, "merge", "--recipe", tmp_path / "merged" / "merge.json", "--out", tmp_path / "again", *trusted)
    first, second = (tmp_path / folder / "merged.safetensors" for folder in ("merged", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_compare_scores_merges_with_the_policy(setup, tmp_path):
    out = tmp_path / "compare"
    means = {}
    for policy in ("base", "recalibrate"):
        folder = out / policy
        rows = ["--rows", "weight_average", "pretrained", "--out", folder]
        ends(0, "compare", *rows, "--", *setup, f"batch_norm.policy={policy}")
        content = json.loads((folder / "summary.json").read_text())
        means[policy] = {name: row["mean"] for name, row in content["rows"].items()}
    assert means["recalibrate"]["weight_average"] > means["base"]["weight_average"] + 0.1
    for reference in ("pretrained", "experts"):
        assert means["recalibrate"][reference] == means["base"][reference]
