"""Runs of two stages: the configuration of the first, and which of the two a run folder stands in."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from adamerge.errors import InputError, did_you_mean

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


def running_stage(folder: Path) -> Path:
    """Return the folder that a run stands in: its first stage's until that has ended, then its own."""
    return folder / STAGE if (folder / STAGE).is_dir() and not (folder / START).is_file() else folder
