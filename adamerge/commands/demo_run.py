"""The whole job on the embedded zoo: adapt in several ways, export the best, score, compare.

The protocol is a split: one half of each task's test images adapts, the other half is scored.
Everything it prints is measured in the run.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console

from adamerge import zoo
from adamerge.backbones import OpenClip
from adamerge.callbacks.export import ExportMergedWeights
from adamerge.callbacks.progress import MergingProgress
from adamerge.commands.run.run import head_info, record_metrics
from adamerge.data.unlabeled_tasks import Protocol, UnlabeledTasks
from adamerge.data.views import Affine, Views
from adamerge.methods import GradientMerging
from adamerge.model.coefficients import Coefficients
from adamerge.model.constraints import Box, Clamp, Constraint, Unconstrained
from adamerge.model.merged_model import MergedModel
from adamerge.objectives import Objective
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.pool.pool import ExpertPool
from adamerge.results import baselines
from adamerge.results.evaluation import TableRow, bootstrap_difference, score_tasks, table, write_summary
from adamerge.results.figures import save_comparison
from adamerge.results.report import report_run
from adamerge.results.report.record import costs_of
from adamerge.results.scoring import checkpoint_parameters, score_experts
from adamerge.system import progress
from adamerge.system.files import ensure_writable
from adamerge.system.progress import Stopwatch

EXPORTED = "recommended"
ROWS = (
    "pretrained",
    "weight_average",
    "task_arithmetic_0.3",
    "task_arithmetic_best",
    "adamerging_task",
    "adamerging_layer",
    "imitation_layer",
    "imitation_row",
    "recommended",
    "oracle_layer",
    "experts",
)
ORDER = ("pretrained", "task_arithmetic_0.3", "imitation_layer", "imitation_row", "recommended", "experts")


@dataclass(frozen=True)
class Recipe:
    """One adapted row: what is minimized, at which granularity, and how far.

    Attributes:
        decay: Whether the learning rate falls to 0 along a cosine.
        views: Augmented views to adapt on instead of the images.
    """

    objective: Objective
    granularity: str
    constraint: Constraint
    lr: float
    steps: int
    batch_size: int
    decay: bool = False
    views: Views | None = None
    uses_labels: bool = False


def run(
    output: Path, *, seed: int = 0, fast: bool = False, protocol: Protocol = "split", console: Console | None = None
) -> dict[str, Any]:
    """Run the demo and write its files.

    Args:
        output: Folder for ``merged.safetensors`` and what belongs to it, ``summary.json``, ``comparison.png`` and
            ``report.html``.
        seed: Of the split and the order of the images.
        fast: A tenth of the steps, to try the machinery; the accuracies mean little then.
        protocol: ``"split"`` or ``"transductive"``.
        console: Where the table goes; None for nowhere.

    Returns:
        The content of ``summary.json``.

    Raises:
        InputError: If the packages of the extra ``demo`` are missing or the folder is not writable.
    """
    watch = Stopwatch()
    ensure_writable(output)
    seed_everything(seed, workers=True, verbose=False)
    files = zoo.files()
    with progress.phase("Rendering the images"):
        tasks = zoo.tasks()
    data = UnlabeledTasks(tasks, batch_size=32, protocol=protocol, seed=seed)
    pool = ExpertPool.from_files(
        files / "base.safetensors", {n: files / "experts" / f"{n}.safetensors" for n in zoo.TASKS}, key_map="visual."
    )
    backbone = OpenClip(str(files), tokenizer=zoo.Tokenizer())
    heads = backbone.heads(pool.source, {}, tasks)
    start = MergedModel(backbone.encoder(), pool, Coefficients(pool, "task", 0.3, Unconstrained()), heads)
    times = {"prepare": watch.seconds()}
    rows, recipes = _constant_rows(start, data, seed), _recipes(data, 0.1 if fast else 1.0)
    for name, recipe in recipes.items():
        coefficients = Coefficients(pool, recipe.granularity, 0.3, recipe.constraint)
        model = MergedModel(backbone.encoder(), pool, coefficients, heads)
        export = None
        if name == EXPORTED:
            facts = {"recipe": _described(recipe), "command": _command(output, seed, fast, protocol)}
            export = ExportMergedWeights(output, head_info=head_info(data), sidecar=backbone.sidecar(), recipe=facts)
        rows[name] = _adapted_row(name, recipe, model, data, seed, export)
    rows["experts"] = score_experts(start, data)
    ordered = {name: rows[name] for name in ROWS}
    content = write_summary(ordered, protocol, output / "summary.json")
    record_metrics(output / "merge.json", content, ordered[EXPORTED].seconds)
    save_comparison(content, output / "comparison.png")
    times["adapt"] = ordered[EXPORTED].seconds
    report_run(output, pool, costs_of(times, recipes[EXPORTED].steps, pool.device, resumed=False))
    if console is not None:
        console.print(table(content, "Demo zoo: one base, six experts, one merged model", console.width))
        for line in verdict(ordered):
            console.print(line)
    return content


def verdict(rows: Mapping[str, TableRow]) -> list[str]:
    """Say whether the expected order came out, with paired bootstrap intervals of the steps between its rows."""
    lines = []
    for lower, higher in itertools.pairwise(ORDER):
        low, high = bootstrap_difference(rows[higher].scores, rows[lower].scores)
        difference = rows[higher].mean - rows[lower].mean
        holds = "holds" if low > 0 else "within noise" if difference > 0 else "does not hold"
        lines.append(
            f"{lower} < {higher}: {holds}, {100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    return lines


def recommended(steps: int = 300) -> Recipe:
    """Return the recipe of ``experiment=recommended``."""
    return Recipe(Imitation(), "row", Unconstrained(), 0.1, steps, 32, decay=True, views=Views(Affine()))


def _recipes(data: UnlabeledTasks, share: float) -> dict[str, Recipe]:
    """The adapted rows, with settings for a demo of minutes: AdaMerging's published run has 500 steps at 1e-3."""

    def steps(count: int) -> int:
        return max(1, round(count * share))

    labels = {name: baselines.stream_labels(stream) for name, stream in data.streams.items()}  # for the oracle only
    return {
        "adamerging_task": Recipe(Entropy(), "task", Clamp(), 2e-3, steps(100), 16),
        "adamerging_layer": Recipe(Entropy(), "layer", Clamp(), 2e-3, steps(100), 16),
        "imitation_layer": Recipe(Imitation(), "layer", Box(), 1e-2, steps(150), 32),
        "imitation_row": Recipe(Imitation(), "row", Unconstrained(), 1e-2, steps(150), 32),
        "recommended": recommended(steps(300)),
        "oracle_layer": Recipe(
            baselines.LabelledCrossEntropy(labels), "layer", Box(), 1e-2, steps(150), 32, uses_labels=True
        ),
    }


def _constant_rows(model: MergedModel, data: UnlabeledTasks, seed: int) -> dict[str, TableRow]:
    """Rows with one shared coefficient: nothing is learned but, on labels, the grid's best."""
    rows = {}
    fixed = {"pretrained": 0.0, "weight_average": 1 / len(model.pool.expert_names), "task_arithmetic_0.3": 0.3}
    for name, value in fixed.items():
        baselines.constant(model.coefficients, value)
        rows[name] = TableRow(score_tasks(model, model.merge(), data, f"Scoring {name}"), seed=seed)
    watch = Stopwatch()
    best = baselines.search_task_arithmetic(model, data)
    seconds = watch.seconds()
    scores = score_tasks(model, model.merge(), data, "Scoring task_arithmetic_best")
    rows["task_arithmetic_best"] = TableRow(
        scores, uses_labels=True, uses_data=True, seconds=seconds, seed=seed, extra={"coefficient": best}
    )
    return rows


def _adapted_row(
    name: str,
    recipe: Recipe,
    model: MergedModel,
    data: UnlabeledTasks,
    seed: int,
    export: ExportMergedWeights | None,
) -> TableRow:
    optimizer = functools.partial(torch.optim.Adam, lr=recipe.lr)
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=recipe.steps)
    method = GradientMerging(model, recipe.objective, optimizer, cosine if recipe.decay else None)
    trainer = Trainer(
        max_steps=recipe.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[MergingProgress(f"Adapting {name}"), *([export] if export else [])],
    )
    watch = Stopwatch()
    trainer.fit(method, datamodule=_streams(recipe, data))
    seconds = watch.seconds()
    # The exported row is scored as exported: read back from the file, in the base's dtype.
    params = checkpoint_parameters(export.files["merged"], model) if export else model.merge()
    scores = score_tasks(model, params, data, f"Scoring {name}")
    return TableRow(scores, uses_labels=recipe.uses_labels, uses_data=True, seconds=seconds, seed=seed)


def _streams(recipe: Recipe, data: UnlabeledTasks) -> UnlabeledTasks:
    """Return the adaptation data of ``data`` in the recipe's batches and views."""
    return UnlabeledTasks(
        data.tasks, batch_size=recipe.batch_size, protocol=data.protocol, seed=data.seed, views=recipe.views
    )


def _command(output: Path, seed: int, fast: bool, protocol: Protocol) -> list[str]:
    options = [*(["--fast"] if fast else []), *(["--transductive"] if protocol == "transductive" else [])]
    return ["adamerge", "demo", "--output", str(output), "--seed", str(seed), *options]


def _described(recipe: Recipe) -> dict[str, Any]:
    return {
        "objective": type(recipe.objective).__name__,
        "granularity": recipe.granularity,
        "constraint": type(recipe.constraint).__name__,
        "lr": recipe.lr,
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "decay": "cosine" if recipe.decay else None,
        "views": None if recipe.views is None else str(recipe.views),
    }
