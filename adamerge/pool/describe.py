"""How granularities, constraints, transforms and a pool's task vectors describe themselves, ready for JSON."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from adamerge.pool.pool import ExpertPool


def describe(item: Any) -> Any:
    """Return a built-in granularity, constraint or transform by name and options, any other object by import path."""
    if not dataclasses.is_dataclass(item) or isinstance(item, type):
        state = {key: repr(value) for key, value in sorted(getattr(item, "__dict__", {}).items())}
        return {"name": f"{type(item).__module__}.{type(item).__qualname__}", **state}
    is_built_in = type(item).__module__.startswith("adamerge.")
    names = {"Unconstrained": "none", "TaskWise": "task"}
    name = (
        names.get(type(item).__name__, type(item).__name__.lower())
        if is_built_in
        else f"{type(item).__module__}.{type(item).__qualname__}"
    )
    options = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    options = {key: _plain(value) for key, value in options.items()}
    return {"name": name, **options} if options else name


def _plain(value: Any) -> Any:
    """Return an option as JSON would give it back."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return describe(value) if dataclasses.is_dataclass(value) else value


def describe_task_vectors(pool: ExpertPool) -> dict[str, Any]:
    """Return which parameters merge and what was done to their task vectors, ready for JSON."""
    return {
        "dtype": pool.dtype_name,
        "transform": describe_transform(pool),
        "parameters": hashlib.sha256("\n".join(sorted(pool.names)).encode()).hexdigest()[:16],
        "keys": pool.keys_digest,
    }


def describe_transform(pool: ExpertPool) -> Any:
    """Return what was done to a pool's task vectors, ready for JSON; a packed file says it of its own."""
    if pool.packed is not None:
        return pool.packed.transform
    return None if pool.transform is None else describe(pool.transform)
