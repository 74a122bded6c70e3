"""Every yaml file that ships composes, and names classes that exist and take its options."""

import itertools
from pathlib import Path

import adamerge.configs
import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from adamerge.commands.run.build import build, check_options, pool_of
from adamerge.commands.run.check import unknown_keys
from adamerge.commands.run.compose import compose
from adamerge.commands.run.named_pools import named_pool
from adamerge.errors import InputError
from adamerge.model.task_step import TaskStep

pytestmark = pytest.mark.usefixtures("listed_benchmark")
FOLDER = Path(adamerge.configs.__file__).parent
# Options that these choices leave to the user.
REQUIRED = {
    "backbone=open_clip": ["backbone.model=ViT-B-32"],
    "backbone=torchvision": ["backbone.model=resnet18"],
    "pool=files": ["pool.base=base.safetensors", "pool.experts={cars: cars.safetensors}"],
    "data=folders": ["data.tasks={cars: {_target_: adamerge.data.Task}}"],
    "data=texts": ["data.tasks={maths: {_target_: adamerge.data.Task}}"],
    "transform=chain": ["transform.transforms=[{_target_: adamerge.transforms.Trim}]"],
    "granularity=pattern": [r"granularity.groups={attention: \.attn\.}"],
}
GROUPS: dict[str, list[str]] = {}
for path in sorted(FOLDER.rglob("*.yaml")):
    if path.parent not in (FOLDER, FOLDER / "merge", FOLDER / "compare"):  # of other commands
        GROUPS.setdefault(str(path.parent.relative_to(FOLDER)), []).append(path.stem)
BUILT = ("offline_benchmark", "text_zoo", "llm_zoo")  # zoos whose parts only fit one another
WHOLE = ("experiment", "benchmark")  # these set many groups, so each is composed alone


def combinations():
    """Return lists of choices that compose together, in which each choice of each group stands once."""
    alone = [[f"{group}={choice}"] for group in WHOLE for choice in GROUPS[group]]
    rest = {group: list(choices) for group, choices in GROUPS.items() if group not in WHOLE}
    together = [[f"{group}={zoo}" for group in rest if zoo in rest[group]] for zoo in BUILT]
    for choices in rest.values():
        choices[:] = [choice for choice in choices if choice not in BUILT]
    for row in itertools.zip_longest(*rest.values()):
        together.append([f"{group}={choice}" for group, choice in zip(rest, row, strict=True) if choice])
    return alone + together


def nodes(config, path=""):
    """Yield every node of a configuration that names a class, with its dotted path."""
    for key, value in config.items_ex(resolve=False):
        where = f"{path}{key}"
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            if value.get("_target_") is not None:
                yield where, value
            yield from nodes(value, f"{where}.")


@pytest.mark.parametrize("choices", combinations(), ids="+".join)
def test_config_choices_compose_and_their_targets_take_their_options(choices):
    config = compose([*choices, *(override for choice in choices for override in REQUIRED.get(choice, []))])
    assert unknown_keys(config) == []
    found = dict(nodes(config))
    assert found
    for where, node in found.items():
        try:
            target = hydra.utils.get_object(node._target_)
        except Exception as error:
            if "wandb" in where or "tensorboard" in where:
                pytest.skip(f"optional package: {error}")
            raise
        assert callable(target), where
        check_options(where, target, node)


@pytest.mark.parametrize("path", sorted((FOLDER / "objective").glob("*.yaml")), ids=lambda path: path.stem)
def test_config_objective_builds_a_callable(path):
    config = compose([f"objective={path.stem}"])
    objective = build(config, "objective")
    assert callable(objective)
    assert all(isinstance(layer, str) for layer in objective.hidden_layers)
    assert not hasattr(TaskStep, "labels")


@pytest.mark.parametrize("path", sorted((FOLDER / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_config_experiment_states_its_command(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"adamerge adapt experiment={path.stem}" in line for line in head)


def test_config_adamerging_layer_has_the_published_settings():
    config = compose(["experiment=adamerging_layer"])
    settings = OmegaConf.to_container(config, resolve=False)
    assert settings["optimizer"]["_target_"] == "torch.optim.Adam"
    assert (settings["optimizer"]["lr"], settings["steps"], settings["init"]) == (1e-3, 500, 0.3)
    assert settings["data"]["batch_size"] == 16
    assert settings["constraint"] == {"_target_": "adamerge.model.constraints.Clamp", "low": 0.0, "high": 1.0}
    assert settings["method"]["reduction"] == "sum"
    assert settings["objective"]["_target_"].endswith("Entropy")
    assert settings["granularity"]["_target_"].endswith("Layer")


def test_unknown_key_of_an_experiment_file_is_found(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nstpes: 3\npool: {storrage: ram}\n")
    config = compose(["--config-dir", str(tmp_path), "experiment=mine"])
    (problem,) = unknown_keys(config)
    assert "'stpes'. Did you mean 'steps'?" in problem
    with pytest.raises(InputError, match=r"pool: unknown key 'storrage'\. Did you mean 'storage'\?"):
        pool_of(config, build(config, "backbone"), None)


def test_compose_flag_that_hydra_does_not_know_is_refused():
    with pytest.raises(InputError, match=r"Unknown flag '--wrong'.*: steps=300\."):
        compose(["--wrong"])
    with pytest.raises(InputError, match=r"Unknown flag '--batch-size'.*: data\.batch_size=VALUE\."):
        compose(["--batch-size", "3"])


def test_compose_config_dir_of_any_name_but_none(tmp_path):
    folder = tmp_path / "it's \\ mine'"
    (folder / "objective").mkdir(parents=True)
    (folder / "objective" / "mine.yaml").write_text("_target_: adamerge.objectives.entropy.Entropy\n")
    assert compose(["--config-dir", str(folder), "objective=mine"]).objective._target_.endswith("Entropy")
    with pytest.raises(InputError, match=r"--config-dir: no such folder: ''"):
        compose(["--config-dir"])


def test_compose_hydras_name_of_the_run_folder_is_run_dir():
    assert compose(["hydra.run.dir=elsewhere"]).run_dir == "elsewhere"


def test_compose_choice_that_is_not_there_names_group_choices_and_asking_file(tmp_path):
    with pytest.raises(InputError, match=r"^granularity=rows: no such .*'row'\? .*, FOLDER/granularity/rows\.yaml\?"):
        compose(["granularity=rows"])
    folder = tmp_path / "own"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "mine.yaml").write_text("defaults: [fodlers]\n")
    with pytest.raises(InputError, match=r"^data=mne: no such choice\. Did you mean 'mine'\? .*zoo\.$"):
        compose(["--config-dir", str(folder), "data=mne"])
    with pytest.raises(InputError, match=r"^data/mine\.yaml: data=fodlers: no such choice\. Did you mean 'folders'\?"):
        compose(["--config-dir", str(folder), "data=mine"])


def test_compose_pool_below_config_dir_is_listed_and_refused_where_a_pool_file_has_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_POOLS", str(tmp_path / "pools"))
    for folder in ("pool", "pools"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pool" / "mine.yaml").write_text("base: a.safetensors\nexperts: {a: b.safetensors}\n")
    with pytest.raises(InputError, match=r"pool: mine\. Did you mean 'mine'\?"):
        compose(["--config-dir", str(tmp_path), "pool=mien"])
    with pytest.raises(InputError, match=r"FOLDER/pool/mine\.yaml for --config-dir is known to adapt and check only"):
        named_pool("mine")
    assert compose(["--config-dir", str(tmp_path), "pool=mine"]).pool.base == "a.safetensors"
    (tmp_path / "pools" / "mine.yaml").write_text("base: c.safetensors\nexperts: {a: b.safetensors}\n")
    with pytest.raises(InputError, match=r"two pools have that name, \S+/pool/mine\.yaml and \S+/pools/mine\.yaml;"):
        compose(["--config-dir", str(tmp_path), "pool=mine"])


def test_compose_pool_in_a_folder_below_config_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/pool/sub").mkdir(parents=True)
    (tmp_path / "mine/pool/sub/ours.yaml").write_text("base: a.safetensors\nexperts: {a: b.safetensors}\n")
    assert compose(["--config-dir", "mine", "pool=sub/ours"]).pool.base == "a.safetensors"


def test_compose_expert_of_a_task_goes_before_what_the_pool_file_says(tmp_path):
    file = tmp_path / "pool.yaml"
    file.write_text("base: a.safetensors\nexperts: {one: {file: b.safetensors, task: mnist}, two: c.safetensors}\n")
    words = [f"pool={file}", "data=clip_8", "data.root=/nowhere"]
    assert compose(words).data.tasks.mnist.expert == "one"
    assert compose([*words, "data.tasks.mnist.expert=two"]).data.tasks.mnist.expert == "two"
