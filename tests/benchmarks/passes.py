"""Speed of the merge and of the gradient pass, against the memory bandwidth of the machine.

Bytes counted: merge reads E task vectors and the base and writes the result, (E + 2) n; the gradient
pass reads E task vectors and the gradient, (E + 1) n. The yardstick is one thread's copy, since the
passes run on one thread. Every round times the copy too, so that other load on the machine cancels.

    python tests/benchmarks/passes.py --experts 8
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from workload import MODELS, alternate, machine, median, temporary_folder, write_experts

from adamerge import Coefficients, ExpertPool
from adamerge.model.merge import merge_into, pull_back

GRANULARITIES = ["task", "block", "layer", "chunk", "row", "column"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit-b-32")
    parser.add_argument("--experts", type=int, nargs="+", default=[8])
    parser.add_argument("--granularity", nargs="+", default=GRANULARITIES)
    parser.add_argument("--storage", choices=["ram", "bfloat16", "stream"], default="ram")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    return parser.parse_args()


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(pool: ExpertPool, granularities: list[str], repeats: int) -> list[dict]:
    """Return groups, seconds and share of the copy bandwidth of both passes, per granularity."""
    experts = len(pool.expert_names)
    out = {name: torch.empty(shape) for name, shape in pool.shapes.items()}
    gradients = {name: torch.randn(shape) for name, shape in pool.shapes.items()}
    size = sum(tensor.nbytes for tensor in out.values())
    source, target = torch.ones(1 << 28), torch.empty(1 << 28)

    def copy() -> None:
        with one_thread():
            target.copy_(source)

    functions: dict[str, Callable[[], object]] = {"copy": copy}
    groups = {}
    for granularity in granularities:
        coefficients = Coefficients(pool, granularity, init=0.1)
        values, index = coefficients().detach(), coefficients.index
        groups[granularity] = index.size
        functions[f"merge {granularity}"] = partial(merge_into, out, pool, index, values)
        functions[f"pull_back {granularity}"] = partial(pull_back, pool, index, gradients)
    seconds = alternate(functions, repeats)
    bandwidths = [2 * source.nbytes / s for s in seconds["copy"]]
    results = []
    for granularity in granularities:
        row = {"experts": experts, "granularity": granularity, "coefficients": experts * groups[granularity]}
        for name, moved in (("merge", (experts + 2) * size), ("pull_back", (experts + 1) * size)):
            own = seconds[f"{name} {granularity}"]
            shares = [moved / s / bandwidth for s, bandwidth in zip(own, bandwidths, strict=True)]
            row[name] = {"seconds": median(own), "bytes_per_second": moved / median(own), "share": median(shares)}
        results.append(row)
    show(results, median(bandwidths))
    return results


def show(results: list[dict], bandwidth: float) -> None:
    table = Table(
        title=f"{results[0]['experts']} experts; one thread copies {bandwidth / 1e9:.1f} GB/s (read + written)"
    )
    for column in ("granularity", "coefficients", "merge s", "GB/s", "of copy", "gradient s", "GB/s", "of copy"):
        table.add_column(column, justify="left" if column == "granularity" else "right")
    for row in results:
        cells = [row["granularity"], f"{row['coefficients']:,}"]
        for name in ("merge", "pull_back"):
            part = row[name]
            cells += [f"{part['seconds']:.3f}", f"{part['bytes_per_second'] / 1e9:.1f}", f"{part['share']:.0%}"]
        table.add_row(*cells)
    Console(width=110).print(table)


def main() -> None:
    options = arguments()
    encoder, _ = MODELS[options.model]()
    results = []
    with temporary_folder() as folder:
        base, paths = write_experts(encoder, Path(folder), max(options.experts))
        for experts in options.experts:
            chosen = dict(list(paths.items())[:experts])
            storage = "stream" if options.storage == "stream" else "ram"
            dtype = torch.bfloat16 if options.storage == "bfloat16" else None
            pool = ExpertPool.from_files(base, chosen, storage=storage, dtype=dtype)
            results += measure(pool, options.granularity, options.repeats)
    if options.json:
        content = {"machine": machine(), "options": vars(options), "results": results}
        options.json.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
