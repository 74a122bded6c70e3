"""Write the adapters and merged weights of this folder with peft: see README.md.

python tests/golden/lora_clip/make.py
"""

import shutil
from importlib.metadata import version
from pathlib import Path

import open_clip
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).parent
TOWER = {"width": 8, "layers": 2}  # as in ViT-S-32, both towers' blocks have the same names and shapes
VISION = {**TOWER, "image_size": 8, "patch_size": 4, "head_width": 4}
TEXT = {**TOWER, "context_length": 8, "vocab_size": 16, "heads": 2}
MLP = ["c_fc", "c_proj"]

# Name of the adapter to the part of the model that it is trained on, and its options.
ADAPTERS = {
    "visual": ("visual", {"target_modules": MLP, "modules_to_save": ["ln_post"]}),
    "blocks": ("visual", {"target_modules": MLP}),
    "both": ("", {"target_modules": MLP}),
    "text": ("", {"target_modules": r"transformer\..*c_fc"}),
    "wrapped": ("model", {"target_modules": r".*visual.*c_fc"}),
}


class Wrapper(nn.Module):
    """A model inside of another, as fine-tuning scripts have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def create() -> nn.Module:
    return open_clip.CLIP(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT)


def main() -> None:
    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in create().state_dict().items()}
    save_file(state, FOLDER / "base.safetensors")
    merged = {}
    for name, (part, options) in ADAPTERS.items():
        clip = create()
        clip.load_state_dict(state)
        trained = {"visual": clip.visual, "": clip, "model": Wrapper(clip)}[part]
        model = get_peft_model(trained, LoraConfig(r=2, lora_alpha=3, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # B starts at zero, and what is saved whole at the base's values
                    parameter.add_(0.1 * torch.randn_like(parameter))
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink(missing_ok=True)
        result = model.merge_and_unload().state_dict()
        start = {"visual": "visual.", "": "", "model": ""}[part]
        result = {start + key.removeprefix("model."): tensor for key, tensor in result.items()}
        merged |= {f"{name}.{key}": tensor for key, tensor in result.items() if not torch.equal(tensor, state[key])}
    save_file({key: tensor.contiguous() for key, tensor in merged.items()}, FOLDER / "merged.safetensors")
    for package in ("open_clip_torch", "peft", "torch"):
        print(package, version(package))
    for key in merged:
        print(key, tuple(merged[key].shape))


if __name__ == "__main__":
    main()
