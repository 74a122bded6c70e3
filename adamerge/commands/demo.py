"""``demo``: the whole job on a zoo, as rows of a comparison: adapt in several ways, export, score, compare.

The protocol is a split: one half of each task's test images adapts, the other half is scored; a text zoo has splits.
"""

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from adamerge.commands.compare import plan as comparison
from adamerge.commands.compare.row import shared_assembly
from adamerge.commands.data import root_option
from adamerge.commands.run.compose import compose
from adamerge.commands.run.named_pools import quoted
from adamerge.commands.run.run import record_metrics
from adamerge.commands.terminal import json_option, list_files, out, print_json, report
from adamerge.results.evaluation import TaskScore, bootstrap, scores_in
from adamerge.results.report.record import costs_of
from adamerge.results.report.write import report_run
from adamerge.results.summary_table import table
from adamerge.system import progress
from adamerge.system.files import atomic_path, ensure_writable

TITLES = {
    "demo": "Demo zoo: one base, six experts, one merged model",
    "text": "Text zoo: one sentence encoder, its experts, one merged model",
}
EXPORTED = "recommended"
ORDER = ("pretrained", "task_arithmetic_0.3", "imitation_layer", "imitation_row", EXPORTED, "experts")

_OF_RUN = ("config.yaml", "metrics", "merge*", "coefficients*", "heads.safetensors", "open_clip")
_OF_ALL = ("summary.json", "comparison.png")


@click.command()
@click.option(
    "--out",
    "--output",
    "output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder.",
)
@click.option(
    "--zoo",
    type=click.Choice(tuple(TITLES)),
    default="demo",
    show_default=True,
    help="demo: images, embedded in the package; text: what `adamerge zoo build text` has made.",
)
@click.option("--seed", default=0, show_default=True, help="Of the splits and the order of the inputs.")
@click.option("--fast", is_flag=True, help="Fewer steps: a look at the machinery in under a minute.")
@click.option("--transductive", is_flag=True, help="Adapt on the scored inputs, as the AdaMerging paper does.")
@root_option
@json_option
def demo(output: Path, zoo: str, seed: int, fast: bool, transductive: bool, root: Path, as_json: bool) -> None:
    """Run the whole job on the embedded offline zoo, or on the text zoo: adapt, export, score, compare."""
    plan = plan_of(output, seed, zoo=zoo, fast=fast, transductive=transductive, root=root)
    ensure_writable(output)
    failed = comparison.run(plan, Console(quiet=True))
    report([f"{row}: {message}" for row, message in failed.items()])
    content = gather(plan, output)
    if as_json:
        print_json({"folder": str(output), "summary": content})
        return
    if not progress.is_quiet():
        shown = table(content, TITLES[zoo])
        out.print(shown.terminal(out.width))
        for line in verdict(scores_of(plan)):
            out.print(line)
    list_files(output, "*.*")


def plan_of(
    output: Path,
    seed: int,
    *,
    zoo: str = "demo",
    fast: bool,
    transductive: bool,
    root: Path = Path("data"),
) -> comparison.Plan:
    """Return the comparison: the preset's rows, in a folder for each choice of options.

    Args:
        output: The demo's folder.
        seed: Seed of the split and the order of the inputs.
        zoo: One of :data:`TITLES`.
        fast: A tenth of the steps, to try the machinery; the accuracies mean little then.
        transductive: Whether the scored inputs adapt.
        root: Folder that the text zoo is in.
    """
    is_text = zoo == "text"
    chosen = {"text": is_text, "fast": fast, "transductive": transductive}
    folder = output / "-".join(["rows", *(word for word, given in chosen.items() if given)])
    overrides = ["data.protocol=transductive"] if transductive else []
    if is_text:
        overrides.append(f"data.root={quoted(root.expanduser().absolute())}")
    preset = ("text_" if is_text else "") + "zoo" + ("_fast" if fast else "")
    return comparison.plan_of((), preset, overrides, (seed,), folder)


def gather(plan: comparison.Plan, output: Path) -> dict[str, Any]:
    """Copy the tables and the exported row's files to the demo's folder, and write the report; return the summary."""
    (seed,) = plan.seeds
    run = comparison.folder_of(plan, seed, EXPORTED) / "run"
    for source, patterns in ((run, _OF_RUN), (plan.folder, _OF_ALL)):
        for path in itertools.chain.from_iterable(map(source.glob, patterns)):
            for file in path.rglob("*") if path.is_dir() else [path]:
                if file.is_file():
                    target = output / file.relative_to(source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_path(target) as temporary:
                        shutil.copyfile(file, temporary)
    content = comparison.read(plan.folder) or {}
    seconds = content["rows"][EXPORTED]["seconds"]
    record_metrics(output / "merge.json", content, seconds)
    pool = shared_assembly(plan.overrides, seed).pool
    steps = compose([*plan.overrides, *plan.rows[EXPORTED].overrides]).steps
    report_run(output, pool, costs_of({"adapt": seconds}, steps, pool.device, resumed=False))
    return content


def scores_of(plan: comparison.Plan) -> dict[str, Mapping[str, TaskScore]]:
    """Return the scores of the rows of :data:`ORDER`, input by input; without a row that failed."""
    (seed,) = plan.seeds
    results = {name: comparison.stored_result(plan, seed, name) for name in ORDER}
    return {name: scores_in(result) for name, result in results.items() if result is not None}


def verdict(scores: Mapping[str, Mapping[str, TaskScore]]) -> list[str]:
    """Say whether the order of the rows is as given, with paired bootstrap intervals of the steps between its rows."""
    lines = []
    for lower, higher in itertools.pairwise(scores):
        low, high = bootstrap(scores[higher], scores[lower])
        means = [sum(score.accuracy for score in scores[row].values()) / len(scores[row]) for row in (lower, higher)]
        difference = means[1] - means[0]
        holds = "holds" if low > 0 else "within noise" if difference > 0 else "does not hold"
        lines.append(
            f"{lower} < {higher}: {holds}, {100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    return lines
