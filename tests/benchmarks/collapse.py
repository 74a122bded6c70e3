"""Entropy minimization on streams that make it collapse, under each action of the collapse guard.

python tests/benchmarks/collapse.py --output runs/collapse

Streams of the demo zoo's six tasks: 64 images of one class, or 8 images; 100 steps, row-wise. Scored on the other half
of the test images, all classes, every 25 steps. What is done stays in the folder: run the command again to go on.
"""

import argparse
import functools
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from pools import Bench
from rich.console import Console
from rich.table import Table
from torch.utils.data import Subset

from adamerge import Coefficients, MergedModel, zoo
from adamerge.callbacks import CollapseGuard
from adamerge.data import Task, UnlabeledTasks
from adamerge.methods import GradientMerging
from adamerge.objectives.entropy import Entropy
from adamerge.results.evaluation import TableRow, score_tasks
from adamerge.system.files import save_json
from tests.benchmarks.pictures import save_lines

STREAMS = ("one_class", "tiny")
ACTIONS = ("warn", "lower", "stop")  # warn changes nothing
CLASS = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--actions", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=25, help="steps between scores")
    parser.add_argument("--plot", type=Path, help="default OUTPUT/collapse.png")
    return parser.parse_args()


def streams(kind: str) -> dict[str, Task]:
    """Return the six tasks with even-numbered images to score and few of the odd-numbered to adapt."""
    tasks = {}
    for name in zoo.TASKS:
        images = zoo.ZooImages(name)
        odd = range(1, len(images), 2)
        one_class = [number for number in odd if int(images.labels[number]) == CLASS]
        adapt = Subset(images, one_class[:64] if kind == "one_class" else odd[:8])
        score = Subset(images, range(0, len(images), 2))
        tasks[name] = Task(adapt=adapt, evaluate=score, classes=zoo.CLASSES[name], templates=zoo.TEMPLATES)
    return tasks


class Scores(Callback):
    """Mean accuracy by step, and the marginal entropies that the guard measures."""

    def __init__(self, data: UnlabeledTasks, every: int) -> None:
        self._data, self._every = data, every
        self.accuracy: dict[int, float] = {}

    def score(self, model: MergedModel, step: int) -> None:
        """Score the model as it is."""
        if step not in self.accuracy:
            self.accuracy[step] = TableRow(score_tasks(model, model.merge(), self._data)).mean

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the start."""
        self.score(pl_module.model, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score every so many steps, and where the run ends."""
        step = trainer.global_step
        if step % self._every == 0 or trainer.should_stop:
            self.score(pl_module.model, step)


def run(bench: Bench, stream: str, action: str, options: argparse.Namespace) -> dict[str, Any]:
    """Adapt once and return the row."""
    seed_everything(0, workers=True, verbose=False)
    data = UnlabeledTasks(streams(stream), batch_size=16)
    model = MergedModel(bench.backbone.encoder(), bench.pool, Coefficients(bench.pool, "row", 0.3, "none"), bench.heads)
    method = GradientMerging(model, Entropy(), functools.partial(torch.optim.Adam, lr=1e-2))
    scores = Scores(data, options.every)
    guard = CollapseGuard(action)
    trainer = Trainer(
        max_steps=options.steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[guard, scores],
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    scores.score(model, trainer.global_step)
    return {
        "accuracy": scores.accuracy,
        "steps": trainer.global_step,
        "task_weights": method.task_weights,
        "reason": guard.reason,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("stream", "guard", "start", "end", "change", "steps", "weights of the tasks' losses")
    for row in rows:
        values = list(row["accuracy"].values())
        weights = ", ".join(f"{task} {weight:g}" for task, weight in row["task_weights"].items())
        table.add_row(
            row["stream"], row["action"], f"{100 * values[0]:.1f}", f"{100 * values[-1]:.1f}",
            f"{100 * (values[-1] - values[0]):+.1f}", str(row["steps"]), weights or "1",
        )  # fmt: skip
    console.print(table)
    console.print("Mean accuracy of six tasks, %, of all classes; the start is task arithmetic at 0.3.")


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    console = Console(width=120)
    folder = options.output / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    bench, rows = None, []
    for stream in options.streams:
        for action in options.actions:
            path = folder / f"{stream}-{action}-{options.steps}.json"
            if not path.exists():
                bench = bench or Bench(0, {})
                save_json({"stream": stream, "action": action, **run(bench, stream, action, options)}, path)
            rows.append(json.loads(path.read_text()))
    save_json({"format": 1, "rows": rows}, options.output / "collapse.json")
    show(rows, console)
    panels: dict[str, dict[str, dict[float, float]]] = {stream: {} for stream in options.streams}
    for row in rows:
        panels[row["stream"]][f"guard: {row['action']}"] = {int(k): 100 * v for k, v in row["accuracy"].items()}
    save_lines(panels, options.plot or options.output / "collapse.png", x="steps", y="mean accuracy, %")


if __name__ == "__main__":
    main()
