"""The command line: ``adamerge <command>``.

``adapt`` and ``check`` take Hydra overrides (``key=value``); all others take plain options.
Exit codes: 0 done, 2 bad input (one line), 3 stopped by a guard, 75 preempted and saved, 130 interrupted and saved.
"""

import importlib
import os
import sys
from collections.abc import Sequence

import click

from adamerge import __version__
from adamerge.commands.terminal import EXIT_INPUT, JobFailed, configure_logging, err, fail, interruptible
from adamerge.errors import EXIT_INTERRUPTED, GuardError, InputError
from adamerge.system import ranks

COMMANDS = {  # name to module and what the list of commands says
    "adapt": ("adapt", "Learn coefficients on unlabeled data and export the merged checkpoint."),
    "check": ("adapt", "Find what is wrong with a run, in seconds, without starting it."),
    "coefficients": ("coefficients", "Bring published coefficients into a file with names."),
    "compare": ("compare.command", "Make many merges of one pool, and score them side by side."),
    "convert": ("convert", "Write a pickled checkpoint's tensors as safetensors, or a CLIP in another format."),
    "data": ("data", "Which of the field's data sets are there, and how to get the others."),
    "demo": ("demo", "Run the whole job on the embedded offline zoo: adapt, export, score, compare."),
    "evaluate": ("evaluate", "Score the merged checkpoint of a run beside experts and baselines."),
    "export": ("export", "Write the merged checkpoint of a run, replay coefficients, or change the format."),
    "inspect": ("inspect", "Show what is in a pool: experts, tensors, sizes, norms and cosines, problems found."),
    "merge": ("merge", "Merge a pool by a rule, without training."),
    "pool": ("pool", "Keep pool files: a base, its experts, their tasks, licences and hashes."),
    "report": ("report", "Write one page, which needs no network, of what runs did."),
    "reproduce": ("reproduce", "Make the rows of a published table and print them beside the published figures."),
    "transform": ("transform", "Write a pool's transformed task vectors into one file, streamed from then on."),
    "zoo": ("zoo", "Zoos: small CLIPs and their experts, trained offline from real images."),
}


EXIT_LOST = 1  # another process of the run has ended, and says why


class LazyGroup(click.Group):
    """Imports a command's module when that command is called, so that help and usage errors import no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None where no command has the name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"adamerge.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.option("--quiet", is_flag=True, help="Show results, warnings and errors only.")
def app(debug: bool, quiet: bool) -> None:
    """Merge expert models into one checkpoint, with coefficients adapted on unlabeled data.

    --debug and --quiet may stand anywhere on the line.
    """
    configure_logging(debug, quiet)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what is wrong with the input is one line and exit code 2."""
    if arguments is not None:
        sys.argv = ["adamerge", *arguments]  # logs and recipes state the command
    arguments = sys.argv[1:]
    for flag in ("--debug", "--quiet"):  # accepted anywhere, also among Hydra's overrides
        if flag in arguments:
            arguments = [flag, *(a for a in arguments if a != flag)]
    try:
        with interruptible():
            code = app.main(arguments, prog_name="adamerge", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_INPUT)
    except click.Abort as error:
        _aborted(error)
    except JobFailed as failed:
        fail(failed.error, "--debug" in arguments)
    except (InputError, OSError, GuardError) as error:
        fail(error, "--debug" in arguments)
    except RuntimeError as error:
        if not ranks.is_lost(error) or "--debug" in arguments:
            raise
        _lost()


def _aborted(abort: click.Abort) -> None:
    """End after Ctrl-C; click takes the end of any file for that of the user's input, which is an error as others."""
    if isinstance(abort.__cause__, EOFError):
        raise abort.__cause__ from None
    err.print("Interrupted.")
    sys.exit(EXIT_INTERRUPTED)


def _lost() -> None:
    """End as another process of the run has; where the command has started it, it says which one."""
    if os.environ.get("TORCHELASTIC_RUN_ID") != "adamerge":
        err.print(f"error: process {ranks.rank()} stops, as another one of the run has ended.")
    sys.exit(EXIT_LOST)


if __name__ == "__main__":
    main()
