"""Write the adapters and merged weights of this folder with peft: see README.md.

python tests/golden/lora/make.py
"""

import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

FOLDER = Path(__file__).parent


class Network(nn.Module):
    """One layer of each kind that LoRA adapts, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(2, 4, 3)
        self.attn = nn.MultiheadAttention(6, 2)
        self.turned = Conv1D(6, 6)  # weight (in, out), square
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


# Name of the adapter to its options; every option of the reader is in one of them.
ADAPTERS = {
    "plain": {"target_modules": ["up", "down"], "r": 2, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["up", "down", "conv"],
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {"up": 3, "^conv": 1},
        "alpha_pattern": {"down": 5},
    },
    "kinds": {"target_modules": ["embed", "attn", "conv"], "r": 2, "lora_alpha": 2, "modules_to_save": ["fc"]},
    "biases": {"target_modules": ["up"], "r": 1, "lora_alpha": 2, "bias": "all"},
    "turned": {"target_modules": ["turned"], "r": 2, "lora_alpha": 2, "fan_in_fan_out": True},
    "lora_bias": {"target_modules": ["down"], "r": 1, "lora_alpha": 2, "lora_bias": True},
}


def main() -> None:
    torch.manual_seed(0)
    base = Network()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    save_file(state, FOLDER / "base.safetensors")
    merged = {}
    for name, options in ADAPTERS.items():
        network = Network()
        network.load_state_dict(state)
        model = get_peft_model(network, LoraConfig(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # B starts at zero, and what is saved whole at the base's values
                    parameter.add_(0.1 * torch.randn_like(parameter))
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink(missing_ok=True)
        result = model.merge_and_unload().state_dict()
        merged |= {f"{name}.{key}": tensor for key, tensor in result.items() if not torch.equal(tensor, state[key])}
    save_file({key: tensor.contiguous() for key, tensor in merged.items()}, FOLDER / "merged.safetensors")
    for package in ("peft", "torch", "transformers"):
        print(package, version(package))
    for key in merged:
        print(key, tuple(merged[key].shape))


if __name__ == "__main__":
    main()
