"""Hugging Face's folder: what ``CLIPModel.from_pretrained`` and ``CLIPProcessor.from_pretrained`` load."""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.backbones import OpenClip
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.clip_configs import to_hugging_face
from adamerge.checkpoints.clip_names import as_theirs
from adamerge.checkpoints.writing import save_state_dict
from adamerge.errors import InputError
from adamerge.results.formats.merged import MergedFolder, Usage, check_equal, describe, example
from adamerge.results.formats.open_clip import sidecar_of, tokenizer_notes
from adamerge.system.files import atomic_path, save_json

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_VOCABULARY = 49408  # of OpenAI's byte-pair encoding, which both libraries ship


def write(merged: MergedFolder, folder: Path) -> Usage:
    """Write configuration, weights, image processor, and OpenAI's tokenizer where the model uses that.

    Raises:
        InputError: If the merge is no CLIP that Hugging Face's can hold, with what has no place there.
    """
    sidecar = sidecar_of(merged.backbone, "hf")
    files = write_model(merged.checkpoint, sidecar, describe(merged.backbone), folder)
    has_own_tokenizer = isinstance(merged.backbone, OpenClip) and merged.backbone.tokenizer is not None
    has_tokenizer = not has_own_tokenizer and write_tokenizer(sidecar, folder)
    if has_tokenizer:
        files["vocab.json, merges.txt, tokenizer_config.json"] = "OpenAI's tokenizer, as open_clip ships it"
    notes = tokenizer_notes(merged.backbone)
    if not has_tokenizer and not notes:
        notes = ("The tokenizer is not OpenAI's, and not part of this folder: take the base's.",)
    options = {"has_tokenizer": has_tokenizer}
    return Usage("transformers", "zero-shot-image-classification", files, sidecar["preprocess_cfg"], notes, options)


def write_model(checkpoint: Checkpoint, sidecar: Mapping[str, Any], where: str, folder: Path) -> dict[str, str]:
    """Write configuration, weights and image processor of an open_clip model.

    Args:
        checkpoint: Its weights, both towers.
        sidecar: The content of ``open_clip_config.json``.
        where: What messages call the model.
        folder: Where to write.

    Returns:
        File name to what it holds.

    Raises:
        InputError: If Hugging Face's CLIP cannot hold it.
    """
    content, preprocessor = to_hugging_face(sidecar, where)
    missing = [key for key in ("token_embedding.weight", "text_projection") if key not in set(checkpoint.keys)]
    if missing:
        raise InputError(
            f"{checkpoint.name}: expected both towers of a CLIP, found no {missing[0]!r}. Export to onnx instead."
        )
    seen = as_theirs(checkpoint)
    tensors = {key: seen.get(key) for key in seen.keys}
    dtype = str(tensors["visual_projection.weight"].dtype).removeprefix("torch.")
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "dtype": dtype, **content}
    save_json(config, folder / "config.json")
    save_json({**preprocessor, "processor_class": "CLIPProcessor"}, folder / "preprocessor_config.json")
    save_state_dict(tensors, folder / WEIGHTS)
    return {
        WEIGHTS: "the weights, both towers",
        "config.json": "the architecture",
        "preprocessor_config.json": "what images go through",
    }


def write_tokenizer(sidecar: Mapping[str, Any], folder: Path) -> bool:
    """Write OpenAI's tokenizer in Hugging Face's files, if it is the model's; return whether it is."""
    text = sidecar["model_cfg"]["text_cfg"]
    if text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs") or text.get("vocab_size") != _VOCABULARY:
        return False
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    renamed = dict(zip(tokenizer.all_special_ids, (_START, _END), strict=True))
    vocabulary = {renamed.get(number, token): number for token, number in tokenizer.encoder.items()}
    save_json(vocabulary, folder / "vocab.json")
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    with atomic_path(folder / "merges.txt") as temporary:
        temporary.write_text("\n".join(["#version: 0.2", *map(" ".join, pairs), ""]), encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    length = text.get("context_length", 77)
    classes = {"tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPProcessor", "model_max_length": length}
    save_json({**classes, **special}, folder / "tokenizer_config.json")
    save_json(special, folder / "special_tokens_map.json")
    return True


def prove(merged: MergedFolder, folder: Path) -> None:
    """Load the folder in transformers, and compare logits of images and texts.

    Raises:
        GuardError: If they differ.
    """
    assert isinstance(merged.backbone, OpenClip)
    prove_model(merged.backbone, merged.checkpoint, folder)


def prove_model(backbone: OpenClip, checkpoint: Checkpoint, folder: Path) -> None:
    """Compare the logits of a folder, loaded in transformers, with those of an open_clip model; without it, say so.

    Args:
        backbone: The open_clip model.
        checkpoint: Its weights.
        folder: Hugging Face's.

    Raises:
        GuardError: If they differ.
    """
    original = backbone.whole({key: checkpoint.get(key) for key in checkpoint.keys})
    if importlib.util.find_spec("transformers") is None:
        log.warning(
            'transformers is not installed, so %s was not loaded back: pip install "adamerge[hf]".', folder.name
        )
        return
    from transformers import CLIPModel

    with _without_progress():
        model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.eval()
    texts = _random_texts(backbone.sidecar()["model_cfg"]["text_cfg"])
    images = example(backbone, 2)
    with torch.no_grad():
        expected = original.get_logits(images, texts)[0]
        logits = model(input_ids=texts, pixel_values=images).logits_per_image
    check_equal(logits, expected, f"{folder.name} in transformers")


@contextmanager
def _without_progress() -> Iterator[None]:
    """Silence transformers' bar for the loading of weights."""
    from transformers.utils import logging as told

    shown = told.is_progress_bar_enabled()
    told.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            told.enable_progress_bar()


def _random_texts(text: Mapping[str, Any]) -> Tensor:
    """Return token ids (3, context length); a text ends at its highest token, in both libraries."""
    length, vocabulary = text.get("context_length", 77), text.get("vocab_size", _VOCABULARY)
    texts = torch.randint(1, vocabulary - 1, (3, length), generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((length // 2, length - 1, 2)):
        texts[row, end] = vocabulary - 1
        texts[row, end + 1 :] = 0
    return texts
