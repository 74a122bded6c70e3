"""Which code of others a configuration imports: each ``_target_``, and the file that it comes from."""

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
    found = []
    for node, path in _walk(content, ""):
        home = _home(path)
        module = home.split(".")[0]
        if module and module not in _OWN:
            spec, _ = _find(home)
            file = _file(spec)
            if spec is not None or module in sys.stdlib_module_names:
                found.append(Target(node, path, file))
    return found


def check_targets(content: Any) -> None:
    """Refuse code that would come from the working directory only because of how Python was started.

    ``python -m`` and ``python -c`` put the working directory on the import path, the ``adamerge`` command does not.

    Raises:
        InputError: If a module would be found there, and the folder is neither on PYTHONPATH nor installed.
    """
    for node, path in _walk(content, ""):
        spec, entry = _find(path)
        if spec is not None and entry is not None and _is_implicit(entry):
            raise InputError(
                f"{node}: {path} would be imported from {_file(spec)}, in the working directory, which nobody put on "
                "the import path on purpose. If that is what you mean, say so: PYTHONPATH=. before the command."
            )


def check_own(content: Any) -> None:
    """Refuse all but classes of adamerge's backbones and transforms, for a folder that is only looked at.

    Functions are refused too, and what a module of adamerge merely imports: ``adamerge.system.files.os.system``.

    Raises:
        InputError: If anything else would be imported.
    """
    for node, path in _walk(content, ""):
        if not path.startswith(("adamerge.backbones.", "adamerge.transforms.", "adamerge.zoo.")) or not _is_own_class(
            path
        ):
            raise InputError(
                f"{node}: expected a class of adamerge's own, found {path}, which is not imported to look at a folder."
            )


def announce(content: Any) -> None:
    """Log what a configuration imports from outside."""
    for target in foreign_targets(content):
        log.info("%s", target)


def _home(path: str) -> str:
    """Return an import path, of a package of ``_OWN`` as the module that defines what it leads to."""
    found = _resolved(path) if path.split(".")[0] in _OWN else None
    home = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None)
    return home if isinstance(home, str) else path


def _resolved(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except Exception:  # whatever a module raises that cannot be imported here
        return None


def _is_own_class(path: str) -> bool:
    found = _resolved(path)
    return isinstance(found, type) and f"{found.__module__}.".startswith(_VIEWED)


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


def _find(path: str) -> tuple[ModuleSpec | None, str | None]:
    """Return the innermost module of an import path, and the entry of ``sys.path`` it is found by."""
    parts = path.split(".")
    for entry in sys.path:
        spec = PathFinder.find_spec(parts[0], [entry or str(Path.cwd())])
        if spec is None or spec.origin is None:  # a folder without __init__.py yields to modules of later entries
            continue
        return _descend(spec, parts), entry
    spec = PathFinder.find_spec(parts[0], [entry or str(Path.cwd()) for entry in sys.path])
    if spec is None or not spec.submodule_search_locations:
        return None, None
    home = str(Path(next(iter(spec.submodule_search_locations))).parent)
    return _descend(spec, parts), home


def _descend(spec: ModuleSpec, parts: Sequence[str]) -> ModuleSpec:
    for index in range(2, len(parts) + 1):
        places = spec.submodule_search_locations
        inner = PathFinder.find_spec(".".join(parts[:index]), places) if places else None
        if inner is None:
            break
        spec = inner
    return spec


def _file(spec: ModuleSpec | None) -> Path | None:
    if spec is None:
        return None
    places = spec.submodule_search_locations
    origin = spec.origin or (next(iter(places)) if places else None)
    return Path(origin) if origin else None


def _is_implicit(entry: str) -> bool:
    """Return whether an entry of ``sys.path`` is the working directory, and there only by the interpreter's start."""
    folder = Path.cwd().resolve()
    if Path(entry or ".").resolve() != folder:
        return False
    given = sys.path if sys.flags.safe_path else sys.path[1:]
    return not any(other and Path(other).resolve() == folder for other in given)
