"""Data sets that torchvision does not read: lists of images, the Hub's parquet files, compressed IDX files."""

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data.images import load_image
from adamerge.errors import InputError
from adamerge.system.reading import MAX_JSON, read_text


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
        lines = [line.strip().lstrip("/") for line in read_text(path, MAX_JSON).splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{path}: expected one image a line, found none.")
        paths = [PurePosixPath(line if "/" in line else f"{re.sub(r'_[^_]*$', '', line)}/{line}") for line in lines]
        self.classes = sorted({str(path.parent) for path in paths})
        labels = {name: label for label, name in enumerate(self.classes)}
        self.samples = [(str(Path(root) / path), labels[str(path.parent)]) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return load_image(path), label


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


class IdxImages(Dataset[tuple[Any, int]]):
    """Grey images and labels in two files of MNIST's IDX format, compressed or not.

    Args:
        root: Folder of the files.
        images: File of the images, from there.
        labels: File of the labels.

    Attributes:
        data: Shape (N, height, width), uint8.
        targets: Shape (N,), int64.

    Raises:
        InputError: If a file is not in the format, or the two do not belong together.
    """

    def __init__(self, root: str | Path, images: str, labels: str) -> None:
        self.data = _read_idx(Path(root) / images, 3)
        self.targets = _read_idx(Path(root) / labels, 1).long()
        if len(self.data) != len(self.targets):
            raise InputError(
                f"{Path(root) / labels}: expected a label for each of the {len(self.data)} images in {images}, found "
                f"{len(self.targets)}."
            )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.data[index].numpy()), int(self.targets[index])


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an array of bytes: two zeros, type 8, the number of dimensions, each as a big-endian int32, then bytes."""
    try:
        content = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cannot be decompressed ({error}). Is the download complete?") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
        raise InputError(
            f"{path}: expected a file of bytes in the IDX format with {dimensions} dimensions, found another start."
        )
    shape = struct.unpack(f">{dimensions}i", content[4:head])
    if len(content) - head != math.prod(shape):
        raise InputError(
            f"{path}: expected {math.prod(shape)} bytes for the shape {shape}, found {len(content) - head}. Is the "
            "download complete?"
        )
    return torch.frombuffer(bytearray(content[head:]), dtype=torch.uint8).view(shape)
