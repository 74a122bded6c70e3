"""Folders of ``torch.distributed.checkpoint``, written by any number of processes, read tensor by tensor.

The library unpickles such a folder's ``.metadata``, which can run code; here it is read as all pickles are
(:mod:`adamerge.checkpoints.pickles`), and so are the tensors in the files that it names.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.composed import check_parts, tell_once
from adamerge.checkpoints.hashes import file_hash
from adamerge.checkpoints.inert import Record, is_whole
from adamerge.checkpoints.pickles import mapped_file, naming, read_object, tensor_in
from adamerge.errors import InputError, shorten
from adamerge.system.archives import Damaged
from adamerge.system.files import combined_hash

METADATA = ".metadata"
_OF_TRAINING = {"optim", "optimizer", "optimizers", "optimizer_states", "lr_scheduler", "lr_schedulers", "scheduler"}
_AROUND = ("app", "state", "state_dict")  # names that training programs put around model and optimizer
_Sizes = tuple[int, ...]


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor, as one process has written it.

    Attributes:
        offsets: Where it begins in the tensor, by dimension.
        sizes: Its shape.
        file: In the folder.
        begin: Of its bytes in the file.
        end: Of its bytes.
    """

    offsets: _Sizes
    sizes: _Sizes
    file: str
    begin: int
    end: int


class DistributedCheckpoint:
    """The model's tensors in a folder that ``torch.distributed.checkpoint`` wrote; those of optimizers are left out.

    Names are those of the model's own state dict, also where it was saved under ``model``, itself under ``app``.
    A tensor is put together when it is asked for; one of a single part stays in the mapped file where the part lies at
    a place that its dtype allows.

    Args:
        folder: The folder, which holds ``.metadata``.

    Raises:
        FileNotFoundError: If it does not, or a file that it names is missing.
        InputError: If the metadata is damaged, asks for what no such file needs, or names no tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder / METADATA), folder
        metadata = read_object(folder / METADATA)
        with naming(folder / METADATA):
            self._specs, self._chunks = _layout(metadata)
        self._files = sorted({chunk.file for chunks in self._chunks.values() for chunk in chunks})
        check_parts(folder / METADATA, self._files)
        with naming(folder / METADATA):
            if self._nbytes() > sum((folder / file).stat().st_size for file in self._files):
                raise Damaged("its tensors are larger than the files that it names")
        self._mapped = cache(_map)

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the tensor names, sorted."""
        return tuple(self._specs)

    def spec(self, key: str) -> tuple[_Sizes, torch.dtype]:
        """Return shape and dtype of a tensor, from the metadata."""
        return self._specs[key]

    def get(self, key: str) -> Tensor:
        """Return a tensor on the CPU; nobody is to write to it."""
        shape, dtype = self._specs[key]
        parts = [(chunk, self._part(chunk, dtype)) for chunk in self._chunks[key]]
        if len(parts) == 1 and parts[0][0].sizes == shape:
            return parts[0][1]
        whole = torch.zeros(shape, dtype=dtype)
        for chunk, part in parts:
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = part
        return whole

    def sha256(self) -> str:
        """Hash the bytes of all files."""
        return combined_hash({file: file_hash(self._folder / file) for file in (METADATA, *self._files)})

    def _nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._specs.values())

    def _part(self, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
        path = self._folder / chunk.file
        with naming(path):
            part = tensor_in(self._mapped(path)[chunk.begin : chunk.end])
            if (tuple(part.shape), part.dtype) != (chunk.sizes, dtype) or part.nbytes > chunk.end - chunk.begin:
                raise Damaged(f"a part of {tuple(part.shape)}, {part.dtype}, not of {chunk.sizes}, {dtype}")
            return part


def _map(path: Path) -> memoryview:
    with mapped_file(path) as (_, view):
        return view


def _layout(metadata: Any) -> tuple[dict[str, tuple[_Sizes, torch.dtype]], dict[str, list[_Chunk]]]:
    """Return shapes, dtypes and parts of the model's tensors."""
    described, stored = (
        metadata.get(field) if isinstance(metadata, Record) else None
        for field in ("state_dict_metadata", "storage_data")
    )
    if (
        not isinstance(described, dict)
        or not isinstance(stored, dict)
        or not all(isinstance(n, str) for n in described)
    ):
        raise Damaged("no metadata of torch.distributed.checkpoint")
    places = _places(stored)
    tensors = {
        name: parts
        for name, entry in sorted(described.items())
        if isinstance(entry, Record) and isinstance(parts := entry.get("chunks"), list)
    }
    specs, chunks = {}, {}
    for name in filter(_is_models, tensors):
        specs[name] = _spec(name, described[name])
        parts = [_chunk(name, part, places, specs[name][0]) for part in tensors[name][: len(places) + 1]]
        if sum(math.prod(part.sizes) for part in parts) != math.prod(specs[name][0]):
            raise Damaged(f"the parts of {name!r} do not make it up")
        chunks[name] = parts
    if not specs:
        raise InputError("no tensors of a model; those of optimizers are not read.")
    if len(specs) < len(tensors):
        left_out = [name for name in tensors if name not in specs]
        tell_once(f"{METADATA}: {len(left_out)} tensors of the training are not read: {shorten(left_out)}.")
    nest = _nest(specs)
    names = {name: name.removeprefix(nest) for name in specs}
    return {names[key]: specs[key] for key in names}, {names[key]: chunks[key] for key in names}


def _nest(names: Collection[str]) -> str:
    """Return what programs nest a model in, as in ``{"app": {"model": ...}}``: the start that all names have."""
    nest = ""
    for part in (*_AROUND, "model"):
        if all(name.startswith(f"{nest}{part}.") for name in names):
            nest += f"{part}."
    return nest


def _places(stored: Mapping[Any, Any]) -> dict[tuple[str, _Sizes | None], Record]:
    """Return where parts lie, by tensor and offset; keys are texts and numbers, as others may take forever to hash."""
    places: dict[tuple[str, _Sizes | None], Record] = {}
    for index, place in stored.items():
        name, offset = (index.get("fqn"), index.get("offset")) if isinstance(index, Record) else (None, None)
        if isinstance(name, str) and isinstance(place, Record) and (offset is None or _sizes(offset) is not None):
            places[name, offset] = place
    return places


def _is_models(name: str) -> bool:
    """Whether a name is none of an optimizer's, such as ``optim.``, ``app.optim.`` and Lightning's ``optimizer_0.``."""
    parts = [re.sub(r"_\d+$", "", part) for part in name.split(".")[:2]]
    return _OF_TRAINING.isdisjoint(parts if parts[0] in _AROUND else parts[:1])


def _spec(name: str, entry: Record) -> tuple[_Sizes, torch.dtype]:
    properties, shape = entry.get("properties"), _sizes(entry.get("size"))
    state = properties.get("") if isinstance(properties, Record) else None  # see torch's TensorProperties
    if not isinstance(state, tuple) or not state or shape is None:
        raise Damaged(f"no shape and dtype of {name!r}")
    if not isinstance(state[0], torch.dtype):
        raise InputError(f"{name!r} has the dtype {state[0]}. Convert it to float32, float16 or bfloat16.")
    return shape, state[0]


def _chunk(name: str, part: Any, places: Mapping[Any, Record], shape: _Sizes) -> _Chunk:
    offsets, sizes = (_sizes(part.get(field)) if isinstance(part, Record) else None for field in ("offsets", "sizes"))
    place = None if offsets is None else places.get((name, offsets)) or places.get((name, None))
    if place is None or offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
        raise Damaged(f"a part of {name!r} without a place")
    if any(o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)):
        raise Damaged(f"a part of {name!r} reaches beyond it")
    file, begin, length = (place.get(field) for field in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or Path(file).name != file or not is_whole(begin) or not is_whole(length):
        raise Damaged(f"a part of {name!r} lies outside of the folder")
    if place.get("transform_descriptors"):
        raise InputError(f"{name!r} is compressed. Load the checkpoint where it was made, and save it without.")
    return _Chunk(offsets, sizes, file, begin, begin + length)


def _sizes(value: Any) -> _Sizes | None:
    return value if isinstance(value, tuple) and all(map(is_whole, value)) else None
