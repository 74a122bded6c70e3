"""What each further unlabeled sample buys: rows adapted on a few samples per task, from the start chosen on the same.

python tests/benchmarks/few_samples.py --output runs/few_samples
python tests/benchmarks/few_samples.py --output runs/few_texts --common backbone=text_zoo pool=text_zoo data=text_zoo \
    data.views=null data.batch_size=8 steps=50

Prints accuracy by number of samples, means over the seeds, with the 95 % interval of the gain on the start (paired
bootstrap over the scored samples), and draws few_samples.png. Cells that are done stay in the folder, where a run that
was stopped goes on, seed by seed.
"""

import argparse
import itertools
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2]))
from adamerge.commands.run import starting
from adamerge.commands.run.assembly import Assembly
from adamerge.commands.run.compose import compose
from adamerge.commands.run.run import adapt
from adamerge.commands.run.starting import begin
from adamerge.errors import InputError
from adamerge.results.evaluation import bootstrap, scores_in
from adamerge.system.files import save_json
from adamerge.system.reading import read_json
from tests.benchmarks.pictures import save_lines

_RECIPE = "experiment=recommended"
_UNPROVED = f"{_RECIPE} callbacks=none data.holdout=0"  # on all samples
ROWS: dict[str, str] = {
    "recommended": _RECIPE,
    "without proof": _UNPROVED,
    "without anchor": f"{_UNPROVED} method.anchor=0",
    "layer-wise": f"{_UNPROVED} granularity=layer optimizer.lr=0.01",
    "entropy": "experiment=adamerging_layer optimizer.lr=0.002 method.reduction=mean constraint=none",
    "random experts": f"{_UNPROVED} transform=random transform.seed=${{seed}}",
    "distillation": "experiment=distillation",
}
_ALL = 0  # all samples


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 4, 16, 64, 256, _ALL], help="per task; 0: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--show", action="store_true", help="make the table of what is done alone")
    parser.add_argument("--common", nargs="+", default=["trainer=cpu"], help="overrides of all rows")
    return parser.parse_args()


def start(samples: int, seed: int, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Let the experts choose the merge that all rows of a number of samples start from; return its record."""
    folder = options.output / f"start-{samples or 'all'}-{seed}"
    path = folder.with_suffix(".json")
    if not path.exists():
        overrides = [*_UNPROVED.split(), *options.common, *_limit(samples), f"seed={seed}", f"run_dir={folder}"]
        begun = begin(compose(overrides), folder)
        save_json({"rule": begun.start.rule, "seconds": begun.start.seconds, "base": begun.pool.base}, path)
    return path, dict(read_json(path))


def cell(name: str, samples: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Adapt a row on some samples of each task; return its scores, its start's, and what was proved."""
    path, merge = start(samples, seed, options)
    folder = options.output / "running"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    overrides = [*ROWS[name].split(), *options.common, *_limit(samples), f"seed={seed}", f"run_dir={folder}"]
    overrides += [f"teacher_cache={options.output / 'teachers'}", "report=false", "logger=none", "name=row"]
    overrides += ["start=null", f"references={'start' not in merge}"]
    # As a run does it, so that a pool file may name the base.
    config = starting.from_merge(compose(overrides), None, Path(merge["base"]))
    rows = (adapt(config, folder) or {})["rows"]
    if "start" not in merge:
        merge |= {"start": rows["pretrained"], "experts": rows["experts"]}
        save_json(merge, path)
    evidence = read_json(folder / "merge.json").get("evidence")
    shutil.rmtree(folder)
    return {"row": rows["row"], "evidence": evidence, **merge}


def once(merge_of: Callable[[Any, Assembly], dict[str, Tensor]]) -> Callable[[Any, Assembly], dict[str, Tensor]]:
    """Make a merge that needs no data once for all seeds and numbers of samples."""
    made: dict[str, dict[str, Tensor]] = {}

    def merge(rule: Any, assembly: Assembly) -> dict[str, Tensor]:
        if getattr(rule, "needs_data", False):
            return merge_of(rule, assembly)
        if repr(rule) not in made:
            made[repr(rule)] = merge_of(rule, assembly)
        return made[repr(rule)]

    return merge


def _limit(samples: int) -> list[str]:
    return [f"data.limit={samples}"] if samples else []


def gains(cells: Iterable[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Return the mean accuracy over seeds in %, and the interval of its gain on the start in points."""
    paired: dict[str, dict[str, Any]] = {"row": {}, "start": {}}  # the seeds are strata, as the tasks are
    means = []
    for number, content in enumerate(cells):
        means.append(100 * content["row"]["mean"])
        for kind, scores in paired.items():
            scores |= {f"{number} {task}": score for task, score in scores_in(content[kind]).items()}
    low, high = bootstrap(paired["row"], paired["start"])
    return sum(means) / len(means), 100 * low, 100 * high


Cells = Mapping[tuple[str, int], list[dict[str, Any]]]  # of the seeds, by row and number of samples


def table(cells: Cells, options: argparse.Namespace) -> str:
    """Return accuracies by row and number of samples in Markdown, each with the interval of its gain on the start."""
    lines = [f"| mean, % | {' | '.join(str(count or 'all') for count in options.samples)} |"]
    lines.append("|---" * (len(options.samples) + 1) + "|")
    starts = _starts(cells)
    lines.append(f"| start | {' | '.join(f'{starts[n]:.1f}' if n in starts else '' for n in options.samples)} |")
    for name in options.rows:
        shown = [gains(cells[name, n]) if (name, n) in cells else None for n in options.samples]
        texts = ["" if s is None else f"{s[0]:.1f} [{s[1]:+.1f}, {s[2]:+.1f}]" for s in shown]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _starts(cells: Cells) -> dict[int, float]:
    """Return the mean of the starts by number of samples, over the seeds of the row that has most of them."""
    longest: dict[int, list[dict[str, Any]]] = {}
    for (_, n), group in cells.items():
        longest[n] = max(longest.get(n, []), group, key=len)
    return {n: 100 * sum(c["start"]["mean"] for c in group) / len(group) for n, group in longest.items()}


def draw(cells: Cells, options: argparse.Namespace) -> None:
    """Draw mean accuracy by number of samples."""
    most = 2 * max(options.samples)
    lines = {"its start": dict(sorted((n or most, mean) for n, mean in _starts(cells).items()))}
    for name in options.rows:
        points = {n or most: gains(cells[name, n])[0] for n in options.samples if (name, n) in cells}
        lines[name] = dict(sorted(points.items()))
    ticks = {n or most: str(n or "all") for n in options.samples}
    path = options.output / "few_samples.png"
    save_lines({"": lines}, path, x="unlabeled samples per task", y="mean accuracy, %", ticks=ticks)


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options.output = options.output.absolute()
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True)
    starting.merge_of = once(starting.merge_of)
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for seed, samples, name in itertools.product(options.seeds, options.samples, options.rows):
        path = options.output / f"{name.replace(' ', '_')}-{samples or 'all'}-{seed}.json"
        if options.show and not path.exists():
            continue
        if not path.exists():
            try:
                save_json(cell(name, samples, seed, options), path)
            except InputError as error:  # too few samples to hold one out
                console.print(f"{path.stem}: {error}")
                continue
        content = dict(read_json(path))
        cells.setdefault((name, samples), []).append(content)
        console.print(f"{path.stem}: {content['row']['mean']:.4f} from {content['start']['mean']:.4f}")
    text = table(cells, options)
    (options.output / "few_samples.md").write_text(text + "\n", encoding="utf-8")
    console.print(text)
    draw(cells, options)


if __name__ == "__main__":
    main()
