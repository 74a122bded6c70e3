"""What the headers of a pool's files say: which tensors merge, which do not and why, how experts differ from the base.

No tensor is read here, so that a pool of large models is checked in milliseconds.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.pool.adapter_config import REMEDY, names_other_base
from adamerge.pool.lora import AdapterCheckpoint, changed_by, is_product
from adamerge.pool.opening import ModelPlace, open_files
from adamerge.pool.options import PoolOptions
from adamerge.pool.task_vectors import compute_dtype_of

_EXTENDED = " If its vocabulary is larger: backbone.vocabulary=shared, or in a pool file extended: [NAME]."
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class KeyMap:
    """Relates the keys of checkpoint files to the encoder's parameter names."""

    def __init__(self, base_keys: Sequence[str], key_map: str | Mapping[str, str] | None) -> None:
        self.map = key_map or ""
        self._to_file = {name: key for key in base_keys if (name := self.name(key)) is not None}

    @property
    def described(self) -> str:
        """What messages call it."""
        return f"the key prefix {self.map!r}" if isinstance(self.map, str) else f"the names of its {len(self.map)} keys"

    def name(self, file_key: str) -> str | None:
        """Return the encoder's name of a file's key, or None where it is not the encoder's."""
        if isinstance(self.map, str):
            return file_key.removeprefix(self.map) if file_key.startswith(self.map) else None
        return self.map.get(file_key)

    def __contains__(self, name: str) -> bool:
        return name in self._to_file

    def file_key(self, name: str) -> str:
        """Return the key of a parameter in the files."""
        return self._to_file[name]

    def buffers(self, checkpoint: Checkpoint, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's values of an encoder's buffers.

        Args:
            checkpoint: The file.
            like: Buffer name to the encoder's own: its dtype and device are kept, and it stands in where
                the file has no such tensor.

        Raises:
            InputError: If a buffer has another shape in the file.
        """
        present, values = set(checkpoint.keys), dict(like)
        for name, buffer in like.items():
            key = self._to_file.get(name)
            if key is None or key not in present:
                continue
            shape = checkpoint.spec(key)[0]
            if shape != tuple(buffer.shape):
                raise InputError(
                    f"{checkpoint.name}: buffer {key!r}: expected the encoder's shape {tuple(buffer.shape)}, "
                    f"found {shape}. Were both made from the same architecture?"
                )
            values[name] = checkpoint.get(key).to(buffer, copy=True)
        return values


@dataclass(frozen=True)
class PoolLayout:
    """Which tensors of a pool merge, by the headers of its files.

    Attributes:
        merged: Parameters that merge.
        fixed: Parameters that are left out by ``include`` and ``exclude``.
        skipped: Tensor of the base to why it is not merged.
        problems: All that is wrong.
        remarks: What is left unmerged of the experts, and is no error.
    """

    merged: tuple[str, ...]
    fixed: tuple[str, ...]
    skipped: Mapping[str, str]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    def refuse(self) -> None:
        """Raise the first problem, if there is any.

        Raises:
            InputError: With the number of the others.
        """
        if self.problems:
            others = len(self.problems) - 1
            count = f" (and {others} more problems; `adamerge check` lists all)" if others else ""
            raise InputError(self.problems[0] + count)


def check_layout(base: Checkpoint, experts: Mapping[str, Checkpoint], keys: KeyMap, options: PoolOptions) -> PoolLayout:
    """Compare names, shapes and dtypes without reading a tensor; collect everything that is wrong."""
    merged, fixed, skipped = _sorted_keys(base, keys, options)
    problems = _option_problems(base, keys, options)
    if not merged:
        problems.append(
            f"{base.name}: no tensor to merge: none of its {len(base.keys)} keys, such as "
            f"{next(iter(base.keys), None)!r}, is left by {keys.described}, include and exclude."
        )
    remarks: list[str] = []
    for expert, checkpoint in experts.items():
        where = f"Expert {expert!r} ({checkpoint.name})" if checkpoint.name != expert else f"Expert {expert!r}"
        changed = changed_by(checkpoint)
        is_adapter = changed is not None
        candidates = checkpoint.keys if changed is None else changed
        if isinstance(checkpoint, AdapterCheckpoint) and names_other_base(checkpoint.base_name, base.name):
            remarks.append(
                f"{where}: was trained on {checkpoint.base_name!r}, and the base is {base.name}. Is it that?"
            )
        extra, outside = _unplaced(base, keys, options, candidates, is_adapter=is_adapter)
        problems += _differences(base, where, checkpoint, [keys.file_key(name) for name in merged], extra)
        if outside:
            is_refused = options.unplaced == "refuse" or (options.unplaced == "auto" and is_adapter)
            meant = "" if options.unplaced == "list" else " If that is meant: pool.unplaced=list, or --unplaced list."
            (problems if is_refused else remarks).append(
                f"{where}: {len(outside)} tensors have no place in the encoder ({keys.described}), and are not "
                f"merged: {shorten(outside)}.{meant}" + (f" Or: {REMEDY}" if is_adapter and meant else "")
            )
    return PoolLayout(tuple(merged), tuple(fixed), skipped, tuple(problems), tuple(remarks))


def shared_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return alias to first name, of tensors that are the same memory, read in the same order."""
    first: dict[tuple[int, Size, tuple[int, ...]], str] = {}
    result = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            canonical = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
            if canonical != name:
                result[name] = canonical
    return result


def _sorted_keys(base: Checkpoint, keys: KeyMap, options: PoolOptions) -> tuple[list[str], list[str], dict[str, str]]:
    """Return the names that merge, those that are the base's, and by key why a tensor does not merge."""
    merged, fixed, skipped = list[str](), list[str](), dict[str, str]()
    tied = options.tied or {}
    for key in base.keys:
        name = keys.name(key)
        if name is None:
            skipped[key] = "not part of the encoder"
        elif name in tied:
            skipped[key] = f"tied to {tied[name]}"
        elif _is_statistic(name):
            skipped[key] = "normalisation statistics: see batch_norm"
        elif options.leaves_out(name):
            skipped[key] = "excluded"
            fixed.append(name)
        elif not base.spec(key)[1].is_floating_point:
            skipped[key] = f"integer tensor ({str(base.spec(key)[1]).removeprefix('torch.')})"
        else:
            merged.append(name)
    return merged, fixed, skipped


def _unplaced(
    base: Checkpoint, keys: KeyMap, options: PoolOptions, candidates: Sequence[str], *, is_adapter: bool
) -> tuple[list[str], list[str]]:
    """Return which tensors of an expert the base's encoder lacks, and which have no place in an encoder.

    What a whole checkpoint has beside the encoder, as the base does too, is taken for the base's, such as a text tower;
    what an adapter changes there is not.
    """
    extra, outside = [], []
    present, tied = set(base.keys), options.tied or {}
    for key in candidates:
        name = keys.name(key)
        if name is None:
            outside += [key] if is_adapter or key not in present else []
        elif name in tied:
            outside += [key] if is_adapter and keys.file_key(tied[name]) not in candidates else []
        elif key not in present and not options.leaves_out(name) and not _is_statistic(name):
            extra.append(key)
    return extra, outside


def _differences(
    base: Checkpoint, where: str, checkpoint: Checkpoint, expected: Sequence[str], extra: Sequence[str]
) -> list[str]:
    """List how one expert's header differs from the base's, where its own tensors are ``extra``."""
    present = set(checkpoint.keys)
    missing = [key for key in expected if key not in present]
    reshaped, integer = [], []
    for key in (key for key in expected if key in present):
        shape, dtype = checkpoint.spec(key)
        if not dtype.is_floating_point:
            integer.append((key, dtype))
        elif shape != base.spec(key)[0]:
            reshaped.append(key)
    problems = []
    if reshaped:
        key = reshaped[0]
        is_longer = len(shape := checkpoint.spec(key)[0]) == 2 and shape[1:] == base.spec(key)[0][1:]
        problems.append(
            f"{where} does not match the base: {len(reshaped)} of {len(expected)} tensors differ in shape, "
            f"first {key!r}: expected {base.spec(key)[0]}, found {checkpoint.spec(key)[0]}. "
            f"Were both made from the same architecture?{_EXTENDED if is_longer else ''}"
        )
    if missing:
        hint = did_you_mean(missing[0], extra or present)
        if twin := next((key for key in sorted(present) if key.endswith(f".{missing[0]}")), None):
            prefix = twin.removesuffix(missing[0])
            hint = f" It has {twin!r}: adamerge convert FILE --key-prefix {prefix} --out NAME.safetensors takes it off."
        problems.append(
            f"{where} lacks {len(missing)} of {len(expected)} tensors of the base: {shorten(missing)}.{hint} "
            "Was it made from the same architecture?"
        )
    if extra:
        problems.append(
            f"{where} has {len(extra)} tensors that the base lacks: {shorten(extra)}. If they are not part of the "
            "encoder, such as a head, leave them out: exclude (--exclude GLOB, pool.exclude)."
        )
    if integer:
        key, dtype = integer[0]
        problems.append(
            f"{where}: tensor {key!r} has the integer dtype {dtype}, expected floating point. "
            "Quantized experts cannot be merged: dequantize the file first."
        )
    return problems


def _is_statistic(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _STATISTICS


def _option_problems(base: Checkpoint, keys: KeyMap, options: PoolOptions) -> list[str]:
    """List names that the options give and the files lack, and names given twice."""
    problems: list[str] = []
    by_name: dict[str, str] = {}
    for key in base.keys:
        name = keys.name(key)
        if name is not None and by_name.setdefault(name, key) != key:
            problems.append(f"key_map gives {by_name[name]!r} and {key!r} the same name {name!r}; name each once.")
    if isinstance(keys.map, Mapping):
        present = set(base.keys)
        unknown = [key for key, name in keys.map.items() if key not in present and not options.leaves_out(name)]
        problems += [f"key_map: {base.name} has no tensor {key!r}.{did_you_mean(key, base.keys)}" for key in unknown]
    tied = options.tied or {}
    problems += [
        f"pool.tied: {alias!r} is tied to {name!r}, which is no untied tensor of {base.name}."
        f"{did_you_mean(name, by_name)}"
        for alias, name in tied.items()
        if name not in by_name or name in tied
    ]
    return problems + [
        f"pool.include: the pattern {pattern!r} matches no tensor of {base.name}.{did_you_mean(pattern, by_name)}"
        for pattern in options.include or ()
        if not fnmatch.filter(by_name, pattern)
    ]


@dataclass(frozen=True)
class Headers:
    """As much of a pool as the headers of its files tell.

    Attributes:
        experts: The experts whose files could be opened.
        shapes: Name to shape, of the parameters that merge; empty where the base could not be opened.
        products: Those that all experts change by products of thin matrices (LoRA), which the pool keeps as such.
        problems: All that is wrong.
        remarks: What is left unmerged of the experts, and is no error.
        compute_dtype: The pool's dtype for computing.
        source: The base, where its file could be opened.
    """

    experts: Mapping[str, Checkpoint] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    compute_dtype: torch.dtype = torch.float32
    source: Checkpoint | None = None
    products: frozenset[str] = frozenset()

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The experts, in order."""
        return tuple(self.experts)


def read_headers(base: ModelPlace | None, experts: Mapping[str, ModelPlace], options: PoolOptions) -> Headers:
    """Open a pool's files and compare their headers; what is wrong is collected, not raised."""
    source, opened, errors = open_files(base, experts, options)
    problems = tuple(map(str, errors))
    if source is None:
        return Headers(opened, problems=problems)
    keys = KeyMap(source.keys, options.key_map)
    layout = check_layout(source, opened, keys, options)
    specs = {name: source.spec(keys.file_key(name)) for name in layout.merged}
    shapes = {name: tuple(shape) for name, (shape, _) in specs.items()}
    dtype = compute_dtype_of(dtype for _, dtype in specs.values())
    is_kept = options.transform is None and options.task_vectors is None
    products = _products(opened, keys, layout.merged) if is_kept else frozenset[str]()
    return Headers(opened, shapes, (*problems, *layout.problems), layout.remarks, dtype, source, products)


def _products(experts: Mapping[str, Checkpoint], keys: KeyMap, names: Sequence[str]) -> frozenset[str]:
    """Return the parameters that all experts change by products, some of them by one that is not zero."""
    changed = {key for expert in experts.values() for key in changed_by(expert) or ()}
    by_key = {keys.file_key(name): name for name in names}
    are_products = (key for key in changed & by_key.keys() if all(is_product(e, key) for e in experts.values()))
    return frozenset(by_key[key] for key in are_products)
