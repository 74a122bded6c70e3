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
PLOTTING = ("matplotlib", "plotly")

POOL = ("--base", "base.safetensors", "--expert", "a=a.safetensors", "--expert", "b=b.safetensors")

NOT_IMPORTED = {  # a command, and the packages that it must do without
    "inspect": (["inspect", "--pool", "zoo"], (*TRAINING, *MODELS, *PLOTTING)),
    "pool list": (["pool", "list"], (*TRAINING, *MODELS, *PLOTTING)),
    "coefficients list": (["coefficients", "list"], (*TRAINING, *MODELS, *PLOTTING)),
    "merge": (["merge", "--rule", "ties", *POOL, "--out", "out"], (*LIGHTNING, *MODELS, *PLOTTING)),
    "transform": (["transform", "--rule", "trim", *POOL, "--out", "out"], (*LIGHTNING, *MODELS, *PLOTTING)),
    "adapt --help": (["adapt", "--help"], (*LIGHTNING, *MODELS, *PLOTTING)),
}


@pytest.mark.parametrize("name", NOT_IMPORTED)
def test_command_does_without_heavy_packages(name, tmp_path):
    command, packages = NOT_IMPORTED[name]
    if POOL[0] in command:
        for value, file in enumerate(("base", "a", "b")):
            save_file({"w": torch.full((2, 3), float(value))}, tmp_path / f"{file}.safetensors")
    code = """
        import json, sys
        from adamerge.commands import cli
        command, packages = map(json.loads, sys.argv[1:])  # Hydra changes the list
        try:
            cli.main(command)
        except SystemExit as stopped:
            assert not stopped.code, stopped.code
        loaded = {name.split(".")[0] for name in sys.modules} & set(packages)
        sys.exit(", ".join(sorted(loaded)) or 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps(command), json.dumps(packages)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert not done.returncode, f"`adamerge {name}` imports {done.stderr.splitlines()[-1]}"
