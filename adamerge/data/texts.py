"""Texts as a data set: prompts with answers, choices or labels, from files or records."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from adamerge.data.text_files import Record, read_records
from adamerge.errors import InputError, check_choice, did_you_mean, shorten

log = logging.getLogger(__name__)

Message = Mapping[str, str]

_PROMPTS = ("prompt", "messages", "text")
_FIELD = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Text:
    """A text; what a network makes of it is its backbone's matter.

    Attributes:
        prompt: What is given: a text, or the messages of a chat, each with ``role`` and ``content``.
        answer: What follows; None where that is not known.
        choices: Answers to choose from, in the order of the labels; () where there are none.
        label: Number of the right class or choice; None where that is not known.
    """

    prompt: str | tuple[Message, ...]
    answer: str | None = None
    choices: tuple[str, ...] = ()
    label: int | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is messages, for the tokenizer's chat template."""
        return not isinstance(self.prompt, str)


class Texts(Dataset[tuple[Text, int | None]]):
    r"""Texts of a file, as items (:class:`Text`, label).

    Records without a prompt, or with an empty one, are left out, and counted in a warning.

    Args:
        source: A file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.txt``, ``.parquet``), several, or records that are
            in memory already, such as a data set of the library ``datasets``.
        prompt: Field of the prompt, or a text with fields in braces, such as ``"{question}\nAnswer:"``; default the
            first of ``prompt``, ``messages`` and ``text`` that the records have. A list of messages is a chat; if
            the assistant's message ends it, and no field of answers is named, that is the answer.
        answer: Field of the answer, or a text with fields in braces; default ``answer`` where records have it.
        choices: Field of a list of answers to choose from, or several fields of one answer each; default ``choices``
            where records have it, else ``classes``.
        label: Field of the right class or choice, as its number or its name (of several fields of choices also the
            field's name); default ``label`` where records have it. Where there are choices and no label, an answer that
            is one of them is the label.
        classes: Names in the order of the labels; default the names among the labels, sorted.
        separator: Goes between a prompt and its answer or choices, unless there is white space already; never in chats.

    Attributes:
        classes: Names in the order of the labels; None where labels are numbers, or are not known.
        targets: The label of each text; None where not all are known.

    Raises:
        InputError: If a file cannot be read, a field is not there, or a record does not fit.

    Example:
        >>> Texts([{"question": "2 + 2", "answer": 4}], prompt="{question} =")[0]
        (Text(prompt='2 + 2 =', answer=' 4', choices=(), label=None), None)
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path] | Iterable[Record],
        *,
        prompt: str | None = None,
        answer: str | None = None,
        choices: str | Sequence[str] | None = None,
        label: str | None = None,
        classes: Sequence[str] | None = None,
        separator: str = " ",
    ) -> None:
        self._separator = separator
        self._places, records = _records(source)
        fields = _Fields(records[0] if records else {}, self._places[0] if records else "texts")
        self._prompt = prompt or next((name for name in _PROMPTS if name in fields.names), _PROMPTS[0])
        fields.check("prompt", self._prompt)
        self._answer = fields.optional("answer", answer)
        self._choices = fields.optional("choices", choices)
        self._label = fields.optional("label", label)
        self.classes = list(map(str, classes)) if classes is not None else self._names(records)
        texts = [self._text(record, place) for record, place in zip(records, self._places, strict=True)]
        kept = [number for number, text in enumerate(texts) if not _is_empty(text)]
        if not kept:
            found = f"{len(texts)} empty ones" if texts else "none"
            raise InputError(f"{self._places[0] if texts else _shown(source)}: expected texts, found {found}.")
        if len(kept) < len(texts):
            first = next(self._places[i] for i, text in enumerate(texts) if _is_empty(text))
            log.warning("%s: %d of %d prompts are empty and left out.", first, len(texts) - len(kept), len(texts))
        self._texts = [texts[number] for number in kept]
        self._places = [self._places[number] for number in kept]
        labels = [text.label for text in self._texts]
        self.targets = None if None in labels else labels

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> tuple[Text, int | None]:
        text = self._texts[index]
        return text, text.label

    def item_name(self, index: int) -> str:
        """Return the file and line of a text."""
        return self._places[index]

    def _names(self, records: Sequence[Record]) -> list[str] | None:
        """Return the names among the labels, sorted; None where they are numbers, or each text has choices."""
        if self._label is None or self._choices is not None:
            return None
        labels = {str(record[self._label]) for record in records if record.get(self._label) is not None}
        return None if all(map(_is_number, labels)) else sorted(labels)

    def _text(self, record: Record, place: str) -> Text:
        if self._prompt not in record and not _FIELD.search(self._prompt):
            raise InputError(f"{place}: no field {self._prompt!r}, as records before; fields: {shorten(record)}.")
        prompt = _value(record, self._prompt, place)
        text: str | tuple[Message, ...]
        answer = None if self._answer is None else _value(record, self._answer, place)
        if isinstance(prompt, (list, tuple)):
            text, last = _messages(prompt, place, takes_answer=self._answer is None)
            answer = last if self._answer is None else answer
        else:
            text = "" if prompt is None else _plain(prompt, place)
        options = self._options(record, place)
        answer = None if answer is None else _plain(answer, place)
        number = self._number(record, options, answer, place)
        answer = None if answer is None else self._apart(text, answer)
        return Text(text, answer, tuple(self._apart(text, option) for option in options), number)

    def _apart(self, prompt: str | tuple[Message, ...], following: str) -> str:
        """Return what follows a prompt, with the separator before it where there is no white space."""
        if not following or not isinstance(prompt, str) or prompt[-1:].isspace() or following[:1].isspace():
            return following
        return f"{self._separator}{following}"

    def _options(self, record: Record, place: str) -> tuple[str, ...]:
        if self._choices is None:
            return tuple(self.classes or ())
        if not isinstance(self._choices, str):
            return tuple(_plain(_value(record, field, place), place) for field in self._choices)
        value = _value(record, self._choices, place)
        if isinstance(value, str) and value.startswith("["):  # in a table
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        if not isinstance(value, (list, tuple)) or len(value) < 2:
            raise InputError(f"{place}: {self._choices}: expected a list of two answers or more, found {value!r}.")
        return tuple(_plain(choice, place) for choice in value)

    def _number(self, record: Record, options: Sequence[str], answer: str | None, place: str) -> int | None:
        """Return the number of the right class or choice, None where that is not known."""
        label = None if self._label is None else _value(record, self._label, place)
        fields = [] if self._choices is None or isinstance(self._choices, str) else list(self._choices)
        if label is None or label == "":
            return options.index(answer) if answer is not None and answer in options else None
        for names in (options, fields):
            if str(label) in names:
                return names.index(str(label))
        if not _is_number(label):
            raise InputError(
                f"{place}: {self._label}: expected one of {shorten(options) or 'the whole numbers from 0'}, found "
                f"{label!r}.{did_you_mean(str(label), options)}"
            )
        if options and not 0 <= int(label) < len(options):
            raise InputError(f"{place}: {self._label}: expected a number from 0 to {len(options) - 1}, found {label}.")
        return int(label)


class _Fields:
    """The fields of records, by which options are checked."""

    def __init__(self, record: Record, place: str) -> None:
        self.names, self._place = list(record), place

    def check(self, option: str, field: str) -> None:
        """Refuse an option that names a field which records lack, in braces or as a whole."""
        for name in _FIELD.findall(field) or [field]:
            if self.names and name not in self.names:
                hint = " The same choices for all texts are classes: [A, B]." if option == "choices" else ""
                raise InputError(
                    f"{self._place}: no field {name!r}.{did_you_mean(name, self.names)} Its fields: "
                    f"{shorten(self.names, 8)}; name one with {option}=FIELD.{hint}"
                )

    def optional(self, option: str, given: Any) -> Any:
        """Return the given field, or fields; by default the option's own name where records have that field."""
        if given is None:
            return option if option in self.names else None
        for field in [given] if isinstance(given, str) else given:
            self.check(option, field)
        return given


def _records(source: Any) -> tuple[list[str], list[Record]]:
    """Return the places and the contents of all records."""
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if all(isinstance(path, (str, Path)) for path in sources):
        files = [Path(path).expanduser() for path in sources]
        found = [(f"{file}, line {number}", record) for file in files for number, record in read_records(file)]
    else:
        found = []
        for number, record in enumerate(sources):
            if not isinstance(record, Mapping):
                raise InputError(f"record {number}: expected a mapping of fields, found {type(record).__name__}.")
            found.append((f"record {number}", record))
    return [place for place, _ in found], [record for _, record in found]


def _shown(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "texts"


def _value(record: Record, field: str, place: str) -> Any:
    """Return a field, or a text with fields in braces filled in; None where a record has no value there."""
    names = _FIELD.findall(field)
    if not names:
        return record.get(field)
    missing = [name for name in names if record.get(name) is None]
    if missing:
        raise InputError(f"{place}: no field {missing[0]!r}, which {field!r} names.")
    return _FIELD.sub(lambda match: str(record[match[1]]), field)


def _plain(value: Any, place: str) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{place}: expected a text, found {type(value).__name__} {str(value)[:40]!r}.")


def _messages(value: Sequence[Any], place: str, *, takes_answer: bool) -> tuple[tuple[Message, ...], str | None]:
    """Return a chat's messages, and the assistant's last one where that ends the chat and ``takes_answer`` is set."""
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f"{place}: expected messages with the texts role and content, found {str(message)[:60]}.")
        check_choice(f"{place}: role", message["role"], ("system", "user", "assistant", "tool", "developer"))
        messages.append({"role": message["role"], "content": message["content"]})
    if takes_answer and len(messages) > 1 and messages[-1]["role"] == "assistant":
        return tuple(messages[:-1]), messages[-1]["content"]
    return tuple(messages), None


def _is_empty(text: Text) -> bool:
    return not (text.prompt.strip() if isinstance(text.prompt, str) else text.prompt)


def _is_number(value: Any) -> bool:
    return not isinstance(value, (bool, float)) and str(value).lstrip("-").isdecimal()
