"""``adapt`` and ``check``: the road of a run, compose, check, start and run, each a file of :mod:`commands.run`.

Modules that import torch or Lightning are imported where they are used, so that help and the refusal of an unknown flag
do not wait for them.
"""

import sys
from pathlib import Path

import click

from adamerge.commands.terminal import (
    EXIT_INPUT,
    Agreed,
    json_option,
    out,
    print_json,
    report,
    trust_option,
)
from adamerge.errors import InputError
from adamerge.system import ranks


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    short_help="Learn coefficients on unlabeled data and export the merged checkpoint.",
)
@trust_option
@json_option
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def adapt(overrides: tuple[str, ...], as_json: bool, trust_code: bool) -> None:
    """Learn coefficients on unlabeled data and export the merged checkpoint."""
    from adamerge.commands.run.compose import compose, hand_over, read_line
    from adamerge.commands.run.imports import announce
    from adamerge.commands.run.named_pools import quoted

    line = read_line([word for word in overrides if not word.startswith("resume=")])
    resume = ([word.split("=", 1)[1] for word in overrides if word.startswith("resume=")] or [""])[-1]
    if {"--help", "-h"} & set(line.flags):
        hand_over(line, lambda _: None)
        return
    if resume == "auto" and not any(word.startswith("run_dir=") for word in line.overrides):
        raise InputError("resume=auto needs a folder that stays the same from start to start: add run_dir=FOLDER.")
    is_resumed = resume not in ("", "null", "auto")
    # A mistyped option is refused before Lightning is imported, which takes seconds.
    config = None if is_resumed or line.flags else compose(overrides, announced=False)
    from adamerge.commands.run import processes, start

    processes.join()
    if is_resumed:
        others = [word for word in overrides if not word.startswith("resume=")]
        start.resume(Path(resume), others, as_json=as_json, trust_code=trust_code)
        return
    if config is None:
        _check_flags(line.flags, resume, as_json)
        hand_over(line, start.sweep_job)
        return
    from adamerge.commands.run.check import check as problems_of

    # All that can be wrong is found before a folder is made or a weight read.
    announce(config)
    start.refuse(next(filter(None, ranks.everyones(problems_of(config))), []))
    config.run_dir = ranks.of_first(config.run_dir)  # it may be named by the clock: all take the first process's
    if not start.start_ranks(config, [*overrides, f"run_dir={quoted(config.run_dir)}"], as_json=as_json):
        given = [*line.overrides, *(["resume=auto"] if resume == "auto" else [])]
        start.start(config, start.command_of_run(line.config_dir, given), as_json=as_json)


def _check_flags(flags: tuple[str, ...], resume: str, as_json: bool) -> None:
    """Refuse flags that do not go with a sweep."""
    if {"-m", "--multirun"} & set(flags):
        if resume == "auto":
            raise InputError("resume=auto does not go with -m: start the jobs one by one, each with its own run_dir.")
        if as_json:
            raise InputError("--json does not go with -m: each run's result is in the summary.json of its folder.")
        if ranks.count() > 1:
            raise Agreed("-m: every process would run the whole sweep. Leave torchrun and srun to one run at a time.")


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    short_help="Find what is wrong with a run, in seconds, without starting it.",
)
@trust_option
@json_option
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def check(overrides: tuple[str, ...], as_json: bool, trust_code: bool) -> None:
    """Read configuration and file headers of `adamerge adapt OVERRIDES`, and report everything that is wrong.

    \b
    adamerge check objective=entropy granularity=row
    adamerge check --config-dir my_configs pool=mine data=mine

    It takes the options of one run of `adamerge adapt`, see `adamerge adapt --help`; jobs of a sweep are checked one by
    one.
    """  # noqa: D301
    from adamerge.commands.run.compose import compose
    from adamerge.commands.run.imports import check_builds_no_library, targets_beyond

    config = compose(overrides, announced=False)
    from adamerge.commands.run.check import check as problems_of  # imports Lightning

    imports = [str(target) for target in targets_beyond(config) if target.is_found]
    if not as_json:  # before any of it is built
        for target in imports:
            out.print(target, highlight=False)
    problems = ([] if trust_code else check_builds_no_library(config)) or problems_of(config)
    if as_json:
        print_json({"problems": problems, "imports": imports})
        if problems:
            sys.exit(EXIT_INPUT)
        return
    report(problems)
    out.print("No problems found.")
