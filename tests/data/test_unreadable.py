"""Images that cannot be read: left out, counted, named, and too many of them refused; the rest stays as it was."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adamerge import InputError
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.datasets import Unlabeled
from adamerge.data.unreadable import Readable
from adamerge.data.views import Views
from adamerge.objectives.imitation import Imitation
from adamerge.results.baselines import stream_labels
from tests.support.fits import QUIET, every_step, fit, make_method, values
from tests.support.small_run import arguments, output, run, write_configs
from tests.support.toy import EXPERTS

TO_TENSOR = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Grayscale()])
COUNT = 12


@pytest.fixture
def folder(tmp_path) -> ImageFolder:
    """Twelve images of three classes, 4 x 4."""
    generator = torch.Generator().manual_seed(0)
    for number in range(COUNT):
        path = tmp_path / "images" / f"class{number // 4}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return ImageFolder(tmp_path / "images")


def spoil(folder: ImageFolder, *indices: int, how="truncated") -> None:
    for index in indices:
        path = folder.samples[index][0]
        with open(path, "rb") as file:
            content = file.read()
        if how == "gone":
            Path(path).unlink()
            continue
        with open(path, "wb") as file:
            file.write({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not an image"}[how])


def make(folder, tasks=("a",), **options) -> UnlabeledTasks:
    options = {"batch_size": 3, "preprocess": TO_TENSOR, "max_unreadable": 0.2, "protocol": "transductive", **options}
    return UnlabeledTasks({task: Task(dataset=folder) for task in tasks}, **options)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "gone"])
def test_unreadable_image_is_replaced_by_the_next_and_named(folder, how, caplog):
    before = [Unlabeled(folder, TO_TENSOR)[i] for i in range(COUNT)]
    spoil(folder, 5, COUNT - 1, how=how)
    data = make(folder)
    stream = data.streams["a"]
    for index in range(COUNT):
        stands_in = {5: 6, COUNT - 1: 0}.get(index, index)
        item = stream[index]
        assert int(item.indices) == stands_in
        assert torch.equal(item.inputs, before[stands_in].inputs)
    names = [folder.samples[5][0], folder.samples[COUNT - 1][0]]
    assert data.unreadable() == {"a": names}
    assert [record.message.split(" cannot be read")[0] for record in caplog.records] == [
        f"data.tasks.a: {name}" for name in names
    ]


def test_more_unreadable_images_than_allowed_are_refused_by_name(folder):
    spoil(folder, 2, 3, 4)
    data = make(folder)
    with pytest.raises(InputError, match=r"data\.tasks\.a: 3 of 12 inputs cannot be read, the latest .*04\.png"):
        [data.streams["a"][index] for index in range(COUNT)]
    with pytest.raises(InputError, match=r"1 of 12 .* data\.max_unreadable allows a share of 0\. "):
        make(folder, max_unreadable=0.0).streams["a"][2]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_share_of_unreadable_images_outside_its_range_is_refused(folder, share):
    with pytest.raises(InputError, match=r"data\.max_unreadable: expected a number in \[0, 1\)"):
        make(folder, max_unreadable=share)


def test_wrong_item_is_no_unreadable_image(folder):
    class Wrong(ImageFolder):
        def __getitem__(self, index):
            raise RuntimeError("a mistake in the data set")

    with pytest.raises(InputError, match=r"data\.tasks\.a\.dataset: item 0 .*RuntimeError: a mistake in the data set"):
        make(Wrong(folder.root))
    with pytest.raises(RuntimeError, match="a mistake"):
        Unlabeled(Wrong(folder.root), TO_TENSOR)[0]


def test_unreadable_images_are_not_scored(folder):
    labels = torch.tensor([label for index, (_, label) in enumerate(folder.samples) if index not in (1, 6)])
    spoil(folder, 1, 6)
    for workers in (0, 1):
        data = make(folder, evaluation_batch_size=1 + workers, num_workers=workers)
        batches = list(data.evaluation_loader("a"))
        assert torch.equal(torch.cat([targets for _, targets in batches]), labels)
        assert data.unreadable_evaluation() == {"a": [folder.samples[i][0] for i in (1, 6)]}


def test_names_look_through_subsets_and_fall_back_to_numbers(folder):
    account = Readable(Subset(Subset(folder, [4, 5, 6]), [2, 0]), limit=0.9)
    account.unreadable = [0]
    assert account.names == [folder.samples[6][0]]
    numbers = Readable([1, 2, 3], limit=0.9)
    numbers.unreadable = [2]
    assert numbers.names == ["input 2"]


def test_unreadable_images_survive_a_checkpoint(folder):
    spoil(folder, 5)
    data, other = make(folder), make(folder)
    data.streams["a"][5]
    other.load_state_dict(data.state_dict())
    assert other.unreadable() == data.unreadable() == {"a": [folder.samples[5][0]]}


@QUIET
def test_fit_with_unreadable_images_is_the_same_with_workers_caches_and_after_a_resume(folder, toy, tmp_path):
    spoil(folder, 0, 7)
    results = []
    for options in ({"cache": "off", "prefetch": 0}, {"cache": "ram"}, {"cache": "off", "num_workers": 1}):
        checkpoints = tmp_path / f"checkpoints{len(results)}"
        for resume, settings in ((None, every_step(checkpoints)), (checkpoints / "step=2.ckpt", {})):
            data = make(folder, EXPERTS, **options)
            method = make_method(toy, Imitation())
            fit(method, data, tmp_path, steps=5, resume=resume, **settings)
            results.append(values(method))
            assert data.unreadable() == {task: [folder.samples[i][0] for i in (0, 7)] for task in EXPERTS}
    assert all(torch.equal(result, results[0]) for result in results[1:])


@QUIET
def test_fit_with_random_transforms_is_the_same_with_workers_and_after_a_resume(folder, toy, tmp_path):
    class Noisy:
        def __call__(self, image):
            return TO_TENSOR(image) + 0.1 * torch.randn(1, 4, 4)

    results = []
    for options in ({}, {"num_workers": 1}):
        checkpoints = tmp_path / f"checkpoints{len(results)}"
        for resume, settings in ((None, every_step(checkpoints)), (checkpoints / "step=3.ckpt", {})):
            method = make_method(toy)
            fit(method, make(folder, EXPERTS, preprocess=Noisy(), **options), tmp_path, resume=resume, **settings)
            results.append(values(method))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_run_with_an_unreadable_image_lists_it_and_scores_the_rest(tmp_path):
    configs = write_configs(tmp_path / "configs", images=3)
    broken = [configs / "images" / "mnist" / "class3" / f"{number}.png" for number in range(3)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:50])
    options = ("steps=2", "evaluate=true", "logger=none", "data.batch_size=15")
    options = (*options, "+data.max_unreadable=0.2")
    assert run(*arguments(configs, tmp_path / "run", *options), cwd=tmp_path) == 0, output(tmp_path)
    recipe = json.loads((tmp_path / "run" / "merge.json").read_text())
    found = [*recipe["unreadable"].get("mnist", []), *recipe["unreadable_evaluation"].get("mnist", [])]
    assert sorted(found) == sorted(map(str, broken))
    assert set(recipe["unreadable"]) | set(recipe["unreadable_evaluation"]) == {"mnist"}
    log = (tmp_path / "run" / "adapt.log").read_text()
    assert all(f"'{path}'" in log for path in broken)
    assert "Not scored:" in output(tmp_path)
    options = (*options[:-1], "+data.max_unreadable=0.01")
    assert run(*arguments(configs, tmp_path / "strict", *options), cwd=tmp_path) == 2
    (line,) = [line for line in output(tmp_path).splitlines() if "error:" in line]
    assert line.startswith("error: data.tasks.mnist: 1 of 15 inputs cannot be read")


def test_view_of_an_unreadable_image_is_the_same_view_of_its_stand_in(folder):
    views = Views(transform=lambda image: image + torch.rand(()), count=2, mix=0.5)
    files = [folder[index] for index in range(COUNT)]
    files[5] = files[6]
    expected = Unlabeled(files, TO_TENSOR, views=views, key="0/views/a")
    spoil(folder, 5)
    data = make(folder, views=views)
    stream = data.streams["a"]
    for index in range(2 * COUNT):
        item = stream[index]
        assert int(item.indices) == index
        assert torch.equal(item.inputs, expected[index].inputs)
    assert data.unreadable() == {"a": [folder.samples[5][0]]}
    assert stream_labels(stream).tolist() == [label for _, label in files]
