"""The text side of open_clip's models, where a folder describes it: no code that lies there, or on the Hub, is run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge.errors import InputError
from adamerge.system.reading import check_texts


def tokenizer_of(name: str, folder: Path | None, config: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    """Return open_clip's tokenizer for a model.

    Args:
        name: The model's, in open_clip.
        folder: Where its files are; None for a model that open_clip knows.
        config: The content of its ``open_clip_config.json``, checked.

    Raises:
        InputError: If it cannot be read, or needs code of its own.
    """
    import open_clip

    is_library = bool(config["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name"))
    if folder is not None:
        check_texts(folder)
    try:
        options = {"trust_remote_code": False} if is_library else {}
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name, **options)
    except Exception as error:  # whatever the library makes of files that are not its own
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"backbone.model={name}: no tokenizer that can be read ({reason}).") from error
    return tokenizer


def check_text_tower(config: Mapping[str, Any]) -> None:
    """Refuse a text tower of transformers that needs code of its own, for which open_clip would ask.

    Raises:
        OSError: If there is no such model.
        ValueError: If it needs code.
    """
    name = config["model_cfg"].get("text_cfg", {}).get("hf_model_name")
    if name:
        from transformers import AutoConfig

        AutoConfig.from_pretrained(str(name), trust_remote_code=False)
