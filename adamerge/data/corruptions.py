"""Common corruptions of images: noise, blur, digital artefacts, as benchmarks of robustness apply them.

The strengths are those of Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and
perturbations, ICLR 2019, arXiv:1903.12261 (https://github.com/hendrycks/robustness): for images whose shorter side is
up to 64 pixels those of CIFAR-10-C, for larger ones those of ImageNet-C. Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from adamerge.data.batch import described
from adamerge.data.images import as_seen
from adamerge.data.unreadable import in_whole
from adamerge.errors import InputError, check_number, did_you_mean

SEVERITIES = (1, 2, 3, 4, 5)
DEFAULT_SEVERITY = 5
_SMALL = 64  # pixels of the shorter side, up to which CIFAR-10-C's strengths are taken
_WATER, _MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)


def motion_blur(image: Tensor, radius: int, sigma: float, generator: torch.Generator) -> Tensor:
    """Blur along a line, at up to 45 degrees from the horizontal: a one-sided Gaussian of so many pixels."""
    angle = math.radians(90 * torch.rand((), generator=generator).item() - 45)
    weights = torch.exp(-0.5 * (torch.arange(2 * radius + 1) / sigma) ** 2)
    weights = weights[weights > 1e-3] / weights[weights > 1e-3].sum()
    height, width = image.shape[-2:]
    step = torch.tensor([2 * math.cos(angle) / width, 2 * math.sin(angle) / height])  # a pixel, in grid units
    theta = torch.eye(2, 3).repeat(len(weights), 1, 1)
    theta[:, :, 2] = torch.arange(len(weights)).unsqueeze(1) * step
    grid = functional.affine_grid(theta, [len(weights), *image.shape], align_corners=False)
    shifted = functional.grid_sample(
        image.expand(len(weights), -1, -1, -1), grid, padding_mode="border", align_corners=False
    )
    return torch.einsum("k,kchw->chw", weights, shifted)


def impulse_noise(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Salt and pepper: a share of all values becomes 0 or 1."""
    lots = torch.rand(image.shape, generator=generator)
    return image.masked_fill(lots < amount, 0.0).masked_fill(lots < amount / 2, 1.0)


def gaussian_noise(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Add independent noise to all values."""
    return image + sigma * torch.randn(image.shape, generator=generator)


def pixelate(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Average over boxes to a share of the size, and enlarge again without smoothing."""
    height, width = image.shape[-2:]
    small = max(1, int(height * share)), max(1, int(width * share))
    coarse = functional.interpolate(image.unsqueeze(0), small, mode="area")
    return functional.interpolate(coarse, (height, width), mode="nearest-exact")[0]


def spatter(
    image: Tensor, mean: float, deviation: float, blur: float, threshold: float, strength: float, mud: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Splash water (bright, translucent) or mud over the image.

    Mud is the published one. Water, which is drawn there with OpenCV's edges and distances, is here the layer of
    drops itself, lit from one side.
    """
    layer = mean + deviation * torch.randn(image.shape[-2:], generator=generator)
    layer = _blurred(layer, blur)
    drops = (layer > threshold).to(image)
    if mud:
        drops = _blurred(drops, strength)
        drops = drops.masked_fill(drops < 0.8, 0.0)
        return image * (1 - drops) + drops * _coloured(_MUD, image)
    depth = drops * layer
    light = functional.pad(depth[None, None], (1, 1, 1, 1), mode="replicate")
    relief = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    lit = _blurred((depth + functional.conv2d(light, relief[None, None])[0, 0]).clamp(min=0) * drops, 0.5)
    return image + strength * lit / lit.max().clamp(min=1e-6) * _coloured(_WATER, image)


def contrast(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Move all values towards the mean of their channel."""
    mean = image.mean((-2, -1), keepdim=True)
    return mean + factor * (image - mean)


def jpeg_compression(image: Tensor, quality: int, generator: torch.Generator) -> Tensor:
    """Compress and decompress, with Pillow."""
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image  # imports slowly

    with io.BytesIO() as file:
        to_pil_image(_as_bytes(image)).save(file, "JPEG", quality=quality)
        pixels: Tensor = pil_to_tensor(Image.open(file))
    return pixels.to(image) / 255


@dataclass(frozen=True)
class CorruptionKind:
    """A corruption: what it does, and its arguments by severity for small and for large images."""

    apply: Callable[..., Tensor]
    small: Sequence[tuple[float, ...]]
    large: Sequence[tuple[float, ...]]


def _single(*values: float) -> list[tuple[float, ...]]:
    return [(value,) for value in values]


KINDS: Mapping[str, CorruptionKind] = {
    "motion_blur": CorruptionKind(
        motion_blur,
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    ),
    "impulse_noise": CorruptionKind(
        impulse_noise, _single(0.01, 0.02, 0.03, 0.05, 0.07), _single(0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    "gaussian_noise": CorruptionKind(
        gaussian_noise, _single(0.04, 0.06, 0.08, 0.09, 0.10), _single(0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "pixelate": CorruptionKind(pixelate, _single(0.95, 0.9, 0.85, 0.75, 0.65), _single(0.6, 0.5, 0.4, 0.3, 0.25)),
    "spatter": CorruptionKind(
        spatter,
        [
            (0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ],
        [
            (0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1),
        ],
    ),
    "contrast": CorruptionKind(contrast, _single(0.75, 0.5, 0.4, 0.3, 0.15), _single(0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg_compression": CorruptionKind(jpeg_compression, _single(80, 65, 58, 50, 40), _single(25, 18, 15, 10, 7)),
}  # fmt: skip
"""The seven that AdaMerging's tables have."""


@dataclass(frozen=True)
class Corruption:
    """A corruption of a severity.

    Args:
        name: One of :data:`KINDS`.
        severity: From 1 to 5.

    Raises:
        InputError: If there is no such corruption or severity.
    """

    name: str
    severity: int = DEFAULT_SEVERITY

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise InputError(
                f"No corruption is called {self.name!r}.{did_you_mean(str(self.name), KINDS)} Known: "
                f"{', '.join(KINDS)}."
            )
        check_number(f"{self.name}: severity", self.severity, SEVERITIES[0], SEVERITIES[-1], whole=True)

    def __str__(self) -> str:
        return f"{self.name}:{self.severity}"

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Return a corrupted image.

        Args:
            image: Shape (C, H, W), values in [0, 1].
            generator: The source of all that is random.
        """
        kind = KINDS[self.name]
        table = kind.small if min(image.shape[-2:]) <= _SMALL else kind.large
        return kind.apply(image, *table[self.severity - 1], generator).clamp(0, 1)


def read_corruptions(text: str, severity: int = DEFAULT_SEVERITY) -> list[Corruption]:
    """Read ``all``, or names with or without ``:severity``, separated by commas.

    Raises:
        InputError: If one is unknown.
    """
    if text == "all":
        return [Corruption(name, severity) for name in KINDS]
    corruptions = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, separator, strength = word.partition(":")
        if separator and not strength.isdigit():
            raise InputError(f"{word}: expected NAME or NAME:SEVERITY, such as gaussian_noise:3.")
        corruptions.append(Corruption(name, int(strength) if separator else severity))
    if not corruptions:
        raise InputError(f"Expected all, or corruptions such as gaussian_noise:3,pixelate, found {text!r}.")
    return corruptions


class Corrupted(Dataset[Any]):
    """A data set whose images are corrupted; an image always in the same way.

    What is random depends on the key, the corruption's name and the image's number in the data set that all subsets
    are of: not on the severity, the order, or what else is loaded.

    Args:
        dataset: Items are images, or tuples that begin with one: PIL images, or tensors (C, H, W).
        corruption: What is done.
        key: Names the data set.
        scale: Mean and standard deviation by channel, with which tensors are normalised; None: they are in [0, 1].
    """

    def __init__(
        self, dataset: Dataset[Any], corruption: Corruption, key: str, scale: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self._dataset, self._corruption, self._key, self._scale = dataset, corruption, key, scale

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        item = self._dataset[index]
        image = item[0] if isinstance(item, (tuple, list)) else item
        key = f"{self._key}/{self._corruption.name}/{in_whole(self._dataset, index)[1]}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        if isinstance(image, Tensor):
            corrupted: Any = self._tensor(image, generator)
        else:
            corrupted = self._picture(image, generator)
        return (corrupted, *item[1:]) if isinstance(item, (tuple, list)) else corrupted

    def _picture(self, image: Any, generator: torch.Generator) -> Any:
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image  # imports slowly

        if not isinstance(image, Image.Image):
            raise InputError(
                f"{self._key.split(',')[0]}: a corruption needs images, found {described(image)}. Set "
                "data.corruption=null (of adamerge evaluate: leave --corruptions out)."
            )
        pixels = pil_to_tensor(as_seen(image).convert("RGB")).float() / 255
        return to_pil_image(_as_bytes(self._corruption(pixels, generator)))

    def _tensor(self, image: Tensor, generator: torch.Generator) -> Tensor:
        mean, deviation = self._scale or (torch.zeros(1), torch.ones(1))
        mean, deviation = mean.view(-1, 1, 1), deviation.view(-1, 1, 1)
        try:
            if image.ndim != 3 or not image.is_floating_point():
                raise InputError(f"a tensor of shape {tuple(image.shape)} and {image.dtype}")
            pixels = image * deviation + mean
            if pixels.min() < -0.02 or pixels.max() > 1.02:  # rounding of half precision and resizing stays below
                raise InputError(f"values from {image.min():.2f} to {image.max():.2f}")
        except (InputError, RuntimeError) as error:
            normalised = "in [0, 1]" if self._scale is None else "normalised as the backbone's preprocessing does it"
            raise InputError(
                f"{self._key}: a corruption needs images: PIL's, or tensors (C, H, W) {normalised}; found {error}. "
                "Give a data set without a transform of its own: the backbone's preprocessing comes after it."
            ) from None
        return (self._corruption(pixels, generator) - mean) / deviation


def scale_of(preprocess: Any) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation (C,) of the normalisation in a preprocessing; None where there is none."""
    steps = [preprocess, *reversed(list(getattr(preprocess, "transforms", [])))]
    for step in steps:
        mean, deviation = getattr(step, "mean", None), getattr(step, "std", None)
        if mean is not None and deviation is not None:
            return torch.as_tensor(mean, dtype=torch.float32), torch.as_tensor(deviation, dtype=torch.float32)
    return None


def _blurred(values: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (H, W), cut at four standard deviations."""
    from torchvision.transforms.v2.functional import gaussian_blur  # imports slowly

    radius = min(int(4 * sigma + 0.5), min(values.shape) - 1)
    blurred: Tensor = gaussian_blur(values.unsqueeze(0), [2 * radius + 1] * 2, [sigma, sigma])
    return blurred[0]


def _coloured(colour: Sequence[float], image: Tensor) -> Tensor:
    """Return a colour for (C, H, W); its mean where there is one channel."""
    values = torch.tensor(colour)
    return (values if len(image) == 3 else values.mean().expand(len(image))).view(-1, 1, 1)


def _as_bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)
