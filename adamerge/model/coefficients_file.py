"""What a coefficients file says about itself: how it was made, and whether it belongs to a pool."""

from collections.abc import Mapping, Sequence
from typing import Any

from adamerge.errors import InputError, shorten
from adamerge.model import granularity as granularities
from adamerge.model.groups import Granularity
from adamerge.pool.describe import describe_task_vectors
from adamerge.pool.pool import ExpertPool

FORMAT = 1


def granularity_of(described: Any, fallback: Granularity | None, source: str) -> Granularity:
    """Rebuild a built-in granularity from its description; never imports anything.

    Args:
        described: What :func:`describe` returned.
        fallback: Used where the described one is not built in.
        source: What to call the file in messages.

    Raises:
        InputError: If it is no built-in, or does not take the options.
    """
    options = dict(described) if isinstance(described, Mapping) else {"name": described}
    name = str(options.pop("name", None))
    kinds: dict[str, Any] = {**granularities.BY_NAME, "pattern": granularities.Pattern}
    if name not in kinds and fallback is not None:
        return fallback
    try:
        result: Granularity = kinds[name](**options)
    except KeyError as error:
        raise InputError(
            f"{source}: granularity {name!r} is not built in (one of {', '.join(kinds)}). "
            "Pass the granularity object it was made with."
        ) from error
    except TypeError as error:
        raise InputError(f"{source}: granularity {name!r} does not take these options: {error}.") from error
    return result


def _is_nested(content: Any) -> bool:
    return isinstance(content, Mapping) and all(isinstance(value, Mapping) for value in content.values())


def check_content(content: Any, pool: ExpertPool, source: str) -> None:
    """Check that a coefficients file's content is well formed and belongs to a pool.

    Raises:
        InputError: If not; the message begins with ``source``.
    """
    required = ("format", "granularity", "experts", "coefficients")
    missing = [key for key in required if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise InputError(f"{source}: not a coefficients file: the keys {shorten(missing)} are missing.")
    if content["format"] != FORMAT:
        raise InputError(f"{source}: format {content['format']!r} is not {FORMAT}; update adamerge to read it.")
    experts, stored, recorded = content["experts"], content["coefficients"], content.get("pool", {})
    are_names = isinstance(experts, Sequence) and all(isinstance(name, str) for name in experts)
    for key, fits, expected in (
        ("experts", are_names, "a list of names"),
        ("coefficients", _is_nested(stored), "a mapping from expert to a mapping from group to value"),
        ("pool", isinstance(recorded, Mapping), "a mapping from name to hash"),
    ):
        if not fits:
            raise InputError(f"{source}: not a coefficients file: {key!r} holds something else; expected {expected}.")
    for names in (experts, stored):
        if sorted(names) != sorted(pool.expert_names):
            raise InputError(
                f"{source}: made for the experts {shorten(names)}, but the pool has {shorten(pool.expert_names)}."
            )
    hashes = pool.hashes() if recorded else {}
    changed = [name for name in hashes if name in recorded and recorded[name] != hashes[name]]
    if changed:
        raise InputError(
            f"{source}: belongs to another pool: the content of {shorten(changed)} differs from what it was made for. "
            "Use the same base and expert files."
        )
    described, vectors = content.get("task_vectors"), describe_task_vectors(pool)
    if recorded and described != vectors:
        raise InputError(
            f"{source}: made for the task vectors {described}, but the pool's are {vectors}. Open the pool with the "
            "same dtype, transform and parameters (include, exclude), for example by naming the run's folder."
        )
