"""The result on disk: merged checkpoint, coefficients, heads and recipe, written so that it can be trusted.

Every file is written to a temporary name, synced and renamed; each tensor of the checkpoint is written as soon as it is
merged, read back and compared.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adamerge import __version__
from adamerge.checkpoints.checkpoint import MemoryCheckpoint, drop_mapped_pages, load_state_dict, stored_facts
from adamerge.checkpoints.writing import save_state_dict, save_tensors
from adamerge.errors import GuardError, InputError
from adamerge.model.batch_norm import FILE, save_statistics, with_statistics
from adamerge.model.coefficients import Coefficients, save_coefficients
from adamerge.model.merge import merged_tensors
from adamerge.pool.pool import ExpertPool
from adamerge.pool.tiles import READ
from adamerge.pool.vocabulary import WithFurtherRows
from adamerge.results.model_writer import FOLDER, folder_of, write_model
from adamerge.system.files import atomic_path, combined_hash, ensure_writable, save_json
from adamerge.system.finite import is_finite

FORMAT = 1
HEADS, RECIPE = "heads.safetensors", "merge.json"


def export(
    pool: ExpertPool,
    merged: Coefficients | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    filename: str = "merged.safetensors",
    statistics: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
    heads: Mapping[str, nn.Module] | None = None,
    head_info: Mapping[str, Any] | None = None,
    sidecar: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write a merge to a folder, and prove it by reading it back.

    Args:
        pool: Base and experts.
        merged: Coefficients to merge with; or of a merge without any its state dict, or pairs of key and tensor in any
            order, each of which is written as it comes: every key of the base.
        folder: Made if needed; files of an earlier export are replaced one by one.
        filename: Name of the merged checkpoint: the base's keys and dtypes. Its bytes depend on pool, coefficients and
            statistics, or on pool and facts, only, so that a replay gives the same file.
        statistics: For BatchNorm, by the encoder's names, where they are not the base's. They are kept beside the
            coefficients, in ``batch_norm.safetensors``.
        facts: Facts of a merge without coefficients: what besides the pool decides the bytes, for the file's metadata.
        heads: Task to classifier, written to ``heads.safetensors``.
        head_info: JSON-ready facts about the heads by task, such as class names.
        sidecar: ``open_clip_config.json``'s content; with it, ``open_clip/`` loads in
            ``open_clip.create_model("local-dir:...")``.
        recipe: Further JSON-ready content of ``merge.json``.

    Where transformers wrote the base, the folder ``model/`` loads there as the base does.

    Returns:
        Short name to file, of what was written.

    Raises:
        InputError: If the folder is not writable.
        GuardError: If a merged tensor is not finite; nothing of the merge is written then.
        OSError: If a file cannot be written; an earlier version of it is then still there.
        RuntimeError: If what was read back differs from what was merged.
    """
    ensure_writable(folder)
    files = {"merged": folder / filename, "recipe": folder / RECIPE}
    if isinstance(merged, Coefficients):
        files |= _write_coefficients(pool, merged, files["merged"], statistics or {})
    else:
        decided = {**(facts or {}), "pool": combined_hash(pool.hashes())}
        tensors = merged.items() if isinstance(merged, Mapping) else merged
        remedy = "The rule does not suit these experts, or its scale is too large for this dtype."
        _write_checkpoint(files["merged"], pool, _finite(tensors, remedy), json.dumps(decided, sort_keys=True))
    content = {"format": FORMAT, "versions": versions(), "hashes": pool.hashes(), "skipped": pool.skipped}
    if heads:
        files["heads"] = folder / HEADS
        save_heads(heads, files["heads"], head_info or {})
    if sidecar:
        files["open_clip"] = folder / "open_clip"
        _write_open_clip(files["open_clip"], files["merged"], sidecar)
        content["stated"] = stated(sidecar)
    files |= _write_model(pool, files["merged"], folder)
    save_json({**content, **(recipe or {})}, files["recipe"])
    return files


def _write_model(pool: ExpertPool, merged: Path, folder: Path) -> dict[str, Path]:
    """Write the folder that transformers loads, where it wrote the base, with its vocabulary or the extended one."""
    base = folder_of(pool.source)
    if base is None:
        return {}
    extended, changes = pool.source, {}
    tokenizer = None
    if isinstance(extended, WithFurtherRows):
        path = Path(extended.longer.name)
        tokenizer = path if path.is_dir() else path.parent
        changes = {"vocab_size": max(extended.spec(key)[0][0] for key in extended.extended)}
    write_model(merged, base, folder / FOLDER, tokenizer=tokenizer, changes=changes)
    return {"model": folder / FOLDER}


def stated(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an open_clip configuration says of the features: the activation, and what images go through."""
    model = sidecar.get("model_cfg", {})
    preprocessing = {"preprocessing": dict(sidecar.get("preprocess_cfg", {}))}
    if "timm_model_name" in model.get("vision_cfg", {}):  # which has its own
        return preprocessing
    return {"activation": "QuickGELU" if model.get("quick_gelu") else "GELU", **preprocessing}


def _write_coefficients(
    pool: ExpertPool, coefficients: Coefficients, path: Path, statistics: Mapping[str, Tensor]
) -> dict[str, Path]:
    """Write the checkpoint of coefficients, and beside it these and the statistics of BatchNorm layers."""
    tensors = with_statistics(merged_tensors(pool, coefficients), pool, statistics)
    finite = _finite(tensors, "The coefficients diverged: lower the learning rate, or set constraint=box.")
    files = {"coefficients": path.with_name("coefficients.json")}
    facts = {"coefficients": digest(coefficients), "pool": combined_hash(pool.hashes())}
    beside = path.with_name(FILE)
    if statistics:
        facts["batch_norm"] = MemoryCheckpoint(FILE, statistics).sha256()
        files["batch_norm"] = beside
    _write_checkpoint(path, pool, finite, json.dumps(facts))
    if statistics:
        save_statistics(statistics, beside, {"coefficients": facts["coefficients"]})
    else:
        beside.unlink(missing_ok=True)  # of an earlier export
    save_coefficients(coefficients, files["coefficients"], pool)
    return files


def _write_checkpoint(path: Path, pool: ExpertPool, tensors: Iterable[tuple[str, Tensor]], facts: str) -> None:
    """Write a merge as it comes; whatever is in memory of the files that it is made of is let go meanwhile."""
    specs = {key: pool.source.spec(key) for key in pool.source.keys}
    save_tensors(specs, _passing(tensors), path, {"adamerge_format": str(FORMAT), "adamerge": facts})


def _passing(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tensors:
        yield key, tensor
        if tensor.numel() > READ:
            drop_mapped_pages()


def save_heads(heads: Mapping[str, nn.Module], path: Path, info: Mapping[str, Any]) -> None:
    """Write the tensors of each task's head as ``<task>/<name>``; ``info`` goes to the metadata as JSON."""
    tensors = {f"{task}/{name}": tensor for task, head in heads.items() for name, tensor in head.state_dict().items()}
    save_state_dict(tensors, path, {"adamerge_tasks": json.dumps(dict(info), ensure_ascii=False)})


def load_heads(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what :func:`save_heads` wrote: tensors by task and name, and the facts about the tasks.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is not a heads file.
    """
    tensors = load_state_dict(path)
    info = stored_facts(path, "adamerge_tasks")
    if info is None or any("/" not in key for key in tensors):
        raise InputError(f"{path}: not a heads file written by adamerge.")
    heads: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        task, name = key.rsplit("/", 1)
        heads.setdefault(task, {})[name] = tensor
    return heads, info


def versions() -> dict[str, str]:
    """Return the versions that decide a result: Python, adamerge, torch and the packages around it."""
    packages = ("torch", "lightning", "open_clip_torch", "torchvision", "safetensors")
    numbers = {"python": platform.python_version(), "adamerge": __version__}
    for package in packages:
        try:
            numbers[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return numbers


def digest(coefficients: Coefficients) -> str:
    """Hash the coefficients with the names of experts and groups they belong to."""
    digest = hashlib.sha256(json.dumps([coefficients.expert_names, coefficients.index.labels]).encode())
    digest.update(coefficients().detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _finite(tensors: Iterable[tuple[str, Tensor]], remedy: str) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on; refuse to write a merge that diverged, or overflows in the base's dtype."""
    for key, tensor in tensors:
        if not is_finite(tensor):
            raise GuardError(
                f"The merged tensor {key!r} ({str(tensor.dtype).removeprefix('torch.')}) is not finite, so nothing was "
                f"exported. {remedy}"
            )
        yield key, tensor


def _write_open_clip(folder: Path, merged: Path, config: Mapping[str, Any]) -> None:
    """Lay the checkpoint out as open_clip's ``local-dir:`` wants it; the weights are a hard link where possible."""
    if folder.is_symlink():
        raise InputError(f"{folder}: expected a folder of the export's own, found a link. Remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    save_json(config, folder / "open_clip_config.json")
    target = folder / "open_clip_model.safetensors"
    with atomic_path(target) as temporary:
        try:
            os.link(merged, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(merged, temporary)
