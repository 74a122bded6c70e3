"""What a step on texts takes: tokens, and the memory of logits and of the experts' answers, before a weight is read."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from adamerge.backbones import Transformers
from adamerge.backbones.model_inputs import ModelInputs
from adamerge.commands.run.build import build
from adamerge.data.batch import Inputs
from adamerge.data.datasets import Unlabeled, length_of, split_item
from adamerge.data.texts import Text
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.model.teachers import TeacherCache
from adamerge.system.memory import free_memory

log = logging.getLogger(__name__)

_LOOKED_AT = 16  # texts of each task that are tokenized
_COUNTED = 2000  # of which it is counted how many are cut
_COPIES = 4  # of a batch's logits in a step: themselves, log-probabilities, and the gradients of both


@dataclass(frozen=True)
class _Sample:
    """Mean tokens, and rows that count, of a task's texts."""

    tokens: float
    rows: float


def forecast_texts(config: DictConfig, parts: Mapping[str, Any]) -> list[str]:
    """Say what a step takes, and list what does not fit into the memory; nothing where data are no texts.

    Args:
        config: Of the run.
        parts: What has been built of it: backbone, data and objective.
    """
    data, backbone = parts.get("data"), parts.get("backbone")
    if not isinstance(data, UnlabeledTasks) or not isinstance(backbone, Transformers):
        return []
    samples = {task: sample for task in data.streams if (sample := _look(data, backbone, task)) is not None}
    if not samples:
        return []
    batch = data.batch_size * data.batches_per_step
    tokens = sum(sample.tokens for sample in samples.values()) * batch
    said = f"A step takes {len(samples)} x {batch} texts, about {tokens:,.0f} tokens"
    classes = int(getattr(backbone.config.get_text_config(), "vocab_size", 0))
    if not classes or all(sample.rows <= 1 for sample in samples.values()):
        log.info("%s.", said)
        return []
    logits = _COPIES * 4 * classes * data.batch_size * max(sample.rows for sample in samples.values())
    answers = _answers(config, parts, data, samples, classes)
    log.info(
        "%s; logits and their gradients: about %s. The experts' answers: about %s.",
        said, _size(logits), _size(answers) if answers else "none",
    )  # fmt: skip
    if logits + answers <= free_memory():
        return []
    return [
        f"Memory: logits ({_size(logits)}) and the experts' answers ({_size(answers)}) need more than the "
        f"{_size(free_memory())} that are free. Set data.batch_size lower, backbone.positions=answer, "
        "backbone.max_length, or teachers.top_k=64."
    ]


def _answers(
    config: DictConfig,
    parts: Mapping[str, Any],
    data: UnlabeledTasks,
    samples: Mapping[str, _Sample],
    classes: int,
) -> float:
    """Return the bytes that the experts' answers take once all are kept."""
    objectives = (parts.get("objective"), *parts.get("objectives", []))
    if not any(getattr(objective, "uses_teacher", False) for objective in objectives):
        return 0.0
    cache = build(config, "teachers") if config.get("teachers") is not None else TeacherCache()
    visited = int(config.get("steps") or 0) * data.batch_size * data.batches_per_step
    kept = sum(min(len(data.streams[task]), visited) * sample.rows for task, sample in samples.items())
    return float(kept * cache.bytes_per_row(classes))


def _look(data: UnlabeledTasks, backbone: Transformers, task: str) -> _Sample | None:
    """Tokenize some texts of a task; None where inputs are no texts."""
    stream = data.streams[task]
    _tell_cut(stream, backbone, task)
    inputs = [stream[number].inputs for number in _spread(len(stream), _LOOKED_AT)]
    if any(not isinstance(sample, Mapping) or "input_ids" not in sample for sample in inputs):
        return None
    batch: Inputs = data.collate(inputs)
    valid = backbone.valid(batch)
    tokens = sum(sample["input_ids"].numel() for sample in inputs if isinstance(sample, Mapping))
    rows = len(inputs) if valid is None else int(valid.sum())
    return _Sample(tokens / len(inputs), rows / len(inputs))


def _tell_cut(stream: Unlabeled, backbone: Transformers, task: str) -> None:
    """Log how many texts to adapt on are cut."""
    items = [split_item(stream.source[number])[0] for number in _spread(length_of(stream.source), _COUNTED)]
    inputs = backbone.preprocess()
    if not isinstance(inputs, ModelInputs) or not all(isinstance(item, (str, Text)) for item in items):
        return
    if cut := inputs.count_cut(items):
        side = inputs.tokenizer.truncation_side
        log.warning(
            "data.tasks.%s: %d of %d texts are cut to %d tokens, on the %s.", task, cut, len(items), inputs.limit, side
        )


def _spread(length: int, count: int) -> range:
    """Return at most ``count`` numbers below a length, evenly apart."""
    return range(0, length, max(1, -(-length // count)))


def _size(count: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB")) if count >= s / 10), (1e3, "kB"))
    return f"{count / scale:.1f} {unit}"
