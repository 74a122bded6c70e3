"""``pool``: files that name a base and its experts, and what is known about them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from adamerge.checkpoints.hashes import check_hash, forget
from adamerge.checkpoints.hub import HubReference, located, located_all, reference_of
from adamerge.checkpoints.model_folder import open_model
from adamerge.commands.run.named_pools import named_pool, own_pools, pool_path, shipped_pools
from adamerge.commands.terminal import echo, json_option, out, print_json, print_table, report
from adamerge.errors import InputError, did_you_mean
from adamerge.pool.opening import check_names
from adamerge.pool.pool_file import PoolFile, PoolFiles, load_pool_file, named_files, named_values, place
from adamerge.pool.save import save_pool_file

_VISUAL = "visual."


@click.group(short_help="Keep pool files: a base, its experts, their tasks, licences and hashes.")
def pool() -> None:
    """Keep the pool files that runs refer to as `pool=NAME` and `--pool NAME` (docs/files.md).

    A name is a shipped pool's, or that of NAME.yaml in ./pools (ADAMERGE_POOLS names other folders).
    """


@pool.command()
@click.argument("name")
@click.option("--base", help="The pretrained checkpoint, for a new pool.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="An expert; repeat.")
@click.option("--task", "tasks", multiple=True, metavar="NAME=TASK", help="What an expert was fine-tuned on; repeat.")
@click.option("--licence", "licences", multiple=True, metavar="NAME=LICENCE", help="Of an expert, or base=...; repeat.")
@click.option("--key-prefix", default=None, help="Of the encoder's keys. Default: visual. for a whole CLIP.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only parameters of such names; repeat.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Parameters to leave out; repeat.")
@click.option("--unplaced", type=click.Choice(["auto", "refuse", "list"]), help="As pool.unplaced.  [auto]")
def add(
    name: str,
    base: str | None,
    experts: tuple[str, ...],
    tasks: tuple[str, ...],
    licences: tuple[str, ...],
    key_prefix: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    unplaced: str | None,
) -> None:
    """Make the pool NAME, or add to it; a NAME with .yaml or / is a file's.

    \b
    adamerge pool add ours --base vit_b32.safetensors --expert cars=cars.safetensors --expert dtd=dtd.safetensors
    adamerge pool add ours --expert svhn=hf://org/name@main --task svhn=svhn --licence svhn=MIT

    Files are opened and compared with the base; their SHA-256, and the commits of models from the Hub, are recorded.
    Pickled ones are converted first, by adamerge convert.
    """  # noqa: D301
    if not (base or experts or tasks or licences or key_prefix or include or exclude or unplaced):
        raise InputError("pool add: nothing to add; give --base, --expert, --task, --licence or an option of the pool.")
    path = pool_path(name)
    files = _with_facts(_with_files(path, base, named_files(experts)), tasks, licences)
    if key_prefix is None and files.key_prefix is None:
        key_prefix = _usual_prefix(files)
    files = files if key_prefix is None else replace(files, key_prefix=key_prefix)
    files = files.with_options(include, exclude, unplaced=unplaced)
    report(files.headers().problems)
    files.verify()
    recorded = {expert: _recorded(files, entry) for expert, entry in files.models.items()}
    _refuse_duplicates(files, recorded)
    files = replace(files, base=recorded.pop("base"), experts=recorded)
    save_pool_file(files, path)
    _show(files, str(path))
    echo(path)


@pool.command("list")
@click.argument("name", required=False)
@json_option
def list_pools(name: str | None, as_json: bool) -> None:
    """List all pools that have a name, or the files of one."""
    if name is not None:
        files = named_pool(name)
        if as_json:
            print_json({**files.described(), "there": {entry: path is not None for entry, path in _places(files)}})
        else:
            _show(files, name)
        return
    lines = [_line(pool_name, "shipped", named_pool(pool_name)) for pool_name in shipped_pools()]
    for pool_name, path in own_pools().items():
        if pool_name in shipped_pools():
            continue
        try:
            lines.append(_line(pool_name, str(path), load_pool_file(path)))
        except (InputError, OSError) as error:
            lines.append((pool_name, "", "", str(error), str(path)))
    if as_json:
        keys = ("name", "experts", "base", "state", "where")
        print_json([dict(zip(keys, line, strict=True)) for line in lines])
    else:
        print_table("Pools", ("", "experts", "base", "state", "from"), lines)


@pool.command()
@click.argument("name")
def verify(name: str) -> None:
    """Read every byte of a pool's files: all are there, have their hashes, and fit the base. Exit code 2 if not.

    \b
    adamerge pool verify ours
    """  # noqa: D301
    files = named_pool(name)
    report(_problems(files))
    _show(files, name)
    unknown = [entry for entry in files.entries.values() if entry.sha256 is None]
    out.print(f"No problems found. {len(unknown)} files have no hash to compare with." if unknown else "All verified.")


@pool.command()
@click.argument("targets", nargs=-1, required=True, metavar="NAME|hf://ORG/NAME...")
def fetch(targets: tuple[str, ...]) -> None:
    """Download the models of the Hub that pools name, or models by reference: the only command that does.

    \b
    adamerge pool fetch clip_vit_b32_8
    adamerge pool fetch hf://openai/clip-vit-base-patch32

    They go to the Hugging Face cache (HF_HOME); what is there is not fetched again.
    """  # noqa: D301
    references: dict[HubReference, None] = {}  # each once
    for target in targets:
        reference = reference_of(target)
        candidates = [reference] if reference else [entry.file for entry in named_pool(target).entries.values()]
        of_hub = [file for file in candidates if isinstance(file, HubReference)]
        if not of_hub:
            raise InputError(f"pool fetch {target}: its files are on this machine's disks; none is of the Hub.")
        references |= dict.fromkeys(of_hub)
    for reference in references:
        out.print(f"{reference}: {reference.fetch()}", highlight=False)


@pool.command()
@click.argument("name")
@click.option("--through", type=click.Choice(["transformers"]), required=True, help="The library that loads them.")
@click.option("--auto", help="Its Auto class, such as AutoModelForCausalLM.  [what config.json names]")
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="A new folder.")
def pack(name: str, through: str, auto: str | None, output: Path) -> None:
    """Write a pool's models under the names that their library gives them in memory.

    \b
    adamerge pool pack mixtral.yaml --through transformers --out packed
    adamerge adapt pool=packed/pool.yaml backbone=transformers data=mine

    For models whose files the library rearranges when it loads them, such as mixtures of experts. One model after
    another is in memory. Adapters stay where they are: they were trained on what is in memory.
    """  # noqa: D301
    from adamerge.commands.pack import write_through

    click.echo("\n".join(map(str, write_through(named_pool(name), output, auto))))


def _with_files(path: Path, base: str | None, experts: Mapping[str, PoolFile]) -> PoolFiles:
    """Return a new pool, or the one in a file with further experts."""
    if path.is_file():
        files = load_pool_file(path)
        if base is not None:
            raise InputError(
                f"pool add --base: {path} has a base already, {files.base.file}; edit the file to change it."
            )
    elif base is not None:
        files = PoolFiles(PoolFile(place(base)), {})
    else:
        raise InputError(f"pool add: {path}: no such pool yet; give its base: --base FILE or hf://ORG/NAME.")
    for name in experts:
        if name in files.experts:
            raise InputError(
                f"pool add --expert {name}: {path} has an expert of that name; take it out of the file first."
            )
    check_names({name: entry.file for name, entry in [*files.experts.items(), *experts.items()]})
    return replace(files, experts={**files.experts, **experts})


def _with_facts(files: PoolFiles, tasks: Sequence[str], licences: Sequence[str]) -> PoolFiles:
    """Put tasks and licences to the experts that they are given for."""
    experts, base = dict(files.experts), files.base
    for option, key, pairs in (("--task", "task", tasks), ("--licence", "licence", licences)):
        for name, value in named_values(option, pairs).items():
            fact: dict[str, Any] = {key: value}
            if name == "base" and key == "licence":
                base = replace(base, **fact)
            elif name in experts:
                experts[name] = replace(experts[name], **fact)
            else:
                raise InputError(f"{option} {name}={value}: no expert of that name.{did_you_mean(name, experts)}")
    return replace(files, base=base, experts=experts)


def _usual_prefix(files: PoolFiles) -> str | None:
    """Return the prefix of the visual tower where the base is a whole CLIP; None also where it cannot be read."""
    try:
        keys = open_model(located(files.base.file)).keys
    except (InputError, OSError):
        return None  # the headers' problems say why
    return _VISUAL if any(key.startswith(_VISUAL) for key in keys) else None


def _recorded(files: PoolFiles, entry: PoolFile) -> PoolFile:
    """Return an entry with its hash, and for a model of the Hub its commit and the licence that its card states."""
    file, licence = entry.file, entry.licence
    if isinstance(file, HubReference):
        licence = licence or file.licence()
        file = file.pinned()
    return replace(entry, file=file, licence=licence, sha256=files.hash_of(located(file)))


def _refuse_duplicates(files: PoolFiles, recorded: Mapping[str, PoolFile]) -> None:
    names: dict[str | None, str] = {}  # by hash
    for name, entry in recorded.items():
        twin = names.setdefault(entry.sha256, name)
        if twin != name and files.options["duplicates"] != "allow":
            raise InputError(
                f"pool add: {twin} and {name} are the same file, or copies: {entry.file}. Leave one out; a pool file "
                "with duplicates: allow may have both."
            )


def _places(files: PoolFiles) -> list[tuple[str, Path | None]]:
    """Return which of a pool's checkpoints are on this machine, and where; no file is opened."""
    places = []
    for name, entry in files.entries.items():
        path = entry.file.cached() if isinstance(entry.file, HubReference) else entry.file
        places.append((name, path if path is not None and path.exists() else None))
    return places


def _problems(files: PoolFiles) -> Sequence[str]:
    """Read every byte of a pool's files; return all that is missing, changed, or does not fit the base."""
    problems: list[str] = []
    try:
        located_all({name: entry.file for name, entry in files.entries.items() if isinstance(entry.file, HubReference)})
    except InputError as error:
        problems.append(str(error))
    for name, path in _places(files):
        entry = files.entries[name]
        try:
            if path is not None:
                forget(path)
                check_hash(entry.file, name, entry.sha256, lambda path=path: files.hash_of(path))  # type: ignore[misc]
            elif isinstance(entry.file, Path):
                raise FileNotFoundError(files.no_such_file(name, entry.file))
        except (InputError, OSError) as error:
            problems.append(str(error))
    return problems or files.headers().problems


def _line(name: str, where: str, files: PoolFiles) -> tuple[str, ...]:
    places = [path for _, path in _places(files)]
    state = f"{sum(path is not None for path in places)} of {len(places)} files are here"
    return name, str(len(files.experts)), str(files.base.file), state, where


def _show(files: PoolFiles, title: str) -> None:
    lines = []
    for name, path in _places(files):
        entry, state = files.entries[name], "missing" if path is None else "here"
        hash_shown = (entry.sha256 or "-")[:12]
        lines.append((name, state, entry.task or "", entry.licence or "", hash_shown, str(entry.file)))
    print_table(title, ("", "state", "task", "licence", "sha256", "file"), lines)
