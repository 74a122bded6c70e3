"""Which code of others a configuration imports: each ``_target_``, and the file that it comes from."""

import importlib.util
import logging
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from adamerge.errors import InputError

log = logging.getLogger(__name__)

_OWN = ("adamerge", "torch", "torchvision", "lightning")  # what every configuration uses
_BY_PATH = "hydra.utils.get_"  # get_class, get_method, get_object: they import what path says

_VIEWED = ("adamerge.backbones.", "adamerge.transforms.", "adamerge.zoo.tokenizer.")  # whose classes only read


@dataclass(frozen=True)
class Target:
    """An import path in a configuration.

    Attributes:
        node: Where it stands, dotted.
        path: What is imported.
        file: The module's file; None where it is built into Python, or not found.
    """

    node: str
    path: str
    file: Path | None

    def __str__(self) -> str:
        return f"{self.node}: imports {self.path} from {self.file or 'Python itself'}"


def foreign_targets(content: Any) -> list[Target]:
    """Return the import paths of a configuration that lead outside of adamerge, torch, torchvision and lightning.

    Of these, only what is their own counts, not what a module of theirs has imported:
    ``adamerge.system.files.os.system`` leads outside. Nothing else is imported for it.

    Args:
        content: The configuration as plain containers.
    """
    targets = []
    for node, path in _walk(content, ""):
        home = _home(path)
        module = home.split(".")[0]
        spec = None if module in _OWN else _find(home)
        if spec is not None:
            targets.append(Target(node, path, _file(spec)))
    return targets


def check_targets(content: Any) -> None:
    """Refuse code that would come from the working directory only because of how Python was started.

    ``python -m`` and ``python -c`` put the working directory on the import path, the ``adamerge`` command does not.

    Raises:
        InputError: If a module would be found there, and the folder is neither on PYTHONPATH nor installed.
    """
    for node, path in _walk(content, ""):
        if _is_implicit(path):
            raise InputError(
                f"{node}: {path} would be imported from {_file(_find(path))}, in the working directory, which nobody "
                "put on the import path on purpose. If that is what you mean, say so: PYTHONPATH=. before the command."
            )


def check_own(content: Any) -> None:
    """Refuse all but classes of adamerge's backbones and transforms, for a folder that is only looked at.

    Functions are refused too, and what a module of adamerge merely imports: ``adamerge.system.files.os.system``.

    Raises:
        InputError: If anything else would be imported.
    """
    for node, path in _walk(content, ""):
        target = _resolved(path) if path.startswith("adamerge.") else None
        if not isinstance(target, type) or not f"{target.__module__}.".startswith(_VIEWED):
            raise InputError(
                f"{node}: expected a class of adamerge's own, found {path}, which is not imported to look at a folder."
            )


def announce(content: Any) -> None:
    """Log what a configuration imports from outside."""
    for target in foreign_targets(content):
        log.info("%s", target)


def _home(path: str) -> str:
    """Return an import path, of a package of ``_OWN`` as the module that defines what it leads to."""
    target = _resolved(path) if path.split(".")[0] in _OWN else None
    home = target.__name__ if isinstance(target, ModuleType) else getattr(target, "__module__", None)
    return home if isinstance(home, str) else path


def _resolved(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except Exception:  # whatever a module raises that cannot be imported here
        return None


def _walk(content: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield node and import path."""
    if isinstance(content, Mapping):
        target = content.get("_target_")
        for key, value in content.items():
            by_path = key == "path" and isinstance(target, str) and target.startswith(_BY_PATH)
            if (key == "_target_" or by_path) and isinstance(value, str):
                yield where or str(key), value
            else:
                yield from _walk(value, f"{where}.{key}" if where else str(key))
    elif isinstance(content, Sequence) and not isinstance(content, str):
        for index, value in enumerate(content):
            yield from _walk(value, f"{where}[{index}]")


def _find(path: str) -> ModuleSpec | None:
    """Return the innermost module of an import path; nothing is imported for it."""
    parts = path.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except ValueError:  # of __main__
        return None
    for stop in range(2, len(parts) + 1):
        places = None if spec is None else spec.submodule_search_locations
        inner = PathFinder.find_spec(".".join(parts[:stop]), places) if places else None
        if inner is None:
            break
        spec = inner
    return spec


def _file(spec: ModuleSpec | None) -> Path | None:
    """Return a module's file, or the folder of a package without ``__init__.py``."""
    if spec is None or (spec.origin is not None and not spec.has_location):
        return None
    return Path(spec.origin or next(iter(spec.submodule_search_locations or ())))


def _is_implicit(path: str) -> bool:
    """Return whether a module comes from the working directory, which is searched by the interpreter's start only."""
    file, folder = _file(_find(path.split(".")[0])), Path.cwd().resolve()
    if file is None or path.startswith("adamerge."):  # which runs already
        return False
    home = file.parent.parent if file.name == "__init__.py" else file.parent
    by_start = [] if sys.flags.safe_path else [sys.path[0], *(entry for entry in sys.path if not entry)]
    is_given = any(entry and Path(entry).resolve() == folder for entry in sys.path[bool(by_start) :])
    return home.resolve() == folder and not is_given and any(Path(entry).resolve() == folder for entry in by_start)
