"""``merge``: a pool and a rule in, one merged checkpoint out.

What decides the result goes into ``merge.json``; running that recipe again gives the same bytes. What imports torch is
imported where it is used, so that options that are wrong do not wait for it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adamerge.commands.terminal import json_option, print_files, rule_options, trust_option
from adamerge.errors import InputError
from adamerge.system import progress

if TYPE_CHECKING:
    from adamerge.commands.run.assembly import Assembly
    from adamerge.model.batch_norm import BatchNormPolicy
    from adamerge.pool.pool_file import PoolFiles


@click.command()
@rule_options("Name of a rule, such as tsvm, ties or regmean++ (docs/methods.md), or an import path.", "merge.json")
@click.option(
    "--batch-norm",
    type=click.Choice(["base", "average", "recalibrate"]),
    help="Statistics of BatchNorm layers, if there are any.  [recalibrate if the rule reads data, else average]",
)
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option("--config-dir", type=click.Path(path_type=Path), help="Your own yaml files, for OVERRIDES.")
@trust_option
@json_option
@click.argument("overrides", nargs=-1)
def merge(
    output: Path,
    as_json: bool,
    batch_norm: str | None,
    config_dir: Path | None,
    overrides: tuple[str, ...],
    trust_code: bool,
    **options: Any,
) -> None:
    """Merge a pool by a rule, without training.

    \b
    adamerge merge --rule tsvm --base BASE --expert cars=FILE --expert dtd=FILE --out merged
    adamerge merge --rule ties --set density=0.1 --pool pool.yaml --out merged
    adamerge merge --rule regmean++ --pool zoo --out merged
    adamerge merge --rule regmean --pool pool.yaml --config-dir my_configs --out merged \\
        data=mine backbone=open_clip backbone.model=ViT-B-32
    adamerge merge --recipe merged/merge.json --out again

    Rules that need unlabeled data (fisher, regmean, regmean++), and --batch-norm recalibrate, take OVERRIDES that name
    backbone and data, as `adamerge adapt` does; the default is the demo zoo's.
    """  # noqa: D301
    from adamerge.commands.run.named_pools import rule_and_pool

    folder = () if config_dir is None else (f"--config-dir={config_dir.absolute()}",)
    extra: dict[str, Any] = {"overrides": [*folder, *overrides], "batch_norm": batch_norm}
    rule, files, extra = rule_and_pool("merge", extra, trust_code=trust_code, **options)
    recipe = options["recipe"]
    source = str(recipe) if recipe is not None and not trust_code else None
    print_files(run(rule, files, output, **extra, stored_in=source), as_json)


def run(
    rule_node: Mapping[str, Any],
    files: "PoolFiles",
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    batch_norm: str | None = None,
    stored_in: str | None = None,
) -> dict[str, Path]:
    """Merge and export.

    Args:
        rule_node: ``_target_`` of the rule and its options.
        files: Base and experts.
        folder: Where to write.
        overrides: Hydra arguments of ``adapt`` that name backbone and data, where data is needed.
        batch_norm: Policy of BatchNorm statistics; None: ``recalibrate`` where the rule reads data, else ``average``.
        stored_in: The recipe that the overrides are from, where it is not trusted, see :func:`compose`.

    Returns:
        Short name to file, of what was written.

    Raises:
        InputError: If the rule, an option, a file or the data is wrong.
        GuardError: If the result is not finite.
    """
    from omegaconf import OmegaConf

    from adamerge.commands.run.build import build
    from adamerge.merges import merged_tensors
    from adamerge.model.batch_norm import BatchNormPolicy
    from adamerge.results import recipes
    from adamerge.results.export import export
    from adamerge.results.report import PAGE
    from adamerge.system.files import ensure_writable

    rule = build(OmegaConf.create({"merge": dict(rule_node)}), "merge")
    reads_data = bool(getattr(rule, "needs_data", False))
    policy = BatchNormPolicy(batch_norm or ("recalibrate" if reads_data else "average"))  # type: ignore[arg-type]
    needs_data = reads_data or policy.needs_data
    if overrides and not needs_data:
        raise InputError(f"merge: {type(rule).__name__} reads no data; leave out {' '.join(overrides)}.")
    files.verify()
    watch = progress.Stopwatch()
    extras: dict[str, Any] = {}
    if needs_data:
        assembly, extras = _assemble(files, overrides, policy, stored_in)
        pool, model, data = assembly.pool, assembly.model, assembly.data
    else:
        pool = files.open_mapped() if getattr(rule, "one_pass", False) else files.open()
        model, data = None, None
    ensure_writable(folder)
    decided = {"rule": dict(rule_node), "overrides": list(overrides), "batch_norm": policy.policy}
    recipe = {
        **decided,
        "files": files.described(),
        "uses_data": needs_data,
        "uses_labels": bool(getattr(rule, "uses_labels", False)),
    }
    with progress.phase(f"Merging: {type(rule).__name__}", len(pool.names), "tensors") as advance:
        tensors = merged_tensors(pool, rule, model=model, data=data, on_parameter=lambda _: advance(1))
        tensors = policy.complete(tensors, model, pool, data)
        tensors = recipes.timed(tensors, recipe, watch)
        written = export(pool, tensors, folder, facts=decided, recipe=recipe, **extras)
    (folder / PAGE).unlink(missing_ok=True)  # of another merge, which this one replaces
    return written


def _assemble(
    files: "PoolFiles", overrides: Sequence[str], policy: "BatchNormPolicy", stored_in: str | None
) -> tuple["Assembly", dict[str, Any]]:
    """Build backbone, data and heads around the pool, as ``adapt`` would; return them and the parts to export."""
    from lightning.pytorch import seed_everything  # as is all of a run, it is heavy, and most rules read no data

    from adamerge.commands.run.assembly import assemble
    from adamerge.commands.run.compose import compose, name_experts
    from adamerge.commands.run.run import head_info

    config = compose(overrides, stored_in=stored_in)
    config.pool = files.node()
    config.granularity = {"_target_": "adamerge.model.granularity.TaskWise"}  # the merge has no coefficients
    config.init, config.transform = "mean", None
    config.batch_norm.policy = policy.policy
    _check_overrides(overrides)
    name_experts(config, files)
    seed_everything(config.seed, workers=True, verbose=False)
    with progress.phase("Reading the pool and building the heads"):
        assembly = assemble(config)
    prefix, given = assembly.backbone.prefix, files.key_prefix
    if given not in (None, prefix):
        raise InputError(f"--key-prefix: the backbone's keys begin with {prefix!r}, found {given!r}.")
    heads, sidecar = assembly.heads, assembly.backbone.sidecar()
    return assembly, {"heads": heads, "head_info": head_info(assembly.data), "sidecar": sidecar}


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that have no say in a merge."""
    used = ("backbone", "data", "seed", "--config-dir", "-cd")
    for argument in overrides:
        key = argument.lstrip("+~").split("=")[0]
        if "=" in argument and not key.startswith(used):
            raise InputError(
                f"merge {argument}: only backbone, data and seed are read from the configuration of `adapt`; "
                "the rule's options are given by --set, the pool by --pool."
            )
