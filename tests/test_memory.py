"""Memory of whole steps: on a model of 88 M parameters against formulations that hold every expert, and by stream."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
ROWS = ("ours stream", "floor", "naive", "shared graph")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's"),
]


def test_sixteen_experts_fit_where_other_formulations_do_not(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--experts", "2", "16", "--images", "1", "--steps", "2"]
    subprocess.run([*command, "--rows", *ROWS, "--json", str(tmp_path / "peaks.json")], check=True)
    results = json.loads((tmp_path / "peaks.json").read_text())["results"]
    peak = {(r["row"], r["experts"]): r["peak"] - r["before"] for r in results}
    model = 87_849_216 * 4  # bytes
    activations = peak["floor", 16] - model  # the floor keeps all gradients of a plain model, and activations
    bound = 2 * model + max(activations, 0) + model // 10  # base, merged, activations, gradients in flight
    assert peak["ours stream", 16] < bound
    assert peak["ours stream", 16] < 1.1 * peak["ours stream", 2]  # 1.02 to 1.07 measured
    assert peak["naive", 16] > bound
    assert peak["shared graph", 16] > bound


def test_adaptation_by_stream_holds_no_float32_copy_of_a_model():
    peaks = {}
    for size in ("tiny", "63m"):  # of which the first has the imports alone
        command = [sys.executable, BENCHMARKS / "merge_memory.py", "--size", size, "--experts", "2", "--rows", "adapt"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[size] = float(re.search(r"RssAnon +([\d.]+) GB", printed).group(1)) * 1e9
    parameters = 62_780_160
    activations = 1e8  # of 128 tokens, and of a few copies of the largest tensor in float32; all of 12 MB or less
    assert peaks["63m"] - peaks["tiny"] < 5 * parameters + activations  # 5.4 bytes per parameter measured
