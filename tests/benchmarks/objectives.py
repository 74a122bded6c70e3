"""Every objective x granularity x method on the demo zoo, beside the labelled oracle of each granularity.

python tests/benchmarks/objectives.py --output runs/objectives
python tests/benchmarks/objectives.py --output runs/objectives --granularities row --seeds 0 1 2 --steps 150

Images that adapt are not scored unless --transductive. All rows have the same start (0.3), images and steps. What is
done stay in the folder: run the command again to go on after an interruption, or to add rows.
"""

import argparse
import functools
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
from adamerge.data import UnlabeledTasks
from adamerge.methods import FrankWolfeMerging, GradientMerging
from adamerge.objectives.alignment import Alignment
from adamerge.objectives.combine import Combine
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.objectives.infomax import InfoMax
from adamerge.results.baselines import LabelledCrossEntropy, constant, stream_labels
from adamerge.results.evaluation import TableRow, gap_closed, normalised, score_tasks
from adamerge.results.scoring import score_experts
from adamerge.system.files import save_json
from adamerge.system.progress import Stopwatch

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
        self.start = TableRow(score_tasks(model, model.merge(), self.data))
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
        return self.described(TableRow(score_tasks(model, model.merge(), self.data)), seconds, trainer.global_step)

    def described(self, row: TableRow, seconds: float = 0.0, steps: int = 0) -> dict[str, Any]:
        return {
            "per_task": {task: score.accuracy for task, score in row.scores.items()},
            "mean": row.mean,
            "normalised": normalised(row.accuracies, self.experts.accuracies),
            "gap_closed": gap_closed(row.mean, self.start.mean, self.experts.mean),
            "seconds": seconds,
            "steps": steps,
            "seed": self.seed,
        }


COLUMNS = ("granularity", "objective", "method", "seeds", "mean", "norm.", "gap", "of oracle", "steps", "s")
NOTE = (
    "Accuracy in %, mean over the seeds; norm.: relative to the task's expert; gap: share of the way from task "
    "arithmetic (0.3) to the experts; of oracle: share of its gain over task arithmetic; s: seconds of adaptation; "
    "* uses labels."
)


def records(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one record per setting, means over its seeds, by granularity, the best label-free first."""
    settings = ("granularity", "objective", "method")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in settings), []).append(row)
    result = []
    for key, group in groups.items():
        record = dict(zip(settings, key, strict=True))
        averages = {k: sum(r[k] for r in group) / len(group) for k in ("mean", "normalised", "gap_closed", "seconds")}
        tasks = {t: sum(r["per_task"][t] for r in group) / len(group) for t in group[0]["per_task"]}
        lost = [t for t in tasks if tasks[t] < sum(r["start"][t] for r in group) / len(group)]
        result.append(
            {**record, **averages, "seeds": len(group), "steps": group[0]["steps"], "tasks": tasks, "lost": lost}
        )
    gains = {(r["granularity"], r["seeds"]): r["gap_closed"] for r in result if r["objective"] == "oracle"}
    for r in result:
        oracle = gains.get((r["granularity"], r["seeds"]), 0.0)  # of other seeds it would say nothing
        r["of_oracle"] = r["gap_closed"] / oracle if oracle > 0.01 else None
    order = lambda r: (GRANULARITIES.index(r["granularity"]), r["objective"] != "oracle", -r["gap_closed"])  # noqa: E731
    return sorted(result, key=order)


def cells(record: Mapping[str, Any]) -> list[str]:
    """Return a record's cells: the columns, then the tasks; a task that lost against task arithmetic has a (-)."""
    name = record["objective"] + (" *" if record["objective"] == "oracle" else "")
    shares = [record["mean"], record["normalised"], record["gap_closed"], record["of_oracle"]]
    numbers = ["" if x is None else f"{100 * x:.{digits}f}" for x, digits in zip(shares, (1, 1, 0, 0), strict=True)]
    tasks = [f"{100 * x:.1f}{' (-)' if t in record['lost'] else ''}" for t, x in record["tasks"].items()]
    first = [record["granularity"], name, record["method"], str(record["seeds"]), *numbers]
    return [*first, str(record["steps"]), f"{record['seconds']:.0f}", *tasks]


def markdown(found: list[dict[str, Any]]) -> str:
    """Return the records as a table for the documentation."""
    header = [*COLUMNS, *found[0]["tasks"]]
    lines = [header, ["---"] * len(header), *(cells(record) for record in found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{NOTE} (-): below task arithmetic.\n"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the gap closed by objective and method, one panel per granularity; the oracle is a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [g for g in GRANULARITIES if any(r["granularity"] == g for r in found)]
    objectives = list(dict.fromkeys(r["objective"] for r in found if r["objective"] != "oracle"))
    figure = Figure(figsize=(2.2 * len(shown) + 2, 0.3 * len(objectives) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, granularity in zip(panels, shown, strict=True):
        rows = [r for r in found if r["granularity"] == granularity]
        for method, marker, color in zip(METHODS, "osD", ("#4477aa", "#ee6677", "#228833"), strict=True):
            points = [r for r in rows if r["method"] == method and r["objective"] != "oracle"]
            at = [objectives.index(r["objective"]) for r in points]
            if points:
                axes.plot([100 * r["gap_closed"] for r in points], at, marker, label=method, color=color, alpha=0.8)
        for r in rows:
            if r["objective"] == "oracle":
                axes.axvline(100 * r["gap_closed"], color="black", linestyle=":", label="oracle *")
        axes.set_title(granularity)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_yticks(range(len(objectives)), objectives)
    panels[0].invert_yaxis()
    panels[-1].legend(fontsize="small", loc="upper left")
    figure.supxlabel("gap closed, % (* uses labels)")
    figure.savefig(path, dpi=150)


def show(found: list[dict[str, Any]], console: Console) -> None:
    """Print the records without their tasks, but with those that lost."""
    table = Table(*COLUMNS, "below task arithmetic")
    for record in found:
        table.add_row(*cells(record)[: len(COLUMNS)], " ".join(record["lost"]))
    console.print(table)
    console.print(NOTE)


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
    found = records(rows)
    (options.output / f"objectives-{budget}.md").write_text(markdown(found), encoding="utf-8")
    plot(found, options.output / f"objectives-{budget}.png")
    show(found, console)


if __name__ == "__main__":
    main()
