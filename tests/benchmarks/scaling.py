"""Weak scaling: time and bytes of a step when processes are added, each with as many images as one alone had.

python tests/benchmarks/scaling.py --model demo --images 16
python tests/benchmarks/scaling.py --model vit-b-32 --experts 4 --images 1 --steps 5

Runs Lightning's Trainer as `adamerge adapt` does, one thread per process, gloo. Bytes are those of the tensors that
collectives are given, counted at torch's dispatcher in a step that is not timed.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset
from workload import CLASSES, MODELS, median, write_experts

sys.path.append(str(Path(__file__).parents[2]))
from adamerge import Coefficients, ExpertPool, MergedModel
from adamerge.commands.run import processes
from adamerge.data import Task, UnlabeledTasks
from adamerge.methods import GradientMerging, ShardedStrategy
from adamerge.model.sharding import ShardedModel
from adamerge.objectives.entropy import Entropy
from adamerge.system import ranks
from adamerge.system.memory import peak_memory
from tests.support.traffic import Traffic, wire_bytes

WARM_UP = 2  # steps that are not timed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--images", type=int, default=16, help="per task and process")
    parser.add_argument("--granularity", default="layer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1, help="of all runs, in turn")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--child", choices=["ddp", "fsdp"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


class Watch(Callback):
    """Times all steps but the first and the last; counts the last one's traffic."""

    def __init__(self, steps: int) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.traffic = Traffic()
        self._last = steps - 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self._last:
            self.traffic.__enter__()
        self._start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == self._last:
            self.traffic.__exit__(None, None, None)
        elif batch_idx >= WARM_UP:
            self.seconds.append(time.perf_counter() - self._start[0])
            self.cpu.append(time.process_time() - self._start[1])


def child(options: argparse.Namespace) -> None:
    """Run as one process of a run, and let the first print what was measured."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    processes.join()
    sharded = options.child == "fsdp" and ranks.count() > 1
    encoder, size = MODELS[options.model]()
    names = [f"task{e}" for e in range(options.experts)]
    experts = {name: options.folder / f"{name}.safetensors" for name in names}
    pool = ExpertPool.from_files(
        options.folder / "base.safetensors", experts, storage="auto" if sharded else "ram", mapped=sharded
    )
    torch.manual_seed(1)
    count = options.images * ranks.count() * 2
    images = TensorDataset(torch.randn(count, 3, size, size), torch.zeros(count, dtype=torch.long))
    with torch.no_grad():
        width = encoder(images[0][0][None]).shape[1]
    heads = {name: nn.Linear(width, CLASSES) for name in names}
    model = (ShardedModel if sharded else MergedModel)(
        encoder, pool, Coefficients(pool, options.granularity, init=0.1), heads
    )
    steps = WARM_UP + options.steps + 1
    watch = Watch(steps)
    strategy = {"strategy": ShardedStrategy() if sharded else DDPStrategy(), "devices": ranks.count()}
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[watch], use_distributed_sampler=False,
        **(strategy if ranks.count() > 1 else {}),
    )  # fmt: skip
    data = UnlabeledTasks({name: Task(adapt=images) for name in names}, batch_size=options.images)
    trainer.fit(GradientMerging(model, Entropy()), datamodule=data)
    held = model.weights.part.nbytes + sum(map(len, model.weights.ranges.values())) * 4 if sharded else 0
    whole = pool.nbytes + 2 * sum(tensor.nbytes for tensor in pool.base.values())
    found = {
        "trainer": options.child,
        "ranks": ranks.count(),
        "seconds": watch.seconds,
        "cpu": watch.cpu,
        "bytes": dict(watch.traffic.bytes),
        "calls": dict(watch.traffic.calls),
        "sent": wire_bytes(watch.traffic, ranks.count()),
        "coefficients": model.coefficients().nbytes,
        "weights": sum(tensor.nbytes for tensor in pool.base.values()),
        "held": held or whole,
        "peak": peak_memory(),
    }
    if ranks.is_first():
        print(json.dumps(found))


def measure(options: argparse.Namespace, folder: str, trainer: str, count: int) -> dict:
    """Run a configuration in processes of its own."""
    own = [__file__, "--child", trainer, "--folder", folder, "--model", options.model]
    own += ["--granularity", options.granularity]
    own += [f"--{name}={getattr(options, name)}" for name in ("experts", "images", "steps")]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launcher, *own], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def show(results: list[dict]) -> None:
    """Print times, each against one process, and bytes."""
    table = Table(title="One step")
    columns = ["trainer", "processes", "median s", "/ one", "CPU s", "/ one", "all-reduced", "gathered", "scattered"]
    for column in [*columns, "calls", "sent", "held MB"]:
        table.add_column(column, justify="left" if column == "trainer" else "right")
    key = {(r["trainer"], r["ranks"]): [] for r in results}
    for result in results:
        key[result["trainer"], result["ranks"]].append(result)
    alone = next(iter(key.values()))
    for (trainer, count), runs in key.items():
        seconds, cpu = (median([s for run in runs for s in run[clock]]) for clock in ("seconds", "cpu"))
        first, first_cpu = (median([s for run in alone for s in run[clock]]) for clock in ("seconds", "cpu"))
        size, calls = runs[0]["bytes"], sum(runs[0]["calls"].values())
        gathered = size.get("_allgather_base_", 0) + size.get("allgather_", 0)
        row = [trainer if count > 1 else "none", str(count), f"{seconds:.3f}", f"{seconds / first:.2f}"]
        row += [f"{cpu:.3f}", f"{cpu / first_cpu:.2f}", f"{size.get('allreduce_', 0):,}", f"{gathered:,}"]
        row += [f"{size.get('_reduce_scatter_base_', 0):,}", str(calls), f"{runs[0]['sent']:,.0f}"]
        table.add_row(*row, f"{runs[0]['held'] / 1e6:.1f}")
    console = Console(width=150)
    console.print(table)
    console.print(
        f"coefficients: {results[0]['coefficients']:,} bytes; merged weights: {results[0]['weights']:,} bytes; "
        "sent: by each process in ring algorithms; held: base, task vectors and merged weights of one process",
        highlight=False,
    )


def main() -> None:
    options = arguments()
    if options.child:
        child(options)
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="adamerge-benchmark-") as folder:
        encoder, _ = MODELS[options.model]()
        write_experts(encoder, Path(folder), options.experts)
        for _ in range(options.repeats):
            for count in options.ranks:
                for trainer in ("ddp", "fsdp") if count > 1 else ("ddp",):
                    results.append(measure(options, folder, trainer, count))
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
