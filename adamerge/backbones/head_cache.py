"""Zero-shot heads, kept in a folder from run to run.

One file per head, named by a hash of everything that decides it: the model's configuration, the weights of its text
tower, the token ids of its prompts (so the tokenizer, the class names and the templates), and the versions of torch and
open_clip. A head of anything else has another name.
"""

import logging
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from adamerge.checkpoints.hashes import digest
from adamerge.checkpoints.tensor_cache import TensorCache
from adamerge.errors import InputError
from adamerge.system.files import ensure_writable


def open_head_cache(option: str | bool) -> TensorCache | None:
    """Return the cache that the option ``head_cache`` names, None for ``off``.

    Args:
        option: ``off``, a folder, or ``auto``: ``adamerge/heads`` in the user's cache folder (``XDG_CACHE_HOME``, else
            ``~/.cache``), left alone where it cannot be written to.

    Raises:
        InputError: If the option is another, or the folder cannot be written to.
    """
    if option is False or option == "off":  # what a yaml file reads from a bare off
        return None
    if not isinstance(option, str) or not option:
        raise InputError(f"backbone.head_cache: expected auto, off or a folder, found {option!r}.")
    if option == "auto":
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return TensorCache("head", Path(home) / "adamerge" / "heads", logging.DEBUG)
    ensure_writable(Path(option))
    return TensorCache("head", Path(option))


def head_key(content: Mapping[str, Any]) -> str:
    """Hash what decides a head, texts, numbers and tensors, nested at will, with the versions that compute it."""
    versions = {name: metadata.version(name) for name in ("torch", "open_clip_torch")}
    return digest({"versions": versions, **content})[:40]
