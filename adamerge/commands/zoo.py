"""``zoo build``: small CLIPs and their experts, trained offline."""

import json
from pathlib import Path

import click

from adamerge import zoo as package
from adamerge.commands.data import root_option
from adamerge.commands.terminal import json_option, list_files, out, print_json
from adamerge.system import progress
from adamerge.system.files import ensure_writable
from adamerge.zoo.benchmark import benchmark_design
from adamerge.zoo.design import DEMO


@click.group()
def zoo() -> None:
    """Zoos: small CLIPs and their experts, trained offline from real images."""


@zoo.command("build")
@click.argument("name", type=click.Choice(("demo", "offline_benchmark")), default="demo")
@click.option(
    "--out",
    "--output",
    "output",
    type=click.Path(path_type=Path),
    help="Folder.  [zoo; offline_benchmark below the folder of the data sets]",
)
@click.option("--seed", default=0, show_default=True, help="Of data and training.")
@root_option
@json_option
def zoo_build(name: str, output: Path | None, seed: int, root: Path, as_json: bool) -> None:
    """Train a zoo anew: the demo's (a few minutes), or that of the offline benchmark (half an hour on one core).

    \b
    adamerge zoo build --out my_zoo --seed 1
    adamerge zoo build offline_benchmark        for experiment=offline_benchmark

    After an interruption the same command trains the models that are missing. The benchmark needs Fashion-MNIST:
    Debian's package dataset-fashion-mnist, or `adamerge data get fashion_mnist`.
    """  # noqa: D301
    root = root.expanduser().absolute()
    if output is None:
        output = Path("zoo") if name == "demo" else package.benchmark_folder(root)
    ensure_writable(output)
    facts = package.build(output, seed, design=DEMO if name == "demo" else benchmark_design(root))
    if as_json:
        print_json(facts)
        return
    if not progress.is_quiet():
        out.print_json(json.dumps(facts))
    list_files(output)
