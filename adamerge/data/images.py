"""Image files as people see them: upright, in 8 bits; torchvision's own loader cuts deeper ones off at 255."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset, Subset

from adamerge.data.unreadable import DAMAGE, UnreadableError

_DEEP = 65535
_UPRIGHT = 1


def load_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, see :func:`as_seen`.

    Raises:
        OSError: If it cannot be read.
        UnreadableError: If it is damaged in another way, or its values have no known range.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe has no end
        raise UnreadableError("no regular file")
    try:
        with Image.open(path) as image:
            return as_seen(image).convert("RGB")
    except DAMAGE:
        raise
    except Exception as error:  # whatever else a decoder makes of a damaged file
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


def as_seen(image: Image.Image) -> Image.Image:
    """Return an image upright, as its EXIF orientation says, and with 8 bits per channel.

    Whole numbers of 16 bits are divided by 257; floating-point values are taken from 0 (black) to 1 (white).

    Raises:
        UnreadableError: If its values are others than these.
    """
    if _orientation(image) != _UPRIGHT:
        image = ImageOps.exif_transpose(image)
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    whole = values.dtype.kind in "iu"
    top = _DEEP if whole else 1
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise UnreadableError(
            f"values from {values.min():g} to {values.max():g}, expected 0 to {top} in mode {image.mode}; save it in 8 "
            "bits"
        )
    return Image.fromarray(np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT))
    except Exception:  # of a damaged block, beside pixels that can be read
        return _UPRIGHT


def read_as_seen(dataset: Dataset[Any] | None) -> None:
    """Let a data set of image files that has torchvision's own loader read them by :func:`load_image`."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    loader = getattr(dataset, "loader", None)
    names = getattr(loader, "__module__", None), getattr(loader, "__name__", None)
    if names == ("torchvision.datasets.folder", "default_loader"):
        dataset.loader = load_image  # type: ignore[union-attr]
