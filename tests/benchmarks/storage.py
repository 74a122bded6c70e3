"""What each way of keeping task vectors holds, costs and changes: bytes, errors, accuracy, peak memory and time.

Errors and accuracies are those of the demo zoo's six experts (merges at random layer-wise coefficients; short
imitation runs); bytes, peak RssAnon and processor time of a step those of a larger network with random values, each in
a process of its own. LoRA rows are compared with the same adapters merged into full checkpoints.

    python tests/benchmarks/storage.py --json storage.json --plot storage.png
"""

import argparse
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from memory import Peak, rss_anon
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn
from workload import Work, write_experts

from adamerge import Coefficients, ExpertPool, load_state_dict
from adamerge.model.merge import merge_into, pull_back
from adamerge.pool.pack import write_packed

# Row to: which experts (full checkpoints or adapters), storage, dtype in memory, packed file.
ROWS = {
    "ram float32": ("full", "ram", None, None),
    "ram bfloat16": ("full", "ram", "bfloat16", None),
    "ram int8": ("full", "ram", "int8", None),
    "stream": ("full", "stream", None, None),
    "packed float32": ("full", "stream", None, "float32"),
    "packed bfloat16": ("full", "stream", None, "bfloat16"),
    "LoRA dense": ("dense", "ram", None, None),
    "LoRA factored": ("adapters", "ram", None, None),
}
TASKS = ("mnist", "digits", "latin", "greek", "cyrillic", "math")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--width", type=int, default=384, help="of the larger network, of 12 blocks")
    parser.add_argument("--experts", type=int, default=6, help="of the larger network")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed; the median counts")
    parser.add_argument("--steps", type=int, default=40, help="of the runs on the demo zoo; 0 for none")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--plot", type=Path, help="write a picture here (.png, .svg, .pdf)")
    return parser.parse_args()


def prepare(folder: Path, base: Path, experts: dict[str, Path], rank: int, prefix: str = "") -> None:
    """Write all forms of a pool: links to its files, packed files, adapters near the experts, and those in full."""
    (folder / "base.safetensors").symlink_to(base.absolute())
    for kind in ("full", "dense", "adapters"):
        (folder / kind).mkdir()
    for name, path in experts.items():
        (folder / "full" / name).symlink_to(path.absolute())
    pool = ExpertPool.from_files(base, files(folder, "full"), key_map=prefix or None, storage="stream")
    for dtype in ("float32", "bfloat16"):
        write_packed(pool, folder / f"{dtype}.safetensors", getattr(torch, dtype))
    for number, name in enumerate(pool.expert_names):
        write_adapter(folder / "adapters" / name, pool, number, rank, prefix)
    adapted = ExpertPool.from_files(base, files(folder, "adapters"), key_map=prefix or None)
    state = load_state_dict(base)
    for name in experts:
        own = {prefix + key: tensor for key, tensor in adapted.expert_parameters(name).items()}
        save_file({**state, **own}, folder / "dense" / name)


def write_adapter(folder: Path, pool: ExpertPool, expert: int, rank: int, prefix: str) -> None:
    """Write the best product of a rank for each matrix of an expert's task vector, as peft would name it."""
    tensors = {}
    for name, shape in pool.shapes.items():
        module = name.removesuffix(".weight").removesuffix(".in_proj_weight")
        if len(shape) > 1 and module != name:
            u, s, v = torch.svd_lowrank(pool.task_vectors(name)[expert].flatten(1), q=rank, niter=4)
            tensors[f"{module}.lora_A"] = (s * v).t().reshape(rank, *shape[1:])
            tensors[f"{module}.lora_B"] = u.reshape(shape[0], rank, *[1] * (len(shape) - 2))
    folder.mkdir()
    content = {f"base_model.model.{prefix}{key}.weight": t.contiguous() for key, t in tensors.items()}
    save_file(content, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def files(folder: Path, kind: str) -> dict[str, Path]:
    names = sorted(path.name for path in (folder / kind).iterdir())
    names.sort(key=lambda name: TASKS.index(name) if name in TASKS else 0)  # the order of the zoo's own pool
    return {name: folder / kind / name for name in names}


def open_row(folder: Path, row: str, prefix: str = "") -> ExpertPool:
    kind, storage, dtype, packed = ROWS[row]
    return ExpertPool.from_files(
        folder / "base.safetensors", files(folder, kind), storage=storage, key_map=prefix or None,
        dtype=dtype and getattr(torch, dtype), task_vectors=packed and folder / f"{packed}.safetensors",
    )  # fmt: skip


def passes(pool: ExpertPool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Merge and contract at fixed random coefficients and gradients."""
    coefficients = Coefficients(pool, "layer", init=0.1)
    generator = torch.Generator().manual_seed(0)
    order = sorted(pool.names)
    values = torch.empty_like(coefficients.raw.detach())
    for name in order:
        values[:, coefficients.groups[name]] = torch.rand(len(values), 1, generator=generator)
    gradients = {name: torch.randn(pool.shapes[name], generator=generator) for name in order}
    out = {name: torch.empty(shape) for name, shape in pool.shapes.items()}
    merge_into(out, pool, coefficients.index, values)
    gradient = pull_back(pool, coefficients.index, gradients)
    return out, torch.cat([gradient[:, coefficients.groups[name]] for name in order], 1)


def errors(folder: Path, row: str) -> dict[str, float]:
    """Errors on the zoo: of the merged change relative to its norm, and of the coefficient gradient's direction."""
    reference = open_row(folder, "LoRA dense" if row.startswith("LoRA") else "ram float32", "visual.")
    (exact, exact_gradient), (found, gradient) = passes(reference), passes(open_row(folder, row, "visual."))
    change = sum((exact[name] - reference.base[name]).square().sum().item() for name in exact)
    error = sum((exact[name] - found[name]).square().sum().item() for name in exact)
    pair = gradient.flatten().double(), exact_gradient.flatten().double()
    return {"error": (error / change) ** 0.5, "one_minus_cosine": 1 - torch.cosine_similarity(*pair, dim=0).item()}


def accuracy(folder: Path, row: str, granularity: str, steps: int) -> float:
    """Mean accuracy of a short imitation run on the zoo's images."""
    from adamerge.commands.run.compose import compose
    from adamerge.commands.run.run import adapt

    kind, storage, dtype, packed = ROWS[row]
    experts = ",".join(f"{name}:{path}" for name, path in files(folder, kind).items())
    run = folder / "runs" / f"{row.replace(' ', '_')}_{granularity}"
    config = compose([
        "trainer=cpu", "logger=none", "objective=imitation", f"granularity={granularity}", "constraint=none",
        f"steps={steps}", "references=false", f"run_dir={run}", f"pool.storage={storage}",
        f"pool.dtype={dtype or 'null'}", f"pool.experts={{{experts}}}",
        f"pool.task_vectors={folder / packed if packed else 'null'}{'.safetensors' if packed else ''}",
    ])  # fmt: skip
    summary = adapt(config, run)
    assert summary is not None
    return next(iter(summary["rows"].values()))["mean"]


def network(width: int) -> nn.Module:
    """A network of 12 residual blocks on images of 32 x 32: the shapes of a transformer, without its attention."""
    torch.manual_seed(0)
    blocks = [Block(width) for _ in range(12)]
    return nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.Flatten(), nn.Linear(16 * width, width), *blocks)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 8 * width), nn.Linear(8 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def cost(folder: Path, row: str, width: int, repeats: int) -> dict[str, float]:
    """Open the larger pool and take steps; report what it holds, the peak and the processor time of a step."""
    model = network(width)
    before = rss_anon()
    with Peak() as opening:
        pool = open_row(folder, row)
    step, seconds = Work.make(model, 32, pool, 1).ours("layer"), []
    step()  # makes the leaves and the scratch memory
    with Peak() as peak:
        for _ in range(repeats):
            start = time.process_time()
            step()
            seconds.append(time.process_time() - start)
    return {
        "bytes": pool.nbytes / len(pool.expert_names),
        "file_bytes": 0 if pool.packed is None else pool.packed.nbytes / len(pool.expert_names),
        "opening": opening.value - before,
        "peak": peak.value - before,
        "seconds": sorted(seconds)[len(seconds) // 2],
    }


def prepare_large(folder: Path, width: int, experts: int, rank: int) -> None:
    (folder / "files").mkdir()
    prepare(folder, *write_experts(network(width), folder / "files", experts), rank)


def prepare_zoo(folder: Path, rank: int) -> None:
    from adamerge import zoo

    experts = {task: zoo.files() / "experts" / f"{task}.safetensors" for task in TASKS}
    prepare(folder, zoo.files() / "base.safetensors", experts, rank, "visual.")


def isolated(function: Callable[..., Any], *args: object) -> Any:
    """Call a function in a process of its own, which shares what is imported and leaves nothing behind."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def measure(options: argparse.Namespace) -> dict[str, dict]:
    results: dict[str, dict] = {row: {} for row in options.rows}
    with TemporaryDirectory() as name:
        large, small = Path(name) / "large", Path(name) / "zoo"
        large.mkdir()
        small.mkdir()
        isolated(prepare_large, large, options.width, options.experts, options.rank)
        isolated(prepare_zoo, small, options.rank)
        for row in options.rows:
            results[row] |= isolated(cost, large, row, options.width, options.repeats) | isolated(errors, small, row)
            print(row, results[row], file=sys.stderr, flush=True)
        for row in options.rows if options.steps else ():
            for granularity in ("layer", "row"):
                results[row][granularity] = isolated(accuracy, small, row, granularity, options.steps)
            print(row, results[row], file=sys.stderr, flush=True)
    return results


def show(results: dict[str, dict]) -> None:
    table = Table(title="Storage of task vectors")
    table.add_column("row")
    for column in ("MB per expert", "merge error", "1 - cosine", "layer %", "row %", "peak MB", "step, x"):
        table.add_column(column, justify="right")
    first = next(iter(results.values()))["seconds"]
    for row, r in results.items():
        scores = (f"{100 * r[key]:.2f}" if key in r else "-" for key in ("layer", "row"))
        held = f"{r['bytes'] / 1e6:.1f}" + (f" (file {r['file_bytes'] / 1e6:.1f})" if r["file_bytes"] else "")
        table.add_row(
            row, held, f"{r['error']:.1e}", f"{r['one_minus_cosine']:.1e}", *scores,
            f"{r['peak'] / 1e6:.0f}", f"{r['seconds'] / first:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


def plot(results: dict[str, dict], path: Path) -> None:
    """Draw bytes per expert and the merge's error of each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.42 * len(results) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    positions = range(len(results))
    left.barh(positions, [r["bytes"] / 1e6 for r in results.values()], color="#4477aa")
    left.set_xlabel("memory per expert, MB")
    left.set_yticks(positions, list(results))
    left.invert_yaxis()
    right.plot([max(r["error"], 1e-9) for r in results.values()], positions, "D", color="#ee6677")
    right.set(xscale="log", xlabel="error of the merged change (1e-9: none)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = arguments()
    logging.getLogger("adamerge").setLevel(logging.WARNING)
    results = measure(options)
    show(results)
    if options.json:
        content = {"options": vars(options), "results": results}
        options.json.write_text(json.dumps(content, indent=2, default=str) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
