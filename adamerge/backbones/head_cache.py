"""Zero-shot heads, kept in a folder from run to run.

One safetensors file per head, named by a hash of everything that decides it: the model's configuration, the weights of
its text tower, the token ids of its prompts (so the tokenizer, the class names and the templates), and the versions of
torch and open_clip. A head of anything else has another name, and every file can be deleted at any time.
"""

import json
import logging
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from adamerge.checkpoints.checkpoint import SafetensorsCheckpoint, save_state_dict
from adamerge.checkpoints.hashes import digest
from adamerge.errors import InputError
from adamerge.system.files import ensure_writable

log = logging.getLogger(__name__)

_SUM = "adamerge_head"  # metadata: the checksum of the tensors
_FACTS = "adamerge_prompts"  # metadata: for people who look into the file


class HeadCache:
    """A folder of heads, which several processes may share.

    Args:
        folder: Made if needed; None: ``adamerge/heads`` in the user's cache folder (``XDG_CACHE_HOME``, else
            ``~/.cache``), left alone where it cannot be written to.

    Raises:
        InputError: If a folder that was given cannot be written to.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        if folder is None:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            self.folder = Path(home) / "adamerge" / "heads"
        else:
            self.folder = Path(folder)
            ensure_writable(self.folder)

    def path(self, decisive: Mapping[str, Any]) -> Path:
        """Return the file of the head that these things decide: texts, numbers, tensors, nested at will."""
        versions = {name: metadata.version(name) for name in ("torch", "open_clip_torch")}
        return self.folder / f"{digest({'versions': versions, **decisive})[:40]}.safetensors"

    def get(self, path: Path) -> tuple[Tensor, Tensor] | None:
        """Return weight (F, C) and scale () of a head; None where no file is or, with a warning, a damaged one."""
        if not path.is_file():
            return None
        try:
            file = SafetensorsCheckpoint(path)
            tensors = {key: file.get(key).clone() for key in file.keys}  # a copy: the file may be replaced or deleted
            with safe_open(path, framework="pt") as opened:
                expected = (opened.metadata() or {}).get(_SUM)
            if digest(tensors) != expected:
                raise InputError(f"{path}: the content is not what was written.")
            return tensors["weight"], tensors["scale"]
        except (InputError, OSError, KeyError) as error:
            log.warning("head_cache: a damaged file is made anew (%s)", " ".join(str(error).split()))
            return None

    def put(self, path: Path, weight: Tensor, scale: Tensor, facts: Mapping[str, Any]) -> None:
        """Write a head, atomically; where that fails the run goes on without."""
        tensors = {"weight": weight.detach().contiguous(), "scale": scale.detach()}
        about = {_SUM: digest(tensors), _FACTS: json.dumps(dict(facts), ensure_ascii=False)}
        try:
            save_state_dict(tensors, path, about)
        except OSError as error:
            log.debug("head_cache: %s cannot be written (%s)", path, error.strerror or error)


def chosen(option: str | bool) -> HeadCache | None:
    """Return the cache that the option ``head_cache`` names: ``auto``, ``off`` (None), or a folder.

    Raises:
        InputError: If it names something else, or a folder that cannot be written to.
    """
    if option is False or option == "off":  # what a yaml file reads from a bare off
        return None
    if not isinstance(option, str) or not option:
        raise InputError(f"backbone.head_cache: expected auto, off or a folder, found {option!r}.")
    return HeadCache(None if option == "auto" else option)
