"""Two small tasks of the demo zoo, as a user would have them: a pool's yaml, and folders of random images."""

from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

TASKS = ("mnist", "digits")
POOL = """
base: ${zoo:base.safetensors}
experts:
  mnist: ${zoo:experts/mnist.safetensors}
  digits: ${zoo:experts/digits.safetensors}
storage: ram
"""


def write_images(folder: Path, count: int = 2) -> None:
    """Write ``count`` random images for each of the ten classes of both tasks into ``images/TASK/CLASS``."""
    generator = torch.Generator().manual_seed(0)
    for task in TASKS:
        for label in range(10):
            for number in range(count):
                pixels = torch.randint(0, 256, (28, 28, 3), generator=generator, dtype=torch.uint8)
                path = folder / "images" / task / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.numpy()).save(path)


class Double:
    """An image as a tensor in double precision."""

    def __call__(self, image):
        return pil_to_tensor(image).double() / 255
