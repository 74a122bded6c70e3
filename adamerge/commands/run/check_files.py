"""Compare a run's pool, data and start with one another: the part of a check that opens files, headers only."""

import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adamerge import zoo
from adamerge.backbones import Backbone, OpenClip, Torchvision, collate_of, own_base
from adamerge.checkpoints.composed import tell_once
from adamerge.checkpoints.hub import HubReference
from adamerge.commands.run.build import build, build_init, build_tasks, check_node, pool_of
from adamerge.commands.run.stages import start_file
from adamerge.data.first_look import check_precision, check_task
from adamerge.data.task import Task
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.model import starts
from adamerge.model.coefficients import Coefficients
from adamerge.model.encoder import EncoderOptions
from adamerge.model.groups import GroupIndex
from adamerge.model.hidden_layers import select
from adamerge.model.refinement import Refinement
from adamerge.pool.headers import Headers
from adamerge.pool.options import PoolOptions, stored_dtype
from adamerge.pool.packed import PackedFile
from adamerge.results.numbers import size
from adamerge.system.memory import free_memory
from adamerge.system.reading import read_json
from adamerge.transforms import Transform

log = logging.getLogger(__name__)

_ZOO = "backbone=zoo (the demo zoo's model, meant where no backbone is named)"  # whose folder nobody has named


class Problems(list[str]):
    """Problems, in the order in which they were seen."""

    @contextmanager
    def naming(self, node: str) -> Iterator[None]:
        """Collect the errors of a block; an unexpected one is named after its node."""
        try:
            yield
        except (InputError, OSError) as error:
            self.append(" ".join(str(error).split()))
        except OmegaConfBaseException as error:
            self.append(f"{node}: {str(error).splitlines()[0]}")
        except Exception as error:
            log.debug("%s", node, exc_info=True)
            self.append(f"{node}: {type(error).__name__}: {' '.join(str(error).split())}")


def check_pool(
    config: DictConfig, backbone: Backbone, problems: list[str], transform: Transform | None = None
) -> Headers:
    """Compare the headers of the pool's files with one another, with the backbone and with the pool's options."""
    tag = getattr(backbone, "pretrained", None)
    has_base = isinstance(config.get("pool"), DictConfig) and config.pool.get("base") is not None
    base = None if has_base else own_base(backbone, download=False)
    is_here = has_base or base is not None or tag is None
    files = pool_of(config, backbone, base if is_here else Path(str(tag)))
    if not is_here:
        log.info("backbone.pretrained=%s: its weights are not in the cache; the run downloads them first.", tag)
    headers = files.headers(base_is_here=is_here, transform=transform)
    problems += headers.problems
    for remark in headers.remarks:
        tell_once(remark, logging.WARNING)
    of_base = {} if headers.source is None else {"base": headers.source}
    for find, checkpoints in (("base_problems", headers.source), ("problems", {**of_base, **headers.experts})):
        if checkpoints is not None and hasattr(backbone, find):
            said = getattr(backbone, find)(checkpoints)
            problems += [text.replace(f"backbone.model={zoo.files()}", _ZOO) for text in said]
    if files.task_vectors is not None:
        problems += _packed_problems(files.task_vectors.file, headers, files.sound_options(transform)[0])
    return headers


def _packed_problems(path: Path | HubReference, headers: Headers, options: PoolOptions) -> list[str]:
    """List how a file of packed task vectors differs from a pool, by its header; its hashes wait for the run."""
    problems = Problems()
    with problems.naming("pool.task_vectors"):
        packed = PackedFile(str(path))
        if headers.shapes:
            problems += packed.problems(headers.expert_names, headers.shapes)
        stored_dtype(options, packed, headers.compute_dtype)
    return problems


def forecast_problems(
    shapes: Mapping[str, tuple[int, ...]], folder: Path | None, options: EncoderOptions | None
) -> list[str]:
    """Say where the merged parameters are too large for the memory, or the disk of ``folder``, that is free."""
    problems = []
    model_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    options = options or EncoderOptions()
    # Beside the base nothing is merged but what is small; auto may mean that.
    merged = 0 if options.engine != "merged" else 2 * model_bytes // (1 if options.dtype is None else 2)
    if model_bytes + merged > free_memory():
        problems.append(
            f"Memory: merging needs about {size(model_bytes + merged)} (base, merged weights and their gradients) "
            f"besides activations; {size(free_memory())} are free. Close other programs, use a larger machine, or see "
            "encoder.compute_dtype and, with LoRA experts, encoder.engine=beside."
        )
    if folder is not None and shutil.disk_usage(folder).free < 2 * model_bytes:
        problems.append(f"Disk: {folder} has less than the {size(2 * model_bytes)} free that an export may need.")
    return problems


def checkpoint_problems(shapes: Mapping[str, tuple[int, ...]], options: EncoderOptions | None) -> list[str]:
    """List what ``encoder.checkpoint`` names and no merged parameter lies in; the encoder itself is not built."""
    patterns = getattr(options, "checkpoint", False)
    if isinstance(patterns, bool) or not shapes:
        return []
    parts = [name.split(".")[:-1] for name in shapes]
    modules = dict.fromkeys(".".join(part[:i]) for part in parts for i in range(1, len(part) + 1))
    problems = Problems()
    for pattern in patterns:
        with problems.naming("encoder.checkpoint"):
            select(modules, pattern, "encoder.checkpoint")
    return problems


def build_data(config: DictConfig, backbone: Backbone, problems: Problems) -> Any:
    """Build the data; where that fails, look at each task alone, so that all that is missing is said at once."""
    tasks = OmegaConf.select(config, "data.tasks", throw_on_missing=False)
    nodes = {str(name): tasks[name] for name in tasks} if isinstance(tasks, DictConfig) else {}
    if "_target_" in nodes:
        check_node(config, "data.tasks")
        nodes = {}
    complete = [name for name, node in nodes.items() if isinstance(node, DictConfig) and "_target_" in node]
    for name, node in nodes.items():
        if complete and name not in complete:  # else the data is a class of the user's, which knows what its tasks are
            raise InputError(
                f"data.tasks.{name}: expected a node with _target_, such as adamerge.data.Task, found {node}."
                f"{did_you_mean(name, complete)}"
            )
    try:
        return build_tasks(config, backbone, _preprocess(backbone))
    except InputError:
        count = len(problems)
        for name in nodes:
            with problems.naming(f"data.tasks.{name}"):
                if isinstance(task := build(config, f"data.tasks.{name}"), Task):
                    check_task(name, task, backbone.preprocess(), collate_of(backbone))
        problems[:] = dict.fromkeys(problems)  # a folder that is not there is the same problem for all
        if len(problems) > count:
            return None
        raise


def _preprocess(backbone: Backbone) -> Callable[[Any], Any] | None:
    """Return a backbone's preprocessing; open_clip, which is slow to import, waits for the first image."""
    if isinstance(backbone, OpenClip):
        return lambda image: backbone.preprocess()(image)
    return backbone.preprocess()


def check_start(config: DictConfig, parts: dict[str, Any], problems: Problems) -> None:
    """Form groups, which become the part ``index``, and initial coefficients from the shapes in the pool's headers."""
    parts["index"] = None
    headers, granularity = parts.get("headers"), parts.get("granularity")
    if headers is None or granularity is None or not headers.shapes:
        return
    start, count = start_file(config), len(problems)
    if start is not None and config.get("first_stage") is None:
        with problems.naming("init"):
            _check_start_file(start)
        return
    if start is not None and isinstance(granularity, Refinement):
        return  # its groups follow from what the first stage will learn
    with problems.naming("granularity"):
        index: object = granularity(headers.shapes)
        if not isinstance(index, GroupIndex):
            raise InputError(f"granularity: expected a GroupIndex from {type(granularity).__name__}, found {index!r}.")
        parts["index"] = index
    if len(problems) > count or "constraint" not in parts or len(headers.experts) < len(config.pool.experts):
        return
    with problems.naming("init"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says it
        init = build_init(config)
        rule = starts.start_of(init)
        if rule is None or isinstance(rule, starts.DepthStart):  # any other may read weights
            Coefficients(headers, granularity, init, parts["constraint"])


def _check_start_file(path: Path) -> None:
    """Check that a coefficients file is there and is one, as far as that shows without the pool.

    Raises:
        InputError: If not.
    """
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise InputError(f"init: {path}: no such file. Name a coefficients.json that a run has written.") from error
    except (OSError, InputError) as error:
        raise InputError(f"init: {path}: not a coefficients file: expected JSON ({error}).") from error
    if not isinstance(content, dict) or "coefficients" not in content:
        raise InputError(f"init: {path}: not a coefficients file: expected the coefficients.json of a run.")


def _check_precisions(tasks: Mapping[str, Task], headers: Headers | None, problems: Problems) -> None:
    """Refuse inputs in double precision, unless the pool computes in it."""
    if headers is None or not headers.shapes or headers.compute_dtype == torch.float64:
        return
    for name, task in tasks.items():
        with problems.naming(f"data.tasks.{name}"):
            check_precision(name, task)


def check_tasks(config: DictConfig, parts: Mapping[str, Any], problems: Problems) -> None:
    """Compare the tasks with the pool, and with what the run does with them."""
    data: Any = parts.get("data")
    backbone = parts.get("backbone")
    if not isinstance(getattr(data, "tasks", None), Mapping):
        return
    for name in data.scored if config.get("evaluate") is True and hasattr(data, "check_scored") else ():
        with problems.naming(f"data.tasks.{name}"):
            data.check_scored(name)
    _check_precisions(data.tasks, parts.get("headers"), problems)
    unseen, need = getattr(data, "unseen", ()), None
    if isinstance(backbone, Torchvision):
        need = "A torchvision backbone, whose heads are the experts' own classifiers,"
        if unseen:
            problems.append(
                f"data.unseen: {unseen[0]} would need a head, but a torchvision backbone's heads are the experts' own "
                "classifiers. Leave data.unseen out, or merge models whose heads come from class names: "
                "backbone=open_clip."
            )
    tasks = {name: task for name, task in data.tasks.items() if name not in unseen}
    scored = getattr(data, "evaluation", tasks) if config.get("evaluate") is True else tasks
    problems += [
        f"data.tasks.{name}.evaluate: expected labelled inputs to score, found none. Give data.tasks.{name}.evaluate, "
        "or set evaluate=false."
        for name in tasks
        if name not in scored
    ]
    for objective in (parts.get("objective"), *parts.get("objectives", [])):
        if need is None and getattr(objective, "uses_teacher", False):
            need = f"The objective {type(objective).__name__}"
    if isinstance(config.get("pool"), DictConfig) and "headers" in parts:
        for name, task in tasks.items():
            _check_expert(name, task, list(config.pool.experts), need, problems)


def _check_expert(name: str, task: Task, experts: Sequence[str], need: str | None, problems: list[str]) -> None:
    """Refuse a task whose expert is not in the pool, where it names one or ``need`` says what needs one."""
    expert = task.expert or name
    if expert not in experts and (task.expert or need):
        because = f" {need} needs each task's expert." if need else ""
        problems.append(
            f"data.tasks.{name}.expert: expected one of the pool's experts {shorten(experts)}, found {expert!r}."
            f"{because}{did_you_mean(expert, experts)} Name it: data.tasks.{name}.expert=NAME."
        )
