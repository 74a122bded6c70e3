"""Data sets that torchvision does not read: images that a text file lists, and parquet files of the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch.utils.data import Dataset

from adamerge.errors import InputError


class ListedImages(Dataset[tuple[Any, int]]):
    """Images that a text file lists, one a line.

    A line is the path of an image in the folder of its class (SUN397's ``/a/abbey/sun_1.jpg``), or a bare name that
    begins with it (RESISC45's ``tennis_court_012.jpg``).

    Args:
        root: Folder of the images.
        listing: The text file, from there.

    Attributes:
        classes: Folders, sorted.
        samples: File and label of each image.

    Raises:
        InputError: If the list is empty.
    """

    def __init__(self, root: str | Path, listing: str | Path) -> None:
        path = Path(root) / listing
        lines = [line.strip().lstrip("/") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{path}: expected one image a line, found none.")
        paths = [PurePosixPath(line if "/" in line else f"{re.sub(r'_[^_]*$', '', line)}/{line}") for line in lines]
        self.classes = sorted({str(path.parent) for path in paths})
        labels = {name: label for label, name in enumerate(self.classes)}
        self.samples = [(str(Path(root) / path), labels[str(path.parent)]) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from torchvision.datasets.folder import default_loader

        path, label = self.samples[index]
        return default_loader(path), label


class HubImages(Dataset[tuple[Any, int]]):
    """Images and labels in the parquet files of a data set of the Hugging Face Hub, downloaded before.

    Args:
        root: Folder of the data set, with ``data/<split>-*.parquet``.
        split: Which.

    Attributes:
        classes: Names of the labels.

    Raises:
        InputError: If there are no such files, or they have no images and named labels.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        import datasets

        files = sorted(str(path) for path in Path(root).glob(f"data/{split}-*.parquet"))
        if not files:
            raise InputError(f"{root}: expected data/{split}-*.parquet, found none. Is the download complete?")
        infos = datasets.info.DatasetInfosDict.from_directory(str(root)) if (Path(root) / "README.md").is_file() else {}
        features = infos["default"].features if "default" in infos else None
        datasets.disable_progress_bars()
        self._rows = datasets.load_dataset("parquet", data_files={split: files}, split=split, features=features)
        label = self._rows.features.get("label")
        if not isinstance(label, datasets.ClassLabel) or "image" not in self._rows.features:
            raise InputError(
                f"{root}: expected the columns image and label, the latter with class names, found "
                f"{', '.join(self._rows.features)}."
            )
        self.classes: Sequence[str] = label.names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self._rows[index]
        return row["image"], int(row["label"])
