"""A merge of LoRA experts as one LoRA adapter, which peft loads on the base that the experts have.

    sum_e lambda_e up_e down_e  =  [lambda_1 up_1, lambda_2 up_2, ...] [down_1; down_2; ...]

Factors side by side, with the coefficients folded into the one that holds their axis: exact, and of a rank that is the
sum of the ranks; or cut to fewer ranks by a singular value decomposition, whose error is told.

Legend: R ranks of all experts; a weight is a matrix (d, w) as it is stored.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adamerge.checkpoints.writing import save_state_dict
from adamerge.errors import GuardError, InputError, shorten
from adamerge.model.beside_modules import is_transposed
from adamerge.model.coefficients import Coefficients
from adamerge.model.merge import merge
from adamerge.model.merge_low_rank import factors_of, is_expressible, scaled_whole, scales_of
from adamerge.pool.adapter_config import CONFIG, NAMES_BEGIN, WEIGHTS
from adamerge.pool.lora import AdapterCheckpoint
from adamerge.pool.low_rank import LowRank, directions
from adamerge.pool.pool import ExpertPool
from adamerge.system.files import save_json
from adamerge.system.reading import read_json_mapping

_TOLERANCE = 1e-5  # of what is read back, relative to a weight's largest change


class Adapter(NamedTuple):
    """What was written.

    Attributes:
        ranks: Module to the rank of its update.
        error: Norm of what was cut off, relative to that of the whole update; 0 where nothing was.
    """

    ranks: Mapping[str, int]
    error: float


def write_adapter(
    pool: ExpertPool, coefficients: Coefficients, network: nn.Module, folder: Path, *, rank: int | None = None
) -> Adapter:
    """Write a merge as an adapter; read it back and compare, unless ranks are cut off.

    Args:
        pool: Base and experts, of which all that is merged is low-rank.
        coefficients: Made for the pool.
        network: The one that has the pool's parameters, for the kinds of its modules.
        folder: Made if needed.
        rank: Most ranks of a module; None for all.

    Raises:
        InputError: If the merge is no low-rank update of modules that adapters have.
        GuardError: If what was read back is another update.
    """
    tensors, ranks, turned = dict[str, Tensor](), dict[str, int](), list[bool]()
    updates = _updates(pool, coefficients, network)
    is_cut = rank is not None and any(update.up.shape[1] > rank for _, update in updates.values())
    cut = whole = 0.0
    for name, (module, update) in updates.items():
        kept = update if rank is None or update.up.shape[1] <= rank else directions(update, rank)
        if is_cut:
            cut += LowRank(torch.cat([update.up, -kept.up], 1), torch.cat([update.down, kept.down])).squared_norm
            whole += update.squared_norm
        path = name.removesuffix(".weight")
        ranks[path] = kept.up.shape[1]
        tensors |= _tensors(path, module, kept, pool.shapes[name])
        if not isinstance(module, nn.Embedding):
            turned.append(is_transposed(module))
    if len(set(turned)) > 1:
        raise InputError("--to peft: expected weights stored one way, found Linear and Conv1D modules. Use --to hf.")
    folder.mkdir(parents=True, exist_ok=True)
    save_state_dict(tensors, folder / WEIGHTS)
    save_json(_config(pool, ranks, fan_in_fan_out=any(turned)), folder / CONFIG)
    if not is_cut:
        _prove(pool, coefficients, folder)
    return Adapter(ranks, (max(0.0, cut) / whole) ** 0.5 if whole else 0.0)


def _updates(pool: ExpertPool, coefficients: Coefficients, network: nn.Module) -> dict[str, tuple[nn.Module, LowRank]]:
    """Return, by parameter, its module and its update, in float64."""
    values = coefficients().detach().cpu().double()
    updates, others = {}, list[str]()
    for name in pool.names:
        segments, (path, _, at) = coefficients.index.segments[name], name.rpartition(".")
        factors, module = factors_of(pool, name, segments), network.get_submodule(path)
        is_taken = at == "weight" and _is_taken(module) and name not in pool.tied.values()
        if factors is None or not is_taken or not is_expressible(segments, pool.shapes[name]):
            others.append(name)
            continue
        exact = factors.to(torch.device("cpu"), torch.float64)
        scales = [scales_of(exact, s, values[:, s.first : s.first + s.span]) for s in segments]
        updates[name] = (module, LowRank(*scaled_whole(exact, segments, scales)))
    if others or not updates:
        raise InputError(
            "--to peft: expected low-rank changes of Linear, Conv or Embedding weights that are tied to no other, and "
            f"coefficients of whole rows or columns; found others in {shorten(others or pool.names)} (whole tensors, "
            "DoRA and modules_to_save are none). Export the whole model: --to hf."
        )
    return updates


def _is_taken(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) or is_transposed(module)


def _tensors(path: str, module: nn.Module, update: LowRank, shape: Sequence[int]) -> dict[str, Tensor]:
    """Return a module's update under peft's names, in float32."""
    up, down = update.up.float(), update.down.float()
    if isinstance(module, nn.Embedding):
        factors = {"lora_embedding_A": up.t(), "lora_embedding_B": down.t()}
    elif is_transposed(module):
        factors = {"lora_A.weight": up.t(), "lora_B.weight": down.t()}
    else:
        ones = (1,) * (len(shape) - 2)
        factors = {"lora_A.weight": down.view(-1, *shape[1:]), "lora_B.weight": up.view(*up.shape, *ones)}
    return {f"{NAMES_BEGIN}{path}.{key}": tensor.contiguous() for key, tensor in factors.items()}


def _config(pool: ExpertPool, ranks: Mapping[str, int], *, fan_in_fan_out: bool) -> dict[str, Any]:
    """Return ``adapter_config.json``: its scale is 1 everywhere; base and kind of task are those of the experts."""
    files = [Path(pool.checkpoint(name).name) / CONFIG for name in pool.expert_names]
    own = [read_json_mapping(file) for file in files if file.is_file()] or [{}]  # whole models have none
    first = next(iter(pool.names))
    is_whole = pool.keys.file_key(first) == first  # else the names are the encoder's, not the whole model's
    common = {key: own[0].get(key) for key in ("base_model_name_or_path", "task_type", "auto_mapping") if is_whole}
    if common.get("task_type") not in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):  # peft adds a new head
        common.pop("task_type", None)
    common = {key: value for key, value in common.items() if all(config.get(key) == value for config in own)}
    largest = max(ranks.values())
    patterns = {path: rank for path, rank in ranks.items() if rank != largest}
    return {
        **{"peft_type": "LORA", "bias": "none", "inference_mode": True, "lora_dropout": 0.0, "use_rslora": False},
        **{"base_model_name_or_path": pool.source.name, "task_type": None, **common},
        **{"r": largest, "lora_alpha": largest, "rank_pattern": patterns, "alpha_pattern": patterns},
        **{"target_modules": sorted(ranks), "fan_in_fan_out": fan_in_fan_out},
    }


def _prove(pool: ExpertPool, coefficients: Coefficients, folder: Path) -> None:
    """Read the adapter back as an expert of the base, and compare it with the merge."""
    expected = merge(pool, coefficients, detach=True)
    prefix = next(iter(pool.names))
    prefix = pool.keys.file_key(prefix).removesuffix(prefix)
    adapter = AdapterCheckpoint(folder, pool.source, prefix)
    for key in adapter.changed:
        base, found = pool.source.get(key).double(), adapter.get(key).double()
        change = (expected[key].double() - base).abs().max()
        rounding = base.abs().max() * torch.finfo(expected[key].dtype).eps
        if (found - expected[key].double()).abs().max() > _TOLERANCE * change + 2 * rounding:
            raise GuardError(f"{folder}: the adapter that was read back gives another {key!r} than the merge.")
    whole = {key for key in expected if not torch.equal(expected[key], pool.source.get(key))}
    if missing := whole - set(adapter.changed):
        raise GuardError(f"{folder}: the adapter that was read back does not change {shorten(sorted(missing))}.")
