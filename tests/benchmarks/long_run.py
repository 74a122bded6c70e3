"""Whether a long run grows: resident memory, open files and threads over thousands of steps, and the files it leaves.

    python tests/benchmarks/long_run.py --steps 5000

Runs `adamerge adapt` on the demo zoo with two experts and small batches of random images, as a process of its own, and
looks at it from outside. The slope is a least-squares line through the resident memory of the second half: what the
first half allocates (libraries, caches, the images) stays. Exit code 1 where the slope is above ``--limit`` or files
or threads grow.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.support.small_run import arguments, write_configs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--limit", type=float, default=1.0, help="kB per step")
    parser.add_argument("overrides", nargs="*", help="further options of the run, such as logger=none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        configs = write_configs(Path(scratch) / "configs")
        folder = Path(scratch) / "run"
        command = arguments(configs, folder, f"steps={options.steps}", *options.overrides)
        code = "import torch; torch.set_num_threads(1); from adamerge.commands.cli import main; main()"
        errors = Path(scratch) / "errors"
        with errors.open("w") as file:
            process = subprocess.Popen([sys.executable, "-c", code, *command], stdout=file, stderr=file, cwd=scratch)
            seen = watch(process, folder)
        if process.returncode:
            sys.exit(errors.read_text())
        result = judge(seen) | {"exit_code": process.returncode, "steps": options.steps}
        result["kilobytes"] = {p.name: round(p.stat().st_size / 1e3, 1) for p in folder.rglob("*.*") if p.is_file()}
    print(json.dumps(result, indent=2))
    grown = result["kB_per_step"] > options.limit or result["files_grown"] > 0 or result["threads_grown"] > 0
    sys.exit(1 if grown or process.returncode else 0)


def watch(process: subprocess.Popen[bytes], folder: Path) -> np.ndarray:
    """Return rows (step, resident kB, open files, threads), one for each checkpoint that was seen while it trained."""
    rows, last = [], folder / "checkpoints" / "last.ckpt"
    latest = 0.0
    while process.poll() is None:
        try:
            if last.stat().st_mtime != latest:
                latest = last.stat().st_mtime
                status = Path(f"/proc/{process.pid}/status").read_text().split("\n")
                facts = dict(line.split(":", 1) for line in status if ":" in line)
                files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                rows.append((step_of(last), int(facts["VmRSS"].split()[0]), files, int(facts["Threads"])))
        except FileNotFoundError:
            pass  # no checkpoint yet, or the process has just ended
        time.sleep(0.2)
    return np.array(rows)


def step_of(checkpoint: Path) -> int:
    import torch

    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def judge(rows: np.ndarray) -> dict[str, float]:
    """Fit a line to the second half of a run."""
    half = rows[rows[:, 0] >= rows[-1, 0] / 2][:-1]  # the last one is taken while it exports
    slope = np.polyfit(half[:, 0], half[:, 1], 1)[0]
    return {
        "samples": len(rows),
        "first_MB": rows[0, 1] / 1e3,
        "half_MB": half[0, 1] / 1e3,
        "last_MB": half[-1, 1] / 1e3,
        "kB_per_step": round(float(slope), 4),
        "open_files": int(half[-1, 2]),
        "files_grown": int(half[-1, 2] - half[0, 2]),
        "threads_grown": int(half[-1, 3] - half[0, 3]),
    }


if __name__ == "__main__":
    main()
