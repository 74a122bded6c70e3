"""Merges without training: a pool in, one state dict out.

A rule is any callable ``rule(pool)`` that yields each parameter's name and merged value; one that says
``needs_data`` is called with the merged model and its unlabeled tasks besides. It is chosen by name
(``configs/merge/NAME.yaml``) or import path. Frozen dataclasses serve well: a wrong option then fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from adamerge.errors import InputError, shorten
from adamerge.model import merge
from adamerge.pool.pool import ExpertPool

if TYPE_CHECKING:
    from adamerge.data.unlabeled_tasks import UnlabeledTasks
    from adamerge.model.merged_model import MergedModel

Merged = Iterator[tuple[str, Tensor]]


class Rule(Protocol):
    """Merges a pool from its weights alone.

    A class may set ``one_pass`` to true where each parameter is read once or twice, in the pool's order, and not held
    after it was yielded: `adamerge merge` then keeps nothing of the pool in memory.
    """

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield each of ``pool.names`` once with its merged value (*S) in ``pool.compute_dtype``."""
        ...


class DataRule(Protocol):
    """Merges a pool with the help of unlabeled data; it has ``needs_data = True``."""

    def __call__(self, pool: ExpertPool, model: MergedModel, data: UnlabeledTasks) -> Merged:
        """Yield as :class:`Rule` does; ``model`` runs the experts, ``data`` has a stream per task."""
        ...


def merged_state_dict(
    pool: ExpertPool,
    rule: Rule | DataRule,
    *,
    model: MergedModel | None = None,
    data: UnlabeledTasks | None = None,
    on_parameter: Callable[[str], None] | None = None,
) -> dict[str, Tensor]:
    """Merge a pool by a rule, for export.

    Tensors that do not merge (excluded, integer, buffers, changed by no expert) are the base's; an alias of a
    tied weight gets the merged value.

    Args:
        pool: Base and experts; not modified.
        rule: How to merge.
        model: A merged model of this pool, for rules that need data.
        data: Unlabeled tasks, for rules that need data.
        on_parameter: Called with each name once it is merged, for progress bars.

    Returns:
        Every key of the base checkpoint, in its order and dtypes, on the CPU. Memory: this state dict, and what
        the rule holds; :func:`merged_tensors` gives the same one by one.

    Raises:
        InputError: If the rule needs data and there is none, or does not yield what it must.

    Example:
        >>> from adamerge.merges.averages import WeightAverage
        >>> pool = ExpertPool.from_state_dicts(
        ...     {"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}, "b": {"w": 3 * torch.ones(1)}})
        >>> merged_state_dict(pool, WeightAverage())
        {'w': tensor([2.])}
    """
    tensors = merged_tensors(pool, rule, model=model, data=data, on_parameter=on_parameter)
    return merge.in_order(pool, tensors)


def merged_tensors(
    pool: ExpertPool,
    rule: Rule | DataRule,
    *,
    model: MergedModel | None = None,
    data: UnlabeledTasks | None = None,
    on_parameter: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield what :func:`merged_state_dict` returns, in the order in which the rule merges.

    Of a pool that keeps nothing in memory this holds what the rule does: as a rule one parameter.
    """
    inputs: tuple[Any, ...] = ()
    if getattr(rule, "needs_data", False):
        if model is None or data is None:
            raise InputError(f"{type(rule).__name__} needs unlabeled data: give merged_state_dict model= and data=.")
        inputs = model, data
    keys = merge.keys_by_name(pool)
    for name, tensor in rule(pool, *inputs):
        if name not in keys or tuple(tensor.shape) != pool.shapes[name]:
            raise InputError(
                f"{type(rule).__name__} yields {name!r} with shape {tuple(tensor.shape)}, expected each of the pool's "
                f"parameters once, in its own shape ({pool.shapes.get(name, 'no such name')})."
            )
        for key in keys.pop(name):
            tensor = tensor.detach().to("cpu", pool.source.spec(key)[1])
            yield key, tensor
        if on_parameter is not None:
            on_parameter(name)
    if keys:
        raise InputError(f"{type(rule).__name__} leaves out {len(keys)} parameters: {shorten(keys)}.")
    yield from merge.fixed_tensors(pool)
