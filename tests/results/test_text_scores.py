"""Scores of texts are what plain loops over the tokens give, whatever is padded."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from adamerge import InputError
from adamerge.data import Task, Texts, UnlabeledTasks
from adamerge.data.batch import Outputs, pad
from adamerge.model.answers import coarsen, shorten_answers
from adamerge.results.evaluation import TableRow, summary
from adamerge.results.summary_table import table
from adamerge.results.text_scores import ExpertAnswers, score_texts

LETTERS = "abcdefgh "
TABLE = torch.randn(len(LETTERS), len(LETTERS), generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(len(LETTERS), len(LETTERS), generator=torch.Generator().manual_seed(1))


def tokens(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def preprocess(text):
    prompt, answer = tokens(text.prompt), tokens(text.answer or "")
    ids = torch.tensor([*prompt, *answer])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "_answer": torch.arange(len(ids)) >= len(prompt)}


def data_of(records, **options) -> UnlabeledTasks:
    task = Task(adapt=Texts(records, **options), evaluate=Texts(records, **options))
    return UnlabeledTasks({"a": task}, preprocess=preprocess, collate=pad, evaluation_batch_size=3)


def bigrams(logits):
    """A language model that looks at the last letter alone."""

    def outputs(inputs, task):
        mask = inputs["attention_mask"].bool()
        return Outputs(logits[inputs["input_ids"]], valid=mask[:, 1:] & mask[:, :-1])

    return outputs


def nats(text: str, start: int) -> list[float]:
    """The negative log-likelihoods of a text's letters from ``start`` on."""
    ids = tokens(text)
    return [-float(TABLE[ids[i - 1]].double().log_softmax(-1)[ids[i]]) for i in range(max(1, start), len(ids))]


def greedy(prompt: str, length: int) -> str:
    text = prompt
    for _ in range(length):
        text += LETTERS[int(TABLE[tokens(text)[-1]].argmax())]
    return text[len(prompt) :]


def score(records, model=TABLE, experts=None, outputs=None, **options):
    return score_texts(outputs or bigrams(model), data_of(records, **options), "a", torch.device("cpu"), experts)


def test_answers_are_scored_by_perplexity_and_exact_match():
    records = [{"prompt": p, "answer": a} for p, a in [("ab", "cde"), ("h", greedy("h", 4)), ("cab", greedy("cab", 1))]]
    result = score([*records, {"prompt": "bad", "answer": "gg"}], separator="")
    assert result.metric == "exact match"
    assert result.correct.tolist() == [False, True, True, False]
    parts = [nats(r["prompt"] + r["answer"], len(r["prompt"])) for r in [*records, {"prompt": "bad", "answer": "gg"}]]
    expected = math.exp(sum(map(sum, parts)) / sum(map(len, parts)))
    assert result.measures["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_texts_alone_are_scored_by_their_next_tokens():
    records = [{"text": "abc"}, {"text": "heed gab"}, {"text": "a"}]
    result = score(records)
    losses = [loss for r in records for loss in nats(r["text"], 0)]
    assert result.metric == "token accuracy"
    assert result.measures["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    hits = [greedy(before, 1) == after for before, after in zip("heed ga", "eed gab", strict=True)]
    assert result.correct[1:].tolist() == pytest.approx([sum(hits) / len(hits), 0.0])


def test_the_choice_is_the_likeliest_per_character():
    records = [
        {"prompt": p, "choices": c, "label": n}
        for p, c, n in [("ab", ["c", "dead beef"], 0), ("bead", ["had", "a", "feed"], 2), ("g", ["gag", "hahaha"], 1)]
    ]
    result = score(records)
    right = []
    for r in records:
        means = [sum(nats(f"{r['prompt']} {c}", len(r["prompt"]))) / len(c) for c in r["choices"]]
        right.append(means.index(min(means)) == r["label"])
    assert result.metric == "choice accuracy"
    assert result.correct.tolist() == right
    assert "perplexity" not in result.measures


def test_choices_of_one_token_are_read_off_the_pass_over_the_prompts():
    records = [{"prompt": p, "choices": list("bcdh"), "label": n % 4} for n, p in enumerate(("ab", "bead", "g", "cab"))]
    passes = []

    def counted(inputs, task):
        passes.append(inputs["input_ids"].shape)
        return bigrams(TABLE)(inputs, task)

    result = score(records, outputs=counted, separator="")
    best = ["bcdh"[int(TABLE[tokens(r["prompt"])[-1]][tokens("bcdh")].argmax())] for r in records]
    assert result.correct.tolist() == ["bcdh".index(b) == r["label"] for b, r in zip(best, records, strict=True)]
    assert len(passes) == 3  # a look at one text, and two batches
    two = [{**record, "choices": ["b", "c", "d", "hh"]} for record in records]  # two tokens: each choice has its own
    passes.clear()
    score(two, outputs=counted, separator="")
    assert len(passes) > 3


class Expert:
    """A model whose only expert is another table."""

    teachers = {"a": "one"}  # noqa: RUF012
    pool = SimpleNamespace(device=torch.device("cpu"))

    def teacher_of(self, task):
        return self.teachers[task]

    def raw_expert(self, expert):
        return OTHER

    def outputs(self, inputs, task, params):
        return bigrams(params)(inputs, task)


def test_agreement_with_the_expert_is_that_of_the_rows_without_padding():
    records = [{"text": "abc"}, {"text": "heed gab"}, {"text": "ab"}, {"text": "hag"}]
    experts = ExpertAnswers(Expert(), data_of(records))
    rows = [letter for r in records for letter in tokens(r["text"])[:-1]]
    theirs, ours = OTHER[rows].log_softmax(-1), TABLE[rows].log_softmax(-1)
    result = score(records, experts=experts)
    assert result.measures["KL"] == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-5)
    assert result.measures["agreement"] == pytest.approx(float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()))
    itself = score(records, model=OTHER, experts=experts)
    assert itself.measures["agreement"] == 1
    assert itself.measures["KL"] == pytest.approx(0, abs=1e-6)


def test_a_divergence_of_shortened_answers_is_a_lower_bound_that_grows_with_the_classes_kept():
    theirs, ours = torch.randn(2, 50, 30, generator=torch.Generator().manual_seed(2))

    def divergence(count):
        answers = shorten_answers(theirs, count)
        assert answers.log_probabilities.exp().sum(-1).allclose(torch.ones(50))
        mine = coarsen(ours, answers.classes)
        return float((answers.log_probabilities.exp() * (answers.log_probabilities - mine)).sum(-1).mean())

    values = [divergence(count) for count in (1, 4, 12, 28, None)]
    assert values == sorted(values)
    assert divergence(29) == divergence(None)  # one class alone is no bucket


def test_texts_with_nothing_to_score_by_are_refused():
    def classifier(inputs, task):
        return Outputs(torch.zeros(len(inputs["input_ids"]), 2))

    with pytest.raises(InputError, match="found neither"):
        score_texts(classifier, data_of([{"text": "abc"}]), "a", torch.device("cpu"))
    labelled = data_of([{"text": "abc", "label": 1}])
    assert score_texts(classifier, labelled, "a", torch.device("cpu")) is None  # a classifier's labels: as images are


def test_the_table_says_what_scores_and_measures_are():
    records = [{"text": "abc"}, {"text": "heed gab"}]
    result = score(records, experts=ExpertAnswers(Expert(), data_of(records)))
    content = json.loads(json.dumps(summary({"ours": TableRow({"a": result})}, "split")))
    assert content["metrics"] == {"a": "token accuracy"}
    assert content["measures"]["perplexity"] == {"unit": "", "lower_is_better": True}
    assert content["rows"]["ours"]["measures"]["KL"]["a"] == result.measures["KL"]
    shown = table(content)
    assert {"score, %", "perplexity ↓", "agreement, % ↑", "KL, nats ↓"} <= set(shown.header)
    assert "a: token accuracy" in shown.caption
