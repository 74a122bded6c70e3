"""The demo end to end, in a real process."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from adamerge import load_state_dict
from adamerge.commands import demo
from adamerge.commands.run.compose import compose
from adamerge.results.evaluation import TaskScore
from adamerge.results.export import load_heads

ROWS = [
    *("pretrained", "weight_average", "task_arithmetic_0.3", "task_arithmetic_best", "adamerging_task"),
    *("adamerging_layer", "imitation_layer", "imitation_row", "recommended", "oracle_layer", "experts"),
]


def scores(*hits):
    return {"task": TaskScore(sum(hits) / len(hits), 0.0, torch.tensor(hits, dtype=torch.bool))}


def test_verdict_says_what_holds_and_what_does_not():
    best, middle, worst = scores(*[1] * 200), scores(*[1, 0] * 100), scores(*[0] * 200)
    rows = dict(zip(demo.ORDER, (worst, middle, middle, worst, worst, best), strict=True))
    lines = demo.verdict(rows)
    assert [line.split(":")[1].split(",")[0].strip() for line in lines] == [
        "holds",
        "does not hold",
        "does not hold",
        "does not hold",
        "holds",
    ]
    assert "+50.0 points" in lines[0]


@pytest.mark.slow
def test_fast_demo_takes_a_tenth_of_the_steps(tmp_path):
    plan = demo.plan_of(tmp_path, 0, fast=True, transductive=False)
    assert list(plan.rows) == ROWS
    assert plan.rows["recommended"].overrides == ("experiment=recommended", "steps=20")
    assert plan.rows["oracle_layer"].overrides[-1] == "steps=15"
    for name, spec in demo.plan_of(tmp_path, 0, fast=False, transductive=False).rows.items():
        if spec.adapts:
            steps = [compose(row.overrides).steps for row in (spec, plan.rows[name])]
            assert steps[1] == round(0.1 * steps[0]), name
    assert demo.plan_of(tmp_path, 0, fast=False, transductive=True).folder != plan.folder


@pytest.mark.slow
def test_demo_gives_the_expected_order_and_files(tmp_path):
    program = Path(sys.executable).with_name("adamerge")
    result = subprocess.run(
        [program, "demo", "--output", "out", "--seed", "1"],
        cwd=tmp_path, capture_output=True, text=True, check=True, env=dict(os.environ),
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "out"
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(content["rows"]) == ROWS
    for lower, higher in itertools.pairwise(demo.ORDER):
        assert content["rows"][lower]["mean"] < content["rows"][higher]["mean"]
    start, best = content["rows"]["task_arithmetic_0.3"], content["rows"]["recommended"]
    assert best["gap_closed"] > 0.65
    assert all(best["per_task"][task] >= start["per_task"][task] for task in content["tasks"])
    assert [name for name, r in content["rows"].items() if r["uses_labels"]] == ["task_arithmetic_best", "oracle_layer"]
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out' / 'open_clip'}")
    merged = load_state_dict(tmp_path / "out" / "merged.safetensors")
    assert all(torch.equal(tensor, merged[name].float()) for name, tensor in model.state_dict().items())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for said in ("adamerge demo --output out --seed 1", "Cosines of the task vectors", "norm of its task vector",
                 "Imitation"):  # fmt: skip
        assert said in page, said
    assert "report.html" in result.stdout
    for chatter in ("Tip:", "GPU available", "TPU available"):
        assert chatter not in result.stderr
    heads, info = load_heads(tmp_path / "out" / "heads.safetensors")
    assert set(heads) == set(content["tasks"]) == set(info)
