"""What is in a pool, for people: sizes, norms and cosines of the task vectors, and what is wrong."""

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from adamerge.errors import InputError, did_you_mean
from adamerge.pool import ExpertPool, PoolReport
from adamerge.preflight import CONFIG_MODULE, pool_files, strings
from adamerge.run_checks import read_headers

_ALIKE = 0.9  # cosine from which two experts are probably the same fine-tuning


@dataclass(frozen=True)
class PoolFiles:
    """What to inspect.

    Attributes:
        base: The base's file.
        experts: Expert name to file.
        include: Globs of parameter names to merge; None for all.
        exclude: Globs of parameter names to leave at the base's values.
    """

    base: Path
    experts: Mapping[str, Path]
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def narrowed(self, include: Sequence[str], exclude: Sequence[str]) -> "PoolFiles":
        """Return the same files with further globs."""
        every = (*(self.include or ()), *include)
        return replace(self, include=every or self.include, exclude=(*self.exclude, *exclude))


def read_pool(pool: str) -> PoolFiles:
    """Read a pool's yaml: a name among the shipped ones, or a file.

    Raises:
        InputError: If there is no such pool, it is no yaml, or it names no files.
    """
    folder = importlib.resources.files(CONFIG_MODULE) / "pool"
    known = [Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    if pool not in known and not Path(pool).is_file():
        raise InputError(f"--pool {pool}: no such file, and no pool of that name.{did_you_mean(pool, known)}")
    path = folder / f"{pool}.yaml" if pool in known else Path(pool)
    try:
        config = OmegaConf.create(path.read_text(encoding="utf-8"))
        OmegaConf.resolve(config)
    except Exception as error:  # whatever a yaml parser, a decoder or an interpolation finds wrong
        reason = " ".join(str(error).split())
        raise InputError(
            f"--pool {pool}: expected a yaml file with base: FILE and experts: {{name: FILE}}, found: {reason}."
        ) from error
    base, experts = pool_files(config, f"--pool {pool}")
    assert isinstance(config, DictConfig)  # or pool_files had refused it
    try:
        include, exclude = (strings(config.get(key)) for key in ("include", "exclude"))
    except InputError as error:
        raise InputError(f"--pool {pool}: {error}") from error
    files = {name: Path(file) for name, file in experts.items()}
    return PoolFiles(Path(base), files, None if include is None else tuple(include), tuple(exclude or ()))


def header_problems(files: PoolFiles, prefix: str) -> tuple[str, ...]:
    """Return all that the headers of the files say is wrong."""
    return read_headers(files.base, files.experts, prefix, files.include, files.exclude).problems


def open_pool(files: PoolFiles, prefix: str) -> ExpertPool:
    """Open and check a pool, experts staying in their mapped files."""
    return ExpertPool.from_files(
        files.base,
        files.experts,
        key_map=prefix or None,
        storage="stream",
        include=files.include,
        exclude=files.exclude or None,
        duplicates="allow",  # shown as a finding
    )


def as_json(pool: ExpertPool) -> dict[str, Any]:
    """Return the pool's report as JSON-ready content."""
    report = pool.report()
    return {
        "base": {"source": pool.source.name, "sha256": pool.hashes()["base"]},
        "experts": {name: dict(facts) for name, facts in report.experts.items()},
        "parameters": report.parameters,
        "entries": report.entries,
        "skipped": dict(report.skipped),
        "cosines": report.cosines.tolist(),
        "norms": {name: norms.tolist() for name, norms in report.norms.items()},
        "findings": findings(pool, report),
    }


def findings(pool: ExpertPool, report: PoolReport) -> list[str]:
    """Return what deserves a second look, though it can be merged."""
    found = []
    names = pool.expert_names
    for i, j in (report.cosines.triu(1) > _ALIKE).nonzero().tolist():
        found.append(
            f"{names[i]} and {names[j]} have a cosine of {report.cosines[i, j]:.2f}: nearly the same fine-tuning."
        )
    norms = torch.tensor([float(facts["norm"]) for facts in report.experts.values()])
    for name, norm in zip(names, norms.tolist(), strict=True):
        if norm > 5 * norms.median().item():
            found.append(f"{name}'s task vector is {norm / norms.median().item():.0f} times the median's norm.")
        if float(report.experts[name]["relative_norm"]) > 1:
            found.append(f"{name} is further from the base than the base is from zero: fine-tuned from another one?")
    return found


def show(pool: ExpertPool, console: Console) -> None:
    """Print a pool's report as tables."""
    report = pool.report()
    console.print(f"base  {pool.source.name}")
    console.print(
        f"      {report.parameters} parameters are merged, {report.entries:,} values; {len(report.skipped)} are not; "
        f"task vectors take {4e-6 * report.entries * len(pool.expert_names):.0f} MB as float32"
    )
    experts = Table(header_style="bold")
    for column in ("expert", "file", "|tau|", "|tau| / |base|", "sha256"):
        experts.add_column(column, justify="right" if "tau" in column else "left", overflow="fold")
    for name, facts in report.experts.items():
        experts.add_row(
            name,
            str(facts["source"]),
            f"{facts['norm']:.3g}",
            f"{facts['relative_norm']:.3f}",
            str(facts["sha256"])[:12],
        )
    console.print(experts)
    cosines = Table(title="cosines of task vectors", title_justify="left", header_style="bold")
    cosines.add_column("")
    for name in pool.expert_names:
        cosines.add_column(name, justify="right")
    for name, row in zip(pool.expert_names, report.cosines.tolist(), strict=True):
        cosines.add_row(name, *(f"{value:.2f}" for value in row))
    console.print(cosines)
    reasons: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, tensors in reasons.items():
        console.print(f"not merged, {reason}: {len(tensors)}, such as {tensors[0]}")
    notes = findings(pool, report)
    for note in notes:
        console.print(f"[yellow]note:[/] {note}")
    if not notes:
        console.print("No problems found.")
