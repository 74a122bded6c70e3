"""Reports of runs: figures, and one page that needs nothing but a browser."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge.errors import InputError
from adamerge.pool.pool import ExpertPool
from adamerge.results.report.record import save_record

if TYPE_CHECKING:
    from adamerge.results.report.facts import Run

log = logging.getLogger(__name__)

PAGE = "report.html"


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the page of a run, or the comparison of several.

    Args:
        folders: That ``adapt``, ``merge``, ``compare`` or ``demo`` made.
        path: The page, written atomically.

    Raises:
        InputError: If a folder is none of these, or a package of the extra ``report`` is missing.
        OSError: If the page cannot be written.
    """
    write_page_of(read_runs(folders), path)


def read_runs(folders: Sequence[Path]) -> "list[Run]":
    """Read what runs left in their folders.

    Raises:
        InputError: If a folder is no run's.
    """
    from adamerge.results.report.facts import read_run

    return [read_run(folder) for folder in folders]


def write_page_of(runs: "Sequence[Run]", path: Path) -> None:
    """Write the page of a run that has been read, or the comparison of several."""
    from adamerge.results.report import comparison_page, run_page
    from adamerge.results.report.page import write_page

    if len(runs) > 1:
        names = comparison_page.names_of(runs)
        write_page(path, f"{len(runs)} runs compared", ", ".join(names), comparison_page.sections(runs))
        return
    (run,) = runs
    title = str(run.config.get("name") or run.name)
    state = "" if run.is_finished else " · not finished"
    write_page(path, title, f"{'/'.join(run.folder.parts[-3:])}{state}", run_page.sections(run))


def report_run(folder: Path, pool: ExpertPool | None, costs: Mapping[str, Any]) -> None:
    """Write the record and the page of a run that has ended; what goes wrong is told, and fails no run."""
    try:
        save_record(folder, pool, costs)
        write_report([folder], folder / PAGE)
    except InputError as error:
        log.info("No report: %s", error)
    except Exception as error:
        log.warning("No report: %s: %s. Later: adamerge report %s", type(error).__name__, error, folder)
        log.debug("The report failed.", exc_info=True)
