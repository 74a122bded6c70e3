"""The import direction of the package, read from its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adamerge

PACKAGE = Path(adamerge.__file__).parent

# Each package, and the packages that it may import besides errors and itself; lowest first, so that none is a circle.
# CONTRIBUTING.md says what each is. This changes only in a commit that says why.
TABLE = {
    "errors": "",
    "system": "",
    "transforms": "system",
    "checkpoints": "system",
    "data": "system",
    "pool": "checkpoints system transforms",
    "backbones": "checkpoints data system",
    "zoo": "data system",
    "model": "checkpoints data pool system transforms",
    "merges": "data model pool transforms",
    "objectives": "model",
    "results": "backbones checkpoints data model pool system",
    "methods": "data model objectives system",
    "callbacks": "checkpoints data methods model results system",
    "commands": "system transforms checkpoints data pool backbones zoo model merges objectives results methods "
    "callbacks",
}

# Heavy third-party packages, and the only packages of ours that may import them.
ALLOWED = {
    "lightning": {"data", "methods", "callbacks", "results", "commands"},
    "lightning_utilities": set(),
    "pytorch_lightning": set(),
    "hydra": {"commands"},
    "omegaconf": {"commands", "pool"},
    "open_clip": {"checkpoints", "backbones", "results", "zoo"},
    "transformers": {"backbones", "results", "zoo"},
    "onnx": set(),
    "onnxruntime": {"results"},
}


def names_of(path: Path) -> str:
    """Return the import path of a file of the package."""
    return ".".join(("adamerge", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(str(node.module))
    return names


FILES = {names_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTED = {name: imported(path) for name, path in FILES.items()}
PUBLIC = {alias.asname or alias.name for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
          if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip


def package_of(name: str) -> str:
    """Return the package, or top-level module, that a module is part of."""
    return [*name.split("."), ""][1]


def test_table_goes_down_and_names_every_package():
    lower: set[str] = set()
    for package, allowed in TABLE.items():
        assert set(allowed.split()) <= lower, f"{package} may import only what stands above it"
        lower.add(package)
    assert {package_of(name) for name in FILES if name != "adamerge"} == set(TABLE)


def test_imports_follow_the_table():
    for name, found in IMPORTED.items():
        package = package_of(name)
        for target in found:
            if package and target.startswith("adamerge."):
                allowed = {package, "errors", "configs", "__version__", *TABLE[package].split()}
                assert package_of(target) in allowed, f"{name} must not import {target}"


def test_no_files_import_one_another_in_a_circle():
    below = {name: {target for target in found if target in FILES and target not in (name, "adamerge")}
             for name, found in IMPORTED.items() if name != "adamerge"}  # fmt: skip
    for name in below:  # a package's front page counts where it is itself what is imported
        below[name] -= {target for target in below[name] if name.startswith(f"{target}.")}
    while free := [name for name, found in below.items() if not found & set(below)]:
        for name in free:
            del below[name]
    assert not below, f"these import one another: {sorted(below)}"


def test_heavy_packages_are_imported_in_few_places():
    for name, found in IMPORTED.items():
        for top in {target.split(".")[0] for target in found}:
            assert package_of(name) in ALLOWED.get(top, {package_of(name)}), f"{name} must not import {top}"


def test_import_adamerge_loads_no_heavy_package():
    code = "import sys, adamerge; adamerge.merge; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'adamerge'" in done.stdout
    for package in ("lightning", "hydra", "omegaconf", "open_clip", "torchvision", "torchmetrics", "matplotlib"):
        assert f"'{package}'" not in done.stdout, f"`import adamerge` loads {package}"


def test_help_and_usage_errors_do_not_wait_for_torch():
    code = "import sys, adamerge.commands.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_public_names_are_exported():
    assert set(adamerge.__all__) <= PUBLIC
    assert set(adamerge.__all__) <= set(dir(adamerge))
    for name in adamerge.__all__:
        assert hasattr(adamerge, name)
    with pytest.raises(AttributeError, match="no attribute 'merged'"):
        adamerge.merged  # noqa: B018
