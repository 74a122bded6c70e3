"""``demo`` and ``zoo``: the embedded offline zoo."""

import json
from pathlib import Path

import click

from adamerge.commands.terminal import list_files, out


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder.")
@click.option("--seed", default=0, show_default=True, help="Of the splits and the order of the images.")
@click.option("--fast", is_flag=True, help="Fewer steps: a look at the machinery in under a minute.")
@click.option("--transductive", is_flag=True, help="Adapt on the scored images, as the AdaMerging paper does.")
def demo(output: Path, seed: int, fast: bool, transductive: bool) -> None:
    """Run the whole job on the embedded offline zoo: adapt, export, score, compare."""
    from adamerge.demo import run

    run(output, seed=seed, fast=fast, protocol="transductive" if transductive else "split", console=out)
    list_files(output)


@click.group()
def zoo() -> None:
    """The demo zoo: a tiny CLIP and six experts, trained offline from files inside pip packages."""


@zoo.command("build")
@click.option("--output", type=click.Path(path_type=Path), default=Path("zoo"), show_default=True, help="Folder.")
@click.option("--seed", default=0, show_default=True, help="Of data and training.")
def zoo_build(output: Path, seed: int) -> None:
    """Train the zoo anew (a few minutes on 2 cores)."""
    from adamerge import zoo as package
    from adamerge.files import ensure_writable

    ensure_writable(output)
    facts = package.build(output, seed)
    out.print_json(json.dumps(facts))
    list_files(output)
