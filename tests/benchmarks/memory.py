"""Peak anonymous memory (RssAnon) of a run, by storage and number of experts; every run in its own process.

Each run opens its pool from files and takes a few steps. Mapped files do not count: the kernel can drop
their pages at any time.

    python tests/benchmarks/memory.py --experts 2 4 8 16
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROWS = ["ours stream", "ours ram", "ours bfloat16", "shared graph", "naive", "floor", "fusion-bench"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-b-32")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--tasks", type=int, default=2, help="the same for every number of experts")
    parser.add_argument("--images", type=int, default=4, help="per task")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS[:-1], help="fusion-bench where it is installed")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--plot", type=Path, help="write a picture here (.png, .svg, .pdf)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # row, number of experts, folder
    return parser.parse_args()


def rss_anon() -> int:
    """Anonymous bytes of this process that are in memory."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Peak:
    """Samples RssAnon every 2 ms in a thread."""

    def __init__(self) -> None:
        self.value = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.value = max(self.value, rss_anon())


def child(options: argparse.Namespace) -> dict:
    """Open the pool, take the steps; report peaks above what the imports and the encoder take."""
    import torch
    from workload import MODELS, Work

    from adamerge import ExpertPool

    row, experts, folder = options.child[0], int(options.child[1]), Path(options.child[2])
    encoder, size = MODELS[options.model]()
    before = rss_anon()
    storage = "stream" if row in ("ours stream", "floor") else "ram"
    paths = {f"task{e}": folder / f"task{e}.safetensors" for e in range(experts)}
    with Peak() as peak:
        dtype = torch.bfloat16 if row == "ours bfloat16" else None
        pool = ExpertPool.from_files(folder / "base.safetensors", paths, storage=storage, dtype=dtype)
        work = Work.make(encoder, size, pool, options.images)
        work.inputs = dict(list(work.inputs.items())[: options.tasks])
        others = {"naive": work.naive, "shared graph": work.shared, "floor": work.floor}
        others |= {"fusion-bench": work.fusion_bench}
        step = others.get(row, work.ours)()
        seconds = []
        for _ in range(options.steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return {"row": row, "experts": experts, "before": before, "peak": peak.value, "seconds": seconds}


def measure(options: argparse.Namespace) -> list[dict]:
    from workload import MODELS, temporary_folder, write_experts

    results = []
    with temporary_folder() as folder:
        write_experts(MODELS[options.model]()[0], Path(folder), max(options.experts))
        for experts in options.experts:
            for row in options.rows:
                command = [sys.executable, __file__, "--model", options.model, "--tasks", str(options.tasks)]
                command += ["--images", str(options.images), "--steps", str(options.steps)]
                command += ["--child", row, str(experts), folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def show(results: list[dict], rows: list[str]) -> None:
    numbers = sorted({result["experts"] for result in results})
    table = Table(title="Peak RssAnon, GB, above the process with the encoder")
    table.add_column("row")
    for experts in numbers:
        table.add_column(f"E={experts}", justify="right")
    table.add_column("growth", justify="right")
    for row in rows:
        peaks = {r["experts"]: r["peak"] - r["before"] for r in results if r["row"] == row}
        growth = f"{peaks[numbers[-1]] / peaks[numbers[0]] - 1:+.1%}"
        table.add_row(row, *(f"{peaks[experts] / 1e9:.2f}" for experts in numbers), growth)
    Console(width=110).print(table)


def plot(results: list[dict], rows: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        points = sorted((r["experts"], (r["peak"] - r["before"]) / 1e9) for r in results if r["row"] == row)
        axes.plot(*zip(*points, strict=True), marker="o", label=row)
    axes.set(xlabel="experts", ylabel="peak anonymous memory, GB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = arguments()
    if options.child:
        print(json.dumps(child(options)))
        return
    results = measure(options)
    show(results, options.rows)
    if options.json:
        options.json.write_text(
            json.dumps({"options": vars(options), "results": results}, indent=2, default=str) + "\n"
        )
    if options.plot:
        plot(results, options.rows, options.plot)


if __name__ == "__main__":
    main()
