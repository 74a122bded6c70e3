"""Folders as runs leave them, written by hand: reports are tested without training anything."""

import csv
import json
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

EXPERTS = ("cars", "dtd", "svhn")
PARAMETERS = (
    "conv1.weight", "positional_embedding", "proj", "ln_post.weight",
    *(f"transformer.resblocks.{block}.{name}" for block in (0, 1, 10, 2)
      for name in ("attn.in_proj_weight", "ln_1.weight", "mlp.c_fc.weight")),
)  # fmt: skip


def write_run(
    folder: Path, *, name="adapt", experts=EXPERTS, rows=0, steps=30, frank_wolfe=False, finished=True, seed=0,
    shift=0.0, versions=1,
) -> Path:  # fmt: skip
    """Write a run's folder.

    Args:
        rows: Coefficients per tensor; 0 for one, in the JSON itself.
        finished: Whether it has exported and been scored.
        shift: Of all accuracies.
        versions: Times the run was started.
    """
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {
        "name": name, "run_dir": str(folder), "cwd": "/somewhere", "seed": seed, "steps": steps, "init": 0.3,
        "objective": {"_target_": "adamerge.objectives.imitation.Imitation"},
        "method": {"_target_": "adamerge.methods.GradientMerging"}, "pool": {"experts": dict.fromkeys(experts, "x")},
        "granularity": {"_target_": "adamerge.model.granularity.Layer"},
        "data": {"tasks": {expert: {} for expert in experts}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_metrics(folder, experts, steps, generator, frank_wolfe, versions)
    if not finished:
        return folder
    write_coefficients(folder, experts, rows, generator)
    hashes = {expert: f"{number}" * 64 for number, expert in enumerate(("base", *experts))}
    recipe = {
        "hashes": hashes, "versions": {"torch": "2.9"}, "skipped": {"token.weight": "not part of the encoder"},
        "steps": steps, "protocol": "split", "seed": seed, "command": ["adamerge adapt", "objective=imitation"],
        "seconds": 3.2, "peak_memory_bytes": 10**9,
    }  # fmt: skip
    if frank_wolfe:
        support = {expert: {"mean": 0.2, "groups": 3} for expert in experts}
        recipe["frank_wolfe"] = {"support": support, "groups": 16, "start": 0.1, "iterations": steps}
    save(recipe, folder / "merge.json")
    save(summary(experts, name, shift), folder / "summary.json")
    save(record(experts, hashes, steps, generator), folder / "report.json")
    return folder


def write_metrics(folder, experts, steps, generator, frank_wolfe, versions):
    names = ["adapt/loss", "adapt/coefficient", "adapt/coefficient/min", "adapt/coefficient/max"]
    kinds = ("adapt/loss", "coefficient", "unlabeled/marginal", "unlabeled/entropy", "unlabeled/disagreement")
    names += [f"{kind}/{expert}" for kind in kinds for expert in sorted(experts)]
    if frank_wolfe:
        names += ["adapt/gap", *(f"pick/{expert}" for expert in sorted(experts)), "pick/start"]
    for version in range(versions):
        path = folder / "metrics" / f"version_{version}" / "metrics.csv"
        path.parent.mkdir(parents=True)
        first = version * steps // (2 * versions)  # a resumed run repeats steps
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "epoch", "step"])
            for step in range(first, steps):
                writer.writerow([*(f"{value:.6g}" for value in generator.uniform(0.4, 0.6, len(names))), 0, step])


def write_coefficients(folder, experts, rows, generator):
    content = {"format": 1, "granularity": "row" if rows else "layer", "constraint": "none", "experts": list(experts)}
    values = {name: generator.normal(0.3, 0.1, (len(experts), rows or 1)).astype("float32") for name in PARAMETERS}
    if rows:
        save_file(values, folder / "coefficients.safetensors")
        content |= {
            "tensors": "coefficients.safetensors",
            "coefficients": {expert: {"mean": 0.3} for expert in experts},
        }
    else:
        content["coefficients"] = {
            expert: {name: float(array[at, 0]) for name, array in values.items()} for at, expert in enumerate(experts)
        }
    save(content, folder / "coefficients.json")


def summary(experts, name, shift=0.0):
    rows = {}
    for at, row in enumerate(("pretrained", "task_arithmetic_0.3", name, "experts")):
        per_task = {task: round(0.5 + 0.1 * at + shift + 0.01 * number, 4) for number, task in enumerate(experts)}
        mean = sum(per_task.values()) / len(per_task)
        rows[row] = {
            "per_task": per_task, "calibration_error": dict.fromkeys(experts, 0.05), "mean": mean,
            "interval": [mean - 0.01, mean + 0.01], "normalised": 0.9, "gap_closed": at / 3 - 1 / 3,
            "uses_labels": False, "uses_data": True, "seconds": 3.2, "seed": 0,
        }  # fmt: skip
    return {"format": 1, "protocol": "split", "tasks": list(experts), "rows": rows}


def record(experts, hashes, steps, generator):
    facts = {
        expert: {"source": f"/far/away/{at}.safetensors", "sha256": hashes[expert], "bytes": 10**6, "norm": 3.0,
                 "relative_norm": 0.05}
        for at, expert in enumerate(experts)
    }  # fmt: skip
    pool = {
        "base": {"source": "/far/away/base.safetensors", "sha256": hashes["base"], "norm": 50.0, "bytes": 10**6},
        "experts": facts, "parameters": len(PARAMETERS), "entries": 12345, "dtype": "float32", "storage": "ram",
        "transform": None, "cosines": np.eye(len(experts)).tolist(), "base_norms": dict.fromkeys(PARAMETERS, 5.0),
        "norms": {name: generator.uniform(0.1, 0.4, len(experts)).tolist() for name in PARAMETERS},
    }  # fmt: skip
    costs = {
        "seconds": {"prepare": 1.0, "adapt": 3.2, "score": 2.0}, "steps": steps, "resumed": False, "device": "cpu",
        "threads": 2, "peak_memory_bytes": 10**9, "peak_device_memory_bytes": None,
    }  # fmt: skip
    return {"format": 1, "pool": pool, "costs": costs}


def save(content, path):
    path.write_text(json.dumps(content))
