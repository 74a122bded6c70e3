"""``report``: a page, and figures, of what runs did."""

import logging
from pathlib import Path

import click

from adamerge.commands.terminal import echo, out
from adamerge.errors import InputError

log = logging.getLogger(__name__)


@click.command()
@click.argument("run_dirs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_DIR...")
@click.option(
    "--out", "output", type=click.Path(path_type=Path), help="The page; default report.html, in RUN_DIR if one."
)
@click.option("--figures", type=click.Path(path_type=Path), help="A folder for the figures as files too, for papers.")
@click.option("--format", "suffix", type=click.Choice(["pdf", "png", "svg"]), default="pdf", show_default=True)
def report(run_dirs: tuple[Path, ...], output: Path | None, figures: Path | None, suffix: str) -> None:
    """Write one page, which needs no network, of what a run did; of several runs a comparison.

    \b
    adamerge report RUN_DIR                          RUN_DIR/report.html
    adamerge report RUN_DIR RUN_DIR --out both.html  side by side
    adamerge report RUN_DIR --figures DIR            and each figure as a file
    adamerge report runs/compare                     folders of `adamerge compare`, merge and demo too

    Runs write their own report when they end; this command is for runs that were stopped, and for comparisons.
    """  # noqa: D301
    from adamerge.results.report import PAGE
    from adamerge.results.report.facts import read_run
    from adamerge.results.report.write import save_figures, write_report

    run_dirs, page = tuple(path.absolute() for path in run_dirs), output.absolute() if output else None
    figures = figures.absolute() if figures else None
    if page is not None and page.suffix != ".html":
        raise InputError(f"--out: expected a file whose name ends in .html, found {output}.")
    page = page or (run_dirs[0] / PAGE if len(run_dirs) == 1 else Path(PAGE).absolute())
    for run in [read_run(folder) for folder in run_dirs]:  # refuses what is no run before anything is written
        if run.config and not run.pool:
            _record(run.folder)
    runs = [read_run(folder) for folder in run_dirs]
    for run in runs:
        run.notes.extend(_changes(run.folder) if run.config else ())
    write_report(runs, page)
    if figures is not None:
        for path in save_figures(runs, figures, suffix):
            out.print(f"  {path}", highlight=False)
    echo(page)


def _changes(folder: Path) -> list[str]:
    """Say where a run's configuration is not the one that it was begun with; a page is shown all the same."""
    from adamerge.commands.run.folder import look_at_config
    from adamerge.commands.run.recorded import check_config

    try:
        check_config(look_at_config(folder), folder)
    except InputError as error:
        log.warning("%s", error)
        return [str(error)]
    except Exception:  # of a broken file, which has a note already
        log.debug("%s", folder, exc_info=True)
    return []


def _record(folder: Path) -> None:
    """Record the geometry of a run's task vectors, where the experts' files are still there."""
    from adamerge.commands.export import pool_of
    from adamerge.results.report.record import save_record

    try:
        save_record(folder, pool_of(folder))
    except Exception as error:  # whatever is wrong with the run, the page shows the rest
        log.info("The task vectors of %s are not shown: %s", folder, " ".join(str(error).split()))
