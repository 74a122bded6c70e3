import importlib.util
import os
import re
import subprocess
import sys

import click
import pytest

from adamerge.commands.cli import COMMANDS as NAMES
from adamerge.commands.cli import app
from adamerge.commands.run.compose import compose
from tests.support.documents import PAGES, ROOT, blocks, commands, unknown_imports, written_files

COMMANDS = {tuple(command.arguments): command for page in PAGES for command in commands(page)}  # each once
SHOWN_ONLY = {"--help", "-h", "--version"}


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


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory):
    """A folder with all files that the pages tell the reader to write, and those that they take for granted."""
    folder = tmp_path_factory.mktemp("reader")
    for page in PAGES:
        for name, text in written_files(page).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    pool = "base: base.safetensors\nexperts: {a: a.safetensors}\n"
    names = ("FILE", "pool.yaml", "pools/ours.yaml", "packed/pool.yaml", "DIR/pool.yaml")
    zoos = ("data/offline_benchmark", "data/text_zoo", "data/llm_zoo")
    for name in (*names, *(f"{zoo}/pool.yaml" for zoo in zoos)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(pool, encoding="utf-8")
    for zoo in zoos:
        (folder / zoo / "zoo.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", COMMANDS.values(), ids=str)
def test_commands_of_the_pages_exist_with_their_options(command, readers_folder, monkeypatch):
    monkeypatch.chdir(readers_folder)
    monkeypatch.delenv("ADAMERGE_DATA", raising=False)
    arguments = [word for word in command.arguments if word not in ("...", "--debug", "--quiet", "--json")]
    if not arguments or SHOWN_ONLY & set(arguments):
        assert not arguments or arguments[0] in NAMES or arguments[0] in SHOWN_ONLY
    elif arguments[0] in ("adapt", "check"):
        compose([word for word in map(first_choice, arguments[1:]) if word not in ("-m", "OVERRIDES")])
    else:
        parse(app, arguments)


def first_choice(word):
    """Return a sweep's first job: ``seed=0,1`` as ``seed=0``; and no run that would have to be resumed."""
    if re.match(r"resume=|--cfg", word):
        return "resume=null"
    word = word.replace("/home/me/configs", "my_configs")  # the reader's home is this folder
    return re.sub(r"^([\w./@]+=[^\[{,'\"]+),.*$", r"\1", word)


def parse(command, arguments):
    """Parse the options of a command, or of a command of a group."""
    while isinstance(command, click.Group):
        inner = command.get_command(click.Context(command), arguments[0])
        assert inner is not None, f"no command {arguments[0]}"
        command, arguments = inner, arguments[1:]
    with command.make_context(command.name, list(arguments)):
        pass


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_pages_compiles_and_imports_what_there_is(page):
    for line, block in blocks(page, "python"):
        compile("\n" * (line - 1) + block, page.name, "exec")
        assert unknown_imports(block) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}: no such file"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {target}: no such heading"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["objective=confidence", "objective.power=3"],
        ["granularity._target_=my_granularities.WeightsAndBiases"],
        ["granularity=pattern", r"granularity.groups={attention: \.attn\., mlp: \.mlp\.}"],
        ["transform._target_=my_transforms.Center"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_the_readme_tells_to_write_runs(overrides, readers_folder, tmp_path):
    code = "from adamerge.commands.cli import main; main()"
    few = ["steps=2", "data.limit=32", "evaluate=false", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", code, "adapt", "--config-dir", "my_configs", *overrides, *few]
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=readers_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "merged.safetensors").is_file()
