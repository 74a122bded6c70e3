"""Commands import what they use: none that reads files waits for Lightning, or for backbones and data sets."""

import json
import subprocess
import sys
import textwrap

import pytest

TRAINING = ("lightning", "torchmetrics", "hydra")
MODELS = ("open_clip", "torchvision", "transformers")
PLOTTING = ("matplotlib", "plotly")

NOT_IMPORTED = {  # a command, and the packages that it must do without
    "inspect": (["inspect", "--pool", "zoo"], (*TRAINING, *MODELS, *PLOTTING)),
    "pool list": (["pool", "list"], (*TRAINING, *MODELS, *PLOTTING)),
    "coefficients list": (["coefficients", "list"], (*TRAINING, *MODELS, *PLOTTING)),
}


@pytest.mark.parametrize("name", NOT_IMPORTED)
def test_command_does_without_heavy_packages(name, tmp_path):
    command, packages = NOT_IMPORTED[name]
    code = """
        import json, sys
        from adamerge.commands import cli
        try:
            cli.main(json.loads(sys.argv[1]))
        except SystemExit as stopped:
            assert not stopped.code, stopped.code
        loaded = {name.split(".")[0] for name in sys.modules} & set(json.loads(sys.argv[2]))
        sys.exit(", ".join(sorted(loaded)) or 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps(command), json.dumps(packages)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert not done.returncode, f"`adamerge {name}` imports {done.stderr.splitlines()[-1]}"
