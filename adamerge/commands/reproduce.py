"""``reproduce``: a published table's rows, made here, beside the published figures.

It is a comparison whose preset has a section ``published``; before a row is made, all that is missing is said at once.
"""

from pathlib import Path

import click
from omegaconf import DictConfig

from adamerge.commands.compare import plan as comparison
from adamerge.commands.compare.command import make
from adamerge.commands.compare.published import unknown_tasks
from adamerge.commands.data import print_how_to_get
from adamerge.commands.run.check import check
from adamerge.commands.run.compose import compose
from adamerge.commands.terminal import err, json_option, out, print_json, report
from adamerge.data.benchmarks import checks
from adamerge.errors import InputError

_TASK = "adamerge.data.benchmarks.task"


@click.command(options_metavar="[OPTIONS] [-- OVERRIDES...]")
@click.argument("preset")
@click.option("--check", "only_check", is_flag=True, help="Say what is missing, and how to get it; make nothing.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="Repeat for several.")
@click.option("--out", "folder", type=click.Path(path_type=Path), help="Folder; go on in it.  [runs/reproduce/PRESET]")
@json_option
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def reproduce(
    preset: str,
    only_check: bool,
    seeds: tuple[int, ...],
    folder: Path | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Make the rows of a published table and print them beside the published figures; run it again to go on.

    \b
    adamerge reproduce table1 --check                       what is missing, and how to get it
    adamerge reproduce table1_hub                           ViT-B/32, 8 tasks, with the Hub's experts
    adamerge reproduce table1 -- pool=my_b32 data.root=/datasets trainer=gpu

    PRESET is a shipped one (docs/reproduce.md), or a yaml file of rows with a section `published`. OVERRIDES are those
    of `adamerge adapt`, for all rows.
    """  # noqa: D301
    _, _, published = comparison.read_preset(preset)
    if published is None:
        raise InputError(f"{preset}: expected a section published: with the figures to compare with, found none.")
    folder = folder or Path("runs") / "reproduce" / Path(preset).stem

    def explain() -> None:
        for name, root in missing:
            print_how_to_get(name, root, err)
        err.print(f"\nThe table was made with: {published['pool']}")

    missing: list[tuple[str, Path]] = []
    try:
        plan = comparison.plan_of((), preset, overrides, seeds, folder)
    except InputError as error:
        report([str(error)], explain)
        raise
    missing += missing_data(plan)
    report(problems_of(plan), explain)
    if only_check and as_json:
        print_json({"rows": list(plan.rows), "problems": []})
    elif only_check:
        out.print(f"{published['title']}: {len(plan.rows)} rows can be made.", highlight=False)
    else:
        make(plan, folder, as_json=as_json)


def problems_of(plan: comparison.Plan) -> list[str]:
    """Return everything that a plan's rows lack, before any is made: pool, data, options.

    Rows are checked as ``adamerge check`` would; what several have wrong is said once.
    """
    problems: list[str] = []
    for overrides in [(), *(spec.overrides for spec in plan.rows.values() if spec.adapts)]:
        config = compose([*plan.overrides, *overrides])
        config.run_dir = str(plan.folder / "run")
        problems = check(config)
        if problems:
            break  # pool and data are the same for all rows
    tasks = list(map(str, compose(plan.overrides).data.get("tasks") or ()))  # data of another kind names its own
    of_figures = unknown_tasks(plan.published, tasks) if plan.published is not None and tasks else []
    return [*dict.fromkeys(problems), *of_figures]


def missing_data(plan: comparison.Plan) -> list[tuple[str, Path]]:
    """Return the field's data sets of a plan's tasks that are not there or not complete, each with its folder."""
    missing = []
    for node in (compose(plan.overrides).data.get("tasks") or {}).values():
        if isinstance(node, DictConfig) and node.get("_target_") == _TASK:
            root = Path(str(node.root)).expanduser().absolute()
            if checks.check(str(node.name), root, 0).state != "complete":
                missing.append((str(node.name), root))
    return missing
