"""Corruptions of images, corrupted streams and scores, and tasks that are scored only."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from adamerge.commands.cli import main
from adamerge.commands.run.compose import compose
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.corruptions import KINDS, SEVERITIES, Corrupted, Corruption, read_corruptions, scale_of
from adamerge.errors import InputError
from adamerge.zoo import ZooImages
from tests.support.small_run import write_configs


def picture(height=28, width=28, channels=3):
    """A smooth image with an edge, in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([(x + y) / 2, (x > 0.5).float() * 0.8, 1 - y])[:channels].contiguous()


def corrupted(name, severity, image, seed=0):
    return Corruption(name, severity)(image, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(28, 28), (100, 130)], ids=["small", "large"])
def test_corruption_keeps_shape_and_range_and_depends_on_the_generator_alone(name, size):
    image = picture(*size)
    before, state = image.clone(), torch.get_rng_state()
    for severity in SEVERITIES:
        result = corrupted(name, severity, image)
        assert result.shape == image.shape
        assert result.dtype == torch.float32
        assert result.min() >= 0
        assert result.max() <= 1
        assert (result - image).abs().mean() > 1e-3
        assert torch.equal(result, corrupted(name, severity, image))
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["motion_blur", "impulse_noise", "gaussian_noise", "contrast", "jpeg_compression"])
@pytest.mark.parametrize("size", [28, 100], ids=["small", "large"])
def test_severer_corruption_is_farther_from_the_image(name, size):
    image = picture(size, size)
    errors = [(corrupted(name, severity, image) - image).abs().mean().item() for severity in SEVERITIES]
    assert errors == sorted(errors)


def test_corruptions_have_the_published_strengths():
    grey = torch.full((3, 64, 64), 0.5)
    assert corrupted("gaussian_noise", 5, grey).std() == pytest.approx(0.10, rel=0.03)
    noisy = corrupted("impulse_noise", 5, grey)
    assert (noisy == 1).float().mean() == pytest.approx(0.035, abs=0.005)
    assert (noisy == 0).float().mean() == pytest.approx(0.035, abs=0.005)
    large = torch.full((3, 65, 70), 0.5)
    assert (corrupted("impulse_noise", 5, large) != 0.5).float().mean() == pytest.approx(0.27, abs=0.02)
    image = picture()
    mean = image.mean((1, 2), keepdim=True)
    torch.testing.assert_close(corrupted("contrast", 1, image), mean + 0.75 * (image - mean))


@pytest.mark.parametrize("name", ["motion_blur", "pixelate", "contrast"])
def test_even_image_stays_as_it_is(name):
    grey = torch.full((3, 30, 40), 0.3)
    torch.testing.assert_close(corrupted(name, 5, grey), grey)


def test_pixelate_averages_boxes():
    image = torch.zeros(1, 100, 100)
    image[:, :, ::4] = 1
    result = corrupted("pixelate", 5, image)  # a quarter of the size: boxes of 4 x 4
    torch.testing.assert_close(result, torch.full_like(image, 0.25))


def test_motion_blur_keeps_the_mean_and_smears_sideways():
    image = torch.zeros(1, 41, 41)
    image[:, 20, 20] = 1
    result = corrupted("motion_blur", 5, image)[0]
    assert result.sum() == pytest.approx(1, abs=0.02)
    columns = (result.sum(0) > 1e-3).sum()
    rows = (result.sum(1) > 1e-3).sum()
    assert columns >= 5
    assert columns + 1 >= rows  # at up to 45 degrees from the horizontal


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_leaves_most_of_the_image(channels, severity):
    image = picture(64, 64, channels)
    result = corrupted("spatter", severity, image)
    changed = ((result - image).abs() > 0.02).float().mean()
    assert 0.01 < changed < 0.9


def test_read_corruptions():
    assert [str(found) for found in read_corruptions("all", 2)] == [f"{name}:2" for name in KINDS]
    assert read_corruptions("contrast:1, pixelate") == [Corruption("contrast", 1), Corruption("pixelate", 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gausian_noise", "Did you mean 'gaussian_noise'"),
        ("contrast:9", r"severity: expected a whole number in \[1, 5\], found 9"),
        ("contrast:high", "such as gaussian_noise:3"),
        (",", "Expected all"),
    ],
)
def test_unknown_corruption_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        read_corruptions(text)


class Pictures(Dataset):
    """Pairs of a PIL image and a label."""

    classes = ("a", "b")

    def __init__(self, count=8):
        values = torch.randint(
            0, 256, (count, 24, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        self.images = [Image.fromarray(value.numpy()) for value in values]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 2


def test_image_is_corrupted_in_the_same_way_whatever_subset_it_is_in():
    whole = Corrupted(Pictures(), Corruption("gaussian_noise"), "task")
    part = Corrupted(Subset(Subset(Pictures(), [1, 3, 5]), [2, 0]), Corruption("gaussian_noise"), "task")
    for index, original in ((0, 5), (1, 1)):
        (image, label), (same, own) = part[index], whole[original]
        assert image.tobytes() == same.tobytes()
        assert label == own
    assert part[0][0].tobytes() != Pictures()[5][0].tobytes()
    other = Corrupted(Pictures(), Corruption("gaussian_noise"), "other")
    assert other[0][0].tobytes() != whole[0][0].tobytes()


def test_severities_share_their_noise():
    weak, strong = (Corrupted(Pictures(), Corruption("impulse_noise", severity), "task")[0][0] for severity in (1, 5))
    clean = torch.from_numpy(np.array(Pictures()[0][0]))
    changed = [torch.from_numpy(np.array(image)) != clean for image in (weak, strong)]
    assert (changed[1] | ~changed[0]).all()


def test_tensors_are_corrupted_as_the_images_that_they_were():
    images = ZooImages("greek")
    scale = torch.tensor([0.5] * 3), torch.tensor([0.5] * 3)
    result = Corrupted(images, Corruption("contrast", 5), "greek", scale)[3][0]
    pixels = images[3][0] / 2 + 0.5
    mean = pixels.mean((1, 2), keepdim=True)
    torch.testing.assert_close(result, (mean + 0.15 * (pixels - mean)) * 2 - 1)
    with pytest.raises(InputError, match=r"values from -0.* to .*without a transform of its own"):
        Corrupted(images, Corruption("contrast", 5), "greek")[3]  # not in [0, 1]
    with pytest.raises(InputError, match=r"shape \(5,\)"):
        Corrupted([torch.zeros(5)], Corruption("contrast"), "vectors")[0]


def test_scale_of_finds_the_normalisation():
    from torchvision.transforms import v2

    found = scale_of(v2.Compose([v2.ToImage(), v2.Normalize([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])]))
    torch.testing.assert_close(found, (torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])))
    assert scale_of(None) is None
    assert scale_of(v2.Compose([v2.ToImage()])) is None


def tasks(**options):
    from torchvision.transforms.functional import to_tensor

    return UnlabeledTasks({"one": Task(dataset=Pictures()), "two": Task(dataset=Pictures(6))},
                          preprocess=to_tensor, batch_size=2, **options)  # fmt: skip


def test_stream_is_corrupted_and_scored_images_are_not():
    clean = tasks(protocol="transductive")
    noisy = tasks(protocol="transductive", corruption="gaussian_noise", severity=3)
    assert not torch.equal(clean.streams["one"][0].inputs, noisy.streams["one"][0].inputs)
    assert torch.equal(clean.evaluation["one"][0][0], noisy.evaluation["one"][0][0])
    scored = clean.with_corrupted_evaluation(Corruption("gaussian_noise", 3))
    assert torch.equal(scored.evaluation["one"][0][0], noisy.streams["one"][0].inputs)  # the very same noise
    held = tasks(holdout=0.25, corruption="contrast")
    assert not torch.equal(held.holdout_streams["one"][0].inputs, tasks(holdout=0.25).holdout_streams["one"][0].inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unseen": ["three"]}, "data.unseen: no task 'three'"),
        ({"unseen": "one"}, r"write \[one\]"),
        ({"unseen": ["one", "two"]}, "none is left"),
        ({"corruption": "fog"}, "No corruption is called 'fog'"),
        ({"corruption": "contrast", "severity": 0}, r"severity: expected a whole number in"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        tasks(**options)


def test_unseen_task_is_scored_whole_and_has_no_stream():
    data = tasks(unseen=["two"])
    assert list(data.streams) == list(data.evaluation) == ["one"]
    assert sum(len(labels) for _, labels in data.evaluation_loader("two")) == 6
    assert list(data.tasks) == ["one", "two"]  # its head is made
    noisy = data.with_corrupted_evaluation(Corruption("contrast"))
    assert not torch.equal(noisy.unseen_evaluation["two"][0][0], data.unseen_evaluation["two"][0][0])


def test_experts_of_unseen_tasks_do_not_merge(tmp_path):
    config = compose(["data.unseen=[digits,math]"])
    assert list(config.pool.experts) == ["mnist", "latin", "greek", "cyrillic"]
    (tmp_path / "pool.yaml").write_text(
        "base: b.safetensors\nexperts: {a: a.safetensors, mnist: {file: m.safetensors}}\n"
    )
    (tmp_path / "pool.yaml").write_text(
        "base: b.safetensors\nexperts:\n  a: a.safetensors\n  b: {file: m.safetensors, task: mnist}\n"
    )
    config = compose(["pool=files", f"pool.file={tmp_path}/pool.yaml", "data=clip_8", "data.unseen=[mnist]"])
    assert list(config.pool.experts) == ["a"]


def test_unseen_leaves_an_expert_out_with_its_hash_and_licence_but_not_that_of_a_seen_task(tmp_path):
    entry = "{{file: {0}.safetensors, sha256: {1}, licence: mit}}"
    entries = [f"  {name}: {entry.format(name, name * 64)}" for name in "ab"]
    (tmp_path / "pool.yaml").write_text("\n".join(["base: b.safetensors", "experts:", *entries, ""]))
    pool = ["pool=files", f"pool.file={tmp_path}/pool.yaml", "data=clip_8", "+data.tasks.mnist.expert=a"]
    config = compose([*pool, "data.unseen=[mnist]"])
    assert [list(config.pool[part]) for part in ("experts", "sha256", "licences")] == [["b"]] * 3
    config = compose([*pool, "+data.tasks.svhn.expert=a", "data.unseen=[mnist]"])
    assert list(config.pool.experts) == list(config.pool.sha256) == ["a", "b"]


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


@pytest.mark.slow
def test_run_with_an_unseen_task_on_a_corrupted_stream_and_its_scores(tmp_path, capsys):
    configs, folder = write_configs(tmp_path / "configs"), tmp_path / "run"
    own = ["--config-dir", str(configs), "pool=small", "data=small", "trainer=cpu", "report=false", f"run_dir={folder}"]
    assert run("adapt", *own, "steps=2", "+data.unseen=[digits]", "+data.corruption=contrast", "+data.severity=2") == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["tasks"], summary["unseen"]) == (["mnist"], ["digits"])
    assert set(summary["rows"]["adapt"]["unseen"]) == {"digits"}
    assert "unseen" not in summary["rows"]["experts"]
    assert "digits †" in capsys.readouterr().out
    capsys.readouterr()
    assert run("evaluate", str(folder), "--corruptions", "pixelate,contrast:2", "--severity", "1", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["corruptions"]) == ["clean", "pixelate:1", "contrast:2"]
    assert content["adapted_on"] == "contrast:2"
    assert content == json.loads((folder / "robustness.json").read_text())
    clean = content["corruptions"]["clean"]["rows"]
    assert clean["adapt"]["per_task"] == summary["rows"]["adapt"]["per_task"]
    assert list(clean) == list(summary["rows"])
    assert (folder / "robustness.png").read_bytes().startswith(b"\x89PNG")
    assert run("evaluate", str(folder), "--corruptions", "contrast") == 0
    assert "contrast:5" in capsys.readouterr().out
    assert run("evaluate", str(folder), "--corruptions", "frost") == 2
    assert "No corruption is called 'frost'" in capsys.readouterr().err
