"""Export on request: a run's last checkpoint, or a coefficients file."""

import shutil
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from adamerge.backbones import Backbone
from adamerge.callbacks.checkpoint_io import AtomicCheckpointIO
from adamerge.commands.run import folder as run_folder
from adamerge.commands.run import run as launch
from adamerge.commands.run.build import build, containers
from adamerge.commands.run.imports import announce, check_own, check_targets
from adamerge.errors import InputError
from adamerge.model.batch_norm import FILE, average, average_for, load_statistics
from adamerge.model.coefficients import Coefficients, load_coefficients
from adamerge.pool.pool import ExpertPool
from adamerge.pool.pool_file import PoolFiles
from adamerge.results.export import digest, export
from adamerge.system.files import atomic_path


def export_run(run_dir: Path, coefficients: Path | None, output: Path) -> dict[str, Path]:
    """Export a run from its last checkpoint, or replay given coefficients.

    Args:
        run_dir: The folder of the run, for its configuration.
        coefficients: A ``coefficients.json`` of the same pool: no image is read, and the heads are the run's own, if
            it has exported any. Default the run's last checkpoint, with heads built anew. Where the run recalibrates
            BatchNorm layers, the statistics beside the file are taken, or images are read if there are none.
        output: Where to write; the run's own folder only while it has no export.

    Raises:
        InputError: If the folder is not a run's, has no checkpoint, or the coefficients are another pool's.
    """
    run_dir, output = run_dir.absolute(), output.absolute()
    coefficients = coefficients.absolute() if coefficients else None
    config = run_folder.load_config(run_dir)
    if output.resolve() == run_dir.resolve() and (run_dir / "merged.safetensors").exists():
        raise InputError(f"{run_dir} has an export already, which would be replaced. Give --output.")
    source = coefficients or run_dir / run_folder.LAST
    recipe = {"config": run_folder.plain(config), "replayed": str(source)}
    if coefficients is None:
        assembly = launch.assemble(config)
        values = assembly.model.coefficients  # frozen groups keep their initial value; the checkpoint lacks them
        _restore(values, source)
        return export(
            assembly.pool,
            values,
            output,
            statistics=_final(assembly),
            heads=assembly.heads,
            head_info=launch.head_info(assembly.data),
            sidecar=assembly.backbone.sidecar(),
            recipe=recipe,
        )
    imports = containers(config)
    check_targets(imports)
    announce(imports)
    backbone = build(config, "backbone")
    pool = launch.build_pool(config, backbone)
    values = load_coefficients(coefficients, pool, build(config, "granularity"))
    statistics = _statistics_beside(coefficients, values)
    if statistics is None:
        statistics = _statistics_anew(config, backbone, pool, values)
    files = export(pool, values, output, statistics=statistics, sidecar=backbone.sidecar(), recipe=recipe)
    if (run_dir / "heads.safetensors").is_file():
        files["heads"] = output / "heads.safetensors"
        with atomic_path(files["heads"]) as temporary:
            shutil.copyfile(run_dir / "heads.safetensors", temporary)
    return files


def pool_of(run_dir: Path) -> ExpertPool:
    """Open the pool of a run, to look at; its experts stay in their files where they can.

    The folder may be another's, so that nothing but adamerge's own backbones and transforms is built.

    Raises:
        InputError: If the folder is not a run's, names code of others, or the files do not fit.
    """
    config = run_folder.load_config(run_dir.absolute())
    for node in ("backbone", "transform"):
        if config.get(node) is not None:
            check_own({node: OmegaConf.to_container(config[node], resolve=True)})
    return launch.build_pool(config, build(config, "backbone"))


def export_files(files: PoolFiles, coefficients: Path, output: Path) -> dict[str, Path]:
    """Export from files alone; BatchNorm statistics are those beside the coefficients, or else the base's.

    Raises:
        InputError: If anything does not fit.
    """
    files.verify()
    pool = files.open(duplicates="allow")
    values = load_coefficients(coefficients, pool)
    statistics = _statistics_beside(coefficients, values)
    return export(pool, values, output, statistics=statistics, recipe={"replayed": str(coefficients)})


def _statistics_beside(path: Path, coefficients: Coefficients) -> dict[str, Tensor] | None:
    """Return the BatchNorm statistics that were exported with a coefficients file; None where there are none."""
    beside = path.parent / FILE
    if not beside.is_file():
        return None
    statistics, facts = load_statistics(beside)
    if facts.get("coefficients") != digest(coefficients):
        raise InputError(
            f"{beside}: expected the statistics of {path.name}, found those of other coefficients. Remove it, or "
            "replay the coefficients that it was written with."
        )
    return statistics


def _statistics_anew(
    config: DictConfig, backbone: Backbone, pool: ExpertPool, coefficients: Coefficients
) -> dict[str, Tensor]:
    """Return the BatchNorm statistics of coefficients; images are read only where there are layers to recalibrate."""
    policy = launch.build_batch_norm(config)
    if policy.policy == "base" or not average(pool):
        return {}
    if not policy.needs_data:
        return average_for(backbone.encoder(), pool)
    assembly = launch.assemble(config)
    assembly.model.coefficients = coefficients
    return _final(assembly)


def _final(assembly: launch.Assembly) -> dict[str, Tensor]:
    """Return the BatchNorm statistics of a run's coefficients."""
    if not assembly.batch_norm.applies(assembly.model):
        return {}
    with torch.no_grad():
        return assembly.batch_norm.final(assembly.model, assembly.model.merge(), assembly.data)


def _restore(coefficients: Coefficients, checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such checkpoint. Has the run saved one yet? Give --coefficients instead.")
    state = AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)["state_dict"]
    raw = state["model.coefficients.raw"]
    if raw.shape != coefficients.raw.shape:
        raise InputError(
            f"{checkpoint}: expected coefficients of shape {tuple(coefficients.raw.shape)}, found {tuple(raw.shape)}."
        )
    with torch.no_grad():
        coefficients.raw.copy_(raw)
