"""The model card: ``README.md`` with the Hub's header, and a picture of the coefficients."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from adamerge import __version__
from adamerge.results.export import stated
from adamerge.results.formats.merged import MergedFolder, Usage
from adamerge.results.report import drawing
from adamerge.results.report.facts import learned_of
from adamerge.results.report.run_charts import coefficient_map
from adamerge.results.summary_table import table as score_table
from adamerge.results.table import Table
from adamerge.system.files import atomic_path
from adamerge.system.reading import read_json_mapping

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


def write_card(merged: MergedFolder, folder: Path, name: str, usage: Usage) -> None:
    """Write ``README.md`` by ``card.md``, and beside it the picture of the coefficients.

    Args:
        merged: What was exported.
        folder: Folder of the export.
        name: Name of the model, its heading.
        usage: What the format says.
    """
    recipe = merged.recipe
    parts, sidecar = ingredients(recipe), merged.backbone.sidecar()
    heads = [task for task, head in merged.heads.items() if set(head) == {"weight", "scale"}]
    preprocessing = ", ".join(f"{key} {json.dumps(value)}" for key, value in usage.preprocessing.items())
    is_clip = usage.library in ("open_clip", "transformers") and "class" not in usage.options
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("card.md").render(
        header=_header(name, recipe, usage), name=name, version=__version__, usage=usage, method=_method(recipe),
        experts=[part for part in parts if part != "base"],
        base=(parts.get("base") or {}).get("source") or "a base that the recipe does not name",
        task=json.dumps(heads[0], ensure_ascii=False) if heads and is_clip else None,
        files=_files(usage, folder), preprocessing=preprocessing,
        activation=stated(sidecar).get("activation") if sidecar else None,
        command=_shown(recipe["command"]) if recipe.get("command") else None,
        picture=PICTURE if _picture(merged.folder, folder) else None, facts=_facts(recipe),
        ingredients=_ingredients(parts), scores=_scores(recipe),
    )  # fmt: skip
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
    parts = {}
    for name in dict.fromkeys([*entries, *hashes]):
        entry = entries.get(name)
        entry = entry if isinstance(entry, Mapping) else {"file": entry}
        licence = entry.get("licence") or licences.get(name)
        parts[name] = {"source": _source(entry.get("file")), "licence": licence, "sha256": hashes.get(name)}
    return parts


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
    options: dict[str, Any] = {"license": licence, "library_name": usage.library}
    options |= {"pipeline_tag": usage.pipeline, "tags": ["merge", "adamerge"]}
    if licence == "other":
        options["license_name"] = "licences-of-the-ingredients"
    if bases:
        options |= {"base_model": bases, "base_model_relation": "merge"}
    kind = usage.pipeline if "class" in usage.options else "image-classification"
    metrics = (recipe.get("scores") or {}).get("metrics") or {}
    results = [
        EvalResult(
            task_type=kind, dataset_type=task, dataset_name=task, metric_type=metrics.get(task, "accuracy"),
            metric_name=metrics.get(task, "accuracy"), metric_value=round(value, 4),
        )
        for task, value in (_own_row(recipe) or {"per_task": {}})["per_task"].items()
    ]  # fmt: skip
    if results:
        options |= {"eval_results": results, "model_name": name}
    return ModelCardData(**options).to_yaml()


def _files(usage: Usage, folder: Path) -> str:
    files = {**usage.files, **{file: content for file, content in _BESIDE.items() if (folder / file).is_file()}}
    return Table(["file", "what"], list(files.items())).markdown(code=(0,))


def _method(recipe: Mapping[str, Any]) -> str:
    """Say in a sentence how the merge came about."""
    if rule := recipe.get("rule"):
        labels = ", with labels" if recipe.get("uses_labels") else ""
        data = f", with data{labels}" if recipe.get("uses_data") else ", without data"
        return f"The rule is `{_short(rule)}`{data}."
    config = recipe.get("config") or {}
    if not config:
        return "Its coefficients come from a file."
    if count := recipe.get("trained_weights"):
        steps = config.get("steps", "?")
        return f"It is no merge: all {count:,} weights were trained, in {steps} steps from a merge, on unlabeled data."
    parts = {part: _short(config[part]) for part in ("objective", "granularity", "constraint") if config.get(part)}
    protocol = {"split": "unlabeled inputs, none of which was scored", "transductive": "the scored inputs, unlabeled"}
    data = protocol.get(str(recipe.get("protocol")), "unlabeled inputs")
    text = ", ".join(f"{part} `{name}`" for part, name in parts.items())
    return f"Its coefficients were learned in {config.get('steps', '?')} steps on {data}: {text}."


def _facts(recipe: Mapping[str, Any]) -> dict[str, str | None]:
    batch_norm = recipe.get("batch_norm")
    versions = recipe.get("versions") or {}
    return {
        "seed": None if recipe.get("seed") is None else str(recipe["seed"]),
        "protocol": recipe.get("protocol"),
        "BatchNorm statistics": batch_norm.get("policy") if isinstance(batch_norm, Mapping) else batch_norm,
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
    }


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


def _ingredients(parts: Mapping[str, Mapping[str, str | None]]) -> str:
    rows = [
        [name, *(part[key] or NOT_STATED for key in ("source", "licence", "sha256"))] for name, part in parts.items()
    ]
    return Table(["", "from", "licence", "SHA-256"], rows).markdown(code=(3,)) if rows else ""


def _scores(recipe: Mapping[str, Any]) -> str:
    rows: Mapping[str, Any] = recipe.get("metrics") or {}
    if not rows:
        return ""
    tasks = list(next(iter(rows.values()))["per_task"])
    content = {"rows": rows, "tasks": tasks, "protocol": recipe.get("protocol"), **(recipe.get("scores") or {})}
    return score_table(content).markdown()


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
    chart = coefficient_map(learned_of(read_json_mapping(path), source))
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
