"""The command line: ``adamerge <command>``.

``adapt`` and ``check`` take Hydra overrides (``key=value``); all others take plain options.
Exit codes: 0 done, 2 bad input (one line), 3 stopped by a guard, 75 preempted and saved, 130 interrupted and saved.
"""

import contextlib
import errno
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler

from adamerge import ranks
from adamerge.errors import EXIT_INTERRUPTED, GuardError, InputError, Interrupted
from adamerge.version import __version__

EXIT_INPUT = 2
EXIT_GUARD = 3

_PIPED_WIDTH = 120  # characters, where there is no terminal to ask

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
err = Console(stderr=True, soft_wrap=True, highlight=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
def app(debug: bool) -> None:
    """Merge expert models into one checkpoint, with coefficients adapted on unlabeled data."""
    _configure_logging(debug)


@app.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder.")
@click.option("--seed", default=0, show_default=True, help="Of the splits and the order of the images.")
@click.option("--fast", is_flag=True, help="Fewer steps: a look at the machinery in under a minute.")
@click.option("--transductive", is_flag=True, help="Adapt on the scored images, as the AdaMerging paper does.")
def demo(output: Path, seed: int, fast: bool, transductive: bool) -> None:
    """Run the whole job on the embedded offline zoo: adapt, export, score, compare."""
    from adamerge.demo import run

    run(output, seed=seed, fast=fast, protocol="transductive" if transductive else "split", console=out)
    _list_files(output)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    short_help="Learn coefficients on unlabeled data and export the merged checkpoint.",
)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def adapt(overrides: tuple[str, ...]) -> None:
    """Learn coefficients on unlabeled data and export the merged checkpoint."""
    from adamerge import launchers, preflight
    from adamerge.composition import compose, hand_over, quoted

    arguments, resume = _take_resume(list(overrides))
    launchers.join()
    if resume not in (None, "auto"):
        _resume(Path(str(resume)), arguments)
        return
    if resume == "auto" and not any(argument.startswith("run_dir=") for argument in arguments):
        raise InputError("resume=auto needs a folder that stays the same from start to start: add run_dir=FOLDER.")
    flags = [a for a in arguments if a.startswith("-")]
    if resume == "auto" and {"-m", "--multirun"} & set(flags):
        raise InputError("resume=auto does not go with -m: start the jobs one by one, each with its own run_dir.")
    if all(flag.split("=")[0] in ("--config-dir", "-cd") for flag in flags):
        # A plain run: everything that can be wrong is found before a folder is made or a weight read.
        config = compose(arguments)
        _refuse(next(filter(None, ranks.everyones(preflight.check(config))), []))
        # The folder may be named by the clock: all processes take the first one's.
        run_dir = f"run_dir={quoted(ranks.of_first(config.run_dir))}"
        if _start_ranks(config, [*overrides, run_dir]):
            return
        if ranks.count() > 1:
            arguments = [*arguments, run_dir]
    elif ranks.count() > 1:
        raise _Agreed("-m: every process would run the whole sweep. Leave torchrun and srun to one run at a time.")
    hand_over([*arguments, "resume=auto"] if resume == "auto" else arguments, _job)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    short_help="Find what is wrong with a run, in seconds, without starting it.",
)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def check(overrides: tuple[str, ...]) -> None:
    """Read configuration and file headers of `adamerge adapt OVERRIDES`, and report everything that is wrong.

    \b
    adamerge check objective=entropy granularity=row
    adamerge check --config-dir my_configs pool=mine data=mine

    It takes what `adamerge adapt` takes; see `adamerge adapt --help`.
    """  # noqa: D301
    from adamerge import preflight
    from adamerge.composition import compose
    from adamerge.targets import foreign_targets

    config = compose(list(overrides))
    problems = preflight.check(config)
    for target in foreign_targets(preflight.containers(config)):
        out.print(_escape(str(target)), highlight=False)
    _report(problems)
    out.print("No problems found.")


@app.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="File to score instead of the run's export.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(run_dir: Path, checkpoint: Path | None, as_json: bool) -> None:
    """Score the merged checkpoint of a run on its tasks' labelled images, beside experts and baselines."""
    from adamerge import launch, run_folder
    from adamerge.evaluation import read_summary, summary, table, write_summary
    from adamerge.scoring import Made, score_run

    run_dir = run_dir.absolute()
    file = (checkpoint or run_dir / "merged.safetensors").absolute()
    config = run_folder.load_config(run_dir)
    assembly = launch.assemble(config)
    old = read_summary(run_dir / "summary.json")["rows"] if (run_dir / "summary.json").is_file() else {}
    before = {} if checkpoint else old.get(str(config.name), {})
    name = checkpoint.stem if checkpoint else str(config.name)
    made = Made(name, file, before.get("seconds", 0.0), int(config.seed), before.get("uses_labels", False))
    rows = score_run(assembly.model, assembly.data, made, references=True)
    protocol = assembly.data.protocol
    left_out = assembly.data.unreadable_evaluation()
    path = run_dir / "summary.json"
    content = summary(rows, protocol, left_out) if checkpoint else write_summary(rows, protocol, path, left_out)
    if as_json:
        click.echo(json.dumps(content, indent=2))
    else:
        out.print(table(content, width=out.width))


@app.command()
@click.argument("run_dir", type=click.Path(path_type=Path), required=False)
@click.option("--coefficients", type=click.Path(path_type=Path), help="Replay this coefficients.json.")
@click.option("--base", type=click.Path(path_type=Path), help="Without RUN_DIR: the base checkpoint.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="Without RUN_DIR: an expert; repeat.")
@click.option("--prefix", default="", help="Without RUN_DIR: key prefix of the encoder, such as visual.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder; default RUN_DIR.")
def export(
    run_dir: Path | None,
    coefficients: Path | None,
    base: Path | None,
    experts: tuple[str, ...],
    prefix: str,
    output: Path | None,
) -> None:
    """Write the merged checkpoint of a run's last step, or replay a coefficients file without any data.

    \b
    adamerge export RUN_DIR                                  an interrupted run's last checkpoint
    adamerge export RUN_DIR --coefficients FILE --output DIR
    adamerge export --base FILE --expert NAME=FILE ... --coefficients FILE --output DIR
    """  # noqa: D301
    from adamerge import replay
    from adamerge.pool_files import named_files

    if run_dir is not None:
        files = replay.export_run(run_dir, coefficients, output or run_dir)
    elif base is None or coefficients is None or output is None or not experts:
        raise InputError("export: give RUN_DIR, or all of --base, --expert, --coefficients and --output.")
    else:
        paths = {name: entry.file for name, entry in named_files(experts).items()}
        files = replay.export_files(base, paths, coefficients, output, prefix)
    for path in files.values():
        out.print(str(path), highlight=False)


@app.command()
@click.option("--rule", help="Name of a rule, such as tsvm, ties or regmean++ (docs/methods.md), or an import path.")
@click.option("--base", type=click.Path(path_type=Path), help="The base checkpoint.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="An expert; repeat.")
@click.option("--pool", help="Instead: zoo, or a pool file (yaml; its paths start from its own folder).")
@click.option("--recipe", type=click.Path(path_type=Path), help="Instead of all else: a merge.json to run again.")
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE", help="An option of the rule; repeat.")
@click.option("--key-prefix", default=None, help="Key prefix of the encoder in the files, such as visual.")
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option("--config-dir", type=click.Path(path_type=Path), help="Your own yaml files, for OVERRIDES.")
@click.argument("overrides", nargs=-1)
def merge(output: Path, **options: Any) -> None:
    """Merge a pool by a rule, without training.

    \b
    adamerge merge --rule tsvm --base BASE --expert cars=FILE --expert dtd=FILE --out merged
    adamerge merge --rule ties --set density=0.1 --pool pool.yaml --out merged
    adamerge merge --rule regmean++ --pool zoo --out merged
    adamerge merge --rule regmean --pool pool.yaml --config-dir my_configs --out merged \\
        data=mine backbone=open_clip backbone.model=ViT-B-32
    adamerge merge --recipe merged/merge.json --out again

    Rules that need unlabeled data (fisher, regmean, regmean++) take OVERRIDES that name backbone and data, as
    `adamerge adapt` does; the default is the demo zoo's.
    """  # noqa: D301
    from adamerge import merging_command

    for path in merging_command.run(merging_command.job_of(**options), output).values():
        out.print(str(path), highlight=False)


@app.command()
@click.option(
    "--rule", help="Name of a transform, such as ties (docs/methods.md), an import path, or none to pack only."
)
@click.option("--base", type=click.Path(path_type=Path), help="The base checkpoint.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="An expert; repeat.")
@click.option("--pool", help="Instead: zoo, or a pool file (yaml; its paths start from its own folder).")
@click.option("--recipe", type=click.Path(path_type=Path), help="Instead of all else: a transform.json to run again.")
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE", help="An option of the rule; repeat.")
@click.option("--key-prefix", default=None, help="Key prefix of the encoder in the files, such as visual.")
@click.option("--dtype", default=None, help="float32 (default), bfloat16, float16 or int8.")
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="Folder.")
def transform(
    rule: str | None,
    base: Path | None,
    experts: tuple[str, ...],
    pool: str | None,
    recipe: Path | None,
    settings: tuple[str, ...],
    key_prefix: str | None,
    dtype: str | None,
    output: Path,
) -> None:
    """Write a pool's transformed task vectors into one file, which is streamed from then on.

    \b
    adamerge transform --rule ties --set density=0.3 --pool pool.yaml --dtype bfloat16 --out packed
    adamerge adapt pool=files pool.file=packed/pool.yaml data=mine
    adamerge merge --rule task_arithmetic --pool packed/pool.yaml --out merged
    """  # noqa: D301
    from adamerge import transform_command
    from adamerge.composition import chosen_pool, rule_node

    if recipe is not None:
        if rule or base or experts or pool or settings or key_prefix or dtype:
            raise InputError("transform: --recipe holds everything but --out; leave the other options out.")
        job = transform_command.read_recipe(recipe)
    elif rule is None:
        raise InputError("transform: give --rule NAME; docs/methods.md lists them; none packs only.")
    else:
        files = chosen_pool("transform", base, experts, pool, key_prefix)
        job = transform_command.Job(rule_node("transform", rule, settings), files, dtype)
    for path in transform_command.run(job, output).values():
        out.print(str(path), highlight=False)


class _Lists(click.Command):
    """Options that take all words up to the next option; what follows ``--`` are overrides."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        words: list[str] = []
        option = None
        for word in args[:at]:
            if word.startswith("--"):
                option = word if word in ("--rows", "--seeds") else None
            elif option and words[-1] != option:
                words.append(option)
            words.append(word)
        return super().parse_args(ctx, [*words, *args[at:]])


@app.command(cls=_Lists, options_metavar="[OPTIONS] [-- OVERRIDES...]")
@click.option("--rows", multiple=True, metavar="ROW...", help="What to compare, see below.")
@click.option("--preset", help="Rows from a file, or a shipped one: demo (every merge, every transform, and more).")
@click.option("--seeds", type=int, multiple=True, default=(0,), show_default=True, metavar="SEED...")
@click.option("--out", "folder", type=click.Path(path_type=Path), required=True, help="Folder; go on in it.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def compare(rows: tuple[str, ...], preset: str | None, seeds: tuple[int, ...], folder: Path, overrides: Any) -> None:
    """Make many merges of one pool, score them side by side, and write tables; run it again to go on.

    \b
    adamerge compare --rows weight_average ties tsvm experiment=recommended --seeds 0 1 2 --out runs/compare
    adamerge compare --rows "ties density=0.1" "task_arithmetic transform=pcb" --out runs/compare
    adamerge compare --rows "transform=ties experiment=adamerging_layer" --out runs/compare
    adamerge compare --rows "experiment=imitation_row start=wudi" --out runs/compare
    adamerge compare --preset demo --out runs/compare -- data=mine backbone=open_clip backbone.model=ViT-B-32

    A row is pretrained, experts, a rule of `adamerge merge` with its options, or what `adamerge adapt` takes;
    start=RULE adapts from that rule's merge. OVERRIDES name pool, data and backbone as for `adamerge adapt`; the
    default is the demo zoo.
    """  # noqa: D301
    from adamerge import comparison

    plan = comparison.plan_of(rows, preset, overrides, seeds, folder)
    failed = comparison.run(plan, out, _quiet)
    _report([f"{row}: {message}" for row, message in failed.items()])
    click.echo(str(folder))


def _quiet() -> None:
    """Set a row's process up."""
    _configure_logging(False)


@app.command()
@click.option("--base", type=click.Path(path_type=Path), help="The base checkpoint.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="An expert; repeat.")
@click.option("--pool", help="Instead: zoo, or a pool file (yaml; its paths start from its own folder).")
@click.option("--prefix", default=None, help="Key prefix of the encoder, such as visual. (the zoo's default).")
@click.option("--include", multiple=True, metavar="GLOB", help="Only parameters of such names; repeat.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Parameters to leave out, such as a head's; repeat.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def inspect(
    base: Path | None,
    experts: tuple[str, ...],
    pool: str | None,
    prefix: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what is in a pool: experts, tensors, sizes, task-vector norms and cosines, problems found."""
    from adamerge import inspection
    from adamerge.composition import chosen_pool

    files = chosen_pool("inspect", base, experts, pool, prefix).narrowed(include, exclude)
    _report(inspection.header_problems(files))
    opened = inspection.open_pool(files)
    if as_json:
        click.echo(json.dumps(inspection.as_json(opened), indent=2))
    else:
        inspection.show(opened, out)


@app.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write, NAME.safetensors.")
@click.option("--key-prefix", default="", help="Take it off the names, such as model.; other tensors are left out.")
def convert(source: Path, out: Path, key_prefix: str) -> None:
    """Write the tensors of a pickled checkpoint or whole module as safetensors. Nothing in it is run."""
    from adamerge import conversion
    from adamerge.errors import shorten

    done = conversion.convert(source, out, key_prefix)
    counts = ", ".join(f"{count} {dtype}" for dtype, count in done.dtypes.items())
    lines = [f"{source}: {done.of}", f"  {sum(done.dtypes.values())} tensors, {_size(done.nbytes)}: {counts}"]
    if done.inert:
        lines.append(f"  named in it, not imported: {shorten(done.inert)}")
    if done.left_out:
        lines.append(f"  left out: {shorten(done.left_out)}")
    if done.prefix:
        lines.append(f"  All names begin with {done.prefix!r}: --key-prefix {key_prefix}{done.prefix} takes it off.")
    for line in (*lines, str(out)):
        out_line = line.encode("ascii", "backslashreplace").decode()
        click.echo(out_line)


@app.group()
def zoo() -> None:
    """The demo zoo: a tiny CLIP and six experts, trained offline from files inside pip packages."""


@zoo.command("build")
@click.option("--output", type=click.Path(path_type=Path), default=Path("zoo"), show_default=True, help="Folder.")
@click.option("--seed", default=0, show_default=True, help="Of data and training.")
def zoo_build(output: Path, seed: int) -> None:
    """Train the zoo anew (a few minutes on 2 cores)."""
    from adamerge import zoo as package
    from adamerge.files import ensure_writable

    ensure_writable(output)
    facts = package.build(output, seed)
    out.print_json(json.dumps(facts))
    _list_files(output)


class _Agreed(InputError):
    """Raised by all processes of a run; the first says it."""


class _JobFailed(SystemExit):
    """Carries a job's error past Hydra, which would print more than the one line."""

    def __init__(self, error: InputError | OSError | GuardError) -> None:
        super().__init__(EXIT_GUARD if isinstance(error, GuardError) else EXIT_INPUT)
        self.error = error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what is wrong with the input is one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in arguments:  # accepted anywhere, also among Hydra's overrides
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        code = app.main(arguments, prog_name="adamerge", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_INPUT)
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except _JobFailed as failed:
        _fail(failed.error, "--debug" in arguments)
    except (InputError, OSError, GuardError) as error:
        _fail(error, "--debug" in arguments)
    except KeyboardInterrupt:
        err.print("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)


def _job(config: Any) -> None:
    """One run, called by Hydra, in this process or in a launcher's."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from adamerge import launchers, preflight, run_folder
    from adamerge.composition import expanded, register_resolvers

    register_resolvers()
    if launchers.job_id() and not logging.getLogger().isEnabledFor(logging.INFO):
        _configure_logging(debug=False)  # this is a process of submitit's, which main() has not seen
    launchers.join()
    folder = Path(HydraConfig.get().runtime.output_dir)
    config = expanded(config)
    config.run_dir = str(folder)
    config.cwd = str(Path.cwd())
    config.job = launchers.job_id()
    again = run_folder.is_of_job(folder, config.job)  # the scheduler has started it anew
    again = again or (config.resume == "auto" and (folder / run_folder.CONFIG_FILE).is_file())
    if ranks.of_first(again):
        stored = run_folder.load_config(folder)
        stored.job = config.job
        changed = run_folder.differences(config, stored)
        if changed:
            message = f"{folder} holds a run with other options: {', '.join(changed)}. Choose another run_dir."
            raise _JobFailed(InputError(message))
        try:
            _run(stored, folder, resume=True)
        except (InputError, OSError, GuardError) as error:
            raise _JobFailed(error) from error
        return
    config.resume = None
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # a single run has been checked before its folder was made
            _refuse(preflight.check(config))
            _refuse_ranks(config)
        _on_first(run_folder.check_unused, folder)
    except InputError as error:
        raise _JobFailed(error) from error
    fresh = not any(folder.iterdir()) if folder.exists() else True
    try:
        _run(config, folder, resume=False)
    except (InputError, OSError, GuardError) as error:
        if fresh and ranks.is_first() and not isinstance(error, GuardError):
            run_folder.remove_unstarted(folder)
        raise _JobFailed(error) from error


def _resume(folder: Path, rest: Sequence[str]) -> None:
    from adamerge import run_folder

    if rest:
        raise InputError(f"resume takes its configuration from {folder}: leave out {' '.join(rest)}.")
    folder = folder.absolute()
    config = run_folder.load_config(folder)
    if not _start_ranks(config, [f"resume={folder}"]):
        _run(config, folder, resume=True)


def _start_ranks(config: Any, overrides: Sequence[str]) -> bool:
    """Start the run's processes and leave with their exit code when they have ended; False if one is enough."""
    from adamerge import launchers

    if launchers.environment() is not None or (count := launchers.wanted(config.trainer)) == 1:
        return False
    debug = ["--debug"] if logging.getLogger().isEnabledFor(logging.DEBUG) else []
    if code := launchers.start(count, [*debug, "adapt", *overrides]):
        sys.exit(code)
    return True


def _refuse_ranks(config: Any) -> None:
    """Refuse a job of a sweep in this process that would have to start others."""
    from adamerge import launchers

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
            error = _Agreed(*found.args)
    if (error := ranks.of_first(error)) is not None:
        raise error


def _run(config: Any, folder: Path, *, resume: bool) -> None:
    from adamerge import run_folder
    from adamerge.evaluation import table

    with contextlib.ExitStack() as stack:
        held = run_folder.held(folder, unused=not resume)  # again: another process may have started here since
        _on_first(lambda _: stack.enter_context(held), folder)
        content = _adapt(config, folder, resume=resume)
    if content is not None:
        out.print(table(content, width=out.width))
    if ranks.is_first():
        _list_files(folder)


def _adapt(config: Any, folder: Path, *, resume: bool) -> Any:
    """Run with a log in the run's folder, and say how to go on where the run is stopped."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from adamerge import launch, run_folder
    from adamerge.stages import running_stage

    _quiet_lightning()
    handler = _log_to(folder / "adapt.log") if ranks.is_first() else logging.NullHandler()
    try:
        return launch.adapt(config, folder, resume=resume)
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
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _take_resume(arguments: list[str]) -> tuple[list[str], str | None]:
    resume = [a.split("=", 1)[1] for a in arguments if a.startswith("resume=")]
    value = resume[-1] if resume and resume[-1] not in ("null", "") else None
    return [a for a in arguments if not a.startswith("resume=")], value


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more; `adamerge check` with the same arguments lists all)"
        raise _Agreed(problems[0] + (more if len(problems) > 1 else ""))


def _report(problems: Sequence[str]) -> None:
    """List all problems, one a line, and leave; nothing where there are none."""
    for problem in problems:
        err.print(f"[red]error:[/] {_escape(problem)}")
    if problems:
        sys.exit(EXIT_INPUT)


def _list_files(folder: Path) -> None:
    """List what a command made, and its folder as the last line."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        out.print(f"  {path.relative_to(folder)}  [dim]{_size(path.stat().st_size)}[/]", highlight=False)
    click.echo(str(folder))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _fail(error: Exception, debug: bool) -> None:
    code = EXIT_GUARD if isinstance(error, GuardError) else EXIT_INPUT
    if not ranks.is_first() and isinstance(error, (_Agreed, GuardError)):
        sys.exit(code)
    if debug:
        err.print_exception()
    text = str(error)
    if "Original Traceback" in text:  # from a process that loads data
        text = text.strip().splitlines()[-1].removeprefix("adamerge.errors.InputError: ")
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        text += ". Free some space." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    where = "" if ranks.is_first() else f" (process {ranks.rank()})"
    err.print(f"[red]error{where}:[/] {_escape(' '.join(text.split()))}")
    sys.exit(code)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _configure_logging(debug: bool) -> None:
    """Own messages to the terminal; Lightning's and open_clip's chatter and known-harmless warnings not."""
    handler: logging.Handler = logging.StreamHandler()
    if err.is_terminal:
        handler = RichHandler(console=err, show_path=False, show_time=False)
    handler.addFilter(lambda record: debug or record.name.startswith("adamerge") or record.levelno >= logging.WARNING)
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO, format="%(message)s", handlers=[handler], force=True
    )
    logging.captureWarnings(True)
    logging.raiseExceptions = debug  # a log that cannot be written to, on a full disk, is not the error to report
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # its errors reach the user as exceptions
    _quiet_lightning()
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _quiet_lightning() -> None:
    """Silence Lightning's loggers; to be called again once it is imported, which sets their levels anew."""
    level = logging.DEBUG if logging.getLogger().level == logging.DEBUG else logging.ERROR
    for noisy in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(noisy).setLevel(level)


def _log_to(path: Path) -> logging.Handler:
    """Keep a complete log file in the run's folder, made with its first line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


if __name__ == "__main__":
    main()
