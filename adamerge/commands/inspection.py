"""What is in a pool, for people: sizes, norms and cosines of the task vectors, and what is wrong."""

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adamerge.pool.headers import read_headers
from adamerge.pool.pool import ExpertPool
from adamerge.pool.pool_file import PoolFiles
from adamerge.pool.report import PoolReport
from adamerge.results.report.charts import decimal

_ALIKE = 0.9  # cosine from which two experts are probably the same fine-tuning


def header_problems(files: PoolFiles) -> tuple[str, ...]:
    """Return all that the headers of the files say is wrong."""
    experts = {name: entry.file for name, entry in files.experts.items()}
    return read_headers(files.base.file, experts, files.key_prefix or "", files.include, files.exclude or ()).problems


def open_pool(files: PoolFiles) -> ExpertPool:
    """Open and check a pool, experts staying in their mapped files."""
    return files.open(storage="stream", dtype=None, duplicates="allow")  # duplicates are shown as a finding


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
        cosines.add_row(name, *(decimal(value, 2) for value in row))
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
