"""What the options of a step gain: time against the plain step, peak memory, and the wait for data.

    python tests/benchmarks/options.py time --model demo vit-b-32 resnet50
    python tests/benchmarks/options.py memory --model vit-b-32 --images 8
    python tests/benchmarks/options.py data

Time: CPU seconds of one process, which other jobs do not change much with one thread; rows alternate; the first
call of a row, which compiles, is timed apart, by the clock. Memory: every row
in its own process, anonymous memory above that of the process with the encoder loaded. Data: a folder of JPEG
files, a tiny encoder; the share of a step that waits for its images.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from memory import Peak, rss_anon
from rich.console import Console
from rich.table import Table

ROWS = {
    "plain": {},
    "bf16": {"bf16": True},
    "checkpoint": {"checkpoint": True},
    "bf16 checkpoint": {"bf16": True, "checkpoint": True},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
}
DATA_ROWS = {
    "neither": {"cache": "off", "prefetch": 0},
    "prefetch": {"cache": "off", "prefetch": 2},
    "2 workers": {"cache": "off", "prefetch": 2, "num_workers": 2},
    "cache": {"cache": "ram", "prefetch": 2},
    "cache, 2 workers": {"cache": "ram", "prefetch": 2, "num_workers": 2},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["time", "memory", "data"], default=["time", "memory", "data"])
    parser.add_argument("--model", nargs="+", default=["demo", "vit-b-32", "resnet50"])
    parser.add_argument("--experts", type=int, default=2, help="as many tasks")
    parser.add_argument("--images", type=int, default=8, help="per task")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="of the data benchmark")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # row, folder
    return parser.parse_args()


def make_step(options: argparse.Namespace, model: str, folder: Path, row: str) -> Callable[[], None]:
    """One step of the engine with a row's options."""
    import torch
    from workload import MODELS, Work

    from adamerge import ExpertPool
    from adamerge.model.encoder import EncoderOptions

    encoder, size = MODELS[model]()
    paths = {f"task{e}": folder / f"task{e}.safetensors" for e in range(options.experts)}
    work = Work.make(encoder, size, ExpertPool.from_files(folder / "base.safetensors", paths), options.images)
    chosen = dict(ROWS[row])
    half = chosen.pop("bf16", False)
    inner = work.ours(encoder_options=EncoderOptions(**chosen))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            inner()

    return step


def time_rows(options: argparse.Namespace, model: str) -> list[dict]:
    """Seconds per step of each row, and of its first call."""
    from workload import MODELS, alternate, temporary_folder, write_experts

    with temporary_folder() as folder:
        write_experts(MODELS[model]()[0], Path(folder), options.experts)
        steps, first = {}, {}
        for row in options.rows:
            steps[row] = make_step(options, model, Path(folder), row)
            start = time.perf_counter()
            steps[row]()
            first[row] = time.perf_counter() - start
        seconds = alternate(steps, options.repeats, time.process_time)
    return [{"what": "time", "model": model, "row": r, "seconds": seconds[r], "first": first[r]} for r in options.rows]


def memory_rows(options: argparse.Namespace, model: str) -> list[dict]:
    """Peak anonymous memory of each row, in a process of its own."""
    from workload import MODELS, temporary_folder, write_experts

    results = []
    with temporary_folder() as folder:
        write_experts(MODELS[model]()[0], Path(folder), options.experts)
        for row in options.rows:
            command = [sys.executable, __file__, "memory", "--model", model, "--images", str(options.images)]
            command += ["--experts", str(options.experts), "--child", row, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            results.append({"what": "memory", "model": model, "row": row, **found})
    return results


def child(options: argparse.Namespace) -> dict:
    """Take three steps; report the peak above what the process had with the pool and the first merge."""
    from workload import MODELS

    MODELS[options.model[0]]()
    before = rss_anon()
    with Peak() as peak:
        step = make_step(options, options.model[0], Path(options.child[1]), options.child[0])
        built = rss_anon()
        for _ in range(3):
            step()
    return {"peak": peak.value - before, "built": built - before}


def write_images(folder: Path, count: int = 200) -> None:
    """Write JPEG files of 224 x 224 to 500 x 375 pixels in two class folders."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(count):
        width, height = (224, 224) if i % 4 == 0 else (500, 375)
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)  # smooth, as photographs are
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)


def data_rows(options: argparse.Namespace) -> list[dict]:
    """The share of a fit's steps that waits for images, for each row, after the first pass over them and overall."""
    import torch
    from lightning.pytorch import Trainer
    from torchvision.datasets import ImageFolder
    from workload import MODELS, temporary_folder, write_experts

    from adamerge import Coefficients, ExpertPool, MergedModel
    from adamerge.backbones import OpenClip
    from adamerge.data import Task, UnlabeledTasks
    from adamerge.methods import GradientMerging
    from adamerge.objectives.entropy import Entropy

    class Timed(UnlabeledTasks):
        """Notes how long each step's batch was waited for."""

        def train_dataloader(self):
            loader = super().train_dataloader()
            batches = type(loader).__iter__

            class TimedLoader(type(loader)):
                def __iter__(inner):
                    iterator = batches(inner)
                    while True:
                        start = time.perf_counter()
                        batch = next(iterator, None)
                        self.waited.append(time.perf_counter() - start)
                        if batch is None:
                            return
                        yield batch

            loader.__class__ = TimedLoader
            return loader

    preprocess = OpenClip("ViT-B-32").preprocess()
    encoder, _ = MODELS["demo"]()
    pooled = torch.nn.Sequential(torch.nn.AvgPool2d(8), encoder)
    results = []
    with temporary_folder() as folder:
        write_images(Path(folder, "images"))
        files = write_experts(pooled, Path(folder), 2)
        for row, chosen in DATA_ROWS.items():
            pool = ExpertPool.from_files(*files)
            heads = {task: torch.nn.Linear(64, 2) for task in pool.expert_names}
            model = MergedModel(pooled, pool, Coefficients(pool), heads)
            images = ImageFolder(str(Path(folder, "images")))
            tasks = {task: Task(adapt=images) for task in pool.expert_names}
            data = Timed(tasks, batch_size=16, preprocess=preprocess, **chosen)
            data.waited = []
            trainer = Trainer(
                max_steps=options.steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            )  # fmt: skip
            start = time.perf_counter()
            trainer.fit(GradientMerging(model, Entropy()), datamodule=data)
            results.append({"what": "data", "row": row, "seconds": time.perf_counter() - start, "waited": data.waited})
    return results


def show(results: list[dict]) -> None:
    console = Console(width=110)
    for what, model in dict.fromkeys((r["what"], r.get("model")) for r in results):
        chosen = [r for r in results if (r["what"], r.get("model")) == (what, model)]
        {"time": show_time, "memory": show_memory, "data": show_data}[what](console, chosen)


def show_time(console: Console, results: list[dict]) -> None:
    from workload import median

    table = Table("row", "median CPU s", "/ plain", "first call s", title=f"Step time, {results[0]['model']}")
    plain = median(results[0]["seconds"])
    for result in results:
        own = median(result["seconds"])
        table.add_row(result["row"], f"{own:.3f}", f"{own / plain:.2f}", f"{result['first']:.1f}")
    console.print(table)


def show_memory(console: Console, results: list[dict]) -> None:
    table = Table("row", "peak GB", "of it in the step", title=f"Peak RssAnon, {results[0]['model']}")
    for result in results:
        step = result["peak"] - result["built"]
        table.add_row(result["row"], f"{result['peak'] / 1e9:.2f}", f"{step / 1e9:.2f}")
    console.print(table)


def show_data(console: Console, results: list[dict]) -> None:
    table = Table("row", "fit s", "waited s", "share", "wait per step, second half ms", title="Waiting for images")
    for result in results:
        waited, half = sum(result["waited"]), result["waited"][len(result["waited"]) // 2 : -1]
        share, late = waited / result["seconds"], 1e3 * sum(half) / len(half)
        table.add_row(result["row"], f"{result['seconds']:.1f}", f"{waited:.2f}", f"{share:.0%}", f"{late:.1f}")
    console.print(table)


def main() -> None:
    options = arguments()
    if options.child:
        print(json.dumps(child(options)))
        return
    import torch

    torch.set_num_threads(options.threads)
    results = []
    for model in options.model:
        results += time_rows(options, model) if "time" in options.what else []
        results += memory_rows(options, model) if "memory" in options.what else []
    results += data_rows(options) if "data" in options.what else []
    show(results)
    if options.json:
        options.json.write_text(
            json.dumps({"options": vars(options), "results": results}, default=str, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
