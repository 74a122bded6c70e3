"""Write a pool's task vectors into one file, to be read as mapped memory: see :mod:`adamerge.pool.packed`."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import drop_mapped_pages
from adamerge.checkpoints.writing import safetensors_header
from adamerge.errors import InputError
from adamerge.pool.describe import describe, describe_transform
from adamerge.pool.low_rank import matrix_shape
from adamerge.pool.packed import FORMAT, METADATA, SCALES
from adamerge.pool.pool import ExpertPool
from adamerge.pool.stacks import ALIGN, encode, takes_int8
from adamerge.system.files import atomic_path, check_space
from adamerge.system.finite import is_finite
from adamerge.transforms import Prepared

_BYTES = ALIGN * 4  # where stacks begin, as far as their sizes allow
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8)


def write_packed(
    pool: ExpertPool,
    path: Path | str,
    dtype: torch.dtype | None = None,
    transform: Any = None,
    on_parameter: Callable[[str], None] | None = None,
) -> Path:
    """Write a pool's task vectors, transformed as they are, as one safetensors file.

    Written tile by tile, so that no more than a few rows of one parameter are in memory, under a temporary name that
    replaces ``path`` when it is complete. Open it with ``ExpertPool.from_files(..., task_vectors=path)``.

    Args:
        pool: Any; LoRA experts are written in full.
        path: The file.
        dtype: float32, bfloat16, float16 or int8; default the pool's compute dtype.
        transform: For a pool that has none, applied while writing: in tiles where it is elementwise, else to one
            parameter at a time. A pool that streams its experts then never holds the result.
        on_parameter: Called with each name once it is written, for progress bars.

    Returns:
        The file.

    Raises:
        InputError: If the dtype is another, or too small for a task vector; if the pool is transformed already,
            or the transform leaves nothing of an expert.
    """
    path, dtype = Path(path), dtype or pool.compute_dtype
    if dtype not in _DTYPES:
        raise InputError(f"dtype: expected float32, bfloat16, float16 or int8, found {dtype}.")
    if transform is not None and (pool.transform is not None or pool.packed is not None):
        raise InputError(
            f"transform: expected a pool of raw experts, found one with {describe_transform(pool) or 'packed vectors'}."
        )
    prepared = None if transform is None else Prepared(transform, pool)
    header, offsets = _header(pool, dtype, describe_transform(pool) if transform is None else describe(transform))
    changed = torch.zeros(len(pool.expert_names), dtype=torch.bool)
    check_space(
        path, sum(math.prod(pool.shapes[n]) * len(changed) * _dtype_of(pool, n, dtype).itemsize for n in pool.names)
    )
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name in pool.names:
            kept = _dtype_of(pool, name, dtype)
            rows, width = matrix_shape(pool.shapes[name])
            for row, tile in _tiles(pool, name, prepared):
                changed |= (tile != 0).any(1)
                if kept == torch.int8:
                    codes, scales = encode(tile.unflatten(1, (-1, width)))
                    _write(file, codes.flatten(1), offsets[name], row * width, rows * width)
                    _write(file, scales, offsets[name + SCALES], row, rows)
                    continue
                values = tile.to(kept)
                if not is_finite(values):
                    raise InputError(f"dtype: {kept} overflows in the task vectors of {name!r}; use bfloat16.")
                _write(file, values, offsets[name], row * width, rows * width)
            if pool.mapped:
                drop_mapped_pages()
            if on_parameter is not None:
                on_parameter(name)
        if not changed.all():
            expert = pool.expert_names[int((~changed).nonzero()[0])]
            raise InputError(f"transform: {type(transform).__name__} leaves nothing of the task vector of {expert!r}.")
    return path


def _dtype_of(pool: ExpertPool, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that one parameter is written in."""
    return pool.compute_dtype if dtype == torch.int8 and not takes_int8(pool.shapes[name]) else dtype


def own_task_vectors(pool: ExpertPool, name: str) -> Tensor:
    """Return the task vectors of one parameter (E, *S), in memory of their own that a transform may overwrite."""
    task_vectors = pool.task_vectors(name)
    return task_vectors if pool.storage == "stream" else task_vectors.clone()


def _tiles(pool: ExpertPool, name: str, prepared: Prepared | None) -> Iterator[tuple[int, Tensor]]:
    """Yield a parameter's task vectors on the CPU in tiles (E, entries) of whole rows, and the first row of each."""
    if prepared is not None and not prepared.elementwise:
        yield 0, prepared(name, own_task_vectors(pool, name)).reshape(len(pool.expert_names), -1).cpu()
        return
    width = max(1, matrix_shape(pool.shapes[name])[1])
    for where, tile in pool.pieces(name, multiple=width):
        if prepared is not None:
            tile = prepared(name, tile.clone())  # the stored task vectors stay as they are
        yield where.start // width, tile.cpu()


def _write(file: BinaryIO, tile: Tensor, offset: int, first: int, entries: int) -> None:
    """Write columns from ``first`` of a stack (E, entries) that begins at ``offset``."""
    for expert, row in enumerate(tile.contiguous()):
        file.seek(offset + (expert * entries + first) * row.element_size())
        file.write(row.view(torch.uint8).numpy().data)


def _header(pool: ExpertPool, dtype: torch.dtype, transform: Any) -> tuple[bytes, dict[str, int]]:
    """Return the file's header, and where each tensor begins in the file.

    Tensors whose rows can all be aligned come first: tiles of those are used as they lie in the map.
    """
    experts = len(pool.expert_names)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in pool.shapes.items():
        kept = _dtype_of(pool, name, dtype)
        tensors[name] = ((experts, *shape), kept)
        if kept == torch.int8:
            tensors[name + SCALES] = ((experts, shape[0]), pool.compute_dtype)

    def order(name: str) -> tuple[bool, int]:
        shape, kept = tensors[name]
        return (math.prod(shape[1:]) * kept.itemsize) % _BYTES != 0, -kept.itemsize

    metadata = {METADATA: json.dumps(_facts(pool, dtype, transform))}
    return safetensors_header({name: tensors[name] for name in sorted(tensors, key=order)}, metadata, _BYTES)


def _facts(pool: ExpertPool, dtype: torch.dtype, transform: Any) -> dict[str, object]:
    reasons = {name: pool.skipped.get(pool.keys.file_key(name), "") for name in pool.fixed}
    unchanged = [name for name, reason in reasons.items() if reason.startswith(pool.UNCHANGED)]
    return {
        "format": FORMAT,
        "experts": list(pool.expert_names),
        "hashes": pool.hashes(),
        "keys": pool.keys_digest,
        "transform": transform,
        "dtype": str(dtype).removeprefix("torch."),
        "unchanged": unchanged,
    }
