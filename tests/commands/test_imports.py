"""Commands import what they use: none that reads files waits for Lightning, or for backbones and data sets."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

LIGHTNING = ("lightning", "torchmetrics")
TRAINING = (*LIGHTNING, "hydra")
MODELS = ("open_clip", "torchvision", "transformers")
PLOTTING = ("matplotlib",)

POOL = ("--base", "base.safetensors", "--expert", "a=a.safetensors", "--expert", "b=b.safetensors")

NOT_IMPORTED = {  # a command, and the packages that it must do without
    "inspect": (["inspect", "--pool", "zoo"], (*TRAINING, *MODELS, *PLOTTING)),
    "pool list": (["pool", "list"], (*TRAINING, *MODELS, *PLOTTING)),
    "coefficients list": (["coefficients", "list"], (*TRAINING, *MODELS, *PLOTTING)),
    "merge": (["merge", "--rule", "ties", *POOL, "--out", "out"], (*LIGHTNING, *MODELS, *PLOTTING)),
    "transform": (["transform", "--rule", "trim", *POOL, "--out", "out"], (*LIGHTNING, *MODELS, *PLOTTING)),
    "adapt --help": (["adapt", "--help"], (*LIGHTNING, *MODELS, *PLOTTING)),
}


# Each command runs in a fork of one process, which has imported what all of them may.
CODE = """
    import json, os, sys
    import rich.console, rich.progress, rich.table, safetensors.torch, torch, yaml
    from adamerge.commands import cli
    for name, (command, packages) in json.loads(sys.argv[1]).items():
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0, name
            continue
        try:
            cli.main(command)
        except SystemExit as stopped:
            assert not stopped.code, stopped.code
        loaded = {module.split(".")[0] for module in sys.modules} & set(packages)
        sys.exit(f"`adamerge {name}` imports {sorted(loaded)}" if loaded else 0)
"""


@pytest.mark.parametrize("names", [("inspect", "merge"), pytest.param(tuple(NOT_IMPORTED), marks=pytest.mark.slow)])
def test_commands_do_without_heavy_packages(tmp_path, names):
    for value, file in enumerate(("base", "a", "b")):
        save_file({"w": torch.full((2, 3), float(value))}, tmp_path / f"{file}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE), json.dumps({name: NOT_IMPORTED[name] for name in names})],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert not done.returncode, done.stderr
