import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_reference_is_what_the_yaml_files_say():
    page = load(ROOT / "docs" / "configuration.py").page()
    assert page == (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), (
        "docs/configuration.md is out of date: run python docs/configuration.py"
    )
