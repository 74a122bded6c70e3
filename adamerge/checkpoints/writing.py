"""Tensors to files: written one at a time, each proved by reading it back."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import DTYPES
from adamerge.errors import InputError, shorten
from adamerge.system.files import atomic_path, check_space

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name to shape and dtype
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 1 << 22  # bytes that are written and read back at a time


def save_state_dict(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; the same tensors and metadata give the same bytes.

    Args:
        tensors: Name to tensor; those that share memory are written each.
        path: The file; an existing one is replaced only once the new one is complete.
        metadata: Strings for the file's header.

    Raises:
        InputError, OSError, RuntimeError: See :func:`save_tensors`.
    """
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    save_tensors(specs, tensors.items(), path, metadata)


def save_tensors(
    specs: Specs, tensors: Iterable[tuple[str, Tensor]], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as they come, none of which is kept; otherwise as :func:`save_state_dict` does.

    Args:
        specs: Name to shape and dtype, of all.
        tensors: Name and tensor, each once, in any order.
        path: The file.
        metadata: Strings for the file's header.

    Raises:
        InputError: If the format, as it is read here, has no place for a dtype, or a tensor is none of ``specs``.
        OSError: If the disk has no room, or the file cannot be written; an earlier one is then still there.
        RuntimeError: If what is read back differs from what was written.
    """
    order = list(DTYPES.values())
    if others := [name for name, (_, dtype) in specs.items() if dtype not in order]:
        raise InputError(f"{path}: {shorten(others)}: {specs[others[0]][1]} has no place in the file.")
    names = sorted(specs, key=lambda name: (-order.index(specs[name][1]), name))
    header, begins = safetensors_header({name: specs[name] for name in names}, metadata)
    check_space(path, len(header) + sum(map(nbytes, specs.values())))
    with atomic_path(path) as temporary, temporary.open("w+b") as file:
        file.write(header)
        for name, tensor in tensors:
            if (tuple(tensor.shape), tensor.dtype) != specs.get(name):
                expected = specs.get(name, "no such tensor")
                raise InputError(f"{path}: {name!r}: expected {expected}, found {tuple(tensor.shape)}, {tensor.dtype}.")
            begin, flat = begins.pop(name), tensor.detach().cpu().contiguous().reshape(-1)
            for piece in flat.view(torch.uint8).split(_PIECE):
                data = piece.numpy().data
                file.seek(begin)
                file.write(data)
                if not _is_written(file, begin, data):
                    raise RuntimeError(f"{path}: the tensor {name!r} is read back differently. Is the disk sound?")
                begin += len(data)
        if begins:
            raise InputError(f"{path}: expected a tensor {shorten(begins)} too, which did not come.")


def nbytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Return the size of a tensor of a shape and dtype."""
    return math.prod(spec[0]) * spec[1].itemsize


def _is_written(file: BinaryIO, begin: int, data: memoryview) -> bool:
    """Return whether a file has these bytes from ``begin``."""
    file.seek(begin)
    return file.read(len(data)) == bytes(data)


def safetensors_header(
    specs: Specs, metadata: Mapping[str, str] | None = None, align: int = 8
) -> tuple[bytes, dict[str, int]]:
    """Return what a safetensors file begins with, and where each tensor begins in the file.

    Args:
        specs: Name to shape and dtype, in the order of the file.
        metadata: Strings besides ``format``, without which transformers refuses a file.
        align: Bytes of which the first tensor begins at a multiple.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begins, end = {}, 0
    for name, spec in specs.items():
        begins[name], end = end, end + nbytes(spec)
        entries[name] = {"dtype": _NAMES[spec[1]], "shape": list(spec[0]), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in begins.items()}
