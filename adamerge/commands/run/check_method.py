"""Make a run's method and callbacks before the pool is read: they refuse their options only when they are made."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adamerge.callbacks.keep_best import KeepBest
from adamerge.callbacks.never_worse import NeverWorse
from adamerge.commands.run.build import build, check_node
from adamerge.commands.run.check_files import Problems
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.methods.checks import check_task_weights
from adamerge.methods.method import MergingMethod
from adamerge.model.constraints import Unconstrained
from adamerge.model.groups import GroupIndex
from adamerge.objectives.entropy import Entropy

_OBJECTIVE = Entropy()  # stands in for one that is wrong, or checked as a part of its own


def check_method(config: DictConfig, parts: Mapping[str, Any], problems: Problems) -> None:
    """Check a stage's method; adamerge's own is made, for coefficients of which the constraint and groups are known.

    Args:
        config: Of the stage.
        parts: What has been built of it: objective, constraint, groups and data.
        problems: To which what is wrong is added.
    """
    with problems.naming("method"):
        _check_iterations(config)
    with problems.naming("method"):
        check_node(config, "method")
        if _is_own(config, "method"):
            method, data = _make_method(config, parts.get("constraint"), parts.get("index")), parts.get("data")
            if not method.learns_coefficients and config.get("first_stage") is not None:
                raise InputError(
                    "first_stage: not with method=distillation, which learns no coefficients; leave it out."
                )
            if isinstance(data, UnlabeledTasks):
                check_task_weights(method.task_weights, parts.get("objective", _OBJECTIVE), data.streams)


def check_callbacks(config: DictConfig, parts: Mapping[str, Any], problems: Problems) -> None:
    """Check a stage's callbacks; adamerge's own are made, and held against the data."""
    for name in config.get("callbacks") or {}:
        node = f"callbacks.{name}"
        with problems.naming(node):
            check_node(config, node)
            callback = build(config, node) if _is_own(config, node) else None
            if isinstance(callback, (KeepBest, NeverWorse)) and "data" in parts:
                callback.check_data(parts["data"])


def _is_own(config: DictConfig, node: str) -> bool:
    """Return whether a node's class is adamerge's, which does nothing but look at its options when it is made."""
    return str(OmegaConf.select(config, f"{node}._target_")).startswith("adamerge.")


def _make_method(config: DictConfig, constraint: Any, index: GroupIndex | None) -> MergingMethod:
    """Return the method, made for a stand-in of the model.

    Raises:
        InputError: If it refuses an option, or constraint or groups.
    """
    config = config.copy()
    OmegaConf.set_struct(config, False)
    if OmegaConf.is_interpolation(config.method, "optimizer"):
        del config.method.optimizer  # which is checked as a part of its own
    groups = {} if index is None else index.groups
    coefficients = SimpleNamespace(constraint=constraint or Unconstrained(), groups=groups)
    model = SimpleNamespace(coefficients=coefficients)
    method: MergingMethod = build(config, "method", model=model, objective=_OBJECTIVE)
    return method


def _check_iterations(config: DictConfig) -> None:
    """Refuse steps that end within an iteration of soft Frank-Wolfe."""
    steps, inner = config.get("steps"), config.method.get("inner_steps")
    is_counted = isinstance(steps, int) and isinstance(inner, int) and inner > 0
    if is_counted and config.method.get("mode") == "soft" and steps % inner:
        raise InputError(
            f"steps: expected a multiple of method.inner_steps ({inner}), the steps of one iteration, found {steps}: "
            f"{steps // inner} iterations and a part of one; such as steps={-(-steps // inner) * inner}."
        )
