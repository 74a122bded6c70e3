"""Write docs/configuration.md from the yaml files in configs/: python docs/configuration.py.

What an option means is read from the comment on its line, or else from the docstring of what `_target_` names.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
INTRODUCTION = """# Configuration

Every option of `adamerge adapt`, made from `configs/` by `python docs/configuration.py`. Choose a file of a group
with `group=file` (`objective=entropy`), set an option with `key=value` (`optimizer.lr=0.01`), add an argument that a
file does not list with `+key=value`. `adamerge adapt --cfg job` prints what your command line amounts to. Files of your
own go into a folder of the same shape, named with `--config-dir`. `merge/` and `transform/` are also the rules of
`adamerge merge --rule NAME --set option=value` and `adamerge transform`.
"""
NOT_LISTED = ("defaults", "hydra")
LEFT_OUT = ("compare",)  # lists of rows, not options


def page() -> str:
    """Return the whole page."""
    groups = sorted({path.parent for path in CONFIGS.rglob("*.yaml")} - {CONFIGS, *map(CONFIGS.joinpath, LEFT_OUT)})
    parts = [INTRODUCTION, *section(CONFIGS / "adapt.yaml", "adapt.yaml", "Options of the run")]
    for group in groups:
        name = group.relative_to(CONFIGS).as_posix()
        parts.append(f"## {name}\n")
        for path in sorted(group.glob("*.yaml")):
            below = name in OPTION_GROUPS and "@package _global_" not in path.read_text(encoding="utf-8")
            parts += section(path, f"{name}={path.stem}", None, prefix=f"{name}." if below else "")
    return "\n".join(parts).rstrip() + "\n"


# Groups whose options are set below the group's own name.
OPTION_GROUPS = [
    "backbone", "callbacks", "constraint", "data", "granularity", "logger", "method", "objective", "optimizer", "pool",
    "trainer", "transform",
]  # fmt: skip


def section(path: Path, name: str, title: str | None, prefix: str = "") -> Iterator[str]:
    """Yield a file's heading, what its first comment says, and its options."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    about = [line.removeprefix("#").strip() for line in lines[: _header(lines)]]
    yield f"## {title}\n" if title else f"### `{name}`\n"
    if about := [line for line in about if line and not line.startswith("@package")]:
        yield _escaped(" ".join(about)) + "\n"
    node = yaml.compose(text)
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        return
    if target := content.get("_target_"):
        yield f"`{target}`\n"
    if chosen := overrides(content.get("defaults", [])):
        yield f"Chooses {', '.join(f'`{choice}`' for choice in chosen)}.\n"
    rows = list(options(node, lines, arguments(target), prefix))
    if rows:
        yield "| option | default | |\n|---|---|---|"
        yield "\n".join(f"| `{key}` | {_code(value)} | {_escaped(meaning)} |" for key, value, meaning in rows) + "\n"


def overrides(defaults: list[Any]) -> list[str]:
    """Return what a defaults list chooses from other groups, as a command line would."""
    named = [next(iter(entry.items())) for entry in defaults if isinstance(entry, dict)]
    return [f"{key.split()[-1].lstrip('/')}={value}" for key, value in named]


def options(node: yaml.MappingNode, lines: list[str], about: dict[str, str], prefix: str) -> Iterator[tuple[str, ...]]:
    """Yield (key, default, meaning) of a mapping, nested ones with dotted keys."""
    for key, value in node.value:
        if key.value.startswith("_") or key.value in NOT_LISTED:
            continue
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            target = next((v.value for k, v in value.value if k.value == "_target_"), None)
            yield from options(value, lines, arguments(target), f"{prefix}{key.value}.")
        else:
            last = value.end_mark.line if value.end_mark.column else value.end_mark.line - 1
            written = "\n".join(lines[value.start_mark.line : last + 1])
            default = written[value.start_mark.column :] if value.start_mark.line == last else written
            yield f"{prefix}{key.value}", _uncommented(default), comment(lines, last) or about.get(key.value, "")


def comment(lines: list[str], line: int) -> str:
    """Return the comment at the end of a line, with the lines of only comment that go on below it."""
    found = re.search(r"(?:^|\s)#\s?(.*)$", lines[line])
    if not found:
        return ""
    column, parts = lines[line].index("#", found.start()), [found[1]]
    for below in lines[line + 1 :]:
        if not below.strip().startswith("#") or below.index("#") != column or not column:
            break
        parts.append(below.strip().lstrip("# "))
    return " ".join(parts)


def arguments(target: str | None) -> dict[str, str]:
    """Return what the docstring of a class or function says about each of its arguments, first sentence each."""
    if target is None or not target.startswith("adamerge."):
        return {}
    module, _, name = target.rpartition(".")
    found: Any = getattr(importlib.import_module(module), name)
    block = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", inspect.getdoc(found) or "", re.MULTILINE)
    if not block:
        return {}
    entries = re.findall(r"^    (\w+)(?: \(.*?\))?: ((?:.*\n?)(?:^     +.*\n?)*)", block[1] + "\n", re.MULTILINE)
    return {key: re.sub(r"``(.*?)``", r"`\1`", " ".join(text.split())) for key, text in entries}


def _header(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _uncommented(text: str) -> str:
    lines = [re.sub(r"(?:^|\s+)#.*$", "", line).strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line)


def _code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def _escaped(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(page(), encoding="utf-8")
