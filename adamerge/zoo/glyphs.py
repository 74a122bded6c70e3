"""Characters of matplotlib's bundled fonts, drawn as 28 x 28 images in the styles of the demo tasks.

Shapes: N images, S = 28 pixels. A mask is ``(N, 1, S, S)`` in [0, 1], 1 on the glyph; an image is ``(N, 3, S, S)``
in [0, 1]. All randomness comes from the numpy generator that the caller passes in.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adamerge.errors import InputError

SIZE = 28
GLYPH_SIZE = 22  # longer side of a glyph in pixels, before the random affine map

FONTS: dict[str, tuple[str, ...]] = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
        "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol",
    ),
    "test": (
        "DejaVuSansMono", "DejaVuSerif-Italic", "DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "STIXGeneralBolIta",
    ),
}  # fmt: skip


def require(module: str, package: str) -> ModuleType:
    """Import an optional module, or say what to install.

    Args:
        module: Dotted name of the module.
        package: Name of the distribution that provides it.

    Returns:
        The imported module.

    Raises:
        InputError: If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"The demo zoo's images come from files inside the package {package!r}, which cannot be imported "
            f'({error}). Install it: pip install "adamerge[demo]"'
        ) from error


@functools.cache
def _font(name: str) -> tuple[Any, frozenset[int]]:
    ft2font = require("matplotlib.ft2font", "matplotlib")
    folder = Path(require("matplotlib", "matplotlib").get_data_path()) / "fonts" / "ttf"
    font = ft2font.FT2Font(str(folder / f"{name}.ttf"))
    return font, frozenset(font.get_charmap())


def _bitmap(name: str, character: str, points: float) -> np.ndarray:
    ft2font = require("matplotlib.ft2font", "matplotlib")
    font, _ = _font(name)
    font.set_size(points, 72)  # 72 dpi: one point is one pixel
    font.set_text(character, 0.0, flags=ft2font.LoadFlags.NO_HINTING)
    font.draw_glyphs_to_bitmap(antialiased=True)
    image = np.asarray(font.get_image(), dtype=np.float32) / 255
    rows, columns = np.nonzero(image)
    return image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


@functools.cache
def draw_glyph(font: str, character: str) -> Tensor | None:
    """Draw one character, centred, with its longer side at ``GLYPH_SIZE`` pixels.

    Args:
        font: File name of a font of matplotlib without ``.ttf``.
        character: A single character.

    Returns:
        Shape ``(S, S)`` in [0, 1], or ``None`` if the font has no such character.
    """
    if ord(character) not in _font(font)[1]:
        return None
    longest = max(_bitmap(font, character, 100.0).shape)
    bitmap = _bitmap(font, character, 100.0 * 2 * GLYPH_SIZE / longest)  # twice the size, halved below
    height, width = bitmap.shape
    top, left = SIZE - height // 2, SIZE - width // 2
    canvas = torch.zeros(1, 1, 2 * SIZE, 2 * SIZE)
    canvas[0, 0, top : top + height, left : left + width] = torch.from_numpy(bitmap.copy())
    return functional.avg_pool2d(canvas, 2)[0, 0]


def draw_masks(
    characters: Sequence[str],
    labels: Tensor,
    fonts: Sequence[str],
    rng: np.random.Generator,
    rotation: float = 10.0,
) -> Tensor:
    """Draw ``characters[label]`` in a random font under a random affine map, for every label.

    Args:
        characters: One character per class.
        labels: Class indices, shape ``(N,)``.
        fonts: Fonts to choose from; one that lacks a character is never chosen for it.
        rng: Source of all randomness; its state advances.
        rotation: Largest rotation in degrees, either way.

    Returns:
        Masks, shape ``(N, 1, S, S)``.
    """
    drawn = [[draw_glyph(font, c) for font in fonts] for c in characters]
    present = [[glyph for glyph in row if glyph is not None] for row in drawn]
    counts = np.array([len(row) for row in present])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    classes = labels.numpy()
    chosen = starts[classes] + (rng.random(len(classes)) * counts[classes]).astype(np.int64)
    bank = torch.stack([glyph for row in present for glyph in row])
    return random_affine(bank[torch.from_numpy(chosen), None], rng, rotation)


def random_affine(masks: Tensor, rng: np.random.Generator, rotation: float) -> Tensor:
    """Rotate, scale, shear and shift every mask at random; rotations are up to ``rotation`` degrees either way."""
    count = len(masks)
    angle = rng.uniform(-math.radians(rotation), math.radians(rotation), count)
    zoom = 1 / rng.uniform(0.75, 1.1, count)
    shear = rng.uniform(-0.15, 0.15, count)
    shift = rng.uniform(-0.14, 0.14, (2, count))  # 0.14 of half the width: 2 pixels
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    rows = [[cos, shear * cos - sin, shift[0]], [sin, shear * sin + cos, shift[1]]]  # output -> input
    theta = torch.from_numpy(np.array(rows)).permute(2, 0, 1).float()
    grid = functional.affine_grid(theta, list(masks.shape), align_corners=False)
    return functional.grid_sample(masks, grid, align_corners=False).clamp(0, 1)


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))


def _blend(masks: Tensor, ink: Tensor, ground: Tensor) -> Tensor:
    return ground + masks * (ink - ground)


def _blur(masks: Tensor) -> Tensor:
    """Gaussian blur, sigma 1 pixel, cut at 3 pixels."""
    taps = torch.exp(-0.5 * torch.arange(-3.0, 4.0) ** 2)
    taps = taps / taps.sum()
    masks = functional.conv2d(masks, taps.view(1, 1, 1, 7), padding=(0, 3))
    return functional.conv2d(masks, taps.view(1, 1, 7, 1), padding=(3, 0))


def _outline(masks: Tensor) -> Tensor:
    """Largest minus smallest value of each 3 x 3 neighbourhood."""
    return functional.max_pool2d(masks, 3, 1, 1) + functional.max_pool2d(-masks, 3, 1, 1)


@functools.cache
def _photos() -> tuple[Tensor, ...]:
    datasets = require("sklearn.datasets", "scikit-learn")
    photos = [torch.tensor(photo).permute(2, 0, 1)[None] for photo in datasets.load_sample_images().images]
    return tuple(functional.avg_pool2d(photo.float() / 255, 2)[0] for photo in photos)  # (3, H/2, W/2)


def _patches(count: int, rng: np.random.Generator) -> Tensor:
    """Random patches of scikit-learn's two photographs, shape ``(N, 3, S, S)``."""
    photos = _photos()
    which = rng.integers(len(photos), size=count)
    corner = rng.random((count, 2))
    patches = []
    for photo, (down, right) in zip((photos[i] for i in which), corner, strict=True):
        top, left = int(down * (photo.shape[1] - SIZE)), int(right * (photo.shape[2] - SIZE))
        patches.append(photo[:, top : top + SIZE, left : left + SIZE])
    return torch.stack(patches)


def _contrasting(ground: Tensor, rng: np.random.Generator) -> Tensor:
    """One colour per image: dark ones on a light ground, light ones on a dark ground."""
    colour = _uniform(rng, 0.0, 0.4, len(ground), 3, 1, 1)
    return torch.where(ground.mean((1, 2, 3), keepdim=True) > 0.5, colour, 1 - colour)


def clean(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """White on black."""
    return masks.expand(-1, 3, -1, -1)


def sign(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Coloured, over a patch of a photograph."""
    ground = _patches(len(masks), rng)
    return _blend(masks, _contrasting(ground, rng), ground)


def paper(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Dark on light paper, blurred."""
    ground, ink = (_uniform(rng, *bounds, len(masks), 3, 1, 1) for bounds in ((0.8, 1.0), (0.0, 0.3)))
    return _blend(_blur(masks), ink, ground)


def noisy(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """White on black under Gaussian noise of standard deviation 0.08."""
    noise = rng.standard_normal((len(masks), 3, SIZE, SIZE), dtype=np.float32)
    return (masks + 0.08 * torch.from_numpy(noise)).clamp(0, 1)


def edge(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """White outlines on black."""
    return _outline(masks).expand(-1, 3, -1, -1)


def generic(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Mix of styles for pretraining: blur, outline, photographs and inverted colours, each by chance."""
    lots = torch.from_numpy(rng.random((4, len(masks), 1, 1, 1)).astype(np.float32))
    masks = torch.where(lots[0] < 0.15, _outline(masks), torch.where(lots[1] < 0.3, _blur(masks), masks))
    images = torch.where(lots[2] < 0.35, sign(masks, rng), clean(masks, rng))
    return torch.where(lots[3] < 0.4, 1 - images, images)


STYLES: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    style.__name__: style for style in (clean, sign, paper, noisy, edge, generic)
}
