"""Every objective x granularity x method on the demo zoo, beside the labelled oracle of each granularity.

python tests/benchmarks/objectives.py --output runs/objectives
python tests/benchmarks/objectives.py --output runs/objectives --granularities row --seeds 0 1 2 --steps 150

Images that adapt are not scored unless --transductive. All rows have the same start (0.3), images and steps. What is
done stay in the folder: run the command again to go on after an interruption, or to add rows.
"""

import argparse
import functools
import itertools
import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from adamerge import Coefficients, ExpertPool, MergedModel, zoo
from adamerge.backbones import OpenClip
from adamerge.baselines import LabelledCrossEntropy, constant, stream_labels
from adamerge.data import UnlabeledTasks
from adamerge.evaluation import Row, Stopwatch, gap_closed, normalised, score_tasks
from adamerge.files import save_json
from adamerge.methods import FrankWolfeMerging, GradientMerging
from adamerge.objectives.alignment import Alignment
from adamerge.objectives.combine import Combine
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.objectives.infomax import InfoMax
from adamerge.scoring import score_experts

BLOCKS = ("transformer.resblocks.[0-9]",)
OBJECTIVES = {
    "entropy": Entropy(),
    "entropy_reliable": Entropy(reliable=0.4),
    "infomax": InfoMax(),
    "imitation": Imitation(),
    "imitation_t2": Imitation(temperature=2.0),
    "imitation_hard": Imitation(targets="hard"),
    "imitation_sure": Imitation(targets="hard", drop_unsure=True),
    "alignment_logits": Alignment(),
    "alignment_hidden": Alignment(hidden_layers=BLOCKS, distance="mean"),
    "alignment_features": Alignment(feature_weight=1.0, distance="mean"),
    "imitation_infomax": Combine({"imitation": Imitation(), "infomax": InfoMax()}, {"infomax": 0.1}),
}
GRANULARITIES = ("task", "layer", "chunk", "column", "row")
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "fw_hard": {"step_rule": "line_search", "vertices": ("experts", "start")},
    "fw_soft": {"mode": "soft", "inner_steps": 20, "vertices": ("experts", "start")},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, default=list(GRANULARITIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32, help="per task")
    parser.add_argument("--lr", type=float, default=1e-2, help="of Adam, for the method gradient")
    parser.add_argument("--transductive", action="store_true")
    return parser.parse_args()


class Bench:
    """The zoo under one seed: data, pool, heads, and the rows that all others are compared with."""

    def __init__(self, options: argparse.Namespace, tasks: Mapping[str, Any], seed: int) -> None:
        self.options, self.seed = options, seed
        protocol = "transductive" if options.transductive else "split"
        self.data = UnlabeledTasks(tasks, batch_size=options.batch_size, protocol=protocol, seed=seed)
        files = zoo.files()
        experts = {name: files / "experts" / f"{name}.safetensors" for name in zoo.TASKS}
        self.pool = ExpertPool.from_files(files / "base.safetensors", experts, key_map="visual.")
        self.backbone = OpenClip(str(files), tokenizer=zoo.Tokenizer())
        self.heads = self.backbone.heads(self.pool.source, {}, tasks)
        model = self.model("task", "none")
        constant(model.coefficients, 0.3)
        self.start = Row(score_tasks(model, model.merge(), self.data))
        self.experts = score_experts(model, self.data)
        self.labels = {task: stream_labels(stream) for task, stream in self.data.streams.items()}

    def model(self, granularity: str, constraint: str) -> MergedModel:
        return MergedModel(
            self.backbone.encoder(), self.pool, Coefficients(self.pool, granularity, 0.3, constraint), self.heads
        )

    def run(self, objective: str, granularity: str, method: str) -> dict[str, Any]:
        """Adapt once, score, and return the row."""
        seed_everything(self.seed, workers=True, verbose=False)
        loss = LabelledCrossEntropy(self.labels) if objective == "oracle" else OBJECTIVES[objective]
        is_fine = granularity in ("column", "row")  # as in the demo
        model = self.model(granularity, "none" if method != "gradient" or is_fine else "box")
        if method == "gradient":
            merging = GradientMerging(model, loss, functools.partial(torch.optim.Adam, lr=self.options.lr))
        else:
            merging = FrankWolfeMerging(model, loss, **METHODS[method])
        trainer = Trainer(
            max_steps=self.options.steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        watch = Stopwatch()
        trainer.fit(merging, datamodule=self.data)
        seconds = watch.seconds()
        return self.described(Row(score_tasks(model, model.merge(), self.data)), seconds, trainer.global_step)

    def described(self, row: Row, seconds: float = 0.0, steps: int = 0) -> dict[str, Any]:
        return {
            "per_task": {task: score.accuracy for task, score in row.scores.items()},
            "mean": row.mean,
            "normalised": normalised(row, self.experts),
            "gap_closed": gap_closed(row, self.start, self.experts),
            "seconds": seconds,
            "steps": steps,
            "seed": self.seed,
        }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the rows by granularity, means over the seeds, the best label-free first."""
    table = Table(
        "granularity", "objective", "method", "seeds", "mean, %", "norm.", "gap", "of oracle", "worst task", "s"
    )
    settings = ("granularity", "objective", "method")
    rows = sorted(rows, key=lambda r: [str(r[key]) for key in settings])
    groups = [(k, list(g)) for k, g in itertools.groupby(rows, key=lambda r: tuple(r[key] for key in settings))]
    gap = {key: sum(r["gap_closed"] for r in group) / len(group) for key, group in groups}
    for key, group in sorted(groups, key=lambda item: (item[0][0], item[0][1] != "oracle", -gap[item[0]])):
        oracle = gap.get((key[0], "oracle", "gradient"))
        tasks = group[0]["per_task"]
        drop = {t: sum(r["per_task"][t] - r["start"][t] for r in group) / len(group) for t in tasks}
        worst = min(drop, key=lambda t: drop[t])
        mean, norm, seconds = (sum(r[k] for r in group) / len(group) for k in ("mean", "normalised", "seconds"))
        name = key[1] + (" *" if key[1] == "oracle" else "")
        cells = [f"{100 * mean:.1f}", f"{100 * norm:.1f}", f"{100 * gap[key]:.0f}"]
        cells += [
            f"{100 * gap[key] / oracle:.0f}" if oracle else "",
            f"{worst} {100 * drop[worst]:+.1f}",
            f"{seconds:.0f}",
        ]
        table.add_row(key[0], name, key[2], str(len(group)), *cells)
    console.print(table)
    console.print(
        "gap: %, share of the way from task arithmetic (0.3) to the experts; of oracle: of its gain; * uses labels."
    )


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    console = Console(width=120)
    folder = options.output / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = zoo.tasks()
    choices = [("oracle", g, "gradient") for g in options.granularities]
    choices += [(o, g, m) for g in options.granularities for o in options.objectives for m in options.methods]
    budget = f"{options.steps}x{options.batch_size}-lr{options.lr:g}{'-transductive' if options.transductive else ''}"
    for seed in options.seeds:
        bench = Bench(options, tasks, seed)
        for objective, granularity, method in choices:
            path = folder / f"{granularity}-{objective}-{method}-{budget}-seed{seed}.json"
            if path.exists():
                continue
            row = bench.run(objective, granularity, method)
            start = bench.described(bench.start)["per_task"]
            names = {"objective": objective, "granularity": granularity, "method": method, "budget": budget}
            save_json({**names, **row, "start": start, "uses_labels": objective == "oracle"}, path)
            console.print(f"{path.stem}: mean {100 * row['mean']:.1f}, gap {100 * row['gap_closed']:.0f} %, "
                          f"{row['seconds']:.0f} s")  # fmt: skip
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*-{budget}-seed*.json"))]
    save_json({"format": 1, "budget": budget, "rows": rows}, options.output / f"objectives-{budget}.json")
    show(rows, console)


if __name__ == "__main__":
    main()
