"""A whole ViT-B-32 pipeline through the commands, timed: python tests/benchmarks/vit_b32_pipeline.py --folder DIR.

A randomly initialised base, experts whose image encoders differ from it by random changes, and random images; then
`pool add`, checks, adaptation, exports to open_clip and transformers, and both loaded back in a process of their own,
where their logits are compared. Time and memory do not depend on the values. Needs 0.4 GB of disk per expert and 3 GB
more.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

MODEL = "ViT-B-32"
ADAMERGE = [sys.executable, "-c", "from adamerge.commands.cli import main; main()"]
LOAD_BACK = """
import sys, torch, open_clip
from transformers import CLIPModel
own = open_clip.create_model(f"local-dir:{sys.argv[1]}").eval()
theirs = CLIPModel.from_pretrained(sys.argv[2]).eval()
torch.manual_seed(0)
images = torch.randn(4, 3, 224, 224)
texts = open_clip.get_tokenizer("ViT-B-32")(["a photo of a cat.", "a photo of a dog.", "a drawing"])
with torch.no_grad():
    ours = own.get_logits(images, texts)[0]
    found = theirs(input_ids=texts, pixel_values=images).logits_per_image
print(f"largest difference of logits {(ours - found).abs().max():.1e}, of values up to {ours.abs().max():.1f}")
"""


def main() -> None:
    """Make what is needed, run the commands, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="A new folder; removed again unless --keep.")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True)
    try:
        # In a process of its own: a command's peak of memory would begin with that of this one.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, options.experts))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit(maker.exitcode)
        rows = [run(name, command, folder) for name, command in commands(folder, options).items()]
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    print("\n| step | wall s | CPU s | peak memory, MB |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def make(folder: Path, experts: int) -> None:
    """Write base, experts, images and the data's configuration."""
    import open_clip
    import torch
    import yaml
    from PIL import Image
    from safetensors.torch import save_file

    torch.manual_seed(0)
    base = open_clip.create_model(MODEL, load_weights=False, pretrained_text=False).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in base.items()}, folder / "base.safetensors")
    visual = {key: tensor for key, tensor in base.items() if key.startswith("visual.")}
    names = [f"task{number}" for number in range(experts)]
    for name in names:
        moved = {key: tensor + 1e-3 * torch.randn_like(tensor) for key, tensor in visual.items()}
        save_file(moved, folder / f"{name}.safetensors")
        for label in range(4):
            for number in range(8):
                path = folder / "images" / name / f"class{label}" / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(path)
    tasks = {
        name: {
            "_target_": "adamerge.data.Task",
            "dataset": {"_target_": "torchvision.datasets.ImageFolder", "root": str(folder / "images" / name)},
        }
        for name in names
    }
    (folder / "configs" / "data").mkdir(parents=True)
    text = yaml.safe_dump({"defaults": ["folders"], "tasks": tasks})
    (folder / "configs" / "data" / "synthetic.yaml").write_text(text)


def commands(folder: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the commands in their order."""
    chosen = [
        *("--config-dir", str(folder / "configs"), "data=synthetic", f"data.batch_size={options.batch_size}"),
        *("pool=files", f"pool.file={folder / 'pool.yaml'}", "backbone=open_clip", f"backbone.model={MODEL}"),
        *("backbone.head_cache=off", f"steps={options.steps}", "trainer=cpu", "references=false"),
        *("logger=none", f"run_dir={folder / 'run'}"),
    ]
    run_dir, pool = str(folder / "run"), [*ADAMERGE, "pool", "add", str(folder / "pool.yaml")]
    pool += ["--base", str(folder / "base.safetensors"), "--licence", "base=CC0-1.0"]
    for name in (f"task{number}" for number in range(options.experts)):
        pool += ["--expert", f"{name}={folder / name}.safetensors", "--licence", f"{name}=CC0-1.0"]
    return {
        f"`pool add`, a base and {options.experts} experts": pool,
        "`data check`": [*ADAMERGE, "data", "check", "--root", str(folder / "images")],
        "`check`": [*ADAMERGE, "check", *chosen],
        f"`adapt`, {options.steps} steps, export and scoring": [*ADAMERGE, "adapt", *chosen],
        "`export --to open_clip`": [*ADAMERGE, "export", run_dir, "--to", "open_clip", "--out", str(folder / "own")],
        "`export --to hf`": [*ADAMERGE, "export", run_dir, "--to", "hf", "--out", str(folder / "theirs")],
        "load both back": [sys.executable, "-c", LOAD_BACK, str(folder / "own"), str(folder / "theirs")],
    }


def run(name: str, command: list[str], folder: Path) -> tuple[str, ...]:
    """Run a command to its end, and return the row of the table."""
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{name}: exit code {process.returncode}")
    return name, f"{seconds:.0f}", f"{usage.ru_utime + usage.ru_stime:.0f}", f"{usage.ru_maxrss / 1000:.0f}"


if __name__ == "__main__":
    main()
