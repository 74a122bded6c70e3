"""Augmented views: fixed by their position, asked and adapted on alike, never held out or scored."""

from unittest.mock import Mock

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from adamerge import InputError
from adamerge.callbacks import KeepBest
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.views import Affine, Views
from adamerge.objectives.imitation import Imitation
from adamerge.results.baselines import LabelledCrossEntropy, search_task_arithmetic, stream_labels
from tests.support.fits import QUIET, every_step, fit, make_data, make_method, values

pytestmark = QUIET


class Noise:
    """Adds noise of torch's generator; counts its calls."""

    def __init__(self, size=1.0):
        self.size, self.calls = size, 0

    def __call__(self, image):
        self.calls += 1
        return image + self.size * torch.randn_like(image)


def numbered(count=6, views=None, **options):
    """Images filled with their own number."""
    images = torch.arange(float(count)).view(-1, 1, 1, 1).expand(count, 3, 4, 4).contiguous()
    tasks = {
        "a": Task(adapt=TensorDataset(images, torch.arange(count)), evaluate=TensorDataset(images, torch.arange(count)))
    }
    return UnlabeledTasks(tasks, views=views, **options)


def test_views_make_a_stream_longer_and_keep_the_positions():
    stream = numbered(views=Views(Noise(0.01), count=3)).streams["a"]
    assert len(stream) == 18
    assert [int(stream[i].indices) for i in range(18)] == list(range(18))
    assert [round(float(stream[i].inputs.mean())) for i in range(18)] == [0, 1, 2, 3, 4, 5] * 3


def test_view_depends_on_seed_task_and_position_alone():
    views = Views(Noise(), count=2)
    first, again, other = (numbered(views=views, seed=seed).streams["a"] for seed in (0, 0, 1))
    torch.manual_seed(1)
    one = [first[i].inputs for i in (0, 6, 3)]
    state = torch.get_rng_state()
    two = [again[i].inputs for i in (3, 6, 0)][::-1]
    assert torch.equal(state, torch.get_rng_state())  # the caller's randomness is left alone
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], one[1])  # two views of one image
    assert not torch.equal(one[0], other[0].inputs)


def test_views_mix_blends_with_another_image_of_the_task():
    stream = numbered(count=2, views=Views(count=100, mix=1.0)).streams["a"]
    means = torch.stack([stream[i].inputs.mean() for i in range(0, 200, 2)])  # image 0, blended with 0 or 1
    assert all(stream[i].inputs.std() < 1e-6 for i in range(5))
    assert ((means >= 0) & (means <= 1)).all()
    assert 0.3 < (means > 0).float().mean() < 0.7
    assert 0.3 < means[means > 0].mean() < 0.7
    rare = numbered(count=2, views=Views(count=100, mix=0.1)).streams["a"]
    assert sum(float(rare[i].inputs.mean()) > 0 for i in range(0, 200, 2)) < 20


def test_views_mix_less_by_themselves_where_there_are_more_images():
    for length, share in ((2, 0.5), (64, 0.5), (320, 0.1)):
        images = Mock(return_value=torch.zeros(1, 2, 2))
        for index in range(0, 200 * length, length):
            Views(mix="auto")(images, length, index, "a")
        assert images.call_count / 200 - 1 == pytest.approx(share, abs=0.1)


def test_views_leave_held_out_and_scored_images_alone():
    data = numbered(count=10, views=Views(Noise(), count=4), holdout=0.2)
    assert (len(data.streams["a"]), len(data.holdout_streams["a"])) == (32, 2)
    held_out = [data.holdout_streams["a"][i] for i in range(2)]
    assert [int(item.indices) for item in held_out] == [32, 33]  # beside the views, for the cache
    assert all(item.inputs.std() == 0 for item in held_out)
    assert all(inputs.flatten(1).std(1).max() == 0 for inputs, _ in data.evaluation_loader("a"))
    quiet = numbered(count=10, views=Views(Noise(0.0), count=4), holdout=0.2).streams["a"]
    taken = {int(quiet[i].inputs.mean()) for i in range(32)}
    assert taken == set(range(10)) - {int(item.inputs.mean()) for item in held_out}


def test_views_take_transforms_of_torchvision():
    views = Views(v2.RandomAffine(45, (0.4, 0.4), fill=-9), count=2)
    view = numbered(views=views).streams["a"][5].inputs
    assert view.shape == (3, 4, 4)
    assert view.min() < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"data\.views: expected a transform or mix > 0, found neither"),
        ({"transform": 3}, r"data\.views\.transform: expected a callable"),
        ({"mix": 1.5}, r"data\.views\.mix: expected a number in \[0, 1\], found 1\.5"),
        ({"mix": 0.5, "count": 0}, r"data\.views\.count: expected a whole number >= 1, found 0"),
        ({"mix": 0.5, "count": 2.0}, r"data\.views\.count: expected a whole number >= 1, found 2\.0"),
    ],
)
def test_views_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        Views(**options)


def test_affine_without_motion_is_the_identity_and_stays_near_with_little():
    image = torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Affine(0, 0, 0, 0)(image), image, atol=1e-5, rtol=0)
    assert (Affine(1, 0.001, 0.001, 0.001)(image) - image).abs().mean() < 0.05


@pytest.mark.parametrize("shape", [(1, 41, 41), (1, 41, 81)])
def test_affine_moves_as_it_says(shape, monkeypatch):
    """A point goes where rotation, shift or scale by the largest amount puts it, on oblong images too."""
    _, height, width = shape
    top, left = height // 2, width // 2
    image = torch.zeros(shape)
    image[0, top - 1 : top + 2, left + 9 : left + 12] = 1  # ten to the right of the middle

    def place(transform, *numbers):
        monkeypatch.setattr(torch, "rand", lambda *_, dtype: (torch.tensor(numbers, dtype=dtype) + 1) / 2)
        view = transform(image)[0]
        y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, view.shape), indexing="ij"))
        mass = view.flatten() / view.sum()
        return round(float((mass * y).sum()) - top), round(float((mass * x).sum()) - left)

    assert place(Affine(90, 0, 0, 0), 1, 0, 0, 0, 0) in ((10, 0), (-10, 0))
    assert place(Affine(0, 0.1, 0, 0), 0, 0, 0, 1, 0) == (0, 10 - round(0.1 * width))
    assert place(Affine(0, 0.1, 0, 0), 0, 0, 0, 0, 1) == (-round(0.1 * height), 10)
    assert place(Affine(0, 0, 0.25, 0), 0, -1, 0, 0, 0) == (0, 13)


def test_affine_repeats_the_border():
    image = torch.full((3, 8, 8), -1.0)
    assert torch.equal(Affine(45, 0.5, 0.5, 0.5)(image), image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degrees": -1}, r"data\.views\.transform\.degrees: expected a number >= 0, found -1"),
        ({"scale": 1.0}, r"data\.views\.transform\.scale: expected a number in \[0, 1\), found 1\.0"),
    ],
)
def test_affine_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        Affine(**options)


def test_views_leave_the_number_of_threads_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        numbered(views=Views(Affine())).streams["a"][0]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_views_must_keep_the_shape_and_be_views():
    stream = numbered(views=Views(v2.CenterCrop(2))).streams["a"]
    with pytest.raises(InputError, match=r"expected a tensor of the input's shape \(3, 4, 4\), found \(3, 2, 2\)"):
        stream[0]
    with pytest.raises(InputError, match=r"data\.views: expected adamerge\.data\.views\.Views"):
        numbered(views=Noise())


def test_fit_on_views_asks_each_expert_once_and_resumes_to_the_bit(toy, tmp_path):
    def run(**options):
        noise = Noise(0.3)
        data = make_data(views=Views(noise, count=5), holdout=0.3)
        method = make_method(toy, Imitation(), "row", "none")
        own = every_step(tmp_path) if "resume" not in options else {}
        own["callbacks"] = [KeepBest(every=50), *own.get("callbacks", [])]
        fit(method, data, tmp_path, steps=6, **own, **options)
        return values(method), method.model.teacher_cache, data

    whole, cache, data = run()
    for task, stream in data.streams.items():
        batch = [stream[i] for i in data._steps().visited(task, 6)]
        seen = torch.stack([item.indices for item in batch])
        cached = cache.get(task, seen)
        assert cached is not None
        method = make_method(toy, Imitation(), "row", "none")
        fresh = next(method.model.expert_outputs(task, [(task, torch.stack([item.inputs for item in batch]))]))
        torch.testing.assert_close(cached.logits, fresh.logits)
    resumed, _, _ = run(resume=tmp_path / "step=3.ckpt")
    assert torch.equal(resumed, whole)


def test_labelled_baselines_know_views_of_the_images(toy):
    plain, viewed = make_data(), make_data(views=Views(Noise(0.0), count=3))
    labels = stream_labels(viewed.streams["red"])
    assert torch.equal(labels, stream_labels(plain.streams["red"]))
    model = make_method(toy).model
    assert search_task_arithmetic(model, viewed) == search_task_arithmetic(model, plain)
    oracle = LabelledCrossEntropy({"red": labels})
    count = len(labels)
    step = lambda indices: type("Step", (), {  # noqa: E731
        "task": "red", "indices": torch.tensor(indices),
        "outputs": type("Out", (), {"logits": torch.arange(6.0).view(2, 3)}),
    })  # fmt: skip
    assert oracle(step([1, 2])) == oracle(step([1 + count, 2 + 2 * count]))


class Decoded(Dataset):
    """Images that are decoded on each access, and counted."""

    def __init__(self):
        self.decoded = 0

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.decoded += 1
        return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index)), 0


def test_views_of_kept_images_are_the_same_and_each_image_is_decoded_once():
    streams, sources = [], []
    for cache in ("off", "ram"):
        sources.append(Decoded())
        data = UnlabeledTasks({"a": Task(adapt=sources[-1])}, views=Views(Affine(), count=4), cache=cache)
        data.setup("fit")
        streams.append(data.streams["a"])
    for position in range(20):
        assert torch.equal(streams[0][position].inputs, streams[1][position].inputs)
    looks = 3 + 2  # at a few items before the run, and at how images come about
    assert sources[0].decoded == looks + 20
    assert sources[1].decoded == looks + 5


def test_token_ids_have_no_views():
    texts = [({"input_ids": torch.arange(3), "attention_mask": torch.ones(3)}, 0)] * 4
    for items in (texts, [(torch.arange(3), 0)] * 4):
        data = UnlabeledTasks({"a": Task(adapt=items)}, batch_size=2, views=Views(Affine(), count=2))
        with pytest.raises(InputError, match=r"data\.views: expected images.*(input_ids|whole numbers)"):
            data.first_batch()
