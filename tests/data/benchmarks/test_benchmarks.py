"""The field's data sets: what is said of them, and reading them from files in their real formats."""

import functools
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from adamerge.commands.run.compose import compose
from adamerge.data import UnlabeledTasks
from adamerge.data.benchmarks import BENCHMARKS, definition, names, open_split, opening, task
from adamerge.errors import InputError
from tests.support import data_files
from tests.support.data_files import MAKERS, encoded, make, put

NUMBER_OF_CLASSES = {
    "sun397": 397, "cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47,
    "stl10": 10, "oxford_iiit_pet": 37, "flowers102": 102, "cifar100": 100, "pcam": 2, "fer2013": 7, "cifar10": 10,
    "food101": 101, "fashion_mnist": 10, "rendered_sst2": 2, "emnist": 10, "kmnist": 10,
    "emnist_letters": 26,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    """Data sets are kept once they have been opened."""
    opening.open_at.cache_clear()
    opening.warn_once.cache_clear()


@pytest.mark.parametrize("name", NUMBER_OF_CLASSES)
def test_definition_is_complete(name):
    known = definition(name)
    assert len(known.classes) == len(set(known.classes)) == NUMBER_OF_CLASSES[name]
    assert len({opening._plain(label) for label in known.spelled or known.classes}) == NUMBER_OF_CLASSES[name]
    assert known.published_classes is None or len(known.published_classes) == NUMBER_OF_CLASSES[name]
    assert known.templates
    assert all(template.count("{}") == 1 for template in known.templates)
    assert {"train", "test"} <= set(known.splits) <= {"train", "val", "test"}
    assert set(known.sources) == {"classes", "templates", "splits"}
    assert known.labels in ("names", "numbers")
    assert known.channels in (1, 3)
    assert known.torchvision or known.get or known.hub or known.manual, "nobody is told how to get it"
    for layout in known.layouts:
        assert set(layout.needs) <= {"all", *layout.options}
        assert set(layout.options) <= set(known.splits)
        assert re.match(r"(torchvision\.datasets|adamerge\.data\.benchmarks\.readers)\.\w+$", layout.reader)


def test_benchmarks_are_those_of_the_configurations():
    for name, tasks in BENCHMARKS.items():
        config = compose([f"data={name}", "data.root=/nowhere"])
        assert tuple(config.data.tasks) == tasks
        assert {node.name: node.root for node in config.data.tasks.values()} == dict.fromkeys(tasks, "/nowhere")
    assert set(names()) == {name for tasks in BENCHMARKS.values() for name in tasks}
    assert set(MAKERS) == set(names()) == set(NUMBER_OF_CLASSES)


def test_page_of_the_data_sets_says_what_the_definitions_say():
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    for known in map(definition, names()):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{known.name}` |"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        splits = ", ".join(f"{split} {count:,}" for split, count in known.splits.items())
        title = f"[{known.title}]({known.homepage})"
        assert cells[1:5] == [title, str(len(known.classes)), splits, known.licence]
        assert cells[6] == known.size


def test_classes_agree_with_those_that_torchvision_knows():
    from torchvision import datasets

    for name in ("fashion_mnist", "kmnist"):
        reader = definition(name).layouts[0].reader.rsplit(".", 1)[1]
        assert list(getattr(datasets, reader).classes) == list(definition(name).classes)
    for name, split, first in (("emnist", "digits", 0), ("emnist_letters", "letters", 1)):
        theirs = datasets.EMNIST.classes_split_dict[split][first:]
        assert [label.upper() for label in theirs] == list(definition(name).classes)
    ours, theirs = definition("flowers102").classes, datasets.Flowers102.classes
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) == 3  # CLIP's spelling of three


@pytest.mark.parametrize("name", MAKERS)
def test_data_set_is_read_from_its_real_format(name, tmp_path, monkeypatch):
    counts, known = make(name, tmp_path, monkeypatch), definition(name)
    for split, count in counts.items():
        images = open_split(name, split, tmp_path)
        assert len(images) == count
        assert images.classes == list(known.classes)
        labels = {images[index][1] for index in range(len(images))}
        assert labels == set(range(len(known.classes))) or name == "pcam"
        assert all(images[index][0].mode == "RGB" for index in (0, count - 1))


def test_labels_follow_the_names_of_the_files_not_their_order(tmp_path, monkeypatch):
    make("sun397", tmp_path, monkeypatch)
    known = definition("sun397")
    images = open_split("sun397", "test", tmp_path)
    for index in (0, 100, 396):
        folder = images.dataset.samples[images.indices[index]][0].split("/SUN397/")[1].rsplit("/", 1)[0]
        assert known.classes[images[index][1]] == folder.split("/", 1)[1].replace("/", " ").replace("_", " ")
    # The same images in folders prepared for task_vectors, which sort otherwise.
    other = tmp_path / "other"
    for name in known.classes:
        put(other / f"sun397/val/{name[0]}_{name.replace(' ', '_')}/1.jpg", encoded())
    prepared = open_split("sun397", "test", other)
    for index in range(0, 397, 50):
        path, _ = prepared.dataset.samples[index]
        assert known.classes[prepared[index][1]].replace(" ", "_") == path.split("/")[-2][2:]


def test_eurosat_folders_of_the_authors_are_preferred_to_our_split(tmp_path, monkeypatch):
    make("eurosat", tmp_path, monkeypatch)
    for folder in data_files.EUROSAT:
        put(tmp_path / f"EuroSAT_splits/test/{folder}/1.jpg", encoded())
    assert "EuroSAT_splits" in open_split("eurosat", "test", tmp_path).dataset.samples[0][0]
    assert "2750" in open_split("eurosat", "val", tmp_path).dataset.samples[0][0]


def test_eurosat_split_is_disjoint_stratified_and_fixed(tmp_path, monkeypatch):
    make("eurosat", tmp_path, monkeypatch)
    parts = {split: open_split("eurosat", split, tmp_path) for split in ("train", "val", "test")}
    taken = [index for part in parts.values() for index in part.indices]
    assert sorted(taken) == list(range(50))
    assert sorted(parts["val"][i][1] for i in range(10)) == list(range(10))
    assert parts["test"].indices == [1, 5, 13, 18, 20, 29, 33, 39, 41, 46]


def test_svhn_is_found_in_its_folder_and_beside_the_others(tmp_path, monkeypatch):
    make("svhn", tmp_path, monkeypatch)
    assert [label for _, label in open_split("svhn", "test", tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    data_files.svhn(tmp_path / "flat", folder=".")
    assert len(open_split("svhn", "test", tmp_path / "flat")) == 10


def test_split_gives_the_same_through_a_data_loader(tmp_path, monkeypatch):
    make("mnist", tmp_path, monkeypatch)
    images = open_split("mnist", "test", tmp_path)
    batches = list(DataLoader(images, 5, collate_fn=lambda items: [(item[0].mode, item[1]) for item in items]))
    assert [item for batch in batches for item in batch] == [("RGB", label) for label in range(10)]


def test_missing_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"SUN397 \(sun397\), test, is not below .*adamerge data check sun397 --root"):
        task("sun397", tmp_path)
    make("cars", tmp_path, monkeypatch)
    (tmp_path / "stanford_cars/cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(InputError, match=r"cars\), test, is not complete .*cars_test_annos_withlabels.mat' missing"):
        task("cars", tmp_path)
    with pytest.raises(InputError, match="expected the folder of the data sets, found none at"):
        task("cars", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"No data set is called 'minst'. Did you mean 'mnist'"):
        task("minst", tmp_path)


def test_missing_class_folder_is_named(tmp_path, monkeypatch):
    make("eurosat", tmp_path, monkeypatch)
    (tmp_path / "eurosat/2750/River").rename(tmp_path / "eurosat/2750/Rhine")
    with pytest.raises(InputError, match="expected its 10 classes, found 10: missing 'river'; unexpected 'rhine'"):
        task("eurosat", tmp_path)


def test_class_with_too_few_images_cannot_be_divided(tmp_path):
    data_files.eurosat(tmp_path, per_class=1)
    with pytest.raises(InputError, match=r"expected more than 540 images of class 'annual crop land' .* found 1"):
        task("eurosat", tmp_path)


def test_files_with_other_checksums_are_not_unpickled(tmp_path):
    data_files.cifar10(tmp_path)
    with pytest.raises(InputError, match=r"CIFAR10 cannot read .*checksums are not the published ones"):
        task("cifar10", tmp_path)


def test_damaged_and_empty_files_of_splits_are_one_line(tmp_path, monkeypatch):
    make("svhn", tmp_path, monkeypatch)
    put(tmp_path / "svhn/test_32x32.mat", b"no matlab file")
    with pytest.raises(InputError, match=r"SVHN \(svhn\), test: torchvision.datasets.SVHN cannot read"):
        task("svhn", tmp_path)
    make("resisc45", tmp_path, monkeypatch)
    put(tmp_path / "resisc45/resisc45-test.txt", "\n")
    with pytest.raises(InputError, match=r"resisc45-test.txt: expected one image a line, found none"):
        task("resisc45", tmp_path)


def test_label_outside_the_classes_is_refused(tmp_path, monkeypatch):
    make("mnist", tmp_path, monkeypatch)
    import numpy as np

    put(tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte", data_files.idx(np.full(10, 77)))
    with pytest.raises(InputError, match=r"MNIST \(mnist\), test: expected labels from 0 to 9, found 77"):
        open_split("mnist", "test", tmp_path)[0]


def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    make("pcam", tmp_path, monkeypatch)
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'need the package h5py: pip install "adamerge\[data\]"'):
        task("pcam", tmp_path)


def test_other_number_of_images_is_warned_of_once(tmp_path, caplog):
    data_files.mnist(tmp_path)
    for _ in range(2):
        task("mnist", tmp_path)
    assert caplog.messages == [f"MNIST (mnist), test: expected 10000 images, found 10 in {tmp_path}."]


def test_task_adapts_on_the_split_it_is_told(tmp_path, monkeypatch):
    make("mnist", tmp_path, monkeypatch)
    preprocess = functools.partial(torch.zeros, 3)

    def sizes(protocol, **options):
        data = UnlabeledTasks(
            {"mnist": task("mnist", tmp_path, **options)}, protocol=protocol, preprocess=lambda _: preprocess()
        )
        return len(data.streams["mnist"]), len(data.evaluation["mnist"])

    assert sizes("split") == (5, 5)
    assert sizes("transductive") == (10, 10)
    assert sizes("split", adapt="train") == (20, 10)
    assert sizes("transductive", adapt="train") == (10, 10)
    with pytest.raises(InputError, match="adapt: MNIST has train, test, found 'val'"):
        task("mnist", tmp_path, adapt="val")


def test_task_names_classes_as_published_or_plainly_or_as_told(tmp_path, monkeypatch):
    make("food101", tmp_path, monkeypatch)
    assert task("food101", tmp_path).classes[0] == "apple_pie"
    assert task("food101", tmp_path, naming="plain").classes[0] == "apple pie"
    mine = task("food101", tmp_path, classes=[str(i) for i in range(101)], templates=["{}!"], expert="cook")
    assert (mine.classes[100], mine.templates, mine.expert) == ("100", ["{}!"], "cook")
    with pytest.raises(InputError, match="classes: expected 101 names, found 1"):
        task("food101", tmp_path, classes=["food"])
    with pytest.raises(InputError, match="naming: expected 'published' or 'plain'"):
        task("food101", tmp_path, naming="mine")


def test_hub_copy_is_read_from_its_parquet_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folders = [name.replace(" ", "_") for name in reversed(definition("resisc45").classes)]  # another order
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=folders)})
    images = [Image.new("L", (8, 8), label) for label in range(45)]
    rows = datasets.Dataset.from_dict({"image": images, "label": list(range(45))}, features=features)
    (tmp_path / "hub/resisc45/data").mkdir(parents=True)
    rows.to_parquet(str(tmp_path / "hub/resisc45/data/test-00000-of-00001.parquet"))
    monkeypatch.setitem(definition("resisc45").splits, "test", 45)
    found = open_split("resisc45", "test", tmp_path)
    assert [label for _, label in found] == list(reversed(range(45)))
    assert found[3][0].getpixel((0, 0)) == (3, 3, 3)
    with pytest.raises(InputError, match=r"expected data/train-\*.parquet, found none"):
        open_split("resisc45", "train", tmp_path)
