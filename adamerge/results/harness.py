"""Score an exported language model by tasks of lm-eval (the Language Model Evaluation Harness)."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adamerge.errors import InputError, did_you_mean
from adamerge.results.table import Table
from adamerge.system.progress import only_errors

FORMAT = 1
_MISSING = "--harness needs the package lm_eval: pip install 'adamerge[harness]'."


class HarnessTasks(NamedTuple):
    """Tasks of lm-eval, loaded: what its evaluation takes as tasks, and its manager of them."""

    tasks: list[Any]
    manager: Any


def load_harness_tasks(names: Sequence[str], include_path: Path | None = None) -> HarnessTasks:
    """Load lm-eval's tasks and their data.

    Task files are code: lm-eval calls the functions that they name, and may download their data.

    Args:
        names: Names of tasks, groups or tags, or task files.
        include_path: A folder of further task files.

    Raises:
        InputError: If lm-eval is not installed, a task is not known, or its data is not here.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(_MISSING) from error
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path {include_path}: expected a folder of task files, found none.")
    with _quiet():
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        _check_tasks(names, manager.all_tasks)
        try:
            loaded = manager.load(list(names))
        except Exception as error:  # of the libraries below: task files, data sets, downloads
            said = " ".join(str(error).split())
            raise InputError(
                f"--harness {','.join(names)}: cannot be loaded ({type(error).__name__}: {said[:300]}). Is its data "
                "here, or can it be downloaded?"
            ) from error
    return HarnessTasks([*loaded["tasks"].values()] if not loaded["groups"] else list(names), manager)


def score_by_harness(folder: Path, tasks: HarnessTasks) -> dict[str, Any]:
    """Score a folder that transformers loads by lm-eval's tasks, on a GPU where there is one.

    Args:
        folder: Model and tokenizer.
        tasks: As loaded.

    Returns:
        The content of ``harness.json``: task to metric to its value and standard error, in its unit, and direction.
    """
    import lm_eval

    model_args = {"pretrained": str(folder), "trust_remote_code": False, "dtype": "auto"}
    with _quiet():
        results = lm_eval.simple_evaluate(
            "hf", model_args, tasks=tasks.tasks, batch_size=16, device="cuda" if torch.cuda.is_available() else "cpu",
            log_samples=False, task_manager=tasks.manager,
        )  # fmt: skip
    return {"format": FORMAT, "lm_eval": lm_eval.__version__, "tasks": _scores(results)}


def harness_table(content: Mapping[str, Any]) -> Table:
    """Return the table of a ``harness.json``."""
    lines = [
        [task, metric, f"{score['value']:.4g}", "" if score["stderr"] is None else f"±{score['stderr']:.2g}",
         {True: "higher", False: "lower", None: ""}[score["higher_is_better"]]]
        for task, metrics in content["tasks"].items()
        for metric, score in metrics.items()
    ]  # fmt: skip
    caption = f"By lm-eval {content['lm_eval']}, in its units; ±: its standard error."
    return Table(["task", "metric", "value", "±", "better"], lines, caption=caption)


def _check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a task that is neither known by name nor a file."""
    for task in tasks:
        if task not in known and not (task.endswith((".yaml", ".yml")) and Path(task).is_file()):
            raise InputError(
                f"--harness: no task {task!r}.{did_you_mean(task, known)} `lm_eval ls tasks` lists those of lm-eval; "
                "name the folder of your own with --include-path DIR."
            )


def _scores(results: Mapping[str, Any] | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the metrics by task, with their filter where it is not lm-eval's plain one."""
    content: dict[str, dict[str, dict[str, Any]]] = {}
    for task, values in (results or {"results": {}})["results"].items():
        directions = (results or {}).get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            content.setdefault(task, {})[metric if kind == "none" else f"{metric} ({kind})"] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, (int, float)) else None,
                "higher_is_better": directions.get(metric),
            }
    return content


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave progress and remarks of lm-eval out, and forbid tokenizers to warn of forks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with only_errors("lm_eval"):
            yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
