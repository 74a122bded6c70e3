"""Runs of two stages: the configuration of the first, what the second starts from, and in which a run stands."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adamerge.commands.run.build import build, build_init
from adamerge.errors import InputError, did_you_mean
from adamerge.model.coefficients import Coefficients, load_coefficients
from adamerge.model.granularity import index_of
from adamerge.model.refinement import Refinement, transfer
from adamerge.pool.describe import describe
from adamerge.pool.pool import ExpertPool
from adamerge.system.files import sha256

STAGE = Path("stage_1")  # the first stage's folder, in the run's
START = "start.json"  # what the second stage starts from; that it is there says that the first has ended
_PARTS = (
    *("steps", "init", "objective", "granularity", "constraint", "optimizer", "method", "callbacks"),
    "checkpoint_every",
)


def first_stage(config: DictConfig) -> DictConfig | None:
    """Return the configuration of a run's first stage, or None where it has one stage only.

    That is the run's own with the parts that the node ``first_stage`` names: a part with a ``_target_`` replaces the
    run's, any other changes options in it. ``init`` is the start of the first stage.

    Args:
        config: The run's, not resolved: ``trainer.max_steps`` must follow the stage's steps.

    Raises:
        InputError: If the node is no mapping, or names what a stage cannot change.
    """
    node = config.get("first_stage")
    if node is None:
        return None
    if not isinstance(node, DictConfig):
        raise InputError(f"first_stage: expected a mapping such as {{steps: 75}}, found {node!r}.")
    unknown = [key for key in map(str, node) if key not in _PARTS]
    if unknown:
        raise InputError(
            f"first_stage.{unknown[0]}: no part of a stage.{did_you_mean(unknown[0], _PARTS)} It takes: "
            f"{', '.join(_PARTS)}; pool, data and backbone are the run's."
        )
    stage = config.copy()
    OmegaConf.set_struct(stage, False)
    for key, part in node.items_ex(resolve=False):
        changes = isinstance(part, DictConfig) and not part._is_interpolation() and "_target_" not in part
        stage[key] = OmegaConf.merge(stage[key], part) if changes and stage.get(key) is not None else part
    stage.first_stage, stage.resume = None, None
    stage.name = f"{config.name}_{STAGE}"
    stage.run_dir = str(Path(str(config.run_dir)) / STAGE)
    return stage


def start_file(config: DictConfig) -> Path | None:
    """Return the coefficients file that a run starts from: its first stage's, or the one that ``init`` names."""
    if config.get("first_stage") is not None:
        return Path(str(config.run_dir)) / START
    init = config.get("init")
    return Path(init) if isinstance(init, str) and init.endswith(".json") else None


def coefficients_of(config: DictConfig, pool: ExpertPool) -> tuple[Coefficients, dict[str, Any]]:
    """Make a run's coefficients, and the record of where they start if they start from others.

    After a first stage ``init`` stays what anchors refer to: the loss of both stages is the same.
    """
    granularity, constraint = build(config, "granularity"), build(config, "constraint")
    init, path = build_init(config), start_file(config)
    if path is None:
        return Coefficients(pool, granularity, init, constraint), {}
    if not path.is_file():
        hint = f"The run's first stage has not ended: go on with adamerge adapt resume={config.run_dir}, or export it."
        raise InputError(f"{path}: no such file, to start from. {hint if config.get('first_stage') else 'Check init.'}")
    of_stage = OmegaConf.select(config, "first_stage.granularity._target_") is not None
    learned_granularity = build(config, "first_stage.granularity") if of_stage else granularity
    learned = load_coefficients(path, pool, learned_granularity)
    if isinstance(granularity, Refinement):
        granularity = granularity.refine(pool, learned)
    index = index_of(granularity, pool)
    values = transfer(learned, index)
    if isinstance(init, str) and init.endswith(".json"):
        init = values if Path(init) == path else transfer(load_coefficients(Path(init), pool, granularity), index)
    coefficients = Coefficients(pool, granularity, init, constraint)
    coefficients.warm_start(values)
    inside = path.is_relative_to(str(config.run_dir))
    name = str(path.relative_to(str(config.run_dir)) if inside else path)
    return coefficients, {"start": {"file": name, "sha256": sha256(path), "granularity": describe(granularity)}}


def running_stage(folder: Path) -> Path:
    """Return the folder that a run stands in: its first stage's until that has ended, then its own."""
    return folder / STAGE if (folder / STAGE).is_dir() and not (folder / START).is_file() else folder


def fold_folder(folder: Path, number: int) -> Path:
    """Return the folder of a fold of a run, counted from 1."""
    return folder / "checkpoints" / f"fold_{number}"
