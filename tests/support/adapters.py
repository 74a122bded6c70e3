"""LoRA adapters in peft's format, written without peft."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    """Write an adapter's folder; the tensors' names lack peft's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {PREFIX + key: tensor.contiguous().clone() for key, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def random_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], rank: int = 2, seed: int = 0, **config) -> Path:
    """Write an adapter of random factors for weights (d, w), by their name without ``.weight``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, *rest) in shapes.items():
        ones = [1] * (len(rest) - 1)
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *rest, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, *ones, generator=generator)
    return write_adapter(folder, tensors, r=rank, **config)
