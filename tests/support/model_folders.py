"""Tiny models of the transformers library in folders, made from configurations, with tokenizers made on the spot."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

VOCABULARY = 64
_WORDS = ("good", "bad", "a", "film", "the", "plot", "was", "is", "not", "very", "2", "3", "plus", "equals", "five")
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 1}


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "LlamaForCausalLM": lambda: t.LlamaConfig(**_GROUPED),
        "Qwen2ForCausalLM": lambda: t.Qwen2Config(
            **{**_GROUPED, "vocab_size": 260, "pad_token_id": None}, tie_word_embeddings=True
        ),
        "GPT2LMHeadModel": lambda: t.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=40, bos_token_id=1, eos_token_id=2
        ),
        "T5ForConditionalGeneration": lambda: t.T5Config(
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        ),
        "BertForSequenceClassification": lambda: t.BertConfig(**_TEXT),
        "BertForTokenClassification": lambda: t.BertConfig(**_TEXT),
        "BertModel": lambda: t.BertConfig(**_TEXT),
        "BertForMaskedLM": lambda: t.BertConfig(**_TEXT),
        **dict.fromkeys(
            ("DistilBertForMaskedLM", "DistilBertForSequenceClassification"),
            lambda: t.DistilBertConfig(
                dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=VOCABULARY, max_position_embeddings=40
            ),
        ),
        **dict.fromkeys(
            ("ModernBertModel", "ModernBertForSequenceClassification"),
            lambda: t.ModernBertConfig(**_TEXT, classifier_pooling="mean"),
        ),
        "ViTForImageClassification": lambda: t.ViTConfig(**_VISION),
        "SegformerForSemanticSegmentation": lambda: t.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        ),
        "LlavaForConditionalGeneration": lambda: t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**_VISION),
            text_config=t.LlamaConfig(**_GROUPED),
            image_token_index=5,
            vision_feature_layer=-1,
        ),
        "MixtralForCausalLM": lambda: t.MixtralConfig(**_GROUPED, num_local_experts=2, num_experts_per_tok=1),
    }


@cache
def new_model(name: str, seed: int = 0, **options: Any) -> Any:
    """Return a tiny model of a class by its name, with random weights, in eval mode."""
    import transformers

    torch.manual_seed(seed)
    config = _configs()[name]()
    for option, value in options.items():
        setattr(config, option, value)
    return getattr(transformers, name)(config).eval()


def save_tokenizer(folder: Path, words: Sequence[str] = _WORDS, **options: Any) -> Any:
    """Write a tokenizer of whole words into a folder, and return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[SEP]", "<image>", *words]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special: dict[str, Any] = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    special["additional_special_tokens"] = ["<image>"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, **options})
    fast.save_pretrained(folder)
    return fast


def save_qwen_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, as the library gives every Qwen its own class of tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)


def moved(tensors: Mapping[str, torch.Tensor], seed: int, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """Return tensors with noise, as an expert's fine-tuned from them; tied ones stay alike."""
    generator = torch.Generator().manual_seed(seed)
    noise: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            noise.setdefault(tensor.data_ptr(), torch.randn(tensor.shape, generator=generator) * scale)
    return {
        name: tensor + noise[tensor.data_ptr()] if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def save_model(model: Any, folder: Path, **tokenizer: Any) -> Path:
    """Write a model as the library does, and a tokenizer beside it."""
    model.save_pretrained(folder)
    if model.config.model_type == "qwen2":
        save_qwen_tokenizer(folder)
    else:
        save_tokenizer(folder, **tokenizer)
    return folder


def save_family(name: str, folder: Path, experts: Sequence[str] = ("one", "two")) -> dict[str, Path]:
    """Write a base and experts of one class; return the folders by name, ``base`` first."""
    import transformers

    base = new_model(name)
    folders = {"base": save_model(base, folder / "base")}
    for seed, expert in enumerate(experts, 1):
        tuned = getattr(transformers, name)(base.config).eval()
        tuned.load_state_dict(moved(base.state_dict(), seed))
        folders[expert] = save_model(tuned, folder / expert)
    return folders


def save_family_with_heads(
    base: str, expert: str, folder: Path, classes: tuple[int, int] = (2, 3)
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Write a base without the experts' heads, and two experts; return folders and experts."""
    bare = new_model(base)
    folders, tuned = {"base": save_model(bare, folder / "base")}, {}
    for seed, (name, count) in enumerate(zip(("one", "two"), classes, strict=True), 1):
        tuned[name] = new_model(expert, seed, num_labels=count)
        tuned[name].base_model.load_state_dict(moved(bare.base_model.state_dict(), seed), strict=False)
        folders[name] = save_model(tuned[name], folder / name)
    return folders, tuned


def save_file_of(module: nn.Module, path: Path) -> Path:
    """Write a module's tensors into one file, tied ones each."""
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, path, {"format": "pt"})
    return path


class Items:
    """A data set of texts, images, or images with texts, and labels.

    Args:
        kind: ``text``, ``image`` or ``both``.
        seed: Of what is in them.
        count: How many.
    """

    def __init__(self, kind: str, seed: int = 0, count: int = 12) -> None:
        self._kind, self._seed, self._count = kind, seed, count
        self.targets = [i % 2 for i in range(count)]
        self.classes = ["bad", "good"]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        generator = torch.Generator().manual_seed(1000 * self._seed + index)
        words = torch.randint(len(_WORDS), (2 + index % 5,), generator=generator)
        text = " ".join(_WORDS[int(word)] for word in words)
        colours = torch.randint(256, (24, 24, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(colours.numpy())
        items = {"text": text, "image": image, "both": {"image": image, "text": f"<image> {text}"}}
        return items[self._kind], self.targets[index]


def save_processor(name: str, folder: Path) -> None:
    """Write the image processor, or the processor, of a tiny model."""
    import transformers as t

    if name.startswith("Segformer"):
        t.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return
    size = {"height": 16, "width": 16}
    images = t.ViTImageProcessor(size=size)
    if name.startswith("Llava"):
        tokenizer = save_tokenizer(folder)
        options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        t.LlavaProcessor(image_processor=images, tokenizer=tokenizer, **options).save_pretrained(folder)
    else:
        images.save_pretrained(folder)
