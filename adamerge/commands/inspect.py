"""``inspect``: what is in a pool: sizes, norms and cosines of the task vectors, and what is wrong."""

from typing import Any

import click
import torch
from rich.text import Text

from adamerge.commands.run.named_pools import chosen_pool
from adamerge.commands.terminal import json_option, out, pool_options, print_json, print_table, report
from adamerge.pool.pool import ExpertPool
from adamerge.pool.report import PoolReport
from adamerge.results.numbers import decimal

_ALIKE = 0.9  # cosine from which two experts are probably the same fine-tuning


@click.command()
@pool_options()
@json_option
def inspect(as_json: bool, **pool: Any) -> None:
    """Show what is in a pool: experts, tensors, sizes, task-vector norms and cosines, problems found."""
    files = chosen_pool("inspect", **pool)
    report(files.headers().problems)
    opened = files.open(storage="stream", dtype=None, duplicates="allow")  # duplicates are shown as a finding
    if as_json:
        print_json(_as_json(opened))
    else:
        _show(opened)


def _as_json(pool: ExpertPool) -> dict[str, Any]:
    """Return the pool's report as JSON-ready content."""
    facts = pool.report()
    return {
        "base": {"source": pool.source.name, "sha256": pool.hashes()["base"]},
        "experts": {name: dict(expert) for name, expert in facts.experts.items()},
        "parameters": facts.parameters,
        "entries": facts.entries,
        "skipped": dict(facts.skipped),
        "cosines": facts.cosines.tolist(),
        "norms": {name: norms.tolist() for name, norms in facts.norms.items()},
        "findings": _findings(pool, facts),
    }


def _findings(pool: ExpertPool, facts: PoolReport) -> list[str]:
    """Return notes on a pool that merges, but deserves a second look."""
    notes = []
    names = pool.expert_names
    for i, j in (facts.cosines.triu(1) > _ALIKE).nonzero().tolist():
        notes.append(
            f"{names[i]} and {names[j]} have a cosine of {facts.cosines[i, j]:.2f}: nearly the same fine-tuning."
        )
    norms = torch.tensor([float(expert["norm"]) for expert in facts.experts.values()])
    for name, norm in zip(names, norms.tolist(), strict=True):
        if norm > 5 * norms.median().item():
            notes.append(f"{name}'s task vector is {norm / norms.median().item():.0f} times the median's norm.")
        if float(facts.experts[name]["relative_norm"]) > 1:
            notes.append(f"{name} is further from the base than the base is from zero: fine-tuned from another one?")
    return notes


def _show(pool: ExpertPool) -> None:
    """Print a pool's report as tables."""
    facts = pool.report()
    out.print(f"base  {pool.source.name}")
    out.print(
        f"      {facts.parameters} parameters are merged, {facts.entries:,} values; {len(facts.skipped)} are not; "
        f"task vectors take {4e-6 * facts.entries * len(pool.expert_names):.0f} MB as float32"
    )
    lines = []
    for name, expert in facts.experts.items():
        norms = f"{expert['norm']:.3g}", f"{expert['relative_norm']:.3f}"
        lines.append((name, str(expert["source"]), *norms, str(expert["sha256"])[:12]))
    print_table("task vectors", ("expert", "file", "|tau|", "|tau| / |base|", "sha256"), lines)
    rows = zip(pool.expert_names, facts.cosines.tolist(), strict=True)
    cosines = [(name, *(decimal(value, 2) for value in row)) for name, row in rows]
    print_table("cosines of task vectors", ("", *pool.expert_names), cosines)
    reasons: dict[str, list[str]] = {}
    for name, reason in facts.skipped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, tensors in reasons.items():
        out.print(f"not merged, {reason}: {len(tensors)}, such as {tensors[0]}")
    notes = _findings(pool, facts)
    for note in notes:
        out.print(Text.assemble(("note:", "yellow"), f" {note}"))
    if not notes:
        out.print("No problems found.")
