"""What a run leaves in ``report.json`` for its report: the pool's sizes and geometry, times and memory.

The experts may be moved or deleted afterwards; the report needs this file only.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adamerge.pool.describe import describe
from adamerge.pool.pool import ExpertPool
from adamerge.system.files import save_json
from adamerge.system.memory import peak_memory
from adamerge.system.progress import Stopwatch
from adamerge.system.reading import read_json_mapping

FILE = "report.json"
FORMAT = 1


def save_record(folder: Path, pool: ExpertPool | None, costs: Mapping[str, Any] | None = None) -> None:
    """Write ``report.json``; one pass over the task vectors, in small tiles.

    Args:
        folder: Folder of the run.
        pool: What was merged; None where that cannot be read as a whole.
        costs: JSON-ready; default what an earlier record says.

    Raises:
        OSError: If the file cannot be written.
    """
    path = folder / FILE
    if costs is None and path.is_file():
        costs = read_json_mapping(path).get("costs")
    watch, costs = Stopwatch(), dict(costs or {})
    content = geometry(pool) if pool else {}
    if "seconds" in costs:
        costs["seconds"] = {**costs["seconds"], "geometry": round(watch.seconds(), 3)}
    save_json({"format": FORMAT, "pool": content, "costs": costs}, path)


def geometry(pool: ExpertPool) -> dict[str, Any]:
    """Return sizes, hashes, norms and cosines of a pool's task vectors as JSON-ready content."""
    report = pool.report()
    experts = {name: {**facts, "bytes": _size(str(facts["source"]))} for name, facts in report.experts.items()}
    base = {
        "source": pool.source.name,
        "sha256": pool.hashes()["base"],
        "norm": math.hypot(*report.base_norms.values()),
        "bytes": _size(pool.source.name),
    }
    transform = report.transform
    return {
        "base": base,
        "experts": experts,
        "parameters": report.parameters,
        "entries": report.entries,
        "dtype": report.dtype,
        "storage": report.storage,
        "transform": transform if transform is None or isinstance(transform, str | dict) else describe(transform),
        "cosines": [[_rounded(value) for value in row] for row in report.cosines.tolist()],
        "norms": {name: [_rounded(norm) for norm in norms.tolist()] for name, norms in report.norms.items()},
        "base_norms": {name: _rounded(norm) for name, norm in report.base_norms.items()},
    }


def costs_of(seconds: Mapping[str, float], steps: int, device: torch.device, *, resumed: bool) -> dict[str, Any]:
    """Return times and memory of this process as JSON-ready content.

    Args:
        seconds: Seconds of the run's phases; of ``adapt`` for all sessions of the run.
        steps: Optimizer steps in all.
        device: That adapted.
        resumed: Whether the run was stopped in between: then the other times are those since.
    """
    is_cuda = device.type == "cuda"
    return {
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "steps": steps,
        "resumed": resumed,
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": peak_memory(),
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if is_cuda else None,
    }


def _rounded(value: float) -> float:
    """Round to six digits."""
    return float(f"{value:.6g}")


def _size(source: str) -> int | None:
    """Return the bytes of a file, or of the files of a folder; None for what is in memory only."""
    path = Path(source)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else None
