"""Weak scaling on one machine: the same batch per process on 1 and 2 processes of the demo zoo.

python tests/benchmarks/scaling.py --steps 20
"""

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import run_ranks

from adamerge import launch, preflight, ranks
from adamerge.composition import compose


def measured(steps: int, options: list[str]) -> tuple[float, int]:
    """Return the median time of a step in seconds, and the bytes of one reduction of the gradient."""
    config = compose(["trainer.accelerator=cpu", f"steps={steps}", *options])
    assembly = launch.assemble(config)
    method = preflight.build(config, "method", model=assembly.model, objective=preflight.build(config, "objective"))
    marks, sent = [], []

    def hook(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    def attach(trainer, module):
        if ranks.count() > 1:
            trainer.strategy.model.register_comm_hook(None, hook)

    watch = LambdaCallback(on_train_start=attach, on_train_batch_end=lambda *_: marks.append(time.perf_counter()))
    settings = {"strategy": "ddp", "devices": ranks.count()} if ranks.count() > 1 else {}
    trainer = preflight.build(
        config,
        "trainer",
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **settings,
    )
    trainer.fit(method, datamodule=assembly.data)
    losses = 4 * (len(assembly.data.streams) + 1) if ranks.count() > 1 else 0
    return statistics.median(b - a for a, b in itertools.pairwise(marks[1:])), sum(sent[-1:]) + losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", help="such as data.batch_size=16 granularity=row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for count in (1, 2):
        found = run_ranks(partial(measured, arguments.steps, arguments.overrides), count, timeout=500)
        print(
            f"{count} processes: {1000 * max(t for t, _ in found):.0f} ms per step, {found[0][1]} bytes per step",
            flush=True,
        )


if __name__ == "__main__":
    main()
