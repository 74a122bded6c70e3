"""Pictures: written whole or not at all."""

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from adamerge.results.evaluation import TableRow, TaskScore, summary
from adamerge.results.report import drawing
from adamerge.results.report.run_charts import rows_with_means
from tests.benchmarks.pictures import save_lines


def content(tasks=("a", "b")):
    def row(hits, **options):
        correct = torch.arange(10) < hits
        return TableRow({task: TaskScore(hits / 10, 0.1, correct) for task in tasks}, **options)

    return summary({"pretrained": row(4), "mine": row(6, uses_data=True), "oracle": row(7, uses_labels=True)}, "split")


def test_comparison_writes_a_picture(tmp_path):
    path = tmp_path / "deep" / "comparison.png"
    drawing.save(rows_with_means(content()), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 100
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert [file.name for file in path.parent.iterdir()] == ["comparison.png"]


def test_comparison_again_gives_the_same_bytes(tmp_path):
    for name in ("one.png", "two.png"):
        drawing.save(rows_with_means(content()), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_comparison_format_follows_the_suffix(tmp_path, suffix, start):
    drawing.save(rows_with_means(content()), tmp_path / f"x.{suffix}")
    assert (tmp_path / f"x.{suffix}").read_bytes().startswith(start)


def test_comparison_leaves_room_beside_a_very_long_name(tmp_path):
    long = content()
    row = next(iter(long["rows"].values()))
    long["rows"] = {**long["rows"], "metrics_weighted " + " ".join(f"scores.task{i}=1" for i in range(20)): row}
    drawing.save(rows_with_means(long), tmp_path / "x.png")  # matplotlib warns where there is none


def test_comparison_more_tasks_than_markers_works(tmp_path):
    drawing.save(rows_with_means(content([f"t{i}" for i in range(11)])), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_comparison_shows_all_tasks_means_and_intervals(tmp_path, monkeypatch):
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or savefig(self, *args, **kw))
    drawing.save(rows_with_means(content()), tmp_path / "x.png")
    (axes,) = figures[0].axes
    low, high = axes.get_xlim()
    assert {"40.0", "60.0", "70.0"} <= {text.get_text() for text in axes.texts}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["pretrained", "mine", "oracle *"]
    shown = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert shown["a"] == shown["b"] == [40, 60, 70]
    ends = [100 * end for row in content()["rows"].values() for end in row["interval"]]
    assert low <= min(ends) < max(ends) <= high


def test_comparison_interval_without_width_works(tmp_path):
    """In float32 the ends can lie on the wrong side of the mean, by rounding."""
    scores = {
        task: TaskScore(float(right), 0.1, torch.tensor([right])) for task, right in zip("abc", (1, 0, 1), strict=True)
    }
    drawing.save(rows_with_means(summary({"x": TableRow(scores)}, "split")), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_comparison_failing_leaves_the_earlier_picture(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"earlier")

    def breaks(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", breaks)
    with pytest.raises(OSError, match="disk full"):
        drawing.save(rows_with_means(content()), path)
    assert path.read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_save_lines_draws_every_line_of_every_panel(tmp_path, monkeypatch):
    panels = {"left": {"a": {0: 1.0, 4: 2.0}}, "right": {"b": {0: 3.0}, "a": {16: 1.0}}}
    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k)))
    save_lines(panels, tmp_path / "lines.png", x="added", y="accuracy")
    left, right = figures[0].axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[1, 2]]
    assert len(right.lines) == 2
    assert right.lines[1].get_color() == left.lines[0].get_color()
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    with Image.open(tmp_path / "lines.png") as image:
        assert image.width > image.height
