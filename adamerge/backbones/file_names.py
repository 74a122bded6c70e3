"""What the tensors of a pool's files are in a network: the same names, or behind another prefix."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from adamerge.backbones.networks import library_names
from adamerge.checkpoints.checkpoint import open_checkpoint
from adamerge.checkpoints.composed import renamed_by_prefix
from adamerge.checkpoints.hub import located
from adamerge.checkpoints.model_folder import find_model
from adamerge.errors import InputError

_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_PREFIX = "base_model.model."


@dataclass(frozen=True)
class FileNames:
    """The tensors of one file.

    Attributes:
        names: Key in the file to name in the network, of those that the network has.
        shapes: Name in the network to shape in the file.
        others: Keys that the network has not.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    others: tuple[str, ...]


def file_names(place: Any, network: nn.Module, wanted: Collection[str]) -> FileNames:
    """Read the header of a pool's file; of a LoRA adapter the tensors that it replaces.

    Args:
        place: A path, a reference to the Hub, or a pool's entry with the key ``file``.
        network: Of the transformers library.
        wanted: The names of its parameters and buffers.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no checkpoint.
    """
    path = path_of(place)
    if (path / _ADAPTER).is_file():
        files = [path / name for name in _ADAPTER_WEIGHTS if (path / name).is_file()]
        checkpoint: Any = open_checkpoint(files[0] if files else path / _ADAPTER_WEIGHTS[0])
        plain = {
            key: key.removeprefix(_ADAPTER_PREFIX)
            .replace(".modules_to_save.default", "")
            .replace(".modules_to_save", "")
            for key in checkpoint.keys
        }
    else:
        checkpoint = find_model(path, lambda _: True).checkpoint
        plain = {key: key for key in checkpoint.keys}
    renamed = network_names(network, list(plain.values()), wanted)
    names = {key: renamed[name] for key, name in plain.items() if renamed[name] in wanted}
    shapes = {name: checkpoint.spec(key)[0] for key, name in names.items()}
    return FileNames(names, shapes, tuple(key for key in checkpoint.keys if key not in names))


def network_names(network: nn.Module, keys: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Return what each of a file's tensors is in a network: as the library renames it, or behind another prefix."""
    library = library_names(network, keys)
    by_prefix = renamed_by_prefix(list(library.values()), wanted)
    return {key: by_prefix[name] for key, name in library.items()}


def path_of(place: Any) -> Path:
    """Return where a pool's entry is."""
    return located(place["file"] if isinstance(place, Mapping) else place)


def check_vocabularies(embeddings: Collection[str], base: FileNames, experts: Mapping[str, FileNames]) -> None:
    """Refuse experts with another number of tokens than the base.

    Args:
        embeddings: The parameters with one row per token, by the network's names.
        base: The base's file.
        experts: Those of the experts, by name.

    Raises:
        InputError: If one has.
    """
    for expert, file in experts.items():
        for name in embeddings:
            of_base, own = base.shapes.get(name), file.shapes.get(name)
            if of_base and own and own[1:] == of_base[1:] and own != of_base:
                raise InputError(
                    f"Expert {expert!r}: {name}: {own[0]} tokens, but the base has {of_base[0]}. Share rows of common "
                    "tokens and take further ones from this expert: backbone.vocabulary=shared."
                )
