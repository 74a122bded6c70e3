"""Callbacks under Lightning's Trainer: the export at the end, graceful stops, progress."""

import json
import logging
import os
import signal
import zipfile

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import Timer

from adamerge import GuardError, InputError, load_state_dict, merge
from adamerge.callbacks import ExportMergedWeights, GracefulStop
from adamerge.callbacks.checkpoint_io import AtomicCheckpointIO
from adamerge.callbacks.elapsed import Elapsed
from adamerge.callbacks.progress import MergingProgress
from adamerge.errors import Interrupted
from adamerge.objectives.imitation import Imitation
from tests.support import hostile
from tests.support.fits import QUIET, batches, every_step, fit, make_data, make_method, values
from tests.support.toy import EXPERTS

pytestmark = QUIET

FILES = {"merged.safetensors", "coefficients.json", "heads.safetensors", "merge.json"}


def names(folder):
    return {path.name for path in folder.iterdir()}


class At(Callback):
    """Calls a function before a batch, or after it."""

    def __init__(self, batch_idx, function, after=False):
        self.batch_idx, self.function, self.after = batch_idx, function, after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch_idx and not self.after:
            self.function()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch_idx and self.after:
            self.function()


def sends(*numbers, at=1):
    return At(at, lambda: [os.kill(os.getpid(), number) for number in numbers])


def fails():
    raise GuardError("on purpose")


# Export


def test_export_merged_weights_at_the_end_of_fit_writes_what_was_trained(toy, tmp_path):
    method = make_method(toy, Imitation())
    info = {task: {"classes": ["a", "b"]} for task in EXPERTS}
    export = ExportMergedWeights(tmp_path / "out", head_info=info, recipe={"config": {"lr": 0.02}})
    assert export.files == {}
    fit(method, make_data(protocol="transductive", seed=3), tmp_path, steps=3, callbacks=[export])
    assert names(tmp_path / "out") == FILES
    assert set(export.files) == {"merged", "coefficients", "heads", "recipe"}
    assert all(path.is_file() for path in export.files.values())
    written = load_state_dict(export.files["merged"])
    expected = merge(method.model.pool, method.model.coefficients, detach=True)
    assert set(written) == set(toy.base)
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    assert any(not torch.equal(written[key], toy.base[key]) for key in expected)
    recipe = json.loads(export.files["recipe"].read_text())
    assert recipe["steps"] == 3
    assert recipe["protocol"] == "transductive"
    assert recipe["seed"] == 3
    assert recipe["config"] == {"lr": 0.02}
    assert "objective" not in recipe, "the configuration says it"


def test_export_merged_weights_filename_is_used(toy, tmp_path):
    export = ExportMergedWeights(str(tmp_path / "out"), "best.safetensors")
    fit(make_method(toy), batches(toy, 1), tmp_path, steps=1, callbacks=[export])
    assert export.files["merged"] == tmp_path / "out" / "best.safetensors"
    assert load_state_dict(export.files["merged"])


def test_export_merged_weights_with_a_data_module_of_ones_own_works(toy, tmp_path):
    class Own(LightningDataModule):
        def train_dataloader(self):
            return batches(toy, 2)

    export = ExportMergedWeights(tmp_path / "out")
    method = make_method(toy)
    fit(method, Own(), tmp_path, steps=2, callbacks=[export])
    recipe = json.loads(export.files["recipe"].read_text())
    assert "protocol" not in recipe
    assert (recipe["method"], recipe["optimizer"], recipe["lr"]) == ("GradientMerging", "Adam", 0.02)
    assert recipe["objective"] == {"name": "entropy", "reliable": None, "hidden_layers": []}


def test_export_merged_weights_wrong_suffix_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"filename: expected a name ending in \.safetensors, found 'merged\.pt'"):
        ExportMergedWeights(tmp_path, "merged.pt")


def test_export_merged_weights_unwritable_folder_fails_before_training(toy, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    method, seen = make_method(toy), []
    callbacks = [ExportMergedWeights(tmp_path / "file" / "out"), At(0, lambda: seen.append("trained"))]
    with pytest.raises(InputError, match=r"Output folder .*file/out is not writable .*Choose another one"):
        fit(method, batches(toy, 1), tmp_path, steps=1, callbacks=callbacks)
    assert seen == []
    assert torch.equal(values(method), torch.full_like(values(method), 0.3))


def test_export_merged_weights_after_a_guard_writes_nothing(toy, tmp_path):
    export = ExportMergedWeights(tmp_path / "out")
    with pytest.raises(GuardError, match="on purpose"):
        fit(make_method(toy), batches(toy, 3), tmp_path, steps=3, callbacks=[export, At(1, fails)])
    assert export.files == {}
    assert names(tmp_path / "out") == set()


def test_export_merged_weights_resumed_after_the_last_step_writes_the_same_bytes(toy, tmp_path):
    """A run that was killed between its last step and the export, or that is resumed when done."""
    first = ExportMergedWeights(tmp_path / "first")
    saving = every_step(tmp_path / "checkpoints")
    saving["callbacks"].append(first)
    fit(make_method(toy), make_data(), tmp_path, steps=3, **saving)
    second = ExportMergedWeights(tmp_path / "second")
    method = make_method(toy)
    fit(method, make_data(), tmp_path, steps=3, resume=tmp_path / "checkpoints" / "step=3.ckpt", callbacks=[second])
    assert names(tmp_path / "second") == FILES
    assert second.files["merged"].read_bytes() == first.files["merged"].read_bytes()
    assert json.loads(second.files["recipe"].read_text())["steps"] == 3


# Graceful stops


@pytest.fixture
def handlers():
    """The handlers of SIGINT and SIGTERM as they were, checked to be back and put back in any case."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_graceful_stop_saves_exits_with_a_code_and_exports_nothing(toy, tmp_path, handlers, number, code):
    method, export = make_method(toy), ExportMergedWeights(tmp_path / "out")
    stop = GracefulStop(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(Interrupted, match=str(code)) as caught:
        fit(method, make_data(), tmp_path, steps=5, callbacks=[export, stop, sends(number, at=1)])
    assert caught.value.code == code
    assert isinstance(caught.value, SystemExit)
    assert names(tmp_path / "out") == set()
    saved = torch.load(stop.checkpoint, weights_only=True)
    assert saved["global_step"] == 2  # the running step was finished
    assert torch.equal(saved["state_dict"]["model.coefficients.raw"], values(method))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_graceful_stop_then_resume_equals_uninterrupted(toy, tmp_path, handlers, accumulate):
    options = {"accumulate_grad_batches": accumulate}
    whole = make_method(toy, Imitation(), lr=0.2)
    fit(whole, make_data(), tmp_path, steps=4, **options)
    stop = GracefulStop(tmp_path / "last.ckpt")
    with pytest.raises(Interrupted, match="130"):
        fit(
            make_method(toy, Imitation(), lr=0.2), make_data(), tmp_path, steps=4,
            callbacks=[stop, sends(signal.SIGINT, at=2)], **options,
        )  # fmt: skip
    assert torch.load(stop.checkpoint, weights_only=True)["global_step"] == (3 if accumulate == 1 else 2)
    resumed = make_method(toy, Imitation(), lr=0.2)
    export = ExportMergedWeights(tmp_path / "out")
    fit(resumed, make_data(), tmp_path, steps=4, resume=stop.checkpoint, callbacks=[export], **options)
    assert torch.equal(values(resumed), values(whole))
    assert names(tmp_path / "out") == FILES


def test_graceful_stop_second_interrupt_stops_at_once(toy, tmp_path, handlers):
    stop, method = GracefulStop(tmp_path / "last.ckpt"), make_method(toy)
    with pytest.raises(SystemExit, match="130") as caught:
        fit(method, make_data(), tmp_path, steps=5, callbacks=[stop, sends(signal.SIGINT, signal.SIGINT, at=1)])
    assert not isinstance(caught.value, Interrupted)  # which says that it was saved
    assert not stop.checkpoint.exists()


def test_graceful_stop_without_signal_changes_nothing_and_gives_the_handlers_back(toy, tmp_path, handlers):
    stop, method = GracefulStop(tmp_path / "last.ckpt"), make_method(toy)
    trainer = fit(method, make_data(), tmp_path, steps=2, callbacks=[stop])
    assert trainer.global_step == 2
    assert not stop.checkpoint.exists()


def test_graceful_stop_gives_the_handlers_back_when_a_fit_fails(toy, tmp_path, handlers):
    stop = GracefulStop(tmp_path / "last.ckpt")
    with pytest.raises(GuardError, match="on purpose"):
        fit(make_method(toy), make_data(), tmp_path, steps=2, callbacks=[stop, At(1, fails)])


# Progress


def test_merging_progress_on_a_terminal_shows_step_and_loss_and_leaves(toy, tmp_path, terminal):
    bar = MergingProgress("Adapting it")
    shown = []

    def look():
        (task,) = bar._bar.tasks
        shown.append((task.description, task.completed, task.total, task.fields["detail"]))

    options = {"enable_progress_bar": True, "callbacks": [bar, At(1, look, after=True)]}
    fit(make_method(toy), make_data(), tmp_path, steps=3, **options)
    ((description, completed, total, metrics),) = shown
    assert (description, completed, total) == ("Adapting it", 2, 3)
    assert "loss" in metrics
    assert "mean coefficient 0." in metrics
    assert "Adapting it" in terminal.getvalue()
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") > 0


def test_merging_progress_is_taken_away_when_the_fit_fails(toy, tmp_path, terminal):
    options = {"enable_progress_bar": True, "callbacks": [MergingProgress(), At(1, fails)]}
    with pytest.raises(GuardError, match="on purpose"):
        fit(make_method(toy), make_data(), tmp_path, steps=3, **options)
    text = terminal.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor was hidden, and is shown again


def test_merging_progress_logs_a_few_plain_lines(toy, tmp_path, caplog, capfd):
    options = {"enable_progress_bar": True, "callbacks": [MergingProgress()]}
    with caplog.at_level(logging.INFO, "adamerge"):
        fit(make_method(toy), make_data(), tmp_path, steps=10, **options)
    lines = [record.getMessage() for record in caplog.records if record.name == "adamerge.system.progress"]
    assert [line.split(",")[0] for line in lines] == [f"Adapting: {step}/10 steps" for step in (2, 4, 6, 8, 10)]
    assert all("steps/s" in line and "left, loss" in line and "mean coefficient 0." in line for line in lines)
    assert "\r" not in "".join(capfd.readouterr())


def test_merging_progress_resumed_starts_where_it_stopped(toy, tmp_path, terminal):
    fit(make_method(toy), make_data(), tmp_path, steps=4, **every_step(tmp_path))
    bar, shown = MergingProgress(), []
    start = At(2, lambda: shown.append(bar._bar.tasks[0].completed))
    options = {"enable_progress_bar": True, "callbacks": [bar, start]}
    fit(make_method(toy), make_data(), tmp_path, steps=4, resume=tmp_path / "step=2.ckpt", **options)
    assert shown == [2]


def test_elapsed_goes_on_from_a_checkpoint_and_leaves_the_trainer_its_max_time():
    first, second = Elapsed(), Elapsed()
    first.on_train_start(None, None)
    first.on_train_end(None, None)
    assert first.seconds > 0
    second.load_state_dict(first.state_dict())
    assert second.seconds == first.seconds
    trainer = lightning.Trainer(max_time="00:00:00:01", callbacks=[second], logger=False, enable_checkpointing=False)
    assert [callback._duration for callback in trainer.callbacks if isinstance(callback, Timer)] == [1.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged checkpoint \\(empty file"),
        (b"PK", "damaged checkpoint"),
        (hostile.legacy(hostile.tensor(count=10**10)), r"damaged checkpoint \(no zip archive"),
        (hostile.saved([1], zipped=True), "not a checkpoint of a run: expected state_dict as dict, found none"),
        (hostile.saved({"state_dict": 1}, zipped=True), "expected state_dict as dict, found int"),
        (hostile.saved(torch.nn.Linear(1, 1), zipped=True), "it holds objects of 'torch.nn"),
    ],
)
def test_checkpoint_of_another_kind_is_refused(tmp_path, content, message):
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=rf"last\.ckpt: .*{message}"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_checkpoint_that_is_compressed_or_lies_about_its_members_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    content = {"state_dict": {"x": torch.ones(3)}, "callbacks": {}, "loops": {}, "epoch": 0, "global_step": 1}
    content |= {"optimizer_states": [], "lr_schedulers": [], "pytorch-lightning_version": "2.6"}
    AtomicCheckpointIO().save_checkpoint(content, path)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["state_dict"]["x"], torch.ones(3))
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    (tmp_path / "packed").replace(path)
    with pytest.raises(InputError, match=r"last\.ckpt: damaged checkpoint \(its zip member .* is compressed"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
