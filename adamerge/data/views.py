"""Augmented views of unlabeled images: more questions for the experts than there are images."""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from adamerge.data.batch import Inputs, described
from adamerge.errors import InputError, check_number


@dataclass(frozen=True)
class Views:
    """Replace each adaptation image by several random views of it.

    Expert and merged model see the very same view, and the expert's answer to it is the target, so a
    transform need not preserve the class. A view is a function of its position in the stream and the
    seed alone: experts are asked once per view, and a resumed run sees the same ones.

    Args:
        transform: Input tensor (C, H, W) to one of the same shape, such as :class:`Affine` or any of
            ``torchvision.transforms.v2``; its randomness must be torch's. None with ``mix`` alone.
        count: Views per image.
        mix: Share of the views that are blended with a view of another image of the task, with a
            uniform weight (mixup). ``"auto"``: half of them up to 64 images, 32 by the number of images beyond.

    Reference:
        Beyer et al., Knowledge distillation: a good teacher is patient and consistent, CVPR 2022,
        arXiv:2106.05237 (the same augmented view for teacher and student). Zhang et al., mixup,
        ICLR 2018, arXiv:1710.09412.
    """

    transform: Callable[[Tensor], Tensor] | None = None
    count: int = 16
    mix: float | Literal["auto"] = 0.0

    def __post_init__(self) -> None:
        if self.transform is not None and not callable(self.transform):
            raise InputError(f"data.views.transform: expected a callable (with _target_), found {self.transform!r}.")
        check_number("data.views.count", self.count, 1, whole=True)
        if self.mix != "auto":
            check_number("data.views.mix", self.mix, 0, 1)
        if self.transform is None and not self.mix:
            raise InputError(
                "data.views: expected a transform or mix > 0, found neither. Set data.views=null for none."
            )

    def __call__(self, image: Callable[[int], Inputs], length: int, index: int, key: str) -> Tensor:
        """Return the view at a position of the stream.

        Args:
            image: Number of an image to its tensor (C, H, W).
            length: Number of images.
            index: Position in the stream; view ``index // length`` of image ``index % length``.
            key: Key of the stream; with ``index`` it fixes everything random.

        Raises:
            InputError: If the transform changes the shape, or the inputs are no images.
        """
        mix = min(0.5, 32 / length) if self.mix == "auto" else self.mix
        with _alone(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f"{key}/{index}".encode()))
            view = self._transformed(image(index % length))
            if mix and float(torch.rand(())) < mix:
                second = self._transformed(image(int(torch.randint(length, ()))))
                view = torch.lerp(view, second, float(torch.rand(())))
        return view

    def _transformed(self, image: Inputs) -> Tensor:
        if not isinstance(image, Tensor) or not (image.is_floating_point() or image.ndim > 2):
            found = described(image) if not isinstance(image, Tensor) else f"whole numbers {tuple(image.shape)}"
            raise InputError(
                f"data.views: expected images, which views are made of, found {found}. Set data.views=null for texts."
            )
        if self.transform is None:
            return image
        view = self.transform(image)
        if not isinstance(view, Tensor) or view.shape != image.shape:
            shape = tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__
            raise InputError(
                f"data.views.transform: expected a tensor of the input's shape {tuple(image.shape)}, found {shape}."
            )
        return view


@contextmanager
def _alone() -> Iterator[None]:
    """Run on one thread: one image is too little for several, and waiting for them took 400 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Affine:
    """Rotate, shear, scale and shift an image at random, and repeat its border where it ends.

    torchvision's random affine fills with one value, an edge that no image of the task has.

    Args:
        degrees: Largest rotation.
        shift: Largest shift, as a share of each side.
        scale: Largest change of size, as a share.
        shear: Largest horizontal shear, as a tangent.
    """

    degrees: float = 8.0
    shift: float = 0.04
    scale: float = 0.08
    shear: float = 0.08

    def __post_init__(self) -> None:
        for option in ("degrees", "shift", "shear"):
            check_number(f"data.views.transform.{option}", getattr(self, option), 0)
        check_number("data.views.transform.scale", self.scale, 0, 1, below=True)

    def __call__(self, image: Tensor) -> Tensor:
        """Return a random view of an image (C, H, W), floating point."""
        angle, size, shear, right, down = (2 * torch.rand(5, dtype=torch.float64) - 1).tolist()
        angle, size = math.radians(angle * self.degrees), 1 + size * self.scale
        cosine, sine = size * math.cos(angle), size * math.sin(angle)
        aspect = image.shape[-2] / image.shape[-1]  # grid_sample's coordinates run from -1 to 1 along both sides
        matrix = [
            [cosine, (shear * self.shear - sine) * aspect, 2 * right * self.shift],
            [sine / aspect, cosine, 2 * down * self.shift],
        ]
        theta = torch.tensor([matrix], dtype=image.dtype)
        grid = functional.affine_grid(theta, [1, *image.shape], align_corners=False)
        return functional.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
