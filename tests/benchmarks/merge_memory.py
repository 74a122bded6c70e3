"""Peak anonymous memory (RssAnon) of merges and of `adamerge transform` over streamed experts, each in its own process.

    python tests/benchmarks/merge_memory.py --experts 4 16 --rows ties opcm transform

Files are random experts shaped like a ViT's image encoder; their pages do not count, as the kernel can drop them at any
time. `transform` writes the task vectors after TIES in bfloat16; `floor` opens the pool and goes over it once.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from memory import Peak, rss_anon
from transforms import write

ROWS = ["floor", "ties", "opcm", "weight_average", "transform"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of a ViT with 12 blocks; 768 has 86 M values")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--folder", type=Path, help="for the files; default a temporary one")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # row, number of experts, folder
    return parser.parse_args()


def child(row: str, experts: int, folder: Path) -> dict[str, float]:
    """Run one row in this process."""
    from omegaconf import OmegaConf

    from adamerge.commands.run.build import build
    from adamerge.commands.run.shipped import rule_node
    from adamerge.commands.transform import run
    from adamerge.merges import merged_state_dict
    from adamerge.pool.pool_file import DEFAULTS, PoolFile, PoolFiles

    entries = {f"expert{e}": PoolFile(folder / f"expert{e}.safetensors") for e in range(experts)}
    files = PoolFiles(PoolFile(folder / "base.safetensors"), entries, options={**DEFAULTS, "storage": "stream"})
    imports, start = rss_anon(), time.perf_counter()
    with Peak() as peak:
        if row == "transform":
            run(rule_node("transform", "ties", []), files, folder / "packed", "bfloat16")
        elif row == "floor":
            for _ in files.open().tiles():
                pass
        else:
            rule = build(OmegaConf.create({"merge": rule_node("merge", row, [])}), "merge")
            merged_state_dict(files.open(), rule)
    return {"peak": peak.value - imports, "seconds": time.perf_counter() - start}


def main() -> None:
    options = arguments()
    if options.child:
        print(json.dumps(child(options.child[0], int(options.child[1]), Path(options.child[2]))))
        return
    with TemporaryDirectory(dir=options.folder) as folder:
        write(Path(folder), options.width, max(options.experts))
        for row in options.rows:
            found = {}
            for experts in options.experts:
                command = [sys.executable, __file__, "--child", row, str(experts), folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[experts] = json.loads(done.stdout.splitlines()[-1])
                line = f"{row:15} E={experts:<3} {found[experts]['peak'] / 1e6:6.0f} MB above imports"
                print(f"{line} {found[experts]['seconds']:7.1f} s", flush=True)
            peaks = [found[experts]["peak"] for experts in options.experts]
            print(f"{row:15} growth {peaks[-1] / peaks[0] - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
