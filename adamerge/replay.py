"""Export without data: a run's last checkpoint, or a coefficients file."""

from pathlib import Path

import torch

from adamerge import launch
from adamerge.coefficients import Coefficients, load_coefficients
from adamerge.errors import InputError
from adamerge.export import export
from adamerge.pool import ExpertPool
from adamerge.preflight import build


def export_run(run_dir: Path, coefficients: Path | None, output: Path) -> dict[str, Path]:
    """Export a run from its last checkpoint or from given coefficients; no image is read.

    Args:
        run_dir: The folder of the run, for its configuration and heads.
        coefficients: A ``coefficients.json`` of the same pool; default the run's last checkpoint.
        output: Where to write.

    Raises:
        InputError: If the folder is not a run's, has no checkpoint, or the coefficients are another pool's.
    """
    config = launch.load_config(run_dir)
    backbone = build(config, "backbone")
    pool = launch.build_pool(config, backbone)
    granularity = build(config, "granularity")
    if coefficients is not None:
        values = load_coefficients(coefficients, pool, granularity)
    else:
        values = Coefficients(pool, granularity, init=0.0, constraint=build(config, "constraint"))
        _restore(values, run_dir / launch.LAST)
    recipe = {"config": launch.plain(config), "replayed": str(coefficients or run_dir / launch.LAST)}
    return export(pool, values, output, sidecar=backbone.sidecar(), recipe=recipe)


def export_files(
    base: Path, experts: dict[str, Path], coefficients: Path, output: Path, prefix: str
) -> dict[str, Path]:
    """Export from files alone.

    Raises:
        InputError: If anything does not fit.
    """
    pool = ExpertPool.from_files(base, experts, key_map=prefix or None)
    return export(pool, load_coefficients(coefficients, pool), output, recipe={"replayed": str(coefficients)})


def _restore(coefficients: Coefficients, checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such checkpoint. Has the run saved one yet? Give --coefficients instead.")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    raw = state["model.coefficients.raw"]
    if raw.shape != coefficients.raw.shape:
        raise InputError(
            f"{checkpoint}: expected coefficients of shape {tuple(coefficients.raw.shape)}, found {tuple(raw.shape)}."
        )
    with torch.no_grad():
        coefficients.raw.copy_(raw)
