"""Time of one optimizer step: this package's engine against other formulations of the same step.

python tests/benchmarks/step_time.py --experts 8 --images 1 4 16
python tests/benchmarks/step_time.py --device cuda --autocast bfloat16 --storage device --experts 8 20 --images 16
python tests/benchmarks/step_time.py --model demo --experts 6 --images 32 --repeats 15
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from workload import MODELS, Work, alternate, machine, median, temporary_folder, under_autocast, write_experts

from adamerge import ExpertPool

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit-b-32")
    parser.add_argument("--experts", type=int, nargs="+", default=[8])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4, 16], help="per task")
    parser.add_argument("--granularity", nargs="+", default=["layer"], help="of ours; the others are layer-wise")
    parser.add_argument("--storage", choices=["device", "ram", "stream"], default="ram")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="mixed precision, of all formulations")
    parser.add_argument("--micro-batch", type=micro_batch, default="auto", help="auto, none, or a number of images")
    parser.add_argument("--rows", nargs="+", help="only these formulations")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu with --threads 1 where others compete")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--plot", type=Path, help="write a picture here (.png, .svg, .pdf)")
    return parser.parse_args()


def micro_batch(text: str) -> int | str | None:
    return {"auto": "auto", "none": None}[text] if text in ("auto", "none") else int(text)


def measure(options: argparse.Namespace) -> list[dict]:
    """Return one measurement per number of experts, number of images and formulation."""
    encoder, size = MODELS[options.model]()
    results = []
    with temporary_folder() as folder:
        base, paths = write_experts(encoder, Path(folder), max(options.experts))
        for experts in options.experts:
            chosen = dict(list(paths.items())[:experts])
            pool = ExpertPool.from_files(base, chosen, storage=options.storage).to(options.device)
            for images in options.images:
                work = Work.make(encoder, size, pool, images)
                steps = work.steps(options.granularity, options.micro_batch, options.rows)
                steps = under_autocast(steps, pool.device.type, options.autocast)
                for name, seconds in alternate(steps, options.repeats, CLOCKS[options.clock]).items():
                    results.append({"experts": experts, "images": images, "row": name, "seconds": seconds})
                show([r for r in results if (r["experts"], r["images"]) == (experts, images)])
    return results


def show(results: list[dict]) -> None:
    """Print the formulations of one problem, each against the first and the floor."""
    medians = {result["row"]: median(result["seconds"]) for result in results}
    table = Table(title=f"{results[0]['experts']} experts, {results[0]['images']} images per task")
    for column in ("formulation", "median s", "fastest s", "/ ours", "/ floor"):
        table.add_column(column, justify="left" if column == "formulation" else "right")
    for result in results:
        own = medians[result["row"]]
        ratios = [f"{own / medians[other]:.2f}" if other in medians else "-" for other in ("ours", "floor")]
        table.add_row(result["row"], f"{own:.3f}", f"{min(result['seconds']):.3f}", *ratios)
    Console(width=110).print(table)


def show_fits(results: list[dict]) -> None:
    """Fit a straight line to the step time over the number of experts: slope, and largest distance from it."""
    experts = sorted({r["experts"] for r in results})
    if len(experts) < 3:
        return
    table = Table("formulation", "images", "s per expert", "s at E=0", "R2", "largest residual", title="Linear in E?")
    for row, images in dict.fromkeys((r["row"], r["images"]) for r in results):
        points = {r["experts"]: median(r["seconds"]) for r in results if (r["row"], r["images"]) == (row, images)}
        x = torch.tensor(list(points), dtype=torch.float64)
        y = torch.tensor(list(points.values()), dtype=torch.float64)
        design = torch.stack([x, torch.ones_like(x)], 1)
        slope, constant = torch.linalg.lstsq(design, y.unsqueeze(1)).solution.squeeze(1).tolist()
        residuals = y - (slope * x + constant)
        r2 = 1 - residuals.square().sum() / (y - y.mean()).square().sum()
        worst = (residuals.abs() / y).max()
        table.add_row(row, str(images), f"{slope:.3f}", f"{constant:.3f}", f"{r2:.4f}", f"{worst:.1%}")
    Console(width=110).print(table)


def plot(results: list[dict], path: Path) -> None:
    """Draw median step time over the number of experts, or of images where there is one number of experts."""
    from matplotlib.figure import Figure

    axis = "experts" if len({r["experts"] for r in results}) > 1 else "images"
    other = "images" if axis == "experts" else "experts"
    values = sorted({r[other] for r in results})
    figure = Figure(figsize=(5 * len(values), 4), layout="constrained")
    for axes, value in zip(figure.subplots(1, len(values), squeeze=False)[0], values, strict=True):
        for row in dict.fromkeys(r["row"] for r in results):
            points = sorted((r[axis], median(r["seconds"])) for r in results if r[other] == value and r["row"] == row)
            axes.plot(*zip(*points, strict=True), marker="o", label=row)
        axes.set(xlabel=axis, ylabel="seconds per step", title=f"{value} {other}", ylim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = measure(options)
    show_fits(results)
    if options.json:
        content = {"machine": machine(), "options": vars(options), "results": results}
        options.json.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
