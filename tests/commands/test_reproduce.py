"""``adamerge reproduce``: rows beside figures that a preset calls published, made for real on small files."""

import json

import pytest
import yaml

from adamerge import InputError
from adamerge.commands.cli import main
from adamerge.commands.compare.plan import plan_of, protocol_of, read_preset
from adamerge.commands.compare.published import with_published
from adamerge.commands.reproduce import problems_of
from adamerge.commands.run.compose import compose
from adamerge.commands.run.shipped import rule_names
from adamerge.data.benchmarks import opening
from adamerge.results.baselines import LabelledCrossEntropy
from tests.support.clips import write_benchmark_clip
from tests.support.data_files import make

TASKS = ("mnist", "dtd")
ROWS = {
    "pretrained": None,
    "ties": "ties aggregate=sum scale=0.3",
    "entropy": "experiment=adamerging_layer steps=2 data.batches_per_step=2",
    "labelled": "experiment=fw_hard_labelled steps=1 data.adapt=train",
}
PUBLISHED = {
    "title": "A table of this test's own",
    "source": "this test",
    "protocol": "transductive",
    "pool": "two experts of this test's own",
    "rows": {
        "pretrained": {"mean": 12.5, "tasks": {"mnist": 20, "dtd": 5.0}, "protocol": "no data"},
        "entropy": {"mean": 50.0, "source": "its second page"},
        "labelled": {"mean": 60},
    },
}


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """A preset on two data sets in their authors' formats, and a tiny CLIP with two experts as a named pool."""
    opening.open_at.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAMERGE_POOLS", raising=False)
    for name in TASKS:
        make(name, tmp_path / "data", monkeypatch)
    write_benchmark_clip(tmp_path, TASKS, monkeypatch)
    options = [word for name in TASKS for word in ("--expert", f"{name}={name}.safetensors")]
    run("pool", "add", "small", "--base", "base.safetensors", *options)
    others = ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb")
    overrides = [
        "benchmark=vit_b32_8", "pool=small", f"backbone.model={tmp_path / 'model'}", "data.protocol=transductive",
        *(f"~data.tasks.{name}" for name in others), f"data.root={tmp_path / 'data'}", "data.batch_size=2",
        "data.num_workers=0", "trainer=cpu",
    ]  # fmt: skip
    return write(tmp_path, {"rows": ROWS, "overrides": overrides, "published": PUBLISHED})


def write(folder, content):
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert (done.value.code or 0) == code


@pytest.mark.slow
def test_reproduce_makes_the_rows_and_puts_the_published_figures_beside(preset, tmp_path, capsys):
    run("reproduce", preset, "--check", "--json")
    content = json.loads(capsys.readouterr().out)
    assert (len(content["rows"]), content["problems"]) == (6, [])
    run("reproduce", preset, "--out", "out")
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = content["rows"]
    assert list(rows) == ["pretrained", "ties", "entropy", "labelled", "task_arithmetic_0.3", "experts"]
    assert rows["pretrained"]["difference"] == pytest.approx(100 * rows["pretrained"]["mean"] - 12.5)
    assert "published" not in rows["ties"]
    assert rows["entropy"]["protocol"] == "transductive, 2 steps of 2 x 2 images a task"
    figures = rows["entropy"]["published"]
    assert (figures["source"], figures["protocol"]) == ("its second page", "transductive")
    assert rows["labelled"]["protocol"].startswith("adapted on train, scored on all of test, 1 steps")
    assert {name: row["uses_labels"] for name, row in rows.items() if row["uses_labels"]} == {"labelled": True}
    text = (tmp_path / "out" / "table.md").read_text()
    assert "(20.0)" in text
    assert "`labelled` *" in text
    assert "two experts of this test's own" in text
    before = (tmp_path / "out" / "seed_0" / "entropy" / "row.json").stat().st_mtime_ns
    capsys.readouterr()
    run("reproduce", preset, "--out", "out", "--json")  # nothing is made again
    assert json.loads(capsys.readouterr().out)["summary"]["rows"] == rows
    assert (tmp_path / "out" / "seed_0" / "entropy" / "row.json").stat().st_mtime_ns == before


def test_reproduce_says_first_what_is_missing_and_how_to_get_it(preset, tmp_path, capsys):
    (tmp_path / "data" / "dtd").rename(tmp_path / "dtd")
    (tmp_path / "mnist.safetensors").unlink()
    run("reproduce", preset, "--out", "out", code=2)
    said = capsys.readouterr().err
    assert "mnist.safetensors: no such file" in said
    assert "DTD (dtd), test, is not below" in said
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 2
    assert max(map(len, errors)) < 400
    assert "\ndtd: how to get it\n  adamerge data get dtd --root" in said
    assert said.splitlines()[-1].startswith("The table was made with: two experts")
    assert not (tmp_path / "out").exists()
    (tmp_path / "pools" / "small.yaml").unlink()
    run("reproduce", preset, code=2)
    said = capsys.readouterr().err
    assert "pool=small: no pool of that name" in said
    assert "The table was made with" in said


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "table2" else pytest.mark.slow)
        for name in rule_names("compare")
        if name.startswith("table")
    ],
)
def test_shipped_tables_compose_and_their_figures_have_sources(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pools").mkdir()
    for pool in ("ta_vit_b32_8", "ta_vit_l14_8"):
        (tmp_path / "pools" / f"{pool}.yaml").write_text("base: a\nexperts: {mnist: b}\n")
    plan = plan_of((), name, (), (0,), tmp_path / "out")
    tasks = set(compose(plan.overrides).data.tasks)
    for figures in plan.published["rows"].values():
        assert figures["source"]
        assert figures["protocol"]
        assert set(figures["tasks"]) <= tasks
        if figures["tasks"]:
            mean = sum(figures["tasks"].values()) / len(figures["tasks"])
            assert figures["mean"] == pytest.approx(mean, abs=0.25)
    assert all("steps of" in protocol_of(plan, row) for row in plan.rows if plan.rows[row].adapts)
    problems = problems_of(plan)
    assert problems  # nothing is here
    assert not any("is no task" in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"published": {**PUBLISHED, "pool": ""}}, "published.pool: must be given"),
        ({"published": {**PUBLISHED, "extra": 1}}, "unknown key 'extra'"),
        (
            {"published": {**PUBLISHED, "rows": {"tie": {"mean": 1}}}},
            r"no row of the preset\. Did you mean 'ties'",
        ),
        (
            {"published": {**PUBLISHED, "rows": {"ties": {"mean": 101}}}},
            r"an accuracy in percent: expected a number in \[0, 100\], found 101",
        ),
        (
            {"published": {**PUBLISHED, "rows": {"ties": {"tasks": {"mnist": 1}}}}},
            "mean: an accuracy in percent: expected a number",
        ),
        ({"rows": ["ties"]}, r"expected rows: \{name: row"),
        ({"published": {**PUBLISHED, "rows": "ties"}}, "published.rows: expected a mapping"),
        ({"published": {**PUBLISHED, "rows": {"ties": {"mean": 1, "mnist": 1}}}}, "unknown key 'mnist'"),
    ],
)
def test_wrong_published_sections_are_named(tmp_path, change, words):
    path = write(tmp_path, {"rows": ROWS, "published": PUBLISHED, **change})
    with pytest.raises(InputError, match=words):
        read_preset(str(path))


def test_preset_without_published_figures_is_refused(tmp_path, capsys):
    path = write(tmp_path, {"rows": ROWS})
    run("reproduce", path, code=2)
    assert "table.yaml: expected a section published" in capsys.readouterr().err


def test_published_task_that_is_not_in_the_data_is_named_before_anything_runs(tmp_path):
    rows = {"pretrained": {"mean": 12.5, "tasks": {"mnst": 20}}}
    path = str(write(tmp_path, {"rows": {"pretrained": None}, "published": {**PUBLISHED, "rows": rows}}))
    plan = plan_of((), path, ("data=clip_8",), (0,), tmp_path / "out")
    message = "published.rows.pretrained.tasks: 'mnst' is no task of the data. Did you mean 'mnist'?"
    assert message in problems_of(plan)


def test_published_task_that_is_not_scored_is_named_and_its_row_has_no_figure(tmp_path, caplog):
    published = read_preset(str(write(tmp_path, {"rows": ROWS, "published": PUBLISHED})))[2]
    row = {"mean": 0.5, "per_task": {"mnst": 0.5}, "interval": [0.4, 0.6], "uses_labels": False}
    content = with_published({"tasks": ["mnst"], "rows": {"pretrained": row}}, published, {"pretrained": "split"})
    assert "'mnist' is no task of the data. Did you mean 'mnst'" in caplog.text
    assert "published" not in content["rows"]["pretrained"]


def test_benchmarks_choose_pool_data_and_model_and_give_way_to_the_command_line():
    for short, model in (("b32", "ViT-B-32"), ("b16", "ViT-B-16"), ("l14", "ViT-L-14")):
        for count in (8, 14, 20):
            config = compose([f"benchmark=vit_{short}_{count}", "experiment=adamerging_layer"])
            assert config.backbone.model == f"{model}-quickgelu"
            assert len(config.pool.experts) == len(config.data.tasks) == count
            assert set(config.pool.experts) == set(config.data.tasks)
            assert (config.steps, config.data.batch_size, config.data.protocol) == (500, 16, "split")
    config = compose(["benchmark=vit_b32_8", "pool=zoo", "data=clip_14", "backbone.model=ViT-B-32"])
    assert "digits" in config.pool.experts
    assert len(config.data.tasks) == 14
    assert config.backbone.model == "ViT-B-32"


def test_labelled_baseline_without_its_callback_is_one_clear_error():
    step = type("Step", (), {"task": "mnist"})()
    with pytest.raises(InputError, match=r"no labels of 'mnist'.*HandOverLabels"):
        LabelledCrossEntropy()(step)
