"""The sections of one run's page."""

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from adamerge.results.agreement import is_in_doubt
from adamerge.results.numbers import decimal, duration, number, percent, size
from adamerge.results.report import run_charts as charts
from adamerge.results.report.charts import HeatMap
from adamerge.results.report.facts import Run
from adamerge.results.report.page import Block, Code, Facts, Note, Plan, Section, Tiles, build_sections
from adamerge.results.summary_table import table
from adamerge.results.table import Table

_COLLAPSED = 0.7  # as CollapseGuard's default: below this share of what it was
_PHASES = {
    "prepare": "Reading the pool, building heads", "adapt": "Adapting", "export": "Exporting", "score": "Scoring",
    "geometry": "Hashes, norms and cosines of the pool",
}  # fmt: skip
_PEAKS = {"Most memory of the process": "peak_memory_bytes", "Most memory of the device": "peak_device_memory_bytes"}


def sections(run: Run) -> list[Section]:
    """Return the page's sections; those for which nothing is known are left out."""
    plan: Plan = [
        ("result", "Result", [headline, evidence, charts.accuracies, matrix, accuracy_table]),
        ("merged", "What was merged", [setting, expert_table, left_out]),
        ("learned", "Coefficients", [charts.coefficients, few_coefficients, charts.distribution, charts.spread,
                                     charts.trajectories]),
        ("adaptation", "Adaptation", [charts.losses, charts.criteria, collapse_table]),
        ("frank-wolfe", "Frank-Wolfe", [charts.picks, charts.gap, support]),
        ("geometry", "Task vectors", [charts.cosines, charts.norms]),
        ("costs", "Time and memory", [cost_table]),
        ("reproduce", "Reproduce", [commands, versions, configuration]),
    ]  # fmt: skip
    return build_sections(run, plan, [*run.notes, *_absent(run)])


def _absent(run: Run) -> list[str]:
    """Say which facts are not there, and what would bring them."""
    missing = {
        "No accuracies: nothing was scored yet. `adamerge evaluate RUN_DIR` does.": not run.summary,
        "No coefficients: `adamerge export RUN_DIR` writes those of the last checkpoint.": run.config
        and run.learned is None
        and "trained_weights" not in run.recipe,
        "No curves: no metrics were logged (logger=csv).": run.config and not run.metrics,
        "No geometry of the task vectors: the experts' files could not be read.": run.config and not run.pool,
    }
    return [text for text, is_missing in missing.items() if is_missing]


def headline(run: Run) -> Tiles | None:
    """The figures that matter most."""
    tiles = _accuracy_tiles(run.summary["rows"], run.own_row) if run.own_row is not None else []
    if run.learned is not None:
        experts = len(run.learned.experts)
        tiles.append(("Coefficients", f"{run.learned.count:,}", f"{experts} experts, {run.learned.granularity}"))
    seconds = run.costs.get("seconds", {}).get("adapt")
    if seconds is not None:
        steps = number(run.recipe.get("steps", run.config.get("steps")))
        folds = (run.recipe.get("evidence") or {}).get("folds")
        tiles.append(("Adaptation", duration(seconds), f"{steps} steps" + (f", after {folds} folds" if folds else "")))
    return Tiles(tiles) if tiles else None


def _accuracy_tiles(rows: Mapping[str, Any], own_row: str) -> list[tuple[str, str, str]]:
    """Return a row's mean accuracy, and where it stands between its references."""
    row = rows[own_row]
    low, high = row["interval"]
    tiles = [("Mean accuracy", f"{percent(row['mean'])} %", f"95 %: {percent(low)} to {percent(high)}")]
    arithmetic = next((name for name in ("task_arithmetic_0.3", "weight_average") if name in rows), None)
    if arithmetic is not None:
        difference = decimal(100 * (row["mean"] - rows[arithmetic]["mean"]), 1, "+")
        tiles.append((f"Against {arithmetic.replace('_', ' ')}", difference, "points of mean accuracy"))
    if row.get("gap_closed") is not None:
        tiles.append(("Gap closed", f"{percent(row['gap_closed'], 0)} %", "from task arithmetic to the experts"))
    if "experts" in rows:
        behind = {task: 100 * (share - rows["experts"]["per_task"][task]) for task, share in row["per_task"].items()}
        worst = min(behind, key=behind.__getitem__)
        points = decimal(behind[worst], 1, "+")
        last = (worst, f"{points} points") if points.startswith("-") else ("none", "no task is behind its expert")
        tiles.append(("Furthest from its expert", *last))
    return tiles


def evidence(run: Run) -> Note | None:
    """What was measured on samples that did not adapt, without labels."""
    facts = run.recipe.get("evidence")
    if not facts:
        return None
    start, result = facts["start"], facts["result"]
    if start is None:
        return Note("No held-out task has an expert to agree with: nothing proves that the result is better.", True)
    samples = "samples that did not adapt"
    if "folds" in facts:
        samples = f"samples, each left out of one of {facts['folds']} runs (in this one all adapt)"
    text = (
        f"The result agrees with the experts in {percent(result['agreement'])} % of {result['rows']} predictions for "
        f"{samples} (the start in {percent(start['agreement'])} %), at a divergence of {number(result['kl'])} nats "
        f"(the start: {number(start['kl'])}). "
    )
    far = ", as far as so few can tell" if is_in_doubt(facts) else ""
    tasks = ", ".join(facts.get("tasks_without_expert", ()))
    unproved = f" Nothing is proved for what has no expert: {tasks}." if tasks else ""
    if facts["exported"] == "result":
        return Note(f"{text}It is better than the start{far}.{unproved}", bool(tasks))
    kept = f"It is not better{far}, so that the start was exported: the coefficients are those of the start."
    return Note(text + kept + unproved, True)


def matrix(run: Run) -> HeatMap | None:
    """Accuracies of many rows by task, for comparisons."""
    return charts.rows_by_task(run.summary) if run.summary and run.own_row is None else None


def accuracy_table(run: Run) -> Table | None:
    """Accuracies of the merge, the baselines and the experts."""
    return table_of(run.summary, run.own_row) if run.summary else None


def table_of(summary: Mapping[str, Any], own_row: str | None) -> Table:
    """Return the table of a summary, with the run's own row made strong."""
    strong = frozenset({list(summary["rows"]).index(own_row)} if own_row in summary["rows"] else ())
    return replace(table(summary), strong=strong)


def setting(run: Run) -> Facts | None:
    """How the run was made, in a few words."""
    learned, config = run.learned, run.config
    facts = {
        "Objective": _target(config.get("objective")),
        "Method": _target(config.get("method")) or _rule(run),
        "Learned": _trained(run),
        "Granularity": learned.granularity if learned else _target(config.get("granularity")),
        "Constraint": learned.constraint if learned else _target(config.get("constraint")),
        "Transform": _target(config.get("transform")) or ("none" if config else ""),
        "Start": _start(config),
        "Data": run.recipe.get("protocol") or (config.get("data") or {}).get("protocol"),
        "Seed": config.get("seed", run.recipe.get("seed")),
        "Merged": _merged(run),
        "Base": _base(run),
    }
    stated = [(name, str(fact)) for name, fact in facts.items() if fact not in (None, "")]
    return Facts(stated) if stated else None


def expert_table(run: Run) -> Table | None:
    """The experts: files, sizes, hashes, norms."""
    hashes, pool = run.recipe.get("hashes") or {}, run.pool.get("experts") or {}
    rows = []
    for name in [name for name in pool or hashes if name != "base"]:
        facts = pool.get(name, {})
        digest = str(facts.get("sha256") or hashes.get(name) or "")[:16]
        file, norm = short_path(facts.get("source")), number(facts.get("norm"))
        rows.append([name, file, size(facts.get("bytes")), digest, norm, percent(facts.get("relative_norm"))])
    header = ["expert", "file", "size", "SHA-256", "norm of its task vector", "relative to the base, %"]
    return Table(header, rows, "Experts. Hashes are shortened; merge.json has them whole.").filled() if rows else None


def left_out(run: Run) -> Note | None:
    """What of the base was not merged."""
    reasons = Counter(map(str, (run.recipe.get("skipped") or {}).values()))
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
    """The experts that Frank-Wolfe has chosen."""
    facts = run.recipe.get("frank_wolfe")
    if not facts:
        return None
    rows = [
        [name, number(chosen["mean"]), f"{chosen['groups']} of {facts['groups']}"]
        for name, chosen in facts["support"].items()
    ]
    caption = f"Experts with weight after {facts['iterations']} iterations; {percent(facts['start'])} % of the start "
    return Table(["expert", "mean coefficient", "groups"], rows, caption + "is left.")


def cost_table(run: Run) -> Table | None:
    """Seconds by phase, and the most memory held."""
    costs, steps, device = run.costs, run.costs.get("steps"), run.costs.get("device")
    seconds = costs.get("seconds") or ({} if run.recipe.get("seconds") is None else {"adapt": run.recipe["seconds"]})
    rows = {_PHASES.get(phase, phase): duration(time) for phase, time in seconds.items()}
    if steps:
        rows |= {"Steps": f"{steps:,}", "Per step": duration(seconds["adapt"] / steps) if "adapt" in seconds else ""}
    for name, key in _PEAKS.items():
        rows[name] = size(costs.get(key) or run.recipe.get(key))
    rows["Device"] = f"{device}, {costs.get('threads')} thread(s)" if device == "cpu" else device or ""
    since = "; of all sessions for adapting, else since the run was last resumed" if costs.get("resumed") else ""
    cells = [[name, text] for name, text in rows.items() if text]
    return Table(["", ""], cells, f"Time and memory{since}") if cells else None


def commands(run: Run) -> list[Block]:
    """Commands that give the same result again."""
    words = [str(word) for word in run.recipe.get("command") or []]
    blocks: list[Block] = []
    if words:
        command = " ".join([words[0], *map(shlex.quote, words[1:])])
        where = f"cd {shlex.quote(str(run.config['cwd']))}\n" if run.config.get("cwd") else ""
        blocks.append(Code("The command", where + command))
    if run.learned is not None and run.config:
        folder, file = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / "coefficients.json"))
        replay = f"adamerge export {folder} --coefficients {file} --out DIR"
        blocks.append(Code("The merged checkpoint again, to the byte and without data", replay))
    return blocks


def versions(run: Run) -> Facts | None:
    """Versions that decide the result."""
    packages = run.recipe.get("versions") or {}
    return Facts([(str(name), str(version)) for name, version in packages.items()]) if packages else None


def configuration(run: Run) -> Code | None:
    """All options of the run."""
    rule = {"rule": run.recipe["rule"]} if "rule" in run.recipe else None
    content = run.config or run.recipe.get("config") or rule
    if not content:
        return None
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    return Code("Configuration", text, is_folded=True)


def short_path(path: Any) -> str:
    """Return the end of a path, which tells files apart."""
    parts = Path(str(path)).parts if path else ()
    return "/".join(parts[-3:]) if len(parts) > 3 else str(path or "")


def _target(node: Any) -> str:
    if not isinstance(node, Mapping) or not node.get("_target_"):
        return node if isinstance(node, str) else ""
    return str(node["_target_"]).rsplit(".", 1)[-1]


def _start(config: Mapping[str, Any]) -> Any:
    """Return the rule whose merge a run starts from, or its initial coefficients."""
    start = config.get("start")
    return f"merge of {start.get('rule')}" if isinstance(start, Mapping) else config.get("init")


def _trained(run: Run) -> str:
    """Say that a run has trained all weights."""
    count = run.recipe.get("trained_weights")
    return "" if count is None else f"all {count:,} weights: no merge, and no coefficients"


def _rule(run: Run) -> str:
    rule = run.recipe.get("rule")
    return str(rule.get("name", rule)) if isinstance(rule, Mapping) else str(rule or "")


def _merged(run: Run) -> str:
    pool = run.pool
    return f"{pool['entries']:,} values in {pool['parameters']} tensors, {pool['dtype']}" if pool else ""


def _base(run: Run) -> str:
    base = run.pool.get("base") or {}
    digest = str(base.get("sha256") or (run.recipe.get("hashes") or {}).get("base") or "")[:16]
    return ", ".join(text for text in (short_path(base.get("source")), size(base.get("bytes")), digest) if text)
