"""Coefficients as the field publishes them, lists without names, to a ``coefficients.json`` with names.

AdaMerging's have one row per parameter tensor in the order in which open_clip registers them, the text tower's
leftovers included, and one column per expert after the base's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.model.coefficients_file import FORMAT
from adamerge.system.files import sha256
from adamerge.system.reading import read_text

Rows = tuple[tuple[float, ...], ...]

# open_clip's order: of a CLIP without its text transformer, of the visual tower, and of each of its blocks.
_BEFORE, _AFTER = 3, 3  # positional_embedding, text_projection, logit_scale; token_embedding, ln_final's two
_STEM = ("class_embedding", "positional_embedding", "proj", "conv1.weight", "ln_pre.weight", "ln_pre.bias")
_BLOCK = (
    *("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight"),
    *("attn.out_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"),
    "mlp.c_proj.bias",
)
_END = ("ln_post.weight", "ln_post.bias")
_IN_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
EIGHT = ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")  # AdaMerging's columns


@dataclass(frozen=True)
class PublishedList:
    """One list of coefficients.

    Attributes:
        name: How it is chosen, such as ``lw_adamerging/ViT-B-32``.
        rows: As published: one (task-wise), or one per parameter tensor.
        source: Where it comes from.
    """

    name: str
    rows: Rows
    source: Mapping[str, str]


def facts_of(published: PublishedList) -> dict[str, str | int]:
    """Return what the name of a shipped list says, and its size."""
    method, model = published.name.split("/")
    granularity, _, variant = method.partition("_")
    return {
        "name": published.name,
        "model": model,
        "method": {"adamerging": "AdaMerging", "adamergingpp": "AdaMerging++"}[variant],
        "granularity": {"tw": "task", "lw": "layer"}[granularity],
        "rows": len(published.rows),
        "columns": len(published.rows[0]),
    }


def shipped_lists() -> dict[str, PublishedList]:
    """Return the lists that ship, by name."""
    text = (files(__package__) / "published.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    source = {"paper": content["paper"], "repository": content["repository"], "licence": content["licence"]}
    lists = content["lists"]
    return {name: PublishedList(name, _rows_of(rows, name), source) for name, rows in lists.items()}


def chosen_list(target: str) -> PublishedList:
    """Return a shipped list by name, or that of a file: rows of numbers as text, or as a list in JSON.

    Raises:
        FileNotFoundError: If ``target`` is neither.
        InputError: If the file holds anything else.
    """
    shipped = shipped_lists()
    if target in shipped:
        return shipped[target]
    path = Path(target)
    if not path.is_file():
        if path.suffix:
            raise FileNotFoundError(f"{path}: no such file, and no list of that name ships.")
        raise InputError(
            f"coefficients import {target}: no such file, and no list of that name ships; shipped: "
            f"{', '.join(shipped)}.{did_you_mean(target, shipped)}"
        )
    try:
        text = read_text(path)
    except InputError as error:
        raise _no_list(target, str(error).removeprefix(f"{path}: ").rstrip(".")) from error
    return PublishedList(path.stem, _rows_of(text, target), {"file": path.name, "sha256": sha256(path)})


def named_coefficients(
    published: PublishedList, parameters: Sequence[str], experts: Sequence[str], order: Sequence[str] | None = None
) -> dict[str, Any]:
    """Pair a list with names; the result is what ``coefficients.json`` holds.

    Args:
        published: The list.
        parameters: Those that merge, of open_clip's ViT without its prefix, in any order.
        experts: The pool's, in any order.
        order: Names of the list's columns, as the pool has them; default the eight of AdaMerging.

    Raises:
        InputError: If rows or columns are not those of the pool.
    """
    rows = _without_base(published, experts)
    columns = _columns(published, experts, order)
    granularity, labels = "task", tuple[str, ...](["all"])
    if len(rows) > 1:
        granularity, labels = "layer", registration_order(parameters)
        rows = _visual(published.name, rows, len(labels))
    values = {
        expert: dict(zip(labels, (row[column] for row in rows), strict=True)) for column, expert in enumerate(columns)
    }
    return {
        "format": FORMAT,
        "granularity": granularity,
        "constraint": "none",
        "experts": list(experts),
        "coefficients": {expert: values[expert] for expert in experts},
        "source": {"list": published.name, **published.source},
    }


def registration_order(parameters: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters of open_clip's visual transformer in the order of ``named_parameters()``.

    Raises:
        InputError: If there are others, or some are missing.
    """
    blocks = {int(match[1]) for name in parameters if (match := _IN_BLOCK.fullmatch(name))}
    inner = (f"transformer.resblocks.{block}.{name}" for block in sorted(blocks) for name in _BLOCK)
    expected = (*_STEM, *inner, *_END)
    missing, further = set(expected) - set(parameters), set(parameters) - set(expected)
    if missing or further:
        raise InputError(
            "Layer-wise lists are of open_clip's CLIP ViTs, all of whose visual tower merges: the pool lacks "
            f"{shorten(sorted(missing)) or 'nothing'} and has besides {shorten(sorted(further)) or 'nothing'}."
        )
    return expected


def _without_base(published: PublishedList, experts: Sequence[str]) -> Rows:
    """Return the rows with one column per expert, without the base's, the first, where there is one."""
    rows, count, width = published.rows, len(experts), len(published.rows[0])
    pool = f"the pool's {count} experts, {shorten(experts, 8)}"
    if width == count:
        return rows
    if width != count + 1:
        raise InputError(
            f"{published.name}: expected as many columns as {pool}, or one more for the base, found {width}. Take a "
            "list of these experts, or a pool of the list's."
        )
    if any(row[0] != 1 for row in rows):
        raise InputError(
            f"{published.name}: found {width} columns for {pool}, so the first would be the base's, but it holds other "
            "values than 1. Take a list of these experts, or a pool of the list's."
        )
    return tuple(row[1:] for row in rows)


def _columns(published: PublishedList, experts: Sequence[str], order: Sequence[str] | None) -> Sequence[str]:
    columns = list(order or EIGHT)
    if sorted(columns) != sorted(experts):
        asked = "--order" if order else "the list's columns"
        raise InputError(
            f"{published.name}: {asked}: {', '.join(columns)}: expected the pool's experts, {', '.join(experts)}, each "
            "once. Name them in the order of the columns: --order NAME,NAME,..."
        )
    return columns


def _visual(name: str, rows: Rows, count: int) -> Rows:
    """Return the rows of the visual tower, without the text tower's leftovers, which were never trained."""
    if len(rows) == count:
        return rows
    whole = count + _BEFORE + _AFTER
    if len(rows) != whole:
        raise InputError(
            f"{name}: expected {count} rows, one per tensor of the visual tower, or {whole} with the "
            f"text tower's leftovers, found {len(rows)}. Is it a list of another model?"
        )
    leftovers = {value for row in (*rows[:_BEFORE], *rows[-_AFTER:]) for value in row}
    if len(leftovers) != 1:
        raise InputError(
            f"{name}: expected one initial value in the first {_BEFORE} and last {_AFTER} rows, the text tower's, "
            f"which are not trained, found {shorten(map(str, sorted(leftovers)))}. Are the rows in open_clip's order?"
        )
    return rows[_BEFORE:-_AFTER]


def _rows_of(text: str, where: str) -> Rows:
    """Read lines of numbers, divided by blanks or commas, or a list of lists in JSON."""
    try:
        if text.lstrip().startswith("["):
            values = np.array(json.loads(text))
        else:
            lines = [line.strip(" \t,;") for line in text.splitlines() if line.strip()]
            values = np.array([re.split(r"[,;\s]+", line) for line in lines]).astype(float)
    except (ValueError, RecursionError) as error:  # no JSON, no numbers, or rows of several lengths
        raise _no_list(where, str(error)) from error
    if values.ndim != 2 or not values.size or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise _no_list(where, "no rows of numbers, or infinite ones")
    return tuple(map(tuple, values.astype(float).tolist()))


def _no_list(where: str, reason: str) -> InputError:
    return InputError(
        f"{where}: expected rows of one length, of finite numbers, found something else ({reason}). Write one line per "
        "row, one number per expert with a blank between them, or a JSON list, [[0.3, ...], ...]."
    )
