"""``evaluate`` and ``export``: what is done with the folder of a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adamerge.backbones import Backbone, OpenClip, Torchvision
from adamerge.checkpoints.model_folder import OPEN_CLIP_CONFIG
from adamerge.commands.run import folder as run_folder
from adamerge.commands.run.build import build
from adamerge.commands.run.compose import compose
from adamerge.commands.run.imports import announce, check_targets
from adamerge.commands.terminal import json_option, out, print_files, print_json
from adamerge.errors import InputError

if TYPE_CHECKING:
    from adamerge.commands.run.run import Assembly
    from adamerge.data.corruptions import Corruption
    from adamerge.results.scoring import Made


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="File to score instead of the run's export.")
@click.option("--corruptions", help="Score under corruptions too: all, or NAME[:SEVERITY],...")
@click.option("--severity", type=click.IntRange(1, 5), default=5, show_default=True, help="Where a name has none.")
@json_option
def evaluate(run_dir: Path, checkpoint: Path | None, corruptions: str | None, severity: int, as_json: bool) -> None:
    """Score the merged checkpoint of a run on its tasks' labelled images, beside experts and baselines.

    \b
    adamerge evaluate RUN_DIR                                   as they are
    adamerge evaluate RUN_DIR --corruptions all                 under seven corruptions (docs/robustness.md)
    adamerge evaluate RUN_DIR --corruptions gaussian_noise:3,pixelate
    """  # noqa: D301
    from adamerge.callbacks.elapsed import seconds_of
    from adamerge.commands.run import folder as run_folder
    from adamerge.commands.run import run as launch
    from adamerge.data.corruptions import read_corruptions
    from adamerge.results.evaluation import read_summary, summary, table, write_summary
    from adamerge.results.scoring import Made, score_run

    chosen = [] if corruptions is None else read_corruptions(corruptions, severity)
    run_dir = run_dir.absolute()
    file = (checkpoint or run_dir / "merged.safetensors").absolute()
    config = run_folder.load_config(run_dir)
    assembly = launch.assemble(config)
    old = read_summary(run_dir / "summary.json")["rows"] if (run_dir / "summary.json").is_file() else {}
    before = {} if checkpoint else old.get(str(config.name), {})
    name = _row_name(file) if checkpoint else str(config.name)
    seconds = 0.0 if checkpoint else before.get("seconds") or seconds_of(run_dir / run_folder.LAST)
    made = Made(name, file, seconds, int(config.seed), before.get("uses_labels", False))
    if chosen:
        _evaluate_corrupted(run_dir, assembly, made, chosen, as_json=as_json)
        return
    rows = score_run(assembly.model, assembly.data, made, assembly.batch_norm, references=True)
    protocol = assembly.data.protocol
    left_out = assembly.data.unreadable_evaluation()
    path = run_dir / "summary.json"
    content = summary(rows, protocol, left_out) if checkpoint else write_summary(rows, protocol, path, left_out)
    if as_json:
        print_json(content)
    else:
        out.print(table(content, width=out.width))


def _row_name(checkpoint: Path) -> str:
    """Return the name of a foreign checkpoint's row: with its folder's, where its own is a reference's or any run's."""
    from adamerge.results.scoring import REFERENCES

    stem = checkpoint.stem
    return f"{checkpoint.parent.name}/{stem}" if stem in (*REFERENCES, "merged") else stem


def _evaluate_corrupted(
    run_dir: Path, assembly: "Assembly", made: "Made", corruptions: "list[Corruption]", *, as_json: bool
) -> None:
    """Score under corruptions; files go beside the run's, named after a foreign checkpoint."""
    from adamerge.results.robustness import save_robustness, score_corruptions, table

    content = score_corruptions(assembly.model, assembly.data, assembly.batch_norm, made, corruptions)
    own = made.file == run_dir / "merged.safetensors"
    stem = "robustness" if own else "robustness_" + made.name.replace("/", "_")
    save_robustness(content, run_dir, stem)
    if as_json:
        print_json(content)
        return
    out.print(table(content))
    for suffix in ("json", "png"):
        if (path := run_dir / f"{stem}.{suffix}").is_file():
            out.print(str(path), highlight=False)


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), required=False)
@click.option("--coefficients", type=click.Path(path_type=Path), help="Replay this coefficients.json.")
@click.option("--base", type=click.Path(path_type=Path), help="Without RUN_DIR: the base checkpoint.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="Without RUN_DIR: an expert; repeat.")
@click.option("--pool", help="Without RUN_DIR: instead, a pool by name, or a pool file.")
@click.option("--prefix", default=None, help="Without RUN_DIR: key prefix of the encoder, such as visual.")
@click.option("--output", "--out", type=click.Path(path_type=Path), help="Folder; default RUN_DIR.")
@click.option("--to", "target", type=click.Choice(["open_clip", "hf", "torchvision", "onnx"]), help="Another format.")
@click.option("--task", help="With --to torchvision: the task whose classifier to write; default the base's.")
@click.option("--model", help="With --to: what RUN_DIR merges, where it does not say; of torchvision NAME[:HEAD].")
@click.option("--upload", metavar="ORG/NAME", help="With --to: upload to the Hub, into a private repository.")
@click.option("--public", is_flag=True, help="With --upload: let it be public.")
@json_option
def export(
    run_dir: Path | None,
    coefficients: Path | None,
    base: Path | None,
    experts: tuple[str, ...],
    pool: str | None,
    prefix: str | None,
    output: Path | None,
    target: str | None,
    task: str | None,
    model: str | None,
    upload: str | None,
    public: bool,
    as_json: bool,
) -> None:
    """Write the merged checkpoint of a run's last step, replay a coefficients file, or change the format.

    \b
    adamerge export RUN_DIR                                  an interrupted run's last checkpoint
    adamerge export RUN_DIR --coefficients FILE --output DIR
    adamerge export --pool NAME --coefficients FILE --output DIR
    adamerge export --base FILE --expert NAME=FILE ... --coefficients FILE --output DIR
    adamerge export RUN_DIR --to hf --out DIR                what transformers loads; or open_clip, torchvision, onnx
    adamerge export RUN_DIR --to open_clip --out DIR --upload ORG/NAME

    With --to, RUN_DIR is a run or a merge that is complete. The new folder holds model, heads, coefficients and a
    model card, and is loaded back by the other library and compared before the command ends (docs/models.md).
    """  # noqa: D301
    from adamerge.commands import replay
    from adamerge.commands.run.named_pools import chosen_pool

    given = {"--task": task, "--model": model, "--upload": upload, "--public": public or None}
    others = [option for option, value in given.items() if value is not None]
    if target is None and others:
        raise InputError(f"{others[0]}: goes with --to FORMAT; see adamerge export --help.")
    if public and upload is None:
        raise InputError("--public: goes with --upload ORG/NAME.")
    if target is not None:
        if run_dir is None or coefficients or base or experts or pool or prefix:
            raise InputError(f"--to {target}: give RUN_DIR and --out FOLDER; first export what is to be converted.")
        if output is None:
            raise InputError(f"--to {target}: give --out FOLDER, a new one.")
        _export_as(run_dir, target, output, as_json, model=model, task=task, repository=upload, public=public)
        return
    if run_dir is not None:
        files = replay.export_run(run_dir, coefficients, output or run_dir)
    elif coefficients is None or output is None or (pool is None and (base is None or not experts)):
        raise InputError("export: give RUN_DIR, or --coefficients, --output, and --pool or both --base and --expert.")
    else:
        files = replay.export_files(chosen_pool("export", base, experts, pool, prefix), coefficients, output)
    print_files(files, as_json)


def _export_as(run_dir: Path, target: str, output: Path, as_json: bool, *, model: str | None, **options: Any) -> None:
    """Write another library's format, and list what there is."""
    from adamerge.results.formats import export_as

    output = output.absolute()  # a run's configuration may move this process
    known = backbone_of if model is None else lambda folder, recipe: _named(model, target)
    files, address = export_as(run_dir, target, output, known, **options)
    if as_json:
        print_json({"files": [str(path) for path in files], "address": address})
        return
    for path in files:
        out.print(str(path), highlight=False)
    click.echo(address or str(output))


def backbone_of(folder: Path, recipe: Mapping[str, Any]) -> Backbone:
    """Return the backbone that a merge's own files name: configuration, recipe, or open_clip's sidecar.

    Relative paths of a run's configuration start from the folder that it was launched in; this process moves there.

    Raises:
        InputError: If the folder does not say what model it is.
    """
    if (folder / run_folder.CONFIG_FILE).is_file():
        return _built(run_folder.load_config(folder), folder)
    if isinstance(recipe.get("config"), Mapping):  # of an export on request
        _go_to(recipe["config"].get("cwd"))
        return _built(OmegaConf.create({"backbone": recipe["config"].get("backbone")}), folder)
    if recipe.get("overrides"):  # of a merge that read data
        _go_to(recipe.get("cwd"))
        return _built(compose([str(override) for override in recipe["overrides"]]), folder)
    if (folder / "open_clip" / OPEN_CLIP_CONFIG).is_file():
        return OpenClip(str(folder / "open_clip"))
    raise _unknown(folder)


def _built(config: DictConfig, folder: Path) -> Backbone:
    """Build the backbone of a folder, which may be another's: what that imports is checked and logged first."""
    node = config.get("backbone")
    if node is None:
        raise _unknown(folder)
    try:
        imports = {"backbone": OmegaConf.to_container(node, resolve=True)}
    except OmegaConfBaseException as error:
        raise InputError(f"backbone: {str(error).splitlines()[0]}") from error
    check_targets(imports)
    announce(imports)
    backbone: Backbone = build(config, "backbone")
    return backbone


def _unknown(folder: Path) -> InputError:
    return InputError(
        f"{folder}: does not say which model it is a merge of. Name it: --model NAME, or a folder with an "
        f"{OPEN_CLIP_CONFIG}."
    )


def _go_to(folder: Any) -> None:
    if folder and Path(str(folder)).is_dir():
        os.chdir(str(folder))


def _named(model: str, target: str) -> Backbone:
    """Return the backbone that ``--model`` names: open_clip's, but for torchvision's format."""
    if target != "torchvision":
        return OpenClip(model)
    name, _, head = model.partition(":")
    return Torchvision(name, **({"head": head} if head else {}))
