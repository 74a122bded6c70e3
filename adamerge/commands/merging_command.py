"""The command ``adamerge merge``: a pool and a rule in, one merged checkpoint out.

What decides the result goes into ``merge.json``; running that recipe again gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from adamerge.commands.run import run as launch
from adamerge.commands.run.build import build
from adamerge.commands.run.compose import compose, name_experts, rule_node
from adamerge.commands.run.named_pools import chosen_pool
from adamerge.errors import InputError
from adamerge.merges import merged_state_dict
from adamerge.model.batch_norm import BatchNormPolicy
from adamerge.pool.pool_file import PoolFiles, pool_files
from adamerge.results import recipes
from adamerge.results.export import export_merge
from adamerge.results.report import PAGE
from adamerge.system import progress
from adamerge.system.files import ensure_writable
from adamerge.system.progress import Stopwatch

RULES = "merge"  # folder of the rules' yaml files


@dataclass(frozen=True)
class Job:
    """One merge.

    Attributes:
        rule: The rule's node: ``_target_`` and its options.
        pool: Base and experts.
        overrides: Hydra arguments of ``adapt`` that name backbone and data, where data is needed.
        batch_norm: Policy of BatchNorm statistics; None: ``recalibrate`` where the rule reads data, else ``average``.
    """

    rule: Mapping[str, Any]
    pool: PoolFiles
    overrides: tuple[str, ...] = ()
    batch_norm: str | None = None


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
    reads_data = bool(getattr(rule, "needs_data", False))
    policy = BatchNormPolicy(job.batch_norm or ("recalibrate" if reads_data else "average"))  # type: ignore[arg-type]
    needs_data = reads_data or policy.needs_data
    if job.overrides and not needs_data:
        raise InputError(f"merge: {type(rule).__name__} reads no data; leave out {' '.join(job.overrides)}.")
    job.pool.verify()
    watch = Stopwatch()
    extras: dict[str, Any] = {}
    if needs_data:
        assembly = _assemble(job, policy)
        pool, model, data = assembly.pool, assembly.model, assembly.data
        extras = {
            "heads": assembly.heads,
            "head_info": launch.head_info(data),
            "sidecar": assembly.backbone.sidecar(),
        }
    else:
        pool, model, data = job.pool.open(), None, None
    with progress.phase(f"Merging: {type(rule).__name__}", len(pool.names), "tensors") as advance:
        state_dict = merged_state_dict(pool, rule, model=model, data=data, on_parameter=lambda _: advance(1))
    state_dict = policy.complete(state_dict, model, pool, data)
    decided = {"rule": dict(job.rule), "overrides": list(job.overrides), "batch_norm": policy.policy}
    recipe = {
        **decided,
        "files": job.pool.described(),
        "uses_data": needs_data,
        "uses_labels": bool(getattr(rule, "uses_labels", False)),
        **recipes.command_facts(watch.seconds()),
    }
    (folder / PAGE).unlink(missing_ok=True)  # of another merge, which this one replaces
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
    batch_norm: str | None,
    config_dir: Path | None,
    overrides: Sequence[str],
) -> Job:
    """Read the command's options.

    Raises:
        InputError: If they do not go together, or one is wrong.
    """
    if recipe is not None:
        if rule or base or experts or pool or settings or key_prefix or batch_norm or config_dir or overrides:
            raise InputError("merge: --recipe holds everything but --out; leave the other options out.")
        return read_recipe(recipe)
    if rule is None:
        raise InputError("merge: give --rule NAME; docs/methods.md lists them.")
    files = chosen_pool("merge", base, experts, pool, key_prefix)
    found = (f"--config-dir={config_dir.absolute()}",) if config_dir is not None else ()
    return Job(rule_node(RULES, rule, settings), files, (*found, *overrides), batch_norm)


def read_recipe(path: Path) -> Job:
    """Read a ``merge.json`` for another run; its files must still have the hashes that it records.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no recipe of this command.
    """
    content = recipes.read_recipe(path, "merge", ("rule", "files", "overrides", "hashes"))
    pool = pool_files(content["files"], str(path), path.parent).pinned(content["hashes"])
    return Job(content["rule"], pool, tuple(content["overrides"]), content.get("batch_norm", "base"))


def _assemble(job: Job, policy: BatchNormPolicy) -> launch.Assembly:
    """Build backbone, data and heads around the pool, as ``adapt`` would."""
    config = compose(list(job.overrides))
    files = job.pool
    config.pool = files.node()
    config.granularity = {"_target_": "adamerge.model.granularity.Task"}  # the merge has no coefficients
    config.init, config.transform = "mean", None
    config.batch_norm.policy = policy.policy
    _check_overrides(job, config)
    seed_everything(config.seed, workers=True, verbose=False)
    with progress.phase("Reading the pool and building the heads"):
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
    name_experts(config, job.pool)
