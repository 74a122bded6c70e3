"""The command ``adamerge compare``: rows, results that are kept, measures and tables."""

import json

import pytest
from rich.console import Console

from adamerge import zoo
from adamerge.commands import cli
from adamerge.commands.compare import plan as comparison
from adamerge.commands.compare import row as compare_row
from adamerge.commands.compare.plan import plan_of
from adamerge.commands.compare.row import make_row, read_row
from adamerge.commands.compare.table import compared
from adamerge.commands.run import folder as run_folder
from adamerge.commands.run.shipped import rule_names
from adamerge.errors import GuardError, InputError
from adamerge.results.summary_table import table
from tests.support.processes import run_ranks

QUIET = Console(quiet=True)


def result(mean, seed=0, **more):
    return {
        "per_task": {"a": mean, "b": mean / 2}, "calibration_error": {"a": 0.1, "b": 0.1}, "mean": 0.75 * mean,
        "interval": [mean - 0.1, mean + 0.1], "uses_labels": False, "uses_data": False, "seconds": 1.0, "seed": seed,
        "protocol": "split", "peak_memory_bytes": 1e6, **more,
    }  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """Rows that were made, instead of making them; of TIES, sums diverge, density 0.9 is interrupted, 0.8 has a bug."""
    calls = []

    def instantly(spec, common, seed, folder):
        calls.append((seed, spec.text))
        if "density=0.8" in spec.text:
            raise KeyError("mnist")
        if "density=0.9" in spec.text:
            raise KeyboardInterrupt
        if "aggregate=sum" in spec.text:
            raise GuardError("it diverged")
        return result(0.8 if spec.text == "experts" else 0.4 + 0.1 * seed, seed)

    monkeypatch.setattr(comparison, "make_row", instantly)
    monkeypatch.setattr(comparison.drawing, "save", lambda chart, path: path.touch())
    return calls


def test_rows_are_references_merges_or_runs():
    assert read_row("experts").rule is None
    merge = read_row("ties density=0.1 transform=lines transform.beta=1")
    assert merge.rule["density"] == 0.1
    assert merge.overrides == ("transform=lines", "transform.beta=1")
    assert not merge.adapts
    assert read_row("task_arithmetic_0.3").rule["coefficient"] == 0.3
    run = read_row("experiment=recommended start=wudi start.steps=10 'granularity.groups={a: x}'")
    assert run.adapts
    assert run.rule["steps"] == 10
    assert run.overrides == ("experiment=recommended", "granularity.groups={a: x}")


def test_controls_are_runs_with_options_of_their_own_that_a_row_replaces():
    control = read_row("random_experts steps=10 start=wudi start.steps=5")
    assert control.adapts
    assert control.rule["steps"] == 5
    assert control.overrides == ("experiment=recommended", "transform=random", "transform.seed=${seed}", "steps=10")
    other = read_row("random_experts experiment=imitation_row transform.seed=3")
    assert set(other.overrides) == {"experiment=imitation_row", "transform=random", "transform.seed=3"}
    assert read_row("distillation steps=10").overrides == ("experiment=distillation", "steps=10")
    assert read_row("experiment=distillation").control is None
    assert read_row("experiment=imitation_row start=auto").rule == "auto"


def test_controls_are_marked_and_explained(tmp_path, made):
    rows = compared({"random_experts": [result(0.6, control="random_experts")], "mine": [result(0.6)]})
    markdown = table(rows).markdown(code=(0,))
    assert "| `random_experts` ‡ |" in markdown
    assert "| `mine` |" in markdown
    assert "‡ control: random directions" in markdown
    assert "‡" not in table(compared({"mine": [result(0.6)]})).markdown()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("random_experts transform=ties", "random_experts takes no transform"),
        ("random_experts step=10", "Did you mean 'steps'"),
        ("tie", "Did you mean 'ties'?"),
        ("ties densty=1", "Did you mean 'density'?"),
        ("ties density", "expected OPTION=VALUE"),
        ("experts transform=ties", "experts takes no options, found 'transform=ties'"),
        ("task_arithmetic_best coefficient=1", "takes a transform only"),
        ("experiment=x start.a=1", "no start=RULE"),
        ("objective=entropi", "entropi"),
        ("ties 'open", "No closing quotation"),
        ("", "expected a rule"),
    ],
)
def test_wrong_row_is_refused_before_anything_runs(row, message, tmp_path, made):
    with pytest.raises(InputError, match="row") as refused:
        plan_of([row], None, [], [0], tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert made == []


@pytest.mark.slow
def test_shipped_preset_has_every_merge_and_every_transform(tmp_path):
    plan = plan_of([], "demo", [], [0], tmp_path)
    texts = [spec.text for spec in plan.rows.values()]
    assert set(rule_names("merge")) <= {text.split()[0] for text in texts}
    used = [" ".join((spec.text, *spec.overrides)) for spec in plan.rows.values()]
    assert all(any(f"transform={name}" in text for text in used) for name in rule_names("transform") if name != "none")
    for method in ("adamerging_layer", "imitation_row", "recommended"):
        starts = {" ".join(text.split()[1:2]) for text in texts if text.startswith(f"experiment={method}")}
        assert starts >= {"", "start=ties", "start=wudi", "start=tsvm"}
    assert {spec.control for spec in plan.rows.values()} == {None, "random_experts", "distillation"}
    assert list(plan.rows)[-1] == "experts"
    assert plan.rows["task_arithmetic_best"].reference == "task_arithmetic_best"
    with pytest.raises(InputError, match="Did you mean 'demo'"):
        plan_of([], "demmo", [], [0], tmp_path)
    (tmp_path / "mine.yaml").write_text("row: {a: ties}")
    with pytest.raises(InputError, match="expected rows"):
        plan_of([], str(tmp_path / "mine.yaml"), [], [0], tmp_path)


def test_rows_choose_those_of_a_preset_by_name_or_join_them(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("rows: {dense: ties density=0.9, sparse: ties density=0.1, tsvm: }")
    rows = {
        (): {"dense": "ties density=0.9", "sparse": "ties density=0.1", "tsvm": "tsvm"},
        ("sparse",): {"sparse": "ties density=0.1"},
        ("sparse", "wudi"): {"sparse": "ties density=0.1", "wudi": "wudi"},
        ("wudi",): {"dense": "ties density=0.9", "sparse": "ties density=0.1", "tsvm": "tsvm", "wudi": "wudi"},
    }
    for given, wanted in rows.items():
        plan = plan_of(given, str(preset), [], [0], tmp_path)
        made = {name: spec.text for name, spec in plan.rows.items()}
        assert made == wanted | {"task_arithmetic_0.3": "task_arithmetic_0.3", "experts": "experts"}
    with pytest.raises(InputError, match=r"row 'sparce': .* Did you mean 'sparse'\?"):
        plan_of(["sparce"], str(preset), [], [0], tmp_path)
    preset.write_text("rows: {sparse: ties densty=0.1}")
    with pytest.raises(InputError, match=r"Did you mean 'density'\?") as refused:
        plan_of([], str(preset), [], [0], tmp_path)
    assert "'sparse'" not in str(refused.value)


def test_run_goes_on_row_by_row_and_keeps_the_others_when_one_fails(tmp_path, made):
    plan = plan_of(["ties", "ties aggregate=sum"], None, [], [0, 1], tmp_path)
    failed = comparison.run(plan, QUIET)
    assert failed == {f"ties aggregate=sum, seed {seed}": "it diverged" for seed in (0, 1)}
    assert len(made) == 8
    made.clear()
    wider = plan_of(["ties", "ties aggregate=sum", "tsvm"], None, [], [0, 1], tmp_path)
    comparison.run(wider, QUIET)
    assert made == [(s, name) for s in (0, 1) for name in ("ties aggregate=sum", "tsvm")]
    content = json.loads((tmp_path / "summary.json").read_text())
    assert list(content["rows"]) == ["ties", "tsvm", "task_arithmetic_0.3", "experts"]
    row = content["rows"]["ties"]
    assert row["seeds"] == [0, 1]
    assert row["per_task"]["a"] == pytest.approx(0.45)
    assert row["normalised"] == pytest.approx(0.45 / 0.8)
    assert (tmp_path / "comparison.png").exists()
    assert "`tsvm`" in (tmp_path / "table.md").read_text()


def test_error_of_a_rule_ends_its_own_row_only(tmp_path, made):
    failed = comparison.run(plan_of(["ties density=0.8", "tsvm"], None, [], [0], tmp_path), QUIET)
    assert failed == {"ties density=0.8, seed 0": "KeyError: 'mnist'"}
    assert "tsvm" in json.loads((tmp_path / "summary.json").read_text())["rows"]


def _refusal(folder):
    with pytest.raises(InputError) as refused:
        comparison.run(plan_of(["ties"], None, [], [0], folder), QUIET)
    return str(refused.value)


@pytest.mark.slow
def test_folder_of_another_comparison_is_refused(tmp_path, made):
    with run_folder.held(tmp_path):
        (text,) = run_ranks(_refusal, 1, tmp_path)  # a lock is another process's
    assert "in use by another run" in text
    assert text.endswith("choose another --out.")
    assert made == []
    assert not list(tmp_path.glob("seed_*"))
    comparison.run(plan_of(["ties"], None, [], [0], tmp_path), QUIET)


def test_interrupted_row_goes_on_with_its_own_options_only(tmp_path, monkeypatch):
    def interrupted(config, folder, *, resume):
        assert (folder / run_folder.LOCK).exists()
        resumed.append(resume)
        (folder / run_folder.LAST).parent.mkdir(exist_ok=True)
        (folder / run_folder.LAST).touch()
        raise SystemExit(130)

    resumed = []
    monkeypatch.setattr(compare_row.run, "adapt", interrupted)
    monkeypatch.setattr(compare_row, "begin", lambda config, folder: config)
    monkeypatch.setattr(compare_row, "load_config", lambda folder: None)
    monkeypatch.setattr(compare_row, "check", lambda config: [])
    text = "experiment=adamerging_layer steps=2 start=wudi"
    for _ in range(2):
        with pytest.raises(SystemExit):
            make_row(read_row(text), [], 0, tmp_path)
    for other, option in ((text.replace("2", "3"), "steps"), (text.replace("wudi", "ties"), "start")):
        with pytest.raises(
            InputError, match=f"made with other options: {option}.*\\. Remove its folder.*another --out"
        ):
            make_row(read_row(other), [], 0, tmp_path)
    (tmp_path / "started.json").unlink()
    with pytest.raises(InputError, match=r"started\.json is missing"):
        make_row(read_row(text), [], 0, tmp_path)
    assert resumed == [False, True]


def test_row_of_several_processes_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"trainer\.devices: a row has one process.*trainer\.devices=1"):
        make_row(read_row("experiment=adamerging_layer"), ["trainer=ddp", "trainer.devices=2"], 0, tmp_path)
    assert not (tmp_path / "run").exists()


def test_interrupted_comparison_writes_what_is_there(tmp_path, made):
    plan = plan_of(["tsvm", "ties density=0.9", "iso_c"], None, [], [0], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        comparison.run(plan, QUIET)
    assert [text for _, text in made] == ["tsvm", "ties density=0.9"]
    assert list(json.loads((tmp_path / "summary.json").read_text())["rows"]) == ["tsvm"]


def test_rows_that_adapt_come_last_and_stand_in_the_table_as_given(tmp_path, made):
    comparison.run(plan_of(["experiment=recommended", "ties"], None, [], [0, 1], tmp_path), QUIET)
    assert [text for _, text in made[:4]] == ["ties", "task_arithmetic_0.3", "experts", "experiment=recommended"]
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert list(rows) == ["experiment=recommended", "ties", "task_arithmetic_0.3", "experts"]


def test_results_of_other_options_are_refused(tmp_path, made):
    comparison.run(plan_of(["ties"], None, [], [0], tmp_path), QUIET)
    with pytest.raises(InputError, match=r"made with another overrides.*Choose another --out"):
        comparison.run(plan_of(["ties"], None, ["data.batch_size=8"], [0], tmp_path), QUIET)
    path = next(tmp_path.glob("seed_0/ties/row.json"))
    path.write_text("{}")
    with pytest.raises(InputError, match="no result of"):
        comparison.run(plan_of(["ties"], None, [], [0], tmp_path), QUIET)


def test_measures_refer_to_the_same_seed():
    found = {
        "task_arithmetic_0.3": [result(0.4, 0), result(0.2, 1)],
        "mine": [result(0.6, 0), result(0.2, 1)],
        "experts": [result(0.8, 0), result(0.4, 1)],
        "none yet": [],
    }
    rows = compared(found)["rows"]
    assert rows["mine"]["gap_closed"] == pytest.approx((0.5 + 0.0) / 2)
    assert rows["mine"]["normalised_per_task"]["a"] == pytest.approx((0.75 + 0.5) / 2)
    assert rows["mine"]["spread"] == pytest.approx(0.75 * 0.4 / 2**0.5)
    assert rows["experts"]["normalised"] == pytest.approx(1)
    assert "none yet" not in rows
    lines = table(compared(found)).markdown(code=(0,)).splitlines()
    assert lines[0] == "| accuracy, % | a | b | mean | 95 % | spread | gap | norm. | ECE | s | MB |"
    assert all(line.count("|") == lines[0].count("|") for line in lines[:5])
    assert compared({"mine": found["mine"]})["rows"]["mine"]["normalised"] is None


def test_command_takes_lists_and_reports_failures(tmp_path, made, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--rows", "tsvm", "ties aggregate=sum", "--seeds", "0", "1", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert {name for _, name in made} == {"tsvm", "ties aggregate=sum", "task_arithmetic_0.3", "experts"}
    assert {seed for seed, _ in made} == {0, 1}
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    made.clear()
    arguments = ["--rows", "tsvm", "--out", str(tmp_path / "b"), "--", "data.batch_size=8"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *arguments])
    assert not stopped.value.code
    assert json.loads(next((tmp_path / "b").rglob("row.json")).read_text())["overrides"] == ["data.batch_size=8"]


@pytest.mark.slow
def test_compare_on_the_zoo_makes_rows(tmp_path):
    scores = [f"scores.{task}=1" for task in zoo.TASKS]
    rows = [
        "ties", "task_arithmetic transform=ties", " ".join(["metrics_weighted", *scores]),
        "experiment=adamerging_layer start=tsvm steps=2",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--rows", *rows, "--out", str(tmp_path)])
    assert not stopped.value.code
    content = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert content["ties"]["mean"] > 0.5
    assert content[rows[3]]["uses_data"]
    assert not content["ties"]["uses_data"]
    assert content[rows[2]]["uses_labels"]
    assert not content["ties"]["uses_labels"]
    assert content["ties"]["peak_memory_bytes"] > 1e8
    # A row is the same whatever was made in the process before.
    again = make_row(read_row(rows[1]), [], 0, tmp_path / "again")
    assert again["per_task"] == content[rows[1]]["per_task"]
    merged = next(tmp_path.glob("seed_0/*transform=ties/merged.safetensors"))
    assert merged.read_bytes() == (tmp_path / "again" / "merged.safetensors").read_bytes()
