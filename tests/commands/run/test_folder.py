"""A run's folder: one process at a time, nothing left of killed ones; full disks and folders that cannot be written."""

import errno
import os
import re
import shutil
import subprocess
import time

import pytest

from adamerge import InputError
from adamerge.commands.run import folder as run_folder
from adamerge.system.files import atomic_path, remove_temporaries
from tests.support.small_run import arguments, output, run, start, write_configs


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp("configs"))


def test_held_folder_is_free_again_and_clear_of_temporaries(tmp_path):
    left = tmp_path / "checkpoints" / ".last.ckpt.1234.tmp"
    left.parent.mkdir()
    left.touch()
    (tmp_path / ".my.tmp").touch()  # not of our making
    with run_folder.held(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / run_folder.LOCK).read_text()
        assert not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", ".my.tmp"}


def test_held_folder_with_a_run_is_refused_where_it_must_be_unused(tmp_path):
    (tmp_path / run_folder.CONFIG_FILE).touch()
    with pytest.raises(InputError, match="holds a run already"), run_folder.held(tmp_path, unused=True):
        pass
    assert not (tmp_path / run_folder.LOCK).exists()


def test_folder_in_use_by_another_process_is_refused_and_free_once_that_is_killed(configs, tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "second").mkdir()
    first = start(*arguments(configs, folder, "steps=100000", "logger=none", "checkpoint_every=1"), cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (folder / run_folder.LAST).exists():
            assert first.is_alive(), output(tmp_path)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert run("adapt", f"resume={folder}", cwd=tmp_path / "second") == 2
        (line,) = output(tmp_path / "second").splitlines()
        assert f"{folder} is in use by another run (process {first.pid} on " in line
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    assert (folder / run_folder.LOCK).exists()
    with run_folder.held(folder):
        pass


def test_held_where_files_cannot_be_locked_warns(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", unsupported)
    with run_folder.held(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


def test_held_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not writable"), run_folder.held(tmp_path / "file" / "run"):
        pass


# Full disks


@pytest.mark.parametrize(
    ("limit", "granularity", "name"),
    [(20_000, "row", "checkpoints/last.ckpt"), (500_000, "task", "merged.safetensors")],
    ids=["checkpoint", "export"],
)
def test_file_that_cannot_be_written_whole_leaves_no_half_one(configs, tmp_path, limit, granularity, name):
    folder = tmp_path / "run"
    options = ("steps=2", "logger=none", f"granularity={granularity}")
    assert run(*arguments(configs, folder, *options), cwd=tmp_path, file_size=limit) == 2
    text = " ".join(output(tmp_path).split())
    assert text.endswith(f"{name}: File too large")
    assert "Traceback" not in text
    if name == "merged.safetensors":
        assert {path.name for path in folder.rglob("*.*") if path.is_file()} == {
            "adapt.log",
            "config.yaml",
            "last.ckpt",
        }
        assert run("adapt", f"resume={folder}", cwd=tmp_path) == 0, output(tmp_path)
    else:
        assert not folder.exists()  # it had saved nothing to go on from


def test_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(configs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        folder, filler = disk / "run", disk / "filler"
        options = ("steps=2", "logger=none", "granularity=task")
        assert run(*arguments(configs, folder, *options), cwd=tmp_path, kill=("file", 5, 0.5)) == -9  # in the export
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 400_000))
        assert run("adapt", f"resume={folder}", cwd=tmp_path) == 2
        text = " ".join(output(tmp_path).split())
        assert re.search(r"merged\.safetensors: No space left on device: it takes .* free\. Free some space\.$", text)
        assert f"go on with: adamerge adapt resume={folder}" in text
        assert "Traceback" not in text
        files = {path.name for path in folder.rglob("*") if path.is_file()}
        assert files == {"config.yaml", "adapt.log", "last.ckpt"}
        filler.unlink()
        assert run("adapt", f"resume={folder}", cwd=tmp_path) == 0, output(tmp_path)
        assert (folder / "merged.safetensors").is_file()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("step", ["write", "sync", "rename"])
def test_atomic_path_on_a_full_disk_keeps_the_previous_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write():
        with atomic_path(path) as temporary:
            temporary.write_text("after")
            if step == "write":
                full()

    if step == "sync":
        monkeypatch.setattr(os, "fsync", full)
    if step == "rename":
        monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.filename == str(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_folders_that_killed_exports_left_are_removed(tmp_path):
    (tmp_path / "hf" / ".model.123.tmp").mkdir(parents=True)
    (tmp_path / "hf" / ".model.123.tmp" / "model.safetensors").write_text("half")
    (tmp_path / ".merged.safetensors.7.tmp").write_text("half")
    (tmp_path / "kept.tmp").write_text("whole")
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["hf", "kept.tmp"]
