"""``transform``: a pool and a transform in, a file of packed task vectors out.

The experts are streamed, so that memory does not grow with their number. ``pool.yaml`` beside the file names it and the
raw experts, which stay the teachers; ``transform.json`` is the recipe, and running it again gives the same bytes. What
imports torch is imported where it is used, so that options that are wrong do not wait for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adamerge.commands.terminal import json_option, print_files, rule_options, trust_option
from adamerge.errors import InputError
from adamerge.system import progress

if TYPE_CHECKING:
    from adamerge.pool.pool_file import PoolFiles

FORMAT = 1
_PACKED, _POOL, _RECIPE = "task_vectors.safetensors", "pool.yaml", "transform.json"


@click.command()
@rule_options(
    "Name of a transform, such as ties (docs/methods.md), an import path, or none to pack only.", "transform.json"
)
@click.option("--dtype", default=None, help="float32 (default), bfloat16, float16 or int8.")
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="Folder.")
@trust_option
@json_option
def transform(output: Path, as_json: bool, dtype: str | None, **options: Any) -> None:
    """Write a pool's transformed task vectors into one file, which is streamed from then on.

    \b
    adamerge transform --rule ties --set density=0.3 --pool pool.yaml --dtype bfloat16 --out packed
    adamerge adapt pool=files pool.file=packed/pool.yaml data=mine
    adamerge merge --rule task_arithmetic --pool packed/pool.yaml --out merged
    """  # noqa: D301
    from adamerge.commands.run.named_pools import rule_and_pool

    node, files, extra = rule_and_pool("transform", {"dtype": dtype}, **options)
    print_files(run(node, files, output, **extra), as_json)


def run(node: Mapping[str, Any], pool_files: "PoolFiles", folder: Path, dtype: str | None = None) -> dict[str, Path]:
    """Transform and pack.

    Args:
        node: ``_target_`` of the transform (null for none) and its options.
        pool_files: Base and raw experts.
        folder: Where to write.
        dtype: Dtype of the packed task vectors; None for the pool's compute dtype.

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

    if pool_files.task_vectors is not None:
        packed = pool_files.task_vectors.file
        raise InputError(f"transform: the pool has packed task vectors already ({packed}); name one of raw experts.")
    stored_dtype = dtype_of(dtype)
    transform = build_optional(OmegaConf.create({"transform": dict(node)}), "transform")
    ensure_writable(folder)
    pool_files.verify()
    watch = progress.Stopwatch()
    pool = pool_files.open_mapped(dtype=None)
    files = {"task_vectors": folder / _PACKED, "pool": folder / _POOL, "recipe": folder / _RECIPE}
    name = type(transform).__name__ if transform is not None else "packing"
    with progress.phase(f"Writing task vectors: {name}", len(pool.names), "tensors") as advance:
        write_packed(pool, files["task_vectors"], stored_dtype, transform, lambda _: advance(1))
    raw = pool_files.pinned({})  # the packed file knows the hashes
    content = {**raw.described(), "dtype": None, "storage": None, "task_vectors": _PACKED}
    with atomic_path(files["pool"]) as temporary:
        temporary.write_text(OmegaConf.to_yaml({k: v for k, v in content.items() if v is not None}), encoding="utf-8")
    recipe = {
        "format": FORMAT,
        "versions": versions(),
        "rule": dict(node),
        "dtype": dtype,
        "files": pool_files.described(),
        "hashes": pool.hashes(),
        "skipped": pool.skipped,
        **recipes.command_facts(watch.seconds()),
    }
    save_json(recipe, files["recipe"])
    return files
