"""Coefficients in TensorBoard, Weights & Biases and MLflow, read back from what these have written."""

import io
import time

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from adamerge import Coefficients, ExpertPool, InputError
from adamerge.callbacks import LogCoefficients
from adamerge.callbacks.log_coefficients import learned_of, log_scores
from adamerge.commands.run.check import check_package
from adamerge.model.granularity import Block
from adamerge.results.report.drawing import pixels
from adamerge.results.report.run_charts import coefficient_map, distribution_of
from tests.support.fits import QUIET, fit, make_data, make_method
from tests.support.toy import EXPERTS

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(wandb|mlflow|tensorboard|google|pydantic|alembic)"),
]


@pytest.fixture
def method(toy):
    method = make_method(toy, lr=0.05)
    method.recipe = {"steps": 4, "optimizer": {"lr": 0.05}}
    return method


def size(path):
    with Image.open(path) as image:
        return image.size


def names(method):
    return method.model.pool.expert_names


def test_tensorboard_gets_images_histograms_and_scalars_by_task(method, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    trainer = fit(method, make_data(), tmp_path, steps=4, logger=logger, log_every_n_steps=1,
                  callbacks=[LogCoefficients(every_n_steps=3)])  # fmt: skip
    log_scores(trainer.loggers, {"per_task": {"a": 0.5, "b": 0.75}, "mean": 0.625}, 4)
    events = accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0}).Reload()
    images = events.Images("coefficients/heat_map")
    assert [image.step for image in images] == [0, 3, 4]
    shown = Image.open(io.BytesIO(images[-1].encoded_image_string))
    assert shown.size == (images[-1].width, images[-1].height)
    assert len(shown.getcolors(100_000)) > 20  # not one colour all over
    values = method.model.coefficients().detach()
    for name, row in zip(names(method), values, strict=True):
        last = events.Histograms(f"coefficients/{name}")[-1]
        assert last.step == 4
        assert last.histogram_value.num == values.shape[1]
        assert last.histogram_value.min == pytest.approx(row.min().item())
        assert last.histogram_value.max == pytest.approx(row.max().item())
        assert events.Scalars(f"coefficients/mean/{name}")[-1].value == pytest.approx(row.mean().item())
    for task in EXPERTS:
        assert len(events.Scalars(f"adapt/loss/{task}")) == 4
    assert events.Scalars("test/acc/b")[0].value == 0.75


@pytest.mark.slow
def test_mlflow_gets_images_and_scalars_by_task(method, tmp_path):
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(
        "adamerge", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_location=str(tmp_path / "artifacts")
    )
    fit(method, make_data(), tmp_path, steps=2, logger=logger, log_every_n_steps=1, callbacks=[LogCoefficients(2)])
    client, run = logger.experiment, logger.run_id
    pictures = [file.path for file in client.list_artifacts(run, "images") if file.path.endswith(".png")]
    for key in ("coefficients~heat_map", "coefficients~histograms"):
        assert sorted(path.split("+")[2] for path in pictures if key in path) == ["0", "2"]
    stored = tmp_path / "artifacts" / run / "artifacts" / pictures[0]
    assert size(stored)[0] >= 600
    for task in EXPERTS:
        assert len(client.get_metric_history(run, f"adapt/loss/{task}")) == 2
    means = client.get_metric_history(run, f"coefficients/mean/{names(method)[0]}")
    assert [metric.step for metric in means] == [0, 2]
    assert client.get_run(run).data.params["optimizer/lr"] == "0.05"


@pytest.mark.slow
def test_wandb_offline_gets_images_histograms_and_scalars_by_task(method, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="adamerge", offline=True)
    try:
        fit(method, make_data(), tmp_path, steps=2, logger=logger, log_every_n_steps=1, callbacks=[LogCoefficients(2)])
        summary = dict(logger.experiment.summary)
        config = dict(logger.experiment.config)
    finally:
        wandb.finish()
    for task in EXPERTS:
        assert isinstance(summary[f"adapt/loss/{task}"], float)
    for name in names(method):
        assert f"coefficients/{name}" in summary
    assert config["optimizer"] == {"lr": 0.05}
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while b'"histogram"' not in stored.read_bytes():  # written by a process of its own
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pictures = sorted(tmp_path.glob("wandb/offline-run-*/files/media/images/coefficients/heat_map_*.png"))
    assert len(pictures) == 2
    assert size(pictures[0])[0] >= 600


def test_resumed_fit_logs_on_from_its_step(toy, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = fit(make_method(toy), make_data(), tmp_path, steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    options = {"logger": logger, "log_every_n_steps": 1, "callbacks": [LogCoefficients()]}
    fit(make_method(toy), make_data(), tmp_path, steps=3, resume=tmp_path / "last.ckpt", **options)
    events = accumulator.EventAccumulator(logger.log_dir).Reload()
    assert [image.step for image in events.Images("coefficients/heat_map")] == [2, 3]


@pytest.mark.parametrize("logger", [False, CSVLogger])
def test_loggers_that_take_no_pictures_are_refused(method, tmp_path, logger):
    chosen = logger and logger(tmp_path)
    with pytest.raises(InputError, match="logger=tensorboard, wandb or mlflow"):
        fit(method, make_data(), tmp_path, steps=1, logger=chosen, callbacks=[LogCoefficients()])


def test_every_n_steps_below_one_is_refused():
    with pytest.raises(InputError, match=r"LogCoefficients.every_n_steps: .* found 0"):
        LogCoefficients(every_n_steps=0)


def test_package_of_a_logger_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"logger.wandb: needs the package wandb: pip install 'adamerge\[wandb\]'"):
        check_package("logger.wandb", "lightning.pytorch.loggers.WandbLogger")
    check_package("logger.mine", "my_loggers.Mine")


def small_pool(shapes):
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return ExpertPool.from_state_dicts(base, {e: {n: t + i for n, t in base.items()} for i, e in enumerate("ab", 1)})


def test_coefficients_are_ordered_by_depth_with_the_mean_of_each_tensor():
    pool = small_pool({"blocks.10.w": (2, 3), "blocks.2.w": (2, 3), "conv": (3,), "proj": (2, 2)})
    coefficients = Coefficients(pool, "row", init=0.0, constraint="none")
    first, count = coefficients.index.labels["blocks.10.w"]
    coefficients.raw.data[1, first : first + count] = torch.tensor([0.2, 0.6])
    chart = coefficient_map(learned_of(coefficients))
    (panel,) = chart.panels
    assert panel.columns == ["conv", "blocks.2.w", "blocks.10.w", "proj"]
    assert chart.rows == ["a", "b"]
    assert panel.values == [[0, 0, 0, 0], [0, 0, pytest.approx(0.4), 0]]


def test_shared_groups_stand_where_their_block_is():
    pool = small_pool({"blocks.10.w": (2,), "blocks.2.w": (2,), "stem.w": (3,), "head": (2,)})
    (panel,) = coefficient_map(learned_of(Coefficients(pool, Block()))).panels
    assert panel.columns == ["stem", "blocks.2", "blocks.10"]


def test_pictures_of_one_value_and_of_many_columns_are_drawn():
    one = learned_of(Coefficients(small_pool({"w": (2,)}), "task"))
    many = learned_of(Coefficients(small_pool({f"blocks.{i}.weight": (2,) for i in range(400)}), "layer"))
    for learned in (one, many):
        for chart in (coefficient_map(learned), distribution_of(learned)):
            height, width, colors = pixels(chart).shape
            assert (width <= 2000, height >= 100, colors) == (True, True, 3)
