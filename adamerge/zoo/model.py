"""The folders of zoos, and the demo zoo's architecture, a very small CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge.system.reading import read_json_mapping
from adamerge.zoo.tokenizer import CONTEXT_LENGTH

if TYPE_CHECKING:
    from open_clip import CLIP

CONFIG_FILE = "open_clip_config.json"
BENCHMARK = "offline_benchmark"
_FILES = Path(__file__).resolve().parent / "files"


def files() -> Path:
    """Return the folder of the zoo that ships with this package.

    It holds ``base.safetensors``, ``experts/<task>.safetensors``, ``open_clip_config.json`` and ``zoo.json``.

    Raises:
        FileNotFoundError: If this installation lacks those files.
    """
    if not (_FILES / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"The demo zoo is missing from this installation: no {CONFIG_FILE} in {_FILES}. "
            "Reinstall adamerge, or make it: adamerge zoo build."
        )
    return _FILES


def benchmark_folder(root: str | Path) -> Path:
    """Return where the zoo of the offline benchmark is: a folder below that of the data sets."""
    return Path(root) / BENCHMARK


def clip_config(embed_dim: int, width: int, layers: int, head_width: int, vocabulary: int) -> dict[str, Any]:
    """Return the architecture and preprocessing of a small CLIP in open_clip's own file format.

    Args:
        embed_dim: Features of both towers.
        width: Width of the image tower.
        layers: Layers of the image tower.
        head_width: Width of the image tower's attention heads.
        vocabulary: Number of token ids.
    """
    vision = {"image_size": 28, "patch_size": 7, "width": width, "layers": layers, "head_width": head_width}
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocabulary, "width": 64, "heads": 2, "layers": 2}
    return {
        "model_cfg": {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"size": 28, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3},
    }


def model_from_config(config: Mapping[str, Any]) -> CLIP:
    """Build an open_clip model with fresh weights from the ``model_cfg`` of ``config``."""
    import open_clip  # imports slowly

    return open_clip.CLIP(**config["model_cfg"])


def create_model(folder: str | Path | None = None) -> CLIP:
    """Build the zoo's open_clip model, without its weights.

    Args:
        folder: Folder of a zoo; ``files()`` if not given.

    Returns:
        A model with random weights, in training mode, on the CPU.

    Raises:
        FileNotFoundError: If the folder has no ``open_clip_config.json``.
    """
    path = (files() if folder is None else Path(folder)) / CONFIG_FILE
    return model_from_config(read_json_mapping(path))
