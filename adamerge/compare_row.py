"""One row of ``adamerge compare``: what its text means, and making, scoring and measuring it.

pretrained | experts                              references
ties density=0.1 transform=lines                  a rule of `adamerge merge`, its options, a transform
experiment=recommended steps=100                  what `adamerge adapt` takes
experiment=imitation_row start=wudi               the same, from a rule's merge: it is the base, coefficients are 0
"""

import resource
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from adamerge import launch
from adamerge.checkpoints import save_state_dict
from adamerge.composition import compose, rule_node
from adamerge.errors import InputError
from adamerge.evaluation import Row, Stopwatch, score_tasks, summary
from adamerge.merges import merged_state_dict
from adamerge.preflight import build, check
from adamerge.run_folder import is_started
from adamerge.scoring import checkpoint_parameters, score_experts

REFERENCES = ("pretrained", "experts")
_MERGED = "merged.safetensors"


@dataclass(frozen=True)
class Spec:
    """A row, understood.

    Attributes:
        text: As the user wrote it.
        rule: Node of the merge that is the row or its start; None for references and runs from the pool's base.
        overrides: Of the configuration of ``adapt``.
        adapts: Whether it is a run of ``adapt``.
    """

    text: str
    rule: Mapping[str, Any] | None = None
    overrides: tuple[str, ...] = ()
    adapts: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return what decides the row's result."""
        return {**asdict(self), "overrides": list(self.overrides)}


def read_row(text: str) -> Spec:
    """Understand a row's text.

    Raises:
        InputError: If it names no rule, or an option is wrong.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"row {text!r}: {error}.") from error
    if not words:
        raise InputError("row '': expected a rule, a reference or options of adapt.")
    try:
        if words[0] in REFERENCES and len(words) == 1:
            return Spec(text)
        if "=" not in words[0]:
            settings = [word for word in words[1:] if not word.startswith("transform")]
            overrides = tuple(word for word in words[1:] if word.startswith("transform"))
            rule = {"task_arithmetic_0.3": "task_arithmetic"}.get(words[0], words[0])
            return Spec(text, _checked(rule_node("merge", rule, settings)), overrides)
        start = [word.removeprefix("start=") for word in words if word.startswith("start=")]
        settings = [word.removeprefix("start.") for word in words if word.startswith("start.")]
        rest = tuple(word for word in words if not word.startswith(("start=", "start.")))
        if settings and not start:
            raise InputError(f"start.{settings[0]}: no start=RULE that takes it.")
        return Spec(text, _checked(rule_node("merge", start[-1], settings)) if start else None, rest, adapts=True)
    except InputError as error:
        raise InputError(f"row {text!r}: {error}") from error


def make_row(spec: Spec, common: Sequence[str], seed: int, folder: Path) -> dict[str, Any]:
    """Make and score one row; its files go into ``folder``.

    Args:
        spec: The row.
        common: Overrides for all rows, which name pool, data and backbone.
        seed: Of splits, orders and everything random.
        folder: Made if needed; a run in there goes on.

    Returns:
        The row as ``summary.json`` has it, with ``peak_memory_bytes`` of this process.

    Raises:
        InputError: If the configuration, the rule or a file is wrong.
        GuardError: If a run was stopped by a guard.
    """
    config = compose([*common, *spec.overrides])
    config.seed, config.cwd = seed, str(Path.cwd())
    if not spec.adapts:
        row = _reference_or_merge(spec, config, folder)
        content: dict[str, Any] = summary({"row": row}, "")["rows"]["row"]
    else:
        content = _adapted(spec, config, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return {**content, "seed": seed, "protocol": str(config.data.get("protocol") or "split"), "peak_memory_bytes": peak}


def _checked(node: dict[str, Any]) -> dict[str, Any]:
    """Refuse options that a rule does not take, before anything runs."""
    build(OmegaConf.create({"merge": node}), "merge")
    return node


def _reference_or_merge(spec: Spec, config: DictConfig, folder: Path) -> Row:
    assembly = _assembled(config)
    model, data = assembly.model, assembly.data
    if not data.evaluation:
        raise InputError("No task has evaluation images to score. Give data.tasks.<name>.evaluate (or dataset).")
    if spec.text == "experts":
        return score_experts(model, data)
    if spec.rule is None:
        return Row(score_tasks(model, model.pool.base, data, "Scoring the pretrained model"))
    seconds, needs_data = _merge(spec.rule, assembly, folder / _MERGED)
    params = checkpoint_parameters(folder / _MERGED, model)
    return Row(score_tasks(model, params, data, "Scoring the merge"), uses_data=needs_data, seconds=seconds)


def _assembled(config: DictConfig) -> launch.Assembly:
    """Build everything that a merge may ask for; its coefficients stay unused."""
    config = config.copy()
    config.granularity = {"_target_": "adamerge.granularity.Task"}
    config.init, config.first_stage = "mean", None
    seed_everything(config.seed, workers=True, verbose=False)
    return launch.assemble(config)


def _merge(rule: Mapping[str, Any], assembly: launch.Assembly, path: Path) -> tuple[float, bool]:
    """Merge into a file; return the seconds that it took, and whether it used data."""
    built = build(OmegaConf.create({"merge": dict(rule)}), "merge")
    watch = Stopwatch()
    state_dict = merged_state_dict(assembly.pool, built, model=assembly.model, data=assembly.data)
    seconds = watch.seconds()
    save_state_dict(state_dict, path)
    return seconds, bool(getattr(built, "needs_data", False))


def _adapted(spec: Spec, config: DictConfig, folder: Path) -> dict[str, Any]:
    """Run ``adapt``, from where it was interrupted, and return its row."""
    before, run, start = 0.0, folder / "run", folder / "start" / _MERGED
    config.run_dir = str(run)
    config.references = False
    if spec.rule is not None:
        resumes = is_started(run)
        before = 0.0 if resumes else _merge(spec.rule, _assembled(config), start)[0]
        config.pool.base = str(start)
        config.init = 0.0 if not any(word.startswith("init=") for word in spec.overrides) else config.init
    problems = check(config)
    if problems:
        raise InputError(problems[0])
    content = launch.adapt(config, run, resume=is_started(run))
    if content is None:
        raise InputError("Nothing was scored: leave evaluate on, and give data.tasks.<name>.evaluate (or dataset).")
    row = dict(next(iter(content["rows"].values())))
    return {**row, "seconds": row["seconds"] + before}
