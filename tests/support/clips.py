"""Small CLIP models of both libraries, randomly initialised: the same architecture in each."""

import json
import logging

import open_clip
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel
from transformers import logging as transformers_logging

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
TEXTS = torch.tensor([[48, 3, 7, 49, 0, 0, 0, 0], [48, 9, 30, 2, 11, 49, 0, 0]])  # ends are the highest token
SHARED = {"num_hidden_layers": 2, "hidden_act": "quick_gelu"}
CONFIG = {
    "projection_dim": 24,
    "vision_config": {
        **SHARED, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    },
    "text_config": {
        **SHARED, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "vocab_size": 50,
        "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
    },
}  # fmt: skip
# The same in open_clip's words.
MODEL_CFG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16, "mlp_ratio": 2.0},
    "text_cfg": {
        "context_length": 8, "vocab_size": 50, "width": 48, "heads": 3, "layers": 2, "mlp_ratio": 2.0,
    },
}  # fmt: skip
PREPROCESS_CFG = {
    "size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest",
}  # fmt: skip
OPEN_CLIP = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Fill every parameter, as zeros and ones left by an initialisation would hide a wrong map."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(1.0 if name.endswith(("norm1.weight", "ln_1.weight")) else 0.0, 0.2)
    return model.eval()


def shaped(name: str, activation: str) -> dict:
    """Return a small configuration with the patches, heads and proportions of one of OpenAI's models."""
    image, patch, layers, vision, text, embed = {
        "B-32": (64, 32, 2, 128, 64, 64), "B-16": (64, 16, 2, 128, 64, 64), "L-14": (56, 14, 4, 192, 128, 96),
    }[name]  # fmt: skip
    shared = {"hidden_act": activation, "num_hidden_layers": layers}
    ends = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    return {
        "projection_dim": embed,
        "vision_config": {
            **shared, "hidden_size": vision, "intermediate_size": 4 * vision, "num_attention_heads": vision // 64,
            "image_size": image, "patch_size": patch,
        },
        "text_config": {
            **shared, "hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": text // 64,
            "vocab_size": 50, "max_position_embeddings": 8, **ends,
        },
    }  # fmt: skip


def hugging_face(seed: int = 0, config: dict = CONFIG) -> CLIPModel:
    """Return transformers' CLIPModel."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomized(CLIPModel(CLIPConfig(**config)))


def open_clip_folder(folder, tensors=None):
    """Make the folder of open_clip's model, with weights if they are given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    if tensors is not None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "open_clip_model.safetensors")
    return folder


def random_open_clip(name: str, **options: object) -> torch.nn.Module:
    """Make a model without weights, of which open_clip warns."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return open_clip.create_model(name, load_weights=False, pretrained_text=False, **options)
    finally:
        logger.setLevel(level)


def open_clip_model(folder, seed: int = 0) -> torch.nn.Module:
    """Return open_clip's model of a folder, randomly initialised."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomized(random_open_clip(f"local-dir:{folder}"))


@torch.no_grad()
def logits_of_hugging_face(model: CLIPModel, images: torch.Tensor, texts: torch.Tensor = TEXTS) -> torch.Tensor:
    return model(input_ids=texts, pixel_values=images).logits_per_image


@torch.no_grad()
def logits_of_open_clip(model: torch.nn.Module, images: torch.Tensor, texts: torch.Tensor = TEXTS) -> torch.Tensor:
    return model.get_logits(images, texts)[0]


def write_benchmark_clip(folder, names, monkeypatch):
    """Write a tiny CLIP that takes open_clip's own tokenizer: its folder, a base, and an expert for each name."""
    text = {**OPEN_CLIP["model_cfg"]["text_cfg"], "vocab_size": 49408}
    monkeypatch.setitem(OPEN_CLIP, "model_cfg", {**OPEN_CLIP["model_cfg"], "text_cfg": text})
    model = open_clip_model(open_clip_folder(folder / "model"))
    base = {key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()}
    save_file(base, folder / "base.safetensors")
    for name in names:
        moved = {
            key: value + 0.01 * torch.randn_like(value) for key, value in base.items() if key.startswith("visual.")
        }
        save_file({**base, **moved}, folder / f"{name}.safetensors")
