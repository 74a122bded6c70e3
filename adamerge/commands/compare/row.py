"""One row of ``adamerge compare``: what its text means, and making, scoring and measuring it.

pretrained | experts | task_arithmetic_best       references; the last searches its coefficient with labels
ties density=0.1 transform=lines                  a rule of `adamerge merge`, its options, a transform
experiment=recommended steps=100                  what `adamerge adapt` takes
experiment=imitation_row start=wudi               the same, from a rule's merge: it is the base, coefficients are 0
random_experts steps=100                          a control, with options of adapt; distillation is the other
"""

import contextlib
import gc
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from adamerge.checkpoints.writing import save_state_dict
from adamerge.commands.run import processes, run
from adamerge.commands.run.assembly import Assembly, build_pool
from adamerge.commands.run.build import build
from adamerge.commands.run.check import check
from adamerge.commands.run.compose import compose
from adamerge.commands.run.folder import differing, held, is_started, load_config, plain
from adamerge.commands.run.shipped import rule_node
from adamerge.commands.run.starting import assembled, begin, merge_of
from adamerge.errors import InputError
from adamerge.model.coefficients import Coefficients
from adamerge.model.merged_model import MergedModel
from adamerge.pool.pool import ExpertPool
from adamerge.results.baselines import search_task_arithmetic
from adamerge.results.evaluation import TableRow, summary
from adamerge.results.scoring import checkpoint_parameters, score_experts, scores_of
from adamerge.system.files import save_json
from adamerge.system.memory import peak_memory, restart_peak
from adamerge.system.progress import Stopwatch
from adamerge.system.reading import read_json

SEARCHED = "task_arithmetic_best"
REFERENCES = ("pretrained", "experts", SEARCHED)
CONTROLS = {  # what of a recipe's result owes nothing to merging; options of the row replace these
    "random_experts": (
        "experiment=recommended", "transform=random", "transform.seed=${seed}",
    ),
    "distillation": ("experiment=distillation",),
}  # fmt: skip
_RUN, _MERGED = "run", "merged.safetensors"
_STARTED = "started.json"  # what an adapting row was begun with


@dataclass(frozen=True)
class Spec:
    """A row's text, taken apart.

    Attributes:
        text: As the user wrote it.
        reference: Which of :data:`REFERENCES` it is, or None.
        rule: Node of the merge that is the row or its start, which may be ``auto``; None for references and runs from
            the pool's base.
        overrides: Overrides of the configuration of ``adapt``.
        adapts: Whether it is a run of ``adapt``.
        control: Which of :data:`CONTROLS` it is, or None.
    """

    text: str
    reference: str | None = None
    rule: Mapping[str, Any] | Literal["auto"] | None = None
    overrides: tuple[str, ...] = ()
    adapts: bool = False
    control: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what decides the row's result."""
        content = {**asdict(self), "overrides": list(self.overrides)}
        return content if self.control else {key: value for key, value in content.items() if key != "control"}


def read_row(text: str) -> Spec:
    """Take a row's text apart.

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
        if words[0] in CONTROLS:
            return _control_spec(text, words)
        return _adapted_spec(text, words) if "=" in words[0] else _merge_spec(text, words)
    except InputError as error:
        raise InputError(f"row {text!r}: {error}") from error


def _merge_spec(text: str, words: Sequence[str]) -> Spec:
    name, options = words[0], words[1:]
    settings = [word for word in options if not word.startswith("transform")]
    overrides = tuple(word for word in options if word.startswith("transform"))
    if name in REFERENCES:
        refused, takes = (settings, "a transform only") if name == SEARCHED else (options, "no options")
        if refused:
            raise InputError(f"{name} takes {takes}, found {refused[0]!r}.")
        return Spec(text, name, overrides=overrides)
    rule = "task_arithmetic" if name == "task_arithmetic_0.3" else name
    return Spec(text, rule=_checked(rule_node("merge", rule, settings)), overrides=overrides)


def _control_spec(text: str, words: Sequence[str]) -> Spec:
    """Return a control as the run that it is: its own options, but for those that the row gives."""
    name, *options = words
    given = {option.partition("=")[0] for option in options}
    if name == "random_experts" and "transform" in given:
        raise InputError("random_experts takes no transform: random directions are its own.")
    of_control = [word for word in CONTROLS[name] if word.partition("=")[0] not in given]
    return replace(_adapted_spec(text, [*of_control, *options]), control=name)


def _adapted_spec(text: str, words: Sequence[str]) -> Spec:
    start = [word.removeprefix("start=") for word in words if word.startswith("start=")]
    settings = [word.removeprefix("start.") for word in words if word.startswith("start.")]
    overrides = tuple(word for word in words if not word.startswith(("start=", "start.")))
    if settings and not start:
        raise InputError(f"start.{settings[0]}: no start=RULE that takes it.")
    if start == ["auto"] and not settings:
        return Spec(text, rule="auto", overrides=overrides, adapts=True)
    node = _checked(rule_node("merge", start[-1], settings)) if start else None
    return Spec(text, rule=node, overrides=overrides, adapts=True)


def make_row(spec: Spec, common: Sequence[str], seed: int, folder: Path) -> dict[str, Any]:
    """Make and score one row; its files go into ``folder``.

    Args:
        spec: The row.
        common: Overrides for all rows, which name pool, data and backbone.
        seed: Seed of splits, orders and everything random.
        folder: Made if needed; a run in there goes on.

    Returns:
        The row as ``summary.json`` has it, with ``peak_memory_bytes`` of this process while it made the row.

    Raises:
        InputError: If the configuration, the rule or a file is wrong.
        GuardError: If a run was stopped by a guard.
    """
    if spec.adapts:
        shared_assembly.cache_clear()  # for its memory
    gc.collect()  # what an earlier row holds in circles
    restart_peak()
    if spec.adapts:
        with contextlib.chdir("."):  # a run that goes on moves to where it was begun
            content = _adapted(spec, _composed([*common, *spec.overrides], seed), folder)
    else:
        assembly = shared_assembly(tuple(common), seed)
        if spec.overrides:
            assembly = _transformed(_composed([*common, *spec.overrides], seed), assembly)
        seed_everything(seed, workers=True, verbose=False)  # as if it were the first row of its process
        content = summary({"row": _reference_or_merge(spec, assembly, folder)}, assembly.data.protocol)
    (row,) = content["rows"].values()
    if spec.control:
        row = {**row, "control": spec.control}
    return {**row, "seed": seed, "protocol": content["protocol"], "peak_memory_bytes": peak_memory()}


def _composed(overrides: Sequence[str], seed: int) -> DictConfig:
    config = compose(overrides)
    config.seed, config.cwd = seed, str(Path.cwd())
    return config


@lru_cache(maxsize=1)
def shared_assembly(common: tuple[str, ...], seed: int) -> Assembly:
    """Build what all rows of a seed that do not adapt have in common, once in a process."""
    return assembled(_composed(common, seed))


def _transformed(config: DictConfig, of: Assembly) -> Assembly:
    """Return an assembly with the pool that the configuration's transform makes; itself without a transform."""
    transform = config.get("transform")
    if transform is None or transform.get("_target_") is None:
        return of
    pool = build_pool(config, of.backbone)
    return replace(of, pool=pool, model=_model(of, Coefficients(pool, "task", "mean"), pool))


def _model(of: Assembly, coefficients: Coefficients, pool: ExpertPool) -> MergedModel:
    """Return the merged model of an assembly with other coefficients."""
    model = MergedModel(
        of.model.encoder, pool, coefficients, of.heads, of.model.teachers, read=of.model.read, valid=of.model.valid
    )
    of.batch_norm.start(model)
    return model.to_device(of.pool.device)


def _reference_or_merge(spec: Spec, assembly: Assembly, folder: Path) -> TableRow:
    if not assembly.data.evaluation:
        raise InputError("No task has evaluation inputs to score. Give data.tasks.<name>.evaluate (or dataset).")
    if spec.reference == SEARCHED:
        return _searched(assembly)
    if spec.rule is None:
        return _score(spec, assembly, folder)
    assert spec.rule != "auto"
    rule, seconds = _merge(spec.rule, assembly, folder / _MERGED)
    uses_data, uses_labels = (bool(getattr(rule, name, False)) for name in ("needs_data", "uses_labels"))
    row = _score(spec, assembly, folder)
    return replace(row, seconds=seconds, uses_data=uses_data, uses_labels=uses_labels)


def _score(spec: Spec, assembly: Assembly, folder: Path) -> TableRow:
    """Score a row, but for :data:`SEARCHED`, as its file in ``folder`` is."""
    model, data = assembly.model, assembly.data
    if spec.reference == "experts":
        return score_experts(model, data)
    if spec.reference == "pretrained":
        return TableRow(*scores_of(model, model.base_parameters(), data, "Scoring the pretrained model"))
    path = folder / _RUN / _MERGED if spec.adapts else folder / _MERGED
    return TableRow(*scores_of(model, checkpoint_parameters(path, model), data, "Scoring the merge"))


def _searched(assembly: Assembly) -> TableRow:
    """Score task arithmetic with the coefficient that is best on the labels of the adaptation inputs."""
    pool, data = assembly.pool, assembly.data
    watch = Stopwatch()
    model = _model(assembly, Coefficients(pool, "task", "mean", "none"), pool)
    best = search_task_arithmetic(model, data)
    params = {name: tensor.detach() for name, tensor in model.merge().items()}
    params |= assembly.batch_norm.final(model, params, data)
    seconds = watch.seconds()
    scores, unseen = scores_of(model, params, data, "Scoring task arithmetic")
    return TableRow(scores, unseen, uses_labels=True, uses_data=True, seconds=seconds, extra={"coefficient": best})


def _built(rule: Mapping[str, Any]) -> Any:
    """Build a rule from its node; options that it does not take are refused."""
    return build(OmegaConf.create({"merge": dict(rule)}), "merge")


def _checked(rule: dict[str, Any]) -> dict[str, Any]:
    _built(rule)
    return rule


def _merge(node: Mapping[str, Any], assembly: Assembly, path: Path) -> tuple[Any, float]:
    """Merge into a file; return the rule, and the seconds that it took."""
    rule = _built(node)
    watch = Stopwatch()
    state_dict = merge_of(rule, assembly)
    seconds = watch.seconds()
    save_state_dict(state_dict, path)
    return rule, seconds


def _adapted(spec: Spec, config: DictConfig, folder: Path) -> dict[str, Any]:
    """Run ``adapt``, from where it was interrupted, and return its summary, of one row."""
    run_dir = folder / _RUN
    config.run_dir = str(run_dir)
    config.references, config.report = False, False
    if processes.wanted(config.trainer) > 1:
        raise InputError(
            "trainer.devices: a row has one process, as each would make the whole comparison. Set trainer.devices=1."
        )
    with held(run_dir, option="--out"):
        if resumed := is_started(run_dir):
            _check_same(spec, config, folder)
        else:
            save_json({"options": _options(spec, config)}, folder / _STARTED)
        if spec.rule is not None:
            config.start = spec.rule
        problems = check(config)
        if problems:
            raise InputError(problems[0])
        begun = begin(load_config(run_dir) if resumed and config.start else config, run_dir)
        if any(word.startswith("init=") for word in spec.overrides):
            begun.init = config.init
        content = run.adapt(begun, run_dir, resume=resumed)
    if content is None:
        raise InputError("Nothing was scored: leave evaluate on, and give data.tasks.<name>.evaluate (or dataset).")
    (row,) = content["rows"].values()
    return {**content, "rows": {"row": row}}


def _options(spec: Spec, config: DictConfig) -> dict[str, Any]:
    return {**plain(config), **({} if spec.rule is None else {"start": spec.rule})}


def _check_same(spec: Spec, config: DictConfig, folder: Path) -> None:
    """Refuse to go on with an interrupted row that was begun with other options."""
    path = folder / _STARTED
    try:
        changed = differing(json.loads(json.dumps(_options(spec, config))), read_json(path)["options"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        changed = [f"unknown, as {path.name} is missing or damaged"]
    if changed:
        raise InputError(
            f"{folder}: an interrupted row that was made with other options: {', '.join(changed)}. "
            "Remove its folder to make it anew, or choose another --out."
        )
