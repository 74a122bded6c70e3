"""Files to tensors: lazy and safe reading.

Nothing here unpickles Python objects: files are safetensors, or torch files read by
:mod:`adamerge.checkpoints.pickles`.
"""

import hashlib
import json
import logging
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.checkpoints.hashes import file_hash
from adamerge.checkpoints.pickles import HARMLESS, read_pickle
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.system.reading import open_regular

log = logging.getLogger(__name__)

_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before the zip format
_HEADER_LIMIT = 16_000_000  # bytes, over 100,000 tensors; reading a header as JSON takes many times its size
# In the order of safetensors' own writer, which begins with the last; so every tensor lies where its size divides.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_MAPPED: "WeakSet[SafetensorsCheckpoint]" = WeakSet()


class Checkpoint(Protocol):
    """Named tensors that are read one at a time.

    ``spec`` costs no tensor read for safetensors files, so that checks stay fast on large models.
    """

    name: str

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the tensor names in file order."""
        ...

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor."""
        ...

    def get(self, key: str) -> Tensor:
        """Return a tensor on the CPU, zero-copy where the format allows."""
        ...

    def sha256(self) -> str:
        """Return the hash of the content, as hexadecimal digits."""
        ...


class MemoryCheckpoint:
    """A state dict that is already in memory."""

    def __init__(self, name: str, tensors: Mapping[str, Any]) -> None:
        others = [str(key) for key, value in tensors.items() if not isinstance(value, Tensor)]
        if others:
            raise InputError(
                f"{name}: expected only tensors, found other values under {shorten(others)}. Save the state dict alone."
            )
        self.name = name
        self._tensors: dict[str, Tensor] = dict(tensors)

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the tensor names in order."""
        return tuple(self._tensors)

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor."""
        tensor = self._tensors[key]
        return tuple(tensor.shape), tensor.dtype

    def get(self, key: str) -> Tensor:
        """Return the tensor itself, detached and on the CPU."""
        return self._tensors[key].detach().cpu()

    def sha256(self) -> str:
        """Hash names, dtypes, shapes and bytes of all tensors."""
        digest = hashlib.sha256()
        for key in sorted(self._tensors):
            tensor = self.get(key).contiguous()
            digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class FileCheckpoint(MemoryCheckpoint):
    """A state dict in a torch file, zip or legacy format; tensors of a zip archive stay mapped.

    Raises:
        InputError: If the file is damaged, or holds Python objects or anything else besides tensors.
    """

    def __init__(self, path: Path) -> None:
        pickled = read_pickle(path)
        if pickled.is_module or set(pickled.inert) - HARMLESS:
            raise _refusal(path)
        if pickled.beside:
            log.warning(
                "%s: tensors under %s are not read, beside those of the model. To use these: "
                "adamerge convert FILE --entry NAME --out NAME.safetensors.",
                path,
                shorten(pickled.beside),
            )
        super().__init__(str(path), {**_strip_module(pickled.tensors), **dict.fromkeys(pickled.left_out)})
        self.path = path

    def sha256(self) -> str:
        """Hash the file's bytes."""
        return file_hash(self.path)


class SafetensorsCheckpoint:
    """A memory-mapped safetensors file: tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        self._header = _read_header(path)
        try:
            with safe_open(path, framework="pt", device="cpu"), path.open("rb") as file:  # which checks every entry
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except SafetensorError as error:
            raise InputError(
                f"{path}: truncated or damaged safetensors file ({error}). Copy or export it again."
            ) from error
        self._start = 8 + int.from_bytes(self._map[:8], "little")
        _MAPPED.add(self)

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the tensor names in file order."""
        return tuple(self._header)

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor from the header alone."""
        entry = self._header[key]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise InputError(
                f"{self.path}: tensor {key!r} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}. "
                "Convert it to float32, float16 or bfloat16."
            )
        return tuple(entry["shape"]), dtype

    def get(self, key: str) -> Tensor:
        """Return a tensor backed by the memory map; nobody is to write to it."""
        shape, dtype = self.spec(key)
        begin, end = self._header[key]["data_offsets"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        count = (end - begin) // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._start + begin).view(shape)

    def drop_pages(self) -> None:
        """Let go of the memory that the map takes; what is read again comes from the system's cache of the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def sha256(self) -> str:
        """Hash the file's bytes."""
        return file_hash(self.path)


def drop_mapped_pages() -> None:
    """Let go of the memory that open files take, as passes do that read each tensor once."""
    for checkpoint in list(_MAPPED):
        checkpoint.drop_pages()


def open_checkpoint(path: Path | str) -> SafetensorsCheckpoint | FileCheckpoint:
    """Open a checkpoint by its content, not by its suffix.

    Args:
        path: A safetensors file, or a torch file of a state dict.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the file is a folder, empty, truncated, not a checkpoint, or holds pickled
            objects other than tensors (it is never unpickled).
    """
    path = Path(path)
    head = checkpoint_head(path)
    # Byte 8 first: a safetensors file opens with its header's length, whose bytes may look like the others.
    if head[8:9] != b"{" and (head.startswith((b"PK", _TORCH_LEGACY))):
        return FileCheckpoint(path)
    if head[8:9] != b"{" and head.startswith(b"\x80"):
        raise _refusal(path)
    return SafetensorsCheckpoint(path)


def checkpoint_head(path: Path) -> bytes:
    """Return the first 16 bytes of a checkpoint file.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is a folder.
    """
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path}: no such file.{did_you_mean(path.name, siblings)}")
    if path.is_dir():
        index = next((f", such as {file.name}" for file in sorted(path.glob("*.index.json"))), "")
        raise InputError(f"{path}: expected a checkpoint file, found a folder. Name the file inside it{index}.")
    with open_regular(path) as file:
        return file.read(16)


def stored_facts(path: Path, key: str) -> dict[str, Any] | None:
    """Return the mapping that a safetensors file's metadata holds as JSON; None where there is none under the key.

    Raises:
        InputError: If the file is none of that format.
    """
    SafetensorsCheckpoint(path)  # bounds the header
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(key)
    try:
        content = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def load_state_dict(path: Path | str, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Load all tensors of a safetensors file, or of a torch file that holds nothing else.

    Args:
        path: The checkpoint file.
        device: Where the tensors go.

    Returns:
        Name to tensor, dtypes as stored. In torch files a nested ``state_dict`` is unwrapped and a
        ``module.`` prefix (DataParallel) removed.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: See :func:`open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    # A copy, so that the result does not change when the mapped file is later replaced.
    return {key: checkpoint.get(key).to(device, copy=True) for key in checkpoint.keys}


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read and check a safetensors header: its offsets must agree with the size of the file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(min(length, _HEADER_LIMIT))
    if not raw.startswith(b"{"):
        raise InputError(f"{path}: not a checkpoint. Expected a safetensors file or a torch file of tensors.")
    try:
        header: dict[str, dict[str, Any]] = json.loads(raw, object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: truncated or damaged safetensors file: its header of {length} bytes cannot be read "
            f"(the file has {size} bytes). Copy or export it again."
        ) from error
    if end != size:
        raise InputError(
            f"{path}: truncated or damaged safetensors file: expected {end} bytes, found {size}. "
            "Copy or export it again."
        )
    return header


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError("a name is given twice")
    return content


def _strip_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): value for key, value in tensors.items()}
    return dict(tensors)


def _refusal(path: Path) -> InputError:
    return InputError(
        f"{path}: holds pickled Python objects besides tensors, and unpickling can run code, so it is refused. "
        f"Write its tensors as safetensors, which runs nothing: adamerge convert {path} --out NAME.safetensors."
    )
