"""``adapt`` and ``check``: one run, in this process or started by Hydra, torchrun or a scheduler."""

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from adamerge.commands.terminal import (
    EXIT_INPUT,
    Agreed,
    JobFailed,
    configure_logging,
    err,
    escape,
    json_option,
    list_files,
    log_to,
    out,
    print_json,
    quiet_lightning,
    record,
    report,
)
from adamerge.errors import GuardError, InputError, Interrupted
from adamerge.system import progress, ranks


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    short_help="Learn coefficients on unlabeled data and export the merged checkpoint.",
)
@json_option
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def adapt(overrides: tuple[str, ...], as_json: bool) -> None:
    """Learn coefficients on unlabeled data and export the merged checkpoint."""
    from adamerge.commands.run import build as preflight
    from adamerge.commands.run import processes as launchers
    from adamerge.commands.run.compose import compose, hand_over, quoted

    arguments, resume = _take_resume(list(overrides))
    launchers.join()
    if resume not in (None, "auto"):
        _resume(Path(str(resume)), arguments, as_json)
        return
    if resume == "auto" and not any(argument.startswith("run_dir=") for argument in arguments):
        raise InputError("resume=auto needs a folder that stays the same from start to start: add run_dir=FOLDER.")
    flags = [a for a in arguments if a.startswith("-")]
    if {"-m", "--multirun"} & set(flags):
        if resume == "auto":
            raise InputError("resume=auto does not go with -m: start the jobs one by one, each with its own run_dir.")
        if as_json:
            raise InputError("--json does not go with -m: each run's result is in the summary.json of its folder.")
    if all(flag.split("=")[0] in ("--config-dir", "-cd") for flag in flags):
        # A plain run: everything that can be wrong is found before a folder is made or a weight read.
        config = compose(arguments)
        _refuse(next(filter(None, ranks.everyones(preflight.check(config))), []))
        # The folder may be named by the clock: all processes take the first one's.
        run_dir = f"run_dir={quoted(ranks.of_first(config.run_dir))}"
        if _start_ranks(config, [*overrides, run_dir], as_json):
            return
        if ranks.count() > 1:
            arguments = [*arguments, run_dir]
    elif ranks.count() > 1:
        raise Agreed("-m: every process would run the whole sweep. Leave torchrun and srun to one run at a time.")
    hand_over([*arguments, "resume=auto"] if resume == "auto" else arguments, _job_in_json if as_json else job)


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    short_help="Find what is wrong with a run, in seconds, without starting it.",
)
@json_option
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def check(overrides: tuple[str, ...], as_json: bool) -> None:
    """Read configuration and file headers of `adamerge adapt OVERRIDES`, and report everything that is wrong.

    \b
    adamerge check objective=entropy granularity=row
    adamerge check --config-dir my_configs pool=mine data=mine

    It takes what `adamerge adapt` takes; see `adamerge adapt --help`.
    """  # noqa: D301
    from adamerge.commands.run import build as preflight
    from adamerge.commands.run.compose import compose
    from adamerge.commands.run.imports import foreign_targets

    config = compose(list(overrides))
    problems = preflight.check(config)
    foreign = [str(target) for target in foreign_targets(preflight.containers(config))]
    if as_json:
        print_json({"problems": problems, "imports": foreign})
        if problems:
            sys.exit(EXIT_INPUT)
        return
    for target in foreign:
        out.print(escape(target), highlight=False)
    report(problems)
    out.print("No problems found.")


def job(config: Any, as_json: bool = False) -> None:
    """One run, called by Hydra, in this process or in a launcher's."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from adamerge.commands.run import build as preflight
    from adamerge.commands.run import folder as run_folder
    from adamerge.commands.run import processes as launchers
    from adamerge.commands.run.compose import expanded
    from adamerge.commands.run.named_pools import register_resolvers

    register_resolvers()
    if launchers.job_id() and not logging.getLogger().isEnabledFor(logging.INFO):
        configure_logging(debug=False)  # this is a process of submitit's, which main() has not seen
    launchers.join()
    folder = Path(HydraConfig.get().runtime.output_dir)
    config = expanded(config)
    config.run_dir = str(folder)
    config.cwd = str(Path.cwd())
    config.command = _command()
    config.job = launchers.job_id()
    again = run_folder.is_of_job(folder, config.job)  # the scheduler has started it anew
    again = again or (config.resume == "auto" and (folder / run_folder.CONFIG_FILE).is_file())
    if ranks.of_first(again):
        stored = run_folder.load_config(folder)
        stored.job = config.job
        changed = run_folder.differences(config, stored)
        if changed:
            message = f"{folder} holds a run with other options: {', '.join(changed)}. Choose another run_dir."
            raise JobFailed(InputError(message))
        try:
            _run(stored, folder, resume=True, as_json=as_json)
        except (InputError, OSError, GuardError) as error:
            raise JobFailed(error) from error
        return
    config.resume = None
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # a single run has been checked before its folder was made
            _refuse(preflight.check(config))
            _refuse_ranks(config)
        _on_first(run_folder.check_unused, folder)
    except InputError as error:
        raise JobFailed(error) from error
    try:
        _run(config, folder, resume=False, as_json=as_json)
    except (InputError, OSError, GuardError) as error:
        raise JobFailed(error) from error


def _command() -> list[str]:
    """Return what starts this run alone: of a sweep with its own values, in a launcher's process too."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.provider == "command-line"]
    inside = [folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder for folder in folders]
    several = ranks.count() > 1  # then the folder that all of them agreed on has been added, in quotes
    own = [word for word in hydra.overrides.task if not (several and word.startswith("run_dir='"))]
    return ["adamerge", "adapt", *(f"--config-dir={folder}" for folder in inside), *own]


def _job_in_json(config: Any) -> None:
    """One run, whose result is printed as JSON."""
    job(config, as_json=True)


def _resume(folder: Path, rest: Sequence[str], as_json: bool) -> None:
    from adamerge.commands.run import folder as run_folder

    if rest:
        raise InputError(f"resume takes its configuration from {folder}: leave out {' '.join(rest)}.")
    folder = folder.absolute()
    config = run_folder.load_config(folder)
    if not _start_ranks(config, [f"resume={folder}"], as_json):
        _run(config, folder, resume=True, as_json=as_json)


def _start_ranks(config: Any, overrides: Sequence[str], as_json: bool) -> bool:
    """Start the run's processes and leave with their exit code when they have ended; False if one is enough."""
    from adamerge.commands.run import processes as launchers

    if launchers.environment() is not None or (count := launchers.wanted(config.trainer)) == 1:
        return False
    flags = {
        "--debug": logging.getLogger().isEnabledFor(logging.DEBUG),
        "--quiet": progress.is_quiet(),
        "--json": as_json,
    }
    if code := launchers.start(count, ["adapt", *(flag for flag, is_set in flags.items() if is_set), *overrides]):
        sys.exit(code)
    return True


def _refuse_ranks(config: Any) -> None:
    """Refuse a job of a sweep in this process that would have to start others."""
    from adamerge.commands.run import processes as launchers

    if launchers.environment() is None and launchers.wanted(config.trainer) > 1:
        raise InputError(
            "trainer.devices: a job of a sweep on this machine has one process, as each would run the whole sweep. "
            "Set trainer.devices=1, sweep on a cluster (hydra/launcher=slurm), or start the runs one by one."
        )


def _on_first(function: Callable[[Path], object], folder: Path) -> None:
    """Call a function that refuses folders in the first of the run's processes; all refuse if it does."""
    error = None
    if ranks.is_first():
        try:
            function(folder)
        except InputError as found:
            error = Agreed(*found.args)
    if (error := ranks.of_first(error)) is not None:
        raise error


def _run(config: Any, folder: Path, *, resume: bool, as_json: bool) -> None:
    from adamerge.commands.run import folder as run_folder
    from adamerge.results.evaluation import table

    with contextlib.ExitStack() as stack:
        held = run_folder.held(folder, unused=not resume)  # again: another process may have started here since
        _on_first(lambda _: stack.enter_context(held), folder)
        try:
            content = _adapt(config, folder, resume=resume)
        except Exception as error:  # of the code of others too: an objective that fails leaves no folder behind
            if not resume and ranks.is_first() and not isinstance(error, GuardError):
                run_folder.remove_unstarted(folder)
            raise
    if not ranks.is_first():
        return
    if as_json:
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        print_json({"run_dir": str(folder), "files": files, "summary": content})
        return
    if content is not None and not progress.is_quiet():
        out.print(table(content, width=out.width))
    list_files(folder)


def _adapt(config: Any, folder: Path, *, resume: bool) -> Any:
    """Run with a log in the run's folder, and say how to go on where the run is stopped."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from adamerge.commands.run import folder as run_folder
    from adamerge.commands.run import run as launch
    from adamerge.commands.run.stages import running_stage
    from adamerge.results.evaluation import table

    quiet_lightning()
    try:
        with log_to(folder / "adapt.log") if ranks.is_first() else contextlib.nullcontext():
            content = launch.adapt(config, folder, resume=resume)
            if content is not None:
                record(table(content))
            return content
    except MisconfigurationException as error:
        raise InputError(f"trainer: {error}") from error
    except OSError:
        if ranks.is_first() and run_folder.is_started(folder):
            err.print(f"When that is mended, go on with: adamerge adapt resume={folder}")
        raise
    except Interrupted:
        if not ranks.is_first():
            raise
        err.print(f"Stopped and saved. Go on with: adamerge adapt resume={folder}")
        err.print(f"Or export what there is: adamerge export {running_stage(folder)}")
        raise


def _take_resume(arguments: list[str]) -> tuple[list[str], str | None]:
    resume = [a.split("=", 1)[1] for a in arguments if a.startswith("resume=")]
    value = resume[-1] if resume and resume[-1] not in ("null", "") else None
    return [a for a in arguments if not a.startswith("resume=")], value


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more; `adamerge check` with the same arguments lists all)"
        raise Agreed(problems[0] + (more if len(problems) > 1 else ""))
