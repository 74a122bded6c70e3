"""Peak anonymous memory (RssAnon) and time of a transform over streamed experts; every run in its own process.

Each run opens a pool of random experts from files (whose pages do not count: the kernel can drop them at any time),
takes the transform's statistics, and applies it: tile by tile where it is elementwise, else one parameter at a time.

    python tests/benchmarks/transforms.py --experts 4 16 --rows ties none
"""

import argparse
import importlib.resources
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from memory import Peak, rss_anon

ROWS = ["none", "ties", "awd", "consensus", "equal_norms", "lines", "pcb", "dare", "trim"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of a ViT with 12 blocks; 768 has 87 M values")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["none", "ties"])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # row, number of experts, folder
    return parser.parse_args()


def write(folder: Path, width: int, experts: int) -> None:
    """Write files shaped like a ViT's parameters: a base, and experts that differ everywhere."""
    import torch
    from safetensors.torch import save_file

    shapes = {"embed.weight": (1000, width)}
    for block in range(12):
        shapes |= {f"blocks.{block}.qkv.weight": (3 * width, width), f"blocks.{block}.out.weight": (width, width)}
        shapes |= {f"blocks.{block}.fc1.weight": (4 * width, width), f"blocks.{block}.fc2.weight": (width, 4 * width)}
        shapes |= {f"blocks.{block}.norm.weight": (width,), f"blocks.{block}.fc1.bias": (4 * width,)}
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(base, folder / "base.safetensors")
    for e in range(experts):
        tensors = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in base.items()}
        save_file(tensors, folder / f"expert{e}.safetensors")


def child(row: str, experts: int, folder: Path) -> dict[str, float]:
    """Open, prepare and apply in this process."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from adamerge import ExpertPool
    from adamerge.transforms import Prepared

    text = (importlib.resources.files("adamerge.configs") / "transform" / f"{row}.yaml").read_text()
    transform = None if row == "none" else instantiate(OmegaConf.create(text), _convert_="object")
    paths = {f"expert{e}": folder / f"expert{e}.safetensors" for e in range(experts)}
    imports = rss_anon()
    with Peak() as peak:
        pool = ExpertPool.from_files(folder / "base.safetensors", paths, storage="stream")
        start = time.perf_counter()
        prepared = None if transform is None else Prepared(transform, pool)
        middle = time.perf_counter()
        if prepared is None or prepared.elementwise:
            for name, tile in pool.tiles():
                _ = tile if prepared is None else prepared(name, tile)
        else:
            for name in pool.names:
                prepared(name, pool.task_vectors(name))
        end = time.perf_counter()
    values = sum(tensor.numel() for tensor in pool.base.values())
    return {"values": values, "peak": peak.value, "imports": imports, "prepare": middle - start, "apply": end - middle}


def main() -> None:
    options = arguments()
    if options.child:
        row, experts, folder = options.child
        print(json.dumps(child(row, int(experts), Path(folder))))
        return
    with TemporaryDirectory() as folder:
        write(Path(folder), options.width, max(options.experts))
        print(f"{'transform':12} {'E':>3} {'values':>7} {'peak':>9} {'above imports':>14} {'prepare':>9} {'apply':>8}")
        for row in options.rows:
            for experts in options.experts:
                command = [sys.executable, __file__, "--child", row, str(experts), folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                above = found["peak"] - found["imports"]
                print(
                    f"{row:12} {experts:3} {found['values'] / 1e6:5.0f} M {found['peak'] / 1e6:6.0f} MB "
                    f"{above / 1e6:11.0f} MB {found['prepare']:7.1f} s {found['apply']:6.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
