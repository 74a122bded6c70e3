"""Reports: what they hold, broken and hostile input, size, and the same bytes again."""

import html
import json
import logging
import math
import re
import shutil
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from adamerge.commands import cli
from adamerge.results.report import drawing, places
from adamerge.results.report.charts import Chart
from adamerge.results.report.facts import read_run
from adamerge.results.report.run_charts import accuracies, coefficients, cosines, distribution, norms, trajectories
from adamerge.results.report.run_page import expert_table, headline, sections
from adamerge.results.report.write import report_run, write_report
from adamerge.results.table import Table
from tests.support.report_runs import EXPERTS, PARAMETERS, save, summary, write_run

HOSTILE = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", '"><b onclick="x">{{7*7}}', "_$x^2$")


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, arguments)])
    return stop.value.code


def refusal(capsys, *arguments):
    assert call(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def page_of(*folders, path):
    write_report([read_run(folder) for folder in folders], path)
    return path.read_text(encoding="utf-8")


def figures(text):
    """Return the picture of each figure, an SVG element, by the figure's key."""
    found = re.findall(r'<figure class="card" id="figure-([\w-]+)">.*?(<svg.*?</svg>)', text, re.DOTALL)
    return {key: ElementTree.fromstring(picture) for key, picture in found}


def words(picture):
    return [" ".join(element.itertext()) for element in picture.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("options", [{}, {"rows": 40}, {"frank_wolfe": True}], ids=["layer", "row", "frank_wolfe"])
def test_report_holds_all_that_a_run_recorded(tmp_path, options):
    text = page_of(write_run(tmp_path / "run", **options), path=tmp_path / "report.html")
    assert len(text.encode()) < 500_000
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text)  # no network
    wanted = {"accuracies", "coefficients", "trajectories", "losses", "marginal", "entropy", "disagreement", "cosines"}
    more = {"rows": ("distribution", "spread"), "frank_wolfe": ("picks", "gap")}
    wanted |= {"norms", *(key for option in options for key in more[option])}
    found = figures(text)
    assert set(found) == wanted
    assert text.count('class="plot" role="img" aria-label="') == len(found)
    for picture in found.values():
        assert len(words(picture)) > 5
    for said in ("adamerge adapt objective=imitation", "Mean accuracy", "1111111111111111", "split", "1.0 GB", "torch",
                 f"--coefficients {tmp_path}/run/coefficients.json",
                 "1 tensors, not part of the encoder", "Imitation", "12,345 values"):  # fmt: skip
        assert said in text, said


def test_report_again_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "run", rows=5)
    assert page_of(run, path=tmp_path / "a.html") == page_of(run, path=tmp_path / "b.html")


def test_cells_of_a_heat_map_tell_names_and_value(tmp_path):
    run = write_run(tmp_path / "run")
    picture = figures(page_of(run, path=tmp_path / "report.html"))["coefficients"]
    hints = [hint.text for hint in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(hints) == len(EXPERTS) * len(PARAMETERS)
    shown = json.loads((run / "coefficients.json").read_text())["coefficients"]["dtd"]["proj"]
    assert f"dtd, proj: coefficient {float(f'{shown:.4g}'):.4g}" in hints


@pytest.mark.slow
def test_report_of_thousands_of_coefficients_stays_below_3_mb(tmp_path):
    run = write_run(
        tmp_path / "run", experts=[f"expert_{i}" for i in range(20)], rows=800, steps=2000, frank_wolfe=True
    )
    assert len(page_of(run, path=tmp_path / "report.html").encode()) < 3_000_000


def test_report_escapes_names_of_users(tmp_path):
    run = write_run(tmp_path / "run", name="<i>mine</i>", experts=HOSTILE)
    text = page_of(run, path=tmp_path / "report.html")
    assert "<i>mine" not in text
    assert html.escape("<i>mine</i>") in text
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "49" not in re.findall(r"<th scope=\"row\">(.*?)</th>", text)
    assert text.count("<script") == 1
    assert " _$x^2$" in words(figures(text)["losses"])


def test_report_of_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert "no such folder" in refusal(capsys, "report", tmp_path / "none")
    (tmp_path / "other").mkdir()
    line = refusal(capsys, "report", tmp_path / "other")
    assert "not a run folder: expected config.yaml, merge.json or summary.json in it, found none" in line
    run = write_run(tmp_path / "run")
    assert "ends in .html" in refusal(capsys, "report", run, "--out", tmp_path / "page.pdf")
    assert "no such folder" in refusal(capsys, "report", run, tmp_path / "none")
    line = refusal(capsys, "report", run / "merge.json")
    assert line.endswith(f"merge.json: expected a run's folder, found a file. Did you mean {run}?")
    assert not (run / "report.html").exists()


def test_report_of_an_unfinished_run_shows_how_far_it_came(tmp_path, capsys):
    run = write_run(tmp_path / "run", finished=False)
    assert call("report", run) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert {"losses", "trajectories", "marginal"} <= set(figures(text))
    for said in (
        "not finished",
        "`adamerge export RUN_DIR` writes",
        "No geometry of the task vectors",
        "No accuracies",
    ):
        assert said in text, said


@pytest.mark.parametrize("name", ["config.yaml", "merge.json", "summary.json", "coefficients.json", "report.json"])
@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"rows": 3, "tasks": 4, "experts": [1], "pool": 7}', "\x00\x01", "null"]
)
def test_report_of_broken_files_says_so_and_shows_the_rest(tmp_path, name, content):
    run = write_run(tmp_path / "run", frank_wolfe=True)
    (run / name).write_text(content)
    shown = sections(read_run(run))
    assert "losses" in [block.key for section in shown for block in section.blocks if isinstance(block, Chart)]
    assert shown[0].key == "notes" or (name in ("config.yaml", "merge.json") and len(content) > 9)  # any mapping


def test_report_of_broken_metrics_keeps_what_came_before(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "metrics" / "version_0" / "metrics.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:10], "x,y,z"]))
    read = read_run(run)
    assert len(read.metrics["adapt/loss"].steps) == 9
    assert "is broken" in read.notes[0]


def test_metrics_of_a_resumed_run_count_each_step_once(tmp_path):
    series = read_run(write_run(tmp_path / "run", versions=3, steps=30)).metrics["adapt/loss"]
    assert series.steps == list(range(30))


def test_figures_without_numbers_that_are_not_finite(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "metrics" / "version_0" / "metrics.csv"
    path.write_text(re.sub(r"\n0\.\d+,", "\nnan,", path.read_text()))
    assert "losses" in figures(page_of(run, path=tmp_path / "report.html"))


def test_coefficients_are_grouped_by_kind_and_ordered_by_depth(tmp_path):
    chart = coefficients(read_run(write_run(tmp_path / "run")))
    assert [panel.title for panel in chart.panels] == ["attention", "MLP", "norm", "other"]
    assert list(chart.panels[0].ticks.values()) == ["0", "1", "2", "10"]
    assert chart.panels[-1].columns == ["conv1.weight", "positional_embedding", "proj"]
    assert sum(len(panel.columns) for panel in chart.panels) == len(PARAMETERS)
    shown = json.loads((tmp_path / "run" / "coefficients.json").read_text())["coefficients"]["dtd"]
    name = "transformer.resblocks.10.mlp.c_fc.weight"
    at = chart.panels[1].columns.index(name)
    assert chart.panels[1].values[1][at] == pytest.approx(shown[name], rel=1e-3)
    assert chart.table().rows[0][0] == chart.panels[0].columns[0]


def test_distribution_counts_every_coefficient(tmp_path):
    chart = distribution(read_run(write_run(tmp_path / "run", rows=50)))
    for _, shares in chart.series.values():
        assert sum(shares) == pytest.approx(100, abs=0.1)


def test_lines_are_thinned_and_ordered_as_the_experts_are(tmp_path):
    chart = trajectories(read_run(write_run(tmp_path / "run", steps=900)))
    assert list(chart.series)[:3] == list(EXPERTS)
    xs, ys = chart.series["svhn"]
    assert len(xs) == len(ys) == 200
    assert sum(ys) / 200 == pytest.approx(0.5, abs=0.02)


def test_norms_by_block_are_relative_to_the_bases(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    chart = norms(run)
    assert list(chart.ticks.values()) == ["stem", "0", "1", "2", "10", "end"]
    of_block = [name for name in PARAMETERS if ".2." in name]
    expected = math.hypot(*(run.pool["norms"][name][0] for name in of_block)) / math.hypot(*[5.0] * len(of_block))
    assert chart.series["cars"][1][3] == pytest.approx(expected, rel=1e-3)


def test_each_name_has_a_colour_of_its_own(tmp_path):
    chart = accuracies(read_run(write_run(tmp_path / "run")))
    (axes,) = drawing.draw(chart).axes
    colors = {line.get_label(): line.get_color() for line in axes.lines}
    colors["adapt"] = to_hex(axes.containers[0][0].get_facecolor())
    assert colors == chart.colors()
    assert len(set(colors.values())) == len(colors) == 4


def test_marks_of_equal_values_are_drawn_apart(tmp_path):
    chart = accuracies(read_run(write_run(tmp_path / "run")))
    (axes,) = drawing.draw(chart).axes
    for at, _ in enumerate(EXPERTS):
        heights = [line.get_ydata()[at] for line in axes.lines]
        assert len(set(heights)) == len(chart.marks) == 3
        assert max(abs(height - at) for height in heights) < 0.5


@pytest.mark.parametrize(("value", "end"), [(-0.0004, 0.25), (-0.2, 0.25), (0.3, 1), (-1.0, 1)])
def test_cosines_have_a_fixed_scale_and_no_zero_with_a_minus(tmp_path, value, end):
    run = read_run(write_run(tmp_path / "run", experts=("a", "b")))
    run.record["pool"]["cosines"] = [[1.0, value], [value, 1.0]]
    chart = cosines(run)
    assert chart.limits() == (-end, end)
    text = "0.00" if value == -0.0004 else f"{value:.2f}"
    axes = drawing.draw(chart).axes[0]
    assert [shown.get_text() for shown in axes.texts] == [text, text]
    assert {shown.get_color() for shown in axes.texts} == {"white" if abs(value) / end > 0.5 else "black"}


def test_empty_columns_are_left_out(tmp_path):
    table = Table(["name", "empty", "half"], [["a", "", ""], ["b", "", "1"]]).filled()
    assert (table.header, table.rows) == (["name", "half"], [["a", ""], ["b", "1"]])
    run = write_run(tmp_path / "run")
    (run / "report.json").unlink()
    assert expert_table(read_run(run)).header == ["expert", "SHA-256"]
    assert "device memory" not in page_of(run, write_run(tmp_path / "b"), path=tmp_path / "report.html")


def test_tiles_name_the_granularity_and_know_when_no_task_is_behind(tmp_path):
    run = write_run(tmp_path / "run")
    coefficients = json.loads((run / "coefficients.json").read_text())
    save({**coefficients, "granularity": {"name": "block", "pattern": "^x"}}, run / "coefficients.json")
    content = summary(EXPERTS, "adapt")
    content["rows"]["experts"]["per_task"] = content["rows"]["adapt"]["per_task"]
    content["rows"]["adapt"]["gap_closed"] = -0.001
    save(content, run / "summary.json")
    tiles = {name: rest for name, *rest in headline(read_run(run)).tiles}
    assert tiles["Coefficients"][1] == "3 experts, block"
    assert tiles["Furthest from its expert"] == ["none", "no task is behind its expert"]
    assert tiles["Gap closed"][0] == "0 %"
    save(summary(EXPERTS, "adapt"), run / "summary.json")
    tiles = {name: rest for name, *rest in headline(read_run(run)).tiles}
    assert tiles["Furthest from its expert"] == ["cars", "-10.0 points"]


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("visual.trunk.blocks.7.norm1.weight", "7", "norm"),
        ("blocks.3.attn.qkv.weight", "3", "attention"),
        ("vision_model.encoder.layers.11.self_attn.q_proj.bias", "11", "attention"),
        ("vision_model.encoder.layers.2.mlp.fc1.weight", "2", "MLP"),
        ("vision_model.encoder.layers.2.layer_norm1.weight", "2", "norm"),
        ("layer1.0.conv1.weight", "1.0", "convolution"),
        ("layer4.1.bn2.weight", "4.1", "norm"),
        ("fc.weight", "end", "other"),
        ("patch_embed.proj.weight", "stem", "embedding"),
        ("class_embedding", "stem", "embedding"),
        ("ln_post.weight", "end", "norm"),
        ("whatever", "stem", "other"),
    ],
)
def test_places_follow_the_names_of_common_libraries(name, block, kind):
    place = places.place_of(name)
    assert (place.block, place.kind) == (block, kind)


def test_report_of_several_runs_compares_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = write_run(tmp_path / "a", name="one", seed=1)
    second = write_run(tmp_path / "b", name="two", seed=2, shift=0.05, rows=4)
    assert call("report", first, second) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(figures(text)) == {"accuracies", "means", "losses-0"}
    assert words(figures(text)["losses-0"])[-2:] == ["one", "two"]
    assert re.search(r'<th scope="row">seed</th><td>1</td><td>2</td>', text)


def test_report_of_runs_of_different_pools_keeps_their_references_apart(tmp_path):
    runs = [write_run(tmp_path / name, name=name, shift=shift) for name, shift in (("one", 0), ("two", 0.05))]
    assert "two: pretrained" not in page_of(*runs, path=tmp_path / "same.html")
    recipe = json.loads((runs[1] / "merge.json").read_text())
    recipe["hashes"]["base"] = "9" * 64
    save(recipe, runs[1] / "merge.json")
    text = page_of(*runs, path=tmp_path / "report.html")
    for name in ("one: pretrained", "two: pretrained", "one: experts", "two: experts"):
        assert name in text
    assert "The runs merged different checkpoints: each has references of its own." in text


def test_report_of_runs_with_one_name_tells_them_apart_by_folder(tmp_path):
    runs = [write_run(tmp_path / "x" / name) for name in ("a", "b")]
    text = page_of(*runs, runs[0], path=tmp_path / "report.html")
    assert "3 runs compared" in text
    text = page_of(*runs, path=tmp_path / "report.html")
    assert "a, b" in text
    assert "The runs have the same configuration." in text


def test_report_of_a_comparison_shows_its_rows(tmp_path):
    (tmp_path / "compare").mkdir()
    save(summary(EXPERTS, "ties"), tmp_path / "compare" / "summary.json")
    text = page_of(tmp_path / "compare", path=tmp_path / "report.html")
    assert set(figures(text)) == {"matrix"}
    assert "ties" in text
    assert "not finished" not in text


@pytest.mark.slow  # the fast tests draw the same charts into pages
@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_figures_for_papers_are_files(tmp_path, capsys, suffix):
    run = write_run(tmp_path / "run", rows=3, frank_wolfe=True, experts=("a", "_b", "$x^2$"))
    assert call("report", run, "--figures", tmp_path / "first", "--format", suffix) == 0
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {f"{key}.{suffix}" for key in figures((run / "report.html").read_text(encoding="utf-8"))}
    if suffix == "png":
        with Image.open(tmp_path / "first" / "coefficients.png") as image:
            assert min(image.size) > 300
    call("report", run, "--figures", tmp_path / "again", "--format", suffix)
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_failing_report_fails_no_run(tmp_path, toy_pool, monkeypatch, caplog):
    run = write_run(tmp_path / "run")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with caplog.at_level(logging.INFO, "adamerge"):
        report_run(run, toy_pool, {})
        assert 'No report: A report needs the package matplotlib: pip install "adamerge[report]".' in caplog.text
        shutil.rmtree(run)
        run.write_text("")  # no folder any more
        report_run(run, toy_pool, {})
    assert "Later: adamerge report" in caplog.text


def test_record_of_a_pool_survives_the_loss_of_the_experts(tmp_path, toy_pool):
    run = write_run(tmp_path / "run", experts=toy_pool.expert_names)
    report_run(run, toy_pool, {"steps": 3})
    report = toy_pool.report()
    pool = json.loads((run / "report.json").read_text())["pool"]
    assert pool["cosines"][0][1] == pytest.approx(report.cosines[0, 1].item(), rel=1e-4)
    assert list(pool["norms"]) == list(toy_pool.names)
    assert all(section.blocks for section in sections(read_run(run)))
    assert (run / "report.html").is_file()
