"""Pools with more experts than tasks: irrelevant experts, duplicates and relevant ones, on the demo zoo.

python tests/benchmarks/pools.py --output runs/pools
python tests/benchmarks/pools.py --output runs/pools --kinds noise --counts 0 16 --methods fw_soft entropy_layer

The tasks stay the zoo's six. Experts are added that were trained by the zoo's own code on shuffled labels
(``shuffled``), on images of noise with random labels (``noise``), on either in turn (``irrelevant``), on the same tasks
with other seeds (``relevant``), or that are copies of the zoo's (``duplicate``). They stay in OUTPUT/experts, the rows
in OUTPUT/rows: run the command again to go on after an interruption, or to add rows. After the experiment with
irrelevant and relevant experts of FW-Merging, arXiv:2503.12649.
"""

import argparse
import functools
import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from open_clip import build_zero_shot_classifier
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adamerge import Coefficients, ExpertPool, MergedModel, zoo
from adamerge.backbones import OpenClip
from adamerge.checkpoints.checkpoint import load_state_dict
from adamerge.checkpoints.writing import save_state_dict
from adamerge.data import UnlabeledTasks
from adamerge.methods import FrankWolfeMerging, GradientMerging
from adamerge.methods.method import MergingMethod
from adamerge.objectives import Objective
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.results.evaluation import TableRow, score_tasks
from adamerge.system.files import atomic_path, save_json
from adamerge.system.progress import Stopwatch
from adamerge.zoo.design import DEMO
from adamerge.zoo.training import train_expert
from tests.benchmarks.pictures import save_lines

KINDS = {  # what the added experts are, in turn
    "irrelevant": ("shuffled", "noise"),
    "duplicate": ("duplicate",),
    "relevant": ("relevant",),
    "shuffled": ("shuffled",),
    "noise": ("noise",),
}


@dataclass(frozen=True)
class Method:
    """One line of the comparison; without steps nothing is learned, the start is scored."""

    objective: Objective | None
    init: float | str
    granularity: str = "layer"
    constraint: str = "none"
    frank_wolfe: Mapping[str, Any] | None = None
    lr: float = 1e-2


_SOFT = {"mode": "soft", "inner_steps": 10}
_POOL = {**_SOFT, "vertices": ("experts", "base"), "vertex_scale": 2.0}  # experiment=fw_pool
METHODS = {
    "fw_hard": Method(Imitation(), 0.0, frank_wolfe={"step_rule": "harmonic"}),
    "fw_hard_joint": Method(Imitation(), 0.0, frank_wolfe={"step_rule": "harmonic", "granularity": "task"}),
    "fw_hard_average": Method(Imitation(), 0.0, frank_wolfe={"step_rule": "harmonic", "average_gradients": True}),
    "fw_pool_group_average": Method(Imitation(), 0.0, "row", frank_wolfe={**_POOL, "average_gradients": True}),
    "fw_soft": Method(Imitation(), 0.0, frank_wolfe={**_SOFT, "granularity": "task"}),
    "fw_pool": Method(Imitation(), 0.0, "row", frank_wolfe={**_POOL, "granularity": "task"}),
    "fw_pool_group": Method(Imitation(), 0.0, "row", frank_wolfe=_POOL),  # each row chooses its own experts
    "imitation_layer": Method(Imitation(), "mean", constraint="box"),
    "imitation_row": Method(Imitation(), "mean", "row"),
    "entropy_layer": Method(Entropy(), "mean", constraint="clamp", lr=2e-3),
    "task_arithmetic_0.3": Method(None, 0.3, "task"),
    "weight_average": Method(None, "mean", "task"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS)[:3])
    parser.add_argument("--counts", nargs="+", type=int, default=[0, 4, 8, 16], help="experts added")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0, help="of split and batches")
    parser.add_argument("--plot", type=Path, help="default OUTPUT/pools.png")
    parser.add_argument("--low", type=float, default=60, help="lowest accuracy in the plot, %%")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16, help="per task")
    return parser.parse_args()


def make_experts(kind: str, count: int, folder: Path) -> dict[str, Path]:
    """Make what is missing of the first ``count`` added experts of a kind, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    turns = KINDS[kind]
    made = [(turns[number % len(turns)], number // len(turns)) for number in range(count)]
    files = {f"{what}_{number:02d}": folder / f"{what}_{number:02d}.safetensors" for what, number in made}
    missing = [item for item, path in zip(made, files.values(), strict=True) if not path.exists()]
    for what, number in track(missing, f"Making experts: {kind}", disable=not missing):
        _make_expert(what, number, folder / f"{what}_{number:02d}.safetensors")
    return files


def _make_expert(kind: str, number: int, path: Path) -> None:
    task, seed = zoo.TASKS[number % len(zoo.TASKS)], 1 + number
    if kind == "duplicate":
        with atomic_path(path) as temporary:
            shutil.copyfile(zoo.files() / "experts" / f"{task}.safetensors", temporary)
        return
    data = zoo.ZooImages(task, "train", seed if kind == "relevant" else 0)
    images, labels = data.images, data.labels
    generator = torch.Generator().manual_seed(seed)
    if kind == "shuffled":
        labels = labels[torch.randperm(len(labels), generator=generator)]
    if kind == "noise":
        images = torch.rand(images.shape, generator=generator) * 2 - 1
        labels = torch.randint(len(data.classes), labels.shape, generator=generator)
    model = zoo.create_model().train()
    model.load_state_dict({k: v.float() for k, v in load_state_dict(zoo.files() / "base.safetensors").items()})
    head = build_zero_shot_classifier(model, zoo.Tokenizer(), data.classes, zoo.TEMPLATES)
    train_expert(model, head, (images, labels), DEMO.expert, seed, lambda: None)
    tower = {name: value.half() for name, value in model.state_dict().items() if name.startswith("visual.")}
    save_state_dict(tower, path)


class Bench:
    """The six tasks, and a pool with experts added."""

    def __init__(self, seed: int, added: Mapping[str, Path], batch_size: int = 16) -> None:
        self.seed = seed
        self.data = UnlabeledTasks(_tasks(), batch_size=batch_size, seed=seed)
        files = zoo.files()
        experts = {name: files / "experts" / f"{name}.safetensors" for name in zoo.TASKS} | dict(added)
        self.pool = ExpertPool.from_files(
            files / "base.safetensors", experts, key_map="visual.", duplicates="allow", storage="ram"
        )
        self.backbone = OpenClip(str(files), tokenizer=zoo.Tokenizer())
        self.heads = self.backbone.heads(self.pool.source, {}, self.data.tasks)

    def run(self, method: Method, steps: int) -> dict[str, Any]:
        """Adapt once, score, and return the row."""
        seed_everything(self.seed, workers=True, verbose=False)
        coefficients = Coefficients(self.pool, method.granularity, method.init, method.constraint)
        model = MergedModel(self.backbone.encoder(), self.pool, coefficients, self.heads)
        watch = Stopwatch()
        if method.objective is not None:
            self._fit(model, method.objective, method, steps)
        seconds = watch.seconds()
        row = TableRow(score_tasks(model, model.merge(), self.data))
        values = coefficients().detach()
        return {
            "per_task": {task: score.accuracy for task, score in row.scores.items()},
            "mean": row.mean,
            "seconds": seconds,
            "weight": {name: value.mean().item() for name, value in zip(self.pool.expert_names, values, strict=True)},
        }

    def _fit(self, model: MergedModel, objective: Objective, method: Method, steps: int) -> None:
        if method.frank_wolfe is None:
            adam = functools.partial(torch.optim.Adam, lr=method.lr)
            merging: MergingMethod = GradientMerging(model, objective, adam)
        else:
            merging = FrankWolfeMerging(model, objective, **method.frank_wolfe)
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(merging, datamodule=self.data)


@functools.cache
def _tasks() -> dict[str, Any]:
    return zoo.tasks()


def measure(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Make the rows that are missing, and return those asked for; nothing added is the same for all kinds."""
    folder = options.output / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    settings = [(kind, count) for kind in options.kinds for count in options.counts if count]
    if 0 in options.counts:
        settings.insert(0, ("none", 0))
    rows = []
    for kind, count in settings:
        bench = None
        for name in options.methods:
            budget = f"{options.steps}x{options.batch_size}-seed{options.seed}"
            path = folder / f"{kind}{count}-{name}-{budget}.json"
            if not path.exists():
                added = make_experts(kind, count, options.output / "experts") if count else {}
                bench = bench or Bench(options.seed, added, options.batch_size)
                row = {"kind": kind, "count": count, "method": name, **bench.run(METHODS[name], options.steps)}
                save_json(row, path)
                console.print(f"{path.stem}: mean {100 * row['mean']:.1f}, {row['seconds']:.0f} s")
            rows.append(json.loads(path.read_text()))
    return rows


def curves(rows: list[dict[str, Any]], kind: str) -> dict[str, dict[float, float]]:
    """Return each method's mean accuracy in percent by the number of added experts of a kind."""
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["kind"] in ("none", kind):
            lines.setdefault(row["method"], {})[row["count"]] = 100 * row["mean"]
    return lines


def show(rows: list[dict[str, Any]], kinds: list[str], console: Console) -> None:
    """Print a line for each kind and method: accuracy by number added, and what the added experts weigh."""
    for kind in kinds:
        counts = sorted({row["count"] for row in rows if row["kind"] in ("none", kind)})
        table = Table(kind, *(f"+{count}" for count in counts), "change", "worst task", "weight of added")
        for method, points in curves(rows, kind).items():
            own = {row["count"]: row for row in rows if row["method"] == method and row["kind"] in ("none", kind)}
            first, last = own[counts[0]], own[counts[-1]]
            drop = {task: last["per_task"][task] - first["per_task"][task] for task in first["per_task"]}
            worst = min(drop, key=lambda task: drop[task])
            added = sum(value for name, value in last["weight"].items() if name not in zoo.TASKS)
            table.add_row(
                method, *(f"{points[count]:.1f}" for count in counts), f"{points[counts[-1]] - points[counts[0]]:+.1f}",
                f"{worst} {100 * drop[worst]:+.1f}", f"{added:.2f} of {sum(last['weight'].values()):.2f}",
            )  # fmt: skip
        console.print(table)
    console.print("Mean accuracy of six tasks, %, by number of added experts; weight: coefficients' means, summed.")


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    console = Console(width=120)
    rows = measure(options, console)
    save_json({"format": 1, "methods": {n: repr(METHODS[n]) for n in options.methods}, "rows": rows},
              options.output / "pools.json")  # fmt: skip
    show(rows, options.kinds, console)
    save_lines(
        {kind: curves(rows, kind) for kind in options.kinds}, options.plot or options.output / "pools.png",
        x="experts added to six", y="mean accuracy, %", low=options.low,
    )  # fmt: skip


if __name__ == "__main__":
    main()
