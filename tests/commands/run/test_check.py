"""What `adamerge check` finds from configurations and file headers, without a run."""

import re
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset

from adamerge import ExpertPool, zoo
from adamerge.backbones import OpenClip
from adamerge.commands.run.build import build, build_tasks, check_options, pool_of
from adamerge.commands.run.check import check
from adamerge.commands.run.check_beside import check_beside
from adamerge.commands.run.compose import compose
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.batch import pad
from adamerge.errors import InputError
from adamerge.model.encoder import EncoderOptions
from adamerge.objectives.imitation import Imitation
from adamerge.pool.headers import Headers
from adamerge.pool.pack import write_packed
from tests.support.adapters import random_adapter


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image folder of ten classes with two images each."""
    root = tmp_path_factory.mktemp("images")
    for label in range(10):
        (root / f"class{label}").mkdir()
        for number in range(2):
            Image.new("RGB", (28, 28), (label, number, 0)).save(root / f"class{label}" / f"{number}.png")
    return root


@pytest.fixture
def found(images, tmp_path, monkeypatch):
    """Check a small run with more overrides; return all problems."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    (folder / "data").mkdir(parents=True)
    task = (
        f"{{_target_: adamerge.data.Task, dataset: {{_target_: torchvision.datasets.ImageFolder, root: {images}}}, "
        f"adapt: null, evaluate: null, expert: null, classes: {list(zoo.CLASSES['digits'])}}}"
    )
    (folder / "data" / "tiny.yaml").write_text(
        f"_target_: adamerge.data.UnlabeledTasks\ntasks:\n  mnist: {task}\n  digits: {task}\nbatch_size: 4\n"
    )
    (folder / "pool").mkdir()
    experts = "".join(f"  {name}: ${{zoo:experts/{name}.safetensors}}\n" for name in ("mnist", "digits"))
    (folder / "pool" / "two.yaml").write_text(f"base: ${{zoo:base.safetensors}}\nexperts:\n{experts}")
    start = ["--config-dir", str(folder), "pool=two", "data=tiny", "trainer=cpu", "steps=3", "run_dir=run"]
    return lambda *overrides: check(compose([*start, *map(str, overrides)]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["init=[0.3, 0.2]", "granularity=chunk", "granularity.pieces={proj: 4}", "trainer.devices=[0]"],
        ["init={digits: 0.1, mnist: 0.2}", "granularity=pattern", r"granularity.groups={attention: \\.attn\\.}"],
        ["init=mean", "objective=entropy", "data.tasks.mnist.expert=digits", "+trainer.num_nodes=1"],
    ],
)
def test_check_good_run_finds_nothing_and_leaves_nothing(found, tmp_path, overrides):
    assert found(*overrides) == []
    assert not (tmp_path / "run").exists()


# Wrong options and the words of their messages. Rows of different lanes are independent, and checked together.
LANES = {
    "steps": [
        ("steps=0", ["steps", ">= 1", "0"]),
        ("steps=1.5", ["steps", "whole number", "1.5"]),
        ("steps=null", ["steps", "None"]),
        ("steps=true", ["steps", "True"]),
        ("steps=many", ["steps", "'many'"]),
    ],
    "checkpoint_every": [
        ("checkpoint_every=0", ["checkpoint_every", ">= 1"]),
        ("checkpoint_every=often", ["checkpoint_every", "'often'"]),
    ],
    "seed": [
        ("seed=-1", ["seed", "-1"]),
        ("seed=4294967296", ["seed", "4294967295"]),
        ("seed=x", ["seed", "'x'"]),
    ],
    "references": [("references=perhaps", ["references", "true or false", "'perhaps'"])],
    "name": [
        ("name=pretrained", ["name", "reserved", "'pretrained'"]),
        ("name=experts", ["name", "reserved", "'experts'"]),
        ("name=weight_average", ["name", "reserved", "'weight_average'"]),
        ("name=start", ["name", "reserved", "'start'"]),
        ("name=task_arithmetic_0.3", ["name", "reserved"]),
        ("name=weight_average_transformed", ["name", "reserved"]),
        ("name=null", ["name", "None"]),
    ],
    "run_dir": [
        ("run_dir=/", ["run_dir", "root"]),
        ("run_dir=''", ["run_dir", "''"]),
        ("run_dir=null", ["run_dir", "None"]),
        ("run_dir=/proc", ["run_dir", "/proc", "not writable"]),
        ("run_dir=/proc/run", ["run_dir", "/proc", "not writable"]),
        ("run_dir=in_the_way", ["run_dir", "in_the_way", "a file"]),
        ("run_dir=in_the_way/run", ["run_dir", "in_the_way", "a file"]),
        ("run_dir=${nothing}", ["run_dir", "nothing"]),
    ],
    "trainer": [
        ("trainer.devices=0", ["trainer.devices", "a number of devices >= 1", "0"]),
        ("trainer.devices=many", ["trainer.devices", "'many'"]),
        ("trainer.devices=[]", ["trainer.devices", "[]"]),
        ("+trainer.num_nodes=0", ["trainer.num_nodes", "0"]),
        ("trainer.precision=16-true", ["trainer.precision", "16-true", "16-mixed"]),
        ("trainer.precision=64-true", ["trainer.precision", "64-true", "32-true"]),
    ],
    "batch_norm": [
        ("batch_norm=nope", ["batch_norm", "'nope'", "batch_norm.OPTION=VALUE"]),
        ("batch_norm=null", ["batch_norm", "none"]),
        ("batch_norm.policy=nope", ["batch_norm", "'nope'"]),
    ],
    "encoder": [("encoder=x", ["encoder", "'x'", "encoder.OPTION=VALUE"])],
    "method": [
        ("method.reduction=men", ["method.reduction", "'men'", "Did you mean 'mean'?"]),
        ("method.max_skipped=-1", ["method.max_skipped", "-1"]),
        ("method.task_weights={mnits:2}", ["method.task_weights", "'mnits'", "Did you mean 'mnist'?"]),
        ("method.micro_batch=0", ["method.micro_batch", "0"]),
        ("method=frank_wolfe constraint=simplex init=mean method.mode=sof", ["method.mode", "'sof'"]),
        ("method.scheduler={_target_: torch.optim.no_scheduler}", ["no_scheduler"]),
    ],
    "callbacks": [
        ("callbacks=keep_best callbacks.keep_best.every=0", ["KeepBest.every", "0"]),
        ("callbacks=keep_best", ["KeepBest", "data.holdout"]),
        ("callbacks=collapse_guard callbacks.collapse_guard.action=wrn", ["CollapseGuard.action", "'warn'"]),
    ],
    "optimizer": [("optimizer._target_=builtins.len", ["optimizer"])],
    "pool": [
        ("init=high", ["init", "'high'"]),
        ("init=[0.1, 0.2, 0.3]", ["init", "2 numbers", "found [0.1, 0.2, 0.3]"]),
        ("init={mnist: 0.3}", ["init", "'mnist', 'digits'"]),
        ("init={mnist: 0.3, digits: null}", ["init", "2 numbers"]),
        ("granularity=pattern granularity.groups={typo:atn}", ["granularity.groups['typo']", "'atn'"]),
        ("granularity=chunk granularity.pieces=-1", ["granularity.pieces", "-1"]),
        ("granularity=chunk granularity.pieces={prj:4}", ["granularity.pieces", "'prj'", "'proj'"]),
        ("pool.base=null", ["pool.base", "base=FILE"]),
        ("pool.experts=null", ["pool.experts", "{name: FILE, ...}"]),
        ("pool.experts.digits=null", ["pool.experts.digits", "checkpoint FILE", "None"]),
        ("+pool.exclude=proj", ["pool.exclude", "list of globs", "'proj'"]),
        ("+pool.dtype=half8", ["pool.dtype", "'half8'"]),
        ("+pool.storage=stream transform=ties", ["pool.storage", "transformed"]),
    ],
    "data": [
        ("data.tasks.mnist.classes=[a, b]", ["data.tasks.mnist.classes", "2 names", "10 classes"]),
        ("data.tasks.mnist.expert=digts", ["data.tasks.mnist.expert", "Imitation", "'digts'", "'digits'"]),
        ("objective=entropy data.tasks.mnist.expert=digts", ["data.tasks.mnist.expert", "'digts'"]),
        ("data.batch_size=four", ["data.batch_size", "'four'"]),
        ("data.tasks.mnit.expert=digits", ["data.tasks.mnit", "_target_", "Did you mean 'mnist'?"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("row", range(max(map(len, LANES.values()))))
def test_check_wrong_option_is_one_sentence_that_names_it(found, tmp_path, row):
    (tmp_path / "in_the_way").write_text("")
    cases = [lane[row] for lane in LANES.values() if row < len(lane)]
    overrides = [part for override, _ in cases for part in re.split(r" (?=[\w.]+=)", override)]
    problems = found(*overrides)
    assert len(problems) == len(cases), problems
    for override, words in cases:
        assert any(all(word in problem for word in words) for problem in problems), (override, problems)
    assert not any("\n" in problem for problem in problems)
    assert not (tmp_path / "run").exists()


def test_check_expert_missing_from_the_pool_is_found(found):
    (problem,) = found("~pool.experts.mnist")
    assert "data.tasks.mnist.expert" in problem
    assert "Imitation needs each task's expert" in problem
    assert found("~pool.experts.mnist", "objective=entropy") == []


@pytest.mark.parametrize("experts", ["[a.safetensors]", "{a: 3}", "{1: a.safetensors}", "a.safetensors"])
def test_pool_files_experts_that_are_no_mapping_of_files_are_refused(experts):
    backbone = OpenClip(str(zoo.files()))
    with pytest.raises(InputError, match=r"^pool\.experts"):
        pool_of(OmegaConf.create(f"pool: {{base: base.safetensors, experts: {experts}}}"), backbone, None)
    with pytest.raises(InputError, match=r"^pool: expected base and experts"):
        pool_of(OmegaConf.create({"pool": None}), backbone, None)


def test_check_says_what_is_wrong_with_each_task_at_once(found):
    wrong = ["data.tasks.mnist.classes=[a, b]", "data.tasks.digits.templates=['{}', 'a photo']"]
    judged = ["callbacks=never_worse", "+data.holdout=auto", "first_stage={steps: 2}"]  # by data that cannot be built
    for more in ([], judged):
        assert [problem.split(":")[0] for problem in found(*wrong, *more)] == [
            "data.tasks.mnist.classes", "data.tasks.digits.templates",
        ]  # fmt: skip


def test_check_labels_of_the_images_to_score_are_looked_at_where_they_are_scored(found):
    texts = "+data.tasks.mnist.dataset.target_transform={_target_: builtins.str, _partial_: true}"
    (problem,) = found(texts)
    assert problem.startswith("data.tasks.mnist.dataset: item 0 (")
    assert "found '0'" in problem
    assert found(texts, "evaluate=false") == []


def test_check_task_takes_fields_that_its_file_does_not_set(found):
    assert found("data.tasks.mnist.expert=digits", "data.tasks.mnist.templates=['a {}.']") == []


def test_check_default_backbone_of_a_foreign_base_is_called_by_its_name(found, tmp_path):
    base = load_file(zoo.files() / "base.safetensors")
    save_file({name: t for name, t in base.items() if "resblocks.1." not in name}, tmp_path / "base.safetensors")
    (problem,) = (text for text in found("pool.base=base.safetensors") if "not a checkpoint of" in text)
    assert "base.safetensors: not a checkpoint of backbone=zoo (the demo zoo's model" in problem
    assert "backbone=open_clip backbone.model=NAME" in problem


def test_tied_weights_are_named_in_the_configuration(found, tmp_path):
    base = load_file(zoo.files() / "base.safetensors")
    for name, projection in (("base", base["visual.proj"]), ("digits", base["visual.proj"] + 1)):
        tensors = {**base, "visual.proj": projection, "visual.alias": projection.clone()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = ["pool.base=base.safetensors", "pool.experts={digits: digits.safetensors}", "~pool.experts.mnist"]
    tied = [*files, "+pool.tied={alias: proj}"]
    assert not any("tied" in text for text in found(*tied))
    backbone = OpenClip(str(zoo.files()))
    config = {"base": "base.safetensors", "experts": {"digits": "digits.safetensors"}, "tied": {"alias": "proj"}}
    pool = pool_of(OmegaConf.create({"pool": config}), backbone, None).open(duplicates="allow")
    assert pool.tied == {"alias": "proj"}
    assert "alias" not in pool.names
    with pytest.raises(InputError, match=r"pool\.tied: expected a mapping from alias"):
        pool_of(OmegaConf.create({"pool": {**config, "tied": ["alias"]}}), backbone, None)


def test_check_gpu_where_there_is_none_is_found(found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = found("trainer.accelerator=cuda")
    assert problem.startswith("trainer.accelerator: found cuda, but torch")
    assert "finds no CUDA device here" in problem
    assert "trainer=cpu" in problem


def test_check_options_speaks_of_the_groups_default_only_where_that_can_be_the_reason():
    said = []
    for where, option in (("merge", "wrong"), ("objective", "temprature"), ("objective", "wrong")):
        content = OmegaConf.create({"_target_": "adamerge.objectives.imitation.Imitation", option: 1})
        with pytest.raises(InputError) as caught:
            check_options(where, Imitation, content)
        said.append("left over from the group's default" in str(caught.value))
    assert said == [False, False, True]


def test_check_task_without_evaluation_images_is_found_unless_nothing_is_scored(found, images):
    overrides = [
        "data.tasks.mnist.dataset=null",
        f"data.tasks.mnist.adapt={{_target_: torchvision.datasets.ImageFolder, root: {images}}}",
    ]
    (problem,) = found(*overrides)
    assert re.search(r"data\.tasks\.mnist\.evaluate.*evaluate=false", problem)
    assert found(*overrides, "evaluate=false") == []


def test_check_inputs_in_double_precision_are_found(found):
    (problem,) = found("+data.tasks.mnist.dataset.transform={_target_: tests.support.small_tasks.Double}")
    assert "data.tasks.mnist.dataset: item 0" in problem
    assert "expected float32, found float64" in problem


def test_check_reads_no_weight_for_init(found, tmp_path):
    tensors = load_file(zoo.files() / "experts" / "digits.safetensors")
    tensors["visual.proj"] = tensors["visual.proj"] * float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    assert found("pool.experts.digits=nan.safetensors") == []


def test_check_lora_expert_is_held_against_the_base(found, tmp_path):
    shapes = {"visual.transformer.resblocks.0.mlp.c_fc": (384, 96)}
    overrides = ["pool.experts.digits=lora", "pool.experts.mnist=lora"]
    random_adapter(tmp_path / "lora", shapes)
    assert found(overrides[0]) == []
    random_adapter(tmp_path / "lora", shapes, use_dora=True)
    (problem,) = found(overrides[0])
    assert re.search(r"lora/adapter_model\.safetensors: .* has no lora_magnitude_vector", problem)
    random_adapter(tmp_path / "lora", {"visual.nowhere": (384, 96)})
    (problem,) = found(overrides[0])
    assert re.search(
        r"lora/adapter_model\.safetensors: .*'visual\.nowhere\.weight', which .*base\.safetensors lacks", problem
    )
    problems = found(overrides[1], "pool.base=absent.safetensors")
    assert [re.match(r".*absent\.safetensors: no such file", problem) is not None for problem in problems] == [True]


def test_check_engine_beside_is_refused_where_the_run_would_refuse_it(found, tmp_path):
    (problem,) = found("encoder.engine=beside")
    assert "beside needs weights of Linear" in problem
    assert found("encoder.engine=beside", "granularity=rank") == []
    lora = [f"pool.experts.{name}=lora/{name}" for name in ("digits", "mnist")]
    for name in ("digits", "mnist"):
        random_adapter(tmp_path / "lora" / name, {"visual.transformer.resblocks.0.mlp.c_fc": (384, 96)})
    assert found("encoder.engine=beside", *lora) == []
    (problem,) = found("encoder.engine=beside", *lora, "granularity=chunk", "granularity.pieces=5")
    assert re.search(r"divides rows of .*c_fc.*Set encoder\.engine=merged", problem)
    assert found("encoder.engine=auto", *lora, "granularity=chunk", "granularity.pieces=5") == []


def test_check_network_that_uses_a_weight_without_its_module_is_refused_beside():
    class Bypass(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x):
            return torch.nn.functional.linear(self.a(x), self.b.weight)

    data = UnlabeledTasks({"one": Task(adapt=TensorDataset(torch.ones(2, 3)))})
    shapes = {"a.weight": (3, 3), "b.weight": (3, 3)}
    for products in (("a.weight",), ("a.weight", "b.weight")):
        headers = Headers(shapes=shapes, products=frozenset(products))
        parts = {"encoder": EncoderOptions(engine="beside"), "headers": headers, "data": data}
        parts["backbone"] = SimpleNamespace(encoder=Bypass)
        if "b.weight" not in products:
            check_beside(parts)
            continue
        with pytest.raises(InputError, match=r"cannot follow 'b\.weight'.*Set encoder\.engine=merged"):
            check_beside(parts)


def test_check_tensors_of_an_expert_without_a_place_are_named(found, tmp_path, caplog):
    towers = {"visual.transformer.resblocks.0.mlp.c_fc": (384, 96), "transformer.resblocks.0.mlp.c_fc": (256, 64)}
    random_adapter(tmp_path / "lora", towers)
    (problem,) = found("pool.experts.digits=lora")
    assert re.search(r"'digits' .*1 tensors have no place .*: 'transformer\.resblocks\.0\.mlp\.c_fc\.weight'", problem)
    assert found("pool.experts.digits=lora", "+pool.unplaced=list") == []
    assert "'transformer.resblocks.0.mlp.c_fc.weight'" in caplog.text
    caplog.clear()
    tensors = load_file(zoo.files() / "experts" / "digits.safetensors")
    wrapped = {f"module.model.{key}": tensor for key, tensor in tensors.items()}
    save_file({**wrapped, "module.model.head.weight": torch.ones(2)}, tmp_path / "wrapped.safetensors")
    assert found("pool.experts.digits=wrapped.safetensors") == []
    assert "'head.weight'" in caplog.text
    (problem,) = found("pool.experts.digits=wrapped.safetensors", "+pool.unplaced=refuse")
    assert "pool.unplaced=list" in problem


def test_check_each_wrong_option_of_the_pool_is_named_and_the_others_hold(found, tmp_path):
    tensors = load_file(zoo.files() / "experts" / "digits.safetensors")
    save_file({**tensors, "visual.extra": torch.ones(2)}, tmp_path / "extra.safetensors")
    wrong = ["+pool.dtype=flot", "+pool.storage=nope"]
    problems = found(*wrong, "pool.experts.digits=extra.safetensors", "+pool.exclude=[extra]")
    assert [problem.split(":")[0] for problem in problems] == ["pool.storage", "pool.dtype"]


def test_check_packed_task_vectors_are_held_against_the_pool(found, tmp_path):
    experts = {name: zoo.files() / "experts" / f"{name}.safetensors" for name in ("mnist", "digits")}
    pool = ExpertPool.from_files(
        zoo.files() / "base.safetensors", experts, key_map="visual.", include=["proj", "conv1*"]
    )
    write_packed(pool, tmp_path / "packed.safetensors")
    narrow = "+pool.include=[proj,conv1.weight]"
    assert found("+pool.task_vectors=packed.safetensors", narrow) == []
    packed = ("+pool.task_vectors=packed.safetensors", narrow)
    for override, words in (
        ([*packed, "transform=ties"], "packed.safetensors: holds plain task vectors; expected no transform"),
        ([*packed, "+pool.dtype=int8"], "pool.dtype: "),
        (["+pool.task_vectors=packed.safetensors"], "packed.safetensors: lacks 54 parameters that the pool merges"),
        (["+pool.task_vectors=absent.safetensors"], "absent.safetensors: no such file"),
        (
            ["+pool.task_vectors=3"],
            "pool.task_vectors: expected a checkpoint FILE, hf://ORG/NAME, or {file: FILE, ...}, found 3",
        ),
        ([f"+pool.task_vectors={experts['mnist']}"], "not a file of packed task vectors"),
    ):
        (problem,) = found(*override)
        assert words in problem


def test_check_existing_folder_is_fine(found, tmp_path):
    (tmp_path / "run").mkdir()
    assert found() == []
    assert list((tmp_path / "run").iterdir()) == []


def test_check_granularity_that_fails_is_named_after_its_node(found, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "broken_groups.py").write_text(
        "class Broken:\n    def __call__(self, shapes):\n        return shapes['nowhere']\n"
        "class Other:\n    def __call__(self, shapes):\n        return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    assert found("granularity._target_=broken_groups.Broken") == ["granularity: KeyError: 'nowhere'"]
    (problem,) = found("granularity._target_=broken_groups.Other")
    assert "expected a GroupIndex from Other, found 3" in problem


def test_build_unexpected_error_names_the_node():
    config = compose(["objective._target_=builtins.int", "+objective.x=y"])
    with pytest.raises(InputError, match=r"^objective"):
        build(config, "objective")


def test_data_of_ones_own_need_no_collate_unless_the_backbone_pads(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        "class Own:\n    def __init__(self, tasks, preprocess=None):\n        self.preprocess = preprocess\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = OmegaConf.create({"data": {"_target_": "own_data.Own", "tasks": {}}})
    assert build_tasks(config, SimpleNamespace(), len).preprocess is len
    with pytest.raises(InputError, match=r"own_data\.Own takes no argument 'collate'"):
        build_tasks(config, SimpleNamespace(collate=pad), None)
