"""Image files reach the model as people see them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adamerge import InputError
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.images import as_seen, load_image, read_as_seen

TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, True)])
RAMP = np.linspace(0, 1, 256).reshape(16, 16)
ORIENTATION = 0x0112


def save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", np.rint(RAMP * 65535).astype(np.uint16)),
        ("a.tif", np.rint(RAMP * 65535).astype(np.uint16)),
        ("b.tif", RAMP.astype(np.float32)),
        ("c.tif", np.rint(RAMP * 65535).astype(np.int32)),
        ("d.png", np.rint(RAMP * 255).astype(np.uint8)),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "float TIFF", "32-bit TIFF", "8-bit PNG"],
)
def test_deep_images_keep_their_levels(tmp_path, name, values):
    image = load_image(save(tmp_path / name, values))
    assert image.mode == "RGB"
    assert np.asarray(image)[..., 0].ravel().tolist() == list(range(256))


@pytest.mark.parametrize(
    "values", [np.full((2, 2), 254.0), np.full((2, 2), np.nan), np.full((2, 2), -1.0)], ids=["255", "nan", "negative"]
)
def test_float_image_of_another_range_is_unreadable(tmp_path, values):
    save(tmp_path / "images" / "cat" / "a.tif", values.astype(np.float32))
    save(tmp_path / "images" / "dog" / "b.png", np.zeros((2, 2), np.uint8))
    data = UnlabeledTasks(
        {"pets": Task(dataset=ImageFolder(str(tmp_path / "images")))},
        preprocess=TO_TENSOR, protocol="transductive", max_unreadable=0.5,
    )  # fmt: skip
    for stream in (data.streams["pets"], data.evaluation["pets"]):
        assert stream[0] is None or stream[0].indices == 1
    assert [name.rpartition("/")[2] for name in data.unreadable()["pets"]] == ["a.tif"]
    assert len(data.unreadable_evaluation()["pets"]) == 1


def test_orientation_is_followed_once(tmp_path):
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, 0] = 255  # upper left; orientation 6: turn by 90 degrees clockwise
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = load_image(save(tmp_path / "a.png", pixels, exif=exif))
    assert image.size == (2, 4)
    assert np.asarray(image)[0, 1].tolist() == [255] * 3
    assert np.array_equal(as_seen(image), image)


def test_folders_with_torchvisions_loader_get_this_one_and_others_keep_theirs(tmp_path):
    save(tmp_path / "cat" / "a.png", np.rint(RAMP * 65535).astype(np.uint16))
    folder = ImageFolder(str(tmp_path))
    read_as_seen(Subset(Subset(folder, [0]), [0]))
    assert np.asarray(folder[0][0]).mean() < 128
    own = ImageFolder(str(tmp_path), loader=lambda path: path)
    read_as_seen(own)
    assert own[0][0].endswith("a.png")
    read_as_seen([1, 2])


def test_image_that_becomes_nan_is_left_out_and_counted():
    images = [(torch.full((1, 2, 2), float("nan") if i == 1 else i), i % 2) for i in range(4)]
    data = UnlabeledTasks({"a": Task(dataset=images)}, protocol="transductive", max_unreadable=0.25)
    assert data.streams["a"][1].indices == 2
    ((inputs, _),) = data.evaluation_loader("a")
    assert inputs[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert data.unreadable() == data.unreadable_evaluation() == {"a": ["input 1"]}
    strict = UnlabeledTasks({"a": Task(dataset=images)}, protocol="transductive")
    with pytest.raises(InputError, match=r"data\.tasks\.a: 1 of 4 inputs .*input 1 \(NaN or infinite values\)"):
        list(strict.evaluation_loader("a"))
