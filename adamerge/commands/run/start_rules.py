"""What the option ``start`` names: rules of `adamerge merge`, checked before anything is read."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adamerge.backbones.file_names import path_of
from adamerge.commands.run import processes
from adamerge.commands.run.build import build
from adamerge.commands.run.shipped import rule_node
from adamerge.errors import InputError
from adamerge.pool.adapter_config import CONFIG as ADAPTER
from adamerge.system import ranks

AUTO = (  # what start=auto chooses among: rules that read the samples would be judged by what they were fitted to
    *(f"task_arithmetic coefficient={coefficient}" for coefficient in (0.1, 0.2, 0.3, 0.4)),
    *("tsvm", "wudi"),
)


def rules_of(start: Any) -> dict[str, dict[str, Any]]:
    """Return the rules that an option ``start`` names, by their texts: of ``auto`` several.

    Args:
        start: ``auto``, a rule's name or import path, ``{rule: ..., option: ...}``, or a node with a ``_target_``.

    Raises:
        InputError: If there is no such rule, or it does not take an option.
    """
    if isinstance(start, DictConfig):
        start = OmegaConf.to_container(start, resolve=True)
    if isinstance(start, Mapping) and "_target_" in start:
        return {str(start["_target_"]).rpartition(".")[2]: _checked(dict(start))}
    if isinstance(start, Mapping):
        options = {str(key): value for key, value in start.items() if key != "rule"}
        start = " ".join([str(start.get("rule")), *(f"{key}={value}" for key, value in options.items())])
    if not isinstance(start, str) or not start.strip():
        raise InputError(f"start: expected auto, a rule, or {{rule: ..., OPTION: ...}}, found {start!r}.")
    nodes = {}
    for text in AUTO if start == "auto" else (start,):
        name, *settings = text.split()
        try:
            nodes[text] = _checked(rule_node("merge", name, settings))
        except InputError as error:
            raise InputError(f"start={start}: {str(error).removeprefix('--rule: ')}") from error
    return nodes


def is_merged(config: DictConfig) -> bool:
    """Whether a run has begun from a rule's merge, which is its base then."""
    start = config.get("start")
    return isinstance(start, DictConfig) and bool(start.get("merged"))


def check_start_rule(config: DictConfig) -> None:
    """Refuse a start that cannot be merged; nothing is read.

    Raises:
        InputError: If the rule is wrong, or another than ``auto`` and no merge can be this run's start.
    """
    start = config.get("start")
    if start is None or is_merged(config):
        return
    rules_of(start)
    if start != "auto" and (reason := why_unmerged(config)):
        raise InputError(f"start: {reason}; set start=null, or start=auto, which then starts from init.")


def why_unmerged(config: DictConfig) -> str:
    """Return why a run cannot start from a rule's merge; nothing if it can."""
    if max(processes.wanted(config.trainer), ranks.count()) > 1:
        return (
            "a rule's merge is made in one process (trainer.devices=1; or make it with adamerge merge, and give "
            "start=null pool.base=FILE init=0)"
        )
    if str(config.get("init")).endswith(".json"):
        return f"init={config.init} has coefficients of the pool's own base"
    if config.pool.get("task_vectors") is not None:
        return "pool.task_vectors are the ways from the pool's own base"
    if OmegaConf.select(config, "backbone.vocabulary") == "shared":
        return "experts with further tokens (backbone.vocabulary=shared) are read beside the pool's own base"
    for name, place in (config.pool.get("experts") or {}).items():
        with suppress(InputError):  # a model that the Hub's cache lacks: said where the pool is opened
            if (path_of(place).expanduser() / ADAPTER).is_file():
                return f"expert {name!r} is a LoRA adapter, which goes with the base, not with a merge"
    return ""


def _checked(node: dict[str, Any]) -> dict[str, Any]:
    """Build a rule, which refuses options that it does not take."""
    build(OmegaConf.create({"merge": node}), "merge")
    return node
