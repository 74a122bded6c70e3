"""The command ``adamerge merge``: a pool and a rule in, one merged checkpoint out.

What decides the result goes into ``merge.json``; running that recipe again gives the same bytes.
"""

import importlib.resources
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from adamerge import launch
from adamerge.composition import compose, register_resolvers
from adamerge.errors import InputError, did_you_mean
from adamerge.evaluation import Stopwatch
from adamerge.export import export_merge
from adamerge.files import ensure_writable
from adamerge.merges import merged_state_dict
from adamerge.pool import ExpertPool
from adamerge.pool_files import PoolFile, PoolFiles, load_pool_file, pool_files
from adamerge.preflight import CONFIG_MODULE, build

RULES = "merge"  # folder of the rules' yaml files
_SHIPPED_PREFIX = {"zoo": "visual."}


@dataclass(frozen=True)
class Job:
    """One merge.

    Attributes:
        rule: The rule's node: ``_target_`` and its options.
        pool: Base and experts.
        overrides: Hydra arguments of ``adapt`` that name backbone and data, for rules that need data.
    """

    rule: Mapping[str, Any]
    pool: PoolFiles
    overrides: tuple[str, ...] = ()


def run(job: Job, folder: Path) -> dict[str, Path]:
    """Merge and export.

    Args:
        job: What to merge, and how.
        folder: Where to write.

    Returns:
        Short name to file, of what was written.

    Raises:
        InputError: If the rule, an option, a file or the data is wrong.
        GuardError: If the result is not finite.
    """
    ensure_writable(folder)
    rule = build(OmegaConf.create({RULES: dict(job.rule)}), RULES)
    needs_data = bool(getattr(rule, "needs_data", False))
    if job.overrides and not needs_data:
        raise InputError(f"merge: {type(rule).__name__} reads no data; leave out {' '.join(job.overrides)}.")
    job.pool.verify()
    watch = Stopwatch()
    extras: dict[str, Any] = {}
    if needs_data:
        assembly = _assemble(job)
        pool, model, data = assembly.pool, assembly.model, assembly.data
        extras = {
            "heads": assembly.heads,
            "head_info": launch.head_info(data),
            "sidecar": assembly.backbone.sidecar(),
        }
    else:
        pool, model, data = _open(job.pool), None, None
    with _progress() as progress:
        bar = progress.add_task(f"Merging: {type(rule).__name__}", total=len(pool.names))
        state_dict = merged_state_dict(pool, rule, model=model, data=data, on_parameter=lambda _: progress.advance(bar))
    decided = {"rule": dict(job.rule), "overrides": list(job.overrides)}
    recipe = {
        **decided,
        "files": _described(job.pool),
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "cwd": str(Path.cwd()),
        "seconds": watch.seconds(),
    }
    return export_merge(pool, state_dict, folder, facts=decided, recipe=recipe, **extras)


def job_of(
    *,
    rule: str | None,
    base: Path | None,
    experts: Sequence[str],
    pool: str | None,
    recipe: Path | None,
    settings: Sequence[str],
    key_prefix: str | None,
    config_dir: Path | None,
    overrides: Sequence[str],
) -> Job:
    """Read the command's options.

    Raises:
        InputError: If they do not go together, or one is wrong.
    """
    if recipe is not None:
        if rule or base or experts or pool or settings or key_prefix or config_dir or overrides:
            raise InputError("merge: --recipe holds everything but --out; leave the other options out.")
        return read_recipe(recipe)
    if rule is None:
        raise InputError("merge: give --rule NAME; docs/methods.md lists them.")
    if pool is not None and (base or experts):
        raise InputError("merge: give either --pool, or --base and --expert, not both.")
    if pool is None and (base is None or not experts):
        raise InputError("merge: give --base FILE and --expert NAME=FILE (repeat), or --pool NAME or FILE.")
    files = named_pool(pool) if pool is not None else PoolFiles(PoolFile(Path(str(base))), _named_files(experts))
    if key_prefix is not None:
        files = replace(files, key_prefix=key_prefix)
    found = (f"--config-dir={config_dir.absolute()}",) if config_dir is not None else ()
    return Job(rule_node(rule, settings), files, (*found, *overrides))


def _named_files(pairs: Sequence[str]) -> dict[str, PoolFile]:
    files: dict[str, PoolFile] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not name or not path or name in files:
            raise InputError(f"--expert {pair}: expected NAME=FILE, each name once.")
        files[name] = PoolFile(Path(path))
    return files


def rule_node(rule: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return a rule's node: a shipped one by name, or any class by import path, with options set.

    Args:
        rule: Such as ``tsvm``, or ``my_package.MyRule``.
        settings: ``option=value``; values are yaml.

    Raises:
        InputError: If there is no such rule, or a setting cannot be read.
    """
    folder = importlib.resources.files(CONFIG_MODULE) / RULES
    known = sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if rule in known:
        node = OmegaConf.create((folder / f"{rule}.yaml").read_text(encoding="utf-8"))
    elif "." in rule:
        node = OmegaConf.create({"_target_": rule})
    else:
        raise InputError(
            f"--rule: expected one of {', '.join(known)}, or an import path such as my_package.MyRule, found {rule!r}."
            f"{did_you_mean(rule, known)}"
        )
    for setting in settings:
        option, separator, value = setting.partition("=")
        if not separator or not option:
            raise InputError(f"--set {setting}: expected OPTION=VALUE.")
        try:
            OmegaConf.update(node, option, OmegaConf.create(f"value: {value}").value)
        except Exception as error:  # whatever a yaml parser finds wrong
            raise InputError(f"--set {setting}: the value is no yaml: {str(error).splitlines()[0]}.") from error
    missing = [str(key) for key in node if OmegaConf.is_missing(node, key)]
    if missing:
        raise InputError(f"--rule {rule}: {missing[0]} must be given: --set {missing[0]}=VALUE.")
    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def named_pool(pool: str) -> PoolFiles:
    """Return a shipped pool by name, or read a pool file.

    Raises:
        InputError: If there is neither.
    """
    register_resolvers()
    folder = importlib.resources.files(CONFIG_MODULE) / "pool"
    if pool in _SHIPPED_PREFIX:
        node = OmegaConf.create((folder / f"{pool}.yaml").read_text(encoding="utf-8"))
        content: Any = OmegaConf.to_container(node, resolve=True)
        return pool_files({**content, "key_prefix": _SHIPPED_PREFIX[pool]}, f"--pool {pool}", Path())
    if not Path(pool).is_file():
        raise InputError(
            f"--pool {pool}: no such pool file, and no shipped pool of that name; shipped: "
            f"{', '.join(_SHIPPED_PREFIX)}.{did_you_mean(pool, _SHIPPED_PREFIX)}"
        )
    return load_pool_file(Path(pool))


def read_recipe(path: Path) -> Job:
    """Read a ``merge.json`` for another run; its files must still have the hashes that it records.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no recipe of this command.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rule, files, overrides = content["rule"], content["files"], content["overrides"]
        hashes = content["hashes"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: no recipe of `adamerge merge` ({type(error).__name__}: {error}). Name a merge.json that it wrote."
        ) from error
    pool = pool_files(files, str(path), path.parent)
    known = {name: PoolFile(e.file, e.task, e.licence, hashes.get(name)) for name, e in pool.experts.items()}
    base = PoolFile(pool.base.file, None, pool.base.licence, hashes.get("base"))
    options = (pool.key_prefix, pool.storage, pool.dtype, pool.include, pool.exclude)
    return Job(rule, PoolFiles(base, known, *options), tuple(overrides))


def _open(files: PoolFiles) -> ExpertPool:
    """Open a pool from its files alone."""
    dtype = None if files.dtype is None else getattr(torch, files.dtype, None)
    if files.dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"pool.dtype: expected float32, bfloat16 or float16, found {files.dtype!r}.")
    return ExpertPool.from_files(
        files.base.file,
        {name: entry.file for name, entry in files.experts.items()},
        storage=files.storage,  # type: ignore[arg-type]
        dtype=dtype,
        include=files.include,
        exclude=files.exclude,
        key_map=files.key_prefix or None,
    )


def _assemble(job: Job) -> launch.Assembly:
    """Build backbone, data and heads around the pool, as ``adapt`` would."""
    config = compose(list(job.overrides))
    files = job.pool
    config.pool = {
        "base": str(files.base.file),
        "experts": {name: str(entry.file) for name, entry in files.experts.items()},
        "storage": files.storage,
        "dtype": files.dtype,
        "include": None if files.include is None else list(files.include),
        "exclude": None if files.exclude is None else list(files.exclude),
    }
    config.granularity = {"_target_": "adamerge.granularity.Task"}  # the merge has no coefficients
    config.init, config.transform = "mean", None
    _check_overrides(job, config)
    seed_everything(config.seed, workers=True, verbose=False)
    with Console(stderr=True).status("Reading the pool and building the heads"):
        assembly = launch.assemble(config)
    prefix = assembly.backbone.prefix
    if files.key_prefix not in (None, prefix):
        raise InputError(f"--key-prefix: the backbone's keys begin with {prefix!r}, found {files.key_prefix!r}.")
    return assembly


def _check_overrides(job: Job, config: DictConfig) -> None:
    """Refuse what has no say in a merge, and tasks whose experts the pool file names otherwise."""
    used = ("backbone", "data", "seed", "--config-dir", "-cd", "num_workers")
    for argument in job.overrides:
        key = argument.lstrip("+~").split("=")[0]
        if argument.partition("=")[1] and not key.startswith(used):
            raise InputError(
                f"merge {argument}: only backbone, data and seed are read from the configuration of `adapt`; "
                "the rule's options are given by --set, the pool by --pool."
            )
    tasks = config.data.get("tasks")
    for name, entry in job.pool.experts.items():
        if entry.task and isinstance(tasks, DictConfig) and entry.task in tasks and "_target_" not in tasks:
            OmegaConf.update(tasks, f"{entry.task}.expert", name, force_add=True)


def _described(files: PoolFiles) -> dict[str, Any]:
    """Return the pool as a pool file's content, with absolute paths."""

    def entry(found: PoolFile) -> dict[str, str]:
        facts = {"file": str(found.file.absolute()), "task": found.task, "licence": found.licence}
        return {key: value for key, value in facts.items() if value is not None}

    return {
        "base": entry(files.base),
        "experts": {name: entry(found) for name, found in files.experts.items()},
        "key_prefix": files.key_prefix,
        "storage": files.storage,
        "dtype": files.dtype,
        "include": None if files.include is None else list(files.include),
        "exclude": None if files.exclude is None else list(files.exclude),
    }


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
