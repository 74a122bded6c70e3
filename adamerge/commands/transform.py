"""``transform``: a pool and a transform in, a file of packed task vectors out.

The experts are streamed, so that memory does not grow with their number. ``pool.yaml`` beside the file names it and the
raw experts, which stay the teachers; ``transform.json`` is the recipe, and running it again gives the same bytes. What
imports torch is imported where it is used, so that options that are wrong do not wait for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adamerge.commands.terminal import json_option, print_files, rule_options
from adamerge.errors import InputError
from adamerge.system import progress

if TYPE_CHECKING:
    from adamerge.pool.pool_file import PoolFiles

FORMAT = 1
_PACKED, _POOL, _RECIPE = "task_vectors.safetensors", "pool.yaml", "transform.json"


@dataclass(frozen=True)
class TransformJob:
    """One transformation.

    Attributes:
        rule: The transform's node: ``_target_`` (null for none) and its options.
        pool: Base and raw experts.
        dtype: Of the packed task vectors; None for the pool's compute dtype.
    """

    rule: Mapping[str, Any]
    pool: "PoolFiles"
    dtype: str | None = None


@click.command()
@rule_options(
    "Name of a transform, such as ties (docs/methods.md), an import path, or none to pack only.", "transform.json"
)
@click.option("--dtype", default=None, help="float32 (default), bfloat16, float16 or int8.")
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="Folder.")
@json_option
def transform(output: Path, as_json: bool, recipe: Path | None, dtype: str | None, **options: Any) -> None:
    """Write a pool's transformed task vectors into one file, which is streamed from then on.

    \b
    adamerge transform --rule ties --set density=0.3 --pool pool.yaml --dtype bfloat16 --out packed
    adamerge adapt pool=files pool.file=packed/pool.yaml data=mine
    adamerge merge --rule task_arithmetic --pool packed/pool.yaml --out merged
    """  # noqa: D301
    from adamerge.commands.run.named_pools import rule_and_pool

    if recipe is not None:
        if any((*options.values(), dtype)):
            raise InputError("transform: --recipe holds everything but --out; leave the other options out.")
        job = read_recipe(recipe)
    else:
        job = TransformJob(*rule_and_pool("transform", **options), dtype)
    print_files(run(job, output), as_json)


def run(job: TransformJob, folder: Path) -> dict[str, Path]:
    """Transform and pack.

    Args:
        job: What to transform, and how.
        folder: Where to write.

    Returns:
        Short name to file, of what was written.

    Raises:
        InputError: If the transform, an option or a file is wrong.
    """
    from omegaconf import OmegaConf

    from adamerge.commands.run.build import build_optional
    from adamerge.pool.pack import write_packed
    from adamerge.pool.task_vectors import dtype_of
    from adamerge.results import recipes
    from adamerge.results.export import versions
    from adamerge.system.files import atomic_path, ensure_writable, save_json

    if job.pool.task_vectors is not None:
        packed = job.pool.task_vectors.file
        raise InputError(f"transform: the pool has packed task vectors already ({packed}); name one of raw experts.")
    dtype = dtype_of(job.dtype)
    transform = build_optional(OmegaConf.create({"transform": dict(job.rule)}), "transform")
    ensure_writable(folder)
    job.pool.verify()
    watch = progress.Stopwatch()
    pool = job.pool.open(storage="stream", dtype=None)
    files = {"task_vectors": folder / _PACKED, "pool": folder / _POOL, "recipe": folder / _RECIPE}
    name = type(transform).__name__ if transform is not None else "packing"
    with progress.phase(f"Writing task vectors: {name}", len(pool.names), "tensors") as advance:
        write_packed(pool, files["task_vectors"], dtype, transform, lambda _: advance(1))
    raw = job.pool.pinned({})  # the packed file knows the hashes
    content = {**raw.described(), "dtype": None, "storage": None, "task_vectors": _PACKED}
    with atomic_path(files["pool"]) as temporary:
        temporary.write_text(OmegaConf.to_yaml({k: v for k, v in content.items() if v is not None}), encoding="utf-8")
    recipe = {
        "format": FORMAT,
        "versions": versions(),
        "rule": dict(job.rule),
        "dtype": job.dtype,
        "files": job.pool.described(),
        "hashes": pool.hashes(),
        "skipped": pool.skipped,
        **recipes.command_facts(watch.seconds()),
    }
    save_json(recipe, files["recipe"])
    return files


def read_recipe(path: Path) -> TransformJob:
    """Read a ``transform.json`` for another run; its files must still have the hashes that it records.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no recipe of this command.
    """
    from adamerge.pool.pool_file import pool_files
    from adamerge.results import recipes

    content = recipes.read_recipe(path, "transform", ("rule", "files", "dtype", "hashes"))
    pool = pool_files(content["files"], str(path), path.parent).pinned(content["hashes"])
    return TransformJob(content["rule"], pool, content["dtype"])
