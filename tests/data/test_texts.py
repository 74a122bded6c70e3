"""Texts come out of every kind of file alike, and what is wrong with a file is said with its place."""

import json
import logging
import os

import pytest

from adamerge import InputError
from adamerge.data import Task, Text, Texts

RECORDS = [
    {"prompt": "Zwei und zwei sind", "answer": "vier"},
    {"prompt": 'Sie sagt: "nein, danke"\nund geht. Größe', "answer": "5"},
]


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(separator: str) -> str:
    lines = [f"prompt{separator}answer"]
    lines += [separator.join('"' + str(value).replace('"', '""') + '"' for value in r.values()) for r in RECORDS]
    return "\r\n".join(lines) + "\r\n"


def parquet(path) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    return [
        write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, RECORDS))),
        write(tmp_path / "a.json", json.dumps(RECORDS, indent=1, ensure_ascii=False)),
        write(tmp_path / "lines.json", "\n".join(map(json.dumps, RECORDS)) + "\n"),
        write(tmp_path / "a.csv", table(",")),
        write(tmp_path / "mark.csv", b"\xef\xbb\xbf" + table(",").encode()),
        write(tmp_path / "a.tsv", table("\t")),
        parquet(tmp_path / "a.parquet"),
    ]


def test_all_kinds_of_files_hold_the_same_texts(files, tmp_path):
    expected = [Text(r["prompt"], f" {r['answer']}") for r in RECORDS]
    for file in files:
        assert [text for text, _ in Texts(file)] == expected, file
    both = Texts([files[0], files[3]])
    assert len(both) == 4
    assert both.item_name(3) == f"{tmp_path / 'a.csv'}, line 4"
    assert [text for text, _ in Texts(RECORDS)] == expected


def test_lines_of_a_plain_file_are_prompts(tmp_path):
    texts = Texts(write(tmp_path / "a.txt", "one\n\n  two\r\n"))
    assert [text for text, _ in texts] == [Text("one"), Text("  two")]
    assert texts.item_name(1).endswith("a.txt, line 3")
    assert texts.targets is None


def test_fields_and_fields_in_braces_are_taken_by_name():
    records = [{"q": "2 + 2", "hint": 4, "a": 4}]
    (text, label) = Texts(records, prompt="{q} ({hint}) =", answer="\n{a}")[0]
    assert (text, label) == (Text("2 + 2 (4) =", "\n4"), None)


def test_a_separator_stands_where_there_is_no_white_space():
    def answers(prompt, **options):
        return Texts([{"prompt": prompt, "answer": "b"}], **options)[0][0].answer

    assert [answers("a"), answers("a "), answers("a", separator="")] == [" b", "b", "b"]
    assert answers([{"role": "user", "content": "a"}]) == "b"


def test_braces_reach_no_attribute_of_a_value():
    assert Texts([{"q": "x", "q.__class__": "plain"}], prompt="{q.__class__}")[0][0].prompt == "plain"


@pytest.mark.parametrize(("key", "label"), [("B", 1), ("0", 0), ("yes", 0), ("no", 1)])
def test_label_of_fields_of_choices_is_a_number_a_choice_or_a_fields_name(key, label):
    records = [{"prompt": "Is it?", "A": "yes", "B": "no", "key": key}]
    assert Texts(records, choices=["A", "B"], label="key")[0][1] == label


def test_prompt_that_a_later_record_lacks_is_refused_and_an_empty_one_left_out():
    with pytest.raises(InputError, match=r"record 1: no field 'prompt'.*question"):
        Texts([{"prompt": "a"}, {"question": "b"}])
    assert len(Texts([{"prompt": "a"}, {"prompt": ""}])) == 1


def test_labels_are_numbers_or_names_in_the_order_of_the_classes(tmp_path):
    records = [{"text": "fine", "label": "good"}, {"text": "poor", "label": "bad"}]
    sorted_names = Texts(records)
    assert (sorted_names.classes, sorted_names.targets) == (["bad", "good"], [1, 0])
    given = Texts(records, classes=["good", "bad"])
    assert given.targets == [0, 1]
    assert given[0][0].choices == (" good", " bad")
    assert Texts(write(tmp_path / "a.csv", "text,label\nfine,1\npoor,0\n")).targets == [1, 0]
    assert Task(dataset=sorted_names).class_names == ["bad", "good"]


@pytest.mark.parametrize(
    "record",
    [
        {"choices": ["x", "y"], "label": 1},
        {"choices": ["x", "y"], "label": "y"},
        {"choices": '["x", "y"]', "label": "1"},
        {"choices": ["x", "y"], "answer": "y"},
    ],
)
def test_choices_have_a_right_one(record):
    text, label = Texts([{"prompt": "Which?", **record}])[0]
    assert (text.choices, label) == ((" x", " y"), 1)


def test_choices_may_be_several_fields():
    text, label = Texts([{"prompt": "Which?", "A": "x", "B": 3, "key": 1}], choices=["A", "B"], label="key")[0]
    assert (text.choices, label) == ((" x", " 3"), 1)


def test_messages_are_a_chat_whose_last_one_may_be_the_answer():
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    text = Texts([{"messages": chat, "id": 1}])[0][0]
    assert text == Text((chat[0],), "Hi")
    assert text.is_chat
    assert Texts([{"prompt": chat[:1], "answer": "Ho"}])[0][0] == Text((chat[0],), "Ho")


def test_empty_prompts_are_left_out_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        texts = Texts([{"text": " "}, {"text": "a"}, {"text": None}])
    assert [text.prompt for text, _ in texts] == ["a"]
    assert "record 0: 2 of 3 prompts are empty" in caplog.text


REFUSED = {  # name of the file: content, options, what the message names
    "a.jsonl": ('{"prompt": "a"}\n{"prompt": ', {}, "line 2: not JSON"),
    "list.jsonl": ('["a"]\n', {}, "line 1: expected an object"),
    "field.jsonl": ('{"quest": "a"}\n', {}, "no field 'prompt'"),
    "answer.jsonl": ('{"prompt": "a", "anser": "b"}\n', {"answer": "answer"}, "Did you mean 'anser'?"),
    "brace.jsonl": ('{"prompt": "a"}\n', {"prompt": "{promt}:"}, "no field 'promt'"),
    "number.jsonl": ('{"prompt": {"a": 1}}\n', {}, "expected a text, found dict"),
    "label.jsonl": ('{"prompt": "a", "label": "c"}\n', {"classes": ["a", "b"]}, "line 1: label: expected one of"),
    "high.jsonl": ('{"prompt": "a", "choices": ["x", "y"], "label": 2}\n', {}, "from 0 to 1, found 2"),
    "one.jsonl": ('{"prompt": "a", "choices": ["x"]}\n', {}, "two answers or more"),
    "role.jsonl": ('{"messages": [{"role": "usr", "content": "a"}]}\n', {}, "Did you mean 'user'?"),
    "latin.csv": ("text\ngr\xf6\xdfer\n".encode("latin1"), {}, "expected UTF-8, found the byte 0xf6"),
    "wide.csv": ("text,label\none, two,1\n", {}, "line 2: expected 2 fields"),
    "quote.csv": ('text\n"one\n', {}, "not a table"),
    "a.parquet": (b"PAR1 no", {}, "not a Parquet file"),
    "a.xml": ("<a/>", {}, "expected one of .jsonl"),
    "empty.txt": ("\n\n", {}, "expected texts, found none"),
    "blank.jsonl": ('{"prompt": ""}\n', {}, "found 1 empty ones"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_with_a_file_is_said_in_one_line(name, tmp_path):
    content, options, message = REFUSED[name]
    with pytest.raises(InputError) as caught:
        Texts(write(tmp_path / name, content), **options)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing there"):
        Texts(tmp_path / "missing.jsonl")
    for name in ("pipe.jsonl", "pipe.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="found a named pipe"):
            Texts(tmp_path / name)
