"""Variations of the recommended recipe on the demo zoo, from task arithmetic and without an anchor, where parts show.

python tests/benchmarks/recipes.py --output runs/recipes
python tests/benchmarks/recipes.py --output runs/recipes --variations recommended images row_pieces --seeds 0 1 2 --full

A fifth of the adaptation images is held out, and variations are compared by the imitation loss on it, which needs no
label (those of the objective cannot be, as each has its own loss); accuracies are shown beside it. With --full nothing
is held out. Rows that are done stay in the folder.
"""

import argparse
import csv
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from adamerge.commands.run.compose import compose
from adamerge.commands.run.run import adapt
from adamerge.system.files import save_json
from adamerge.system.reading import read_json

_COMBINED = "objective=combine +objective.terms.hidden._target_=adamerge.objectives.alignment.Alignment"
_HIDDEN = f"{_COMBINED} ~objective.terms.infomax ~objective.weights.infomax +objective.terms.hidden.logit_weight=0"
_BASE = "experiment=recommended start=null method.anchor=0 data.views.count=16 data.views.mix=0"
_RATES = (0.0003, 0.001, 0.003)  # of all weights, for experiment=distillation
VARIATIONS: dict[str, str] = {
    "recommended": "",
    "images": "data.views=null",
    "no_decay": "method.scheduler=null",
    "lr_0.01": "optimizer.lr=0.01",
    "lr_0.2": "optimizer.lr=0.2",
    "temperature_2": "objective.temperature=2",
    "hard": "objective.targets=hard",
    "mix_half": "data.views.mix=0.5",
    "mix_only": "data.views.transform=null data.views.mix=1",
    "strong_views": "data.views.transform.degrees=30 data.views.transform.shift=0.12 data.views.transform.scale=0.25 "
    "data.views.transform.shear=0.3",
    "views_1": "data.views.count=1",
    "batch_64": "data.batch_size=64",
    "start_mean": "init=mean",
    "start_half": "init=0.5",
    "hidden": f"{_HIDDEN} +objective.terms.hidden.anchor=0 +objective.terms.hidden.distance=mean "
    "+objective.terms.hidden.hidden_layers=[transformer.resblocks.?]",
    "box": "constraint=box",
    "finer": "granularity=chunk granularity.pieces=1000",
    "column": "granularity=column",
    "layer": "granularity=layer",
    **{f"distillation_{lr}": f"method=distillation granularity=task optimizer.lr={lr}" for lr in _RATES},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--variations", nargs="+", choices=VARIATIONS, default=list(VARIATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--full", action="store_true", help="adapt on all adaptation images, hold nothing out")
    parser.add_argument("--transductive", action="store_true")
    return parser.parse_args()


def run(name: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Adapt in a folder of its own, and return the row: accuracies, and the lowest loss on held-out images."""
    overrides = [*_BASE.split(), *VARIATIONS[name].split(), f"seed={seed}", f"steps={options.steps}"]
    overrides += [f"run_dir={folder}", "trainer=cpu", f"teacher_cache={folder.parent / 'teachers'}"]
    overrides += ["callbacks=none", "data.holdout=0"] if options.full else ["callbacks=keep_best", "data.holdout=0.2"]
    overrides += ["data.protocol=transductive"] if options.transductive else []
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    adapt(compose(overrides), folder)
    row = read_json(folder / "summary.json")["rows"]["recommended"]
    losses = []
    for path in folder.glob("metrics/*/metrics.csv"):
        with path.open(encoding="utf-8") as file:
            losses += [float(line["holdout/loss"]) for line in csv.DictReader(file) if line.get("holdout/loss")]
    return {"variation": name, "overrides": VARIATIONS[name], **row, "holdout": min(losses, default=None)}


def show(rows: list[dict[str, Any]]) -> str:
    """Return a table in Markdown, means over the seeds, the lowest held-out loss first."""
    lines = [
        "| variation | seeds | held-out loss | mean, % | gap, % | worst task, % | s |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["variation"], []).append(row)

    def mean(group: list[dict[str, Any]], key: str) -> float:
        return sum(row[key] or 0.0 for row in group) / len(group)

    for name, group in sorted(groups.items(), key=lambda item: (mean(item[1], "holdout"), -mean(item[1], "mean"))):
        worst = min(min(row["per_task"].values()) for row in group)
        is_comparable = group[0]["holdout"] is not None and "objective" not in group[0]["overrides"]
        held_out = f"{mean(group, 'holdout'):.4f}" if is_comparable else ""
        numbers = f"{100 * mean(group, 'mean'):.2f} | {100 * mean(group, 'gap_closed'):.0f} | {100 * worst:.1f}"
        lines.append(f"| {name} | {len(group)} | {held_out} | {numbers} | {mean(group, 'seconds'):.0f} |")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    protocol = "transductive" if options.transductive else "split"
    budget = f"{options.steps}{'-full' if options.full else ''}-{protocol}"
    folder = options.output.absolute() / budget
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    for seed in options.seeds:
        for name in options.variations:
            path = folder / f"{name}-seed{seed}.json"
            if not path.exists():
                row = run(name, seed, options, folder / f"{name}-seed{seed}")
                save_json(row, path)
                console.print(f"{path.stem}: held out {row['holdout']}, mean {100 * row['mean']:.2f}")
    table = show([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])
    (options.output / f"recipes-{budget}.md").write_text(table + "\n", encoding="utf-8")
    console.print(table, soft_wrap=True)


if __name__ == "__main__":
    main()
