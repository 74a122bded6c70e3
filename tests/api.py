"""The public surface of the package, as text: ``python -m tests.api`` writes it to tests/api.txt.

Public are ``adamerge.__all__``, what the subpackages' front pages name, what the shipped yaml files name as
``_target_``, what README and docs import, and the commands with their options.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adamerge.configs
import click
import yaml

import adamerge
from adamerge.commands.cli import app
from tests.support.documents import PAGES, blocks

FILE = Path(__file__).parent / "api.txt"
CONFIGS = Path(adamerge.configs.__file__).parent
PACKAGES = ("backbones", "callbacks", "merges", "methods", "objectives", "transforms", "zoo")


def surface() -> str:
    """Return the whole text."""
    names = {line for path, found in public_names() for line in signatures(path, found)}
    return "\n".join(
        ["# Names", *sorted(names), "", "# Commands", *commands(app, "adamerge"), "", *configuration(), ""]
    )


def public_names() -> Iterator[tuple[str, Any]]:
    """Yield import path and object of each public name; some come twice."""
    for name in adamerge.__all__:
        yield f"adamerge.{name}", getattr(adamerge, name)
    for package in PACKAGES:
        module = importlib.import_module(f"adamerge.{package}")
        for name in getattr(module, "__all__", vars(module)):
            found = getattr(module, name)
            if not name.startswith("_") and callable(found) and str(found.__module__).startswith("adamerge"):
                yield f"{module.__name__}.{name}", found
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(CONFIGS.rglob("*.yaml")))
    targets = re.findall(r"_target_: (adamerge\.[\w.]+)\.(\w+)", text)
    code = "\n".join(block for page in PAGES for _, block in blocks(page, "python"))
    imports = re.findall(r"from (adamerge\.[\w.]+) import ([\w, ]+)", code)
    for path, listed in (*targets, *imports):
        for name in re.findall(r"\w+", listed):
            yield f"{path}.{name}", getattr(importlib.import_module(path), name)


def signatures(path: str, found: Any) -> Iterator[str]:
    """Yield the signature of a function, or of a class and of its own methods and properties."""
    if not callable(found):
        return
    yield f"{path}{arguments(found)}"
    if not inspect.isclass(found):
        return
    foreign = [base for base in found.__mro__ if not base.__module__.startswith("adamerge")]
    for base in found.__mro__:
        for name, member in vars(base).items():
            if base in foreign or name.startswith("_") or any(hasattr(other, name) for other in foreign):
                continue  # a hook of Lightning's or torch's is theirs
            if isinstance(member, property):
                yield f"{path}.{name}"
            elif callable(function := getattr(member, "__func__", member)) and not inspect.isclass(function):
                yield f"{path}.{name}{arguments(function)}"


def arguments(function: Any) -> str:
    """Return a signature without types: names, defaults, and how they are passed."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "(...)"
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name not in ("self", "cls")]
    text = str(inspect.Signature(plain))
    return re.sub(r"<(?:function|class|factory)[^>]*>|functools\.partial\(.*?\)(?=[,)])", "...", text)


def commands(command: click.Command, path: str) -> Iterator[str]:
    """Yield each command with its arguments and options."""
    words = [
        "/".join((*p.opts, *p.secondary_opts)) + ("" if getattr(p, "is_flag", False) else "=")
        if isinstance(p, click.Option)
        else str(p.name).upper()
        for p in command.params
    ]
    yield " ".join([path, *words])
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), f"{path} {name}")


def configuration() -> Iterator[str]:
    """Yield the options of a run and the choices of each group."""
    content = yaml.safe_load((CONFIGS / "adapt.yaml").read_text(encoding="utf-8"))
    yield "# Options of adapt"
    yield " ".join(sorted(key for key in content if key not in ("defaults", "hydra")))
    yield "\n# Choices of groups"
    for group in sorted({path.parent for path in CONFIGS.rglob("*.yaml")} - {CONFIGS}):
        choices = sorted(path.stem for path in group.glob("*.yaml"))
        yield f"{group.relative_to(CONFIGS).as_posix()}: {' '.join(choices)}"


if __name__ == "__main__":
    FILE.write_text(surface(), encoding="utf-8")
