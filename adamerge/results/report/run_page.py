"""The sections of one run's page."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from adamerge.results.evaluation import table
from adamerge.results.numbers import decimal, duration, number, percent, size
from adamerge.results.report import run_charts as charts
from adamerge.results.report.blocks import Block, Code, Facts, Note, Section, Tiles, built
from adamerge.results.report.charts import HeatMap, Panel
from adamerge.results.report.facts import Run, mapping
from adamerge.results.table import Table

_COLLAPSED = 0.7  # as CollapseGuard's default: below this share of what it was


def sections(run: Run) -> list[Section]:
    """Return the page's sections; those for which nothing is known are left out."""
    notes: list[str] = []

    def section(key: str, title: str, *makers: Any) -> Section:
        return Section(key, title, built(*(lambda make=make: make(run) for make in makers), notes=notes))

    found = [
        section("result", "Result", headline, charts.accuracies, matrix, accuracy_table),
        section("merged", "What was merged", setting, expert_table, left_out),
        section("learned", "Coefficients", charts.coefficients, few_coefficients, charts.distribution, charts.spread,
                charts.trajectories),
        section("adaptation", "Adaptation", charts.losses, charts.criteria, collapse_table),
        section("frank-wolfe", "Frank-Wolfe", charts.picks, charts.gap, support),
        section("geometry", "Task vectors", charts.cosines, charts.norms),
        section("costs", "Time and memory", cost_table),
        section("reproduce", "Reproduce", commands, versions, configuration),
    ]  # fmt: skip
    found = [section for section in found if section.blocks]
    warnings: list[Block] = [Note(text, is_warning=True) for text in (*run.notes, *notes, *_absent(run))]
    return [Section("notes", "To know", warnings), *found] if warnings else found


def _absent(run: Run) -> list[str]:
    """Say which facts are not there, and what would bring them."""
    missing = []
    adapted = bool(run.config)
    if not run.summary:
        missing.append("No accuracies: nothing was scored yet. `adamerge evaluate RUN_DIR` does.")
    if adapted and run.learned is None:
        missing.append("No coefficients: `adamerge export RUN_DIR` writes those of the last checkpoint.")
    if adapted and not run.metrics:
        missing.append("No curves: no metrics were logged (logger=csv).")
    if adapted and not run.pool:
        missing.append("No geometry of the task vectors: the experts' files could not be read.")
    return missing


def headline(run: Run) -> Tiles | None:
    """The figures that matter most."""
    tiles = []
    rows, own = run.summary.get("rows", {}), run.own_row
    if own is not None:
        row = rows[own]
        low, high = row["interval"]
        tiles.append(("Mean accuracy", f"{percent(row['mean'])} %", f"95 %: {percent(low)} to {percent(high)}"))
        for name in ("task_arithmetic_0.3", "weight_average"):
            if name in rows:
                difference = 100 * (row["mean"] - rows[name]["mean"])
                tiles.append(
                    (f"Against {name.replace('_', ' ')}", decimal(difference, 1, "+"), "points of mean accuracy")
                )
                break
        if row.get("gap_closed") is not None:
            tiles.append(("Gap closed", f"{percent(row['gap_closed'], 0)} %", "from task arithmetic to the experts"))
        if "experts" in rows:
            worst = min(
                rows[own]["per_task"], key=lambda task: row["per_task"][task] - rows["experts"]["per_task"][task]
            )
            lost = 100 * (row["per_task"][worst] - rows["experts"]["per_task"][worst])
            text = decimal(lost, 1, "+")
            behind = (worst, f"{text} points") if text.startswith("-") else ("none", "no task is behind its expert")
            tiles.append(("Furthest from its expert", *behind))
    if run.learned is not None:
        experts = len(run.learned.experts)
        tiles.append(("Coefficients", f"{run.learned.count:,}", f"{experts} experts, {run.learned.granularity}"))
    seconds = (run.record.get("costs") or {}).get("seconds", {}).get("adapt")
    if seconds is not None:
        tiles.append(("Adaptation", duration(seconds), f"{_steps(run)} steps"))
    return Tiles(tiles) if tiles else None


def matrix(run: Run) -> HeatMap | None:
    """Accuracies of many rows by task, for comparisons."""
    if not run.summary or run.own_row is not None:
        return None
    return rows_by_task(run.summary)


def rows_by_task(summary: Mapping[str, Any]) -> HeatMap:
    """Return a heat map of accuracies in percent, rows by tasks."""
    rows, tasks = summary["rows"], [str(task) for task in summary["tasks"]]
    values = [[round(100 * row["per_task"][task], 2) for task in tasks] for row in rows.values()]
    return HeatMap(
        key="matrix", title="Accuracy by row and task", text="Each row's accuracy in percent.", rows=list(rows),
        panels=[Panel("", tasks, values)], value="accuracy, %", column="task", shows_values=len(tasks) <= 10, digits=1,
    )  # fmt: skip


def accuracy_table(run: Run) -> Table | None:
    """Accuracies of the merge, the baselines and the experts."""
    if not run.summary:
        return None
    return table_of(run.summary, run.own_row)


def table_of(summary: Mapping[str, Any], own: str | None) -> Table:
    """Return the table of a summary, with the run's own row made strong."""
    strong = frozenset({list(summary["rows"]).index(own)} if own in summary["rows"] else ())
    return replace(table(summary), strong=strong)


def setting(run: Run) -> Facts | None:
    """How the run was made, in a few words."""
    learned, config = run.learned, run.config or mapping(run.recipe.get("recipe"))  # the demo has no configuration
    facts = [
        ("Objective", _target(config.get("objective"))),
        ("Method", _target(config.get("method")) or _rule(run)),
        ("Granularity", learned.granularity if learned else _target(config.get("granularity"))),
        ("Constraint", learned.constraint if learned else _target(config.get("constraint"))),
        ("Transform", _target(config.get("transform")) or ("none" if config else "")),
        ("Start", _text(config.get("init"))),
        ("Data", str(run.recipe.get("protocol") or (config.get("data") or {}).get("protocol") or "")),
        ("Seed", _text(config.get("seed", run.recipe.get("seed")))),
        ("Merged", _merged(run)),
        ("Base", _base(run)),
    ]
    known = [(name, text) for name, text in facts if text]
    return Facts(known) if known else None


def expert_table(run: Run) -> Table | None:
    """The experts: files, sizes, hashes, norms."""
    hashes, pool = run.recipe.get("hashes") or {}, run.pool.get("experts") or {}
    if not hashes and not pool:
        return None
    rows = []
    for name in [name for name in pool or hashes if name != "base"]:
        facts = pool.get(name, {})
        rows.append(
            [
                name, short_path(facts.get("source")), size(facts.get("bytes")),
                str(facts.get("sha256") or hashes.get(name) or "")[:16], number(facts.get("norm")),
                percent(facts.get("relative_norm")),
            ]
        )  # fmt: skip
    header = ["expert", "file", "size", "SHA-256", "norm of its task vector", "relative to the base, %"]
    return Table(header, rows, "Experts. Hashes are shortened; merge.json has them whole.").filled()


def left_out(run: Run) -> Note | None:
    """What of the base was not merged."""
    reasons: dict[str, int] = {}
    for reason in (run.recipe.get("skipped") or {}).values():
        reasons[str(reason)] = reasons.get(str(reason), 0) + 1
    if not reasons:
        return None
    return Note("Not merged: " + "; ".join(f"{count} tensors, {reason}" for reason, count in reasons.items()) + ".")


def few_coefficients(run: Run) -> Table | None:
    """The coefficients themselves, where there is one per expert."""
    learned = run.learned
    if learned is None or len(learned.values) > 1 or learned.is_fine:
        return None
    ((label, values),) = learned.values.items()
    rows = [[name, number(float(value))] for name, (value,) in zip(learned.experts, values, strict=True)]
    return Table(["expert", label], rows, "Coefficients")


def collapse_table(run: Run) -> list[Block] | None:
    """Whether a task collapses, by criteria that need no label."""
    variety, apart = (charts.unlabeled(run, kind) for kind in ("marginal", "disagreement"))
    if not variety:
        return None
    rows, collapsed = [], []
    for task, series in variety.items():
        first, last = series.values[0], series.values[-1]
        if last < _COLLAPSED * first:
            collapsed.append(task)
        ends = [number(apart[task].values[at]) if task in apart else "" for at in (0, -1)] if apart else []
        verdict = "fewer classes" if task in collapsed else "no"
        rows.append([task, number(first), number(last), *ends, verdict])
    ends = ["disagreement, first step", "last step"] if apart else []
    header = ["task", "variety, first step", "last step", *ends, "collapse"]
    text = f"Signs of collapse: variety of predictions below {_COLLAPSED:g} of what it was" + (
        ", or a disagreement that grows." if apart else "."
    )
    warning = f"{', '.join(collapsed)}: predictions name ever fewer classes. See callbacks=collapse_guard."
    return [*([Note(warning, is_warning=True)] if collapsed else []), Table(header, rows, text)]


def support(run: Run) -> Table | None:
    """What Frank-Wolfe has chosen."""
    facts = run.recipe.get("frank_wolfe")
    if not facts:
        return None
    groups = facts["groups"]
    rows = [
        [name, number(chosen["mean"]), f"{chosen['groups']} of {groups}"] for name, chosen in facts["support"].items()
    ]
    kept = f"{percent(facts['start'])} % of the start is left"
    caption = f"Experts with weight after {facts['iterations']} iterations; {kept}."
    return Table(["expert", "mean coefficient", "groups"], rows, caption)


def cost_table(run: Run) -> Table | None:
    """Seconds by phase, and the most memory held."""
    costs = run.record.get("costs") or {}
    rows = []
    names = {"prepare": "Reading the pool, building heads", "adapt": "Adapting", "export": "Exporting"}
    names |= {"score": "Scoring", "geometry": "Hashes, norms and cosines of the pool"}
    for phase, seconds in (costs.get("seconds") or {}).items():
        rows.append([names.get(phase, phase), duration(seconds)])
    if steps := costs.get("steps"):
        rows.append(["Steps", f"{steps:,}"])
        if "adapt" in costs.get("seconds", {}):
            rows.append(["Per step", duration(costs["seconds"]["adapt"] / steps)])
    peaks = {"Most memory of the process": "peak_memory_bytes", "Most memory of the device": "peak_device_memory_bytes"}
    rows += [[name, size(costs.get(key) or run.recipe.get(key))] for name, key in peaks.items()]
    if not costs and run.recipe.get("seconds") is not None:
        rows.insert(0, [names["adapt"], duration(run.recipe["seconds"])])
    if device := costs.get("device"):
        rows.append(["Device", f"{device}, {costs.get('threads')} thread(s)" if device == "cpu" else device])
    rows = [row for row in rows if row[1]]
    since = "; of all sessions for adapting, else since the run was last resumed" if costs.get("resumed") else ""
    return Table(["", ""], rows, f"Time and memory{since}") if rows else None


def commands(run: Run) -> list[Block] | None:
    """How to get the same again."""
    words = [str(word) for word in run.recipe.get("command") or []]
    blocks: list[Block] = []
    if words:
        command = " ".join([words[0], *map(shlex.quote, words[1:])])
        where = f"cd {shlex.quote(str(run.config['cwd']))}\n" if run.config.get("cwd") else ""
        blocks.append(Code("The command", where + command))
    if run.learned is not None and run.config:
        folder, file = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / "coefficients.json"))
        replay = f"adamerge export {folder} --coefficients {file} --output DIR"
        blocks.append(Code("The merged checkpoint again, to the byte and without data", replay))
    return blocks or None


def versions(run: Run) -> Facts | None:
    """Versions that decide the result."""
    found = run.recipe.get("versions") or {}
    return Facts([(str(name), str(version)) for name, version in found.items()]) if found else None


def configuration(run: Run) -> Code | None:
    """All options."""
    content = (
        run.config or run.recipe.get("config") or {k: run.recipe[k] for k in ("rule", "recipe") if k in run.recipe}
    )
    if not content:
        return None
    return Code(
        "Configuration", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110), is_folded=True
    )


def short_path(path: Any) -> str:
    """Return the end of a path, which tells files apart."""
    parts = Path(str(path)).parts if path else ()
    return "/".join(parts[-3:]) if len(parts) > 3 else str(path or "")


def _target(node: Any) -> str:
    if not isinstance(node, Mapping) or not node.get("_target_"):
        return node if isinstance(node, str) else ""
    return str(node["_target_"]).rsplit(".", 1)[-1]


def _rule(run: Run) -> str:
    rule = run.recipe.get("rule")
    return str(rule.get("name", rule)) if isinstance(rule, Mapping) else str(rule or "")


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _steps(run: Run) -> str:
    return number(run.recipe.get("steps", run.config.get("steps")))


def _merged(run: Run) -> str:
    pool = run.pool
    return f"{pool['entries']:,} values in {pool['parameters']} tensors, {pool['dtype']}" if pool else ""


def _base(run: Run) -> str:
    base = run.pool.get("base") or {}
    digest = str(base.get("sha256") or (run.recipe.get("hashes") or {}).get("base") or "")[:16]
    return ", ".join(text for text in (short_path(base.get("source")), size(base.get("bytes")), digest) if text)
