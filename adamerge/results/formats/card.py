"""The model card: ``README.md`` with the Hub's header, and a picture of the coefficients."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge import __version__
from adamerge.checkpoints.model_folder import read_json
from adamerge.results.evaluation import table as accuracy_table
from adamerge.results.formats.merged import Usage
from adamerge.results.report import drawing
from adamerge.results.report.facts import learned_of
from adamerge.results.report.run_charts import coefficient_map
from adamerge.results.table import Table
from adamerge.system.files import atomic_path

NOT_STATED = "not stated"
PICTURE = "coefficients.png"
_BESIDE = {  # files that an export may have beside the model's own
    "heads.safetensors": "each task's classifier, as `TASK/NAME`, with its class names in the metadata",
    "coefficients.json": "the merging coefficients",
    "coefficients.safetensors": "the merging coefficients themselves, which are too many for JSON",
    "batch_norm.safetensors": "the statistics of the BatchNorm layers",
    "adamerge.json": "ingredients with hashes and licences, versions, settings and accuracies",
}
_REFERENCE = re.compile(r"hf://(?P<name>[^@\s/]+/[^@\s/]+)")
# Names that the Hub knows, of those that models and data sets usually have.
_LICENCES = (
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-2.0", "cc-by-sa-3.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail"),
    *("unlicense", "wtfpl"),
)


def write_card(folder: Path, name: str, recipe: Mapping[str, Any], usage: Usage, source: Path) -> None:
    """Write ``README.md``, and beside it the picture and the files that it speaks of.

    Args:
        folder: Of the export.
        name: Of the model, its heading.
        recipe: The content of ``merge.json``.
        usage: What the format says.
        source: The folder of the merge, with ``coefficients.json`` where it has coefficients.
    """
    sections = [
        f"# {name}\n",
        _summary(recipe),
        _use(usage, folder),
        _making(recipe, _picture(source, folder)),
        _ingredients(recipe),
        _accuracy(recipe),
    ]
    text = f"{_header(name, recipe, usage)}\n" + "\n".join(section for section in sections if section)
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")


def ingredients(recipe: Mapping[str, Any]) -> dict[str, dict[str, str | None]]:
    """Return ``source`` (a file's name, or a repository), ``licence`` and ``sha256`` of base and experts, by name.

    Folders of files are left out: a card is for others, who have nothing of this machine's.
    """
    hashes = recipe.get("hashes") or {}
    files = recipe.get("files") or (recipe.get("config") or {}).get("pool") or {}
    licences = files.get("licences") or {}
    entries = {"base": files.get("base"), **(files.get("experts") or {})}
    if files.get("base") is None and (tag := _tag(recipe)) is not None:
        entries["base"] = tag
    found = {}
    for name in dict.fromkeys([*entries, *hashes]):
        entry = entries.get(name)
        entry = entry if isinstance(entry, Mapping) else {"file": entry}
        licence = entry.get("licence") or licences.get(name)
        found[name] = {"source": _source(entry.get("file")), "licence": licence, "sha256": hashes.get(name)}
    return found


def licence_of(licences: Iterable[str | None]) -> str:
    """Return what the header says of the licence, by those of the ingredients, as the Hub names it.

    >>> licence_of(["MIT", "mit"]), licence_of(["MIT", "Apache-2.0"]), licence_of(["MIT", None])
    ('mit', 'other', 'unknown')
    """
    names = {None if licence is None else licence.lower() for licence in licences}
    if None in names or not names:
        return "unknown"
    return str(next(iter(names))) if len(names) == 1 and names <= set(_LICENCES) else "other"


def _header(name: str, recipe: Mapping[str, Any], usage: Usage) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    parts = ingredients(recipe)
    licence = licence_of(part["licence"] for part in parts.values())
    bases = [match["name"] for part in parts.values() if (match := _REFERENCE.match(part["source"] or ""))]
    options: dict[str, Any] = {"license": licence, "pipeline_tag": usage.pipeline, "tags": ["merge", "adamerge"]}
    if licence == "other":
        options["license_name"] = "licences-of-the-ingredients"
    if usage.library:
        options["library_name"] = usage.library
    if bases:
        options |= {"base_model": bases, "base_model_relation": "merge"}
    results = [
        EvalResult(
            task_type="image-classification", dataset_type=task, dataset_name=task, metric_type="accuracy",
            metric_name="accuracy", metric_value=round(value, 4),
        )
        for task, value in (_own_row(recipe) or {"per_task": {}})["per_task"].items()
    ]  # fmt: skip
    if results:
        options |= {"eval_results": results, "model_name": name}
    return f"---\n{ModelCardData(**options).to_yaml()}\n---\n"


def _summary(recipe: Mapping[str, Any]) -> str:
    parts = ingredients(recipe)
    experts = [part for part in parts if part != "base"]
    base = (parts.get("base") or {}).get("source") or "a base that the recipe does not name"
    return (
        f"One checkpoint, merged from {len(experts)} experts ({', '.join(experts)}), each fine-tuned from {base}, with "
        f"adamerge {__version__}. {_method(recipe)}\n"
    )


def _use(usage: Usage, folder: Path) -> str:
    files = {**usage.files, **{file: what for file, what in _BESIDE.items() if (folder / file).is_file()}}
    lines = [f"## Use\n\n```python\n{usage.code.rstrip()}\n```\n"]
    if usage.head:
        lines.append(f"The classes of a task:\n\n```python\n{usage.head}\n```\n")
    lines.append(Table(["file", "what"], list(files.items())).markdown(code=(0,)))
    if usage.preprocessing:
        settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in usage.preprocessing.items())
        lines.append(f"Preprocessing of images: {settings}.\n")
    return "\n".join([*lines, *(f"{note}\n" for note in usage.notes)])


def _method(recipe: Mapping[str, Any]) -> str:
    """Say in a sentence how the merge came about."""
    if rule := recipe.get("rule"):
        labels = ", with labels" if recipe.get("uses_labels") else ""
        data = f", with data{labels}" if recipe.get("uses_data") else ", without data"
        return f"The rule is `{_short(rule)}`{data}."
    config = recipe.get("config") or recipe.get("recipe") or {}  # the demo has no configuration
    if not config:
        return "Its coefficients come from a file."
    parts = {part: _short(config[part]) for part in ("objective", "granularity", "constraint") if config.get(part)}
    protocol = {"split": "unlabeled images, none of which was scored", "transductive": "the scored images, unlabeled"}
    data = protocol.get(str(recipe.get("protocol")), "unlabeled images")
    text = ", ".join(f"{part} `{name}`" for part, name in parts.items())
    return f"Its coefficients were learned in {config.get('steps', '?')} steps on {data}: {text}."


def _making(recipe: Mapping[str, Any], picture: bool) -> str:
    lines = ["## How it was made\n"]
    if command := recipe.get("command"):
        lines.append(f"```bash\n{_shown(command)}\n```\n")
    facts = {
        "seed": recipe.get("seed"),
        "protocol": recipe.get("protocol"),
        "BatchNorm statistics": (recipe.get("batch_norm") or {}).get("policy")
        if isinstance(recipe.get("batch_norm"), Mapping)
        else None,
        "versions": ", ".join(f"{name} {version}" for name, version in (recipe.get("versions") or {}).items()),
    }
    shown = [f"- {key}: {value}" for key, value in facts.items() if value not in (None, "")]
    lines.append("\n".join(shown) + "\n" if shown else "")
    if picture:
        lines.append(
            f"Coefficients by expert and parameter, means over the groups inside one:\n\n![Coefficients]({PICTURE})\n"
        )
    return "\n".join(line for line in lines if line)


def _shown(command: Sequence[Any]) -> str:
    """Return a command line with ``...`` in the place of paths, which are this machine's."""
    program, *arguments = map(str, command)
    return shlex.join([_name_of(program), *map(_without_path, arguments)]).replace("'...'", "...")


def _without_path(word: str) -> str:
    """Return a word of a command line with ``...`` for its value, where that holds a path.

    >>> _without_path("pool.file=/home/al ice/pool.yaml"), _without_path("init=hf://o/n"), _without_path("~/a")
    ('pool.file=...', 'init=hf://o/n', '...')
    """
    option, sign, value = word.rpartition("=") if word.count("=") == 1 else ("", "", word)
    has_path = bool(set("/\\~") & set(value)) and _REFERENCE.fullmatch(value) is None
    return f"{option}{sign}..." if has_path else word


def _name_of(path: str) -> str:
    """Return the last name of a path of any system."""
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _ingredients(recipe: Mapping[str, Any]) -> str:
    parts = ingredients(recipe)
    if not parts:
        return ""
    rows = [
        [name, *(part[key] or NOT_STATED for key in ("source", "licence", "sha256"))] for name, part in parts.items()
    ]
    table = Table(["", "from", "licence", "SHA-256"], rows).markdown(code=(3,))
    note = "A merge is derived from all of its ingredients: what their licences ask for holds for it too."
    return f"## Ingredients\n\n{table}\n{note}\n"


def _accuracy(recipe: Mapping[str, Any]) -> str:
    rows: Mapping[str, Any] = recipe.get("metrics") or {}
    if not rows:
        return ""
    content = {"rows": rows, "tasks": list(next(iter(rows.values()))["per_task"]), "protocol": recipe.get("protocol")}
    return f"## Accuracy\n\n{accuracy_table(content).markdown()}\n"


def _own_row(recipe: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the metrics of the merge itself, which are under the run's name."""
    name = (recipe.get("config") or {}).get("name")
    row: Mapping[str, Any] | None = (recipe.get("metrics") or {}).get(name)
    return row


def _picture(source: Path, folder: Path) -> bool:
    """Draw the coefficients, where there are any and matplotlib is installed; return whether it was done."""
    path = source / "coefficients.json"
    if not path.is_file():
        return False
    chart = coefficient_map(learned_of(read_json(path), source))
    return drawing.save_if_possible(chart, folder / PICTURE)


def _tag(recipe: Mapping[str, Any]) -> str | None:
    """Return where the base of an open_clip tag came from."""
    backbone = (recipe.get("config") or {}).get("backbone") or {}
    if not backbone.get("pretrained"):
        return None
    return f"{_source(backbone.get('model'))}, pretrained={_source(backbone['pretrained'])}"


def _source(place: Any) -> str | None:
    """Return a reference to the Hub as it is, of a path its name: folders may be called after people."""
    if place is None:
        return None
    text = str(place)
    return text if _REFERENCE.match(text) else _name_of(text)


def _short(node: Any) -> str:
    """Return a part of a configuration by the last name of its target."""
    if not isinstance(node, Mapping):
        return str(node)
    options = {key: value for key, value in node.items() if not str(key).startswith("_") and value is not None}
    plain = {key: value for key, value in options.items() if isinstance(value, (int, float, str, bool))}
    name = str(node.get("_target_", "")).rsplit(".", 1)[-1]
    return f"{name}({', '.join(f'{key}={_without_path(str(value))}' for key, value in plain.items())})"
