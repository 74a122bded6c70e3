"""The command line as a user meets it: in one process for speed, and in real processes where that matters."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from adamerge import zoo
from adamerge.callbacks.elapsed import seconds_of
from adamerge.commands.evaluate import _row_name
from adamerge.commands.run.compose import compose
from tests.support.command_line import QUIET, call, command, environment, refusal
from tests.support.small_run import output, start

pytestmark = QUIET


def changed(tmp_path, name, change):
    """Write the digits expert with its tensors changed; return the file."""
    tensors = load_file(zoo.files() / "experts" / "digits.safetensors")
    change(tensors)
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path)
    return path


def test_adapt_small_run_writes_everything(arguments, capsys, tmp_path):
    assert call("adapt", *arguments) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(tmp_path / "run")
    names = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {"merged.safetensors", "coefficients.json", "heads.safetensors", "merge.json", "summary.json"} <= names
    assert {"config.yaml", "adapt.log", "checkpoints/last.ckpt", "metrics/version_0/metrics.csv"} <= names
    assert not [p for p in tmp_path.rglob("*.tmp")]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["protocol"] == "split"
    assert set(summary["rows"]) == {"pretrained", "task_arithmetic_0.3", "adapt", "experts"}
    recipe = json.loads((tmp_path / "run" / "merge.json").read_text())
    assert recipe["steps"] == 3
    assert recipe["metrics"]["adapt"]["mean"] == summary["rows"]["adapt"]["mean"]
    base = load_file(zoo.files() / "base.safetensors")
    merged = load_file(tmp_path / "run" / "merged.safetensors")
    assert merged.keys() == base.keys()
    assert all(merged[key].dtype == base[key].dtype for key in base)


def test_evaluate_run_folder_repeats_its_summary(arguments, capsys, tmp_path):
    call("adapt", *arguments)
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    capsys.readouterr()
    assert call("evaluate", "run", "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert {n: r["per_task"] for n, r in after["rows"].items()} == {n: r["per_task"] for n, r in before["rows"].items()}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a/ties.safetensors", "ties"),
        ("a/merged.safetensors", "a/merged"),
        ("a/pretrained.safetensors", "a/pretrained"),
    ],
)
def test_evaluated_checkpoint_takes_no_other_rows_name(file, name):
    assert _row_name(Path(file)) == name


def test_export_coefficients_gives_the_same_bytes(arguments, capsys, tmp_path):
    call("adapt", *arguments, "evaluate=false", "granularity=row")
    merged = (tmp_path / "run" / "merged.safetensors").read_bytes()
    assert call("export", "run", "--coefficients", "run/coefficients.json", "--output", "again") == 0
    assert (tmp_path / "again" / "merged.safetensors").read_bytes() == merged
    pairs = [f"{task}={zoo.files() / 'experts' / task}.safetensors" for task in ("mnist", "digits")]
    command = ["export", "--base", zoo.files() / "base.safetensors", "--prefix", "visual.", "--output", "files"]
    assert call(*command, "--expert", pairs[0], "--expert", pairs[1], "--coefficients", "run/coefficients.json") == 0
    assert (tmp_path / "files" / "merged.safetensors").read_bytes() == merged
    capsys.readouterr()
    text = refusal(capsys, *command, "--expert", pairs[0], "--coefficients", "run/coefficients.json", "--output", "no")
    assert "coefficients.json" in text
    assert "digits" in text
    assert not (tmp_path / "no").exists()


def test_export_coefficients_of_another_pool_is_refused(arguments, capsys, tmp_path):
    call("adapt", *arguments, "evaluate=false")
    path = changed(tmp_path, "other", lambda tensors: tensors["visual.proj"].mul_(1.5))
    pairs = [f"mnist={zoo.files() / 'experts' / 'mnist.safetensors'}", f"digits={path}"]
    text = refusal(
        capsys, "export", "--base", zoo.files() / "base.safetensors", "--prefix", "visual.", "--expert", pairs[0],
        "--expert", pairs[1], "--coefficients", "run/coefficients.json", "--output", "no",
    )  # fmt: skip
    assert "another pool" in text
    assert "'digits'" in text
    assert not (tmp_path / "no").exists()


def test_inspect_zoo_lists_experts_and_cosines(capsys):
    assert call("inspect", "--pool", "zoo", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["experts"]) == list(zoo.TASKS)
    assert content["parameters"] == 56
    assert [row[i] for i, row in enumerate(content["cosines"])] == pytest.approx([1.0] * 6)
    assert call("inspect", "--pool", "zoo") == 0
    assert "No problems found" in capsys.readouterr().out


def test_check_good_run_makes_nothing(arguments, capsys, tmp_path):
    assert call("check", *arguments) == 0
    assert "No problems found" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_check_several_problems_lists_all(arguments, capsys, tmp_path):
    (tmp_path / "text.safetensors").write_text("no checkpoint at all")
    overrides = ["pool.base=gone.safetensors", "pool.experts.mnist=text.safetensors", "objective._target_=no.Such"]
    assert call("check", *arguments, *overrides) == 2
    errors = capsys.readouterr().err
    assert errors.count("error:") == 3
    for word in ("gone.safetensors", "text.safetensors", "no.Such"):
        assert word in errors


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objectiv=entropy", ["'objectiv'", "'objective'"]),
        ("objective.temprature=2", ["'objective.temprature'", "'objective.temperature'"]),
        ("objective=entropi", ["objective=entropi: no such choice. Did you mean 'entropy'?", "alignment, combine"]),
        ("experiment=recomended", ["experiment=recomended: no such choice. Did you mean 'recommended'?"]),
        ("--stepss=3", ["Unknown flag '--stepss=3'. Options are written without dashes: steps=3."]),
        ("objective._target_=my_missing.Thing", ["objective._target_", "my_missing", "PYTHONPATH"]),
        ("objective._target_=adamerge.objectives.entropy.Entropi", ["objective._target_", "Entropi"]),
        ("+objective.weight=2", ["objective.weight", "takes no such option"]),
        ("+method.micro_bach=2", ["method.micro_bach", "micro_batch"]),
        ("+trainer.max_stps=2", ["trainer.max_stps", "max_steps"]),
        ("pool.base=missing.safetensors", ["missing.safetensors", "no such file"]),
        ("pool.storage=disk", ["pool.storage", "'disk'", "stream"]),
        ("granularity._target_=adamerge.model.granularity.Lair", ["granularity._target_", "Lair"]),
        ("data.protocol=both", ["data.protocol", "transductive", "'both'"]),
        ("+data.limit=0", ["data.limit", ">= 1"]),
        ("objective.temperature=-1", ["objective.temperature", "-1"]),
        ("init=high", ["init", "'high'"]),
        ("resume=auto", ["run_dir"]),
        ("resume=nowhere", ["nowhere", "config.yaml"]),
    ],
)
def test_adapt_wrong_option_is_one_line_and_leaves_nothing(arguments, capsys, tmp_path, override, words):
    if override.startswith("resume="):
        arguments = [a for a in arguments if not a.startswith("run_dir=")] if override.endswith("auto") else []
    text = refusal(capsys, "adapt", *arguments, override)
    for word in words:
        assert word in text
    assert list(tmp_path.iterdir()) == []


def remove(tensors):
    del tensors["visual.proj"]


def add(tensors):
    tensors["visual.extra"] = torch.zeros(3)


def reshape(tensors):
    tensors["visual.proj"] = torch.zeros(96, 32)


def integer(tensors):
    tensors["visual.proj"] = torch.zeros(96, 64, dtype=torch.int8)


def nan(tensors):
    tensors["visual.proj"][0, 0] = float("nan")


def infinite(tensors):
    tensors["visual.ln_post.bias"][3] = float("inf")


def other_architecture(tensors):
    for key, tensor in tensors.items():
        tensors[key] = torch.zeros([2 * size for size in tensor.shape])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove, ["'digits'", "visual.proj", "lacks 1 of 56"]),
        (add, ["'digits'", "visual.extra", "exclude"]),
        (reshape, ["'digits'", "visual.proj", "(96, 64)", "(96, 32)"]),
        (integer, ["'digits'", "visual.proj", "int8", "dequantize"]),
        (nan, ["nan.safetensors", "visual.proj", "1 NaN or infinite"]),
        (infinite, ["infinite.safetensors", "visual.ln_post.bias"]),
        (other_architecture, ["'digits'", "56 of 56", "same architecture"]),
    ],
)
def test_adapt_wrong_expert_is_one_line_and_leaves_nothing(arguments, capsys, tmp_path, change, words):
    path = changed(tmp_path, change.__name__, change)
    text = refusal(capsys, "adapt", *arguments, f"pool.experts.digits={path}")
    for word in words:
        assert word in text
    assert list(tmp_path.iterdir()) == [path]


def test_adapt_truncated_expert_is_refused(arguments, capsys, tmp_path):
    whole = (zoo.files() / "experts" / "digits.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: len(whole) // 2])
    text = refusal(capsys, "adapt", *arguments, f"pool.experts.digits={path}")
    assert "cut.safetensors" in text
    assert f"expected {len(whole)} bytes, found {len(whole) // 2}" in text


@pytest.mark.parametrize("index", ["model.safetensors.index.json", ".metadata"])
def test_missing_part_of_an_expert_is_refused_by_each_command(arguments, capsys, tmp_path, index):
    expert, part = tmp_path / "expert", "two.safetensors" if index.endswith(".json") else "__0_0.distcp"
    if index.endswith(".json"):
        expert.mkdir()
        (expert / "config.json").write_text("{}")
        (expert / index).write_text(json.dumps({"weight_map": {"w": "one.safetensors", "b": part}}))
        save_file({"w": torch.ones(2)}, expert / "one.safetensors")
    else:
        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"w": torch.ones(2)}, checkpoint_id=expert)
        (expert / part).unlink()
    out, base = tmp_path / "out", zoo.files() / "base.safetensors"
    commands = [
        ("check", *arguments, f"pool.experts.digits={expert}"),
        ("merge", "--rule", "weight_average", "--base", base, "--expert", f"a={expert}", "--out", out),
    ]
    if index == ".metadata":
        commands.append(("convert", expert, "--out", tmp_path / "out.safetensors"))
    for words in commands:
        text = refusal(capsys, *map(str, words))
        assert f"{expert / index}: names " in text
        assert f"missing: '{part}'. Copy" in text
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != expert] == []


def test_adapt_pickle_is_refused_and_not_run(arguments, capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "expert.pt"
    path.write_bytes(pickle.dumps(Evil()))
    text = refusal(capsys, "adapt", *arguments, f"pool.experts.digits={path}")
    assert "expert.pt" in text
    assert "safetensors" in text
    assert not (tmp_path / "ran").exists()


def test_adapt_same_file_twice_is_refused(arguments, capsys):
    path = zoo.files() / "experts" / "mnist.safetensors"
    text = refusal(capsys, "adapt", *arguments, f"pool.experts.digits={path}")
    assert "'mnist' and 'digits' are the same file" in text


def test_adapt_same_weights_twice_is_refused(arguments, capsys, tmp_path):
    path = tmp_path / "copy.safetensors"
    shutil.copyfile(zoo.files() / "experts" / "mnist.safetensors", path)
    text = refusal(capsys, "adapt", *arguments, f"pool.experts.digits={path}")
    assert "identical weights" in text
    assert "copy.safetensors" in text


def test_adapt_expert_identical_to_base_is_refused(arguments, capsys):
    text = refusal(capsys, "adapt", *arguments, f"+pool.experts.third={zoo.files() / 'base.safetensors'}")
    assert "'third'" in text
    assert "identical to the base" in text


def test_adapt_empty_data_folder_is_refused(arguments, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    text = refusal(capsys, "adapt", *arguments, "data.tasks.mnist.dataset.root=empty")
    assert "data.tasks.mnist.dataset" in text
    assert "class folder in empty" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_adapt_class_count_that_does_not_fit_is_refused(arguments, capsys, tmp_path, configs):
    shutil.copytree(configs / "images" / "mnist", tmp_path / "nine")
    shutil.rmtree(tmp_path / "nine" / "class9")
    text = refusal(capsys, "adapt", *arguments, "data.tasks.mnist.dataset.root=nine")
    assert "data.tasks.mnist" in text
    assert "9 classes" in text
    assert "10" in text


def test_adapt_output_that_cannot_be_made_is_refused(arguments, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    text = refusal(capsys, "adapt", *arguments, "run_dir=file/run")
    assert "file" in text
    assert "run_dir" in text


def test_debug_shows_the_traceback(arguments, capsys):
    assert call("adapt", *arguments, "pool.base=missing.safetensors", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_adapt_objective_outside_the_package_is_found(arguments, configs, tmp_path, monkeypatch, capsys):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_objectives.py").write_text(
        "class Confidence:\n"
        "    def __init__(self, power=1.0):\n"
        "        self.power = power\n"
        "    def __call__(self, step):\n"
        "        return -(step.outputs.logits.softmax(-1) ** self.power).sum(-1).mean()\n"
    )
    (configs / "objective").mkdir(exist_ok=True)
    (configs / "objective" / "confidence.yaml").write_text("_target_: my_objectives.Confidence\npower: 2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    assert call("adapt", *arguments, "objective=confidence", "evaluate=false") == 0
    assert (tmp_path / "run" / "merged.safetensors").is_file()


def test_adapt_run_folder_in_use_is_refused(arguments, capsys, tmp_path):
    call("adapt", *arguments, "evaluate=false")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    text = refusal(capsys, "adapt", *arguments, "seed=7")
    assert "holds a run already" in text
    assert "resume=" in text
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_adapt_resume_auto_starts_goes_on_and_refuses_other_options(arguments, capsys, tmp_path):
    assert call("adapt", *arguments, "resume=auto", "evaluate=false") == 0
    merged = (tmp_path / "run" / "merged.safetensors").read_bytes()
    assert call("adapt", *arguments, "resume=auto", "evaluate=false") == 0
    assert (tmp_path / "run" / "merged.safetensors").read_bytes() == merged
    text = refusal(capsys, "adapt", *arguments, "resume=auto", "evaluate=false", "seed=3", "granularity=task")
    assert "other options" in text
    assert "granularity._target_" in text
    assert "seed" in text
    text = refusal(capsys, "adapt", *arguments, "-m", "resume=auto", "seed=0,1")
    assert "-m" in text


def test_adapt_resume_says_how_to_go_on_where_it_cannot(arguments, capsys, tmp_path, monkeypatch):
    config = compose([*arguments, "trainer.accelerator=gpu"])
    (tmp_path / "run").mkdir()
    OmegaConf.save(config, tmp_path / "run" / "config.yaml", resolve=True)
    assert "init=run/coefficients.json steps=N" in refusal(capsys, "adapt", "resume=run", "steps=9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    text = refusal(capsys, "adapt", "resume=run")
    assert "trainer.accelerator: found gpu" in text
    assert f"adamerge export {tmp_path / 'run'} --out DIR and init=DIR/coefficients.json" in text


def test_adapt_resume_from_another_folder_finds_relative_files(arguments, tmp_path, monkeypatch):
    shutil.copyfile(zoo.files() / "experts" / "digits.safetensors", tmp_path / "digits.safetensors")
    assert call("adapt", *arguments, "pool.experts.digits=digits.safetensors", "evaluate=false") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call("adapt", "resume=../run") == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call("export", "../run", "--coefficients", "../run/coefficients.json", "--output", "again") == 0
    again = tmp_path / "elsewhere" / "again" / "merged.safetensors"
    assert again.read_bytes() == (tmp_path / "run" / "merged.safetensors").read_bytes()


def test_adapt_resume_with_a_changed_expert_is_refused(arguments, capsys, tmp_path):
    shutil.copyfile(zoo.files() / "experts" / "digits.safetensors", tmp_path / "digits.safetensors")
    call("adapt", *arguments, "pool.experts.digits=digits.safetensors", "evaluate=false")
    shutil.copyfile(zoo.files() / "experts" / "latin.safetensors", tmp_path / "digits.safetensors")
    text = refusal(capsys, "adapt", "resume=run")
    assert "cannot be resumed" in text
    assert "'digits'" in text


def test_adapt_that_diverges_exports_nothing(arguments, capsys, tmp_path):
    assert call("adapt", *arguments, "steps=1", "constraint=none", "optimizer.lr=1e30") == 3
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "merged.safetensors").exists()
    assert (tmp_path / "run" / "config.yaml").exists()


def test_adapt_tasks_without_labels_are_adapted_and_not_scored(arguments, configs, capsys, tmp_path):
    only = {f"{task}": {
        "_target_": "adamerge.data.Task", "classes": list(zoo.CLASSES["mnist"]), "templates": list(zoo.TEMPLATES),
        "adapt": {"_target_": "torchvision.datasets.ImageFolder", "root": str(configs / "images" / task)},
    } for task in ("mnist", "digits")}  # fmt: skip
    (configs / "data" / "unlabelled.yaml").write_text(
        json.dumps({"_target_": "adamerge.data.UnlabeledTasks", "tasks": only, "batch_size": 4, "seed": "${seed}"})
    )
    chosen = ["data=unlabelled" if a == "data=tiny" else a for a in arguments]
    assert call("adapt", *chosen, "evaluate=false") == 0
    assert (tmp_path / "run" / "merged.safetensors").exists()
    assert (tmp_path / "run" / "config.yaml").exists()
    assert "no task has evaluation inputs" in refusal(capsys, "evaluate", "run").lower()


def test_adapt_sweep_checks_each_job(arguments, capsys, tmp_path, configs):
    (configs / "experiment").mkdir(exist_ok=True)
    (configs / "experiment" / "typo.yaml").write_text("# @package _global_\nstpes: 3\n")
    sweep = [a for a in arguments if not a.startswith("run_dir")] + ["hydra.sweep.dir=sweep", "experiment=typo"]
    text = refusal(capsys, "adapt", *sweep, "-m", "seed=0,1")
    assert "'stpes'. Did you mean 'steps'?" in text


def test_adapt_interrupted_and_resumed_equals_uninterrupted(arguments, tmp_path):
    arguments = [*arguments, "steps=20", "evaluate=false", "report=true", "granularity=row", "optimizer.lr=0.01"]
    assert call("adapt", *arguments, "report=false", "run_dir=whole") == 0
    process = start("adapt", *arguments, "run_dir=cut", cwd=tmp_path)
    log = tmp_path / "cut" / "adapt.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "4/20 steps" in log.read_text()):
        assert process.is_alive(), output(tmp_path)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, output(tmp_path)
    assert "adamerge adapt resume=" in output(tmp_path)
    assert not (tmp_path / "cut" / "merged.safetensors").exists()
    checkpoint = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    before = seconds_of(checkpoint)
    for _ in range(2):  # the second time it has ended, and nothing is left to do
        assert call("adapt", "resume=cut") == 0
        for name in ("merged.safetensors", "coefficients.safetensors"):
            assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        recipe, record = (json.loads((tmp_path / "cut" / f"{name}.json").read_text()) for name in ("merge", "report"))
        began = ["adamerge", "adapt", f"--config-dir={arguments[1]}", *arguments[2:], "run_dir=cut"]
        assert recipe["command"] == began
        assert record["costs"]["seconds"]["adapt"] == pytest.approx(seconds_of(checkpoint), abs=1e-3)
        assert seconds_of(checkpoint) > before > 0


def test_adapt_frank_wolfe_exports_its_support_and_refuses_the_box(arguments, capsys, tmp_path):
    options = [*arguments, "method=frank_wolfe", "granularity=task", "method.step_rule=line_search", "evaluate=false"]
    assert call("adapt", *options, "constraint=simplex") == 0
    recipe = json.loads((tmp_path / "run" / "merge.json").read_text())
    assert recipe["frank_wolfe"]["iterations"] == 3
    assert sum(entry["mean"] for entry in recipe["frank_wolfe"]["support"].values()) == pytest.approx(1, abs=1e-5)
    merged = (tmp_path / "run" / "merged.safetensors").read_bytes()
    assert call("export", "run", "--coefficients", "run/coefficients.json", "--output", "again") == 0
    assert (tmp_path / "again" / "merged.safetensors").read_bytes() == merged
    capsys.readouterr()
    text = refusal(capsys, "adapt", *options, "constraint=box", "run_dir=no")
    assert "constraint must be simplex or none, found box" in text
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_adapt_sweep_runs_each_combination(arguments, tmp_path):
    subprocess.run(
        command("adapt", *[a for a in arguments if not a.startswith("run_dir")], "-m", "objective=entropy,imitation",
                "evaluate=false", "hydra.sweep.dir=sweep"),
        check=True, capture_output=True, env=environment(),
    )  # fmt: skip
    results = [(tmp_path / "sweep" / str(job) / "merged.safetensors").read_bytes() for job in (0, 1)]
    assert results[0] != results[1]
    words = [json.loads((tmp_path / "sweep" / str(job) / "merge.json").read_text())["command"] for job in (0, 1)]
    assert [[word for word in own if word.startswith("objective=")] for own in words] == [
        ["objective=entropy"],
        ["objective=imitation"],
    ]


def test_help_names_groups_and_choices(capsys):
    assert call("adapt", "--help") == 0
    text = capsys.readouterr().out
    choices = dict(line.split(": ", 1) for line in text.splitlines() if re.match(r"\w+: \w", line))
    assert {"entropy", "imitation"} <= set(choices["objective"].split(", "))
    assert {"task", "block", "layer", "chunk", "row", "column"} <= set(choices["granularity"].split(", "))
    assert "resume=" in text
    assert call("--help") == 0
    text = capsys.readouterr().out
    for name in ("adapt", "check", "demo", "evaluate", "export", "inspect", "zoo"):
        assert name in text
