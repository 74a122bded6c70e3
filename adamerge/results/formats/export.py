"""The command ``adamerge export RUN --to FORMAT``: write, load back, describe, and upload if asked to."""

import importlib
import logging
import shutil
from pathlib import Path
from typing import Any

from adamerge.backbones import Transformers
from adamerge.errors import InputError
from adamerge.results.formats import card, upload
from adamerge.results.formats.merged import BackboneOf, MergedFolder, open_merged
from adamerge.system.files import atomic_folder, save_json, sha256
from adamerge.system.reading import as_written

log = logging.getLogger(__name__)

FORMATS = {"open_clip": "open_clip", "hf": "hugging_face", "torchvision": "torchvision", "onnx": "onnx"}
_STATED = (  # of the recipe, as it is
    *("format", "versions", "seed", "steps", "protocol", "rule", "uses_data", "uses_labels", "batch_norm", "metrics"),
    *("scores", "stated"),
)
_KEPT = ("coefficients.json", "coefficients.safetensors", "heads.safetensors", "batch_norm.safetensors")


def export_as(
    folder: Path,
    target: str,
    out: Path,
    backbone_of: BackboneOf,
    *,
    task: str | None = None,
    repository: str | None = None,
    public: bool = False,
) -> tuple[list[Path], str | None]:
    """Write a merge in another library's format, load it back there, and compare; nothing is left if that fails.

    Args:
        folder: Folder of a run, or of a merge.
        target: One of :data:`FORMATS`.
        out: A new folder, or an empty one.
        backbone_of: See :func:`~adamerge.results.formats.merged.open_merged`.
        task: Whose classifier a torchvision file, or a folder of transformers, gets; default the base's.
        repository: Where to upload to, ``org/name``; None for nowhere.
        public: Whether the upload may be public.

    Returns:
        The files; and the address of the upload.

    Raises:
        InputError: If the folder has no merge, the format cannot hold it, or ``out`` is in use.
        GuardError: If what was loaded back computes something else.
    """
    if task is not None and target not in ("torchvision", "hf"):
        raise InputError(
            f"--task {task}: only --to torchvision and --to hf have one classifier; leave it out for --to {target}."
        )
    if repository is not None:
        upload.check_name(repository)
    folder, out = folder.absolute(), out.absolute()
    check_new(out)
    merged = open_merged(folder, backbone_of)
    name = out.name if repository is None else repository.split("/")[1]
    with atomic_folder(out) as temporary:
        _write(merged, target, temporary, name, {} if task is None else {"task": task})
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return files, None if repository is None else upload.upload(out, repository, public=public)


def check_new(out: Path) -> None:
    """Refuse a folder that has files.

    Raises:
        InputError: If it has, or is none.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: expected a new folder, found one with files. Choose another, or remove it.")


def _write(merged: MergedFolder, target: str, folder: Path, name: str, options: dict[str, Any]) -> None:
    name_of_module = FORMATS[target]
    if isinstance(merged.backbone, Transformers):
        if target != "hf":
            raise InputError(f"--to {target}: the merge is of a model of transformers; export it with --to hf.")
        name_of_module = "transformers"
    elif target == "hf" and options:
        raise InputError(f"--task {options['task']}: a CLIP has no classifier of its own; leave it out.")
    module = importlib.import_module(f"adamerge.results.formats.{name_of_module}")
    usage = module.write(merged, folder, **options)
    module.prove(merged, folder, **options)
    log.info("Loaded back and compared: %s", ", ".join(usage.files))
    for kept in _KEPT:
        if (merged.folder / kept).is_file():
            shutil.copyfile(merged.folder / kept, folder / kept)
    with as_written(merged.folder / "merge.json"):
        save_json(_provenance(merged), folder / "adamerge.json")
        card.write_card(merged, folder, name, usage)


def _provenance(merged: MergedFolder) -> dict[str, Any]:
    """Return what is known of the merge for others: no paths of this machine."""
    recipe = merged.recipe
    return {
        **{key: recipe[key] for key in _STATED if key in recipe},
        "ingredients": card.ingredients(recipe),
        "merged_sha256": sha256(merged.path),
        "heads": {task: merged.info.get(task) for task in merged.heads},
    }
