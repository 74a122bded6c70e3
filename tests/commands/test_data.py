"""``adamerge data check`` and ``adamerge data get``."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import json
import threading

import pytest

from adamerge.commands.cli import main
from adamerge.data.benchmarks import definition, names, opening
from adamerge.data.benchmarks.checks import check
from adamerge.data.benchmarks.definitions import Download
from adamerge.data.benchmarks.downloads import fetch
from adamerge.errors import InputError
from tests.support import data_files
from tests.support.data_files import make, put


@pytest.fixture(autouse=True)
def _fresh():
    opening.open_at.cache_clear()


def run(*arguments):
    with pytest.raises(SystemExit) as done:
        main(["data", *map(str, arguments)])
    return done.value.code


def test_check_lists_what_is_there_and_how_to_get_the_rest(tmp_path, monkeypatch, capsys):
    make("mnist", tmp_path, monkeypatch)
    assert run("check", "mnist", "cars", "--root", tmp_path) == 2
    said = capsys.readouterr().out
    mnist, cars = (next(line for line in said.splitlines() if line.startswith(name)) for name in ("mnist", "cars"))
    assert mnist.split()[1:] == ["complete", "20", "-", "10", "torchvision's", "folder"]
    assert cars.split() == ["cars", "missing", "-", "-", "-"]
    assert f"adamerge data get cars --hub --root {tmp_path}" in said
    assert "stanford_cars/cars_test_annos_withlabels.mat" in said
    assert "mnist: how to get it" not in said


def test_check_of_all_does_not_fail_for_what_is_simply_not_there(tmp_path, monkeypatch, capsys):
    make("svhn", tmp_path, monkeypatch)
    assert run("check", "--root", tmp_path, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content) == len(names())
    assert {name for name, report in content.items() if report["state"] == "complete"} == {"svhn"}
    assert content["svhn"]["splits"]["test"] == {"expected": 10, "found": 10, "problems": []}


def test_check_says_that_the_folder_is_not_there(tmp_path, capsys):
    assert run("check", "--root", tmp_path / "nowhere") == 0
    assert f"{tmp_path / 'nowhere'}: no such folder." in capsys.readouterr().err


def test_check_takes_its_folder_from_the_environment(tmp_path, monkeypatch, capsys):
    make("dtd", tmp_path, monkeypatch)
    monkeypatch.setenv("ADAMERGE_DATA", str(tmp_path))
    assert run("check", "dtd") == 0
    assert "complete" in capsys.readouterr().out


def test_check_names_a_word_that_is_no_data_set(capsys):
    assert run("check", "clip8") == 2
    assert "No data set is called 'clip8'. Did you mean 'clip_8'" in capsys.readouterr().err


def test_check_finds_wrong_counts_missing_files_and_damaged_images(tmp_path, monkeypatch):
    make("sun397", tmp_path, monkeypatch)
    monkeypatch.setitem(definition("sun397").splits, "train", 398)
    folder = tmp_path / "SUN397/a/abbey"
    (folder / "sun_train0.jpg").unlink()
    put(folder / "sun_test0.jpg", b"not an image")
    report = check("sun397", tmp_path, sample=None)
    assert report.state == "wrong"
    assert report.problems == [
        "train: expected 398 images, found 397",
        f"train: 1 of 397 files missing, the first {folder / 'sun_train0.jpg'}",
        *[problem for problem in report.problems if problem.startswith("train: 1 of 397 images looked at")],
        *[problem for problem in report.problems if problem.startswith("test: 1 of 397 images looked at cannot be")],
    ]
    assert len(report.problems) == 4


def test_check_says_which_split_is_missing(tmp_path, monkeypatch):
    make("gtsrb", tmp_path, monkeypatch)
    (tmp_path / "gtsrb/GT-final_test.csv").unlink()
    report = check("gtsrb", tmp_path)
    assert (report.state, report.splits["train"].found, report.splits["test"].found) == ("incomplete", 43, None)
    assert report.problems == [f"test: '{tmp_path / 'gtsrb/GT-final_test.csv'}' missing"]


def test_check_reports_files_that_cannot_be_read_at_all(tmp_path):
    data_files.fer2013(tmp_path)
    report = check("fer2013", tmp_path)
    assert report.state == "wrong"
    assert "checksums are not the published ones" in report.problems[0]


@pytest.fixture
def server(tmp_path):
    """A web server with the files of a folder, and that folder."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/", folder
        running.shutdown()


def test_get_downloads_checks_and_does_not_fetch_again(tmp_path, monkeypatch, server, capsys):
    from torchvision.datasets import MNIST

    address, folder = server
    counts = data_files.mnist(tmp_path / "made")
    resources = []
    for path in sorted((tmp_path / "made/MNIST/raw").iterdir()):
        content = gzip.compress(path.read_bytes())
        put(folder / f"{path.name}.gz", content)
        resources.append((f"{path.name}.gz", hashlib.md5(content).hexdigest()))
    for split, count in counts.items():
        monkeypatch.setitem(definition("mnist").splits, split, count)
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [address])
    root = tmp_path / "root"
    assert run("get", "mnist", "--root", root) == 0
    assert "complete" in capsys.readouterr().out
    for path in folder.iterdir():
        path.unlink()
    assert run("get", "mnist", "--root", root) == 0


def test_get_puts_files_where_the_layout_looks_for_them(tmp_path, server):
    address, folder = server
    content = b"airplane_001.jpg\n"
    put(folder / "resisc45-test.txt", content)
    download = Download(f"{address}resisc45-test.txt", hashlib.md5(content).hexdigest(), "resisc45")
    fetch(dataclasses.replace(definition("resisc45"), get=(download,)), tmp_path / "root")
    assert (tmp_path / "root/resisc45/resisc45-test.txt").read_bytes() == content


def test_get_says_what_to_do_where_the_server_does_not_answer(tmp_path):
    download = Download("http://127.0.0.1:9/SUN397.tar.gz", "0" * 32, gives="SUN397/y")
    known = dataclasses.replace(definition("sun397"), get=(download,))
    with pytest.raises(InputError, match=r"SUN397 \(sun397\) could not be fetched: .*unpacks to SUN397/"):
        fetch(known, tmp_path)


def test_get_of_what_nobody_serves_any_more_says_so(tmp_path, capsys):
    assert run("get", "cars", "--root", tmp_path) == 2
    assert "cannot be fetched from its authors. By hand: The authors' server is gone" in capsys.readouterr().err


def test_get_from_the_hub_asks_for_the_files_that_are_read(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **given: asked.update(repo=repo, **given))
    fetch(definition("cars"), tmp_path, hub=True)
    assert asked["repo"] == "tanganke/stanford_cars"
    assert asked["local_dir"] == tmp_path / "hub/cars"
    assert "data/test-*.parquet" in asked["allow_patterns"]
    with pytest.raises(InputError, match="no copy at the Hub is known"):
        fetch(definition("mnist"), tmp_path, hub=True)
