"""Which code a configuration imports, judged by name before any of it is built: each ``_target_``, and its file."""

import functools
import importlib.util
import logging
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adamerge.commands.run.listed import LIBRARIES, is_listed, resolved
from adamerge.errors import InputError

log = logging.getLogger(__name__)

_BY_PATH = "hydra.utils."  # get_class, get_method, get_object: they import what path says
_VIEWED = ("adamerge.backbones.", "adamerge.transforms.", "adamerge.zoo.tokenizer.")  # whose classes only read
_DEEPEST = 100  # nodes inside one another; interpolations can go round in circles
_PACKAGES = frozenset({"site-packages", "dist-packages"})  # what folders of installed packages are called
TRUST = "--trust-code"


@dataclass(frozen=True)
class Target:
    """An import path in a configuration.

    Attributes:
        node: Where it stands, dotted.
        path: What is imported.
        file: The module's file; None where it is built into Python, or not found.
        is_found: Whether there is such a module.
    """

    node: str
    path: str
    file: Path | None
    is_found: bool = True

    def __str__(self) -> str:
        return f"{self.node}: imports {self.path} from {self.file or 'Python itself'}"


def targets_beyond(content: Any, *, literal: bool = False) -> list[Target]:
    """Return the import paths of a configuration that are not on the list of names.

    Nothing but adamerge's own modules, and those that the list names, is imported for it.

    Args:
        content: The configuration, or a part of one, as it is composed or as plain containers.
        literal: Count texts with ``${`` too, which may become nodes when the configuration is resolved once more.
    """
    targets = []
    for node, path in _walk(content, "", literal=literal):
        if not is_listed(path):
            spec = _find(path)
            targets.append(Target(node, path, _file(spec), spec is not None))
    return targets


def announce(content: Any) -> None:
    """Log what a configuration of the user's own imports beyond the list of names, before it is built; each once."""
    for target in targets_beyond(content):
        if target.is_found:
            _tell(target)


@functools.cache
def _tell(target: Target) -> None:
    log.info("%s", target)


def check_listed(content: Any, source: str, why: str) -> None:
    """Refuse a configuration that imports anything beyond the list of names.

    Args:
        content: The configuration.
        source: Where it stands, for the message.
        why: Why it is not taken for the user's own.

    Raises:
        InputError: If it does.
    """
    beyond = targets_beyond(content, literal=True)
    if beyond:
        first = beyond[0]
        text = f"the interpolation {first.path}" if "${" in first.path else first.path
        others = f" (and {len(beyond) - 1} more)" if len(beyond) > 1 else ""
        raise InputError(
            f"{source}: {first.node}: {text}{others} is not on adamerge's list of names (docs/security.md), and "
            f"{why}. Read the file; if you trust it, say {TRUST}."
        )


def check_builds_no_library(content: Any) -> list[str]:
    """List the import paths that ``check`` does not build without being told to: names of libraries beyond the list.

    Modules of the user's own, outside of Python's folders for packages, are built; but not what they have imported
    from elsewhere. Paths that lead nowhere are left to the check, which says so.
    """
    return [
        f"{target.node}: {target.path}{_from(target)} is not on adamerge's list of names (docs/security.md), and a "
        f"check builds nothing else of a library. If you mean it, say {TRUST}; adapt itself does what you wrote."
        for target in targets_beyond(content, literal=True)
        if not _is_own(target) and not _leads_nowhere(target)
    ]


def _from(target: Target) -> str:
    return f" from {target.file}" if target.file is not None else ""


def _leads_nowhere(target: Target) -> bool:
    if "${" in target.path:
        return False
    in_library = target.path.split(".")[0] in LIBRARIES
    return not target.is_found or (in_library and resolved(target.path) is None)


def _is_own(target: Target) -> bool:
    """Whether a path leads to something that a module of the user's own defines; that module is imported for it."""
    if target.path.split(".")[0] in LIBRARIES or not _is_users(target.file):
        return False
    found = resolved(target.path)
    home = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None)
    return found is None or (isinstance(home, str) and (is_listed(_full(found)) or _is_users(_file(_find(home)))))


def _full(found: Any) -> str:
    return f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"


def _is_users(file: Path | None) -> bool:
    """Whether a module lies outside of the folders of Python and of installed packages."""
    if file is None:
        return False
    library = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    places = (file.absolute(), file.resolve())
    is_package = any(not _PACKAGES.isdisjoint(place.parts) for place in places)
    return not is_package and not any(place.is_relative_to(folder) for place in places for folder in library)


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
    for node, path in _walk(content, "", literal=True):
        target = resolved(path) if path.startswith("adamerge.") else None
        if not isinstance(target, type) or not f"{target.__module__}.".startswith(_VIEWED):
            raise InputError(
                f"{node}: expected a class of adamerge's own, found {path}, which is not imported to look at a folder."
            )


def _walk(content: Any, where: str, *, literal: bool = False, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield node and import path of all that Hydra would import; interpolations count as what they lead to.

    Raises:
        InputError: If nodes lie too deep inside one another.
    """
    if depth > _DEEPEST:
        raise InputError(f"{where.split('.')[0]}: expected nodes of up to {_DEEPEST} levels, found more.")
    if isinstance(content, (Mapping, DictConfig)):
        named = _value(content, "_target_")
        by_path = isinstance(named, str) and named.startswith(_BY_PATH)
        for key in content:
            value = _value(content, key)
            place = f"{where}.{key}" if where else str(key)
            is_path = key == "_target_" or (by_path and key == "path")
            if is_path and isinstance(value, str):
                yield where or place, value
            elif by_path and key == "_args_" and isinstance(value, (Sequence, ListConfig)):
                yield from ((where, word) for word in value if isinstance(word, str))
            else:
                yield from _walk(value, place, literal=literal, depth=depth + 1)
    elif isinstance(content, (Sequence, ListConfig)) and not isinstance(content, str):
        for index in range(len(content)):
            yield from _walk(_value(content, index), f"{where}[{index}]", literal=literal, depth=depth + 1)
    elif literal and isinstance(content, str) and "${" in content:
        yield where, content


def _value(content: Any, key: Any) -> Any:
    """Return a member of a container, interpolations resolved where they can be, else as they are written."""
    if not isinstance(content, (DictConfig, ListConfig)):
        return content.get(key) if isinstance(content, Mapping) else content[key]
    if isinstance(content, DictConfig) and key not in list(content.keys()):  # `in` itself leaves out what is ???
        return None
    try:
        return None if OmegaConf.is_missing(content, key) else content[key]
    except OmegaConfBaseException:
        node: Any = content._get_node(key)
        return node._value()


def _find(path: str) -> ModuleSpec | None:
    """Return the innermost module of an import path; nothing is imported for it."""
    parts = path.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ValueError, ImportError):  # of __main__, or no name at all
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
