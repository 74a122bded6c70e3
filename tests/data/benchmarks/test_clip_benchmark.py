"""The field's benchmark through the commands: a tiny CLIP, eight experts, and small files in the real formats."""

import json

import pytest

from adamerge.commands.cli import main
from adamerge.data.benchmarks import BENCHMARKS, opening
from tests.support.clips import write_benchmark_clip
from tests.support.data_files import make


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Options of a run on all eight tasks."""
    opening.open_at.cache_clear()
    for name in BENCHMARKS["clip_8"]:
        make(name, tmp_path / "data", monkeypatch)
    write_benchmark_clip(tmp_path, BENCHMARKS["clip_8"], monkeypatch)
    experts = [f"{name}: {tmp_path / name}.safetensors" for name in BENCHMARKS["clip_8"]]
    return [
        "data=clip_8", f"data.root={tmp_path / 'data'}", "data.num_workers=0", "data.batch_size=2",
        "backbone=open_clip", f"backbone.model={tmp_path / 'model'}",
        "pool=files", f"pool.base={tmp_path / 'base.safetensors'}", f"pool.experts={{{', '.join(experts)}}}",
        "trainer=cpu", "steps=2", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


@pytest.mark.slow
def test_eight_tasks_adapt_and_are_scored(arguments, tmp_path, capsys):
    main_ends(["check", *arguments], 0)
    assert "No problems found" in capsys.readouterr().out
    main_ends(["adapt", *arguments, "references=false"], 0)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["tasks"] == list(BENCHMARKS["clip_8"])


def test_all_that_is_missing_is_said_at_once(arguments, tmp_path, capsys):
    (tmp_path / "data/dtd").rename(tmp_path / "dtd")
    (tmp_path / "data/svhn").rename(tmp_path / "svhn")
    main_ends(["check", *arguments], 2)
    said = capsys.readouterr().err
    assert "DTD (dtd), test, is not below" in said
    assert "SVHN (svhn), test, is not below" in said
    assert said.count("error:") == 2


def main_ends(arguments, code):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == code
