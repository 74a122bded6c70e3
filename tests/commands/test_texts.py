"""A language model from its folders and text files to a scored merge, by the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge.commands.run.compose import compose
from adamerge.objectives.imitation import Imitation
from tests.support.command_line import QUIET, call, refusal
from tests.support.language import WORDS, llama

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
DATA = """
defaults: [texts]
tasks:
  sums: {_target_: adamerge.data.Task, dataset: {_target_: adamerge.data.Texts, source: sums.jsonl}}
  colours: {_target_: adamerge.data.Task, dataset: {_target_: adamerge.data.Texts, source: colours.csv}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three folders that transformers wrote, two files of texts, and the yaml files that name them."""
    root = tmp_path_factory.mktemp("texts")
    base = load_file(llama(root / "base") / "model.safetensors")
    for seed, name in enumerate(("sums", "colours"), 1):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: t + 0.2 * torch.randn(t.shape, generator=generator) for key, t in base.items()}
        save_file(tensors, llama(root / name) / "model.safetensors", {"format": "pt"})
    numbers = WORDS[:10]
    sums = [
        {"prompt": f"what is {numbers[i]} plus {numbers[j]}", "answer": numbers[i + j]}
        for i in range(4)
        for j in range(3)
    ]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    colours = [
        f'which is the {word} of {number},"[""yes"",""no of""]",{n % 2}'
        for n, (word, number) in enumerate(zip(["red", "blue"] * 5, numbers, strict=True))
    ]
    (root / "colours.csv").write_text("\n".join(["prompt,choices,label", *colours]))
    for group, text in (
        ("data", DATA),
        ("pool", f"defaults: [files]\nbase: {root}/base\nexperts: {{sums: {root}/sums, colours: {root}/colours}}\n"),
    ):
        (root / "my" / group).mkdir(parents=True)
        (root / "my" / group / "ours.yaml").write_text(text)
    return root


@pytest.fixture
def arguments(world, monkeypatch):
    monkeypatch.chdir(world)
    ours = ["--config-dir", "my", "pool=ours", "data=ours", "backbone=transformers"]
    return [*ours, "trainer=cpu", "report=false", "steps=2", "data.batch_size=4"]


def test_a_run_on_texts_is_checked_made_and_scored(arguments, world, capsys):
    assert call("check", *arguments) == 0
    said = capsys.readouterr().err
    assert "A step takes 2 x 4 texts, about" in said
    assert "experts' answers: about" in said
    assert call("adapt", *arguments, "run_dir=run", "teachers.top_k=8", "--json") == 0
    content = json.loads(capsys.readouterr().out)["summary"]
    assert content["metrics"] == {"sums": "exact match", "colours": "choice accuracy"}
    experts, merged = content["rows"]["experts"]["measures"], content["rows"]["adapt"]["measures"]
    assert experts["agreement"] == {"sums": 1.0, "colours": 1.0}
    assert max(experts["KL"].values()) < 1e-5 < min(merged["KL"].values())
    assert set(merged["perplexity"]) == {"sums"}
    capsys.readouterr()
    assert call("evaluate", "run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"]["adapt"]["measures"] == merged


def test_texts_without_anything_to_score_by_are_scored_by_their_experts(arguments, world, capsys):
    (world / "plain.txt").write_text("\n".join(" ".join(WORDS[i : i + 4]) for i in range(10)))
    source = "data.tasks.colours.dataset.source=plain.txt"
    assert call("adapt", *arguments, source, "run_dir=plain", "references=false", "--json") == 0
    content = json.loads(capsys.readouterr().out)["summary"]
    assert content["metrics"]["colours"] == "token accuracy"
    assert set(content["rows"]["adapt"]["measures"]["agreement"]) == {"sums", "colours"}


def test_a_field_that_is_not_there_is_refused_before_a_weight_is_read(arguments, capsys):
    message = refusal(capsys, "adapt", *arguments, "+data.tasks.sums.dataset.answer=anser")
    assert "sums.jsonl, line 1: no field 'anser'. Did you mean 'answer'?" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert_merging_lm", "recommended_lm"])
def test_recipes_for_language_models_run_as_they_state(arguments, name, world):
    options = [word for word in arguments if not word.startswith(("steps=", "data.batch_size="))]
    quick = ["data.limit=4", "steps=2"] if name == "recommended_lm" else []
    command = [*options, f"experiment={name}", *quick, f"run_dir={name}", "evaluate=false", "logger=none"]
    assert call("adapt", *command) == 0
    config = compose(command)
    recipe = json.loads((world / name / "merge.json").read_text())
    assert recipe["steps"] == config.steps
    granularity = json.loads((world / name / "coefficients.json").read_text())["granularity"]
    assert str(granularity).lower().startswith("row" if name == "recommended_lm" else "layer")


@pytest.mark.slow
def test_a_run_that_is_gone_on_with_is_that_of_one_go(arguments, world):
    options = [word for word in arguments if not word.startswith("steps=")]
    command = [*options, "steps=3", "evaluate=false", "logger=none", "teachers.top_k=4", "checkpoint_every=1"]
    assert call("adapt", *command, "run_dir=whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Imitation, "__call__", broken_after(4))  # of two tasks: in the third step
        assert call("adapt", *command, "run_dir=parts") != 0
    assert call("adapt", "resume=parts") == 0
    assert (world / "parts" / "merged.safetensors").read_bytes() == (
        world / "whole" / "merged.safetensors"
    ).read_bytes()


def broken_after(calls):
    """Return the objective's call that fails once, as a full disk would, after some more."""
    original, count = Imitation.__call__, 0

    def call_of(self, step):
        nonlocal count
        count += 1
        if count > calls + 1:  # the first is a trial before the first step
            raise OSError("no space left")
        return original(self, step)

    return call_of
