"""The merging coefficients: the only thing that is trained.

Legend: E experts, G groups; coefficients are (E, G), expert axis first, float32 (float64 pools keep
float64) whatever the model's dtype: in bfloat16 one ulp at 0.33 is larger than an Adam step of 1e-3.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.checkpoints.checkpoint import load_state_dict
from adamerge.checkpoints.writing import save_state_dict
from adamerge.errors import InputError, check_choice, shorten
from adamerge.model import constraints, starts
from adamerge.model import granularity as granularities
from adamerge.model.coefficients_file import FORMAT, check_content, granularity_of
from adamerge.model.constraints import Constraint
from adamerge.model.groups import Granularity, names_of
from adamerge.pool.describe import describe, describe_task_vectors
from adamerge.pool.headers import Headers
from adamerge.pool.pool import ExpertPool
from adamerge.system.files import save_json, sha256
from adamerge.system.reading import read_json

log = logging.getLogger(__name__)

_INLINE_LIMIT = 10_000  # coefficients; above, values go to a safetensors file beside the JSON


class Coefficients(nn.Module):
    """Merging coefficients of a pool, by expert and group.

    Args:
        pool: The experts and the parameters they share; headers serve too, if ``init`` asks for no weight.
        granularity: ``"task"``, ``"block"``, ``"layer"``, ``"chunk"``, ``"row"``, ``"column"``, ``"rank"``, or
            any :class:`~adamerge.model.groups.Granularity`.
        init: Initial coefficient: a number, one number per expert (a sequence, or a mapping by expert
            name), ``"mean"`` (1 / E: weight averaging), a rule of :mod:`adamerge.model.starts` or its name
            (``"lines"``, ``"model_stock"``), or a tensor (E, G). 0.3 suits up to 8 experts.
        constraint: ``"box"``, ``"clamp"``, ``"sigmoid"``, ``"simplex"``, ``"none"``, or any
            :class:`Constraint`.

    Raises:
        InputError: If an option is unknown or ``init`` does not fit the pool.

    Attributes:
        raw: The trainable tensor (E, G), before the constraint.

    Example:
        >>> base = {"w": torch.zeros(2), "b": torch.zeros(1)}
        >>> pool = ExpertPool.from_state_dicts(base, {"cars": {name: t + 1 for name, t in base.items()}})
        >>> coefficients = Coefficients(pool, "layer", init=0.25)
        >>> coefficients().tolist(), coefficients.group_names
        ([[0.25, 0.25]], ['w', 'b'])
        >>> coefficients.to_dict()["coefficients"]
        {'cars': {'w': 0.25, 'b': 0.25}}
    """

    def __init__(
        self,
        pool: ExpertPool | Headers,
        granularity: str | Granularity = "layer",
        init: float | str | Sequence[float] | Mapping[str, float] | Tensor | starts.Start = 0.3,
        constraint: str | Constraint = "box",
    ) -> None:
        super().__init__()
        self.granularity = granularities.by_name(granularity) if isinstance(granularity, str) else granularity
        self.constraint = constraints.by_name(constraint) if isinstance(constraint, str) else constraint
        self.expert_names = pool.expert_names
        self._shapes = dict(pool.shapes)
        self.index = granularities.index_of(self.granularity, pool)
        start = starts.start_of(init)
        given: Any = init if start is None else starts.by_group(start(pool), self.index, len(pool.expert_names))
        values = _initial_values(given, pool, self.index.size)
        self.raw = nn.Parameter(self.constraint.inverse(values))
        self._frozen: Tensor | None
        self.initial: Tensor
        frozen = torch.zeros(self.index.size, dtype=torch.bool)
        frozen[list(self.index.frozen)] = True
        self.register_buffer("_frozen", frozen if self.index.frozen else None, persistent=False)
        self.register_buffer("initial", self.constraint.forward(self.raw.detach()).clone(), persistent=False)
        if not torch.allclose(self.initial, values, atol=1e-4):
            log.warning("init lies outside the constraint: coefficients start at %.4g on average.", self.initial.mean())

    def forward(self) -> Tensor:
        """Return the coefficients (E, G) after the constraint."""
        values = self.constraint.forward(self.raw)
        return values if self._frozen is None else torch.where(self._frozen, self.initial, values)

    @torch.no_grad()
    def project(self) -> None:
        """Move the raw tensor back into the constraint's set, in place; call after an optimizer step."""
        self.raw.copy_(self.constraint.project(self.raw))

    @torch.no_grad()
    def assign(self, values: Tensor) -> None:
        """Set the coefficients to ``values`` (E, G), as far as the constraint allows, in place."""
        self.raw.copy_(self.constraint.inverse(values.to(self.raw)))

    @torch.no_grad()
    def warm_start(self, values: Tensor) -> None:
        """Start from ``values`` (E, G), in place; frozen groups keep them.

        ``initial`` else stays what it was: anchors refer to it.
        """
        self.assign(values)
        values = values.to(self.raw)
        if self._frozen is not None:
            self.initial.copy_(torch.where(self._frozen, values, self.initial))
        if not torch.allclose(self(), values, atol=1e-4):
            log.warning("The coefficients to start from lie outside the constraint, and were moved into it.")

    def check(self, pool: ExpertPool) -> None:
        """Refuse a pool of other experts or parameters than the coefficients were made for.

        Raises:
            InputError: If the pool does not fit.
        """
        problem = ""
        if self.expert_names != pool.expert_names:
            problem = f"expected the experts {shorten(pool.expert_names)}, found {shorten(self.expert_names)}"
        elif self._shapes != pool.shapes:
            differing = set(self._shapes.items()) ^ set(pool.shapes.items())
            name = min(name for name, _ in differing)
            problem = f"{name!r}: expected the shape {pool.shapes.get(name)}, found {self._shapes.get(name)}"
        elif isinstance(self.granularity, granularities.Rank) and self.granularity.groups(pool) != self.index:
            problem = "its experts have other ranks"
        if problem:
            raise InputError(f"The coefficients were made for another pool: {problem}. Make them anew for this pool.")

    @property
    def groups(self) -> dict[str, list[int]]:
        """Parameter name to the groups it uses, ascending."""
        return self.index.groups

    @property
    def group_names(self) -> list[str]:
        """One readable name per group, length G."""
        return list(names_of(self.index))

    def to_dict(self) -> dict[str, Any]:
        """Return the coefficients by expert and by group or parameter name, ready for JSON.

        Floats are exact: reading them back as float32 gives the same bits.
        """
        values = self().detach().cpu()
        return {
            "format": FORMAT,
            "granularity": describe(self.granularity),
            "constraint": describe(self.constraint),
            "experts": list(self.expert_names),
            "coefficients": {
                expert: {
                    label: row[first].item() if count == 1 else row[first : first + count].tolist()
                    for label, (first, count) in self.index.labels.items()
                }
                for expert, row in zip(self.expert_names, values, strict=True)
            },
        }

    @classmethod
    def from_dict(
        cls,
        pool: ExpertPool,
        content: Mapping[str, Any],
        *,
        granularity: Granularity | None = None,
        source: str = "coefficients",
    ) -> "Coefficients":
        """Rebuild coefficients from :meth:`to_dict`'s content, pairing experts and groups by name.

        The result is unconstrained: its values are exactly the stored ones.

        Args:
            pool: The pool they are for; its experts may stand in another order.
            content: What :meth:`to_dict` returned.
            granularity: Used where the stored granularity is a class of the user's own.
            source: What to call the content in messages, such as a file's path.

        Raises:
            InputError: If experts, groups, hashes or the format are not those of this pool.
        """
        check_content(content, pool, source)
        chosen = granularity_of(content["granularity"], granularity, source)
        try:
            result = cls(pool, chosen, init=0.0, constraint="none")
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        values = torch.empty_like(result.raw)
        for row, expert in zip(values, pool.expert_names, strict=True):
            stored, labels = content["coefficients"][expert], result.index.labels
            if stored.keys() != labels.keys():
                missing, extra = shorten(labels.keys() - stored.keys()), shorten(stored.keys() - labels.keys())
                raise InputError(
                    f"{source}: the groups of expert {expert!r} are not this pool's: missing {missing or 'none'}, not "
                    f"in the pool {extra or 'none'}. Was the file made for another model?"
                )
            for label, (first, count) in labels.items():
                try:
                    row[first : first + count] = torch.as_tensor(stored[label], dtype=values.dtype).reshape(count)
                except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                    raise InputError(
                        f"{source}: expert {expert!r}, {label!r}: expected {count} numbers, found "
                        f"{stored[label]!r:.80}."
                    ) from error
        if not torch.isfinite(values).all():
            raise InputError(f"{source}: contains NaN or infinite coefficients.")
        result.assign(values)
        result.initial.copy_(values)
        return result


def save_coefficients(coefficients: Coefficients, path: Path, pool: ExpertPool) -> None:
    """Write ``coefficients.json``, atomically; above 10,000 values they go to a safetensors beside it.

    Args:
        coefficients: What to write.
        path: The JSON file; the tensor file has the same name with the suffix ``.safetensors``.
        pool: Its hashes, task-vector dtype and transform are recorded, so that a replay can be checked.
    """
    content = {**coefficients.to_dict(), "pool": pool.hashes(), "task_vectors": describe_task_vectors(pool)}
    if coefficients.raw.numel() > _INLINE_LIMIT:
        values = coefficients().detach().cpu()
        tensors = {
            label: values[:, first : first + count].contiguous()
            for label, (first, count) in coefficients.index.labels.items()
        }
        save_state_dict(tensors, path.with_suffix(".safetensors"))
        content["coefficients"] = {
            expert: {"mean": row.mean().item(), "min": row.min().item(), "max": row.max().item()}
            for expert, row in zip(coefficients.expert_names, values, strict=True)
        }
        content["tensors"] = path.with_suffix(".safetensors").name
        content["tensors_sha256"] = sha256(path.with_suffix(".safetensors"))
    save_json(content, path)


def load_coefficients(path: Path, pool: ExpertPool, granularity: Granularity | None = None) -> Coefficients:
    """Read what :func:`save_coefficients` wrote, for the same pool.

    Raises:
        FileNotFoundError: If the file, or the tensor file it names, does not exist.
        InputError: If it is not a coefficients file or belongs to another pool.
    """
    content = read_json(path)
    if isinstance(content, dict) and "tensors" in content:
        check_content(content, pool, str(path))
        beside = path.parent / Path(str(content["tensors"])).name
        tensors = load_state_dict(beside)
        if sha256(beside) != content.get("tensors_sha256"):
            raise InputError(
                f"{path}: {beside.name} is not the file that was written with it. Keep the two together, unchanged."
            )
        experts = content["experts"]
        if short := [label for label, tensor in tensors.items() if tensor.ndim != 2 or len(tensor) != len(experts)]:
            shape = tuple(tensors[short[0]].shape)
            raise InputError(
                f"{beside}: {short[0]!r}: expected a row for each of {len(experts)} experts, found {shape}."
            )
        content["coefficients"] = {
            expert: {label: tensor[row] for label, tensor in tensors.items()} for row, expert in enumerate(experts)
        }
    return Coefficients.from_dict(pool, content, granularity=granularity, source=str(path))


def _initial_values(
    init: float | str | Sequence[float] | Mapping[str, float] | Tensor, pool: ExpertPool | Headers, groups: int
) -> Tensor:
    """Expand ``init`` to (E, G)."""
    experts = len(pool.expert_names)
    values: Any = init
    if isinstance(init, str):
        check_choice("init, where it is a name and no number, list or mapping", init, ["mean", *starts.STARTS])
        values = 1 / experts
    if isinstance(init, Mapping):
        if set(init) != set(pool.expert_names):
            raise InputError(
                f"init: expected one number for each of {shorten(pool.expert_names)}, found {shorten(init)}."
            )
        values = [init[name] for name in pool.expert_names]
    if isinstance(init, (int, float)) and init * experts > 2.4 + 1e-9:
        warnings.warn(
            f"init={init} for {experts} experts: their sum {init * experts:.1f} usually overshoots; "
            "0.3 suits up to 8 experts, try init=mean.",
            stacklevel=3,
        )
    try:
        tensor = torch.as_tensor(values, dtype=pool.compute_dtype).detach()
        if tensor.ndim == 1 and len(tensor) == experts:
            tensor = tensor.unsqueeze(1)
        tensor = tensor.expand(experts, groups).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f"shape {tuple(init.shape)}" if isinstance(init, Tensor) else repr(init)
        raise InputError(
            f"init: expected a number, {experts} numbers or a tensor ({experts}, {groups}), found {shape}."
        ) from error
    if not torch.isfinite(tensor).all():
        raise InputError("init: contains NaN or infinite values.")
    return tensor
