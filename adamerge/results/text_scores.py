"""Score language models on texts: right choices, greedy answers, perplexity, and agreement with the expert.

Legend: B texts, S positions, V tokens, N rows that count.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from adamerge.data.batch import Inputs, Outputs, to
from adamerge.data.datasets import length_of, split_item
from adamerge.data.first_look import measure
from adamerge.data.texts import Text, Texts
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.data.unreadable import in_whole
from adamerge.errors import InputError
from adamerge.model.answers import Answers, coarsen, shorten_answers
from adamerge.model.merged_model import MergedModel
from adamerge.results.task_score import Measure, TaskScore

log = logging.getLogger(__name__)

KEPT = 64  # classes of an expert's answer; a divergence from it is a lower bound where there are more
OutputsOf = Callable[[Inputs, str], Outputs]


def is_text(data: UnlabeledTasks, task: str) -> bool:
    """Whether a task's items to score are texts; none is read."""
    source = in_whole(data.scored[task].source, 0)[0]
    items = source if isinstance(source, (list, tuple)) else ()
    return isinstance(source, Texts) or (len(items) > 0 and isinstance(split_item(items[0])[0], Text))


def texts_of(data: UnlabeledTasks, task: str) -> list[Text]:
    """Return a task's texts to score."""
    source: Any = data.scored[task].source
    return [split_item(source[index])[0] for index in range(length_of(source))]


def next_tokens(outputs: Outputs, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return what a language model says of the next tokens: of the answers or, where there are none, of all.

    Returns:
        Logits (N, V), the tokens (N,) and how many rows each text has (B,); None for a network that predicts none.
    """
    if not isinstance(inputs, Mapping) or outputs.logits.ndim != 3:
        return None
    if "_targets" in inputs:  # of a decoder
        targets, mask = inputs["_targets"], inputs["_targets"] >= 0
        logits = outputs.logits
    elif "_answer" in inputs:
        ids, logits = inputs["input_ids"], outputs.logits[:, :-1]
        present = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        answer = inputs["_answer"].bool() & present
        counted = torch.where(answer.any(1, keepdim=True), answer, present)
        targets, mask = ids[:, 1:], counted[:, 1:] & present[:, :-1]
    else:
        return None
    return logits[mask], targets[mask], mask.sum(1)


@dataclass
class TextTotals:
    """Sums over the texts of a task, on the CPU."""

    predicts: bool = False  # whether the network says tokens at all, if not of these texts
    nats: float = 0.0
    tokens: int = 0
    right: Tensor = field(
        default_factory=lambda: torch.zeros(0)
    )  # share of the next tokens of each text that the model would have said
    divergence: float = 0.0
    rows: int = 0
    agreed: Tensor = field(default_factory=lambda: torch.zeros(0))  # whether each row names the expert's class

    def add(self, outputs: Outputs, inputs: Inputs) -> None:
        """Count the next tokens of a batch."""
        said = next_tokens(outputs, inputs)
        if said is None:
            return
        self.predicts = True
        logits, targets, lengths = said
        self.nats -= float(logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).double().sum())
        self.tokens += len(targets)
        hits = (logits.argmax(-1) == targets).float().split(lengths.tolist())
        self.right = torch.cat([self.right, torch.stack([hit.mean() for hit in hits]).nan_to_num().cpu()])

    def compare(self, rows: Tensor, expert: Answers) -> None:
        """Count how rows (N, C) agree with the expert's."""
        known = Answers(*(None if part is None else part.to(rows.device) for part in expert))  # type: ignore[arg-type]
        ours, theirs = coarsen(rows, known.classes), known.log_probabilities.float()
        nats = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours))
        self.divergence += float(nats.double().sum())
        same = (rows.argmax(-1) == known.best).float().cpu()
        self.agreed = torch.cat([self.agreed, same])
        self.rows += len(rows)

    def measures(self) -> dict[str, float]:
        """Return the measures that there are, agreement in [0, 1]."""
        measures = {}
        if self.tokens:
            measures["perplexity"] = math.exp(min(self.nats / self.tokens, 700.0))
        if self.rows:
            measures |= {"agreement": float(self.agreed.mean()), "KL": self.divergence / self.rows}
        return measures


def of_metrics(
    data: UnlabeledTasks, task: str, predictions: Tensor, labels: Tensor
) -> tuple[dict[str, float], dict[str, Measure]]:
    """Return what a task's metrics say of logits (N, C) or classes (N,), and how they are shown."""
    metrics = data.tasks[task].metrics
    where = f"data.tasks.{task}.metrics"
    values = {name: measure(metric, predictions, labels, f"{where}.{name}") for name, metric in metrics.items()}
    return values, {name: Measure("", metric.higher_is_better is False) for name, metric in metrics.items()}


@torch.no_grad()
def choose(outputs: OutputsOf, data: UnlabeledTasks, task: str, texts: Sequence[Text], device: torch.device) -> Tensor:
    """Return each text's choice of the largest log-likelihood per character, (B,), as lm-eval's ``acc_norm``."""
    pairs = [(text, choice) for text in texts for choice in text.choices]
    scores: list[float] = []
    for first in range(0, len(pairs), data.evaluation_batch_size):
        batch = pairs[first : first + data.evaluation_batch_size]
        samples = [data.input_of(replace(text, answer=choice)) for text, choice in batch]
        inputs = to(data.collate(samples), device)
        said = next_tokens(outputs(inputs, task), inputs)
        assert said is not None
        logits, targets, lengths = said
        nats = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).split(lengths.tolist())
        sizes = _sizes([choice for _, choice in batch])
        scores += [float(part.double().sum()) / size for part, size in zip(nats, sizes, strict=True)]
    parts = torch.tensor(scores, dtype=torch.float64).split([len(text.choices) for text in texts])
    return torch.stack([part.argmax() for part in parts])


def _sizes(choices: Sequence[str]) -> list[int]:
    return [max(1, len(choice.strip())) for choice in choices]


def single_tokens(data: UnlabeledTasks, texts: Sequence[Text]) -> list[Tensor] | None:
    """Return the choices (C,) of each text where all are one token after the same prompt, or None."""
    found = []
    for text in texts:
        if text.label is None or not text.choices or text.answer is not None:
            return None
        inputs = [data.input_of(replace(text, answer=answer)) for answer in (None, *text.choices)]
        ids = [sample["input_ids"] for sample in inputs if isinstance(sample, Mapping) and "_answer" in sample]
        if len(ids) < len(inputs) or not all(torch.equal(ids[0], sample[:-1]) for sample in ids[1:]):
            return None
        found.append(torch.stack([sample[-1] for sample in ids[1:]]))
    return found


def choose_token(logits: Tensor, inputs: Inputs, texts: Sequence[Text], tokens: Sequence[Tensor]) -> Tensor:
    """Return what :func:`choose` does, (B,), by the logits (B, S, V) of the prompts and choices of one token each."""
    assert isinstance(inputs, Mapping)
    present = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    last = (present * torch.arange(present.shape[1], device=present.device)).argmax(1)
    nats = logits[torch.arange(len(last)), last].float().log_softmax(-1).double().cpu()  # (B, V)
    rows = zip(nats, texts, tokens, strict=True)
    scores = [row[ids] / torch.tensor(_sizes(text.choices)) for row, text, ids in rows]
    return torch.stack([row.argmax() for row in scores])


@torch.no_grad()
def score_texts(
    outputs: OutputsOf,
    data: UnlabeledTasks,
    task: str,
    device: torch.device,
    experts: "ExpertAnswers | None" = None,
    on_batch: Callable[[int], None] | None = None,
) -> TaskScore | None:
    """Score a task's texts by what they have: choices and labels, answers, or next tokens alone.

    The score is a share of the texts: of right choices (``choice accuracy``), of answers that the model gives token for
    token when it takes the likeliest (``exact match``), or of next tokens that it would have said (``token accuracy``).

    Args:
        outputs: ``(inputs, task) -> Outputs``.
        data: Has the texts.
        task: Its name.
        device: Where inputs go.
        experts: What the experts say; None for no comparison.
        on_batch: Called with the number of texts of each batch once it is done.

    Returns:
        The score, with perplexity (of the answers, or of texts without) and agreement with the expert as measures; None
        for a network that predicts no tokens and texts with labels: they are scored as any inputs with labels are.

    Raises:
        InputError: If the texts have nothing to score by, and no expert to compare with.
    """
    if _is_classified(outputs, data, task, device):
        return None
    totals, texts, chosen = TextTotals(), texts_of(data, task), torch.zeros(0, dtype=torch.long)
    tokens = single_tokens(data, texts)
    answers = repeat(None) if experts is None else experts.of(task)
    for (inputs, labels), expert in zip(data.evaluation_loader(task), answers, strict=False):
        on_device = to(inputs, device)
        result = outputs(on_device, task)
        totals.add(result, on_device)
        if tokens is not None:
            part = slice(len(chosen), len(chosen) + len(labels))
            chosen = torch.cat([chosen, choose_token(result.logits, on_device, texts[part], tokens[part])])
        if expert is not None:
            totals.compare(result.rows(), expert)
        if on_batch is not None:
            on_batch(len(labels))
    if tokens is None and totals.predicts and all(text.choices and text.label is not None for text in texts):
        chosen = choose(outputs, data, task, texts, device)
    return _score(totals, texts, chosen, data, task)


def _is_classified(outputs: OutputsOf, data: UnlabeledTasks, task: str, device: torch.device) -> bool:
    """Whether a task's texts have labels, and the network, asked one text, predicts no tokens."""
    texts = texts_of(data, task)
    if not texts or any(text.label is None for text in texts):
        return False
    inputs = to(data.collate([data.input_of(texts[0])]), device)
    return next_tokens(outputs(inputs, task), inputs) is None


def _score(
    totals: "TextTotals",
    texts: Sequence[Text],
    chosen: Tensor,
    data: UnlabeledTasks,
    task: str,
) -> TaskScore:
    measures, is_generative = totals.measures(), totals.tokens > 0
    if len(chosen):
        measures.pop("perplexity", None)  # of questions
        labels = torch.tensor([text.label for text in texts])
        more, kinds = of_metrics(data, task, chosen, labels)
        right = chosen == labels
        return TaskScore(right.float().mean().item(), None, right, "choice accuracy", {**measures, **more}, kinds)
    if data.tasks[task].metrics:
        log.warning("data.tasks.%s.metrics: left out, as its texts have no labels to measure by.", task)
    if is_generative:
        is_answer = all(text.answer for text in texts)
        right = totals.right == 1 if is_answer else totals.right
        name = "exact match" if is_answer else "token accuracy"
        return TaskScore(right.float().mean().item(), None, right, name, measures)
    if "agreement" not in measures:
        raise InputError(
            f"data.tasks.{task}: expected texts with labels, or with an expert to compare with, found neither. Give "
            "labels, or set evaluate=false."
        )
    share = measures.pop("agreement")
    return TaskScore(share, None, totals.agreed, "agreement", measures)


class ExpertAnswers:
    """What each task's expert says of the texts to score, asked once: one expert in memory at a time.

    Experts that classify texts with labels are not asked.

    Args:
        model: Has the experts.
        data: Has the texts.
    """

    def __init__(self, model: MergedModel, data: UnlabeledTasks) -> None:
        self._answers: dict[str, list[Answers]] = {}
        for task in data.evaluation:
            if task in model.teachers and is_text(data, task):
                self._answers[task] = list(self._ask(model, data, task))

    @staticmethod
    @torch.no_grad()
    def _ask(model: MergedModel, data: UnlabeledTasks, task: str) -> Iterator[Answers]:
        params = model.raw_expert(model.teacher_of(task))

        def outputs_of(inputs: Inputs, task: str) -> Outputs:
            return model.outputs(inputs, task, params)

        if _is_classified(outputs_of, data, task, model.pool.device):
            return
        for inputs, _ in data.evaluation_loader(task):
            outputs = outputs_of(to(inputs, model.pool.device), task)
            answers = shorten_answers(outputs.rows(), KEPT)
            yield Answers(*(None if part is None else part.cpu() for part in answers))  # type: ignore[arg-type]

    def of(self, task: str) -> Iterator[Answers | None]:
        """Yield the answers to each batch of a task; None without end where no expert was asked."""
        return chain(self._answers[task]) if self._answers.get(task) else repeat(None)
