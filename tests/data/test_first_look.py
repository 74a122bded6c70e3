"""What is wrong with a task is found before a run: class names, folders, items and labels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adamerge import InputError
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.first_look import check_class_names, check_labels, check_precision, check_task

TO_TENSOR = v2.Compose([v2.Resize((4, 4)), v2.ToImage(), v2.ToDtype(torch.float32, True)])


def folder(root, *classes, images: int = 1) -> ImageFolder:
    """Write images in folders of these names."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (5, 6)).save(root / name / f"{i}.png")
    return ImageFolder(str(root))


def refused(task: Task, name: str = "pets") -> str:
    """Return what a run would be refused with."""
    with pytest.raises(InputError) as caught:
        UnlabeledTasks({name: task}, preprocess=TO_TENSOR).check_scored(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Named(list):
    """Items with class names beside them."""

    def __init__(self, items, classes) -> None:
        super().__init__(items)
        self.classes = classes


def items(*labels):
    return [(torch.zeros(3, 4, 4), label) for label in labels]


# Class names


def test_adapt_with_a_class_that_evaluate_lacks_is_refused(tmp_path):
    adapt = folder(tmp_path / "adapt", "cat", "dog", "fox")
    message = refused(Task(adapt=adapt, evaluate=folder(tmp_path / "evaluate", "cat", "fox")))
    assert message.startswith("data.tasks.pets: adapt and evaluate")
    assert "only adapt has 'dog'" in message


def test_adapt_with_the_same_classes_in_another_order_is_refused():
    task = Task(adapt=Named(items(0, 1), ["dog", "cat"]), evaluate=Named(items(0, 1), ["cat", "dog"]))
    assert "their order differs, 'dog', 'cat' and 'cat', 'dog'" in refused(task)


def test_images_to_adapt_on_may_lie_in_one_folder(tmp_path):
    evaluate = folder(tmp_path / "evaluate", "cat", "dog")
    UnlabeledTasks({"pets": Task(adapt=folder(tmp_path / "a", "images"), evaluate=evaluate)}, preprocess=TO_TENSOR)


def test_given_names_in_another_order_than_the_folders_are_refused(tmp_path):
    message = refused(Task(dataset=folder(tmp_path, "cat", "dog"), classes=["Dog", "cat"]))
    assert "data.tasks.pets.classes: 'Dog' stands at position 0" in message
    assert "in the order of the labels: 'cat', 'dog'" in message


@pytest.mark.parametrize("classes", [["a tabby", "a poodle"], ["Cat", "DOG"], ["cat", "poodle"]])
def test_given_names_that_do_not_contradict_the_folders_are_taken(tmp_path, classes):
    UnlabeledTasks({"pets": Task(dataset=folder(tmp_path, "cat", "dog"), classes=classes)}, preprocess=TO_TENSOR)


def test_given_names_of_another_number_are_refused(tmp_path):
    message = refused(Task(dataset=folder(tmp_path, "cat", "dog"), classes=["cat", "dog", "fox"]))
    assert "data.tasks.pets.classes: " in message
    assert "found 3 names, but the data set has 2 classes" in message


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir"])
def test_folder_that_is_no_class_is_refused(tmp_path, name):
    message = refused(Task(dataset=folder(tmp_path, "cat", "dog", name)))
    assert message.startswith(f"data.tasks.pets.dataset: the folder {name!r} does not look like a class")


@pytest.mark.parametrize("names", [("train", "val"), ("Test", "train"), ("images",)])
def test_root_one_level_too_high_is_refused(tmp_path, names):
    message = refused(Task(dataset=folder(tmp_path, *names)))
    assert "one level too high" in message
    assert f"root: .../{sorted(names)[0]}" in message


def test_root_of_folders_that_hold_the_same_classes_is_refused(tmp_path):
    message = refused(Task(dataset=folder(tmp_path, "2023/cat", "2023/dog", "2024/cat", "2024/dog")))
    assert message.startswith("data.tasks.pets.dataset: the folders '2023', '2024' hold the same folders 'cat', 'dog'")
    assert f"root: {tmp_path / '2023'}" in message
    nested = folder(tmp_path / "nested", "cat/tabby", "cat/siamese", "dog/poodle", "dog/collie")
    check_class_names("pets", Task(dataset=nested))


def test_class_called_train_among_others_is_one():
    check_class_names("vehicles", Task(dataset=Named(items(0, 1), ["train", "bus"])))


def test_one_class_is_refused(tmp_path):
    assert "data.tasks.pets: expected at least two classes, found 'cat'" in refused(
        Task(dataset=folder(tmp_path, "cat"))
    )


@pytest.mark.parametrize("option", ["classes", "templates"])
def test_text_in_the_place_of_a_list_is_refused(option):
    task = Task(dataset=items(0, 1), **{option: "a {}"})
    assert f"data.tasks.pets.{option}: expected a list" in refused(task)


def test_template_without_a_place_for_the_name_is_refused():
    message = refused(Task(dataset=items(0, 1), templates=["a {}", "a photo"]))
    assert message.startswith("data.tasks.pets.templates: 'a photo' has no {}")


# Items and labels


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("cat", "found 'cat'"),
        ("1", "found '1'"),
        (torch.tensor([0, 1]), r"found numbers of shape (2,). For one-hot labels: argmax"),
        ([0, 1], "found list of 2 entries. For one-hot labels: argmax"),
        (np.eye(2)[0], "found numbers of shape (2,)"),
        (0.5, "found 0.5"),
        (None, "found none"),
        (-1, "from 0 to 1 as label, found -1"),
        (3, "from 0 to 1 as label, found 3"),
    ],
    ids=str,
)
def test_label_that_is_no_class_number_is_refused(label, message):
    task = Task(adapt=items(0), evaluate=Named([(torch.zeros(3, 4, 4), label)] * 2, ["cat", "dog"]))
    text = refused(task)
    assert text.startswith("data.tasks.pets.evaluate: item 0 (input 0): expected ")
    assert message in text


@pytest.mark.parametrize("label", [1, 1.0, np.int64(1), torch.tensor(1), torch.tensor([1]), True])
def test_class_number_of_any_type_is_taken(label):
    data = UnlabeledTasks({"pets": Task(adapt=items(0), evaluate=Named(items(label, 0), ["cat", "dog"]))})
    assert next(data.evaluation_loader("pets"))[1].tolist() == [1, 0]


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(9, 3, 4, 4), torch.arange(9) % 3 + 1),
        [(torch.zeros(3, 4, 4), label) for label in (2, 1, 3, 1, 1)],
        Subset(TensorDataset(torch.zeros(9, 3, 4, 4), torch.arange(9) % 3 + 1), [1, 2, 3]),
    ],
    ids=["tensors", "list", "subset"],
)
def test_labels_that_begin_with_1_are_refused(dataset):
    message = refused(Task(adapt=items(0), evaluate=dataset, classes=["cat", "dog", "fox"]))
    assert message.startswith("data.tasks.pets.evaluate: ")
    assert "Subtract 1" in message


def test_label_beyond_the_head_is_found_without_class_names():
    task = Task(adapt=items(0), evaluate=items(0, 1, 3))
    check_labels("pets", task, 4)
    with pytest.raises(InputError, match=r"data\.tasks\.pets\.evaluate: labels: .* from 0 to 2, found 0 to 3"):
        check_labels("pets", task, 3)


class Shy:
    """Shows its labels item by item alone."""

    classes = ("cat", "dog")
    labels = (0, 0, 7, 0, 1, 1, 0, 0)

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int):
        return torch.zeros(3, 4, 4), self.labels[index]


def test_late_label_is_named_where_it_is_scored():
    data = UnlabeledTasks({"pets": Task(adapt=items(0), evaluate=Shy())})
    with pytest.raises(InputError, match=r"data\.tasks\.pets: item 2 .*from 0 to 1 as label, found 7"):
        list(data.evaluation_loader("pets"))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": 1, "label": 2}, "a mapping with the keys image, label"),
        ((np.zeros((4, 4, 3)), 0), "found a NumPy array of shape (4, 4, 3)"),
        (("cat.jpg", 0), "found str"),
    ],
    ids=["mapping", "numpy", "path"],
)
def test_item_that_is_no_input_is_refused(item, message):
    text = refused(Task(adapt=[item, item], evaluate=items(0, 1)))
    assert text.startswith("data.tasks.pets.adapt: item 0 (input 0): ")
    assert message in text


def test_double_precision_is_refused_where_the_network_is_in_single():
    item = (torch.zeros(3, 4, 4).double(), 0)
    task = Task(adapt=[item, item], evaluate=items(0, 1))
    check_task("pets", task)  # a network in double precision takes it
    with pytest.raises(InputError, match=r"data\.tasks\.pets\.adapt: item 0 .*expected float32, found float64"):
        check_precision("pets", task)


def test_items_of_unequal_shapes_are_refused():
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)]
    message = refused(Task(adapt=images))
    assert "data.tasks.pets.adapt: item 0 (input 0) has the shape (3, 4, 4), item 2 (input 2) (3, 4, 5)" in message


def test_late_shape_is_named_in_its_batch():
    images = [torch.zeros(3, 4, 5 if i == 1 else 4) for i in range(6)]
    data = UnlabeledTasks({"pets": Task(adapt=images)}, batch_size=6)
    with pytest.raises(InputError, match=r"data\.tasks\.pets: inputs of one batch .*\(3, 4, 5\)"):
        data.first_batch()


def test_error_of_a_data_set_is_named_after_its_item():
    class Broken(list):
        def __getitem__(self, index):
            raise KeyError("width")

    assert "data.tasks.pets.adapt: item 0 (input 0): KeyError: 'width'" in refused(Task(adapt=Broken(items(0, 1))))


def test_look_draws_no_random_numbers_and_passes_over_damaged_images(tmp_path):
    dataset = folder(tmp_path, "cat", "dog", images=2)
    open(dataset.samples[0][0], "wb").close()
    state = torch.get_rng_state()
    check_task("pets", Task(dataset=dataset), lambda image: torch.rand(3, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_data_set_of_damaged_images_is_refused():
    message = refused(Task(adapt=[torch.full((3, 4, 4), torch.nan)] * 9))
    assert message.startswith("data.tasks.pets.adapt: none of the items [0, 4, 8] can be read (NaN")


def test_images_without_preprocessing_are_refused_with_their_type():
    with pytest.raises(InputError, match=r"adapt: item 0 .*found Image.* has no preprocessing\. Give PIL images, or"):
        UnlabeledTasks({"pets": Task(adapt=[Image.new("RGB", (2, 2))])})
