"""Runs that start from a rule's merge: what becomes the base, which rule the experts choose, what finds it later."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from adamerge import InputError, load_state_dict
from adamerge.commands.run import start_rules
from adamerge.commands.run.compose import compose
from adamerge.commands.run.start_rules import AUTO, rules_of
from adamerge.commands.run.starting import begin
from adamerge.model.answers import Outputs
from adamerge.results.agreement import Tally
from tests.support.command_line import QUIET, call, refusal

pytestmark = QUIET


def test_rules_are_named_by_a_word_a_mapping_or_left_open():
    assert rules_of("wudi")["wudi"]["_target_"] == "adamerge.merges.wudi.WUDI"
    ((text, node),) = rules_of(OmegaConf.create({"rule": "wudi", "steps": 7})).items()
    assert (text, node["steps"]) == ("wudi steps=7", 7)
    assert rules_of(node) == {"WUDI": node}
    assert tuple(rules_of("auto")) == AUTO


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("tsv", r"start=tsv: expected one of .*Did you mean 'tsvm'"),
        ({"rule": "wudi", "stps": 7}, "stps"),
        ({"steps": 7}, "start"),
        ([1], r"start: expected auto, a rule, or \{rule"),
    ],
)
def test_wrong_start_is_refused(start, message):
    with pytest.raises(InputError, match=message):
        rules_of(start)


def test_start_of_several_processes_or_of_adapters_is_refused_and_auto_leaves_it_out(arguments, capsys, tmp_path):
    text = refusal(capsys, "check", *arguments, "start=tsvm", "trainer.devices=2")
    assert "start: a rule's merge is made in one process" in text
    assert call("check", *arguments, "start=auto", "trainer.devices=2") == 0
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    adapter = f"pool.experts.mnist={tmp_path / 'lora'}"
    call("check", *arguments, "start=tsvm", adapter)
    assert "start: expert 'mnist' is a LoRA adapter" in capsys.readouterr().err
    config = compose([*arguments, "start=auto", adapter])
    assert begin(config, tmp_path / "run") is config
    assert "start=auto: expert 'mnist' is a LoRA adapter" in capsys.readouterr().err


def test_run_starts_from_the_merge_and_is_found_again(arguments, capsys, tmp_path):
    """One process goes through all commands that read a run: over 3 s."""
    assert call("adapt", *arguments, "start={rule: task_arithmetic, coefficient: 0.2}", "optimizer.lr=0") == 0
    run = tmp_path / "run"
    merge = load_state_dict(run / "start" / "merged.safetensors")
    exported = load_state_dict(run / "merged.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in merge.items())  # the rate is 0
    content = json.loads((run / "summary.json").read_text())
    assert list(content["rows"]) == ["start", "adapt", "experts"]
    assert content["rows"]["start"]["per_task"] == content["rows"]["adapt"]["per_task"]
    start = OmegaConf.load(run / "config.yaml").start
    assert (start.rule, start.node.coefficient) == ("task_arithmetic coefficient=0.2", 0.2)
    assert json.loads((run / "merge.json").read_text())["config"]["start"]["rule"] == start.rule
    given = [*arguments, "start={rule: task_arithmetic, coefficient: 0.2}", "optimizer.lr=0"]
    assert call("adapt", *given, "resume=auto") == 0
    text = refusal(capsys, "adapt", *given[:-2], "start=tsvm", given[-1], "resume=auto")
    assert "a run with other options: start, start.coefficient, start.rule. Choose" in text
    shutil.move(run, tmp_path / "moved")
    moved = tmp_path / "moved"
    assert call("evaluate", moved) == 0
    assert json.loads((moved / "summary.json").read_text())["rows"]["start"] == content["rows"]["start"]
    assert call("export", moved, "--coefficients", moved / "coefficients.json", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "merged.safetensors").read_bytes() == (moved / "merged.safetensors").read_bytes()


def test_start_auto_takes_the_rule_that_is_nearest_to_the_experts(arguments, capsys, tmp_path, monkeypatch):
    rules = ("task_arithmetic coefficient=3", "task_arithmetic coefficient=0.3", "weight_average")
    monkeypatch.setattr(start_rules, "AUTO", rules)
    assert call("adapt", *arguments, "start=auto", "evaluate=false", "steps=1") == 0
    start = OmegaConf.load(tmp_path / "run" / "config.yaml").start
    assert tuple(start.candidates) == rules
    assert start.rule == min(rules, key=lambda rule: start.candidates[rule].kl)
    assert start.rule != rules[0]
    assert all(0 <= facts.agreement <= 1 and facts.rows == 20 for facts in start.candidates.values())
    said = capsys.readouterr().err
    assert f"start=auto: starts from {start.rule}" in said


def test_tally_is_the_mean_over_tasks_of_means_over_rows():
    tally = Tally(("a", "b", "empty"))
    expert = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    tally.add("a", expert, Outputs(expert))
    tally.add("b", torch.tensor([[0.0, 2.0]]), Outputs(expert[:1]))
    p = torch.tensor([2.0, 0.0]).softmax(0)
    measured = tally.result()
    assert (measured.agreement, measured.rows) == (0.5, 3)
    assert measured.kl == pytest.approx(float((p * (p.log() - p.flip(0).log())).sum()) / 2)
    assert Tally(()).result() is None
