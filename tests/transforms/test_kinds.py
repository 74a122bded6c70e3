"""Kinds of tensors, on the real names of the families that are merged most."""

import re
from collections import defaultdict

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers

from adamerge.transforms.kinds import is_skipped, kind_of

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {**SMALL, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {**SMALL, "image_size": 32, "patch_size": 16}


def clip_of_hugging_face():
    config = transformers.CLIPConfig(text_config={**TEXT, "projection_dim": 4}, vision_config=IMAGES, projection_dim=4)
    return transformers.CLIPModel(config)


def clip_of_open_clip(layers):
    vision = open_clip.CLIPVisionCfg(layers=layers, width=64, patch_size=16, image_size=32)
    return open_clip.CLIP(8, vision, open_clip.CLIPTextCfg(5, 20, width=64, heads=1, layers=1))


MODELS = {
    "bert": lambda: transformers.BertForPreTraining(transformers.BertConfig(**TEXT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "llama classifier": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TEXT)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, num_layers=1, num_heads=2, d_ff=16)
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES)),
    "clip of transformers": clip_of_hugging_face,
    "clip of open_clip": lambda: clip_of_open_clip(1),
    "clip with a ResNet": lambda: clip_of_open_clip([1, 1, 1, 1]),
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=1),
    "timm deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1),
    "timm siglip": lambda: timm.create_model("vit_base_patch16_siglip_224", depth=1),
    "timm swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    "timm resnet": lambda: timm.create_model("resnet18"),
    "timm convnext": lambda: timm.create_model("convnext_atto"),
    "torchvision vit": torchvision.models.vit_b_32,
    "torchvision resnet": torchvision.models.resnet18,
    "torchvision swin": torchvision.models.swin_t,
    "torchvision efficientnet": torchvision.models.efficientnet_b0,
}

# All that is embedding, position, head or projection; N for numbers.
SPECIAL = {
    "bert": {
        "embedding": {"bert.embeddings.word_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"},
        "position": {"bert.embeddings.position_embeddings.weight"},
        "head": {"cls.predictions.transform.dense.weight", "cls.predictions.decoder.weight",
                 "cls.seq_relationship.weight"},
    },
    "roberta": {
        "embedding": {"roberta.embeddings.word_embeddings.weight", "roberta.embeddings.token_type_embeddings.weight"},
        "position": {"roberta.embeddings.position_embeddings.weight"},
        "head": {"classifier.dense.weight", "classifier.out_proj.weight"},
    },
    "llama": {"embedding": {"model.embed_tokens.weight"}, "head": {"lm_head.weight"}},
    "llama classifier": {"embedding": {"model.embed_tokens.weight"}, "head": {"score.weight"}},
    "gpt2": {"embedding": {"transformer.wte.weight"}, "position": {"transformer.wpe.weight"},
             "head": {"lm_head.weight"}},
    "t5": {
        "embedding": {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"},
        "position": {f"{part}.block.N.layer.N.SelfAttention.relative_attention_bias.weight"
                     for part in ("encoder", "decoder")},
        "head": {"lm_head.weight"},
    },
    "vit": {"embedding": {"vit.embeddings.cls_token"}, "position": {"vit.embeddings.position_embeddings"},
            "head": {"classifier.weight"}},
    "clip of transformers": {
        "embedding": {"text_model.embeddings.token_embedding.weight", "vision_model.embeddings.class_embedding"},
        "position": {f"{tower}_model.embeddings.position_embedding.weight" for tower in ("text", "vision")},
        "projection": {"text_projection.weight", "visual_projection.weight"},
    },
    "clip of open_clip": {
        "embedding": {"token_embedding.weight", "visual.class_embedding"},
        "position": {"positional_embedding", "visual.positional_embedding"},
        "projection": {"text_projection", "visual.proj"},
    },
    "clip with a ResNet": {
        "embedding": {"token_embedding.weight"},
        "position": {"positional_embedding", "visual.attnpool.positional_embedding"},
        "projection": {"text_projection"},
    },
    "timm vit": {"embedding": {"cls_token"}, "position": {"pos_embed"}, "head": {"head.weight"}},
    "timm deit": {"embedding": {"cls_token", "dist_token"}, "position": {"pos_embed"},
                  "head": {"head.weight", "head_dist.weight"}},
    "timm siglip": {"position": {"pos_embed"}},
    "timm swin": {"position": {"layers.N.blocks.N.attn.relative_position_bias_table"}, "head": {"head.fc.weight"}},
    "timm resnet": {"head": {"fc.weight"}},
    "timm convnext": {"head": {"head.fc.weight"}},
    "torchvision vit": {"embedding": {"class_token"}, "position": {"encoder.pos_embedding"},
                        "head": {"heads.head.weight"}},
    "torchvision resnet": {"head": {"fc.weight"}},
    "torchvision swin": {"position": {"features.N.N.attn.relative_position_bias_table"}, "head": {"head.weight"}},
    "torchvision efficientnet": {"head": {"classifier.N.weight"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes():
    """Names and shapes of each model's parameters."""
    with torch.device("meta"):
        return {
            name: {key: tuple(p.shape) for key, p in make().named_parameters(remove_duplicate=False)}
            for name, make in MODELS.items()
        }


@pytest.mark.parametrize("family", MODELS)
def test_kinds_of_real_models(shapes, family):
    found = defaultdict(set)
    for name, shape in shapes[family].items():
        kind = kind_of(name, shape)
        found[kind].add(re.sub(r"(?<=[._])\d+", "N", name))
        if kind in ("matrix", "head", "projection"):
            assert len(shape) == 2, name
        if kind in ("norm", "vector"):
            assert len(shape) < 2, name
        if kind == "convolution":
            assert len(shape) == 4, name
    special = {kind: names for kind, names in found.items() if kind in ("embedding", "position", "head", "projection")}
    assert special == SPECIAL[family]


@pytest.mark.parametrize("family", MODELS)
def test_norms_are_those_of_the_modules(family):
    with torch.device("meta"):
        model = MODELS[family]()
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                is_named = not re.search(r"\d\.bias$", name) or "norm" in name or "ln_" in name or "bn" in name
                assert kind_of(name, parameter.shape) == ("norm" if is_named else "vector"), name


def test_skip_takes_kinds_and_globs():
    assert is_skipped("wte.weight", (5, 3), ["embedding"])
    assert is_skipped("text_projection", (5, 3), ["head", "*text_projection*"])
    assert not is_skipped("visual.proj", (5, 3), ["head", "*text_projection*"])
