"""The field's data sets as data: class names, prompts, splits, and where files lie, one yaml file each."""

import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from adamerge.errors import InputError, did_you_mean

_EIGHT = ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
_FOURTEEN = (*_EIGHT, "stl10", "oxford_iiit_pet", "flowers102", "cifar100", "pcam", "fer2013")
_TWENTY = (*_FOURTEEN, "cifar10", "food101", "fashion_mnist", "rendered_sst2", "emnist", "kmnist")

_TWENTY_HUB = tuple("emnist_letters" if name == "emnist" else name for name in _TWENTY)

# Task arithmetic's eight, the 14 and 20 of Wang et al., arXiv:2405.07813 (https://github.com/nik-dim/tall_masks), and
# the 20 of FusionBench's experts at the Hub (https://github.com/tanganke/fusion_bench).
BENCHMARKS: Mapping[str, tuple[str, ...]] = {
    **{"clip_8": _EIGHT, "clip_14": _FOURTEEN, "clip_20": _TWENTY},
    "clip_20_hub": _TWENTY_HUB,
}


@dataclass(frozen=True, eq=False)
class DatasetLayout:
    """One way in which a data set lies on disk; all paths are below the folder of the data sets.

    Attributes:
        title: What it is.
        reader: Import path of the data set class.
        options: Split to the class's arguments; ``root`` is a path, by default ``.``.
        needs: Split, or ``all``, to the files and folders that must be there.
        at: Folders that the paths start from, the first that has any of them.
        requires: Packages that the class needs.
        strip: Regular expression for what comes before the class name in the class's own names.
        divide: Split to images per class, drawn with a fixed seed; the rest is ``train``.
        counts: Split to the number of its images where it is not the definition's, None where it is not known.
        first_label: The files' number of the first class.
    """

    title: str
    reader: str
    options: Mapping[str, Mapping[str, Any]]
    needs: Mapping[str, Sequence[str]]
    at: Sequence[str] = (".",)
    requires: Sequence[str] = ()
    strip: str = ""
    divide: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int | None] = field(default_factory=dict)
    first_label: int = 0


@dataclass(frozen=True)
class Download:
    """One file to fetch: its address and MD5, the folder it goes to, and what is there once it has been unpacked."""

    url: str
    md5: str
    folder: str = "."
    gives: str | None = None


@dataclass(frozen=True, eq=False)
class Definition:
    """What is known about a data set.

    Attributes:
        name: By which options call it.
        title: Its own name.
        homepage: Homepage of its authors.
        licence: In their words, or that there are none.
        size: On disk, roughly.
        channels: Channels of its images, 1 or 3; they are always given as RGB.
        labels: ``names`` where the files name the classes, so that their order can be checked; else ``numbers``.
        splits: Split to number of images.
        sources: Where classes, templates and splits come from.
        classes: Names for prompts, in the order of the labels.
        templates: Prompts.
        layouts: Ways in which it may lie on disk, tried in this order.
        published_classes: Names that the published heads were made with, where they differ.
        spelled: Names as the files have them, where they differ by more than case and punctuation.
        torchvision: Arguments with which torchvision's class is to be called to fetch it.
        get: Files to fetch.
        hub: A copy at the Hugging Face Hub.
        manual: What remains to be done by hand.
    """

    name: str
    title: str
    homepage: str
    licence: str
    size: str
    channels: int
    labels: str
    splits: Mapping[str, int]
    sources: Mapping[str, str]
    classes: Sequence[str]
    templates: Sequence[str]
    layouts: Sequence[DatasetLayout]
    published_classes: Sequence[str] | None = None
    spelled: Sequence[str] | None = None
    torchvision: Sequence[Mapping[str, Any]] = ()
    get: Sequence[Download] = ()
    hub: str | None = None
    manual: str | None = None


def names() -> tuple[str, ...]:
    """Return the names of all data sets, in the order of the benchmarks."""
    return (*_TWENTY, "emnist_letters")


@functools.cache
def definition(name: str) -> Definition:
    """Return what is known about a data set.

    Raises:
        InputError: If no data set has that name.
    """
    _check_name(name, names())
    text = (importlib.resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    layouts = tuple(DatasetLayout(**layout) for layout in content.pop("layouts"))
    downloads = tuple(Download(**entry) for entry in content.pop("get", ()))
    return Definition(name=name, layouts=layouts, get=downloads, **content)


def chosen(words: Sequence[str]) -> list[str]:
    """Return the data sets that words name, each a data set or a benchmark; all for none.

    Raises:
        InputError: If a word names neither.
    """
    chosen_names: list[str] = []
    for word in words or names():
        _check_name(word, [*BENCHMARKS, *names()])
        chosen_names += BENCHMARKS.get(word, (word,))
    return list(dict.fromkeys(chosen_names))


def _check_name(name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise InputError(f"No data set is called {name!r}.{did_you_mean(name, choices)} Known: {', '.join(choices)}.")
