"""The command line: ``adamerge <command>``.

``adapt`` and ``check`` take Hydra overrides (``key=value``); all others take plain options.
Exit codes: 0 done, 2 bad input (one line), 3 stopped by a guard, 75 preempted and saved, 130 interrupted and saved.
"""

import sys
from collections.abc import Sequence

import click

from adamerge import __version__
from adamerge.commands.adapt import adapt, check
from adamerge.commands.coefficients import coefficients
from adamerge.commands.data import data
from adamerge.commands.demo import demo, zoo
from adamerge.commands.export import evaluate, export
from adamerge.commands.inspect import convert, inspect
from adamerge.commands.merge import compare, merge, transform
from adamerge.commands.pool import pool
from adamerge.commands.report import report
from adamerge.commands.reproduce import reproduce
from adamerge.commands.terminal import EXIT_INPUT, JobFailed, configure_logging, err, fail
from adamerge.errors import EXIT_INTERRUPTED, GuardError, InputError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.option("--quiet", is_flag=True, help="Show results, warnings and errors only.")
def app(debug: bool, quiet: bool) -> None:
    """Merge expert models into one checkpoint, with coefficients adapted on unlabeled data.

    --debug and --quiet may stand anywhere on the line.
    """
    configure_logging(debug, quiet)


for command in (
    demo,
    adapt,
    check,
    evaluate,
    export,
    report,
    merge,
    transform,
    compare,
    reproduce,
    inspect,
    convert,
    data,
    pool,
    coefficients,
    zoo,
):
    app.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what is wrong with the input is one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for flag in ("--debug", "--quiet"):  # accepted anywhere, also among Hydra's overrides
        if flag in arguments:
            arguments = [flag, *(a for a in arguments if a != flag)]
    try:
        code = app.main(arguments, prog_name="adamerge", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_INPUT)
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except JobFailed as failed:
        fail(failed.error, "--debug" in arguments)
    except (InputError, OSError, GuardError) as error:
        fail(error, "--debug" in arguments)
    except KeyboardInterrupt:
        err.print("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
