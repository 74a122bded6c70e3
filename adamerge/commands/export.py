"""``export``: a run's last checkpoint, a coefficients file, or a merge in another library's format."""

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from omegaconf import DictConfig
from torch import Tensor

from adamerge.backbones import Backbone
from adamerge.callbacks.checkpoint_io import AtomicCheckpointIO
from adamerge.commands.run.assembly import Assembly, assemble, build_pool
from adamerge.commands.run.backbone_of import backbone_of, named_backbone
from adamerge.commands.run.build import build
from adamerge.commands.run.folder import LAST, load_config, look_at_config, plain
from adamerge.commands.run.imports import check_own
from adamerge.commands.run.named_pools import chosen_pool
from adamerge.commands.run.recorded import check_config, check_pool, check_start
from adamerge.commands.run.run import head_info
from adamerge.commands.terminal import echo, json_option, pool_options, print_files, print_json, trust_option
from adamerge.errors import InputError
from adamerge.model.batch_norm import FILE, average, average_for, load_statistics
from adamerge.model.coefficients import Coefficients, load_coefficients
from adamerge.pool.pool import ExpertPool
from adamerge.pool.pool_file import PoolFiles
from adamerge.results.export import HEADS, RECIPE, digest
from adamerge.results.export import export as write_export
from adamerge.results.formats import export_as
from adamerge.results.formats.export import check_new
from adamerge.results.formats.merged import BackboneOf
from adamerge.results.formats.peft import write_adapter
from adamerge.system.files import atomic_folder, atomic_path

log = logging.getLogger(__name__)

COEFFICIENTS = "coefficients.json"
TARGETS = ("open_clip", "hf", "torchvision", "onnx", "peft")


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), required=False)
@click.option("--coefficients", type=click.Path(path_type=Path), help="Replay this coefficients.json.")
@pool_options()
@click.option("--out", "--output", "output", type=click.Path(path_type=Path), help="Folder; default RUN_DIR.")
@click.option("--to", "target", type=click.Choice(TARGETS), help="Another format.")
@click.option("--task", help="With --to torchvision or hf: the task whose classifier to write; default the base's.")
@click.option("--model", help="With --to: what RUN_DIR merges, where it does not say; of torchvision NAME[:HEAD].")
@click.option("--rank", type=click.IntRange(1), help="With --to peft: most ranks of a module; default all, exact.")
@click.option("--upload", metavar="ORG/NAME", help="With --to: upload to the Hub, into a private repository.")
@click.option("--public", is_flag=True, help="With --upload: let it be public.")
@trust_option
@json_option
def export(
    run_dir: Path | None,
    coefficients: Path | None,
    output: Path | None,
    as_json: bool,
    target: str | None,
    task: str | None,
    model: str | None,
    rank: int | None,
    upload: str | None,
    public: bool,
    trust_code: bool,
    **pool: Any,
) -> None:
    """Write the merged checkpoint of a run's last step, replay a coefficients file, or change the format.

    \b
    adamerge export RUN_DIR                                  an interrupted run's last checkpoint
    adamerge export RUN_DIR --coefficients FILE --out DIR
    adamerge export --pool NAME --coefficients FILE --out DIR
    adamerge export --base FILE --expert NAME=FILE ... --coefficients FILE --out DIR
    adamerge export RUN_DIR --to hf --out DIR                what transformers loads; or open_clip, torchvision, onnx
    adamerge export RUN_DIR --to peft --out DIR              of LoRA experts: one adapter
    adamerge export RUN_DIR --to open_clip --out DIR --upload ORG/NAME

    With --to, RUN_DIR is a run or a merge that is complete. The new folder holds model, heads, coefficients and a
    model card, and is loaded back by the other library and compared before the command ends (docs/models.md); of
    peft it holds the adapter, heads and coefficients.
    """  # noqa: D301
    of_format = {"--task": task, "--model": model, "--rank": rank, "--upload": upload, "--public": public or None}
    if target is not None:
        if run_dir is None or coefficients or any(pool.values()):
            raise InputError(f"--to {target}: give RUN_DIR and --out FOLDER; first export what is to be converted.")
        _export_to(target, run_dir, output, of_format, as_json=as_json, trust_code=trust_code)
        return
    for option, value in of_format.items():
        if value is not None:
            raise InputError(f"{option}: goes with --to {'peft' if option == '--rank' else 'FORMAT'}; see --help.")
    if run_dir is not None:
        files = export_run(run_dir, coefficients, output or run_dir, trust_code=trust_code)
    elif coefficients is None or output is None or not any(pool.values()):
        raise InputError("export: give RUN_DIR, or --coefficients, --out, and --pool or both --base and --expert.")
    else:
        files = export_files(chosen_pool("export", **pool), coefficients, output)
    print_files(files, as_json)


def _export_to(
    target: str, run_dir: Path, output: Path | None, options: Mapping[str, Any], *, as_json: bool, trust_code: bool
) -> None:
    """Write a merge in another format, and print what was written; ``options`` are the command's, by name."""
    if output is None:
        raise InputError(f"--to {target}: give --out FOLDER, a new one.")
    taken = ("--rank",) if target == "peft" else ("--task", "--model", "--upload", "--public")
    for option, value in options.items():
        if value is not None and option not in taken:
            raise InputError(f"{option}: not with --to {target}.")
    if options["--public"] and options["--upload"] is None:
        raise InputError("--public: goes with --upload ORG/NAME.")
    output = output.absolute()  # a run's configuration may move this process
    if target == "peft":
        files = export_adapter(run_dir, output, rank=options["--rank"], trust_code=trust_code)
        address = None
    else:
        find: BackboneOf = partial(backbone_of, trust_code=trust_code)
        if options["--model"] is not None:
            find = lambda *_: named_backbone(options["--model"], target)  # noqa: E731
        files, address = export_as(
            run_dir, target, output, find, task=options["--task"], repository=options["--upload"],
            public=bool(options["--public"]),
        )  # fmt: skip
    if as_json:
        print_json({"files": [str(path) for path in files], "address": address})
    else:
        echo("\n".join([*map(str, files), address or str(output)]))


def export_run(run_dir: Path, coefficients: Path | None, output: Path, *, trust_code: bool = False) -> dict[str, Path]:
    """Export a run from its last checkpoint, or replay given coefficients.

    Args:
        run_dir: The folder of the run, for its configuration.
        coefficients: A ``coefficients.json`` of the same pool: no image is read, and the heads are the run's own, if
            it has exported any. Default the run's last checkpoint, with heads built anew. Where the run recalibrates
            BatchNorm layers, the statistics beside the file are taken, or images are read if there are none.
        output: Where to write; the run's own folder only while it has no export.
        trust_code: See :func:`~adamerge.commands.run.folder.load_config`.

    Raises:
        InputError: If the folder is not a run's, has no checkpoint, or the coefficients are another pool's.
    """
    run_dir, output = run_dir.absolute(), output.absolute()
    coefficients = coefficients.absolute() if coefficients else None
    config = load_config(run_dir, trust_code=trust_code)
    check_config(config, run_dir)
    if output.resolve() == run_dir.resolve() and (run_dir / RECIPE).exists():  # which is written last
        raise InputError(f"{run_dir} has an export already, which would be replaced. Give --out.")
    source = coefficients or run_dir / LAST
    recipe = {"config": plain(config), "replayed": str(source)}
    if coefficients is None:
        assembly = assemble(config)
        check_pool(assembly.pool.hashes(), run_dir)
        check_start(assembly.start.get("start", {}), run_dir)
        values = assembly.model.coefficients  # frozen groups keep their initial value; the checkpoint lacks them
        _restore(values, source)
        return write_export(
            assembly.pool,
            values,
            output,
            statistics=_final(assembly),
            heads=assembly.heads,
            head_info=head_info(assembly.data),
            sidecar=assembly.backbone.sidecar(),
            recipe=recipe,
        )
    backbone, pool, values = _replayed(config, coefficients)
    statistics = _statistics_beside(coefficients, values)
    if statistics is None:
        statistics = _statistics_anew(config, backbone, pool, values)
    heads = {"heads": output / HEADS} if (run_dir / HEADS).is_file() else {}
    for path in heads.values():
        with atomic_path(path) as temporary:
            shutil.copyfile(run_dir / HEADS, temporary)
    files = write_export(pool, values, output, statistics=statistics, sidecar=backbone.sidecar(), recipe=recipe)
    return {**files, **heads}


def _replayed(
    config: DictConfig, coefficients: Path, run_dir: Path | None = None
) -> tuple[Backbone, ExpertPool, Coefficients]:
    """Return a run's backbone and pool, held against ``run_dir``, and coefficients from a file; no data is built."""
    backbone = build(config, "backbone")
    pool = build_pool(config, backbone, for_export=True)
    if run_dir is not None:
        check_pool(pool.hashes(), run_dir)
    return backbone, pool, load_coefficients(coefficients, pool, build(config, "granularity"))


def export_adapter(run_dir: Path, output: Path, *, rank: int | None = None, trust_code: bool = False) -> list[Path]:
    """Write the merge of a complete run of LoRA experts as one adapter; return the files.

    Args:
        run_dir: The folder of the run.
        output: A new folder.
        rank: Most ranks of a module.
        trust_code: See :func:`~adamerge.commands.run.folder.load_config`.

    Raises:
        InputError: If the folder is no complete run's, the merge is no adapter, or ``output`` has files.
    """
    run_dir = run_dir.absolute()
    check_new(output)
    coefficients = run_dir / COEFFICIENTS
    if not coefficients.is_file():
        raise InputError(f"{coefficients}: no such file. --to peft takes the folder of a complete run of LoRA experts.")
    config = load_config(run_dir, trust_code=trust_code)
    check_config(config, run_dir)
    backbone, pool, values = _replayed(config, coefficients, run_dir)
    if _statistics_beside(coefficients, values):
        raise InputError("--to peft: an adapter holds no BatchNorm statistics, as this run does. Use another format.")
    with atomic_folder(output) as temporary:
        adapter = write_adapter(pool, values, backbone.encoder(), temporary, rank=rank)
        for kept in (coefficients, run_dir / HEADS):
            if kept.is_file():
                shutil.copyfile(kept, temporary / kept.name)
    largest = max(adapter.ranks.values())
    of_cut = f", without {100 * adapter.error:.2g} % of the update's norm" if adapter.error else ", exact"
    log.info("An adapter of %d modules, rank %d at most%s", len(adapter.ranks), largest, of_cut)
    return sorted(output.iterdir())


def pool_of(run_dir: Path) -> ExpertPool:
    """Open the pool of a run, to look at; its experts stay in their files where they can.

    The folder may be another's, so that nothing but adamerge's own backbones and transforms is built, no folder is made
    and nothing is downloaded.

    Raises:
        InputError: If the folder is not a run's, names code of others, or the files do not fit.
    """
    config = look_at_config(run_dir.absolute())
    for node in ("backbone", "transform"):
        if config.get(node) is not None:
            check_own({node: config[node]})
    if "head_cache" in config.backbone:
        config.backbone.head_cache = "off"
    return build_pool(config, build(config, "backbone"), download=False)


def export_files(files: PoolFiles, coefficients: Path, output: Path) -> dict[str, Path]:
    """Export from files alone; BatchNorm statistics are those beside the coefficients, or else the base's.

    Raises:
        InputError: If anything does not fit.
    """
    files.verify()
    pool = files.open_mapped(duplicates="allow")
    values = load_coefficients(coefficients, pool)
    statistics = _statistics_beside(coefficients, values)
    return write_export(pool, values, output, statistics=statistics, recipe={"replayed": str(coefficients)})


def _statistics_beside(path: Path, coefficients: Coefficients) -> dict[str, Tensor] | None:
    """Return the BatchNorm statistics that were exported with a coefficients file; None where there are none."""
    beside = path.parent / FILE
    if not beside.is_file():
        return None
    statistics, facts = load_statistics(beside)
    if facts.get("coefficients") != digest(coefficients):
        raise InputError(
            f"{beside}: expected the statistics of {path.name}, found those of other coefficients. Remove it, or "
            "replay the coefficients that it was written with."
        )
    return statistics


def _statistics_anew(
    config: DictConfig, backbone: Backbone, pool: ExpertPool, coefficients: Coefficients
) -> dict[str, Tensor]:
    """Return the BatchNorm statistics of coefficients; images are read only where there are layers to recalibrate."""
    policy = build(config, "batch_norm")
    if policy.policy == "base" or not average(pool):
        return {}
    if not policy.needs_data:
        return average_for(backbone.encoder(), pool)
    assembly = assemble(config)
    assembly.model.coefficients = coefficients
    return _final(assembly)


def _final(assembly: Assembly) -> dict[str, Tensor]:
    """Return the BatchNorm statistics of a run's coefficients."""
    if not assembly.batch_norm.applies(assembly.model):
        return {}
    with torch.no_grad():
        return assembly.batch_norm.final(assembly.model, assembly.model.merge(), assembly.data)


def _restore(coefficients: Coefficients, checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such checkpoint. Has the run saved one yet? Give --coefficients instead.")
    state = AtomicCheckpointIO().load_checkpoint(checkpoint)["state_dict"]
    if any(key.startswith("trained.") for key in state):
        raise InputError(
            f"{checkpoint}: the run trains all weights (method=distillation): it has no coefficients to export. It "
            "exports its weights when it ends: go on with adamerge adapt resume=RUN_DIR."
        )
    raw = state.get("model.coefficients.raw")
    if not isinstance(raw, Tensor) or not raw.is_floating_point() or not raw.isfinite().all():
        raise InputError(f"{checkpoint}: expected finite coefficients in it, found none. Is it a run's checkpoint?")
    if raw.shape != coefficients.raw.shape:
        raise InputError(
            f"{checkpoint}: expected coefficients of shape {tuple(coefficients.raw.shape)}, found {tuple(raw.shape)}."
        )
    with torch.no_grad():
        coefficients.raw.copy_(raw)
