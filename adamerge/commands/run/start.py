"""Start a checked run, or go on with one: its processes, its folder, and what the terminal says of both."""

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from adamerge.commands.run import folder as run_folder
from adamerge.commands.run import processes, run
from adamerge.commands.run.check import check, check_trainer
from adamerge.commands.run.compose import expanded
from adamerge.commands.run.imports import TRUST, announce, targets_beyond
from adamerge.commands.run.named_pools import register_resolvers
from adamerge.commands.run.recorded import check_config
from adamerge.commands.run.stages import STAGE, running_stage
from adamerge.commands.run.starting import as_begun, as_given, begin
from adamerge.commands.terminal import (
    PIPED_WIDTH,
    Agreed,
    JobFailed,
    configure_logging,
    err,
    list_files,
    log_to,
    out,
    print_json,
    quiet_lightning,
    record,
    record_line,
)
from adamerge.errors import GuardError, InputError, Interrupted
from adamerge.results.summary_table import table
from adamerge.system import progress, ranks


def refuse(problems: Sequence[str]) -> None:
    """Refuse a run for the first of its problems.

    Raises:
        Agreed: If there is one.
    """
    if problems:
        others = f" (and {len(problems) - 1} more; `adamerge check` with the same arguments lists all)"
        raise Agreed(problems[0] + (others if len(problems) > 1 else ""))


def start(config: DictConfig, command: Sequence[str], *, as_json: bool) -> None:
    """Start a run in its folder, or go on there: if ``resume`` is auto, or a scheduler has started its job anew.

    Args:
        config: As composed and checked.
        command: What starts this run alone, for its records.
        as_json: Print the result as JSON.

    Raises:
        InputError: If the folder holds another run, or anything is wrong with this one.
    """
    folder = Path(config.run_dir).expanduser().absolute()
    config.run_dir, config.cwd, config.command = str(folder), str(Path.cwd()), list(command)
    config.job = processes.job_id()
    again = run_folder.is_of_job(folder, config.job)
    again = again or (config.resume == "auto" and (folder / run_folder.CONFIG_FILE).is_file())
    if not ranks.of_first(again):
        config.resume = None
        _on_first(run_folder.check_unused, folder)
        _run(config, folder, resume=False, as_json=as_json)
        return
    stored = run_folder.look_at_config(folder)  # which must say what the command says, and is not built
    stored.job = config.job
    if config.trainer.get("precision") == "auto":  # a run goes on as it has begun
        config.trainer.precision = stored.trainer.get("precision")
    changed = run_folder.differing(run_folder.plain(config), run_folder.plain(as_given(stored)))
    if changed:
        raise InputError(
            f"{folder} holds a run with other options: {', '.join(changed)}. Choose another run_dir."
            f"{_further(folder) if 'steps' in changed else ''}"
        )
    config = as_begun(config, stored)
    _on_first(partial(check_config, config), folder)
    config.cwd, config.command = stored.cwd, stored.command
    _run(config, folder, resume=True, as_json=as_json)


def resume(folder: Path, overrides: Sequence[str], *, as_json: bool, trust_code: bool = False) -> None:
    """Go on with the run of a folder.

    Args:
        folder: The run's.
        overrides: What else was given.
        as_json: Print the result as JSON.
        trust_code: See :func:`~adamerge.commands.run.folder.load_config`.

    Raises:
        InputError: If the folder is no run's, or there are overrides.
    """
    if overrides:
        advice = _further(folder) if any(word.startswith("steps=") for word in overrides) else ""
        raise InputError(f"resume takes its configuration from {folder}: leave out {' '.join(overrides)}.{advice}")
    folder, first = folder.absolute(), None
    config = run_folder.load_config(folder, trust_code=trust_code)
    if config.get("first_stage") is not None:
        first = run_folder.load_config(folder / STAGE, trust_code=trust_code)
        _on_first(partial(check_config, first), folder / STAGE)
    _on_first(partial(check_config, config), folder)
    try:
        check_trainer(config)
    except InputError as error:
        raise Agreed(
            f"{error} A run goes on as it was begun: there, or here from what it has learned, with "
            f"adamerge export {folder} --out DIR and init=DIR/coefficients.json."
        ) from error
    flags = [TRUST] if trust_code else []
    if not start_ranks(config, [*flags, f"resume={folder}"], as_json=as_json):
        _run(config, folder, resume=True, as_json=as_json, first=first)


def _further(folder: Path) -> str:
    """Say how to add steps to a run."""
    return f" For more steps, start another run from its coefficients: init={folder / 'coefficients.json'} steps=N."


def sweep_job(config: DictConfig) -> None:
    """Check and start one run of a sweep, called by Hydra, in this process or in a launcher's."""
    register_resolvers()
    if processes.job_id() and not logging.getLogger().isEnabledFor(logging.INFO):
        configure_logging(debug=False)  # this is a process of submitit's, which main() has not seen
    processes.join()
    try:
        config = expanded(config)
        announce(config)
        config.run_dir = str(HydraConfig.get().runtime.output_dir)
        refuse(check(config))
        if processes.environment() is None and processes.wanted(config.trainer) > 1:
            raise InputError(
                "trainer.devices: a job of a sweep on this machine has one process, as each would run the whole sweep. "
                "Set trainer.devices=1, sweep on a cluster (hydra/launcher=slurm), or start the runs one by one."
            )
        start(config, _command_of_job(), as_json=False)
    except (InputError, OSError, GuardError) as error:
        raise JobFailed(error) from error


def _command_of_job() -> list[str]:
    """Return the command that starts a job of a sweep alone, with its own values."""
    hydra = HydraConfig.get()
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.provider == "command-line"]
    return command_of_run(folders[0] if folders else None, hydra.overrides.task)


def command_of_run(config_dir: Path | None, overrides: Sequence[str]) -> list[str]:
    """Return the command that starts a run, without the folder that its processes agreed on, which stands in quotes."""
    words = [word for word in overrides if ranks.count() == 1 or not word.startswith("run_dir='")]
    if config_dir is not None and config_dir.is_relative_to(Path.cwd()):
        config_dir = config_dir.relative_to(Path.cwd())
    return ["adamerge", "adapt", *(() if config_dir is None else (f"--config-dir={config_dir}",)), *words]


def start_ranks(config: DictConfig, overrides: Sequence[str], *, as_json: bool) -> bool:
    """Start the run's processes and leave with their exit code when they have ended; False if one is enough."""
    if processes.environment() is not None or (count := processes.wanted(config.trainer)) == 1:
        return False
    flags = {
        "--debug": logging.getLogger().isEnabledFor(logging.DEBUG),
        "--quiet": progress.is_quiet(),
        "--json": as_json,
    }
    if code := processes.start(count, ["adapt", *(flag for flag, is_set in flags.items() if is_set), *overrides]):
        sys.exit(code)
    return True


def _on_first(function: Callable[[Path], object], folder: Path) -> None:
    """Call a function that refuses folders in the first of the run's processes; all refuse if it does."""
    error = None
    if ranks.is_first():
        try:
            function(folder)
        except InputError as refusal:
            error = Agreed(*refusal.args)
    if (error := ranks.of_first(error)) is not None:
        raise error


def _run(config: DictConfig, folder: Path, *, resume: bool, as_json: bool, first: DictConfig | None = None) -> None:
    """Run in a folder that no other process may use meanwhile, and print the result."""
    with contextlib.ExitStack() as stack:
        held = run_folder.held(folder, unused=not resume)  # again: another process may have started here since
        _on_first(lambda _: stack.enter_context(held), folder)
        try:
            content = _run_logged(config, folder, resume=resume, first=first)
        except (Exception, Interrupted) as error:  # an objective of others that fails leaves no folder behind either
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
        out.print(table(content).terminal(out.width))
    list_files(folder)


def _run_logged(config: DictConfig, folder: Path, *, resume: bool, first: DictConfig | None) -> Any:
    """Run with a log in the run's folder, and say how to go on where the run is stopped."""
    quiet_lightning()
    try:
        with log_to(folder / "adapt.log") if ranks.is_first() else contextlib.nullcontext():
            for target in targets_beyond(config):
                record_line(target)
            content = run.adapt(begin(config, folder), folder, resume=resume, first=first)
            if content is not None:
                record(table(content).terminal(PIPED_WIDTH))
            return content
    except MisconfigurationException as error:
        raise InputError(f"trainer: {error}") from error
    except OSError as error:
        if ranks.is_first() and run_folder.is_started(folder):
            err.print(f"When that is mended, go on with: {run_folder.resume_command(folder)}")
        if error.errno is not None and error.filename is None:  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
        raise
    except Interrupted:
        if ranks.is_first():
            _tell_stopped(folder)
        raise


def _tell_stopped(folder: Path) -> None:
    """Say how to go on with a run that a signal has stopped."""
    if not run_folder.is_started(folder):
        err.print("Nothing was saved yet: start it again.")
        return
    err.print(f"Stopped and saved. Go on with: {run_folder.resume_command(folder)}")
    if run_folder.last_checkpoint(running_stage(folder)) is not None:  # else the run is still in its folds
        err.print(f"Or export what there is: adamerge export {running_stage(folder)}")
