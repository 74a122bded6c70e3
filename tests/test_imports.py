"""The import direction of the package, read from its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adamerge

PACKAGE = Path(adamerge.__file__).parent

# Lowest first. A module may import from lines above its own, never from its own line or below;
# files of one package (zoo, methods, ...) may import each other. A new module is a new word here.
ORDER = [
    ["version", "errors", "ranks"],
    ["corruptions"],
    ["pickles", "low_rank", "selection", "stock", "views", "reading", "memory"],
    ["files", "stacks", "progress", "lazy", "hub", "recipes"],
    ["hash_cache", "checkpoint_io"],
    ["checkpoints"],
    ["key_maps"],
    ["model_files"],
    ["granularity", "constraints", "layout", "adapters", "packed_file", "conversion", "targets", "clip_configs"],
    ["transforms"],
    ["task_vectors", "initial", "factored"],
    ["pool"],
    ["descriptions", "pool_part"],
    ["coefficients", "packed", "coefficient_lists"],
    ["merge", "refinement"],
    ["teachers", "calls", "running"],
    ["sharding"],
    ["model"],
    ["sharded_model"],
    ["objectives", "frank_wolfe", "streams", "teacher_files"],
    ["caching", "splits"],
    ["data"],
    ["backbones", "batch_norm", "merges", "tasks"],
    ["baselines", "evaluation", "methods", "export"],
    ["callbacks"],
    ["zoo", "figures", "report"],
    ["run_checks", "stages"],
    ["run_folder", "pool_files"],
    ["preflight"],
    ["pool_names"],
    ["scoring", "composition", "launchers"],
    ["launch", "inspection", "pool_command"],
    ["replay", "demo", "formats", "merging_command", "compare_row", "comparison_table"],
    ["robustness"],
    ["row_processes"],
    ["comparison", "transform_command"],
    ["reproduction"],
    ["commands"],
    ["cli"],
]

# Heavy third-party packages, and the only modules that may import them.
SHELL = {  # what commands are made of
    *("stages", "run_folder", "launchers", "preflight", "composition", "launch", "inspection", "replay", "demo", "cli"),
    *("pool_files", "pool_names", "pool_command", "merging_command", "transform_command", "compare_row", "comparison"),
    *("checkpoint_io", "commands", "formats", "reproduction"),
}
ALLOWED = {
    "lightning": SHELL | {"methods", "callbacks", "data", "evaluation"},
    "lightning_utilities": set(),
    "pytorch_lightning": set(),
    "hydra": SHELL,
    "omegaconf": SHELL,
    "open_clip": {"backbones", "clip_configs", "zoo", "formats"},
    "transformers": {"formats"},
    "onnx": set(),
    "onnxruntime": {"formats"},
}


def modules() -> dict[Path, str]:
    """Return each source file of the package and the first word of its module's name ('' for adamerge itself)."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        word = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        files[path] = "" if word == "__init__" else word
    return files


def imported(path: Path) -> set[str]:
    """Return the full names of everything a file imports, at any depth of its code."""
    names = set()
    package = ("adamerge", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            anchor = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (anchor, node.module) if part)
            if module == "adamerge":  # `from adamerge import constraints` names a module, `... import merge` does not
                names |= {module if alias.name in PUBLIC else f"{module}.{alias.name}" for alias in node.names}
            else:
                names.add(module)
    return names


RANK = {word: rank for rank, words in enumerate(ORDER) for word in words}
FILES = {str(path.relative_to(PACKAGE)): (path, word) for path, word in modules().items()}
PUBLIC = {alias.asname or alias.name for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
          if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_imports_of_package_point_down(file):
    path, word = FILES[file]
    own = RANK.get(word, len(ORDER))
    assert not word or word in RANK, f"{file}: give the module {word!r} a place in ORDER"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "adamerge" or not word or parts[1:2] in (["configs"], [word]):
            continue
        assert len(parts) > 1, f"{file} imports from the package's front: name the module"
        target = parts[1]
        assert target in RANK, f"{file} imports {name}, which has no place in ORDER"
        assert RANK[target] < own, f"{file} ({word}) must not import {name}: it stands above or beside it"


@pytest.mark.parametrize("file", FILES)
def test_imports_of_heavy_packages_stay_in_their_modules(file):
    path, word = FILES[file]
    for name in imported(path):
        top = name.split(".")[0]
        assert word in ALLOWED.get(top, {word}), f"{file} must not import {top}: only {sorted(ALLOWED[top])} may"


def test_import_adamerge_loads_no_heavy_package():
    code = "import sys, adamerge; adamerge.merge; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'adamerge'" in done.stdout
    for package in ("lightning", "hydra", "omegaconf", "open_clip", "torchvision", "torchmetrics", "matplotlib"):
        assert f"'{package}'" not in done.stdout, f"`import adamerge` loads {package}"


def test_help_and_usage_errors_do_not_wait_for_torch():
    code = "import sys, adamerge.commands.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    "first",
    ["import adamerge.merge", "import adamerge.model.merged_model", "from adamerge.model.merge import PullBack"],
)
def test_merge_is_the_function_whatever_is_imported_first(first):
    code = f"{first}; import adamerge; from adamerge import merge; print(merge.__name__, adamerge.merge is merge)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "merge True\n"


def test_public_names_are_exported():
    assert set(adamerge.__all__) <= PUBLIC
    assert set(adamerge.__all__) <= set(dir(adamerge))
    for name in adamerge.__all__:
        assert hasattr(adamerge, name)
    with pytest.raises(AttributeError, match="no attribute 'merged'"):
        adamerge.merged  # noqa: B018
