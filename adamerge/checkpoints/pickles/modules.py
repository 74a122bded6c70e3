"""The state dict of a pickled module, from the records of its parts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adamerge.checkpoints.pickles.archive import Pickled
from adamerge.checkpoints.pickles.records import Damaged, Record, TensorView
from adamerge.errors import InputError, shorten

NESTS = ("state_dict", "model_state_dict", "model")
_MAX_DEPTH = 100  # modules inside of modules
_MAX_NAMES = 100_000
_MAX_GROWTH = 4  # bytes written over bytes read: weights that share memory are written in full
_MAX_NAME = 1000  # characters
_SMALL = 1 << 24  # bytes that may be written whatever the file's size


@dataclass(frozen=True)
class Found:
    """The tensors of a pickled checkpoint.

    Attributes:
        views: Name to tensor, unread.
        of: What held them, in words.
        left_out: Names beside them that hold something else.
    """

    views: Mapping[str, TensorView]
    of: str
    left_out: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Return name to tensor, views of the file where possible."""
        return {name: view.tensor() for name, view in self.views.items()}


def find_tensors(pickled: Pickled) -> Found:
    """Find the state dict: a module's, a dictionary's, or either under ``state_dict`` or ``model``.

    Raises:
        InputError: If there is none, or it would be many times larger than its file.
    """
    root = pickled.root
    for nest in NESTS:
        if isinstance(root, dict) and (isinstance(root.get(nest), dict) or _is_module(root.get(nest))):
            root = root[nest]
    left_out: tuple[str, ...] = ()
    entries = root.entries if isinstance(root, Record) and not _is_module(root) else root
    if _is_module(root):
        try:
            views = dict(_of_module(root))
        except Damaged as error:
            raise InputError(f"{pickled.path}: refused: {error}.") from error
        kind = f"module {root.kind}"
    elif isinstance(entries, dict):
        views = {key: value for key, value in entries.items() if isinstance(value, TensorView)}
        left_out = tuple(str(k)[:80] for k in entries if k not in views and isinstance(k, str))
        kind = "state dict"
    else:
        views, kind = {}, ""
    _check(pickled, views)
    return Found(views, kind, left_out)


def _check(pickled: Pickled, views: Mapping[Any, TensorView]) -> None:
    """Refuse names that are none, and tensors that repeat the same memory too often."""
    root, path = pickled.root, pickled.path
    if not views:
        name = str(root.kind) if isinstance(root, Record) else type(root).__name__
        raise InputError(f"{path}: expected a state dict (name to tensor) or a module, found {name} without tensors.")
    bad = [ascii(name)[:80] for name in views if not isinstance(name, str) or not name or not name.isprintable()]
    if bad:
        raise InputError(f"{path}: expected tensors with printable names, found {shorten(bad)}.")
    total = sum(view.nbytes for view in views.values())
    if total > _MAX_GROWTH * pickled.size + _SMALL:
        raise InputError(
            f"{path}: refused: its tensors take {min(total, 10**300):.3g} bytes, more than {_MAX_GROWTH} times the "
            f"file's {pickled.size}, as they repeat the same memory. Save clones of them."
        )


def _is_module(value: Any) -> bool:
    """Return whether a record is that of an ``nn.Module``: it has its three dictionaries."""
    return isinstance(value, Record) and all(
        isinstance(_entries(value.get(name)), dict) for name in ("_parameters", "_buffers", "_modules")
    )


def _entries(value: Any) -> Any:
    return value.entries if isinstance(value, Record) else value


def _of_module(root: Record) -> Iterator[tuple[str, TensorView]]:
    """Yield what ``root.state_dict()`` would hold, in its order."""
    pending: list[tuple[str, Record]] = [("", root)]
    steps = 0
    while pending:
        prefix, module = pending.pop()
        steps += 1
        if prefix.count(".") > _MAX_DEPTH or steps > _MAX_NAMES:
            raise Damaged(f"its modules are nested more than {_MAX_DEPTH} deep, or are more than {_MAX_NAMES}")
        volatile = module.get("_non_persistent_buffers_set")
        skipped = volatile if isinstance(volatile, (set, frozenset)) else ()
        for kind in ("_parameters", "_buffers"):
            for name, value in _entries(module.get(kind)).items():
                steps += 1
                if isinstance(value, TensorView) and not (kind == "_buffers" and name in skipped):
                    yield _joined(prefix, name), value
        children = _entries(module.get("_modules")).items()
        steps += len(children)
        pending += [(f"{_joined(prefix, name)}.", child) for name, child in reversed(children) if _is_module(child)]


def _joined(prefix: str, name: Any) -> str:
    if not isinstance(name, str) or len(prefix) + len(name) > _MAX_NAME:
        raise Damaged(f"its modules have names that are no texts, or of more than {_MAX_NAME} characters")
    return prefix + name
