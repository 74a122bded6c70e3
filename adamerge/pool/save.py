"""Write pool files."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adamerge.pool.pool_file import DEFAULTS, PoolFile, PoolFiles
from adamerge.system.files import atomic_path


def save_pool_file(files: PoolFiles, path: Path) -> None:
    """Write a pool file, atomically.

    Paths are written relative to its folder where they lie below that, or both below the working directory.
    """
    options = {"key_prefix": files.key_prefix, **files.options}
    content: dict[str, Any] = {
        "base": _written(files.base, path),
        **{key: value for key, value in options.items() if value is not None and value != DEFAULTS.get(key)},
        "experts": {name: _written(entry, path) for name, entry in files.experts.items()},
    }
    if files.task_vectors is not None:
        content["task_vectors"] = _written(files.task_vectors, path)
    with atomic_path(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(content), encoding="utf-8")


def _written(entry: PoolFile, pool_file: Path) -> dict[str, str]:
    file, folder = entry.file, pool_file.parent.absolute()
    if isinstance(file, Path):
        whole = Path(os.path.abspath(file))  # without the '..' that a pool file's own paths may have
        together = all(path.is_relative_to(Path.cwd()) for path in (whole, folder))
        relative = Path(os.path.relpath(whole, folder))
        leads_there = (folder / relative).resolve() == whole.resolve()  # not where '..' leaves a linked folder
        file = relative if leads_there and (together or whole.is_relative_to(folder)) else whole
    return replace(entry, file=file).facts()
