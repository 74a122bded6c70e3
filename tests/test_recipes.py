"""Recipes do what they say: the headers of experiments and comparisons, their options, and what a run of them does."""

import json
import re
from pathlib import Path

import adamerge.configs
import pytest
import yaml

from adamerge.commands.compare.row import read_row
from adamerge.commands.run.check import unknown_keys
from adamerge.commands.run.compose import compose
from adamerge.model.encoder import select
from tests.support.command_line import QUIET, call, refusal

FOLDER = Path(adamerge.configs.__file__).parent
EXPERIMENTS = sorted(path.stem for path in (FOLDER / "experiment").glob("*.yaml"))
QUICK = ("fw_hard",)  # a run of seconds
SUMMARIES = ("2503.12649", "2509.25712")  # papers whose figures are known from third parties' summaries only
MANY = 8  # experts, beyond which 0.3 each is far from any of them

pytestmark = [*QUIET, pytest.mark.usefixtures("listed_benchmark")]


def header(name):
    lines = (FOLDER / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def iterations(config):
    """What a run of these steps completes; a remainder would be a part of one."""
    inner = config.method.inner_steps if config.method.get("mode") == "soft" else 1
    assert config.steps % inner == 0
    return config.steps // inner


STATED = {  # what a header says, and the option that has to
    r"batch (\d+)": lambda config: config.data.batch_size,
    r"init (0\.\d+)": lambda config: config.init,
    r"Adam (1e-3)": lambda config: config.optimizer.lr,
    r"(\d+) (?:unlabeled )?(?:samples|training images) per task": lambda config: config.data.limit,
    r"(\d+) iterations(?: from| here|, experts)": iterations,
    r"in (\d+) steps per iteration": lambda config: config.method.inner_steps,
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_header_of_an_experiment_states_its_options(name):
    config, text = compose([f"experiment={name}"]), header(name)
    for pattern, option in STATED.items():
        for stated in re.findall(pattern, text):
            assert float(stated) == option(config), pattern
    for kind in re.findall(r"\b(layer|task|row)-wise", text)[:1]:
        assert kind in config.granularity._target_.rsplit(".", 1)[-1].lower()
    if config.method._target_.endswith("FrankWolfeMerging"):
        assert iterations(config) > 1
        assert not text.startswith("FW-Merging") or re.search(r"\d iterations", text)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_figures_that_only_summaries_give_say_so(name):
    text = header(name)
    if any(paper in text for paper in SUMMARIES) and re.search(r"\d\d\.\d", re.sub(r"arXiv:\S+", "", text)):
        assert "not checked against the paper" in text


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem in ("zoo", "text_zoo") else pytest.mark.slow)
        for path in sorted((FOLDER / "compare").glob("*.yaml"))
    ],
    ids=lambda path: path.stem,
)
def test_rows_of_a_comparison_compose_and_start_frank_wolfe_near_many_experts(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    overrides = [word for word in content.get("overrides", []) if not word.startswith("pool=ta_")]  # made by its user
    for name, text in content["rows"].items():
        spec = read_row(text or name)
        if spec.overrides:
            config = compose([*overrides, *spec.overrides])
            assert unknown_keys(config) == [], name
            if config.method._target_.endswith("FrankWolfeMerging"):
                assert iterations(config) > 1, name
                assert len(config.data.tasks) <= MANY or config.init != 0.3, name
    source = str((content.get("published") or {}).get("source", ""))
    assert "not checked against the paper" in source or not any(paper in source for paper in SUMMARIES)


def test_expert_merging_compares_every_block():
    names = [f"transformer.resblocks.{block}{part}" for block in range(24) for part in ("", ".mlp", ".mlp.c_fc")]
    (pattern,) = compose(["experiment=expert_merging"]).objective.hidden_layers
    assert select(names, pattern, "hidden_layers") == [f"transformer.resblocks.{block}" for block in range(24)]


def test_part_of_an_iteration_is_refused(arguments, capsys):
    line = refusal(capsys, "adapt", *arguments, "experiment=fw_soft_labelled", "steps=15")
    assert "steps: expected a multiple of method.inner_steps (20)" in line
    assert "steps=20" in line


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in EXPERIMENTS
        # recommended, on a zoo that takes minutes to build; those of language models: tests/commands/test_texts.py
        if name != "offline_benchmark" and not name.endswith("_lm")
    ],
)
def test_run_of_an_experiment_makes_its_stated_iterations(arguments, tmp_path, name):
    options = [argument for argument in arguments if not argument.startswith("steps=")]
    config = compose([*options, f"experiment={name}"])
    assert call("adapt", *options, f"experiment={name}", "evaluate=false", "logger=none") == 0
    recipe = json.loads((tmp_path / "run" / "merge.json").read_text())
    assert recipe["steps"] == config.steps
    if "frank_wolfe" in recipe:
        assert recipe["frank_wolfe"]["iterations"] == iterations(config)
