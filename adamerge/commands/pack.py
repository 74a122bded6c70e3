"""``pool pack``: a pool's models, loaded by their library one after another and written as it has them in memory."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adamerge.checkpoints.hub import located
from adamerge.errors import InputError
from adamerge.pool.adapter_config import CONFIG as ADAPTER
from adamerge.pool.pool_file import PoolFile, PoolFiles
from adamerge.pool.save import save_pool_file
from adamerge.system import progress
from adamerge.system.files import atomic_folder


def write_through(files: PoolFiles, output: Path, auto: str | None) -> list[Path]:
    """Load base and experts through transformers, and write each into a folder of its own, and a pool file.

    Args:
        files: The pool; its models are folders of transformers.
        output: A new folder.
        auto: The Auto class; None for what the configurations name.

    Returns:
        The folders, and the pool file.

    Raises:
        InputError: If a model is no folder of transformers, or ``output`` is in use.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--out {output}: expected a new folder, found one with files. Choose another, or remove it.")
    files.verify()
    places = {name: located(entry.file) for name, entry in files.models.items()}
    loaded = {name: path for name, path in places.items() if not (path / ADAPTER).is_file()}
    for name, path in loaded.items():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path} ({name}): expected the folder of a model that transformers wrote, or an adapter's."
            )
    with atomic_folder(output.absolute()) as folder, progress.phase("Loading", len(loaded), "models") as advance:
        for name, path in loaded.items():
            _write(path, folder / name, auto)
            advance(1)
    entries: dict[str, PoolFile] = {
        name: replace(entry, file=output.absolute() / name if name in loaded else places[name], sha256=None)
        for name, entry in files.models.items()
    }
    packed = replace(files, base=entries.pop("base"), experts=entries)
    save_pool_file(packed, output / "pool.yaml")
    return [*(output / name for name in loaded), output / "pool.yaml"]


def _write(source: Path, folder: Path, auto: str | None) -> None:
    """Write one model as it is in memory, with the files beside its weights."""
    from adamerge.backbones.networks import check_size, class_of, read_config, tied_names
    from adamerge.checkpoints.writing import save_state_dict
    from adamerge.results.formats.transformers import quiet

    config = read_config(source)
    kind = class_of(config, auto, source)
    check_size(kind, config)
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}  # unpickles nothing
    try:
        with quiet():
            model: Any = kind.from_pretrained(source, dtype="auto", **options)
    except Exception as error:  # whatever the library makes of files that are not its own
        raise InputError(
            f"{source}: transformers cannot load it: {' '.join(str(error).split())[:300]} Weights that are pickled "
            "become safetensors with adamerge convert."
        ) from error
    tensors: Mapping[str, Any] = model.state_dict()
    tied = tied_names(model)
    kept = {name: tensor for name, tensor in tensors.items() if name not in tied}
    folder.mkdir(parents=True)
    for path in source.iterdir():
        is_weights = path.name.endswith((".safetensors", ".bin", ".index.json"))
        if path.is_file() and not is_weights and path.suffix != ".py":
            shutil.copyfile(path, folder / path.name)
    save_state_dict(kept, folder / "model.safetensors")
