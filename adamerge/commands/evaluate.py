"""``evaluate``: the merged checkpoint of a run on its tasks' labelled data, or by lm-eval.

What imports torch is imported where it is used, so that options that are wrong do not wait for it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adamerge.commands.terminal import json_option, out, print_json, trust_option
from adamerge.errors import InputError

if TYPE_CHECKING:
    from adamerge.commands.run.assembly import Assembly
    from adamerge.data.corruptions import Corruption
    from adamerge.results.scoring import MergeResult


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="File to score instead of the run's export.")
@click.option("--corruptions", help="Score under corruptions too: all, or NAME[:SEVERITY],...")
@click.option("--severity", type=click.IntRange(1, 5), default=5, show_default=True, help="Where a name has none.")
@click.option("--harness", metavar="TASKS", help="Score a language model by tasks of lm-eval: NAME or FILE.yaml,...")
@click.option("--include-path", type=click.Path(path_type=Path), help="With --harness: a folder of your task files.")
@trust_option
@json_option
def evaluate(
    run_dir: Path,
    checkpoint: Path | None,
    corruptions: str | None,
    severity: int,
    harness: str | None,
    include_path: Path | None,
    trust_code: bool,
    as_json: bool,
) -> None:
    """Score the merged checkpoint of a run on its tasks' labelled data, beside experts and baselines.

    \b
    adamerge evaluate RUN_DIR                                   as they are
    adamerge evaluate RUN_DIR --corruptions all                 under seven corruptions (docs/robustness.md)
    adamerge evaluate RUN_DIR --corruptions gaussian_noise:3,pixelate
    adamerge evaluate RUN_DIR --harness hellaswag,arc_easy      by lm-eval (pip install "adamerge[harness]")
    adamerge evaluate RUN_DIR --harness mine --include-path DIR by a task of your own, DIR/mine.yaml

    With --harness, RUN_DIR is a run, a merge, or a folder that transformers loads; lm-eval calls functions that task
    files name.
    """  # noqa: D301
    if include_path is not None and harness is None:
        raise InputError("--include-path: goes with --harness TASKS.")
    if harness is not None:
        if checkpoint or corruptions:
            raise InputError("--harness: goes without --checkpoint and --corruptions; name the folder of the model.")
        _evaluate_by_harness(run_dir.absolute(), harness, include_path, trust_code=trust_code, as_json=as_json)
        return
    chosen = None if corruptions is None else (corruptions, severity)
    _evaluate_run(run_dir.absolute(), checkpoint, chosen, trust_code=trust_code, as_json=as_json)


def _evaluate_run(
    run_dir: Path, checkpoint: Path | None, corruptions: tuple[str, int] | None, *, trust_code: bool, as_json: bool
) -> None:
    """Score a run's export, or another file as if it were that; ``corruptions`` are their names and severity."""
    from adamerge.callbacks.elapsed import seconds_of
    from adamerge.commands.run.assembly import assemble
    from adamerge.commands.run.folder import LAST, load_config
    from adamerge.commands.run.processes import device_of
    from adamerge.commands.run.recorded import check_config, check_pool
    from adamerge.commands.run.start_rules import is_merged
    from adamerge.data.corruptions import read_corruptions
    from adamerge.results.evaluation import summary
    from adamerge.results.scoring import MergeResult, score_run
    from adamerge.results.summary_table import table
    from adamerge.system.files import save_json

    chosen = [] if corruptions is None else read_corruptions(*corruptions)
    file = (checkpoint or run_dir / "merged.safetensors").absolute()
    config = load_config(run_dir, trust_code=trust_code)
    check_config(config, run_dir)
    assembly = assemble(config)
    check_pool(assembly.pool.hashes(), run_dir)
    assembly.model.to_device(device_of(config))
    path = run_dir / "summary.json"
    before = {} if checkpoint or not path.is_file() else _row_before(path, str(config.name))
    name = _row_name(file) if checkpoint else str(config.name)
    seconds = 0.0 if checkpoint else before.get("seconds") or seconds_of(run_dir / LAST)
    result = MergeResult(name, file, seconds, int(config.seed), before.get("uses_labels", False))
    if chosen:
        _evaluate_corrupted(run_dir, assembly, result, chosen, as_json=as_json)
        return
    options = {"references": True, "from_start": is_merged(config)}
    rows = score_run(assembly.model, assembly.data, result, assembly.batch_norm, **options)
    content = summary(rows, assembly.data.protocol, assembly.data.unreadable_evaluation())
    if not checkpoint:
        save_json(content, path)
    if as_json:
        print_json(content)
    else:
        out.print(table(content).terminal(out.width))


def _evaluate_by_harness(
    folder: Path, tasks: str, include_path: Path | None, *, trust_code: bool, as_json: bool
) -> None:
    """Score a folder that transformers loads, or one made of a run for the while; the result goes beside it."""
    import tempfile
    from functools import partial

    from adamerge.commands.run.backbone_of import backbone_of
    from adamerge.results.formats import export_as, open_merged
    from adamerge.results.harness import harness_table, load_harness_tasks, score_by_harness
    from adamerge.system.files import save_json

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    backbone = partial(backbone_of, trust_code=trust_code)
    is_exported = (folder / "config.json").is_file()
    if not is_exported:
        open_merged(folder, backbone)  # what is no merge is refused before lm-eval is loaded, tasks before an export
    loaded = load_harness_tasks(names, None if include_path is None else include_path.absolute())
    with tempfile.TemporaryDirectory() as temporary:
        model = folder if is_exported else Path(temporary) / "model"
        if not is_exported:
            export_as(folder, "hf", model, backbone)
        content = score_by_harness(model, loaded)
    save_json(content, folder / "harness.json")
    if as_json:
        print_json(content)
    else:
        out.print(harness_table(content).terminal(out.width))


def _row_before(path: Path, name: str) -> dict[str, Any]:
    """Return what an earlier summary says of a run; {} where it has no such row.

    Raises:
        InputError: If it is no summary.
    """
    from adamerge.system.reading import as_written, read_json_mapping

    with as_written(path):
        row = read_json_mapping(path)["rows"].get(name, {})
        return {"seconds": float(row.get("seconds") or 0), "uses_labels": bool(row.get("uses_labels", False))}


def _row_name(checkpoint: Path) -> str:
    """Return a foreign checkpoint's row name: its file's, after its folder's where a reference or run has that name."""
    from adamerge.results.scoring import REFERENCES

    stem = checkpoint.stem
    return f"{checkpoint.parent.name}/{stem}" if stem in (*REFERENCES, "merged") else stem


def _evaluate_corrupted(
    run_dir: Path, assembly: "Assembly", result: "MergeResult", corruptions: "list[Corruption]", *, as_json: bool
) -> None:
    """Score under corruptions; files go beside the run's, named after a foreign checkpoint."""
    from adamerge.results.robustness import save_robustness, score_corruptions, table

    content = score_corruptions(assembly.model, assembly.data, assembly.batch_norm, result, corruptions)
    is_own = result.file == run_dir / "merged.safetensors"
    stem = "robustness" if is_own else "robustness_" + result.name.replace("/", "_")
    save_robustness(content, run_dir, stem)
    if as_json:
        print_json(content)
        return
    out.print(table(content).terminal())
    for suffix in ("json", "png"):
        if (path := run_dir / f"{stem}.{suffix}").is_file():
            out.print(str(path), highlight=False)
