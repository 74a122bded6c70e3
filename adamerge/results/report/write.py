"""Write reports of runs: figures, and one page that needs nothing but a browser."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge.errors import InputError
from adamerge.pool.pool import ExpertPool
from adamerge.results.report import PAGE, comparison_page, drawing, run_page
from adamerge.results.report.charts import Chart
from adamerge.results.report.facts import Run, read_run
from adamerge.results.report.page import Section, write_page
from adamerge.results.report.record import save_record
from adamerge.system.files import ensure_writable

log = logging.getLogger(__name__)


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the page of a run, or the comparison of several.

    Args:
        runs: What they left in their folders.
        path: The page, written atomically.

    Raises:
        InputError: If a package of the extra ``report`` is missing.
        OSError: If the page cannot be written.
    """
    if len(runs) > 1:
        title, subtitle = f"{len(runs)} runs compared", ", ".join(comparison_page.names_of(runs))
    else:
        (run,) = runs
        title = str(run.config.get("name") or run.name)
        subtitle = "/".join(run.folder.parts[-3:]) + ("" if run.is_finished else " · not finished")
    write_page(path, title, subtitle, _sections(runs))


def save_figures(runs: Sequence[Run], folder: Path, suffix: str) -> list[Path]:
    """Write each figure of the page of these runs into a file of its own; the same bytes each time.

    Args:
        runs: One, or several to compare.
        folder: Made if needed.
        suffix: ``pdf``, ``svg`` or ``png``.

    Returns:
        The files.

    Raises:
        InputError: If matplotlib is missing, or the folder is not writable.
    """
    ensure_writable(folder)
    charts = [block for section in _sections(runs) for block in section.blocks if isinstance(block, Chart)]
    paths = {folder / f"{chart.key}.{suffix}": chart for chart in charts}
    try:
        for path, chart in paths.items():
            drawing.save(chart, path)
    except ImportError as error:
        raise InputError('Figures as files need the package matplotlib: pip install "adamerge[report]".') from error
    return list(paths)


def _sections(runs: Sequence[Run]) -> list[Section]:
    return comparison_page.sections(runs) if len(runs) > 1 else run_page.sections(runs[0])


def report_run(folder: Path, pool: ExpertPool | None, costs: Mapping[str, Any]) -> None:
    """Write the record and the page of a run that has ended; what goes wrong is told, and fails no run."""
    try:
        save_record(folder, pool, costs)
        write_report([read_run(folder)], folder / PAGE)
    except InputError as error:
        log.info("No report: %s", error)
    except Exception as error:
        log.warning("No report: %s: %s. Later: adamerge report %s", type(error).__name__, error, folder)
        log.debug("The report failed.", exc_info=True)
